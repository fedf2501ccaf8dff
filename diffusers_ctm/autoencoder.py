# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Images to latents and back, by any image autoencoder of diffusers and the numbers that its config holds."""

import contextlib
import threading
import weakref
from collections.abc import Iterator

import torch
from torch import nn


_LOCKS: "weakref.WeakKeyDictionary[nn.Module, threading.RLock]" = weakref.WeakKeyDictionary()


def latent_channels(vae: nn.Module) -> int:
    """Channels of the latents of an autoencoder. Raises ValueError if its config does not say them."""
    channels = vae.config.get("vq_embed_dim") or vae.config.get("latent_channels")
    if channels is None:
        raise ValueError(
            f"{type(vae).__name__} is no autoencoder of images as AutoencoderKL, AutoencoderTiny, AutoencoderDC and "
            "VQModel are: its config does not say `latent_channels`."
        )
    return channels


def downscale(vae: nn.Module) -> int:
    """Pixels of an image for each pixel of a latent, along a side."""
    ratio = getattr(vae, "spatial_compression_ratio", None)
    blocks = vae.config.get("encoder_block_out_channels") or vae.config.get("block_out_channels")
    return ratio or 2 ** (len(blocks) - 1)


@contextlib.contextmanager
def in_float32(vae: nn.Module, wanted: bool = True) -> Iterator[None]:
    """Cast an autoencoder in float16 to float32 for the block, if that is `wanted`.

    One thread at a time has an autoencoder in float16, as another would see it cast in the middle of its own call.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(_LOCKS.setdefault(vae, threading.RLock()))
        half = vae.dtype == torch.float16
        if half and wanted:
            stack.callback(vae.half)
            vae.float()
        if not half:  # nobody casts it, or this thread has done so
            stack.close()
        yield


@contextlib.contextmanager
def for_gradients(vae: nn.Module | None) -> Iterator[None]:
    """Prepare an autoencoder for gradients through its decoder, back to a network that made the latents.

    In float16 they would vanish, and a cast after the forward pass would change weights that they need. So would
    `enable_model_cpu_offload`, which sends the network away when the autoencoder is called: both stay meanwhile.
    """
    hook = getattr(vae, "_hf_hook", None)
    previous = getattr(hook, "prev_module_hook", None)
    if previous is not None:
        hook.prev_module_hook = None
    try:
        with contextlib.nullcontext() if vae is None else in_float32(vae):
            yield
    finally:
        if previous is not None:
            hook.prev_module_hook = previous


def moments(vae: nn.Module, images: torch.Tensor, normalized: bool = True) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Mean and standard deviation of the raw latents of `images`, float32 of shape (B, c, h, w).

    The deviation is None for an autoencoder without one. One that overflows in float16 (`force_upcast`) encodes, and
    decodes, in float32.

    Args:
        vae: `AutoencoderKL`, `AutoencoderTiny`, `AutoencoderDC`, `VQModel` or another that encodes images alike.
        images: in [-1, 1], shape (B, C, H, W).
        normalized: whether the autoencoder works on images in [-1, 1]; else in [0, 1].
    """
    images = images if normalized else images / 2 + 0.5
    with in_float32(vae, vae.config.get("force_upcast", False)):
        output = vae.encode(images.to(vae.dtype))
    if hasattr(output, "latent_dist"):
        return output.latent_dist.mean.float(), output.latent_dist.std.float()
    return (output.latents if hasattr(output, "latents") else output.latent).float(), None


def standardized(vae: nn.Module, raw: torch.Tensor) -> torch.Tensor:
    """The latents that a diffusion model sees, by the autoencoder's config: (raw - mean) * scaling_factor / std."""
    mean, scale = _shift_and_scale(vae, raw)
    return (raw - mean) * scale


def encode(vae: nn.Module, images: torch.Tensor, normalized: bool = True) -> torch.Tensor:
    """Standardized latents of `images`, those of their mean; as `moments` and `standardized`."""
    return standardized(vae, moments(vae, images, normalized)[0])


def decode(vae: nn.Module, latents: torch.Tensor, normalized: bool = True) -> torch.Tensor:
    """The images of standardized latents, about in [-1, 1], float32 of shape (B, C, H, W).

    Where a gradient is wanted, call it in a block of `for_gradients`.
    """
    mean, scale = _shift_and_scale(vae, latents)
    raw = latents / scale + mean
    with in_float32(vae, vae.config.get("force_upcast", False)):
        images = vae.decode(raw.to(vae.dtype), return_dict=False)[0].float()
    return images if normalized else 2 * images - 1


def _shift_and_scale(vae: nn.Module, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What is subtracted from raw latents, and what the difference is multiplied with; each (1, c or 1, 1, 1)."""
    config = vae.config
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is None or std is None:
        mean, std = [config.get("shift_factor") or 0.0], [1.0]
    mean, std = (torch.tensor(values, dtype=like.dtype, device=like.device)[:, None, None] for values in (mean, std))
    return mean, (config.get("scaling_factor") or 1.0) / std
