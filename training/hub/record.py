"""training.json: how a pipeline came to be."""

import os
import platform
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any

import diffusers
import torch

import diffusers_ctm

from ..cli.files import read_json, write_json
from ..cli.names import is_hub_id, public_name, without_folders
from ..cli.training_options import RunOptions
from .client import card_licence, commit_of
from .license import Licence, licence_fields, licence_in, licence_of, strictest


RECORD = "training.json"

CONVERSION = "conversion.json"  # what training.convert knows

NOTICE = "NOTICE.md"  # attribution, which the page shows too

# Whose licence the weights of a run inherit, as `training.json` names them, and as a reader does.
ORIGINS = {"teacher": "teacher", "first_stage": "first stage"}


def recorded_licence(folder: str) -> Licence | None:
    """The licence that a student inherits from a local pipeline's folder, or from a checkpoint.

    It is said in the run's record, of the weights, their teacher and their first stage, in the conversion's, and in the card.
    """
    record = read_json(folder, RECORD)
    said = [licence_of(x) for x in (record, *map(record.get, ORIGINS), read_json(folder, CONVERSION))]
    card = Path(folder, "README.md")
    if card.is_file():
        said.append(licence_in(card.read_text(encoding="utf-8", errors="replace")))
    return strictest(said)


def origin_record(name: str, revision: str | None = None) -> dict[str, Any]:
    """Name, commit and licence of a teacher or a first stage, as far as they can be found out."""
    commit, licence = None, None
    if os.path.isdir(name):
        licence = recorded_licence(name)
    elif is_hub_id(name):
        commit = commit_of(name, revision)
        licence = card_licence(name, revision)
    record: dict[str, Any] = {"name": public_name(name), "on_hub": is_hub_id(name), "revision": commit or revision}
    return {**record, **licence_fields(licence)}


def changed_options(options: RunOptions) -> dict[str, Any]:
    """The options that differ from the defaults and decide what the weights are, paths by their last part."""
    values = asdict(options)
    changed = {}
    for entry in fields(options):
        default = entry.default if entry.default_factory is MISSING else entry.default_factory()
        value = values[entry.name]
        if not entry.metadata["recorded"] or value == default:
            continue
        changed[entry.name] = (
            [without_folders(item) for item in value] if isinstance(value, list) else without_folders(value)
        )
    return changed


def training_record(
    options: RunOptions, num_processes: int, first_stage: str | None = None, teacher_revision: str | None = None
) -> dict[str, Any]:
    """What `training.json` says of a run, but for the number of steps done. Names no folder of this machine and no secret.

    Args:
        first_stage: what `find_first_stage` found.
        teacher_revision: the commit of the teacher that was loaded.
    """
    teacher = getattr(options, "teacher", None)
    revision = teacher_revision or getattr(options, "teacher_revision", None)
    dataset = options.dataset_name
    record: dict[str, Any] = {
        "program": options.PROGRAM,
        "teacher": None if teacher is None else origin_record(teacher, revision),
        "first_stage": None if first_stage is None else origin_record(first_stage),
        "dataset": {
            "name": public_name(dataset),
            "on_hub": dataset != "digits" and not dataset.endswith(".parquet") and is_hub_id(dataset),
            "config": options.dataset_config_name,
            "split": options.dataset_split,
        },
        "options": changed_options(options),
        "images_per_step": options.train_batch_size * options.gradient_accumulation_steps * num_processes,
        "versions": {
            "diffusers_ctm": diffusers_ctm.__version__,
            "diffusers": diffusers.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }
    own = licence_of({"license": options.hub_license})
    return {**record, **licence_fields(own or strictest(licence_of(record[role] or {}) for role in ORIGINS))}


def write_record(record: dict[str, Any], steps: int, folder: str) -> None:
    """Write `training.json`."""
    write_json({**record, "steps": steps}, RECORD, folder)


def conversion_repo(conversion: dict) -> str | None:
    """user/repo of a conversion's source user/repo/path/to/file."""
    source = str(conversion.get("source") or "")
    start = "/".join(source.split("/")[:2])
    return start if source.count("/") >= 2 and "://" not in source and is_hub_id(start) else None
