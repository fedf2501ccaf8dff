"""ADM under OpenAI's, the CTM authors' and NVIDIA's names."""

import inspect
import re
from collections.abc import Iterable, Mapping

import torch
from diffusers import UNet2DModel

from diffusers_ctm import CTMUNet2DModel

from ..cli.errors import UserError
from .layers import (
    COPY,
    EMBEDDING,
    LINEAR,
    ONE_HOT,
    QKV,
    QKV_ORDERS,
    TWO_TIMES,
    Layer,
    Shapes,
    Tensors,
    _check_shapes,
    _shape,
)


# What names and shapes do not tell. Consistency models have the names and shapes of the EDM teacher, too.
DEFAULTS = {
    "openai": {"timestep_scale": 1000.0, "sigma_data": 0.5, "num_head_channels": 64, "dropout": 0.0},
    "ctm": {"timestep_scale": 1000.0, "sigma_data": 0.5, "num_head_channels": 64, "dropout": 0.0},
    "nvidia": {"timestep_scale": 1.0, "sigma_data": 0.5, "num_head_channels": 64, "dropout": 0.1},
}

PREFIX = "model."  # of EDMPrecond; may be absent

CONSTANT_FILTER = torch.full((1, 1, 2, 2), 0.25)


def flavour_of(shapes: Iterable[str]) -> str | None:
    """Whose names these are, "openai", "ctm" or "nvidia", or None."""
    names = {name.removeprefix(PREFIX) for name in shapes}
    if {"map_layer0.weight", "out_conv.weight"} <= names:
        return "nvidia"
    if {"time_embed.0.weight", "input_blocks.0.0.weight", "out.2.weight"} <= set(shapes):
        return (
            "ctm" if any(name.startswith("time_embed_s.") or ".emb_layers_s." in name for name in shapes) else "openai"
        )
    return None


def matches(shapes: Shapes) -> bool:
    """Whether these names are those of an ADM network."""
    return flavour_of(shapes) is not None


def defaults(shapes: Shapes) -> dict:
    """What shapes do not tell of this network: its preconditioning, head width and dropout."""
    return dict(DEFAULTS[_known_flavour(shapes)])


def config_of(shapes: Shapes, **overrides) -> dict:
    """The arguments of `UNet2DModel` that give a network with these names and shapes.

    Args:
        shapes: shape of each tensor by its official name.
        overrides: arguments that win over what was inferred or what shapes do not tell; `num_head_channels` is `attention_head_dim`.

    Raises UserError, with the key, if one is missing, surplus or of another shape than in such a network.
    """
    flavour, shapes = _known_flavour(shapes), _normal_shapes(shapes)
    if flavour == "nvidia":
        config = _nvidia_config(shapes)
    else:
        config = _openai_config(shapes)
    config |= {"attention_head_dim": DEFAULTS[flavour]["num_head_channels"], "dropout": DEFAULTS[flavour]["dropout"]}
    config |= _own_overrides(overrides)
    _check_divisible(config)
    network = _meta_network(config, flavour)
    _check_shapes(shapes, {name: tuple(tensor.shape) for name, tensor in _official(network, flavour).items()})
    return config


