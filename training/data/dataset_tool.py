# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Images and latents as the dataset_tool of NVIDIA's StyleGAN, EDM and EDM2 writes them; image files in .zip files.

A folder or .zip file holds `00000/img00000000.png`, ... and `dataset.json`, whose "labels" are null or pairs like
["00000/img00000000.png", 6]. Folder names mean nothing there. Latents are `00000/img-mean-std-00000000.npy`, ...
"""

import functools
import io
import json
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import ClassLabel, Dataset, DatasetInfo, Features, Image
from PIL import Image as PILImage

from ..cli.errors import UserError, loading, naming


LABELS = "dataset.json"
ARRAYS = (".npy",)


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
    names, where = _image_names(path), f"{path}{os.sep}{LABELS}"
    if not names and _names(path, ARRAYS):
        raise UserError(
            f"--dataset_name {path} holds latents, which go to --latents. Give --dataset_name their images."
        )
    labels = _labels(path, names)
    columns = {"image": Image()}
    if with_classes:
        if labels is None:
            raise UserError(
                f"--label_column: {where} is missing or has no labels (null). Leave --label_column out, or write the "
                "data set with labels."
            )
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


class ToolLatents:
    """Latents of images as EDM2's dataset_tool encodes them, a file for each, in the order of the images' names.

    A file holds float32 of shape (2c, h, w): means, and behind them standard deviations. Nothing is ever written.

    Args:
        path: the folder or .zip file.
        shape: (c, h, w) of the latents to be expected.

    Attributes:
        labels: the class of each that `dataset.json` says, None for one that it leaves out; None without labels.

    Raises UserError if it cannot be read or the first file is of another shape.
    """

    def __init__(self, path: str, shape: tuple[int, int, int]):
        self.path, self.shape = path, shape
        with naming("latents"):
            self.names = _names(path, ARRAYS)
            labels = _labels(path, self.names)
        if not self.names:
            raise UserError(
                f"--latents {path} holds no latents (.npy). Give what EDM2's `dataset_tool.py encode` made, or a new "
                "folder, to which they are then written."
            )
        self.labels = None if labels is None else [labels.get(name) for name in self.names]
        self.read([0])

    def __len__(self) -> int:
        return len(self.names)

    def read(self, indices: list[int]) -> torch.Tensor:
        """Means and deviations of the latents of images that are not mirrored, float32 of shape (n, 2, 1, c, h, w)."""
        rows = []
        for index in indices:
            name = self.names[index]
            with loading(f"{name} of --latents {self.path}", "Copy or write it anew."):
                content = io.BytesIO(_read(self.path, name))
                values = np.lib.format.read_array(content, allow_pickle=False).astype(np.float32)
            c, h, w = self.shape
            if values.shape != (2 * c, h, w):
                raise UserError(
                    f"{name} of --latents {self.path} has the shape {values.shape}; means and deviations of "
                    f"the autoencoder's latents of these images have {(2 * c, h, w)}. Give others, or set --resolution."
                )
            rows.append(torch.from_numpy(values).reshape(2, 1, c, h, w))
        return torch.stack(rows)


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
    """Names of the image files, as `_names`."""
    PILImage.init()
    return _names(path, tuple(ending for ending, kind in PILImage.EXTENSION.items() if kind in PILImage.OPEN))


def _names(path: str, endings: tuple[str, ...]) -> list[str]:
    """Names of the files that end so, relative to `path` and with slashes, sorted; hidden files are left out."""
    if path.endswith(".zip"):
        with loading(path):
            names = archive_of(path).namelist()
    else:
        names = [
            os.path.relpath(os.path.join(folder, file), path).replace(os.sep, "/")
            for folder, _, files in os.walk(path)
            for file in files
        ]
    return sorted(name for name in names if name.lower().endswith(endings) and "/." not in f"/{name}")


def _read(path: str, name: str) -> bytes:
    """The content of a file."""
    return archive_of(path).read(name) if path.endswith(".zip") else Path(path, name).read_bytes()


def _entries(path: str) -> dict[str, Any] | None:
    """The content of `dataset.json`; None if there is none, or it is another program's."""
    with loading(f"{path}{os.sep}{LABELS}", "Write it anew, or remove it if the data set has no classes."):
        without = path.endswith(".zip") and LABELS not in archive_of(path).namelist()
        content = json.loads(b"null" if without else _read(path, LABELS))
    return content if isinstance(content, dict) and "labels" in content else None


def _labels(path: str, names: list[str]) -> dict[str, int] | None:
    """Class of each name in `dataset.json`; None without labels. Raises UserError for a file that is not there."""
    labels, where = (_entries(path) or {}).get("labels"), f"{path}{os.sep}{LABELS}"
    if labels is None:
        return None
    labels = _as_classes(labels, where)
    if missing := sorted(labels.keys() - names):
        raise UserError(
            f"{where} names {len(missing)} files that are not there, such as {missing[0]}. The data set is not whole: "
            "copy or write it anew."
        )
    return labels


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
