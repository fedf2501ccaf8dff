"""A layer under two names and how its tensors change: copied, joined, split, transposed; shapes checked; used by both families."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch

from ..cli.errors import UserError


Shapes = Mapping[str, tuple[int, ...]]

Tensors = dict[str, torch.Tensor]

# Orders of the output channels of `qkv`, slowest first.
QKV_ORDERS = ("three_head_dim", "head_three_dim", "head_dim_three")


@dataclass(frozen=True)
class Kind:
    """How the tensors of a layer change: two inverse functions (tensors, layer, head_dim, qkv_order) -> tensors by name."""

    to_own: Callable[..., Tensors]
    to_official: Callable[..., Tensors]


@dataclass(frozen=True)
class Layer:
    """A layer by its official and by its own name. `filters` are its constant official tensors."""

    official: str
    own: str
    kind: Kind
    filters: tuple[str, ...] = ()


def _copy_to_own(tensors: Tensors, layer: Layer, *_) -> Tensors:
    return {f"{layer.own}.{part}": tensors[f"{layer.official}.{part}"] for part in ("weight", "bias")}


def _copy_to_official(tensors: Tensors, layer: Layer, *_) -> Tensors:
    return {f"{layer.official}.{part}": tensors[f"{layer.own}.{part}"] for part in ("weight", "bias")}


def _embedding_to_own(tensors: Tensors, layer: Layer, *_) -> Tensors:
    return {f"{layer.own}.weight": tensors[f"{layer.official}.weight"]}


def _embedding_to_official(tensors: Tensors, layer: Layer, *_) -> Tensors:
    return {f"{layer.official}.weight": tensors[f"{layer.own}.weight"]}


def _one_hot_to_own(tensors: Tensors, layer: Layer, *_) -> Tensors:
    return {f"{layer.own}.weight": tensors[f"{layer.official}.weight"].T}


def _one_hot_to_official(tensors: Tensors, layer: Layer, *_) -> Tensors:
    return {f"{layer.official}.weight": tensors[f"{layer.own}.weight"].T}


def _two_times_to_own(tensors: Tensors, layer: Layer, *_) -> Tensors:
    """W a + b + W_s a_s + b_s = [W, W_s] [a, a_s] + (b + b_s)."""
    time, target = layer.official, layer.official.replace("emb_layers", "emb_layers_s")
    return {
        f"{layer.own}.weight": torch.cat([tensors[f"{time}.weight"], tensors[f"{target}.weight"]], dim=1),
        f"{layer.own}.bias": tensors[f"{time}.bias"] + tensors[f"{target}.bias"],
    }


def _two_times_to_official(tensors: Tensors, layer: Layer, *_) -> Tensors:
    time, target = layer.official, layer.official.replace("emb_layers", "emb_layers_s")
    weight, target_weight = tensors[f"{layer.own}.weight"].chunk(2, dim=1)
    bias = tensors[f"{layer.own}.bias"]
    return {
        f"{time}.weight": weight,
        f"{time}.bias": bias,
        f"{target}.weight": target_weight,
        f"{target}.bias": torch.zeros_like(bias),
    }


def split_qkv(tensor: torch.Tensor, head_dim: int, order: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weights or biases of query, key and value, each with C rows in the order (head, dim), of a `qkv` with 3 C rows in `order`."""
    three, heads = order.split("_").index("three"), len(tensor) // (3 * head_dim)
    sizes = {"three": 3, "head": heads, "dim": head_dim}
    rows = tensor.reshape(*(sizes[axis] for axis in order.split("_")), *tensor.shape[1:]).movedim(three, 0)
    return tuple(part.reshape(heads * head_dim, *tensor.shape[1:]) for part in rows)


def join_qkv(parts: Iterable[torch.Tensor], head_dim: int, order: str) -> torch.Tensor:
    """Inverse of `split_qkv`."""
    rows = torch.stack([part.reshape(-1, head_dim, *part.shape[1:]) for part in parts])
    joined = rows.movedim(0, order.split("_").index("three"))
    return joined.reshape(-1, *rows.shape[3:])


def _qkv_to_own(tensors: Tensors, layer: Layer, head_dim: int, order: str) -> Tensors:
    weights = split_qkv(tensors[f"{layer.official}.weight"].flatten(1), head_dim, order)
    biases = split_qkv(tensors[f"{layer.official}.bias"], head_dim, order)
    own = {}
    for name, weight, bias in zip(("to_q", "to_k", "to_v"), weights, biases, strict=True):
        own |= {f"{layer.own}.{name}.weight": weight, f"{layer.own}.{name}.bias": bias}
    return own


def _qkv_to_official(tensors: Tensors, layer: Layer, head_dim: int, order: str) -> Tensors:
    names = [f"{layer.own}.{name}" for name in ("to_q", "to_k", "to_v")]
    weight = join_qkv([tensors[f"{name}.weight"] for name in names], head_dim, order)
    bias = join_qkv([tensors[f"{name}.bias"] for name in names], head_dim, order)
    return {f"{layer.official}.weight": weight[:, :, None, None], f"{layer.official}.bias": bias}


def _linear_to_own(tensors: Tensors, layer: Layer, *_) -> Tensors:
    own = _copy_to_own(tensors, layer)
    return own | {f"{layer.own}.weight": own[f"{layer.own}.weight"].flatten(1)}


def _linear_to_official(tensors: Tensors, layer: Layer, *_) -> Tensors:
    official = _copy_to_official(tensors, layer)
    return official | {f"{layer.official}.weight": official[f"{layer.official}.weight"][:, :, None, None]}


COPY = Kind(_copy_to_own, _copy_to_official)

EMBEDDING = Kind(_embedding_to_own, _embedding_to_official)

ONE_HOT = Kind(_one_hot_to_own, _one_hot_to_official)  # a linear layer on one-hot vectors

TWO_TIMES = Kind(_two_times_to_own, _two_times_to_official)

QKV = Kind(_qkv_to_own, _qkv_to_official)

LINEAR = Kind(_linear_to_own, _linear_to_official)  # a 1x1 convolution


def _shape(shapes: Shapes, name: str, ndim: int) -> tuple[int, ...]:
    if name not in shapes:
        raise UserError(f"The checkpoint has no {name}, which every ADM network has; is it complete?")
    if len(shapes[name]) != ndim:
        raise UserError(f"{name} has shape {shapes[name]} in the checkpoint; {ndim} dimensions were expected.")
    return shapes[name]


def _check_shapes(shapes: Shapes, expected: Shapes) -> None:
    for name in expected:
        if name not in shapes:
            raise UserError(f"The checkpoint has no {name}, which an ADM network like this one has; is it complete?")
    for name, shape in shapes.items():
        if name not in expected:
            raise UserError(f"The checkpoint has {name}, which has no place in this ADM network.")
        if shape != expected[name]:
            raise UserError(f"{name} has shape {shape} in the checkpoint; {expected[name]} was expected.")
