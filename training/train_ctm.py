"""Distil an EDM teacher into a CTM: `python -m training.train_ctm --config training/configs/digits.yaml`."""

import copy
import functools

import torch
from diffusers.models.resnet import ResnetBlock2D

from diffusers_ctm import CTMPipeline, CTMScheduler, CTMUNet2DModel
from diffusers_ctm.trajectory import karras_sigmas

from .config import CTMConfig, UserError, run_program
from .data import ImageDataset
from .losses import DISTANCES, ctm_loss
from .run import StepRandom, TrainingRun
from .solver import heun_solve
from .teacher import Teacher, load_teacher
from .time_sampling import draw_half_lognormal_sigma, draw_lognormal_sigma, draw_times


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
    """A CTMScheduler with the teacher's levels and preconditioning."""
    names = ("sigma_min", "sigma_max", "sigma_data", "rho", "prediction_type", "timestep_scale")
    numbers = {name: teacher.scheduler.config[name] for name in names}
    return CTMScheduler(num_train_timesteps=config.num_train_timesteps, **numbers)


def draw_dsm_sigma(config: CTMConfig, scheduler: CTMScheduler, random: StepRandom) -> torch.Tensor:
    """Levels of denoising score matching, shape (B,)."""
    noise, ramp = random.normal(), random.uniform()
    if config.dsm_sigma == "lognormal":
        return draw_lognormal_sigma(noise)
    numbers = scheduler.config
    return draw_half_lognormal_sigma(noise, ramp, numbers.sigma_min, numbers.sigma_max, numbers.rho, random.own.start)


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


def set_dropout(network: CTMUNet2DModel, probability: float) -> None:
    """As if `network` had been built with `dropout=probability`: in its residual blocks, not in attention."""
    network.register_to_config(dropout=probability)
    for module in network.modules():
        if isinstance(module, ResnetBlock2D):
            module.dropout.p = probability


def main(config: CTMConfig) -> str:
    """Distil, and save the averaged student as a pipeline; return its folder."""
    dataset = ImageDataset(config)
    teacher = load_teacher(config.teacher)
    check_fit(teacher, dataset)
    leave_out = label_dropout(teacher, config)
    torch.manual_seed(config.seed)
    try:
        student = CTMUNet2DModel.from_unet(teacher.network)
    except ValueError as error:
        raise UserError(f"--teacher {config.teacher} cannot become a CTM: {error}") from error
    if config.dropout is not None:
        set_dropout(student, config.dropout)
    scheduler = student_scheduler(teacher, config)
    numbers = scheduler.config

    def make_pipeline(unet: CTMUNet2DModel) -> CTMPipeline:
        id2label = teacher.id2label or dataset.id2label
        return CTMPipeline(unet, copy.deepcopy(scheduler), id2label=id2label, null_class=teacher.null_class)

    samples = {"1-step": {"num_inference_steps": 1}, "4-steps": {"num_inference_steps": 4}}
    run = TrainingRun(config, dataset, student, make_pipeline, samples)
    teacher.network.to(run.device, memory_format=torch.channels_last)
    levels = (config.num_train_timesteps, numbers.sigma_min, numbers.sigma_max, numbers.rho)
    grid = karras_sigmas(*levels, device=run.device)
    last_weight = run.bare_network.last_layer.weight

    for batch in run.batches():
        with run.accelerator.accumulate(run.network), run.accelerator.autocast():
            random, labels = batch.random, batch.dropped_labels(leave_out, teacher.null_class)
            solver = functools.partial(heun_solve, functools.partial(teacher.denoise, class_labels=labels), grid)
            times = draw_times(
                random.total,
                config.num_train_timesteps,
                config.matching,
                config.max_solver_steps,
                config.solver_steps_distribution,
                random.host,
            )[random.own]
            loss = ctm_loss(
                student=run.network,
                student_ema=run.ema.module,
                solver=solver,
                preconditioning=scheduler.preconditioning,
                grid=grid,
                times=times,
                x_0=batch.images,
                noise=random.normal(*batch.images.shape[1:]),
                dsm_sigma=draw_dsm_sigma(config, scheduler, random),
                dsm_noise=random.normal(*batch.images.shape[1:]),
                last_weight=last_weight,
                class_labels=labels,
                distance=DISTANCES[config.distance],
                inner_target=config.inner_target,
                dsm_weight=config.dsm_weight,
                dsm_adaptive=config.dsm_adaptive,
                reduce_gradient=lambda gradient: run.accelerator.reduce(gradient, "mean"),
            )
            terms = {"trajectory_loss": loss.trajectory, "dsm_loss": loss.dsm, "dsm_weight": loss.dsm_weight}
            run.update(loss.backward, terms)
    path = run.finish()
    run.accelerator.print(f"Saved {path}")
    return path


if __name__ == "__main__":
    run_program(main, CTMConfig)
