# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Distance against network evaluations of the checkpoints that carry an evaluation, and a histogram of likelihoods."""

import gradio as gr
import pandas as pd
from PIL import Image, ImageDraw, ImageFont

from training.report.pictures import GRAY

from .checkpoints import CHECKPOINTS
from .controls import following


def plots() -> list[gr.Column]:
    """A plot for each checkpoint that carries an evaluation; that of the chosen one is visible."""
    columns = []
    for name, checkpoint in CHECKPOINTS.items():
        try:
            table = pd.DataFrame(distances(checkpoint.evaluation))
            features = checkpoint.evaluation["features"]["name"]
        except (KeyError, TypeError, IndexError):  # no evaluation, or one from another program
            continue
        with following(gr.Column, lambda model, name=name: {"visible": model == name}) as column:
            gr.Markdown(
                f"{name}: Frechet distance to real images (features `{features}`) against network evaluations; lower "
                "is better. The teacher is sampled by Heun's method."
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
        columns.append(column)
    return columns


def distances(evaluation: dict) -> list[dict]:
    """The points of the plot; a CTM in one step has no gamma and is shown at each."""
    rows, results = [], [one for one in evaluation["results"] if one["sampler"] in ("ctm", "heun")]
    gammas = sorted({one["gamma"] for one in results if one["gamma"] is not None})
    for one in results:
        if one["sampler"] == "heun":
            names = ["Heun"]
        else:
            names = [f"{gamma:g}" for gamma in (gammas if one["gamma"] is None else [one["gamma"]])]
        rows += [{"evaluations": one["nfe"], "distance": one["frechet"]["mean"], "gamma": name} for name in names]
    return rows


def histogram(values: list[float], mark: float, image: Image.Image) -> Image.Image:
    """Histogram of `values` with a line at `mark`, below `image`."""
    low, high = min(*values, mark), max(*values, mark)
    width, height, bins, base = 640, 264, 32, 225
    picture = Image.new("RGBA", (width, height), (0, 0, 0, 0))
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(24)
    span = max(high - low, 1e-6)
    place = [min(bins - 1, int((value - low) / span * bins)) for value in values]
    counts = [place.count(k) for k in range(bins)]
    unit = width / bins
    for k in set(place):
        top = base - 100 * counts[k] / max(counts)
        draw.rectangle([k * unit + 1, top, (k + 1) * unit - 1, base], fill=(118, 118, 118, 255))
    x = min(width - 2, int((mark - low) / span * (width - 1)))
    draw.line([x, 100, x, base], fill=(200, 60, 160, 255), width=3)
    picture.paste(image.convert("RGB"), (max(0, min(width - image.width, x - image.width // 2)), 0))
    for value, anchor, at in ((low, "lm", 0), (high, "rm", width)):
        draw.text((at, base + 21), f"{value:.2f}", GRAY, font, anchor=anchor)
    draw.text((width / 2, base + 21), "bits per dimension", GRAY, font, anchor="mm")
    return picture
