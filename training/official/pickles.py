# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Read pickles without running them.

A pickle is a program. `Reader` is the standard library's unpickler in Python, without the steps that could look up a
name, call something, or cost more than the file warrants. A name in the file stands for one of the functions of this
file or is refused; nothing is imported. The standard library alone leaves four doors open, which are closed here:

- It looks names up, calls them and sets their state: `find_class`, `load_reduce`, `load_build`.
- It hashes tuples of tuples of tuples, which can take for ever: `load_setitem` and its like accept plain keys only.
- It takes memory for a length that the file only claims: `Reader` reads no more than the file has.
- It lets a file call a function on the same data again and again and make large objects by small steps: `Budget`.

`pickle.Unpickler` in C can close the first door only. torch's `weights_only` reader reads none of NVIDIA's files.
"""

import io
import math
import pickle
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import torch


MAX_READS = 2_000_000  # of a name, number, ...; a training checkpoint with 1,000 tensors and Adam's moments has 265,000
SLACK = 2**20  # bytes that a small file may ask for beyond its size
ELEMENT_BYTES = {str: 1, bytes: 1, list: 100, dict: 100, set: 100}  # what an element of a copy takes, at most
LEGACY_MAGIC, LEGACY_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # of torch.save before 1.6


class Refused(Exception):
    """Why a file is not read; completes "... cannot be read: "."""


@dataclass(frozen=True, eq=False)
class Name:
    """A name in a pickle. `make` is called in the place of what the name means; None: it is never called."""

    name: str
    make: Callable | None = None


@dataclass(eq=False)
class Record:
    """What is left of an object of a class that is not here: the class's name and its attributes."""

    class_name: str
    state: Any = field(default_factory=dict, repr=False)


class Budget:
    """What one file of `size` bytes may still cost: reads, and bytes that are copied out of it.

    A storage that is pickled on its own is copied twice.
    """

    def __init__(self, size: int):
        self.size, self.reads, self.bytes = size, MAX_READS, 2 * size + SLACK

    def read(self) -> None:
        self.reads -= 1
        if self.reads < 0:
            raise Refused("it has more instructions than any checkpoint needs")

    def copy(self, count: int) -> None:
        self.bytes -= count
        if self.bytes < 0:
            raise Refused("it unfolds to more bytes than it has")

    def copy_all(self, values: tuple) -> None:
        """The arguments of a call, as if it copied them. Tuples are free: functions of CALLS keep short ones only."""
        for value in values:
            if type(value) in ELEMENT_BYTES:
                self.copy(ELEMENT_BYTES[type(value)] * len(value))


def short(value: Any) -> str:
    """A few characters of `value`, which may be huge, nested or full of control characters."""
    if isinstance(value, Name):
        value = value.name
    if type(value) is str:
        return value if len(value) <= 80 and value.isprintable() else ascii(value[:80])
    return str(value) if type(value) is int and value.bit_length() <= 64 else f"a {type(value).__name__}"


# Tensors --------------------------------------------------------------------------------------------------------------


def integers(values: Any) -> tuple[int, ...]:
    """`values` as a tuple of integers in [0, 2^63)."""
    is_short = type(values) in (tuple, list) and len(values) <= 64
    if not is_short or not all(type(value) is int and 0 <= value < 2**63 for value in values):
        raise Refused("a tensor has no proper shape")
    return tuple(values)


def _tensor(storage, offset, size, stride, requires_grad=False, hooks=None, *rest) -> torch.Tensor:
    """A view of the storage of the tensor `storage`. One that repeats it (stride 0) may be up to 1 MB large.

    `rest` may hold another type and what else torch notes: whether the tensor is conjugated or negated.
    """
    if type(storage) is not torch.Tensor or any(note for note in rest if type(note) is not torch.dtype):
        raise Refused("a tensor has no storage, or is conjugated or negated")
    dtype = next((note for note in rest if type(note) is torch.dtype), storage.dtype)
    (offset,), size, stride, data = integers((offset,)), integers(size), integers(stride), storage.untyped_storage()
    count, available = math.prod(size), data.nbytes() // dtype.itemsize
    last = offset + sum((length - 1) * step for length, step in zip(size, stride))
    if len(size) != len(stride) or (count and last >= available) or offset > available:
        raise Refused(f"a tensor of shape {list(size)} reaches beyond the {available} elements of its storage")
    if count * dtype.itemsize > max(data.nbytes(), SLACK):
        raise Refused(f"a tensor of shape {list(size)} repeats a storage of {available} elements")
    return torch.empty(0, dtype=dtype).set_(data, offset, size, stride)


