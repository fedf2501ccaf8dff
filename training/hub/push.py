# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Uploads in the background of a run."""

import contextlib
import functools
import os
import queue
import shutil
import sys
import threading
from collections.abc import Callable
from typing import Any

from huggingface_hub import utils
from tqdm.auto import tqdm

from ..cli.errors import UserError, error_text
from ..cli.files import WRITE_ERRORS, write_json
from ..cli.training_options import RunOptions
from .client import LAST_CHECKPOINT, MANIFEST, manifest, open_repo, retried
from .inheritance import choose_license
from .license import check_license_name
from .publication import publish, upload
from .staging import link_or_copy, stage


def say(text: str) -> None:
    """Write a line to standard error that does not break the progress bar."""
    tqdm.write(text, file=sys.stderr)


class Pusher:
    """Uploads what a run saves, one save at a time; while it does, a newer save replaces the one that waits.

    A run that fails or is stopped ends at once, whatever the Hub does; one that is done waits for it in `finish`.

    Raises UserError at once if the Hub refuses the token or the name, or if the license is unknown or contradicts the
    teacher's. A Hub that cannot be reached is a warning, then and later: it is said once and tried again with each save
    and at the end.

    Args:
        options: of the run.
        record: its `training_record`, which the run may complete later.
    """

    def __init__(self, options: RunOptions, record: dict[str, Any]):
        self.options, self.record, self.repo = options, record, options.hub_model_id
        self.room = os.path.join(options.output_dir, ".push")  # what is being uploaded
        check_license_name(options.hub_license, "hub_license")
        if options.hub_license == "other":
            raise UserError(
                "--hub_license other has no name and address. Leave --push_to_hub out and publish the finished "
                "pipeline: python -m training.publish FOLDER NAME --license other --license_name ... --license_link ..."
            )
        choose_license(record, {}, option_name="hub_license")
        self.failing = False
        try:
            open_repo(self.repo, options.hub_private)
        except UserError as error:
            raise UserError(f"--push_to_hub: {error}") from error
        except Exception as error:
            self._failed(error)
        utils.disable_progress_bars()  # they would tear the training's own
        utils.logging.set_verbosity_error()
        shutil.rmtree(self.room, ignore_errors=True)  # of a run that was killed
        self._saves: queue.Queue[tuple[str, int]] = queue.Queue()  # at most one waits: its folder and step
        self._superseded = threading.Event()  # whether something newer waits for the upload that runs
        threading.Thread(target=self._work, name="push", daemon=True).start()  # a daemon does not keep a program alive

    def _failed(self, error: BaseException) -> None:
        if not self.failing:
            say(
                f"Warning: {self.repo} on the Hub: {error_text(error)}. The training goes on; the upload is tried "
                "again with each save and at the end."
            )
        self.failing = True

    # During training ------------------------------------------------------------------------------------------------

    def push(self, save_pipeline: Callable[[str], None], step: int, checkpoint: str) -> None:
        """Save the pipeline of this step in a folder of its own and have it uploaded, unless all is left to the end."""
        if self.options.hub_strategy == "end":
            return
        folder = os.path.join(self.room, f"step-{step}")
        try:
            save_pipeline(os.path.join(folder, "pipeline"))
            if self.options.hub_strategy == "checkpoint":
                kept = os.path.join(folder, "upload", LAST_CHECKPOINT)  # also when the checkpoint is rotated away
                shutil.copytree(checkpoint, kept, copy_function=functools.partial(link_or_copy, os.link))
        except WRITE_ERRORS as error:
            shutil.rmtree(folder, ignore_errors=True)
            self._failed(error)
            return
        self._superseded.set()
        self._drop_waiting()
        self._saves.put((folder, step))

    def _drop_waiting(self) -> None:
        with contextlib.suppress(queue.Empty):
            folder, _ = self._saves.get_nowait()
            shutil.rmtree(folder, ignore_errors=True)
            self._saves.task_done()

    def _work(self) -> None:
        while True:
            folder, step = self._saves.get()
            self._superseded.clear()
            try:
                self._upload(folder, step)
                if self.failing:
                    say(f"{self.repo} on the Hub is up to date again: step {step}.")
                self.failing = False
            except Exception as error:
                self._failed(error)
            shutil.rmtree(folder, ignore_errors=True)
            self._saves.task_done()

    def _upload(self, folder: str, step: int) -> None:
        target = os.path.join(folder, "upload")
        stage(os.path.join(folder, "pipeline"), target, with_code=True)
        checkpoint = os.path.join(target, LAST_CHECKPOINT)
        if os.path.isdir(checkpoint):
            write_json(manifest(checkpoint), MANIFEST, checkpoint)

        license = choose_license(self.record, {}, option_name="hub_license")
        record, message = {**self.record, "steps": step}, f"Training in progress, step {step}"
        send = functools.partial(upload, target, self.repo, self.options.hub_private, license, record, {}, message)
        retried(send, self._superseded.wait)

    # At the end -----------------------------------------------------------------------------------------------------

    def finish(self, folder: str) -> None:
        """Publish the finished pipeline, after what is being uploaded.

        A failure is said, with the command that tries again, and is no error: the training is done and lies in
        `folder`, and whoever starts a program anew when it fails would train again.
        """
        say(f"Uploading the finished pipeline to {self.repo} ...")
        self._superseded.set()
        if self.options.hub_strategy != "checkpoint":  # the finished pipeline is newer, but brings no checkpoint
            self._drop_waiting()
        self._saves.join()
        shutil.rmtree(self.room, ignore_errors=True)
        try:
            say("\n".join(publish(folder, self.repo, private=self.options.hub_private)))
        except Exception as error:
            private = " --private" if self.options.hub_private else ""
            say(
                f"Warning: the pipeline is finished in {folder}, but it could not be published: {error_text(error)}\n"
                f"Publish it with: python -m training.publish {folder} {self.repo}{private}"
            )
