# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Images as the dataset_tool of NVIDIA's StyleGAN and EDM writes them, and image files within .zip files.

A folder or .zip file holds `00000/img00000000.png`, ... and `dataset.json`, whose "labels" are null or pairs like
["00000/img00000000.png", 6]. Folder names mean nothing there.
"""

import functools
import json
import os
import zipfile
from typing import Any

import pyarrow as pa
from datasets import ClassLabel, Dataset, DatasetInfo, Features, Image
from PIL import Image as PILImage

from ..cli.errors import UserError, loading


LABELS = "dataset.json"


def is_tool_output(path: str) -> bool:
    """Whether `path` is a folder with the tool's `dataset.json`, or a .zip file. Raises UserError for broken JSON."""
    if path.endswith(".zip"):
        return os.path.isfile(path)
    return os.path.isfile(os.path.join(path, LABELS)) and _entries(path) is not None


def tool_images(path: str, with_classes: bool) -> Dataset:
    """The images, in the order of their names, with the columns "image" and, where classes are known, "label".

    Each image is a path, within a .zip file as zip://NAME::FILE. The classes are 0, 1, ... up to the highest label.

    Raises UserError if files and labels do not belong together, or if classes are asked for and not there.
    """
    names, labels = _image_names(path), (_entries(path) or {}).get("labels")
    where = f"{path}{os.sep}{LABELS}"
    if labels is None and with_classes:
        raise UserError(
            f"--label_column: {where} is missing or has no labels (null). Leave --label_column out, or write the data "
            "set with labels."
        )
    columns = {"image": Image()}
    if labels is not None:
        labels = _as_classes(labels, where)
        if missing := sorted(labels.keys() - names):
            raise UserError(
                f"{where} names {len(missing)} image files that are not there, such as {missing[0]}. The data set is "
                "not whole: copy or write it anew."
            )
        if with_classes:
            if missing := sorted(set(names) - labels.keys()):
                raise UserError(
                    f"{where} has no entry for {len(missing)} of {len(names)} images, such as {missing[0]}. Add "
                    "entries, remove these images, or leave --label_column out."
                )
            columns["label"] = ClassLabel(num_classes=max(labels.values(), default=0) + 1)
    if path.endswith(".zip"):
        files = [f"zip://{name}::{os.path.abspath(path)}" for name in names]
    else:
        files = [os.path.join(os.path.abspath(path), name) for name in names]
    features = Features(columns)
    encoded = [pa.nulls(len(files), pa.binary()), pa.array(files, pa.string())]
    arrays = [pa.StructArray.from_arrays(encoded, ["bytes", "path"])]
    if "label" in columns:
        arrays.append(pa.array([labels[name] for name in names], pa.int64()))
    return Dataset(pa.Table.from_arrays(arrays, schema=features.arrow_schema), DatasetInfo(features=features))


def read_file(image: dict[str, Any]) -> dict[str, Any]:
    """An encoded image, {"bytes", "path"}; one within a .zip file on this disk is read."""
    inner, _, archive = (image["path"] or "").rpartition("::")
    if image["bytes"] is None and inner.startswith("zip://") and os.path.isfile(archive):
        return {"bytes": archive_of(archive).read(inner.removeprefix("zip://")), "path": None}
    return image


def archive_of(path: str) -> zipfile.ZipFile:
    """The .zip file, opened once by each process: several that share one opening would move each other's place."""
    return _opened(path, os.getpid())


@functools.lru_cache(8)
def _opened(path: str, process: int) -> zipfile.ZipFile:
    return zipfile.ZipFile(path)


def _image_names(path: str) -> list[str]:
    """Names of the image files, relative to `path` and with slashes, sorted; hidden files are left out."""
    if path.endswith(".zip"):
        with loading(path):
            names = archive_of(path).namelist()
    else:
        names = [
            os.path.relpath(os.path.join(folder, file), path).replace(os.sep, "/")
            for folder, _, files in os.walk(path)
            for file in files
        ]
    PILImage.init()
    known = tuple(ending for ending, kind in PILImage.EXTENSION.items() if kind in PILImage.OPEN)
    return sorted(name for name in names if name.lower().endswith(known) and "/." not in f"/{name}")


def _entries(path: str) -> dict[str, Any] | None:
    """The content of `dataset.json`; None if there is none, or it is another program's."""
    with loading(f"{path}{os.sep}{LABELS}", "Write it anew, or remove it if the data set has no classes."):
        if path.endswith(".zip"):
            archive = archive_of(path)
            text = archive.read(LABELS) if LABELS in archive.namelist() else b"null"
        else:
            with open(os.path.join(path, LABELS), "rb") as file:
                text = file.read()
        content = json.loads(text)
    return content if isinstance(content, dict) and "labels" in content else None


def _as_classes(labels: Any, where: str) -> dict[str, int]:
    """Class of each name. Raises UserError unless all are pairs of a name and a whole number from 0 on."""
    try:
        classes = {name.replace("\\", "/"): int(label) for name, label in labels}
        whole = all(int(label) == label >= 0 for _, label in labels)
    except (TypeError, ValueError, AttributeError, OverflowError):
        whole = False
    if not whole:
        raise UserError(f'{where}: "labels" must be null or a list of pairs of a file name and a class, 0, 1, ...')
    if len(classes) < len(labels):
        raise UserError(f"{where} names {len(labels) - len(classes)} files more than once; give each one entry.")
    return classes
