# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Images of one size and mode and their classes, as samples in [-1, 1], and mirrored."""

import os
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Features, Image
from PIL import Image as PILImage

from ..cli.errors import UserError, loading
from ..cli.shared_options import DataOptions
from .classes import numbers_by_name, shown
from .sources import find_columns, load_source


GRAY_MODES = ("1", "L", "LA", "I", "I;16", "I;16B", "I;16L", "F")


class Images:
    """Size, mode and classes of a data set's images, and how each image is made to fit.

    Args:
        options: of the data.
        features: of the data set.
        first: its first row, or None if it is empty.

    Attributes:
        columns: the columns to read.
        num_classes, id2label: None without classes; `id2label` also where the classes are plain numbers.
        classes: numbers of the classes that have images, ascending; None if that is not known.

    Raises UserError if the data set is empty, or a column is missing or of the wrong kind.
    """

    def __init__(self, options: DataOptions, features: Features, first: dict[str, Any] | None):
        if first is None:
            raise UserError(
                f"--dataset_name {options.dataset_name} holds no images in --dataset_split {options.dataset_split}."
            )
        self.options = options
        self.image_column, self.label_column = find_columns(options, features)
        self.columns = [column for column in (self.image_column, self.label_column) if column is not None]
        self.num_classes, self.id2label, self.classes = options.num_classes, None, None
        self._numbers, self._numbered_as = None, None
        if self.label_column is not None and isinstance(features[self.label_column], ClassLabel):
            self.id2label = dict(enumerate(features[self.label_column].names))
            if self.num_classes not in (None, len(self.id2label)):
                raise UserError(
                    f"--num_classes {self.num_classes} is for plain numbers; --label_column {self.label_column} names "
                    f"{len(self.id2label)} classes. Leave it out."
                )
            self.num_classes = len(self.id2label)
        image = first[self.image_column]
        self.mode = options.image_mode or ("L" if image.mode in GRAY_MODES else "RGB")
        self.channels = 1 if self.mode == "L" else 3
        self.resolution = options.resolution or min(image.size)

    def check_labels(self, labels: list[int | None]) -> None:
        """Raise UserError if an image has no class, or one beyond their number."""
        missing = sum(label is None or label < 0 for label in labels)
        if missing:
            raise UserError(
                f"--label_column {self.label_column} has no class (null or negative) for {missing} of {len(labels)} "
                "images; remove such images, or leave --label_column out."
            )
        known = self.num_classes if self._numbers is None else len(self._numbers)
        if known is not None and max(labels, default=0) >= known:
            raise UserError(
                f"--label_column {self.label_column} holds the class {max(labels)}, and there are {known} classes, "
                "from 0 on. Give a larger --num_classes."
            )

    @property
    def trained_classes(self) -> list[int] | None:
        """`classes`, if others have no image; None if all have, there are none, or it is not known."""
        return None if self.classes is None or len(self.classes) == self.num_classes else self.classes

    def number_classes(self, num_classes: int, id2label: Mapping[int, str] | None, network: str) -> None:
        """Give the classes the numbers that a network has for them, found by name (`numbers_by_name`).

        `num_classes`, `id2label`, `classes` and all labels are then the network's. One line says what was changed.

        Args:
            num_classes, id2label: of the network.
            network: the option that names it, for messages.

        Raises UserError for classes that the network does not have, and if another network has numbered them already
        and this one differs.
        """
        numbers = {own: own for own in range(self.num_classes)}
        if self.id2label is not None:
            numbers |= numbers_by_name(self.id2label, num_classes, id2label, self.classes, network)
        used = list(numbers) if self.classes is None else self.classes
        if any(numbers[own] >= num_classes for own in used):
            raise UserError(
                f"--label_column {self.label_column} has {self.num_classes} classes, {network} knows {num_classes}."
            )
        moved = [f"{self.id2label[own]} from {own} to {numbers[own]}" for own in used if numbers[own] != own]
        if moved and self._numbered_as is not None:
            raise UserError(
                f"{self._numbered_as} and {network} number the same classes differently: {shown(moved)}. Use one of "
                "them at a time."
            )
        if moved:
            self._numbers = torch.tensor(list(numbers.values()))
            self.classes = self.classes and sorted(numbers[own] for own in used)
            say_once(f"Classes numbered by name, as {network} has them: {shown(moved)}.")
        if id2label or moved:
            self._numbered_as = network
            self.id2label = {int(number): name for number, name in id2label.items()} if id2label else None
        self.num_classes = num_classes

    def as_numbered(self, labels: list[int]) -> torch.Tensor:
        """Labels of the data set in the numbers of the network, int64 of shape (n,)."""
        labels = torch.tensor(labels)
        return labels if self._numbers is None else self._numbers[labels]

    def decode(
        self, images: list[dict[str, Any]], labels: list[int | None] | None, names: Iterable[Any]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Encoded images as uint8 of shape (n, C, H, W), and their classes as int64 of shape (n,), or None.

        Raises UserError for an image that cannot be read, by its name, or has no class.
        """
        decoded = []
        for image, name in zip(images, names):
            with loading(f"Image {name} of the data set"):
                decoded.append(Image().decode_example(image))
        if self.label_column is None:
            return self.stack(decoded), None
        self.check_labels(labels)
        return self.stack(decoded), self.as_numbered(labels)

    def stack(self, images: list[PILImage.Image]) -> torch.Tensor:
        """uint8 of shape (n, C, H, W)."""
        pixels = np.stack([np.asarray(self._fit(image)) for image in images])
        pixels = torch.from_numpy(pixels.reshape(len(images), self.resolution, self.resolution, self.channels))
        return pixels.permute(0, 3, 1, 2).contiguous()

    def _fit(self, image: PILImage.Image) -> PILImage.Image:
        """Scale the shorter side to the resolution and keep the center.

        ImageNet's images are made small like this since Dhariwal & Nichol (2021), for the teachers and figures that
        there are: means of 2x2 pixels as long as twice the resolution is left, then bicubic. Means alone would weigh
        pixels unevenly.
        """
        image = eight_bit(image).convert(self.mode)
        size = self.resolution
        while min(image.size) >= 2 * size:
            image = image.resize((image.width // 2, image.height // 2), PILImage.Resampling.BOX)
        if image.size != (size, size):
            scale = size / min(image.size)
            image = image.resize([round(side * scale) for side in image.size], PILImage.Resampling.BICUBIC)
            left, top = ((side - size) // 2 for side in image.size)
            image = image.crop((left, top, left + size, top + size))
        return image


class ImageDataset(Images, torch.utils.data.Dataset):
    """Images of one size and mode, and their classes.

    `dataset[[3, 7]]` is `(images, labels)`: uint8 of shape (n, C, H, W) and int64 of shape (n,), or None without
    classes.
    """

    def __init__(self, options: DataOptions):
        source = load_source(options)
        super().__init__(options, source.features, source[0] if len(source) else None)
        if self.label_column is not None:
            labels = source[self.label_column][:]
            self.check_labels(labels)
            self.classes = sorted(set(labels))
            if self.num_classes is None:
                self.num_classes = self.classes[-1] + 1
        self.source = source.select_columns(self.columns).cast_column(self.image_column, Image(decode=False))

    def __len__(self) -> int:
        return len(self.source)

    def labels(self) -> torch.Tensor | None:
        """Class of each image, int64 of shape (N,), or None without classes."""
        return self.as_numbered(self.source[self.label_column][:]) if self.label_column else None

    def __getitem__(self, indices: list[int]) -> tuple[torch.Tensor, torch.Tensor | None]:
        rows = self.source[indices]
        return self.decode(rows[self.image_column], rows.get(self.label_column), indices)

    __getitems__ = __getitem__  # torch's DataLoader then asks for a whole batch at once


def eight_bit(image: PILImage.Image) -> PILImage.Image:
    """`image` with at most 8 bits a channel and nothing transparent.

    16-bit gray is scaled and transparency is laid on white; PIL's own conversion clips the one and shows hidden colors
    in the other. Raises UserError for gray in 32 bits, whose range is not known.
    """
    if image.mode.startswith("I;16"):
        return PILImage.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
    if image.mode in ("I", "F"):
        raise UserError(
            f"The data set holds images in mode {image.mode!r} (32-bit gray), whose white is not known; save them with "
            "8 or 16 bits."
        )
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return PILImage.alpha_composite(PILImage.new("RGBA", image.size, "white"), image)
    return image


def say_once(line: str) -> None:
    """Print a line, once in a program and in its main process only."""
    if os.environ.get("RANK", "0") == "0":  # as launchers set it: data are loaded before the processes meet
        print(line)


def to_sample(images: torch.Tensor) -> torch.Tensor:
    """uint8 images in 0..255 to float32 in [-1, 1]."""
    return images.to(torch.float32) / 127.5 - 1


def mirrored(images: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """The images, (B, C, H, W), mirrored left to right where `draws`, (B,), uniform in [0, 1), are below 0.5."""
    return torch.where((draws < 0.5)[:, None, None, None], images.flip(-1), images)
