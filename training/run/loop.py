# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""The training loop: networks, averages, steps."""

import contextlib
import copy
import itertools
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Protocol

import torch

from diffusers_ctm import CTMPipeline

from ..cli.errors import UserError
from ..cli.training_options import RunOptions
from ..cli.weights import broken
from ..data.batches import LoadedBatch, run_batches
from ..data.images import Images
from .averages import make_averages
from .batch import Batch, StepRandom
from .checkpoints import newest_checkpoint
from .compiling import compile_network
from .devices import make_accelerator, make_lr_scheduler, make_optimizer, whole
from .interruption import Interruption
from .learner import TrainedNetwork
from .monitor import Monitor
from .saving import RunFolder


class Kept(Protocol):
    """What a checkpoint holds besides networks. All processes call it; `gather` joins their rows of a tensor."""

    def state_dict(self, gather: Callable[[torch.Tensor], torch.Tensor]) -> dict: ...

    def load_state_dict(self, state: dict) -> None: ...


class TrainingRun:
    """One run of a training program.

    It resumes, or takes the weights of --init_from, when its first batch is asked for.

    Args:
        options: of the run.
        dataset: images, or their latents.
        network: learns; it is moved to the device and wrapped.
        make_pipeline: builds the pipeline that is saved and sampled from a network. Without `sample_settings` it may be
            another model of diffusers.
        sample_settings: name and `CTMPipeline.__call__` options of each grid drawn during training.
        revisions: the commits that were loaded of teacher, guiding teacher and autoencoder, by their options, for the
            record.
        on_step: called with the run after each step, when it has been logged, sampled and saved.

    Attributes:
        network: the wrapped network. `bare_network` is the same without wrapping.
        averages: moving averages of it, by name. The losses call `ema`, one of them, and it is sampled and saved.
        networks: all that learn, by name; `network` is "main".
        folder: the run's folder, with its record.
        step: number of steps done.
        samples_per_step: over all processes and passes. `own_samples` are those of this process, a slice for each pass.
    """

    def __init__(
        self,
        options: RunOptions,
        dataset: Images,
        network: torch.nn.Module,
        make_pipeline: Callable[[torch.nn.Module], CTMPipeline],
        sample_settings: dict[str, dict],
        revisions: dict[str, str | None] | None = None,
        on_step: "Callable[[TrainingRun], None] | None" = None,
    ):
        self.options, self.dataset, self.make_pipeline, self.on_step = options, dataset, make_pipeline, on_step
        self.accelerator = make_accelerator(options)
        self.device = self.accelerator.device
        # FSDP spreads rows of memory, which channels last would cut.
        self._memory_format = torch.contiguous_format if self.accelerator.is_fsdp2 else torch.channels_last
        self.folder = RunFolder(options, self.accelerator, make_pipeline, revisions)

        if options.gradient_checkpointing:
            network.enable_gradient_checkpointing()
        network = self.place(network).train()
        self.averages = make_averages(options, network)
        self.ema = self.averages[str(options.ema_decay)]
        for each in (network, *(average.module for average in self.averages.values())):
            self.speed_up(each)
        self.networks: dict[str, TrainedNetwork] = {}
        main = self.add_network("main", network, make_optimizer(options, network))
        self.network, self.bare_network = main.network, main.bare
        self.lr_scheduler = make_lr_scheduler(options, main.optimizer)
        self.accelerator.register_for_checkpointing(self.lr_scheduler)
        self.monitor = Monitor(options, dataset, self.accelerator, sample_settings)
        self.step = self._saved_step = 0
        self._kept: dict[str, Kept] = {}
        processes = self.accelerator.num_processes
        num_passes = options.gradient_accumulation_steps * processes
        self.samples_per_step = num_passes * options.train_batch_size
        self.own_samples = [
            slice(number * options.train_batch_size, (number + 1) * options.train_batch_size)
            for number in range(self.accelerator.process_index, num_passes, processes)
        ]
        self._save_due = False
        self._position = None  # in a streamed data set

    def place(self, network: torch.nn.Module) -> torch.nn.Module:
        """Move a network to the run's device."""
        return network.to(self.device, memory_format=self._memory_format)

    def speed_up(self, network: torch.nn.Module) -> None:
        """Compile a network that is on the device, if --compile says so."""
        if self.options.compile:
            compile_network(network)

    def add_network(self, name: str, module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> TrainedNetwork:
        """Train a further network, such as a discriminator, by `update(..., network=name)`.

        Call this before the first batch. Checkpoints hold its weights, buffers, optimizer state and, in fp16, the scale
        of its loss. The learning rate and the averages are those of the first network alone. Call its `network`
        (wrapped for several processes) where it learns, and `bare` where it only judges: the gradient of another
        network's loss passes through it and is not kept.

        Args:
            module: on the device (`place`).
            optimizer: over its parameters; fused Adam and AdamW need not wait for the device (`TrainedNetwork.step`).
        """
        if self.networks and self.accelerator.is_fsdp2:
            raise UserError(f"FSDP cannot train a second network ({name}). Use training/configs/accelerate/ddp.yaml.")
        scaler = copy.deepcopy(self.accelerator.scaler) if self.networks else self.accelerator.scaler
        self.networks[name] = TrainedNetwork(self.accelerator, module, optimizer, scaler)
        return self.networks[name]

    def keep(self, name: str, thing: "Kept") -> None:
        """Let checkpoints hold the state of `thing`. Call this before the first batch."""
        self._kept[name] = thing

    def announce(self, stage: str) -> None:
        """Show which stage the run is in."""
        self.monitor.announce(stage)

    # One iteration --------------------------------------------------------------------------------------------------

    def batches(self) -> Iterator[Batch]:
        """The forward passes of all remaining steps of this process. Between steps it logs, samples and saves."""
        options, accelerator = self.options, self.accelerator
        # Nothing is written before all else is known to work.
        if self.folder.checkpoint is not None:
            self.folder.resume(list(self.networks), self.load_state_dict, self.lr_scheduler)
            if names := self._broken():
                raise UserError(
                    f"The checkpoint {self.folder.checkpoint} has infinite or NaN weights, in {names[0]}. Resume from "
                    "another one."
                )
        elif self.folder.first_stage is not None:
            self.folder.start_from_first_stage(self.bare_network, self.averages)
        self.dataset.prepare()
        self.folder.save_options()
        self.monitor.start(self.step)
        size, total = options.train_batch_size, self.samples_per_step
        parts = [own.start // size for own in self.own_samples]
        loaded = run_batches(
            self.dataset,
            options,
            self.step,
            parts,
            total // size,
            self._position,
            pin_memory=self.device.type == "cuda",
        )
        with Interruption(accelerator) as interruption, self.monitor.progress, contextlib.closing(loaded):
            while self.step < options.max_train_steps:
                for own in self.own_samples:
                    random = StepRandom(options.seed, self.step, total, own, self.device)
                    images, labels, self._position = self._next(loaded, own.start)
                    yield self._batch(images, labels, random)
                self.step += 1
                self._after_step(interruption.agreed())

    def accumulate(self) -> contextlib.AbstractContextManager:
        """Enclose each pass of a step: processes exchange gradients in the last one only."""
        return self.accelerator.accumulate(*(trained.network for trained in self.networks.values()))

    def update(self, loss: torch.Tensor, terms: dict[str, torch.Tensor], network: str = "main") -> None:
        """Backward pass of `loss` for one network; after a step's last one also its optimizer and averages of "main".

        If `loss`, one of the `terms` or the gradient is infinite or NaN in any pass of the step and any process, the
        step is skipped: it changes nothing of that network and is counted.

        Args:
            loss: has the gradient.
            terms: named numbers, 0-d, to be logged.
            network: a name of `networks`.
        """
        trained, means = self.networks[network], self.monitor.means
        finite = loss.detach().isfinite() & means.add(terms)
        # A NaN spreads to the gradients of all processes by their mean, so that all of them skip the step.
        trained.backward(loss * torch.where(finite, 1.0, float("nan")))
        if not self.accelerator.sync_gradients:
            return
        norm, applied = trained.step(self.options.max_grad_norm)
        means.add({"grad_norm" if network == "main" else f"{network}_grad_norm": norm})
        if network == "main" and applied is not False:
            applied = None if applied is True else applied
            for average in self.averages.values():
                average.step(self.bare_network, applied)
            # Not within a forward pass: a step may have several of them.
            if hasattr(self.bare_network, "normalize_weights_"):
                self.bare_network.normalize_weights_(applied)

    def note_by_level(self, name: str, values: torch.Tensor, sigma: torch.Tensor) -> None:
        """Log the mean of `values`, shape (B,), in each of a few bins of noise levels `sigma`, as "name/bin"."""
        self.monitor.means.add_by_level(name, values, sigma)

    # Images ---------------------------------------------------------------------------------------------------------

    def _next(self, loaded: Iterator[LoadedBatch], first: int) -> LoadedBatch:
        """The images of a pass from sample `first` on.

        If they cannot be read, save a checkpoint before the error where no other process need agree.
        """
        try:
            return next(loaded)
        except UserError as error:
            if first > 0 or self.accelerator.num_processes > 1 or self.step == 0:
                raise
            self.save_checkpoint()
            raise UserError(f"{error} {newest_checkpoint(self.options.output_dir)} is saved.") from error

    def _batch(self, images: torch.Tensor, labels: torch.Tensor | None, random: StepRandom) -> Batch:
        images = self.dataset.to_sample(images.to(self.device, non_blocking=True), random)
        labels = None if labels is None else labels.to(self.device, non_blocking=True)
        return Batch(images.contiguous(memory_format=self._memory_format), labels, random)

    def due(self, every: int) -> bool:
        """Whether what happens every so many steps (0: never), and at the last, happens at this one."""
        return every > 0 and (self.step == self.options.max_train_steps or self.step % every == 0)

    # Between steps --------------------------------------------------------------------------------------------------

    def _after_step(self, signum: int) -> None:
        """Log, sample, measure and save what is due; for a signal save at once, and end."""
        options, monitor, step = self.options, self.monitor, self.step
        last = step == options.max_train_steps

        monitor.progress.update()
        with warnings.catch_warnings():  # torch warns if the first step was skipped
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
            self.lr_scheduler.step()
        if self.due(options.logging_steps) or self.device.type == "cpu":  # on a GPU a look at the count costs a wait
            monitor.check_skipped(step, self._skipped_in_a_row())
        if self.due(options.logging_steps):
            skipped = sum(int(trained.skipped) for trained in self.networks.values())
            monitor.log(step, skipped, self.lr_scheduler.get_last_lr()[0])
        with monitor.clock_stopped():
            if signum and not last:
                self.save_checkpoint()  # first: the sender may not wait for the rest
            if self.due(options.sample_every):
                monitor.save_samples(step, self.make_pipeline(self.ema.module))
            if self.due(options.eval_every):
                monitor.measure(step, self.make_pipeline(self.ema.module))
            if options.posthoc_ema and self.due(options.posthoc_ema_every):
                self.folder.save_snapshots(step, self.averages)
            self._save_due = self._save_due or self.due(options.checkpointing_steps)
            if self._save_due and (last or not self._skipped_in_a_row()):  # a broken network replaces no good one
                self.save_checkpoint()
                self._save_due = False
        if self.on_step is not None:
            self.on_step(self)
        if signum and not last:
            self._stop(signum)

    def _skipped_in_a_row(self) -> int:
        """Number of steps in a row that have been skipped by now. Waits for the device."""
        return max(int(trained.skipped_in_a_row) for trained in self.networks.values())

    def _stop(self, signum: int) -> None:
        """Exit with the status that a shell gives to a process that this signal ended."""
        self.monitor.progress.close()  # ends its line
        if self.accelerator.is_main_process:
            print(
                f"Stopped by {signal.Signals(signum).name} after step {self.step} of {self.options.max_train_steps}. "
                f"Saved {newest_checkpoint(self.options.output_dir)}; go on with --resume_from_checkpoint latest.",
                file=sys.stderr,
            )
        self.monitor.tracking.finish()
        sys.exit(128 + signum)

    def save_checkpoint(self) -> None:
        """Save all that resuming needs, unless it is saved already."""
        if self.step > self._saved_step:
            self._check_weights()
            self.folder.save_checkpoint(self.state_dict(), self.ema)
            self._saved_step = self.step

    def finish(self) -> str:
        """Save the averaged networks as pipelines and publish them if asked to; return the folder of the main one."""
        self._check_weights()
        path = self.folder.finish(self.step, self.averages)
        self.monitor.tracking.finish()
        if self.folder.pusher is not None:
            self.folder.pusher.finish(path)
        self.accelerator.print(f"Saved {path}")
        return path

    def _check_weights(self) -> None:
        """Raise UserError if a weight is infinite or NaN: a loss can be finite and its gradient not."""
        if names := self._broken():
            raise UserError(
                f"The weights became infinite or NaN by step {self.step}, in {names[0]}. Lower --learning_rate, keep "
                "--max_grad_norm above 0, or use --mixed_precision no; the checkpoints of earlier steps are intact."
            )

    def _broken(self) -> list[str]:
        """Names of the weights and buffers, of all that learns and of the averages, that are infinite or NaN."""
        modules = {name: trained.bare for name, trained in self.networks.items()}
        modules |= {f"average {name}": average.module for name, average in self.averages.items()}
        tensors = {
            f"{title}: {name}": tensor.detach()
            for title, module in modules.items()
            for name, tensor in itertools.chain(module.named_parameters(), module.named_buffers())
            if tensor.is_floating_point()
        }
        return broken({name: whole(tensor.norm()) for name, tensor in tensors.items()})

    def state_dict(self) -> dict:
        """The part of a checkpoint that is not Accelerate's. All processes call it."""
        return {
            "step": self.step,
            "position": self._position,
            "averages": {name: average.state_dict() for name, average in self.averages.items()},
            "networks": {name: trained.state_dict() for name, trained in self.networks.items()},
            "kept": {name: kept.state_dict(self.accelerator.gather) for name, kept in self._kept.items()},
            **self.monitor.state_dict(),
        }

    def load_state_dict(self, state: dict) -> None:
        """Go on from `state`, in place."""
        self.step = self._saved_step = state["step"]
        self._position = state["position"]
        for name, average in self.averages.items():
            average.load_state_dict(state["averages"][name])
        for name, trained in self.networks.items():
            trained.load_state_dict(state["networks"][name])
        for name, kept in self._kept.items():
            kept.load_state_dict(state["kept"][name])
        self.monitor.load_state_dict(state)
