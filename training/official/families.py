# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""The families of official networks, and which one weights are of."""

from collections import Counter
from collections.abc import Mapping
from typing import Any, Protocol

import torch

from ..cli.errors import UserError
from . import adm, edm2, song
from .layers import Shapes, Tensors, shapes_of
from .pickles import Record


WRAPPERS = 4  # that may lie around each other


class Family(Protocol):
    """A family of official networks.

    To add one, write a file in this room that has what is listed here, and put it into FAMILIES. layers.py has what
    most of it is made of: list the network's layers as `Layer(official, own, kind)`, infer its arguments from names and
    shapes, and let `empty_network`, `check_shapes`, `filled` and `official_tensors` do the rest. song.py is the shorter
    example.

    Attributes:
        NAME: what `conversion.json` records.
        CLASSES: the networks that it makes.
    """

    NAME: str
    CLASSES: tuple[type[torch.nn.Module], ...]

    def matches(self, shapes: Shapes) -> bool:
        """Whether a state dict with these names and shapes is of the family."""

    def defaults(self, shapes: Shapes) -> dict[str, float | str]:
        """`sigma_data`, `timestep_scale` and other numbers of the scheduler, which shapes do not tell."""

    def said_by(self, part: Record) -> dict[str, Any]:
        """What a pickled network says of itself beside its weights: `sigma_data`, and arguments of its class."""

    def latent_numbers(self, encoder: Any) -> dict[str, list[float]] | None:
        """`latents_mean` and `latents_std` of its networks of latents, which see images in [0, 1], or None.

        `encoder` is the file's entry of that name, if it has one.
        """

    def to_diffusers(
        self, state_dict: Mapping[str, torch.Tensor], qkv_order: str | None = None, **overrides
    ) -> torch.nn.Module:
        """The network. `overrides` are arguments of its class. UserError names what does not fit."""

    def without_variances(self, state_dict: Mapping[str, torch.Tensor]) -> Tensors:
        """The weights without the outputs of a learned variance. UserError if the family never predicts epsilon."""

    def to_official(self, network: torch.nn.Module, flavour: str | None = None) -> Tensors:
        """The state dict with the authors' names, in one of the family's `flavour`s."""


FAMILIES: tuple[Family, ...] = (song, adm, edm2)


def find_family(state_dict: Mapping[str, torch.Tensor]) -> tuple[Family, dict[str, torch.Tensor]]:
    """(family, state dict without wrappers' prefixes), recognized by names and shapes.

    DistributedDataParallel, torch.compile or a trainer's module put a prefix before every name ("module.",
    "_orig_mod.", "net.", several of them). It is left out where the names with it are of no family. Raises UserError if
    the weights are of no family.
    """
    bare = {name: tensor for name, tensor in state_dict.items() if name != "n_averaged"}  # of torch's AveragedModel
    for _ in range(WRAPPERS + 1):
        for family in FAMILIES:
            if family.matches(shapes_of(bare)):
                return family, bare
        prefix = next(iter(bare), "").partition(".")[0] + "."
        if not all(name.startswith(prefix) for name in bare):
            break
        bare = {name.removeprefix(prefix): tensor for name, tensor in bare.items()}
    groups = Counter(name.partition(".")[0][:60] for name in bare)
    found = ", ".join(f"{name} ({count})" for name, count in groups.most_common(6))
    advice = ""
    if {"conv_in", "down_blocks", "up_blocks"} <= groups.keys():
        advice = " These have the names of diffusers: such weights need no conversion, but a folder with config.json."
    if {"x_embedder", "t_embedder", "final_layer"} <= groups.keys():
        advice = (
            " These have their authors' names of a transformer (DiT, SiT), which are not converted: pass a teacher in "
            "diffusers' form, such as facebook/DiT-XL-2-256."
        )
    raise UserError(
        f"These weights are of no network that is known here. Their {len(state_dict)} names begin with {found}. Known "
        f"are EDM's DDPM++, NCSN++ and ADM, OpenAI's ADM, the CTMs of both, MeanFlow's U-Net, and EDM2's.{advice}"
    )


def family_of(network: torch.nn.Module) -> Family:
    family = next((family for family in FAMILIES if isinstance(network, family.CLASSES)), None)
    if family is None:
        raise UserError(f"A {type(network).__name__} has no official form.")
    return family