def _rebuild_from_type(function, kind, arguments, state=None) -> torch.Tensor:
    if getattr(function, "make", None) is not _tensor or type(arguments) is not tuple:
        raise Refused(f"a tensor is made by {short(function)}")
    return _tensor(*arguments)


# numpy and plain values -----------------------------------------------------------------------------------------------


def _bytes(value: Any) -> bytes:
    if type(value) is str:  # Python 2 wrote bytes so
        return value.encode("latin-1")
    if type(value) is not bytes:
        raise Refused("something else stands where bytes should be")
    return value


NUMPY_TYPES = {
    **{"f2": torch.float16, "f4": torch.float32, "f8": torch.float64, "c8": torch.complex64, "c16": torch.complex128},
    **{"i1": torch.int8, "i2": torch.int16, "i4": torch.int32, "i8": torch.int64, "b1": torch.bool},
    **{"u1": torch.uint8, "u2": torch.uint16, "u4": torch.uint32, "u8": torch.uint64},
}


def _numpy_type(name, *flags) -> torch.dtype:
    dtype = NUMPY_TYPES.get(name.lstrip("<|=") if type(name) is str else "")
    if dtype is None:
        raise Refused(f"it has a numpy array of type {short(name)}")
    return dtype


def _array(data, dtype, shape, order="C") -> torch.Tensor:
    """A copy of `data` as a tensor. In order "F" the first index runs fastest."""
    data, shape = bytearray(_bytes(data)), integers(shape)
    if type(dtype) is not torch.dtype or math.prod(shape) * dtype.itemsize != len(data):
        raise Refused("a numpy array's shape does not fit its data")
    array = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
    if order != "F":
        return array.reshape(shape)
    return array.reshape(shape[::-1]).permute(*reversed(range(len(shape))))


def _unfilled_array(kind, shape, letter) -> torch.Tensor:
    """An empty array, to be filled by BUILD."""
    array = torch.empty(0)
    array.is_unfilled = True
    return array


def _key(value: Any) -> Any:
    """`value` if it may be a dictionary's key. Tuples and huge integers may not: their hashes can take for ever."""
    if value is None or type(value) in (str, bytes, bool, float) or (type(value) is int and -(2**63) <= value < 2**64):
        return value
    raise Refused(f"a dictionary's key is of type {type(value).__name__}")


def _set(values: list | tuple = ()) -> set:
    if type(values) is not list and values != ():
        raise Refused("something else stands where a list should be")
    return {_key(value) for value in values}


def _dict(pairs: list | tuple = ()) -> dict:
    if (type(pairs) is not list and pairs != ()) or not all(type(pair) in (list, tuple) for pair in pairs):
        raise Refused("something else stands where a list of pairs should be")
    return {_key(key): value for key, value in pairs}


def _persistent_object(meta) -> Record:
    """An object of NVIDIA's `torch_utils.persistence`; the source text that comes with it is dropped."""
    if type(meta) is not dict or type(meta.get("class_name")) is not str:
        raise Refused("one of NVIDIA's persistent objects has no class name")
    return Record(meta["class_name"], meta.get("state"))


