# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Averages of any width after the training: `python -m training.ema runs/student --sigma_rel 0.08`.

Karras et al. 2024, Section 3 and Appendix C. The sums are ema-pytorch's. Its `PostHocEMA` would also keep and write the
averages. But it writes half-precision pickles, counters included, under their final names from the start, and it reads
snapshots of later steps than asked for.
"""

import glob
import os
from dataclasses import dataclass
from typing import ClassVar

import torch
from diffusers import DiffusionPipeline
from ema_pytorch.post_hoc_ema import p_dot_p, sigma_rel_to_gamma, solve_weights

from .cli.errors import UserError, loading
from .cli.files import atomic_folder, read_json, write_json
from .cli.options import Checked, option, run_program
from .hub.record import RECORD
from .run.averages import SNAPSHOTS


WIDEST = 12**-0.5  # sigma_rel of gamma = 0, the plain mean of all steps


@dataclass
class PostHocConfig(Checked):
    """Make a pipeline of the power-function average of any width, from the snapshots of a run with --posthoc_ema."""

    POSITIONAL: ClassVar[tuple[str, ...]] = ("run",)

    run: str | None = option(None, "The run's output_dir.")
    config: str | None = option(None, "YAML file with any of these options; the command line overrides it.")
    sigma_rel: float | None = option(
        None, "Width of the average relative to the length of the training, in (0, 0.288]; 0.05 to 0.15 is usual."
    )
    step: int | None = option(
        None, "The step that ends the average; it must have a snapshot. Default: the last that has."
    )
    output_dir: str | None = option(
        None, "Folder of the pipeline, replaced if it is there. Default: pipeline-ema-sigma_rel-... in the run's."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(self.run is not None, "run", "the output_dir of a run with --posthoc_ema")
        width = self.sigma_rel
        self.check(width is not None and 0 < width < WIDEST, "sigma_rel", f"in (0, {WIDEST:.3f}), for instance 0.1")


@dataclass
class Snapshot:
    """A power-function average after `updates` updates, at `step` of its run, in `folder`."""

    folder: str
    sigma_rel: float
    step: int
    updates: int


def find_snapshots(output_dir: str) -> list[Snapshot]:
    """All snapshots of a run, the earliest first. Raises UserError if there are none."""
    snapshots = []
    for folder in glob.glob(os.path.join(glob.escape(output_dir), SNAPSHOTS, "sigma_rel-*")):
        with loading(
            f"The snapshot {folder}", f"Its {RECORD} does not say what it is. Remove it, or take it from a backup."
        ):
            record = read_json(folder, RECORD)
            average = record["average"]
            snapshots.append(Snapshot(folder, average["sigma_rel"], record["steps"], average["updates"]))
    if not snapshots:
        raise UserError(f"--run {output_dir} has no {SNAPSHOTS}: a run with --posthoc_ema 0.05 0.1 keeps them.")
    return sorted(snapshots, key=lambda snapshot: (snapshot.step, snapshot.sigma_rel))


def reconstruction(
    sigma_rels: list[float], updates: list[int], sigma_rel: float, update: int
) -> tuple[torch.Tensor, float]:
    """Weights of averages that make the average of another width, and its error (Karras et al. 2024, Algorithm 3).

    The average of width `sigma_rel` after `update` updates is a sum of the network's weights over time; the result is
    the closest to it among the sums of the given averages, by least squares.

    Returns:
        float64 of shape (number of averages,), and the distance between both weightings of time, relative to the wanted
        one.
    """
    t = torch.tensor(updates, dtype=torch.float64)
    gamma = torch.tensor([sigma_rel_to_gamma(value) for value in sigma_rels], dtype=torch.float64)
    t_r = torch.tensor([update], dtype=torch.float64)
    gamma_r = torch.tensor([sigma_rel_to_gamma(sigma_rel)], dtype=torch.float64)
    weights = solve_weights(t, gamma, t_r, gamma_r)[:, 0]
    square = p_dot_p(t_r, gamma_r, t_r, gamma_r)
    captured = weights @ p_dot_p(t, gamma, t_r, gamma_r)
    return weights, (1 - captured / square).clamp(min=0).sqrt().item()


def load_pipeline(folder: str) -> DiffusionPipeline:
    """The pipeline of a snapshot. Raises UserError if it is damaged."""
    with loading(f"The snapshot {folder}"):
        return DiffusionPipeline.from_pretrained(folder)


@torch.no_grad()
def main(config: PostHocConfig) -> str:
    """Reconstruct, save as a pipeline, and return its folder."""
    snapshots = find_snapshots(config.run)
    steps = sorted({snapshot.step for snapshot in snapshots})
    step = steps[-1] if config.step is None else config.step
    if step not in steps:
        raise UserError(f"--step {step} has no snapshot; there are some of the steps {', '.join(map(str, steps))}.")
    snapshots = [snapshot for snapshot in snapshots if snapshot.step <= step]
    last = snapshots[-1]
    sigma_rels, updates = [entry.sigma_rel for entry in snapshots], [entry.updates for entry in snapshots]
    weights, error = reconstruction(sigma_rels, updates, config.sigma_rel, last.updates)

    pipe = load_pipeline(last.folder)
    sums = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in pipe.unet.named_parameters()}
    for snapshot, weight in zip(snapshots, weights.tolist(), strict=True):
        for name, parameter in load_pipeline(snapshot.folder).unet.named_parameters():
            sums[name].add_(parameter, alpha=weight)
    for name, parameter in pipe.unet.named_parameters():
        parameter.copy_(sums[name])

    name = f"pipeline-ema-sigma_rel-{config.sigma_rel:g}" + ("" if config.step is None else f"-step-{step:06d}")
    path = config.output_dir or os.path.join(config.run, name)
    record = read_json(last.folder, RECORD)
    record["average"] = {"sigma_rel": config.sigma_rel, "updates": last.updates, "error": error}
    with atomic_folder(path) as draft:
        pipe.save_pretrained(draft)
        write_json(record, RECORD, draft)
    print(
        f"Saved {path}: the average of width {config.sigma_rel:g} after step {step}, from {len(snapshots)} snapshots."
    )
    print(f"Its weighting of the training's steps is {error:.1%} off that of an average kept during the training.")
    if error > 0.05:
        print("Take a width nearer to those of the snapshots, or save them more often (--posthoc_ema_every).")
    return path


if __name__ == "__main__":
    run_program(main, PostHocConfig)
