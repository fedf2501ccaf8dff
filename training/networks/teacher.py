# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""A teacher: a frozen denoiser, its preconditioning, and the repository and commit that it was loaded from.

A further class of networks begins in `source.NETWORKS`, a further scheduler in `diffusers_ctm/scheduler_configs.py`,
and a further kind of prediction in `PREDICTIONS` of `diffusers_ctm/preconditioning.py`.
"""

import functools
import os
from dataclasses import dataclass, replace

import torch
from diffusers.utils import logging

from diffusers_ctm import EDMHeunScheduler
from diffusers_ctm.preconditioning import PREDICTIONS, Preconditioning, condition
from diffusers_ctm.scheduler_configs import own_config
from diffusers_ctm.scheduling_karras import KarrasSchedulerMixin
from diffusers_ctm.trajectory import jump
from diffusers_ctm.two_times import image_size

from ..cli.device import say
from ..cli.errors import UserError, loading
from ..cli.shared_options import TeacherOptions
from ..data.latents import Autoencoder
from ..official.edm2 import note_on_weights
from .autoencoder import autoencoder_of
from .source import Network, Source, join


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
        guidance_scale: w of D_ref + w (D - D_ref); 1 is no guidance.
        reference: the teacher of D_ref; None is this one itself without class, which needs a `null_class`.
        autoencoder: that of its pipeline, if it works on latents.
    """

    network: Network
    scheduler: EDMHeunScheduler
    id2label: dict[int, str] | None = None
    name: str | None = None
    revision: str | None = None
    null_class: int | None = None
    guidance_scale: float = 1.0
    reference: "Teacher | None" = None
    autoencoder: Autoencoder | None = None

    @property
    def preconditioning(self) -> Preconditioning:
        return self.scheduler.preconditioning

    @property
    def is_consistency_model(self) -> bool:
        return not self.preconditioning.kind.is_denoiser

    @property
    def is_guided(self) -> bool:
        return self.guidance_scale != 1

    @property
    def evaluations(self) -> int:
        """Network evaluations per image of one call of `denoise`."""
        return 2 if self.is_guided else 1

    @property
    def parts(self) -> dict[str, "Teacher"]:
        """This teacher and the one that guides it, by the options that name them."""
        return {"teacher": self} if self.reference is None else {"teacher": self, "guidance_teacher": self.reference}

    def denoise(self, x: torch.Tensor, sigma: torch.Tensor, class_labels: torch.Tensor | None = None) -> torch.Tensor:
        """D(x, sigma) of a denoiser, x of shape (B, C, H, W), sigma and labels of shape (B,); with gradient if `x` has.

        A guided teacher gives D_ref + w (D - D_ref): classifier-free guidance (Ho & Salimans 2022), one batch of 2B, or
        autoguidance (Karras et al. 2024, "Guiding a diffusion model with a bad version of itself"), two networks. An
        image without class is its own reference in the first.
        """
        own = functools.partial(self.preconditioning.denoise, self.network)
        if not self.is_guided:
            return own(x, sigma, **condition(class_labels))
        if self.reference is None:
            null = torch.full_like(class_labels, self.null_class)
            both = own(torch.cat([x, x]), torch.cat([sigma, sigma]), class_labels=torch.cat([class_labels, null]))
            denoised, reference = both.chunk(2)
        else:
            denoised = own(x, sigma, **condition(class_labels))
            knows_classes = self.reference.network.config.num_class_embeds is not None
            reference = self.reference.denoise(x, sigma, class_labels if knows_classes else None)
        return reference + self.guidance_scale * (denoised - reference)

    @torch.no_grad()
    def jump_to_end(self, x_t: torch.Tensor, t: torch.Tensor, class_labels: torch.Tensor | None = None) -> torch.Tensor:
        """f(x_t, t), the state at sigma_min, of a consistency model (Song et al. 2023, Eq. 5). No gradient."""
        end = torch.full_like(t, self.scheduler.config.sigma_min)
        g = self.preconditioning.g(self.network, x_t, t, **condition(class_labels))  # of its only jump, to sigma_min
        return jump(x_t, g, t, end)


def load_teacher(options: TeacherOptions) -> Teacher:
    """The teacher that the options name, with the one that guides it.

    Raises UserError if a network cannot be loaded (`_load`) or cannot guide or be guided.
    """
    given = {"prediction_type": options.teacher_prediction_type, "timestep_scale": options.teacher_timestep_scale}
    given = {name: value for name, value in given.items() if value is not None}
    teacher = _load("teacher", options.teacher, options.teacher_revision, options.teacher_subfolder, given)
    if not options.teacher_is_guided:
        return teacher
    if teacher.is_consistency_model:
        raise UserError(
            f"--teacher_guidance_scale is for denoisers, and --teacher {options.teacher} is a consistency model; leave "
            "it out."
        )
    if options.guidance_teacher is not None:
        folder, revision = options.guidance_teacher_subfolder, options.guidance_teacher_revision
        reference = _load("guidance_teacher", options.guidance_teacher, revision, folder)
        _check_reference(reference, teacher)
        teacher = replace(teacher, reference=reference)
    elif teacher.null_class is None:
        raise UserError(
            f"--teacher_guidance_scale {options.teacher_guidance_scale:g} needs --guidance_teacher, or a teacher that "
            f"was trained with label dropout: --teacher {options.teacher} has no label for 'no class'."
        )
    return replace(teacher, guidance_scale=options.teacher_guidance_scale)


