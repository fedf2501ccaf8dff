# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""The bases of frozen networks: images in the size that a network is shown, and feature maps of them."""

import importlib.util
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..cli.errors import UserError, error_text
from ..cli.weights import check_finite


IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class FrozenNetwork(nn.Module):
    """A network that only looks at images, resized to one size.

    `train()` leaves it in evaluation mode: dropout and batch statistics would make it another network.

    Args:
        side: height and width in pixels of the images that it is shown.
        about: what it is, in JSON's types.
        channels: of these images. Gray images are repeated; for 1 channel, those of color images are averaged.
        mode, antialias: how images are resized, as in `torch.nn.functional.interpolate`.
    """

    def __init__(
        self,
        side: tuple[int, int],
        about: dict[str, Any],
        channels: int = 3,
        mode: str = "bilinear",
        antialias: bool = False,
    ):
        super().__init__()
        self.side, self.about, self.channels = side, about, channels
        self.resizing = {"mode": mode, "antialias": antialias, "align_corners": False}

    def train(self, mode: bool = True) -> "FrozenNetwork":
        return super().train(False)

    def size_shown(self, height: int, width: int) -> tuple[int, int]:
        """The size that images of `height` x `width` pixels are resized to."""
        return self.side

    def resized(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, 1 or 3, H, W) in the size and with the channels that the network is shown, in float32 at least."""
        x = images.to(torch.promote_types(images.dtype, torch.float32))
        if x.shape[1] > self.channels:
            x = x.mean(1, keepdim=True)
        size = self.size_shown(*x.shape[-2:])
        if x.shape[-2:] != size:
            x = F.interpolate(x, size=size, **self.resizing)
        return x.expand(-1, self.channels, -1, -1)


class Backbone(FrozenNetwork):
    """A network whose `backbone(images)` is a list of feature maps (B, C_i, H_i, W_i), the finest first.

    Images are float, in [-1, 1], of shape (B, 1 or 3, H, W) and any size. They are resized bilinearly without
    antialiasing, as the authors of CTM do, and normalized with mean and deviation of the network's training images.
    Maps are differentiable in the images; the parameters get no gradient.

    A subclass sets up its network, then calls `freeze`, and has `maps(x)`: the maps of the result of `shown`.

    Args:
        resolution: height and width in pixels of the images that it is shown.
        mean, std: of its training images, in [0, 1], one number or one for each channel.
        about, channels: as of `FrozenNetwork`.

    Attributes:
        num_channels: C_i.
    """

    def __init__(self, resolution: int, mean: Any, std: Any, about: dict[str, Any], channels: int = 3):
        super().__init__((resolution, resolution), {**about, "resolution": resolution}, channels)
        self.resolution = resolution
        mean, std = (torch.as_tensor(value, dtype=torch.float64).expand(channels) for value in (mean, std))
        # ((x + 1) / 2 - mean) / std = scale x + shift
        for name, value in (("scale", 0.5 / std), ("shift", (0.5 - mean) / std)):
            self.register_buffer(name, value.float().reshape(1, channels, 1, 1), persistent=False)

    def freeze(self) -> None:
        """Freeze the network and find `num_channels` by trying it.

        Raises UserError if its weights are broken or its images too small.
        """
        check_finite("it", self.state_dict())
        self.requires_grad_(False).eval().to(memory_format=torch.channels_last)
        try:
            with torch.no_grad():
                self.num_channels = [m.shape[1] for m in self(torch.zeros(1, self.channels, *self.side))]
        except RuntimeError as error:
            raise UserError(
                f"the network gives no feature maps of images of {self.resolution}x{self.resolution} pixels. Show it "
                f"larger images, or images of the size that it was trained on ({error_text(error)})."
            ) from error

    def shown(self, images: torch.Tensor) -> torch.Tensor:
        """The resized and normalized images that the network is shown."""
        return (self.resized(images) * self.scale + self.shift).contiguous(memory_format=torch.channels_last)

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        return self.maps(self.shown(images))


def outputs_of(layers: Iterable[nn.Module], x: torch.Tensor, chosen: Sequence[int]) -> list[torch.Tensor]:
    """The outputs of the layers with the `chosen` indices, when `x` passes one after the other."""
    outputs = []
    for layer in layers:
        x = layer(x)
        outputs.append(x)
    return [outputs[index] for index in chosen]


def installed_file(package: str, pattern: str) -> Path | None:
    """The first file of an installed package that fits `pattern`, or None. The package is not imported."""
    spec = importlib.util.find_spec(package)
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    return next((path for folder in folders for path in sorted(Path(folder).glob(pattern))), None)
