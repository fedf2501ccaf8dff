# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Errors that users can solve, and other libraries' errors in one line, without a token."""

import contextlib
import re
from collections.abc import Iterable, Iterator

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


def listed(words: Iterable[str], most: int = 12) -> str:
    """Words in a message: the first `most`, and how many more there are."""
    words = list(words)
    return ", ".join(words[:most]) + (f" and {len(words) - most} more" if len(words) > most else "")


def without_token(text: str) -> str:
    """`text` with everything that is, or looks like, an access token replaced."""
    token = get_token()
    if token:
        text = text.replace(token, "***")
    return re.sub(r"\bhf_[A-Za-z0-9]{20,}", "***", text)


def error_text(error: BaseException) -> str:
    """An error's type and message in one line, without a token; also those of the errors that it was raised from.

    Some libraries say in the last error only that something failed, and what in the first.
    """
    texts = [_one_line(error)]
    while (error := error.__cause__) is not None:
        text = _one_line(error)
        if not any((text.partition(": ")[2] or text) in shown for shown in texts):
            texts.append(text)
    return without_token(". Cause: ".join(texts))


def _one_line(error: BaseException) -> str:
    message = " ".join(str(error).split())
    if len(message) > 400:  # some say at the end what is wrong
        message = f"{message[:250]} ... {message[-145:]}"
    return f"{type(error).__name__}: {message}" if message else type(error).__name__
