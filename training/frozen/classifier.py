"""The small classifier of small images that training.features trains."""

import json
import os
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from ..cli.errors import UserError
from ..data.images import to_sample


EMBEDDED = {"digits": Path(__file__).parents[2] / "assets" / "digits-features"}


class FeatureNetwork(nn.Module):
    """A small classifier of small images; what its last layer reads are the features.

    Four 3x3 convolutions, halved resolution after the second, and the mean over positions. Batch normalisation, fixed once
    trained, so that contrast and brightness reach the features; normalising each image by itself would hide them.

    Args:
        channels: 1 (grey; the channels of colour images are averaged) or 3.
        resolution: height and width in pixels of its images.
        num_classes: that it tells apart.
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
        self.num_features = num_features
        self.about = dict(self.config)
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

    def check_images(self, channels: int, height: int, width: int) -> None:
        """Raise UserError for images of another size than it was trained on."""
        side = self.config["resolution"]
        if (height, width) != (side, side):
            raise UserError(
                f"--features is a network for {side}x{side} images, these are {height}x{width}. Use a folder that "
                "training.features made from such images, FID's Inception, or an image model of transformers."
            )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Features, float32 of shape (B, num_features), of uint8 images (B, 1 or 3, resolution, resolution)."""
        x = to_sample(images)
        wanted = self.config["channels"]
        if x.shape[1] != wanted:
            x = x.mean(1, keepdim=True).expand(-1, wanted, -1, -1)
        return self.body(x)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """Logits, shape (B, num_classes), of samples in [-1, 1] with the network's channels; differentiable, as guidance needs them."""
        return self.classifier(self.body(x))

    def classify(self, images: torch.Tensor) -> torch.Tensor:
        """Class of each image, int64 of shape (B,)."""
        return self.classifier(self(images)).argmax(1)


def _convolution(channels_in: int, channels_out: int) -> list[nn.Module]:
    return [nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False), nn.BatchNorm2d(channels_out), nn.ReLU()]


def kind_of(name: str) -> tuple[str, Path]:
    """What network `name` says, and its path: "classifier" (a folder of this program), "file" or "transformers" (folder or Hub id).

    Raises UserError if it is the embedded one and that is missing.
    """
    folder = EMBEDDED.get(name, Path(name)) if not os.path.exists(name) else Path(name)
    if name in EMBEDDED and not folder.is_dir():
        raise UserError(f"{folder.name} is missing; make it with `python -m training.features`.")
    if _config_of(folder).get("_class_name") == FeatureNetwork.__name__:
        return "classifier", folder
    if folder.is_file() or folder.suffix in (".pt", ".pth", ".ts"):
        return "file", folder
    return "transformers", folder


def _config_of(folder: Path) -> dict:
    path = folder / "config.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def load_saved(folder: str | Path) -> FeatureNetwork:
    """A network that this program saved; `about` holds its config, accuracy included. On the CPU."""
    folder = Path(folder)
    config = _config_of(folder)
    network = FeatureNetwork(**{name: config[name] for name in FeatureNetwork().config})
    network.load_state_dict(load_file(folder / "model.safetensors"))
    network.about = {name: value for name, value in config.items() if name not in ("_class_name", "options")}
    return network.eval()
