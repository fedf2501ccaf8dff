# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints are read as torch.load and pickle.load do, and no file, however made, runs, hangs or fills the memory."""

import collections
import io
import os
import pickle
import random
import resource
import struct
import sys
import time
import zipfile

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from helpers.nvidia import EasyDict, Persistent, nvidia_pickle
from training.cli.errors import UserError
from training.official.files import read_checkpoint
from training.official.pickles import LEGACY_MAGIC, LEGACY_PROTOCOL, MAX_READS, Record
from training.official.weights import (
    MAX_DEPTH,
    MAX_MODULES,
    find_weights,
    module_numbers,
    module_state_dict,
    weights_of,
)


def write(tmp_path, content: bytes):
    path = tmp_path / "file"
    path.write_bytes(content)
    return path


def read(tmp_path, content: bytes):
    return read_checkpoint(write(tmp_path, content))


def refuse(tmp_path, content: bytes, *words: str) -> str:
    """The message with which `content` is refused, quickly and at no cost."""
    path = write(tmp_path, content)
    peak, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with pytest.raises(UserError) as refused:
        read_checkpoint(path)
    assert time.monotonic() - start < 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 700_000  # KB
    message = str(refused.value)
    assert len(message) < 1000 and message.isprintable()
    for word in words:
        assert word in message
    return message


def saved(value, **options) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, **options)
    return file.getvalue()


def same(ours, theirs) -> bool:
    """Equal to the bit, types and strides included; Parameters are tensors here."""
    if isinstance(theirs, torch.Tensor):
        layout = ours.dtype == theirs.dtype and ours.shape == theirs.shape and ours.stride() == theirs.stride()
        return layout and _bits(ours) == _bits(theirs)
    if isinstance(theirs, dict):
        return list(ours) == list(theirs) and all(same(ours[key], theirs[key]) for key in theirs)
    if isinstance(theirs, list | tuple):
        return len(ours) == len(theirs) and all(same(*pair) for pair in zip(ours, theirs))
    return type(ours) is type(theirs) and ours == theirs


def _bits(tensor: torch.Tensor) -> list[int]:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).tolist()


