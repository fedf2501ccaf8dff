# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Meters of time, memory and passes through a network."""

import ctypes
import gc
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from ..cli.device import wait_for
from ..cli.training_options import RunOptions


class Counter:
    """Counts the images that pass a network, whose first layer is `first`: forward without and with graph, backward."""

    def __init__(self, network: torch.nn.Module, first: torch.nn.Module):
        self.counts = {"without_graph": 0, "with_graph": 0, "backward": 0}
        self.handles = [network.register_forward_hook(self._forward), first.register_forward_hook(self._watch)]

    def _forward(self, module, args, output):
        self.counts["with_graph" if output[0].requires_grad else "without_graph"] += len(args[0])

    def _watch(self, module, args, output):
        if output.requires_grad:  # a pass that only asks for the last layer's gradient does not come here
            output.register_hook(self._backward)

    def _backward(self, gradient):
        self.counts["backward"] += len(gradient)

    def close(self) -> dict[str, int]:
        """Stop counting; the counts."""
        for handle in self.handles:
            handle.remove()
        return self.counts


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    wait_for(device)
    began = time.perf_counter()
    call()
    wait_for(device)
    return time.perf_counter() - began


def peak_memory(call: Callable[[], object], device: torch.device) -> int | None:
    """The most bytes by which the memory in use rises during `call`.

    On a CPU it is the resident set, and None where the system is not Linux.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    if not os.access("/proc/self/clear_refs", os.W_OK):
        return None
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # forget the peak so far
    before = _resident("VmRSS:")
    call()
    return _resident("VmHWM:") - before


def _resident(name: str) -> int:
    """Bytes that Linux counts for this process under `name`."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))


def step_times(main: Callable, config: RunOptions, steps: int) -> list[float]:
    """The seconds on a clock at which each of the first `steps` iterations of a training run ended.

    Args:
        main: of the training program, called as `main(config, on_step=...)`. It writes to a folder that is removed.
        config: of the run, which neither samples nor saves nor logs here.
    """
    marks = []
    with tempfile.TemporaryDirectory() as folder:
        quiet = replace(
            config,
            output_dir=f"{folder}/run",
            max_train_steps=steps,
            sample_every=0,
            checkpointing_steps=0,
            report_to="none",
            resume_from_checkpoint=None,
        )
        main(quiet, on_step=lambda run: marks.append(time.perf_counter()))
    return marks
