# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Files that are whole or not there."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_aside(path: Path, overwrite: bool = True) -> Iterator[Path]:
    """A place to write to, in the folder of `path`, which is made. It gets that name when the block has ended well.

    Raises FileExistsError for a file that exists, or was made meanwhile, unless `overwrite` is set.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        yield aside
        if not overwrite:
            path.touch(exist_ok=False)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
