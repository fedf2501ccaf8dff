"""Images of one size and mode and their classes; to samples in [-1, 1]; mirrored."""

import numpy as np
import torch
from datasets import ClassLabel, Features
from PIL import Image as PILImage

from ..cli.errors import UserError
from ..cli.shared_options import DataOptions
from .sources import find_image_column, find_label_column, load_source


GREY_MODES = ("1", "L", "LA", "I", "I;16", "I;16B", "I;16L", "F")


class Images:
    """Size, mode and classes of a data set's images, and how each is made to fit.

    Args:
        options: of the data.
        features: of the data set.
        first: one of the images.
        image_column, label_column: their names; the latter may be None.

    Attributes:
        columns: the columns to read.
        num_classes, id2label: None without classes; those of plain numbers the data set does not tell.
    """

    def __init__(
        self,
        options: DataOptions,
        features: Features,
        first: PILImage.Image,
        image_column: str,
        label_column: str | None,
    ):
        self.image_column, self.label_column = image_column, label_column
        self.columns = [image_column] + ([label_column] if label_column else [])
        self.num_classes, self.id2label = None, None
        if label_column is not None and isinstance(features[label_column], ClassLabel):
            self.num_classes = features[label_column].num_classes
            self.id2label = dict(enumerate(features[label_column].names))
        self.mode = options.image_mode or ("L" if first.mode in GREY_MODES else "RGB")
        self.resolution = options.resolution or min(first.size)

    @property
    def channels(self) -> int:
        return 1 if self.mode == "L" else 3

    def stack(self, images: list[PILImage.Image]) -> torch.Tensor:
        """uint8 of shape (n, C, H, W)."""
        pixels = np.stack([np.asarray(self._fit(image)) for image in images])
        pixels = torch.from_numpy(pixels.reshape(len(images), self.resolution, self.resolution, self.channels))
        return pixels.permute(0, 3, 1, 2).contiguous()

    def _fit(self, image: PILImage.Image) -> PILImage.Image:
        """Scale the shorter side to the resolution and keep the centre.

        As Dhariwal & Nichol (2021) and those after them make ImageNet's images small, whose teachers and figures there are: means of 2x2 pixels
        as long as twice the resolution is left, the rest bicubic. Means alone would weigh pixels unevenly.
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

    `dataset[[3, 7]]` is `(images, labels)`: uint8 of shape (n, C, H, W) and int64 of shape (n,), or None without classes.

    Raises UserError if the data set or a column is not there, is no image column, or is empty.
    """

    def __init__(self, options: DataOptions):
        self.source = load_source(options)
        if len(self.source) == 0:
            raise UserError(
                f"--dataset_name {options.dataset_name} holds no images in --dataset_split {options.dataset_split}."
            )
        features = self.source.features
        image_column = find_image_column(options, features)
        label_column = find_label_column(options, features)
        super().__init__(options, features, self.source[0][image_column], image_column, label_column)
        if label_column is not None:
            labels = self.source[label_column]
            unlabelled = sum(label is None or label < 0 for label in labels)
            if unlabelled:
                raise UserError(
                    f"--label_column {label_column} has no class (null or negative) for {unlabelled} of {len(labels)} images; "
                    "remove those images, or leave --label_column out."
                )
            if self.num_classes is None:
                self.num_classes = max(labels) + 1
        self.source = self.source.select_columns(self.columns)

    def __len__(self) -> int:
        return len(self.source)

    def labels(self) -> torch.Tensor | None:
        """Class of each image, int64 of shape (N,), or None without classes."""
        return torch.tensor(self.source[self.label_column][:]) if self.label_column else None

    def __getitem__(self, indices: list[int]) -> tuple[torch.Tensor, torch.Tensor | None]:
        try:
            rows = self.source[indices]
        except Exception as error:  # PIL and datasets raise many kinds for a broken file
            raise UserError(f"{self._unreadable(indices)} cannot be read: {type(error).__name__}: {error}") from error
        labels = torch.tensor(rows[self.label_column]) if self.label_column else None
        return self.stack(rows[self.image_column]), labels

    def _unreadable(self, indices: list[int]) -> str:
        for index in indices:
            try:
                self.source[index]
            except Exception:
                return f"Image {index} of the data set"
        return f"One of the images {', '.join(map(str, indices))} of the data set"

    __getitems__ = __getitem__  # torch's DataLoader then asks for a whole batch at once


def eight_bit(image: PILImage.Image) -> PILImage.Image:
    """`image` with at most 8 bits a channel and nothing transparent: 16-bit grey is scaled, transparency is laid on white.

    PIL's own conversion clips the one and shows hidden colours in the other. Raises UserError for grey in 32 bits, whose range
    nobody knows.
    """
    if image.mode.startswith("I;16"):
        return PILImage.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
    if image.mode in ("I", "F"):
        raise UserError(
            f"The data set holds images in mode {image.mode!r} (32-bit grey), whose white is not known; save them with 8 or 16 bits."
        )
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return PILImage.alpha_composite(PILImage.new("RGBA", image.size, "white"), image)
    return image


def to_sample(images: torch.Tensor) -> torch.Tensor:
    """uint8 images in 0..255 to float32 in [-1, 1]."""
    return images.to(torch.float32) / 127.5 - 1
