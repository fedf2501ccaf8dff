"""Read checkpoints without running them: torch.save files, pickles, NVIDIA's EDM pickles, safetensors.

A pickle is a program. `read_checkpoint` walks through its opcodes, which `pickletools.genops` of the standard library only
decodes, with an interpreter of its own that knows containers, numbers, strings and bytes, and calls nothing but the functions of
this file: those in CALLS and NEW, by the names that torch and numpy write for them. Everything else that a file may name is
refused before it is looked up. torch's own `weights_only` reader serves none of NVIDIA's files and bounds neither memory nor
depth, so that one reader for all of them is both simpler and stricter.

What a file can cost is bounded by its size: opcodes are counted, storages lie in the file itself (mapped, not copied), and whatever
is copied out of it may not add up to more than the file.
"""

import pickletools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch


MAX_OPCODES = 1_000_000  # a training checkpoint with 1,000 tensors and Adam's moments has 200,000

MAX_LINE = 2**20  # bytes of a line in a pickle of protocol 0

MAX_INTEGER = 2048  # bits

SLACK = 2**20  # bytes that a small file may ask for beyond its size

BLOB = 2**16  # bytes strings this long stay in the mapped file

BROKEN = "it is no checkpoint, or broken"

LEGACY_MAGIC, LEGACY_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # of torch.save before 1.6

# Where checkpoints keep their weights, the best first: averaged weights are what samples well.
ENTRIES = ("ema", "model_ema", "ema_model", "ema_state_dict", "params_ema", "g_ema")


ENTRIES += ("state_dict", "model_state_dict", "model", "network", "net", "unet", "params", "module")


class _Refused(Exception):
    """Why a file is not read: a sentence's second half."""


@dataclass(frozen=True)
class Global:
    """A name in a pickle, `module.name`. Never looked up."""

    name: str


@dataclass(eq=False)
class Record:
    """What is left of an object of a class that is not here: the class's name and its attributes."""

    class_name: str
    state: Any = field(default_factory=dict, repr=False)


@dataclass(frozen=True, eq=False)
class _Storage:
    """Bytes of tensors. dtype None: each tensor says its own."""

    data: torch.UntypedStorage
    dtype: torch.dtype | None


@dataclass(eq=False)
class _NumpyType:
    dtype: torch.dtype


class _Budget:
    """What one file may still cost."""

    def __init__(self, size: int):
        self.opcodes, self.bytes = MAX_OPCODES, size + SLACK

    def opcode(self) -> None:
        self.opcodes -= 1
        if self.opcodes < 0:
            raise _Refused(f"it has more than {MAX_OPCODES:,} instructions, which no checkpoint needs")

    def copy(self, count: int) -> None:
        self.bytes -= count
        if self.bytes < 0:
            raise _Refused("it unfolds to more bytes than it has")


class _Reader:
    """The file object that `pickletools.genops` reads, over bytes in memory; long strings are views, not copies."""

    def __init__(self, view: memoryview):
        self.view, self.position = view, 0

    def tell(self) -> int:
        return self.position

    def read(self, count: int) -> bytes | memoryview:
        part = self.view[self.position : self.position + max(count, 0)]
        is_string = (
            bytes(self.view[max(self.position - 5, 0) :][:1]) == b"T"
        )  # Python 2's, which pickletools decodes as bytes
        self.position += len(part)
        return bytes(part) if is_string or len(part) < BLOB else part

    def readline(self) -> bytes:
        for length in (2**8, 2**12, 2**16, MAX_LINE):  # reading costs at most 16 times the line
            line, newline, _ = bytes(self.view[self.position : self.position + length]).partition(b"\n")
            if newline:
                break
        else:
            raise _Refused("a line has no end")
        self.position += len(line) + 1
        return line + newline


# Tensors --------------------------------------------------------------------------------------------------------------


def _integers(values: Any, count: int | None = None) -> tuple[int, ...]:
    """`values` as a tuple of integers in [0, 2^63)."""
    if type(values) not in (tuple, list) or len(values) > 64 or count not in (None, len(values)):
        raise _Refused("a tensor has no proper shape")
    if not all(type(value) is int and 0 <= value < 2**63 for value in values):
        raise _Refused("a tensor has no proper shape")
    return tuple(values)


