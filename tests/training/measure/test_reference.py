# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Files of a reference: what is kept is read again, and what is no covariance is refused."""

import numpy as np
import pytest
import torch

from helpers.comparing import close
from training.cli.errors import UserError
from training.cli.shared_options import DataOptions
from training.data.images import ImageDataset
from training.frozen.vectors import load_feature_network
from training.measure.distances import reference_features
from training.measure.reference import kept_features, read_reference


CPU = torch.device("cpu")
FLIPPED = {"dataset_split": "train[:300]", "random_flip": True}


def kept(path, **options):
    config = DataOptions(**{**FLIPPED, **options})
    network = load_feature_network("digits")
    file = read_reference(path) if path.exists() else None
    return kept_features(str(path), file, config, ImageDataset(config), network, 100, CPU)


def test_features_are_kept_and_read_again(tmp_path, monkeypatch, capsys):
    path = tmp_path / "new" / "digits.npz"
    network, dataset = load_feature_network("digits"), ImageDataset(DataOptions(**FLIPPED))
    expected, _ = reference_features(dataset, network, 100, CPU, True)
    close(kept(path), expected, 1e-5, 1e-5)
    assert "Kept the features of 300 real images" in capsys.readouterr().out
    seen = []
    read = ImageDataset.__getitems__
    monkeypatch.setattr(ImageDataset, "__getitems__", lambda self, rows: seen.extend(rows) or read(self, rows))
    close(kept(path), expected, 1e-5, 1e-5)
    assert len(seen) == 32  # of 300
    file = read_reference(path)
    close(file.statistics[0], expected.double().mean(0), 1e-5, 1e-5)
    close(file.statistics[1], expected.double().T.cov(), 1e-4, 1e-4)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"dataset_split": "train[:301]"}, "dataset_split train.:300., here train.:301.; num_images 300, here 301"),
        ({"random_flip": False}, "random_flip True, here False"),
        ({"image_mode": "RGB"}, "image_mode L, here RGB"),
    ],
)
def test_what_was_made_otherwise_is_refused(tmp_path, options, words):
    kept(tmp_path / "digits.npz")
    with pytest.raises(UserError, match=f"--reference .*digits.npz was made otherwise: {words}"):
        kept(tmp_path / "digits.npz", **options)


def test_other_images_and_features_of_the_same_name_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "digits.npz"
    kept(path)
    with monkeypatch.context() as patch:
        read = ImageDataset.__getitems__
        patch.setattr(ImageDataset, "__getitems__", lambda self, rows: (255 - read(self, rows)[0], None))
        with pytest.raises(UserError, match="does not hold the features of these images"):
            kept(path)
    network = load_feature_network("digits")
    next(network.parameters()).data += 1e-3
    monkeypatch.setattr(f"{__name__}.load_feature_network", lambda _: network)
    with pytest.raises(UserError, match="was made otherwise: features [0-9a-f]{16}, here"):
        kept(path)


EYE = np.eye(3)


@pytest.mark.parametrize(
    "arrays, words",
    [
        ({"mean": np.zeros(3)}, "has no `mu` and `sigma`; it has mean"),
        ({"mu": np.zeros(3), "sigma": np.eye(4)}, r"mu of shape \(3,\) and sigma of shape \(4, 4\); \(F,\)"),
        ({"mu": np.zeros((1, 3)), "sigma": EYE}, "were expected"),
        ({"mu": np.zeros(3), "sigma": EYE * [1, 1, np.nan]}, "has infinite or NaN numbers"),
        ({"mu": np.array([0, 0, np.inf]), "sigma": EYE}, "has infinite or NaN numbers"),
        ({"mu": np.zeros(3), "sigma": EYE + [[0, 1e-3, 0], [0] * 3, [0] * 3]}, "is not symmetric"),
        ({"mu": np.zeros(3), "sigma": np.diag([1, 1, -1e-3])}, "eigenvalue -0.001 below 0"),
        ({"mu": np.array([None] * 3), "sigma": EYE}, "cannot be loaded"),  # a pickle
    ],
)
def test_what_is_no_mean_and_covariance_is_refused(tmp_path, arrays, words):
    np.savez(tmp_path / "fid.npz", **arrays)
    with pytest.raises(UserError, match=f"--reference .*fid.npz.*{words}"):
        read_reference(tmp_path / "fid.npz")


def test_rounding_is_no_fault(tmp_path):
    values = torch.randn(20, 50, generator=torch.Generator().manual_seed(0))  # fewer samples than features: singular
    np.savez(tmp_path / "fid.npz", mu=values.mean(0).numpy(), sigma=values.T.cov().numpy())
    mu, sigma = read_reference(tmp_path / "fid.npz").statistics
    assert mu.dtype == sigma.dtype == torch.float64 and torch.linalg.eigvalsh(sigma)[0] < 0
    (tmp_path / "bad.npz").write_bytes(b"PK")
    with pytest.raises(UserError, match="bad.npz cannot be loaded"):
        read_reference(tmp_path / "bad.npz")
