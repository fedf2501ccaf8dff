# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""The latents of a data set's images: encoded once into files, drawn anew from their moments at each use."""

import functools
import glob
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from diffusers import ModelMixin
from safetensors import safe_open
from safetensors.torch import save
from tqdm.auto import tqdm

from diffusers_ctm.autoencoder import downscale, latent_channels, moments, standardized

from ..cli.device import say
from ..cli.errors import UserError, loading
from ..cli.files import atomic_file, tensors_digest
from .images import ImageDataset, to_sample


SHARD = 4096  # images in a file
BATCH = 16  # images that are encoded at once
SPOT_CHECK = 4  # images that are encoded again when files are read


@dataclass
class Autoencoder:
    """An autoencoder, frozen, and how it is used.

    Args:
        network: in evaluation mode, without gradient.
        normalize_images: whether it works on images in [-1, 1]; else in [0, 1].
        name: the folder or repository that it came from.
        revision: the commit of that repository; None for a folder.
        record: where it came from before, of the record of the pipeline that it was found in.
    """

    network: ModelMixin
    normalize_images: bool
    name: str
    revision: str | None = None
    record: dict[str, Any] | None = None

    @property
    def pipeline_options(self) -> dict[str, Any]:
        """What a pipeline of its latents is made with."""
        return {"vae": self.network, "normalize_images": self.normalize_images}

    def digest(self) -> str:
        """A few digits that tell it from other autoencoders, weights and config."""
        config = {name: value for name, value in self.network.config.items() if not name.startswith("_")}
        text = json.dumps([config, self.normalize_images], sort_keys=True, default=str)
        return tensors_digest(self.network.state_dict().items(), text).hex()[:16]


