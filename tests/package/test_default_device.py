# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Whatever torch's default device is, levels are on the CPU and samples where the pipeline is."""

import pytest
import torch

from diffusers_ctm import (
    BlockAverageOperator,
    ClassifierGuidance,
    CTMImg2ImgPipeline,
    CTMInpaintPipeline,
    CTMInversionPipeline,
    CTMPipeline,
    CTMRestorationPipeline,
    CTMScheduler,
    EDMHeunScheduler,
    GrayscaleOperator,
    LossGuidance,
    gamma_seed_grid,
    log_likelihood,
    rejection_sample,
    steps_gamma_grid,
    trajectory_strip,
)
from helpers.tiny_networks import make_unet_2d


UNET = make_unet_2d(num_class_embeds=4)
IMAGE = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))
MASK = torch.ones(1, 1, 8, 8).tril()


def pipeline(cls=CTMPipeline, scheduler=CTMScheduler, **options):
    pipe = cls(UNET, scheduler(), **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def once(generator):
    """What every call is given."""
    return {"class_labels": 1, "generator": generator, "output_type": "latent"}


def uniform_classifier(images):
    return images.mean((1, 2, 3), keepdim=True)[:, :, 0, 0].expand(-1, 4)


RUNS = {
    "jumps": lambda g: pipeline()(num_inference_steps=3, gamma=0.5, **once(g)).images,
    "random classes": lambda g: pipeline()(batch_size=2, generator=g, output_type="pt").images,
    "Heun": lambda g: pipeline(scheduler=EDMHeunScheduler)(num_inference_steps=2, **once(g)).images,
    "levels": lambda g: pipeline()(timesteps=[1.0], final_sigma=0.5, **once(g)).images,
    "no class": lambda g: pipeline(null_class=3)(guidance_scale=2.0, **once(g)).images,
    "classifier": lambda g: pipeline()(guidance=ClassifierGuidance(uniform_classifier, 0), **once(g)).images,
    "loss on the image": lambda g: (
        pipeline()(
            num_inference_steps=2, guidance=LossGuidance(lambda x: x.mean((1, 2, 3)), on="image"), **once(g)
        ).images
    ),
    "image to image": lambda g: pipeline(CTMImg2ImgPipeline)(IMAGE, num_inference_steps=2, **once(g)).images,
    "inpainting": lambda g: pipeline(CTMInpaintPipeline)(IMAGE, MASK, num_inference_steps=2, **once(g)).images,
    "super-resolution": lambda g: (
        pipeline(CTMRestorationPipeline)(
            IMAGE[..., ::2, ::2], BlockAverageOperator(2), num_inference_steps=2, **once(g)
        ).images
    ),
    "color": lambda g: (
        pipeline(CTMRestorationPipeline)(IMAGE[:, :1], GrayscaleOperator(), num_inference_steps=2, **once(g)).images
    ),
    "encoding": lambda g: pipeline(CTMInversionPipeline)(IMAGE, 1, num_inference_steps=2).latents,
    "interpolation": lambda g: (
        pipeline(CTMInversionPipeline)
        .interpolate(IMAGE, 1 - IMAGE, class_labels=1, num_inference_steps=2, output_type="pt")
        .images
    ),
    "ode": lambda g: log_likelihood(pipeline(), IMAGE, 1, dequantize=False, rtol=0.3, atol=0.3, generator=g).nats,
    "elbo": lambda g: log_likelihood(pipeline(), IMAGE, 1, "elbo", num_draws=2, dequantize=False, generator=g).nats,
    "strip": lambda g: torch.stack(trajectory_strip(pipeline(), 2, **once(g)).estimates),
    "seeds": lambda g: torch.stack(gamma_seed_grid(pipeline(), (0.0, 1.0), (0, 1), 2, **once(g))),
    "steps": lambda g: torch.stack(steps_gamma_grid(pipeline(), (1, 2), (0.0, 1.0), **once(g))),
    "rejection": lambda g: rejection_sample(pipeline(), uniform_classifier, 2, threshold=0.1, **once(g)).scores,
    "discrete": lambda g: (
        CTMScheduler(prediction_type="epsilon", beta_schedule="linear", sigma_min=0.02, sigma_max=100.0).timesteps
    ),
}


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_the_default_device_changes_nothing(run):
    expected = run(torch.Generator().manual_seed(0))
    with torch.device("meta"):  # what is put there has no values: any use of it fails
        found = run(torch.Generator().manual_seed(0))
    assert found.device.type == "cpu" and torch.equal(found, expected)


@pytest.mark.parametrize("cls", [CTMScheduler, EDMHeunScheduler])
def test_levels_are_on_the_cpu(cls):
    with torch.device("meta"):
        scheduler = cls()
        scheduler.set_timesteps(3)
        shown = scheduler.sigma_to_t(2.0)
    assert scheduler.sigmas.device == scheduler.timesteps.device == shown.device == torch.device("cpu")
    assert torch.equal(shown, scheduler.sigma_to_t(2.0)) and float(scheduler.t_to_sigma(shown)) == pytest.approx(2)
