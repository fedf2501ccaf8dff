# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Distance against network evaluations, of the checkpoints that carry an evaluation."""

import gradio as gr
import pandas as pd

from .checkpoints import CHECKPOINTS
from .controls import following


def plots() -> list[gr.Column]:
    """A plot for each checkpoint that carries an evaluation; that of the chosen one is visible."""
    columns = []
    for name, checkpoint in CHECKPOINTS.items():
        if checkpoint.evaluation is None:
            continue
        try:
            table = pd.DataFrame(distances(checkpoint.evaluation))
            features = checkpoint.evaluation["features"]["name"]
        except (KeyError, TypeError, IndexError):  # from another program
            continue
        with following(gr.Column, lambda model, name=name: {"visible": model == name}) as column:
            draw_plot(name, features, table)
        columns.append(column)
    return columns


def draw_plot(name: str, features: str, table: pd.DataFrame) -> None:
    gr.Markdown(
        f"{name}: Frechet distance to real images (features `{features}`) against network evaluations; lower is "
        "better. The "
        "teacher is sampled by Heun's method."
    )
    gr.ScatterPlot(
        table,
        x="evaluations",
        y="distance",
        color="gamma",
        x_title="network evaluations",
        y_title="distance",
        x_lim=[0, 1.1 * table.evaluations.max()],
        y_lim=[0, 1.1 * table.distance.max()],
        height=260,
        buttons=[],
    )


def distances(evaluation: dict) -> list[dict]:
    rows, results = [], [one for one in evaluation["results"] if one["sampler"] in ("ctm", "heun")]
    gammas = sorted({one["gamma"] for one in results if one["gamma"] is not None})
    for one in results:
        if one["sampler"] == "heun":
            names = ["Heun"]
        else:
            names = [f"{gamma:g}" for gamma in (gammas if one["gamma"] is None else [one["gamma"]])]
        rows += [{"evaluations": one["nfe"], "distance": one["frechet"]["mean"], "gamma": name} for name in names]
    return rows
