"""TrainingRun: networks, averages, steps."""

import contextlib
import copy
import glob
import math
import os
import shutil
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any, NoReturn

import torch
from diffusers.optimization import get_scheduler
from tqdm.auto import tqdm

from diffusers_ctm import CTMPipeline
from diffusers_ctm.preconditioning import Preconditioning

from ..cli.errors import UserError
from ..cli.files import WRITE_ERRORS, atomic_file, atomic_folder, read_json
from ..cli.options import save_config
from ..cli.training_options import RunOptions
from ..data.batches import run_batches
from ..data.images import ImageDataset, mirrored, to_sample
from ..data.stream import ImageStream
from ..hub.push import Pusher
from ..hub.record import RECORD, training_record, write_record
from ..measure.during_training import DistanceToData, read_metrics, write_metrics
from ..report.pictures import enlarged_grid
from .averages import EMA, power_decay, snapshot_folder
from .batch import Batch, StepRandom
from .checkpoints import (
    STATE,
    check_preconditioning,
    checkpoints,
    decisive_options,
    default_options,
    find_first_stage,
    load_first_stage,
    load_run_state,
    load_weights,
    newest_checkpoint,
    start_output_dir,
)
from .compiling import compile_network
from .devices import make_accelerator, make_optimizer
from .interruption import Interruption
from .learner import TrainedNetwork
from .monitor import Means
from .sharding import whole
from .tracking import Expendable, Stopwatch, Tracking


