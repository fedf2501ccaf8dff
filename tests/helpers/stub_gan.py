# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""The stand-ins for feature networks and discriminators with which the authors' adversarial steps were recorded."""

import torch
import torch.nn.functional as F
from torch import nn

from training.objective.adversarial import ProjectedDiscriminator
from training.objective.diffaugment import DiffAugmentParameters


class StubBackbone(nn.Module):
    resolution = 224

    def __init__(self, weights, mean, std):
        super().__init__()
        self.c1, self.c2 = nn.Conv2d(3, 6, 4, stride=4), nn.Conv2d(6, 8, 4, stride=4)
        self.load_state_dict(weights)
        self.mean, self.std = (torch.tensor(value).view(3, 1, 1) for value in (mean, std))

    def forward(self, images):
        x = ((images + 1) / 2 - self.mean) / self.std
        x = F.interpolate(x, (224, 224), mode="bilinear", align_corners=False)
        first = F.leaky_relu(self.c1(x), 0.2)
        return [first, F.leaky_relu(self.c2(first), 0.2)]


class StubHeads(nn.Module):
    def __init__(self, weights):
        super().__init__()
        self.d0, self.d1 = nn.Conv2d(6, 1, 8, stride=8), nn.Conv2d(8, 1, 4, stride=4)
        self.load_state_dict(weights)

    def forward(self, features):
        return torch.cat([self.d0(features[0]).flatten(1), self.d1(features[1]).flatten(1)], 1)


def stub_discriminator(weights) -> ProjectedDiscriminator:
    """Both pairs of networks, from the arrays by name."""

    def of(prefix):
        return {n.removeprefix(prefix): torch.from_numpy(weights[n]) for n in weights if n.startswith(prefix)}

    half, imagenet = ([0.5] * 3, [0.5] * 3), ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    backbones = {"a": StubBackbone(of("feat.a."), *half), "b": StubBackbone(of("feat.b."), *imagenet)}
    discriminator = ProjectedDiscriminator(backbones, 0, channels=1)
    for index, name in enumerate("ab"):
        discriminator.projections[index] = nn.Identity()
        discriminator.discriminators[index] = StubHeads(of(f"disc.{name}."))
    return discriminator


def augment_of(arrays, prefix: str) -> DiffAugmentParameters:
    """The authors' parameters of DiffAugment under our names."""
    ours = ("brightness", "saturation", "contrast", "shift_rows", "shift_columns", "cutout_row", "cutout_column")
    theirs = ("brightness", "saturation", "contrast", "translation_x", "translation_y", "offset_x", "offset_y")
    return DiffAugmentParameters(
        **{our: torch.as_tensor(arrays[prefix + their]).flatten() for our, their in zip(ours, theirs)}
    )
