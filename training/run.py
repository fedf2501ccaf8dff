"""What every training run does around its loss: devices, data, averages, checkpoints, logs, samples."""

import glob
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import ProjectConfiguration, set_seed
from diffusers.optimization import get_scheduler
from diffusers.utils import make_image_grid
from PIL import Image
from tqdm.auto import tqdm

from diffusers_ctm import CTMPipeline

from .config import RunOptions, UserError, save_config
from .data import ImageDataset, StepSampler, to_sample
from .ema import EMA, power_decay, snapshot_folder
from .files import WRITE_ERRORS, atomic_file, atomic_folder
from .record import LOCAL_OPTIONS, is_hub_id, training_record, write_record


CHECKPOINT = re.compile(r"checkpoint-(\d+)")


class StepRandom:
    """The random numbers of one step for one part of its global batch.

    They depend on seed, step and the global position of a sample, not on how the global batch is split over processes and
    accumulation steps: every part draws for all and keeps its own. Nothing needs to be saved to resume.
    """

    def __init__(self, seed: int, step: int, total: int, own: slice, device: torch.device):
        self.total, self.own = total, own
        seed = 2 * (seed * 1_000_000_007 + step)
        self.host = torch.Generator().manual_seed(seed)
        self.device_generator = torch.Generator(device).manual_seed(seed + 1)  # not the host's stream on a CPU
        self.device = device

    def normal(self, *shape: int) -> torch.Tensor:
        """Standard normal, shape (B, *shape), on the device."""
        return torch.randn(self.total, *shape, generator=self.device_generator, device=self.device)[self.own]

    def uniform(self) -> torch.Tensor:
        """Uniform in [0, 1), shape (B,), on the device."""
        return torch.rand(self.total, generator=self.device_generator, device=self.device)[self.own]


@dataclass
class Batch:
    """One forward pass's share of a step.

    Args:
        images: float32 in [-1, 1], shape (B, C, H, W), on the device.
        labels: int64 of shape (B,), or None.
        random: where its random numbers come from.
    """

    images: torch.Tensor
    labels: torch.Tensor | None
    random: StepRandom

    def dropped_labels(self, probability: float, null_class: int | None) -> torch.Tensor | None:
        """`labels`, each replaced by `null_class` with `probability` (Ho & Salimans 2022). At 0 nothing is drawn."""
        if self.labels is None or probability == 0:
            return self.labels
        return torch.where(self.random.uniform() < probability, null_class, self.labels)


def checkpoints(output_dir: str) -> list[str]:
    """The `checkpoint-N` folders, the oldest first; they appear by rename, so each is whole."""
    names = os.listdir(output_dir) if os.path.isdir(output_dir) else []
    steps = sorted(int(match[1]) for match in map(CHECKPOINT.fullmatch, names) if match)
    return [os.path.join(output_dir, f"checkpoint-{step}") for step in steps]


def newest_checkpoint(output_dir: str) -> str | None:
    """The `checkpoint-N` with the largest N, or None."""
    return next(reversed(checkpoints(output_dir)), None)


# Options that may differ when a run is resumed: how long, how fast and what is written.
FREE_OPTIONS = LOCAL_OPTIONS | {
    "max_train_steps", "train_batch_size", "gradient_accumulation_steps", "mixed_precision", "gradient_checkpointing", "teacher_subfolder"
}  # fmt: skip


def decisive_options(options: RunOptions, num_processes: int) -> dict[str, str]:
    """The options that a checkpoint's run must share with the run that resumes it, as text; of the batch, its global size."""
    decisive = {name: str(value) for name, value in asdict(options).items() if name not in FREE_OPTIONS}
    total = options.train_batch_size * options.gradient_accumulation_steps * num_processes
    return {**decisive, "train_batch_size x accumulation x processes": str(total)}


