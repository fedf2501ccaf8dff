# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Reading what a run starts from: a checkpoint to resume, or the weights of a first stage."""

import math
import os
import re
from dataclasses import asdict, dataclass, fields

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from torch.optim.lr_scheduler import LambdaLR

from diffusers_ctm.autoencoder import downscale, encode
from diffusers_ctm.preconditioning import Preconditioning
from diffusers_ctm.scheduling_karras import preconditioning_of

from ..cli.device import say
from ..cli.errors import UserError, loading
from ..cli.names import is_hub_id
from ..cli.options import default_of
from ..cli.training_options import OutputOptions, RunOptions
from ..cli.weights import check_finite, load_pipeline
from ..data.images import Images
from ..data.latents import TOLERANCE
from ..hub.client import download_checkpoint
from ..hub.record import LOADED


CHECKPOINT = re.compile(r"checkpoint-(\d+)")

STATE = "run_state.pt"


def checkpoints(output_dir: str) -> list[str]:
    """The `checkpoint-N` folders, the oldest first; they appear by rename, so each is whole."""
    names = os.listdir(output_dir) if os.path.isdir(output_dir) else []
    steps = sorted(int(match[1]) for match in map(CHECKPOINT.fullmatch, names) if match)
    return [os.path.join(output_dir, f"checkpoint-{step}") for step in steps]


def newest_checkpoint(output_dir: str) -> str | None:
    """The `checkpoint-N` with the largest N, or None."""
    return next(reversed(checkpoints(output_dir)), None)


def decisive_options(options: RunOptions, num_processes: int) -> dict[str, str]:
    """The options that a run must share with the one that resumes it, as text, and the size of the global batch."""
    decisive = {
        entry.name: str(getattr(options, entry.name)) for entry in fields(options) if not entry.metadata["free"]
    }
    images = options.train_batch_size * options.gradient_accumulation_steps * num_processes
    return {**decisive, "train_batch_size x accumulation x processes": str(images)}


def free_options(options: RunOptions, precision: str) -> dict[str, str]:
    """The recorded options that a resumed run may have others of, as text; `precision` stands for "auto"."""
    names = [entry.name for entry in fields(options) if entry.metadata["free"] and entry.metadata["recorded"]]
    return {name: precision if name == "mixed_precision" else str(getattr(options, name)) for name in names}


def start_output_dir(options: OutputOptions) -> str | None:
    """Check the output folder before work starts; return the checkpoint to resume from, or None."""
    folder, resume = options.output_dir, options.resume_from_checkpoint
    newest = newest_checkpoint(folder)
    if resume == "latest":
        return newest
    if resume is None:
        if os.path.isdir(folder) and any(not name.startswith(".") for name in os.listdir(folder)):
            way = "Continue that run" if newest else "No checkpoint is in it: start it afresh there"
            raise UserError(
                f"--output_dir {folder} is not empty. {way} with --resume_from_checkpoint latest, or choose another "
                "folder."
            )
        return None
    if is_hub_id(resume):
        resume = download_checkpoint(resume)
    if not os.path.isfile(os.path.join(resume, STATE)):
        raise UserError(
            f"--resume_from_checkpoint {resume} is not a checkpoint folder of this program, nor 'latest', nor "
            "user/name on the Hub."
        )
    if newest is not None and not os.path.samefile(resume, newest):
        raise UserError(
            f"--output_dir {folder} holds {newest}, which this run would overwrite or rotate away. Choose another "
            f"folder, or remove the checkpoints that are not {resume}."
        )
    return resume


def load_run_state(checkpoint: str, mmap: bool = False) -> dict:
    """The part of a checkpoint that is not Accelerate's. No code in it runs. `mmap` reads a tensor when it is used."""
    return torch.load(os.path.join(checkpoint, STATE), map_location="cpu", weights_only=True, mmap=mmap)


