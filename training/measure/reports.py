# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Reports of what was measured: their common facts, and their files."""

import datetime
import json
from dataclasses import asdict
from typing import Any

import diffusers
import torch
import torchmetrics

import diffusers_ctm

from ..cli.device import hardware, versions
from ..cli.files import write_files
from ..report.pictures import png


def facts(config: Any, device: torch.device) -> dict[str, Any]:
    """When, with which options, on what and with which versions a report was made."""
    return {
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "options": asdict(config),
        "hardware": hardware(device),
        "versions": versions(diffusers_ctm, diffusers, torch, torchmetrics),
    }


def write_report(
    folder: str, name: str, report: dict[str, Any], text: str = "", pictures: dict[str, Any] | None = None
) -> None:
    """Write NAME.json, NAME.md if there is a text, and the pictures by name, and print the text.

    All files are written before the first of them replaces a former one.

    Args:
        pictures: PIL images and matplotlib figures.
    """
    files = {f"{name}.json": (json.dumps(report, indent=2, allow_nan=False) + "\n").encode()}
    if text:
        files[f"{name}.md"] = text.encode()
    files |= {f"{title}.png": png(picture) for title, picture in (pictures or {}).items()}
    write_files(folder, files)
    if text:
        print(f"\n{text}")
