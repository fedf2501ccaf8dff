# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""training.guide: guidance of the shipped CTM on digits, tiny."""

import math

import pytest
import torch

from diffusers_ctm import CTMPipeline, CTMScheduler
from diffusers_ctm.guidance import ClassAverage
from helpers.exact import randn
from training.cli.errors import UserError
from training.cli.shared_options import DataOptions
from training.data.images import ImageDataset
from training.frozen.vectors import load_feature_network
from training.guide import GuideConfig, main, nearest_class


def asked(row):
    return row["method"], row["value"], row["steps"]


def test_guidance_leads_the_shipped_model_to_the_classes_that_were_asked():
    options = {"num_samples": 20, "num_inference_steps": [2], "gamma": 0.0, "scales": [0.0, 3.0], "on": ["image"]}
    none, guided = main(GuideConfig(**options))
    assert (asked(none), asked(guided)) == (("image", 0.0, 2), ("image", 3.0, 2)) and none["kept"] == 1
    assert none["classifier"] < 0.35 and none["nearest"] < 0.35  # one class in ten by chance
    assert guided["classifier"] > none["classifier"] + 0.2 and guided["nearest"] > none["nearest"] + 0.1


def test_classifier_free_guidance_is_that_of_the_pipeline(make_unet, tmp_path):
    network = make_unet(in_channels=1, out_channels=1, num_class_embeds=11)
    CTMPipeline(network, CTMScheduler(), null_class=10).save_pretrained(tmp_path)
    options = {"model": str(tmp_path), "guidance_scales": [1.0, 4.0], "num_inference_steps": [1, 3], "num_samples": 12}
    rows = main(GuideConfig(**options))
    assert [asked(row) for row in rows] == [("free", scale, steps) for steps in (1, 3) for scale in (1.0, 4.0)]

    _, labels = ImageDataset(DataOptions(label_column="label"))[list(range(1797))]
    target = labels[torch.randperm(1797, generator=torch.Generator().manual_seed(0))][:12]
    pipe = CTMPipeline(network, CTMScheduler(), null_class=10)
    pipe.set_progress_bar_config(disable=True)
    images = pipe(
        class_labels=target, num_inference_steps=3, gamma=1.0, guidance_scale=4.0, output_type="latent",
        generator=torch.Generator().manual_seed(0),
    ).images  # fmt: skip
    judged = load_feature_network("digits").logits(images.clamp(-1, 1)).argmax(1)
    assert 0 < rows[3]["outside"] == pytest.approx((images.abs() > 1.05).float().mean().item(), abs=1e-3)
    assert rows[3]["classifier"] == pytest.approx((judged == target).float().mean().item(), abs=1e-6)


def test_rejection_keeps_what_the_classifier_is_sure_of():
    options = {"thresholds": [0.0, 0.9], "num_inference_steps": [1], "num_samples": 20}
    every, sure = main(GuideConfig(**options))
    assert (asked(every), asked(sure)) == (("rejection", 0.0, 1), ("rejection", 0.9, 1))
    assert every["kept"] == 1 and 0.3 < sure["kept"] < 1 and sure["classifier"] == 1
    with pytest.raises(UserError, match="--thresholds 1 kept 0 of 20 images. Give a lower one, or more --max_batches"):
        main(GuideConfig(**options | {"thresholds": [1.0]}, max_batches=1))


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
        ({"scales": [math.nan]}, "--scales must be finite numbers"),
        ({"guidance_scales": [1.0, math.inf]}, "--guidance_scales must be finite numbers"),
        ({"thresholds": [1.2]}, r"--thresholds must be in \[0, 1\]"),
        ({"num_inference_steps": [4, 0]}, "--num_inference_steps must be positive"),
        ({"gamma": 1.5}, r"--gamma must be in \[0, 1\]"),
        ({"label_column": None}, "--label_column must be a column"),
        ({"num_samples": 1}, "--num_samples must be 2 or more"),
        ({"model": "no such folder"}, "--model no such folder cannot be loaded"),
        ({"model": "assets/digits-edm"}, "is no CTM but a CTMPipeline with EDMHeunScheduler"),
        ({"classifier": "no such folder"}, "--classifier no such folder cannot be loaded"),
        ({"guidance_scales": [2.0]}, "--guidance_scales need a network trained with --label_dropout"),
        ({"model": "assets/emoji-ctm"}, r"images of shape \(1, 8, 8\), --model makes \(3, 64, 64\)"),
    ],
)
def test_options_and_models_that_do_not_fit(options, message):
    with pytest.raises(UserError, match=message):
        main(GuideConfig(**options))
