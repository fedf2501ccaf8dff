# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Pickles as NVIDIA's `torch_utils.persistence` writes them: an object is its class's source text and attributes."""

import pickle
import sys
import types

import pytest


class EasyDict(dict):
    """As NVIDIA's `dnnlib.util.EasyDict` is."""


def _reconstruct_persistent_obj(meta):
    raise AssertionError("the file was run")


class Persistent:
    """As NVIDIA's `persistent_class`. The source text would write a file `ran`."""

    source = "open('ran', 'w').close()"

    def __reduce__(self):
        meta = EasyDict(type="class", version=6, module_src=self.source, class_name=type(self).__name__)
        meta["state"] = dict(self.__dict__)
        return _reconstruct_persistent_obj, (meta,), None, None, None


def nvidia_pickle(value, protocol=4) -> bytes:
    """`value` pickled under NVIDIA's module names, which are not there afterwards."""
    with pytest.MonkeyPatch.context() as patch:
        for name, member in (("torch_utils.persistence", _reconstruct_persistent_obj), ("dnnlib.util", EasyDict)):
            module = types.ModuleType(name)
            setattr(module, member.__name__, member)
            patch.setattr(member, "__module__", name)
            patch.setitem(sys.modules, name.partition(".")[0], types.ModuleType(name.partition(".")[0]))
            patch.setitem(sys.modules, name, module)
        return pickle.dumps(value, protocol)
