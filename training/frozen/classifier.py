# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""The small classifier that training.features trains, and how a name is told from that of another network."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from ..cli.errors import UserError, loading
from ..cli.files import read_json
from ..data.images import to_sample


EMBEDDED = {"digits": Path(__file__).parents[2] / "assets" / "digits-features"}

CONFIG = "config.json"


class FeatureNetwork(nn.Module):
    """A small classifier of small images. The input of its last layer is its features.

    Four 3x3 convolutions, half the resolution after the second, and the mean over positions. Its batch normalization is
    fixed after training, so that contrast and brightness reach the features; normalizing each image by itself would
    hide them.

    Args:
        channels: 1 (gray; the channels of color images are averaged) or 3.
        resolution: height and width in pixels of its images.
        num_classes: number of classes that it tells apart.
        num_features: width of the features.
    """

    def __init__(self, channels: int = 1, resolution: int = 8, num_classes: int = 10, num_features: int = 64):
        super().__init__()
        self.config = {
            "channels": channels,
            "resolution": resolution,
            "num_classes": num_classes,
            "num_features": num_features,
        }
        half = num_features // 2
        self.body = nn.Sequential(
            *_convolution(channels, half),
            *_convolution(half, half),
            nn.MaxPool2d(2),
            *_convolution(half, num_features),
            *_convolution(num_features, num_features),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.classifier = nn.Linear(num_features, num_classes)

    def check_images(self, channels: int, height: int, width: int, prefix: str = "") -> None:
        """Raise UserError, which names the option --{prefix}features, for images of another size than in training."""
        side = self.config["resolution"]
        if (height, width) != (side, side):
            raise UserError(
                f"--{prefix}features is a network for {side}x{side} images, these are {height}x{width}. Use a folder "
                "that training.features made from such images, FID's Inception, or an image model of transformers."
            )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Features, float32 of shape (B, num_features), of uint8 images (B, 1 or 3, resolution, resolution)."""
        x = to_sample(images)
        channels = self.config["channels"]
        if x.shape[1] != channels:
            x = x.mean(1, keepdim=True).expand(-1, channels, -1, -1)
        return self.body(x)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (B, num_classes) of samples in [-1, 1] with the network's channels; differentiable for guidance."""
        return self.classifier(self.body(x))

    def classify(self, images: torch.Tensor) -> torch.Tensor:
        """Class of each uint8 image, int64 of shape (B,)."""
        return self.classifier(self(images)).argmax(1)


def _convolution(channels_in: int, channels_out: int) -> list[nn.Module]:
    return [nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False), nn.BatchNorm2d(channels_out), nn.ReLU()]


def is_saved(folder: str | Path) -> bool:
    """Whether `folder` holds a `FeatureNetwork` that training.features saved."""
    return read_json(folder, CONFIG).get("_class_name") == FeatureNetwork.__name__


def load_saved(folder: str | Path) -> FeatureNetwork:
    """The network that training.features saved in `folder`, on the CPU.

    `about` holds its config and its accuracy, and `id2label` the names of its classes, None if it has none.
    """
    config = json.loads(Path(folder, CONFIG).read_text(encoding="utf-8"))
    network = FeatureNetwork(*(config[name] for name in ("channels", "resolution", "num_classes", "num_features")))
    network.load_state_dict(load_file(Path(folder, "model.safetensors")))
    network.about = {k: v for k, v in config.items() if k not in ("_class_name", "id2label", "options")}
    network.id2label = {int(number): name for number, name in (config.get("id2label") or {}).items()} or None
    return network.eval()


def kind_of(name: str) -> tuple[str, Path]:
    """The kind of network that `name` asks for, and its path.

    The kinds are "classifier" (a folder of training.features), "file", and "transformers" (a folder or Hub id).
    """
    path = Path(name) if os.path.exists(name) else EMBEDDED.get(name, Path(name))
    if is_saved(path):
        return "classifier", path
    is_file = path.is_file() or path.suffix in (".pt", ".pth", ".ts")
    return "file" if is_file else "transformers", path


@contextlib.contextmanager
def loading_network(what: str, choices: str) -> Iterator[None]:
    """Turn any error of the block into a UserError that begins with `what` and tells the `choices`."""
    with loading(what, choices):
        try:
            yield
        except UserError as error:
            raise UserError(f"{what} cannot be used: {error} {choices}") from error
