# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Feature networks of others: TorchScript files and image models of transformers."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPConfig, CLIPModel, ViTConfig, ViTForImageClassification, ViTModel

from helpers.comparing import close, seeded
from training.cli.errors import UserError
from training.frozen.vectors import load_feature_network


SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


def random_images(*shape):
    return torch.randint(0, 256, shape, generator=seeded(), dtype=torch.uint8)


def save(model, folder, **processor):
    torch.manual_seed(0)
    model.eval().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return model


class Pooling(nn.Module):
    """Stands for FID's Inception: the mean of each channel."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert x.shape[2] == 299 and x.shape[3] == 299
        return x.mean(dim=[2, 3])


class ResizingPooling(nn.Module):
    """Stands for NVIDIA's file, which takes uint8 and resizes by itself."""

    def forward(self, img: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        x = img.float().mean(dim=[2, 3])
        return x if return_features else x[:, :1]


@pytest.mark.parametrize("module, low, high", [(Pooling(), -1, 1), (ResizingPooling(), 0, 255)])
def test_torchscript_features(tmp_path, module, low, high):
    images = random_images(4, 1, 16, 16)
    path = str(tmp_path / "pooling.pt")
    torch.jit.script(module).save(path)
    network = load_feature_network(path)
    assert network.num_features == 3
    expected = low + (high - low) * images.float().mean((1, 2, 3)) / 255
    close(network(images), expected[:, None].expand(4, 3), 0, 0.01 * (high - low))


def test_what_is_no_torchscript_is_refused_by_the_name_of_the_option(tmp_path):
    (tmp_path / "broken.pt").write_bytes(b"no TorchScript")
    with pytest.raises(UserError, match="--eval_features .*broken.pt cannot be loaded"):
        load_feature_network(str(tmp_path / "broken.pt"), prefix="eval_")


def test_transformers_features(tmp_path):
    mean, std = [0.5, 0.4, 0.3], [0.5, 0.25, 0.2]
    size = {"height": 32, "width": 32}
    model = save(
        ViTModel(ViTConfig(**SIZES, image_size=32, patch_size=8)), tmp_path, size=size, image_mean=mean, image_std=std
    )
    network = load_feature_network(str(tmp_path))
    images = random_images(3, 3, 32, 32)
    x = (images / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    with torch.no_grad():
        close(network(images), model(pixel_values=x).pooler_output)
    assert network.num_features == 16
    gray = network(torch.full((2, 1, 8, 8), 100, dtype=torch.uint8))
    close(gray, network(torch.full((2, 3, 32, 32), 100, dtype=torch.uint8)))


def test_features_have_no_random_weights(tmp_path):
    without_pooler = ViTForImageClassification(ViTConfig(**SIZES, image_size=8, patch_size=4))
    processor = {"size": 8, "image_mean": 0.5, "image_std": 0.5}
    model = save(without_pooler, tmp_path, **processor)
    images = random_images(3, 3, 8, 8)
    with torch.no_grad():
        expected = model.vit(pixel_values=images / 127.5 - 1).last_hidden_state.mean(1)
    close(load_feature_network(str(tmp_path))(images), expected)

    weights = load_file(tmp_path / "model.safetensors")
    del weights[next(name for name in weights if name.endswith("layernorm.weight"))]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="--features .*: its files lack 1 of the weights, such as layernorm.weight"):
        load_feature_network(str(tmp_path))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**processor, "do_flip_channel_order": True}))
    with pytest.raises(UserError, match="--features .*blue, green, red"):
        load_feature_network(str(tmp_path))


def test_features_of_an_image_and_text_model(tmp_path):
    text = {**SIZES, "vocab_size": 20, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    vision = {**SIZES, "image_size": 16, "patch_size": 8}
    crop = {"size": {"shortest_edge": 24}, "crop_size": {"height": 16, "width": 16}, "do_center_crop": True}
    save(CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)), tmp_path, **crop)
    network = load_feature_network(str(tmp_path))
    assert network.num_features == 12 and network.side == (16, 16)
    assert math.isfinite(network(torch.zeros(2, 1, 20, 20, dtype=torch.uint8)).sum())


def test_broken_weights_are_named(tmp_path):
    save(ViTModel(ViTConfig(**SIZES, image_size=16, patch_size=8)), tmp_path, size={"height": 16, "width": 16})
    weights = load_file(tmp_path / "model.safetensors")
    weights["layernorm.bias"][0] = math.inf
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="^--eval_features .* cannot be used: it has .*: network.layernorm.bias"):
        load_feature_network(str(tmp_path), prefix="eval_")
