# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Precision, recall and diversity of sets for which they are known."""

import math

import pytest
import torch

from helpers.exact import randn
from training.measure.diversity import PrecisionRecall, pairwise_distance
from training.measure.judges import in_shares_of_the_teacher
from training.measure.sampling import Setting


def test_precision_and_recall_are_those_of_the_definition(monkeypatch):
    monkeypatch.setattr("training.measure.diversity.ROWS", 7)  # in several parts
    real, drawn = randn(60, 3), 1.2 + randn(40, 3, seed=1)

    def inside(points, centers):
        radii = [sorted((each - center).norm() for each in centers)[3] for center in centers]  # [0] is itself
        return [any((x - c).norm() <= r for c, r in zip(centers, radii)) for x in points]

    expected = {"precision": sum(inside(drawn, real)) / 40, "recall": sum(inside(real, drawn)) / 60}
    assert PrecisionRecall(real)(drawn) == pytest.approx(expected)
    assert 0.1 < min(expected.values()) and max(expected.values()) < 0.95


def test_precision_and_recall_of_samples_that_lack_one_or_the_other():
    modes = 100 * torch.eye(4, dtype=torch.float64).repeat(50, 1)
    real, drawn = modes + randn(200, 4), modes + randn(200, 4, seed=1)
    judge = PrecisionRecall(real)
    same = judge(drawn)
    assert min(same.values()) > 0.7
    half = judge(drawn[(torch.arange(200) % 4) < 2])  # two of the four modes
    assert half["precision"] == pytest.approx(same["precision"], abs=0.1)
    assert half["recall"] == pytest.approx(same["recall"] / 2, abs=0.1)
    spoilt = judge(torch.cat([drawn[:100], 1000 + drawn[100:]]))
    assert spoilt["precision"] == pytest.approx(same["precision"] / 2, abs=0.1)
    assert judge(real[:1].expand(50, 4)) == {"precision": 1.0, "recall": 1 / 200}  # a collapsed sampler
    assert judge(real) == {"precision": 1.0, "recall": 1.0}


def test_a_large_reference_is_thinned_evenly(monkeypatch):
    monkeypatch.setattr("training.measure.diversity.MOST_REAL", 100)
    assert torch.equal(PrecisionRecall(torch.arange(300.0)[:, None]).reference, torch.arange(0.0, 300, 3)[:, None])


def test_pairwise_distance_of_gaussians_and_classes():
    dim, features = 6, randn(900, 6)
    mean = 2 * math.gamma((dim + 1) / 2) / math.gamma(dim / 2)  # of the distance of two from N(0, I)
    assert pairwise_distance(features, None) == pytest.approx(mean, rel=0.02)
    labels = torch.arange(900) % 3
    apart = features + 50 * torch.nn.functional.one_hot(labels, dim)
    assert pairwise_distance(apart, labels) == pytest.approx(mean, rel=0.02)  # the distance of classes does not count
    wide = torch.where((labels == 0)[:, None], 4 * features, features)
    assert pairwise_distance(wide, labels) == pytest.approx((4 + 1 + 1) / 3 * mean, rel=0.02)
    collapsed = 50 * torch.nn.functional.one_hot(labels, dim)
    assert pairwise_distance(collapsed, labels) == 0 < pairwise_distance(collapsed, None)
    assert pairwise_distance(features[:3], torch.arange(3)) == 0  # no pair


def test_diversity_is_a_share_of_the_teacher_in_most_steps_seed_by_seed():
    ctm, coarse, fine = Setting("ctm", 1, 0.0), Setting("heun", 2), Setting("heun", 9)
    raw = {ctm: [1.0, 3.0], coarse: [4.0, 2.0], fine: [2.0, 4.0]}

    def shares(like, raw=raw):
        measured = {setting: [{"diversity": value} for value in values] for setting, values in raw.items()}
        in_shares_of_the_teacher(measured, like)
        return {setting: [values.get("diversity") for values in by_seed] for setting, by_seed in measured.items()}

    assert shares(raw) == {ctm: [50, 75], coarse: [200, 50], fine: [100, 100]}
    assert shares([coarse, fine])[ctm] == [None, None] == shares(raw, {ctm: [1.0, 3.0]})[ctm]
    assert shares(raw, raw | {fine: [0.0, 1.0]}) == dict.fromkeys(raw, [None, None])  # a teacher that collapsed
