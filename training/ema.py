# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Averages of any width after the training: `python -m training.ema runs/student --sigma_rel 0.08`.

Karras et al. 2024, Section 3 and Appendix C. The sums are ema-pytorch's. Its `PostHocEMA` would also keep and write the
averages. But it writes half-precision pickles, counters included, under their final names from the start, and it reads
snapshots of later steps than asked for.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from ema_pytorch.post_hoc_ema import p_dot_p, sigma_rel_to_gamma, solve_weights

from .cli.errors import UserError, loading
from .cli.files import atomic_folder, read_json, write_json
from .cli.options import Checked, option, run_program
from .cli.weights import load_pipeline
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
        self.check(
            self.sigma_rel is not None and 0 < self.sigma_rel < WIDEST,
            "sigma_rel",
            f"in (0, {WIDEST:.3f}), for instance 0.1",
        )


def find_snapshots(output_dir: str) -> list[tuple[int, float, int, Path]]:
    """(step of the run, sigma_rel, updates, folder) of all averages that it kept, the earliest first.

    Raises UserError if there are none.
    """
    snapshots = []
    for folder in Path(output_dir, SNAPSHOTS).glob("sigma_rel-*"):
        with loading(
            f"The snapshot {folder}", f"Its {RECORD} does not say what it is. Remove it, or take it from a backup."
        ):
            record = read_json(folder, RECORD)
            average = record["average"]
            snapshots.append((record["steps"], average["sigma_rel"], average["updates"], folder))
    if not snapshots:
        raise UserError(f"--run {output_dir} has no {SNAPSHOTS}: a run with --posthoc_ema 0.05 0.1 keeps them.")
    return sorted(snapshots)


def reconstruction(
    sigma_rels: Sequence[float], updates: Sequence[int], sigma_rel: float, update: int
) -> tuple[torch.Tensor, float]:
    """Weights of averages that make the average of another width, and its error (Karras et al. 2024, Algorithm 3).

    The average of width `sigma_rel` after `update` updates is a sum of the network's weights over time; the result is
    the closest to it among the sums of the given averages, by least squares, with weights scaled to add up to 1.

    Returns:
        float64 of shape (number of averages,), and the distance between both weightings of time, relative to the wanted
        one.
    """
    t = torch.tensor(updates, dtype=torch.float64)
    gamma = torch.tensor([sigma_rel_to_gamma(value) for value in sigma_rels], dtype=torch.float64)
    t_r = torch.tensor([update], dtype=torch.float64)
    gamma_r = torch.tensor([sigma_rel_to_gamma(sigma_rel)], dtype=torch.float64)
    weights = solve_weights(t, gamma, t_r, gamma_r)[:, 0]
    weights = weights / weights.sum()  # an average
    length = p_dot_p(t_r, gamma_r, t_r, gamma_r)
    own = weights @ p_dot_p(t[:, None], gamma[:, None], t, gamma) @ weights
    shared = weights @ p_dot_p(t, gamma, t_r, gamma_r)
    return weights, ((own - 2 * shared + length) / length).clamp(min=0).sqrt().item()


@torch.no_grad()
def main(config: PostHocConfig) -> str:
    """Reconstruct, save as a pipeline, and return its folder."""
    snapshots = find_snapshots(config.run)
    steps = sorted({step for step, *_ in snapshots})
    last = steps[-1] if config.step is None else config.step
    if last not in steps:
        raise UserError(f"--step {last} has no snapshot; there are some of the steps {', '.join(map(str, steps))}.")
    widths, updates, folders = zip(*(rest for step, *rest in snapshots if step <= last), strict=True)
    weights, error = reconstruction(widths, updates, config.sigma_rel, updates[-1])

    sums = {}
    for folder, weight in zip(folders, weights.tolist(), strict=True):
        pipe = load_pipeline(f"The snapshot {folder}", str(folder))
        for name, parameter in pipe.unet.named_parameters():
            total = sums.setdefault(name, torch.zeros_like(parameter, dtype=torch.float64))
            total.add_(parameter, alpha=weight)
    for name, parameter in pipe.unet.named_parameters():
        parameter.copy_(sums[name])

    name = f"pipeline-ema-sigma_rel-{config.sigma_rel:g}" + ("" if config.step is None else f"-step-{last:06d}")
    path = config.output_dir or str(Path(config.run, name))
    record = read_json(folders[-1], RECORD)
    record["average"] = {"sigma_rel": config.sigma_rel, "updates": updates[-1], "error": error}
    with atomic_folder(path) as draft:
        pipe.save_pretrained(draft)
        write_json(record, RECORD, draft)
    print(
        f"Saved {path}: the average of width {config.sigma_rel:g} after step {last}, from {len(folders)} snapshots.\n"
        f"Its weighting of the training's steps is {error:.1%} off that of an average kept during the training."
    )
    if error > 0.05:
        print("Take a width nearer to those of the snapshots, or save them more often (--posthoc_ema_every).")
    return path


if __name__ == "__main__":
    run_program(main, PostHocConfig)
