# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Folders of diffusers' DiT, as its pipeline saves them and as the Hub has them, are read as teachers."""

import json
import shutil

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

from diffusers_ctm import CTMDiTTransformer2DModel
from helpers.comparing import close
from helpers.exact import randn
from helpers.tiny_networks import DIT_TINY, fill
from training.cli.shared_options import TeacherOptions
from training.networks.source import Source, as_denoiser
from training.networks.teacher import load_teacher


CLASSES = {"0": "tench, Tinca tinca", "1": "goldfish, Carassius auratus", "2": "great white shark"}


@pytest.fixture(params=["today", "on the Hub"])
def folder(request, tmp_path):
    """A folder of a DiTPipeline. facebook/DiT-XL-2-256 names the class that the network had at first, in a pickle."""
    torch.manual_seed(0)
    options = {**DIT_TINY, "out_channels": 6, "num_embeds_ada_norm": 3}
    network = fill(DiTTransformer2DModel(**options))
    autoencoder = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=3)
    DiTPipeline(network, autoencoder, DDIMScheduler(clip_sample=False)).save_pretrained(tmp_path)
    index, config = tmp_path / "model_index.json", tmp_path / "transformer" / "config.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "id2label": CLASSES}))
    if request.param == "on the Hub":
        old = {"_class_name": "Transformer2DModel", "cross_attention_dim": None, "only_cross_attention": False}
        config.write_text(json.dumps({**json.loads(config.read_text()), **old}))
        (tmp_path / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
        torch.save(network.state_dict(), tmp_path / "transformer" / "diffusion_pytorch_model.bin")
    return tmp_path


def test_the_network_and_its_null_class(folder):
    source = Source(str(folder), None)
    assert source.networks() == {"transformer": "DiTTransformer2DModel", "vae": "AutoencoderKL"}
    network = source.load_network("transformer")
    assert type(network) is CTMDiTTransformer2DModel and not network.has_target_time
    assert source.null_class("transformer") == 3 == network.config.num_class_embeds - 1
    assert as_denoiser(network) is network


def test_the_teacher_denoises_as_diffusers_does(folder):
    """x_0 of DDIM at whole timesteps, from the half of the output that is the noise."""
    pipe = DiTPipeline.from_pretrained(folder)
    pipe.scheduler.set_timesteps(1000)
    shutil.rmtree(folder / "vae")
    teacher = load_teacher(TeacherOptions(str(folder), teacher_guidance_scale=3.0))
    assert teacher.null_class == 3 and teacher.id2label == {int(number): name for number, name in CLASSES.items()}
    for timestep in (3, 400, 999):
        abar = pipe.scheduler.alphas_cumprod[timestep]
        x, labels = randn(2, 3, 8, 8, dtype=torch.float32), torch.tensor([0, 2])
        sigma = ((1 - abar) / abar).sqrt().expand(2)
        with torch.no_grad():
            outputs = [
                pipe.transformer(x, torch.full((2,), timestep), classes).sample[:, :3]
                for classes in (labels, torch.full_like(labels, 3))
            ]
        guided = outputs[1] + 3 * (outputs[0] - outputs[1])
        expected = pipe.scheduler.step(guided, timestep, x).pred_original_sample
        close(teacher.denoise(x / abar.sqrt(), sigma, labels), expected, rtol=1e-3, atol=1e-3 * sigma.max().item())
