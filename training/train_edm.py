# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Train an EDM denoiser: `python -m training.train_edm --config training/configs/digits_edm.yaml`."""

import copy
from dataclasses import dataclass

import torch
from diffusers import UNet2DModel

from diffusers_ctm import CTMPipeline
from diffusers_ctm.preconditioning import condition

from .cli.options import BELOW_ONE, POSITIVE, option, run_program, with_default
from .cli.shared_options import NetworkOptions
from .cli.training_options import RunOptions
from .data.batches import load_images
from .networks.autoencoder import load_autoencoder
from .networks.build import build_scheduler, build_unet
from .objective.jumps import noised
from .objective.losses import dsm_loss, uncertainty_loss
from .objective.times import draw_lognormal_sigma
from .run.checkpoints import number_classes_as_before
from .run.loop import TrainingRun


@dataclass
class EDMConfig(NetworkOptions, RunOptions):
    """Train an EDM denoiser (Karras et al. 2022, Table 1), a teacher for `training.train_ctm`.

    With --architecture edm2 a learned uncertainty weighs the noise levels (Karras et al. 2024).
    """

    PROGRAM = "training.train_edm"

    output_dir: str = with_default(RunOptions, "output_dir", "runs/edm")
    optimizer: str = with_default(RunOptions, "optimizer", "adam")
    learning_rate: float = with_default(RunOptions, "learning_rate", 1e-3)
    dropout: float = option(0.0, "Dropout probability.", must_be=BELOW_ONE)
    label_dropout: float = option(
        0.0,
        "Probability of leaving the class of an image out, for classifier-free guidance (guidance_scale); 0.1 is "
        "usual. Above 0 the network gets one label more, 'no class'.",
        must_be=BELOW_ONE,
        needs="label_column",
    )
    sigma_min: float = option(0.002, "Lowest noise level when sampling.", must_be=POSITIVE)
    sigma_max: float = option(80.0, "Highest noise level when sampling.")
    p_mean: float = option(-1.2, "Mean of ln(sigma) in training.")
    p_std: float = option(1.2, "Standard deviation of ln(sigma) in training.", must_be=POSITIVE)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(self.sigma_max > self.sigma_min, "sigma_max", "above sigma_min")


def main(config: EDMConfig) -> str:
    """Train, and save the averaged network as a pipeline; return its folder."""
    autoencoder = load_autoencoder(config.vae, config.vae_revision, config.vae_unit_range) if config.vae else None
    dataset = load_images(config, autoencoder)
    number_classes_as_before(dataset, config)
    torch.manual_seed(config.seed)
    network = build_unet(config, dataset, config.dropout, config.label_dropout)
    scheduler = build_scheduler(config, config.sigma_min, config.sigma_max)
    null_class = dataset.num_classes if config.label_dropout else None

    def make_pipeline(unet: UNet2DModel) -> CTMPipeline:
        return CTMPipeline(
            unet,
            copy.deepcopy(scheduler),
            id2label=dataset.id2label,
            null_class=null_class,
            trained_classes=dataset.trained_classes,
            **dataset.pipeline_options,
        )

    run = TrainingRun(
        config,
        dataset,
        network,
        make_pipeline,
        {"heun-18": {"num_inference_steps": 18}},
        revisions=None if autoencoder is None else {"vae": autoencoder.revision},
    )
    for batch in run.batches():
        with run.accumulate(), run.accelerator.autocast():
            # Karras et al. 2022, Table 1: log-normal levels, weight 1 / c_out^2.
            sigma = draw_lognormal_sigma(batch.random.normal(), config.p_mean, config.p_std)
            noise = batch.random.normal(*batch.images.shape[1:])
            x_sigma = noised(batch.images, sigma, noise)
            labels = batch.dropped_labels(config.label_dropout, null_class)
            denoised = scheduler.preconditioning.denoise(run.network, x_sigma, sigma, **condition(labels))
            losses = dsm_loss(denoised, batch.images, sigma, config.sigma_data)
            run.note_by_level("dsm_loss_by_sigma", losses.detach(), sigma)
            loss = losses.mean()
            terms = {"dsm_loss": loss}
            if config.architecture == "edm2":
                u = run.bare_network.log_variance(scheduler.preconditioning.c_noise(sigma))
                loss = terms["uncertainty_loss"] = uncertainty_loss(losses, u).mean()
            run.update(loss, terms)
    return run.finish()


if __name__ == "__main__":
    run_program(main, EDMConfig)
