# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Mean and spread of several measurements, and numbers, times and table cells in words."""

import math
import statistics


def summary(values: list[float]) -> dict:
    """All values, their mean, standard deviation (n - 1; None for one value), lowest and highest."""
    return {
        "by_seed": values,
        "mean": statistics.fmean(values),
        "std": statistics.stdev(values) if len(values) > 1 else None,
        "min": min(values),
        "max": max(values),
    }


def summaries(measured: list[dict[str, float]]) -> dict[str, dict]:
    """The `summary` of each distance over the seeds, by its name."""
    return {name: summary([values[name] for values in measured]) for name in measured[0]}


def number(value: float) -> str:
    """Three digits, without an exponent where that reads well."""
    return f"{value:.0f}" if 100 <= abs(value) < 1e6 else f"{value:.3g}"


def cell(values: dict) -> str:
    """Mean ± standard deviation of a `summary`: the deviation with two digits, the mean with as many decimals."""
    mean, std = values["mean"], values["std"]
    if not std or std < 1e-9 * abs(mean):  # errors of rounding are no spread
        return number(mean)
    decimals = max(0, 1 - math.floor(math.log10(std)))
    return f"{mean:.{decimals}f} ± {std:.{decimals}f}"


def duration(seconds: float) -> str:
    unit, factor = ("s", 1) if seconds >= 1 else ("ms", 1e3) if seconds >= 1e-3 else ("µs", 1e6)
    return f"{seconds * factor:.3g} {unit}"
