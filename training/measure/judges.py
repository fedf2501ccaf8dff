# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""All that is said of a set of samples by the features of one or several networks."""

from collections.abc import Collection

import torch

from ..frozen.vectors import FeaturesSideBySide
from .distances import Distances, Statistics, real_against_real
from .diversity import PrecisionRecall, pairwise_distance
from .sampling import Setting


class Judges:
    """What features say of samples: distances, precision and recall, diversity. All but the first network's features
    give a Frechet distance alone.

    Args:
        network: from uint8 images to the features.
        reference: of the real images, (N, F), or their statistics, of which there is the Frechet distance alone.
        kid: measure the kernel distance too.
    """

    def __init__(self, network: FeaturesSideBySide, reference: torch.Tensor | Statistics, kid: bool):
        self.network, self.precision_recall = network, None
        if isinstance(reference, tuple):
            self.distances = [Distances(reference)]
            return
        first, *others = network.split(reference)
        self.distances = [Distances(first, kid), *map(Distances, others)]
        self.precision_recall = PrecisionRecall(first)

    def __call__(self, features: torch.Tensor, labels: torch.Tensor | None) -> dict[str, float]:
        """All by name, of samples' features (n, F) and classes (n,)."""
        first, *others = self.network.split(features)
        judged = self.distances[0](first)
        for number, (distances, part) in enumerate(zip(self.distances[1:], others, strict=True), start=2):
            judged[f"frechet_{number}"] = distances(part)["frechet"]
        if self.precision_recall is not None:
            judged |= self.precision_recall(first)
        return {**judged, "diversity": pairwise_distance(first, labels)}

    def real_images(
        self, reference: torch.Tensor, num_samples: int, seeds: list[int], real_labels: torch.Tensor | None
    ) -> dict:
        """`real_against_real` of all networks: the Frechet distances of the others beside all of the first."""
        parts = zip(self.network.split(reference), self.distances, strict=True)
        first, *others = (real_against_real(*part, num_samples, seeds, real_labels) for part in parts)
        for number, other in enumerate(others, start=2):
            for kind in first.keys() & other.keys():
                first[kind][f"frechet_{number}"] = other[kind]["frechet"]
        return first


def in_shares_of_the_teacher(measured: dict[Setting, list[dict[str, float]]], like: Collection[Setting]) -> None:
    """Replace each "diversity" by its share, in percent, of the teacher's in most steps and of the same seed.

    It is removed without a teacher, or if all its images of a class are alike, and of settings that are not in `like`.
    """
    teacher = [setting for setting in measured if setting.sampler == "heun"]
    whole = [values["diversity"] for values in measured[teacher[-1]]] if teacher else [0.0]
    for setting, by_seed in measured.items():
        for place, values in enumerate(by_seed):
            own = values.pop("diversity")
            if min(whole) > 0 and setting in like:
                values["diversity"] = 100 * own / whole[place]
