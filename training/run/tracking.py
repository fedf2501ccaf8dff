# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""The tracker, whose failures end no training."""

import contextlib
import secrets
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from PIL import Image
from tqdm.auto import tqdm

from ..cli.errors import UserError, loading
from ..cli.files import WRITE_ERRORS
from ..cli.training_options import RunOptions


class Tracking:
    """TensorBoard or Weights & Biases, of the main process, through Accelerate.

    Args:
        accelerator: of the run.
        options: of the run.

    Attributes:
        run_id: the run's name at Weights & Biases; a resumed run keeps it.
    """

    def __init__(self, accelerator: Accelerator, options: RunOptions):
        self.accelerator, self.options = accelerator, options
        self.run_id, self._failing = secrets.token_hex(4), set()

    @contextlib.contextmanager
    def optional(self, what: str) -> Iterator[None]:
        """Guard a write that the training can do without: a failure is reported once and ends nothing."""
        try:
            yield
        except (UserError, *WRITE_ERRORS) as error:
            if what not in self._failing:
                tqdm.write(f"Warning: {what}: {error}. The training goes on without.", file=sys.stderr)
            self._failing.add(what)

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
            with self.optional("the logs"):
                self.accelerator.init_trackers(
                    "diffusers-ctm", None if step else values, {tracker: {"purge_step": step + 1}}
                )
        elif tracker == "wandb":
            settings = {"dir": folder, "name": Path(folder).absolute().name, "id": self.run_id, "resume": "allow"}
            with loading(
                "The tracker wandb", "Log in with `wandb login`, set WANDB_MODE=offline, or give --report_to none."
            ):
                self.accelerator.init_trackers("diffusers-ctm", values, {tracker: settings})

    def log(self, values: dict[str, float], step: int) -> None:
        """Log numbers by name."""
        with self.optional("the logs"):
            self.accelerator.log(values, step=step)

    def show(self, pictures: dict[str, Image.Image], step: int) -> None:
        """Log pictures by name, in RGB."""
        with self.optional("the logs"):
            layout = {"dataformats": "NHWC"} if self.options.report_to == "tensorboard" else {}
            for tracker in self.accelerator.trackers:
                tracker.log_images(
                    {name: np.asarray(picture)[None] for name, picture in pictures.items()}, step, **layout
                )

    def finish(self) -> None:
        """Write the rest, and end Accelerate's part of the run."""
        with self.optional("the logs"):
            self.accelerator.end_training()
