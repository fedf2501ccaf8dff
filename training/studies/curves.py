# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Curves of several runs: when each reaches a distance, and how far each is at equal cost."""

import math
import statistics
from collections.abc import Iterable
from typing import Any

from ..report.numbers import summary


# A point of a curve: "iteration", "seconds", "teacher_evaluations", and "judged": by number of steps, by judge.
Point = dict[str, Any]

COSTS = ("iteration", "seconds", "teacher_evaluations")


def seconds_until(iteration: int, phases: list[dict[str, Any]]) -> float:
    """The seconds that the first iterations of a run of timed `phases` take, by the median of each phase."""
    total = 0.0
    for phase in phases:
        iterations = min(iteration, phase["iterations"])
        total, iteration = total + iterations * statistics.median(phase["seconds"]), iteration - iterations
    return total


def judged_at(points: list[Point], axis: str, value: float, steps: str, judge: str) -> float | None:
    """What `judge` says of `steps` steps where `axis` reaches `value`; None beyond the measurements.

    Between two of them it lies on a line in its logarithm.
    """
    if value > points[-1][axis] * (1 + 1e-9) or value < points[0][axis] * (1 - 1e-9):
        return None
    for before, after in zip([points[0], *points], points):
        if after[axis] >= value * (1 - 1e-9):
            low, high = (math.log(point["judged"][steps][judge]) for point in (before, after))
            share = 1.0 if after is before else (value - before[axis]) / (after[axis] - before[axis])
            return math.exp(low + min(share, 1.0) * (high - low))
    return None


def reached(points: list[Point], distance: float, steps: str, judge: str) -> dict[str, float] | None:
    """Where a curve first comes down to `distance`: its iteration, seconds and teacher evaluations; None if never."""
    for before, after in zip([points[0], *points], points):
        low, high = (math.log(point["judged"][steps][judge]) for point in (before, after))
        if high <= math.log(distance) + 1e-9:
            share = 1.0 if after is before or low == high else (low - math.log(distance)) / (low - high)
            return {axis: before[axis] + share * (after[axis] - before[axis]) for axis in COSTS}
    return None


def over_seeds(values: Iterable[float | None]) -> dict | None:
    """The `summary` over runs; None where one of them has no value."""
    values = list(values)
    return None if None in values else summary(values)


def leaderboard(curves: dict[str, list[list[Point]]], eval_steps: list[int], judges: list[str]) -> dict[str, Any]:
    """The table of a study. The first variant is what the others are measured by.

    The target is the mean of what the first judge says of the first variant's last point, in the fewest steps. Each
    row has the cost of reaching it, what every judge says there, and what they say after a third of the first
    variant's time and at the row's own end.

    Args:
        curves: the points of the runs of each variant, the first variant first.
        eval_steps: the numbers of sampling steps, in rising order.
        judges: their names, the first decides.
    """
    first, steps = next(iter(curves.values())), list(map(str, eval_steps))
    target = statistics.fmean(run[-1]["judged"][steps[0]][judges[0]] for run in first)
    whole = statistics.fmean(run[-1]["seconds"] for run in first)
    asked = statistics.fmean(run[-1]["teacher_evaluations"] for run in first)

    def judged(runs: list[list[Point]], places: list[tuple[str, float]]) -> dict[str, dict[str, dict | None]]:
        """By number of steps, by judge, at a place of each run."""
        return {
            n: {
                judge: over_seeds(judged_at(run, *place, n, judge) for run, place in zip(runs, places))
                for judge in judges
            }
            for n in steps
        }

    rows = {}
    for name, runs in curves.items():
        arrivals = [reached(run, target, steps[0], judges[0]) for run in runs]
        arrived = None not in arrivals

        rows[name] = {
            "runs": len(runs),
            "target": {axis: summary([arrival[axis] for arrival in arrivals]) if arrived else None for axis in COSTS},
            "share_of_seconds": summary([each["seconds"] / whole for each in arrivals]) if arrived else None,
            "share_of_evaluations": summary([e["teacher_evaluations"] / asked for e in arrivals]) if arrived else None,
            "at_target": judged(runs, [("iteration", each["iteration"]) for each in arrivals]) if arrived else None,
            "at_a_third": judged(runs, [("seconds", whole / 3)] * len(runs)),
            "at_the_end": judged(runs, [("iteration", run[-1]["iteration"]) for run in runs]),
            "seconds": summary([run[-1]["seconds"] for run in runs]),
            "teacher_evaluations": summary([run[-1]["teacher_evaluations"] for run in runs]),
        }
    return {"target": target, "seconds": whole, "teacher_evaluations": asked, "rows": rows}
