# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Tiny image autoencoders of diffusers, and one that loses nothing: pixels in another order."""

from collections.abc import Callable
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny, VQModel
from diffusers.configuration_utils import FrozenDict
from torch import nn

from diffusers_ctm import CTMUNet2DModel, EDM2UNet2DModel, EDMUNet2DModel


BLOCKS = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
TRIPLES = {
    **{f"{part}_block_out_channels": (8, 8, 16) for part in ("encoder", "decoder")},
    **{f"{part}_block_types": ("ResBlock",) * 3 for part in ("encoder", "decoder")},
    **{f"{part}_layers_per_block": (1, 1, 1) for part in ("encoder", "decoder")},
    **{f"{part}_qkv_multiscales": ((), (), ()) for part in ("encoder", "decoder")},
}
# Class, options, and how many pixels of a side are one latent.
AUTOENCODERS: dict[str, tuple[type[nn.Module], dict, int]] = {
    "KL": (AutoencoderKL, {"block_out_channels": (4, 4, 8), "norm_num_groups": 2, **BLOCKS}, 4),
    "Tiny": (
        AutoencoderTiny,
        {
            **{f"{part}_block_out_channels": (4, 4) for part in ("encoder", "decoder")},
            **{f"num_{part}_blocks": (1, 1) for part in ("encoder", "decoder")},
        },
        2,
    ),
    "DC": (
        AutoencoderDC,
        {
            "attention_head_dim": 8,
            "downsample_block_type": "Conv",
            "upsample_block_type": "interpolate",
            "latent_channels": 4,
            **TRIPLES,
        },
        4,
    ),
    "VQ": (
        VQModel,
        {
            "block_out_channels": (4, 4, 8),
            "norm_num_groups": 2,
            "num_vq_embeddings": 64,
            "latent_channels": 3,
            "vq_embed_dim": 4,
            **BLOCKS,
        },
        4,
    ),
}


def make_autoencoder(name: str, seed: int = 0, **changes) -> nn.Module:
    """A tiny autoencoder of a class of `AUTOENCODERS` with latents of 4 channels, in eval mode."""
    cls, options, _ = AUTOENCODERS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return cls(**{**options, **changes}).eval()


Order = tuple[Callable[[torch.Tensor], torch.Tensor], Callable[[torch.Tensor], torch.Tensor]]


def in_memory(factor: int = 2) -> Order:
    """(fold, unfold): rows of pixels become channels, in the order of the memory, in which noise is drawn."""
    return (
        lambda x: x.reshape(len(x), x.shape[1] * factor**2, *(side // factor for side in x.shape[2:])),
        lambda z: z.reshape(len(z), z.shape[1] // factor**2, *(side * factor for side in z.shape[2:])),
    )


def in_blocks(factor: int = 2) -> Order:
    """(fold, unfold): the pixels of a block become the channels of its latent."""
    return lambda x: F.pixel_unshuffle(x, factor), lambda z: F.pixel_shuffle(z, factor)


class Folding(nn.Module):
    """An autoencoder that loses nothing: raw latents are `gain` times the pixels, plus `shift`, in another order.

    Args:
        order: of the pixels; by default `in_memory`.
        channels: of the images; latents have four times as many, and half the side.
        normalized: whether it works on images in [-1, 1]; else in [0, 1].
        config: further entries of its config.
    """

    def __init__(self, order: Order | None = None, channels=1, gain=1.0, shift=0.0, **config):
        super().__init__()
        self.fold, self.unfold = order or in_memory()
        self.gain, self.shift = nn.Parameter(torch.tensor(gain)), shift
        sizes = {"in_channels": channels, "latent_channels": 4 * channels, "block_out_channels": (1, 1)}
        self.config = FrozenDict({**sizes, **config})
        self.seen = []  # what it was given, in this order

    @property
    def dtype(self):
        return self.gain.dtype

    @property
    def device(self):
        return self.gain.device

    def encode(self, images):
        self.seen.append(images)
        return SimpleNamespace(latents=self.fold(images) * self.gain + self.shift)

    def decode(self, raw, return_dict):
        self.seen.append(raw)
        return (self.unfold((raw - self.shift) / self.gain),)


class Unfolded(nn.Module):
    """A network of latents of `Folding` as one of pixels."""

    def __init__(self, unet: CTMUNet2DModel | EDMUNet2DModel | EDM2UNet2DModel, order: Order):
        super().__init__()
        self.unet, self.has_target_time = unet, True
        self.fold, self.unfold = order
        channels, size = unet.config.in_channels // 4, 2 * unet.config.sample_size
        sizes = {"in_channels": channels, "out_channels": channels, "sample_size": size}
        self.config = FrozenDict({**unet.config, **sizes})
        self.dtype, self.device = torch.float32, torch.device("cpu")
        self.train(unet.training)

    def forward(self, sample, *times, return_dict=False, **labels):
        return (self.unfold(self.unet(self.fold(sample), *times, return_dict=False, **labels)[0]),)
