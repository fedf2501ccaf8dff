"""Uploads in the background of a run."""

import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable
from typing import Any

from huggingface_hub import utils
from tqdm.auto import tqdm

from ..cli.errors import UserError, error_text
from ..cli.files import WRITE_ERRORS
from ..cli.training_options import RunOptions
from ..publish import PublishConfig
from ..publish import main as publish
from .client import LAST_CHECKPOINT, files_below, open_repo, retried, write_manifest
from .inheritance import check_licence_name, choose_licence
from .publication import upload
from .record import write_record
from .staging import stage


def say(text: str) -> None:
    """A line on standard error that does not break the progress bar."""
    tqdm.write(text, file=sys.stderr)


class Pusher:
    """Uploads what a run saves. A thread sends one save at a time; while it does, a newer save replaces the one that waits.

    Raises UserError at once if the Hub refuses the token or the name, or if the licence is unknown or contradicts the teacher's.
    A Hub that cannot be reached is a warning, then and later: it is said once and tried again with each save and at the end.

    Args:
        options: of the run.
        record: its `training_record`.
    """

    def __init__(self, options: RunOptions, record: dict[str, Any]):
        self.options, self.repo = options, options.hub_model_id
        self.room = os.path.join(options.output_dir, ".push")  # what is being uploaded
        check_licence_name(options.hub_license, "hub_license")
        if options.hub_license == "other":
            raise UserError(
                "--hub_license other has no name and address. Leave --push_to_hub out and publish the finished pipeline: python -m "
                "training.publish FOLDER NAME --license other --license_name ... --license_link ..."
            )
        with tempfile.TemporaryDirectory() as folder:
            write_record(record, 0, folder)
            choose_licence(folder, None, "hub_license")
        self.opened, self.failing = False, False
        try:
            self._open()
        except UserError as error:
            raise UserError(f"--push_to_hub: {error}") from error
        except Exception as error:
            self._failed(error)
        utils.disable_progress_bars()  # they would tear the training's own
        utils.logging.set_verbosity_error()
        shutil.rmtree(self.room, ignore_errors=True)  # of a run that was killed
        self._waiting: tuple[str, int] | None = None
        self._changed = threading.Condition()
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None

    def _open(self) -> None:
        if not self.opened:
            open_repo(self.repo, self.options.hub_private)
            self.opened = True

    def _failed(self, error: BaseException) -> None:
        if not self.failing:
            say(
                f"Warning: {self.repo} on the Hub: {error_text(error)}. The training goes on; the upload is tried again with each save and at the "
                "end."
            )
        self.failing = True

    # During training ------------------------------------------------------------------------------------------------

    def push(self, save_pipeline: Callable[[str], None], step: int, checkpoint: str) -> None:
        """Save the pipeline of this step in a folder of its own and have it uploaded, unless all is left to the end."""
        if self.options.hub_strategy == "end":
            return
        folder = os.path.join(self.room, f"step-{step}")
        try:
            shutil.rmtree(folder, ignore_errors=True)
            save_pipeline(os.path.join(folder, "pipeline"))
            if self.options.hub_strategy == "checkpoint":
                link_folder(checkpoint, os.path.join(folder, LAST_CHECKPOINT))
        except WRITE_ERRORS as error:
            shutil.rmtree(folder, ignore_errors=True)
            self._failed(error)
            return
        with self._changed:
            if self._waiting is not None:
                shutil.rmtree(self._waiting[0], ignore_errors=True)
            self._waiting = (folder, step)
            self._changed.notify()
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="push", daemon=True)
                self._thread.start()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting is not None or self._closing.is_set())
                if self._waiting is None:
                    return
                (folder, step), self._waiting = self._waiting, None
            try:
                retried(lambda folder=folder, step=step: self._upload(folder, step), self._wait)
                if self.failing:
                    say(f"{self.repo} on the Hub is up to date again: step {step}.")
                self.failing = False
            except Exception as error:
                self._failed(error)
            finally:
                shutil.rmtree(folder, ignore_errors=True)

    def _wait(self, seconds: float) -> bool:
        """Wait before another attempt; true if something newer is to be uploaded instead."""
        with self._changed:
            return self._changed.wait_for(lambda: self._waiting is not None or self._closing.is_set(), seconds)

    def _upload(self, folder: str, step: int) -> None:
        self._open()
        with tempfile.TemporaryDirectory(prefix="push-") as target:
            pipeline, checkpoint = os.path.join(folder, "pipeline"), os.path.join(folder, LAST_CHECKPOINT)
            stage(pipeline, target)
            for path, source in files_below(pipeline).items():
                if path.endswith(".py"):  # the loading code, just written
                    shutil.copyfile(source, os.path.join(target, path))
            if os.path.isdir(checkpoint):
                write_manifest(checkpoint)
                link_folder(checkpoint, os.path.join(target, LAST_CHECKPOINT))
            upload(target, self.repo, choose_licence(target, None, "hub_license"), f"Training in progress, step {step}")

    # At the end -----------------------------------------------------------------------------------------------------

    def finish(self, folder: str) -> None:
        """Publish the finished pipeline, after what is being uploaded.

        A failure is said, with the command that tries again, and is no error: the training is done and lies in `folder`, and
        what starts a program anew if it fails would train again.
        """
        with self._changed:
            if self.options.hub_strategy != "checkpoint":  # whose checkpoint is not in what comes now
                self._waiting = None
            self._closing.set()
            self._changed.notify()
        say(f"Uploading the finished pipeline to {self.repo} ...")
        if self._thread is not None:
            self._thread.join()
        shutil.rmtree(self.room, ignore_errors=True)
        config = PublishConfig(folder=folder, name=self.repo, private=self.options.hub_private)
        try:
            publish(config)
        except Exception as error:
            private = " --private" if self.options.hub_private else ""
            say(
                f"Warning: the pipeline is finished in {folder}, but it could not be published: {error_text(error)}\n"
                f"Publish it with: python -m training.publish {folder} {self.repo}{private}"
            )


def link_folder(source: str, target: str) -> None:
    """Copy a folder, by links where the disk allows it: the copy stays when the source is rotated away."""

    def link(a: str, b: str) -> None:
        try:
            os.link(a, b)
        except OSError:
            shutil.copyfile(a, b)

    shutil.copytree(source, target, copy_function=link)
