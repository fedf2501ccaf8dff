# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""The latents of a data set's images: moments in files, encoded once, here or by others, and drawn anew at each use."""

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
from .dataset_tool import LABELS, ToolLatents, is_tool_output
from .images import ImageDataset, to_sample


SHARD = 4096  # images in a file
BATCH = 16  # images that are encoded at once
SPOT_CHECK = 4  # images that are encoded again when files are read
# Of the latents' deviation, root mean square over an image: float16 gives 0.002, bfloat16 0.02, another image 0.5.
TOLERANCE = 0.04


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


class LatentFiles:
    """Moments of latents in files of a folder, which are written here.

    A file holds "mean" and, of an autoencoder that has it, "std", float16 of shape (n, o, c, h, w): raw latents of n
    images as they are and, with --random_flip, mirrored (o = 2).

    Args:
        folder: of the files.
        length: number of images.
        origin: what the latents are made of, as JSON.

    Raises UserError for files in the folder that were made of something else, or cannot be read.
    """

    def __init__(self, folder: str, length: int, origin: str):
        self.folder, self.length, self.origin = folder, length, origin
        self._check_origins()

    def read(self, indices: list[int]) -> torch.Tensor:
        """Moments of images, float32 of shape (n, m, o, c, h, w), m = 2 with deviations."""
        rows = []
        for index in indices:
            shard, row = divmod(index, SHARD)
            with loading(self._path(shard), "Remove it to have it written anew."):
                file = opened(self._path(shard), os.getpid())
                rows.append(torch.stack([file.get_slice(name)[row].float() for name in file.keys()]))
        return torch.stack(rows)

    def missing(self) -> list[range]:
        """The images of each file that is not there."""
        opened.cache_clear()  # a file may have been replaced
        starts = range(0, self.length, SHARD)
        return [
            range(start, min(start + SHARD, self.length))
            for start in starts
            if not os.path.isfile(self._path(start // SHARD))
        ]

    def write(self, images: range, tensors: dict[str, torch.Tensor]) -> None:
        """Write the file of these images. Raises UserError if that fails."""
        with atomic_file(self._path(images.start // SHARD)) as draft:
            # safetensors' own files are for their owner alone.
            Path(draft).write_bytes(save(tensors, {"origin": self.origin}))

    def _path(self, shard: int) -> str:
        return os.path.join(self.folder, f"latents-{shard:05d}-of-{math.ceil(self.length / SHARD):05d}.safetensors")

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


@functools.lru_cache(256)
def opened(path: str, process: int) -> Any:
    """A file of latents, opened once by each process."""
    return safe_open(path, "pt").__enter__()


class LatentDataset(torch.utils.data.Dataset):
    """The latents of the images of a data set, in files of a folder, or in those of EDM2's dataset_tool.

    What is missing in the folder is encoded by `prepare`, by all processes together; a run that was cut off goes on.
    Files of the tool are read and never written.

    `dataset[[3, 7]]` is `(moments, labels)`: float32 of shape (n, m, o, c, h, w), m = 2 with deviations, o = 2 with
    mirrored images, and int64 of shape (n,), or None without classes. `to_sample` draws latents from moments. Size and
    channels are the latents'; all else, such as classes, is the images'.

    Args:
        images: the data set.
        autoencoder: its latents.
        path: the folder, or a folder or .zip file of the tool.

    Raises:
        UserError: an image size that the autoencoder does not take; files that are of other images or of another
            autoencoder, or that cannot be read.
    """

    def __init__(self, images: ImageDataset, autoencoder: Autoencoder, path: str):
        self.images, self.autoencoder, self.path = images, autoencoder, path
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
        self._files: LatentFiles | ToolLatents
        if path.endswith(".zip") or is_tool_output(path):
            self._files = ToolLatents(path, (self.channels, self.resolution, self.resolution))
            self._check_tool()
        else:
            origin = json.dumps({**images.origin(), "autoencoder": autoencoder.digest()})
            self._files = LatentFiles(path, len(images), origin)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "autoencoder": None, "pipeline_options": {}}  # processes that read do not encode

    def __getattr__(self, name: str) -> Any:
        if name == "images":  # while this object is made anew in another process
            raise AttributeError(name)
        return getattr(self.images, name)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, indices: list[int]) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self._files.read(indices), self.images.labels_of(indices)

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

    def prepare(self) -> None:
        """Write the files that are not there, and check the others. All processes call it, before the first batch.

        Raises UserError for a file that cannot be written or read, latents that are not finite in float16, and files
        that hold other latents.
        """
        state = PartialState()
        self.autoencoder.network.to(state.device)
        if isinstance(self._files, LatentFiles):
            missing = self._files.missing()
            state.wait_for_everyone()  # all know what is missing before the first of them writes
            self._write(missing[state.process_index :: state.num_processes], state.is_main_process)
        state.wait_for_everyone()
        self._check()

    def _write(self, missing: list[range], is_main_process: bool) -> None:
        """Encode these images and write their files."""
        hidden = not missing or not is_main_process
        with tqdm(total=sum(map(len, missing)), desc="Encoding", unit="image", disable=hidden) as progress:
            for images in missing:
                parts = []
                for first in range(0, len(images), BATCH):
                    parts.append(self._moments(list(images[first : first + BATCH]), self.autoencoder.normalize_images))
                    progress.update(len(parts[-1][0]))
                tensors = {
                    name: torch.cat(values).contiguous()
                    for name, values in zip(("mean", "std"), zip(*parts))
                    if values[0] is not None
                }
                self._files.write(images, tensors)

    @torch.no_grad()
    def _moments(self, indices: list[int], normalize_images: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Mean and deviation of raw latents, float16 of shape (n, o, c, h, w) on the CPU.

        The autoencoder is shown images in [-1, 1], or without `normalize_images` in [0, 1]. Raises UserError if they
        are not finite.
        """
        network = self.autoencoder.network
        images = to_sample(self.images[indices][0].to(network.device))
        turned = [images, images.flip(-1)] if self.images.options.random_flip else [images]
        found = [moments(network, each, normalize_images) for each in turned]
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

    def _check_tool(self) -> None:
        """Raise UserError if files of the tool cannot be of these images."""
        files, path = self._files, self.path
        if self.images.options.random_flip:
            raise UserError(
                f"--random_flip must be false with --latents {path}, which holds no latents of mirrored images. Or "
                "give --latents a new folder, to which both are written."
            )
        if len(files) != len(self):
            raise UserError(
                f"--latents {path} holds the latents of {len(files):,} images, and --dataset_name "
                f"{self.images.options.dataset_name} has {len(self):,}. They must be of the same images, in the order "
                "of their names."
            )
        if files.labels is not None and self.label_column is not None:
            labels = self.labels().tolist()
            both = set(zip(files.labels, labels))
            if len(both) > max(len(set(files.labels)), len(set(labels))):  # whatever the classes' numbers
                raise UserError(
                    f"--latents {path}: its {LABELS} puts the images into other classes than --label_column "
                    f"{self.label_column} of the data set. Its latents are of other images, or in another order."
                )

    def _check(self) -> None:
        """Encode a few images again, and say what the latents are. Raises UserError if the files hold others."""
        spots = torch.linspace(0, len(self) - 1, min(SPOT_CHECK, len(self))).long().tolist()
        autoencoder, kept = self.autoencoder, self[spots][0][:, :, 0]
        latents = kept[:, 0]

        def agree(normalize_images: bool) -> bool:
            again = [values[:, 0] for values in self._moments(spots, normalize_images) if values is not None]
            difference = (torch.stack(again, dim=1).float() - kept).square().mean((2, 3, 4)).sqrt()
            return bool((difference <= TOLERANCE * latents.std()).all())  # nor if a file holds NaN

        if not agree(autoencoder.normalize_images):
            ranges = {True: "[-1, 1]", False: "[0, 1]"}
            ours, other = autoencoder.normalize_images, not autoencoder.normalize_images
            if isinstance(self._files, ToolLatents) and agree(other):
                raise UserError(
                    f"--latents {self.path} holds the latents of these images in {ranges[other]}, and the autoencoder "
                    f"{autoencoder.name} is shown images in {ranges[ours]}. Give --vae_unit_range {str(ours).lower()} "
                    "with --vae. A teacher's autoencoder is shown what the teacher knows: leave --latents out then."
                )
            raise UserError(
                f"--latents {self.path} does not hold the latents of these images by the autoencoder "
                f"{autoencoder.name}. Give another folder, which is then written."
            )
        say(
            f"Latents: {self.channels} x {self.resolution} x {self.resolution} of {autoencoder.name}, in {self.path}; "
            f"standard deviation {standardized(autoencoder.network, latents).std():.2f} in {len(spots)} images."
        )
