"""Train an EDM denoiser: `python -m training.train_edm --config training/configs/digits_edm.yaml`."""

import copy

import torch
from diffusers import UNet2DModel

from diffusers_ctm import CTMPipeline, EDMHeunScheduler

from .config import EDMConfig, UserError, run_program
from .data import ImageDataset
from .losses import dsm_loss
from .run import TrainingRun
from .time_sampling import draw_lognormal_sigma


def build_unet(config: EDMConfig, dataset: ImageDataset) -> UNet2DModel:
    """The UNet2DModel that the options describe."""
    levels = range(len(config.block_out_channels))
    halvings = 2 ** (len(levels) - 1)
    if dataset.resolution % halvings:
        raise UserError(
            f"--resolution must be a multiple of {halvings} for {len(levels)} --block_out_channels, got {dataset.resolution}."
        )
    kinds = ["Attn" if level in config.attention_levels else "" for level in levels]
    return UNet2DModel(
        sample_size=dataset.resolution,
        in_channels=dataset.channels,
        out_channels=dataset.channels,
        block_out_channels=tuple(config.block_out_channels),
        layers_per_block=config.layers_per_block,
        down_block_types=tuple(f"{kind}DownBlock2D" for kind in kinds),
        up_block_types=tuple(f"{kind}UpBlock2D" for kind in reversed(kinds)),
        add_attention=config.mid_attention,
        attention_head_dim=config.attention_head_dim,
        norm_num_groups=config.norm_num_groups,
        resnet_time_scale_shift=config.resnet_time_scale_shift,
        dropout=config.dropout,
        num_class_embeds=dataset.num_classes + 1 if config.label_dropout else dataset.num_classes,
    )


def main(config: EDMConfig) -> str:
    """Train, and save the averaged network as a pipeline; return its folder."""
    dataset = ImageDataset(config)
    torch.manual_seed(config.seed)
    network = build_unet(config, dataset)
    # As EDM does it: the untrained network predicts nothing, so that D starts as the best linear denoiser.
    torch.nn.init.zeros_(network.conv_out.weight)
    torch.nn.init.zeros_(network.conv_out.bias)
    scheduler = EDMHeunScheduler(
        sigma_min=config.sigma_min,
        sigma_max=config.sigma_max,
        sigma_data=config.sigma_data,
        timestep_scale=config.timestep_scale,
    )

    null_class = dataset.num_classes if config.label_dropout else None

    def make_pipeline(unet: UNet2DModel) -> CTMPipeline:
        return CTMPipeline(unet, copy.deepcopy(scheduler), id2label=dataset.id2label, null_class=null_class)

    run = TrainingRun(config, dataset, network, make_pipeline, {"heun-18": {"num_inference_steps": 18}})
    preconditioning = scheduler.preconditioning
    for batch in run.batches():
        with run.accelerator.accumulate(run.network):
            # Karras et al. 2022, Table 1: log-normal levels, weight 1 / c_out^2.
            sigma = draw_lognormal_sigma(batch.random.normal(), config.p_mean, config.p_std)
            noise = batch.random.normal(*batch.images.shape[1:])
            x_sigma = batch.images + sigma[:, None, None, None] * noise
            labels = batch.dropped_labels(config.label_dropout, null_class)
            condition = {} if labels is None else {"class_labels": labels}
            denoised = preconditioning.denoise(run.network, x_sigma, sigma, **condition)
            loss = dsm_loss(denoised, batch.images, sigma, config.sigma_data).mean()
            run.update(loss, {"dsm_loss": loss})
    path = run.finish()
    run.accelerator.print(f"Saved {path}")
    return path


if __name__ == "__main__":
    run_program(main, EDMConfig)
