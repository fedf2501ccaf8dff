# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Train an autoencoder for latents: `python -m training.train_vae --dataset_name user/images --resolution 64`."""

import os
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL
from diffusers.image_processor import VaeImageProcessor
from torch import nn

from .cli.errors import UserError
from .cli.files import atomic_file
from .cli.options import NOT_NEGATIVE, POSITIVE, option, run_program, with_default
from .cli.training_options import RunOptions
from .data.batches import load_images
from .data.images import to_sample
from .measure.distances import Distances, features_for
from .measure.sampling import rounded
from .objective.distances import DistanceOptions, make_distance
from .report.pictures import enlarged_grid
from .run.loop import TrainingRun


MEASURED = 10_000  # images, at most, of which the latents and the reconstructions are measured
BATCH = 50
PAIRS = 20  # images and their reconstructions in each picture


@dataclass
class VAEConfig(DistanceOptions, RunOptions):
    """Train an image autoencoder (diffusers' AutoencoderKL), on whose latents `training.train_edm --vae` trains.

    The loss is the mean absolute error of pixels, a distance of features, and the Kullback-Leibler divergence of the
    latents from unit normal noise (Rombach et al. 2022, without a discriminator).
    """

    PROGRAM = "training.train_vae"

    output_dir: str = with_default(RunOptions, "output_dir", "runs/vae")
    optimizer: str = with_default(RunOptions, "optimizer", "adam")
    learning_rate: float = with_default(RunOptions, "learning_rate", 1e-3)
    distance: str = with_default(DistanceOptions, "distance", "features")
    distance_network: str | None = with_default(DistanceOptions, "distance_network", "efficientnet_lite0")
    distance_weight: float = option(1.0, "Weight of the distance beside the pixels' error.", must_be=NOT_NEGATIVE)
    kl_weight: float = option(
        1e-4, "Weight of the divergence, per number of a latent, beside the pixels' error.", must_be=NOT_NEGATIVE
    )
    latent_channels: int = option(4, "Channels of the latents.", must_be=POSITIVE)
    block_out_channels: list[int] = option(
        [32, 64, 64],
        "Channels of each resolution, the highest first. A latent has half the side for each but the first.",
        must_be=POSITIVE,
    )
    layers_per_block: int = option(1, "Residual blocks per resolution.", must_be=POSITIVE)
    norm_num_groups: int = option(8, "Groups of the group normalization.", must_be=POSITIVE)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.refuse(["vae", "latents"], "is for training on latents")
        self.refuse(["eval_every"], "is for models that draw samples; the end of the run says how well it reconstructs")
        self.refuse(
            ["push_to_hub"], "is for pipelines; upload the folder with `push_to_hub` of diffusers' AutoencoderKL"
        )
        groups = self.norm_num_groups
        self.check(
            all(channels % groups == 0 for channels in self.block_out_channels),
            "block_out_channels",
            "multiples of norm_num_groups",
        )


