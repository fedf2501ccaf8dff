# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""The Hub's client: access, retries, one commit at a time, checkpoints."""

import functools
import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, set_client_factory, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
)
from huggingface_hub.utils._http import default_client_factory

from ..cli.errors import UserError, error_text, loading, without_token
from ..cli.files import read_json, sha256
from .license import License, license_in


Result = TypeVar("Result")

RETRY_WAITS = (2.0, 6.0, 20.0)  # seconds before the second and later attempts

TIMEOUT = 300.0  # seconds without a byte

LAST_CHECKPOINT = "last-checkpoint"  # its folder in a repository, as transformers' Trainer has it

MANIFEST = "files.json"


@functools.cache
def api() -> HfApi:
    """The client, with a limit on how long it waits for an answer: huggingface_hub itself waits forever."""

    def client():
        made = default_client_factory()
        made.timeout = TIMEOUT
        return made

    set_client_factory(client)
    return HfApi(library_name="diffusers-ctm")


def is_refusal(error: BaseException) -> bool:
    """Whether trying again cannot help: a wrong token, name or content, not a Hub that is down or busy."""
    if isinstance(error, HfHubHTTPError):
        status = getattr(error.response, "status_code", 500)
        return 400 <= status < 500 and status not in (408, 409, 412, 425, 429)
    garbled = isinstance(error, json.JSONDecodeError)  # something on the way answered, not the Hub
    return isinstance(error, (LocalTokenNotFoundError, ValueError, UserError)) and not garbled


def retried(action: Callable[[], Result], wait: Callable[[float], object] = time.sleep) -> Result:
    """The result of `action`, tried again after growing waits unless the Hub refuses it. Raises its last error.

    `wait(seconds)` returns something true to give up early.
    """
    for seconds in RETRY_WAITS:
        try:
            return action()
        except Exception as error:
            if is_refusal(error) or wait(seconds):
                raise
    return action()


# Access ---------------------------------------------------------------------------------------------------------------


def open_repo(repo: str, private: bool) -> None:
    """Create the model repository if it is not there, and check that this token may write to it.

    Raises UserError if the Hub refuses; other errors mean that it cannot be reached now.
    """
    try:
        api().create_repo(repo, private=private or None, exist_ok=True)
        api().auth_check(repo, write=True)
        exposed = private and not api().model_info(repo).private
    except Exception as error:
        if not is_refusal(error):
            raise
        raise UserError(
            f"The Hub refuses {repo}: {error_text(error)}. Log in with `hf auth login` or set HF_TOKEN to a token that "
            "may write, and name a repository of your own as user/name."
        ) from error
    if exposed:
        raise UserError(
            f"{repo} exists on the Hub and is public; asking for a private one does not hide it. Make it private in "
            "its settings, choose another name, or leave the option out."
        )


# What repositories hold -----------------------------------------------------------------------------------------------


def read_card(repo: str, revision: str | None = None) -> str | None:
    """README.md of a repository; None if it has none. The cache answers for a Hub that does not."""
    try:
        return Path(api().hf_hub_download(repo, "README.md", revision=revision)).read_bytes().decode()
    except LocalEntryNotFoundError:  # neither the Hub nor the cache answers
        raise
    except EntryNotFoundError:
        return None


def file_of(source: str, name: str) -> str | None:
    """Local path of the file `name` in a folder or a repository on the Hub; None if it is not there or not reached."""
    if os.path.isdir(source):
        path = os.path.join(source, name)
        return path if os.path.isfile(path) else None
    try:
        return api().hf_hub_download(source, name)
    except EntryNotFoundError:  # also while offline
        return None


def card_license(repo: str, revision: str | None = None) -> License | None:
    """The license in the card of a repository; None if there is none or it cannot be read."""
    try:
        return license_in(read_card(repo, revision) or "")
    except Exception:  # not on the Hub, offline
        return None


def commit_of(repo: str, revision: str | None = None) -> str | None:
    """The commit that a revision is now; None if the Hub does not answer. A commit is itself, and nobody is asked."""
    if re.fullmatch("[0-9a-f]{40}", revision or ""):
        return revision
    try:
        return api().model_info(repo, revision=revision).sha
    except Exception:  # not on the Hub, offline
        return None


# Commits --------------------------------------------------------------------------------------------------------------


def files_below(folder: str) -> dict[str, str]:
    """Local path of every file in `folder`, by its path in there with forward slashes."""
    paths = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): str(path) for path in paths}


def commit_folder(repo: str, folder: str, message: str, parent: str, revision: str | None = None) -> str:
    """Upload `folder` in one commit after `parent`, so that a reader sees all of it or that; return its address.

    The Hub refuses it (412) if there is another commit after `parent` by then.
    Large files go first and are not sent again if this is repeated. (`upload_folder` splits large folders into several
    commits.) The folders in it replace those of the repository; only files in `evaluation` stay there.
    """
    files = files_below(folder)
    refuse_secrets(files)
    folders = tuple(f"{path.split('/')[0]}/" for path in files if "/" in path and not path.startswith("evaluation/"))
    present = api().list_repo_files(repo, revision=parent)
    operations = [CommitOperationAdd(path, local) for path, local in files.items()]
    operations += [CommitOperationDelete(path) for path in present if path not in files and path.startswith(folders)]
    options = {"commit_message": message, "revision": revision, "parent_commit": parent}
    return api().create_commit(repo, operations, **options).commit_url


def refuse_secrets(files: dict[str, str]) -> None:
    """Raise UserError if a text file holds this user's token, or what looks like one."""
    for path, local in files.items():
        if path.endswith((".json", ".md", ".py", ".txt", ".yaml")):
            text = Path(local).read_text(encoding="utf-8", errors="replace")
            if without_token(text) != text:
                raise UserError(f"{path} holds an access token of the Hub; nothing was uploaded. Remove it there.")


# Checkpoints ----------------------------------------------------------------------------------------------------------


def manifest(folder: str) -> dict[str, list]:
    """Size and SHA-256 of the files of a checkpoint, so that a download can be checked."""
    files = files_below(folder)
    return {path: [os.path.getsize(local), sha256(local)] for path, local in files.items() if path != MANIFEST}


def download_checkpoint(repo: str) -> str:
    """The folder of a repository's `last-checkpoint`, downloaded whole and checked. Raises UserError."""
    option = f"--resume_from_checkpoint {repo}"
    with loading(option, "Run the same command again; what has arrived is kept."):
        if not api().repo_exists(repo):
            raise UserError(
                f"{option} is neither a checkpoint folder of this program, nor 'latest', nor a repository on the Hub "
                "that this token may read."
            )
        commit = api().model_info(repo).sha  # one commit, even if another is pushed meanwhile
        snapshot = retried(lambda: snapshot_download(repo, revision=commit, allow_patterns=f"{LAST_CHECKPOINT}/*"))
    folder = os.path.join(snapshot, LAST_CHECKPOINT)
    uploaded, present = read_json(folder, MANIFEST), manifest(folder)
    if "run_state.pt" not in uploaded:
        raise UserError(
            f"{option} has no checkpoint of this program: a run with --hub_strategy checkpoint uploads its newest to "
            f"{LAST_CHECKPOINT}."
        )
    broken = sorted(path for path in uploaded | present if uploaded.get(path) != present.get(path))
    if broken:
        raise UserError(
            f"{option} is not what was uploaded: {', '.join(broken[:3])}. Remove {snapshot} and try again, or resume "
            "from another checkpoint."
        )
    return folder