class TrainingRun:
    """One run of a training program.

    It resumes, or takes the weights of --init_from, when its first batch is asked for.

    Args:
        options: of the run.
        dataset: images.
        network: what is trained; moved to the device and wrapped.
        make_pipeline: builds the pipeline that is saved and sampled from a network.
        sample_settings: name and `CTMPipeline.__call__` options of each grid drawn during training.

    Attributes:
        network: the wrapped network. `bare_network` is the same without wrapping.
        averages: moving averages of it, by name. `ema`, one of them, is what the losses call, what is sampled and what is saved.
        networks: all that learn, by name; `network` is "main".
        step: number of steps done.
    """

    def __init__(
        self,
        options: RunOptions,
        dataset: ImageDataset | ImageStream,
        network: torch.nn.Module,
        make_pipeline: Callable[[torch.nn.Module], CTMPipeline],
        sample_settings: dict[str, dict],
    ):
        self.options, self.dataset = options, dataset
        self.make_pipeline, self.sample_settings = make_pipeline, sample_settings
        self._checkpoint = start_output_dir(options)
        self._first_stage = None
        if self._checkpoint is None and options.init_from is not None:
            self._first_stage = find_first_stage(options.init_from)
        self.accelerator = make_accelerator(options)
        self.record, self.pusher = {}, None
        if self.accelerator.is_main_process:
            self.record = training_record(options, self.accelerator.num_processes, self._first_stage)
            if options.push_to_hub:
                self.pusher = Pusher(options, self.record)

        if options.gradient_checkpointing:
            network.enable_gradient_checkpointing()
        network = self.place(network).train()
        self.averages = {
            str(decay): EMA(network, decay, options.ema_warmup)
            for decay in dict.fromkeys([options.ema_decay, *options.extra_ema_decays])
        }
        self.ema = self.averages[str(options.ema_decay)]
        for width in options.posthoc_ema:
            self.averages[f"sigma_rel-{width:g}"] = EMA(network, power_decay(width))
        for each in (network, *(average.module for average in self.averages.values())):
            self.speed_up(each)
        self.networks: dict[str, TrainedNetwork] = {}
        self.add_network("main", network, make_optimizer(options, network))
        main = self.networks["main"]
        self.network, self.bare_network = main.network, main.bare
        self.lr_scheduler = get_scheduler(
            options.lr_scheduler,
            main.optimizer,
            num_warmup_steps=options.lr_warmup_steps,
            num_training_steps=options.max_train_steps,
        )
        self.accelerator.register_for_checkpointing(self.lr_scheduler)
        self.step = self._saved_step = 0
        self._position = None  # in a streamed data set
        self._means = Means()
        self._save_due = False
        self._optional = Expendable()
        self._tracking = Tracking(self.accelerator, options, self._optional)
        self._measure = None
        if options.eval_every:
            self._measure = DistanceToData(options, dataset, self.accelerator)

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    def place(self, network: torch.nn.Module) -> torch.nn.Module:
        """Move a network to the run's device."""
        return network.to(self.device, memory_format=self._memory_format)

    def speed_up(self, network: torch.nn.Module) -> torch.nn.Module:
        """Compile a network that is on the device, if --compile says so."""
        if self.options.compile:
            compile_network(network)
        return network

    @property
    def _preconditioning(self) -> Preconditioning:
        return self.make_pipeline(self.ema.module).scheduler.preconditioning

    @property
    def _memory_format(self) -> torch.memory_format:
        channels_last = self.options.channels_last and not self.accelerator.is_fsdp2  # which spreads rows of memory
        return torch.channels_last if channels_last else torch.contiguous_format

    def add_network(self, name: str, module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> TrainedNetwork:
        """Train a further network, such as a discriminator, by `update(..., network=name)`. Before the first batch.

        Weights, buffers, the optimiser's state and, in fp16, the scale of its loss are saved in checkpoints and resumed. The learning rate and
        the averages are those of the first network alone. Call its `network` (wrapped for several processes) where it is to
        learn, and `bare` where it only judges: the gradient of another network's loss passes through it and is not kept.

        Args:
            module: on the device (`place`).
            optimizer: over its parameters; fused Adam and AdamW need not wait for the device (`TrainedNetwork.step`).
        """
        if name in self.networks:
            raise ValueError(f"There is a network {name!r} already.")
        if self.networks and self.accelerator.is_fsdp2:
            raise UserError(f"FSDP cannot train a second network ({name}). Use training/configs/accelerate/ddp.yaml.")
        scaler = copy.deepcopy(self.accelerator.scaler) if self.networks else self.accelerator.scaler
        self.networks[name] = TrainedNetwork(self.accelerator, module, optimizer, scaler)
        return self.networks[name]

    def _start(self) -> None:
        """Resume, or start from a first stage, or as it is. Nothing is written before all else is known to work."""
        if self._checkpoint is not None:
            self._load_checkpoint(self._checkpoint)
        elif self._first_stage is not None:
            self._load_first_stage(self._first_stage)
        if self.accelerator.is_main_process:
            with atomic_file(os.path.join(self.options.output_dir, "config.yaml")) as draft:
                save_config(self.options, draft)
        values = {
            name: value if isinstance(value, (int, float, str, bool)) else str(value)
            for name, value in asdict(self.options).items()
        }
        self._tracking.start(self.step, values)
        if self._measure is not None and self.accelerator.is_main_process:
            with self._optional("metrics.jsonl"):  # of later steps than this the run will measure again
                if kept := read_metrics(self.options.output_dir, self.step + 1):
                    write_metrics(self.options.output_dir, kept)

    # The loop -------------------------------------------------------------------------------------------------------

    def batches(self) -> Iterator[Batch]:
        """The forward passes of all remaining steps of this process. Between steps it logs, samples and saves."""
        self._start()
        options, accelerator = self.options, self.accelerator
        accumulation, processes = options.gradient_accumulation_steps, accelerator.num_processes
        num_parts = accumulation * processes
        parts = [index * processes + accelerator.process_index for index in range(accumulation)]
        size = options.train_batch_size
        pin_memory = self.device.type == "cuda"
        loaded = run_batches(self.dataset, options, self.step, parts, num_parts, self._position, pin_memory)
        progress = tqdm(
            total=options.max_train_steps,
            initial=self.step,
            desc="Training",
            unit="step",
            disable=not accelerator.is_local_main_process,
        )
        self._stopwatch = Stopwatch()
        with Interruption(accelerator) as interruption, progress, contextlib.closing(loaded):
            while self.step < options.max_train_steps:
                for part in parts:
                    try:
                        images, labels, self._position = next(loaded)
                    except UserError as error:
                        if part > 0 or processes > 1 or self.step == 0:
                            raise
                        self._save_if_new()  # between two steps, and nobody else need agree
                        raise UserError(f"{error} {newest_checkpoint(options.output_dir)} is saved.") from error
                    own = slice(part * size, (part + 1) * size)
                    random = StepRandom(options.seed, self.step, num_parts * size, own, self.device)
                    yield self._batch(images, labels, random)
                self.step += 1
                self._after_step(progress, interruption.agreed())

    def _batch(self, images: torch.Tensor, labels: torch.Tensor | None, random: StepRandom) -> Batch:
        images = to_sample(images.to(self.device, non_blocking=True))
        if self.options.random_flip:
            images = mirrored(images, random.uniform())
        images = images.contiguous(memory_format=self._memory_format)
        labels = None if labels is None else labels.to(self.device, non_blocking=True)
        return Batch(images, labels, random)

    def accumulate(self) -> contextlib.AbstractContextManager:
        """Around each pass of a step: gradients are exchanged between processes in the last one only."""
        return self.accelerator.accumulate(*(trained.network for trained in self.networks.values()))

    def update(self, loss: torch.Tensor, terms: dict[str, torch.Tensor], network: str = "main") -> None:
        """Backward pass of `loss` for one network; after the last one of a step also its optimiser and, of "main", the averages.

        If `loss`, one of the `terms` or the gradient is infinite or NaN in any pass of the step and any process, the step changes
        nothing of that network and is counted.

        Args:
            loss: has the gradient.
            terms: named numbers, 0-d, to be logged.
            network: a name of `networks`.
        """
        trained = self.networks[network]
        finite = loss.detach().isfinite()
        if terms:
            finite = finite & self._means.add(terms)
        # A NaN spreads to the gradients of all processes by their mean, so that all of them leave the step out.
        trained.backward(loss * torch.where(finite, 1.0, float("nan")))
        if not self.accelerator.sync_gradients:
            return
        norm, applied = trained.step(self.options.max_grad_norm)
        self._means.add({"grad_norm" if network == "main" else f"{network}_grad_norm": norm})
        if network == "main" and applied is not False:
            for average in self.averages.values():
                average.step(self.bare_network, None if applied is True else applied)

    def note_by_level(self, name: str, values: torch.Tensor, sigma: torch.Tensor) -> None:
        """Log the mean of `values` in each of a few bins of noise levels, as "name/bin"; both of shape (B,), on the device."""
        self._means.add_by_level(name, values, sigma)

    def _after_step(self, progress: tqdm, signum: int) -> None:
        """Log, sample, evaluate, save what is due; for a signal save at once, and end."""
        options, step = self.options, self.step
        last = step == options.max_train_steps
        progress.update()
        self._stopwatch.steps += 1
        with warnings.catch_warnings():  # about a first step that was left out
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
            self.lr_scheduler.step()
        logs = step % options.logging_steps == 0 or last
        if logs or self.device.type == "cpu":  # elsewhere looking costs a wait
            self._check_skipped(last)
        if logs:
            self._log(progress)
        with self._stopwatch.out():
            if signum and not last:
                self._save_if_new()  # first: who sent it may not wait for the rest
            if options.sample_every and (step % options.sample_every == 0 or last):
                self.save_samples()
            if options.eval_every and (step % options.eval_every == 0 or last):
                self.measure()
            if options.posthoc_ema and (step % options.posthoc_ema_every == 0 or last):
                self.save_snapshots()
            if options.checkpointing_steps and (step % options.checkpointing_steps == 0 or last):
                self._save_due = True
            if self._save_due and (last or not self._skipping()):  # a network that may be broken replaces no good one
                self._save_if_new()
                self._save_due = False
        if signum and not last:
            progress.close()  # ends its line
            self._end_for(signum)

    def _end_for(self, signum: int) -> NoReturn:
        """Exit with the status that a shell gives to what ended by this signal."""
        text = (
            f"Stopped by {signal.Signals(signum).name} after step {self.step} of {self.options.max_train_steps}. Saved "
            f"{newest_checkpoint(self.options.output_dir)}; go on with --resume_from_checkpoint latest."
        )
        if self.accelerator.is_main_process:
            print(text, file=sys.stderr)
        self._tracking.finish()
        sys.exit(128 + signum)

    def _skipping(self) -> int:
        """How many steps in a row have been left out by now. Waits for the device."""
        return max(int(trained.skipped_in_a_row) for trained in self.networks.values())

    def _check_skipped(self, last: bool) -> None:
        """Raise UserError if too many steps in a row have been left out: at the end of a short run, half of it."""
        options = self.options
        limit = options.max_skipped_steps
        if self._skipping() < (min(limit, max(2, options.max_train_steps // 2)) if last else limit):
            return
        _, broken = self._means.read(self.accelerator)
        names = ", ".join(name for name in broken if not name.endswith("grad_norm")) or "the gradient"
        newest = newest_checkpoint(options.output_dir)
        intact = f"{newest} is intact" if newest else "no checkpoint had been saved"
        raise UserError(
            f"The last {self._skipping()} steps were left out, up to step {self.step}: {names} became infinite or NaN. Lower --learning_rate, "
            f"set --max_grad_norm 1, or use --mixed_precision no or bf16; {intact}. (--max_skipped_steps {limit})"
        )

    def _log(self, progress: tqdm) -> None:
        """Means since the last call. The only place that waits for the device."""
        means, _ = self._means.read(self.accelerator)
        skipped = sum(int(trained.skipped) for trained in self.networks.values())
        shown = {name: f"{value:.3g}" for name, value in means.items() if "/" not in name}
        progress.set_postfix({**shown, "skipped": skipped} if skipped else shown)
        options = self.options
        images = options.train_batch_size * options.gradient_accumulation_steps * self.accelerator.num_processes
        values = {
            **means,
            "learning_rate": self.lr_scheduler.get_last_lr()[0],
            "skipped_steps": skipped,
            "images_per_second": images * self._stopwatch.read(),
        }
        self._tracking.log(
            {name if "/" in name else f"train/{name}": value for name, value in values.items()}, self.step
        )

    def _broken(self, what: str) -> UserError:
        return UserError(
            f"{what} became infinite or NaN by step {self.step}. Lower --learning_rate, set --max_grad_norm 1, or use "
            "--mixed_precision no; the checkpoints of earlier steps are intact."
        )

    # Saving ---------------------------------------------------------------------------------------------------------

    def save_samples(self) -> None:
        """Draw the averaged network's samples from fixed noise to output_dir/samples, one picture per setting."""
        if not self.accelerator.is_main_process:
            return
        pipe, grids = self.make_pipeline(self.ema.module), {}
        pipe.set_progress_bar_config(disable=True)
        columns, rows = 10, 4
        labels = None
        if self.dataset.num_classes is not None:
            labels = [index % self.dataset.num_classes for index in range(columns)] * rows
        for name, settings in self.sample_settings.items():
            generator = torch.Generator(self.device).manual_seed(0)
            images = pipe(batch_size=columns * rows, class_labels=labels, generator=generator, **settings).images
            path = os.path.join(self.options.output_dir, "samples", f"step-{self.step:06d}-{name}.png")
            grids[f"samples/{name}"] = enlarged_grid(images, rows, columns)
            with self._optional("the samples"), atomic_file(path) as draft:
                grids[f"samples/{name}"].save(draft)
        self._tracking.show(grids, self.step)

    def measure(self) -> None:
        """Measure the Frechet distance of the averaged network's samples, into the tracker and output_dir/metrics.jsonl."""
        options, measure = self.options, self._measure
        distances = measure(self.make_pipeline(self.ema.module), self.sample_settings)
        if not self.accelerator.is_main_process:
            return
        shown = ", ".join(f"{value:.4g} ({name})" for name, value in distances.items())
        tqdm.write(f"Step {self.step}: Frechet distance {shown}", file=sys.stderr)
        self._tracking.log({f"frechet/{name}": value for name, value in distances.items()}, self.step)
        line = {
            "step": self.step,
            "frechet": {name: value if math.isfinite(value) else None for name, value in distances.items()},
            "num_samples": options.eval_samples,
            "num_reference": measure.num_reference,
            "features": options.eval_features,
        }
        with self._optional("metrics.jsonl"):
            write_metrics(options.output_dir, [*read_metrics(options.output_dir, self.step), line])

    def _check_weights(self) -> None:
        """Raise UserError if a weight is infinite or NaN: a loss can be finite and its gradient not."""
        networks = [self.bare_network, *(average.module for average in self.averages.values())]
        norms = [whole(parameter.detach().norm()) for network in networks for parameter in network.parameters()]
        if not torch.stack(norms).isfinite().all():
            raise self._broken("The weights")

    def _save_if_new(self) -> None:
        if self.step > self._saved_step:
            self.save_checkpoint()

    def save_checkpoint(self) -> None:
        """Save all that resuming needs as output_dir/checkpoint-N, whole or not at all, and remove the oldest beyond the limit."""
        self._check_weights()
        accelerator, options = self.accelerator, self.options
        path = os.path.join(options.output_dir, f"checkpoint-{self.step}")
        draft = os.path.join(options.output_dir, f".checkpoint-{self.step}.draft")
        if accelerator.is_main_process:
            shutil.rmtree(draft, ignore_errors=True)
        accelerator.wait_for_everyone()
        means = self._means.state_dict(accelerator)
        try:
            accelerator.save_state(draft)
            accelerator.wait_for_everyone()  # each process writes its own random state
            if accelerator.is_main_process:
                state = {
                    "step": self.step,
                    "averages": {name: average.state_dict() for name, average in self.averages.items()},
                    "networks": {name: trained.state_dict() for name, trained in self.networks.items()},
                    "means": means,
                    "position": self._position,
                    "preconditioning": asdict(self._preconditioning),
                    "tracker_run": self._tracking.run_id,
                    "options": decisive_options(options, accelerator.num_processes),
                }
                torch.save(state, os.path.join(draft, STATE))
                write_record(self.record, self.step, draft)
                os.replace(draft, path)
        except WRITE_ERRORS as error:
            shutil.rmtree(draft, ignore_errors=True)
            raise UserError(
                f"{path} could not be written: {error}. Older checkpoints are intact; resume with --resume_from_checkpoint latest."
            ) from error
        accelerator.wait_for_everyone()
        self._saved_step = self.step
        if accelerator.is_main_process and options.checkpoints_total_limit:
            for old in checkpoints(options.output_dir)[: -options.checkpoints_total_limit]:
                shutil.rmtree(old)
        if self.pusher is not None:
            self.pusher.push(self.save_pipeline, self.step, path)

    def save_pipeline(self, folder: str, ema: EMA | None = None, about: dict[str, Any] | None = None) -> None:
        """Save an averaged network, by default `ema`, as a diffusers folder, with the record of this run and what it is."""
        self.make_pipeline((ema or self.ema).module).save_pretrained(folder)
        write_record(self.record if about is None else {**self.record, "average": about}, self.step, folder)

    def save_snapshots(self) -> None:
        """Keep the power-function averages as they are now, for `training.ema`."""
        if self.accelerator.is_main_process:
            for width in self.options.posthoc_ema:
                average = self.averages[f"sigma_rel-{width:g}"]
                with atomic_folder(snapshot_folder(self.options.output_dir, width, self.step)) as draft:
                    self.save_pipeline(draft, average, {"sigma_rel": width, "updates": average.updates})

    def _load_checkpoint(self, path: str) -> None:
        accelerator = self.accelerator
        try:
            state = load_run_state(path)
            before, now = state["options"], decisive_options(self.options, accelerator.num_processes)
            before = {**now, **default_options(self.options), **before}  # what older code did not know had its default
            changed = [f"--{name} was {before[name]}, is {now[name]}" for name in now if before[name] != now[name]]
            if changed:
                raise UserError(
                    f"The checkpoint {path} belongs to a run with other options: {'; '.join(changed)}. Give the same, or start a new "
                    "run in another --output_dir."
                )
            saved = state.get("networks", {"main": {}})  # older code had but one
            if list(saved) != list(self.networks):
                raise UserError(
                    f"The checkpoint {path} holds the networks {', '.join(saved)}, this run has {', '.join(self.networks)}. Start a new run from "
                    f"its weights: another --output_dir, and --init_from {path}."
                )
            for name in glob.glob(os.path.join(glob.escape(path), "custom_checkpoint_*.pkl")):
                torch.load(name, map_location="cpu", weights_only=True)  # which accelerate would run code of
            scaler = accelerator.scaler
            if not os.path.isfile(os.path.join(path, "scaler.pt")):
                accelerator.scaler = None  # of a run in another precision
            accelerator.load_state(path)
            accelerator.scaler = scaler
            accelerator.step = 0  # passes so far, of which every so many end a step: maybe of another number now
            for name, average in self.averages.items():
                average.load_state_dict(state["averages"][name])
            for name, trained in self.networks.items():
                trained.load_state_dict(saved[name])
            self._means.load_state_dict(state.get("means", []), self.device, accelerator.is_main_process)
        except UserError:
            raise
        except Exception as error:  # torch, safetensors and accelerate each raise their own
            raise UserError(
                f"The checkpoint {path} cannot be resumed: {type(error).__name__}: {error}. It belongs to another network or "
                "is damaged; resume from another one."
            ) from error
        self.step = self._saved_step = state["step"]
        if self.step > self.options.max_train_steps:
            raise UserError(f"--max_train_steps {self.options.max_train_steps} is below step {self.step} of {path}.")
        self._position = state.get("position")
        self._tracking.run_id = state.get("tracker_run", self._tracking.run_id)
        if accelerator.is_main_process:
            self.record["first_stage"] = read_json(path, RECORD).get("first_stage")  # whatever --init_from is now
        accelerator.print(f"Resumed from {path} at step {self.step}.")

    def _load_first_stage(self, source: str) -> None:
        """Start from saved weights. The averages go on from the saved ones, at their full decay; power-function averages start anew."""
        stage = load_first_stage(source)
        load_weights(self.bare_network, stage.network, source)
        check_preconditioning(self._preconditioning, stage.preconditioning, source)
        for name, average in self.averages.items():
            if not name.startswith("sigma_rel"):
                average.start_from(stage.averages.get(name, stage.averages[None]))
        self.accelerator.print(f"Started from the weights of {source}.")

    def finish(self) -> str:
        """Save the averaged network as output_dir/pipeline, a diffusers folder, and publish it if asked to; return its path.

        Further averages become folders beside it, `pipeline-ema-DECAY`.
        """
        self._check_weights()
        path = os.path.join(self.options.output_dir, "pipeline")
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            with atomic_folder(path) as draft:
                self.save_pipeline(draft)
            for decay in self.options.extra_ema_decays:
                if decay != self.options.ema_decay:
                    with atomic_folder(f"{path}-ema-{decay}") as draft:
                        self.save_pipeline(draft, self.averages[str(decay)], {"decay": decay})
        self.accelerator.wait_for_everyone()  # launchers end all processes if one fails, at its exit too
        self._tracking.finish()
        if self.pusher is not None:
            self.pusher.finish(path)
        return path
