# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""The distance of samples to the teacher's own images from the same noise."""

import math
from collections.abc import Iterator

import torch
from tqdm.auto import tqdm

from diffusers_ctm import CTMPipeline

from .sampling import Setting, generate, rounded


PAIRED_STEPS = 40  # Heun steps; on the digits 0.0024 from 200 steps, where 18 steps are 0.012 and a 1-step CTM 0.15


def why_unlike(pipelines: dict[str, CTMPipeline]) -> str | None:
    """Why samples of "ctm" cannot be compared with those of "heun" one by one; None if they can, or one is missing."""
    if len(pipelines) < 2:
        return None
    ctm, heun = pipelines["ctm"], pipelines["heun"]
    what = "The CTM has neither paired error nor diversity"
    starts = ctm.scheduler.config.sigma_max, heun.scheduler.config.sigma_max
    if starts[0] != starts[1]:
        return f"{what}: it starts at level {starts[0]:g}, the teacher at {starts[1]:g}."
    if ctm.classes != heun.classes:
        return f"{what}: it and the teacher know other classes."
    return None


class PairedError:
    """Root mean squared errors of samples to the teacher's images from the same noise and classes.

    The teacher's images are the end of the probability-flow ODE, solved finely by Heun's method (Karras et al. 2022,
    Algorithm 1), and are made once. They say what a deterministic sampler should draw from each noise, which the
    distance of two sets cannot: blur and a solver's bias may cancel there. A sampler that adds noise has no such image.

    Args:
        teacher: with an `EDMHeunScheduler`. A sampler that is compared must start at the same level and know the same
            classes.
        labels: class of each sample, int64 (num_samples,), or None.
        num_samples, batch_size: images in all, and at most per call. Both choose the noise, and so does `seed`.
        steps: Heun steps of the teacher's images.
        network: from uint8 images to features (B, F), to be compared too.
        progress: counts network calls.
    """

    def __init__(
        self,
        teacher: CTMPipeline,
        labels: torch.Tensor | None,
        num_samples: int,
        seed: int = 0,
        batch_size: int = 250,
        steps: int = PAIRED_STEPS,
        network: torch.nn.Module | None = None,
        progress: tqdm | None = None,
    ):
        self.labels, self.num_samples, self.seed, self.batch_size = labels, num_samples, seed, batch_size
        self.network = network
        self.truth = [
            (images.cpu(), None if network is None else network(rounded(images)).cpu())
            for images in self._images(teacher, Setting("heun", steps), progress)
        ]

    def _images(self, pipe: CTMPipeline, setting: Setting, progress: tqdm | None) -> Iterator[torch.Tensor]:
        """Batches of images in [0, 1], float32 (B, C, H, W) on the device."""
        for batch, indices in enumerate(torch.arange(self.num_samples).split(self.batch_size)):
            own = None if self.labels is None else self.labels[indices]
            yield generate(pipe, setting, len(indices), own, self.seed, batch)
            if progress is not None:
                progress.update(setting.nfe)

    def __call__(self, pipe: CTMPipeline, setting: Setting, progress: tqdm | None = None) -> dict[str, float]:
        """The errors of `pipe`, sampled in a `setting` that is deterministic.

        "paired": of each value of the images, in [-1, 1], before they are rounded to 8 bits.
        "paired_features": of the features, root mean square of the Euclidean distances, if there is a network.
        """
        squares, feature_squares = 0.0, 0.0
        for (truth, features), images in zip(self.truth, self._images(pipe, setting, progress), strict=True):
            apart = 2 * (images.cpu().double() - truth)  # from [0, 1] to [-1, 1]
            squares += float(apart.square().flatten(1).mean(1).sum())
            if features is not None:
                apart = self.network(rounded(images)).cpu().double() - features
                feature_squares += float(apart.square().sum())
        errors = {"paired": math.sqrt(squares / self.num_samples)}
        if self.network is not None:
            errors["paired_features"] = math.sqrt(feature_squares / self.num_samples)
        return errors