class LatentDataset(torch.utils.data.Dataset):
    """The latents of the images of a data set, in files of a folder.

    What is missing there is encoded by `prepare`, by all processes together; a run that was cut off goes on. A file
    holds "mean" and, of an autoencoder that has it, "std", float16 of shape (n, o, c, h, w): raw latents of n images as
    they are and, with --random_flip, mirrored (o = 2).

    `dataset[[3, 7]]` is `(moments, labels)`: float32 of shape (n, m, o, c, h, w), m = 2 with deviations, and int64 of
    shape (n,), or None without classes. `to_sample` draws latents from moments. Size and channels are the latents';
    all else, such as classes, is the images'.

    Args:
        images: the data set.
        autoencoder: its latents.
        folder: of the files.

    Raises:
        UserError: an image size that the autoencoder does not take; files in the folder that are of other images or of
            another autoencoder, or that cannot be read.
    """

    def __init__(self, images: ImageDataset, autoencoder: Autoencoder, folder: str):
        self.images, self.autoencoder, self.folder = images, autoencoder, folder
        network, factor = autoencoder.network, downscale(autoencoder.network)
        if images.resolution % factor:
            raise UserError(
                f"--resolution {images.resolution}: the autoencoder {autoencoder.name} takes multiples of {factor}."
            )
        if images.channels != network.config.in_channels:
            raise UserError(
                f"--image_mode: the autoencoder {autoencoder.name} takes images with {network.config.in_channels} "
                f"channels, and the data set's have {images.channels}."
            )
        self.channels, self.resolution = latent_channels(network), images.resolution // factor
        self.pipeline_options = autoencoder.pipeline_options
        self.origin = json.dumps({**images.origin(), "autoencoder": autoencoder.digest()})
        self._check_origins()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "autoencoder": None, "pipeline_options": {}}  # processes that read do not encode

    def __getattr__(self, name: str) -> Any:
        if name == "images":  # while this object is made anew in another process
            raise AttributeError(name)
        return getattr(self.images, name)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, indices: list[int]) -> tuple[torch.Tensor, torch.Tensor | None]:
        rows = []
        for index in indices:
            shard, row = divmod(index, SHARD)
            with loading(self._path(shard), "Remove it to have it written anew."):
                file = opened(self._path(shard), os.getpid())
                rows.append(torch.stack([file.get_slice(name)[row].float() for name in file.keys()]))
        labels = self.images.labels_of(indices)
        return torch.stack(rows), labels

    __getitems__ = __getitem__

    def to_sample(self, values: torch.Tensor, random: Any) -> torch.Tensor:
        """Standardized latents (B, c, h, w), drawn from moments (B, m, o, c, h, w), mirrored images or not.

        `random` gives numbers for each of them, by `uniform()` and `normal(*shape)`.
        """
        if values.shape[2] > 1:
            turned = (random.uniform() < 0.5).long()
            values = values[torch.arange(len(values), device=values.device), :, turned]
        else:
            values = values[:, :, 0]
        raw = values[:, 0]
        if values.shape[1] > 1:
            raw = raw + values[:, 1] * random.normal(*raw.shape[1:])
        return standardized(self.autoencoder.network, raw)

    # Files ----------------------------------------------------------------------------------------------------------

    def _path(self, shard: int) -> str:
        return os.path.join(self.folder, f"latents-{shard:05d}-of-{math.ceil(len(self) / SHARD):05d}.safetensors")

    def prepare(self) -> None:
        """Write the files that are not there, and check the others. All processes call it, before the first batch.

        Raises UserError for a file that cannot be written or read, latents that are not finite in float16, and files
        that hold other latents.
        """
        state = PartialState()
        self.autoencoder.network.to(state.device)
        opened.cache_clear()  # a file may have been replaced
        shards = range(math.ceil(len(self) / SHARD))
        missing = [shard for shard in shards if not os.path.isfile(self._path(shard))]
        state.wait_for_everyone()  # all know what is missing before the first of them writes
        own = missing[state.process_index :: state.num_processes]
        count = sum(min(SHARD, len(self) - shard * SHARD) for shard in own)
        with tqdm(total=count, desc="Encoding", unit="image", disable=not own or not state.is_main_process) as progress:
            for shard in own:
                indices = list(range(shard * SHARD, min((shard + 1) * SHARD, len(self))))
                parts = []
                for first in range(0, len(indices), BATCH):
                    parts.append(self._moments(indices[first : first + BATCH]))
                    progress.update(len(parts[-1][0]))
                tensors = {
                    name: torch.cat(values).contiguous()
                    for name, values in zip(("mean", "std"), zip(*parts))
                    if values[0] is not None
                }
                with atomic_file(self._path(shard)) as draft:  # safetensors' own files are for their owner alone
                    Path(draft).write_bytes(save(tensors, {"origin": self.origin}))
        state.wait_for_everyone()
        self._check()

    @torch.no_grad()
    def _moments(self, indices: list[int]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Mean and deviation of raw latents, float16 of shape (n, o, c, h, w) on the CPU.

        Raises UserError if they are not finite.
        """
        network = self.autoencoder.network
        images = to_sample(self.images[indices][0].to(network.device))
        turned = [images, images.flip(-1)] if self.images.options.random_flip else [images]
        found = [moments(network, each, self.autoencoder.normalize_images) for each in turned]
        halves = tuple(
            None if values[0] is None else torch.stack([value.half().cpu() for value in values], dim=1)
            for values in zip(*found)
        )
        if not all(values is None or values.isfinite().all() for values in halves):
            raise UserError(
                f"The autoencoder {self.autoencoder.name} gives latents that are NaN or infinite, or beyond float16, "
                f"for one of the images {indices[0]} to {indices[-1]}."
            )
        return halves

    def _check_origins(self) -> None:
        """Raise UserError if a file in the folder was made of something else, whatever their number."""
        here = json.loads(self.origin)
        for path in sorted(glob.glob(os.path.join(glob.escape(self.folder), "latents-*-of-*.safetensors"))):
            with loading(path, "Remove it to have it written anew."), safe_open(path, "pt") as file:
                made_from = json.loads((file.metadata() or {}).get("origin", "{}"))
            other = [name for name in here if made_from.get(name) != here[name]]
            if other:
                changes = (f"{name} {made_from.get(name)}, here {here[name]}" for name in other)
                raise UserError(
                    f"--latents {self.folder} was made otherwise: {'; '.join(changes)}. Give another folder, which is "
                    "then written."
                )

    @torch.no_grad()
    def _check(self) -> None:
        """Encode a few images again, and say what the latents are."""
        spots = torch.linspace(0, len(self) - 1, min(SPOT_CHECK, len(self))).long().tolist()
        network, kept = self.autoencoder.network, self[spots][0][:, 0, 0]
        again = self._moments(spots)[0][:, 0].float()
        if not (again - kept).abs().max() <= 0.02 * kept.std():  # nor if a file holds NaN
            raise UserError(
                f"--latents {self.folder} does not hold the latents of these images. Give another folder, or remove "
                "this one."
            )
        latents = standardized(network, kept)
        say(
            f"Latents: {self.channels} x {self.resolution} x {self.resolution} of {self.autoencoder.name}, in "
            f"{self.folder}; standard deviation {latents.std():.2f} in {len(spots)} images."
        )


@functools.lru_cache(256)
def opened(path: str, process: int) -> Any:
    """A file of latents, opened once by each process."""
    return safe_open(path, "pt").__enter__()
