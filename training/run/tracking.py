# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""The tracker, the speed, and writes that can fail without harm."""

import contextlib
import os
import secrets
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict

import numpy as np
from accelerate import Accelerator
from PIL import Image
from tqdm.auto import tqdm

from ..cli.errors import UserError, loading
from ..cli.files import WRITE_ERRORS
from ..cli.training_options import RunOptions


class Expendable:
    """Guards writes that the training can do without: a failure is reported once and ends nothing."""

    def __init__(self):
        self.failing: set[str] = set()

    @contextlib.contextmanager
    def __call__(self, what: str) -> Iterator[None]:
        try:
            yield
        except (UserError, *WRITE_ERRORS) as error:
            if what not in self.failing:
                tqdm.write(f"Warning: {what}: {error}. The training goes on without.", file=sys.stderr)
            self.failing.add(what)


class Tracking:
    """TensorBoard or Weights & Biases, of the main process, through Accelerate.

    Args:
        accelerator: of the run.
        options: of the run.
        optional: guards what is written.

    Attributes:
        run_id: the run's name at Weights & Biases; a resumed run keeps it.
    """

    def __init__(self, accelerator: Accelerator, options: RunOptions, optional: Expendable):
        self.accelerator, self.options, self.optional = accelerator, options, optional
        self.run_id = secrets.token_hex(4)

    def start(self, step: int) -> None:
        """Start the tracker of a run that has done `step` steps, and log the options."""
        tracker, folder = self.options.report_to, self.options.output_dir
        values = {
            name: value if isinstance(value, (int, float, str, bool)) else str(value)
            for name, value in asdict(self.options).items()
        }
        if tracker == "tensorboard":
            # TensorBoard forgets the later steps that were logged before the run was resumed. The options of a resumed
            # run are logged already; TensorBoard would make another run of them.
            settings = {tracker: {"purge_step": step + 1}}
            with self.optional("the logs"):
                self.accelerator.init_trackers("diffusers-ctm", None if step else values, settings)
        elif tracker == "wandb":
            name = os.path.basename(os.path.abspath(folder))
            settings = {tracker: {"dir": folder, "name": name, "id": self.run_id, "resume": "allow"}}
            with loading(
                "The tracker wandb", "Log in with `wandb login`, set WANDB_MODE=offline, or give --report_to none."
            ):
                self.accelerator.init_trackers("diffusers-ctm", values, settings)

    def log(self, values: dict[str, float], step: int) -> None:
        """Log numbers by name."""
        with self.optional("the logs"):
            self.accelerator.log(values, step=step)

    def show(self, pictures: dict[str, Image.Image], step: int) -> None:
        """Log pictures by name, in RGB."""
        with self.optional("the logs"):
            for tracker in self.accelerator.trackers:
                if tracker.name == "tensorboard":
                    batches = {name: np.asarray(picture)[None] for name, picture in pictures.items()}
                    tracker.log_images(batches, step, dataformats="NHWC")
                else:
                    tracker.log_images({name: [picture] for name, picture in pictures.items()}, step)

    def finish(self) -> None:
        """Write the rest, and end Accelerate's part of the run."""
        with self.optional("the logs"):
            self.accelerator.end_training()


class Stopwatch:
    """Steps per second, without the time for samples and checkpoints between them."""

    def __init__(self, step: int):
        self._step, self._since = step, time.perf_counter()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Pause the stopwatch inside this block."""
        began = time.perf_counter()
        yield
        self._since += time.perf_counter() - began

    def read(self, step: int) -> float:
        """Steps per second since the last call, with `step` steps done."""
        now = time.perf_counter()
        rate = (step - self._step) / max(now - self._since, 1e-9)
        self._step, self._since = step, now
        return rate
