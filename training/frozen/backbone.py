"""Base of networks that give feature maps."""

import importlib.util
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..cli.errors import UserError


IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Backbone(nn.Module):
    """Frozen feature network: `backbone(images)` is a list of feature maps (B, C_i, H_i, W_i), the finest first.

    Images are float, in [-1, 1], of shape (B, 1 or 3, H, W) and any size; they are resized bilinearly to `resolution` (the authors' way:
    no antialiasing), grey is repeated, and mean and deviation of the network's training are applied. Differentiable in the images.
    The parameters get no gradient, and `train()` leaves it in evaluation mode.

    A subclass sets up its network, then calls `freeze`.

    Args:
        resolution: height and width in pixels of what the network is shown.
        mean, std: of its training images, in [0, 1], one number or one for each channel.
        about: what it is, in JSON's types.
        channels: of what it is shown; 1 averages the channels of colour images.

    Attributes:
        num_channels: C_i.
    """

    num_channels: list[int]

    def __init__(self, resolution: int, mean: Any, std: Any, about: dict[str, Any], channels: int = 3):
        super().__init__()
        self.resolution, self.channels = resolution, channels
        self.about = {**about, "resolution": resolution}
        mean, std = (torch.as_tensor(value, dtype=torch.float64).expand(channels) for value in (mean, std))
        # ((x + 1) / 2 - mean) / std = scale x + shift
        for name, value in (("scale", 0.5 / std), ("shift", (0.5 - mean) / std)):
            self.register_buffer(name, value.float().reshape(1, channels, 1, 1), persistent=False)

    def freeze(self) -> None:
        """Freeze the network and learn `num_channels` by trying it. Raises UserError if it gives no maps of images this small."""
        self.requires_grad_(False).eval().to(memory_format=torch.channels_last)
        try:
            with torch.no_grad():
                maps = self(torch.zeros(1, self.channels, self.resolution, self.resolution))
        except RuntimeError as error:
            reason = f"{type(error).__name__}: {str(error).strip()}"
        else:
            reason = "" if maps and all(m.ndim == 4 and min(m.shape) > 0 for m in maps) else "an empty one"
        if reason:
            raise UserError(
                f"the network gives no feature maps of images of {self.resolution}x{self.resolution} pixels ({reason}); "
                "show it larger ones, or those of the size it was trained on"
            )
        self.num_channels = [m.shape[1] for m in maps]

    def train(self, mode: bool = True) -> "Backbone":
        """Stays in evaluation mode: dropout and batch statistics would make it another network."""
        return super().train(False)

    def size_shown(self, height: int, width: int) -> tuple[int, int]:
        """The size that images of `height` x `width` pixels are resized to."""
        return self.resolution, self.resolution

    def shown(self, images: torch.Tensor) -> torch.Tensor:
        """What the network is shown of `images`."""
        if images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ValueError(f"images must be of shape (B, 1 or 3, H, W), got {tuple(images.shape)}")
        x = images.to(torch.promote_types(images.dtype, torch.float32))
        if x.shape[1] > self.channels:
            x = x.mean(1, keepdim=True)
        size = self.size_shown(*x.shape[-2:])
        if x.shape[-2:] != size:
            x = F.interpolate(x, size=size, mode="bilinear", align_corners=False)
        x = x * self.scale + self.shift  # repeats grey
        return x.contiguous(memory_format=torch.channels_last)

    def maps(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Feature maps of what `shown` returns."""
        raise NotImplementedError

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Feature maps of `images`."""
        return self.maps(self.shown(images))


def installed_file(package: str, pattern: str) -> Path | None:
    """The first file of an installed package that `pattern` fits, found without importing the package; None if there is none."""
    spec = importlib.util.find_spec(package)
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    return next((path for folder in folders for path in sorted(Path(folder).glob(pattern))), None)
