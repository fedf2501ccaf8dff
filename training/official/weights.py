# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Find the state dict in what a checkpoint file holds."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ..cli.errors import UserError
from .pickles import Record, short


MAX_MODULES = 20_000  # modules of a network
MAX_DEPTH = 100  # modules within modules

# Where checkpoints keep their weights, the best first: averaged weights are what samples well.
ENTRIES = ("ema", "model_ema", "ema_model", "ema_state_dict", "params_ema", "g_ema", "net_ema")
ENTRIES += ("state_dict", "model_state_dict", "model", "network", "net", "unet", "params", "module")


def module_state_dict(module: Record) -> dict[str, torch.Tensor]:
    """The state dict of a torch.nn.Module that was pickled whole: parameters and persistent buffers, by dotted names.

    Raises UserError if it is no module, or modules lie within each other endlessly.
    """
    result: dict[str, torch.Tensor] = {}
    for prefix, state in modules_of(module):
        transient = state.get("_non_persistent_buffers_set")
        transient = transient if isinstance(transient, set | list | tuple) else ()
        for kind in ("_parameters", "_buffers"):
            for name, tensor in _children(state, kind):
                if isinstance(tensor, torch.Tensor) and not (kind == "_buffers" and name in transient):
                    result[f"{prefix}{name}"] = tensor
    return result


def module_numbers(module: Record, name: str) -> set[float]:
    """The finite numbers that a pickled module and its parts hold under the attribute `name`, such as "dropout"."""
    values = (state.get(name) for _, state in modules_of(module))
    return {float(value) for value in values if is_number(value)}


def is_number(value: Any) -> bool:
    """Whether `value` is a number that is neither infinite nor NaN, nor of thousands of digits."""
    return type(value) in (int, float) and abs(value) < 1e30


def said_by_precond(part: Record) -> dict[str, float]:
    """What one of NVIDIA's pickled EDMPrecond says of itself beside its weights: `sigma_data` and `dropout`.

    Raises UserError if it is one of NVIDIA's other preconditionings, whose tensors are named alike.
    """
    name = part.class_name.rpartition(".")[2]
    if name.endswith("Precond") and name != "EDMPrecond":
        raise UserError(
            f"The file holds a {name[:40]}, not an EDMPrecond: the networks of NVIDIA's baselines predict something "
            "else and are shown other times. Only those with EDM's preconditioning are converted."
        )
    values = {key: module_numbers(part, key) for key in ("sigma_data", "dropout")}
    said = {key: numbers.pop() for key, numbers in values.items() if len(numbers) == 1}
    return {key: value for key, value in said.items() if value > 0 and (key != "dropout" or value < 1)}


def modules_of(module: Record) -> Iterator[tuple[str, dict]]:
    """(prefix of its names, attributes) of a pickled module and all its parts, in their order."""
    waiting, seen = [("", module)], 0
    while waiting:
        prefix, part = waiting.pop()
        seen += 1
        if seen > MAX_MODULES or prefix.count(".") > MAX_DEPTH:
            raise UserError(f"The module {short(module.class_name)} has more parts than any network.")
        state = part.state if isinstance(part, Record) else None
        if type(state) is not dict or type(state.get("_parameters")) is not dict:
            raise UserError(f"{short(prefix) or 'The object'} is no torch.nn.Module.")
        yield prefix, state
        children = [(f"{prefix}{name}.", child) for name, child in _children(state, "_modules") if child is not None]
        waiting += reversed(children)


def _children(state: Mapping, kind: str) -> list[tuple[str, Any]]:
    children = state.get(kind) or {}
    if type(children) is not dict or not all(type(name) is str and len(name) <= 200 for name in children):
        raise UserError(f"A module's {kind} have no proper names.")
    return list(children.items())


def weights_of(value: Any) -> dict[str, torch.Tensor]:
    """The tensors of a state dict or of a pickled module, by name; nothing of anything else."""
    if isinstance(value, Record):
        return module_state_dict(value) if type(value.state) is dict and "_parameters" in value.state else {}
    if not isinstance(value, dict):
        return {}
    return {name: tensor for name, tensor in value.items() if type(name) is str and isinstance(tensor, torch.Tensor)}


def find_weights(checkpoint: Any, entry: str | None = None) -> tuple[str, dict | Record]:
    """(name of the entry, state dict or pickled module) that holds the weights in what `read_checkpoint` returned.

    Args:
        checkpoint: a state dict, a module, or a dict that holds one of them, maybe one dict further down.
        entry: its name, dotted if it lies deeper. None takes the first of ENTRIES that is there, averaged weights
            before others, and the checkpoint itself, named "", if it is a state dict.

    Raises:
        UserError: no entry has weights; the message lists what the file has.
    """
    parts = {"": checkpoint} | _parts(checkpoint)
    counts = {name: len(weights_of(part)) for name, part in parts.items()}
    parts = {name: part for name, part in parts.items() if counts[name]}
    listed = ", ".join(f"{short(name) or 'the file itself'} ({counts[name]})" for name in list(parts)[:8]) or "none"
    if entry is None:
        last = {name: name.rpartition(".")[2] for name in parts}
        usual = [name for name in parts if last[name] in ENTRIES]
        usual.sort(key=lambda name: ENTRIES.index(last[name]))  # of two that are named alike the outer one stays first
        others = list(parts) if "" in parts or len(parts) == 1 else []
        entry = next(iter(usual + others), None)
    if entry is None:
        raise UserError(
            f"The file has no weights under a usual name; name one with --entry. Entries with tensors: {listed}."
        )
    if entry not in parts:
        raise UserError(f"--entry {entry} has no tensors. Entries with tensors: {listed}.")
    return entry, parts[entry]


def _parts(checkpoint: Any) -> dict[str, dict | Record]:
    """The dicts and objects in the dict `checkpoint`, and in those, by dotted names. A shared one is listed once.

    So are the networks in a state dict of several.
    """
    parts, level, seen = {}, {"": checkpoint}, {id(checkpoint)}
    for _ in range(2):
        inner = {}
        for prefix, value in level.items():
            for name, part in [*value.items(), *_networks(value).items()] if type(value) is dict else ():
                if type(name) is str and isinstance(part, dict | Record) and id(part) not in seen:
                    seen.add(id(part))
                    inner[f"{prefix}{name}."] = part
        level = inner
        parts |= {name.removesuffix("."): part for name, part in level.items()}
    return parts


def _networks(state_dict: Mapping[str, Any]) -> dict[str, dict[str, torch.Tensor]]:
    """The networks by name where a state dict holds several, such as one and its averages, as "net." and "net_ema."."""
    networks: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in weights_of(state_dict).items():
        first, _, rest = name.partition(".")
        if rest and first.rstrip("0123456789") in ENTRIES:
            networks.setdefault(first, {})[rest] = tensor
    return networks if len(networks) > 1 else {}
