# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""model_card.md filled with a pipeline's records and reports."""

import hashlib
import math
import os
import re
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from safetensors import safe_open

import diffusers_ctm

from ..cli.files import read_json
from ..cli.names import HUB_ID
from ..report.tables import distance_table
from .license import License, license_fields, license_of
from .record import ORIGINS, origins_of


TEMPLATE = Path(__file__).resolve().parents[2] / "model_card.md"

MARK = re.compile(r"\n<!-- diffusers-ctm card ([0-9a-f]{16}): replaced when published again, kept if edited -->\n$")

DATASETS = {
    "digits": "scikit-learn's 1,797 handwritten digits (E. Alpaydin and C. Kaynak, UCI, CC BY 4.0)",
    "twemoji.parquet": (  # as the README has training.emoji write it
        "[Twemoji](https://github.com/jdecked/twemoji)'s graphics, copyright Twitter, Inc and other contributors, "
        "[CC BY 4.0](https://creativecommons.org/licenses/by/4.0/), made smaller and laid on white"
    ),
}

CLASS_NAMES = 20  # the most that are listed


def is_generated(card: str) -> bool:
    """Whether `card` is as this program wrote it, unedited."""
    mark = MARK.search(card)
    return mark is not None and _digest(card[: mark.start()]) == mark[1]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def make_card(
    folder: str,
    repo: str,
    license: License,
    record: dict[str, Any],
    conversion: dict[str, Any],
    samples: str | None = None,
    revision: str | None = None,
) -> str:
    """README.md of the pipeline in `folder`, published as `repo`.

    Args:
        folder: with model_index.json, and maybe evaluation/; staged, so that its reports name no local folder.
        record: content of training.json, {} if there is none.
        conversion: content of conversion.json, {} if there is none.
        samples: words on the samples in samples.png, if it is there.
        revision: the branch that it is published on; None is main.
    """
    scheduler, unet = read_json(folder, "scheduler/scheduler_config.json"), read_json(folder, "unet/config.json")
    measured = os.path.join(folder, "evaluation")
    evaluation, memorization = read_json(measured, "evaluation.json"), read_json(measured, "memorization.json")
    index = read_json(folder, "model_index.json")
    names = index.get("id2label") or {}
    is_ctm = unet.get("_class_name") == "CTMUNet2DModel" or scheduler.get("_class_name") == "CTMScheduler"
    size = unet.get("sample_size")
    height, width = size if isinstance(size, list) else (size, size)
    num_classes = unet.get("num_class_embeds") or len(names) or None
    if unet.get("num_class_embeds") and index.get("null_class") is not None:
        num_classes -= 1  # the label that means "no class"
    teacher, first_stage = record.get("teacher") or {}, record.get("first_stage") or {}
    source = _origin_text(teacher) if teacher else _code(conversion["source"]) if conversion.get("source") else ""
    values = {
        "title": repo.split("/")[-1],
        "repo": repo,
        "revision": None if revision == "main" else revision,
        "is_ctm": is_ctm,
        "presets": ", ".join(sorted(scheduler.get("presets") or {}, key=int)),
        "size": f"{width}x{height} pixels",
        "channels": unet.get("out_channels", 3),
        "num_classes": num_classes,
        "class_names": _class_names(names),
        "example_class": "class_labels=0" if num_classes else "",
        "parameters": _parameters(folder),
        "licence": _license_text(license),
        "samples": samples,
        "teacher": source,
        "teacher_licence": _text(license_of(teacher) or license_of(conversion) or ""),
        "first_stage": _origin_text(first_stage),
        "first_stage_licence": _text(license_of(first_stage) or ""),
        "conversion": f"Converted from {_text(conversion['family'])} weights." if conversion.get("family") else "",
        "dataset": _dataset_text(record.get("dataset") or {}),
        "trained": bool(record),
        "training": _training_text(record),
        "distance": _distance_text(record.get("distance") or {}),
        "options": sorted((_code(name), _code(value)) for name, value in (record.get("options") or {}).items()),
        "evaluation_table": "\n".join(distance_table(evaluation, "frechet")) if evaluation else "",
        "features": _features(evaluation),
        "num_samples": f"{evaluation.get('num_samples', 0):,}",
        "plot": os.path.isfile(os.path.join(measured, "evaluation.png")),
        "gammas": os.path.isfile(os.path.join(measured, "gammas.png")),
        "memorisation": _memorization_text(memorization),
        "neighbours": os.path.isfile(os.path.join(measured, "memorization.png")),
        "version": diffusers_ctm.__version__,
    }
    data = card_data(repo, license, is_ctm, record, conversion, evaluation)
    text = ModelCard.from_template(data, template_str=TEMPLATE.read_text(encoding="utf-8"), **values).content
    text = text.rstrip() + "\n"
    return f"{text}\n<!-- diffusers-ctm card {_digest(text)}: replaced when published again, kept if edited -->\n"


def _text(value: Any) -> str:
    """`value`, which someone else may have written, as one line without markdown."""
    line = " ".join("".join(c if c.isprintable() else " " for c in str(value)).split())
    return re.sub(r"([\\`*\[\]<>|])", r"\\\1", line)


def _code(value: Any) -> str:
    """`value` in backticks, on one line, in a table too."""
    line = "".join(c if c.isprintable() else " " for c in str(value)).replace("`", "'")
    return "`" + line.replace("|", r"\|") + "`"