# The names that may be called, and what is called instead. None: the name stands beside others and is never called.
CALLS: dict[str, Callable | None] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor,
    "torch._utils._rebuild_parameter": lambda data, requires_grad, hooks: data,
    "torch._utils._rebuild_parameter_with_state": lambda data, requires_grad, hooks, state: data,
    "torch._tensor._rebuild_from_type_v2": _rebuild_from_type,
    "torch.Size": integers,
    "torch.device": lambda kind, index=None: short(kind),
    "numpy.core.multiarray._reconstruct": _unfilled_array,
    "numpy._core.multiarray._reconstruct": _unfilled_array,
    "numpy.core.multiarray.scalar": lambda dtype, data: _array(data, dtype, ()).item(),
    "numpy._core.multiarray.scalar": lambda dtype, data: _array(data, dtype, ()).item(),
    "numpy.core.numeric._frombuffer": _array,
    "numpy._core.numeric._frombuffer": _array,
    "numpy.dtype": _numpy_type,
    "collections.OrderedDict": _dict,
    "collections.defaultdict": lambda factory=None: {},
    "dnnlib.util.EasyDict": lambda: {},
    "builtins.set": _set,
    "builtins.frozenset": _set,
    "builtins.bytearray": lambda data=b"", encoding=None: _bytes(data),
    "builtins.bytes": lambda: b"",
    "builtins.complex": complex,
    "_codecs.encode": lambda text, encoding: _bytes(text),  # how protocol 2 writes bytes
    "copyreg._reconstructor": lambda kind, base, state: kind.make(),  # how protocols 0 and 1 write objects
    "torch_utils.persistence._reconstruct_persistent_obj": _persistent_object,
    **{"builtins.object": None, "builtins.dict": None, "builtins.list": None, "builtins.int": None},
    **{"builtins.float": None, "numpy.ndarray": None, "torch.Tensor": None, "torch._tensor.Tensor": None},
    **{"torch.nn.parameter.Parameter": None, "torch.nn.parameter.Buffer": None},
}

DTYPES = {
    f"torch.{name}": value
    for name, value in vars(torch).items()
    if isinstance(value, torch.dtype) and not name.startswith(("qint", "quint"))
} | {  # a storage's class says the type of its elements
    **{"torch.DoubleStorage": torch.float64, "torch.FloatStorage": torch.float32, "torch.HalfStorage": torch.float16},
    **{"torch.BFloat16Storage": torch.bfloat16, "torch.BoolStorage": torch.bool, "torch.ByteStorage": torch.uint8},
    **{"torch.CharStorage": torch.int8, "torch.ShortStorage": torch.int16, "torch.IntStorage": torch.int32},
    **{"torch.LongStorage": torch.int64, "torch.ComplexFloatStorage": torch.complex64},
    **{"torch.ComplexDoubleStorage": torch.complex128, "torch.storage.UntypedStorage": torch.uint8},
}

PYTHON_2 = {"__builtin__": "builtins", "copy_reg": "copyreg"}


# The unpickler --------------------------------------------------------------------------------------------------------

# Instructions that no checkpoint needs: other ways to call and to refer to something outside.
UNUSED = (
    *(pickle.INST, pickle.OBJ, pickle.NEWOBJ_EX, pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.PERSID),
    *(pickle.NEXT_BUFFER, pickle.READONLY_BUFFER),
)


