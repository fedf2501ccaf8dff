# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""EDM2 networks as their authors keep them: those of the oracle, and snapshots made of ours."""

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from diffusers_ctm import EDM2UNet2DModel
from diffusers_ctm.preconditioning import Preconditioning
from helpers.nvidia import EasyDict, Persistent, nvidia_pickle
from helpers.places import EDM2_ORACLE
from training.official import edm2


# What names and shapes do not tell, by the authors' argument.
UNTOLD = {"channels_per_head": "attention_head_dim", "resample_filter": "resample_filter"}
UNTOLD |= {name: name for name in ("dropout", "label_balance", "concat_balance", "res_balance", "attn_balance")}
UNTOLD |= {"clip_act": "clip_act"}


def oracle_network(name: str) -> tuple[EDM2UNet2DModel, Preconditioning, dict[str, torch.Tensor]]:
    """A network of the oracle, converted, with its preconditioning and official weights; skips without the oracle."""
    path = EDM2_ORACLE / f"{name}.safetensors"
    if not path.exists():
        pytest.skip("the oracle folder is not here")
    weights = load_file(path)
    with safe_open(path, "pt") as file:
        config = json.loads(file.metadata()["config"])
    untold = {own: config[theirs] for theirs, own in UNTOLD.items() if theirs in config}
    return edm2.to_diffusers(weights, **untold), Preconditioning(config.get("sigma_data", 0.5), 1.0), weights


def official_blocks(network: EDM2UNet2DModel) -> dict[str, str]:
    """Own names of the blocks by the authors', which tell part, resolution and number."""
    config = network.config
    sides = [config.sample_size >> level for level in range(len(config.block_out_channels))]
    down = [f"enc.{sides[0]}x{sides[0]}_block{i}" for i in range(config.layers_per_block)]
    for side in sides[1:]:
        down += [f"enc.{side}x{side}_down", *(f"enc.{side}x{side}_block{i}" for i in range(config.layers_per_block))]
    up = []
    for side in reversed(sides):
        up += [f"dec.{side}x{side}_up", *(f"dec.{side}x{side}_block{i}" for i in range(config.layers_per_block + 1))]
    middle = [f"dec.{sides[-1]}x{sides[-1]}_in{i}" for i in range(2)]
    parts = {"down_blocks": down, "mid_blocks": middle, "up_blocks": up[1:]}  # no "up" at the lowest level
    return {f"unet.{name}": f"{part}.{i}" for part, names in parts.items() for i, name in enumerate(names)}


# Snapshots ------------------------------------------------------------------------------------------------------------


def _class(name: str) -> type[nn.Module]:
    return type(name, (Persistent, nn.Module), {})


Precond, UNet, Block, MPConv, MPFourier, StandardRGBEncoder, StabilityVAEEncoder = map(
    _class, ("Precond", "UNet", "Block", "MPConv", "MPFourier", "StandardRGBEncoder", "StabilityVAEEncoder")
)


def precond_of(network: EDM2UNet2DModel, sigma_data: float = 0.5) -> nn.Module:
    """The authors' modules, of one time, with the weights of `network` in float16 and the attributes they have."""
    config, own = network.config, official_blocks(network)
    precond = Precond()
    precond.sigma_data, precond.img_resolution = sigma_data, config.sample_size
    for name, tensor in edm2.to_official(network).items():
        module, path = precond, name.split(".")[:-1]
        for depth, part in enumerate(path):
            if part not in module._modules:
                module.add_module(part, _part(".".join(path[: depth + 1]), network, own))
            module = module._modules[part]
        if name.endswith((".freqs", ".phases")):
            module.register_buffer(name.rpartition(".")[2], tensor.half())
        else:
            module.register_parameter(name.rpartition(".")[2], nn.Parameter(tensor.half(), requires_grad=False))
    return precond


def _part(name: str, network: EDM2UNet2DModel, own: dict[str, str]) -> nn.Module:
    config = network.config
    if name == "unet":
        unet = UNet()
        unet.label_balance, unet.concat_balance = config.label_balance, config.concat_balance
        return unet
    if name in ("unet.enc", "unet.dec"):
        return nn.ModuleDict()
    if name not in own:
        return MPFourier() if name.endswith("_fourier") else MPConv()
    block, ours = Block(), network.get_submodule(own[name])
    block.out_channels, block.num_heads = ours.conv1.out_channels, 0 if ours.attention is None else ours.attention.heads
    block.resample_filter, block.dropout, block.clip_act = list(config.resample_filter), config.dropout, config.clip_act
    block.res_balance, block.attn_balance = config.res_balance, config.attn_balance
    return block


def latent_encoder(mean: list[float], std: list[float]) -> nn.Module:
    """Their encoder of networks of latents, by mean and deviation of raw latents: final = scale raw + bias."""
    encoder = StabilityVAEEncoder()
    encoder.scale = 1 / np.float32(std)
    encoder.bias = -np.float32(mean) * encoder.scale
    return encoder


def snapshot(precond: nn.Module, encoder: nn.Module | None = None) -> bytes:
    """A file of their training loop; without an encoder, of a network of pixels."""
    about = EasyDict(class_name="training.dataset.ImageFolderDataset", path="data.zip", use_labels=True)
    encoder = encoder or StandardRGBEncoder()
    return nvidia_pickle(EasyDict(encoder=encoder, dataset_kwargs=about, loss_fn=None, ema=precond))


def halves(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Official weights as the float16 of a snapshot gives them back."""
    return {name: tensor.half().float() for name, tensor in weights.items()}