def card_data(
    repo: str,
    license: License,
    is_ctm: bool,
    record: dict[str, Any],
    conversion: dict[str, Any],
    evaluation: dict[str, Any],
) -> ModelCardData:
    """The metadata, as the Hub reads it."""
    sources = [origin["name"] for origin in origins_of(record, conversion).values() if origin.get("on_hub")]
    # The Hub has no relation "distilled"; a student starts as its teacher.
    trained = any(record.get(role) for role in ORIGINS)
    dataset = record.get("dataset") or {}
    results = _results(evaluation, dataset)
    kind = ["consistency-trajectory-model", "ctm", "few-step"] if is_ctm else ["edm", "diffusion"]
    return ModelCardData(
        **license_fields(license),
        library_name="diffusers",
        pipeline_tag="unconditional-image-generation",
        base_model=sources[0] if sources else None,
        base_model_relation="finetune" if sources and trained else None,
        datasets=[dataset["name"]] if dataset.get("on_hub") else None,
        tags=["diffusers-ctm", *kind],
        eval_results=results or None,
        model_name=repo.split("/")[-1] if results else None,
    )


def _results(evaluation: dict[str, Any], dataset: dict[str, Any]) -> list[EvalResult]:
    """Frechet distances for `model-index`: of the CTM where there is one, else of the other sampler."""
    name = (evaluation.get("reference") or {}).get("dataset_name") or dataset.get("name") or "unknown"
    options = evaluation.get("options") or {}
    rows = [row for row in evaluation.get("results") or [] if isinstance(row.get("frechet"), dict)]
    results = []
    for row in [row for row in rows if row["sampler"] == "ctm"] or rows:
        gamma = "" if row["gamma"] is None else f", gamma {row['gamma']:g}"
        steps = f"{row['steps']} step{'' if row['steps'] == 1 else 's'}{gamma}"
        results.append(
            EvalResult(
                task_type="unconditional-image-generation",
                task_name="Unconditional Image Generation",
                dataset_type=name,
                dataset_name=name,
                dataset_config=options.get("dataset_config_name"),
                dataset_split=options.get("dataset_split"),
                metric_type="frechet_distance",
                metric_name=f"Frechet distance, {steps}, features {_features(evaluation)}",
                metric_value=round(row["frechet"]["mean"], 6),
            )
        )
    return results


def _features(evaluation: dict[str, Any]) -> str:
    return (evaluation.get("features") or {}).get("name") or "unknown"


def _memorization_text(report: dict[str, Any]) -> str:
    """The measurements of training.memorization on pixels, in sentences."""
    if not report:
        return ""
    rows = [
        f"{row['name']}: {row['pixels']['median']:.1f}, {row['pixels']['copies']:.1%} of {row['num_images']:,}"
        for row in report["results"]
    ]
    return (
        f"Median distance to the nearest of {report['num_training_images']:,} training images (root mean square of "
        "pixels in 0..255), and share of copies, which are nearer than a third of the distance to the second nearest: "
        f"{'; '.join(rows)}."
    )


def _license_text(license: License) -> str:
    """As a link to the web or into the repository, if it has one."""
    name = _text(license.name or license.id)
    is_link = license.link and re.fullmatch(r"(https?://)?[\w./~%#?=&+-]+", license.link)
    return f"[{name}]({license.link})" if is_link else name


def _class_names(names: dict[str, str]) -> str:
    listed = [_code(names[number]) for number in sorted(names, key=int)]
    return ", ".join(listed[:CLASS_NAMES] + ["..."] * (len(listed) > CLASS_NAMES))


def _origin_text(origin: dict[str, Any]) -> str:
    """A teacher or a first stage, with its commit."""
    if not origin.get("name"):
        return ""
    commit = f", commit {_code(origin['revision'])}" if origin.get("revision") else ""
    return _link_text(origin, "") + commit


def _link_text(source: dict[str, Any], kind: str) -> str:
    """The name of a model or of a data set, as a link if it is on the Hub."""
    name = source["name"]
    is_link = source.get("on_hub") and HUB_ID.fullmatch(name)
    return f"[{name}](https://huggingface.co/{kind}{name})" if is_link else _code(name)


def _dataset_text(dataset: dict[str, Any]) -> str:
    if not dataset.get("name"):
        return ""
    if dataset["name"] in DATASETS:
        return DATASETS[dataset["name"]]
    return _link_text(dataset, "datasets/") + (f", split {_code(dataset['split'])}" if dataset.get("split") else "")


def _training_text(record: dict[str, Any]) -> str:
    steps, images = record.get("steps"), record.get("images_per_step")
    if not steps or not images:
        return ""
    versions = ", ".join(f"{_text(name)} {_text(version)}" for name, version in (record.get("versions") or {}).items())
    return f"{_text(record.get('program'))}, {steps:,} steps of {images:,} images; {versions}"


def _distance_text(distance: dict[str, Any]) -> str:
    """`name`, and what else the record of a distance says."""
    if not distance.get("name"):
        return ""
    details = ", ".join(f"{_text(name)} {_text(value)}" for name, value in distance.items() if name != "name")
    return f"{_code(distance['name'])} ({details})" if details else _code(distance["name"])


def _parameters(folder: str) -> str:
    """How many numbers the weights hold, by the headers of the files: nothing is loaded."""
    total = 0
    for path in Path(folder, "unet").glob("*.safetensors"):
        with safe_open(path, "numpy") as file:
            total += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())
    return f"{total / 1e6:.2f} M"
