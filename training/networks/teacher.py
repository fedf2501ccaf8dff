# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""A teacher: a frozen denoiser, its preconditioning, and the repository and commit that it was loaded from.

A further class of networks begins in `source.NETWORKS`, a further scheduler in `diffusers_ctm/scheduler_configs.py`,
and a further kind of prediction in `PREDICTIONS` of `diffusers_ctm/preconditioning.py`.
"""

import os
from dataclasses import dataclass

import torch
from diffusers import UNet2DModel
from diffusers.utils import logging

from diffusers_ctm import EDMHeunScheduler, EDMUNet2DModel
from diffusers_ctm.preconditioning import PREDICTIONS, Preconditioning, condition
from diffusers_ctm.scheduler_configs import own_config
from diffusers_ctm.trajectory import jump

from ..cli.errors import UserError, loading
from ..cli.shared_options import TeacherOptions
from .source import Source, join


logger = logging.get_logger(__name__)


@dataclass
class Teacher:
    """A frozen denoiser, or a frozen consistency model, which knows the ends of trajectories only.

    Args:
        network: F, in evaluation mode, without gradient.
        scheduler: an `EDMHeunScheduler` with its levels and preconditioning, which samples it if it is a denoiser.
        id2label: names of its classes, if it carries them.
        name: the folder or repository that it came from.
        revision: the commit of that repository; None for a folder.
        null_class: its label that means "no class", if it was trained with label dropout.
    """

    network: UNet2DModel | EDMUNet2DModel
    scheduler: EDMHeunScheduler
    id2label: dict[int, str] | None = None
    name: str | None = None
    revision: str | None = None
    null_class: int | None = None

    @property
    def preconditioning(self) -> Preconditioning:
        return self.scheduler.preconditioning

    @property
    def is_consistency_model(self) -> bool:
        return not self.preconditioning.kind.is_denoiser

    is_guided = False
    evaluations = 1

    def denoise(self, x: torch.Tensor, sigma: torch.Tensor, class_labels: torch.Tensor | None = None) -> torch.Tensor:
        """D(x, sigma) of a denoiser, x of shape (B, C, H, W), sigma of shape (B,); with gradient if `x` has."""
        return self.preconditioning.denoise(self.network, x, sigma, **condition(class_labels))

    @torch.no_grad()
    def jump_to_end(self, x_t: torch.Tensor, t: torch.Tensor, class_labels: torch.Tensor | None = None) -> torch.Tensor:
        """f(x_t, t), the state at sigma_min, of a consistency model (Song et al. 2023, Eq. 5). No gradient."""
        end = torch.full_like(t, self.scheduler.config.sigma_min)
        g = self.preconditioning.g(self.network, x_t, t, **condition(class_labels))  # of its only jump, to sigma_min
        return jump(x_t, g, t, end)


def load_teacher(options: TeacherOptions) -> Teacher:
    """The teacher that the options name: the one network in its folder or Hub repository, and its scheduler's config.

    The network's files lie in a subfolder (`unet`) or at the top. Raises UserError if it is not there, cannot be read,
    holds no or several networks, or has an unknown scheduler.
    """
    name = options.teacher
    label, here = f"--teacher {name}", "" if os.path.isdir(name) else "No such folder is here. "
    advice = (
        f"{here}It must be a folder or a Hub repository with `unet` and `scheduler`; a private repository needs `hf "
        "auth login` or HF_TOKEN."
    )
    with loading(label, advice):
        source = Source(name, options.teacher_revision)
        folder = source.choose_network(options.teacher_subfolder)
        network = source.load_network(folder)
        scheduler_config = source.scheduler(folder)
        index = source.json(join(os.path.dirname(folder), "model_index.json"))
    null_class = index.get("null_class")
    _check_network(label, network, null_class)
    id2label = _read_labels(label, index.get("id2label") or {})
    scheduler = _make_scheduler(label, scheduler_config, options)
    return Teacher(network.float().requires_grad_(False).eval(), scheduler, id2label, name, source.revision, null_class)


def _check_network(label: str, network: UNet2DModel, null_class: int | None) -> None:
    """Raise UserError if the network is of a kind that cannot be a teacher."""
    config = network.config
    embedding, classes = config.get("class_embed_type"), config.num_class_embeds
    faults = [
        (
            config.in_channels != config.out_channels,
            f"gives {config.out_channels} channels for {config.in_channels}, such as a network that also predicts "
            "variances. It must predict one value per pixel",
        ),
        (
            config.get("time_embedding_type") == "learned",
            "has time_embedding_type 'learned', which knows whole timesteps only; it cannot be used",
        ),
        (
            embedding is not None,
            f"has class_embed_type {embedding!r}: it is conditional on numbers that are no classes, which is not "
            "supported",
        ),
        (
            config.sample_size is None,
            "does not say the size of its images: write sample_size to the config.json of the network",
        ),
        (
            null_class is not None and null_class != (classes or 0) - 1,
            f"has null_class {null_class!r} in model_index.json: it must be the last of the network's {classes} labels",
        ),
    ]
    for is_so, fault in faults:
        if is_so:
            raise UserError(f"{label} {fault}.")


def _read_labels(label: str, labels: object) -> dict[int, str] | None:
    """The names of the classes by number; None if there are none."""
    try:
        return {int(number): str(name) for number, name in labels.items()} or None
    except (AttributeError, ValueError) as error:
        raise UserError(f'{label}: id2label in model_index.json must be like {{"0": "airplane"}}.') from error


def _make_scheduler(label: str, config: dict, options: TeacherOptions) -> EDMHeunScheduler:
    """The teacher's levels and preconditioning from the config of any scheduler, and what options say instead."""
    given = {"prediction_type": options.teacher_prediction_type, "timestep_scale": options.teacher_timestep_scale}
    given = {name: value for name, value in given.items() if value is not None}
    if not config:
        if "prediction_type" not in given:
            raise UserError(
                f"{label} has no scheduler_config.json, which says what the network predicts. Say it with "
                "--teacher_prediction_type; the rest is then as in diffusers' scheduler of that kind."
            )
        kind = PREDICTIONS[given["prediction_type"]]
        if kind.edm_scheduler_type and "timestep_scale" not in given:
            raise UserError(
                f"{label} has no scheduler_config.json: say --teacher_timestep_scale too, 1 for NVIDIA's EDM, 1000 for "
                "OpenAI's."
            )
        config = {"_class_name": kind.default_scheduler}
        logger.warning(f"{label} has no scheduler_config.json; taking the defaults of {config['_class_name']}.")
    try:
        own = own_config(config)
        if not own.keys() & {"sigma_data", "prediction_type"} and "prediction_type" not in given:
            raise UserError(
                f"{label} has a {config.get('_class_name')}, which is not known: not of the EDM family, and without "
                "betas, flow or scores. Say --teacher_prediction_type."
            )
        return EDMHeunScheduler.from_config({**own, **given})
    except ValueError as error:
        said = "".join(f" --teacher_{name} {value}" for name, value in given.items())
        raise UserError(f"{label}{said} does not fit its scheduler_config.json: {error}") from error
