"""Read torch.save, safetensors and pickle files of any age."""

import os
import struct
import zipfile
from typing import Any

import safetensors.torch
import torch

from ..cli.errors import UserError
from .pickles import BROKEN, LEGACY_MAGIC, _Budget, _Machine, _read_legacy, _Reader, _Refused, _short, _Storage


MAX_DIRECTORY = 2**23  # bytes of a zip file's list of entries; 10,000 tensors need 1 MB


def _sliced(data: torch.UntypedStorage, start: int, length: int) -> torch.UntypedStorage:
    """Bytes of the mapped file: a view, or a copy where they are not aligned as tensors must be."""
    part = data[start : start + length]
    return part if start % 16 == 0 else part.clone()


def _read_zip(path: str, data: torch.UntypedStorage, view: memoryview) -> Any:
    """torch.save since 1.6: an uncompressed zip file with one pickle and one entry for each storage."""
    if _directory_size(view) > MAX_DIRECTORY:
        raise _Refused("its list of entries is larger than any checkpoint's")
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        if len(entries) != len(archive.infolist()):
            raise _Refused("two of its entries have the same name")
    pickles = [name for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
    prefix = pickles[0].removesuffix("data.pkl") if len(pickles) == 1 else ""
    if not prefix or prefix in ("/", "./", "../"):
        raise _Refused("it is a zip file, but none of torch.save")
    if f"{prefix}constants.pkl" in entries:
        raise _Refused("it is a TorchScript program, not a checkpoint")
    budget, storages = _Budget(len(view)), {}

    def place(name: str) -> tuple[int, int]:
        """Start and length of an entry in the file. Names are looked up, never opened."""
        entry = entries.get(name)
        if entry is None:
            raise _Refused(f"its entry {_short(name)} is missing")
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 or entry.file_size != entry.compress_size:
            raise _Refused("its entries are compressed or encrypted, and torch.save does neither")
        header = bytes(view[entry.header_offset : entry.header_offset + 30])
        if len(header) != 30 or header[:4] != b"PK\3\4":
            raise _Refused(BROKEN)
        start = entry.header_offset + 30 + sum(struct.unpack("<HH", header[26:]))
        if start + entry.file_size > len(view):
            raise _Refused("it is truncated")
        return start, entry.file_size

    def storage(dtype: torch.dtype | None, key: str, count: int) -> _Storage:
        if key not in storages:
            start, length = place(f"{prefix}data/{key}")
            if start % 16:
                budget.copy(length)
            storages[key] = _sliced(data, start, length)
        if count * (dtype.itemsize if dtype else 1) > storages[key].nbytes():
            raise _Refused(f"a storage of {count} elements has {storages[key].nbytes()} bytes")
        return _Storage(storages[key], dtype)

    if f"{prefix}byteorder" in entries:
        start, length = place(f"{prefix}byteorder")
        if bytes(view[start : start + min(length, 10)]) != b"little":
            raise _Refused("it is big-endian")
    start, length = place(f"{prefix}data.pkl")
    return _Machine(budget, storage).run(_Reader(view[start : start + length]))


def _directory_size(view: memoryview) -> int:
    """Bytes of a zip file's list of entries, from the record that `zipfile` goes by."""
    tail = bytes(view[-66_000:])
    end = tail.rfind(b"PK\5\6")
    if end < 0:
        raise _Refused("it is a zip file whose end is missing: the download was cut off")
    if end >= 76 and tail[end - 20 : end - 16] == b"PK\6\7" and tail[end - 76 : end - 72] == b"PK\6\6":
        return struct.unpack_from("<Q", tail, end - 76 + 40)[0]
    return struct.unpack_from("<I", tail, end + 12)[0]


def _is_safetensors(view: memoryview) -> bool:
    length = int.from_bytes(bytes(view[:8]), "little")
    return len(view) > 9 and 2 <= length <= len(view) - 8 and bytes(view[8:9]) == b"{"


def _read_safetensors(path: str) -> dict[str, torch.Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise _Refused(f"it is no whole safetensors file ({error})") from error


def _is_legacy(view: memoryview) -> bool:
    """Whether the file begins with the magic number of old torch.save, in any protocol."""
    try:
        return _Machine(_Budget(0)).run(_Reader(view[:64])) == LEGACY_MAGIC
    except Exception:  # it begins with some other pickle, cut off here
        return False


def _read(path: str) -> Any:
    size = os.path.getsize(path)
    if size == 0:
        raise _Refused("it is empty")
    data = torch.UntypedStorage.from_file(os.fspath(path), False, size)
    view = memoryview(torch.empty(0, dtype=torch.uint8).set_(data).numpy())
    head = bytes(view[:512])
    if head.startswith(b"PK"):
        return _read_zip(path, data, view)
    if _is_safetensors(view):
        return _read_safetensors(path)
    if head[257:262] == b"ustar":
        raise _Refused("it is a tar archive")
    if head.startswith(b"version https://git-lfs"):
        raise _Refused("it is a pointer of git-lfs in the place of the file: run `git lfs pull`")
    if head.lstrip().startswith(b"<"):
        raise _Refused("it is a web page in the place of the file: the download failed")
    if _is_legacy(view):
        return _read_legacy(view, _Budget(size))
    return _Machine(_Budget(size)).run(_Reader(view))


def read_checkpoint(path: str | os.PathLike) -> Any:
    """What the file `path` holds: nested dicts, lists, tuples and sets of tensors and plain values. Nothing of it is run.

    Reads files of torch.save of any version, safetensors, and pickles, NVIDIA's included. Parameters and numpy arrays become tensors,
    OrderedDict and the like dict, devices text, and objects of the classes that NVIDIA's files and torch.nn have `Record`s.
    Tensors keep their strides and share storages as they were saved. Storages of torch.save's present format are parts of the mapped
    file: they take memory when they are read, and changing them does not change the file.

    Raises:
        UserError: the file is not there, broken, truncated, none of these formats, names anything else, or would take more memory
            than its size warrants.
    """
    try:
        return _read(os.fspath(path))
    except _Refused as error:
        reason = str(error)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error
    except Exception as error:  # what a broken pickle makes of the interpreter: IndexError, KeyError, struct.error, ...
        reason, text = BROKEN, str(error)[:200]
        if text:
            reason += f" ({type(error).__name__}: {text})"
    raise UserError(
        f"{path} cannot be read: {reason}. Nothing of it was run. Readable are files of torch.save, safetensors, and pickles of tensors "
        "and plain values; if you trust this one, load it with its own software and save its state dict with safetensors."
    )
