# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""The family of SongUNet: EDM's DDPM++ and NCSN++, and the networks for CIFAR-10 of CTM and MeanFlow."""

import math
import re
from collections.abc import Mapping
from typing import Any

import torch

from diffusers_ctm import EDMUNet2DModel

from ..cli.errors import UserError
from .layers import (
    BITS,
    COPY,
    COPY_WEIGHT,
    LINEAR,
    PREFIX,
    Layer,
    Shapes,
    Tensors,
    bare,
    check_shapes,
    copied,
    empty_network,
    filled,
    has,
    numbers,
    official_tensors,
    present,
    qkv,
    resample_filter,
    resolutions,
    shape_of,
    shapes_of,
    sides_of,
    two_times,
)
from .pickles import Record
from .weights import said_by_precond


NAME = "edm"
CLASSES = (EDMUNet2DModel,)

# What names and shapes do not tell.
DEFAULTS = {
    "sigma_data": 0.5,
    "timestep_scale": 1.0,
    "dropout": 0.13,  # of EDM's and CTM's CIFAR-10 training; FFHQ and AFHQv2 had 0.05 to 0.25
}
# MeanFlow's network is shown tau_t and tau_t - tau_s themselves, and jumps from pure noise to images.
MEANFLOW = {
    "prediction_type": "flow_prediction",
    "num_diffusion_timesteps": 1,
    "sigma_min": 0.0,
    "sigma_max": math.inf,
    "dropout": 0.2,
}


def matches(shapes: Shapes) -> bool:
    """Whether these names are those of a SongUNet, EDM teacher or the CIFAR-10 network of CTM or MeanFlow."""
    names = [name.removeprefix(PREFIX) for name in shapes]
    # Several tensors each: weights that lack one are recognized still, and told what is missing.
    has_end = any(re.match(r"dec\.(\d+)x\1_aux_(conv|norm)\.", name) for name in names)
    return has_end and any(name.startswith("map_layer") for name in names)


def defaults(shapes: Shapes) -> dict[str, float | str]:
    return DEFAULTS | MEANFLOW if is_meanflow(bare(shapes)) else dict(DEFAULTS)


def is_meanflow(shapes: Shapes) -> bool:
    """Whether its time embedding reads sines of two times, twice as many as its first convolution has channels each."""
    first = next((shape for name, shape in shapes.items() if re.fullmatch(r"enc\.(\d+)x\1_conv\.weight", name)), ())
    read = shapes.get("map_layer0.weight", ())
    return len(first) == 4 and len(read) == 2 and read[1] == 4 * first[0] and "map_noise.freqs" not in shapes


def said_by(part: Record) -> dict[str, float]:
    return said_by_precond(part)


def latent_numbers(encoder: Any) -> None:
    return None


def network_of(shapes: Shapes, **overrides) -> EDMUNet2DModel:
    """The network with these official names and shapes, on "meta".

    `overrides` are arguments of EDMUNet2DModel that win over what was inferred or what shapes do not tell. Raises
    UserError, with the name, if one is missing, surplus or of another shape than in such a network.
    """
    shapes = bare(shapes)
    network = empty_network(EDMUNet2DModel, _inferred(shapes), overrides)
    check_shapes(shapes, network, _layers(network))
    return network


def to_diffusers(state_dict: Mapping[str, torch.Tensor], qkv_order: str | None = None, **overrides) -> EDMUNet2DModel:
    """The network of an official state dict, float32, in evaluation mode, on the device of its tensors (meta included).

    Shares no storage with `state_dict`. Raises UserError as `network_of` does, and for a resampling filter that
    EDMUNet2DModel does not have.
    """
    if qkv_order is not None:
        raise UserError("--qkv_order is for ADM networks; this is a SongUNet, which has one order only.")
    network = network_of(shapes_of(state_dict), **overrides)
    return filled(network, _layers(network), bare(state_dict))


