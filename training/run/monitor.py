# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Everything that a run shows: means of its losses, samples, distances, skipped steps, log lines."""

import contextlib
import math
import os
import sys
import time
from collections.abc import Iterator

import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from diffusers_ctm import CTMPipeline
from diffusers_ctm.checks import NotFiniteError

from ..cli.errors import UserError
from ..cli.files import atomic_file
from ..cli.training_options import RunOptions
from ..data.images import Images
from ..measure.during_training import DistanceToData, keep_metrics
from ..measure.sampling import class_labels
from ..report.pictures import enlarged_grid
from .checkpoints import newest_checkpoint
from .tracking import Tracking


# Bounds between the noise levels whose score-matching losses are logged apart; about a factor of 3 each.
SIGMA_EDGES = (0.1, 0.3, 1.0, 3.0, 10.0)

SIGMA_BINS = ("below_0.1", *(f"{low:g}_to_{high:g}" for low, high in zip(SIGMA_EDGES, SIGMA_EDGES[1:])), "from_10")


class Means:
    """Means of named numbers over the passes of some steps and over all processes, summed on the device.

    Infinite and NaN numbers are left out of the means and counted.
    """

    def __init__(self):
        # By the names of a group: their sums, their numbers of finite values, and their numbers of values; (3, names).
        self.sums: dict[tuple[str, ...], torch.Tensor] = {}

    def _add(self, names: tuple[str, ...], *rows: torch.Tensor) -> None:
        added = torch.stack(rows)
        self.sums[names] = self.sums[names] + added if names in self.sums else added

    @torch.no_grad()
    def add(self, values: dict[str, torch.Tensor]) -> torch.Tensor:
        """Add one number of each name; return whether all are finite, 0-d on their device."""
        stacked = torch.stack([value.detach().float() for value in values.values()])
        finite = stacked.isfinite()
        self._add(tuple(values), torch.where(finite, stacked, 0), finite.float(), torch.ones_like(stacked))
        return finite.all()

    @torch.no_grad()
    def add_by_level(self, name: str, values: torch.Tensor, sigma: torch.Tensor) -> None:
        """Add each of `values`, shape (B,), to the mean of its noise level's bin, "name/bin" of `SIGMA_BINS`.

        Nothing waits for the device.
        """
        above = torch.stack([sigma >= edge for edge in SIGMA_EDGES]).sum(0)
        inside = (above == torch.arange(len(SIGMA_BINS), device=sigma.device)[:, None]) & values.isfinite()
        count = inside.sum(1).float()
        names = tuple(f"{name}/{bin}" for bin in SIGMA_BINS)
        self._add(names, torch.where(inside, values.float(), 0).sum(1), count, count)

    def read(self, accelerator: Accelerator) -> tuple[dict[str, float], list[str]]:
        """The means, and the names that were not always finite. Waits for the device, and starts anew."""
        names = [name for group in self.sums for name in group]
        sums = accelerator.reduce(torch.cat(list(self.sums.values()), dim=1), "sum")
        rows = list(zip(names, *sums.tolist(), strict=True))
        self.sums = {}
        by_name = {name: [0.0, 0.0, 0.0] for name in names}
        for name, *values in rows:  # two stages have some names in common
            by_name[name] = [before + value for before, value in zip(by_name[name], values)]
        means = {name: total / finite for name, (total, finite, _) in by_name.items() if finite > 0}
        return means, [name for name, (_, finite, count) in by_name.items() if finite < count]

    def state_dict(self, accelerator: Accelerator) -> list:
        """The sums so far, over all processes: for one of them to load."""
        reduced = {names: accelerator.reduce(rows, "sum").cpu() for names, rows in self.sums.items()}
        return [(list(names), rows[:2], rows[2].tolist()) for names, rows in reduced.items()]

    def load_state_dict(self, state: list, device: torch.device, sums: bool) -> None:
        """Go on from `state`; the one process that loads it with `sums` has those of all."""
        self.sums = {}
        for names, rows, counts in state:
            rows = torch.cat([rows, torch.tensor([counts])]).to(device)
            self.sums[tuple(names)] = rows if sums else torch.zeros_like(rows)


