# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""The images of a training run, and its batches by seed and step."""

import contextlib
import functools
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from ..cli.errors import UserError, error_text
from ..cli.training_options import RunOptions
from .images import ImageDataset
from .latents import Autoencoder, LatentDataset
from .stream import ImageStream, stream_batches


GRACE = 60  # seconds

LoadedBatch = tuple[torch.Tensor, torch.Tensor | None, dict[str, Any] | None]


def load_images(
    options: RunOptions, autoencoder: Autoencoder | None = None
) -> ImageDataset | ImageStream | LatentDataset:
    """The images of a training run, all at hand or streamed, or their latents. Raises UserError as these do."""
    if options.streaming:
        return ImageStream(options, options.shuffle_buffer)
    images = ImageDataset(options)
    if autoencoder is None:
        if options.latents is not None:
            raise UserError(
                f"--latents {options.latents} needs the autoencoder that made them: give --vae, or a teacher that has "
                "one."
            )
        return images
    return LatentDataset(images, autoencoder, options.latents or f"{os.path.normpath(options.output_dir)}-latents")


def run_batches(
    dataset: ImageDataset | ImageStream | LatentDataset,
    options: RunOptions,
    first_step: int,
    parts: list[int],
    num_parts: int,
    position: dict[str, Any] | None = None,
    pin_memory: bool = False,
) -> Iterator[LoadedBatch]:
    """(images, labels, position) for one process: what the data set gives, int64 (n,) or None, the place in a stream.

    The images of a step are the same however it is split into parts (`step_indices`). Raises UserError if an image
    cannot be read.

    Args:
        first_step: the step to begin with.
        parts: this process's, of `num_parts`.
        position: where a stream goes on; None is the beginning.
        pin_memory: for a GPU.
    """
    split = (options.train_batch_size, options.seed, first_step, options.max_train_steps, parts, num_parts)
    if isinstance(dataset, ImageStream):
        return stream_batches(dataset, *split, position, options.dataloader_num_workers)
    return load_batches(dataset, step_indices(len(dataset), *split), options.dataloader_num_workers, pin_memory)


def step_indices(
    length: int, batch_size: int, seed: int, first_step: int, last_step: int, parts: list[int], num_parts: int
) -> Iterator[list[int]]:
    """Batches of indices for one process, a function of seed and step: a run resumes by saying where it stands.

    Each epoch is a permutation of the data set and batches run across its ends. The images of a step are the same for
    every split of `total = batch_size * num_parts` into batches; a part is one process in one accumulation step.
    """

    @functools.lru_cache(2)  # a batch may run across an end
    def order(epoch: int) -> torch.Tensor:
        return torch.randperm(length, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))

    for step in range(first_step, last_step):
        for part in parts:
            begin = (step * num_parts + part) * batch_size
            places = range(begin, begin + batch_size)
            yield [int(order(place // length)[place % length]) for place in places]


def load_batches(
    dataset: ImageDataset | LatentDataset, indices: Iterable[list[int]], num_workers: int, pin_memory: bool
) -> Iterator[LoadedBatch]:
    """The batches of `indices`, decoded by `num_workers` processes ahead of time, or by this one if it is 0.

    Raises UserError if one of the processes dies or an image cannot be read.
    """
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_sampler=indices,
        collate_fn=tuple,
        num_workers=num_workers,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # without it the loader would draw from the generator that dropout uses
        worker_init_fn=leave_signals_to_the_main_process,
    )
    with contextlib.ExitStack() as stack:
        loaded = iter(loader)
        if num_workers and threading.current_thread() is threading.main_thread():
            # Torch's handler would raise the death of a process in whatever line runs at the moment; without it the
            # death shows below. It comes back last, since a connection breaks before the signal that its process died.
            stack.callback(signal.signal, signal.SIGCHLD, signal.signal(signal.SIGCHLD, signal.SIG_DFL))
        if num_workers:  # without this a traceback that refers to them would keep the processes running
            stack.callback(loaded._shutdown_workers)
        try:
            for images, labels in loaded:
                yield images, labels, None
        except UserError as error:  # with the other process's traceback before it
            raise UserError(str(error).rsplit("UserError: ", 1)[-1].strip()) from None
        except (RuntimeError, OSError, EOFError) as error:
            if not num_workers or "Caught " in str(error):  # by a process that lives
                raise
            raise UserError(
                f"A process that reads images died ({error_text(error)}), mostly for want of memory, or of shared "
                f"memory in a container (--shm-size). Lower --dataloader_num_workers {num_workers}, then resume with "
                "--resume_from_checkpoint latest."
            ) from error


def leave_signals_to_the_main_process(worker: int = 0) -> None:
    """Let a data-loading process end when the main one says so: a terminal and a batch system signal both.

    After a signal it ends within `GRACE` all the same: the main process may be waiting for it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(GRACE))
