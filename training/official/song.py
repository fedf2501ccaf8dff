"""SongUNet: EDM's DDPM++ and NCSN++, and the CIFAR-10 CTM."""

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from diffusers_ctm import EDMUNet2DModel

from ..cli.errors import UserError


# What names and shapes do not tell: arguments of the network, then numbers of its preconditioning.
DEFAULTS = {
    "dropout": 0.13,  # of EDM's and CTM's CIFAR-10 training; FFHQ and AFHQv2 had 0.05 to 0.25
    "label_dropout": 0.0,
    "attention_head_dim": None,  # one head
    "sigma_data": 0.5,
    "timestep_scale": 1.0,
}

PREFIX = "model."

Shapes = Mapping[str, tuple[int, ...]]


def matches(shapes: Shapes) -> bool:
    """Whether these names are those of a SongUNet, EDM teacher or CIFAR-10 CTM."""
    names = _without_prefix(shapes)
    top = _top(names)
    return top is not None and {"map_layer0.weight", f"dec.{top}x{top}_aux_conv.weight"} <= set(names)


def config_of(shapes: Shapes, **overrides) -> dict:
    """The arguments of `EDMUNet2DModel` that give a network with these names and shapes.

    Args:
        shapes: shape of each tensor by its official name.
        overrides: arguments that win over what was inferred, or that shapes do not tell (`DEFAULTS`).

    Raises UserError, with the key, if one is missing, surplus or of another shape than in such a network.
    """
    config = {**_inferred(shapes), **overrides}
    unknown = set(overrides) - set(inspect.signature(EDMUNet2DModel.__init__).parameters)
    if unknown:
        raise UserError(f"{sorted(unknown)[0]} is not an argument of EDMUNet2DModel and cannot be overridden.")
    names = _without_prefix(shapes)
    for name in names:
        if name in shapes and PREFIX + name in shapes:
            raise UserError(f"The checkpoint has {name} twice, with and without the prefix {PREFIX!r}.")
    expected = {name: tuple(tensor.shape) for name, tensor in _official(_meta_network(config), _top(names)).items()}
    for name in sorted(expected.keys() - names.keys()):
        raise UserError(f"The checkpoint has no {name}, which a SongUNet like this one has; is it complete?")
    for name in sorted(names.keys() - expected.keys()):
        raise UserError(f"The checkpoint has {name}, which has no place in EDMUNet2DModel.")
    for name, shape in names.items():
        if tuple(shape) != expected[name]:
            raise UserError(f"{name} has shape {tuple(shape)} in the checkpoint; {expected[name]} was expected.")
    return config


def to_diffusers(state_dict: Mapping[str, torch.Tensor], **overrides) -> EDMUNet2DModel:
    """The network of an official state dict, float32, in evaluation mode, on the device of its tensors (meta included).

    Shares no storage with `state_dict`. `overrides` as in `config_of`. Raises UserError, with the key, for one that is missing,
    surplus or misshapen, and for a resampling filter that EDMUNet2DModel does not have.
    """
    config = config_of({name: tuple(tensor.shape) for name, tensor in state_dict.items()}, **overrides)
    tensors = _without_prefix(state_dict)
    network = _meta_network(config)
    weights = {}
    for rule in _rules(network, _top(tensors)):
        values = [tensors[name].detach().to(torch.float32) for name in rule.official]
        copies = [value.clone(memory_format=torch.contiguous_format) for value in rule.to_ours(*values)]
        weights.update(zip(rule.ours, copies, strict=True))
    expected = _filter(network)
    for name in _filter_names(network, _top(tensors)):
        if not tensors[name].is_meta and not torch.allclose(tensors[name].detach().float().cpu(), expected):
            raise UserError(
                f"{name} is not the filter {tuple(network.config.resample_filter)}, the only one of its size."
            )
    network.load_state_dict(weights, assign=True)
    return network.eval()


def to_official(network: EDMUNet2DModel) -> dict[str, torch.Tensor]:
    """The state dict that the authors' EDMPrecond or EDMPrecond_CTM loads.

    A CTM's two biases per block are one here: it goes to `affine.bias`, and `affine_s.bias` is zero. Raises UserError if
    `sample_size` is not one number, because the official names contain it.
    """
    size = network.config.sample_size
    if not isinstance(size, int):
        raise UserError(f"The official names contain the side of the image; this network has sample_size={size}.")
    tensors = _official(network, size)
    return {
        PREFIX + name: value.detach().clone(memory_format=torch.contiguous_format) for name, value in tensors.items()
    }


