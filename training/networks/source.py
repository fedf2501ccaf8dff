"""The one network in a folder or repository with its scheduler's config, all of one commit."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import diffusers
from diffusers import UNet2DModel
from huggingface_hub import snapshot_download

from ..cli.errors import UserError


NETWORKS = ("UNet2DModel", "CTMUNet2DModel", "EDMUNet2DModel")  # attributes of diffusers, ours too

# Files of a network's weights, the best kind first. `.bin` is a pickle, which diffusers opens with torch's `weights_only`.
WEIGHTS = (
    [
        "diffusion_pytorch_model.safetensors",
        "diffusion_pytorch_model.safetensors.index.json",
        "diffusion_pytorch_model-*.safetensors",
    ],
    ["diffusion_pytorch_model.*.safetensors"],
    ["diffusion_pytorch_model.bin"],
)


class _Source:
    """Files of a folder or repository; of a repository, those that are needed, all of one commit."""

    def __init__(self, name: str, revision: str | None, token: str | None):
        self.name, self.revision, self.token = name, None, token
        self.root = Path(name)
        self.on_hub = not self.root.is_dir()
        if self.on_hub:
            self.root = Path(self._download(["*model_index.json", "*config.json"], revision))
            self.revision = self.root.name  # a snapshot's folder is named by its commit
        elif revision is not None:
            raise UserError(f"--teacher_revision {revision} is for repositories on the Hub; {name} is a folder.")

    def _download(self, patterns: list[str], revision: str | None) -> str:
        return snapshot_download(self.name, revision=revision, token=self.token, allow_patterns=patterns)

    def files(self, folder: str, patterns: Sequence[str]) -> list[str]:
        """Names of the files in `folder` that match, fetched."""
        if self.on_hub:
            self._download([_join(folder, pattern) for pattern in patterns], self.revision)
        return sorted(path.name for pattern in patterns for path in (self.root / folder).glob(pattern))

    def json(self, path: str) -> dict:
        """The content of a JSON file, {} if it is not there."""
        file = self.root / path
        value = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        if not isinstance(value, dict):
            raise UserError(f"{path} of {self.name} is no JSON object.")
        return value

    def networks(self) -> dict[str, str]:
        """Class of every model by its folder, "" for the top."""
        found = {}
        for path in sorted(self.root.rglob("config.json")):
            folder = path.parent.relative_to(self.root).as_posix()
            if any(part.startswith(".") for part in Path(folder).parts):
                continue
            folder = "" if folder == "." else folder
            config = self.json(_join(folder, "config.json"))
            # The first versions of diffusers did not record the class.
            unet = "UNet2DModel" if {"in_channels", "block_out_channels", "down_block_types"} <= config.keys() else None
            class_name = config.get("_class_name", unet) or next(iter(config.get("architectures") or []), None)
            if class_name is not None:
                found[folder] = class_name
        return found

    def scheduler(self, folder: str) -> dict:
        """The scheduler's config that belongs to the network in `folder`, {} if there is none."""
        for base in dict.fromkeys([folder, os.path.dirname(folder)]):
            for path in ("scheduler/scheduler_config.json", "scheduler_config.json"):
                config = self.json(_join(base, path))
                if config:
                    return config
        return {}


def _join(*parts: str) -> str:
    return "/".join(part for part in parts if part)


def _choose_network(name: str, found: dict[str, str], subfolder: str | None) -> str:
    """The folder of the only network that can be a teacher. Raises UserError that lists what there is."""
    candidates = [folder for folder, class_name in found.items() if class_name in NETWORKS]
    if subfolder is not None:
        subfolder = subfolder.strip("/")
        candidates = [folder for folder in candidates if folder == subfolder or folder.startswith(f"{subfolder}/")]
    if len(candidates) != 1:
        where = f"--teacher {name}" + (f" --teacher_subfolder {subfolder}" if subfolder else "")
        listed = ", ".join(f"{folder or 'the top'} ({class_name})" for folder, class_name in found.items())
        count = "no network" if not candidates else f"{len(candidates)} networks"
        raise UserError(
            f"{where} holds {count} of the classes {', '.join(NETWORKS)}. Found: {listed or 'no model at all'}. "
            + ("Choose one with --teacher_subfolder." if candidates else "It must be a diffusion model of pixels.")
        )
    folder = candidates[0]
    latent = [
        other
        for other, class_name in found.items()
        if folder
        and os.path.dirname(other) == os.path.dirname(folder)
        and class_name.startswith(("VQModel", "Autoencoder"))
    ]
    if latent:
        raise UserError(
            f"--teacher {name}: {folder} works on the latents of {latent[0]} ({found[latent[0]]}), not on pixels, which is not supported."
        )
    return folder


def _load_network(name: str, source: _Source, folder: str) -> UNet2DModel:
    """The network, with no weight missing or left over."""
    fetched = ((kind, source.files(folder, patterns)) for kind, patterns in enumerate(WEIGHTS))
    kind, files = next(((kind, files) for kind, files in fetched if files), (None, []))
    if kind is None:
        raise UserError(
            f"--teacher {name}: {folder or 'the top'} has a config.json, but no weights "
            "(diffusion_pytorch_model.safetensors or .bin)."
        )
    options = {}
    if kind == 1:
        options["variant"] = files[0].split(".")[1]
    network_class = getattr(diffusers, source.json(_join(folder, "config.json")).get("_class_name", "UNet2DModel"))
    network, report = network_class.from_pretrained(
        str(source.root / folder), use_safetensors=kind < 2, output_loading_info=True, **options
    )
    if report["missing_keys"] or report["unexpected_keys"]:
        raise UserError(
            f"--teacher {name}: weights and config do not fit: missing {report['missing_keys'][:3]}, "
            f"unexpected {report['unexpected_keys'][:3]}."
        )
    return network
