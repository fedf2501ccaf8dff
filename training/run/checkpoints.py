"""What a run finds on the disk: a checkpoint to continue, or a first stage."""

import os
import re
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from diffusers_ctm.preconditioning import Preconditioning
from diffusers_ctm.scheduling_karras import preconditioning_of

from ..cli.errors import UserError
from ..cli.names import is_hub_id
from ..cli.training_options import RunOptions
from ..hub.client import download_checkpoint
from .sharding import load_whole


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
    """The options that a checkpoint's run must share with the run that resumes it, as text; of the batch, its global size."""
    decisive = {f.name: str(getattr(options, f.name)) for f in fields(options) if not f.metadata["free"]}
    total = options.train_batch_size * options.gradient_accumulation_steps * num_processes
    return {**decisive, "train_batch_size x accumulation x processes": str(total)}


def default_options(options: RunOptions) -> dict[str, str]:
    """The defaults of the options, as text: what a checkpoint of older code means by leaving one out."""
    defaults = {}
    for entry in fields(options):
        defaults[entry.name] = str(entry.default if entry.default_factory is MISSING else entry.default_factory())
    return defaults


def start_output_dir(options: RunOptions) -> str | None:
    """Check the output folder before work starts; return the checkpoint to resume from, or None."""
    folder, resume = options.output_dir, options.resume_from_checkpoint
    if resume is not None and resume != "latest":
        if is_hub_id(resume):
            resume = download_checkpoint(resume)
        if not os.path.isfile(os.path.join(resume, STATE)):
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
        newest = newest_checkpoint(folder)
        way = "Continue that run" if newest else "No checkpoint is in it: start it afresh there"
        raise UserError(
            f"--output_dir {folder} is not empty. {way} with --resume_from_checkpoint latest, or choose another folder."
        )
    return None


def load_run_state(checkpoint: str) -> dict[str, Any]:
    """What a checkpoint holds beside Accelerate's files. No code in it runs."""
    return torch.load(os.path.join(checkpoint, STATE), map_location="cpu", weights_only=True)


# A first stage --------------------------------------------------------------------------------------------------------


@dataclass
class FirstStage:
    """Weights that a run starts from.

    Args:
        network: of the network that learns.
        averages: of its moving averages, by the decay; None is the one of any other decay.
        preconditioning: with which the network learnt; None if what holds it does not say.
    """

    network: dict[str, torch.Tensor]
    averages: dict[str | None, dict[str, torch.Tensor]]
    preconditioning: Preconditioning | None


def find_first_stage(name: str) -> str:
    """The checkpoint or pipeline folder, or the Hub repository, that --init_from means. Raises UserError if there is none."""
    if is_hub_id(name):
        return name
    for folder in (name, newest_checkpoint(name), os.path.join(name, "pipeline")):
        if folder is not None and any(
            os.path.isfile(os.path.join(folder, file)) for file in (STATE, "model_index.json")
        ):
            return folder
    raise UserError(
        f"--init_from {name} is no checkpoint folder, no pipeline, no run with either, and no repository on the Hub (user/name)."
    )


def load_first_stage(folder: str) -> FirstStage:
    """The weights in what `find_first_stage` found. Raises UserError if they cannot be read."""
    try:
        if not os.path.isfile(os.path.join(folder, STATE)):
            pipe = DiffusionPipeline.from_pretrained(folder)
            weights = pipe.unet.state_dict()
            return FirstStage(weights, {None: weights}, preconditioning_of(pipe.scheduler))
        state = load_run_state(folder)
        averages = {decay: average["weights"] for decay, average in state["averages"].items()}
        averages[None] = averages[state["options"]["ema_decay"]]
        numbers = state.get("preconditioning")  # older code did not keep it
        preconditioning = None if numbers is None else Preconditioning(**numbers)
        whole = os.path.join(folder, "pytorch_model_fsdp.bin")  # of a run with FSDP
        if os.path.isfile(whole):
            return FirstStage(torch.load(whole, map_location="cpu", weights_only=True), averages, preconditioning)
        return FirstStage(load_file(os.path.join(folder, "model.safetensors")), averages, preconditioning)
    except Exception as error:  # torch, safetensors, diffusers and huggingface_hub each raise their own
        raise UserError(f"--init_from {folder} cannot be loaded: {type(error).__name__}: {error}") from error


def load_weights(network: torch.nn.Module, weights: dict[str, torch.Tensor], source: str) -> None:
    """Copy all weights into `network`. Raises UserError if they are not those of such a network."""
    own = network.state_dict()
    missing, unknown = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    other = [name for name in own.keys() & weights.keys() if own[name].shape != weights[name].shape]
    if missing or unknown or other:
        parts = {"missing": missing, "unknown": unknown, "of another shape": sorted(other)}
        listed = "; ".join(f"{len(names)} {kind}, such as {names[0]}" for kind, names in parts.items() if names)
        raise UserError(f"--init_from {source} is not of the network that this run trains: {listed}.")
    load_whole(network, weights)


def check_preconditioning(own: Preconditioning, saved: Preconditioning | None, source: str) -> None:
    """Raise UserError if weights learnt with another preconditioning than the run's own: shapes do not tell, and outputs would be wrong."""
    if saved is None:
        return
    before, now = asdict(saved), asdict(own)
    changed = [f"{name} {before[name]}, here {now[name]}" for name in now if before[name] != now[name]]
    if changed:
        raise UserError(
            f"--init_from {source} learnt with another preconditioning: {'; '.join(changed)}. Give the --teacher of that run, or without "
            "one its --sigma_data and --timestep_scale."
        )
