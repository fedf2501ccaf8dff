# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""The Frechet distance of a run's samples while it trains, and its file metrics.jsonl."""

import json
import math
import os
from collections.abc import Callable

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from diffusers_ctm import CTMPipeline

from ..cli.errors import UserError, loading
from ..cli.files import atomic_file
from ..cli.training_options import RunOptions
from ..data.images import ImageDataset, mirrored
from ..data.latents import LatentDataset
from .distances import Distances, check_counts, features_for
from .sampling import Setting, class_labels, draw


METRICS = "metrics.jsonl"

BATCH = 250  # most images per evaluation of the network

MOST_REFERENCE = 50_000  # real images; a larger data set gives so many, evenly spaced


class DistanceToData:
    """The Frechet distance of samples to the data set's images, measured by all processes together.

    The numbers do not depend on how many processes there are. Measuring changes nothing in the training: its noise
    comes from other generators.

    Args:
        options: of the run.
        dataset: images, or latents of images.
        accelerator: of the run.

    Raises UserError if the features do not fit the images or there are too few images.
    """

    def __init__(self, options: RunOptions, dataset: ImageDataset | LatentDataset, accelerator: Accelerator):
        self.options, self.dataset, self.accelerator = options, dataset.images, accelerator
        with torch.random.fork_rng(devices=[]):  # making a network draws weights first
            self.network = features_for(self.dataset, options.eval_features, accelerator.device, "eval_")
        self.num_reference = min(len(self.dataset), MOST_REFERENCE)
        check_counts(options.eval_samples, self.num_reference, self.network.num_features, "eval_")
        self._distances: Distances | None = None

    @torch.inference_mode()
    def __call__(self, pipe: CTMPipeline, sample_settings: dict[str, dict]) -> dict[str, float]:
        """Distance of each setting's samples, by its name; NaN if the network makes infinite or NaN pixels.

        Empty in all but the main process.
        """
        count = self.options.eval_samples
        labels = class_labels(pipe.classes, self.dataset.labels(), count)
        pipe.set_progress_bar_config(disable=True)
        if self._distances is None:
            reference = self._features(self.num_reference, self._reference)
            # Other processes only draw: they keep no reference.
            self._distances = Distances(reference) if self.accelerator.is_main_process else lambda features: {}
        measured = {}
        for name, settings in sample_settings.items():
            setting = Setting("ctm", settings["num_inference_steps"], settings.get("gamma"))

            def samples(indices: torch.Tensor, batch: int, setting=setting) -> torch.Tensor:
                own = None if labels is None else labels[indices]
                return draw(pipe, setting, len(indices), own, 0, batch)

            features = self._features(count, samples)
            if features is not None:
                finite = bool(features.isfinite().all())
                measured[name] = self._distances(features)["frechet"] if finite else math.nan
        return measured

    def _reference(self, indices: torch.Tensor, batch: int) -> torch.Tensor:
        images, _ = self.dataset[(indices * len(self.dataset) // self.num_reference).tolist()]
        if self.options.random_flip:
            images = mirrored(images, torch.rand(len(images), generator=torch.Generator().manual_seed(batch)))
        return images.to(self.accelerator.device)

    def _features(self, count: int, make: Callable[[torch.Tensor, int], torch.Tensor]) -> torch.Tensor | None:
        """Features of `count` images, (count, F) on the CPU of the main process, None elsewhere.

        Each of n processes makes every n-th batch. `make(indices, batch)` gives uint8 images; if it raises UserError,
        their features are NaN.
        """
        accelerator, own = self.accelerator, {}
        for batch, indices in enumerate(torch.arange(count).split(BATCH)):
            if batch % accelerator.num_processes != accelerator.process_index:
                continue
            try:
                own[batch] = self.network(make(indices, batch)).float().cpu()
            except UserError:
                own[batch] = torch.full((len(indices), self.network.num_features), math.nan)
        batches = {batch: features for part in gather_object([own]) for batch, features in part.items()}
        return torch.cat([batches[batch] for batch in sorted(batches)]) if accelerator.is_main_process else None


def keep_metrics(output_dir: str, step: int, *new: dict) -> None:
    """Rewrite output_dir/metrics.jsonl as a whole: its lines of the steps before `step`, then `new`."""
    path, lines = os.path.join(output_dir, METRICS), []
    if os.path.isfile(path):
        with loading(path, "Remove it to have it written anew."), open(path, encoding="utf-8") as file:
            lines = [line for line in map(json.loads, file) if line["step"] < step]
    if lines or new:
        with atomic_file(path) as draft, open(draft, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(line, allow_nan=False) + "\n" for line in [*lines, *new])
