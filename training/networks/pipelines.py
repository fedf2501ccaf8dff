# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""A user's model as a silent pipeline, checked against the data."""

import os
from collections.abc import Sequence

import torch
from diffusers import CMStochasticIterativeScheduler

from diffusers_ctm import CTMPipeline, CTMScheduler, CTMUNet2DModel
from diffusers_ctm.guidance import ClassAverage
from diffusers_ctm.scheduling_karras import jumps
from diffusers_ctm.trajectory import append_dims

from ..cli.errors import UserError
from ..cli.shared_options import DataOptions, TeacherOptions
from ..cli.weights import load_pipeline
from ..data.images import ImageDataset
from .student import fit_data
from .teacher import Teacher, check_levels, load_teacher


def load_model(name: str, gammas: Sequence[float]) -> CTMPipeline:
    """The CTM in the folder or Hub repository `name`, or the consistency model as one if `gammas` is 1 alone.

    Raises UserError if it cannot be loaded, has broken weights or is neither.
    """
    label, here = f"--model {name}", "" if os.path.isdir(name) else "No such folder is here. "
    pipe = load_pipeline(label, name, f"{here}It must be a CTM's folder or its repository on the Hub.")
    scheduler = getattr(pipe, "scheduler", None)
    if isinstance(scheduler, CMStochasticIterativeScheduler):
        if list(gammas) != [1.0]:
            raise UserError(
                f"{label} is a consistency model, which has no score and samples with gamma = 1 only: "
                "`training.evaluate` takes it with --gammas 1."
            )
        # One step, and more at gamma = 1, sample as the consistency model does; it never learned other jumps.
        return CTMPipeline(CTMUNet2DModel.from_unet(pipe.unet), CTMScheduler.from_config(scheduler.config, gamma=1.0))
    if not jumps(scheduler):
        kind = type(pipe).__name__ if scheduler is None else f"a {type(pipe).__name__} with {type(scheduler).__name__}"
        raise UserError(f"{label} is no CTM but {kind}. A diffusion model goes to --teacher.")
    return pipe


class GuidedNetwork(torch.nn.Module):
    """F = (D - c_skip x) / c_out of a guided teacher's denoiser D, for a pipeline with the teacher's scheduler."""

    def __init__(self, teacher: Teacher):
        super().__init__()
        self.teacher, self.config = teacher, teacher.network.config
        self.networks = torch.nn.ModuleList(part.network for part in teacher.parts.values())

    @property
    def dtype(self) -> torch.dtype:
        return self.teacher.network.dtype

    @property
    def device(self) -> torch.device:
        return self.teacher.network.device

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        return_dict: bool = False,
    ) -> tuple[torch.Tensor]:
        preconditioning = self.teacher.preconditioning
        sigma = preconditioning.sigma_of_c_noise(timestep).expand(len(sample))
        c_skip, c_out, c_in = preconditioning.scalings(append_dims(sigma, sample.ndim))
        x = (sample - preconditioning.kind.input_shift) / c_in
        return ((self.teacher.denoise(x, sigma, class_labels) - c_skip * x) / c_out,)


def load_pipelines(
    config: TeacherOptions, dataset: ImageDataset | None, device: torch.device, gammas: Sequence[float] = ()
) -> dict[str, CTMPipeline]:
    """The pipelines of the options `model` ("ctm") and `teacher` ("heun"), on the device, checked against the data.

    Without a data set nothing is checked.
    A consistency model is taken for a CTM if `gammas` is 1 alone.
    """
    pipelines = {}
    if config.model is not None:
        pipelines["ctm"] = load_model(config.model, gammas)
        prepare(pipelines["ctm"], "--model", config, dataset, device)
    if config.teacher is not None:
        pipelines["heun"] = load_heun(config)
        prepare(pipelines["heun"], "--teacher", config, dataset, device)
    return pipelines


def load_heun(config: TeacherOptions) -> CTMPipeline:
    """The teacher, guided if the options say so, sampled by Heun's method. Raises UserError if it is no denoiser."""
    teacher = load_teacher(config)
    if teacher.is_consistency_model:
        raise UserError(
            f"--teacher {config.teacher} is a consistency model, which Heun's method cannot sample: it is no denoiser. "
            "Measure it with --model and --gammas 1."
        )
    check_levels(teacher, teacher.scheduler)
    network = GuidedNetwork(teacher) if teacher.is_guided else teacher.network
    latent = {} if teacher.autoencoder is None else teacher.autoencoder.pipeline_options
    return CTMPipeline(network, teacher.scheduler, id2label=teacher.id2label, null_class=teacher.null_class, **latent)


def prepare(
    pipe: CTMPipeline, name: str, config: DataOptions, dataset: ImageDataset | None, device: torch.device
) -> None:
    """Fit the data to the pipeline of the option `name` (`fit_data`), and put that on the device, silent."""
    if dataset is not None:
        makes = (pipe.image_channels, *pipe.image_size)
        fit_data(dataset, makes, pipe.num_classes, pipe.config.id2label, name, config)
    pipe.to(device)
    pipe.unet.to(memory_format=torch.channels_last)
    pipe.set_progress_bar_config(disable=True)


def without_classes(pipe: CTMPipeline) -> tuple[CTMPipeline, dict]:
    """A silent pipeline that samples without being told a class, and the options to call it with."""
    pipe.unet.requires_grad_(False)
    options = {"guidance_scale": 0.0} if pipe.knows_no_class else {}
    if pipe.num_classes is not None and not pipe.knows_no_class:
        latent = {"vae": pipe.vae, "normalize_images": pipe.config.normalize_images}
        pipe = CTMPipeline(ClassAverage(pipe.unet, pipe.classes), pipe.scheduler, **latent)
    pipe.set_progress_bar_config(disable=True)
    return pipe, options
