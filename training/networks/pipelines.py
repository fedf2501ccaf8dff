"""A user's model as a silent pipeline, checked against the data."""

import os
from collections.abc import Sequence

import torch
from diffusers import CMStochasticIterativeScheduler, DiffusionPipeline

from diffusers_ctm import CTMPipeline
from diffusers_ctm.guidance import ClassAverage
from diffusers_ctm.scheduling_karras import jumps

from ..cli.errors import UserError
from ..cli.shared_options import DataOptions, TeacherOptions
from ..data.images import ImageDataset
from .teacher import ctm_of_consistency_model, teacher_of


def load_model(name: str, gammas: Sequence[float]) -> CTMPipeline:
    """The CTM in the folder or Hub repository `name`, or the consistency model as one if `gammas` is 1 alone.

    Raises UserError if it cannot be loaded or is neither.
    """
    try:
        pipe = DiffusionPipeline.from_pretrained(name)
    except Exception as error:  # huggingface_hub, safetensors and diffusers each raise their own
        here = "" if os.path.isdir(name) else " No such folder is here."
        raise UserError(
            f"--model {name} cannot be loaded.{here} It must be a CTM's folder or its repository on the Hub.\n"
            f"{type(error).__name__}: {str(error).strip()}"
        ) from error
    scheduler = getattr(pipe, "scheduler", None)
    if isinstance(scheduler, CMStochasticIterativeScheduler):
        if list(gammas) != [1.0]:
            raise UserError(
                f"--model {name} is a consistency model, which has no score and samples with gamma = 1 only: `training.evaluate` takes it with --gammas 1."
            )
        return ctm_of_consistency_model(pipe.unet, scheduler.config)
    if not jumps(scheduler):
        raise UserError(f"--model {name} is no CTM but {_kind(pipe)}. A diffusion model goes to --teacher.")
    return pipe


def _kind(pipe: DiffusionPipeline) -> str:
    scheduler = getattr(pipe, "scheduler", None)
    return type(pipe).__name__ if scheduler is None else f"a {type(pipe).__name__} with {type(scheduler).__name__}"


def load_pipelines(
    config: TeacherOptions, dataset: ImageDataset, device: torch.device, gammas: Sequence[float] = ()
) -> dict[str, CTMPipeline]:
    """The pipelines of the options `model` ("ctm") and `teacher` ("heun"), on the device, checked against the data.

    A consistency model is taken for a CTM if `gammas` is 1 alone.
    """
    pipelines = {}
    if config.model is not None:
        pipelines["ctm"] = load_model(config.model, gammas)
    if config.teacher is not None:
        teacher = teacher_of(config)
        if teacher.is_consistency_model:
            raise UserError(
                f"--teacher {config.teacher} is a consistency model, which Heun's method cannot sample: it is no denoiser. Measure it with "
                "--model and --gammas 1."
            )
        pipelines["heun"] = CTMPipeline(
            teacher.network, teacher.scheduler, id2label=teacher.id2label, null_class=teacher.null_class
        )
    for sampler, pipe in pipelines.items():
        prepare(pipe, "--model" if sampler == "ctm" else "--teacher", config, dataset, device)
    return pipelines


def prepare(pipe: CTMPipeline, name: str, config: DataOptions, dataset: ImageDataset, device: torch.device) -> None:
    """Check the pipeline of the option `name` against the data, and put it on the device, silent. Raises UserError."""
    network = pipe.unet.config
    size = network.sample_size
    makes = (network.out_channels, *((size, size) if isinstance(size, int) or size is None else size))
    found = (dataset.channels, dataset.resolution, dataset.resolution)
    if makes != found:
        raise UserError(
            f"--dataset_name {config.dataset_name} gives images of shape {found}, {name} makes {makes}; set --resolution "
            "and --image_mode, or choose another data set."
        )
    if pipe.num_classes is not None and (dataset.num_classes or 0) > pipe.num_classes:
        raise UserError(
            f"--label_column {dataset.label_column} has {dataset.num_classes} classes, {name} knows {pipe.num_classes}."
        )
    pipe.to(device)
    pipe.unet.to(memory_format=torch.channels_last)
    pipe.set_progress_bar_config(disable=True)


def without_classes(pipe: CTMPipeline) -> tuple[CTMPipeline, dict]:
    """(a silent pipeline that samples without being told a class, what to call it with)."""
    options = {}
    pipe.unet.requires_grad_(False)
    if pipe.knows_no_class:
        options["guidance_scale"] = 0.0
    elif pipe.num_classes is not None:
        pipe = CTMPipeline(ClassAverage(pipe.unet), pipe.scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe, options
