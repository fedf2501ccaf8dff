"""What is known about how a pipeline came to be: `training.json` in its folder, read again when it is published."""

import json
import os
import platform
import re
from collections.abc import Iterable
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

import diffusers
import torch
import yaml
from huggingface_hub import ModelCard

import diffusers_ctm

from .config import RunOptions


RECORD = "training.json"
CONVERSION = "conversion.json"  # what training.convert knows
NOTICE = "NOTICE.md"  # attribution, which the page shows too
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")

# Who may be republished under another licence, as these allow. Whatever is not here is inherited as it is.
PERMISSIVE = {
    "mit", "apache-2.0", "bsd", "bsd-2-clause", "bsd-3-clause", "bsd-3-clause-clear", "isc", "unlicense", "wtfpl", "zlib", "0bsd",
    "cc0-1.0", "pddl", "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0", "afl-3.0", "bsl-1.0", "ecl-2.0", "ncsa", "postgresql",
}  # fmt: skip

# Whose licence the weights of a run inherit, as `training.json` names them, and as a reader does.
ORIGINS = {"teacher": "teacher", "first_stage": "first stage"}

# Options that say where, how and what is shown, not what the weights are. None of them is recorded.
LOCAL_OPTIONS = {
    "config", "output_dir", "resume_from_checkpoint", "dataloader_num_workers", "checkpointing_steps", "checkpoints_total_limit",
    "sample_every", "logging_steps", "eval_every", "eval_samples", "eval_features", "report_to", "teacher", "init_from", "posthoc_ema_every", "push_to_hub", "hub_model_id", "hub_private", "hub_strategy", "hub_license",
}  # fmt: skip


@dataclass
class Licence:
    """A licence as the Hub names it.

    Args:
        id: e.g. "mit", "cc-by-nc-sa-4.0", or "other".
        name, link: of an "other" one.
    """

    id: str
    name: str | None = None
    link: str | None = None

    def __str__(self) -> str:
        return f"{self.id} ({self.name})" if self.name else self.id


def licence_of(values: Any) -> Licence | None:
    """The licence in a card's metadata, or in a record: keys `license`, `license_name`, `license_link`. None in what is no dict."""
    found = values.get("license") if isinstance(values, dict) else None
    if isinstance(found, list) and len(found) == 1:
        found = found[0]
    if not isinstance(found, str) or not found.strip() or found.strip().lower() == "unknown":
        return None
    name, link = (
        text if isinstance(text := values.get(key), str) else None for key in ("license_name", "license_link")
    )
    return Licence(found.strip().lower(), name, link)


def licence_in(card: str) -> Licence | None:
    """The licence in the text of a card; None if there is none, or metadata that is no YAML."""
    try:
        return licence_of(ModelCard(card, ignore_metadata_errors=True).data.to_dict())
    except (ValueError, yaml.YAMLError, RecursionError):
        return None


def is_hub_id(name: str | None) -> bool:
    """Whether `name` is user/name on the Hub rather than something on this disk."""
    return bool(name) and HUB_ID.fullmatch(name) is not None and not os.path.exists(name)


def public_name(name: str) -> str:
    """`name` as it may be published: a Hub id as it is, of a local path its last part, of `run/pipeline` and `run/checkpoint-5` the run."""
    if is_hub_id(name):
        return name
    parts = [part for part in re.split(r"[/\\]", os.path.abspath(name) if name.startswith(".") else name) if part]
    if len(parts) > 1 and re.fullmatch(r"pipeline|checkpoint-\d+", parts[-1]):
        parts.pop()
    return parts[-1] if parts else name


def read_json(folder: str, name: str) -> dict[str, Any]:
    """The object in a JSON file of `folder`; empty if there is none or it cannot be read."""
    try:
        with open(os.path.join(folder, name), encoding="utf-8") as file:
            value = json.load(file)
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


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


def strictest(licences: Iterable[Licence | None]) -> Licence | None:
    """Of the licences that are known the first that is not permissive, else the first. (Two such conditions are not weighed.)"""
    known = [licence for licence in licences if licence is not None]
    return next((licence for licence in known if licence.id not in PERMISSIVE), known[0] if known else None)


def origin_record(name: str, revision: str | None = None) -> dict[str, Any]:
    """Name, commit and licence of a teacher or a first stage, as far as they can be found out."""
    commit, licence = None, None
    if os.path.isdir(name):
        licence = recorded_licence(name)
    elif is_hub_id(name):
        from .hub import card_licence, commit_of

        commit = commit_of(name, revision)
        licence = card_licence(name, revision)
    record: dict[str, Any] = {"name": public_name(name), "on_hub": is_hub_id(name), "revision": commit or revision}
    return {**record, **licence_fields(licence)}


def licence_fields(licence: Licence | None) -> dict[str, str]:
    """The licence as entries of a record or a card."""
    if licence is None:
        return {}
    values = {"license": licence.id, "license_name": licence.name, "license_link": licence.link}
    return {name: value for name, value in values.items() if value}


def _without_folders(value: Any) -> Any:
    """`value`, or its public name if it is a path."""
    is_path = isinstance(value, str) and (os.path.isabs(value) or ("/" in value and os.path.exists(value)))
    return public_name(value) if is_path else value


def changed_options(options: RunOptions) -> dict[str, Any]:
    """The options that differ from the defaults and decide what the weights are, paths by their last part."""
    values = asdict(options)
    changed = {}
    for entry in fields(options):
        default = entry.default if entry.default_factory is MISSING else entry.default_factory()
        value = values[entry.name]
        if entry.name in LOCAL_OPTIONS or value == default:
            continue
        changed[entry.name] = (
            [_without_folders(item) for item in value] if isinstance(value, list) else _without_folders(value)
        )
    return changed


def training_record(options: RunOptions, num_processes: int, first_stage: str | None = None) -> dict[str, Any]:
    """What `training.json` says of a run, but for the number of steps done. Names no folder of this machine and no secret.

    Args:
        first_stage: what `find_first_stage` found.
    """
    teacher = getattr(options, "teacher", None)
    dataset = options.dataset_name
    record: dict[str, Any] = {
        "program": options.PROGRAM,
        "teacher": None if teacher is None else origin_record(teacher, getattr(options, "teacher_revision", None)),
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


def write_json(value: dict[str, Any], name: str, folder: str) -> None:
    """Write a JSON file to `folder`."""
    with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
        json.dump(value, file, indent=2)
        file.write("\n")


def write_record(record: dict[str, Any], steps: int, folder: str) -> None:
    """Write `training.json`."""
    write_json({**record, "steps": steps}, RECORD, folder)
