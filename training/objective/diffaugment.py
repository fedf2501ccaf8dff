# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""DiffAugment, its numbers drawn outside."""

from collections.abc import Callable
from dataclasses import dataclass

import torch


LARGEST_SHIFT = 0.125  # of height and width

CUTOUT = 0.2


def _pixels(fraction: float, length: int) -> int:
    return int(fraction * length + 0.5)


@dataclass
class DiffAugmentParameters:
    """How each image of a batch is changed; every tensor has shape (B,).

    Args:
        brightness: added to all values; 0 changes nothing.
        saturation: distance of the channels from their mean is multiplied by it; 1 changes nothing, 0 makes gray.
        contrast: distance of all values from the image's mean is multiplied by it; 1 changes nothing, 0 makes constant.
        shift_rows, shift_columns: int64; pixel (i, j) is taken from (i + shift_rows, j + shift_columns), 0 from
            outside.
        cutout_row, cutout_column: int64, center of the box that is set to 0.
    """

    brightness: torch.Tensor
    saturation: torch.Tensor
    contrast: torch.Tensor
    shift_rows: torch.Tensor
    shift_columns: torch.Tensor
    cutout_row: torch.Tensor
    cutout_column: torch.Tensor


def draw_diff_augment(
    uniform: Callable[[], torch.Tensor], height: int, width: int, parts: int = 1
) -> DiffAugmentParameters:
    """Parameters of `diff_augment` in the ranges of CTM's training, for images of `height` x `width` pixels.

    Brightness is in [-0.5, 0.5), saturation in [0, 2), contrast in [0.5, 1.5), shifts of up to an eighth of the side
    and the place of the cut-out box are uniform over whole pixels.

    Args:
        uniform: gives numbers uniform in [0, 1), shape (B,), anew at each call; `StepRandom.uniform` in a training run.
            Called 7 * parts times.
        parts: as many batches of B images, one after the other, each with its own numbers.
    """

    def number() -> torch.Tensor:
        return torch.cat([uniform() for _ in range(parts)])

    def integer(lowest: int, highest: int) -> torch.Tensor:
        return lowest + ((highest - lowest + 1) * number()).long()

    def shift(length: int) -> torch.Tensor:
        return integer(-_pixels(LARGEST_SHIFT, length), _pixels(LARGEST_SHIFT, length))

    def center(length: int) -> torch.Tensor:
        return integer(0, length - _pixels(CUTOUT, length) % 2)

    return DiffAugmentParameters(
        brightness=number() - 0.5,
        saturation=2 * number(),
        contrast=number() + 0.5,
        shift_rows=shift(height),
        shift_columns=shift(width),
        cutout_row=center(height),
        cutout_column=center(width),
    )


def diff_augment(images: torch.Tensor, parameters: DiffAugmentParameters) -> torch.Tensor:
    """DiffAugment (Zhao et al. 2020): color, translation and cutout, differentiable. Nothing waits for the device.

    The box that is cut out has a fifth of the sides, less at the border. Values may leave [-1, 1].

    Args:
        images: shape (B, C, H, W), any C.
    """
    batch, channels, height, width = images.shape
    brightness, saturation, contrast = (
        value.view(-1, 1, 1, 1) for value in (parameters.brightness, parameters.saturation, parameters.contrast)
    )
    x = images + brightness
    gray = x.mean(1, keepdim=True)
    x = gray + saturation * (x - gray)
    mean = x.mean((1, 2, 3), keepdim=True)
    x = mean + contrast * (x - mean)

    def axis(length: int, shift: torch.Tensor, center: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Per pixel of an axis, shape (B, length): its source, whether that is inside, and whether it is cut out."""
        place = torch.arange(length, device=images.device)
        source = place + shift[:, None]
        size = _pixels(CUTOUT, length)
        start = center[:, None] - size // 2
        return (
            source.clamp(0, length - 1),
            source == source.clamp(0, length - 1),
            (place >= start) & (place < start + size),
        )

    row, row_inside, row_cut = axis(height, parameters.shift_rows, parameters.cutout_row)
    column, column_inside, column_cut = axis(width, parameters.shift_columns, parameters.cutout_column)
    source = (row[:, :, None] * width + column[:, None, :]).view(batch, 1, -1).expand(-1, channels, -1)
    x = x.flatten(2).gather(2, source).view(images.shape)
    inside = row_inside[:, :, None] & column_inside[:, None, :]
    cut = row_cut[:, :, None] & column_cut[:, None, :]
    return x.masked_fill((~inside | cut)[:, None], 0.0)