# Names and shapes to arguments ----------------------------------------------------------------------------------------


def _without_prefix(named: Mapping) -> dict:
    """`named` without the wrapper's prefix."""
    return {name.removeprefix(PREFIX): value for name, value in named.items()}


def _top(names: Mapping) -> int | None:
    """The resolution of the first convolution, that of the image."""
    found = [re.fullmatch(r"enc\.(\d+)x\1_conv\.weight", name) for name in names]
    return next((int(match[1]) for match in found if match), None)


def _inferred(shapes: Shapes) -> dict:
    """The arguments that names and shapes tell, and `DEFAULTS` for the others."""
    names = _without_prefix(shapes)
    top = _top(names)
    if top is None:
        raise UserError("The checkpoint has no first convolution enc.<size>x<size>_conv.weight; it is no SongUNet.")

    def shape(name: str, ndim: int) -> tuple[int, ...]:
        if name not in names:
            raise UserError(f"The checkpoint has no {name}, which every SongUNet has; is it complete?")
        if len(names[name]) != ndim:
            raise UserError(
                f"{name} has shape {tuple(names[name])} in the checkpoint; {ndim} dimensions were expected."
            )
        return tuple(names[name])

    def present(pattern: str) -> list[str]:
        return [name for name in names if re.fullmatch(pattern, name)]

    blocks = [int(re.match(r"enc\.(\d+)x", name)[1]) for name in present(r"enc\.(\d+)x\1_block0\.conv0\.weight")]
    levels = sorted(set(blocks), reverse=True)
    if levels != [top >> level for level in range(len(levels))]:
        raise UserError(f"The checkpoint has blocks at {levels}; a SongUNet for {top}x{top} halves from there.")
    if not levels:
        raise UserError(f"The checkpoint has no enc.{top}x{top}_block0.conv0.weight, which every SongUNet has.")

    layers = len(present(rf"enc\.{top}x{top}_block\d+\.conv0\.weight"))
    if layers * len(levels) > len(names):  # before a network of any size is made
        raise UserError(
            f"The checkpoint has {len(names)} tensors for {len(levels)} levels of {layers} blocks; is it complete?"
        )

    filters = present(r".*resample_filter")
    taps = shape(filters[0], 4)[-1] if filters else 2
    if taps not in (2, 4):
        raise UserError(f"{filters[0]} has {taps} taps; EDMUNet2DModel knows the filters (1, 1) and (1, 3, 3, 1).")

    model_channels, in_channels = shape(f"enc.{top}x{top}_conv.weight", 4)[:2]
    time_embedding_dim, time_proj_dim = shape("map_layer0.weight", 2)
    encoders = {"skip": r"enc\..*_aux_skip\.weight", "residual": r"enc\..*_aux_residual\.weight"}
    return {
        "sample_size": top,
        "in_channels": in_channels,
        "out_channels": shape(f"dec.{top}x{top}_aux_conv.weight", 4)[0],
        "model_channels": model_channels,
        "block_out_channels": tuple(shape(f"enc.{size}x{size}_block0.conv0.weight", 4)[0] for size in levels),
        "layers_per_block": layers,
        "attention_levels": tuple(
            level for level, size in enumerate(levels) if f"enc.{size}x{size}_block0.qkv.weight" in names
        ),
        "attention_head_dim": DEFAULTS["attention_head_dim"],
        "dropout": DEFAULTS["dropout"],
        "time_embedding_type": "fourier" if "map_noise.freqs" in names else "positional",
        "time_proj_dim": time_proj_dim,
        "time_embedding_dim": time_embedding_dim,
        "encoder_type": next((kind for kind, pattern in encoders.items() if present(pattern)), "standard"),
        "decoder_type": "skip" if len(present(r"dec\..*_aux_conv\.weight")) > 1 else "standard",
        "resample_filter": (1, 3, 3, 1) if taps == 4 else (1, 1),
        "num_class_embeds": shape("map_label.weight", 2)[1] if "map_label.weight" in names else None,
        "label_dropout": DEFAULTS["label_dropout"],
        "augment_dim": shape("map_augment.weight", 2)[1] if "map_augment.weight" in names else None,
        "target_time": "map_layer0_s.weight" in names,
    }