def start_output_dir(options: RunOptions) -> str | None:
    """Check the output folder before work starts; return the checkpoint to resume from, or None."""
    folder, resume = options.output_dir, options.resume_from_checkpoint
    if resume is not None and resume != "latest":
        if is_hub_id(resume):
            from .hub import download_checkpoint

            resume = download_checkpoint(resume)
        if not os.path.isfile(os.path.join(resume, "run_state.pt")):
            raise UserError(
                f"--resume_from_checkpoint {resume} is not a checkpoint folder of this program, nor 'latest', nor user/name on the Hub."
            )
        newest = newest_checkpoint(folder)
        if newest is not None and not os.path.samefile(resume, newest):
            raise UserError(
                f"--output_dir {folder} holds {newest}, which this run would overwrite or rotate away. Choose another folder, or remove "
                f"the checkpoints that are not {resume}."
            )
        return resume
    if resume == "latest":
        return newest_checkpoint(folder)
    if os.path.isdir(folder) and any(not name.startswith(".") for name in os.listdir(folder)):
        raise UserError(
            f"--output_dir {folder} is not empty. Continue that run with --resume_from_checkpoint latest, or choose another folder."
        )
    return None


class TrainingRun:
    """One run of a training program.

    Args:
        options: of the run.
        dataset: images.
        network: what is trained; moved to the device and wrapped.
        make_pipeline: builds the pipeline that is saved and sampled from a network.
        sample_settings: name and `CTMPipeline.__call__` options of each grid drawn during training.

    Attributes:
        network: the wrapped network. `bare_network` is the same without wrapping.
        averages: moving averages of it, by name. `ema`, one of them, is what the losses call, what is sampled and what is saved.
    """

    def __init__(
        self,
        options: RunOptions,
        dataset: ImageDataset,
        network: torch.nn.Module,
        make_pipeline: Callable[[torch.nn.Module], CTMPipeline],
        sample_settings: dict[str, dict],
    ):
        self.options, self.dataset = options, dataset
        self.make_pipeline, self.sample_settings = make_pipeline, sample_settings
        checkpoint = start_output_dir(options)
        self.accelerator = make_accelerator(options)
        self.record, self.pusher = {}, None
        if self.accelerator.is_main_process:
            self.record = training_record(options, self.accelerator.num_processes)
            if options.push_to_hub:
                from .push import Pusher

                self.pusher = Pusher(options, self.record)

        if options.gradient_checkpointing:
            network.enable_gradient_checkpointing()
        network = network.to(self.accelerator.device, memory_format=torch.channels_last).train()
        self.bare_network = network
        self.averages = {
            str(decay): EMA(network, decay, options.ema_warmup)
            for decay in dict.fromkeys([options.ema_decay, *options.extra_ema_decays])
        }
        self.ema = self.averages[str(options.ema_decay)]
        for width in options.posthoc_ema:
            self.averages[f"sigma_rel-{width:g}"] = EMA(network, power_decay(width))
        optimizer = make_optimizer(options, network)
        self.network, self.optimizer = self.accelerator.prepare(network, optimizer)
        self.lr_scheduler = get_scheduler(
            options.lr_scheduler,
            self.optimizer,
            num_warmup_steps=options.lr_warmup_steps,
            num_training_steps=options.max_train_steps,
        )
        self.step = 0
        self._sums: dict[str, torch.Tensor] = {}
        self._count = 0
        self.accelerator.register_for_checkpointing(self.lr_scheduler)
        if checkpoint is not None:
            self._load_checkpoint(checkpoint)
        self._open_output_dir()

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    def _open_output_dir(self) -> None:
        """Record the options and start the tracker; nothing is written before all else is known to work."""
        if self.accelerator.is_main_process:
            with atomic_file(os.path.join(self.options.output_dir, "config.yaml")) as draft:
                save_config(self.options, draft)
        values = {
            name: value if isinstance(value, (int, float, str, bool)) else str(value)
            for name, value in asdict(self.options).items()
        }
        if self.options.report_to != "none":
            self.accelerator.init_trackers("diffusers-ctm", config=values)

    # The loop -------------------------------------------------------------------------------------------------------

    def batches(self) -> Iterator[Batch]:
        """The forward passes of all remaining steps of this process. Between steps it logs, samples and saves."""
        options, accelerator = self.options, self.accelerator
        accumulation, processes = options.gradient_accumulation_steps, accelerator.num_processes
        num_parts = accumulation * processes
        parts = [index * processes + accelerator.process_index for index in range(accumulation)]
        size = options.train_batch_size
        sampler = StepSampler(
            len(self.dataset), size, options.seed, self.step, options.max_train_steps, parts, num_parts
        )
        loader = torch.utils.data.DataLoader(
            self.dataset,
            batch_sampler=sampler,
            collate_fn=_identity,
            num_workers=options.dataloader_num_workers,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # else starting it would draw from the generator that dropout uses
        )
        progress = tqdm(
            total=options.max_train_steps,
            initial=self.step,
            desc="Training",
            unit="step",
            disable=not accelerator.is_local_main_process,
        )
        with progress:
            loaded = iter(loader)
            while self.step < options.max_train_steps:
                for part in parts:
                    images, labels = next(loaded)
                    own = slice(part * size, (part + 1) * size)
                    random = StepRandom(options.seed, self.step, num_parts * size, own, self.device)
                    yield self._batch(images, labels, random)
                self.step += 1
                self._after_step(progress)

    def _batch(self, images: torch.Tensor, labels: torch.Tensor | None, random: StepRandom) -> Batch:
        images = to_sample(images.to(self.device, non_blocking=True))
        if self.options.random_flip:
            flip = random.uniform()[:, None, None, None] < 0.5
            images = torch.where(flip, images.flip(-1), images)
        images = images.contiguous(memory_format=torch.channels_last)
        labels = None if labels is None else labels.to(self.device, non_blocking=True)
        return Batch(images, labels, random)

    def update(self, loss: torch.Tensor, terms: dict[str, torch.Tensor]) -> None:
        """Backward pass of `loss`; after the last one of a step also the optimiser and the average. `terms` are logged."""
        with torch.no_grad():
            for name, value in terms.items():
                self._sums[name] = self._sums.get(name, 0) + value.detach().float()
        self._count += 1
        self.accelerator.backward(loss)
        if self.accelerator.sync_gradients:
            if self.options.max_grad_norm > 0:
                self.accelerator.clip_grad_norm_(self.network.parameters(), self.options.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.accelerator.sync_gradients:
            self.lr_scheduler.step()
            for average in self.averages.values():
                average.step(self.bare_network)

    def _after_step(self, progress: tqdm) -> None:
        options, step = self.options, self.step
        last = step == options.max_train_steps
        progress.update()
        saves = options.checkpointing_steps and (step % options.checkpointing_steps == 0 or last)
        if step % options.logging_steps == 0 or saves or last:
            self._log(progress)  # first: a broken run saves nothing
        if options.sample_every and (step % options.sample_every == 0 or last):
            self.save_samples()
        if options.posthoc_ema and (step % options.posthoc_ema_every == 0 or last):
            self.save_snapshots()
        if saves:
            self.save_checkpoint()

    def _log(self, progress: tqdm) -> None:
        """Means since the last call. The only place that waits for the device."""
        names = list(self._sums)
        sums = self.accelerator.reduce(torch.stack([self._sums[name] for name in names]) / self._count, "mean")
        means = dict(zip(names, sums.tolist(), strict=True))
        self._sums, self._count = {}, 0
        broken = [name for name, value in means.items() if value != value or abs(value) == float("inf")]
        if broken:
            raise self._broken(", ".join(broken))
        progress.set_postfix({name: f"{value:.3g}" for name, value in means.items()})
        learning_rate = self.lr_scheduler.get_last_lr()[0]
        self.accelerator.log(
            {**{f"train/{k}": v for k, v in means.items()}, "train/learning_rate": learning_rate}, step=self.step
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
        pipe = self.make_pipeline(self.ema.module)
        pipe.set_progress_bar_config(disable=True)
        columns, rows = 10, 4
        labels = None
        if self.dataset.num_classes is not None:
            labels = [index % self.dataset.num_classes for index in range(columns)] * rows
        for name, settings in self.sample_settings.items():
            generator = torch.Generator(self.device).manual_seed(0)
            images = pipe(batch_size=columns * rows, class_labels=labels, generator=generator, **settings).images
            path = os.path.join(self.options.output_dir, "samples", f"step-{self.step:06d}-{name}.png")
            with atomic_file(path) as draft:
                enlarged_grid(images, rows, columns).save(draft)

    def _check_weights(self) -> None:
        """Raise UserError if a weight is infinite or NaN: a loss can be finite and its gradient not."""
        networks = [self.bare_network, *(average.module for average in self.averages.values())]
        norms = [parameter.detach().norm() for network in networks for parameter in network.parameters()]
        if not torch.stack(norms).isfinite().all():
            raise self._broken("The weights")

    def save_checkpoint(self) -> None:
        """Save all that resuming needs as output_dir/checkpoint-N, whole or not at all, and remove the oldest beyond the limit."""
        self._check_weights()
        accelerator, options = self.accelerator, self.options
        path = os.path.join(options.output_dir, f"checkpoint-{self.step}")
        draft = os.path.join(options.output_dir, f".checkpoint-{self.step}.draft")
        if accelerator.is_main_process:
            shutil.rmtree(draft, ignore_errors=True)
        accelerator.wait_for_everyone()
        try:
            accelerator.save_state(draft)
            accelerator.wait_for_everyone()  # each process writes its own random state
            if accelerator.is_main_process:
                state = {
                    "step": self.step,
                    "averages": {name: average.state_dict() for name, average in self.averages.items()},
                    "options": decisive_options(options, accelerator.num_processes),
                }
                torch.save(state, os.path.join(draft, "run_state.pt"))
                os.replace(draft, path)
        except WRITE_ERRORS as error:
            shutil.rmtree(draft, ignore_errors=True)
            raise UserError(
                f"{path} could not be written: {error}. Older checkpoints are intact; resume with --resume_from_checkpoint latest."
            ) from error
        accelerator.wait_for_everyone()
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
        try:
            state = torch.load(os.path.join(path, "run_state.pt"), map_location="cpu", weights_only=True)
            before, now = state["options"], decisive_options(self.options, self.accelerator.num_processes)
            changed = [
                f"--{name} was {before.get(name)}, is {now[name]}" for name in now if before.get(name) != now[name]
            ]
            if changed:
                raise UserError(
                    f"The checkpoint {path} belongs to a run with other options: {'; '.join(changed)}. Give the same, or start a new "
                    "run in another --output_dir."
                )
            for name in glob.glob(os.path.join(glob.escape(path), "custom_checkpoint_*.pkl")):
                torch.load(name, map_location="cpu", weights_only=True)  # which accelerate would run code of
            self.accelerator.load_state(path)
            for name, average in self.averages.items():
                average.load_state_dict(state["averages"][name])
        except UserError:
            raise
        except Exception as error:  # torch, safetensors and accelerate each raise their own
            raise UserError(
                f"The checkpoint {path} cannot be resumed: {type(error).__name__}: {error}. It belongs to another network or "
                "is damaged; resume from another one."
            ) from error
        self.step = state["step"]
        if self.step > self.options.max_train_steps:
            raise UserError(f"--max_train_steps {self.options.max_train_steps} is below step {self.step} of {path}.")
        self.accelerator.print(f"Resumed from {path} at step {self.step}.")

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
        self.accelerator.end_training()
        if self.pusher is not None:
            self.pusher.finish(path)
        return path


def _identity(batch):
    return batch


def make_accelerator(options: RunOptions) -> Accelerator:
    """Accelerate with the options' precision, accumulation and tracker; seeds every process."""
    precision = options.mixed_precision
    if precision == "auto":
        precision = (
            "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False) else "no"
        )
    tracker = options.report_to
    if tracker != "none" and tracker not in map(str, get_available_trackers()):
        raise UserError(f"--report_to {tracker} needs the package {tracker}: pip install {tracker}, or choose 'none'.")
    accelerator = Accelerator(
        mixed_precision=precision,
        gradient_accumulation_steps=options.gradient_accumulation_steps,
        log_with=None if tracker == "none" else tracker,
        project_config=ProjectConfiguration(options.output_dir, logging_dir=os.path.join(options.output_dir, "logs")),
    )
    set_seed(options.seed, device_specific=True)
    return accelerator


def make_optimizer(options: RunOptions, network: torch.nn.Module) -> torch.optim.Optimizer:
    """RAdam, Adam or AdamW over the parameters that learn."""
    classes = {"radam": torch.optim.RAdam, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    return classes[options.optimizer](
        [parameter for parameter in network.parameters() if parameter.requires_grad],
        lr=options.learning_rate,
        betas=(options.adam_beta1, options.adam_beta2),
        weight_decay=options.adam_weight_decay,
        eps=options.adam_epsilon,
    )


def enlarged_grid(images: list[Image.Image], rows: int, columns: int, smallest_side: int = 48) -> Image.Image:
    """Images in rows, small ones enlarged without smoothing."""
    factor = max(1, -(-smallest_side // images[0].height))
    size = (images[0].width * factor, images[0].height * factor)
    return make_image_grid(
        [image.resize(size, Image.Resampling.NEAREST).convert("RGB") for image in images], rows, columns
    )
