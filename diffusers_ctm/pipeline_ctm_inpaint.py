# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Inpainting without training, by a consistency trajectory model."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback

from .autoencoder import downscale
from .guidance import Guidance
from .image_inputs import read_images, read_masks
from .linear_operators import MaskOperator
from .pipeline_ctm_restoration import CTMRestorationPipeline
from .pipeline_output import CTMPipelineOutput
from .runs import own_run


class CTMInpaintPipeline(CTMRestorationPipeline):
    """Repaints the white part of a mask. `CTMRestorationPipeline` says how, and what to expect of gamma.

    Known pixels come back exactly: as floats bit for bit ("latent", "pt" and "np"), as 8-bit values in PIL images; but
    not in an image that a safety checker flags. With a `vae` a latent counts as known if all of its pixels are, so that
    a few more pixels beside the mask are made anew, and known pixels are pasted over the decoded image; "latent" holds
    the known latents.
    """

    _given = "image"

    @torch.no_grad()
    @own_run
    def __call__(
        self,
        image=None,
        mask_image=None,
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
        """Repaint images.

        Args:
            image: a PIL image ("L" or "RGB", as the network has channels), an array (B, H, W, C) or tensor (B, C, H, W)
                of floats in [0, 1] or of uint8, or a list of these, of the network's size. What lies under the white of
                the mask has no influence.
            mask_image: white (from 0.5 on) where to repaint, black where to keep: a PIL image of mode "1", "L" or
                "RGB", an array (B, H, W, 1) or tensor (B, 1, H, W), or a list of these, of the size of the image. One
                image or mask serves a whole batch.
            num_inference_steps: N, and the number of network evaluations. Default 18.
            gamma: in [0, 1], a number or one per step; None is the scheduler's. 1, the default, is consistency models'
                Algorithm 4.
            timesteps, sigmas: instead of `num_inference_steps`, where steps start; as in `CTMPipeline`.
            batch_size: number of images. Default: as many as `image`, `mask_image`, `class_labels`, `latents` or
                generators.
            class_labels: class of each image; as in `CTMPipeline`.
            generator: source of all noise, or one per image.
            latents: unit normal noise of shape (B, C, H, W) to start with, times the first level.
            output_type, return_dict, callback_on_step_end, callback_on_step_end_tensor_inputs: as in `CTMPipeline`.
            guidance, guidance_scale: as in `CTMPipeline`, at its costs; what is known stays known.

        Raises:
            ValueError: for arguments that do not fit each other, the network or the scheduler; the message says what to
                pass.
        """
        if image is None or mask_image is None:
            raise ValueError("image and mask_image must both be given.")
        image = read_images(image, self.image_channels, self.image_size)
        repaint = read_masks(mask_image, tuple(image.shape[-2:]))
        if len(image) != len(repaint) and 1 not in (len(image), len(repaint)):
            raise ValueError(f"image has {len(image)} entries and mask_image {len(repaint)}; pass one or as many.")
        image, repaint = torch.broadcast_tensors(image, repaint)

        known = (~repaint[:, :1]).to(device=self._execution_device, dtype=image.dtype)  # once, not at every step
        given = known * image.to(known.device)
        if self.vae is not None:
            given = self.encode_images(given + (1 - known) / 2)  # gray where nothing is known
            factor = downscale(self.vae)
            known = (F.avg_pool2d(known, factor) == 1).to(known.dtype)
        operator = MaskOperator(known)
        latents, class_labels = self._restore(
            operator(given),
            operator,
            operator.pseudo_inverse,
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
        if output_type == "latent":
            return self._finish(latents, output_type, return_dict, class_labels)
        # [-1, 1] and back is not exact in floats: the known pixels are put back as they were given
        images = self.image_processor.postprocess(self.decode_states(latents), "pt")
        images = torch.where(repaint.to(latents.device), images, image.to(latents.device))
        return self._finish(images, output_type, return_dict, class_labels, denormalize=False)
