# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""A pool of the teacher's trajectories, from which steps draw."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ..cli.options import NOT_NEGATIVE, POSITIVE, UNIT, Checked, option
from .jumps import TeacherDenoiser
from .solvers import Solver
from .times import Times, TimeSampler


SHARE_OF_MEMORY = 0.25  # of a GPU's free memory that a pool may take; a larger one lies in the host's


@dataclass
class PoolOptions(Checked):
    """A pool of the teacher's trajectories, for ctm and regression."""

    pool_size: int | None = option(
        None,
        "Trajectories of the teacher that are kept for each image of a step, with all their states, and drawn from. 0: "
        "every step solves its own. Default: 8 with regression, else 0.",
        must_be=NOT_NEGATIVE,
    )
    pool_refresh: int = option(
        8,
        "Steps after which the oldest trajectories, as many as a step has images, are replaced by new ones.",
        must_be=POSITIVE,
    )
    pool_substeps: int = option(1, "The solver's steps between two levels of the grid.", must_be=POSITIVE)
    pool_from_data: float = option(
        0.0,
        "Share of the trajectories that start at a lower level of the grid, from an image with noise. Such states are "
        "free of the solver's errors above.",
        must_be=UNIT,
    )


class TrajectoryPool:
    """For every sample of a step its own few trajectories of the teacher, from which each step draws one.

    A refresh replaces the oldest of every sample by a new one, in one batch. All that are made together start at one
    level of the grid: sigma_max, or for a share of them a lower one. A sample never meets another's trajectories. So
    the draws of a step are independent, and it does not matter how its samples are split over processes.

    Args:
        options: with the size of the pool.
        solver: follows the teacher.
        sampler: of the grid's levels.
        total: samples of a step, over all processes and passes.
        own: those of this process, a slice for each pass.
        device: of the samples.

    Attributes:
        refreshes: their number so far.
        states: shape (trajectories of a sample, samples of this process, levels, C, H, W); None before the first.
        labels: their classes, of its first two dimensions, or None.
    """

    def __init__(
        self,
        options: PoolOptions,
        solver: Solver,
        sampler: TimeSampler,
        total: int,
        own: Sequence[slice],
        device: torch.device,
    ):
        self.options, self.solver, self.sampler, self.device = options, solver, sampler, device
        self.depth, self.total = options.pool_size, total
        self.own, self.offsets, rows = own, {}, 0
        for part in own:
            self.offsets[part.start] = rows
            rows += part.stop - part.start
        self.rows = rows
        self.refreshes, self._refreshed_at = 0, -1
        self.starts = torch.zeros(self.depth, dtype=torch.int64)  # places of the first states
        self.states: torch.Tensor | None = None
        self.labels: torch.Tensor | None = None

    def draw(
        self,
        step: int,
        own: slice,
        x_0: torch.Tensor,
        labels: torch.Tensor | None,
        noise: Callable[[], torch.Tensor],
        teacher: TeacherDenoiser,
        sampler: TimeSampler,
        generator: torch.Generator,
    ) -> tuple[Times, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Times, states at t and at u, and classes, of one pass; refresh first if that is due.

        Args:
            step: number of the step.
            own: the pass's samples among those of the step.
            x_0, labels: its images and classes, from which new trajectories start.
            noise: draws standard normal noise in the shape of `x_0`.
            sampler: of the times, on the pool's grid.
            generator: on the CPU, in the same state in every process and pass of the step.
        """
        number = torch.rand(1, generator=generator, dtype=torch.float64)
        if self._is_due(step, number):
            self._refresh(own, x_0, labels, noise(), teacher)
        filled = min(self.refreshes, self.depth)
        which = (torch.rand(self.total, generator=generator) * filled).long()
        times = sampler.draw_known(self.starts[which].double(), generator)[own]
        rows = self.offsets[own.start] + torch.arange(len(x_0))
        index = torch.stack([which[own], rows, *times.places])
        if self.states.device.type != "cpu":
            index = index.pin_memory()
        which, rows, t, u = index.to(self.states.device, non_blocking=True)
        x_t, x_u = (self._fetch(self.states[which, rows, place]) for place in (t, u))
        return times, x_t, x_u, None if self.labels is None else self._fetch(self.labels[which, rows])

    def _is_due(self, step: int, number: torch.Tensor) -> bool:
        """Whether this step refreshes, decided in its first pass; `number` in [0, 1) chooses where it starts."""
        waits = self.refreshes >= self.depth and step - self._refreshed_at < self.options.pool_refresh
        if step != self._refreshed_at and not waits:
            share, last = self.options.pool_from_data, self.sampler.last_place
            from_data = int((self.refreshes + 1) * share) > int(self.refreshes * share)
            place = 1 + (number * (last - 1)).long().item() if from_data and last > 1 else 0
            self.starts[self.refreshes % self.depth] = place
            self.refreshes, self._refreshed_at = self.refreshes + 1, step
        return step == self._refreshed_at

    def _refresh(
        self,
        own: slice,
        x_0: torch.Tensor,
        labels: torch.Tensor | None,
        noise: torch.Tensor,
        teacher: TeacherDenoiser,
    ) -> None:
        """Solve the newest trajectory of each sample of a pass."""
        slot, per_level = (self.refreshes - 1) % self.depth, self.options.pool_substeps
        if self.states is None:
            self._allocate(x_0.shape[1:], labels is not None)
        start = int(self.starts[slot])
        steps = per_level * (self.sampler.last_place - start)
        levels = self.sampler.level(start + torch.arange(steps + 1, dtype=torch.float64) / per_level)
        levels = levels.to(x_0.dtype).to(x_0.device, non_blocking=True)[:, None].expand(-1, len(x_0))
        place = slice(self.offsets[own.start], self.offsets[own.start] + len(x_0))
        with torch.inference_mode():
            x = x_0 + levels[0, 0] * noise
            states = self.solver.states(lambda x, sigma: teacher(x, sigma, labels), x, levels)
            self.states[slot, place, start] = x
            for number, x in enumerate(states, start=1):
                if number % per_level == 0:
                    self.states[slot, place, start + number // per_level] = x
        if labels is not None:
            self.labels[slot, place] = labels

    def _allocate(self, shape: torch.Size, with_labels: bool) -> None:
        """Make room on the device, or in the host's memory if it takes too much of a GPU's."""
        size = (self.depth, self.rows, self.sampler.num_levels, *shape)
        where, pinned = self.device, False
        if where.type == "cuda" and 4 * math.prod(size) > SHARE_OF_MEMORY * torch.cuda.mem_get_info(where)[0]:
            where, pinned = torch.device("cpu"), True
        self.states = torch.zeros(size, device=where, pin_memory=pinned)
        if with_labels:
            self.labels = torch.zeros(size[:2], dtype=torch.int64, device=where, pin_memory=pinned)

    def _fetch(self, values: torch.Tensor) -> torch.Tensor:
        """Bring what was drawn to the device."""
        if values.device.type != self.device.type:  # of several processes on a CPU it is "cpu:0"
            values = values.pin_memory().to(self.device, non_blocking=True)
        return values

    def state_dict(self, gather: Callable[[torch.Tensor], torch.Tensor]) -> dict:
        """The whole pool; `gather` joins the samples of a pass of all processes. All of them call it."""

        def whole(values: torch.Tensor | None) -> torch.Tensor | None:
            if values is None:
                return None
            passes = values.split(self.rows // len(self.own), dim=1)
            rows = [torch.cat([gather(row.to(self.device)).cpu() for row in each]) for each in zip(*passes)]
            return torch.stack(rows)

        numbers = {"refreshes": self.refreshes, "refreshed_at": self._refreshed_at, "starts": self.starts.clone()}
        return {**numbers, "states": whole(self.states), "labels": whole(self.labels)}

    def load_state_dict(self, state: dict) -> None:
        """Go on from `state`, with the part of this process."""
        self.refreshes, self._refreshed_at = state["refreshes"], state["refreshed_at"]
        self.starts.copy_(state["starts"])
        if state["states"] is None:
            return
        own = torch.cat([torch.arange(self.total)[part] for part in self.own])
        self._allocate(state["states"].shape[3:], state["labels"] is not None)
        self.states.copy_(state["states"][:, own])
        if self.labels is not None:
            self.labels.copy_(state["labels"][:, own])
