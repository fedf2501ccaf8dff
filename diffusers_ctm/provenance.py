# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""How an image was made, written into its PNG file: that it is synthetic, by which model, with which numbers."""

import dataclasses
import functools
import inspect
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import quoteattr

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from PIL import Image, PngImagePlugin

from .files import written_aside
from .preconditioning import Preconditioning
from .scheduling_karras import jumps
from .two_times import input_dtype
from .version import __version__


# IPTC's terms for media that a trained model made, and for given media that it changed.
SOURCE_TYPES = "http://cv.iptc.org/newscodes/digitalsourcetype/"

GENERATED = SOURCE_TYPES + "trainedAlgorithmicMedia"

EDITED = SOURCE_TYPES + "compositeWithTrainedAlgorithmicMedia"

SOFTWARE = f"diffusers-ctm {__version__}"

# Keyword in the PNG file, by name. The first six are text, the others JSON.
FIELDS = {
    "digital_source_type": "DigitalSourceType",
    "software": "Software",
    "model": "Model",
    "revision": "Revision",
    "pipeline": "Pipeline",
    "scheduler": "Scheduler",
    "num_inference_steps": "Steps",
    "gamma": "Gamma",
    "sigmas": "Sigmas",
    "class_label": "Class",
    "seed": "Seed",
    "batch_index": "BatchIndex",
    "batch_size": "BatchSize",
    "generator": "Generator",
    "scheduler_config": "SchedulerConfig",
    "guidance_scale": "GuidanceScale",
    "guidance": "Guidance",
    "dtype": "DType",
}

TEXT_FIELDS = tuple(FIELDS)[:6]

XMP_KEYWORD = "XML:com.adobe.xmp"


def png_text(provenance: Mapping[str, Any]) -> dict[str, str]:
    """`provenance` as text by PNG keyword, with IPTC's DigitalSourceType and the software as XMP. None is left out.

    Raises ValueError for a key that is not in `FIELDS`, and for a value that JSON does not know.
    """
    unknown = sorted(set(provenance) - set(FIELDS))
    if unknown:
        raise ValueError(f"provenance has no {', '.join(unknown)}; it holds {', '.join(FIELDS)}.")
    provenance = {"digital_source_type": GENERATED, "software": SOFTWARE, **provenance}
    text = {}
    for name, keyword in FIELDS.items():
        value = provenance.get(name)
        if value is None:
            continue
        try:
            text[keyword] = str(value) if name in TEXT_FIELDS else json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"provenance[{name!r}] must be a value that JSON knows, got {value!r}.") from error
    text[XMP_KEYWORD] = (
        '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/">'
        '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description rdf:about="" '
        'xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" xmlns:xmp="http://ns.adobe.com/xap/1.0/" '
        f"Iptc4xmpExt:DigitalSourceType={quoteattr(text['DigitalSourceType'])} "
        f'xmp:CreatorTool={quoteattr(text["Software"])}/></rdf:RDF></x:xmpmeta><?xpacket end="w"?>'
    )
    return text


def provenance_of_text(text: Mapping[str, Any]) -> dict[str, Any]:
    """The values that `png_text` wrote, by name. What it would not write stays text; other keywords are left out."""
    values: dict[str, Any] = {}
    for name, keyword in FIELDS.items():
        value = text.get(keyword)
        if not isinstance(value, str):
            continue
        try:
            values[name] = value if name in TEXT_FIELDS else json.loads(value)
            json.dumps(values[name], allow_nan=False)  # `png_text` writes no NaN
        except (ValueError, RecursionError):
            values[name] = value
    if "digital_source_type" not in values:
        xmp = text.get(XMP_KEYWORD, text.get("xmp", ""))
        xmp = xmp.decode("utf-8", "replace") if isinstance(xmp, bytes) else str(xmp)
        source = re.search(r"DigitalSourceType(?:\s+rdf:resource)?\s*(?:=\s*[\"']|>)\s*([^\"'<\s]+)", xmp)
        if source:
            values["digital_source_type"] = source[1]
    return values


