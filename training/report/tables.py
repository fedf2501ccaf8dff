# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""The table of distances by steps and gamma, and the names of its rows."""

import statistics
from collections.abc import Iterable, Sequence

from .numbers import cell, duration


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """The lines of a table in Markdown: its first column to the left, the others to the right."""
    lines = ["| " + " | ".join(map(str, cells)) + " |" for cells in (head, *rows)]
    return [lines[0], "|---" + "|--:" * (len(head) - 1) + "|", *lines[1:]]


REAL_NAMES = {"resampled": "real images, resampled", "halves": "real images, two halves"}


def setting_name(sampler: str, steps: int, gamma: float | None = None, guided: bool = False) -> str:
    """One way to sample in words: "4 steps, gamma 0.5", "teacher, Heun 18", "guided teacher, Heun 18"."""
    if sampler == "heun":
        return f"{'guided ' if guided else ''}teacher, Heun {steps}"
    name = "1 step" if steps == 1 else f"{steps} steps"
    return name if gamma is None else f"{name}, gamma {gamma:g}"


def _is_guided(report: dict) -> bool:
    """Whether the report's teacher is."""
    return (report.get("options") or {}).get("teacher_guidance_scale", 1) != 1


def distance_table(report: dict, distance: str) -> list[str]:
    """The lines of a table: a row for each number of steps, a column for each gamma."""
    gammas = sorted({row["gamma"] for row in report["results"] if row["gamma"] is not None})
    head = ["", "NFE", "without gamma", *(f"gamma {gamma:g}" for gamma in gammas), "time per image"]
    table: list[list[object]] = []

    def add(name: str, nfe: int | str, values: dict[float | None, dict], seconds: str) -> None:
        cells = [cell(values[gamma][distance]) if gamma in values else "" for gamma in [None, *gammas]]
        table.append([name, nfe, *cells, seconds])

    guided = _is_guided(report)
    groups: dict[tuple[str, int], list[dict]] = {}
    for row in report["results"]:
        groups.setdefault((row["sampler"], row["steps"]), []).append(row)
    for (sampler, steps), rows in groups.items():
        seconds = duration(statistics.fmean(row["seconds_per_image"] for row in rows))
        add(setting_name(sampler, steps, guided=guided), rows[0]["nfe"], {row["gamma"]: row for row in rows}, seconds)
    for kind, values in report["real_against_real"].items():
        if distance in values:
            add(REAL_NAMES[kind], "", {None: values}, "")
    return markdown_table(head, table)


def judges_table(report: dict) -> tuple[list[str], list[str]]:
    """The lines of a table of all that is measured beside the first distances, and notes that explain its columns.

    A row for each way to sample, '-' where a number has no meaning.
    """
    options = report["options"]
    others = enumerate(report.get("other_features", []), start=2)
    columns = [(f"frechet_{number}", f"Frechet, `{other['name']}`", "") for number, other in others] + [
        (
            "precision",
            "precision",
            "Precision: the share of samples that are as near to a real image as the third nearest other real image. "
            "Recall: likewise the share of real images, near to samples (Kynkäänniemi et al. 2019).",
        ),
        ("recall", "recall", ""),
        (
            "diversity",
            "diversity, %",
            "Diversity: the mean distance of two samples of one class, in percent of that of the teacher in most "
            "steps.",
        ),
        (
            "paired",
            "paired error",
            "Paired error: root mean squared error, of values in [-1, 1], to the teacher's own images from the same "
            f"noise in {options['paired_steps']} Heun steps, {options['paired_samples']:,} per seed; "
            "in features, of Euclidean distances. Only deterministic sampling has such images.",
        ),
        ("paired_features", "paired error, features", ""),
    ]
    guided = _is_guided(report)
    rows = [(setting_name(row["sampler"], row["steps"], row["gamma"], guided), row) for row in report["results"]]
    rows += [(REAL_NAMES[kind], values) for kind, values in report["real_against_real"].items()]
    columns = [column for column in columns if any(column[0] in values for _, values in rows)]
    if not columns:
        return [], []
    table = [[name, *(cell(values[key]) if key in values else "-" for key, _, _ in columns)] for name, values in rows]
    head = ["", *(title for _, title, _ in columns)]
    told = [row for row in table if set(row[1:]) != {"-"}]
    return markdown_table(head, told), [note for _, _, note in columns if note]
