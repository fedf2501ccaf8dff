# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Nearest training images."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from tqdm.auto import tqdm

from ..data.images import ImageDataset


COPY_RATIO = 1 / 3  # Yoon et al. 2023, "Diffusion Probabilistic Models Generalize when They Fail to Memorize"


def pixels(images: torch.Tensor) -> torch.Tensor:
    """Features that are the pixels: uint8 (B, C, H, W) to float32 (B, CHW).

    They are scaled so that distances are root mean squares of 0..255.
    """
    return images.flatten(1).float() / math.sqrt(images[0].numel())


@dataclass
class Neighbors:
    """The two nearest training images of each of n images. A training image and its mirror image are one image.

    Args:
        distances: float64 (n, 2), ascending.
        indices: int64 (n,), which image of the data set is nearest.
        mirrored: bool (n,), whether its mirror image is the nearest.
    """

    distances: torch.Tensor
    indices: torch.Tensor
    mirrored: torch.Tensor

    @property
    def copies(self) -> torch.Tensor:
        """Bool (n,): nearer than a third of the distance to the second nearest, the criterion of Yoon et al. 2023."""
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

    def update(self, indices: torch.Tensor, distances: torch.Tensor, mirrored: torch.Tensor) -> None:
        """Compare with further training images, whose `indices` are (B,).

        Args:
            distances: (n, B), to the image or to its mirror image, whichever is nearer.
            mirrored: bool (n, B), whether the mirror image is nearer.
        """
        nearest, place = distances.min(1)
        better = nearest < self.distances[:, 0]
        self.indices[better] = indices[place[better]]
        self.mirrored[better] = mirrored[better, place[better]]
        self.distances = torch.cat([self.distances, distances], 1).topk(2, largest=False, sorted=True).values


def find_neighbors(
    groups: dict[str, tuple[torch.Tensor, torch.Tensor | None]],
    dataset: ImageDataset,
    network: Callable[[torch.Tensor], torch.Tensor],
    mirror: bool,
    batch_size: int = 250,
    device: torch.device | str = "cpu",
) -> dict[str, Neighbors]:
    """The nearest training images of each group. The data set is read once and never held as a whole.

    Args:
        groups: by name uint8 images (n, C, H, W), and which images of the data set they are, or None. An image is not
            its own neighbor.
        network: from uint8 images to features; distances are Euclidean.
        mirror: whether mirror images count as training images.
    """

    def features(images: torch.Tensor) -> torch.Tensor:
        return torch.cat([network(batch.to(device)).float().cpu() for batch in images.split(batch_size)]).double()

    queries, neighbors = {name: features(images) for name, (images, _) in groups.items()}, {}
    for name, query in queries.items():
        far = torch.full((len(query), 2), math.inf, dtype=torch.float64)
        neighbors[name] = Neighbors(far, torch.full((len(query),), -1), torch.zeros(len(query), dtype=torch.bool))
    for indices in tqdm(torch.arange(len(dataset)).split(batch_size), desc="Training images", unit="batch"):
        images, _ = dataset[indices.tolist()]
        plain = features(images)
        flipped = features(images.flip(-1)) if mirror else plain
        for name, (_, itself) in groups.items():
            distances, others = torch.cdist(queries[name], plain), torch.cdist(queries[name], flipped)
            mirrored, distances = others < distances, torch.minimum(distances, others)
            if itself is not None:
                distances[itself[:, None] == indices] = math.inf
            neighbors[name].update(indices, distances, mirrored)
    return neighbors
