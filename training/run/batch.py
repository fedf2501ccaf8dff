# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""The images of one forward pass and the random numbers of its step."""

from dataclasses import dataclass

import torch


class StepRandom:
    """The random numbers of one step for one part of its global batch.

    They depend on seed, step and the global position of a sample, not on how the global batch is split over processes
    and accumulation steps: every part draws for all and keeps its own. To resume a run they need not be saved.
    """

    def __init__(self, seed: int, step: int, total: int, own: slice, device: torch.device):
        self.total, self.own = total, own
        seed = 2 * (seed * 1_000_000_007 + step)
        self.host = torch.Generator().manual_seed(seed)
        self.device_generator = torch.Generator(device).manual_seed(seed + 1)  # not the host's stream on a CPU
        self.device = device

    def normal(self, *shape: int) -> torch.Tensor:
        """Standard normal, shape (B, *shape), on the device."""
        return torch.randn(self.total, *shape, generator=self.device_generator, device=self.device)[self.own]

    def uniform(self) -> torch.Tensor:
        """Uniform in [0, 1), shape (B,), on the device."""
        return torch.rand(self.total, generator=self.device_generator, device=self.device)[self.own]


@dataclass
class Batch:
    """One forward pass's share of a step.

    Args:
        images: float32 in [-1, 1], shape (B, C, H, W), on the device.
        labels: int64 of shape (B,), or None.
        random: the source of its random numbers.
    """

    images: torch.Tensor
    labels: torch.Tensor | None
    random: StepRandom

    def dropped_labels(self, probability: float, null_class: int | None) -> torch.Tensor | None:
        """`labels`, each replaced by `null_class` with `probability` (Ho & Salimans 2022). At 0 nothing is drawn."""
        if self.labels is None or probability == 0:
            return self.labels
        return torch.where(self.random.uniform() < probability, null_class, self.labels)
