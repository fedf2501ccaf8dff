"""How two estimates at time 0 are compared, pixels and features."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from ..cli.errors import UserError
from ..cli.names import public_name
from ..cli.shared_options import DistanceOptions
from ..frozen.backbone import Backbone
from ..frozen.maps import load_backbone
from ..frozen.vgg import HEAD, LPIPSBackbone, lpips_weights
from .losses import DISTANCES, Distance


def unit_vectors(features: torch.Tensor) -> torch.Tensor:
    """Features (B, C, H, W) divided by their length over the channels, plus 1e-10 as LPIPS does; where that is 0, 0 without gradient."""
    length = torch.linalg.vector_norm(features, dim=1, keepdim=True)
    return features / torch.where(length > 0, length + 1e-10, torch.inf)


def feature_distance(a: torch.Tensor, b: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
    """sum_c w_c (a_c / |a| - b_c / |b|)^2, mean over positions, of feature maps (B, C, H, W); shape (B,) (Zhang et al. 2018, Eq. 1).

    In float32 at least. `weight` is of shape (C,); None is 1 for each channel, the squared distance of unit vectors, in 0..4.
    """
    a, b = (unit_vectors(x.to(torch.promote_types(x.dtype, torch.float32))) for x in (a, b))
    squares = (a - b).square()
    if weight is not None:
        squares = squares * weight[:, None, None]
    return squares.sum(1).mean((1, 2))


class PixelDistance(nn.Module):
    """A distance of losses.DISTANCES, by its name."""

    def __init__(self, name: str):
        super().__init__()
        self.function: Distance = DISTANCES[name]
        self.about = {"name": name}

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Shape (B,), of images (B, C, H, W)."""
        return self.function(a, b)


class PerceptualDistance(nn.Module):
    """Distance of the feature maps that a frozen network gives of two batches of images.

    With `heads`, one weight for each channel of each map, the sum over the maps: LPIPS. Without, every channel weighs the same and it is the
    mean over the maps: LPIPS's baseline without learning (Zhang et al. 2018, Section 4.1).

    In float32 whatever autocast says, as the authors do: between images that differ by 0.01, the gradient in bfloat16 was at an angle of 40
    degrees to this one for EfficientNet-Lite0 and of 15 for LPIPS. Gradient goes to each batch that asks for it; of a target without
    gradient nothing but its features is kept.

    Args:
        backbone: the frozen network.
        heads: weights of shape (C_i,).
        about: what it is, in JSON's types.
    """

    def __init__(
        self, backbone: Backbone, heads: Sequence[torch.Tensor] | None = None, about: dict[str, Any] | None = None
    ):
        super().__init__()
        self.backbone, self.with_heads = backbone, heads is not None
        self.about = {**(about or {}), **backbone.about}
        for number, head in enumerate(heads or ()):
            self.register_buffer(f"head{number}", head.detach().clone(), persistent=False)

    def train(self, mode: bool = True) -> "PerceptualDistance":
        """Stays in evaluation mode."""
        return super().train(False)

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Shape (B,), of images (B, 1 or 3, H, W) in [-1, 1]."""
        with torch.autocast(a.device.type, enabled=False):
            maps = list(zip(self.backbone(a), self.backbone(b), strict=True))
            if self.with_heads:
                return sum(feature_distance(x, y, getattr(self, f"head{i}")) for i, (x, y) in enumerate(maps))
            return sum(feature_distance(x, y) for x, y in maps) / len(maps)


def make_distance(options: DistanceOptions, device: torch.device | str = "cpu") -> nn.Module:
    """The distance that `options` ask for, on `device`: a module, `distance(a, b)` of shape (B,) for images (B, C, H, W) in [-1, 1].

    `about` says what it is, in JSON's types.

    Raises UserError if its network cannot be had.
    """
    if options.distance in DISTANCES:
        return PixelDistance(options.distance).to(device)
    if options.distance == "lpips":
        network = options.distance_network
        with names_option("distance_weights"):
            weights, source = lpips_weights(network, options.distance_weights)
        with names_option("distance_resolution"):
            backbone = LPIPSBackbone(weights, network, options.distance_pooling, options.distance_resolution)
        heads = [weights[HEAD.format(number)].flatten() for number in range(len(backbone.num_channels))]
        return PerceptualDistance(backbone, heads, {"name": "lpips", "weights": source}).to(device)
    with names_option("distance_network"):
        backbone = load_backbone(options.distance_network, options.distance_resolution)
    about = {"name": "features", "network": public_name(options.distance_network)}
    return PerceptualDistance(backbone, about=about).to(device)


@contextlib.contextmanager
def names_option(name: str) -> Iterator[None]:
    """UserErrors of the block begin with the option."""
    try:
        yield
    except UserError as error:
        raise UserError(f"--{name}: {error}") from error