def without_variances(state_dict: Mapping[str, torch.Tensor]) -> Tensors:
    raise UserError("--prediction_type epsilon is for OpenAI's networks; this is a SongUNet.")


def to_official(network: EDMUNet2DModel, flavour: str | None = None) -> Tensors:
    """The state dict that the authors' EDMPrecond or EDMPrecond_CTM loads.

    A CTM's two biases per block are one here: it goes to `affine.bias`, and `affine_s.bias` is zero. A MeanFlow network
    gets the names of its `net_ema`. Raises UserError if `sample_size` is not one number, because the official names
    contain it.
    """
    if flavour is not None:
        raise UserError("--flavour is for ADM networks; this is a SongUNet, which has one set of names only.")
    prefix = "" if network.config.target_time_type == "interval" else PREFIX
    return copied(official_tensors(network, _layers(network)), prefix)


def _inferred(shapes: Shapes) -> dict:
    """The arguments that names and shapes tell, and the family's defaults for the others."""
    sizes, blocks = resolutions(shapes)
    top = f"{sizes[0]}x{sizes[0]}"

    def matching(pattern: str) -> list[str]:
        return [name for name in shapes if re.fullmatch(pattern, name)]

    filters = matching(r".*resample_filter")
    taps = shape_of(shapes, filters[0], 4)[-1] if filters else 2
    if taps not in (2, 4):
        raise UserError(f"{filters[0]} has {taps} taps; EDMUNet2DModel knows the filters (1, 1) and (1, 3, 3, 1).")
    model_channels, in_channels = shape_of(shapes, f"enc.{top}_conv.weight", 4)[:2]
    time_embedding_dim, time_proj_dim = shape_of(shapes, "map_layer0.weight", 2)
    meanflow = is_meanflow(shapes)
    encoders = {"skip": r"enc\..*_aux_skip\..*", "residual": r"enc\..*_aux_residual\..*"}
    if time_proj_dim == 2 * model_channels and "map_noise.freqs" not in shapes:  # a buffer: some files leave it out
        raise UserError(
            "The checkpoint has no map_noise.freqs, which a network has that is shown twice as many frequencies as its "
            "first convolution has channels; is it complete?"
        )
    has_attention = [has(shapes, f"enc.{size}x{size}_block0.qkv.") for size in sizes]
    return {
        "sample_size": sizes[0],
        "in_channels": in_channels,
        "out_channels": shape_of(shapes, f"dec.{top}_aux_conv.weight", 4)[0],
        "model_channels": model_channels,
        "block_out_channels": tuple(shape_of(shapes, f"enc.{s}x{s}_block0.conv0.weight", 4)[0] for s in sizes),
        "layers_per_block": blocks,
        "attention_levels": tuple(level for level, here in enumerate(has_attention) if here),
        "attention_head_dim": None,  # one head
        "dropout": (MEANFLOW if meanflow else DEFAULTS)["dropout"],
        "time_embedding_type": "fourier" if "map_noise.freqs" in shapes else "positional",
        "time_proj_dim": time_proj_dim // 2 if meanflow else time_proj_dim,
        "time_embedding_dim": time_embedding_dim,
        "encoder_type": next((kind for kind, pattern in encoders.items() if matching(pattern)), "standard"),
        "decoder_type": "skip" if len(numbers(shapes, r"dec\.(\d{1,4})x\1_aux_")) > 1 else "standard",
        "resample_filter": (1, 3, 3, 1) if taps == 4 else (1, 1),
        "num_class_embeds": shape_of(shapes, "map_label.weight", 2)[1] if has(shapes, "map_label.") else None,
        "label_dropout": 0.0,
        "augment_dim": shape_of(shapes, "map_augment.weight", 2)[1] if has(shapes, "map_augment.") else None,
        "target_time": meanflow or has(shapes, "map_layer0_s."),
        "target_time_type": "interval" if meanflow else "separate",
    }


