# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""A checkpoint from a path, the Hub or an https address."""

import http.client
import os
import shutil
import urllib.parse
import urllib.request

from huggingface_hub import hf_hub_download
from tqdm.auto import tqdm

from ..cli.errors import UserError, loading
from ..cli.names import is_address, public_name


def shown(source: str) -> str:
    """`source` as it may be shown and recorded; a file on the Hub keeps its whole name."""
    return public_name(source) if is_address(source) or os.path.exists(source) else source


def fetch(source: str, revision: str | None, folder: str) -> str:
    """The path of the checkpoint `source`, downloaded into `folder` if it is an address.

    Raises UserError if it is not there, or if its name cannot be a path, a file on the Hub or an address.
    """
    if is_address(source):
        return download(source, folder)
    if os.path.isfile(source):
        return source
    if os.path.isdir(source):
        raise UserError(f"SOURCE {source} is a folder; pass the checkpoint's file, or --to official for a pipeline.")
    parts = source.split("/")
    if len(parts) < 3 or not all(parts) or parts[0] in (".", "..", "~"):
        raise UserError(
            f"SOURCE {source} is not there. Pass a file, a file on the Hub as user/repo/file.pt, or an https address."
        )
    with loading(f"SOURCE {source}", "It is no file on this disk, and the Hub does not give it."):
        return hf_hub_download("/".join(parts[:2]), "/".join(parts[2:]), revision=revision)


def check_address(address: str, local: bool = True) -> None:
    """Raise UserError unless `address` is https without a password, or (if `local`) http on this machine."""
    parts = urllib.parse.urlsplit(address)
    if parts.scheme != "https" and not (local and parts.scheme == "http" and parts.hostname == "127.0.0.1"):
        raise UserError(f"SOURCE {public_name(address)} is no https address; others are not downloaded.")
    if "@" in parts.netloc:
        raise UserError(
            f"SOURCE {public_name(address)} has a user or a password in its address, which is not supported."
        )


class _OnlySecure(urllib.request.HTTPRedirectHandler):
    """Follows a redirection to https only: no website reaches what is served on this machine."""

    def redirect_request(self, request, file, code, message, headers, address):
        check_address(address, local=request.type == "http")
        return super().redirect_request(request, file, code, message, headers, address)


def download(address: str, folder: str) -> str:
    """Fetch `address` into `folder`; return the file's path.

    torch.hub.download_url_to_file does not serve: it has no timeout, follows any redirection, and keeps a file that
    broke off.
    """
    check_address(address)
    path, name = os.path.join(folder, "download"), public_name(address)
    try:
        answer = urllib.request.build_opener(_OnlySecure).open(address, timeout=60)
        expected = answer.length
        with (
            tqdm.wrapattr(answer, "read", total=expected, desc=os.path.basename(name)) as stream,
            open(path, "wb") as file,
        ):
            shutil.copyfileobj(stream, file)
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = (
            error if isinstance(error, OSError) else type(error).__name__
        )  # others repeat the address, query and all
        raise UserError(
            f"SOURCE {name} cannot be downloaded: {reason}. Is the address right? Spaces are written as %20."
        ) from error
    if expected not in (None, os.path.getsize(path)):
        raise UserError(f"SOURCE {name} broke off after {os.path.getsize(path):,} of {expected:,} bytes. Try again.")
    return path
