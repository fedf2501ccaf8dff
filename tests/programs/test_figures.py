# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""training.figures: the shipped pictures are those of the shipped CTMs."""

import os

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_ctm import CTMPipeline, CTMScheduler
from helpers.places import ROOT
from training.cli.errors import UserError
from training.figures import FiguresConfig, flow, main, two_modes_denoiser


ASSETS = ROOT / "assets"
FOLDERS = {
    "model": "digits-ctm",
    "mnist_model": "mnist-ctm",
    "mnist_teacher": "mnist-edm",
    "emoji_model": "emoji-ctm",
    "emoji_teacher": "emoji-edm",
}
MODELS = {name: str(ASSETS / folder) for name, folder in FOLDERS.items()}


def test_the_shipped_pictures_are_drawn(tmp_path):
    main(FiguresConfig(**MODELS, output_dir=str(tmp_path)))
    assert sorted(os.listdir(tmp_path)) == sorted(os.listdir(ASSETS / "figures"))
    for name in (
        "mnist.png",
        "three_gammas.png",
        "editing.png",
        "trajectories.png",
        "safety.png",
        "emoji.png",
        "emoji_editing.png",
    ):
        drawn, shipped = (
            np.asarray(Image.open(folder / name).convert("RGB"), dtype=float)
            for folder in (tmp_path, ASSETS / "figures")
        )
        assert drawn.shape == shipped.shape and abs(drawn - shipped).mean() < 1, name


def test_the_toy_flow_keeps_the_distribution():
    """The flow is monotone, so it keeps the CDF of the two modes, each with its noise."""

    def cdf(x, sigma):
        scale = (0.01 + sigma**2) ** 0.5
        return sum(torch.special.ndtr((x - mean) / scale) for mean in (-1.0, 1.0)) / 2

    start = torch.tensor([-4.0, -0.5, 0.3, 2.9], dtype=torch.float64)
    levels, states = flow(start, 4.0, 0.02, steps=400)
    assert (levels[0], levels[-1]) == pytest.approx((4.0, 0.02)) and torch.equal(states[0], start)
    torch.testing.assert_close(cdf(states[-1], 0.02), cdf(start, 4.0), rtol=0, atol=2e-3)
    close = two_modes_denoiser(torch.tensor([1.3]), torch.tensor([1e-3]))
    assert close.item() == pytest.approx(1.3, abs=1e-3)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"model": "nowhere/at-all"}, "--model nowhere/at-all cannot be loaded"),
        ({"model": "{assets}/digits-edm"}, "is no CTM but a CTMPipeline with EDMHeunScheduler"),
        ({"model": "{other}"}, "must be a CTM of the ten 8x8 digits"),
        ({"emoji_model": "{other}"}, "--emoji_model .* must be a CTM of color images"),
        ({"mnist_model": "{other}"}, "--mnist_model .* must be a CTM of ten digits"),
    ],
)
def test_a_model_that_does_not_fit(make_unet, tmp_path, options, message):
    other = tmp_path / "other"
    CTMPipeline(make_unet(num_class_embeds=10), CTMScheduler()).save_pretrained(other)
    models = MODELS | {name: value.format(assets=ASSETS, other=other) for name, value in options.items()}
    with pytest.raises(UserError, match=message):
        main(FiguresConfig(**models, output_dir=str(tmp_path / "figures")))
    assert not (tmp_path / "figures").exists()
