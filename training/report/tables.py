"""The table of distances by steps and gamma, and the names of its rows."""

import statistics

from ..measure.sampling import Setting
from .numbers import cell, duration


def distance_table(report: dict, distance: str) -> list[str]:
    """Lines of one table: a row per number of steps, a column per gamma."""
    gammas = sorted({row["gamma"] for row in report["results"] if row["gamma"] is not None})
    lines = [
        "| | NFE | without gamma |" + "".join(f" gamma {gamma:g} |" for gamma in gammas) + " time per image |",
        "|---|--:|--:|" + "--:|" * (len(gammas) + 1),
    ]

    def line(name: str, nfe: int | str, values: dict[float | None, dict], seconds: list[float]) -> str:
        cells = [cell(values[gamma][distance]) if gamma in values else "" for gamma in [None, *gammas]]
        taken = duration(statistics.fmean(seconds)) if seconds else ""
        return f"| {name} | {nfe} | " + " | ".join(cells) + f" | {taken} |"

    rows: dict[tuple[str, int], list[dict]] = {}
    for row in report["results"]:
        rows.setdefault((row["sampler"], row["steps"]), []).append(row)
    for (sampler, steps), found in rows.items():
        values = {row["gamma"]: row for row in found}
        seconds = [row["seconds_per_image"] for row in found]
        lines.append(line(Setting(sampler, steps).name, found[0]["nfe"], values, seconds))
    names = {"resampled": "real images, resampled", "halves": "real images, two halves"}
    for kind, found in report["real_against_real"].items():
        if distance in found:
            lines.append(line(names[kind], "", {None: found}, []))
    return lines
