"""Images read as they come, in an order that a run can resume."""

import collections
import concurrent.futures
import contextlib
import itertools
import queue
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch
from datasets import Image

from ..cli.errors import UserError
from ..cli.shared_options import DataOptions
from .images import Images
from .sources import find_image_column, find_label_column, load_source


T = TypeVar("T")

Row = dict[str, Any]


@dataclass
class Position:
    """A place in the endless stream of epochs: the beginning of a window of images that are shuffled together.

    Args:
        epoch, window: their numbers, from 0.
        first: number of images before the window, in all epochs.
        stream: what `datasets` needs to go on there; None is the beginning of the epoch.
    """

    epoch: int = 0
    window: int = 0
    first: int = 0
    stream: dict[str, Any] | None = None


class ImageStream(Images):
    """Images of one size and mode, and their classes, of a data set that is not held.

    Windows of `window` images are shuffled, each by a permutation that seed, epoch and window fix. So the order is a function of
    the seed, and to resume means to read one window again.

    Raises UserError if the data set or a column is not there, is no image column, is empty, or has classes whose number is not known.
    """

    def __init__(self, options: DataOptions, window: int):
        source = load_source(options, streaming=True)
        try:
            first = next(iter(source), None)
            features = source.features or source._resolve_features().features
        except Exception as error:  # of the network, a file or a decoder
            raise UserError(
                f"--dataset_name {options.dataset_name} cannot be read: {type(error).__name__}: {error}"
            ) from error
        if first is None:
            raise UserError(
                f"--dataset_name {options.dataset_name} holds no images in --dataset_split {options.dataset_split}."
            )
        image_column, label_column = find_image_column(options, features), find_label_column(options, features)
        super().__init__(options, features, first[image_column], image_column, label_column)
        if label_column is not None and self.num_classes is None:
            raise UserError(
                f"--label_column {label_column} holds plain numbers, whose number of classes a stream does not tell; give the data set a "
                "feature ClassLabel there, or leave out --streaming."
            )
        # Decoded later, by whom it concerns.
        self.source = source.select_columns(self.columns).cast_column(image_column, Image(decode=False))
        self.window = window

    def rows(self, seed: int, position: Position, begin: int) -> Iterator[tuple[int, Row, Position]]:
        """All rows from number `begin` on, in shuffled order and without end, with their numbers and the windows they are in.

        `position` is a window that begins at `begin` or before.
        """
        while True:
            for at, window in self._windows(position):
                if at.first + len(window) > begin:
                    numbers = (seed * 1_000_003 + at.epoch) * 1_000_003 + at.window
                    order = torch.randperm(len(window), generator=torch.Generator().manual_seed(numbers)).tolist()
                    for number, index in enumerate(order, at.first):
                        if number >= begin:
                            yield number, window[index], at
                position = Position(epoch=at.epoch + 1, first=at.first + len(window))
            if position.window:  # it was the end of an epoch
                position = Position(epoch=position.epoch + 1, first=position.first)

    def _windows(self, position: Position) -> Iterator[tuple[Position, list[Row]]]:
        """The windows of an epoch, from `position` on."""
        source = self.source
        source.set_epoch(position.epoch)  # which also tells a state to be loaded from one that was
        source.load_state_dict(position.stream)
        iterator, first, stream = iter(source), position.first, position.stream
        for number in itertools.count(position.window):
            try:
                window = list(itertools.islice(iterator, self.window))
            except Exception as error:  # of the network or a file, after datasets has tried again
                raise UserError(
                    f"The data set cannot be read any further: {type(error).__name__}: {error}. Resume with --resume_from_checkpoint latest."
                ) from error
            if not window:
                if number == 0:
                    raise UserError("The streamed data set holds no images any more.")
                return
            yield Position(position.epoch, number, first, stream), window
            first, stream = first + len(window), source.state_dict()

    def decode(self, rows: list[Row]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """uint8 images of shape (n, C, H, W) and int64 classes of shape (n,), or None. Raises UserError for what cannot be read."""
        images = []
        for row in rows:
            try:
                images.append(Image().decode_example(row[self.image_column]))
            except Exception as error:  # PIL raises many kinds for a broken file
                name = (row[self.image_column] or {}).get("path") or "without a name"
                raise UserError(
                    f"An image of the data set ({name}) cannot be read: {type(error).__name__}: {error}"
                ) from error
        if self.label_column is None:
            return self.stack(images), None
        labels = [row[self.label_column] for row in rows]
        if any(label is None or label < 0 for label in labels):
            raise UserError(
                f"--label_column {self.label_column} has no class (null or negative) for an image; remove such images, or leave "
                "--label_column out."
            )
        return self.stack(images), torch.tensor(labels)


def stream_batches(
    stream: ImageStream,
    batch_size: int,
    seed: int,
    first_step: int,
    last_step: int,
    parts: list[int],
    num_parts: int,
    position: dict[str, Any] | None,
    num_workers: int,
) -> Iterator[tuple[torch.Tensor, torch.Tensor | None, dict[str, Any]]]:
    """(images, labels, position) for one process, as `StepSampler` names them: a step has the same images however it is split.

    Every process reads the whole stream, and decodes its own part of it. `position`, also of another process, is where to go on;
    None is the beginning. With `num_workers`, so many threads decode, ahead of time.
    """
    total = batch_size * num_parts

    def own() -> Iterator[tuple[list[Row], Position]]:
        batch = []
        start = Position() if position is None else Position(**position)
        for number, row, at in stream.rows(seed, start, first_step * total):
            step, place = divmod(number, total)
            if step == last_step:
                return
            if place // batch_size in parts:
                batch.append(row)
                if len(batch) == batch_size:
                    yield batch, at
                    batch = []

    if num_workers == 0:
        for rows, at in own():
            yield *stream.decode(rows), asdict(at)
        return

    def decoded() -> Iterator[tuple[torch.Tensor, torch.Tensor | None, dict[str, Any]]]:
        with concurrent.futures.ThreadPoolExecutor(num_workers) as pool:
            begun: collections.deque = collections.deque()
            for rows, at in own():
                begun.append((pool.submit(stream.decode, rows), at))
                if len(begun) > num_workers:
                    done, at = begun.popleft()
                    yield *done.result(), asdict(at)
            for done, at in begun:
                yield *done.result(), asdict(at)

    with contextlib.closing(ahead(decoded(), num_workers)) as batches:
        yield from batches


def ahead(iterator: Iterator[T], depth: int) -> Iterator[T]:
    """What `iterator` gives, made by another thread up to `depth` pieces ahead. What it raises is raised here."""
    made: queue.Queue = queue.Queue(depth)
    closed = threading.Event()

    def put(piece: tuple[str, Any]) -> None:
        while not closed.is_set():
            with contextlib.suppress(queue.Full):
                return made.put(piece, timeout=0.1)

    def work() -> None:
        try:
            with contextlib.closing(iterator):
                for piece in iterator:
                    put(("piece", piece))
                    if closed.is_set():
                        return
            put(("end", None))
        except BaseException as error:
            put(("error", error))

    thread = threading.Thread(target=work, name="reading ahead", daemon=True)
    thread.start()
    try:
        while True:
            kind, piece = made.get()
            if kind == "piece":
                yield piece
            elif kind == "error":
                raise piece
            else:
                return
    finally:
        closed.set()
        thread.join(timeout=5)
