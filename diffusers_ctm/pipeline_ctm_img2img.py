# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Image to image: noise an image to a level and come down with a consistency trajectory model."""

from collections.abc import Callable, Sequence
from numbers import Real

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback

from .checks import as_number, check_count, check_positive
from .class_labels import labels_and_batch_size
from .guidance import Guidance
from .image_inputs import read_images
from .pipeline_ctm import CTMPipeline
from .pipeline_output import CTMPipelineOutput
from .provenance import EDITED
from .runs import own_run
from .scheduling_karras import default_num_steps, jumps, level_at, start_levels


class CTMImg2ImgPipeline(CTMPipeline):
    """SDEdit (Meng et al. 2022) with trajectory jumps: strokes to images, variations, and denoising at a known level.

    The image is noised to a level and sampling starts there, so that what is coarser than the noise stays and the rest
    is made anew. Components, classes, generators and callbacks are those of `CTMPipeline`; besides `CTMScheduler`,
    `EDMHeunScheduler` works (the exact score). One network evaluation per step with `CTMScheduler`.
    """

    _digital_source_type = EDITED

    @torch.no_grad()
    @own_run
    def __call__(
        self,
        image=None,
        strength: float | None = None,
        sigma: float | None = None,
        num_inference_steps: int | None = None,
        gamma: float | Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        add_noise: bool = True,
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
        """Edit images.

        Args:
            image: a PIL image ("L" or "RGB", as the network has channels), an array (B, H, W, C) or tensor (B, C, H, W)
                of floats in [0, 1] or of uint8, or a list of these, of the network's size. One image serves a whole
                batch.
            strength: in (0, 1], how far up the Karras schedule to go: the level is (a + strength (b - a))^rho with
                a = sigma_min^(1/rho), b = sigma_max^(1/rho). 1 is sigma_max, where the image no longer matters; 0.5,
                the default, is 2.5 for levels from 0.002 to 80. Of levels from 0 to infinity it is the place in the
                schedule that is even in tau, `flow_level(strength, shift)`: 1 for 0.5 without shift.
            sigma: instead, the level itself: standard deviation of the noise, for pixels in [-1, 1] or latents.
            num_inference_steps: N, all of them taken, on the Karras schedule from that level down to sigma_min, or to
                the `final_sigma` of the scheduler's config. Default 1 with `CTMScheduler`, else 18. N network
                evaluations, 2N - 1 with `EDMHeunScheduler`.
            gamma: in [0, 1], a number or one per step; 0 is deterministic after the first noise.
            sigmas: instead of the three above, the levels at which steps start, descending; the first is that of the
                image.
            add_noise: False takes `image` as it is, as one that already carries normal noise of standard deviation
                `sigma` (or `sigmas[0]`) for pixels in [-1, 1], and removes it. Arrays and tensors may then leave [0,
                1]: a state x_t in [-1, 1] plus noise is passed as (x_t + 1) / 2. An image that was clipped to [0, 1]
                has less noise at its ends than sigma says.
            batch_size: number of images. Default: as many as `image`, `class_labels`, `latents` or generators.
            class_labels: class of each new image; as in `CTMPipeline`.
            generator: source of all noise, or one per image.
            latents: unit normal noise of shape (B, C, H, W) to add, times the level.
            output_type, return_dict, callback_on_step_end, callback_on_step_end_tensor_inputs: as in `CTMPipeline`.
            guidance, guidance_scale: as in `CTMPipeline`, at its costs.

        Raises:
            ValueError: for arguments that do not fit each other, the network or the scheduler; the message says what to
                pass.
        """
        # 1. Check
        if image is None:
            raise ValueError("image is missing; pass the image to edit.")
        if not add_noise and latents is not None:
            raise ValueError("latents are noise to add, and add_noise=False adds none; pass one of them.")
        if not add_noise and self.vae is not None:
            raise ValueError("add_noise=False takes noisy pixels, and this network knows the noise of latents only.")
        image = read_images(image, self.image_channels, self.image_size, bounded=add_noise)
        batch_size = self.check_call(
            batch_size, latents, generator, output_type, callback_on_step_end, callback_on_step_end_tensor_inputs
        )
        batch_size = self._batch_size_with(image, "image", batch_size)
        self._set_guidance(guidance_scale, guidance)
        sigmas = self._levels(strength, sigma, sigmas, num_inference_steps, add_noise)

        # 2. Prepare
        device = self._execution_device
        class_labels, batch_size = labels_and_batch_size(self, class_labels, batch_size, generator, device)
        self.set_timesteps(device, sigmas=sigmas, gamma=gamma)
        start = self.encode_images(image).expand(batch_size, -1, -1, -1)
        if add_noise:
            start = start + self.prepare_latents(batch_size, device, generator, latents, tuple(start.shape[-2:]))

        # 3. Sample
        images = self._sample(start, class_labels, callback_on_step_end, guidance, generator=generator)

        # 4. Finish
        return self._finish(images, output_type, return_dict, class_labels)

    def _levels(self, strength, sigma, sigmas, num_inference_steps, add_noise) -> Sequence[float]:
        """The levels at which steps start, from whichever of the arguments says them."""
        strength, sigma = as_number(strength), as_number(sigma)
        if sum(value is not None for value in (strength, sigma, sigmas)) > 1:
            raise ValueError("Pass one of `strength`, `sigma` and `sigmas`; each says at which level to start.")
        if not add_noise and sigma is None and sigmas is None:
            raise ValueError(
                "add_noise=False needs `sigma`, the standard deviation of the noise that the image carries, for "
                "pixels in [-1, 1]."
            )
        if sigmas is not None:
            if num_inference_steps is not None:
                raise ValueError("Pass `num_inference_steps` or `sigmas`, not both.")
            return sigmas
        if num_inference_steps is None:
            num_inference_steps = default_num_steps(self.scheduler)
        check_count(num_inference_steps=num_inference_steps)

        config = self.scheduler.config
        if sigma is None:
            strength = 0.5 if strength is None else strength
            if not isinstance(strength, Real) or not 0 < strength <= 1:
                raise ValueError(f"strength must lie in (0, 1], got {strength!r}.")
            sigma = config.sigma_max
            if strength < 1:
                ramp = torch.tensor(1 - strength, dtype=torch.float64, device="cpu")
                sigma = level_at(config, ramp).item()
        else:
            check_positive(sigma=sigma)
        end = config.sigma_min
        if jumps(self.scheduler) and config.final_sigma is not None:
            end = config.final_sigma
        lowest, name = max((end, "final_sigma"), (config.sigma_min, "sigma_min"))
        if sigma <= lowest or sigma > config.sigma_max * (1 + 1e-4):
            raise ValueError(
                f"The level to start from, {sigma:g}, must lie above {name}={lowest:g} and not above "
                f"sigma_max={config.sigma_max:g}; choose another `strength` or `sigma`."
            )
        levels = start_levels(config, num_inference_steps, end, sigma)
        if end > 0 and levels[-1] < end * (1 + 2e-4):  # steps shorter than float32 shows the network
            raise ValueError(
                f"{num_inference_steps} steps from level {sigma:g} to {end:g} are too many; "
                "take fewer steps or more `strength`."
            )
        return levels.tolist()