def to_diffusers(
    state_dict: Mapping[str, torch.Tensor], qkv_order: str | None = None, **overrides
) -> UNet2DModel | CTMUNet2DModel:
    """The network of an official state dict, float32, in evaluation mode, on the device of its tensors (meta included).

    Shares no storage with `state_dict`. `overrides` as in `config_of`. `qkv_order`, one of `QKV_ORDERS`, is needed only for
    checkpoints whose `qkv` is a one-dimensional convolution (guided-diffusion), where it depends on an option of theirs
    ("head_three_dim" unless use_new_attention_order). Raises UserError, with the key, for one that is missing, surplus or misshapen.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in state_dict.items()}
    config = config_of(shapes, **overrides)
    flavour = _known_flavour(shapes)
    qkv_order = _qkv_order(shapes, flavour, qkv_order)
    network = _meta_network(config, flavour)
    tensors = {_normal_name(name): _normal(tensor.detach().float(), name) for name, tensor in state_dict.items()}
    weights = {}
    for layer in _layers(network, flavour):
        weights |= layer.kind.to_own(tensors, layer, config["attention_head_dim"], qkv_order)
        for name in layer.filters:
            _check_filter(name, tensors[name])
    copies = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in weights.items()}
    network.load_state_dict(copies, assign=True)
    return network.eval()


def without_variances(state_dict: Mapping[str, torch.Tensor]) -> Tensors:
    """The weights of OpenAI's network without the outputs of a learnt variance, if it has them (Nichol & Dhariwal 2021).

    They are the second half of its channels; sampling by the ODE and distillation need the first. Raises UserError for other networks.
    """
    if flavour_of(state_dict) != "openai":
        raise UserError(
            "Networks that predict epsilon are OpenAI's guided-diffusion ones; these weights have other names."
        )
    in_channels, last = state_dict["input_blocks.0.0.weight"].shape[1], ("out.2.weight", "out.2.bias")
    halves = len(state_dict["out.2.weight"]) == 2 * in_channels
    return {name: tensor[:in_channels] if halves and name in last else tensor for name, tensor in state_dict.items()}


def to_official(network: UNet2DModel | CTMUNet2DModel, flavour: str | None = None) -> Tensors:
    """The state dict of `network` under official names, copies of its weights.

    Args:
        flavour: "ctm" for a CTMUNet2DModel (the default there), "openai" (the default) or "nvidia" for a UNet2DModel. The two biases of
            a CTM's residual block are one here: it goes to `emb_layers`, zeros to `emb_layers_s`.

    Raises UserError for a network that the official classes cannot be, saying which entry of its config is the reason.
    """
    flavour = flavour or ("ctm" if isinstance(network, CTMUNet2DModel) else "openai")
    if flavour not in DEFAULTS:
        raise UserError(f"flavour must be one of {', '.join(DEFAULTS)}, got {flavour!r}.")
    if type(network) is not (CTMUNet2DModel if flavour == "ctm" else UNet2DModel):
        raise UserError(f"A {type(network).__name__} has no official form of flavour {flavour!r}.")
    _check_has_official_form(network, flavour)
    return {name: tensor.detach().clone() for name, tensor in _official(network, flavour).items()}


RESNET_NAMES = {  # own: (OpenAI's, NVIDIA's)
    "norm1": ("in_layers.0", "norm0"),
    "conv1": ("in_layers.2", "conv0"),
    "time_emb_proj": ("emb_layers.1", "affine"),
    "norm2": ("out_layers.0", "norm1"),
    "conv2": ("out_layers.3", "conv1"),
    "conv_shortcut": ("skip_connection", "skip"),
}

ATTENTION_NAMES = {"group_norm": ("norm", "norm2"), "": ("qkv", "qkv"), "to_out.0": ("proj_out", "proj")}


def _layers(network: UNet2DModel, flavour: str) -> list[Layer]:
    """All layers of `network` under both names."""
    layers = _nvidia_layers(network) if flavour == "nvidia" else _openai_layers(network, flavour)
    if flavour == "nvidia":
        layers = [Layer(PREFIX + x.official, x.own, x.kind, tuple(PREFIX + name for name in x.filters)) for x in layers]
    return layers


def _resnet(network: UNet2DModel, official: str, own: str, flavour: str) -> list[Layer]:
    resnet = network.get_submodule(own)
    layers = []
    for part, names in RESNET_NAMES.items():
        if getattr(resnet, part, None) is None:
            continue
        kind = TWO_TIMES if flavour == "ctm" and part == "time_emb_proj" else COPY
        layers.append(Layer(f"{official}.{names[flavour == 'nvidia']}", f"{own}.{part}", kind))
    if flavour == "nvidia" and (resnet.up or resnet.down):
        filters = tuple(f"{official}.{name}.resample_filter" for name in ("conv0", "skip"))
        layers[1] = Layer(layers[1].official, layers[1].own, layers[1].kind, filters)
    return layers


def _attention(official: str, own: str, flavour: str) -> list[Layer]:
    kinds = {"group_norm": COPY, "": QKV, "to_out.0": LINEAR}
    return [
        Layer(f"{official}.{names[flavour == 'nvidia']}", f"{own}.{part}".rstrip("."), kinds[part])
        for part, names in ATTENTION_NAMES.items()
    ]


def _openai_layers(network: UNet2DModel, flavour: str) -> list[Layer]:
    """Names as in OpenAI's lists: `input_blocks` and `output_blocks` number blocks through all levels."""
    layers = []
    for time, own in (("time_embed", "time_embedding"), ("time_embed_s", "target_time_embedding")):
        if hasattr(network, own):
            layers += [Layer(f"{time}.0", f"{own}.linear_1", COPY), Layer(f"{time}.2", f"{own}.linear_2", COPY)]
    if network.class_embedding is not None:
        layers.append(Layer("label_emb", "class_embedding", EMBEDDING))
    layers.append(Layer("input_blocks.0.0", "conv_in", COPY))

    number = 1
    for level, block in enumerate(network.down_blocks):
        own = f"down_blocks.{level}"
        for i in range(len(block.resnets)):
            layers += _resnet(network, f"input_blocks.{number}.0", f"{own}.resnets.{i}", flavour)
            if hasattr(block, "attentions"):
                layers += _attention(f"input_blocks.{number}.1", f"{own}.attentions.{i}", flavour)
            number += 1
        if block.downsamplers is not None:
            if network.config.downsample_type == "resnet":
                layers += _resnet(network, f"input_blocks.{number}.0", f"{own}.downsamplers.0", flavour)
            else:
                layers.append(Layer(f"input_blocks.{number}.0.op", f"{own}.downsamplers.0.conv", COPY))
            number += 1

    layers += _resnet(network, "middle_block.0", "mid_block.resnets.0", flavour)
    layers += _attention("middle_block.1", "mid_block.attentions.0", flavour)
    layers += _resnet(network, "middle_block.2", "mid_block.resnets.1", flavour)

    number = 0
    for level, block in enumerate(network.up_blocks):
        own = f"up_blocks.{level}"
        for i in range(len(block.resnets)):
            layers += _resnet(network, f"output_blocks.{number}.0", f"{own}.resnets.{i}", flavour)
            if hasattr(block, "attentions"):
                layers += _attention(f"output_blocks.{number}.1", f"{own}.attentions.{i}", flavour)
            number += 1
        if block.upsamplers is not None:  # behind the last block of the level, under its number
            official = f"output_blocks.{number - 1}.{2 if hasattr(block, 'attentions') else 1}"
            if network.config.upsample_type == "resnet":
                layers += _resnet(network, official, f"{own}.upsamplers.0", flavour)
            else:
                layers.append(Layer(f"{official}.conv", f"{own}.upsamplers.0.conv", COPY))
    return [*layers, Layer("out.0", "conv_norm_out", COPY), Layer("out.2", "conv_out", COPY)]


