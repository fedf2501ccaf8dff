# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Nearest training images against brute force."""

import math

import pytest
import torch

from helpers.comparing import close
from helpers.gaussian_models import gaussian_pixels, save_parquet
from training.cli.shared_options import DataOptions
from training.data.images import ImageDataset
from training.measure.neighbors import Neighbors, find_neighbors, pixels


@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize("batch_size", [7, 200])
def test_nearest_two_are_those_of_brute_force(tmp_path, mirror, batch_size):
    path = save_parquet(tmp_path / "train.parquet", gaussian_pixels(200, 8, 8, 3), [0] * 200)
    dataset = ImageDataset(DataOptions(dataset_name=path))
    images, _ = dataset[list(range(200))]
    ramp = (30 * torch.arange(8)).to(torch.uint8).expand(1, 3, 8, 8)
    queries = torch.cat([images[[3, 50]], images[[9]].flip(-1), ramp])
    itself = torch.tensor([3, 50, 9, 17])
    groups = {"free": (queries, None), "others": (queries, itself)}
    neighbors = find_neighbors(groups, dataset, pixels, mirror, batch_size)
    plain, flipped = (
        (queries.double()[:, None] - each.double()).square().mean((2, 3, 4)).sqrt()
        for each in (images, images.flip(-1))
    )
    for name, group in neighbors.items():
        distances = torch.minimum(plain, flipped) if mirror else plain.clone()
        if name == "others":
            distances[range(4), itself] = math.inf
        nearest = distances.topk(2, largest=False)
        close(group.distances, nearest.values, 1e-6, 1e-5)
        assert torch.equal(group.indices, nearest.indices[:, 0])
        assert torch.equal(group.mirrored, (flipped < plain)[range(4), group.indices] & mirror)
    free, others = neighbors["free"], neighbors["others"]
    assert free.indices[:2].tolist() == [3, 50] and free.copies[:2].all()
    assert (free.indices[2] == 9 and free.copies[2]) == mirror and not others.copies[:3].any()


def test_copies_are_those_nearer_than_a_third_of_the_second_nearest():
    distances = torch.tensor([[1.0, 3.1], [1.0, 2.9], [0.0, 5.0], [4.0, 4.0]])
    neighbors = Neighbors(distances, torch.zeros(4), torch.zeros(4))
    assert neighbors.copies.tolist() == [True, False, True, False]
    assert neighbors.summary() == {"median": 1.0, "percentile_5": pytest.approx(0.15), "min": 0.0, "copies": 0.5}
