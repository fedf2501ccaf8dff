"""Distil a diffusion model into a CTM: `python -m training.train_ctm --config training/configs/digits.yaml`."""

import copy
import functools
from collections.abc import Callable

import torch

from diffusers_ctm import CTMPipeline, CTMScheduler, CTMUNet2DModel, EDMUNet2DModel

from .cli.errors import UserError
from .cli.options import run_program
from .cli.training_options import CTMConfig
from .data.batches import load_images
from .networks.student import check_fit, label_dropout, make_student, set_dropout, student_scheduler, untrained
from .networks.teacher import Teacher, teacher_of
from .objective.adversarial import (
    ProjectedDiscriminator,
    check_single_images,
    discriminator_loss,
    discriminator_optimizer,
    generator_loss,
    generator_weight,
    is_discriminator_step,
    make_discriminator,
)
from .objective.distances import make_distance
from .objective.losses import Solver, ctm_estimate, ctm_loss, make_jumps
from .objective.solvers import SOLVERS
from .objective.times import TimeSampler, draw_half_lognormal_sigma, draw_lognormal_sigma
from .run.batch import StepRandom
from .run.loop import TrainingRun


def check_consistency_teacher(teacher: Teacher, config: CTMConfig) -> None:
    """Raise UserError if the options ask a consistency model for what it does not know."""
    if not teacher.is_consistency_model:
        return
    if config.matching != "global":
        raise UserError(
            f"--teacher {config.teacher} is a consistency model: it knows jumps to sigma_min and no solver's steps. Give --matching global, which "
            "then learns those jumps, or distil the diffusion model that it came from."
        )
    solver_options = {
        "solver": "heun",
        "solver_substeps": 1,
        "solver_model": "teacher",
        "triples_per_path": 1,
        "max_solver_steps": None,
        "solver_steps_distribution": None,
        "solver_steps_per": None,
    }
    given = [f"--{name}" for name, default in solver_options.items() if getattr(config, name) != default]
    if given:
        raise UserError(
            f"--teacher {config.teacher} is a consistency model: no solver runs. Leave out {', '.join(given)}."
        )
    if config.dsm_adaptive:  # as it must be without score matching
        raise UserError(
            f"--teacher {config.teacher} is a consistency model, and the student starts as its copy: at first the trajectory loss has no gradient "
            "to weigh score matching by, and without score matching nothing would be learnt. Give --dsm_adaptive false and a "
            "--dsm_weight above 0."
        )


def choose_precision(teacher: Teacher, config: CTMConfig) -> None:
    """Train in float32 if left to us and the network's rounding would reach the image magnified by the noise level.

    g = x - sigma epsilon: one part in 256 of bfloat16 at sigma = 157 is 0.6, more than an image.
    """
    if config.mixed_precision == "auto" and teacher.preconditioning.kind.magnifies_rounding:
        config.mixed_precision = "no"


def draw_dsm_sigma(config: CTMConfig, scheduler: CTMScheduler, random: StepRandom) -> torch.Tensor:
    """Levels of denoising score matching, shape (B,)."""
    noise, ramp = random.normal(), random.uniform()
    numbers = scheduler.config
    levels = (numbers.sigma_min, numbers.sigma_max, numbers.rho)
    if config.dsm_sigma == "lognormal":
        sigma = draw_lognormal_sigma(noise)
    else:
        sigma = draw_half_lognormal_sigma(noise, ramp, *levels, random.own.start)
    if not scheduler.preconditioning.kind.learnt_every_level:
        sigma = sigma.clamp(numbers.sigma_min, numbers.sigma_max)
    return sigma


def time_sampler(config: CTMConfig, scheduler: CTMScheduler) -> TimeSampler:
    """What draws (t, u, s) as the options say."""
    return TimeSampler(
        num_levels=config.num_train_timesteps,
        sigma_min=scheduler.config.sigma_min,
        sigma_max=scheduler.config.sigma_max,
        rho=scheduler.config.rho,
        matching=config.matching,
        max_steps=config.max_solver_steps or (1 if config.matching == "local" else config.num_train_timesteps - 1),
        distribution=config.solver_steps_distribution or "weighted",
        per_sample=config.solver_steps_per == "sample",
        continuous=config.continuous_times,
        per_path=config.triples_per_path,
        substeps=config.solver_substeps,
    )


def make_solver(config: CTMConfig, teacher: Teacher, student_ema: torch.nn.Module) -> Solver:
    """The solver of `ctm_loss`: by the score of teacher or average, or the jump to the end of a consistency model."""
    if teacher.is_consistency_model:
        return lambda x, path, steps, labels: [x, teacher.jump_to_end(x, path[0], labels)]

    def score_of_student(x, sigma, *labels):
        condition = {"class_labels": labels[0]} if labels else {}
        return teacher.preconditioning.g(student_ema, x, sigma, sigma, **condition)

    denoiser = score_of_student if config.solver_model == "ema" else teacher.denoise
    return functools.partial(SOLVERS[config.solver], denoiser)


