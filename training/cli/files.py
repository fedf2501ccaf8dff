# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Files and folders that are whole or not there; JSON that may be missing; a digest of a file or of weights."""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError

from .errors import UserError


# Errors of torch, safetensors and the system for a disk that refuses a write.
WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)


@contextlib.contextmanager
def atomic_folder(path: str) -> Iterator[str]:
    """Yield a new folder beside `path`; when the block ends well it becomes `path`, replacing a former one as a whole.

    If the block fails, nothing stays behind and the former folder is untouched. A disk that refuses the write is a
    UserError.
    """
    path = os.path.normpath(path)
    if os.path.isfile(path):
        raise UserError(f"{path} is a file, and stays; choose another folder.")
    parent, name = os.path.split(path)
    draft = os.path.join(parent, f".{name}.draft")
    former = os.path.join(parent, f".{name}.former")
    try:
        shutil.rmtree(draft, ignore_errors=True)
        os.makedirs(draft)
        yield draft
        if os.path.exists(path):
            shutil.rmtree(former, ignore_errors=True)
            os.rename(path, former)
        os.rename(draft, path)
    except WRITE_ERRORS as error:
        raise UserError(f"{path} could not be written: {error}. Its former content is unchanged.") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        if os.path.exists(former) and not os.path.exists(path):
            os.rename(former, path)  # the second rename failed, or a process was killed before it
        shutil.rmtree(former, ignore_errors=True)


def check_writable(folder: str) -> None:
    """Raise UserError if `folder` cannot be written, before long work and not after it. Leaves nothing behind."""
    path = Path(folder).absolute()
    existing = next(each for each in (path, *path.parents) if each.exists())
    try:
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error}. Choose another folder.") from error


@contextlib.contextmanager
def atomic_file(path: str) -> Iterator[str]:
    """Yield the name of a new file beside `path`; when the block ends well it is renamed to `path`."""
    parent, name = os.path.split(path)
    stem, extension = os.path.splitext(name)
    draft = os.path.join(parent, f".{stem}.draft{extension}")
    try:
        os.makedirs(parent or ".", exist_ok=True)
        yield draft
        os.replace(draft, path)
    except WRITE_ERRORS as error:
        raise UserError(f"{path} could not be written: {error}. Its former content is unchanged.") from error
    finally:
        if os.path.exists(draft):
            os.remove(draft)


def write_files(folder: str, files: dict[str, bytes]) -> None:
    """Write `files`, contents by name, into `folder`. All are written before the first replaces a former one."""
    with contextlib.ExitStack() as results:
        for name, content in files.items():
            Path(results.enter_context(atomic_file(os.path.join(folder, name)))).write_bytes(content)


def sha256(path: str | os.PathLike) -> str:
    """Hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def tensors_digest(tensors: Iterable[tuple[str, torch.Tensor]], prefix: str = "") -> bytes:
    """SHA-256 of `prefix` and of tensors with their names, in the order of the names."""
    digest = hashlib.sha256(prefix.encode())
    for name, tensor in sorted(tensors):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.digest()


def read_json(folder: str, name: str) -> dict:
    """The object in a JSON file of `folder`; empty if there is none or it cannot be read."""
    try:
        value = json.loads(Path(folder, name).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def write_json(value: dict, name: str, folder: str) -> None:
    """Write a JSON file to `folder`."""
    Path(folder, name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
