"""The Hub's client: access, retries, one commit at a time, checkpoints."""

import functools
import json
import os
import time
from collections.abc import Callable
from typing import TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, set_client_factory, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils._http import default_client_factory

from ..cli.errors import UserError, error_text, without_token
from ..cli.files import sha256
from .license import Licence, licence_in


Result = TypeVar("Result")

RETRY_WAITS = (2.0, 6.0, 20.0)  # seconds before the second and later attempts

TIMEOUT = 300.0  # seconds without a byte

LAST_CHECKPOINT = "last-checkpoint"  # its folder in a repository, as transformers' Trainer has it

MANIFEST = "files.json"


@functools.cache
def api() -> HfApi:
    """The client, with a limit on how long it waits for an answer: huggingface_hub itself waits for ever."""

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
    if isinstance(error, json.JSONDecodeError):  # not the Hub answered but something on the way
        return False
    return isinstance(error, (LocalTokenNotFoundError, ValueError, UserError))


def retried(action: Callable[[], Result], wait: Callable[[float], object] = time.sleep) -> Result:
    """The result of `action`, tried again after growing waits unless the Hub refuses it. Raises its last error.

    `wait(seconds)` returns something true to give up early.
    """
    for seconds in (*RETRY_WAITS, None):
        try:
            return action()
        except Exception as error:
            if seconds is None or is_refusal(error) or wait(seconds):
                raise
    raise AssertionError("not reached")


# Access ---------------------------------------------------------------------------------------------------------------


def open_repo(repo: str, private: bool) -> None:
    """Create the model repository if it is not there, and check that this token may write to it.

    Raises UserError if the Hub refuses; other errors mean that it cannot be reached now.
    """
    try:
        api().whoami()
        api().create_repo(repo, private=private or None, exist_ok=True)
        api().auth_check(repo, write=True)
        if private and not api().model_info(repo).private:
            raise UserError(
                f"{repo} exists on the Hub and is public; asking for a private one does not hide it. Make it private in its settings, "
                "choose another name, or leave the option out."
            )
    except UserError:
        raise
    except Exception as error:
        if is_refusal(error):
            raise UserError(
                f"The Hub refuses {repo}: {error_text(error)}. Log in with `hf auth login` or set HF_TOKEN to a token that may write, and "
                "name a repository of your own as user/name."
            ) from error
        raise


# Cards and licences ---------------------------------------------------------------------------------------------------


def read_card(repo: str, revision: str | None = None) -> str | None:
    """README.md of a repository, maybe as the cache has it if the Hub does not answer; None if the repository has none."""
    try:
        with open(api().hf_hub_download(repo, "README.md", revision=revision), encoding="utf-8", newline="") as file:
            return file.read()
    except LocalEntryNotFoundError:  # neither the Hub nor the cache says
        raise
    except EntryNotFoundError:
        return None


def present_card(repo: str, revision: str | None = None) -> str | None:
    """README.md as it is on the Hub now, None if there is none. Raises if the Hub does not answer: the cache may have an older one."""
    return read_card(repo, api().model_info(repo, revision=revision).sha)


def file_of(source: str, name: str) -> str | None:
    """Local path of the file `name` in a folder or a repository on the Hub; None if there is no such file, or no way to get it."""
    if os.path.isdir(source):
        path = os.path.join(source, name)
        return path if os.path.isfile(path) else None
    try:
        return api().hf_hub_download(source, name)
    except EntryNotFoundError:  # also while offline
        return None


def card_licence(repo: str, revision: str | None = None) -> Licence | None:
    """The licence in the card of a repository; None if there is none or it cannot be read."""
    try:
        text = read_card(repo, revision)
        return None if text is None else licence_in(text)
    except Exception:  # not on the Hub, offline
        return None


def commit_of(repo: str, revision: str | None = None) -> str | None:
    """The commit that a revision is now; None if it cannot be found out."""
    try:
        return api().model_info(repo, revision=revision).sha
    except Exception:
        return None


# Commits --------------------------------------------------------------------------------------------------------------


