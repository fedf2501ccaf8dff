# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""The one network in a folder or repository with its scheduler's config, all of one commit."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import diffusers
from diffusers import DiTTransformer2DModel, UNet2DModel
from huggingface_hub import snapshot_download

from diffusers_ctm import CTMDiTTransformer2DModel, EDM2UNet2DModel, EDMUNet2DModel

from ..cli.errors import UserError
from ..cli.weights import WEIGHTS, check_finite, kind_of_weights, loading_options


NETWORKS = (  # attributes of diffusers, ours too
    "UNet2DModel",
    "CTMUNet2DModel",
    "EDMUNet2DModel",
    "EDM2UNet2DModel",
    "DiTTransformer2DModel",
    "CTMDiTTransformer2DModel",
)
CONFIGS = ("*model_index.json", "*config.json")
AUTOENCODERS = ("AsymmetricAutoencoderKL", "AutoencoderDC", "AutoencoderKL", "AutoencoderTiny", "VQModel")
Network = UNet2DModel | EDMUNet2DModel | EDM2UNet2DModel | CTMDiTTransformer2DModel  # that is trained or taught from


class Source:
    """Files of a folder or repository; of a repository those that are needed, all of one commit.

    Args:
        name: the folder or repository.
        revision: branch, tag or commit of the repository; None is main.
        option: the option that gave the name, for messages. `OPTION_revision` and `OPTION_subfolder` are options too.

    Attributes:
        root: the folder that holds them.
        revision: the commit of the repository; None for a folder.
    """

    def __init__(self, name: str, revision: str | None, option: str = "teacher"):
        self.name, self.revision, self.option = name, None, option
        self.root = Path(name)
        self.on_hub = not self.root.is_dir()
        if self.on_hub:
            self.root = Path(self._download(CONFIGS, revision))
            self.revision = self.root.name  # a snapshot's folder is named by its commit
        elif revision is not None:
            raise UserError(f"--{option}_revision {revision} is for repositories on the Hub; {name} is a folder.")

    def _download(self, patterns: Sequence[str], revision: str | None) -> str:
        return snapshot_download(self.name, revision=revision, allow_patterns=list(patterns))

    def files(self, folder: str, patterns: Sequence[str]) -> list[str]:
        """Names of the files in `folder` that match, fetched."""
        if self.on_hub:
            # With the configs, which are there already: huggingface_hub warns of patterns that nothing matches.
            self._download([*CONFIGS, *(join(folder, pattern) for pattern in patterns)], self.revision)
        return sorted(path.name for pattern in patterns for path in (self.root / folder).glob(pattern))

    def json(self, path: str) -> dict:
        """The content of a JSON file, {} if it is not there."""
        file = self.root / path
        value = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        if not isinstance(value, dict):
            raise UserError(f"{path} of {self.name} is not a JSON object.")
        return value

    def networks(self) -> dict[str, str]:
        """Class of every model by its folder, "" for the top."""
        classes = {}
        for path in sorted(self.root.rglob("config.json")):
            file = path.relative_to(self.root)
            if any(part.startswith(".") for part in file.parts):
                continue
            classes[os.path.dirname(file.as_posix())] = class_name_of(self.json(file.as_posix()))
        return {folder: class_name for folder, class_name in classes.items() if class_name is not None}

    def choose_network(self, subfolder: str | None) -> str:
        """The folder of the only network that can be a teacher. Raises UserError that lists what there is."""
        classes, name = self.networks(), f"--{self.option} {self.name}"
        candidates = [folder for folder, class_name in classes.items() if class_name in NETWORKS]
        if subfolder is not None:
            subfolder = subfolder.strip("/")
            candidates = [folder for folder in candidates if f"{folder}/".startswith(f"{subfolder}/")]
        if len(candidates) != 1:
            listed = ", ".join(f"{folder or 'the top'} ({class_name})" for folder, class_name in classes.items())
            count = "no network" if not candidates else f"{len(candidates)} networks"
            raise UserError(
                f"{name}{f' --{self.option}_subfolder {subfolder}' if subfolder else ''} holds {count} of the classes "
                f"{', '.join(NETWORKS)}. It holds: {listed or 'no model at all'}. "
                + (f"Choose one with --{self.option}_subfolder." if candidates else "It must be a diffusion model.")
            )
        return candidates[0]

    def choose_autoencoder(self, beside: str | None = None) -> str | None:
        """The folder of the only autoencoder, or of that of the pipeline that the network in `beside` belongs to.

        None if there is none. Raises UserError for several, and for one of another class than `AUTOENCODERS`.
        """
        found = {
            folder: class_name
            for folder, class_name in self.networks().items()
            if class_name.startswith(("VQModel", "Autoencoder", "AsymmetricAutoencoder"))
            and (beside is None or beside and os.path.dirname(folder) == os.path.dirname(beside))
        }
        if len(found) > 1 or set(found.values()) - set(AUTOENCODERS):
            listed = ", ".join(f"{folder or 'the top'} ({class_name})" for folder, class_name in found.items())
            raise UserError(
                f"--{self.option} {self.name} holds {listed}. One autoencoder can be used, of the classes "
                f"{', '.join(AUTOENCODERS)}."
            )
        return next(iter(found), None)

    def load_network(self, folder: str) -> Network:
        """The network, with no weight missing or left over; a DiT as `as_denoiser` makes it."""
        name = f"--{self.option} {self.name}"
        found = None
        for patterns in WEIGHTS.values():  # a repository's files are fetched kind by kind, until there are some
            found = found or kind_of_weights(self.files(folder, patterns))
        if found is None:
            raise UserError(
                f"{name}: {folder or 'the top'} has a config.json, but no weights (diffusion_pytorch_model.safetensors "
                "or .bin, of a variant or not, in one file or several with their index)."
            )
        network_class = getattr(diffusers, class_name_of(self.json(join(folder, "config.json"))))
        network, report = network_class.from_pretrained(
            str(self.root / folder), output_loading_info=True, **loading_options(*found)
        )
        missing, unexpected = report["missing_keys"], report["unexpected_keys"]
        if missing or unexpected:
            raise UserError(
                f"{name}: weights and config do not fit: missing {missing[:3]}, unexpected {unexpected[:3]}."
            )
        check_finite(name, network.state_dict())
        return as_denoiser(network)

    def null_class(self, folder: str) -> int | None:
        """The label of the network in `folder` that means "no class"; None if there is none.

        A pipeline of this package says it in its index. That of diffusers' DiT is the number of its classes.
        """
        said = self.json(join(os.path.dirname(folder), "model_index.json")).get("null_class")
        config = self.json(join(folder, "config.json"))
        if said is None and class_name_of(config) == "DiTTransformer2DModel":
            return config.get("num_embeds_ada_norm", 1000)
        return said

    def scheduler(self, folder: str) -> dict:
        """The scheduler's config that belongs to the network in `folder`, {} if there is none."""
        for base in dict.fromkeys([folder, os.path.dirname(folder)]):
            for path in ("scheduler/scheduler_config.json", "scheduler_config.json"):
                if config := self.json(join(base, path)):
                    return config
        return {}


def class_name_of(config: dict) -> str | None:
    """The class of the model with this config.json; the first versions of diffusers recorded none, or another."""
    unet = "UNet2DModel" if {"in_channels", "block_out_channels", "down_block_types"} <= config.keys() else None
    name = config.get("_class_name", unet) or next(iter(config.get("architectures") or []), None)
    is_dit = name == "Transformer2DModel" and config.get("norm_type") == "ada_norm_zero"
    return "DiTTransformer2DModel" if is_dit else name


def as_denoiser(network: Network | DiTTransformer2DModel) -> Network:
    """`network`; diffusers' DiT in our class, which predicts no variances and takes real times.

    Raises ValueError for a DiT of other channels than it takes.
    """
    if isinstance(network, DiTTransformer2DModel):
        return CTMDiTTransformer2DModel.from_unet(network, target_time=False)
    return network


def join(*parts: str) -> str:
    """A path in a repository, without the parts that are empty."""
    return "/".join(part for part in parts if part)
