"""What of a folder is uploaded; the loading code stays in."""

import json
import os
import re
import shutil
from typing import Any

from ..cli.errors import UserError
from ..cli.files import read_json
from ..cli.names import public_name
from .record import CONVERSION, NOTICE, RECORD


# What of a folder is the pipeline: files of a component, and files beside the components.
COMPONENT_FILES = re.compile(
    r"(config|scheduler_config|preprocessor_config)\.json|(diffusion_pytorch_model|model)[\w.-]*\.safetensors(\.index\.json)?"
)

TOP_FILES = ("model_index.json", RECORD, CONVERSION, NOTICE)

PICTURES = ("evaluation.png", "gammas.png", "memorisation.png")

REPORTS = ("evaluation.json", "memorisation.json", "likelihood.json")


def stage(folder: str, target: str, evaluation: str | None = None) -> list[str]:
    """Make `target` a pipeline folder with nothing else in it: links to the files of `folder`; return what was left out.

    JSON files are copied without local paths: what diffusers notes in them, and where measurements were made and kept. Raises UserError
    if it is no pipeline.
    """
    index = read_json(folder, "model_index.json")
    if not index:
        inside = os.path.join(folder, "pipeline")
        hint = f" Did you mean {inside}?" if os.path.isfile(os.path.join(inside, "model_index.json")) else ""
        raise UserError(f"{folder} is no pipeline: it has no readable model_index.json.{hint}")
    parts = [name for name, value in index.items() if isinstance(value, list) and not name.startswith("_")]
    if not all(re.fullmatch(r"\w+", name) for name in parts):
        raise UserError(f"{folder} is no pipeline: its model_index.json names {parts}, which are no folders in it.")
    taken = {name for name in TOP_FILES if os.path.isfile(os.path.join(folder, name))}
    for part in parts:
        inside = os.path.join(folder, part)
        names = os.listdir(inside) if os.path.isdir(inside) else []
        taken |= {f"{part}/{name}" for name in names if COMPONENT_FILES.fullmatch(name)}
    sources = {path: os.path.join(folder, path) for path in taken}
    evaluation = evaluation or os.path.join(folder, "evaluation")
    sources |= {f"evaluation/{name}": os.path.join(evaluation, name) for name in (*PICTURES, *REPORTS)}
    for path, source in sources.items():
        if os.path.isfile(source):
            _check_link(path, source)
            _put(source, os.path.join(target, path))
    code = {"pipeline.py", *(f"{part}/diffusers_ctm.py" for part in parts)}  # written anew from the installed package
    return [name for name in _entries(folder, parts) if name not in taken | code | {"evaluation/"}]


def _entries(folder: str, parts: list[str]) -> list[str]:
    """What lies in the folder and its components; other folders by their name."""
    found = []
    for name in sorted(os.listdir(folder)):
        if name in parts:
            found += [f"{name}/{inner}" for inner in sorted(os.listdir(os.path.join(folder, name)))]
        else:
            found.append(f"{name}/" if os.path.isdir(os.path.join(folder, name)) else name)
    return found


def _check_link(path: str, source: str) -> None:
    """Raise UserError for a link that leads out of its folder: what came with a folder would publish any file of this disk.

    Weights are read before they are uploaded, and the cache of the Hub is made of links to `blobs`.
    """
    if not os.path.islink(source) or source.endswith(".safetensors"):
        return
    parent = os.path.dirname(os.path.realpath(source))
    if parent != os.path.realpath(os.path.dirname(source)) and os.path.basename(parent) != "blobs":
        raise UserError(
            f"{path} is a link to {os.path.realpath(source)}; copy that file there if it shall be published."
        )


def _put(source: str, target: str) -> None:
    os.makedirs(os.path.dirname(target), exist_ok=True)
    name = os.path.basename(source)
    if name in ("config.json", "model_index.json", *REPORTS):
        values = read_json(*os.path.split(source))
        values.pop("_name_or_path", None)
        if name in REPORTS:
            if not values:
                return
            values = public_report(values)
        with open(target, "w", encoding="utf-8") as file:
            json.dump(values, file, indent=2)
            file.write("\n")
        return
    try:
        os.symlink(os.path.abspath(source), target)
    except OSError:  # a system without links
        shutil.copyfile(source, target)


def public_report(report: dict[str, Any]) -> dict[str, Any]:
    """A report of a measurement as it may be published: models, data and features by `public_name`, no folder that was written to."""

    def public(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: public(inner) for key, inner in value.items() if key not in ("config", "output_dir")}
        if isinstance(value, list):
            return [public(inner) for inner in value]
        return public_name(value) if isinstance(value, str) else value

    return {
        key: public(value) if key in ("options", "features", "reference") else value for key, value in report.items()
    }


def components(target: str) -> tuple[str, ...]:
    """The folders of a pipeline's components."""
    return tuple(
        name
        for name in sorted(os.listdir(target))
        if name != "evaluation" and os.path.isdir(os.path.join(target, name))
    )
