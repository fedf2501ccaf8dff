# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""The table of distances by steps and gamma, and the names of its rows."""

import statistics

from .numbers import cell, duration


REAL_NAMES = {"resampled": "real images, resampled", "halves": "real images, two halves"}


def setting_name(sampler: str, steps: int, gamma: float | None = None, guided: bool = False) -> str:
    """One way to sample in words: "4 steps, gamma 0.5", "teacher, Heun 18", "guided teacher, Heun 18"."""
    if sampler == "heun":
        return f"{'guided ' if guided else ''}teacher, Heun {steps}"
    name = "1 step" if steps == 1 else f"{steps} steps"
    return name if gamma is None else f"{name}, gamma {gamma:g}"


def distance_table(report: dict, distance: str) -> list[str]:
    """The lines of a table: a row for each number of steps, a column for each gamma."""
    gammas = sorted({row["gamma"] for row in report["results"] if row["gamma"] is not None})
    lines = [
        "| | NFE | without gamma |" + "".join(f" gamma {gamma:g} |" for gamma in gammas) + " time per image |",
        "|---|--:|--:|" + "--:|" * (len(gammas) + 1),
    ]

    def add(name: str, nfe: int | str, values: dict[float | None, dict], seconds: str) -> None:
        cells = [cell(values[gamma][distance]) if gamma in values else "" for gamma in [None, *gammas]]
        lines.append(f"| {name} | {nfe} | " + " | ".join(cells) + f" | {seconds} |")

    guided = (report.get("options") or {}).get("teacher_guidance_scale", 1) != 1
    groups: dict[tuple[str, int], list[dict]] = {}
    for row in report["results"]:
        groups.setdefault((row["sampler"], row["steps"]), []).append(row)
    for (sampler, steps), rows in groups.items():
        seconds = duration(statistics.fmean(row["seconds_per_image"] for row in rows))
        add(setting_name(sampler, steps, guided=guided), rows[0]["nfe"], {row["gamma"]: row for row in rows}, seconds)
    for kind, values in report["real_against_real"].items():
        if distance in values:
            add(REAL_NAMES[kind], "", {None: values}, "")
    return lines