def _meta_network(config: dict) -> EDMUNet2DModel:
    """The network without values. Raises UserError for arguments that give none."""
    try:
        with torch.device("meta"):
            return EDMUNet2DModel(**config)
    except (ValueError, RuntimeError, ZeroDivisionError) as error:
        raise UserError(f"No EDMUNet2DModel can be made of the checkpoint: {error}") from error


# Names to names -------------------------------------------------------------------------------------------------------


def _same(*values: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return values


@dataclass(frozen=True)
class Rule:
    """Official tensors and those of EDMUNet2DModel that say the same."""

    official: tuple[str, ...]
    ours: tuple[str, ...]
    to_ours: Callable[..., tuple[torch.Tensor, ...]] = _same
    to_official: Callable[..., tuple[torch.Tensor, ...]] = _same


def _layer(official: str, ours: str, bias: bool = True) -> list[Rule]:
    """A layer that is the same in both."""
    return [Rule((f"{official}.{end}",), (f"{ours}.{end}",)) for end in ("weight", "bias")[: 1 + bias]]


def _affine(official: str, ours: str) -> list[Rule]:
    """One linear layer per time, added, as one linear layer of [time, target time]."""
    return [
        Rule(
            (f"{official}affine.weight", f"{official}affine_s.weight"),
            (f"{ours}.weight",),
            lambda time, target: (torch.cat([time, target], dim=1),),
            lambda both: both.chunk(2, dim=1),
        ),
        Rule(
            (f"{official}affine.bias", f"{official}affine_s.bias"),
            (f"{ours}.bias",),
            lambda time, target: (time + target,),
            lambda both: (both, torch.zeros_like(both)),
        ),
    ]


def _attention(official: str, ours: str, heads: int) -> list[Rule]:
    """1x1 convolutions as linear layers. The rows of `qkv` are (heads, channels of a head, three)."""

    def split(qkv: torch.Tensor) -> tuple[torch.Tensor, ...]:
        rest = qkv.shape[1:2]  # input channels of a weight, nothing of a bias
        return tuple(part.reshape(-1, *rest) for part in qkv.reshape(heads, -1, 3, *rest).unbind(2))

    def join(*parts: torch.Tensor) -> tuple[torch.Tensor]:
        rest = parts[0].shape[1:]
        joined = torch.stack([part.reshape(heads, -1, *rest) for part in parts], dim=2).reshape(-1, *rest)
        return (joined[:, :, None, None] if rest else joined,)

    projections = [f"{ours}.{name}" for name in ("to_q", "to_k", "to_v")]
    return [
        *_layer(f"{official}norm2", f"{ours}.group_norm"),
        *(
            Rule((f"{official}qkv.{e}",), tuple(f"{p}.{e}" for p in projections), split, join)
            for e in ("weight", "bias")
        ),
        Rule(
            (f"{official}proj.weight",),
            (f"{ours}.to_out.0.weight",),
            lambda convolution: (convolution[:, :, 0, 0],),
            lambda linear: (linear[:, :, None, None],),
        ),
        Rule((f"{official}proj.bias",), (f"{ours}.to_out.0.bias",)),
    ]


def _blocks(network: EDMUNet2DModel, ours: str, official: list[str]) -> list[Rule]:
    """The residual blocks of the submodule `ours`, whose official names are `official`."""
    block, rules = network.get_submodule(ours), []
    for index, (resnet, name) in enumerate(zip(block.resnets, official, strict=True)):
        name, path = f"{name}.", f"{ours}.resnets.{index}"
        rules += _layer(f"{name}norm0", f"{path}.norm1") + _layer(f"{name}conv0", f"{path}.conv1")
        rules += _layer(f"{name}norm1", f"{path}.norm2") + _layer(f"{name}conv1", f"{path}.conv2")
        if network.has_target_time:
            rules += _affine(name, f"{path}.time_emb_proj")
        else:
            rules += _layer(f"{name}affine", f"{path}.time_emb_proj")
        if resnet.conv_shortcut is not None:
            rules += _layer(f"{name}skip", f"{path}.conv_shortcut")
        if str(index) in block.attentions:
            attention = block.attentions[str(index)]
            rules += _attention(name, f"{ours}.attentions.{index}", attention.heads)
    return rules


def _rules(network: EDMUNet2DModel, top: int) -> list[Rule]:
    """What becomes of each tensor, the constant filters left out. `top` is the resolution in the official names."""
    rules = _layer("map_layer0", "time_embedding.linear_1") + _layer("map_layer1", "time_embedding.linear_2")
    if network.has_target_time:
        rules += _layer("map_layer0_s", "target_time_embedding.linear_1")
        rules += _layer("map_layer1_s", "target_time_embedding.linear_2")
    if network.config.time_embedding_type == "fourier":
        bits = Rule(
            ("map_noise.freqs",),
            ("time_proj.frequency_bits",),
            lambda frequencies: (frequencies.view(torch.int32),),
            lambda bits: (bits.view(torch.float32),),
        )
        rules.append(bits)
    if network.class_embedding is not None:
        rules += _layer("map_label", "class_embedding")
    if network.augment_embedding is not None:
        rules += _layer("map_augment", "augment_embedding", bias=False)

    names = _Names(network, top)
    rules += _layer(f"enc.{top}x{top}_conv", "conv_in")
    for level, block in enumerate(network.down_blocks):
        rules += _blocks(network, f"down_blocks.{level}", names.down(level))
        if block.image_conv is not None:
            rules += _layer(f"{names.enc(level)}_aux_skip", f"down_blocks.{level}.image_conv")
        elif block.image_downsample is not None:
            rules += _layer(f"{names.enc(level)}_aux_residual", f"down_blocks.{level}.image_downsample.Conv2d_0")
    rules += _blocks(network, "mid_block", names.middle())
    for index, block in enumerate(network.up_blocks):
        level = len(network.up_blocks) - 1 - index
        rules += _blocks(network, f"up_blocks.{index}", names.up(level))
        if block.conv_out is not None or level == 0:
            ours = f"up_blocks.{index}." if level else ""
            rules += _layer(f"{names.dec(level)}_aux_norm", f"{ours}conv_norm_out")
            rules += _layer(f"{names.dec(level)}_aux_conv", f"{ours}conv_out")
    return rules


class _Names:
    """Official names of blocks."""

    def __init__(self, network: EDMUNet2DModel, top: int):
        self.top, self.layers, self.last = top, network.config.layers_per_block, len(network.down_blocks) - 1

    def enc(self, level: int) -> str:
        return f"enc.{self.top >> level}x{self.top >> level}"

    def dec(self, level: int) -> str:
        return f"dec.{self.top >> level}x{self.top >> level}"

    def down(self, level: int) -> list[str]:
        names = ["down"] * (level > 0) + [f"block{i}" for i in range(self.layers)]
        return [f"{self.enc(level)}_{name}" for name in names]

    def middle(self) -> list[str]:
        return [f"{self.dec(self.last)}_in0", f"{self.dec(self.last)}_in1"]

    def up(self, level: int) -> list[str]:
        names = ["up"] * (level < self.last) + [f"block{i}" for i in range(self.layers + 1)]
        return [f"{self.dec(level)}_{name}" for name in names]


def _filter(network: EDMUNet2DModel) -> torch.Tensor:
    """The constant `resample_filter`, shape (1, 1, taps, taps), sum 1."""
    taps = torch.tensor(network.config.resample_filter, dtype=torch.float32, device="cpu")
    return (torch.outer(taps, taps) / taps.sum() ** 2)[None, None]


def _filter_names(network: EDMUNet2DModel, top: int) -> list[str]:
    """Where the authors' networks hold the filter: in both convolutions of a block that resamples, and beside those blocks."""
    names, found = _Names(network, top), []
    for level in range(1, names.last + 1):
        blocks = (names.down(level)[0], names.up(level - 1)[0])
        found += [f"{block}.{layer}" for block in blocks for layer in ("conv0", "skip")]
        aux = {"skip": ["aux_down"], "residual": ["aux_residual"]}.get(network.config.encoder_type, [])
        found += [f"{names.enc(level)}_{name}" for name in aux]
        if network.config.decoder_type == "skip":
            found.append(f"{names.dec(level - 1)}_aux_up")
    return [f"{name}.resample_filter" for name in found]


def _official(network: EDMUNet2DModel, top: int) -> dict[str, torch.Tensor]:
    """Official names, without prefix, and tensors that may share the network's storage."""
    weights, tensors, rules = network.state_dict(), {}, _rules(network, top)
    surplus = weights.keys() ^ {name for rule in rules for name in rule.ours}
    if surplus:
        raise UserError(f"{min(surplus)} has no official name; unload adapters and unfuse the attention before.")
    for rule in rules:
        tensors.update(zip(rule.official, rule.to_official(*(weights[name] for name in rule.ours)), strict=True))
    constant = _filter(network).to(network.device)
    return tensors | dict.fromkeys(_filter_names(network, top), constant)
