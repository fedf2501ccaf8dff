# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Distill a diffusion model into a CTM: `python -m training.train_ctm --config training/configs/digits.yaml`."""

import copy
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import psutil
import torch

from diffusers_ctm import CTMPipeline, CTMScheduler, CTMUNet2DModel, EDMUNet2DModel
from diffusers_ctm.preconditioning import condition

from .cli.errors import UserError
from .cli.options import option, run_program, with_default
from .cli.shared_options import NetworkOptions, TeacherOptions
from .cli.training_options import RunOptions, StudentOptions
from .data.batches import load_images
from .data.latents import Autoencoder
from .networks.autoencoder import load_autoencoder
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
from .objective.derivatives import is_random
from .objective.distances import PIXEL_DISTANCES, DistanceOptions, make_distance
from .objective.jumps import Jumps, TeacherDenoiser, TeacherSolver, noised, student_images
from .objective.losses import Adversary, ScoreMatching, ScoreMatchingOptions, training_loss
from .objective.objectives import ObjectiveOptions
from .objective.pool import TrajectoryPool
from .objective.solvers import SOLVERS, TargetOptions
from .objective.times import TimeOptions, Times, TimeSampler, draw_half_lognormal_sigma, draw_lognormal_sigma
from .run.batch import Batch, StepRandom
from .run.checkpoints import number_classes_as_before
from .run.loop import TrainingRun