def _load(
    option: str, name: str, revision: str | None, subfolder: str | None, given: dict[str, str | float] | None = None
) -> Teacher:
    """The one network in a folder or Hub repository, and its scheduler's config.

    The network's files lie in a subfolder (`unet`) or at the top. Raises UserError if it is not there, cannot be read,
    holds no or several networks, or has an unknown scheduler.

    Args:
        option: the option that gave the name, for messages.
        given: entries of the scheduler's config that options give instead; None: there are no such options.
    """
    label, here = f"--{option} {name}", "" if os.path.isdir(name) else "No such folder is here. "
    advice = (
        f"{here}It must be a folder or a Hub repository with `unet` and `scheduler`; a private repository needs `hf "
        "auth login` or HF_TOKEN."
    )
    with loading(label, advice):
        source = Source(name, revision, option)
        folder = source.choose_network(subfolder)
        network = source.load_network(folder)
        scheduler_config = source.scheduler(folder)
        index = source.json(join(os.path.dirname(folder), "model_index.json"))
        beside = source.choose_autoencoder(folder)
        autoencoder = None if beside is None else autoencoder_of(source, beside)
        null_class = source.null_class(folder)
    _check_network(label, network, null_class)
    if note := note_on_weights(network):
        say(f"Note on {label}: {note}")
    id2label = _read_labels(label, index.get("id2label") or {})
    scheduler = _make_scheduler(label, scheduler_config, given)
    return Teacher(
        network.float().requires_grad_(False).eval(),
        scheduler,
        id2label,
        name,
        source.revision,
        null_class,
        autoencoder=autoencoder,
    )


def _check_reference(reference: Teacher, teacher: Teacher) -> None:
    """Raise UserError if `reference` cannot guide `teacher`: it must denoise the same images and classes."""

    label = f"--guidance_teacher {reference.name}"
    if reference.is_consistency_model:
        raise UserError(f"{label} is a consistency model, which is no denoiser. Give a diffusion model.")
    both = (reference, teacher)
    facts = {"images of shape": [(each.network.config.out_channels, *image_size(each.network)) for each in both]}
    if reference.network.config.num_class_embeds is not None:  # one without classes guides all of them alike
        facts["num_class_embeds"] = [each.network.config.num_class_embeds for each in both]
        facts["null_class"] = [each.null_class for each in both]
    if reference.id2label and teacher.id2label:  # names that one of them lacks cannot be compared
        for number, name in teacher.id2label.items():
            facts[f"the class {number}"] = [reference.id2label.get(number), name]
    for what, (has, needed) in facts.items():
        if has != needed:
            raise UserError(
                f"{label} has {what} {has!r}, and --teacher {teacher.name} {needed!r}. Give a model of the same "
                "images, classes and numbers of classes."
            )


def check_levels(teacher: Teacher, scheduler: KarrasSchedulerMixin) -> None:
    """Raise UserError if the one that guides `teacher` does not know the noise levels of `scheduler`."""
    if teacher.reference is None:
        return
    ends = {name: scheduler.config[name] for name in ("sigma_min", "sigma_max")}
    try:
        EDMHeunScheduler.from_config(teacher.reference.scheduler.config, **ends)
    except ValueError as error:
        raise UserError(
            f"--guidance_teacher {teacher.reference.name} does not know the noise levels of --teacher {teacher.name}: "
            f"{error} Give another one; a student may also have fewer levels, by --sigma_min and --sigma_max."
        ) from error


def _check_network(label: str, network: Network, null_class: int | None) -> None:
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


def _make_scheduler(label: str, config: dict, given: dict[str, str | float] | None) -> EDMHeunScheduler:
    """Levels and preconditioning from the config of any scheduler, and what options say instead, as in `_load`."""
    if given is None and not config:
        raise UserError(
            f"{label} has no scheduler_config.json, which says what the network predicts. Save its scheduler beside it."
        )
    advice = "Say --teacher_prediction_type." if given is not None else "Give another model."
    given = given or {}
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
                f"betas, flow or scores. {advice}"
            )
        return EDMHeunScheduler.from_config({**own, **given})
    except ValueError as error:
        said = "".join(f" --teacher_{name} {value}" for name, value in given.items())
        raise UserError(f"{label}{said} does not fit its scheduler_config.json: {error}") from error
