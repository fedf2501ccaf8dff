# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Distill a diffusion model into a CTM: `python -m training.train_ctm --config training/configs/digits.yaml`."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch

from diffusers_ctm import CTMPipeline, CTMScheduler, CTMUNet2DModel, EDMUNet2DModel
from diffusers_ctm.preconditioning import condition

from .cli.errors import UserError
from .cli.options import option, run_program, with_default
from .cli.shared_options import NetworkOptions, TeacherOptions
from .cli.training_options import RunOptions, StudentOptions
from .data.batches import load_images
from .networks.student import check_fit, choose_precision, label_dropout, make_student, student_scheduler, untrained
from .networks.teacher import Teacher, load_teacher
from .objective.adversarial import (
    DiscriminatorOptions,
    ProjectedDiscriminator,
    check_single_images,
    discriminator_loss,
    discriminator_optimizer,
    generator_loss,
    generator_weight,
    is_discriminator_step,
    make_discriminator,
)
from .objective.distances import DistanceOptions, make_distance
from .objective.losses import (
    Adversary,
    Jumps,
    ScoreMatching,
    ScoreMatchingOptions,
    TeacherSolver,
    ctm_estimate,
    ctm_loss,
)
from .objective.solvers import SOLVERS, TargetOptions
from .objective.times import TimeOptions, TimeSampler, draw_half_lognormal_sigma, draw_lognormal_sigma
from .run.batch import StepRandom
from .run.checkpoints import number_classes_as_before
from .run.loop import TrainingRun


@dataclass
class CTMConfig(
    DiscriminatorOptions,
    ScoreMatchingOptions,
    DistanceOptions,
    TargetOptions,
    TimeOptions,
    StudentOptions,
    RunOptions,
    TeacherOptions,
):
    """Distill a diffusion model into a CTM (Kim et al. 2024), or train one without a teacher."""

    PROGRAM = "training.train_ctm"

    output_dir: str = with_default(RunOptions, "output_dir", "runs/ctm")
    teacher: str | None = option(
        None,
        "The teacher: a folder or a repository on the Hub with a pixel diffusion model (UNet2DModel) and its "
        "scheduler: EDM, DDPM, flow matching, variance-exploding scores; a consistency model with --matching global "
        "--dsm_adaptive false.",
        recorded=False,
    )

    def __post_init__(self) -> None:
        """Refuse what another choice makes meaningless."""
        super().__post_init__()
        if self.teacher is None and self.solver_model == "teacher":
            raise UserError(
                "--teacher is needed: a folder or a repository on the Hub with `unet` and `scheduler`. To train "
                "without one, give --solver_model ema."
            )
        if self.teacher is not None:
            self.refuse([entry.name for entry in fields(NetworkOptions)], "is for a run without --teacher")
        if self.solver_model == "ema":
            self.refuse(["teacher_guidance_scale"], "has no use with --solver_model ema: no solver asks the teacher")
        if self.matching == "global":
            self.refuse(["inner_target"], "does not go with --matching global, which has no inner jump")
        if self.discriminator_weight == 0:
            self.refuse([entry.name for entry in fields(DiscriminatorOptions)], "needs --discriminator_weight")


def check_consistency_teacher(config: CTMConfig) -> None:
    """Raise UserError if the options ask a teacher that is a consistency model for what it does not know."""
    name = f"--teacher {config.teacher} is a consistency model"
    if config.matching != "global":
        raise UserError(
            f"{name}: it knows jumps to sigma_min and no solver's steps. Give --matching global, which then learns "
            "those jumps, or distill the diffusion model that it came from."
        )
    config.refuse(["solver", "solver_model", "max_solver_steps"], f"has no use: {name}, and no solver runs")
    if config.dsm_adaptive:  # always, unless score matching runs
        raise UserError(
            f"{name}, and the student starts as its copy: at first the trajectory loss has no gradient to weigh score "
            "matching by, and without score matching nothing would be learned. Give --dsm_adaptive false and a "
            "--dsm_weight above 0."
        )


def draw_dsm_sigma(config: ScoreMatchingOptions, scheduler: CTMScheduler, random: StepRandom) -> torch.Tensor:
    """Levels of denoising score matching, shape (B,)."""
    noise, ramp = random.normal(), random.uniform()
    low, high = scheduler.config.sigma_min, scheduler.config.sigma_max
    if config.dsm_sigma == "lognormal":
        sigma = draw_lognormal_sigma(noise)
    else:
        sigma = draw_half_lognormal_sigma(noise, ramp, low, high, scheduler.config.rho, random.own.start)
    return sigma if scheduler.preconditioning.kind.learned_every_level else sigma.clamp(low, high)


def time_sampler(config: TimeOptions, scheduler: CTMScheduler) -> TimeSampler:
    """The sampler of (t, u, s) that the options describe."""
    return TimeSampler(
        num_levels=config.num_train_timesteps,
        sigma_min=scheduler.config.sigma_min,
        sigma_max=scheduler.config.sigma_max,
        rho=scheduler.config.rho,
        matching=config.matching,
        max_steps=config.max_solver_steps,
    )


