# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Precision and recall, and how different the samples of a class are."""

import torch


MOST_REAL = 10_000  # real images of precision and recall; of a larger data set so many, evenly spaced

MOST_OF_CLASS = 1_000  # samples of a class whose pairs are looked at; their number grows with the square

ROWS = 1_000  # rows of a matrix of distances that are held at once


class PrecisionRecall:
    """Improved precision and recall (Kynkäänniemi et al. 2019, Eq. 1 and 2, with their k = 3).

    Each set stands for the union of balls around its features, whose radii are the distances to the k-th nearest of the
    same set. "precision" is the share of samples in the real images' balls: are they like real images? "recall" is the
    share of real images in the samples' balls: is each kind of real image drawn? Both depend on the numbers of images.

    Args:
        reference: features of real images, shape (N, F), N > k.
        k: which neighbor.
    """

    def __init__(self, reference: torch.Tensor, k: int = 3):
        count = min(len(reference), MOST_REAL)
        self.k, self.reference = k, reference[torch.arange(count) * len(reference) // count].double()
        self.radii = self._radii(self.reference)

    def _radii(self, features: torch.Tensor) -> torch.Tensor:
        """Distance of each of (n, F) to its k-th nearest neighbor, shape (n,). The nearest of all is itself."""
        smallest = [
            torch.cdist(rows, features).topk(self.k + 1, largest=False).values[:, -1] for rows in features.split(ROWS)
        ]
        return torch.cat(smallest)

    @staticmethod
    def _share_inside(features: torch.Tensor, centers: torch.Tensor, radii: torch.Tensor) -> float:
        inside = [(torch.cdist(rows, centers) <= radii).any(1) for rows in features.split(ROWS)]
        return float(torch.cat(inside).double().mean())

    def __call__(self, features: torch.Tensor) -> dict[str, float]:
        """Both, in [0, 1], of samples' features, shape (n, F), n > k."""
        features = features.double()
        return {
            "precision": self._share_inside(features, self.reference, self.radii),
            "recall": self._share_inside(self.reference, features, self._radii(features)),
        }


def pairwise_distance(features: torch.Tensor, labels: torch.Tensor | None) -> float:
    """Mean Euclidean distance of two samples of one class: their diversity, as Zhu et al. 2017 (BicycleGAN) measure it.

    It is the mean over all pairs, and over the classes in the shares of their samples; 0 if no class has two.

    Args:
        features: shape (n, F).
        labels: classes, int64 (n,), or None, which is one class.
    """
    labels = torch.zeros(len(features), dtype=torch.int64) if labels is None else labels
    total, count = 0.0, 0
    for label in labels.unique():
        own = features[labels == label]
        if len(own) > 1:
            total += len(own) * float(torch.pdist(own[:MOST_OF_CLASS].double()).mean())
            count += len(own)
    return total / max(count, 1)
