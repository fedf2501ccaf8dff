# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""The data set that the options name: the digits, a file, a folder or a repository on the Hub; and its columns."""

import os
import re
from typing import Any

import numpy as np
from datasets import (
    ClassLabel,
    Dataset,
    DatasetBuilder,
    DatasetDict,
    Features,
    Image,
    IterableDataset,
    ReadInstruction,
    concatenate_datasets,
    load_dataset,
    load_dataset_builder,
    load_from_disk,
)
from datasets.data_files import NON_WORDS_CHARS, SPLIT_KEYWORDS
from datasets.packaged_modules.folder_based_builder.folder_based_builder import FolderBasedBuilder
from PIL import Image as PILImage

from ..cli.errors import UserError, loading
from ..cli.shared_options import DataOptions
from .dataset_tool import is_tool_output, tool_images


TEXT = ("string", "large_string", "string_view")  # names of classes
LABEL_TYPES = ("int", "uint", "float", "bool", *TEXT)


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
    with loading(f"--dataset_name {name}"):
        splits = _splits_at_hand(options)
        if splits is not None:
            if options.dataset_config_name is not None:
                raise UserError(f"--dataset_name {name} has no configurations; leave --dataset_config_name out.")
            part = _part(splits, split)
            return part.to_iterable_dataset() if streaming else part
        if name.endswith(".parquet"):
            return load_dataset("parquet", data_files={_only(split): name}, split=split, streaming=streaming)
        builder = load_dataset_builder(name, options.dataset_config_name)
        if isinstance(builder, FolderBasedBuilder) and options.label_column == "label":
            builder = _with_class_folders(builder, options)
        if streaming:
            return builder.as_streaming_dataset(split)
        builder.download_and_prepare()
        return builder.as_dataset(split)


def _splits_at_hand(options: DataOptions) -> dict[str, Dataset] | None:
    """The splits of a data set that is read here; None if `load_dataset` reads it."""
    name = options.dataset_name
    if name == "digits" and not os.path.exists(name):
        return {"train": digits()}
    if is_tool_output(name):
        return {"train": tool_images(name, options.label_column == "label")}
    if any(os.path.isfile(os.path.join(name, file)) for file in ("state.json", "dataset_dict.json")):  # save_to_disk
        saved = load_from_disk(name)
        return dict(saved) if isinstance(saved, DatasetDict) else {_only(options.dataset_split): saved}
    return None


def _only(split: str) -> str:
    """The name of the one split that a file or folder without names is: that which is asked for."""
    return split.partition("[")[0]


def _part(splits: dict[str, Dataset], split: str) -> Dataset:
    """The part of data sets at hand that `load_dataset` would return for `split`."""
    try:
        lengths = {name: len(dataset) for name, dataset in splits.items()}
        parts = ReadInstruction.from_spec(split).to_absolute(lengths)
    except (ValueError, AssertionError) as error:
        names = " and ".join(map(repr, splits))
        raise UserError(
            f"--dataset_split {split}: the data set has {names} and parts, such as '{next(iter(splits))}[:1500]' or "
            f"'{next(iter(splits))}[-10%:]'. {error}"
        ) from error
    return concatenate_datasets([splits[part.splitname].select(range(part.from_, part.to) or []) for part in parts])


def _with_class_folders(builder: DatasetBuilder, options: DataOptions) -> DatasetBuilder:
    """The builder of a folder of images whose folder names are the classes in every split.

    Left alone, `datasets` decides anew after each split whether they are, and then the splits differ. Raises UserError
    if the images do not lie in one folder for each class.
    """
    files = [file for files in builder.config.data_files.values() for file in files]
    if any(os.path.basename(file) in builder.METADATA_FILENAMES for file in files):
        return builder  # the classes are in that file
    images = [file for file in files if file.lower().endswith(tuple(builder.EXTENSIONS))]
    folders = {os.path.dirname(file) for file in images}
    splits = {keyword for keywords in SPLIT_KEYWORDS.values() for keyword in keywords}
    for folder in folders:
        above = os.path.dirname(folder)
        inside = folder.removeprefix(builder.base_path.rstrip("/"))
        is_split = inside.count("/") == 1 and splits & set(re.split(f"[{NON_WORDS_CHARS}]", inside[1:]))
        if above in folders or not inside or is_split:
            raise UserError(
                f"--label_column label: the folders are not one for each class, because {folder} holds images. Make it "
                "CLASS/IMAGE or train/CLASS/IMAGE, or write metadata.csv with the columns file_name and label."
            )
    return load_dataset_builder(options.dataset_name, options.dataset_config_name, drop_labels=False)


def find_columns(options: DataOptions, features: Features) -> tuple[str, str | None]:
    """The columns of the images and of the classes, if those are asked for.

    Images are a feature `Image`, or the bytes of image files. Raises UserError if a column is missing or holds
    something else, or if several could hold the images.
    """
    image, label = options.image_column, options.label_column
    for name, column in (("image_column", image), ("label_column", label)):
        if column is not None and column not in features:
            raise UserError(f"--{name} {column} is not a column of the data set; it has {', '.join(features)}.")
    of_images = [name for name, feature in features.items() if isinstance(feature, Image)]
    of_bytes = [name for name, feature in features.items() if _holds_bytes(feature)]
    image_columns = of_images or of_bytes
    if image is not None and image not in of_images + of_bytes:
        raise UserError(
            f"--image_column {image} holds no images but {_in_words(features[image])}; image columns: "
            f"{of_images + of_bytes}."
        )
    if not image_columns:
        raise UserError(
            f"--dataset_name {options.dataset_name} has no column of images (feature `Image` of datasets, or bytes of "
            f"image files); its columns are {', '.join(features)}. Where a column holds paths or addresses, save the "
            "data set with the images themselves: `datasets` casts a column of paths to `Image`."
        )
    if image is None and len(image_columns) > 1:
        raise UserError(f"--image_column is needed: the data set has the image columns {', '.join(image_columns)}.")
    if label is not None and not str(getattr(features[label], "dtype", "")).startswith(LABEL_TYPES):
        raise UserError(
            f"--label_column {label} must hold one class for each image, as a whole number or a name; it holds "
            f"{_in_words(features[label])}."
        )
    return image or image_columns[0], label


def _holds_bytes(feature: Any) -> bool:
    """Whether a column may hold image files: bytes, or a struct of these and a path."""
    if isinstance(feature, dict):
        return "bytes" in feature and feature.keys() <= {"bytes", "path"} and _holds_bytes(feature["bytes"])
    return getattr(feature, "dtype", "") in ("binary", "large_binary", "binary_view")


def _in_words(feature: Any) -> str:
    return "text" if getattr(feature, "dtype", "") in TEXT else str(feature)
