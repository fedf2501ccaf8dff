# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Images and masks of every form, read as tensors and checked."""

import numpy as np
import torch
from PIL import Image


def read_images(
    images,
    channels: int,
    size: tuple[int, int] | None,
    name: str = "image",
    bounded: bool = True,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """`images` as a tensor of shape (B, C, H, W), 0 black and 1 white. Nothing is resized, converted or guessed.

    Args:
        images: a PIL image of mode "L" (one channel), "RGB" or "RGBA"; a numpy array of shape (H, W), (H, W, C) or (B,
            H, W, C) or a tensor of shape (H, W), (C, H, W) or (B, C, H, W), of floats in [0, 1] or of uint8; or a list
            of these.
        channels: C.
        size: (H, W) that the images must have; None is any.
        name: of the argument, for messages.
        bounded: refuse values outside [0, 1].
        dtype: of the result, a float type.

    Raises:
        ValueError: for anything else, and for values that are NaN or infinite.
    """
    if isinstance(images, (list, tuple)):
        if not images:
            raise ValueError(f"{name} is an empty list.")
        parts = [read_images(image, channels, size, name, bounded, dtype) for image in images]
        if len({part.shape[1:] for part in parts}) > 1:
            raise ValueError(f"{name} holds images of different sizes: {[tuple(part.shape[2:]) for part in parts]}.")
        return torch.cat(parts)
    if isinstance(images, Image.Image):
        images = _read_pil(images, channels, name)
    if isinstance(images, np.ndarray):
        if images.ndim not in (2, 3, 4):
            raise ValueError(f"{name} must have shape (H, W), (H, W, C) or (B, H, W, C), got {images.shape}.")
        images = images[..., None] if images.ndim == 2 else images
        images = torch.from_numpy((images[None] if images.ndim == 3 else images).copy()).movedim(-1, 1)
    elif isinstance(images, torch.Tensor):
        if images.ndim not in (2, 3, 4):
            raise ValueError(f"{name} must have shape (H, W), (C, H, W) or (B, C, H, W), got {tuple(images.shape)}.")
        images = images.reshape((1,) * (4 - images.ndim) + tuple(images.shape))
    else:
        raise ValueError(
            f"{name} must be a PIL image, an array, a tensor or a list of these, got {type(images).__name__}."
        )

    if dtype == torch.float64:
        images = images.cpu()  # not every device has it
    if images.dtype == torch.uint8:
        images = images.to(dtype) / 255
    if not images.is_floating_point():
        raise ValueError(f"{name} holds {images.dtype}; pass floats in [0, 1], or 0..255 as uint8.")
    if images.shape[1] != channels:
        hint = "" if channels in (1, 3) else " If those are latents, pass their autoencoder to the pipeline as `vae`."
        raise ValueError(f"{name} has {images.shape[1]} channels; this network makes images with {channels}.{hint}")
    if size is not None and tuple(images.shape[2:]) != tuple(size):
        raise ValueError(
            f"{name} is {images.shape[2]}x{images.shape[3]} pixels (height x width); this network makes "
            f"{size[0]}x{size[1]}. Resize it first."
        )
    if len(images) == 0:
        raise ValueError(f"{name} is empty.")
    if not images.isfinite().all():
        raise ValueError(f"{name} holds values that are NaN or infinite.")
    if bounded and not ((images >= 0) & (images <= 1)).all():
        raise ValueError(
            f"{name} has values from {images.min():g} to {images.max():g}; floats must lie in [0, 1]. Pass (x + 1) / "
            "2 of an image x in [-1, 1], and 0..255 as uint8."
        )
    return images.to(dtype)


def _read_pil(image: Image.Image, channels: int, name: str) -> np.ndarray:
    """A PIL image as uint8 of shape (H, W, C)."""
    mode = {1: "L", 3: "RGB", 4: "RGBA"}.get(channels)
    if mode is None:
        raise ValueError(f"{name}: no PIL image has {channels} channels; pass a tensor.")
    if image.mode != mode:
        raise ValueError(
            f"{name} has mode {image.mode!r}; this network makes images of mode {mode!r}. Pass "
            f"`image.convert({mode!r})`."
        )
    return np.asarray(image).reshape(image.height, image.width, channels)


def read_masks(masks, size: tuple[int, int] | None, name: str = "mask_image") -> torch.Tensor:
    """`masks` as a bool tensor of shape (B, 1, H, W), true from the middle of the range on (white).

    PIL images of mode "1", "L" or "RGB", arrays and tensors as in `read_images` with one channel, of bools or floats;
    or a list. Integers are refused: 1 may mean white or almost black.

    Raises:
        ValueError: for anything else.
    """
    if not isinstance(masks, (list, tuple)):
        masks = [masks]
    return read_images([_float_mask(mask, name) for mask in masks], 1, size, name) >= 0.5


def _float_mask(mask, name: str):
    """One mask in a form that `read_images` takes."""
    if isinstance(mask, Image.Image):
        if mask.mode not in ("1", "L", "RGB"):
            raise ValueError(
                f"{name} has mode {mask.mode!r}; pass '1', 'L' or 'RGB', white where pixels are repainted."
            )
        return mask.convert("L")
    if isinstance(mask, (np.ndarray, torch.Tensor)):
        if "int" in str(mask.dtype):
            raise ValueError(f"{name} holds {mask.dtype}; pass bools, or floats in [0, 1].")
        return mask * 1.0 if "bool" in str(mask.dtype) else mask
    return mask
