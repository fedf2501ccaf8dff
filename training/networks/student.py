# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""The student of a teacher: its network, levels, labels and precision, and whether teacher and data fit."""

from collections.abc import Mapping
from dataclasses import fields, replace

from diffusers import UNet2DModel
from torch import nn

from diffusers_ctm import CTMScheduler, CTMUNet2DModel
from diffusers_ctm.preconditioning import Preconditioning
from diffusers_ctm.two_times import image_size

from ..cli.errors import UserError
from ..cli.shared_options import DataOptions
from ..cli.training_options import GridOptions, HardwareOptions, StudentOptions
from ..data.images import Images
from ..data.latents import LatentDataset
from .build import build_scheduler, build_unet
from .source import Network
from .teacher import Teacher, check_levels


def fit_data(
    dataset: Images | LatentDataset,
    makes: tuple[int, int, int],
    num_classes: int | None,
    id2label: Mapping[int, str] | None,
    name: str,
    config: DataOptions,
) -> None:
    """Give the data's classes the numbers that the network of the option `name` has for them, and say so.

    Raises UserError if the images have another shape than `makes`, (C, H, W), or classes that it does not know.
    """
    given = (dataset.channels, dataset.resolution, dataset.resolution)
    if makes != given:
        latent, of_pixels = bool(dataset.pipeline_options), makes[0] in (1, 3)
        advice = "Set --resolution and --image_mode, or choose another data set."
        if latent and makes[0] != given[0]:
            advice = "It makes images: leave --vae out." if of_pixels else "Give the autoencoder that made its latents."
        elif not latent and not of_pixels:
            way = "Give --vae" if hasattr(config, "vae") else "Save its pipeline with its `vae`"
            advice = f"These are latents, and their autoencoder is missing. {way}."
        raise UserError(
            f"--dataset_name {config.dataset_name} gives {'latents' if latent else 'images'} of shape {given}, {name} "
            f"makes {makes}. {advice}"
        )
    if num_classes is not None and dataset.num_classes is not None:
        dataset.number_classes(num_classes, id2label, name)


def check_fit(teacher: Teacher, config: DataOptions, dataset: Images | LatentDataset) -> None:
    """Raise UserError if images or classes of the data are not those of the teacher."""
    labels = teacher.network.config.num_class_embeds
    if labels is not None and dataset.num_classes is None:
        raise UserError(f"--label_column is needed: the teacher is conditional on {labels} classes.")
    if labels is None and dataset.num_classes is not None:
        raise UserError("--label_column was given, but the teacher is unconditional; leave it out.")
    num_classes = labels if teacher.null_class is None else teacher.null_class  # which is the last label
    makes = (teacher.network.config.out_channels, *image_size(teacher.network))
    fit_data(dataset, makes, num_classes, teacher.id2label, "--teacher", config)


def choose_precision(options: HardwareOptions, teacher: Teacher) -> HardwareOptions:
    """`options` with float32 in place of "auto" if the network's rounding would reach the image magnified by the noise
    level.

    g = x - sigma epsilon: one part in 256 of bfloat16 at sigma = 157 is 0.6, more than an image.
    """
    magnifies = any(part.preconditioning.kind.magnifies_rounding for part in teacher.parts.values())
    if options.mixed_precision == "auto" and magnifies:
        return replace(options, mixed_precision="no")
    return options


def student_scheduler(teacher: Teacher, options: GridOptions) -> CTMScheduler:
    """A CTMScheduler with the teacher's whole preconditioning, and its levels unless options say others."""
    names = {field.name for field in fields(Preconditioning)} | {"sigma_min", "sigma_max", "rho"}
    asked = {"sigma_min": options.sigma_min, "sigma_max": options.sigma_max}
    numbers = {name: teacher.scheduler.config[name] if asked.get(name) is None else asked[name] for name in names}
    if teacher.is_consistency_model and numbers["sigma_min"] != teacher.scheduler.config.sigma_min:
        raise UserError("--sigma_min cannot differ from that of a consistency model, whose jumps end there.")
    try:
        scheduler = CTMScheduler(num_train_timesteps=options.num_train_timesteps, **numbers)
    except ValueError as error:
        raise UserError(f"--sigma_min or --sigma_max does not fit --teacher {teacher.name}: {error}") from error
    check_levels(teacher, scheduler)
    return scheduler


def make_student(network: Network, dropout: float | None = None) -> Network:
    """A teacher's network with a target time, equal to it at every target. `dropout` replaces the teacher's."""
    student_class = CTMUNet2DModel if isinstance(network, UNet2DModel) else type(network)
    try:
        student = student_class.from_unet(network)
    except ValueError as error:
        raise UserError(f"--teacher cannot become a CTM: {error}") from error
    if dropout is not None:
        set_dropout(student, dropout)
    return student


def set_dropout(network: Network, probability: float) -> None:
    """As if `network` had been built with `dropout=probability`: in its blocks, not in the attention of U-Nets."""
    network.register_to_config(dropout=probability)
    for module in network.modules():
        if isinstance(getattr(module, "dropout", None), nn.Dropout):
            module.dropout.p = probability


def untrained(options: StudentOptions, dataset: Images | LatentDataset) -> Teacher:
    """The start of a student without a teacher: the network that the options describe, with random weights."""
    network = build_unet(options, dataset, options.dropout or 0.0, options.label_dropout or 0.0)
    try:
        scheduler = build_scheduler(options, options.sigma_min or 0.002, options.sigma_max or 80.0)
    except ValueError as error:
        raise UserError(f"--sigma_min or --sigma_max: {error}") from error
    return Teacher(
        network.requires_grad_(False).eval(),
        scheduler,
        dataset.id2label,
        null_class=dataset.num_classes if options.label_dropout else None,
    )


def label_dropout(teacher: Teacher, options: StudentOptions) -> float:
    """The probability of leaving a class out, checked against the teacher."""
    if teacher.null_class is not None:
        return 0.1 if options.label_dropout is None else options.label_dropout
    if options.label_dropout:
        raise UserError(
            "--label_dropout needs a teacher that was trained with it (`training.train_edm --label_dropout 0.1`); "
            "this one has no label for 'no class'."
        )
    return 0.0