class Reader(pickle._Unpickler):
    """Reads one pickle from `file`, and stops behind it.

    Args:
        file: the open file.
        budget: what the whole file may cost.
        storage: gives the storage of (dtype, key, number of elements) as a tensor. None: all are within the pickle.
        is_inner: the pickle is a storage within another pickle.
    """

    dispatch = {code: step for code, step in pickle._Unpickler.dispatch.items() if bytes([code]) not in UNUSED}

    def __init__(self, file: BinaryIO, budget: Budget, storage: Callable | None = None, is_inner: bool = False):
        super().__init__(types.SimpleNamespace(read=self._read_bytes, readline=self._read_line), encoding="latin-1")
        self.file, self.budget, self.storage, self.is_inner = file, budget, storage, is_inner

    def _read_bytes(self, count: int) -> bytes:
        self.budget.read()
        return self.file.read(min(count, self.budget.size))

    def _read_line(self) -> bytes:
        self.budget.read()
        return self.file.readline()

    def load_frame(self) -> None:
        """Only the length of a frame: the standard library would copy the whole of it."""
        self.read(8)

    def find_class(self, module: str, name: str) -> Name | torch.dtype:
        full = f"{PYTHON_2.get(module, module)}.{name}"
        if full in DTYPES:
            return DTYPES[full]
        if full in CALLS:
            return Name(full, CALLS[full])
        if full == "torch.storage._load_from_bytes":
            return Name(full, self.load_from_bytes)
        if full == "argparse.Namespace" or (full.startswith("torch.nn.modules.") and full.count(".") == 4):
            return Name(full, lambda: Record(full))
        raise Refused(
            f"it names {short(module)}.{short(name)}, and a checkpoint may name only tensors, arrays and plain values"
        )

    def load_reduce(self) -> None:
        """Call a stand-in. A new object of a class (NEWOBJ) is a call of it."""
        arguments, function = self.stack.pop(), self.stack.pop()
        if type(function) is not Name or function.make is None or type(arguments) is not tuple:
            raise Refused(f"it calls {short(function)}")
        self.budget.copy_all(arguments)
        self.append(function.make(*arguments))

    def load_from_bytes(self, data: Any) -> Any:
        """A storage that is pickled on its own: a file of torch.save within the pickle."""
        if self.is_inner:
            raise Refused("a storage lies within a storage")
        return read_pickle(io.BytesIO(_bytes(data)), self.budget, is_inner=True)

    def load_build(self) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if type(target) is Record:
            target.state = state
        elif type(target) is torch.Tensor and hasattr(target, "is_unfilled") and type(state) is tuple:
            self.budget.copy_all(state)
            _, shape, dtype, is_fortran, data = state
            target.data = _array(data, dtype, shape, "F" if is_fortran else "C")
            del target.is_unfilled
        elif type(target) is torch.dtype:
            if type(state) is not tuple or state[1] not in ("<", "|", "="):
                raise Refused("a numpy array is big-endian")
        elif type(target) is not dict or type(state) is not dict:  # a state dict's `_metadata` is dropped
            raise Refused(f"it sets the state of {short(target)}")

    def set_items(self, items: list) -> None:
        target = self.stack[-1]
        if type(target) is not dict:
            raise Refused(f"it fills {short(target)} as if it were a dictionary")
        for key, value in zip(items[::2], items[1::2]):
            target[_key(key)] = value

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.set_items([key, value])

    def load_setitems(self) -> None:
        self.set_items(self.pop_mark())

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.append({})
        self.set_items(items)

    def load_frozenset(self) -> None:
        items = self.pop_mark()
        self.append(_set(items))

    def load_additems(self) -> None:
        items = self.pop_mark()
        self.stack[-1].update(_set(items))

    def persistent_load(self, identity: Any) -> torch.Tensor:
        match identity:
            case ("storage", torch.dtype() as dtype, str(key), _, count, *rest) if self.storage and rest in (
                [],
                [None],
            ):
                return self.storage(dtype, key, *integers((count,)))
        raise Refused("it refers to something outside of it")

    # Read as bytes, because the standard library would take memory for the length that the file claims.
    dispatch |= {
        **{pickle.FRAME[0]: load_frame, pickle.BYTEARRAY8[0]: pickle._Unpickler.load_binbytes8},
        **{pickle.REDUCE[0]: load_reduce, pickle.NEWOBJ[0]: load_reduce, pickle.BUILD[0]: load_build},
        **{pickle.SETITEM[0]: load_setitem, pickle.SETITEMS[0]: load_setitems, pickle.DICT[0]: load_dict},
        **{pickle.FROZENSET[0]: load_frozenset, pickle.ADDITEMS[0]: load_additems},
    }


def read_pickle(file: BinaryIO, budget: Budget, is_inner: bool = False) -> Any:
    """What a file of pickles holds: one, or those of torch.save before 1.6."""
    first = Reader(file, budget, is_inner=is_inner).load()
    return _read_legacy(file, budget, is_inner) if type(first) is int and first == LEGACY_MAGIC else first


def _read_legacy(file: BinaryIO, budget: Budget, is_inner: bool) -> Any:
    """torch.save before 1.6, after its magic number: version, system, object, its storages' keys, their bytes."""
    storages: dict[str, torch.Tensor] = {}

    def storage(dtype: torch.dtype, key: str, count: int) -> torch.Tensor:
        """A storage that is filled below."""
        if key not in storages:
            budget.copy(count * dtype.itemsize)
            storages[key] = torch.empty(count, dtype=dtype)
        if storages[key].dtype != dtype or len(storages[key]) != count:
            raise Refused("two tensors disagree on their storage")
        return storages[key]

    version, system, result, keys = (Reader(file, budget, storage, is_inner).load() for _ in range(4))
    if version != LEGACY_PROTOCOL or (type(system) is dict and system.get("little_endian") is False):
        raise Refused("it is a file of torch.save of another version or big-endian")
    if type(keys) is not list or {_key(key) for key in keys} != set(storages):
        raise Refused("its list of storages is wrong")
    for key in keys:
        count = int.from_bytes(file.read(8), "little")
        data = storages[key].view(torch.uint8).numpy()
        if count != len(storages[key]) or file.readinto(data) != len(data):
            raise Refused("it is truncated")
    return result
