# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""The folder of a run: its start from a checkpoint or a first stage, and all that it saves."""

import contextlib
import glob
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch.optim.lr_scheduler import LambdaLR

from diffusers_ctm import CTMPipeline

from ..cli.errors import loading
from ..cli.files import atomic_file, atomic_folder, read_json
from ..cli.options import save_config
from ..cli.training_options import RunOptions
from ..hub.push import Pusher
from ..hub.record import RECORD, training_record, write_record
from ..hub.staging import link_or_copy
from .averages import EMA, snapshot_folder
from .checkpoints import (
    STATE,
    changes_of,
    check_autoencoder,
    check_preconditioning,
    check_same_run,
    checkpoints,
    decisive_options,
    example_latents,
    find_first_stage,
    free_options,
    jump_of_learning_rate,
    load_first_stage,
    load_run_state,
    start_output_dir,
)
from .devices import load_whole


def share_autoencoder(folder: str) -> None:
    """Let a pipeline's autoencoder be the file of the first pipeline beside it: it is the same in all of them.

    A disk without hard links keeps a copy.
    """
    for weights in Path(folder, "vae").glob("*.safetensors"):
        first = min(weights.parents[2].glob(f"*/vae/{weights.name}"))
        if not first.samefile(weights):
            with atomic_file(str(weights)) as draft:
                link_or_copy(os.link, str(first), draft)


