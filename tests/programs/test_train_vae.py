# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""`python -m training.train_vae`: what it learns, what it saves, how it goes on, and what learns on its latents."""

import os

import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from safetensors.torch import load_file

from helpers.runs import fresh_accelerate  # noqa: F401
from training import train_edm, train_vae
from training.cli.errors import UserError
from training.cli.files import read_json
from training.data.images import ImageDataset, to_sample
from training.data.latents import LatentDataset
from training.networks.autoencoder import load_autoencoder
from training.train_edm import EDMConfig
from training.train_vae import Reconstruction, VAEConfig


TINY = {
    "distance_network": "digits",
    "block_out_channels": [8, 16],
    "latent_channels": 2,
    "learning_rate": 5e-3,
    "train_batch_size": 16,
    "ema_decay": 0.5,
    "report_to": "none",
    "sample_every": 0,
}


def weights(folder):
    return load_file(os.path.join(folder, "diffusion_pytorch_model.safetensors"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a run of 120 steps, with a checkpoint before the end."""
    folder = tmp_path_factory.mktemp("vae") / "run"
    options = {**TINY, "sample_every": 120, "eval_features": "digits"}
    return train_vae.main(VAEConfig(output_dir=str(folder), max_train_steps=120, checkpointing_steps=100, **options))


def test_it_learns_to_reconstruct_and_standardizes_its_latents(trained, capsys):
    folder = os.path.dirname(trained)
    measured = read_json(trained, "training.json")["reconstruction"]
    images = to_sample(ImageDataset(VAEConfig(**TINY))[list(range(0, 1797, 9))][0])
    network = AutoencoderKL.from_pretrained(trained)
    with torch.no_grad():
        raw = network.encode(images).latent_dist.mean
        made = network.decode(raw).sample
    psnr = -10 * ((made.clamp(-1, 1) - images) / 2).square().flatten(1).mean(1).log10()
    assert psnr.mean().item() == pytest.approx(measured["psnr"], abs=0.2)
    plain = -10 * ((images.mean(0) - images) / 2).square().flatten(1).mean(1).log10()  # every image the mean of all
    assert psnr.mean() > plain.mean() + 2 and measured["frechet"] > 0
    mean, std = (torch.tensor(network.config[name])[:, None, None] for name in ("latents_mean", "latents_std"))
    latents = (raw - mean) * network.config.scaling_factor / std
    assert latents.std((0, 2, 3)).tolist() == pytest.approx([0.5, 0.5], abs=0.03)
    assert latents.mean((0, 2, 3)).tolist() == pytest.approx([0, 0], abs=0.05)
    assert os.listdir(os.path.join(folder, "samples")) == ["step-000120.png"]


def test_it_goes_on_bit_for_bit(trained, tmp_path):
    os.makedirs(tmp_path / "part")
    os.rename(os.path.join(os.path.dirname(trained), "checkpoint-100"), tmp_path / "part" / "checkpoint-100")
    options = {**TINY, "max_train_steps": 120, "resume_from_checkpoint": "latest"}
    again = train_vae.main(VAEConfig(output_dir=str(tmp_path / "part"), **options))
    for name, weight in weights(trained).items():
        assert torch.equal(weights(again)[name], weight), name


def test_a_teacher_learns_on_its_latents(trained, tmp_path):
    options = {"label_column": "label", "block_out_channels": [16], "layers_per_block": 1, "train_batch_size": 8}
    options |= {"attention_levels": [], "attention_head_dim": 8, "report_to": "none", "sample_every": 0}
    folder = train_edm.main(EDMConfig(output_dir=str(tmp_path / "edm"), vae=trained, max_train_steps=2, **options))
    pipe = DiffusionPipeline.from_pretrained(folder)
    assert pipe.unet.config.sample_size == 4 and pipe.unet.config.in_channels == 2 and pipe.image_size == (8, 8)
    latents = LatentDataset(ImageDataset(VAEConfig(**TINY)), load_autoencoder(trained, None), str(tmp_path / "latents"))
    assert latents.resolution == 4 and pipe.vae.config.latents_std == latents.autoencoder.network.config.latents_std


def test_the_loss_is_that_of_the_formula():
    torch.manual_seed(0)
    network = train_vae.build_autoencoder(VAEConfig(**TINY), 1, 8)
    images, noise = torch.rand(3, 1, 8, 8) * 2 - 1, torch.randn(3, 2, 4, 4)
    made, divergence = Reconstruction(network)(images, noise)
    mean, log_variance = network.quant_conv(network.encoder(images)).chunk(2, dim=1)
    expected = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).flatten(1).mean(1)
    torch.testing.assert_close(divergence, expected)
    torch.testing.assert_close(made, network.decode(mean + (0.5 * log_variance).exp() * noise).sample)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"vae": "x"}, "--vae is for training on latents"),
        ({"eval_every": 1, "eval_features": "digits"}, "--eval_every is for models that draw samples"),
        ({"block_out_channels": [8, 12]}, "--block_out_channels must be multiples of norm_num_groups"),
        ({"block_out_channels": [8] * 5}, "--resolution must be a multiple of 16 for 5 --block_out_channels, got 8"),
        ({"push_to_hub": True, "hub_model_id": "user/vae"}, "--push_to_hub is for pipelines"),
    ],
)
def test_impossible_options_are_refused(options, message, tmp_path):
    with pytest.raises(UserError, match=message):
        train_vae.main(VAEConfig(output_dir=str(tmp_path / "run"), **{**TINY, **options}))
    assert not (tmp_path / "run").exists()
