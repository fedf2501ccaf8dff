# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""training.json: how a pipeline came to be."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import diffusers
import torch

import diffusers_ctm

from ..cli.device import versions
from ..cli.files import read_json, write_json
from ..cli.names import is_hub_id, public_name, without_folders
from ..cli.options import default_of
from ..cli.training_options import RunOptions
from .client import card_license, commit_of
from .license import License, license_fields, license_in, license_of, strictest


RECORD = "training.json"

CONVERSION = "conversion.json"  # written by training.convert

NOTICE = "NOTICE.md"  # attribution, which the page shows too

# The weights of a run inherit the licenses of these: keys of `training.json`, and words for a reader.
ORIGINS = {
    "teacher": "teacher",
    "guidance_teacher": "guidance teacher",
    "first_stage": "first stage",
    "vae": "autoencoder",
}

LOADED = ("teacher", "guidance_teacher", "vae")  # those of them that options of the same name give


def recorded_license(folder: str) -> License | None:
    """The license that a student inherits from a local pipeline's folder, or from a checkpoint.

    The records of the run and of the conversion say it of the weights and of their origins, the card of the weights.
    """
    record, conversion = read_json(folder, RECORD), read_json(folder, CONVERSION)
    records = (record, *origins_of(record, conversion).values())
    card = Path(folder, "README.md")
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    return strictest([*map(license_of, records), license_in(text)])


def origin_record(name: str, revision: str | None = None) -> dict[str, Any]:
    """Name, commit and license of one of `ORIGINS`, as far as they are known.

    The Hub is asked for the commit unless `revision` is one.
    """
    on_hub = is_hub_id(name)
    if on_hub:
        revision = commit_of(name, revision) or revision
    license = card_license(name, revision) if on_hub else recorded_license(name)
    return {"name": public_name(name), "on_hub": on_hub, "revision": revision, **license_fields(license)}


def changed_options(options: RunOptions) -> dict[str, Any]:
    """The recorded options that differ from the defaults, paths by their last part."""
    changed = {}
    for entry in fields(options):
        value = getattr(options, entry.name)
        if entry.metadata["recorded"] and value != default_of(entry):
            changed[entry.name] = (
                list(map(without_folders, value)) if isinstance(value, list) else without_folders(value)
            )
    return changed


def training_record(
    options: RunOptions,
    num_processes: int,
    first_stage: str | None = None,
    revisions: dict[str, str | None] | None = None,
) -> dict[str, Any]:
    """The content of `training.json` except for the number of steps. Names no folder of this machine and no secret.

    Args:
        first_stage: the result of `find_first_stage`.
        revisions: the commits that were loaded, by the options of `LOADED`. The Hub may have moved on since.
    """
    dataset, origins = options.dataset_name, {}
    for role in LOADED:
        name = getattr(options, role, None)
        revision = name and ((revisions or {}).get(role) or getattr(options, f"{role}_revision"))
        origins[role] = name and origin_record(name, revision)
    origins["first_stage"] = first_stage and origin_record(first_stage)
    license = license_of({"license": options.hub_license}) or strictest(map(license_of, origins.values()))
    return {
        "program": options.PROGRAM,
        **origins,
        "dataset": {
            "name": public_name(dataset),
            "on_hub": dataset != "digits" and not dataset.endswith(".parquet") and is_hub_id(dataset),
            "config": options.dataset_config_name,
            "split": options.dataset_split,
        },
        "options": changed_options(options),
        "images_per_step": options.train_batch_size * options.gradient_accumulation_steps * num_processes,
        "versions": versions(diffusers_ctm, diffusers, torch),
        **license_fields(license),
    }


def write_record(record: dict[str, Any], steps: int, folder: str) -> None:
    """Write `training.json`."""
    write_json({**record, "steps": steps}, RECORD, folder)


def origins_of(record: dict[str, Any], conversion: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Where weights come from, by what it is to them, each as in `origin_record`; {} where there is none.

    Args:
        record: content of `training.json`.
        conversion: content of `conversion.json`, whose source may be user/repo/path/to/file. The license of what was
            converted comes before that of its autoencoder.
    """
    source = str(conversion.get("source") or "")
    repo = "/".join(source.split("/")[:2])
    on_hub = source.count("/") >= 2 and "://" not in source and is_hub_id(repo)
    converted = {**conversion, "name": repo if on_hub else source, "on_hub": on_hub}
    origins = {title: record.get(role) or conversion.get(role) or {} for role, title in ORIGINS.items()}
    return {"original": converted, **origins}
