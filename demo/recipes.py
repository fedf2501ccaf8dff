# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Recipes that the page runs. Each function stands, as it is, in the Python that the page shows for copying.

Class labels are numbers, one or one per image, or None for an unconditional checkpoint. Each recipe returns what
`save_images` takes.
"""

import torch

from diffusers_ctm import (
    ClassAverage,
    ClassifierGuidance,
    CTMImg2ImgPipeline,
    CTMInpaintPipeline,
    CTMInversionPipeline,
    CTMPipeline,
    EDMHeunScheduler,
    log_likelihood,
    slerp,
    steps_gamma_grid,
    trajectory_strip,
)
from training.frozen.classifier import load_saved


def sample(pipe, class_labels, steps, gamma, seeds):
    """With `gamma=None` the checkpoint's tuned schedule for this number of steps is used."""
    noise = [torch.Generator().manual_seed(seed) for seed in seeds]
    return pipe(
        batch_size=len(seeds), class_labels=class_labels, num_inference_steps=steps, gamma=gamma, generator=noise
    )


def trajectory(pipe, class_labels, steps, gammas, seed):
    """For each gamma: the states x_t of one image, then the jump of each to the end."""
    pictures = []
    for gamma in gammas:
        noise = torch.Generator().manual_seed(seed)
        strip = trajectory_strip(pipe, steps, gamma, class_labels=class_labels, batch_size=1, generator=noise)
        pictures += [images[0] for images in (*strip.states, *strip.estimates)]
    return pictures


def steps_and_gamma(pipe, class_labels, steps, gammas, seed):
    rows = steps_gamma_grid(pipe, steps, gammas, class_labels, torch.Generator().manual_seed(seed))
    return [image for row in rows for image in row]


def heun(model, class_labels, steps, seeds):
    """The sampler of the diffusion model. A CTM is sampled by its exact score."""
    model.scheduler = EDMHeunScheduler.from_config(model.scheduler.config)
    noise = [torch.Generator().manual_seed(seed) for seed in seeds]
    return model(batch_size=len(seeds), class_labels=class_labels, num_inference_steps=steps, generator=noise)


def inpaint(pipe, image, mask, class_labels, steps, gamma, seeds):
    noise = [torch.Generator().manual_seed(seed) for seed in seeds]
    return CTMInpaintPipeline.from_pipe(pipe)(
        image,
        mask,
        batch_size=len(seeds),
        num_inference_steps=steps,
        gamma=gamma,
        class_labels=class_labels,
        generator=noise,
    )


def edit(pipe, image, strength, class_labels, steps, gamma, seeds):
    noise = [torch.Generator().manual_seed(seed) for seed in seeds]
    return CTMImg2ImgPipeline.from_pipe(pipe)(
        image,
        strength,
        batch_size=len(seeds),
        num_inference_steps=steps,
        gamma=gamma,
        class_labels=class_labels,
        generator=noise,
    )


def between_seeds(pipe, class_labels, steps, shape, first, second, count):
    noises = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in (first, second)]
    a, b = (noise.expand(count, -1, -1, -1) for noise in noises)
    latents = slerp(a, b, torch.linspace(0, 1, count))
    return pipe(class_labels=class_labels, num_inference_steps=steps, gamma=0.0, latents=latents)


def between_images(pipe, image, other_image, class_labels, steps, count):
    """Both are encoded by Heun's method, mixed, and decoded."""
    inverter = CTMInversionPipeline.from_pipe(pipe)
    return inverter.interpolate(image, other_image, torch.linspace(0, 1, count), class_labels, steps)


def guide_by_classifier(pipe, classifier, target, scale, steps, gamma, seeds):
    """The network is told no class: a conditional one is averaged over all classes."""
    network = load_saved(classifier).requires_grad_(False)
    unet = pipe.unet if pipe.num_classes is None else ClassAverage(pipe.unet, pipe.classes)
    free = CTMPipeline(
        unet,
        pipe.scheduler,
        safety_checker=pipe.safety_checker,
        feature_extractor=pipe.feature_extractor,
        vae=pipe.vae,
        normalize_images=pipe.config.normalize_images,
    )
    guidance = ClassifierGuidance(network.logits, target, scale)
    noise = [torch.Generator().manual_seed(seed) for seed in seeds]
    return free(batch_size=len(seeds), num_inference_steps=steps, gamma=gamma, generator=noise, guidance=guidance)


def guide_classifier_free(pipe, class_labels, scale, steps, gamma, seeds):
    noise = [torch.Generator().manual_seed(seed) for seed in seeds]
    return pipe(
        guidance_scale=scale,
        batch_size=len(seeds),
        num_inference_steps=steps,
        gamma=gamma,
        class_labels=class_labels,
        generator=noise,
    )


def likelihood(pipe, images, class_labels, seed):
    noise = torch.Generator().manual_seed(seed)
    return log_likelihood(pipe, images, class_labels, generator=noise, rtol=1e-3, atol=1e-3)