class Reconstruction(nn.Module):
    """An autoencoder as one call, from images to images by way of noisy latents, for several processes to learn."""

    def __init__(self, autoencoder: AutoencoderKL):
        super().__init__()
        self.autoencoder = autoencoder

    def enable_gradient_checkpointing(self) -> None:
        self.autoencoder.enable_gradient_checkpointing()

    def forward(self, images: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Reconstructions (B, C, H, W), and the divergence per number of each latent, shape (B,).

        `noise` is unit normal, of the latents' shape.
        """
        posterior = self.autoencoder.encode(images).latent_dist
        latents = posterior.mean + posterior.std * noise
        return self.autoencoder.decode(latents).sample, posterior.kl() / latents[0].numel()


def build_autoencoder(config: VAEConfig, channels: int, resolution: int) -> AutoencoderKL:
    """The autoencoder that the options describe. Raises UserError for a resolution that it cannot halve."""
    levels = len(config.block_out_channels)
    if resolution % 2 ** (levels - 1):
        raise UserError(
            f"--resolution must be a multiple of {2 ** (levels - 1)} for {levels} --block_out_channels, got "
            f"{resolution}."
        )
    return AutoencoderKL(
        in_channels=channels,
        out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=tuple(config.block_out_channels),
        layers_per_block=config.layers_per_block,
        latent_channels=config.latent_channels,
        norm_num_groups=config.norm_num_groups,
        sample_size=resolution,
        scaling_factor=1.0,
        force_upcast=False,
    )


@torch.no_grad()
def measure(run: TrainingRun, config: VAEConfig) -> dict[str, float]:
    """Give the averaged autoencoder the mean and deviation of its latents, and say how well it reconstructs.

    Latents are then standardized to a deviation of 0.5, EDM's sigma_data. Returns the peak signal-to-noise ratio in dB
    of pixels in [0, 1], and with --eval_features the Frechet distance of reconstructions to the images.
    """
    network, dataset = run.ema.module.autoencoder, run.dataset
    indices = torch.linspace(0, len(dataset) - 1, min(MEASURED, len(dataset))).long().unique()
    features = None if config.eval_features is None else features_for(dataset, config.eval_features, run.device)
    latents, errors, seen = [], [], {"real": [], "made": []}
    for batch in indices.split(BATCH):
        pixels = dataset[batch.tolist()][0].to(run.device)
        mean = network.encode(to_sample(pixels)).latent_dist.mean
        made = (network.decode(mean).sample / 2 + 0.5).clamp(0, 1)
        latents.append(mean.float().cpu())
        errors.append((made - pixels / 255).square().flatten(1).mean(1).cpu())
        if features is not None:
            seen["real"].append(features(pixels).float().cpu())
            seen["made"].append(features(rounded(made)).float().cpu())
    latents = torch.cat(latents).transpose(0, 1).flatten(1)
    network.register_to_config(
        latents_mean=latents.mean(1).tolist(), latents_std=latents.std(1).tolist(), scaling_factor=0.5
    )
    measured = {"psnr": (-10 * torch.cat(errors).log10()).mean().item()}
    if features is not None:
        measured["frechet"] = Distances(torch.cat(seen["real"]))(torch.cat(seen["made"]))["frechet"]
    return measured


@torch.no_grad()
def draw(run: TrainingRun) -> None:
    """Save a picture of some images, each above its reconstruction, if the step is one of --sample_every."""
    if not run.due(run.options.sample_every) or not run.accelerator.is_main_process:
        return
    network = run.ema.module.autoencoder
    indices = torch.linspace(0, len(run.dataset) - 1, min(PAIRS, len(run.dataset))).long().tolist()
    images = to_sample(run.dataset[indices][0].to(run.device))
    made = network.decode(network.encode(images).latent_dist.mean).sample.clamp(-1, 1)
    both = VaeImageProcessor.numpy_to_pil(VaeImageProcessor.pt_to_numpy(torch.cat([images, made]) / 2 + 0.5))
    path = os.path.join(run.options.output_dir, "samples", f"step-{run.step:06d}.png")
    with atomic_file(path) as draft:
        enlarged_grid(both, 2, len(indices)).save(draft)


def main(config: VAEConfig) -> str:
    """Train, measure, and save the averaged autoencoder; return its folder."""
    dataset = load_images(config)
    torch.manual_seed(config.seed)
    distance = make_distance(config)
    network = build_autoencoder(config, dataset.channels, dataset.resolution)
    side = dataset.resolution // 2 ** (len(config.block_out_channels) - 1)
    run = TrainingRun(
        config, dataset, Reconstruction(network), lambda module: module.autoencoder, sample_settings={}, on_step=draw
    )
    distance = distance.to(run.device)
    for batch in run.batches():
        with run.accumulate(), run.accelerator.autocast():
            noise = batch.random.normal(config.latent_channels, side, side)
            made, divergence = run.network(batch.images, noise)
            terms = {
                "pixel_loss": (made.float() - batch.images).abs().mean(),
                "distance_loss": distance(made.float(), batch.images).mean(),
                "kl_loss": divergence.float().mean(),
            }
            weights = (1.0, config.distance_weight, config.kl_weight)
            run.update(sum(weight * term for weight, term in zip(weights, terms.values())), terms)
    if run.accelerator.is_main_process:
        measured = measure(run, config)
        run.folder.record["reconstruction"] = measured
        frechet = f", Frechet distance {measured['frechet']:.3g}" if "frechet" in measured else ""
        print(f"Reconstructions: {measured['psnr']:.2f} dB{frechet}.")
    return run.finish()


if __name__ == "__main__":
    run_program(main, VAEConfig)
