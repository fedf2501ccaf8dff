# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Images of one size and mode and their classes, as samples in [-1, 1], and mirrored."""

import collections
import io
import os
import sys
from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import ClassLabel, Dataset, Image, IterableDataset, Value
from datasets.utils.file_utils import xopen
from PIL import Image as PILImage
from PIL import ImageOps
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION

from ..cli.device import say
from ..cli.errors import UserError, listed, loading
from ..cli.names import without_folders
from ..cli.shared_options import DataOptions
from .classes import Classes
from .dataset_tool import read_file
from .sources import TEXT, find_columns, load_source


GRAY_MODES = ("1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L", "F")
LOOKED_AT = 256  # images whose size and mode decide, of a data set at hand


class Images(Classes):
    """Size, mode and classes of a data set's images, and how each image is made to fit.

    Args:
        options: of the data.
        source: the data set.

    Attributes:
        source: its rows, with the columns needed only; each image is decoded later, where it is used.
        columns: the columns to read.
        mode, channels, resolution: of the images as they are made to fit; known after `look_at`.
        pipeline_options: what a pipeline of such images is made with.

    Raises UserError if a column is missing or of the wrong kind.
    """

    def __init__(self, options: DataOptions, source: Dataset | IterableDataset):
        self.options, features = options, source.features
        self.image_column, label_column = find_columns(options, features)
        super().__init__(label_column, options.num_classes)
        self.columns = [column for column in (self.image_column, self.label_column) if column is not None]
        self.source = source.select_columns(self.columns).cast_column(self.image_column, Image(decode=False))
        self.pipeline_options: dict[str, Any] = {}
        self._warned = set()
        if self.label_column is not None:
            kind = features[self.label_column]
            if isinstance(kind, ClassLabel):
                self.name_classes(kind.names)
            elif kind.dtype.startswith(("float", "bool")):
                with loading(f"--label_column {self.label_column}", "Each class must be a whole number."):
                    self.source = self.source.cast_column(self.label_column, Value("int64"))

    def look_at(self, images: list[dict[str, Any]], numbers: Iterable[int], length: int | None) -> None:
        """Set mode, channels and resolution by the headers of some encoded images, and say what the data set is.

        The images are in color if one of them is. Raises UserError if there are none, if one cannot be read, or if
        their sizes differ and no option gives one.

        Args:
            numbers: of their rows, for messages.
            length: of the data set, if it is known.
        """
        options = self.options
        if not images:
            raise UserError(
                f"--dataset_name {options.dataset_name} holds no images in --dataset_split {options.dataset_split}."
            )
        sizes, gray = collections.Counter(), True
        for image, number in zip(images, numbers):
            with loading(named(image, number), f"--image_column {self.image_column} must hold image files."):
                opened = open_image(image)
                sizes[min(opened.size)] += 1
                gray = gray and has_gray_mode(opened)
                opened.close()
        self.mode = options.image_mode or ("L" if gray else "RGB")
        self.channels = 1 if self.mode == "L" else 3
        if options.resolution is None and len(sizes) > 1:
            common = ", ".join(f"{side} ({count} images)" for side, count in sizes.most_common(3))
            raise UserError(
                f"--resolution is needed: the images of --dataset_name {options.dataset_name} differ in size. Among "
                f"{len(images)} the shorter side has {min(sizes)} to {max(sizes)} pixels, most often {common}."
            )
        self.resolution = options.resolution or min(sizes)
        number = "streamed images" if length is None else f"{length:,} images"
        color, classes = "gray" if self.mode == "L" else "color", f"{self.num_classes or 'no'} classes"
        if self.empty_classes:
            names = [str((self.id2label or {}).get(label, label)) for label in self.empty_classes]
            classes += f", without an image for {listed(names)}"
        say(
            f"Data: {options.dataset_name}, {options.dataset_split}: {number}, {self.resolution}x{self.resolution} "
            f"pixels, {color}, {classes}."
        )

    def check_images(self, missing: list[int], count: int) -> None:
        """Raise UserError if there are rows without an image among `count`; `missing` are their numbers."""
        if missing:
            raise UserError(
                f"--image_column {self.image_column} has no image (null) in {len(missing)} of {count} rows, the first "
                f"in row {missing[0]} (from 0); remove such rows from the data set."
            )

    def decode(
        self, images: list[dict[str, Any]], labels: list[int | None] | None, numbers: Iterable[int]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Encoded images as uint8 of shape (n, C, H, W), and their classes as int64 of shape (n,), or None.

        Raises UserError for an image that cannot be read, by the number of its row and its path, or has no class.
        """
        fitted = []
        for image, number in zip(images, numbers):
            name = named(image, number)
            with loading(name):
                opened = open_image(image)
                ImageOps.exif_transpose(opened, in_place=True)  # a copy would lose the file's format and tags
                fitted.append(np.asarray(self._fit(opened, name)))
        pixels = np.stack(fitted).reshape(len(images), self.resolution, self.resolution, self.channels)
        pixels = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
        if self.label_column is None:
            return pixels, None
        self.check_labels(labels)
        return pixels, self.as_numbered(labels)

    def prepare(self) -> None:
        """What must be done before the first batch: nothing."""

    def to_sample(self, images: torch.Tensor, random: Any) -> torch.Tensor:
        """uint8 images as float32 in [-1, 1], with --random_flip mirrored where `random.uniform()` is below 0.5."""
        images = to_sample(images)
        return mirrored(images, random.uniform()) if self.options.random_flip else images

    def _fit(self, image: PILImage.Image, name: str = "An image") -> PILImage.Image:
        """Scale the shorter side to the resolution and keep the center.

        ImageNet's images are made small like this since Dhariwal & Nichol (2021), for the teachers and figures that
        there are: means of 2x2 pixels as long as twice the resolution is left, then bicubic. Means alone would weigh
        pixels unevenly.
        """
        size, image = self.resolution, eight_bit(image)
        if self.options.resolution is None and min(image.size) < size:
            self._warn(name, f"is enlarged from {min(image.size)} to {size} pixels", "--resolution")
        if self.options.image_mode is None and self.mode == "L" and has_color(image):
            self._warn(name, "loses its color", "--image_mode")
        image = image.convert(self.mode)
        while min(image.size) >= 2 * size:
            image = image.resize((image.width // 2, image.height // 2), PILImage.Resampling.BOX)
        if image.size != (size, size):
            scale = size / min(image.size)
            image = image.resize([round(side * scale) for side in image.size], PILImage.Resampling.BICUBIC)
            left, top = ((side - size) // 2 for side in image.size)
            image = image.crop((left, top, left + size, top + size))
        return image

    def _warn(self, name: str, what: str, option: str) -> None:
        """Say what happens to an image that the first look did not show, once in each process."""
        if option not in self._warned:
            self._warned.add(option)
            print(
                f"Warning: {name} {what}, and others may too. Give {option} if you want that.",
                file=sys.stderr,
            )


class ImageDataset(Images, torch.utils.data.Dataset):
    """Images of one size and mode, and their classes.

    `dataset[[3, 7]]` is `(images, labels)`: uint8 of shape (n, C, H, W) and int64 of shape (n,), or None without
    classes.
    """

    def __init__(self, options: DataOptions):
        super().__init__(options, load_source(options))
        length = len(self.source)
        encoded = self.source.data.column(self.image_column)
        empty = (pc.is_null(pc.struct_field(encoded, part)).to_numpy() for part in ("bytes", "path"))
        self.check_images(np.flatnonzero(np.logical_and(*empty)).tolist(), length)
        if self.label_column is not None:
            labels = self.source[self.label_column][:]
            if self.source.features[self.label_column].dtype in TEXT:
                names = sorted(set(labels) - {None})
                self.source = self.source.cast_column(self.label_column, ClassLabel(names=names))
                self.name_classes(names)
                labels = self.source[self.label_column][:]
            self.check_labels(labels)
            self.classes = sorted(set(labels))
            if self.num_classes is None:
                self.num_classes = max(labels, default=0) + 1
        count = min(LOOKED_AT, length)
        spread = [index * length // count for index in range(count)]
        self.look_at(self.source[spread][self.image_column] if spread else [], spread, length)

    def __len__(self) -> int:
        return len(self.source)

    @property
    def images(self) -> "ImageDataset":
        """The images themselves, as `LatentDataset.images` are those of its latents."""
        return self

    def labels(self) -> torch.Tensor | None:
        """Class of each image, int64 of shape (N,), or None without classes."""
        return self.as_numbered(self.source[self.label_column][:]) if self.label_column else None

    def labels_of(self, indices: list[int]) -> torch.Tensor | None:
        """Class of some images, int64 of shape (n,), or None without classes; their pixels are not read."""
        if self.label_column is None:
            return None
        return self.as_numbered(self.source.select_columns(self.label_column)[indices][self.label_column])

    def origin(self) -> dict[str, Any]:
        """What these images are, in JSON's types. Paths are named by their last part."""
        names = ("dataset_name", "dataset_config_name", "dataset_split", "random_flip")
        return {
            **{name: without_folders(getattr(self.options, name)) for name in names},
            "image_column": self.image_column,
            "num_images": len(self),
            "resolution": self.resolution,
            "image_mode": self.mode,
        }

    def __getitem__(self, indices: list[int]) -> tuple[torch.Tensor, torch.Tensor | None]:
        rows = self.source[indices]
        return self.decode(rows[self.image_column], rows.get(self.label_column), indices)

    __getitems__ = __getitem__  # torch's DataLoader then asks for a whole batch at once


def named(image: dict[str, Any], number: int) -> str:
    """What messages call an encoded image in row `number`."""
    path = f" ({image['path']})" if image["path"] else ""
    return f"Image {number}{path} of the data set"


def open_image(image: dict[str, Any]) -> PILImage.Image:
    """An encoded image whose pixels are decoded when they are asked for, as they are stored: not yet upright."""
    image = read_file(image)
    if image["bytes"] is None and os.path.isfile(image["path"]):
        return PILImage.open(image["path"])
    if image["bytes"] is None:  # on the Hub or elsewhere
        with xopen(image["path"], "rb") as file:
            image = {"bytes": file.read()}
    return PILImage.open(io.BytesIO(image["bytes"]))


def has_gray_mode(image: PILImage.Image) -> bool:
    """Whether the image has gray alone by its mode, or by all colors of its palette. Decodes nothing."""
    if image.mode not in ("P", "PA"):
        return image.mode in GRAY_MODES
    palette = PILImage.new("P", (1, 1))
    palette.putpalette(image.palette)
    red, green, blue = (palette.getpalette("RGB")[channel::3] for channel in range(3))
    return red == green == blue


def has_color(image: PILImage.Image) -> bool:
    """Whether a pixel of an image is not gray."""
    if image.mode in GRAY_MODES:
        return False
    red, green, blue = image.convert("RGB").split()
    return red != green or red != blue


def eight_bit(image: PILImage.Image) -> PILImage.Image:
    """`image` with at most 8 bits a channel and nothing transparent.

    16-bit gray is scaled and transparency is laid on white; PIL's own conversion clips the one and shows hidden colors
    in the other. Raises UserError for gray in 32 bits, whose range is not known.
    """
    # PIL gives gray of 16 bits in PGM files, and in PNG files before version 11.3, a mode of 32 bits.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PPM", "PNG")):
        tags = getattr(image, "tag_v2", {})  # a TIFF may have 12 bits, and black as its highest value
        scaled = np.asarray(image) * (255 / (2 ** tags.get(BITSPERSAMPLE, (16,))[0] - 1))
        return PILImage.fromarray(
            (255 - scaled if tags.get(PHOTOMETRIC_INTERPRETATION) == 0 else scaled).round().astype(np.uint8)
        )
    if image.mode in ("I", "F"):
        raise UserError(
            f"The data set holds images in mode {image.mode!r} (32-bit gray), whose white is not known; save them with "
            "8 or 16 bits."
        )
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return PILImage.alpha_composite(PILImage.new("RGBA", image.size, "white"), image)
    return image


def to_sample(images: torch.Tensor) -> torch.Tensor:
    """uint8 images in 0..255 to float32 in [-1, 1]."""
    return images.to(torch.float32) / 127.5 - 1


def mirrored(images: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """The images, (B, C, H, W), mirrored left to right where `draws`, (B,), uniform in [0, 1), are below 0.5."""
    return torch.where((draws < 0.5)[:, None, None, None], images.flip(-1), images)
