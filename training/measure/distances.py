# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Frechet and kernel distances to real images, and of real images to real images."""

import math
import warnings

import torch
from diffusers.utils import logging
from tqdm.auto import tqdm

from ..cli.errors import UserError
from ..data.images import ImageDataset, mirrored
from ..frozen.vectors import load_feature_network
from ..report.numbers import summaries
from .diversity import PrecisionRecall
from .sampling import class_labels


logger = logging.get_logger(__name__)

MOST_SAMPLES = 10_000  # the most that `--num_samples` is by default

KERNEL_SUBSET = 2_000  # most images of one kernel distance; its time grows with the square


Statistics = tuple[torch.Tensor, torch.Tensor]  # mean (F,) and covariance (F, F) of features, float64


class Distances:
    """Distances of sets of features to those of the reference, by torchmetrics, which reads the reference once.

    "frechet" is the Frechet distance of two Gaussians with the sets' means and covariances. "kernel" is the unbiased
    squared maximum mean discrepancy with the kernel (x.y / F + 1)^3, over all images. With more than `KERNEL_SUBSET`
    images, it is the mean over as many random subsets as make up all of them. Both are small differences of large
    numbers, in float64.

    Args:
        reference: features, shape (N, F), or their statistics, of which there is no kernel distance.
        kernel: measure the kernel distance too.
    """

    def __init__(self, reference: torch.Tensor | Statistics, kernel: bool = False):
        # Imported here: torchmetrics brings matplotlib, for which a training run that measures nothing need not wait.
        from torchmetrics.image.fid import FrechetInceptionDistance
        from torchmetrics.image.kid import KernelInceptionDistance

        identity = torch.nn.Identity()  # torchmetrics expects a feature network, and is given features
        identity.num_features = reference[0].shape[-1]
        # In a training run only one of several processes measures, and it must not wait for the others.
        settings = {"feature": identity, "reset_real_features": False, "sync_on_compute": False}
        self.num_reference = len(reference)
        self.frechet = FrechetInceptionDistance(**settings)
        if isinstance(reference, tuple):  # torchmetrics keeps sums: those of two samples with these statistics
            mean, covariance = reference
            self.frechet.real_features_sum = 2 * mean
            self.frechet.real_features_cov_sum = covariance + 2 * mean.outer(mean)
            self.frechet.real_features_num_samples = torch.tensor(2)
        else:
            self.frechet.update(reference.double(), real=True)
        self.kernel = None
        if kernel:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # it says that it keeps the features in memory
                self.kernel = KernelInceptionDistance(subsets=1, **settings)
            self.kernel.update(reference.double(), real=True)

    def __call__(self, features: torch.Tensor) -> dict[str, float]:
        """Distances of `features`, shape (n, F), by name."""
        self.frechet.update(features.double(), real=False)
        distances = {"frechet": float(self.frechet.compute())}
        self.frechet.reset()
        if self.kernel is not None:
            smaller = min(self.num_reference, len(features))
            self.kernel.subset_size = min(smaller, KERNEL_SUBSET)
            self.kernel.subsets = math.ceil(smaller / self.kernel.subset_size)
            self.kernel.update(features.double(), real=False)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                distances["kernel"] = float(self.kernel.compute()[0])
            self.kernel.reset()
        return distances


@torch.inference_mode()
def reference_features(
    dataset: ImageDataset,
    network: torch.nn.Module,
    batch_size: int,
    device: torch.device,
    random_flip: bool = False,
    num_workers: int = 0,
    only: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Features (N, F) and classes (N,) of all real images, on the CPU.

    Args:
        random_flip: mirror half of the images.
        num_workers: processes that decode images.
        only: indices of some images; None is all.
    """
    indices = torch.arange(len(dataset)) if only is None else only
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_sampler=indices.split(batch_size),
        collate_fn=lambda batch: batch,
        num_workers=num_workers,
    )
    draws = torch.rand(len(dataset), generator=torch.Generator().manual_seed(0))[indices].split(batch_size)
    features, labels = [], []
    for (images, batch_labels), drawn in zip(tqdm(loader, "Real images", unit="batch"), draws):
        if random_flip:
            images = mirrored(images, drawn)
        features.append(network(images.to(device)).float().cpu())
        labels.append(batch_labels)
    return torch.cat(features), None if labels[0] is None else torch.cat(labels)


def real_against_real(
    reference: torch.Tensor,
    distances: Distances,
    num_samples: int,
    seeds: list[int],
    real_labels: torch.Tensor | None = None,
) -> dict:
    """Distances of real images: the floor that the number of images leaves. The Frechet distance is biased upwards.

    "resampled": `num_samples` images drawn from the reference, with replacement, against the reference. They stand for
    a model that knows it by heart.
    "halves": two halves of the reference against each other, N / 2 images each, with their precision and recall.
    With `real_labels`, shape (N,), both keep to the classes: "resampled" has the classes that samples are asked for,
    and both halves have the same.
    """
    count = len(reference)
    classes = torch.zeros(count, dtype=torch.int64) if real_labels is None else real_labels
    wanted = class_labels([0], real_labels, num_samples)
    resampled, halves = [], []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(count, generator=generator)
        order = order[classes[order].sort(stable=True).indices]  # class after class
        sizes = classes.bincount(minlength=int(wanted.max()) + 1)
        place = (torch.rand(num_samples, generator=generator, dtype=torch.float64) * sizes[wanted]).long()
        resampled.append(distances(reference[order[(sizes.cumsum(0) - sizes)[wanted] + place]]))
        if count // 2 > reference.shape[1]:
            half, other = reference[order[0::2]], reference[order[1::2]]
            halves.append({**Distances(half)(other), **PrecisionRecall(half)(other)})
    result = {"resampled": {"num_images": num_samples, **summaries(resampled)}}
    if halves:
        result["halves"] = {"num_images": count // 2, **summaries(halves)}
    return result


def check_counts(num_samples: int, num_reference: int | None, num_features: int, prefix: str = "") -> list[str]:
    """Raise UserError for sets whose covariance would be singular. Return notes on sets that are merely small.

    Args:
        num_reference: None if it is not known.
        prefix: begins the names of the options in messages; "eval_" in a training run.
    """
    notes = []
    samples = f"{prefix or 'num_'}samples"
    for name, count, what in ((samples, num_samples, "samples"), ("dataset_name", num_reference, "real images")):
        if count is None:
            continue
        if count <= num_features:
            raise UserError(
                f"--{name}: {count} {what} are too few for {num_features} features; the Frechet distance needs more "
                f"than {num_features} of each. Give more, or --{prefix}features with fewer."
            )
        if count < 5 * num_features:
            notes.append(f"{count:,} {what} are few for {num_features} features: compare only with the same number.")
            logger.warning(notes[-1])
    return notes


def features_for(dataset: ImageDataset, name: str, device: torch.device, prefix: str = "") -> torch.nn.Module:
    """The feature network `name`, which must take the images of `dataset`. Errors name --{prefix}features."""
    network = load_feature_network(name, device, prefix)
    network.check_images(dataset.channels, dataset.resolution, dataset.resolution, prefix)
    return network


def what_is_compared(
    dataset: ImageDataset, features: str, num_samples: int | None, device: torch.device
) -> tuple[torch.nn.Module, int, list[str]]:
    """The feature network, the number of samples, and notes on these numbers. Raises UserError if they do not fit."""
    network = features_for(dataset, features, device)
    num_samples = num_samples or min(len(dataset), MOST_SAMPLES)
    return network, num_samples, check_counts(num_samples, len(dataset), network.num_features)
