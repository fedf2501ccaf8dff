# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""The family of EDM2: the magnitude-preserving networks for ImageNet-512 and ImageNet-64."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from diffusers_ctm import EDM2UNet2DModel
from diffusers_ctm.unet_edm2 import MPConv2d, MPLinear

from ..cli.errors import UserError
from .layers import (
    COPY_WEIGHT,
    WEIGHT,
    Kind,
    Layer,
    Shapes,
    Tensors,
    check_shapes,
    copied,
    empty_network,
    filled,
    has,
    join_qkv,
    official_tensors,
    present,
    resolutions,
    shape_of,
    shapes_of,
    sides_of,
    split_qkv,
)
from .pickles import Record
from .weights import is_number, module_numbers, modules_of


NAME = "edm2"
CLASSES = (EDM2UNet2DModel,)

# What names and shapes do not tell: the values of all published networks.
DEFAULTS = {"sigma_data": 0.5, "timestep_scale": 1.0}
HEAD_DIM = 64
SHORT = 0.1  # root mean square of rows of weights that are not as training leaves them
RAW_MEAN, RAW_STD = (5.81, 3.25, 0.12, -2.15), (4.17, 4.62, 3.71, 3.28)  # of the latents of ImageNet-512

# Attributes of the pickled modules: arguments of EDM2UNet2DModel, and sigma_data.
SAID = ("sigma_data", "dropout", "label_balance", "concat_balance", "res_balance", "attn_balance", "clip_act")


def matches(shapes: Shapes) -> bool:
    """Whether these names are those of EDM2's Precond."""
    return has(shapes, "unet.emb_fourier.") and has(shapes, "unet.enc.")


def defaults(shapes: Shapes) -> dict[str, float]:
    return dict(DEFAULTS)


