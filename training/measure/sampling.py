# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Samples as users get them, and the time they take."""

import math
import time
from dataclasses import dataclass

import torch
from tqdm.auto import tqdm

from diffusers_ctm import CTMPipeline
from diffusers_ctm.checks import NotFiniteError

from ..cli.device import wait_for
from ..cli.errors import UserError
from ..report.tables import setting_name


@dataclass(frozen=True)
class Setting:
    """One way to sample.

    Args:
        sampler: "ctm" or "heun".
        steps: number of steps.
        gamma: of the CTM, a number, or with `sigmas` one for each step. None is the checkpoint's own choice for this
            number of steps, always so for Heun's method.
        sigmas: the level at which each step starts. None is the Karras levels.
        guided: whether the teacher is, so that each call of its denoiser takes two network evaluations.
    """

    sampler: str
    steps: int
    gamma: float | tuple[float, ...] | None = None
    sigmas: tuple[float, ...] | None = None
    guided: bool = False

    @property
    def nfe(self) -> int:
        """Network evaluations."""
        calls = self.steps if self.sampler == "ctm" else 2 * self.steps - 1
        return 2 * calls if self.guided else calls

    @property
    def is_deterministic(self) -> bool:
        """Whether the noise at the start decides the image: no noise is added between steps."""
        return self.sampler == "heun" or self.steps == 1 or self.gamma == 0

    @property
    def shown_gamma(self) -> float | None:
        """gamma for reports: None in one step, which goes straight to the image and has none."""
        return None if self.steps == 1 else self.gamma

    @property
    def name(self) -> str:
        return setting_name(self.sampler, self.steps, self.shown_gamma if self.sigmas is None else None, self.guided)

    @property
    def options(self) -> dict:
        """For `CTMPipeline.__call__`, and with `sigmas` also for `CTMScheduler.config.presets`."""
        if self.sigmas is not None:
            return {"sigmas": list(self.sigmas), "gamma": list(self.gamma)}
        return {"num_inference_steps": self.steps, "gamma": self.gamma}


def settings_of(
    pipelines: dict[str, CTMPipeline],
    steps: list[int],
    gammas: list[float],
    teacher_steps: list[int],
    teacher_is_guided: bool = False,
) -> list[Setting]:
    """All settings of the samplers in `pipelines`. One step comes once, because gamma has no effect there."""
    ctm = [Setting("ctm", n, gamma) for n in steps for gamma in (gammas if n > 1 else gammas[:1])]
    heun = [Setting("heun", n, guided=teacher_is_guided) for n in teacher_steps]
    return [setting for setting in ctm + heun if setting.sampler in pipelines]


def class_labels(classes: list[int] | None, real_labels: torch.Tensor | None, count: int) -> torch.Tensor | None:
    """Labels of `count` samples, int64: in the shares of the real images, or without their labels each class in turn.

    Classes are spread evenly: any stretch of samples has nearly the same shares.
    """
    if classes is None:
        return None
    if real_labels is None:
        return torch.tensor(classes)[torch.arange(count) % len(classes)]
    classes = real_labels.sort().values
    sizes = classes.bincount()
    rank = torch.arange(len(classes)) - (sizes.cumsum(0) - sizes)[classes]
    spread = ((rank + 0.5) / sizes[classes]).sort(stable=True).indices
    return classes[spread].repeat(math.ceil(count / len(classes)))[:count]


def generate(
    pipe: CTMPipeline, setting: Setting, count: int, labels: torch.Tensor | None, seed: int, batch: int
) -> torch.Tensor:
    """Samples in [0, 1], float32 of shape (count, C, H, W), on the device.

    The noise depends on seed, batch and count, not on the setting: all settings start alike.
    """
    generator = torch.Generator(pipe._execution_device).manual_seed(seed * 1_000_003 + batch)
    try:
        return pipe(
            batch_size=count, class_labels=labels, generator=generator, output_type="pt", **setting.options
        ).images
    except NotFiniteError as error:
        option = "--model" if setting.sampler == "ctm" else "--teacher"
        raise UserError(f"{option} gives infinite or NaN pixels ({setting.name}). {error}") from error


def rounded(images: torch.Tensor) -> torch.Tensor:
    """Images in [0, 1] as users get them: uint8."""
    return (images * 255).round().to(torch.uint8)


def draw(
    pipe: CTMPipeline, setting: Setting, count: int, labels: torch.Tensor | None, seed: int, batch: int
) -> torch.Tensor:
    """Samples as users get them, rounded: `generate` in uint8."""
    return rounded(generate(pipe, setting, count, labels, seed, batch))


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
        network: torch.nn.Module,
        real_labels: torch.Tensor | None,
        num_samples: int,
        batch_size: int,
    ):
        self.pipelines, self.network = pipelines, network
        num_batches = math.ceil(num_samples / batch_size)
        self.sizes = [num_samples * (i + 1) // num_batches - num_samples * i // num_batches for i in range(num_batches)]
        self.labels = {name: class_labels(pipe.classes, real_labels, num_samples) for name, pipe in pipelines.items()}

    def _draw(self, setting: Setting, seed: int, batch: int) -> torch.Tensor:
        labels = self.labels[setting.sampler]
        own = None if labels is None else labels.split(self.sizes)[batch]
        return draw(self.pipelines[setting.sampler], setting, self.sizes[batch], own, seed, batch)

    def features(self, setting: Setting, seed: int, progress: tqdm) -> tuple[torch.Tensor, float]:
        """Features of one setting and seed, float32 (num_samples, F) on the CPU, and the seconds that sampling took."""
        features, seconds = [], 0.0
        for batch in range(len(self.sizes)):
            began = time.perf_counter()
            images = self._draw(setting, seed, batch)
            wait_for(images.device)
            seconds += time.perf_counter() - began
            features.append(self.network(images).float().cpu())
            progress.update(setting.nfe)
        return torch.cat(features), seconds

    def warm_up(self) -> None:
        """One call of each network at the size that will be timed."""
        for sampler in self.pipelines:
            self.network(self._draw(Setting(sampler, 1), 0, 0))
