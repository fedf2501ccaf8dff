# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Read files of torch.save of any age, pickles and safetensors."""

import io
import os
import struct
import zipfile
from typing import Any

import safetensors.torch
import torch

from ..cli.errors import UserError
from .pickles import Budget, Reader, Refused, read_pickle, short


MAX_DIRECTORY = 2**23  # bytes of a zip file's list of entries; 10,000 tensors need 1 MB


class _Zip:
    """A file of torch.save since 1.6: an uncompressed zip file with one pickle and one entry for each storage.

    The storages are parts of the mapped file.
    """

    def __init__(self, path: str):
        self.size = os.path.getsize(path)
        self.data = torch.UntypedStorage.from_file(path, False, self.size)
        self.view = memoryview(torch.empty(0, dtype=torch.uint8).set_(self.data).numpy())
        self.budget, self.storages = Budget(self.size), {}
        if self._directory_size() > MAX_DIRECTORY:
            raise Refused("its list of entries is larger than any checkpoint's")
        with zipfile.ZipFile(path) as archive:
            self.entries = {entry.filename: entry for entry in archive.infolist()}
            if len(self.entries) != len(archive.infolist()):
                raise Refused("two of its entries have the same name")

    def _directory_size(self) -> int:
        """Bytes of the list of entries, from the record that `zipfile` goes by."""
        tail = bytes(self.view[-66_000:])
        end = tail.rfind(b"PK\5\6")
        if end < 0:
            raise Refused("it is a zip file whose end is missing: the download was cut off")
        if end >= 76 and tail[end - 20 : end - 16] == b"PK\6\7" and tail[end - 76 : end - 72] == b"PK\6\6":
            return struct.unpack_from("<Q", tail, end - 76 + 40)[0]
        return struct.unpack_from("<I", tail, end + 12)[0]

    def load(self) -> Any:
        pickles = [name for name in self.entries if name.count("/") == 1 and name.endswith("/data.pkl")]
        self.prefix = pickles[0].removesuffix("data.pkl") if len(pickles) == 1 else ""
        if self.prefix in ("", "/", "./", "../"):
            raise Refused("it is a zip file, but none of torch.save")
        if f"{self.prefix}constants.pkl" in self.entries:
            raise Refused("it is a TorchScript program, not a checkpoint")
        order = f"{self.prefix}byteorder"
        if order in self.entries and bytes(self.view[self._place(order)]) != b"little":
            raise Refused("it is big-endian")
        return Reader(io.BytesIO(self.view[self._place(pickles[0])]), self.budget, self._storage).load()

    def _place(self, name: str) -> slice:
        """Where an entry lies in the file. Names are looked up, never opened."""
        entry = self.entries.get(name)
        if entry is None:
            raise Refused(f"its entry {short(name)} is missing")
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 or entry.file_size != entry.compress_size:
            raise Refused("its entries are compressed or encrypted, and torch.save does neither")
        lengths = struct.unpack_from("<HH", self.view, entry.header_offset + 26)
        start = entry.header_offset + 30 + sum(lengths)
        if start + entry.file_size > self.size:
            raise Refused("it is truncated")
        return slice(start, start + entry.file_size)

    def _storage(self, dtype: torch.dtype, key: str, count: int) -> torch.Tensor:
        if key not in self.storages:
            place = self._place(f"{self.prefix}data/{key}")
            data = self.data[place]
            if place.start % 16:  # tensors must be aligned
                self.budget.copy(data.nbytes())
                data = data.clone()
            self.storages[key] = data
        data = self.storages[key]
        if count * dtype.itemsize > data.nbytes():
            raise Refused(f"a storage of {count} elements has {data.nbytes()} bytes")
        return torch.empty(0, dtype=dtype).set_(data)


def _read(path: str) -> Any:
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        head = file.read(512)
        if head.startswith(b"PK"):
            return _Zip(path).load()
        if head[8:9] == b"{" and 2 <= int.from_bytes(head[:8], "little") <= size - 8:
            return safetensors.torch.load_file(path)
        others = {
            "it is empty": not head,
            "it is a tar archive": head[257:262] == b"ustar",
            "it is a pointer of git-lfs in the place of the file: run `git lfs pull`": head.startswith(
                b"version https://git-lfs"
            ),
            "it is a web page in the place of the file: the download failed": head.lstrip().startswith(b"<"),
        }
        for reason, is_so in others.items():
            if is_so:
                raise Refused(reason)
        file.seek(0)
        return read_pickle(file, Budget(size))


def read_checkpoint(path: str | os.PathLike) -> Any:
    """What the file `path` holds: nested dicts, lists, tuples and sets of tensors and plain values. It is not run.

    Reads files of torch.save of any version, safetensors, and pickles, NVIDIA's included. Parameters and numpy arrays
    become tensors, OrderedDict and the like dict, devices text, and objects of the classes that NVIDIA's files and
    torch.nn have `Record`s. Tensors keep their strides and share storages as they were saved. Storages of torch.save's
    present format are parts of the mapped file: they take memory when they are read, and changing them does not change
    the file.

    Raises:
        UserError: the file is not there, broken, truncated, none of these formats, names anything else, or would take
            more memory than its size warrants.
    """
    try:
        return _read(os.fspath(path))
    except Refused as error:
        reason = str(error)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error
    except Exception as error:  # a broken pickle raises errors of many kinds: IndexError, KeyError, struct.error, ...
        reason = f"it is no checkpoint, or broken ({type(error).__name__}: {ascii(str(error)[:200])})"
    raise UserError(
        f"{path} cannot be read: {reason}. Nothing of it was run. Readable are files of torch.save, safetensors, and "
        "pickles of tensors and plain values; if you trust this one, load it with its own software and save its state "
        "dict with safetensors."
    )