@dataclass
class CTMConfig(
    DiscriminatorOptions,
    ScoreMatchingOptions,
    DistanceOptions,
    ObjectiveOptions,
    StudentOptions,
    RunOptions,
    TeacherOptions,
):
    """Distill a diffusion model into a CTM (Kim et al. 2024), or train one without a teacher."""

    PROGRAM = "training.train_ctm"

    output_dir: str = with_default(RunOptions, "output_dir", "runs/ctm")
    teacher: str | None = option(
        None,
        "The teacher: a folder or a repository on the Hub with a diffusion model of pixels or latents (U-Net, EDM2 or "
        "DiT) and its scheduler: EDM, DDPM, flow matching, variance-exploding scores; a consistency model with "
        "--matching global --dsm_adaptive false.",
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
            self.refuse(["dsm_target"], "does not go with --solver_model ema: the average would learn from itself")
        if self.matching == "global":
            self.refuse(["inner_target"], "does not go with --matching global, which has no inner jump")
        late = self.stages[-1]
        self.check(
            late.start < self.max_train_steps,
            "objective",
            f"such that {late.name} begins before --max_train_steps {self.max_train_steps}",
        )
        if "semigroup" in {stage.name for stage in self.stages}:
            self.check(
                self.dsm_weight > 0, "dsm_weight", "above 0 with semigroup, which learns the denoiser from it alone"
            )
        self.check(
            self.dsm_share * self.train_batch_size >= 2 or self.dsm_share == 1,
            "dsm_share",
            f"at least 2 of the {self.train_batch_size} images of --train_batch_size",
        )
        if self.discriminator_weight == 0:
            self.refuse([entry.name for entry in fields(DiscriminatorOptions)], "needs --discriminator_weight")


def check_consistency_teacher(config: CTMConfig) -> None:
    """Raise UserError if the options ask a teacher that is a consistency model for what it does not know."""
    name = f"--teacher {config.teacher} is a consistency model"
    if config.matching != "global" or config.objective != ["ctm"]:
        raise UserError(
            f"{name}: it knows jumps to sigma_min and no solver's steps. Give --matching global with --objective ctm, "
            "which then learns those jumps, or distill the diffusion model that it came from."
        )
    idle = ["solver", "solver_model", "max_solver_steps", "pool_size", "dsm_target"]
    config.refuse(idle, f"has no use: {name}, and no solver runs")
    if config.dsm_adaptive:  # always, unless score matching runs
        raise UserError(
            f"{name}, and the student starts as its copy: at first the trajectory loss has no gradient to weigh score "
            "matching by, and without score matching nothing would be learned. Give --dsm_adaptive false and a "
            "--dsm_weight above 0."
        )


def choose_autoencoder(config: CTMConfig, teacher: Teacher | None) -> Autoencoder | None:
    """The autoencoder whose latents are learned: the teacher's, or that of --vae. None: pixels.

    Raises UserError for two of them, and for options that see images, which latents are not.
    """
    autoencoder = teacher and teacher.autoencoder
    if config.vae is not None:
        if autoencoder is not None:
            raise UserError(f"--vae is not needed: --teacher {teacher.name} brings its own autoencoder. Leave it out.")
        autoencoder = load_autoencoder(config.vae, config.vae_revision, config.vae_unit_range)
    if autoencoder is not None:
        sees = "sees images, and the run learns latents"
        config.check(config.distance in PIXEL_DISTANCES, "distance", f"l2 or pseudo_huber: another {sees}")
        config.check(config.discriminator_weight == 0, "discriminator_weight", f"0: the discriminator {sees}")
        config.check(not config.streaming, "streaming", "false: latents are encoded once")
    return autoencoder


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


def make_denoiser(config: TargetOptions, teacher: Teacher, student_ema: torch.nn.Module) -> TeacherDenoiser:
    """The denoiser that is followed: the teacher's, or the average's; of a consistency model the jumps to the end."""
    if teacher.is_consistency_model:
        return teacher.jump_to_end
    if config.solver_model == "teacher":
        return teacher.denoise
    return lambda x, sigma, labels: teacher.preconditioning.g(student_ema, x, sigma, sigma, **condition(labels))


def match_scores(
    config: ScoreMatchingOptions,
    images: torch.Tensor,
    sigma: torch.Tensor,
    noise: torch.Tensor,
    labels: torch.Tensor | None,
    denoise: TeacherDenoiser | None,
    first: int,
) -> ScoreMatching:
    """The score matching of a pass, whose first image is number `first` of the step.

    Its target is what `denoise` makes of the noisy images, or they themselves.
    """
    if config.dsm_share < 1:
        # By pairs, of which `half_lognormal` draws one level low and one high.
        pairs = (torch.arange(len(images)) + first) // 2
        rows = (((pairs + 1) * config.dsm_share).floor() > (pairs * config.dsm_share).floor()).nonzero().flatten()
        rows = rows.to(images.device, non_blocking=True)
        images, sigma, noise = images[rows], sigma[rows], noise[rows]
        labels = None if labels is None else labels[rows]
    x = noised(images, sigma, noise)
    target = images if denoise is None else denoise(x, sigma, labels)
    return ScoreMatching(x, sigma, target, labels, config.dsm_weight, config.dsm_adaptive)


class Asked:
    """A denoiser that counts its network evaluations, one for each image, as "teacher_evaluations" of a run's record.

    Args:
        denoise: the denoiser.
        each: evaluations of its networks for an image, over all processes.
        record: of the run.
    """

    def __init__(self, denoise: TeacherDenoiser, each: int, record: dict):
        self.denoise, self.each, self.record = denoise, each, record
        record["teacher_evaluations"] = 0

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        self.record["teacher_evaluations"] += self.each * len(x)
        return self.denoise(x, sigma, labels)

    def state_dict(self, gather: Callable) -> dict:
        return {"evaluations": self.record["teacher_evaluations"]}

    def load_state_dict(self, state: dict) -> None:
        self.record["teacher_evaluations"] = state["evaluations"]


def make_pool(config: ObjectiveOptions, sampler: TimeSampler, run: TrainingRun) -> TrajectoryPool:
    """The pool that the options describe, empty. Raises UserError if it takes more memory than is free."""
    shape = run.dataset.channels, run.dataset.resolution, run.dataset.resolution
    own = run.samples_per_step // run.accelerator.num_processes
    needed = 4 * own * sampler.num_levels * math.prod(shape)  # for one trajectory of each image
    free = psutil.virtual_memory().available  # a pool lies there, or in less than a GPU has
    config.check(
        config.pool_size * needed <= free,
        "pool_size",
        f"at most {free // needed}: each takes {needed / 2**30:.2g} GiB in each process, {free / 2**30:.1f} GiB are "
        "free",
    )
    total = run.samples_per_step
    return TrajectoryPool(config, SOLVERS[config.solver], sampler, total, run.own_samples, run.device)


def make_solver(config: TargetOptions, teacher: Teacher, denoise: TeacherDenoiser) -> TeacherSolver:
    """From t to u: along a score, or the jump to the end of a consistency model."""
    if teacher.is_consistency_model:
        return lambda x, levels, labels: denoise(x, levels[0], labels)
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


def main(config: CTMConfig, on_step: Callable[[TrainingRun], None] | None = None) -> str:
    """Distill, and save the averaged student as a pipeline; return its folder. Each step ends with `on_step(run)`."""
    teacher = None if config.teacher is None else load_teacher(config)
    autoencoder = choose_autoencoder(config, teacher)
    dataset = load_images(config, autoencoder)
    number_classes_as_before(dataset, config)
    torch.manual_seed(config.seed)
    teacher = teacher or untrained(config, dataset)
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
            **dataset.pipeline_options,
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
        revisions={
            **{role: part.revision for role, part in teacher.parts.items()},
            **({} if autoencoder is None else {"vae": autoencoder.revision}),
        },
        on_step=on_step,
    )
    if config.lagrangian_gradient == "full" and is_random(run.bare_network):
        raise UserError(
            "--lagrangian_gradient full learns from the difference of two answers, and dropout makes that noise. Give "
            "--dropout 0, or --lagrangian_gradient semi."
        )
    run.folder.record |= {"objective": config.objective, "pool_size": config.pool_size or 0}
    if autoencoder is not None and config.vae is None:
        run.folder.record["vae"] = autoencoder.record or run.folder.record.get("teacher")
    run.folder.record["distance"] = distance.to(run.device).about
    if config.solver_model == "teacher":
        for part in teacher.parts.values():
            run.speed_up(run.place(part.network))
    sampler = time_sampler(config, scheduler)
    evaluations = run.accelerator.num_processes * (teacher.evaluations if config.solver_model == "teacher" else 1)
    denoise = Asked(make_denoiser(config, teacher, run.ema.module), evaluations, run.folder.record)
    run.keep("teacher", denoise)
    solver = make_solver(config, teacher, denoise)
    pool = None
    if config.pool_size:
        pool = make_pool(config, sampler, run)
        run.keep("pool", pool)
    discriminator = None
    if judge is not None:
        judge = run.place(judge)
        discriminator = run.add_network("discriminator", judge, discriminator_optimizer(config, judge))
    size = (dataset.resolution, dataset.resolution)

    samplers = {"matching": sampler, "global": replace(sampler, matching="global")}
    draws = {kind: each.draw_to_end if teacher.is_consistency_model else each.draw for kind, each in samplers.items()}
    draws["between"] = sampler.draw_between

    def draw_states(kind: str, batch: Batch, labels: torch.Tensor | None) -> tuple[Times, torch.Tensor, ...]:
        """Times, x_t, x_u if it is known, and classes of a pass: from the pool, or its images with noise."""
        random, images = batch.random, batch.images
        if pool is not None and kind in samplers:
            noise = functools.partial(random.normal, *images.shape[1:])
            return pool.draw(run.step, random.own, images, labels, noise, denoise, samplers[kind], random.host)
        times = draws[kind](random.total, random.host)[random.own]
        return times, noised(images, times.t, random.normal(*images.shape[1:])), None, labels

    for batch in run.batches():
        with run.accumulate(), run.accelerator.autocast():
            random, images, stage = batch.random, batch.images, config.stage_at(run.step)
            labels = batch.dropped_labels(drop_labels, teacher.null_class)
            discriminates = is_discriminator_step(config, run.step)
            fights = discriminator is not None and run.step >= config.discriminator_start
            run.announce(stage.name + (", adversarial" if fights else ""))
            times, x_t, x_u, jump_labels = draw_states(stage.objective.times, batch, labels)
            jumps = Jumps(
                run.bare_network if discriminates else run.network,
                run.ema.module,
                scheduler.preconditioning,
                times,
                x_t,
                jump_labels,
                solver,
                denoise,
                x_u,
                distance,
                1.0 if config.init_from else run.step / config.max_train_steps,
            )
            if discriminates:
                augment = discriminator.bare.draw_augment(random.uniform, *size, parts=2)
                loss = discriminator_loss(discriminator.network, images, student_images(jumps), augment)
                run.update(loss, {"discriminator_loss": loss}, network="discriminator")
                continue
            score_matching = adversary = None
            sigma, noise = draw_dsm_sigma(config, scheduler, random), random.normal(*images.shape[1:])
            if config.dsm_weight > 0:
                by = denoise if teacher.is_guided or config.dsm_target == "teacher" else None
                score_matching = match_scores(config, images, sigma, noise, labels, by, random.own.start)
            if fights:
                adversary = make_adversary(config.discriminator_weight, discriminator.bare, random, size)
            loss = training_loss(
                functools.partial(stage.objective.terms, options=config),
                jumps,
                last_weight=lambda: run.bare_network.last_layer.weight,
                score_matching=score_matching,
                adversary=adversary,
                beside=stage.objective.beside(jumps, config),
                reduce_gradient=lambda gradient: run.accelerator.reduce(gradient, "mean"),
            )
            if loss.dsm_samples is not None:
                run.note_by_level("dsm_loss_by_sigma", loss.dsm_samples, score_matching.sigma)
            run.update(loss.total, loss.terms)
    return run.finish()


if __name__ == "__main__":
    run_program(main, CTMConfig)
