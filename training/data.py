"""Images through `datasets`, in an order that depends on the seed and the step alone."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Features, Image, IterableDataset, ReadInstruction, load_dataset
from PIL import Image as PILImage

from .config import DataOptions, UserError
from .interruption import leave_signals_to_the_main_process


def digits() -> Dataset:
    """scikit-learn's 1,797 handwritten digits, 8x8 grey, with labels."""
    from sklearn.datasets import load_digits

    source = load_digits()
    pixels = np.round(source.images * (255 / 16)).astype(np.uint8)  # 17 grey levels, 0 to 16
    features = Features({"image": Image(), "label": ClassLabel(names=[str(i) for i in range(10)])})
    columns = {"image": [PILImage.fromarray(image) for image in pixels], "label": source.target.tolist()}
    return Dataset.from_dict(columns, features=features)


def load_source(options: DataOptions, streaming: bool = False) -> Dataset | IterableDataset:
    """The data set that the options name. Raises UserError if it is not there."""
    name = options.dataset_name
    if name == "digits" and not os.path.exists(name):
        if options.dataset_config_name is not None:
            raise UserError("--dataset_name digits has no configurations; leave --dataset_config_name out.")
        part = _part(digits(), options.dataset_split)
        return part.to_iterable_dataset() if streaming else part
    try:
        if name.endswith(".parquet"):  # the file is whatever split is asked for
            files = {options.dataset_split.partition("[")[0]: name}
            return load_dataset("parquet", data_files=files, split=options.dataset_split, streaming=streaming)
        return load_dataset(name, options.dataset_config_name, split=options.dataset_split, streaming=streaming)
    except Exception as error:  # datasets raises many kinds for a name, split or configuration that is not there
        raise UserError(f"--dataset_name {name} cannot be loaded: {type(error).__name__}: {error}") from error


def _part(dataset: Dataset, split: str) -> Dataset:
    """The part of a data set in memory, whose one split is "train", that `load_dataset` would take by `split`."""
    try:
        parts = ReadInstruction.from_spec(split).to_absolute({"train": len(dataset)})
    except (ValueError, AssertionError) as error:
        raise UserError(
            f"--dataset_split {split}: the digits have 'train' and its parts, such as 'train[:1500]' or 'train[-10%:]'. {error}"
        ) from error
    return dataset.select([index for part in parts for index in range(part.from_, part.to)])


def _column(features: Features, option: str, name: str) -> str:
    if name not in features:
        raise UserError(f"--{option} {name} is not a column of the data set; it has {', '.join(features)}.")
    return name


def find_image_column(options: DataOptions, features: Features) -> str:
    """The column of the images. Raises UserError if it is not there, holds none, or is not named among several."""
    image_columns = [name for name, feature in features.items() if isinstance(feature, Image)]
    if options.image_column is not None:
        name = _column(features, "image_column", options.image_column)
        if name not in image_columns:
            raise UserError(f"--image_column {name} holds no images; image columns: {image_columns}.")
        return name
    if len(image_columns) == 1:
        return image_columns[0]
    if image_columns:
        raise UserError(f"--image_column is needed: the data set has the image columns {', '.join(image_columns)}.")
    raise UserError(
        f"--dataset_name {options.dataset_name} has no column of images (feature `Image` of datasets); its columns are {', '.join(features)}."
    )


def find_label_column(options: DataOptions, features: Features) -> str | None:
    """The column of the classes, or None. Raises UserError if it is not there or holds something else."""
    if options.label_column is None:
        return None
    name = _column(features, "label_column", options.label_column)
    if not str(getattr(features[name], "dtype", "")).startswith(("int", "uint")):
        raise UserError(f"--label_column {name} must hold classes or whole numbers, it holds {features[name]}.")
    return name


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


class StepSampler:
    """Batches of indices for one process, a function of seed and step: a run resumes by saying where it stands.

    Each epoch is a permutation of the data set and batches run across its ends. The images of a step are the same for every split of
    `total = batch_size * num_parts` into batches; a part is one process in one accumulation step.
    """

    def __init__(
        self, length: int, batch_size: int, seed: int, first_step: int, last_step: int, parts: list[int], num_parts: int
    ):
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.steps = range(first_step, last_step)
        self.parts, self.num_parts = parts, num_parts

    def __len__(self) -> int:
        return len(self.steps) * len(self.parts)

    def __iter__(self) -> Iterator[list[int]]:
        orders: dict[int, torch.Tensor] = {}
        for step in self.steps:
            for part in self.parts:
                begin = (step * self.num_parts + part) * self.batch_size
                batch = []
                for position in range(begin, begin + self.batch_size):
                    epoch, index = divmod(position, self.length)
                    if epoch not in orders:
                        orders = {e: order for e, order in orders.items() if e >= epoch - 1}
                        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
                        orders[epoch] = torch.randperm(self.length, generator=generator)
                    batch.append(int(orders[epoch][index]))
                yield batch


def load_batches(
    dataset: ImageDataset, sampler: Iterable[list[int]], num_workers: int, pin_memory: bool = False
) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    """The batches that `sampler` names, decoded by `num_workers` processes ahead of time, or by this one if that is 0.

    Raises UserError if one of the processes dies or an image cannot be read.
    """
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=_identity,
        num_workers=num_workers,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # else starting it would draw from the generator that dropout uses
        worker_init_fn=leave_signals_to_the_main_process,
    )
    with contextlib.ExitStack() as stack:
        loaded = iter(loader)
        if num_workers and threading.current_thread() is threading.main_thread():
            # Torch would raise the death of a process in whatever line runs at the moment. Without that it is found below. Torch's
            # handler comes back last, since a connection breaks before the signal that its process died.
            stack.callback(signal.signal, signal.SIGCHLD, signal.signal(signal.SIGCHLD, signal.SIG_DFL))
        if num_workers:  # without this a traceback that refers to them would keep the processes running
            stack.callback(loaded._shutdown_workers)
        while True:
            try:
                batch = next(loaded)
            except StopIteration:
                return
            except UserError as error:  # with the other process's traceback before it
                raise UserError(str(error).rsplit("UserError: ", 1)[-1].strip()) from None
            except (RuntimeError, OSError, EOFError) as error:
                # Torch notices the death, or this process had begun to fetch what the dead one offered.
                fetching = isinstance(error, (ConnectionError, FileNotFoundError, EOFError)) and "Caught " not in str(
                    error
                )
                if not num_workers or not (fetching or "DataLoader worker (" in str(error)):
                    raise
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                raise UserError(
                    f"A process that reads images died ({reason}), mostly for want of memory, or of shared memory in a "
                    f"container (--shm-size). Lower --dataloader_num_workers {num_workers}, then resume with --resume_from_checkpoint latest."
                ) from error
            yield batch


def _identity(batch):
    return batch
