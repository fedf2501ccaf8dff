# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""training.guide: guidance of the shipped CTM on digits, tiny."""

import pytest
import torch
from exact import randn

from training.config import UserError
from training.guide import ClassAverage, GuideConfig, main, nearest_class


def test_guidance_leads_the_shipped_model_to_the_classes_that_were_asked():
    shares = main(GuideConfig(num_samples=20, num_inference_steps=2, gamma=0.0, scales=[0.0, 3.0], on=["image"]))
    assert list(shares) == [("image", 0.0), ("image", 3.0)]
    assert all(share < 0.35 for share in shares["image", 0.0])  # one class in ten by chance
    by_classifier, by_neighbour = (b - a for a, b in zip(*shares.values(), strict=True))
    assert by_classifier > 0.2 and by_neighbour > 0.1, shares


def test_the_average_over_classes(make_unet):
    network = make_unet(num_class_embeds=4)
    average = ClassAverage(network)
    sample, times = randn(2, 3, 8, 8, dtype=torch.float32), (torch.tensor(0.3), torch.tensor(-0.2))
    with torch.no_grad():
        each = [network(sample, *times, class_labels=torch.full((2,), k), return_dict=False)[0] for k in range(4)]
        torch.testing.assert_close(average(sample, *times)[0], torch.stack(each).mean(0), rtol=1e-4, atol=1e-5)
    assert average.config.num_class_embeds is None and network.config.num_class_embeds == 4


def test_the_nearest_example_decides():
    examples, labels = torch.tensor([[[[0.0]]], [[[1.0]]], [[[2.0]]]]), torch.tensor([7, 3, 5])
    assert nearest_class(torch.tensor([[[[1.6]]], [[[0.4]]]]), examples, labels).tolist() == [5, 7]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"on": ["noisy"]}, "--on must be 'prediction', 'image' or both"),
        ({"scales": []}, "--scales must be finite numbers"),
        ({"gamma": 1.5}, r"--gamma must be in \[0, 1\]"),
        ({"label_column": None}, "--label_column must be a column"),
        ({"num_samples": 0}, "--num_samples must be positive"),
    ],
)
def test_options_that_do_not_fit(options, message):
    with pytest.raises(UserError, match=message):
        GuideConfig(**options)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"model": "no such folder"}, "--model no such folder cannot be loaded"),
        ({"model": "assets/digits-edm"}, "is no CTM but a CTMPipeline with EDMHeunScheduler"),
        ({"classifier": "no such folder"}, "--classifier cannot be loaded"),
    ],
)
def test_a_model_that_is_not_there(options, message):
    with pytest.raises(UserError, match=message):
        main(GuideConfig(**options))