def said_by(part: Record) -> dict[str, Any]:
    """What a pickled network says beside its weights: the attributes SAID, the size of its heads, its filter.

    What cannot be is left out. Raises UserError if parts of it say different things.
    """
    found: dict[str, set] = {name: module_numbers(part, name) for name in SAID}
    found["sigma_data"] = {value for value in found["sigma_data"] if value > 0}
    found |= {"attention_head_dim": set(), "resample_filter": set()}
    for _, state in modules_of(part):
        heads, channels, taps = (state.get(name) for name in ("num_heads", "out_channels", "resample_filter"))
        if type(heads) is type(channels) is int and 0 < heads <= channels < 1e30:
            found["attention_head_dim"].add(channels // heads)
        if type(taps) is list and len(taps) <= 16 and all(map(is_number, taps)):
            found["resample_filter"].add(tuple(taps))
    for name, values in found.items():
        if len(values) > 1:
            raise UserError(f"Blocks of the network say different things of {name}: {sorted(values)[:4]}.")
    return {name: values.pop() for name, values in found.items() if values}


def latent_numbers(encoder: Any) -> dict[str, list[float]]:
    """What the authors' StabilityVAEEncoder does, latent = scale * raw + bias, in diffusers' words.

    The numbers are the file's, or without them those of the published networks. Raises UserError for numbers that no
    latents have.
    """
    state = encoder.state if isinstance(encoder, Record) and isinstance(encoder.state, dict) else {}
    scale, bias = state.get("scale"), state.get("bias")
    if not all(isinstance(value, torch.Tensor) and value.ndim == 1 for value in (scale, bias)):
        return {"latents_mean": list(RAW_MEAN), "latents_std": [2 * value for value in RAW_STD]}
    mean, std = -bias.double() / scale, 1 / scale.double()
    if not (mean.isfinite().all() and std.isfinite().all() and (std > 0).all()):
        raise UserError(f"The file's encoder has no proper scale and bias: {scale.tolist()}, {bias.tolist()}.")
    return {"latents_mean": mean.tolist(), "latents_std": std.tolist()}


def to_diffusers(state_dict: Mapping[str, torch.Tensor], qkv_order: str | None = None, **overrides) -> EDM2UNet2DModel:
    """The network of an official state dict, float32, in evaluation mode, on the device of its tensors (meta included).

    `overrides` are arguments of EDM2UNet2DModel that win over what was inferred or what shapes do not tell. Raises
    UserError, with the name, if a tensor is missing, surplus or of another shape than in such a network.
    """
    if qkv_order is not None:
        raise UserError("--qkv_order is for ADM networks; this is EDM2's, which has one order only.")
    shapes = shapes_of(state_dict)
    network = empty_network(EDM2UNet2DModel, _inferred(shapes), overrides)
    layers = _layers(network)
    check_shapes(shapes, network, layers)
    return filled(network, layers, state_dict)


def note_on_weights(network: nn.Module) -> str:
    """A sentence if the stored weights of an EDM2 network are much shorter than its training keeps them, else "".

    Their length is divided out, so that nothing fails. At a root mean square of 0.01 the normalization of a student's
    first step changes outputs by 5 %; at 0.1 it is 0.4 %.
    """
    layers = [module.weight.flatten(1) for module in network.modules() if isinstance(module, (MPLinear, MPConv2d))]
    if not layers:
        return ""
    size = torch.cat([weight.detach().float().square().mean(1).sqrt().cpu() for weight in layers]).median().item()
    if size >= SHORT:
        return ""
    return (
        f"the rows of its weights have a root mean square of {size:.2g}. EDM2's training keeps it at 1, averages are "
        "somewhat below. The network divides by it: if it was trained without that, its images are wrong. The first "
        "step of a student normalizes it, which changes the outputs of rows this short."
    )


def without_variances(state_dict: Mapping[str, torch.Tensor]) -> Tensors:
    raise UserError("--prediction_type epsilon is for OpenAI's networks; this is EDM2's.")


def to_official(network: EDM2UNet2DModel, flavour: str | None = None) -> Tensors:
    """The state dict that the authors' Precond loads. Raises UserError for a second time, which it does not have."""
    if flavour is not None:
        raise UserError("--flavour is for ADM networks; this is EDM2's, which has one set of names only.")
    if network.has_target_time:
        raise UserError("EDM2's authors have no network with a target time; only teachers have an official form.")
    return copied(official_tensors(network, _layers(network)))


def _inferred(shapes: Shapes) -> dict:
    """The arguments that names and shapes tell, and the family's defaults for the others."""
    sizes, blocks = resolutions({name.removeprefix("unet."): shape for name, shape in shapes.items()})
    levels = [f"unet.enc.{size}x{size}" for size in sizes]
    widths = [shape_of(shapes, f"{level}_block0.conv_res1.weight", 4)[0] for level in levels]
    attended = tuple(index for index, level in enumerate(levels) if has(shapes, f"{level}_block0.attn_"))
    time_embedding_dim, time_proj_dim = shape_of(shapes, "unet.emb_noise.weight", 2)
    classes, variances = has(shapes, "unet.emb_label."), has(shapes, "logvar_")
    return {
        "sample_size": sizes[0],
        "in_channels": shape_of(shapes, f"{levels[0]}_conv.weight", 4)[1] - 1,
        "out_channels": shape_of(shapes, "unet.out_conv.weight", 4)[0],
        "block_out_channels": tuple(widths),
        "layers_per_block": blocks,
        "attention_levels": attended,
        "attention_head_dim": HEAD_DIM,
        "time_proj_dim": time_proj_dim,
        "time_embedding_dim": time_embedding_dim,
        "num_class_embeds": shape_of(shapes, "unet.emb_label.weight", 2)[1] if classes else None,
        "log_variance_channels": shape_of(shapes, "logvar_linear.weight", 2)[1] if variances else None,
    }


# Kinds of layers ------------------------------------------------------------------------------------------------------

GAIN = Kind(("",), ("",))
LINEAR = Kind(WEIGHT, WEIGHT, lambda weight: (weight.flatten(1),), lambda weight: (weight[:, :, None, None],))
FOURIER = Kind(
    (".freqs", ".phases"),
    (".frequency_bits", ".phase_bits"),
    lambda *numbers: tuple(number.view(torch.int32) for number in numbers),
    lambda *bits: tuple(each.view(torch.float32) for each in bits),
)


def _qkv(head_dim: int) -> Kind:
    """Query, key and value, three linear layers, as one 1x1 convolution with channels in the order head, dim, three."""
    return Kind(
        WEIGHT,
        tuple(f".{name}.weight" for name in ("to_q", "to_k", "to_v")),
        lambda weight: split_qkv(weight.flatten(1), head_dim, "head_dim_three"),
        lambda *weights: (join_qkv(weights, head_dim, "head_dim_three")[:, :, None, None],),
    )


def _layers(network: EDM2UNet2DModel) -> list[Layer]:
    """All layers under both names."""
    layers_per_block, sides = network.config.layers_per_block, sides_of(network)
    down, up = [], []
    for level, side in enumerate(sides):
        down += [f"unet.enc.{side}_down"] * (level > 0)
        down += [f"unet.enc.{side}_block{i}" for i in range(layers_per_block)]
    for level, side in reversed(list(enumerate(sides))):
        up += [f"unet.dec.{side}_up"] * (level < len(sides) - 1)
        up += [f"unet.dec.{side}_block{i}" for i in range(layers_per_block + 1)]
    middle = [f"unet.dec.{sides[-1]}_in{i}" for i in range(2)]
    layers = [
        Layer("unet.out_gain", "out_gain", GAIN),
        Layer("unet.emb_fourier", "time_proj", FOURIER),
        Layer("unet.emb_noise", "time_embedding", COPY_WEIGHT),
        Layer("unet.emb_label", "class_embedding", COPY_WEIGHT),
        Layer(f"unet.enc.{sides[0]}_conv", "conv_in", COPY_WEIGHT),
        Layer("unet.out_conv", "conv_out", COPY_WEIGHT),
        Layer("logvar_fourier", "log_variance_proj", FOURIER),
        Layer("logvar_linear", "log_variance_linear", COPY_WEIGHT),
    ]
    for part, names in (("down_blocks", down), ("mid_blocks", middle), ("up_blocks", up)):
        for index, name in enumerate(names):
            layers += _block(network, f"{part}.{index}", name)
    return present(layers, network)


def _block(network: EDM2UNet2DModel, own: str, name: str) -> list[Layer]:
    """The layers of the block `own`, whose official name is `name`."""
    return [
        Layer(f"{name}.emb_gain", f"{own}.emb_gain", GAIN),
        Layer(f"{name}.conv_res0", f"{own}.conv1", COPY_WEIGHT),
        Layer(f"{name}.emb_linear", f"{own}.emb_linear", COPY_WEIGHT),
        Layer(f"{name}.conv_res1", f"{own}.conv2", COPY_WEIGHT),
        Layer(f"{name}.conv_skip", f"{own}.conv_shortcut", COPY_WEIGHT),
        Layer(f"{name}.attn_qkv", f"{own}.attention", _qkv(network.config.attention_head_dim)),
        Layer(f"{name}.attn_proj", f"{own}.attention.to_out.0", LINEAR),
    ]
