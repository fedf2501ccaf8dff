# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Tiny feature networks with random weights, and images for them."""

import torch

from helpers.exact import randn
from training.frozen.backbone import Backbone
from training.frozen.classifier import FeatureNetwork


def images(*shape, seed=0, dtype=torch.float32):
    return (0.5 * randn(*shape, seed=seed, dtype=dtype)).clamp(-1, 1)


class Shown(Backbone):
    """Its only map is the images that it is shown."""

    def __init__(self, resolution, mean=0.5, std=0.5, channels=3):
        super().__init__(resolution, mean, std, {}, channels)
        self.freeze()

    def maps(self, x):
        return [x]


def classifier(channels=1):
    torch.manual_seed(0)
    network = FeatureNetwork(channels, 8, 4, 6)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean, -0.2, 0.2)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
    return network


def efficientnet_weights(width=2):
    """Random weights in the layout of the package, a few channels wide."""
    generator = torch.Generator().manual_seed(0)
    weights = {}

    def convolution(name, norm, channels_out, channels_in, kernel):
        weights[f"{name}.weight"] = (
            randn(channels_out, channels_in, kernel, kernel, seed=len(weights), dtype=torch.float32) / kernel
        )
        for part in ("weight", "bias", "running_mean", "running_var"):
            value = torch.rand(channels_out, generator=generator)
            weights[f"{norm}.{part}"] = value + 0.5 if part in ("weight", "running_var") else value - 0.5
        weights[f"{norm}.num_batches_tracked"] = torch.tensor(0)

    convolution("_conv_stem", "_bn0", width, 3, 3)
    channels = width
    kernels = (3, 3, 3, 5, 5, 3, 3, 3, 5, 5, 5, 5, 5, 5, 5, 3)
    widths = (1, 2, 2, 3, 3, 3, 3, 3, 4, 4, 4, 5, 5, 5, 5, 6)
    for index, (kernel, channels_out) in enumerate(zip(kernels, widths)):
        prefix, inner = f"_blocks.{index}", channels
        if index > 0:
            inner = 2 * channels
            convolution(f"{prefix}._expand_conv", f"{prefix}._bn0", inner, channels, 1)
        convolution(f"{prefix}._depthwise_conv", f"{prefix}._bn1", inner, 1, kernel)
        convolution(f"{prefix}._project_conv", f"{prefix}._bn2", channels_out, inner, 1)
        channels = channels_out
    convolution("_conv_head", "_bn1", 8, channels, 1)
    return weights