EMBEDDINGS = [
    Layer("map_layer0", "time_embedding.linear_1", COPY),
    Layer("map_layer1", "time_embedding.linear_2", COPY),
    Layer("map_layer0_s", "target_time_embedding.linear_1", COPY),
    Layer("map_layer1_s", "target_time_embedding.linear_2", COPY),
    Layer("map_noise", "time_proj", BITS),
    Layer("map_label", "class_embedding", COPY),
    Layer("map_augment", "augment_embedding", COPY_WEIGHT),
]
RESNET_NAMES = {  # official: own
    **{"norm0": "norm1", "conv0": "conv1", "norm1": "norm2", "conv1": "conv2"},
    **{"affine": "time_emb_proj", "skip": "conv_shortcut"},
}


def _layers(network: EDMUNet2DModel) -> list[Layer]:
    """All layers under both names, the official ones without prefix."""
    config, taps = network.config, network.config.resample_filter
    enc, dec = ([f"{side}.{size}" for size in sides_of(network)] for side in ("enc", "dec"))
    layers = [*EMBEDDINGS, Layer(f"{enc[0]}_conv", "conv_in", COPY)]
    for level, block in enumerate(network.down_blocks):
        own, size = f"down_blocks.{level}", enc[level]
        names = [f"{size}_down"] * (level > 0) + [f"{size}_block{i}" for i in range(config.layers_per_block)]
        layers += _blocks(network, own, names)
        if block.image_conv is not None:
            layers += [Layer(f"{size}_aux_skip", f"{own}.image_conv", COPY), resample_filter(f"{size}_aux_down", taps)]
        elif block.image_downsample is not None:
            layers.append(Layer(f"{size}_aux_residual", f"{own}.image_downsample.Conv2d_0", COPY))
            layers.append(resample_filter(f"{size}_aux_residual", taps))
    layers += _blocks(network, "mid_block", [f"{dec[-1]}_in0", f"{dec[-1]}_in1"])
    for index, size in enumerate(reversed(dec)):
        own, is_last = f"up_blocks.{index}", size == dec[0]
        names = [f"{size}_up"] * (index > 0) + [f"{size}_block{i}" for i in range(config.layers_per_block + 1)]
        layers += _blocks(network, own, names)
        start = "" if is_last else f"{own}."
        layers.append(Layer(f"{size}_aux_norm", f"{start}conv_norm_out", COPY))
        layers.append(Layer(f"{size}_aux_conv", f"{start}conv_out", COPY))
        if config.decoder_type == "skip" and index > 0:
            layers.append(resample_filter(f"{size}_aux_up", taps))
    return present(layers, network)


def _blocks(network: EDMUNet2DModel, own: str, names: list[str]) -> list[Layer]:
    """The residual blocks of the submodule `own`, whose official names are `names`."""
    block, layers = network.get_submodule(own), []
    kinds = {"affine": COPY if network.target_time_embedding is None else two_times()}
    order = "three_head_dim" if network.config.target_time_type == "interval" else "head_dim_three"
    for index, name in enumerate(names):
        for official, part in RESNET_NAMES.items():
            layers.append(Layer(f"{name}.{official}", f"{own}.resnets.{index}.{part}", kinds.get(official, COPY)))
        if name.endswith(("_down", "_up")):
            layers += [resample_filter(f"{name}.{part}", network.config.resample_filter) for part in ("conv0", "skip")]
        if str(index) in block.attentions:
            attention, path = block.attentions[str(index)], f"{own}.attentions.{index}"
            head_dim = attention.to_q.out_features // attention.heads
            layers += [
                Layer(f"{name}.norm2", f"{path}.group_norm", COPY),
                Layer(f"{name}.qkv", path, qkv(head_dim, order)),
                Layer(f"{name}.proj", f"{path}.to_out.0", LINEAR),
            ]
    return layers