def files_below(folder: str) -> dict[str, str]:
    """Local path of every file in `folder`, by its path in there with forward slashes."""
    found = {}
    for parent, _, names in os.walk(folder):
        for name in sorted(names):
            path = os.path.join(parent, name)
            found[os.path.relpath(path, folder).replace(os.sep, "/")] = path
    return found


def commit_folder(
    repo: str,
    folder: str,
    message: str,
    replaced: tuple[str, ...] = (),
    revision: str | None = None,
) -> str:
    """Upload `folder` in one commit, so that a reader sees all of it or what was there before; return its address.

    Large files go first and are not sent again if this is repeated. (`upload_folder` splits large folders into several commits.)

    Args:
        replaced: folders in the repository that hold afterwards what `folder` has in them, and nothing else.
    """
    files = files_below(folder)
    refuse_secrets(files)
    present = api().list_repo_files(repo, revision=revision)
    old = [path for path in present if path not in files and path.startswith(tuple(f"{name}/" for name in replaced))]
    operations = [CommitOperationAdd(path, local) for path, local in files.items()]
    operations += [CommitOperationDelete(path) for path in old]
    return api().create_commit(repo, operations, commit_message=message, revision=revision).commit_url


def refuse_secrets(files: dict[str, str]) -> None:
    """Raise UserError if a text file holds this user's token, or what looks like one."""
    for path, local in files.items():
        if path.endswith((".json", ".md", ".py", ".txt", ".yaml")):
            with open(local, encoding="utf-8", errors="replace") as file:
                text = file.read()
            if without_token(text) != text:
                raise UserError(f"{path} holds an access token of the Hub; nothing was uploaded. Remove it there.")


# Checkpoints ----------------------------------------------------------------------------------------------------------


def write_manifest(folder: str) -> None:
    """Write down sizes and SHA-256 of the files of a checkpoint, so that a download can be checked."""
    files = {
        path: [os.path.getsize(local), sha256(local)] for path, local in files_below(folder).items() if path != MANIFEST
    }
    with open(os.path.join(folder, MANIFEST), "w", encoding="utf-8") as file:
        json.dump(files, file, indent=1)


def download_checkpoint(repo: str) -> str:
    """The folder of a repository's `last-checkpoint`, downloaded whole and checked. Raises UserError."""
    try:
        sha = api().model_info(repo).sha  # one commit, even if another is pushed meanwhile
        snapshot = retried(lambda: snapshot_download(repo, revision=sha, allow_patterns=f"{LAST_CHECKPOINT}/*"))
    except RepositoryNotFoundError as error:
        raise UserError(
            f"--resume_from_checkpoint {repo} is neither a checkpoint folder of this program, nor 'latest', nor a repository on the Hub that "
            "this token may read."
        ) from error
    except Exception as error:
        raise UserError(
            f"--resume_from_checkpoint {repo} cannot be downloaded: {error_text(error)}. Run the same command again; what has arrived is kept."
        ) from error
    folder = os.path.join(snapshot, LAST_CHECKPOINT)
    try:
        with open(os.path.join(folder, MANIFEST), encoding="utf-8") as file:
            wanted = {path: (size, digest) for path, (size, digest) in json.load(file).items()}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"--resume_from_checkpoint {repo} has no checkpoint of this program: a run with --hub_strategy checkpoint uploads its newest to "
            f"{LAST_CHECKPOINT}."
        ) from error
    found = files_below(folder)
    broken = [
        path
        for path, (size, digest) in wanted.items()
        if path not in found or os.path.getsize(found[path]) != size or sha256(found[path]) != digest
    ]
    broken += sorted(set(found) - set(wanted) - {MANIFEST})
    if broken or "run_state.pt" not in wanted:
        raise UserError(
            f"--resume_from_checkpoint {repo} is not what was uploaded: {', '.join(broken[:3]) or 'run_state.pt is missing'}. Remove "
            f"{snapshot} and try again, or resume from another checkpoint."
        )
    return folder
