# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Tiny real networks, and the numbers of the authors' code where this checkout has them."""

import os


os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before huggingface_hub is imported: no test waits for a network
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the networks here are too small to share

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel

from helpers.places import ORACLE
from helpers.tiny_networks import make_unet_2d


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


@pytest.fixture
def oracle():
    """Read an .npz of the oracle folder, or of a path in another one; skip where the checkout has none."""

    def read(name):
        if not (ORACLE / name).exists():
            pytest.skip("the oracle folder is not here")
        return np.load(ORACLE / name)

    return read