def _nvidia_layers(network: UNet2DModel) -> list[Layer]:
    """Names as NVIDIA's: a block by resolution, its attention part of it, `in0` and `in1` the middle."""
    layers = [
        Layer("map_layer0", "time_embedding.linear_1", COPY),
        Layer("map_layer1", "time_embedding.linear_2", COPY),
    ]
    if network.class_embedding is not None:
        layers.append(Layer("map_label", "class_embedding", ONE_HOT))
    levels = len(network.down_blocks)
    size = [network.config.sample_size >> level for level in range(levels)]
    name = [f"{s}x{s}" for s in size]
    layers.append(Layer(f"enc.{name[0]}_conv", "conv_in", COPY))

    def blocks(side: str, level: int, own: str, block: torch.nn.Module) -> list[Layer]:
        found = []
        for i in range(len(block.resnets)):
            official = f"{side}.{name[level]}_block{i}"
            found += _resnet(network, official, f"{own}.resnets.{i}", "nvidia")
            if hasattr(block, "attentions"):
                found += _attention(official, f"{own}.attentions.{i}", "nvidia")
        return found

    for level, block in enumerate(network.down_blocks):
        layers += blocks("enc", level, f"down_blocks.{level}", block)
        if block.downsamplers is not None:
            layers += _resnet(network, f"enc.{name[level + 1]}_down", f"down_blocks.{level}.downsamplers.0", "nvidia")
    layers += _resnet(network, f"dec.{name[-1]}_in0", "mid_block.resnets.0", "nvidia")
    if network.config.add_attention:
        layers += _attention(f"dec.{name[-1]}_in0", "mid_block.attentions.0", "nvidia")
    layers += _resnet(network, f"dec.{name[-1]}_in1", "mid_block.resnets.1", "nvidia")
    for i, block in enumerate(network.up_blocks):
        level = levels - 1 - i
        layers += blocks("dec", level, f"up_blocks.{i}", block)
        if block.upsamplers is not None:
            layers += _resnet(network, f"dec.{name[level - 1]}_up", f"up_blocks.{i}.upsamplers.0", "nvidia")
    return [*layers, Layer("out_norm", "conv_norm_out", COPY), Layer("out_conv", "conv_out", COPY)]


