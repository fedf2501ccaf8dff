"""`FAMILIES = (song, adm)`, imported, not by string: which one weights are of. A Protocol with matches, defaults, to_diffusers, to_official, without_variances."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from ..cli.errors import UserError
from . import adm as convert_adm
from . import song as convert_edm
from .pickles import Record
from .weights import module_numbers


COUNTERS = {"n_averaged"}  # what torch's AveragedModel holds beside the network

MAX_NAME = 200  # characters; those of official networks have fewer than 80


@dataclass(frozen=True)
class Family:
    """A family of official networks.

    Args:
        module: a module of this package with `matches(shapes) -> bool` (is a state dict with these names and shapes of the family?),
            `to_diffusers(state_dict, **overrides) -> network` (UserError names what does not fit), `to_official(network) -> dict`
            (the authors' key names), and `defaults(shapes) -> dict` or `DEFAULTS`: what shapes do not tell.
        classes: names of the network classes that it makes.
        head: its override for the channels per attention head.
        orders: whether its networks differ in the order of attention's channels (`qkv_order`).
    """

    module: ModuleType
    classes: tuple[str, ...]
    head: str = "num_head_channels"
    orders: bool = False


FAMILIES = {
    "edm": Family(convert_edm, ("EDMUNet2DModel",), head="attention_head_dim"),
    "adm": Family(convert_adm, ("UNet2DModel", "CTMUNet2DModel"), orders=True),
}


def family_module(family: str) -> ModuleType:
    return FAMILIES[family].module


def find_family(state_dict: Mapping[str, torch.Tensor]) -> tuple[str, dict[str, torch.Tensor]]:
    """(family, state dict without wrappers' prefixes), recognised by key names and shapes.

    What DistributedDataParallel, torch.compile or a trainer's module put before every name ("module.", "_orig_mod.", "net.", several
    of them) is left out where the names with it are known to no family. Raises UserError if it is of no family.
    """
    bare = {name: tensor for name, tensor in state_dict.items() if name not in COUNTERS}
    while bare and all(len(name) <= MAX_NAME for name in bare):
        for family in FAMILIES:
            if family_module(family).matches(shapes_of(bare)):
                return family, bare
        prefix = next(iter(bare)).partition(".")[0] + "."
        if not all(name.startswith(prefix) for name in bare):
            break
        bare = {name.removeprefix(prefix): tensor for name, tensor in bare.items()}
    some = ", ".join(f"{name[:60]} {list(tensor.shape)}" for name, tensor in list(state_dict.items())[:4])
    raise UserError(
        f"These weights are of no network that is known here ({len(state_dict)} tensors: {some}, ...). Known are EDM's DDPM++, NCSN++ "
        "and ADM, OpenAI's ADM, and the CTMs of both."
    )


def shapes_of(state_dict: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state_dict.items()}


def family_defaults(family: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """What the family knows that shapes do not tell."""
    module = family_module(family)
    return module.defaults(shapes) if hasattr(module, "defaults") else dict(module.DEFAULTS)


def said_by(part: Any) -> dict[str, float]:
    """What a pickled network says of itself beside its weights: `sigma_data` and `dropout`. Nothing of a state dict.

    Raises UserError if it is one of NVIDIA's other preconditionings, whose tensors are named alike.
    """
    if not isinstance(part, Record):
        return {}
    name = part.class_name.rpartition(".")[2]
    if name.endswith("Precond") and name != "EDMPrecond":
        raise UserError(
            f"The file holds a {name[:40]}, not an EDMPrecond: the networks of NVIDIA's baselines predict something else and are shown other "
            "times. Only those with EDM's preconditioning are converted."
        )
    found = {key: module_numbers(part, key) for key in ("sigma_data", "dropout")}
    said = {key: values.pop() for key, values in found.items() if len(values) == 1}
    return {key: value for key, value in said.items() if value > 0 and (key != "dropout" or value < 1)}
