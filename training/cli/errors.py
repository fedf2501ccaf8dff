# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Errors that users can solve, and other libraries' errors in one line, without a token."""

import contextlib
import re
from collections.abc import Iterator

from huggingface_hub import get_token


class UserError(Exception):
    """A problem that the user can solve; its message says how. Printed without a traceback."""


@contextlib.contextmanager
def loading(what: str, advice: str = "") -> Iterator[None]:
    """Turn any error of the block into a UserError that says that `what` cannot be loaded, and `advice`.

    Files of strangers make huggingface_hub, safetensors, diffusers, transformers and torch raise errors of many kinds.
    A UserError passes as it is.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{what} cannot be loaded. {advice}".rstrip() + f"\n{error_text(error)}") from error


@contextlib.contextmanager
def naming(option: str) -> Iterator[None]:
    """Let every UserError of the block begin with the option that it is about."""
    try:
        yield
    except UserError as error:
        raise UserError(f"--{option}: {error}") from error


def without_token(text: str) -> str:
    """`text` with everything that is, or looks like, an access token replaced."""
    token = get_token()
    if token:
        text = text.replace(token, "***")
    return re.sub(r"\bhf_[A-Za-z0-9]{20,}", "***", text)


def error_text(error: BaseException) -> str:
    """An error's type and message in one line, without a token."""
    return without_token(f"{type(error).__name__}: {' '.join(str(error).split())[:400]}")
