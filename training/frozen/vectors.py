"""One vector per image, for Frechet distances."""

import torch
import torch.nn.functional as F
from torch import nn

from ..cli.errors import UserError
from .classifier import kind_of, load_saved
from .pretrained import image_processing, load_pretrained


FEATURES_HELP = (
    "Network whose features are compared: 'digits' (embedded), a folder that training.features saved, FID's Inception or "
    "another TorchScript file (.pt, which runs the code inside: give only files that you trust), or an image model of "
    "transformers, by its folder or Hub id."
)

INCEPTION_SIDE = 299  # pixels


def load_feature_network(name: str, device: torch.device | str = "cpu", prefix: str = "") -> nn.Module:
    """The feature network `name` (see `FEATURES_HELP`), frozen, in evaluation mode, on `device`.

    It takes uint8 images of shape (B, 1 or 3, H, W) and returns float32 features of shape (B, num_features), as torchmetrics'
    `FrechetInceptionDistance(feature=...)` asks. `about` describes it in JSON's types; `check_images(channels, height, width)`
    raises UserError for images that it does not take. Errors name the option --{prefix}features.

    Raises UserError if it is not there or is no network for images.
    """
    try:
        kind, folder = kind_of(name)
        if kind == "classifier":
            network = load_saved(folder)
        elif kind == "file":
            network = TorchScriptFeatures(str(folder), device)
        else:
            network = TransformersFeatures(name)
        network = network.to(device).requires_grad_(False).eval()
        network.about = {"name": name, "num_features": network.num_features, **network.about}
    except UserError as error:
        raise UserError(f"--{prefix}features {name}: {error}") from error
    except Exception as error:  # torch, safetensors, transformers and huggingface_hub each raise their own
        raise UserError(
            f"--{prefix}features {name} cannot be loaded. {FEATURES_HELP}\n{type(error).__name__}: {str(error).strip()}"
        ) from error
    return network


class ResizedFeatures(nn.Module):
    """Base of networks that see colour images of one size: repeats grey, resizes and normalises."""

    def __init__(self, side: tuple[int, int], mode: str):
        super().__init__()
        self.side, self.mode = side, mode

    def check_images(self, channels: int, height: int, width: int, prefix: str = "") -> None:
        """Takes images of every size."""

    def resized(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 (B, 1 or 3, H, W) to float32 (B, 3, *side), values in 0..255."""
        x = images.to(torch.float32).expand(-1, 3, -1, -1)
        if x.shape[-2:] != torch.Size(self.side):
            x = F.interpolate(x, size=self.side, mode=self.mode, align_corners=False, antialias=True).clamp(0, 255)
        return x

    def measure(self, device: torch.device | str) -> None:
        """Set `num_features` by trying two images."""
        with torch.no_grad():
            self.num_features = self(torch.zeros(2, 3, 32, 32, dtype=torch.uint8, device=device)).shape[1]


class TorchScriptFeatures(ResizedFeatures):
    """FID's Inception as a TorchScript file: (B, 3, 299, 299) in [-1, 1] to (B, 2048), images resized bilinearly, antialiased.

    NVIDIA's file, told by its `return_features` argument, takes values in 0..255 of any size and resizes by itself.
    """

    def __init__(self, path: str, device: torch.device | str):
        super().__init__((INCEPTION_SIDE, INCEPTION_SIDE), "bilinear")
        self.network = torch.jit.load(path, map_location=device).eval()
        arguments = [argument.name for argument in self.network.forward.schema.arguments]
        self.resizes_itself = "return_features" in arguments
        preprocessing = (
            "its own" if self.resizes_itself else f"bilinear to {INCEPTION_SIDE}x{INCEPTION_SIDE}, antialiased"
        )
        self.about = {"kind": "TorchScript", "resizing": preprocessing}
        self.measure(device)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Features of uint8 images, float32 of shape (B, num_features)."""
        if self.resizes_itself:
            features = self.network(images.expand(-1, 3, -1, -1), return_features=True)
        else:
            features = self.network(self.resized(images) / 127.5 - 1)
        if isinstance(features, (tuple, list)):
            features = features[0]
        if features.ndim == 4:
            features = features.mean((2, 3))
        if features.ndim != 2 or len(features) != len(images):
            raise ValueError(f"the file returns a tensor of shape {tuple(features.shape)} for {len(images)} images")
        return features.float()


class TransformersFeatures(ResizedFeatures):
    """An image model of transformers: its pooled output, else the mean of its last hidden state.

    The latter too where the files lack its pooler, as those of many classifiers do: transformers would draw it at random, anew each time.
    Whole images are resized, bicubic and antialiased, to the size that its image processor crops to, and get that processor's
    mean and standard deviation.
    """

    def __init__(self, name: str):
        from transformers import AutoModel

        processing = image_processing(name)
        super().__init__(processing.side, "bicubic")
        self.network, lacking = load_pretrained(AutoModel, name)
        self.has_pooler = all(key.startswith("text_") for key in lacking)
        self.register_buffer("mean", processing.mean.reshape(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", processing.std.reshape(1, 3, 1, 1), persistent=False)
        self.about = {
            "kind": f"transformers {type(self.network).__name__}",
            "resizing": f"bicubic to {self.side[0]}x{self.side[1]}, antialiased",
        }
        self.network.eval()
        self.measure("cpu")

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Features of uint8 images, float32 of shape (B, num_features)."""
        x = (self.resized(images) - self.mean) / self.std
        # Models of images and texts, CLIP and its kin, have a method for the image half.
        encode = getattr(self.network, "get_image_features", self.network)
        output = encode(pixel_values=x)
        if isinstance(output, torch.Tensor):
            return output.flatten(1).float()
        pooled = getattr(output, "pooler_output", None)
        if pooled is None or not self.has_pooler:
            hidden = output.last_hidden_state
            pooled = hidden.mean(1) if hidden.ndim == 3 else hidden.mean((2, 3))
        return pooled.flatten(1).float()