def _count(size: tuple[int, ...]) -> int:
    count = 1
    for length in size:
        count *= length
    return count


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A view of `storage` that lies within it. Expanded tensors (stride 0) may be 1 MB larger than what they repeat."""
    if not isinstance(storage, _Storage):
        raise _Refused("a tensor has no storage")
    dtype = dtype or storage.dtype
    if not isinstance(dtype, torch.dtype):
        raise _Refused("a tensor has no type")
    (offset,), size = _integers((offset,)), _integers(size)
    stride = _integers(stride, len(size))
    count, available = _count(size), storage.data.nbytes() // dtype.itemsize
    last = offset + sum((length - 1) * step for length, step in zip(size, stride))
    if (count and last >= available) or offset > available:
        raise _Refused(f"a tensor of shape {list(size)} reaches beyond the {available} elements of its storage")
    if count * dtype.itemsize > max(storage.data.nbytes(), SLACK):
        raise _Refused(f"a tensor of shape {list(size)} repeats a storage of {available} elements")
    return torch.empty(0, dtype=dtype).set_(storage.data, offset, size, stride)


def _rebuild_tensor_v2(
    machine, storage, offset, size, stride, requires_grad=False, hooks=None, metadata=None
) -> torch.Tensor:
    if metadata:
        raise _Refused("a tensor is conjugated or negated")
    return _tensor(storage, offset, size, stride)


def _rebuild_tensor_v3(machine, storage, offset, size, stride, requires_grad, hooks, dtype, metadata=None):
    if metadata:
        raise _Refused("a tensor is conjugated or negated")
    return _tensor(storage, offset, size, stride, dtype)


def _rebuild_parameter(machine, data, requires_grad=False, hooks=None, state=None) -> torch.Tensor:
    if not isinstance(data, torch.Tensor):
        raise _Refused("a parameter is no tensor")
    return data


def _rebuild_from_type(machine, function, kind, args, state=None) -> torch.Tensor:
    return _rebuild_parameter(machine, machine.call(function, args))


def _load_from_bytes(machine, data) -> Any:
    """What a storage that is pickled on its own becomes: a file of torch.save within the pickle."""
    if machine.depth:
        raise _Refused("a storage lies within a storage")
    if type(data) is str:
        machine.budget.copy(len(data))
    return _read_legacy(memoryview(_bytes(data)), machine.budget, depth=1)


# numpy and plain values -----------------------------------------------------------------------------------------------


def _bytes(value: Any) -> bytes | memoryview | bytearray:
    if type(value) is str:  # Python 2 wrote bytes so
        return value.encode("latin-1")
    if type(value) not in (bytes, memoryview, bytearray):
        raise _Refused("something else stands where bytes should be")
    return value


NUMPY_TYPES = {
    **{"f2": torch.float16, "f4": torch.float32, "f8": torch.float64, "c8": torch.complex64, "c16": torch.complex128},
    **{"i1": torch.int8, "i2": torch.int16, "i4": torch.int32, "i8": torch.int64, "b1": torch.bool},
    **{"u1": torch.uint8, "u2": torch.uint16, "u4": torch.uint32, "u8": torch.uint64},
}


def _numpy_type(machine, name, *flags) -> _NumpyType:
    dtype = NUMPY_TYPES.get(name.lstrip("<|=") if type(name) is str else "")
    if dtype is None:
        raise _Refused(f"it has a numpy array of type {_short(name)}")
    return _NumpyType(dtype)


def _from_bytes(machine, data: Any, kind: Any, shape: Any) -> torch.Tensor:
    """A copy of `data` as a contiguous tensor."""
    data, shape = _bytes(data), _integers(shape)
    if not isinstance(kind, _NumpyType) or _count(shape) * kind.dtype.itemsize != len(data):
        raise _Refused("a numpy array's shape does not fit its data")
    machine.budget.copy(len(data))
    if not data:
        return torch.empty(shape, dtype=kind.dtype)
    return torch.frombuffer(bytearray(data), dtype=kind.dtype).reshape(shape)


def _numpy_scalar(machine, kind, data) -> Any:
    return _from_bytes(machine, data, kind, ()).item()


def _numpy_array(machine, kind, shape, letter) -> torch.Tensor:
    """An empty array, which BUILD fills."""
    array = torch.empty(0)
    machine.arrays[id(array)] = array
    return array


def _numpy_frombuffer(machine, data, kind, shape, order) -> torch.Tensor:
    return _ordered(_from_bytes(machine, data, kind, shape), shape, order == "F")


def _ordered(array: torch.Tensor, shape: tuple[int, ...], fortran: bool) -> torch.Tensor:
    """Data in memory order as an array: its first index runs fastest if `fortran`."""
    if not fortran:
        return array
    return array.reshape(tuple(reversed(shape))).permute(*reversed(range(len(shape))))


def _key(value: Any) -> Any:
    """`value` if it may be a dictionary's key. Tuples and huge integers may not: their hashes can take for ever."""
    if value is None or type(value) in (str, bytes, bool, float) or (type(value) is int and -(2**63) <= value < 2**64):
        return value
    raise _Refused(f"a dictionary's key is of type {type(value).__name__}")


