# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""training.features: what is embedded is what it makes, and it makes the same again."""

import json

import pytest
import torch

from helpers.comparing import seeded
from helpers.gaussian_models import gaussian_pixels, save_parquet
from training import features
from training.cli.errors import UserError
from training.data.images import ImageDataset
from training.features import FeatureConfig
from training.frozen.classifier import EMBEDDED
from training.frozen.vectors import load_feature_network


def test_embedded_features_have_the_accuracy_they_state():
    network = load_feature_network("digits")
    stored = json.loads((EMBEDDED["digits"] / "config.json").read_text())
    options = FeatureConfig(**stored["options"])
    dataset = ImageDataset(options)
    _, held_out = features.split(len(dataset), options.held_out, options.seed)
    images, labels = dataset[held_out]
    accuracy = (network.classify(images) == labels).float().mean().item()
    assert len(held_out) == stored["num_held_out_images"]
    assert accuracy == pytest.approx(stored["accuracy"], abs=1e-6) and accuracy > 0.95
    assert network.about["accuracy"] == stored["accuracy"] and network.about["name"] == "digits"
    output = network(images[:5])
    assert output.shape == (5, network.num_features) == (5, 64) and output.dtype == torch.float32
    torch.testing.assert_close(network(images[:5].expand(-1, 3, -1, -1)), output, rtol=1e-4, atol=1e-4)
    assert sum(file.stat().st_size for file in EMBEDDED["digits"].iterdir()) < 500_000


def test_training_features_is_reproducible_and_replaces_only_its_own(tmp_path):
    data = save_parquet(tmp_path / "images.parquet", gaussian_pixels(400, 8, 8), [int(i % 4 == 0) for i in range(400)])
    weights = []
    for path in (tmp_path / "a", tmp_path / "b", tmp_path / "a"):
        features.main(FeatureConfig(dataset_name=data, output_dir=str(path), num_epochs=1, num_features=8))
        weights.append((path / "model.safetensors").read_bytes())
    assert weights[0] == weights[1] == weights[2]
    network = load_feature_network(str(tmp_path / "a"))
    assert network.num_features == 8 and network.about["num_classes"] == 2
    thesis = tmp_path / "other" / "thesis.txt"
    thesis.parent.mkdir()
    thesis.write_text("mine")
    with pytest.raises(UserError, match="--output_dir .* holds something else"):
        features.main(FeatureConfig(dataset_name=data, output_dir=str(thesis.parent), num_epochs=1))
    assert thesis.exists()
    for wrong in ("", str(thesis)):
        with pytest.raises(UserError, match="--output_dir must be a folder"):
            FeatureConfig(output_dir=wrong)


def test_shift_moves_images_by_whole_pixels():
    images = torch.randint(0, 256, (50, 2, 6, 6), generator=seeded(), dtype=torch.uint8)
    seen = set()
    ways = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
    for old, new in zip(images, features.shifted(images, 1, seeded())):
        inside = {(dy, dx): old[:, 1 + dy : 5 + dy, 1 + dx : 5 + dx] for dy, dx in ways}
        match = [way for way, part in inside.items() if torch.equal(new[:, 1:-1, 1:-1], part)]
        assert len(match) == 1
        seen.update(match)
    assert len(seen) == 9
    assert torch.equal(features.shifted(images, 0, seeded()), images)