def number_classes_as_before(dataset: Images, options: RunOptions) -> None:
    """Give the data's classes the numbers that they have in the checkpoint or first stage that the run starts from.

    Raises UserError for classes that these do not know (`Images.number_classes`).
    """
    if dataset.num_classes is None:
        return
    checkpoint = start_output_dir(options)
    if (checkpoint or options.init_from) is None:
        return
    name = "--resume_from_checkpoint" if checkpoint else "--init_from"
    source = checkpoint or find_first_stage(options.init_from)
    with loading(f"{name} {source}"):
        if os.path.isfile(os.path.join(source, STATE)):
            id2label = load_run_state(source, mmap=True).get("id2label")
        else:
            id2label = DiffusionPipeline.load_config(source).get("id2label")
    if id2label:
        dataset.number_classes(len(id2label), id2label, f"{name} {source}")


def check_same_run(state: dict, options: RunOptions, num_processes: int, networks: list[str], path: str) -> None:
    """Raise UserError if the checkpoint `path` with this state is of another run than that of options and networks."""
    defaults = {entry.name: str(default_of(entry)) for entry in fields(options)}  # of options that are newer than it
    before, now = {**defaults, **state["options"]}, decisive_options(options, num_processes)
    changed = [f"--{name} was {before.get(name)}, is {now[name]}" for name in now if before.get(name) != now[name]]
    if changed:
        raise UserError(
            f"The checkpoint {path} belongs to a run with other options: {'; '.join(changed)}. Give the same, or start "
            "a new run in another --output_dir."
        )
    if list(state["networks"]) != networks:
        raise UserError(
            f"The checkpoint {path} holds the networks {', '.join(state['networks'])}, this run has "
            f"{', '.join(networks)}. Start a new run from its weights: another --output_dir, and --init_from {path}."
        )
    if state["step"] > options.max_train_steps:
        raise UserError(f"--max_train_steps {options.max_train_steps} is below step {state['step']} of {path}.")


def changes_of(state: dict, options: RunOptions, precision: str, former: dict, record: dict) -> list[str]:
    """What differs from the run that saved `state` and may: "--compile was False, is True".

    Args:
        precision: of the run that resumes.
        former, record: the contents of `training.json`, of the checkpoint and of now.
    """
    before, now = state["options"], free_options(options, precision)
    changed = [name for name in now if before.get(name, now[name]) != now[name]]
    changed = [f"--{name} was {before[name]}, is {now[name]}" for name in changed]
    for role in LOADED if former else ():
        old, new = (
            " at ".join(filter(None, map((each.get(role) or {}).get, ("name", "revision")))) or None
            for each in (former, record)
        )
        changed += [f"--{role} was {old}, is {new}"] if old != new else []
    return changed


def jump_of_learning_rate(state: dict, options: RunOptions, scheduler: LambdaLR) -> str:
    """A sentence if the learning rate of a resumed run does not go on where it was, else "".

    `scheduler` is loaded: its last rate is the checkpoint's, its function that of the options.
    """
    before = scheduler.get_last_lr()[0] / scheduler.base_lrs[0]
    now = scheduler.lr_lambdas[0](scheduler.last_epoch)
    if math.isclose(before, now, rel_tol=1e-6, abs_tol=1e-9):
        return ""
    former = state["options"].get("max_train_steps", "another number")
    return (
        f"The learning rate goes from {before:.3f} to {now:.3f} of its peak: --lr_scheduler {options.lr_scheduler} "
        f"ends at --max_train_steps, which was {former} at the checkpoint and is {options.max_train_steps}."
    )


# A first stage --------------------------------------------------------------------------------------------------------


def find_first_stage(name: str) -> str:
    """The checkpoint, pipeline's folder or Hub repository that --init_from means. Raises UserError if there is none."""
    if is_hub_id(name):
        return name
    for folder in (name, newest_checkpoint(name), os.path.join(name, "pipeline")):
        if folder is not None and any(
            os.path.isfile(os.path.join(folder, file)) for file in (STATE, "model_index.json")
        ):
            return folder
    raise UserError(
        f"--init_from {name} is no checkpoint folder, no pipeline, no run with either, and no repository on the Hub "
        "(user/name)."
    )