def _items(machine, values: Any) -> list:
    if type(values) not in (list, tuple):
        raise _Refused("something else stands where a list should be")
    machine.budget.copy(100 * len(values))
    return list(values)


def _dict(machine, pairs=()) -> dict:
    pairs = _items(machine, pairs)
    if not all(type(pair) in (list, tuple) and len(pair) == 2 for pair in pairs):
        raise _Refused("something else stands where pairs should be")
    return {_key(key): value for key, value in pairs}


def _set(machine, values=()) -> set:
    return {_key(value) for value in _items(machine, values)}


def _encode(machine, text, encoding) -> bytes:
    """How protocol 2 writes bytes."""
    if type(text) is not str or encoding not in ("latin1", "latin-1"):
        raise _Refused("something else stands where bytes should be")
    machine.budget.copy(len(text))
    return text.encode("latin-1")


def _empty_bytes(machine, values=b"", *rest) -> bytes:
    if rest or len(values) > 0:
        raise _Refused("something else stands where bytes should be")
    return b""


def _bytearray(machine, values=b"", *rest) -> bytearray:
    values = bytearray(_bytes(values)) if not rest else bytearray(_encode(machine, values, *rest))
    machine.budget.copy(len(values))
    return values


def _complex(machine, real, imaginary) -> complex:
    if type(real) is not float or type(imaginary) is not float:
        raise _Refused("something else stands where a complex number should be")
    return complex(real, imaginary)


def _device(machine, kind, index=None) -> str:
    return _short(kind) if index is None else f"{_short(kind)}:{_short(index)}"


# Objects --------------------------------------------------------------------------------------------------------------


def _persistent_object(machine, meta) -> Record:
    """An object of NVIDIA's `torch_utils.persistence`; the source text that comes with it is dropped."""
    if type(meta) is not dict or type(meta.get("class_name")) is not str:
        raise _Refused("one of NVIDIA's persistent objects has no class name")
    return Record(meta["class_name"], meta.get("state"))


def _reconstruct(machine, kind, base, state) -> Any:
    """How protocols 0 and 1 write objects."""
    return machine.new(kind)


def _values(machine, values) -> tuple:
    return tuple(_items(machine, values))


