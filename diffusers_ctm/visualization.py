# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Pictures of how a CTM samples: its states on the way, and one latent at many gammas, seeds and steps."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from .checks import check_count, check_finite, sum_of
from .class_labels import labels_and_batch_size
from .pipeline_ctm import CTMPipeline
from .preconditioning import condition
from .runs import own_run
from .scheduling_karras import jumps


class TrajectoryStrip(NamedTuple):
    """Output of `trajectory_strip`. Entry i of each list belongs to level i, the last one to the end, sigma_min.

    `levels` are noise levels; `states` the images of x_t, scaled to the spread of data; `estimates` those of its jump
    to sigma_min. Images are as `output_type` says, B of them in each entry. A safety checker of the pipeline sees each;
    what it flags is black.
    """

    levels: list[float]
    states: list
    estimates: list


@torch.no_grad()
@own_run
def trajectory_strip(
    pipe: CTMPipeline,
    num_inference_steps: int | None = None,
    gamma: float | Sequence[float] | None = None,
    sigmas: Sequence[float] | None = None,
    batch_size: int | None = None,
    class_labels: int | str | Sequence[int | str] | torch.Tensor | None = None,
    generator: torch.Generator | list[torch.Generator] | None = None,
    latents: torch.Tensor | None = None,
    output_type: str = "pil",
) -> TrajectoryStrip:
    """Sample, and show every state x_t with its jump to the end, G(x_t, t, sigma_min).

    2N network evaluations for N steps: N of the sampler and one per state that is not the last. The arguments are those
    of `CTMPipeline`, which must have a `CTMScheduler`. Images show x_t times sigma_data / sqrt(sigma_data^2 + t^2);
    `output_type="latent"` gives x_t itself.

    Raises:
        ValueError: for another scheduler, and as `CTMPipeline` does.
    """
    if not jumps(pipe.scheduler):
        raise ValueError(f"trajectory_strip works with CTMScheduler, not with {type(pipe.scheduler).__name__}.")
    batch_size = pipe.check_call(batch_size, latents, generator, output_type)
    device = pipe._execution_device
    class_labels, batch_size = labels_and_batch_size(pipe, class_labels, batch_size, generator, device)
    pipe.set_timesteps(device, num_inference_steps, sigmas=sigmas, gamma=gamma)
    first = pipe.prepare_latents(batch_size, device, generator, latents)
    levels, states = pipe.scheduler.sigmas.tolist(), [first]

    def keep(pipe, step, timestep, tensors):
        states.append(tensors["latents"])
        return {}

    def sample(x_t, **options):
        return CTMPipeline.__call__(
            pipe, class_labels=class_labels, latents=x_t / options["sigmas"][0], output_type="latent", **options
        ).images

    targets, end = pipe.scheduler.target_sigmas.tolist(), pipe.scheduler.config.sigma_min
    sample(first, sigmas=levels[:-1], target_sigmas=targets, generator=generator, callback_on_step_end=keep)
    ends = [  # a run that ends at 0 comes by sigma_min itself
        sample(x_t, sigmas=[t], final_sigma=end) if t > end * (1 + 1e-4) else x_t
        for x_t, t in zip(states[:-1], levels[:-1], strict=True)
    ]

    def show(images, scale=1.0):
        shown = scale * images
        return pipe.image_processor.postprocess(pipe.checked_images(images, output_type, shown=shown)[0], output_type)

    sigma_data = pipe.scheduler.config.sigma_data
    return TrajectoryStrip(
        levels,
        [show(x_t, sigma_data / (sigma_data**2 + t**2) ** 0.5) for x_t, t in zip(states, levels, strict=True)],
        [show(x) for x in (*ends, states[-1])],
    )