def read_provenance(path: str | os.PathLike) -> dict[str, Any]:
    """The record in the image file `path` of how it was made, with the keys of `FIELDS`; empty if there is no record.

    A file by other software has its `digital_source_type` in the XMP, which is read. Anybody can write or remove such
    metadata: it informs and proves nothing.

    Raises:
        OSError: the file is not there, is not an image, or is one that Pillow refuses to unpack.
    """
    try:
        with Image.open(path) as image:
            image.load()  # text may stand after the pixels
            return provenance_of_text(image.info)
    except (ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise OSError(f"{os.fspath(path)} cannot be read: {error}") from error


def save_images(
    images: Any,
    path_pattern: str | os.PathLike,
    provenance: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
    overwrite: bool = False,
) -> list[Path]:
    """Save images as PNG files that say how they were made.

    They say it as XMP and as plain text: synthetic media by IPTC's digital source type, software, and what is known of
    model, revision, steps, gamma, levels, class and seed. `read_provenance` reads it.

    Args:
        images: a pipeline's output, a PIL image or a list of them, an array (B, H, W, C) or a tensor (B, C, H, W) in
            [0, 1].
        path_pattern: file name, filled by `str.format` with `index`, `seed` and `class_label`: "out/{index:03d}.png" or
            "out/{class_label}-{seed}.png". Folders are made.
        provenance: values by name (see `FIELDS`), for all images or one dict each. They take precedence over those of
            the pipeline's output, and these over what PIL images carry from a pipeline with `add_provenance`. Without
            any, the file says synthetic and by which software.
        overwrite: replace files that exist.

    Returns:
        The paths.

    Raises:
        FileExistsError: a file exists, and `overwrite` is not set. Then nothing is written.
        ValueError: a path that does not end with .png or that two images share, a seed or class that cannot stand in
            it, images of another kind or outside [0, 1], unknown keys, one dict each for another number of images.
    """
    of_output = getattr(images, "provenance", None) or []
    pictures = _pil_images(getattr(images, "images", images))
    given = (
        [provenance or {}] * len(pictures)
        if provenance is None or isinstance(provenance, Mapping)
        else list(provenance)
    )
    if len(given) != len(pictures):
        raise ValueError(f"provenance has {len(given)} entries for {len(pictures)} images; pass one or as many.")
    records = [
        {
            **(provenance_of_text(picture.info) if FIELDS["digital_source_type"] in picture.info else {}),
            **(of_output[i] if i < len(of_output) else {}),
            **given[i],
        }
        for i, picture in enumerate(pictures)
    ]
    texts = [png_text(record) for record in records]
    paths = [_path(path_pattern, i, record) for i, record in enumerate(records)]
    if len(set(paths)) < len(paths):
        raise ValueError(f"path_pattern={str(path_pattern)!r} gives several images one name; put {{index}} in it.")
    for path in paths:
        if path.exists() and not overwrite:
            raise FileExistsError(f"{path} exists; choose another path_pattern, or pass overwrite=True.")
    for picture, text, path in zip(pictures, texts, paths):
        info = PngImagePlugin.PngInfo()
        for keyword, value in text.items():
            (info.add_itxt if keyword == XMP_KEYWORD else info.add_text)(keyword, value)
        with written_aside(path, overwrite) as aside:
            picture.save(aside, format="PNG", pnginfo=info)
    return paths


def _pil_images(images: Any) -> list[Image.Image]:
    if isinstance(images, Image.Image):
        return [images]
    if isinstance(images, (list, tuple)) and all(isinstance(image, Image.Image) for image in images):
        return list(images)
    if isinstance(images, torch.Tensor) and images.ndim == 4:
        images = VaeImageProcessor.pt_to_numpy(images.float())
    if not isinstance(images, np.ndarray) or images.ndim != 4 or images.shape[-1] not in (1, 3):
        shape = getattr(images, "shape", None)
        raise ValueError(
            "images must be PIL images, an array (B, H, W, C) or a tensor (B, C, H, W) with 1 or 3 channels, got "
            f"{type(images).__name__}{'' if shape is None else f' of shape {tuple(shape)}'}."
        )
    if images.dtype.kind != "f" or not ((images >= 0) & (images <= 1)).all():
        raise ValueError("images must be floats in [0, 1]; those of output_type='latent' lie in [-1, 1].")
    return VaeImageProcessor.numpy_to_pil(images)


def _path(pattern: str | os.PathLike, index: int, record: Mapping[str, Any]) -> Path:
    fields = {"index": index, "seed": record.get("seed"), "class_label": record.get("class_label")}
    for name, value in fields.items():  # they may come from a stranger's file and say "../"
        if f"{{{name}" in str(pattern) and not re.fullmatch(r"(?!\.+$)[^/\\:\x00-\x1f]*", str(value)):
            raise ValueError(
                f"{name}={value!r} of the provenance cannot stand in a file name; pass another `provenance`."
            )
    try:
        path = Path(os.fspath(pattern).format(**fields))
    except (KeyError, IndexError, ValueError, TypeError) as error:
        raise ValueError(
            f"path_pattern={str(pattern)!r} cannot be filled with {fields}: {type(error).__name__}: {error}."
        ) from error
    if path.suffix.lower() != ".png":
        raise ValueError(f"path_pattern={str(pattern)!r} must end with .png, the format that carries the text.")
    return path


def fresh_seeds(generator: torch.Generator | list[torch.Generator] | None) -> dict | list[dict]:
    """The seed of a generator, or of each, and its device where that is not the CPU, by the names of `FIELDS`.

    Nothing if something was drawn from it, or is drawn for another image of the list: the seed would not repeat it.
    """
    if isinstance(generator, list):
        return [fresh_seeds(one) if generator.count(one) == 1 else {} for one in generator]
    if generator is None:
        return {}
    seed, device = generator.initial_seed(), generator.device
    start = torch.Generator(device).manual_seed(seed).get_state()
    if not torch.equal(start, generator.get_state()):
        return {}
    return {"seed": seed} if device.type == "cpu" else {"seed": seed, "generator": device.type}


@functools.cache
def _option_names(scheduler_class: type) -> list[str]:
    """Names of the numbers in a scheduler's config that a run depends on, beside those that its record names itself."""
    known = {field.name for field in dataclasses.fields(Preconditioning)}
    known = known - {"sigma_min"} | {"num_train_timesteps", "gamma", "final_sigma", "presets"}
    return [name for name in inspect.signature(scheduler_class.__init__).parameters if name not in known]


def _as_written(values: torch.Tensor) -> list[float]:
    """Float32 numbers in as few digits as tell them from others: 0.7, not 0.699999988."""
    return [float(str(value)) for value in values.numpy()]


def _model_and_revision(pipe: DiffusionPipeline) -> tuple[str | None, str | None]:
    """The pipeline's source: an id of the Hub and its commit, or the name of a folder without its path."""
    name, network = pipe.config.get("_name_or_path"), getattr(pipe.unet.config, "_name_or_path", None)
    commit = re.search(r"[/\\]snapshots[/\\]([0-9a-f]{40})([/\\]|$)", str(network or ""))
    if name is None or not os.path.isdir(name):
        return name, commit and commit[1]
    parts = [part for part in re.split(r"[/\\]", os.path.abspath(name)) if part]
    if len(parts) > 1 and parts[-1] == "pipeline":  # the run above it has the name
        parts.pop()
    return parts[-1] if parts else None, None


def run_records(
    pipe: DiffusionPipeline,
    count: int,
    class_labels: torch.Tensor | None,
    seeds: dict | list[dict] | None,
    changes: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """How each of `count` images was made, by the names of `FIELDS`; what is not known is left out.

    Args:
        seeds: `fresh_seeds` of the run's generator; None if it does not decide the images.
        changes: values that replace those of the scheduler's run.
    """
    scheduler, config, dtype = pipe.scheduler, pipe.scheduler.config, input_dtype(pipe.unet)
    model, revision = _model_and_revision(pipe)
    record = {
        "digital_source_type": pipe._digital_source_type,
        "software": SOFTWARE,
        "model": model,
        "revision": revision,
        "pipeline": type(pipe).__name__,
        "scheduler": type(scheduler).__name__,
        "num_inference_steps": scheduler.num_inference_steps,
        "gamma": _as_written(scheduler.gammas) if jumps(scheduler) else None,
        "sigmas": _as_written(scheduler.sigmas.float().cpu()),
        "scheduler_config": {name: config[name] for name in _option_names(type(scheduler)) if name in config},
        "dtype": None if dtype == torch.float32 else str(dtype).removeprefix("torch."),
        **changes,
    }
    record = {name: value for name, value in record.items() if value is not None}
    labels = None if class_labels is None else class_labels.tolist()  # one transfer
    records = []
    for i in range(count):
        image = {} if labels is None else {"class_label": labels[i]}
        if isinstance(seeds, list):
            image |= seeds[i]
        elif seeds:
            image |= {**seeds, "batch_index": i, "batch_size": count}
        records.append({**record, **image})
    return records
