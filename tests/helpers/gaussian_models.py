# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Normally distributed images in parquet files, and saved models that are exact for them."""

from pathlib import Path

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Features, Image
from diffusers import UNet2DModel
from PIL import Image as PILImage

from diffusers_ctm import CTMPipeline, CTMScheduler, CTMUNet2DModel, EDMHeunScheduler
from helpers.tiny_networks import make_unet_2d


SIGMA_DATA = 0.3


def gaussian_pixels(*shape: int, seed: int = 0) -> np.ndarray:
    """uint8 images whose values in [-1, 1] are N(0, SIGMA_DATA^2)."""
    pixels = np.random.default_rng(seed).normal(0, SIGMA_DATA, shape)
    return np.clip(np.round((pixels + 1) * 127.5), 0, 255).astype(np.uint8)


def save_parquet(path: Path, pixels: np.ndarray, labels: list[int]) -> str:
    """Images (n, H, W) or (n, H, W, 3) of the classes a and b."""
    schema = Features({"image": Image(), "label": ClassLabel(names=["a", "b"])})
    columns = {"image": [PILImage.fromarray(image) for image in pixels], "label": labels}
    Dataset.from_dict(columns, features=schema).to_parquet(str(path))
    return str(path)


def save_exact(folder: Path, sigma_data: float, ctm: bool = True, bias: float = 0.0, **changes) -> str:
    """A pipeline with F = `bias`: for 0 the exact denoiser of N(0, sigma_data^2), and as a CTM its Euler steps."""
    unet = make_unet_2d(CTMUNet2DModel if ctm else UNet2DModel, random=False, **changes)
    torch.nn.init.zeros_(unet.conv_out.weight)
    torch.nn.init.constant_(unet.conv_out.bias, bias)
    scheduler = (CTMScheduler if ctm else EDMHeunScheduler)(sigma_data=sigma_data, sigma_max=2.0)
    CTMPipeline(unet, scheduler).save_pretrained(str(folder))
    return str(folder)
