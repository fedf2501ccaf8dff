# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Curves of several runs, compared at equal iterations, seconds and teacher evaluations."""

import math
import statistics
from typing import Any

from ..report.numbers import summary


def seconds_until(iteration: int, phases: list[dict[str, Any]]) -> float:
    """The seconds that the first iterations of a run of timed `phases` take, by the median of each phase."""
    total = 0.0
    for phase in phases:
        iterations = min(iteration, phase["iterations"])
        total, iteration = total + iterations * statistics.median(phase["seconds"]), iteration - iterations
    return total


def seconds_per_iteration(phases: list[dict[str, Any]]) -> list[float]:
    """The mean over a whole run of timed `phases`, one value for each round of timing."""
    iterations = [phase["iterations"] for phase in phases]
    rounds = zip(*(phase["seconds"] for phase in phases))
    return [sum(n * seconds for n, seconds in zip(iterations, row)) / sum(iterations) for row in rounds]


def at(points: list[dict], axis: str, value: float, steps: str) -> float | None:
    """Distance where `axis` reaches `value`: on a line in its logarithm between measurements, None beyond them."""
    if value > points[-1][axis] * (1 + 1e-9) or value < points[0][axis]:
        return None
    for before, after in zip([points[0], *points], points):
        if after[axis] >= value * (1 - 1e-9):
            low, high = math.log(before["frechet"][steps]), math.log(after["frechet"][steps])
            share = 1.0 if after is before else (value - before[axis]) / (after[axis] - before[axis])
            return math.exp(low + min(share, 1.0) * (high - low))
    return None


def distance_at(runs: list[list[dict]], axis: str, value: float, steps: str) -> dict | None:
    """The summary of `at` over runs; None where one of them does not go."""
    distances = [at(points, axis, value, steps) for points in runs]
    return None if None in distances else summary(distances)


def tabulate(curves: dict[str, list[dict]], seconds: dict[str, list[float]], eval_steps: list[int]) -> dict[str, Any]:
    """The table of a study: the time per iteration of each variant, and its distances.

    Distances are those at the iterations and seconds that all reach, and those at the teacher evaluations that a
    variant and the first one reach, beside the distances of the first.

    Args:
        curves: the runs of each variant, the first variant first.
        seconds: per iteration of each variant, one value for each round of timing.
        eval_steps: the numbers of sampling steps.
    """
    points = {name: [curve["points"] for curve in runs] for name, runs in curves.items()}
    last = [run[-1] for runs in points.values() for run in runs]
    common = {axis: min(point[axis] for point in last) for axis in ("iteration", "seconds")}
    first, steps = next(iter(points.values())), list(map(str, eval_steps))
    rows = {}
    for name, runs in points.items():
        evaluations = [
            run[-1]["teacher_evaluations"] / run[-1]["iteration"] / curve["options"]["train_batch_size"]
            for run, curve in zip(runs, curves[name])
        ]
        value = min(run[-1]["teacher_evaluations"] for run in (*runs, *first))
        pairs = {n: [distance_at(each, "teacher_evaluations", value, n) for each in (runs, first)] for n in steps}
        rows[name] = {
            "runs": len(runs),
            "milliseconds_per_iteration": summary([1000 * value for value in seconds[name]]),
            "teacher_evaluations_per_image": summary(evaluations),
            **{axis: {n: distance_at(runs, axis, common[axis], n) for n in steps} for axis in common},
            "beside_first": {"value": value, "distances": pairs},
        }
    return {"common": common, "rows": rows}
