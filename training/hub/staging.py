# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""The files of a pipeline's folder that are uploaded, without local paths."""

import os
import re
import shutil
from collections.abc import Callable
from typing import Any

from ..cli.errors import UserError
from ..cli.files import read_json, write_json
from ..cli.names import public_name
from .client import files_below
from .record import CONVERSION, NOTICE, RECORD


COMPONENT_FILE = (
    r"(config|scheduler_config|preprocessor_config)\.json"
    r"|(diffusion_pytorch_model|model)[\w.-]*\.safetensors(\.index\.json)?"
)

TOP_FILES = ("model_index.json", RECORD, CONVERSION, NOTICE)

PICTURES = ("evaluation.png", "gammas.png", "memorization.png")

REPORTS = ("evaluation.json", "memorization.json", "likelihood.json")


def stage(folder: str, target: str, evaluation: str | None = None, with_code: bool = False) -> list[str]:
    """Make `target` a pipeline folder with nothing else in it, of links to files of `folder`; return the others' names.

    JSON files are copied without local paths: diffusers notes some, and reports name where measurements were made.
    Raises UserError if `folder` is no pipeline.

    Args:
        evaluation: folder of its measurements. Default: `evaluation` in it, or beside it if it is a run's `pipeline`.
        with_code: keep the loading code too. Only for a folder that this program has just written: code of others is
            never published.
    """
    index = read_json(folder, "model_index.json")
    if not index:
        inside = os.path.join(folder, "pipeline")
        hint = f" Did you mean {inside}?" if os.path.isfile(os.path.join(inside, "model_index.json")) else ""
        raise UserError(f"{folder} is no pipeline: it has no readable model_index.json.{hint}")
    parts = [name for name, value in index.items() if isinstance(value, list) and not name.startswith("_")]
    if not all(re.fullmatch(r"\w+", name) for name in parts):
        raise UserError(f"{folder} is no pipeline: its model_index.json names {parts}, which are no folders in it.")
    files = files_below(folder)
    code = {"pipeline.py", *(f"{part}/diffusers_ctm.py" for part in parts)}
    of_component = re.compile(f"({'|'.join(parts)})/({COMPONENT_FILE})")
    kept = {path for path in files if path in TOP_FILES or of_component.fullmatch(path) or (with_code and path in code)}
    sources = {path: files[path] for path in kept}
    evaluation = evaluation or _evaluation_of(folder)
    sources |= {f"evaluation/{name}": os.path.join(evaluation, name) for name in (*PICTURES, *REPORTS)}
    for path, source in sources.items():
        if os.path.isfile(source):
            _check_link(path, source)
            _put(source, os.path.join(target, path))
    others = files.keys() - kept - code
    shown = {path if os.path.dirname(path) in ("", *parts) else f"{path.split('/')[0]}/" for path in others}
    return sorted(shown - {"evaluation/"})


def _evaluation_of(folder: str) -> str:
    parent, name = os.path.split(os.path.abspath(folder))
    inside = os.path.join(folder, "evaluation")
    return os.path.join(parent, "evaluation") if name == "pipeline" and not os.path.isdir(inside) else inside


def _check_link(path: str, source: str) -> None:
    """Raise UserError for a link out of its folder: a folder from elsewhere could publish any file of this disk.

    Weights are read before they are uploaded, and the cache of the Hub consists of links to `blobs`.
    """
    if not os.path.islink(source) or source.endswith(".safetensors"):
        return
    parent = os.path.dirname(os.path.realpath(source))
    if parent != os.path.realpath(os.path.dirname(source)) and os.path.basename(parent) != "blobs":
        raise UserError(f"{path} is a link to {os.path.realpath(source)}; copy that file there to publish it.")


def _put(source: str, target: str) -> None:
    folder, name = os.path.split(target)
    os.makedirs(folder, exist_ok=True)
    if name in ("config.json", "model_index.json", *REPORTS):
        values = read_json(*os.path.split(source))
        values.pop("_name_or_path", None)
        if values or name not in REPORTS:
            write_json(public_report(values) if name in REPORTS else values, name, folder)
    else:
        link_or_copy(os.symlink, os.path.abspath(source), target)


def link_or_copy(link: Callable[[str, str], None], source: str, target: str) -> None:
    """Link `target` to `source`, or copy it on a system or a disk without links."""
    try:
        link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def public_report(report: dict[str, Any]) -> dict[str, Any]:
    """A report of a measurement with models, data and features by `public_name`, and without output folders."""

    def public(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: public(inner) for key, inner in value.items() if key not in ("config", "output_dir")}
        if isinstance(value, list):
            return [public(inner) for inner in value]
        return public_name(value) if isinstance(value, str) else value

    return {
        key: public(value) if key in ("options", "features", "other_features", "reference") else value
        for key, value in report.items()
    }