def _official(network: UNet2DModel, flavour: str) -> Tensors:
    """The weights of `network` under official names, views where possible."""
    own, head_dim, order = network.state_dict(), network.config.attention_head_dim, _qkv_order({}, flavour, None)
    official = {}
    for layer in _layers(network, flavour):
        official |= layer.kind.to_official(own, layer, head_dim, order)
        official |= {name: CONSTANT_FILTER for name in layer.filters}
    return official


# Configs --------------------------------------------------------------------------------------------------------------


def _known_flavour(shapes: Iterable[str]) -> str:
    flavour = flavour_of(shapes)
    if flavour is None:
        raise UserError(
            "The checkpoint is no ADM network: it has neither OpenAI's time_embed.0, input_blocks.0.0 and out.2 nor NVIDIA's "
            "map_layer0 and out_conv."
        )
    if flavour == "nvidia":
        for name in shapes:
            if PREFIX + name in shapes:
                raise UserError(f"The checkpoint has {name} twice, with and without the prefix {PREFIX!r}.")
    return flavour


def _normal_name(name: str) -> str:
    """`name` with NVIDIA's prefix."""
    return PREFIX + name if name.startswith(("map_", "enc.", "dec.", "out_norm.", "out_conv.")) else name


def _is_one_dimensional(name: str, shape: tuple[int, ...]) -> bool:
    """Whether it is an attention's 1x1 convolution over the flattened image, as in guided-diffusion."""
    return name.endswith((".qkv.weight", ".proj_out.weight")) and len(shape) == 3 and shape[-1] == 1


def _normal(tensor: torch.Tensor, name: str) -> torch.Tensor:
    return tensor[..., None] if _is_one_dimensional(name, tuple(tensor.shape)) else tensor


def _normal_shapes(shapes: Shapes) -> dict[str, tuple[int, ...]]:
    return {
        _normal_name(name): (*shape, 1) if _is_one_dimensional(name, tuple(shape)) else tuple(shape)
        for name, shape in shapes.items()
    }


def _qkv_order(shapes: Shapes, flavour: str, order: str | None) -> str:
    if order is None:
        for name, shape in shapes.items():
            if name.endswith(".qkv.weight") and _is_one_dimensional(name, shape):
                raise UserError(
                    f"{name} is a one-dimensional convolution, as in guided-diffusion, whose order of channels the checkpoint does not tell. "
                    "Give --qkv_order head_three_dim (guided-diffusion's default), or three_head_dim if it was trained with "
                    "use_new_attention_order."
                )
        return "head_dim_three" if flavour == "nvidia" else "three_head_dim"
    if order not in QKV_ORDERS:
        raise UserError(f"qkv_order must be one of {', '.join(QKV_ORDERS)}, got {order!r}.")
    return order


def _numbers(shapes: Shapes, pattern: str) -> list[int]:
    """The different numbers that the group of `pattern` finds at the start of a name, sorted."""
    found = (re.match(pattern, name) for name in shapes)
    return sorted({int(match[1]) for match in found if match})


def _openai_config(shapes: Shapes) -> dict:
    count = len(_numbers(shapes, r"output_blocks\.(\d+)\."))
    ups = _numbers(shapes, r"output_blocks\.(\d+)\.[12]\.(?:in_layers\.0|conv)\.weight$")
    levels = len(ups) + 1
    layers, rest = divmod(count, levels)
    layers -= 1
    if count == 0 or rest or layers < 1 or ups != [(i + 1) * (layers + 1) - 1 for i in range(levels - 1)]:
        raise UserError(
            f"The checkpoint has {count} output_blocks, of which numbers {ups} upsample; in an ADM network with {levels} levels each "
            "level has as many, and its last one upsamples."
        )
    first = [1 + level * (layers + 1) for level in range(levels)]
    widths = tuple(_shape(shapes, f"input_blocks.{i}.0.in_layers.2.weight", 4)[0] for i in first)
    resnet_down = levels == 1 or f"input_blocks.{first[1] - 1}.0.in_layers.2.weight" in shapes
    resnet_up = levels == 1 or any(f"output_blocks.{ups[0]}.{k}.in_layers.2.weight" in shapes for k in (1, 2))
    if resnet_down != resnet_up:
        raise UserError("Of down- and upsampling only one is a residual block: no ADM network is like this.")
    return _config(
        shapes,
        names=("input_blocks.0.0", "out.2", "time_embed.0", "input_blocks.1.0.emb_layers.1"),
        widths=widths,
        layers=layers,
        attention=[f"input_blocks.{i}.1.qkv.weight" in shapes for i in first],
        num_classes=_shape(shapes, "label_emb.weight", 2)[0] if "label_emb.weight" in shapes else None,
        sample_size=8 << (levels - 1),  # all of OpenAI's networks end at 8x8
        resnet_sampling=resnet_down,
        mid_attention=True,
    )


