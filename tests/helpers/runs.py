# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""What the tests of runs share: a tiny network's options, Accelerate as in a new process, and saved weights."""

import os
import socket
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch.multiprocessing import start_processes


NETWORK = {
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "attention_levels": [1],
    "attention_head_dim": 8,
    "norm_num_groups": 4,
    "sigma_data": 0.75,
    "dropout": 0.1,
}

# A run that shows and saves nothing until its end.
SMALL = {
    "label_column": "label",
    "train_batch_size": 8,
    "report_to": "none",
    "sample_every": 0,
    "checkpointing_steps": 0,
    "logging_steps": 2,
}


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Each test may ask for another precision, as another process would."""
    AcceleratorState._reset_state(reset_partial_state=True)


def weights(pipeline):
    return load_file(os.path.join(pipeline, "unet", "diffusion_pytorch_model.safetensors"))


def same(a, b):
    """Whether two networks have the same weights, to the last bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], value) for name, value in b.items())


def assert_same_weights(a, b, **tolerance):
    """Two pipelines have the same weights, to the last bit unless a tolerance is given."""
    torch.testing.assert_close(weights(a), weights(b), **(tolerance or {"rtol": 0, "atol": 0}))


def in_processes(count: int, function: Callable, *arguments: Any) -> None:
    """Call a function in `count` processes that find each other as torchrun's do. Forked, they import nothing anew."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    start_processes(_as_process, (count, port, function, arguments), count, start_method="fork")


def _as_process(rank: int, count: int, port: int, function: Callable, arguments: tuple) -> None:
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    settings = {**ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
    os.environ.update({name: str(value) for name, value in settings.items()})
    torch.set_num_threads(1)
    function(*arguments)
    # Threads of Gloo may release tensors while the interpreter ends, which aborts it (pytorch/pytorch#179291).
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