def gamma_seed_grid(
    pipe: CTMPipeline,
    gammas: Sequence[float | Sequence[float]] = (0.0, 0.5, 1.0),
    seeds: Sequence[int] = (0, 1, 2, 3),
    num_inference_steps: int = 4,
    class_labels: int | str | None = None,
    generator: torch.Generator | None = None,
    latents: torch.Tensor | None = None,
    output_type: str = "pil",
) -> list:
    """One latent at every gamma with the noise of every seed: entry i holds the images of `gammas[i]`, one per seed.

    The first noise is the same in all, so that what differs comes from the noise of the steps; at gamma = 0, nothing
    does. One batch of `len(seeds)` per gamma, `num_inference_steps` network evaluations each.

    Args:
        latents: the latent, unit normal noise of shape (1, C, H, W); default: drawn from `generator`.
        class_labels: one class for all; default: drawn from `generator`.

    Raises:
        ValueError: for no gamma, no seed or more than one latent, and as `CTMPipeline` does.
    """
    if not len(gammas) or not len(seeds):
        raise ValueError("gammas and seeds must each have at least one entry.")
    device = pipe._execution_device
    class_labels, _ = labels_and_batch_size(pipe, class_labels, 1, generator, device)
    latents = pipe.draw_latents(1, device, generator, latents)
    return [
        CTMPipeline.__call__(
            pipe,
            batch_size=len(seeds),
            class_labels=class_labels,
            num_inference_steps=num_inference_steps,
            gamma=gamma,
            generator=[torch.Generator().manual_seed(int(seed)) for seed in seeds],
            latents=latents.expand(len(seeds), -1, -1, -1),
            output_type=output_type,
        ).images
        for gamma in gammas
    ]


@torch.no_grad()
@own_run
def steps_gamma_grid(
    pipe: CTMPipeline,
    steps: Sequence[int] = (1, 2, 4, 8, 16),
    gammas: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    class_labels: int | str | None = None,
    generator: torch.Generator | None = None,
    output_type: str = "pil",
) -> list:
    """One latent at every gamma and number of steps: entry i holds the images of `gammas[i]`, one per entry of `steps`.

    Each is what `pipe(num_inference_steps=..., gamma=..., generator=...)` gives with a generator in the state of
    this one, so all start from the same noise and share that of the steps. They run side by side, each at its own noise
    level: max(steps) network evaluations on at most `len(steps) * len(gammas)` images.

    Args:
        class_labels: one class for all; default: drawn from `generator`.
        generator: source of all noise. It is left after the first noise, as if there were one step.

    Raises:
        ValueError: for no steps or no gamma, a list of generators, another scheduler than `CTMScheduler`, and as
            `CTMPipeline` does.
    """
    if not len(gammas) or not len(steps):
        raise ValueError("steps and gammas must each have at least one entry.")
    if not jumps(pipe.scheduler):
        raise ValueError(f"steps_gamma_grid works with CTMScheduler, not with {type(pipe.scheduler).__name__}.")
    check_count(**{f"steps[{i}]": count for i, count in enumerate(steps)})
    if isinstance(generator, list):
        raise ValueError("steps_gamma_grid takes one generator, from which all images have the same noise.")
    if generator is None:
        generator = torch.Generator().manual_seed(torch.randint(2**62, (), device="cpu").item())
    pipe.check_call(1, None, generator, output_type)
    device, unet, dtype = pipe._execution_device, pipe.unet, pipe.unet.dtype
    class_labels, _ = labels_and_batch_size(pipe, class_labels, 1, generator, device)
    runs = []
    for gamma in gammas:
        for count in steps:
            scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
            scheduler.set_timesteps(count, device, gamma=gamma)
            scheduler.set_begin_index(0)
            runs.append(scheduler)
    unit = pipe.draw_latents(1, device, generator, None)
    states = [unit * scheduler.init_noise_sigma for scheduler in runs]
    noises = [torch.Generator(generator.device).set_state(generator.get_state()) for _ in runs]

    sums, levels = [], []
    for i in range(max(steps)):
        active = [k for k, scheduler in enumerate(runs) if i < scheduler.num_inference_steps]
        inputs = torch.cat([runs[k].scale_model_input(states[k], runs[k].timesteps[i]) for k in active]).to(dtype)
        times = [torch.stack([getattr(runs[k], name)[i] for k in active]) for name in ("timesteps", "target_timesteps")]
        labels = condition(None if class_labels is None else class_labels.expand(len(active)))
        outputs = unet(inputs, *times, **labels, return_dict=False)[0].to(states[0].dtype)
        sums.append(sum_of(outputs))
        levels.append(torch.stack([runs[k].call_sigmas[i] for k in active]))
        for k, output in zip(active, outputs.split(1), strict=True):
            states[k] = runs[k].step(output, runs[k].timesteps[i], states[k], noises[k], return_dict=False)[0]

    check_finite(sums, levels)
    images = pipe.checked_images(torch.cat(states), output_type)[0]
    pipe.maybe_free_model_hooks()
    return [
        pipe.image_processor.postprocess(row, output_type) for row in images.unflatten(0, (len(gammas), len(steps)))
    ]