@dataclass
class FirstStage:
    """What `find_first_stage` returned holds.

    Args:
        weights: of the network.
        averages: weights of its moving averages, by the decay; None is any other decay.
        preconditioning: that it was trained with; None if the scheduler of its pipeline does not say it.
        example: the result of `example_latents`; None if an older checkpoint does not say it.
    """

    weights: dict[str, torch.Tensor]
    averages: dict[str | None, dict[str, torch.Tensor]]
    preconditioning: Preconditioning | None
    example: torch.Tensor | None


@torch.no_grad()
def example_latents(pipe: DiffusionPipeline) -> torch.Tensor:
    """A certain small image as the network of a pipeline sees it: its latents, float32 on the CPU; empty for pixels."""
    vae = getattr(pipe, "vae", None) or getattr(pipe, "vqvae", None)
    if vae is None:
        return torch.empty(0)
    side = 4 * downscale(vae)
    noise = torch.rand((1, vae.config.in_channels, side, side), generator=torch.Generator().manual_seed(0))
    return encode(vae, (2 * noise - 1).to(vae.device), pipe.config.get("normalize_images", True)).cpu()


def load_first_stage(folder: str) -> FirstStage:
    """Read what `find_first_stage` returned. Raises UserError if that fails."""
    option = f"--init_from {folder}"
    if not os.path.isfile(os.path.join(folder, STATE)):
        pipe = load_pipeline(option, folder)
        with loading(option):
            weights = pipe.unet.state_dict()
            return FirstStage(weights, {None: weights}, preconditioning_of(pipe.scheduler), example_latents(pipe))
    with loading(option):
        state = load_run_state(folder)
        averages = {decay: average["weights"] for decay, average in state["averages"].items()}
        sharded = os.path.join(folder, "pytorch_model_fsdp.bin")  # what a run with FSDP saves
        if os.path.isfile(sharded):
            weights = torch.load(sharded, map_location="cpu", weights_only=True)
        else:
            weights = load_file(os.path.join(folder, "model.safetensors"))
        check_finite(option, weights)
        for decay, average in averages.items():
            check_finite(option, {f"average {decay}, {name}": tensor for name, tensor in average.items()})
        averages[None] = averages[state["options"]["ema_decay"]]
        return FirstStage(weights, averages, Preconditioning(**state["preconditioning"]), state.get("example"))


def check_preconditioning(own: Preconditioning, saved: Preconditioning | None, source: str) -> None:
    """Raise UserError if weights are known to be trained with another preconditioning than the run's.

    Their shapes do not tell, and outputs would be wrong.
    """
    before, now = asdict(saved or own), asdict(own)
    changed = [f"{name} {before[name]}, here {now[name]}" for name in now if before[name] != now[name]]
    if changed:
        raise UserError(
            f"--init_from {source} learned with another preconditioning: {'; '.join(changed)}. Give the --teacher of "
            "that run, or without one its --sigma_data and --timestep_scale."
        )


def check_autoencoder(own: torch.Tensor, saved: torch.Tensor | None, source: str) -> None:
    """Raise UserError if weights are known to be trained on other latents than the run's, both of `example_latents`.

    Their shapes do not tell, and images would be wrong. Decoders may differ.
    """
    if saved is None and own.numel():
        say(f"Note: --init_from {source} does not say whose latents it learned. They must be those of this run.")
    if saved is None or own.numel() == saved.numel() == 0:
        return
    if own.shape != saved.shape or not (own - saved).square().mean().sqrt() <= TOLERANCE * own.std():
        learned, here = ("latents" if each.numel() else "pixels" for each in (saved, own))
        both = "latents of another autoencoder than this run's" if learned == here else f"{learned}, this run {here}"
        raise UserError(
            f"--init_from {source} learned {both}. Give the --vae of that run, or a --teacher with its autoencoder."
        )
