# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Distances of sets of features against closed forms."""

import pytest
import torch

from helpers.comparing import close, seeded
from helpers.exact import randn
from training.cli.errors import UserError
from training.cli.shared_options import DataOptions
from training.data.images import ImageDataset
from training.frozen.vectors import load_feature_network
from training.measure.distances import Distances, check_counts, real_against_real, reference_features


def test_frechet_distance_of_gaussians():
    first, second = randn(2, 100_000, 3)
    rotation = torch.linalg.qr(randn(3, 3, seed=1))[0]
    a, b = torch.tensor([1.0, 2.0, 0.5]), torch.tensor([1.5, 1.0, 0.5])
    shift = torch.tensor([0.3, 0.0, -0.4], dtype=torch.float64)
    measured = Distances((first * a) @ rotation)((second * b) @ rotation + shift)["frechet"]
    assert measured == pytest.approx(float((shift**2).sum() + ((a - b) ** 2).sum()), rel=0.02)


def test_the_distance_from_statistics_is_that_from_the_images():
    features, samples = 3 + 2 * randn(2, 500, 6) @ randn(6, 6, seed=1)
    measured = Distances((features.mean(0), features.T.cov()))
    assert measured(samples) == pytest.approx(Distances(features)(samples), abs=1e-6)
    assert measured(features)["frechet"] == pytest.approx(0, abs=1e-6)  # and once more, of other samples


def test_frechet_distance_falls_to_zero_with_the_number_of_samples():
    data = torch.randn(2, 16_000, 8, generator=seeded())
    values = [Distances(data[0, :n])(data[1, :n])["frechet"] for n in (1_000, 16_000)]
    assert values[0] / values[1] == pytest.approx(16, rel=0.35)  # the bias is proportional to 1 / n
    assert Distances(data[0])(data[0])["frechet"] == pytest.approx(0, abs=1e-6)


def kernel_distance(x, y):
    """The unbiased estimate for sets of equal size, in float64."""
    x, y, n = x.double(), y.double(), len(x)

    def kernel(a, b):
        return (a @ b.T / x.shape[1] + 1) ** 3

    within = sum((kernel(z, z).sum() - kernel(z, z).diag().sum()) / (n * (n - 1)) for z in (x, y))
    return float(within - 2 * kernel(x, y).mean())


def test_kernel_distance_near_zero_of_large_features():
    x, y = 20 + torch.randn(2, 300, 64, generator=seeded())
    assert Distances(x, kernel=True)(y)["kernel"] == pytest.approx(kernel_distance(x, y), rel=1e-5)


@pytest.mark.parametrize("subset", [300, 100])
def test_kernel_distance_is_the_unbiased_estimate(monkeypatch, subset):
    monkeypatch.setattr("training.measure.distances.KERNEL_SUBSET", subset)
    x, y = torch.randn(2, 300, 4, generator=seeded())
    y = y + 0.3
    n, expected = len(x), kernel_distance(x, y)
    distances = Distances(x, kernel=True)
    state = torch.random.get_rng_state()
    measured = distances(y)["kernel"]
    assert measured == pytest.approx(expected, rel=1e-6 if subset == n else 0.3)
    assert distances(y)["kernel"] == measured
    assert torch.equal(torch.random.get_rng_state(), state)


def test_half_of_the_reference_is_mirrored():
    dataset, network = ImageDataset(DataOptions()), load_feature_network("digits")
    images, _ = dataset[list(range(1797))]
    plain, labels = reference_features(dataset, network, 500, torch.device("cpu"))
    flipped, _ = reference_features(dataset, network, 500, torch.device("cpu"), random_flip=True)
    same = (flipped - plain).abs().amax(1) < 1e-4
    assert labels is None and 800 < same.sum() < 1000
    close(plain, network(images), 1e-4, 1e-4)
    close(flipped[~same], network(images.flip(-1))[~same], 1e-4, 1e-4)


def test_floor_of_real_images():
    reference = torch.randn(2_000, 8, generator=seeded())
    floor = real_against_real(reference, Distances(reference), 2_000, range(5))
    # Two sets of n and m samples of one Gaussian are C (1/n + 1/m) apart; of the resampled ones only one is random.
    assert floor["halves"]["frechet"]["mean"] / floor["resampled"]["frechet"]["mean"] == pytest.approx(4, rel=0.3)
    # Classes far apart: random shares of them move the mean, equal shares do not.
    labels = torch.arange(2_000) % 4
    apart = reference + 10 * torch.nn.functional.one_hot(labels, 8)
    random = real_against_real(apart, Distances(apart), 2_000, range(3))
    kept = real_against_real(apart, Distances(apart), 2_000, range(3), labels)
    for kind in ("resampled", "halves"):
        assert kept[kind]["frechet"]["mean"] == pytest.approx(floor[kind]["frechet"]["mean"], rel=0.4)
        assert random[kind]["frechet"]["mean"] > 1.5 * kept[kind]["frechet"]["mean"]
    few = reference[:15]
    assert "halves" not in real_against_real(few, Distances(few), 20, [0])


def test_few_images_are_noted_and_fewer_refused():
    assert check_counts(1_000, 1_000, 64) == []
    notes = check_counts(200, 1_000, 64)
    assert len(notes) == 1 and "200 samples are few" in notes[0]
    with pytest.raises(UserError, match="--dataset_name: 60 real images.*--features with fewer"):
        check_counts(1_000, 60, 64)
    with pytest.raises(UserError, match="--eval_samples: 60 samples are too few.*--eval_features with fewer"):
        check_counts(60, 1_000, 64, "eval_")
