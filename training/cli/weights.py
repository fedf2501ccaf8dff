# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Weights that a program loads: in which files they lie, and that all of them are numbers."""

import os
import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import HfApi

from .errors import UserError, loading
from .names import is_hub_id


# The kinds of files that a network's weights lie in, the best first, and which names are of a kind. `.bin` is a pickle,
# which diffusers opens with torch's `weights_only`.
WEIGHTS = {
    "whole": (
        "diffusion_pytorch_model.safetensors",
        "diffusion_pytorch_model.safetensors.index.json",
        "diffusion_pytorch_model-?????-of-?????.safetensors",
    ),
    "variant": ("diffusion_pytorch_model.*.safetensors", "diffusion_pytorch_model.safetensors.index.*.json"),
    "pickle": ("diffusion_pytorch_model.bin",),
    "pickles": ("diffusion_pytorch_model.bin.index.json", "diffusion_pytorch_model-?????-of-?????.bin"),
    "pickled variant": ("diffusion_pytorch_model.*.bin", "diffusion_pytorch_model.bin.index.*.json"),
}

# Files of the variant fp16: model.fp16.bin, model.fp16-00001-of-00002.bin, model.bin.index.fp16.json.
VARIANT = re.compile(
    r"diffusion_pytorch_model\.(?:(?:safetensors|bin)\.index\.(.+)\.json|(.+?)(?:-\d+-of-\d+)?\.(?:safetensors|bin))"
)


def kind_of_weights(files: Iterable[str]) -> tuple[str, list[str]] | None:
    """The best kind of `WEIGHTS` among the names of files in a network's folder, and its files. None: there is none."""
    files = sorted(files)
    kinds = ((kind, [file for file in files if any(fnmatch(file, one) for one in WEIGHTS[kind])]) for kind in WEIGHTS)
    return next(((kind, found) for kind, found in kinds if found), None)


def loading_options(kind: str, files: Iterable[str]) -> dict[str, Any]:
    """How `from_pretrained` is told of weights of a kind that lie in `files`, both of `kind_of_weights`."""
    variants = [match[1] or match[2] for match in map(VARIANT.fullmatch, files) if match]
    return {"use_safetensors": "pickle" not in kind, "variant": variants[0] if "variant" in kind else None}


def load_pipeline(what: str, name: str, advice: str = "", revision: str | None = None) -> DiffusionPipeline:
    """The pipeline in the folder or Hub repository `name`; of its `unet` a variant if nothing else is there.

    Code in it does not run. Raises UserError, which begins with `what` and gives the advice, if it cannot be loaded or
    has broken weights.
    """
    folder = Path(name, "unet")
    with loading(what, advice):
        options = _unusual(os.listdir(folder)) if folder.is_dir() else {}
        try:
            pipe = DiffusionPipeline.from_pretrained(name, revision=revision, **options)
        except OSError:
            if not is_hub_id(name):
                raise
            paths = HfApi().list_repo_files(name, revision=revision)
            options = _unusual(path.removeprefix("unet/") for path in paths if path.startswith("unet/"))
            if not options:
                raise
            pipe = DiffusionPipeline.from_pretrained(name, revision=revision, **options)
    for part, module in pipe.components.items():
        if isinstance(module, torch.nn.Module):
            check_finite(what, {f"{part}.{key}": value for key, value in module.state_dict().items()})
    return pipe


def _unusual(files: Iterable[str]) -> dict[str, Any]:
    """What diffusers must be told of the files in the folder of a network; empty if it finds them by itself."""
    kind, found = kind_of_weights(files) or ("whole", [])
    if kind in ("whole", "pickle"):
        return {}
    options = loading_options(kind, found)
    return {**options, "use_safetensors": options["use_safetensors"] and None}  # other components may be pickles


def broken(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Names of the tensors that have an infinite or NaN entry. Waits for the device once."""
    finite = [tensor.isfinite().all() for tensor in tensors.values()]
    return [name for name, fine in zip(tensors, torch.stack(finite).tolist()) if not fine] if finite else []


def check_finite(what: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise UserError, which begins with `what` and names the first, if tensors have infinite or NaN entries.

    And if they have none, on "meta": diffusers leaves what a file lacks there.
    """
    lacking = [name for name, tensor in tensors.items() if tensor.is_meta]
    if lacking:
        raise UserError(f"{what} lacks {len(lacking)} of its {len(tensors)} tensors, such as {lacking[0]}.")
    names = broken(tensors)
    if names:
        more = f" and {len(names) - 1} more of its {len(tensors)} tensors" if len(names) > 1 else ""
        raise UserError(
            f"{what} has infinite or NaN weights: {names[0]}{more}. The file or the training that made it is broken; "
            "take another copy, or an earlier checkpoint."
        )
