# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""One feature vector for each image, for Frechet distances."""

import torch
from torch import nn

from ..cli.weights import check_finite
from .backbone import FrozenNetwork
from .classifier import kind_of, load_saved, loading_network
from .pretrained import image_processing, load_pretrained


FEATURES_HELP = (
    "Network whose features are compared: 'digits' (embedded), a folder that training.features saved, FID's Inception "
    "or another TorchScript file (.pt, which runs the code inside: give only files that you trust), or an image model "
    "of transformers, by its folder or Hub id."
)

INCEPTION_SIDE = 299  # pixels


@torch.no_grad()
def load_feature_network(name: str, device: torch.device | str = "cpu", prefix: str = "") -> nn.Module:
    """The feature network `name` (see `FEATURES_HELP`), frozen, in evaluation mode, on `device`.

    It takes uint8 images of shape (B, 1 or 3, H, W) and returns float32 features of shape (B, num_features), as
    torchmetrics' `FrechetInceptionDistance(feature=...)` asks. `about` describes it in JSON's types.
    `check_images(channels, height, width)` raises UserError for images that it does not take.

    Raises UserError, which names the option --{prefix}features, if it cannot be loaded or is no network for images.
    """
    with loading_network(f"--{prefix}features {name}", FEATURES_HELP):
        kind, path = kind_of(name)
        if kind == "classifier":
            network = load_saved(path)
        elif kind == "file":
            network = TorchScriptFeatures(str(path), device)
        else:
            network = TransformersFeatures(name)
        check_finite("it", network.state_dict())
        network = network.to(device).requires_grad_(False).eval()
        network.num_features = network(torch.zeros(2, 3, 32, 32, dtype=torch.uint8, device=device)).shape[1]
    network.about = {"name": name, "num_features": network.num_features, **network.about}
    return network


class FeaturesSideBySide(nn.Module):
    """Several feature networks as one: uint8 images to (B, sum of their num_features)."""

    def __init__(self, networks: list[nn.Module]):
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.cat([network(images).float() for network in self.networks], 1)

    def split(self, features: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The features of each network again, of (B, sum of num_features)."""
        return features.split([network.num_features for network in self.networks], 1)


class ResizedFeatures(FrozenNetwork):
    """Base of networks for color images of one size. They take images of every size."""

    def check_images(self, channels: int, height: int, width: int, prefix: str = "") -> None:
        """All images fit."""

    def pixels(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 images (B, 1 or 3, H, W) as float32 (B, 3, *side), values in 0..255."""
        return self.resized(images).clamp(0, 255)


class TorchScriptFeatures(ResizedFeatures):
    """FID's Inception as a TorchScript file: (B, 3, 299, 299) in [-1, 1] to (B, 2048).

    Images are resized bilinearly with antialiasing.

    NVIDIA's file, which has an argument `return_features`, takes values in 0..255 of any size and resizes by itself.
    """

    def __init__(self, path: str, device: torch.device | str):
        network = torch.jit.load(path, map_location=device)
        resizes = "return_features" in [argument.name for argument in network.forward.schema.arguments]
        resizing = "its own" if resizes else f"bilinear to {INCEPTION_SIDE}x{INCEPTION_SIDE}, antialiased"
        super().__init__((INCEPTION_SIDE,) * 2, {"kind": "TorchScript", "resizing": resizing}, antialias=True)
        self.network, self.resizes_itself = network, resizes

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Features of uint8 images, float32 of shape (B, num_features)."""
        if self.resizes_itself:
            features = self.network(images.expand(-1, 3, -1, -1), return_features=True)
        else:
            features = self.network(self.pixels(images) / 127.5 - 1)
        if isinstance(features, (tuple, list)):
            features = features[0]
        if features.ndim == 4:
            features = features.mean((2, 3))
        if features.ndim != 2 or len(features) != len(images):
            raise ValueError(f"the file returns a tensor of shape {tuple(features.shape)} for {len(images)} images")
        return features.float()


class TransformersFeatures(ResizedFeatures):
    """An image model of transformers: its pooled output, else the mean of its last hidden state.

    It is the mean too where the files lack the pooler, as those of many classifiers do: transformers would draw it at
    random, anew each time. Whole images are resized, bicubic and antialiased, to the size that its image processor
    crops to, and get the processor's mean and standard deviation.
    """

    def __init__(self, name: str):
        side, mean, std = image_processing(name)
        network, missing = load_pretrained(name)
        about = {
            "kind": f"transformers {type(network).__name__}",
            "resizing": f"bicubic to {side[0]}x{side[1]}, antialiased",
        }
        super().__init__(side, about, mode="bicubic", antialias=True)
        self.network = network
        self.has_pooler = all(key.startswith("text_") for key in missing)
        self.register_buffer("mean", mean.reshape(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", std.reshape(1, 3, 1, 1), persistent=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Features of uint8 images, float32 of shape (B, num_features)."""
        x = (self.pixels(images) - self.mean) / self.std
        # CLIP and similar models of images and texts have a method for the image half.
        encode = getattr(self.network, "get_image_features", self.network)
        output = encode(pixel_values=x)
        if isinstance(output, torch.Tensor):
            return output.flatten(1).float()
        pooled = getattr(output, "pooler_output", None)
        if pooled is None or not self.has_pooler:
            hidden = output.last_hidden_state
            pooled = hidden.mean(1) if hidden.ndim == 3 else hidden.mean((2, 3))
        return pooled.flatten(1).float()