def _nvidia_config(shapes: Shapes) -> dict:
    sizes = _numbers(shapes, r"model\.enc\.(\d+)x\1_block0\.")[::-1]
    if not sizes or sizes != [sizes[0] >> level for level in range(len(sizes))]:
        raise UserError(
            f"The checkpoint has enc blocks at resolutions {sizes}; each level of an ADM network halves it."
        )
    blocks = [f"model.enc.{size}x{size}_block0" for size in sizes]
    widths = tuple(_shape(shapes, f"{block}.conv0.weight", 4)[0] for block in blocks)
    if "model.map_augment.weight" in shapes:
        raise UserError(
            "model.map_augment.weight: the network was trained with augmentation labels, which UNet2DModel cannot take."
        )
    if min(widths) < 128:
        raise UserError(
            f"The network has widths {widths}. Below 128 channels NVIDIA's norms have a quarter as many groups as channels, each its own "
            "number, and UNet2DModel has one for all."
        )
    top, label = f"model.enc.{sizes[0]}x{sizes[0]}", "model.map_label.weight"
    layers = len(_numbers(shapes, rf"model\.enc\.{sizes[0]}x{sizes[0]}_block(\d+)\."))
    if layers * len(sizes) > len(shapes):  # before a network of any size is made
        raise UserError(
            f"The checkpoint has {len(shapes)} tensors for {len(sizes)} levels of {layers} blocks; is it complete?"
        )
    return _config(
        shapes,
        names=(f"{top}_conv", "model.out_conv", "model.map_layer0", f"{top}_block0.affine"),
        widths=widths,
        layers=layers,
        attention=[f"{block}.qkv.weight" in shapes for block in blocks],
        num_classes=_shape(shapes, label, 2)[1] if label in shapes else None,
        sample_size=sizes[0],
        resnet_sampling=True,
        mid_attention=f"model.dec.{sizes[-1]}x{sizes[-1]}_in0.qkv.weight" in shapes,
    )


def _config(
    shapes: Shapes,
    names: tuple[str, str, str, str],
    widths: tuple[int, ...],
    layers: int,
    attention: list[bool],
    num_classes: int | None,
    sample_size: int,
    resnet_sampling: bool,
    mid_attention: bool,
) -> dict:
    """Arguments of `UNet2DModel`. `names`: first and last convolution, first linear of the time, linear of a residual block."""
    conv_in, conv_out, time, projection = (f"{name}.weight" for name in names)
    time_dim, model_channels = _shape(shapes, time, 2)
    if model_channels != widths[0]:
        raise UserError(
            f"{time} reads {model_channels} frequencies and the first level has {widths[0]} channels; UNet2DModel has as many of both."
        )
    rows = _shape(shapes, projection, 2)[0]
    if rows not in (widths[0], 2 * widths[0]):
        raise UserError(
            f"{projection} has {rows} rows; {widths[0]} (shift) or {2 * widths[0]} (scale and shift) were expected."
        )
    plain_down, plain_up = (
        ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D") if resnet_sampling else ("DownBlock2D", "UpBlock2D")
    )
    return {
        "sample_size": sample_size,
        "in_channels": _shape(shapes, conv_in, 4)[1],
        "out_channels": _shape(shapes, conv_out, 4)[0],
        "block_out_channels": widths,
        "layers_per_block": layers,
        "down_block_types": tuple("AttnDownBlock2D" if here else plain_down for here in attention),
        "up_block_types": tuple("AttnUpBlock2D" if here else plain_up for here in reversed(attention)),
        "downsample_type": "resnet" if resnet_sampling else "conv",
        "upsample_type": "resnet" if resnet_sampling else "conv",
        "resnet_time_scale_shift": "scale_shift" if rows == 2 * widths[0] else "default",
        "time_embedding_dim": None if time_dim == 4 * widths[0] else time_dim,
        "norm_num_groups": 32,
        "attn_norm_num_groups": 32,
        "norm_eps": 1e-5,
        "add_attention": mid_attention,
        "num_class_embeds": num_classes,
    }


