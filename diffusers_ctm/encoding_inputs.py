# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Images as users have them, as one checked tensor in [-1, 1]."""

from collections.abc import Sequence

import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image


LARGEST_VALUE = 4.0  # a float image with larger values was meant to be 0..255


def images_to_tensor(
    images: Image.Image | np.ndarray | torch.Tensor | Sequence, channels: int, size: int | tuple[int, int] | None = None
) -> torch.Tensor:
    """Images as a tensor of shape (B, C, H, W) in [-1, 1], float32 (float64 of a float64 tensor); 0..255 is k / 127.5 - 1.

    Nothing is resized or converted to another mode. Floats are taken as diffusers' `VaeImageProcessor` takes them: in [0, 1],
    unless one of the batch is negative: then all of it is in [-1, 1]. Values somewhat outside are kept, so that the unclipped
    output of a sampler passes.

    Args:
        images: a PIL image ("L" for one channel, "RGB" for three), an array (H, W, C) or (B, H, W, C), a tensor (C, H, W) or
            (B, C, H, W), or a list of equally sized ones. Arrays and tensors are uint8 or float.
        channels: C of the network.
        size: H = W or (H, W) of the network; None takes any.

    Raises:
        ValueError: another type, mode, number of channels or size, no image, values that are not finite or not of an image.
    """
    if isinstance(images, (list, tuple)):
        if not images:
            raise ValueError("The list of images is empty.")
        batches = [_float_batch(image, channels) for image in images]
        shapes = sorted({tuple(batch.shape[1:]) for batch in batches})
        if len(shapes) > 1:
            raise ValueError(f"The images have different shapes (C, H, W): {shapes}. Pass one shape at a time.")
        batch = torch.cat(batches)
    else:
        batch = _float_batch(images, channels)

    height_width = (size, size) if isinstance(size, int) else size
    if batch.shape[1] != channels or (height_width is not None and tuple(batch.shape[2:]) != tuple(height_width)):
        wanted = (channels, *(height_width or ("H", "W")))
        raise ValueError(
            f"The images have shape (C, H, W) = {tuple(batch.shape[1:])}, the network works on {wanted}. Resize or convert them first."
        )
    if batch.numel() == 0:
        raise ValueError(f"The images are empty: shape {tuple(batch.shape)}.")
    if not batch.isfinite().all():
        raise ValueError("The images hold values that are NaN or infinite.")
    if batch.abs().max() > LARGEST_VALUE:
        raise ValueError(
            f"The images hold values up to {batch.abs().max().item():g}. Floats lie in [0, 1] or [-1, 1]; pass 0..255 as uint8."
        )
    return batch if batch.min() < 0 else 2 * batch - 1


def _float_batch(image: Image.Image | np.ndarray | torch.Tensor, channels: int) -> torch.Tensor:
    """One image or batch as a float tensor (B, C, H, W), in the range it came in, 0..255 in [0, 1]."""
    if isinstance(image, Image.Image):
        modes = {1: "L", 3: "RGB", 4: "RGBA"}
        if image.mode != modes.get(channels):
            raise ValueError(
                f"A PIL image has mode {image.mode!r}, the network has {channels} channel(s)."
                + (f" Use `image.convert({modes[channels]!r})`." if channels in modes else " Pass tensors.")
            )
        return VaeImageProcessor.numpy_to_pt(VaeImageProcessor.pil_to_numpy(image))
    if isinstance(image, np.ndarray):
        if image.ndim not in (3, 4):
            raise ValueError(f"An array of images has shape (H, W, C) or (B, H, W, C), got {image.shape}.")
        image = torch.from_numpy(np.ascontiguousarray(image)).movedim(-1, -3)
    if not isinstance(image, torch.Tensor):
        raise ValueError(f"Images are PIL images, numpy arrays, tensors or lists of them, got {type(image).__name__}.")
    if image.ndim not in (3, 4):
        raise ValueError(f"A tensor of images has shape (C, H, W) or (B, C, H, W), got {tuple(image.shape)}.")
    if not image.is_floating_point():
        if image.dtype != torch.uint8:
            raise ValueError(f"Images are uint8 or floats, got {image.dtype}.")
        image = image / 255
    image = image if image.ndim == 4 else image[None]
    return image if image.dtype == torch.float64 else image.float()
