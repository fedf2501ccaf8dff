"""Time, memory and passes through a network; marks of steps through a hook of TrainingRun, no patching."""

import ctypes
import gc
import os
import tempfile
import time
import unittest.mock
from collections.abc import Callable

import torch

from .. import train_ctm
from ..cli.device import wait_for
from ..run import loop as run


class Counter:
    """Images through a network, of which `first` is the first layer: forward without and with graph, and backward."""

    def __init__(self, network: torch.nn.Module, first: torch.nn.Module):
        self.without_graph = self.with_graph = self.backward = 0
        self.handles = [network.register_forward_hook(self._forward), first.register_forward_hook(self._watch)]

    def _forward(self, module, args, output):
        if output[0].requires_grad:
            self.with_graph += len(args[0])
        else:
            self.without_graph += len(args[0])

    def _watch(self, module, args, output):
        if output.requires_grad:  # a pass that only asks for the last layer's gradient does not come here
            output.register_hook(self._backward)

    def _backward(self, gradient):
        self.backward += len(gradient)

    def close(self) -> dict[str, int]:
        for handle in self.handles:
            handle.remove()
        return {name: getattr(self, name) for name in ("without_graph", "with_graph", "backward")}


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    wait_for(device)
    began = time.perf_counter()
    call()
    wait_for(device)
    return time.perf_counter() - began


def peak_memory(call: Callable[[], object], device: torch.device) -> int | None:
    """Bytes by which memory in use rises at most during `call`; on a CPU the resident set, on Linux only."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before

    def status(name: str) -> int:
        with open("/proc/self/status") as file:
            return next(1024 * int(line.split()[1]) for line in file if line.startswith(name))

    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # forget the peak so far
        before = status("VmRSS:")
    except OSError:
        call()
        return None
    call()
    return status("VmHWM:") - before


def step_times(options: dict, steps: int, clock: Callable[[], float] = time.perf_counter) -> list[float]:
    """When each of `steps` iterations of `training.train_ctm` with `options` ended, by `clock`. Writes to a folder that is removed."""
    marks = []

    class Noting(run.TrainingRun):
        def _after_step(self, *args):
            marks.append(clock())
            super()._after_step(*args)

    quiet = {"sample_every": 0, "checkpointing_steps": 0, "report_to": "none", "resume_from_checkpoint": None}
    with tempfile.TemporaryDirectory() as folder, unittest.mock.patch.object(train_ctm, "TrainingRun", Noting):
        place = {"output_dir": os.path.join(folder, "run"), "max_train_steps": steps}
        train_ctm.main(train_ctm.CTMConfig(**{**options, **quiet, **place}))
    return marks
