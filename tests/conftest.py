# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Tiny real networks, and the numbers of the authors' code where this checkout has them."""

import os
from pathlib import Path


os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before huggingface_hub is imported: no test waits for a network
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the networks here are too small to share

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel

from diffusers_ctm import CTMUNet2DModel
from training.time_sampling import Times


ORACLE = Path(__file__).parents[2] / "shared" / "oracle"

TINY = {
    "sample_size": 8,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 8,
    "attention_head_dim": 8,
}


def make_unet_2d(cls=CTMUNet2DModel, random=True, seed=0, **changes):
    """A tiny network in eval mode. `random=True` also fills the layers that start at zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = cls(**{**TINY, **changes}).eval()
        if random and cls is CTMUNet2DModel:
            for name, parameter in unet.named_parameters():
                if name.endswith("time_emb_proj.weight"):
                    torch.nn.init.normal_(parameter.data, std=0.3)
    return unet


@pytest.fixture
def make_unet():
    """The function `make_unet_2d`."""
    return make_unet_2d


@pytest.fixture
def exact_teacher(make_unet):
    """Make a UNet2DModel with F = 0: the exact EDM denoiser of data N(0, sigma_data^2), whatever sigma_data."""

    def make(**changes):
        unet = make_unet(UNet2DModel, **changes)
        torch.nn.init.zeros_(unet.conv_out.weight)
        torch.nn.init.zeros_(unet.conv_out.bias)
        return unet

    return make


def grid_times(grid: torch.Tensor, t: list[int], u: list[int], s: list[int]) -> Times:
    """The times of samples whose t, u, s are these entries of the descending `grid`, each with a path of its own."""
    t, u, s = (torch.as_tensor(index) for index in (t, u, s))
    steps = u - t
    rows = t + torch.minimum(torch.arange(int(steps.max()) + 1)[:, None], steps)
    return Times(grid[t], grid[u], grid[s], grid[rows], steps, torch.zeros_like(t), steps, grid[-1].item())


@pytest.fixture
def oracle():
    """Read an .npz of the oracle folder, or skip where the checkout has none."""

    def read(name):
        if not (ORACLE / name).exists():
            pytest.skip("the oracle folder is not here")
        return np.load(ORACLE / name)

    return read
