# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Pattern search over levels and gammas."""

import math
from collections.abc import Callable, Sequence

import torch

from diffusers_ctm import CTMScheduler
from diffusers_ctm.scheduling_karras import level_at, ramp_of, start_levels

from .sampling import Setting


FIRST_STRIDE, LAST_STRIDE = 0.25, 0.02  # of the search, in units of the whole range of a level or of gamma

LEAST_GAP = 0.01  # between levels, in the same units


class Space:
    """Schedules of N steps as points of a box: N places of levels on the Karras ramp, then N - 1 gammas.

    A level's coordinate is 0 at sigma_max and 1 at sigma_min, even in sigma^(1/rho). The last step adds no noise and
    has no gamma.
    """

    def __init__(self, steps: int, scheduler: CTMScheduler, first_level: bool):
        config = scheduler.config
        self.config, self.steps, self.first_level = config, steps, first_level
        self.end = config.sigma_min if config.final_sigma is None else config.final_sigma
        self.range = (config.sigma_min, config.sigma_max, config.rho)
        # The last step starts above where it ends; a step to 0 may start at sigma_min.
        self.highest = 1.0 if self.end < config.sigma_min else ramp_of(config, self.end) - LEAST_GAP

    def karras(self, gamma: float) -> tuple[float, ...]:
        """The Karras schedule at one gamma."""
        levels = [ramp_of(self.config, level) for level in start_levels(self.config, self.steps, self.end).tolist()]
        return (*levels, *[gamma] * (self.steps - 1))

    def setting(self, point: Sequence[float]) -> Setting:
        """The schedule of a point, with numbers of six digits, so that what is measured is what is saved."""
        ramps = torch.tensor(point[: self.steps], dtype=torch.float64)
        levels = [float(f"{level:.6g}") for level in level_at(self.config, ramps).tolist()]
        if not self.first_level:
            levels[0] = self.range[1]
        gammas = [float(f"{gamma:.6g}") for gamma in point[self.steps :]]
        return Setting("ctm", self.steps, (*gammas, 0.0), tuple(levels))

    def moved(self, point: tuple[float, ...], direction: Sequence[int], stride: float) -> tuple[float, ...]:
        """`point` moved and put back into the box, levels apart. It is `point` itself if it stays where it is."""
        moved = [value + stride * way for value, way in zip(point, direction)]
        low = 0.0
        for i in range(self.steps):
            high = self.highest - LEAST_GAP * (self.steps - 1 - i)
            moved[i] = min(max(moved[i], low), high)
            low = moved[i] + LEAST_GAP
        moved[self.steps :] = [min(max(gamma, 0.0), 1.0) for gamma in moved[self.steps :]]
        stays = all(math.isclose(a, b, abs_tol=1e-9) for a, b in zip(moved, point))
        return point if stays else tuple(moved)

    def directions(self) -> list[tuple[int, ...]]:
        """All gammas together, all levels together, then each coordinate alone, up and down."""
        first = 0 if self.first_level else 1
        levels, gammas = range(first, self.steps), range(self.steps, 2 * self.steps - 1)
        groups = dict.fromkeys([tuple(gammas), tuple(levels), *((i,) for i in (*levels, *gammas))])
        directions = []
        for group in filter(None, groups):
            up = tuple(int(i in group) for i in range(2 * self.steps - 1))
            directions += [up, tuple(-way for way in up)]
        return directions


def mean(distances: list[float]) -> float:
    return sum(distances) / len(distances)


def run_search(
    space: Space, gammas: Sequence[float], most: int, measure: Callable[[Setting], list[float]]
) -> dict[Setting, list[float]]:
    """Pattern search (Hooke and Jeeves 1961): at most `most` schedules in the order in which they were tried.

    It begins with the Karras schedule at each of `gammas` and goes on from the best. It tries each direction in turn
    and keeps at once what is better. If no direction is better, it halves the stride, and ends below `LAST_STRIDE`.

    Returns what `measure` said of each schedule: its distances, one for each seed. The lowest mean is the best.
    """
    trials: dict[Setting, list[float]] = {}

    def distance(point: tuple[float, ...]) -> float:
        setting = space.setting(point)
        if setting not in trials:
            if len(trials) == most:
                return math.inf
            trials[setting] = measure(setting)
        return mean(trials[setting])

    best = min(map(space.karras, gammas if space.steps > 1 else gammas[:1]), key=distance)
    stride, directions = FIRST_STRIDE, space.directions()
    while stride >= LAST_STRIDE and len(trials) < most:
        start = best
        for direction in directions:
            best = min(best, space.moved(best, direction, stride), key=distance)
        if best == start:
            stride /= 2
    return trials
