# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Images to the noise that they come from, and back: the probability-flow ODE in both directions."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.utils import BaseOutput

from .checks import (
    as_float64,
    called_back,
    check_callback,
    check_count,
    check_finite,
    check_output_type,
    sum_of,
)
from .image_inputs import read_images
from .pipeline_ctm import CTMPipeline, exact_denoiser, pipeline_condition
from .pipeline_output import CTMPipelineOutput
from .provenance import EDITED
from .runs import own_run, show_run
from .scheduling_karras import check_inner_levels
from .trajectory import append_dims, heun_step, karras_sigmas


@dataclass
class CTMInversionOutput(BaseOutput):
    """Output of `CTMInversionPipeline`.

    Args:
        latents: of shape (B, C, H, W), float32, about unit normal: what `CTMPipeline` takes as `latents`.
    """

    latents: torch.Tensor


class CTMInversionPipeline(CTMPipeline):
    """Encodes images: follows the probability-flow ODE from an image, taken as the state at sigma_min, up to sigma_max.

    Heun's method on the exact score, so that it works for a CTM (asked for g(x, t, t)) and for an EDM teacher alike.
    Make it from a loaded pipeline by `CTMInversionPipeline.from_pipe(pipe)`, or load it by
    `CTMInversionPipeline.from_pretrained`.

    N steps cost 2N network evaluations, and the latents are off by an error of order 1 / N^2. `decode` walks the same
    levels down and returns the image up to such an error or less.

    An image is clean, a state at sigma_min has noise of that size. Where the data hardly vary (a constant background),
    the latents of images are therefore nearer to 0 than unit normal noise.
    """

    _digital_source_type = EDITED

    @torch.no_grad()
    @own_run
    def __call__(
        self,
        image,
        class_labels: int | str | Sequence[int | str] | torch.Tensor | None = None,
        num_inference_steps: int = 18,
        return_dict: bool = True,
        callback_on_step_end: Callable | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
    ) -> CTMInversionOutput | tuple[torch.Tensor]:
        """Encode images.

        Args:
            image: a PIL image ("L" or "RGB", as the network has channels), an array (B, H, W, C) or tensor (B, C, H, W)
                of floats in [0, 1] or of uint8, or a list of these, of the network's size.
            class_labels: class of each image, or one for all; numbers or names. Needed by a class-conditional network.
            num_inference_steps: N, on the Karras schedule with N + 1 levels; 2N network evaluations.
            return_dict: return a `CTMInversionOutput` rather than a tuple.
            callback_on_step_end: called as `callback(pipe, step, timestep, {"latents": state})` after each
                step, with the c_noise of the level reached; may return a dict with new latents.
            callback_on_step_end_tensor_inputs: which tensors it gets; "latents" is all there is.

        Returns:
            `CTMInversionOutput` with `latents`, the state at sigma_max divided by sigma_max, or a tuple that holds it.

        Raises:
            ValueError: images of another size or mode or with NaN, labels missing or not expected, a scheduler that is
                not of this package or whose levels reach 0 or infinity.
        """
        device = self._execution_device
        x = self._read(image, "image")
        condition = pipeline_condition(self, class_labels, len(x), device)
        x = self._follow(
            x,
            self._ode_levels(num_inference_steps).flip(0),
            condition,
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
        )
        latents = x / self.scheduler.config.sigma_max
        self.maybe_free_model_hooks()
        return CTMInversionOutput(latents=latents) if return_dict else (latents,)

    @torch.no_grad()
    @own_run
    def decode(
        self,
        latents: torch.Tensor,
        class_labels: int | str | Sequence[int | str] | torch.Tensor | None = None,
        num_inference_steps: int = 18,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
    ) -> CTMPipelineOutput | tuple:
        """The images of `latents`: the same levels downward, from sigma_max to sigma_min, 2N network evaluations.

        Takes what `__call__` takes, with `latents` (B, C, H, W) in place of images; `output_type` is that of
        `CTMPipeline`. `CTMPipeline.from_pipe(pipe)(latents=latents)` decodes by the CTM's jumps instead, from one
        evaluation on.
        """
        check_output_type(output_type)
        self._check_vae(output_type)
        channels = self.unet.config.in_channels
        is_batch = isinstance(latents, torch.Tensor) and latents.ndim == 4 and latents.shape[1] == channels
        if not is_batch or not latents.isfinite().all():
            raise ValueError(f"latents must be a tensor of shape (B, {channels}, H, W) of finite values.")
        device = self._execution_device
        condition = pipeline_condition(self, class_labels, len(latents), device)
        levels = self._ode_levels(num_inference_steps)
        x = latents.to(device=device, dtype=torch.float32) * self.scheduler.config.sigma_max
        x = self._follow(x, levels, condition, callback_on_step_end, callback_on_step_end_tensor_inputs)
        self._seeds, self._guided_by = None, {}  # nothing is drawn, and nothing guides
        return self._finish(
            x,
            output_type,
            return_dict,
            condition.get("class_labels"),
            scheduler="Heun",
            num_inference_steps=num_inference_steps,
            gamma=None,
            scheduler_config=None,
            sigmas=[float(f"{level:.6g}") for level in levels.tolist()],
        )

    @torch.no_grad()
    @own_run
    def interpolate(
        self,
        image,
        other_image,
        weights: Sequence[float] | torch.Tensor = (0.0, 0.25, 0.5, 0.75, 1.0),
        class_labels: int | str | Sequence[int | str] | torch.Tensor | None = None,
        num_inference_steps: int = 18,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> CTMPipelineOutput | tuple:
        """Images between two, by spherical interpolation of latents: both are encoded, mixed by `slerp`, and decoded.

        Weight 0 gives `image`, 1 `other_image`, both up to the error of encoding and decoding. Costs 4N network
        evaluations, the first 2N on a batch of two, the others on one of `len(weights)`.

        Args:
            image, other_image: one image each, as in `__call__`.
            weights: numbers in [0, 1].
            class_labels: one class for all, or that of the two images: then images of weight below 1/2 are decoded as
                the first.
            num_inference_steps: N.
            output_type: "pil", "np", "pt" or "latent", as in `CTMPipeline`.
            return_dict: return an `CTMPipelineOutput` rather than a tuple.
        """
        pair = [self._read(picture, name) for picture, name in ((image, "image"), (other_image, "other_image"))]
        if any(len(picture) != 1 for picture in pair):
            raise ValueError("interpolate takes one image and one other_image; call it once per pair.")
        weights = as_float64(weights, "weights").float()
        if weights.ndim != 1 or len(weights) == 0 or not ((weights >= 0) & (weights <= 1)).all():
            raise ValueError(f"weights must be a list of numbers in [0, 1], got {weights.tolist()}.")
        device = self._execution_device
        condition = pipeline_condition(self, class_labels, 2, device)
        states = self._follow(torch.cat(pair), self._ode_levels(num_inference_steps).flip(0), condition)
        first, second = (state.expand(len(weights), *state.shape) for state in states / self.scheduler.config.sigma_max)
        labels = condition.get("class_labels")
        labels = None if labels is None else labels[(weights >= 0.5).long().to(device)]
        return self.decode(slerp(first, second, weights), labels, num_inference_steps, output_type, return_dict)

    def _read(self, image, name: str) -> torch.Tensor:
        """The states at level 0 of `image`, which must have the channels and size of the pipeline's images."""
        return self.encode_images(read_images(image, self.image_channels, self.image_size, name))

    def _ode_levels(self, num_steps: int) -> torch.Tensor:
        """The scheduler's N + 1 Karras levels from sigma_max to sigma_min, float64."""
        self._match_scheduler()
        check_count(num_inference_steps=num_steps)
        config = self.scheduler.config
        check_inner_levels(config, "Inversion")
        return karras_sigmas(num_steps + 1, config.sigma_min, config.sigma_max, config.rho, dtype=torch.float64)

    def _follow(self, x, levels, condition, callback=None, callback_inputs=None) -> torch.Tensor:
        """Heun's method from `x` at the first of `levels` to the last, in either direction."""
        check_callback(callback, callback_inputs, self._callback_tensor_inputs)
        denoiser = exact_denoiser(self, **condition)
        starts, sums = levels[:-1], []
        levels = levels.to(device=x.device, dtype=x.dtype)
        self._num_timesteps = 2 * len(starts)
        show_run(self)
        with self.progress_bar(total=len(levels) - 1) as progress_bar:
            for i, (t, t_next) in enumerate(zip(levels[:-1], levels[1:], strict=True)):
                if self._interrupt:
                    break
                x = heun_step(denoiser, x, t, t_next)
                if callback is not None:
                    show_run(self)
                    x = called_back(callback, self, i, self.scheduler.sigma_to_t(t_next), x)
                sums.append(sum_of(x))  # looked at once, at the end
                progress_bar.update()
        check_finite(sums, starts, source="The network" if callback is None else "The network, or the callback,")
        return x


def slerp(a: torch.Tensor, b: torch.Tensor, weight: torch.Tensor | float) -> torch.Tensor:
    """Spherical interpolation of each sample: weight 0 gives `a`, 1 gives `b`.

    (sin((1 - w) theta) a + sin(w theta) b) / sin(theta), theta the angle between a and b as vectors. Independent unit
    normal `a` and `b` of many dimensions then give unit normal values, which linear interpolation does not: it shrinks
    them to sqrt(1/2) in the middle. Almost parallel samples are interpolated linearly.

    Args:
        a, b: shape (B, ...).
        weight: a number, or shape (B,).

    Raises:
        ValueError: different shapes, or opposite samples, between which no path is the shortest.
    """
    if a.shape != b.shape or a.ndim < 2:
        raise ValueError(f"a and b must have one shape (B, ...), got {tuple(a.shape)} and {tuple(b.shape)}.")
    weight = torch.as_tensor(weight, dtype=a.dtype, device=a.device)
    if weight.ndim > 1 or (weight.ndim == 1 and len(weight) != len(a)):
        raise ValueError(f"weight must be a number or have shape ({len(a)},), got shape {tuple(weight.shape)}.")
    flat = (x.flatten(1).cpu().double() for x in (a, b))  # not every device has float64
    cosine = torch.nn.functional.cosine_similarity(*flat)
    if (cosine < -1 + 1e-7).any():
        raise ValueError("a and b are opposite: no path between them is the shortest.")
    theta = cosine.clamp(-1, 1).acos().to(weight)
    near = theta < 1e-4
    safe = torch.where(near, torch.ones_like(theta), theta)
    weight_a = torch.where(near, 1 - weight, ((1 - weight) * safe).sin() / safe.sin())
    weight_b = torch.where(near, weight, (weight * safe).sin() / safe.sin())
    return append_dims(weight_a, a.ndim) * a + append_dims(weight_b, a.ndim) * b
