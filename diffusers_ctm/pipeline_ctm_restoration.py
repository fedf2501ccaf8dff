# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Restoration without training: images that match a linear measurement, by a consistency trajectory model."""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.utils import logging
from PIL import Image

from .class_labels import labels_and_batch_size
from .guidance import Guidance
from .image_inputs import read_images
from .linear_operators import check_measured_values, check_operator, consistent_image, nearest_image_in_range
from .pipeline_ctm import CTMPipeline
from .pipeline_output import CTMPipelineOutput
from .provenance import EDITED
from .runs import own_run
from .scheduling_karras import jumps


class CTMRestorationPipeline(CTMPipeline):
    """Images x with A x = y for a linear operator A: colorization, super-resolution, inpainting, and others.

    Consistency models' Algorithm 4 (Song et al. 2023) with trajectory jumps. It starts from x = A+ y + t_1 z; the step
    from level t to t_next, with s from gamma's split, is

        x_0    <- the image that the jump G(x_t, t, s) aims at: (m/t) x_t + (1 - m/t) g(x_t, t, s), m = sigma_min
        x_0    <- A+ y + (I - A+ A) x_0
        x_s    <- x_0 + (s - m)/(t - m) (x_t - x_0)
        x_next <- x_s + sqrt(t_next^2 - s^2) z

    one network evaluation each. The image counts as the state at sigma_min, so gamma = 1, where s = m, is Algorithm 4
    itself; without a measurement it is `CTMPipeline`'s step. What A sees of x_t is y plus noise of about the level at
    every step, and A x = y holds in the end.

    x is then still unclipped, and is what output type "latent" gives. For the others the nearest image with pixels in
    [0, 1] that has the measurement is looked for (`nearest_image_in_range`): it has it to 1e-5 of the largest value,
    in PIL images up to their rounding to 8 bits. If no image in range is found, a warning says how far off it is.

    The method is approximate. The network is shown the noised measurement, and what A does not see follows from it as
    in an unconditional sample. With gamma > 0 and ever more steps the renoising of ever smaller levels is Langevin
    dynamics of the conditional distribution, which it then approaches; gamma = 1 is fastest. gamma = 0 never renoises
    and stays wrong however many steps are taken: relations between known and unknown pixels come out too weak. The
    measurement is taken as exact: a noisy one leaves its noise in the images.

    With a `vae`, x are latents: the operator acts on them, and the measurement is what it gives for the latents of an
    image, a tensor. An operator of pixels is not linear in latents, so that colorization and super-resolution of pixels
    are not possible there; `CTMInpaintPipeline` is.

    Components, classes, generators and callbacks are those of `CTMPipeline`; the scheduler is `CTMScheduler`.
    """

    _digital_source_type = EDITED
    _given = "measurement"  # the argument that y came from

    @torch.no_grad()
    @own_run
    def __call__(
        self,
        measurement=None,
        operator: Callable[[torch.Tensor], torch.Tensor] | None = None,
        pseudo_inverse: Callable[[torch.Tensor], torch.Tensor] | None = None,
        num_inference_steps: int | None = None,
        gamma: float | Sequence[float] = 1.0,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        batch_size: int | None = None,
        class_labels: int | str | Sequence[int | str] | torch.Tensor | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
        guidance: Guidance | None = None,
        guidance_scale: float = 1.0,
    ) -> CTMPipelineOutput | tuple:
        """Restore images.

        Args:
            measurement: y, what `operator` gives for pixels in [0, 1], whatever it is passed as: a tensor of shape (B,
                ...) or, where it looks like an image, a PIL image, an array of shape (B, H, W, C), or a list of these.
                0..255 of uint8 count as 0 to 1. One measurement serves a whole batch.
            operator: A, linear, from images (B, C, H, W) to (B, ...), each image alone: a `LinearOperator` or any
                function.
            pseudo_inverse: A+, with A A+ A = A. Default: `operator.pseudo_inverse`.
            num_inference_steps: N, and the number of network evaluations. Default 18.
            gamma: in [0, 1], a number or one per step; None is the scheduler's. 1, the default, is consistency models'
                Algorithm 4; see the class.
            timesteps, sigmas: instead of `num_inference_steps`, where steps start; as in `CTMPipeline`.
            batch_size: number of images. Default: as many as `measurement`, `class_labels`, `latents` or generators.
            class_labels: class of each image; as in `CTMPipeline`.
            generator: source of all noise, or one per image.
            latents: unit normal noise of shape (B, C, H, W) to start with, times the first level.
            output_type, return_dict, callback_on_step_end, callback_on_step_end_tensor_inputs: as in `CTMPipeline`.
            guidance, guidance_scale: as in `CTMPipeline`, at its costs; what is known stays known.

        Raises:
            ValueError: for an operator that is not linear, a pseudo-inverse that is not its own, a measurement of
                another shape, or with values that an operator without negative weights does not give for pixels in [0,
                1], and for arguments that do not fit each other, the network or the scheduler; the message says what to
                pass.
        """
        if not callable(operator):
            raise ValueError(f"operator must be a LinearOperator or a function, got {operator!r}.")
        if pseudo_inverse is None:
            pseudo_inverse = getattr(operator, "pseudo_inverse", None)
        if not callable(pseudo_inverse):
            raise ValueError("pseudo_inverse is missing; pass a function, or an operator that has one of that name.")
        if self.vae is not None and not isinstance(measurement, torch.Tensor):
            raise ValueError(
                "measurement must be a tensor, what the operator gives for latents: this network has an autoencoder, "
                "and sees no pixels."
            )
        images, class_labels = self._restore(
            _read_measurement(measurement),
            operator,
            pseudo_inverse,
            {"num_inference_steps": num_inference_steps, "timesteps": timesteps, "sigmas": sigmas, "gamma": gamma},
            batch_size,
            class_labels,
            generator,
            latents,
            output_type,
            (callback_on_step_end, callback_on_step_end_tensor_inputs),
            guidance,
            guidance_scale,
        )
        return self._finish(images, output_type, return_dict, class_labels)

    def _restore(
        self,
        y,
        operator,
        pseudo_inverse,
        levels,
        batch_size,
        class_labels,
        generator,
        latents,
        output_type,
        callback,
        guidance,
        guidance_scale,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The last sample, in [-1, 1] unless it is "latent" or has a `vae`, and its classes.

        `y` is what `operator` gives for pixels in [0, 1], or with a `vae` for latents, a float tensor; `levels` go to
        `set_timesteps`.
        """
        # 1. Check
        batch_size = self.check_call(batch_size, latents, generator, output_type, *callback)
        if not jumps(self.scheduler):
            raise ValueError(
                f"{type(self).__name__} works with CTMScheduler, not with {type(self.scheduler).__name__}: use "
                "`CTMScheduler.from_config(pipe.scheduler.config)` and a CTM."
            )
        self._set_guidance(guidance_scale, guidance)
        batch_size = self._batch_size_with(y, self._given, batch_size)
        if all(levels[name] is None for name in ("num_inference_steps", "timesteps", "sigmas")):
            levels["num_inference_steps"] = 18

        # 2. Prepare
        device = self._execution_device
        class_labels, batch_size = labels_and_batch_size(self, class_labels, batch_size, generator, device)
        # The image counts as the state at sigma_min.
        self.set_timesteps(device, **levels, final_sigma=self.scheduler.config.sigma_min)
        y = y.to(device).expand(batch_size, *y.shape[1:])
        size = self.state_size or tuple((pseudo_inverse(y) if latents is None else latents).shape[-2:])
        shape = (batch_size, self.unet.config.in_channels, *size)
        check_operator(operator, pseudo_inverse, shape, y)
        if self.vae is None:
            white = operator(y.new_ones(shape))
            check_measured_values(operator, y, white, shape)
            y = 2 * y - white  # A is linear, and the network's pixels are 2 x - 1
        known = pseudo_inverse(y)
        start = known + self.prepare_latents(batch_size, device, generator, latents, size)

        # 3. Sample
        images = self._sample(
            start,
            class_labels,
            callback[0],
            guidance,
            generator=generator,
            project=partial(consistent_image, operator, pseudo_inverse, known=known),
        )

        # 4. Bring into range
        if output_type != "latent" and self.vae is None:
            images, error = nearest_image_in_range(operator, pseudo_inverse, images, y)
            if error > 1e-5:
                logging.get_logger(__name__).warning(
                    f"The measurement of the images is off by up to {error:.2g} of its largest value: no image with "
                    "pixels in [0, 1] was found that has it. Is it what the operator gives for pixels in [0, 1]?"
                )
        return images, class_labels


def _read_measurement(measurement) -> torch.Tensor:
    """A measurement as a float32 tensor (B, ...): tensors of any shape, arrays and PIL images as in `read_images`."""
    if measurement is None:
        raise ValueError("measurement is missing; pass what is known of the image.")
    first = measurement[0] if isinstance(measurement, (list, tuple)) and measurement else measurement
    if isinstance(first, (Image.Image, np.ndarray)):
        channels = (
            len(first.getbands()) if isinstance(first, Image.Image) else (first.shape[-1] if first.ndim > 2 else 1)
        )
        return read_images(measurement, channels, None, "measurement", bounded=False)
    if isinstance(measurement, (list, tuple)) and all(isinstance(value, torch.Tensor) for value in measurement):
        if len({(value.shape, value.dtype) for value in measurement}) != 1:
            raise ValueError("measurement must be a list of tensors of one shape and dtype, and not empty.")
        measurement = torch.stack(list(measurement))
    if isinstance(measurement, torch.Tensor) and measurement.dtype == torch.uint8:
        measurement = measurement.to(torch.float32) / 255
    if not isinstance(measurement, torch.Tensor) or not measurement.is_floating_point() or measurement.ndim == 0:
        got = f"{measurement.dtype} tensor" if isinstance(measurement, torch.Tensor) else type(measurement).__name__
        raise ValueError(
            f"measurement must be a float or uint8 tensor of shape (B, ...), or an image, got {got}: what the operator "
            "gives for pixels in [0, 1]."
        )
    if not measurement.isfinite().all():
        raise ValueError("measurement holds values that are NaN or infinite.")
    return measurement.to(torch.float32)
