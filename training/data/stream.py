# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Images read as they come, in an order that a run can resume."""

import collections
import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from multiprocessing.pool import ThreadPool
from typing import Any, TypeVar

import datasets
import torch

from ..cli.errors import UserError, loading
from ..cli.shared_options import DataOptions
from .images import Images
from .sources import TEXT, load_source


T = TypeVar("T")

Row = tuple[int, dict[str, Any]]  # its number in an epoch, its columns

FIRST = 64  # rows whose images are looked at before a stream begins


@dataclass
class Position:
    """A place in the endless stream of epochs: the beginning of a window of images that are shuffled together.

    Args:
        epoch, window: their numbers, from 0.
        first: number of images before the window, in all epochs.
        stream: the state from which `datasets` goes on there; None is the beginning of the epoch.
    """

    epoch: int = 0
    window: int = 0
    first: int = 0
    stream: dict[str, Any] | None = None


class ImageStream(Images):
    """Images of one size and mode, and their classes, of a data set that is not held.

    Windows of `window` images are shuffled, each by a permutation that seed, epoch and window fix. So the order is a
    function of the seed, and a run that resumes reads one window again.

    Raises UserError also if the number of classes is not known.
    """

    def __init__(self, options: DataOptions, window: int):
        if datasets.__version__ == "5.0.0":
            raise UserError("--streaming: datasets 5.0.0 loses its place when a run is resumed twice; install another.")
        source = load_source(options, streaming=True)
        with loading(f"--dataset_name {options.dataset_name}"):
            if source.features is None:
                source = source._resolve_features()
            super().__init__(options, source)
            first = list(enumerate(itertools.islice(iter(self.source), FIRST)))
        is_text = self.label_column is not None and source.features[self.label_column].dtype in TEXT
        if is_text or (self.label_column is not None and self.num_classes is None):
            kind = "text" if is_text else "plain numbers"
            raise UserError(
                f"--label_column {self.label_column} holds {kind}, whose number of classes a stream does not tell; "
                f"{'give the data set a feature ClassLabel there' if is_text else 'give --num_classes'}, or leave out "
                "--streaming."
            )
        self.window = window
        self._check_rows(first)
        self.look_at([row[self.image_column] for _, row in first], range(len(first)), None)

    def rows(self, seed: int, position: Position, begin: int) -> Iterator[tuple[int, Row, Position]]:
        """All rows from number `begin` on, shuffled and without end, with their numbers and the windows they are in.

        `position` is a window that begins at `begin` or before.
        """
        for place, window in self._windows(position):
            if place.first + len(window) > begin:
                numbers = (seed * 1_000_003 + place.epoch) * 1_000_003 + place.window
                generator = torch.Generator().manual_seed(numbers % 2**64)  # larger ones overflow
                order = torch.randperm(len(window), generator=generator).tolist()
                for number, index in enumerate(order, place.first):
                    if number >= begin:
                        yield number, window[index], place

    def _windows(self, position: Position) -> Iterator[tuple[Position, list[Row]]]:
        """The windows from `position` on, epoch after epoch."""
        source = self.source
        while True:
            source.set_epoch(position.epoch)  # datasets then also sees that a state to load is not one that it loaded
            source.load_state_dict(position.stream)
            iterator = iter(source)
            while True:
                with loading("The rest of the data set", "Resume with --resume_from_checkpoint latest."):
                    # Every window of an epoch but the last is full.
                    window = list(enumerate(itertools.islice(iterator, self.window), position.window * self.window))
                if not window:
                    break
                self._check_rows(window)
                yield position, window
                first = position.first + len(window)
                position = Position(position.epoch, position.window + 1, first, source.state_dict())
            if position.window == 0:
                raise UserError("The streamed data set holds no images any more.")
            position = Position(position.epoch + 1, first=position.first)

    def decode_rows(self, rows: list[Row]) -> tuple[torch.Tensor, torch.Tensor | None]:
        images, labels = [row[self.image_column] for _, row in rows], [row.get(self.label_column) for _, row in rows]
        return self.decode(images, labels, [number for number, _ in rows])

    def _check_rows(self, rows: list[Row]) -> None:
        images = ((number, row[self.image_column] or {}) for number, row in rows)
        empty = [number for number, image in images if image.get("bytes") is None and image.get("path") is None]
        self.check_images(empty, len(rows))


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
    """(images, labels, position) for one process, split as in `step_indices`.

    Every process reads the whole stream and decodes its own part of it. `position`, also another process's, is where
    to go on; None is the beginning. With `num_workers`, so many threads decode ahead of time.
    """
    total = batch_size * num_parts

    def batches_of_rows() -> Iterator[tuple[list[Row], dict[str, Any]]]:
        batch = []
        for number, row, place in stream.rows(seed, Position(**position or {}), first_step * total):
            step, index = divmod(number, total)
            if step == last_step:
                return
            if index // batch_size in parts:
                batch.append(row)
                if len(batch) == batch_size:
                    yield batch, asdict(place)
                    batch = []

    if num_workers == 0:
        for rows, place in batches_of_rows():
            yield *stream.decode_rows(rows), place
        return
    with ThreadPool(num_workers) as decoders:
        begun = ((decoders.apply_async(stream.decode_rows, [rows]), place) for rows, place in batches_of_rows())
        with contextlib.closing(ahead(begun, num_workers)) as batches:
            for batch, place in batches:
                yield *batch.get(), place


def ahead(iterator: Iterator[T], depth: int) -> Iterator[T]:
    """The pieces of `iterator`, made by another thread up to `depth` ahead. Its errors are raised here.

    The thread is a daemon: one that hangs keeps neither the caller nor the program from ending.
    """
    end = object()
    with ThreadPool(1) as reader:
        made = collections.deque(reader.apply_async(next, [iterator, end]) for _ in range(depth + 1))
        while (piece := made.popleft().get()) is not end:
            made.append(reader.apply_async(next, [iterator, end]))
            yield piece
