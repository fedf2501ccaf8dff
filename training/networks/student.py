"""The student of a teacher: network, levels, labels; refused where teacher and data do not fit."""

from dataclasses import fields

import torch
from diffusers import UNet2DModel
from diffusers.models.resnet import ResnetBlock2D

from diffusers_ctm import CTMScheduler, CTMUNet2DModel, EDMUNet2DModel
from diffusers_ctm.preconditioning import Preconditioning

from ..cli.errors import UserError
from ..cli.training_options import CTMConfig
from ..data.images import ImageDataset
from .build import build_scheduler, build_unet
from .teacher import Teacher


def make_student(network: UNet2DModel | EDMUNet2DModel) -> CTMUNet2DModel | EDMUNet2DModel:
    """The network with target time that equals the teacher `network` at every target. Raises ValueError if it cannot become one."""
    student_class = EDMUNet2DModel if isinstance(network, EDMUNet2DModel) else CTMUNet2DModel
    return student_class.from_unet(network)


def set_dropout(network: CTMUNet2DModel | EDMUNet2DModel, probability: float) -> None:
    """As if `network` had been built with `dropout=probability`: in its residual blocks, not in attention."""
    network.register_to_config(dropout=probability)
    for module in network.modules():
        if isinstance(module, ResnetBlock2D):
            module.dropout.p = probability


def check_fit(teacher: Teacher, dataset: ImageDataset) -> None:
    """Raise UserError if images or classes of the data are not those of the teacher."""
    config = teacher.network.config
    size = config.sample_size
    expected = (config.in_channels, *((size, size) if isinstance(size, int) else size))
    found = (dataset.channels, dataset.resolution, dataset.resolution)
    if found != expected:
        raise UserError(
            f"--dataset_name gives images of shape {found}, the teacher takes {expected}; set --resolution and --image_mode."
        )
    if config.num_class_embeds is not None and dataset.num_classes is None:
        raise UserError(f"--label_column is needed: the teacher is conditional on {config.num_class_embeds} classes.")
    if config.num_class_embeds is None and dataset.num_classes is not None:
        raise UserError("--label_column was given, but the teacher is unconditional; leave it out.")
    known = (config.num_class_embeds or 0) - (teacher.null_class is not None)
    if dataset.num_classes is not None and dataset.num_classes > known:
        raise UserError(f"--label_column has {dataset.num_classes} classes, the teacher knows {known}.")


def student_scheduler(teacher: Teacher, config: CTMConfig) -> CTMScheduler:
    """A CTMScheduler with the teacher's whole preconditioning, and its levels unless options say others."""
    names = {field.name for field in fields(Preconditioning)} | {"sigma_min", "sigma_max", "rho"}
    numbers = {name: teacher.scheduler.config[name] for name in names}
    for name in ("sigma_min", "sigma_max"):
        if getattr(config, name) is not None:
            numbers[name] = getattr(config, name)
    if teacher.is_consistency_model and numbers["sigma_min"] != teacher.scheduler.config.sigma_min:
        raise UserError("--sigma_min cannot differ from that of a consistency model, whose jumps end there.")
    try:
        return CTMScheduler(num_train_timesteps=config.num_train_timesteps, **numbers)
    except ValueError as error:
        raise UserError(f"--sigma_min or --sigma_max does not fit --teacher {config.teacher}: {error}") from error


def untrained(config: CTMConfig, dataset: ImageDataset) -> Teacher:
    """What the student starts from without a teacher: the network that the options describe."""
    leave_out = config.label_dropout or 0.0
    torch.manual_seed(config.seed)
    network = build_unet(config, dataset, config.dropout or 0.0, leave_out)
    try:
        scheduler = build_scheduler(config, config.sigma_min or 0.002, config.sigma_max or 80.0)
    except ValueError as error:
        raise UserError(f"--sigma_min or --sigma_max: {error}") from error
    return Teacher(
        network.requires_grad_(False).eval(),
        scheduler,
        dataset.id2label,
        null_class=dataset.num_classes if leave_out else None,
    )


def label_dropout(teacher: Teacher, config: CTMConfig) -> float:
    """The probability of leaving a class out, checked against the teacher."""
    if teacher.null_class is None:
        if config.label_dropout:
            raise UserError(
                "--label_dropout needs a teacher that was trained with it (`training.train_edm --label_dropout 0.1`); this one has no label "
                "for 'no class'."
            )
        return 0.0
    return 0.1 if config.label_dropout is None else config.label_dropout
