# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""The authors' networks, converted, through our pipeline: the samples of their samplers, number for number."""

import pytest
import torch
from safetensors.torch import load_file

import diffusers_ctm.scheduling_ctm
import diffusers_ctm.scheduling_edm_heun
from diffusers_ctm import CTMPipeline, CTMScheduler, EDMHeunScheduler
from helpers.official_edm2 import oracle_network
from helpers.places import EDM2_ORACLE, ORACLE
from training.networks.pipelines import GuidedNetwork
from training.networks.teacher import Teacher
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


# EDM2 -----------------------------------------------------------------------------------------------------------------


def guided(scale, reference="edm2_guide_cond64"):
    """A teacher of EDM2, guided by another network with classes."""
    network, other = (oracle_network(name)[0] for name in ("edm2_pixel64", reference))
    return Teacher(network, EDMHeunScheduler(), guidance_scale=scale, reference=Teacher(other, EDMHeunScheduler()))


@pytest.fixture
def sample_edm2(oracle):
    """Sample from the authors' noise and compare, the levels of all calls of the network too."""
    arrays = oracle(EDM2_ORACLE / "edm2_sampler.npz")

    def check(name, network, num_inference_steps, **options):
        pipe = CTMPipeline(network, EDMHeunScheduler(**options))
        pipe.set_progress_bar_config(disable=True)
        images = pipe(
            class_labels=arrays["labels_int"].tolist(),
            num_inference_steps=num_inference_steps,
            latents=torch.from_numpy(arrays["latents"]),
            output_type="latent",
        ).images
        close(images, arrays[name])
        if f"{name}__calls_net_t" in arrays:
            which, levels = arrays[f"{name}__calls_net_t"].T
            called = torch.from_numpy(levels[which == 0])
            torch.testing.assert_close(pipe.scheduler.call_sigmas.double(), called, rtol=1e-6, atol=0)
            assert len(levels) == len(called) * (2 if isinstance(network, GuidedNetwork) else 1)

    return check


@pytest.mark.parametrize(
    "name, steps, options",
    [("heun8", 8, {}), ("heun5_sig0.01_50_rho5", 5, {"sigma_min": 0.01, "sigma_max": 50.0, "rho": 5.0})],
)
def test_edm2s_sampler(name, steps, options, sample_edm2):
    sample_edm2(name, oracle_network("edm2_pixel64")[0], steps, **options)


def test_edm2s_guided_denoiser(oracle):
    arrays = oracle(EDM2_ORACLE / "edm2_sampler.npz")
    teacher, sigma = guided(1.7), torch.from_numpy(arrays["guided_sigma"]).expand(1)
    x, labels = sigma * torch.from_numpy(arrays["latents"]), torch.from_numpy(arrays["labels_int"])
    for each, name in ((teacher, "out"), (guided(1.0), ""), (teacher.reference, "ref")):
        with torch.no_grad():
            close(each.denoise(x, sigma, labels), arrays[f"guided_D_{name}".removesuffix("_")])


def test_edm2s_unconditional_network(oracle):
    arrays = oracle(EDM2_ORACLE / "edm2_sampler.npz")
    network, preconditioning, _ = oracle_network("edm2_guide_uncond64")
    sigma = torch.from_numpy(arrays["guided_sigma"])
    x = sigma * torch.from_numpy(arrays["latents"])
    with torch.no_grad():
        close(preconditioning.denoise(network, x, sigma), arrays["guided_D_uncondref"])


def test_edm2s_autoguidance_with_noise(sample_edm2, oracle, monkeypatch):
    arrays = oracle(EDM2_ORACLE / "edm2_sampler.npz")
    noises = [torch.from_numpy(noise).float() for noise in arrays["churn_noises"]]
    monkeypatch.setattr(diffusers_ctm.scheduling_edm_heun, "randn_tensor", lambda *args, **kwargs: noises.pop(0))
    churn = dict(zip(("s_churn", "s_tmin", "s_tmax", "s_noise"), arrays["churn_params"].tolist(), strict=True))
    sample_edm2("heun8_autog1.7_churn", GuidedNetwork(guided(1.7)), 8, **churn)
    assert not noises
