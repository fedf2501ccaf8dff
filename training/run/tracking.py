# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""The tracker, the speed, and writes that can fail without harm."""

import contextlib
import os
import secrets
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import numpy as np
from accelerate import Accelerator
from PIL import Image
from tqdm.auto import tqdm

from ..cli.errors import UserError
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

    def settings(self, step: int) -> dict[str, dict[str, Any]]:
        """Settings with which a run that has done `step` steps starts each tracker."""
        folder = self.options.output_dir
        name = os.path.basename(os.path.abspath(folder))
        return {
            # TensorBoard forgets the later steps that were logged before the run was resumed.
            "tensorboard": {"purge_step": step + 1},
            "wandb": {"dir": folder, "name": name, "id": self.run_id, "resume": "allow"},
        }

    def start(self, step: int) -> None:
        """Start the tracker and log the options. Raises UserError if Weights & Biases refuses."""
        tracker = self.options.report_to
        if tracker == "none":
            return
        values = {
            name: value if isinstance(value, (int, float, str, bool)) else str(value)
            for name, value in asdict(self.options).items()
        }
        settings = {tracker: self.settings(step)[tracker]}
        if tracker == "tensorboard":
            with self.optional("the logs"):
                # The options of a resumed run are logged already; TensorBoard would make another run of them.
                self.accelerator.init_trackers("diffusers-ctm", None if step else values, settings)
            return
        try:
            self.accelerator.init_trackers("diffusers-ctm", values, settings)
        except Exception as error:  # wandb raises its own
            raise UserError(
                f"--report_to {tracker} cannot start: {str(error).strip()}. Log in with `wandb login`, or set "
                "WANDB_MODE=offline."
            ) from error

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
            for tracker in self.accelerator.trackers:
                tracker.finish()
        self.accelerator.trackers = []
        self.accelerator.end_training()


class Stopwatch:
    """Steps per second, without the time for samples and checkpoints between them."""

    def __init__(self):
        self.steps, self._since, self._out = 0, time.perf_counter(), 0.0

    @contextlib.contextmanager
    def out(self) -> Iterator[None]:
        """Pause the stopwatch inside this block."""
        began = time.perf_counter()
        yield
        self._out += time.perf_counter() - began

    def read(self) -> float:
        """Steps per second since the last call."""
        rate = self.steps / max(time.perf_counter() - self._since - self._out, 1e-9)
        self.__init__()
        return rate