# The names that may be called, and what is done instead. `machine` is the interpreter that meets them.
CALLS: dict[str, Callable] = {
    "torch._utils._rebuild_tensor": _rebuild_tensor_v2,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor_v2,
    "torch._utils._rebuild_tensor_v3": _rebuild_tensor_v3,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "torch._utils._rebuild_parameter_with_state": _rebuild_parameter,
    "torch._tensor._rebuild_from_type_v2": _rebuild_from_type,
    "torch.storage._load_from_bytes": _load_from_bytes,
    "torch.Size": _values,
    "torch.device": _device,
    "numpy.core.multiarray._reconstruct": _numpy_array,
    "numpy._core.multiarray._reconstruct": _numpy_array,
    "numpy.core.multiarray.scalar": _numpy_scalar,
    "numpy._core.multiarray.scalar": _numpy_scalar,
    "numpy.core.numeric._frombuffer": _numpy_frombuffer,
    "numpy._core.numeric._frombuffer": _numpy_frombuffer,
    "numpy.dtype": _numpy_type,
    "collections.OrderedDict": _dict,
    "collections.defaultdict": lambda machine, factory=None, pairs=(): _dict(machine, pairs),
    "builtins.set": _set,
    "builtins.frozenset": _set,
    "builtins.bytearray": _bytearray,
    "builtins.bytes": _empty_bytes,
    "builtins.complex": _complex,
    "_codecs.encode": _encode,
    "copyreg._reconstructor": _reconstruct,
    "torch_utils.persistence._reconstruct_persistent_obj": _persistent_object,
}

DICTS = ("collections.OrderedDict", "dnnlib.util.EasyDict")  # dictionaries that are written as objects

RECORDS = ("argparse.Namespace",)  # plain objects; so is every class of torch.nn.modules

NAMES = ("builtins.object", "builtins.dict", "builtins.list", "builtins.int", "builtins.float", "numpy.ndarray")


NAMES += ("torch.Tensor", "torch._tensor.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer")


DTYPES = {
    f"torch.{name}": value
    for name, value in vars(torch).items()
    if isinstance(value, torch.dtype) and not name.startswith(("qint", "quint"))
}

STORAGES: dict[str, torch.dtype | None] = {
    **{"torch.DoubleStorage": torch.float64, "torch.FloatStorage": torch.float32, "torch.HalfStorage": torch.float16},
    **{"torch.BFloat16Storage": torch.bfloat16, "torch.BoolStorage": torch.bool, "torch.ByteStorage": torch.uint8},
    **{"torch.CharStorage": torch.int8, "torch.ShortStorage": torch.int16, "torch.IntStorage": torch.int32},
    **{"torch.LongStorage": torch.int64, "torch.ComplexFloatStorage": torch.complex64},
    **{"torch.ComplexDoubleStorage": torch.complex128, "torch.storage.UntypedStorage": None},
}

PYTHON_2 = {"__builtin__": "builtins", "copy_reg": "copyreg"}


def _is_record(name: str) -> bool:
    return name in RECORDS or (name.startswith("torch.nn.modules.") and name.count(".") == 4)


def _short(value: Any) -> str:
    """A few characters of `value`, which may be huge, nested or full of control characters."""
    if type(value) is str:
        return value if len(value) <= 80 and value.isprintable() else ascii(value[:80])
    return str(value) if type(value) is int and value.bit_length() <= 64 else f"a {type(value).__name__}"


# The interpreter ------------------------------------------------------------------------------------------------------


CONSTANTS = frozenset(
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE SHORT_BINUNICODE "
    "BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8".split()
)

SINGLES = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}

EMPTY = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": set}