def adversarial_terms(
    config: CTMConfig, judge: ProjectedDiscriminator, random: StepRandom, size: tuple[int, int]
) -> dict[str, Callable]:
    """Arguments of `ctm_loss` for a step of the adversarial stage that trains the student."""
    augment = judge.draw_augment(random.uniform, *size)

    def weight(trajectory_gradient: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        scale = generator_weight(
            trajectory_gradient, gradient, config.discriminator_weight_min, config.discriminator_weight_max
        )
        return config.discriminator_weight * scale

    return {"generator_loss": lambda estimate: generator_loss(judge, estimate, augment), "generator_weight": weight}


def main(config: CTMConfig) -> str:
    """Distil, and save the averaged student as a pipeline; return its folder."""
    dataset = load_images(config)
    teacher = untrained(config, dataset) if config.teacher is None else teacher_of(config)
    check_fit(teacher, dataset)
    check_consistency_teacher(teacher, config)
    choose_precision(teacher, config)
    scheduler = student_scheduler(teacher, config)
    leave_out = label_dropout(teacher, config)
    # Feature networks that cannot be had are told of before the run exists, and what loading draws at random is drawn before the seed is set.
    distance = make_distance(config)
    judge = make_discriminator(config, dataset.channels, config.seed) if config.discriminator_weight > 0 else None
    if judge is not None and config.train_batch_size == 1:
        check_single_images(judge, dataset.channels, dataset.resolution)
    torch.manual_seed(config.seed)
    try:
        student = make_student(teacher.network)
    except ValueError as error:
        raise UserError(f"--teacher {config.teacher} cannot become a CTM: {error}") from error
    if config.dropout is not None:
        set_dropout(student, config.dropout)

    def make_pipeline(unet: CTMUNet2DModel | EDMUNet2DModel) -> CTMPipeline:
        id2label = teacher.id2label or dataset.id2label
        return CTMPipeline(unet, copy.deepcopy(scheduler), id2label=id2label, null_class=teacher.null_class)

    samples = {"1-step": {"num_inference_steps": 1}, "4-steps": {"num_inference_steps": 4}}
    run = TrainingRun(config, dataset, student, make_pipeline, samples)
    run.record["distance"] = distance.to(run.device).about
    if config.solver_model == "teacher":
        run.speed_up(run.place(teacher.network))
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
            random, labels = batch.random, batch.dropped_labels(leave_out, teacher.null_class)
            times, noise = draw_times(random.total, random.host)[random.own], random.normal(*batch.images.shape[1:])
            if is_discriminator_step(config, run.step):
                jumps = make_jumps(
                    run.bare_network, run.ema.module, scheduler.preconditioning, times, batch.images, labels
                )
                fake = ctm_estimate(jumps, batch.images, noise)
                augment = discriminator.bare.draw_augment(random.uniform, *size, parts=2)
                loss = discriminator_loss(discriminator.network, batch.images, fake, augment)
                run.update(loss, {"discriminator_loss": loss}, network="discriminator")
                continue
            dsm_sigma, dsm_noise = draw_dsm_sigma(config, scheduler, random), random.normal(*batch.images.shape[1:])
            adversarial = {}
            if discriminator is not None and run.step >= config.discriminator_start:
                adversarial = adversarial_terms(config, discriminator.bare, random, size)
            loss = ctm_loss(
                student=run.network,
                student_ema=run.ema.module,
                solver=solver,
                preconditioning=scheduler.preconditioning,
                times=times,
                x_0=batch.images,
                noise=noise,
                dsm_sigma=dsm_sigma,
                dsm_noise=dsm_noise,
                last_weight=lambda: run.bare_network.last_layer.weight,
                class_labels=labels,
                distance=distance,
                inner_target=config.inner_target or "ema",
                dsm_weight=config.dsm_weight,
                dsm_adaptive=config.dsm_adaptive,
                reduce_gradient=lambda gradient: run.accelerator.reduce(gradient, "mean"),
                **adversarial,
            )
            terms = {"trajectory_loss": loss.trajectory, "dsm_loss": loss.dsm, "dsm_weight": loss.dsm_weight}
            if adversarial:
                terms |= {"generator_loss": loss.generator, "generator_weight": loss.generator_weight}
            if loss.dsm_samples is not None:
                run.note_by_level("dsm_loss_by_sigma", loss.dsm_samples, dsm_sigma)
            run.update(loss.backward, terms)
    path = run.finish()
    run.accelerator.print(f"Saved {path}")
    return path


if __name__ == "__main__":
    run_program(main, CTMConfig)