def zip_of(pickled: bytes, **entries: bytes) -> bytes:
    """A file of torch.save with a pickle of our own."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        for name, content in entries.items():
            archive.writestr(f"archive/data/{name[1:]}", content)
    return file.getvalue()


def legacy_of(pickled: bytes) -> bytes:
    return b"".join(pickle.dumps(part, 2) for part in (LEGACY_MAGIC, LEGACY_PROTOCOL, {})) + pickled + pickle.dumps([])


def inner_of(pickled: bytes) -> bytes:
    """A pickle with a storage that is pickled on its own."""
    content = legacy_of(pickled)
    return b"\x80\x04ctorch.storage\n_load_from_bytes\nB" + struct.pack("<I", len(content)) + content + b"\x85R."


# What checkpoints hold ------------------------------------------------------------------------------------------------

VALUES = {"n": 3, "big": 2**80, "f": 2.5, "nan": float("inf"), "s": "žluťoučký", "b": b"abc", "t": (1, None, True, ())}
VALUES |= {"l": [[1], {"x": False}], "od": collections.OrderedDict(a=1), 7: "seven", "z": 1 + 2j}


def tensors() -> dict:
    base = torch.arange(24.0)
    layer = nn.Linear(3, 2)
    return {
        "parameter": layer.weight,
        "shared": [base[:6], base[4:].view(4, 5).T, base[::3]],
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(2.5),
        "expanded": torch.arange(3.0).expand(5, 3),
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "state": layer.state_dict(),  # an OrderedDict with `_metadata`
        "size": torch.Size([1, 2]),
    }


DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128, torch.bool]
DTYPES += [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64]
DTYPES += [torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("legacy", [False, True])
def test_files_of_torch_save_are_read_as_torch_load_reads_them(legacy, protocol, tmp_path):
    content = saved({**tensors(), **VALUES}, _use_new_zipfile_serialization=not legacy, pickle_protocol=protocol)
    result = read(tmp_path, content)
    expected = torch.load(io.BytesIO(content), weights_only=False)
    assert same({**result, "od": 0, "state": 0}, {**expected, "od": 0, "state": 0})
    assert same(result["od"], dict(expected["od"])) and same(result["state"], dict(expected["state"]))
    first, second, _ = result["shared"]
    first[4] = -1
    assert second[0, 0] == -1  # one storage, and it may be written to


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype(dtype, legacy, tmp_path):
    bits = torch.arange(64, dtype=torch.uint8) % (2 if dtype == torch.bool else 100)
    tensor = bits.view(dtype)[1:]
    result = read(tmp_path, saved([tensor], _use_new_zipfile_serialization=not legacy))[0]
    assert result.dtype == dtype
    assert torch.equal(result.view(torch.uint8), bits[dtype.itemsize :])


@pytest.mark.parametrize("protocol", range(6))
def test_pickles_are_read_as_pickle_reads_them(protocol, tmp_path):
    arrays = {"a": np.arange(6.0).reshape(2, 3), "fortran": np.asfortranarray(np.arange(6).reshape(2, 3))}
    arrays |= {"half": np.ones(3, np.float16), "truth": np.array([True, False]), "zero": np.array(4, np.uint8)}
    plain = {"set": {1, 2}, "bytearray": bytearray(b"xyz"), **VALUES}
    scalars = {"float": np.float64(0.5), "int": np.int64(-3)}
    result = read(tmp_path, pickle.dumps({**tensors(), **arrays, **plain, **scalars}, protocol))
    assert all(same(result[name], torch.from_numpy(array)) for name, array in arrays.items())
    assert all(result[name] == value for name, value in plain.items())
    assert result["float"] == 0.5 and result["int"] == -3
    assert all(same(result[name], value) for name, value in tensors().items() if name in ("shared", "expanded"))


def test_one_object_in_two_places_stays_one_and_cycles_are_kept(tmp_path):
    inner = [1]
    cycle = {"inner": [inner, inner]}
    cycle["self"] = cycle
    result = read(tmp_path, pickle.dumps(cycle))
    assert result["inner"][0] is result["inner"][1] and result["self"] is result


@pytest.mark.parametrize("length", [10, 2**17])
def test_long_strings_of_python_2(length, tmp_path):
    """Its numpy wrote the data of an array as one."""
    value = ("\0\x80\xff" * length)[:length]
    pickled = b"T" + length.to_bytes(4, "little") + value.encode("latin-1") + b"."
    assert read(tmp_path, pickled) == pickle.loads(pickled, encoding="latin-1") == value


def test_safetensors(tmp_path):
    state = {"a": torch.randn(3, 4), "b": torch.ones(2, dtype=torch.bfloat16)}
    assert same(read(tmp_path, safetensors.torch.save(state)), state)


def test_a_large_file_is_mapped_not_copied(tmp_path):
    path = tmp_path / "large.pt"
    torch.save({f"{i}": torch.full((2**20,), float(i)) for i in range(20)}, path)  # 80 MB
    peak, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    result = read_checkpoint(path)
    assert result["7"][-1] == 7
    assert time.monotonic() - start < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 20_000  # KB


# NVIDIA's files -------------------------------------------------------------------------------------------------------


class Layer(Persistent, nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, width))
        self.bias = None
        self.register_buffer("resample_filter", torch.ones(1, 1, 2, 2) if width == 3 else None)
        self.register_buffer("transient", torch.zeros(9), persistent=False)
        self.scale = np.sqrt(0.5)


class Net(Persistent, nn.Module):
    def __init__(self):
        super().__init__()
        self.sigma_data, self.sigma_max, self.img_resolution = 0.5, float("inf"), 32
        self.enc = nn.ModuleDict({"32x32_conv": Layer(3), "32x32_block0": Layer(4)})
        self.norm = nn.BatchNorm1d(2)
        self.nothing = None
        self.register_module("absent", None)
        self.share = self.enc["32x32_conv"]


class Loss(Persistent):
    def __init__(self):
        self.P_mean, self.wavelet = -1.2, np.ones((2, 2))


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_nvidias_pickles_give_the_networks_state_dict(protocol, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    net = Net()
    snapshot = {"ema": net, "loss_fn": Loss(), "augment_pipe": None, "dataset_kwargs": EasyDict(path="x.zip")}
    result = read(tmp_path, nvidia_pickle(snapshot, protocol))
    name, part = find_weights(result)
    state = weights_of(part)
    assert name == "ema" and same(state, dict(net.state_dict()))
    assert "enc.32x32_conv.transient" not in state and "share.weight" in state
    record = result["ema"]
    assert isinstance(record, Record) and record.class_name == "Net" and record.state["sigma_max"] == float("inf")
    assert module_numbers(part, "sigma_data") == {0.5} and module_numbers(part, "scale") == {np.sqrt(0.5)}
    assert module_numbers(part, "sigma_max") == module_numbers(part, "training") == set()  # infinite, no number
    assert result["loss_fn"].state["P_mean"] == -1.2 and result["dataset_kwargs"] == {"path": "x.zip"}
    assert result["ema"].state["_modules"]["enc"].state["_modules"]["32x32_conv"].state["scale"] == np.sqrt(0.5)
    assert os.listdir(tmp_path) == ["file"]


def module(**children) -> Record:
    return Record("Net", {"_parameters": {}, "_buffers": {}, "_modules": children})


def test_modules_within_each_other_endlessly_are_refused():
    circle, doubled = module(), module()
    circle.state["_modules"]["again"] = circle
    for _ in range(MAX_DEPTH - 1):
        doubled = module(a=doubled, b=doubled)
    for endless in (circle, doubled):
        with pytest.raises(UserError, match="more parts"):
            module_state_dict(endless)
    wide = module(**{f"m{i}": module() for i in range(MAX_MODULES // 2)})
    wide.state["_non_persistent_buffers_set"] = 3
    assert module_state_dict(wide) == {}


@pytest.mark.parametrize("state", [None, 3, {}, {"_parameters": {"w": 1}, "_modules": {"m": 3}}])
def test_what_is_no_module_has_no_state_dict(state):
    with pytest.raises(UserError):
        module_state_dict(Record("Net", state))


# Where the weights are ------------------------------------------------------------------------------------------------


def test_averaged_weights_are_found_before_others():
    def weights(value):
        return {"layer.weight": torch.full((1,), float(value))}

    checkpoint = {"step": torch.tensor(1), "model": weights(1), "ema": weights(2), "optimizer": {"state": {0: {}}}}
    assert find_weights(checkpoint)[0] == "ema"
    assert find_weights(checkpoint, "model") == ("model", checkpoint["model"])
    assert find_weights({"x": {"state_dict": weights(3)}})[0] == "x.state_dict"
    assert find_weights(weights(4))[0] == ""
    assert find_weights({"unusual": weights(5)})[0] == "unusual"
    with pytest.raises(UserError, match="--entry other has no tensors.*model"):
        find_weights(checkpoint, "other")
    with pytest.raises(UserError, match="--entry"):
        find_weights({"one": weights(1), "two": weights(2)})
    for nothing in ({}, [], 3, None, {"a": {"b": 1}}):
        with pytest.raises(UserError, match="none"):
            find_weights(nothing)


# Attacks --------------------------------------------------------------------------------------------------------------


def call(module: str, name: str, argument: str, protocol: int = 0) -> bytes:
    head = f"c{module}\n{name}\n".encode()
    if protocol == 4:
        head = b"\x80\x04" + b"".join(b"\x8c" + bytes([len(part)]) + part.encode() for part in (module, name)) + b"\x93"
    return head + b"X" + struct.pack("<I", len(argument)) + argument.encode() + b"\x85R."


COMMAND = "open('ran', 'w').close()"
RUN = {
    "os.system": call("os", "system", "touch ran"),
    "posix.system": call("posix", "system", "touch ran", 4),
    "subprocess": call("subprocess", "getoutput", "touch ran"),
    "eval": call("builtins", "eval", COMMAND),
    "exec": call("builtins", "exec", COMMAND, 4),
    "exec of Python 2": call("__builtin__", "exec", COMMAND),
    "open": b"cbuiltins\nopen\n(X\x03\x00\x00\x00ranX\x01\x00\x00\x00wtR.",
    "import": call("builtins", "__import__", "evil"),
    "getattr": b"cbuiltins\ngetattr\n(cos\npath\nX\x04\x00\x00\x00joinXtR.",
    "attrgetter": call("operator", "attrgetter", "system"),
    "methodcaller": call("operator", "methodcaller", "system"),
    "module that is imported": b"cevil\nfunction\n.",
    "torch.load": call("torch", "load", "file"),
    "torch.hub": call("torch.hub", "load", "x/y"),
    "numpy.load": call("numpy", "load", "file", 4),
    "numpy's test runner": call("numpy.testing._private.utils", "runstring", COMMAND),
    "a function of this reader": call("training.unpickle", "read_checkpoint", "file"),
    "module of torch.nn with arguments": call("torch.nn.modules.linear", "Linear", "x"),
    "dotted name": call("torch", "serialization.os.system", "touch ran", 4),
    "dotted name in the allowed module": call("torch.nn.modules", "module.torch.os.system", "touch ran", 4),
    "dotted name of a module": b"ctorch.nn.modules.module.os\nsystem\nX\x08\x00\x00\x00touch ran\x85R.",
    "INST": b"(S'touch ran'\nios\nsystem\n.",
    "INST of an allowed class": b"(itorch.nn.modules.linear\nLinear\n.",
    "OBJ": b"(cos\nsystem\nS'touch ran'\no.",
    "NEWOBJ": b"csubprocess\nPopen\nS'touch'\n\x85\x81.",
    "NEWOBJ of a function": b"\x80\x02ctorch.storage\n_load_from_bytes\n)\x81.",
    "NEWOBJ with arguments": b"\x80\x02ctorch.nn.modules.linear\nLinear\nK\x01\x85\x81.",
    "NEWOBJ_EX": b"\x80\x04ctorch.nn.modules.linear\nLinear\n)}\x92.",
    "BUILD of a list": b"\x80\x02]}b.",
    "BUILD of a tensor": pickle.dumps(torch.ones(1))[:-1] + b"}b.",
    "BUILD of a name": b"\x80\x02ctorch\nFloatStorage\n}X\x0c\x00\x00\x00__setstate__K\x01sb.",
    "BUILD of a dict with a class": b"\x80\x02}ccollections\nOrderedDict\nb.",
    "EXT1": b"\x80\x02\x82\x01.",
    "EXT2": b"\x80\x02\x83\x01\x00.",
    "EXT4": b"\x80\x02\x84\x01\x00\x00\x00.",
    "persistent id": b"Psomewhere\n.",
    "binary persistent id": b"\x80\x02X\x01\x00\x00\x00xQ.",
    "buffers outside": b"\x80\x05\x97\x98.",
    "call of text": b"S'x'\n)R.",
    "call without a tuple": b"ccollections\nOrderedDict\n]R.",
    "APPEND to a name": b"cbuiltins\nlist\nK\x01a.",
    "SETITEM of a list": b"]K\x01K\x02s.",
    "reconstructor": b"ccopy_reg\n_reconstructor\n(cos\nsystem\nc__builtin__\nobject\nNtR.",
}


@pytest.mark.parametrize("wrap", [bytes, zip_of, legacy_of, inner_of], ids=["pickle", "zip", "legacy", "storage"])
def test_nothing_is_run_and_nothing_imported(wrap, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "evil.py").write_text(COMMAND)
    for name, content in RUN.items():
        message = refuse(tmp_path, wrap(content), "file cannot be read", "Nothing of it was run")
        assert sorted(os.listdir(tmp_path)) == ["evil.py", "file"] and "evil" not in sys.modules, (name, message)


def test_the_message_says_which_name_is_refused(tmp_path):
    refuse(tmp_path, RUN["os.system"], "it names os.system")
    refuse(tmp_path, call("a" * 100_000, "b\x1b[31m", "", 0), "it names 'aaaa")
    refuse(tmp_path, pickle.dumps(zipfile.ZipFile), "zipfile")


def test_the_attacks_are_real(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pickle.loads(RUN["exec"])
    assert os.path.exists("ran")


def _laughs(levels: int, close: bytes) -> bytes:
    """A container of ten times a container of ten times ..., 10^levels things if anyone counts."""
    content = b"\x80\x04(K\x01\x94"  # a list at the end of all of them, so that one object is left
    for level in range(levels):
        content += b"(" + (b"j" + struct.pack("<I", level)) * 10 + close + b"\x94"
    return content + b"l."


def test_a_billion_laughs_cost_nothing(tmp_path):
    for close in (b"l", b"t"):
        result = read(tmp_path, _laughs(300, close))
        assert len(result) == 301 and result[-1][0] is result[-1][9] is result[-2]
        with pytest.raises(UserError):
            find_weights(result)
    key = _laughs(300, b"t")[:-2] + b"}j" + struct.pack("<I", 300) + b"K\x01sl."  # its hash takes 10^300 steps
    refuse(tmp_path, key, "key is of type tuple")
    refuse(tmp_path, key.replace(b"K\x01sl.", b"\x91l."), "key is of type")  # so it does in a frozenset
    with pytest.raises(UserError):
        find_weights(read(tmp_path, b"\x80\x04" + _dag(300) + b"."))


def _dag(levels: int) -> bytes:
    """A dictionary that holds twice a dictionary that holds twice ...: `levels` objects, 2^levels paths."""
    content = b"}\x94"
    for level in range(levels):
        get = b"j" + struct.pack("<I", level)
        content += b"0}\x94(X\x01\x00\x00\x00a" + get + b"X\x01\x00\x00\x00b" + get + b"u"
    return content


LENGTHS = {
    "LONG4": b"\x8b\xff\xff\xff\x7f",
    "LONG4, negative": b"\x8b\xff\xff\xff\xff",
    "BINSTRING": b"T\xff\xff\xff\x7f",
    "BINUNICODE": b"X\xff\xff\xff\xff",
    "BINUNICODE8": b"\x8d" + b"\xff" * 7 + b"\x7f",
    "BINBYTES": b"B\xff\xff\xff\xff",
    "BINBYTES8": b"\x8e" + b"\xff" * 7 + b"\x7f",
    "BYTEARRAY8": b"\x96" + b"\xff" * 7 + b"\x7f",
    "BYTEARRAY8, negative": b"\x96" + b"\xff" * 8,
    "FRAME": b"\x95" + b"\xff" * 8,
    "PUT": b"Np" + b"9" * 5000 + b"\n.",
    "LONG_BINPUT": b"\x80\x02Nr\xff\xff\xff\xff0.",
    "LONG, decimal": b"L" + b"9" * 100_000 + b"L\n.",
    "a line without end": b"S'" + b"x" * 3_000_000,
    "more instructions than any checkpoint": b"\x80\x04" + b"}\x94" * MAX_READS + b".",
}


@pytest.mark.parametrize("name", LENGTHS)
def test_claimed_lengths_and_endless_files(name, tmp_path):
    refuse(tmp_path, LENGTHS[name])


def test_lines_cost_what_they_are_long(tmp_path):
    """40,000 lines of 300 bytes: with a megabyte for each it would be 40 GB."""
    start = time.monotonic()
    assert read(tmp_path, b"(" + (b"S'" + b"x" * 300 + b"'\n0") * 40_000 + b"l.") == []
    assert time.monotonic() - start < 4


@pytest.mark.parametrize("opening, closing", [(b"(", b"l"), (b"(", b"t"), (b"]", b"a"), (b"(K\x01", b"d")])
def test_containers_100_000_deep(opening, closing, tmp_path):
    result = read(
        tmp_path,
        b"\x80\x02" + opening * 100_000 + b"N" * (closing == b"d") + closing * (100_000 - (closing == b"a")) + b".",
    )
    with pytest.raises(UserError):
        find_weights(result)
    del result  # and taking it apart does not overflow either


def repeated(function: bytes, *arguments: bytes) -> bytes:
    """A pickle that calls `function` 10,000 times with the same arguments."""
    content, get = b"\x80\x02c" + function + b"\nq\x00", b"h\x00"
    for i, argument in enumerate(arguments, start=1):
        content += argument + b"q" + bytes([i])
        get += b"h" + bytes([i])
    return content + b"0(" + (get + (b"\x85" if len(arguments) == 1 else b"\x86") + b"R") * 10_000 + b"l."


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


BLOB = saved(torch.zeros(2**18).untyped_storage(), _use_new_zipfile_serialization=False)


@pytest.mark.parametrize(
    "content",
    [
        repeated(b"torch.storage\n_load_from_bytes", b"B" + struct.pack("<I", len(BLOB)) + BLOB),
        repeated(b"torch.storage\n_load_from_bytes", text(BLOB.decode("latin-1"))),  # as Python 2 writes bytes
        repeated(b"_codecs\nencode", text("x" * 2**20), text("latin1")),
        repeated(b"builtins\nset", b"](" + b"N" * 2**15 + b"e"),
    ],
    ids=["storage", "storage of Python 2", "bytes", "set"],
)
def test_copies_may_not_add_up_to_more_than_the_file(content, tmp_path):
    refuse(tmp_path, content, "more bytes than it has")


def test_a_tensor_is_not_taken_apart(tmp_path):
    """A million tensors of one number each would take a thousand times the file."""
    for call in (b"cbuiltins\nset\n%s\x85R.", b"ctorch\nSize\n%s\x85R.", b"ccollections\nOrderedDict\n]%sa\x85R."):
        tensor = rebuilt(storage_id(count=2**20), size=(2**20,))[2:-1]
        refuse(tmp_path, zip_of(b"\x80\x02" + call % tensor, _0=bytes(2**22)))


def storage_id(kind="FloatStorage", key="0", count=4, location="cpu") -> bytes:
    return b"(" + text("storage") + f"ctorch\n{kind}\n".encode() + text(key) + text(location) + _number(count) + b"tQ"


def _number(value: int) -> bytes:
    raw = value.to_bytes(16, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def rebuilt(storage: bytes, offset=0, size=(4,), stride=(1,), name="_rebuild_tensor_v2") -> bytes:
    shape = [b"(" + b"".join(map(_number, values)) + b"t" for values in (size, stride)]
    return (
        b"\x80\x02ctorch._utils\n" + name.encode() + b"\n(" + storage + _number(offset) + b"".join(shape) + b"\x89}tR."
    )


@pytest.mark.parametrize(
    "shape",
    [
        {"size": (5,)},
        {"offset": 1},
        {"offset": 2**62},
        {"offset": -1},
        {"size": (2,), "stride": (4,)},
        {"size": (2,), "stride": (-1,)},
        {"size": (-1,)},
        {"size": (2**62, 2**62), "stride": (0, 0)},
        {"size": (2**40,), "stride": (0,)},
        {"size": (2**70,), "stride": (0,)},
        {"size": (2, 2), "stride": (1,)},
        {"size": (1,) * 65, "stride": (1,) * 65},
        {"offset": 5, "size": (0,)},
    ],
    ids=str,
)
def test_tensors_lie_within_their_storage(shape, tmp_path):
    whole = read(tmp_path, zip_of(rebuilt(storage_id()), _0=struct.pack("<4f", 1, 2, 3, 4)))
    assert whole.tolist() == [1, 2, 3, 4]
    message = refuse(tmp_path, zip_of(rebuilt(storage_id(), **shape), _0=bytes(16)))
    assert any(words in message for words in ("no proper shape", "reaches beyond", "repeats a storage"))


@pytest.mark.parametrize(
    "storage, word",
    [
        (storage_id(count=5), "16 bytes"),
        (storage_id(count=2**62), "16 bytes"),
        (storage_id(count=-1), "shape"),
        (storage_id(kind="DoubleStorage"), "16 bytes"),
        (storage_id(kind="QInt8Storage"), "QInt8Storage"),
        (storage_id(key="1"), "missing"),
        (storage_id(key="../data.pkl/../../file"), "missing"),
        (storage_id(key="/etc/passwd"), "missing"),
        (b"X\x01\x00\x00\x000Q", "outside"),
        (b"N", "storage"),
    ],
    ids=range(10),
)
def test_storages_lie_within_the_file(storage, word, tmp_path):
    refuse(tmp_path, zip_of(rebuilt(storage), _0=bytes(16)), word)
    refuse(tmp_path, legacy_of(rebuilt(storage)))


def archive(*names, compression=zipfile.ZIP_STORED, content=b"N.") -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as target:
        for name in names:
            target.writestr(name, content)
    return file.getvalue()


BOMB = {"compression": zipfile.ZIP_DEFLATED, "content": b"\x80\x04N." + bytes(10**8)}


@pytest.mark.parametrize(
    "names, options, word",
    [
        (["a/b.txt"], {}, "none of torch.save"),
        ([], {}, "none of torch.save"),
        (["data.pkl"], {}, "none of torch.save"),
        (["../data.pkl"], {}, "none of torch.save"),
        (["../../data.pkl"], {}, "none of torch.save"),
        (["/data.pkl"], {}, "none of torch.save"),
        (["a/data.pkl", "b/data.pkl"], {}, "none of torch.save"),
        (["a/data.pkl", "a/data.pkl"], {}, "same name"),
        (["a/data.pkl", "a/constants.pkl"], {}, "TorchScript"),
        (["a/data.pkl", "a/byteorder"], {"content": b"big"}, "big-endian"),
        (["a/data.pkl"], BOMB, "compressed"),
    ],
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_zip_files_of_others(names, options, word, tmp_path):
    refuse(tmp_path, archive(*names, **options), word)


def test_a_zip_file_with_an_endless_list_of_entries(tmp_path):
    content = bytearray(archive("archive/data.pkl"))
    assert read(tmp_path, bytes(content)) is None
    position = content.rfind(b"PK\5\6")
    content[position + 12 : position + 16] = struct.pack("<I", 2**31)
    refuse(tmp_path, bytes(content), "list of entries")
    locator = b"PK\6\7" + bytes(16)  # of a record of large files that is none: zipfile does not go by it
    refuse(tmp_path, bytes(content[:position] + bytes(100) + locator + content[position:]), "list of entries")


# Broken files ---------------------------------------------------------------------------------------------------------

SMALL = {"a": torch.arange(6.0).reshape(2, 3), "b": [1, "x", 2.5, None], "c": torch.ones(2, dtype=torch.int8)}
FILES = {
    "zip": lambda: saved(SMALL),
    "legacy": lambda: saved(SMALL, _use_new_zipfile_serialization=False),
    "pickle": lambda: pickle.dumps({**SMALL, "n": np.arange(3), "s": np.float32(1)}, 4),
    "pickle 0": lambda: pickle.dumps({**SMALL, "n": np.arange(3)}, 0),
    "safetensors": lambda: safetensors.torch.save({"a": SMALL["a"]}),
}


@pytest.mark.parametrize("kind", FILES)
def test_files_truncated_at_every_length(kind, tmp_path):
    content, path = FILES[kind](), tmp_path / "file"
    path.write_bytes(content)
    read_checkpoint(path)
    for length in range(len(content) - 1, -1, -1):
        os.truncate(path, length)
        with pytest.raises(UserError):
            read_checkpoint(path)


@pytest.mark.parametrize("kind", FILES)
def test_damaged_files_are_read_or_refused(kind, tmp_path):
    content, draw = FILES[kind](), random.Random(0)
    refused = 0
    for _ in range(300):
        damaged = bytearray(content)
        for _ in range(draw.choice([1, 1, 3, 20])):
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        try:
            read(tmp_path, bytes(damaged))
        except UserError:
            refused += 1
    assert refused > 30


@pytest.mark.parametrize(
    "content, word",
    [
        (b"", "empty"),
        (b"<!DOCTYPE html><html>", "download failed"),
        (b"\n  <?xml version='1.0'?>", "download failed"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git-lfs"),
        (b"Not Found", "no checkpoint"),
        (b"Repository not found. Please make sure", "no checkpoint"),
        (b'{"error": "Unauthorized"}', "no checkpoint"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "no checkpoint"),
        (bytes(1000), "no checkpoint"),
        (bytes(257) + b"ustar" + bytes(300), "tar"),
        (b"PK\x03\x04" + bytes(50), "cut off"),
        (legacy_of(b"N.")[:-1] + b"x", "no checkpoint"),
    ],
    ids=range(12),
)
def test_other_files(content, word, tmp_path):
    refuse(tmp_path, content, word)


def test_files_that_cannot_be_opened(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        read_checkpoint(tmp_path / "absent")
    with pytest.raises(UserError, match="cannot be read"):
        read_checkpoint(tmp_path)
