# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""The family of ADM, under OpenAI's, the CTM authors' and NVIDIA's names."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DModel

from diffusers_ctm import CTMUNet2DModel

from ..cli.errors import UserError
from .layers import (
    COPY,
    COPY_WEIGHT,
    LINEAR,
    ONE_HOT,
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


NAME = "adm"
CLASSES = (UNet2DModel, CTMUNet2DModel)

# What names and shapes do not tell. Consistency models have the names and shapes of the EDM teacher, too.
DEFAULTS = {
    "openai": {"timestep_scale": 1000.0, "sigma_data": 0.5, "dropout": 0.0},
    "ctm": {"timestep_scale": 1000.0, "sigma_data": 0.5, "dropout": 0.0},
    "nvidia": {"timestep_scale": 1.0, "sigma_data": 0.5, "dropout": 0.1},
}
HEAD_DIM = 64
BLOCKS = {
    *("DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D", "UNetMidBlock2D"),
    *("UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
}
QKV_ORDER = {"openai": "three_head_dim", "ctm": "three_head_dim", "nvidia": "head_dim_three"}


def flavour_of(shapes: Iterable[str]) -> str | None:
    """Whose names these are, "openai", "ctm" or "nvidia", or None."""
    names = {name.removeprefix(PREFIX) for name in shapes}
    parts = {name.partition(".")[0] for name in names}
    # Each part has several tensors: weights that lack one are recognized still, and told what is missing.
    if {"enc", "dec", "out_norm", "out_conv"} <= parts and any(name.startswith("map_layer") for name in names):
        return "nvidia"
    if {"time_embed", "input_blocks", "middle_block", "output_blocks", "out"} <= parts:
        has_target = any(name.startswith("time_embed_s.") or ".emb_layers_s." in name for name in names)
        return "ctm" if has_target else "openai"
    return None


def matches(shapes: Shapes) -> bool:
    """Whether these names are those of an ADM network."""
    return flavour_of(shapes) is not None


def defaults(shapes: Shapes) -> dict[str, float]:
    return dict(DEFAULTS[flavour_of(shapes)])


def said_by(part: Record) -> dict[str, float]:
    return said_by_precond(part)


def latent_numbers(encoder: Any) -> None:
    return None


def network_of(shapes: Shapes, **overrides) -> UNet2DModel | CTMUNet2DModel:
    """The network with these official names and shapes, on "meta".

    `overrides` are arguments of UNet2DModel that win over what was inferred or what shapes do not tell. Raises
    UserError, with the name, if one is missing, surplus or of another shape than in such a network.
    """
    flavour = flavour_of(shapes)
    shapes = {name: (*shape, 1) if _is_one_dimensional(name, shape) else shape for name, shape in bare(shapes).items()}
    config = _nvidia_config(shapes) if flavour == "nvidia" else _openai_config(shapes)
    config |= {"attention_head_dim": HEAD_DIM, "dropout": DEFAULTS[flavour]["dropout"]}
    head_dim = overrides.get("attention_head_dim", HEAD_DIM)
    for name, shape in shapes.items():
        if name.endswith(".qkv.weight") and shape and shape[0] % (3 * head_dim):
            raise UserError(
                f"--num_head_channels {head_dim} does not divide the {shape[0] // 3} channels of {name}; pass one that "
                "does."
            )
    network = empty_network(CTMUNet2DModel if flavour == "ctm" else UNet2DModel, config, overrides)
    check_shapes(shapes, network, _layers(network, flavour))
    return network


def to_diffusers(
    state_dict: Mapping[str, torch.Tensor], qkv_order: str | None = None, **overrides
) -> UNet2DModel | CTMUNet2DModel:
    """The network of an official state dict, float32, in evaluation mode, on the device of its tensors (meta included).

    Shares no storage with `state_dict`. `qkv_order`, one of `QKV_ORDERS`, is needed only for checkpoints whose `qkv` is
    a one-dimensional convolution (guided-diffusion), where it depends on an option of theirs ("head_three_dim" unless
    use_new_attention_order). Raises UserError as `network_of` does.
    """
    shapes = shapes_of(state_dict)
    network, flavour = network_of(shapes, **overrides), flavour_of(shapes)
    for name, shape in shapes.items():
        if qkv_order is None and name.endswith(".qkv.weight") and _is_one_dimensional(name, shape):
            raise UserError(
                f"{name} is a one-dimensional convolution, as in guided-diffusion, whose order of channels the "
                "checkpoint does not tell. Give --qkv_order head_three_dim (guided-diffusion's default), or "
                "three_head_dim if it was trained with use_new_attention_order."
            )
    return filled(network, _layers(network, flavour, qkv_order), bare(state_dict))


def without_variances(state_dict: Mapping[str, torch.Tensor]) -> Tensors:
    """The weights of OpenAI's network without the outputs of a learned variance, if it has any.

    They are the second half of its channels (Nichol & Dhariwal 2021). Sampling by the ODE and distillation need the
    first.
    """
    if flavour_of(state_dict) != "openai":
        raise UserError("--prediction_type epsilon is for OpenAI's guided-diffusion; these weights have other names.")
    tensors = bare(state_dict)
    in_channels, last = tensors["input_blocks.0.0.weight"].shape[1], ("out.2.weight", "out.2.bias")
    halves = len(tensors["out.2.weight"]) == 2 * in_channels
    return {name: tensor[:in_channels] if halves and name in last else tensor for name, tensor in tensors.items()}


def to_official(network: UNet2DModel | CTMUNet2DModel, flavour: str | None = None) -> Tensors:
    """The state dict of `network` under official names, copies of its weights.

    Args:
        flavour: "ctm" for a CTMUNet2DModel (the default there), "openai" (the default) or "nvidia" for a UNet2DModel.
            The two biases of a CTM's residual block are one here: it goes to `emb_layers`, zeros to `emb_layers_s`.

    Raises UserError for a network that the official classes cannot be, saying which entry of its config is the reason.
    """
    flavour = flavour or ("ctm" if isinstance(network, CTMUNet2DModel) else "openai")
    if flavour not in DEFAULTS:
        raise UserError(f"--flavour must be one of {', '.join(DEFAULTS)}, got {flavour!r}.")
    if (flavour == "ctm") != isinstance(network, CTMUNet2DModel):
        raise UserError(f"A {type(network).__name__} has no official form of flavour {flavour!r}.")
    config = {name: tuple(value) if isinstance(value, list) else value for name, value in network.config.items()}
    others = {*config["down_block_types"], *config["up_block_types"], config["mid_block_type"]} - BLOCKS
    if others:
        raise UserError(f"The network has blocks {others}; an ADM network has none such.")
    if flavour != "nvidia" and not config["add_attention"]:
        raise UserError(f"The network has add_attention=False; an ADM network of flavour {flavour!r} has True.")
    official = official_tensors(network, _layers(network, flavour))
    free = ("sample_size", "dropout", "attention_head_dim")
    converted = network_of(shapes_of(official), **{name: config[name] for name in free}).config
    unused = {"num_train_timesteps"} | ({"downsample_padding"} if config["downsample_type"] == "resnet" else set())
    for name, value in converted.items():
        if not name.startswith("_") and name not in unused and config[name] != value:
            raise UserError(
                f"The network has {name}={config[name]!r}; an ADM network of flavour {flavour!r} has {value!r}."
            )
    return copied(official, PREFIX if flavour == "nvidia" else "")


def _is_one_dimensional(name: str, shape: tuple[int, ...]) -> bool:
    """Whether it is an attention's 1x1 convolution over the flattened image, as in guided-diffusion."""
    return name.endswith((".qkv.weight", ".proj_out.weight")) and len(shape) == 3 and shape[-1] == 1


# Layers under both names ----------------------------------------------------------------------------------------------

OPENAI_OUTER = {  # official: own
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "time_embed_s.0": "target_time_embedding.linear_1",
    "time_embed_s.2": "target_time_embedding.linear_2",
    **{"input_blocks.0.0": "conv_in", "out.0": "conv_norm_out", "out.2": "conv_out"},
}
RESNET_NAMES = {  # own: (OpenAI's, NVIDIA's)
    "norm1": ("in_layers.0", "norm0"),
    "conv1": ("in_layers.2", "conv0"),
    "time_emb_proj": ("emb_layers.1", "affine"),
    "norm2": ("out_layers.0", "norm1"),
    "conv2": ("out_layers.3", "conv1"),
    "conv_shortcut": ("skip_connection", "skip"),
}


@dataclass(frozen=True)
class _Names:
    """Official names, without prefix. A list has an entry per level of the side, in the order of the network.

    Args:
        outer: layers outside of the blocks, with their own names.
        blocks: the residual blocks of both sides, "down" and "up".
        samplers: what halves or doubles the resolution behind a level.
        middle: residual block, attention, residual block.
        ends: what stands behind a block's name for its residual part and for its attention.
    """

    outer: dict[str, str]
    blocks: dict[str, list[list[str]]]
    samplers: dict[str, list[str]]
    middle: tuple[str, str, str]
    ends: tuple[str, str]


def _openai_names(network: UNet2DModel) -> _Names:
    """`input_blocks` and `output_blocks` number blocks through all levels. An upsampler has its level's last number."""
    per_level, levels = network.config.layers_per_block + 1, range(len(network.down_blocks))
    down = [[f"input_blocks.{1 + level * per_level + i}" for i in range(per_level)] for level in levels]
    up = [[f"output_blocks.{level * per_level + i}" for i in range(per_level)] for level in levels]
    places = [2 if hasattr(block, "attentions") else 1 for block in network.up_blocks]
    samplers = {
        "down": [f"{names[-1]}.0" for names in down],
        "up": [f"{names[-1]}.{place}" for names, place in zip(up, places)],
    }
    middle = ("middle_block.0", "middle_block.1", "middle_block.2")
    return _Names(OPENAI_OUTER, {"down": down, "up": up}, samplers, middle, (".0", ".1"))


def _nvidia_names(network: UNet2DModel) -> _Names:
    """A block is named by its resolution, and its attention is part of it."""
    sizes, count = sides_of(network), range(network.config.layers_per_block + 1)
    outer = {
        **{"map_layer0": "time_embedding.linear_1", "map_layer1": "time_embedding.linear_2"},
        **{f"enc.{sizes[0]}_conv": "conv_in", "out_norm": "conv_norm_out", "out_conv": "conv_out"},
    }
    blocks = {
        "down": [[f"enc.{size}_block{i}" for i in count] for size in sizes],
        "up": [[f"dec.{size}_block{i}" for i in count] for size in reversed(sizes)],
    }
    samplers = {"down": [f"enc.{size}_down" for size in sizes[1:]], "up": [f"dec.{size}_up" for size in sizes[-2::-1]]}
    middle = (f"dec.{sizes[-1]}_in0", f"dec.{sizes[-1]}_in0", f"dec.{sizes[-1]}_in1")
    return _Names(outer, blocks, samplers, middle, ("", ""))


def _layers(network: UNet2DModel, flavour: str, qkv_order: str | None = None) -> list[Layer]:
    is_nvidia = flavour == "nvidia"
    names = _nvidia_names(network) if is_nvidia else _openai_names(network)
    attention_kind = qkv(network.config.attention_head_dim, qkv_order or QKV_ORDER[flavour])
    layers = [Layer(official, own, COPY) for official, own in names.outer.items()]
    label, kind = ("map_label", ONE_HOT) if is_nvidia else ("label_emb", COPY_WEIGHT)
    layers.append(Layer(label, "class_embedding", kind))

    def add_resnet(official: str, own: str) -> None:
        for part, officials in RESNET_NAMES.items():
            if flavour == "ctm" and part == "time_emb_proj":
                layers.append(Layer(f"{official}.emb_layers", f"{own}.{part}", two_times(".1")))
            else:
                layers.append(Layer(f"{official}.{officials[is_nvidia]}", f"{own}.{part}", COPY))
        if is_nvidia and official.endswith(("_up", "_down")):
            layers.extend(resample_filter(f"{official}.{name}") for name in ("conv0", "skip"))

    def add_attention(official: str, own: str) -> None:
        norm, projection = ("norm2", "proj") if is_nvidia else ("norm", "proj_out")
        layers.extend(
            [
                Layer(f"{official}.{norm}", f"{own}.group_norm", COPY),
                Layer(f"{official}.qkv", own, attention_kind),
                Layer(f"{official}.{projection}", f"{own}.to_out.0", LINEAR),
            ]
        )

    for side, convolution in (("down", "op"), ("up", "conv")):
        for level, block in enumerate(network.get_submodule(f"{side}_blocks")):
            own = f"{side}_blocks.{level}"
            for i, official in enumerate(names.blocks[side][level][: len(block.resnets)]):
                add_resnet(official + names.ends[0], f"{own}.resnets.{i}")
                add_attention(official + names.ends[1], f"{own}.attentions.{i}")
            if getattr(block, f"{side}samplers") is not None:  # a residual block or a convolution
                official, own = names.samplers[side][level], f"{own}.{side}samplers.0"
                add_resnet(official, own)
                layers.append(Layer(f"{official}.{convolution}", f"{own}.conv", COPY))
    add_resnet(names.middle[0], "mid_block.resnets.0")
    add_attention(names.middle[1], "mid_block.attentions.0")
    add_resnet(names.middle[2], "mid_block.resnets.1")
    return present(layers, network)


# Names and shapes to arguments ----------------------------------------------------------------------------------------


def _openai_config(shapes: Shapes) -> dict:
    count = len(numbers(shapes, r"output_blocks\.(\d{1,4})\."))
    ups = numbers(shapes, r"output_blocks\.(\d{1,4})\.[12]\.(?:in_layers|conv)\.")
    levels = len(ups) + 1
    layers = count // levels - 1
    if layers < 1 or count % levels or ups != [(i + 1) * (layers + 1) - 1 for i in range(levels - 1)]:
        raise UserError(
            f"The checkpoint has {count} output_blocks, of which numbers {ups} upsample; in an ADM network with "
            f"{levels} levels each level has as many, and its last one upsamples."
        )
    first = [1 + level * (layers + 1) for level in range(levels)]
    has_resnet_sampling = levels == 1 or has(shapes, f"input_blocks.{first[1] - 1}.0.in_layers.")
    return _config(
        shapes,
        names=("input_blocks.0.0", "out.2", "time_embed.0", "input_blocks.1.0.emb_layers.1"),
        widths=tuple(shape_of(shapes, f"input_blocks.{i}.0.in_layers.2.weight", 4)[0] for i in first),
        has_attention=[has(shapes, f"input_blocks.{i}.1.") for i in first],
        has_resnet_sampling=has_resnet_sampling,
        layers_per_block=layers,
        num_class_embeds=shape_of(shapes, "label_emb.weight", 2)[0] if "label_emb.weight" in shapes else None,
        sample_size=8 << (levels - 1),  # all of OpenAI's networks end at 8x8
        add_attention=True,
    )


def _nvidia_config(shapes: Shapes) -> dict:
    sizes, layers = resolutions(shapes)
    blocks, top = [f"enc.{size}x{size}_block0" for size in sizes], f"enc.{sizes[0]}x{sizes[0]}"
    widths = tuple(shape_of(shapes, f"{block}.conv0.weight", 4)[0] for block in blocks)
    if min(widths) < 128:
        raise UserError(
            f"The network has widths {widths}. Below 128 channels NVIDIA's norms have a quarter as many groups as "
            "channels, each its own number, and UNet2DModel has one for all."
        )
    return _config(
        shapes,
        names=(f"{top}_conv", "out_conv", "map_layer0", f"{top}_block0.affine"),
        widths=widths,
        has_attention=[has(shapes, f"{block}.qkv.") for block in blocks],
        has_resnet_sampling=True,
        layers_per_block=layers,
        num_class_embeds=shape_of(shapes, "map_label.weight", 2)[1] if "map_label.weight" in shapes else None,
        sample_size=sizes[0],
        add_attention=has(shapes, f"dec.{sizes[-1]}x{sizes[-1]}_in0.qkv."),
    )


def _config(
    shapes: Shapes,
    names: tuple[str, str, str, str],
    widths: tuple[int, ...],
    has_attention: list[bool],
    has_resnet_sampling: bool,
    **others,
) -> dict:
    """Arguments of UNet2DModel. `names`: first and last convolution, linear layers of the time and of a block."""
    conv_in, conv_out, time, projection = (f"{name}.weight" for name in names)
    time_dim, rows = shape_of(shapes, time, 2)[0], shape_of(shapes, projection, 2)[0]
    plain_down, plain_up = "DownBlock2D", "UpBlock2D"
    if has_resnet_sampling:
        plain_down, plain_up = "ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D"
    return {
        "in_channels": shape_of(shapes, conv_in, 4)[1],
        "out_channels": shape_of(shapes, conv_out, 4)[0],
        "block_out_channels": widths,
        "down_block_types": tuple("AttnDownBlock2D" if here else plain_down for here in has_attention),
        "up_block_types": tuple("AttnUpBlock2D" if here else plain_up for here in reversed(has_attention)),
        "downsample_type": "resnet" if has_resnet_sampling else "conv",
        "upsample_type": "resnet" if has_resnet_sampling else "conv",
        "resnet_time_scale_shift": "scale_shift" if rows == 2 * widths[0] else "default",
        "time_embedding_dim": None if time_dim == 4 * widths[0] else time_dim,
        "norm_num_groups": 32,
        "attn_norm_num_groups": 32,
        "norm_eps": 1e-5,
        **others,
    }
