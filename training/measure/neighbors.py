"""Nearest training images."""

import math
from dataclasses import dataclass

import torch
from torch import nn
from tqdm.auto import tqdm

from ..data.images import ImageDataset


COPY_RATIO = 1 / 3  # Yoon et al. 2023, "Diffusion Probabilistic Models Generalize when They Fail to Memorize"


class Pixels(nn.Module):
    """The images themselves: uint8 (B, C, H, W) to float32 (B, CHW), scaled so that distances are root mean squares of 0..255."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1).float() / math.sqrt(images[0].numel())


@dataclass
class Neighbours:
    """The two nearest training images of n images.

    Args:
        distances: float64 (n, 2), ascending.
        indices: int64 (n,), which image of the data set is nearest.
        mirrored: bool (n,), whether it is its mirror image that is.
    """

    distances: torch.Tensor
    indices: torch.Tensor
    mirrored: torch.Tensor

    @property
    def copies(self) -> torch.Tensor:
        """Bool (n,): nearer than a third of the way to the second nearest, the criterion of Yoon et al. 2023."""
        return self.distances[:, 0] < COPY_RATIO * self.distances[:, 1]

    def summary(self) -> dict[str, float]:
        """Median, 5th percentile and minimum of the distance to the nearest, and the share of copies."""
        nearest = self.distances[:, 0]
        return {
            "median": nearest.quantile(0.5).item(),
            "percentile_5": nearest.quantile(0.05).item(),
            "min": nearest.min().item(),
            "copies": self.copies.double().mean().item(),
        }


class Search:
    """Keeps the two nearest of the training images that it is shown, batch by batch, for each query.

    A training image and its mirror image are one, at the distance of the nearer.

    Args:
        queries: features of n images, (n, F).
        itself: int64 (n,), for queries from the training images: which one each is, not to be found.
    """

    def __init__(self, queries: torch.Tensor, itself: torch.Tensor | None = None):
        self.queries = queries.double()
        self.itself = itself
        self.distances = torch.full((len(queries), 2), math.inf, dtype=torch.float64)
        self.indices = torch.full((len(queries),), -1)
        self.mirrored = torch.zeros(len(queries), dtype=torch.bool)

    def show(self, first: int, features: torch.Tensor, of_mirrored: torch.Tensor | None) -> None:
        """Training images first, first + 1, ...: their features (B, F), and those of their mirror images if these count."""
        found = torch.cdist(self.queries, features.double())
        flipped = torch.zeros_like(found, dtype=torch.bool)
        if of_mirrored is not None:
            other = torch.cdist(self.queries, of_mirrored.double())
            flipped, found = other < found, torch.minimum(found, other)
        if self.itself is not None:
            found[self.itself[:, None] == torch.arange(first, first + len(features))] = math.inf
        nearest, place = found.min(1)
        better = nearest < self.distances[:, 0]
        self.indices[better] = first + place[better]
        self.mirrored[better] = flipped[torch.arange(len(found)), place][better]
        self.distances = torch.cat([self.distances, found], 1).topk(2, largest=False, sorted=True).values

    def result(self) -> Neighbours:
        return Neighbours(self.distances, self.indices, self.mirrored)


def features_of(images: torch.Tensor, network: nn.Module, batch_size: int, device: torch.device | str) -> torch.Tensor:
    """Features of uint8 images, float32 (n, F) on the CPU."""
    return torch.cat([network(batch.to(device)).float().cpu() for batch in images.split(batch_size)])


def find_neighbours(
    groups: dict[str, tuple[torch.Tensor, torch.Tensor | None]],
    dataset: ImageDataset,
    network: nn.Module,
    mirror: bool,
    batch_size: int = 250,
    device: torch.device | str = "cpu",
) -> dict[str, Neighbours]:
    """The nearest training images of each group; the data set is read once and never held as a whole.

    Args:
        groups: by name uint8 images (n, C, H, W), and which of the data set they are, or None.
        network: from uint8 images to features; distances are Euclidean.
        mirror: whether mirror images count as training images.
    """
    searches = {
        name: Search(features_of(images, network, batch_size, device), itself)
        for name, (images, itself) in groups.items()
    }
    for indices in tqdm(torch.arange(len(dataset)).split(batch_size), desc="Training images", unit="batch"):
        images, _ = dataset[indices.tolist()]
        features = features_of(images, network, batch_size, device)
        of_mirrored = features_of(images.flip(-1), network, batch_size, device) if mirror else None
        for search in searches.values():
            search.show(int(indices[0]), features, of_mirrored)
    return {name: search.result() for name, search in searches.items()}
