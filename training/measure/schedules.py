"""Pattern search over levels and gammas."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from diffusers_ctm import CTMScheduler
from diffusers_ctm.trajectory import karras_ramp, karras_sigma, karras_starts


FIRST_STRIDE, LAST_STRIDE = 0.25, 0.02  # of the search, in units of the whole range of a level or of gamma

LEAST_GAP = 0.01  # between levels, likewise


@dataclass(frozen=True)
class Schedule:
    """A way to sample, as `training.evaluate.Sampling` takes it, and as a preset.

    Args:
        steps: number N of steps, the network evaluations.
        sigmas: level at which each starts, or None: what the checkpoint does when it is told N alone.
        gammas: gamma of each.
    """

    steps: int
    sigmas: tuple[float, ...] | None = None
    gammas: tuple[float, ...] | None = None
    sampler = "ctm"

    @property
    def nfe(self) -> int:
        return self.steps

    @property
    def name(self) -> str:
        return f"{self.steps} {'step' if self.steps == 1 else 'steps'}"

    @property
    def options(self) -> dict[str, Any]:
        """For `CTMPipeline.__call__`."""
        if self.sigmas is None:
            return {"num_inference_steps": self.steps}
        return self.preset

    @property
    def preset(self) -> dict[str, list[float]]:
        """For `CTMScheduler.config.presets`."""
        return {"sigmas": list(self.sigmas), "gamma": list(self.gammas)}


class Space:
    """Schedules of N steps as points of a box: where each level lies on the Karras ramp, then gamma of all steps but the last.

    A level's coordinate is 0 at sigma_max and 1 at sigma_min, even in sigma^(1/rho). The last step adds no noise and has no gamma.
    """

    def __init__(self, steps: int, scheduler: CTMScheduler, first_level: bool):
        config = scheduler.config
        self.steps, self.first_level = steps, first_level
        self.end = config.sigma_min if config.final_sigma is None else config.final_sigma
        self.range = (config.sigma_min, config.sigma_max, config.rho)
        # The last step starts above where it ends; a step to 0 may start at sigma_min.
        self.highest = 1.0 if self.end == 0 else karras_ramp(self.end, *self.range) - LEAST_GAP

    def karras(self, gamma: float) -> tuple[float, ...]:
        """The Karras schedule at one gamma."""
        levels = [karras_ramp(level, *self.range) for level in karras_starts(self.steps, self.end, *self.range).tolist()]
        return (*levels, *[gamma] * (self.steps - 1))

    def schedule(self, point: Sequence[float]) -> Schedule:
        """With numbers of six digits, so that what is measured is what is saved."""
        ramps = torch.tensor(point[: self.steps], dtype=torch.float64)
        levels = [float(f"{level:.6g}") for level in karras_sigma(ramps, *self.range).tolist()]
        if not self.first_level:
            levels[0] = self.range[1]
        return Schedule(self.steps, tuple(levels), (*[float(f"{g:.6g}") for g in point[self.steps :]], 0.0))

    def moved(self, point: Sequence[float], direction: Sequence[int], stride: float) -> tuple[float, ...] | None:
        """`point` moved and put back into the box, levels apart; None if it stays where it is."""
        moved = [value + stride * way for value, way in zip(point, direction)]
        levels = moved[: self.steps]
        low = 0.0
        for i in range(self.steps):
            high = self.highest - LEAST_GAP * (self.steps - 1 - i)
            levels[i] = min(max(levels[i], low), high)
            low = levels[i] + LEAST_GAP
        moved = (*levels, *[min(max(gamma, 0.0), 1.0) for gamma in moved[self.steps :]])
        return None if all(math.isclose(a, b, abs_tol=1e-9) for a, b in zip(moved, point)) else moved

    def directions(self) -> list[tuple[int, ...]]:
        """All gammas together, all levels together, then each coordinate alone, up and down."""
        first = 0 if self.first_level else 1
        levels, gammas = range(first, self.steps), range(self.steps, 2 * self.steps - 1)
        groups = [tuple(gammas), tuple(levels), *((i,) for i in (*levels, *gammas))]
        found = []
        for group in dict.fromkeys(group for group in groups if group):
            for way in (1, -1):
                found.append(tuple(way * (i in group) for i in range(2 * self.steps - 1)))
        return found


def search(space: Space, gammas: Sequence[float]) -> Iterator[Schedule]:
    """Pattern search (Hooke and Jeeves 1961): a generator of schedules to try, which is sent the distance of each.

    Begins with the Karras schedule at each of `gammas` and goes on from the best. Each direction is tried in turn, what is better is kept
    at once, and where none is, the stride is halved. Returns the best when strides are below `LAST_STRIDE`.
    """
    best, lowest = None, math.inf
    for gamma in gammas if space.steps > 1 else gammas[:1]:
        point = space.karras(gamma)
        distance = yield space.schedule(point)
        if distance < lowest:
            best, lowest = point, distance
    stride, directions = FIRST_STRIDE, space.directions()
    while stride >= LAST_STRIDE:
        found = False
        for direction in directions:
            point = space.moved(best, direction, stride)
            if point is None:
                continue
            distance = yield space.schedule(point)
            if distance < lowest:
                best, lowest, found = point, distance, True
        if not found:
            stride /= 2


@dataclass
class Trial:
    """A schedule and its distance on each seed of the search."""

    schedule: Schedule
    by_seed: list[float]

    @property
    def mean(self) -> float:
        return sum(self.by_seed) / len(self.by_seed)


def run_search(
    space: Space, gammas: Sequence[float], most: int, measure: Callable[[Schedule], list[float]]
) -> list[Trial]:
    """At most `most` different schedules in the order in which they were tried."""
    trials: dict[Schedule, Trial] = {}
    proposals = search(space, gammas)
    try:
        schedule = next(proposals)
        while schedule in trials or len(trials) < most:
            if schedule not in trials:
                trials[schedule] = Trial(schedule, measure(schedule))
            schedule = proposals.send(trials[schedule].mean)
    except StopIteration:
        pass
    return list(trials.values())
