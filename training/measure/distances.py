"""Frechet and kernel distances to real images, and real against real; plain arguments, no config."""

import math
import warnings
from collections.abc import Sequence

import torch
from diffusers.utils import logging
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance
from tqdm.auto import tqdm

from ..cli.errors import UserError
from ..cli.shared_options import DataOptions
from ..data.images import ImageDataset, mirrored
from ..frozen.vectors import load_feature_network
from ..report.numbers import summaries
from .sampling import class_labels


logger = logging.get_logger(__name__)

MOST_SAMPLES = 10_000  # of the default of --num_samples

KERNEL_SUBSET = 2_000  # most images of one kernel distance; its time grows with the square


class _Given(nn.Module):
    """The feature network of torchmetrics' classes when they are given features: the identity."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features


class Distances:
    """Distances of sets of features to those of the reference, by torchmetrics; the reference is taken in once.

    "frechet" is the Frechet distance of two Gaussians with the sets' means and covariances, in float64. "kernel" is the unbiased
    squared maximum mean discrepancy with the kernel (x.y / F + 1)^3, over all images, or where there are more than
    `KERNEL_SUBSET`, the mean over as many random subsets as make up all of them.

    Args:
        reference: shape (N, F).
        kernel: measure the kernel distance too.
    """

    def __init__(self, reference: torch.Tensor, kernel: bool = False):
        # Of several processes of a training one alone measures, and may not wait for the others.
        settings = {"feature": _Given(reference.shape[1]), "reset_real_features": False, "sync_on_compute": False}
        self.num_reference = len(reference)
        self.frechet = FrechetInceptionDistance(**settings)
        self.frechet.update(reference.double(), real=True)
        self.kernel = None
        if kernel:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # it says that it keeps the features in memory
                self.kernel = KernelInceptionDistance(subsets=1, **settings)
            self.kernel.update(reference.float(), real=True)

    def __call__(self, features: torch.Tensor) -> dict[str, float]:
        """Distances of `features`, shape (n, F), by name."""
        self.frechet.update(features.double(), real=False)
        distances = {"frechet": float(self.frechet.compute())}
        self.frechet.reset()
        if self.kernel is not None:
            smaller = min(self.num_reference, len(features))
            self.kernel.subset_size = min(smaller, KERNEL_SUBSET)
            self.kernel.subsets = math.ceil(smaller / self.kernel.subset_size)
            self.kernel.update(features.float(), real=False)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                distances["kernel"] = float(self.kernel.compute()[0])
            self.kernel.reset()
        return distances


@torch.inference_mode()
def reference_features(
    dataset: ImageDataset, network: nn.Module, options: DataOptions, batch_size: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Features (N, F) and classes (N,) of all real images, on the CPU; mirrored at random if the data options say so."""
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_sampler=torch.arange(len(dataset)).split(batch_size),
        collate_fn=lambda batch: batch,
        num_workers=options.dataloader_num_workers,
    )
    draws = torch.rand(len(dataset), generator=torch.Generator().manual_seed(0)).split(batch_size)
    features, labels = [], []
    for (images, batch_labels), drawn in zip(tqdm(loader, "Real images", unit="batch"), draws):
        if options.random_flip:
            images = mirrored(images, drawn)
        features.append(network(images.to(device)).float().cpu())
        labels.append(batch_labels)
    return torch.cat(features), None if labels[0] is None else torch.cat(labels)


def real_against_real(
    reference: torch.Tensor,
    distances: Distances,
    num_samples: int,
    seeds: Sequence[int],
    real_labels: torch.Tensor | None = None,
) -> dict:
    """What real images score: the floor that the number of images leaves, since the Frechet distance is biased upwards.

    "resampled": `num_samples` drawn from the reference, with replacement, against the reference: a model that knows it by heart.
    "halves": two halves of the reference against each other, N / 2 images each.
    With `real_labels`, shape (N,), both keep to the classes: the first has those that samples are asked for, halves share alike.
    """
    count = len(reference)
    classes = torch.zeros(count, dtype=torch.int64) if real_labels is None else real_labels
    wanted = class_labels(1, real_labels, num_samples)
    resampled, halves = [], []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(count, generator=generator)
        order = order[classes[order].sort(stable=True).indices]  # class after class
        sizes = classes.bincount(minlength=int(wanted.max()) + 1)
        place = (torch.rand(num_samples, generator=generator, dtype=torch.float64) * sizes[wanted]).long()
        resampled.append(distances(reference[order[(sizes.cumsum(0) - sizes)[wanted] + place]]))
        if count // 2 > reference.shape[1]:
            halves.append(Distances(reference[order[0::2]])(reference[order[1::2]]))
    result = {"resampled": {"num_images": num_samples, **summaries(resampled)}}
    if halves:
        result["halves"] = {"num_images": count // 2, **summaries(halves)}
    return result


def check_counts(num_samples: int, num_reference: int, num_features: int) -> list[str]:
    """Raise UserError for sets whose covariance would be singular; return notes about sets that are merely small."""
    notes = []
    for name, count, what in (
        ("num_samples", num_samples, "samples"),
        ("dataset_name", num_reference, "real images"),
    ):
        if count <= num_features:
            raise UserError(
                f"--{name}: {count} {what} are too few for {num_features} features; the Frechet distance needs more than "
                f"{num_features} of each. Give more, or --features with fewer."
            )
        if count < 5 * num_features:
            notes.append(f"{count:,} {what} are few for {num_features} features: compare only with the same number.")
    for note in notes:
        logger.warning(note)
    return notes


def what_is_compared(
    features: str, options: DataOptions, num_samples: int | None, device: torch.device
) -> tuple[nn.Module, ImageDataset, int, list[str]]:
    """The feature network, the real images, the number of samples, and remarks on these numbers. Raises UserError if they do not fit."""
    network = load_feature_network(features, device)
    dataset = ImageDataset(options)
    network.check_images(dataset.channels, dataset.resolution, dataset.resolution)
    num_samples = num_samples or min(len(dataset), MOST_SAMPLES)
    notes = check_counts(num_samples, len(dataset), network.num_features)
    return network, dataset, num_samples, notes
