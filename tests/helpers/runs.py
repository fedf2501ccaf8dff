# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""What the tests of runs share: a tiny network's options, Accelerate as in a new process, and saved weights."""

import os

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file


NETWORK = {
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "attention_levels": [1],
    "attention_head_dim": 8,
    "norm_num_groups": 4,
    "sigma_data": 0.75,
    "dropout": 0.1,
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
