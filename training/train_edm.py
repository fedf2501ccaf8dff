"""Train an EDM denoiser: `python -m training.train_edm --config training/configs/digits_edm.yaml`."""

import copy

import torch
from diffusers import UNet2DModel

from diffusers_ctm import CTMPipeline

from .cli.options import run_program
from .cli.training_options import EDMConfig
from .data.batches import load_images
from .networks.build import build_scheduler, build_unet
from .objective.losses import dsm_loss
from .objective.times import draw_lognormal_sigma
from .run.loop import TrainingRun


def main(config: EDMConfig) -> str:
    """Train, and save the averaged network as a pipeline; return its folder."""
    dataset = load_images(config)
    torch.manual_seed(config.seed)
    network = build_unet(config, dataset, config.dropout, config.label_dropout)
    scheduler = build_scheduler(config, config.sigma_min, config.sigma_max)
    null_class = dataset.num_classes if config.label_dropout else None

    def make_pipeline(unet: UNet2DModel) -> CTMPipeline:
        return CTMPipeline(unet, copy.deepcopy(scheduler), id2label=dataset.id2label, null_class=null_class)

    run = TrainingRun(config, dataset, network, make_pipeline, {"heun-18": {"num_inference_steps": 18}})
    preconditioning = scheduler.preconditioning
    for batch in run.batches():
        with run.accumulate(), run.accelerator.autocast():
            # Karras et al. 2022, Table 1: log-normal levels, weight 1 / c_out^2.
            sigma = draw_lognormal_sigma(batch.random.normal(), config.p_mean, config.p_std)
            noise = batch.random.normal(*batch.images.shape[1:])
            x_sigma = batch.images + sigma[:, None, None, None] * noise
            labels = batch.dropped_labels(config.label_dropout, null_class)
            condition = {} if labels is None else {"class_labels": labels}
            denoised = preconditioning.denoise(run.network, x_sigma, sigma, **condition)
            losses = dsm_loss(denoised, batch.images, sigma, config.sigma_data)
            run.note_by_level("dsm_loss_by_sigma", losses.detach(), sigma)
            loss = losses.mean()
            run.update(loss, {"dsm_loss": loss})
    path = run.finish()
    run.accelerator.print(f"Saved {path}")
    return path


if __name__ == "__main__":
    run_program(main, EDMConfig)