class _Machine:
    """The stack and the memo of one pickle.

    Args:
        budget: what the whole file may cost.
        storage: finds the storage of a persistent id's (dtype, key, number of elements); None: the pickle may have none.
        depth: 1 within a storage that is pickled on its own.
    """

    def __init__(self, budget: _Budget, storage: Callable | None = None, depth: int = 0):
        self.budget, self.storage, self.depth = budget, storage, depth
        self.stack: list = []
        self.marks: list[list] = []
        self.memo: dict[int, Any] = {}
        self.arrays: dict[int, torch.Tensor] = {}

    def run(self, reader: _Reader) -> Any:
        """The object that the pickle at the reader's position holds. The reader stops behind it."""
        for opcode, argument, _ in pickletools.genops(reader):
            self.budget.opcode()
            name = opcode.name
            if name in CONSTANTS:
                if type(argument) is int and argument.bit_length() > MAX_INTEGER:
                    raise _Refused(f"it has a number of more than {MAX_INTEGER} bits")
                self.stack.append(argument)
            elif name in SINGLES:
                self.stack.append(SINGLES[name])
            elif name in EMPTY:
                self.stack.append(EMPTY[name]())
            elif name == "STOP":
                break
            else:
                step = getattr(self, f"_{name.lower()}", None)
                if step is None:
                    raise _Refused(f"it has the instruction {name}, which no checkpoint needs")
                step(argument)
        if len(self.stack) != 1 or self.marks:
            raise _Refused(BROKEN)
        return self.stack.pop()

    def call(self, function: Any, arguments: Any) -> Any:
        """What stands for `function(*arguments)`, both from the pickle."""
        if not isinstance(function, Global) or type(arguments) is not tuple:
            raise _Refused("it calls something that is no function")
        if function.name not in CALLS:
            if _is_record(function.name) and not arguments:
                return Record(function.name)
            raise _Refused(f"it calls {_short(function.name)}")
        return CALLS[function.name](self, *arguments)

    def new(self, kind: Any) -> Any:
        """An empty object of the class `kind`."""
        name = kind.name if isinstance(kind, Global) else ""
        if name in DICTS:
            return {}
        if not _is_record(name):
            raise _Refused(f"it makes an object of {_short(name) or 'no class'}")
        return Record(name)

    # Opcodes. Each is named as in pickletools; what is not here is refused.

    def _proto(self, version: int) -> None:
        if version > 5:
            raise _Refused(f"it is a pickle of protocol {version}")

    def _frame(self, length: int) -> None:
        pass

    def _mark(self, _) -> None:
        self.marks.append(self.stack)
        self.stack = []

    def _pop_mark(self, _=None) -> list:
        values, self.stack = self.stack, self.marks.pop()
        return values

    def _pop(self, _) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self._pop_mark()

    def _dup(self, _) -> None:
        self.stack.append(self.stack[-1])

    def _list(self, _) -> None:
        values = self._pop_mark()
        self.stack.append(values)

    def _tuple(self, _) -> None:
        values = self._pop_mark()
        self.stack.append(tuple(values))

    def _take(self, count: int) -> tuple:
        if len(self.stack) < count:
            raise _Refused(BROKEN)
        values = tuple(self.stack[-count:])
        del self.stack[-count:]
        return values

    def _tuple1(self, _) -> None:
        self.stack.append(self._take(1))

    def _tuple2(self, _) -> None:
        self.stack.append(self._take(2))

    def _tuple3(self, _) -> None:
        self.stack.append(self._take(3))

    def _frozenset(self, _) -> None:
        values = self._pop_mark()
        self.stack.append({_key(value) for value in values})

    def _dict(self, _) -> None:
        values = self._pop_mark()
        self.stack.append({})
        self._set_items(values)

    def _top(self, kind: type) -> Any:
        if type(self.stack[-1]) is not kind:
            raise _Refused(f"it fills {_short(self.stack[-1])} as if it were a {kind.__name__}")
        return self.stack[-1]

    def _set_items(self, values: list | tuple) -> None:
        target = self._top(dict)
        if len(values) % 2:
            raise _Refused(BROKEN)
        for key, value in zip(values[::2], values[1::2]):
            target[_key(key)] = value

    def _setitem(self, _) -> None:
        self._set_items(self._take(2))

    def _setitems(self, _) -> None:
        self._set_items(self._pop_mark())

    def _append(self, _) -> None:
        values = self._take(1)
        self._top(list).extend(values)

    def _appends(self, _) -> None:
        values = self._pop_mark()
        self._top(list).extend(values)

    def _additems(self, _) -> None:
        values = self._pop_mark()
        self._top(set).update(_key(value) for value in values)

    def _put(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    _binput = _long_binput = _put

    def _memoize(self, _) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def _get(self, index: int) -> None:
        self.stack.append(self.memo[index])

    _binget = _long_binget = _get

    def _global(self, names: str) -> None:
        self._name(*names.split(" ", 1))

    def _stack_global(self, _) -> None:
        self._name(*self._take(2))

    def _name(self, module: Any, name: Any) -> None:
        if type(module) is not str or type(name) is not str:
            raise _Refused(BROKEN)
        full = f"{PYTHON_2.get(module, module)}.{name}"
        if full in DTYPES:
            self.stack.append(DTYPES[full])
        elif full in CALLS or full in STORAGES or full in NAMES or full in DICTS or _is_record(full):
            self.stack.append(Global(full))
        else:
            raise _Refused(
                f"it names {_short(module)}.{_short(name)}, and a checkpoint may name only tensors, arrays and plain values"
            )

    def _reduce(self, _) -> None:
        self.stack.append(self.call(*self._take(2)))

    def _newobj(self, _) -> None:
        kind, arguments = self._take(2)
        if arguments != ():
            raise _Refused("it makes an object with arguments")
        self.stack.append(self.new(kind))

    def _build(self, _) -> None:
        (state,) = self._take(1)
        target = self.stack[-1]
        if isinstance(target, Record):
            target.state = state
        elif id(target) in self.arrays:
            self._fill(self.arrays.pop(id(target)), state)
        elif isinstance(target, _NumpyType):
            if type(state) is not tuple or len(state) < 2 or state[1] not in ("<", "|", "="):
                raise _Refused("a numpy array is big-endian")
        elif type(target) is not dict or type(state) is not dict:  # a state dict's `_metadata` is dropped
            raise _Refused(f"it sets the state of {_short(target)}")

    def _fill(self, array: torch.Tensor, state: Any) -> None:
        """numpy's (version, shape, dtype, is Fortran, data)."""
        if type(state) is not tuple or len(state) != 5:
            raise _Refused(BROKEN)
        _, shape, kind, fortran, data = state
        array.data = _ordered(_from_bytes(self, data, kind, shape), shape, bool(fortran))

    def _binpersid(self, _) -> None:
        (identity,) = self._take(1)
        if self.storage is None or type(identity) is not tuple or not 5 <= len(identity) <= 6:
            raise _Refused("it refers to something outside of it")
        tag, kind, key, _, count, *view = identity
        known = isinstance(kind, Global) and kind.name in STORAGES
        if tag != "storage" or not known or type(key) is not str or view not in ([], [None]):
            raise _Refused("it refers to something outside of it")
        self.stack.append(self.storage(STORAGES[kind.name], key, _integers((count,))[0]))


def _read_legacy(view: memoryview, budget: _Budget, depth: int = 0) -> Any:
    """torch.save before 1.6: pickles of a magic number, a version, the system, the object, its storages' keys; then their bytes."""
    reader, storages = _Reader(view), {}

    def read(storage: Callable | None = None) -> Any:
        return _Machine(budget, storage, depth).run(reader)

    def storage(dtype: torch.dtype | None, key: str, count: int) -> _Storage:
        """A storage that is filled below."""
        if key not in storages:
            length = count * (dtype.itemsize if dtype else 1)
            if length > len(view):
                raise _Refused(f"a storage of {count} elements lies in a file of {len(view)} bytes")
            budget.copy(length)
            storages[key] = _Storage(torch.UntypedStorage(length), dtype)
        if storages[key].dtype != dtype or count * (dtype.itemsize if dtype else 1) != storages[key].data.nbytes():
            raise _Refused("two tensors disagree on their storage")
        return storages[key]

    if read() != LEGACY_MAGIC or read() != LEGACY_PROTOCOL:
        raise _Refused("it is no file of torch.save")
    system = read()
    if type(system) is dict and system.get("little_endian") is False:
        raise _Refused("it is big-endian")
    result, keys = read(storage), read()
    if type(keys) is not list or not all(type(key) is str for key in keys) or set(keys) != set(storages):
        raise _Refused("its list of storages is wrong")
    for key in keys:
        target = storages[key].data
        count = int.from_bytes(bytes(view[reader.position : reader.position + 8]), "little")
        start = reader.position + 8
        if count * (storages[key].dtype.itemsize if storages[key].dtype else 1) != target.nbytes():
            raise _Refused("it is truncated")
        reader.position = start + target.nbytes()
        if reader.position > len(view):
            raise _Refused("it is truncated")
        part = view[start : reader.position]
        if part:
            source = torch.frombuffer(bytearray(part) if part.readonly else part, dtype=torch.uint8)
            torch.empty(0, dtype=torch.uint8).set_(target).copy_(source)
    return result