class Monitor:
    """Shows how a run goes on: losses, samples, distances, steps that were skipped. It changes nothing in the training.

    Args:
        options: of the run.
        dataset: images.
        accelerator: of the run.
        sample_settings: name and `CTMPipeline.__call__` options of each grid of samples.

    Attributes:
        means: of the losses since the last log.
        tracking: the tracker.
        progress: the progress bar, from `start` on.
    """

    def __init__(
        self,
        options: RunOptions,
        dataset: Images,
        accelerator: Accelerator,
        sample_settings: dict[str, dict],
    ):
        self.options, self.dataset, self.accelerator = options, dataset, accelerator
        self.sample_settings = sample_settings
        self.means, self.tracking = Means(), Tracking(accelerator, options)
        self.distance = DistanceToData(options, dataset, accelerator) if options.eval_every else None

    def start(self, step: int) -> None:
        """Begin to show a run that has done `step` steps."""
        self.tracking.start(step)
        if self.distance is not None and self.accelerator.is_main_process:
            with self.tracking.optional("metrics.jsonl"):  # the run measures the later steps again
                keep_metrics(self.options.output_dir, step + 1)
        self._timed_step, self._since, self._stage = step, time.perf_counter(), None
        self.progress = tqdm(
            total=self.options.max_train_steps,
            initial=step,
            desc="Training",
            unit="step",
            disable=not self.accelerator.is_local_main_process,
        )

    def announce(self, stage: str) -> None:
        """Show which stage the run is in, before the numbers."""
        if stage != self._stage:
            self._stage = stage
            self.progress.set_description(f"Training ({stage})")

    @contextlib.contextmanager
    def clock_stopped(self) -> Iterator[None]:
        """Leave the time of this block out of the speed."""
        began = time.perf_counter()
        yield
        self._since += time.perf_counter() - began

    def check_skipped(self, step: int, in_a_row: int) -> None:
        """Raise UserError if too many steps in a row were skipped: at the end of a short run, half of it."""
        limit = self.options.max_skipped_steps
        most = min(limit, max(2, step // 2)) if step == self.options.max_train_steps else limit
        if in_a_row < most:
            return
        _, broken = self.means.read(self.accelerator)
        names = ", ".join(name for name in broken if not name.endswith("grad_norm")) or "the gradient"
        newest = newest_checkpoint(self.options.output_dir)
        intact = f"{newest} is intact" if newest else "no checkpoint had been saved"
        raise UserError(
            f"The last {in_a_row} steps were left out, up to step {step}: {names} became infinite or NaN. Lower "
            f"--learning_rate, keep --max_grad_norm above 0, or use --mixed_precision no or bf16; {intact}. "
            f"(--max_skipped_steps {limit})"
        )

    def log(self, step: int, skipped: int, learning_rate: float) -> None:
        """Show and track the means since the last call. Waits for the device."""
        options = self.options
        means, _ = self.means.read(self.accelerator)
        shown = {name: f"{value:.3g}" for name, value in means.items() if "/" not in name}
        self.progress.set_postfix({**shown, "skipped": skipped} if skipped else shown)
        images = options.train_batch_size * options.gradient_accumulation_steps * self.accelerator.num_processes
        steps, seconds = step - self._timed_step, time.perf_counter() - self._since
        self._timed_step, self._since = step, time.perf_counter()
        values = {
            **means,
            "learning_rate": learning_rate,
            "skipped_steps": skipped,
            "images_per_second": images * steps / max(seconds, 1e-9),
        }
        self.tracking.log({name if "/" in name else f"train/{name}": value for name, value in values.items()}, step)

    def save_samples(self, step: int, pipe: CTMPipeline) -> None:
        """Draw samples from fixed noise to output_dir/samples, one picture per setting; none if they are NaN."""
        if not self.accelerator.is_main_process or not self.sample_settings:
            return
        grids, columns, rows = {}, 10, 4
        pipe.set_progress_bar_config(disable=True)
        labels = pipe.classes and class_labels(pipe.classes, None, columns).repeat(rows)
        for name, settings in self.sample_settings.items():
            generator = torch.Generator(self.accelerator.device).manual_seed(0)
            try:
                images = pipe(batch_size=columns * rows, class_labels=labels, generator=generator, **settings).images
            except NotFiniteError as error:
                tqdm.write(f"Step {step}: no samples of {name}. {error}", file=sys.stderr)
                continue
            grids[f"samples/{name}"] = grid = enlarged_grid(images, rows, columns)
            path = os.path.join(self.options.output_dir, "samples", f"step-{step:06d}-{name}.png")
            with self.tracking.optional("the samples"), atomic_file(path) as draft:
                grid.save(draft)
        self.tracking.show(grids, step)

    def measure(self, step: int, pipe: CTMPipeline) -> None:
        """Measure the Frechet distance of samples to the data, for the tracker and output_dir/metrics.jsonl."""
        distances = self.distance(pipe, self.sample_settings)
        if not self.accelerator.is_main_process:
            return
        shown = ", ".join(f"{value:.4g} ({name})" for name, value in distances.items())
        tqdm.write(f"Step {step}: Frechet distance {shown}", file=sys.stderr)
        self.tracking.log({f"frechet/{name}": value for name, value in distances.items()}, step)
        line = {
            "step": step,
            "frechet": {name: value if math.isfinite(value) else None for name, value in distances.items()},
            "num_samples": self.options.eval_samples,
            "num_reference": self.distance.num_reference,
            "features": self.options.eval_features,
        }
        with self.tracking.optional("metrics.jsonl"):
            keep_metrics(self.options.output_dir, step, line)

    def state_dict(self) -> dict:
        """The means so far and the tracker's run, for a checkpoint. All processes call it."""
        return {"means": self.means.state_dict(self.accelerator), "tracker_run": self.tracking.run_id}

    def load_state_dict(self, state: dict) -> None:
        self.means.load_state_dict(state["means"], self.accelerator.device, self.accelerator.is_main_process)
        self.tracking.run_id = state["tracker_run"]