def make_solver(config: TargetOptions, teacher: Teacher, student_ema: torch.nn.Module) -> TeacherSolver:
    """The solver of `ctm_loss`: along a score, or the jump to the end of a consistency model."""
    if teacher.is_consistency_model:
        return lambda x, levels, labels: teacher.jump_to_end(x, levels[0], labels)

    def denoise(x: torch.Tensor, sigma: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        if config.solver_model == "teacher":
            return teacher.denoise(x, sigma, labels)
        return teacher.preconditioning.g(student_ema, x, sigma, sigma, **condition(labels))

    solve = SOLVERS[config.solver].solve
    return lambda x, levels, labels: solve(lambda x, sigma: denoise(x, sigma, labels), x, levels)


def make_adversary(
    weight: float, judge: ProjectedDiscriminator, random: StepRandom, size: tuple[int, int]
) -> Adversary:
    """The adversarial term of a step that trains the student, with `weight` beside its adaptive weight."""
    augment = judge.draw_augment(random.uniform, *size)
    return Adversary(
        lambda estimate: generator_loss(judge, estimate, augment),
        lambda *gradients: weight * generator_weight(*gradients),
    )


def main(config: CTMConfig, on_step: Callable[[int], None] | None = None) -> str:
    """Distill, and save the averaged student as a pipeline; return its folder. Each step ends with `on_step(step)`."""
    dataset = load_images(config)
    number_classes_as_before(dataset, config)
    torch.manual_seed(config.seed)
    teacher = untrained(config, dataset) if config.teacher is None else load_teacher(config)
    check_fit(teacher, config, dataset)
    if teacher.is_consistency_model:
        check_consistency_teacher(config)
    config = choose_precision(config, teacher)
    scheduler = student_scheduler(teacher, config)
    drop_labels = label_dropout(teacher, config)
    # A feature network that cannot be loaded is an error before the run's folder exists. Loading may draw random
    # numbers: seed after it.
    distance = make_distance(config)
    judge = make_discriminator(config, dataset.channels, config.seed) if config.discriminator_weight > 0 else None
    if judge is not None and config.train_batch_size == 1:
        check_single_images(judge, dataset.channels, dataset.resolution)

    def make_pipeline(unet: CTMUNet2DModel | EDMUNet2DModel) -> CTMPipeline:
        return CTMPipeline(
            unet,
            copy.deepcopy(scheduler),
            id2label=teacher.id2label or dataset.id2label,
            null_class=teacher.null_class,
            trained_classes=dataset.trained_classes,
        )

    samples = {"1-step": {"num_inference_steps": 1}, "4-steps": {"num_inference_steps": 4}}
    torch.manual_seed(config.seed)
    student = make_student(teacher.network, config.dropout)
    run = TrainingRun(
        config,
        dataset,
        student,
        make_pipeline,
        samples,
        revisions={role: part.revision for role, part in teacher.parts.items()},
        on_step=on_step,
    )
    run.folder.record["distance"] = distance.to(run.device).about
    if config.solver_model == "teacher":
        for part in teacher.parts.values():
            run.speed_up(run.place(part.network))
    sampler = time_sampler(config, scheduler)
    draw_times = sampler.draw_to_end if teacher.is_consistency_model else sampler.draw
    solver = make_solver(config, teacher, run.ema.module)
    discriminator = None
    if judge is not None:
        judge = run.place(judge)
        discriminator = run.add_network("discriminator", judge, discriminator_optimizer(config, judge))
    size = (dataset.resolution, dataset.resolution)

    for batch in run.batches():
        with run.accumulate(), run.accelerator.autocast():
            random, images = batch.random, batch.images
            labels = batch.dropped_labels(drop_labels, teacher.null_class)
            times, noise = draw_times(random.total, random.host)[random.own], random.normal(*images.shape[1:])
            discriminates = is_discriminator_step(config, run.step)
            network = run.bare_network if discriminates else run.network
            jumps = Jumps(network, run.ema.module, scheduler.preconditioning, times, images, noise, labels)
            if discriminates:
                augment = discriminator.bare.draw_augment(random.uniform, *size, parts=2)
                loss = discriminator_loss(discriminator.network, images, ctm_estimate(jumps), augment)
                run.update(loss, {"discriminator_loss": loss}, network="discriminator")
                continue
            score_matching = adversary = None
            dsm_sigma, dsm_noise = draw_dsm_sigma(config, scheduler, random), random.normal(*images.shape[1:])
            if config.dsm_weight > 0:
                score_matching = ScoreMatching(dsm_sigma, dsm_noise, config.dsm_weight, config.dsm_adaptive)
            if discriminator is not None and run.step >= config.discriminator_start:
                adversary = make_adversary(config.discriminator_weight, discriminator.bare, random, size)
            loss = ctm_loss(
                jumps,
                solver,
                last_weight=lambda: run.bare_network.last_layer.weight,
                score_matching=score_matching,
                adversary=adversary,
                distance=distance,
                inner_target=config.inner_target or "ema",
                reduce_gradient=lambda gradient: run.accelerator.reduce(gradient, "mean"),
            )
            terms = {"trajectory_loss": loss.trajectory, "dsm_loss": loss.dsm, "dsm_weight": loss.dsm_weight}
            if adversary is not None:
                terms |= {"generator_loss": loss.generator, "generator_weight": loss.generator_weight}
            if loss.dsm_samples is not None:
                run.note_by_level("dsm_loss_by_sigma", loss.dsm_samples, dsm_sigma)
            run.update(loss.total, terms)
    return run.finish()


if __name__ == "__main__":
    run_program(main, CTMConfig)
