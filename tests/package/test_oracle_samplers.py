# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""The authors' CIFAR-10 networks, converted, through our pipeline: the samples of their samplers, number for number."""

import pytest
import torch
from safetensors.torch import load_file

import diffusers_ctm.scheduling_ctm
from diffusers_ctm import CTMPipeline, CTMScheduler, EDMHeunScheduler
from helpers.places import ORACLE
from training.official.song import to_diffusers


@pytest.fixture(scope="module")
def make_pipeline():
    """A pipeline with one of the oracle's networks."""

    def make(name, scheduler):
        path = ORACLE / f"{name}.safetensors"
        if not path.exists():
            pytest.skip("the oracle folder is not here")
        pipe = CTMPipeline(to_diffusers(load_file(path)).eval(), scheduler)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return make


@pytest.fixture
def sample(oracle, make_pipeline, monkeypatch):
    """Sample the CTM from the authors' noise; each draw takes the next of theirs."""
    arrays = oracle("samplers_cifar_some.npz")
    noises = [torch.from_numpy(noise) for noise in arrays["noises"]]
    monkeypatch.setattr(diffusers_ctm.scheduling_ctm, "randn_tensor", lambda *args, **kwargs: noises.pop(0))
    pipe = make_pipeline("ctm_cifar_uncond", CTMScheduler())

    def run(**options):
        latents = torch.from_numpy(arrays["x_T"]) / pipe.scheduler.config.sigma_max
        return pipe(latents=latents, output_type="latent", **options).images

    return run


def close(actual, expected):
    torch.testing.assert_close(actual, torch.from_numpy(expected).to(actual.dtype), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name, gamma", [("exact_ts", 0.0), ("gamma0.5_ts", 0.5)])
def test_levels_by_index(name, gamma, sample, oracle):
    arrays = oracle("samplers_cifar_some.npz")
    close(sample(sigmas=arrays["sigmas_karras_18"][[0, 6, 12]].tolist(), gamma=gamma), arrays[name])


def test_two_step_index_sampler(sample, oracle):
    arrays = oracle("samplers_cifar_some.npz")
    grid = arrays["sigmas_karras_18"].astype(float)
    close(sample(sigmas=grid[[0, 3]], target_sigmas=grid[[5, 17]]), arrays["gamma2_ind5_3"])


@pytest.mark.parametrize("name", ["heun_ctm_18", "heun_teacher_18", "heun_teacher_5"])
def test_heun(name, oracle, make_pipeline):
    arrays = oracle("samplers_cifar_some.npz")
    network = "edm_ddpmpp_uncond" if "teacher" in name else "ctm_cifar_uncond"
    pipe = make_pipeline(network, EDMHeunScheduler())
    latents = torch.from_numpy(arrays["x_T"]) / pipe.scheduler.config.sigma_max
    images = pipe(latents=latents, num_inference_steps=int(name.split("_")[-1]), output_type="latent").images
    close(images, arrays[name])


def test_edms_own_sampler(oracle, make_pipeline):
    arrays = oracle("edm_ddpmpp_uncond_edmsampler18.npz")
    pipe = make_pipeline("edm_ddpmpp_uncond", EDMHeunScheduler())
    latents = torch.from_numpy(arrays["latents"])
    close(pipe(latents=latents, num_inference_steps=18, output_type="latent").images, arrays["x"])
