"""Moving averages of a network's weights, as networks that can be called, and averages of any width after the training:

python -m training.ema runs/student --sigma_rel 0.08
"""

import os
import re
from dataclasses import dataclass
from typing import ClassVar

import torch
from diffusers import DiffusionPipeline
from ema_pytorch.post_hoc_ema import p_dot_p, sigma_rel_to_gamma, solve_weights

from .cli.errors import UserError
from .cli.files import atomic_folder, read_json, write_json
from .cli.options import Checked, option, run_program
from .hub.record import RECORD
from .run.averages import SNAPSHOTS


SNAPSHOT = re.compile(r"sigma_rel-[0-9.e-]+-step-(\d+)")

WIDEST = 12**-0.5  # sigma_rel of gamma = 0, the plain mean of all steps


# Averages of any width (Karras et al. 2024, Section 3 and Appendix C) -------------------------------------------------


#
# The sums are ema-pytorch's. Its `PostHocEMA` would also keep and write the averages, but as half-precision pickles, counters
# included, under their final names from the start, and it reads snapshots that are later than what is asked for.
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
        if self.run is None:
            raise UserError("--run is needed: the output_dir of a run with --posthoc_ema.")
        if self.sigma_rel is None:
            raise UserError("--sigma_rel is needed: the width of the average, for instance 0.1.")
        self.check(0 < self.sigma_rel < WIDEST, "sigma_rel", f"in (0, {WIDEST:.3f})")


@dataclass
class Snapshot:
    """A power-function average after `updates` updates, at `step` of its run, in `folder`."""

    folder: str
    sigma_rel: float
    step: int
    updates: int


def find_snapshots(output_dir: str) -> list[Snapshot]:
    """All snapshots of a run, the earliest first. Raises UserError if there are none."""
    parent = os.path.join(output_dir, SNAPSHOTS)
    found = []
    for name in sorted(os.listdir(parent)) if os.path.isdir(parent) else []:
        if SNAPSHOT.fullmatch(name):
            folder = os.path.join(parent, name)
            record = read_json(folder, RECORD)
            average = record.get("average", {})
            if not {"sigma_rel", "updates"} <= average.keys() or "steps" not in record:
                raise UserError(f"{folder} has no {RECORD} that says what it is. Remove it, or take it from a backup.")
            found.append(Snapshot(folder, average["sigma_rel"], record["steps"], average["updates"]))
    if not found:
        raise UserError(f"--run {output_dir} has no {SNAPSHOTS}: a run with --posthoc_ema 0.05 0.1 keeps them.")
    return sorted(found, key=lambda snapshot: (snapshot.step, snapshot.sigma_rel))


def reconstruction(
    sigma_rels: list[float], updates: list[int], sigma_rel: float, update: int
) -> tuple[torch.Tensor, float]:
    """Weights of averages that make the average of another width, and the error of that (Karras et al. 2024, Algorithm 3).

    The average of width `sigma_rel` after `update` updates is a sum of the network's weights over time; the result is the
    closest to it among the sums of the given averages, by least squares.

    Returns:
        float64 of shape (number of averages,), and the distance between both weightings of time, relative to the one wanted.
    """
    t = torch.tensor(updates, dtype=torch.float64)
    gamma = torch.tensor([sigma_rel_to_gamma(value) for value in sigma_rels], dtype=torch.float64)
    t_r = torch.tensor([update], dtype=torch.float64)
    gamma_r = torch.tensor([sigma_rel_to_gamma(sigma_rel)], dtype=torch.float64)
    weights = solve_weights(t, gamma, t_r, gamma_r)[:, 0]
    square = p_dot_p(t_r, gamma_r, t_r, gamma_r)
    captured = weights @ p_dot_p(t, gamma, t_r, gamma_r)
    return weights, (1 - captured / square).clamp(min=0).sqrt().item()


def _load(folder: str) -> DiffusionPipeline:
    try:
        return DiffusionPipeline.from_pretrained(folder)
    except Exception as error:  # safetensors and diffusers each raise their own
        raise UserError(f"The snapshot {folder} cannot be loaded: {type(error).__name__}: {error}") from error


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

    pipe = _load(last.folder)
    sums = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in pipe.unet.named_parameters()}
    for snapshot, weight in zip(snapshots, weights.tolist(), strict=True):
        parameters = dict(_load(snapshot.folder).unet.named_parameters())
        if parameters.keys() != sums.keys():
            raise UserError(f"The snapshot {snapshot.folder} is of another network than {last.folder}.")
        for name, total in sums.items():
            total.add_(parameters[name], alpha=weight)
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
        print(
            "That is much: take a width nearer to those of the snapshots, or save them more often (--posthoc_ema_every)."
        )
    return path


if __name__ == "__main__":
    run_program(main, PostHocConfig)