class RunFolder:
    """The folder of a run. All that is saved in it is whole or not there, and goes to the Hub if the options say so.

    Args:
        options: of the run.
        accelerator: of the run.
        make_pipeline: builds the pipeline, or other model of diffusers, that is saved from a network.
        revisions: as of `TrainingRun`.

    Attributes:
        checkpoint: the folder that the run resumes from, or None.
        first_stage: the folder or repository on the Hub whose weights a run without a checkpoint starts from, or None.
        record: the contents of `training.json`; empty in all but the main process.
        pusher: uploads what is saved, from the main process and if asked to; else None.
    """

    def __init__(
        self,
        options: RunOptions,
        accelerator: Accelerator,
        make_pipeline: Callable[[torch.nn.Module], CTMPipeline],
        revisions: dict[str, str | None] | None = None,
    ):
        self.options, self.accelerator, self.make_pipeline = options, accelerator, make_pipeline
        self.checkpoint = start_output_dir(options)
        starts = self.checkpoint is None and options.init_from is not None
        self.first_stage = find_first_stage(options.init_from) if starts else None
        self.record, self.pusher = {}, None
        if accelerator.is_main_process:
            self.record = training_record(options, accelerator.num_processes, self.first_stage, revisions)
            if options.push_to_hub:
                self.pusher = Pusher(options, self.record)

    # The start ------------------------------------------------------------------------------------------------------

    def resume(self, networks: list[str], load_state_dict: Callable[[dict], None], lr_scheduler: LambdaLR) -> None:
        """Load the checkpoint of a run with these `networks`: Accelerate's part here, the rest by `load_state_dict`.

        Says what differs from the run that saved it.
        """
        accelerator, path = self.accelerator, self.checkpoint
        with loading(f"The checkpoint {path}", "It belongs to another network or is damaged; resume from another one."):
            state = load_run_state(path)
            check_same_run(state, self.options, accelerator.num_processes, networks, path)
            # Accelerate would run code in these files.
            for name in glob.glob(os.path.join(glob.escape(path), "custom_checkpoint_*.pkl")):
                torch.load(name, map_location="cpu", weights_only=True)
            scaler = accelerator.scaler
            if not os.path.isfile(os.path.join(path, "scaler.pt")):
                accelerator.scaler = None  # the checkpoint is of a run in another precision
            accelerator.load_state(path)
            accelerator.scaler = scaler
            accelerator.step = 0  # it counts passes, and a step may have another number of them now
            load_state_dict(state)
        accelerator.print(f"Resumed from {path} at step {state['step']}.")
        if accelerator.is_main_process:
            former = read_json(path, RECORD)
            self.record["first_stage"] = former.get("first_stage")  # whatever --init_from is now
            changes = changes_of(state, self.options, accelerator.mixed_precision, former, self.record)
            if changes:
                print(f"Other options than at the checkpoint: {'; '.join(changes)}.")
            if jump := jump_of_learning_rate(state, self.options, lr_scheduler):
                print(jump)

    def start_from_first_stage(self, network: torch.nn.Module, averages: dict[str, EMA]) -> None:
        """Take weights of the first stage. Averages go on at their full decay; power-function averages start anew."""
        source = self.first_stage
        stage, pipe = load_first_stage(source), self.make_pipeline(network)
        check_autoencoder(example_latents(pipe), stage.example, source)
        with loading(f"--init_from {source}", "It is not of the network that this run trains."):
            load_whole(network, stage.weights)
        if hasattr(pipe, "scheduler"):
            check_preconditioning(pipe.scheduler.preconditioning, stage.preconditioning, source)
        for name, average in averages.items():
            if not name.startswith("sigma_rel"):
                average.start_from(stage.averages.get(name, stage.averages[None]))
        self.accelerator.print(f"Started from the weights of {source}.")

    def save_options(self) -> None:
        """Write the options to output_dir/config.yaml."""
        if self.accelerator.is_main_process:
            with atomic_file(os.path.join(self.options.output_dir, "config.yaml")) as draft:
                save_config(self.options, draft)

    # Saving ---------------------------------------------------------------------------------------------------------

    def save_checkpoint(self, state: dict, ema: EMA) -> None:
        """Save output_dir/checkpoint-N, upload its pipeline if asked to, and remove the oldest beyond the limit."""
        accelerator, options, step = self.accelerator, self.options, state["step"]
        path = os.path.join(options.output_dir, f"checkpoint-{step}")
        with contextlib.ExitStack() as stack:
            draft = stack.enter_context(atomic_folder(path)) if accelerator.is_main_process else None
            [draft] = broadcast_object_list([draft])
            accelerator.save_state(draft)
            accelerator.wait_for_everyone()  # each process writes its own random state
            if accelerator.is_main_process:
                pipe = self.make_pipeline(ema.module)
                state = {
                    **state,
                    "preconditioning": asdict(pipe.scheduler.preconditioning) if hasattr(pipe, "scheduler") else None,
                    "example": example_latents(pipe),
                    "id2label": pipe.config.get("id2label"),
                    "options": {
                        **decisive_options(options, accelerator.num_processes),
                        **free_options(options, accelerator.mixed_precision),
                    },
                }
                torch.save(state, os.path.join(draft, STATE))
                write_record(self.record, step, draft)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process and options.checkpoints_total_limit:
            for old in checkpoints(options.output_dir)[: -options.checkpoints_total_limit]:
                shutil.rmtree(old)
        if self.pusher is not None:
            self.pusher.push(lambda folder: self._write_pipeline(folder, ema, step), step, path)

    def save_snapshots(self, step: int, averages: dict[str, EMA]) -> None:
        """Keep the power-function averages as they are now, for `training.ema`."""
        for width in self.options.posthoc_ema:
            average, folder = averages[f"sigma_rel-{width:g}"], snapshot_folder(self.options.output_dir, width, step)
            self._save_pipeline(folder, average, step, {"sigma_rel": width, "updates": average.updates})
            if self.accelerator.is_main_process:
                share_autoencoder(folder)

    def finish(self, step: int, averages: dict[str, EMA]) -> str:
        """Save the main average as output_dir/pipeline and further ones as `pipeline-ema-DECAY`; return the path."""
        options, path = self.options, os.path.join(self.options.output_dir, "pipeline")
        self.accelerator.wait_for_everyone()
        self._save_pipeline(path, averages[str(options.ema_decay)], step)
        for decay in set(options.extra_ema_decays) - {options.ema_decay}:
            self._save_pipeline(f"{path}-ema-{decay}", averages[str(decay)], step, {"decay": decay})
        self.accelerator.wait_for_everyone()  # launchers end all processes if one fails, even at its exit
        return path

    def _save_pipeline(self, path: str, average: EMA, step: int, about: dict | None = None) -> None:
        if self.accelerator.is_main_process:
            with atomic_folder(path) as draft:
                self._write_pipeline(draft, average, step, about)

    def _write_pipeline(self, folder: str, average: EMA, step: int, about: dict | None = None) -> None:
        """Write an averaged network as a diffusers folder, with the run's record, which says `about` the average."""
        self.make_pipeline(average.module).save_pretrained(folder)
        write_record(self.record if about is None else {**self.record, "average": about}, step, folder)
