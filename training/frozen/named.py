# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""The kind of network that a name asks for, and errors that begin with the name."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from ..cli.errors import UserError, loading
from .classifier import EMBEDDED, is_saved


def kind_of(name: str) -> tuple[str, Path]:
    """The kind of network that `name` asks for, and its path.

    The kinds are "classifier" (a folder of training.features), "file", and "transformers" (a folder or Hub id).
    """
    path = Path(name) if os.path.exists(name) else EMBEDDED.get(name, Path(name))
    if is_saved(path):
        return "classifier", path
    is_file = path.is_file() or path.suffix in (".pt", ".pth", ".ts")
    return "file" if is_file else "transformers", path


@contextlib.contextmanager
def loading_network(what: str, choices: str) -> Iterator[None]:
    """Turn any error of the block into a UserError that begins with `what` and tells the `choices`."""
    with loading(what, choices):
        try:
            yield
        except UserError as error:
            raise UserError(f"{what} cannot be used: {error} {choices}") from error
