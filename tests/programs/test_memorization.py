# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""training.memorization on models that repeat images and that do not."""

import json

import pytest
from PIL import Image

from helpers.gaussian_models import SIGMA_DATA, gaussian_pixels, save_exact, save_parquet
from training.cli.errors import UserError
from training.memorization import MemorizationConfig, main


GRAY = 133  # the first image, and what the model that repeats makes, up to rounding


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with the splits train (200 images, the first of them gray) and test (100)."""
    folder = tmp_path_factory.mktemp("data")
    train = gaussian_pixels(200, 8, 8, 3)
    train[0] = GRAY
    save_parquet(folder / "train-0.parquet", train, [0, 1] * 100)
    save_parquet(folder / "test-0.parquet", gaussian_pixels(100, 8, 8, 3, seed=1), [0, 1] * 50)
    return str(folder)


def test_a_model_that_repeats_is_told_from_one_that_knows_the_distribution(data, tmp_path):
    bias = (GRAY / 127.5 - 1) / 1e-3  # g = c_out F, and c_out is sigma_data at high noise
    copier = save_exact(tmp_path / "copier", 1e-3, bias=bias)
    exact = save_exact(tmp_path / "exact", SIGMA_DATA, ctm=False)
    options = {"dataset_name": data, "num_samples": 100, "held_out_split": "test", "num_pictures": 3}
    report = main(MemorizationConfig(model=copier, teacher=exact, output_dir=str(tmp_path / "out"), **options))
    rows = {row["name"]: row["pixels"] for row in report["results"]}
    assert rows["1 step"]["copies"] == rows["18 steps, gamma 0"]["copies"] == 1.0
    assert rows["1 step"]["median"] < 1
    assert rows["teacher, Heun 18"]["copies"] == rows["held-out images"]["copies"] == 0
    seen, unseen = rows["training images, each without itself"]["median"], rows["held-out images"]["median"]
    assert rows["teacher, Heun 18"]["median"] == pytest.approx(unseen, rel=0.03)
    assert seen == pytest.approx(unseen, rel=0.03)  # leaving one out stands for images held out

    assert json.loads((tmp_path / "out" / "memorization.json").read_text())["results"] == report["results"]
    table = (tmp_path / "out" / "memorization.md").read_text()
    assert "100.0%" in table and "held-out images (100)" in table
    with Image.open(tmp_path / "out" / "memorization.png") as picture:
        assert picture.size[0] > 2 * 3 * 48


def test_features_are_measured_beside_pixels(data, tmp_path):
    model = save_exact(tmp_path / "model", SIGMA_DATA)
    options = {"dataset_name": data, "num_samples": 20, "steps": [1], "features": "digits", "random_flip": True}
    report = main(MemorizationConfig(model=model, output_dir=str(tmp_path / "out"), **options))
    assert all({"pixels", "features"} <= set(row) for row in report["results"])
    assert report["results"][0]["features"] != report["results"][0]["pixels"]
    table = (tmp_path / "out" / "memorization.md").read_text()
    assert "mirror" in table and "features: median" in table


def test_options_that_do_not_fit(data, tmp_path):
    two = save_parquet(tmp_path / "two.parquet", gaussian_pixels(2, 8, 8, 3), [0, 1])
    for options, message in (
        ({"dataset_name": data}, "--model or --teacher is needed"),
        ({"model": "m", "gamma": 2.0}, r"--gamma must be in \[0, 1\]"),
        ({"model": "m", "steps": [0]}, "--steps must be positive"),
        ({"model": "m", "dataset_name": two}, "3 or more are needed"),
    ):
        with pytest.raises(UserError, match=message):
            main(MemorizationConfig(**options))
