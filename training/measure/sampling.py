"""Samples of a setting as a user gets them, and the time they take."""

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from diffusers_ctm import CTMPipeline

from ..cli.device import wait_for
from ..cli.errors import UserError


@dataclass(frozen=True)
class Setting:
    """One way to sample.

    Args:
        sampler: "ctm" or "heun".
        steps: number of steps.
        gamma: of the CTM; None where it has no effect: in one step, and for Heun.
    """

    sampler: str
    steps: int
    gamma: float | None = None

    @property
    def nfe(self) -> int:
        """Network evaluations."""
        return self.steps if self.sampler == "ctm" else 2 * self.steps - 1

    @property
    def name(self) -> str:
        if self.sampler == "heun":
            return f"teacher, Heun {self.steps}"
        steps = "1 step" if self.steps == 1 else f"{self.steps} steps"
        return steps if self.gamma is None else f"{steps}, gamma {self.gamma:g}"

    @property
    def options(self) -> dict[str, Any]:
        """For `CTMPipeline.__call__`: the Karras levels, which gamma brings, also where the checkpoint carries a schedule for one step."""
        gamma = 0.0 if self.gamma is None and (self.sampler, self.steps) == ("ctm", 1) else self.gamma
        options = {"num_inference_steps": self.steps}
        return options if gamma is None else {**options, "gamma": gamma}


def class_labels(num_classes: int | None, real_labels: torch.Tensor | None, count: int) -> torch.Tensor | None:
    """Classes of `count` samples, int64: in the shares of the real images, or without their labels each class in turn.

    Classes are spread evenly: any stretch of samples has nearly the same shares.
    """
    if num_classes is None:
        return None
    if real_labels is None:
        return torch.arange(count) % num_classes
    classes = real_labels.sort().values
    sizes = classes.bincount()
    rank = torch.arange(len(classes)) - (sizes.cumsum(0) - sizes)[classes]
    spread = ((rank + 0.5) / sizes[classes]).sort(stable=True).indices
    return classes[spread].repeat(math.ceil(count / len(classes)))[:count]


def draw(
    pipe: CTMPipeline, setting: Setting, count: int, labels: torch.Tensor | None, seed: int, batch: int
) -> torch.Tensor:
    """Samples as a user gets them, rounded: uint8, shape (count, C, H, W), on the device.

    The noise depends on seed, batch and count, not on the setting: all settings start alike.
    """
    device = pipe._execution_device
    generator = torch.Generator(device).manual_seed(seed * 1_000_003 + batch)
    images = pipe(
        batch_size=count, class_labels=labels, generator=generator, output_type="pt", **setting.options
    ).images
    if not torch.isfinite(images).all():
        name = "--model" if setting.sampler == "ctm" else "--teacher"
        raise UserError(f"{name} gives infinite or NaN pixels ({setting.name}); its weights are broken.")
    return (images * 255).round().to(torch.uint8)


class Sampling:
    """All samples of one run, as features, and the time they take.

    Args:
        pipelines: by sampler.
        network: from uint8 images to features.
        real_labels: classes of the reference images, or None.
        num_samples, batch_size: images in all, and at most per call; the batches differ by at most one image.
    """

    def __init__(
        self,
        pipelines: dict[str, CTMPipeline],
        network: nn.Module,
        real_labels: torch.Tensor | None,
        num_samples: int,
        batch_size: int,
    ):
        self.pipelines, self.network = pipelines, network
        num_batches = math.ceil(num_samples / batch_size)
        self.sizes = [num_samples * (i + 1) // num_batches - num_samples * i // num_batches for i in range(num_batches)]
        self.num_samples = num_samples
        self.labels = {
            sampler: class_labels(pipe.num_classes, real_labels, num_samples) for sampler, pipe in pipelines.items()
        }

    def features(self, setting: Setting, seed: int, progress: tqdm) -> tuple[torch.Tensor, float]:
        """Features of one setting and seed, float32 (num_samples, F) on the CPU, and the seconds that sampling took."""
        pipe, labels = self.pipelines[setting.sampler], self.labels[setting.sampler]
        found, seconds, start = [], 0.0, 0
        for batch, size in enumerate(self.sizes):
            own = None if labels is None else labels[start : start + size]
            began = time.perf_counter()
            images = draw(pipe, setting, size, own, seed, batch)
            wait_for(images.device)
            seconds += time.perf_counter() - began
            found.append(self.network(images).float().cpu())
            start += size
            progress.update(setting.nfe)
        return torch.cat(found), seconds

    def warm_up(self) -> None:
        """One call of each network at the size that will be timed."""
        for sampler, pipe in self.pipelines.items():
            labels = self.labels[sampler]
            size = self.sizes[0]
            self.network(draw(pipe, Setting(sampler, 1), size, None if labels is None else labels[:size], 0, 0))
