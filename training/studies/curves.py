"""Curves of several runs at equal iterations, seconds, evaluations."""

import math
import statistics
from typing import Any

from ..report.numbers import summary


def seconds_until(iteration: int, found: list[dict[str, Any]]) -> float:
    """How long the first iterations of a run of timed `phases` take, by the median of each."""
    total = 0.0
    for phase in found:
        own = min(iteration, phase["iterations"])
        total, iteration = total + own * statistics.median(phase["seconds"]), iteration - own
    return total


def seconds_per_iteration(found: list[dict[str, Any]]) -> list[float]:
    """Of a whole run of timed `phases`, a value a round."""
    whole = sum(phase["iterations"] for phase in found)
    return [
        sum(phase["iterations"] * taken for phase, taken in zip(found, row)) / whole
        for row in zip(*(phase["seconds"] for phase in found))
    ]


def at(points: list[dict], axis: str, value: float, steps: str) -> float | None:
    """Distance where `axis` reaches `value`, between measurements by a line in its logarithm; None where the run does not go."""
    if not points or value > points[-1][axis] * (1 + 1e-9) or value < points[0][axis]:
        return None
    for before, after in zip([points[0], *points], points):
        if after[axis] >= value * (1 - 1e-9):
            low, high = math.log(before["frechet"][steps]), math.log(after["frechet"][steps])
            share = 1.0 if after is before else (value - before[axis]) / (after[axis] - before[axis])
            return math.exp(low + min(share, 1.0) * (high - low))
    return None


def tabulate(curves: dict[str, list[dict]], seconds: dict[str, list[float]], eval_steps: list[int]) -> dict[str, Any]:
    """For each variant: time per iteration, its distances at the iterations and seconds that all reach, and at the teacher evaluations that
    it and the first variant reach, beside those of the first."""
    points = {name: [curve["points"] for curve in runs] for name, runs in curves.items()}
    every = [run for runs in points.values() for run in runs]
    common = {axis: min(run[-1][axis] for run in every) for axis in ("iteration", "seconds") if every}
    rows = {}
    for name, runs in points.items():
        row = {
            "runs": len(runs),
            "milliseconds_per_iteration": summary([1000 * value for value in seconds[name]]),
            "teacher_evaluations_per_image": summary(
                [
                    run[-1]["teacher_evaluations"] / run[-1]["iteration"] / curve["options"]["train_batch_size"]
                    for run, curve in zip(runs, curves[name])
                ]
            ),
        }
        for axis, value in common.items():
            row[axis] = {}
            for steps in map(str, eval_steps):
                row[axis][steps] = distance_at(runs, axis, value, steps)
        row["beside_first"] = beside(runs, next(iter(points.values())), "teacher_evaluations", eval_steps)
        rows[name] = row
    return {"common": common, "rows": rows}


def distance_at(runs: list[list[dict]], axis: str, value: float, steps: str) -> dict | None:
    """Mean and spread of `at` over runs; None where one of them does not go."""
    found = [at(run, axis, value, steps) for run in runs]
    return None if None in found else summary(found)


def beside(runs: list[list[dict]], first: list[list[dict]], axis: str, eval_steps: list[int]) -> dict[str, Any]:
    """As far along `axis` as all of `runs` and `first` go: their distances, `runs` and then `first`, by the number of steps."""
    value = min(run[-1][axis] for run in (*runs, *first))
    pairs = {str(n): [distance_at(each, axis, value, str(n)) for each in (runs, first)] for n in eval_steps}
    return {"value": value, "distances": pairs}