def _own_overrides(overrides: dict) -> dict:
    """`overrides` as arguments of `UNet2DModel`; None leaves what was inferred."""
    known = set(inspect.signature(UNet2DModel.__init__).parameters) - {"self"}
    renamed = {"attention_head_dim" if name == "num_head_channels" else name: v for name, v in overrides.items()}
    for name in renamed:
        if name not in known:
            raise UserError(f"{name} is not an argument of UNet2DModel and cannot be overridden.")
    return {name: value for name, value in renamed.items() if value is not None}


def _check_divisible(config: dict) -> None:
    groups = config["norm_num_groups"]
    for channels in config["block_out_channels"]:
        if channels % groups:
            raise UserError(
                f"The network has a width of {channels}, which the {groups} groups of ADM's norms do not divide."
            )
    width = config["attention_head_dim"]
    attended = [c for c, kind in zip(config["block_out_channels"], config["down_block_types"]) if "Attn" in kind]
    if config["add_attention"]:
        attended.append(config["block_out_channels"][-1])
    for channels in attended:
        if channels % width:
            raise UserError(
                f"num_head_channels={width} does not divide an attention of {channels} channels; pass one that does."
            )


def _check_filter(name: str, tensor: torch.Tensor) -> None:
    if tensor.device.type != "meta" and not torch.allclose(tensor.cpu(), CONSTANT_FILTER):
        raise UserError(
            f"{name} is {tensor.flatten().tolist()}; UNet2DModel resamples with the filter (1/4, 1/4, 1/4, 1/4) only."
        )


def _check_has_official_form(network: UNet2DModel, flavour: str) -> None:
    """UserError unless the official weights of `network`, converted, have its config."""
    config = network.config
    allowed = {"DownBlock2D", "UpBlock2D", "AttnDownBlock2D", "AttnUpBlock2D"} | {
        "ResnetDownsampleBlock2D",
        "ResnetUpsampleBlock2D",
    }
    kinds = set(config.down_block_types) | set(config.up_block_types)
    if not kinds <= allowed or config.mid_block_type != "UNetMidBlock2D":
        raise UserError(
            f"The network has blocks {sorted(kinds - allowed) or config.mid_block_type}; ADM networks have none such."
        )
    if config.class_embed_type is not None or config.time_embedding_type != "positional":
        raise UserError(
            "ADM networks know class numbers and positional time embeddings only; see class_embed_type, time_embedding_type."
        )
    if network.mid_block.attentions[0] is not None and network.mid_block.attentions[0].group_norm is None:
        raise UserError("The network has attn_norm_num_groups=None; an ADM network has 32 groups there.")
    if not config.add_attention and flavour != "nvidia":
        raise UserError("The network has add_attention=False; an ADM network of this flavour attends in the middle.")
    if flavour == "nvidia" and (config.downsample_type, config.upsample_type) != ("resnet", "resnet"):
        raise UserError(
            "NVIDIA's ADM resamples in residual blocks; the network's downsample_type or upsample_type is another."
        )
    if flavour == "nvidia" and not isinstance(config.sample_size, int):
        raise UserError(f"NVIDIA's names hold the resolution, and the network's sample_size is {config.sample_size!r}.")
    shapes = {name: tuple(tensor.shape) for name, tensor in _official(network, flavour).items()}
    free = ("sample_size", "dropout", "attention_head_dim")
    converted = _meta_network(config_of(shapes, **{name: config[name] for name in free}), flavour).config
    ignored = {"num_train_timesteps"} | ({"downsample_padding"} if config.downsample_type == "resnet" else set())
    for name, value in converted.items():
        if not name.startswith("_") and name not in ignored and _plain(config[name]) != _plain(value):
            raise UserError(
                f"The network has {name}={config[name]!r}; an ADM network of flavour {flavour!r} has {value!r}."
            )


def _plain(value):
    return tuple(value) if isinstance(value, list) else value


def _meta_network(config: dict, flavour: str) -> UNet2DModel:
    """A network without memory. Raises UserError for arguments that give none."""
    try:
        with torch.device("meta"):
            return (CTMUNet2DModel if flavour == "ctm" else UNet2DModel)(**config)
    except (ValueError, RuntimeError, ZeroDivisionError) as error:
        raise UserError(f"No ADM network can be made of the checkpoint: {error}") from error
