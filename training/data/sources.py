# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""The data set that the options name: the digits, a file, a folder or a repository on the Hub; and its columns."""

import os

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image, IterableDataset, ReadInstruction, load_dataset
from PIL import Image as PILImage

from ..cli.errors import UserError, loading
from ..cli.shared_options import DataOptions


def digits() -> Dataset:
    """scikit-learn's 1,797 handwritten digits, 8x8 gray, with labels."""
    from sklearn.datasets import load_digits

    source = load_digits()
    pixels = np.round(source.images * (255 / 16)).astype(np.uint8)  # 17 levels of gray, 0 to 16
    features = Features({"image": Image(), "label": ClassLabel(names=[str(i) for i in range(10)])})
    columns = {"image": [PILImage.fromarray(image) for image in pixels], "label": source.target.tolist()}
    return Dataset.from_dict(columns, features=features)


def load_source(options: DataOptions, streaming: bool = False) -> Dataset | IterableDataset:
    """The data set that the options name. Raises UserError if it is not there."""
    name, split = options.dataset_name, options.dataset_split
    is_digits = name == "digits" and not os.path.exists(name)
    if is_digits and options.dataset_config_name is not None:
        raise UserError("--dataset_name digits has no configurations; leave --dataset_config_name out.")
    with loading(f"--dataset_name {name}"):
        if is_digits:
            part = _part(digits(), split)
            return part.to_iterable_dataset() if streaming else part
        if name.endswith(".parquet"):  # the file counts as the split that is asked for
            files = {split.partition("[")[0]: name}
            return load_dataset("parquet", data_files=files, split=split, streaming=streaming)
        return load_dataset(name, options.dataset_config_name, split=split, streaming=streaming)


def _part(dataset: Dataset, split: str) -> Dataset:
    """The part of a data set in memory that `load_dataset` would return for `split`. Its only split is "train"."""
    try:
        parts = ReadInstruction.from_spec(split).to_absolute({"train": len(dataset)})
    except (ValueError, AssertionError) as error:
        raise UserError(
            f"--dataset_split {split}: the digits have 'train' and its parts, such as 'train[:1500]' or "
            f"'train[-10%:]'. {error}"
        ) from error
    return dataset.select([index for part in parts for index in range(part.from_, part.to)])


def find_columns(options: DataOptions, features: Features) -> tuple[str, str | None]:
    """The columns of the images and of the classes, if those are asked for.

    Raises UserError if one is missing or holds something else, or if several could hold the images.
    """
    image, label = options.image_column, options.label_column
    for name, column in (("image_column", image), ("label_column", label)):
        if column is not None and column not in features:
            raise UserError(f"--{name} {column} is not a column of the data set; it has {', '.join(features)}.")
    image_columns = [name for name, feature in features.items() if isinstance(feature, Image)]
    if not image_columns:
        raise UserError(
            f"--dataset_name {options.dataset_name} has no column of images (feature `Image` of datasets); its columns "
            f"are {', '.join(features)}."
        )
    if image is None and len(image_columns) > 1:
        raise UserError(f"--image_column is needed: the data set has the image columns {', '.join(image_columns)}.")
    if image is not None and image not in image_columns:
        raise UserError(f"--image_column {image} holds no images; image columns: {image_columns}.")
    if label is not None and not str(getattr(features[label], "dtype", "")).startswith(("int", "uint")):
        raise UserError(f"--label_column {label} must hold classes or whole numbers, it holds {features[label]}.")
    return image or image_columns[0], label
