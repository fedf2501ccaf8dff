# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""A layer under two names, how its tensors change between them, and what all families do with their layers."""

import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from ..cli.errors import UserError, listed


Network = TypeVar("Network", bound=torch.nn.Module)
Shapes = Mapping[str, tuple[int, ...]]
Tensors = dict[str, torch.Tensor]

PREFIX = "model."  # of the authors' wrappers, EDMPrecond and the like; may be absent

# Orders of the output channels of `qkv`, slowest first.
QKV_ORDERS = ("three_head_dim", "head_three_dim", "head_dim_three")


# Kinds of layers ------------------------------------------------------------------------------------------------------


def _same(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tensors


@dataclass(frozen=True)
class Kind:
    """How the tensors of a layer change.

    Args:
        official, own: the ends of their names.
        to_own, to_official: two inverse functions of the tensors, in the order of the names.
    """

    official: tuple[str, ...]
    own: tuple[str, ...]
    to_own: Callable[..., tuple[torch.Tensor, ...]] = _same
    to_official: Callable[..., tuple[torch.Tensor, ...]] = _same


@dataclass(frozen=True)
class Layer:
    """A layer by the start of its official and of its own names."""

    official: str
    own: str
    kind: Kind

    def official_names(self) -> list[str]:
        return [self.official + end for end in self.kind.official]

    def own_names(self) -> list[str]:
        return [self.own + end for end in self.kind.own]

    def to_own(self, tensors: Mapping[str, torch.Tensor]) -> Tensors:
        values = self.kind.to_own(*(tensors[name] for name in self.official_names()))
        return dict(zip(self.own_names(), values, strict=True))

    def to_official(self, tensors: Mapping[str, torch.Tensor]) -> Tensors:
        values = self.kind.to_official(*(tensors[name] for name in self.own_names()))
        return dict(zip(self.official_names(), values, strict=True))


def _as_convolution(weight: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return weight[:, :, None, None], bias


WEIGHT, BOTH = (".weight",), (".weight", ".bias")
COPY = Kind(BOTH, BOTH)
COPY_WEIGHT = Kind(WEIGHT, WEIGHT)
ONE_HOT = Kind(
    WEIGHT, WEIGHT, lambda weight: (weight.T,), lambda weight: (weight.T,)
)  # an embedding as a linear layer on one-hot vectors
LINEAR = Kind(
    BOTH, BOTH, lambda weight, bias: (weight.flatten(1), bias), _as_convolution
)  # a linear layer as a 1x1 convolution
BITS = Kind(  # frequencies that no cast may round
    (".freqs",),
    (".frequency_bits",),
    lambda frequencies: (frequencies.view(torch.int32),),
    lambda bits: (bits.view(torch.float32),),
)


def two_times(end: str = "") -> Kind:
    """One linear layer per time, added, as one of both: W a + b + W_s a_s + b_s = [W, W_s] [a, a_s] + (b + b_s).

    `end` stands behind the `_s` that tells the two names apart. Both biases return in the first.
    """

    def join(weight, bias, target_weight, target_bias):
        return torch.cat([weight, target_weight], dim=1), bias + target_bias

    def split(weight, bias):
        weight, target_weight = weight.chunk(2, dim=1)
        return weight, bias, target_weight, torch.zeros_like(bias)

    names = (f"{end}.weight", f"{end}.bias", f"_s{end}.weight", f"_s{end}.bias")
    return Kind(names, BOTH, join, split)


def qkv(head_dim: int, order: str) -> Kind:
    """Query, key and value, three linear layers, as one 1x1 convolution whose 3 C output channels are in `order`."""

    def split(weight, bias):
        weights, biases = split_qkv(weight.flatten(1), head_dim, order), split_qkv(bias, head_dim, order)
        return tuple(tensor for pair in zip(weights, biases) for tensor in pair)

    def join(*tensors):
        weight, bias = join_qkv(tensors[::2], head_dim, order), join_qkv(tensors[1::2], head_dim, order)
        return _as_convolution(weight, bias)

    return Kind(BOTH, tuple(f".{name}{end}" for name in ("to_q", "to_k", "to_v") for end in BOTH), split, join)


def split_qkv(tensor: torch.Tensor, head_dim: int, order: str) -> tuple[torch.Tensor, ...]:
    """Weights or biases of query, key and value, each with C rows in the order (head, dim), of 3 C rows in `order`."""
    axes, heads = order.split("_"), len(tensor) // (3 * head_dim)
    sizes = {"three": 3, "head": heads, "dim": head_dim}
    rows = tensor.reshape(*(sizes[axis] for axis in axes), *tensor.shape[1:]).movedim(axes.index("three"), 0)
    return tuple(part.reshape(heads * head_dim, *tensor.shape[1:]) for part in rows)


def join_qkv(parts: Iterable[torch.Tensor], head_dim: int, order: str) -> torch.Tensor:
    """Inverse of `split_qkv`."""
    rows = torch.stack([part.reshape(-1, head_dim, *part.shape[1:]) for part in parts])
    joined = rows.movedim(0, order.split("_").index("three"))
    return joined.reshape(-1, *rows.shape[3:])


def resample_filter(name: str, taps: tuple[int, ...] = (1, 1)) -> Layer:
    """The constant filter of the official layer `name`, of shape (1, 1, taps, taps). Networks here have none."""
    row = torch.tensor(taps, dtype=torch.float32, device="cpu") / sum(taps)
    constant = torch.outer(row, row)[None, None]

    def check(tensor):
        if not tensor.is_meta and not torch.allclose(tensor.cpu(), constant):
            raise UserError(f"{name}.resample_filter is not the filter {taps}, the only one of its size that is known.")
        return ()

    return Layer(name, "", Kind((".resample_filter",), (), check, lambda: (constant,)))


# What all families do -------------------------------------------------------------------------------------------------


def present(layers: list[Layer], network: torch.nn.Module) -> list[Layer]:
    """Those of `layers` that `network` has tensors of, and the constant filters, which have none."""
    weights = network.state_dict().keys()
    return [layer for layer in layers if not layer.kind.own or not weights.isdisjoint(layer.own_names())]


def bare(named: Mapping[str, Any]) -> dict[str, Any]:
    """`named` without the wrapper's prefix. Raises UserError if a name is there with and without it."""
    for name in named:
        if PREFIX + name in named:
            raise UserError(f"The checkpoint has {name} twice, with and without the prefix {PREFIX!r}.")
    return {name.removeprefix(PREFIX): value for name, value in named.items()}


def shapes_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def shape_of(shapes: Shapes, name: str, ndim: int) -> tuple[int, ...]:
    if name not in shapes:
        raise UserError(f"The checkpoint has no {name}, which every network of its family has; is it complete?")
    if len(shapes[name]) != ndim:
        raise UserError(f"{name} has shape {shapes[name]} in the checkpoint; {ndim} dimensions were expected.")
    return shapes[name]


def has(shapes: Iterable[str], start: str) -> bool:
    """Whether a name starts so: of a layer that lacks one of its tensors too."""
    return any(name.startswith(start) for name in shapes)


def numbers(shapes: Iterable[str], pattern: str) -> list[int]:
    """The different numbers that the group of `pattern` finds at the start of a name, sorted."""
    matches = (re.match(pattern, name) for name in shapes)
    return sorted({int(match[1]) for match in matches if match})


def resolutions(shapes: Shapes) -> tuple[list[int], int]:
    """(sides of the levels, blocks of a level) by NVIDIA's names. Raises UserError before any network is made."""
    tops = numbers(shapes, r"enc\.(\d{1,4})x\1_conv\.")
    sizes = numbers(shapes, r"enc\.(\d{1,4})x\1_block0\.")[::-1]
    if not tops or not sizes or sizes != [tops[-1] >> level for level in range(len(sizes))]:
        raise UserError(
            f"The checkpoint has a first convolution enc.<size>x<size>_conv.weight at {tops} and blocks at {sizes}; "
            "each level of a network halves the side of the image, and all have blocks."
        )
    blocks = len(numbers(shapes, rf"enc\.{sizes[0]}x{sizes[0]}_block(\d{{1,4}})\."))
    if blocks * len(sizes) > len(shapes):
        raise UserError(
            f"The checkpoint has {len(shapes)} tensors for {len(sizes)} levels of {blocks} blocks; is it complete?"
        )
    return sizes, blocks


def sides_of(network: torch.nn.Module) -> list[str]:
    """The resolutions of the network's levels as NVIDIA's names contain them: "32x32", "16x16", ..."""
    size = network.config.sample_size
    if not isinstance(size, int):
        raise UserError(f"The official names contain the side of the image; this network has sample_size={size}.")
    return [f"{size >> level}x{size >> level}" for level in range(len(network.config.block_out_channels))]


def empty_network(kind: Callable[..., Network], inferred: dict, overrides: dict) -> Network:
    """A network on "meta". Raises UserError if an override is no argument of it, or the arguments do not fit."""
    for name in overrides:
        if name not in inspect.signature(kind.__init__).parameters:
            raise UserError(f"{name} is not an argument of {kind.__name__} and cannot be overridden.")
    try:
        with torch.device("meta"):
            return kind(**inferred | overrides)
    except (ValueError, RuntimeError, ZeroDivisionError) as error:
        raise UserError(f"No {kind.__name__} can be made of the checkpoint: {error}") from error


def check_shapes(shapes: Shapes, network: torch.nn.Module, layers: list[Layer]) -> None:
    """Raise UserError, with the names, if some are missing, surplus or of another shape than in `network`."""
    expected = shapes_of(official_tensors(network, layers))
    missing = [name for name in expected if name not in shapes]
    surplus = [name for name in shapes if name not in expected]
    other = [name for name in shapes if name in expected and shapes[name] != expected[name]]
    faults = []
    if missing:
        faults.append(f"has no {listed(missing, 3)}, which a network like this one has; is it complete?")
    if surplus:
        faults.append(f"has {listed(surplus, 3)}, which has no place in this network.")
    if faults:
        raise UserError("The checkpoint " + " It ".join(faults))
    if other:
        name, more = other[0], f" ({len(other) - 1} more are of another shape)" if len(other) > 1 else ""
        raise UserError(f"{name} has shape {shapes[name]} in the checkpoint; {expected[name]} was expected{more}.")


def filled(network: Network, layers: list[Layer], state_dict: Mapping[str, torch.Tensor]) -> Network:
    """`network` with float32 copies of the official tensors, on their device, in evaluation mode."""
    tensors = {name: tensor.float() for name, tensor in state_dict.items()}
    weights = {}
    for layer in layers:
        weights |= layer.to_own(tensors)
    network.load_state_dict(copied(weights), assign=True)
    return network.eval()


def official_tensors(network: torch.nn.Module, layers: list[Layer]) -> Tensors:
    """Tensors by official names, which may share the network's storage. Raises UserError if a tensor of it has none."""
    weights, official = network.state_dict(), {}
    different = weights.keys() ^ {name for layer in layers for name in layer.own_names()}
    if different:
        raise UserError(
            f"{min(different)} has no official name in a network like this; unload adapters and unfuse the attention "
            "before."
        )
    for layer in layers:
        official |= layer.to_official(weights)
    return official


def copied(tensors: Mapping[str, torch.Tensor], prefix: str = "") -> Tensors:
    """Contiguous copies, with `prefix` before their names."""
    return {
        prefix + name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
