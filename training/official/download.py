"""A checkpoint from a path, the Hub or an https address (torch.hub.download_url_to_file)."""

import http.client
import os
import urllib.error
import urllib.parse
import urllib.request

from huggingface_hub import hf_hub_download
from tqdm.auto import tqdm

from ..cli.errors import UserError, error_text
from ..cli.names import is_address, public_name


MAX_DOWNLOAD = 2**35  # bytes

CHUNK = 2**20


def shown(source: str) -> str:
    """`source` as it may be shown and recorded; a file on the Hub keeps its whole name."""
    return public_name(source) if is_address(source) or os.path.exists(source) else source


def fetch(source: str, revision: str | None, folder: str) -> str:
    """The path of the checkpoint `source`, downloaded into `folder` if it is an address.

    Raises UserError if it is not there, or its name could be none of the three.
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
    try:
        return hf_hub_download("/".join(parts[:2]), "/".join(parts[2:]), revision=revision)
    except Exception as error:  # huggingface_hub raises many kinds
        raise UserError(
            f"SOURCE {source} is neither a file here nor one that can be had from the Hub: {error_text(error)}"
        ) from error


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
    """Follows a redirection to https only, or on this machine if it comes from there: no website reaches what is served here."""

    def redirect_request(self, request, file, code, message, headers, address):
        check_address(address, local=request.type == "http")
        return super().redirect_request(request, file, code, message, headers, address)


def download(address: str, folder: str) -> str:
    """Fetch `address` into `folder`; return the file's path. UserError if it does not come whole."""
    check_address(address)
    path = os.path.join(folder, "download")
    name = public_name(address)
    try:
        with urllib.request.build_opener(_OnlySecure).open(address, timeout=60) as answer, open(path, "wb") as file:
            announced = answer.headers.get("Content-Length")
            expected = int(announced) if announced is not None else None
            received = 0
            with tqdm(total=expected, unit="B", unit_scale=True, desc=os.path.basename(name)) as progress:
                while chunk := answer.read(CHUNK):
                    received += len(chunk)
                    if received > MAX_DOWNLOAD:
                        raise UserError(f"SOURCE {name} is larger than {MAX_DOWNLOAD / 2**30:.0f} GiB.")
                    file.write(chunk)
                    progress.update(len(chunk))
    except http.client.InvalidURL as error:  # whose text repeats the address, query and all
        raise UserError(f"SOURCE {name} is no proper address; spaces, for instance, are written as %20.") from error
    except (OSError, http.client.HTTPException, ValueError) as error:  # URLError is an OSError
        reason = f"{error.code} {error.reason}" if isinstance(error, urllib.error.HTTPError) else error
        raise UserError(f"SOURCE {name} cannot be downloaded: {reason}.") from error
    if expected is not None and received != expected:
        raise UserError(f"SOURCE {name} broke off after {received:,} of {expected:,} bytes. Try again.")
    return path
