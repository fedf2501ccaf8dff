# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""model_card.md filled with a pipeline's records and reports."""

import hashlib
import math
import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from safetensors import safe_open

import diffusers_ctm
from diffusers_ctm.autoencoder import downscale

from ..cli.files import read_json
from ..cli.names import HUB_ID
from ..report.tables import distance_table, setting_name
from .license import License, license_fields, license_of
from .record import ORIGINS, origins_of


TEMPLATE = Path(__file__).resolve().parents[2] / "model_card.md"

MARK = re.compile(r"\n<!-- diffusers-ctm card ([0-9a-f]{16}): replaced when published again, kept if edited -->\n$")

ATTRIBUTIONS = {  # of data sets
    "digits": "scikit-learn's 1,797 handwritten digits (E. Alpaydin and C. Kaynak, UCI, CC BY 4.0)",
    "twemoji.parquet": (  # as docs/evaluation.md has training.emoji write it
        "[Twemoji](https://github.com/jdecked/twemoji)'s graphics, copyright Twitter, Inc and other contributors, "
        "[CC BY 4.0](https://creativecommons.org/licenses/by/4.0/), made smaller and laid on white"
    ),
}


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
    evaluation = read_json(measured, "evaluation.json")
    index = read_json(folder, "model_index.json")
    names = index.get("id2label") or {}
    is_ctm = unet.get("_class_name") == "CTMUNet2DModel" or scheduler.get("_class_name") == "CTMScheduler"
    size, vae = unet.get("sample_size"), read_json(folder, "vae/config.json")
    height, width = size if isinstance(size, list) else (size, size)
    if vae and size:
        height, width = (downscale(SimpleNamespace(config=vae)) * side for side in (height, width))
    num_classes = unet.get("num_class_embeds") or len(names) or None
    if unet.get("num_class_embeds") and index.get("null_class") is not None:
        num_classes -= 1  # the label that means "no class"
    teacher, first_stage = record.get("teacher") or {}, record.get("first_stage") or {}
    guidance_teacher = record.get("guidance_teacher") or {}
    autoencoder = origins_of(record, conversion)[ORIGINS["vae"]]
    values = {
        "title": repo.split("/")[-1],
        "repo": repo,
        "revision": None if revision == "main" else revision,
        "is_ctm": is_ctm,
        "presets": ", ".join(sorted(scheduler.get("presets") or {}, key=int)),
        "size": f"{width}x{height} pixels",
        "channels": vae.get("in_channels") or unet.get("out_channels", 3),
        "num_classes": num_classes,
        "class_names": [_code(names[number]) for number in sorted(names, key=int)],
        "example_class": "class_labels=0" if num_classes else "",
        "parameters": _parameters(folder),
        "license": _license_text(license),
        "samples": samples,
        "record": record,
        "teacher": teacher or {"name": conversion.get("source")},
        "teacher_license": license_of(teacher) or license_of(conversion),
        "guidance_scale": (record.get("options") or {}).get("teacher_guidance_scale"),
        "guidance_teacher": guidance_teacher,
        "guidance_teacher_license": license_of(guidance_teacher),
        "first_stage": first_stage,
        "vae": autoencoder,
        "vae_license": license_of(autoencoder),
        "first_stage_license": license_of(first_stage),
        "conversion": conversion,
        "dataset": record.get("dataset") or {},
        "attributions": ATTRIBUTIONS,
        "objective": " ".join(map(str, record.get("objective") or [])),
        "pool_size": record.get("pool_size"),
        "distance": record.get("distance") or {},
        "options": sorted((record.get("options") or {}).items()),
        "evaluation_table": "\n".join(distance_table(evaluation, "frechet")) if evaluation else "",
        "features": _features(evaluation),
        "num_samples": f"{evaluation.get('num_samples', 0):,}",
        "plot": os.path.isfile(os.path.join(measured, "evaluation.png")),
        "gammas": os.path.isfile(os.path.join(measured, "gammas.png")),
        "memorization": read_json(measured, "memorization.json"),
        "neighbors": os.path.isfile(os.path.join(measured, "memorization.png")),
        "version": diffusers_ctm.__version__,
        "text": _text,
        "code": _code,
        "link": _link,
    }
    data = card_data(repo, license, is_ctm, record, conversion, evaluation)
    card = ModelCard.from_template(data, template_str=TEMPLATE.read_text(encoding="utf-8"), **values).content
    card = card.rstrip() + "\n"
    return f"{card}\n<!-- diffusers-ctm card {_digest(card)}: replaced when published again, kept if edited -->\n"


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
    origins = origins_of(record, conversion)
    for role in ("guidance_teacher", "vae"):  # the weights of the network are not made from theirs
        del origins[ORIGINS[role]]
    sources = [origin["name"] for origin in origins.values() if origin.get("on_hub")]
    # The Hub has no relation "distilled"; a student starts as its teacher.
    trained = any(record.get(role) for role in ("teacher", "first_stage"))
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
    return [
        EvalResult(
            task_type="unconditional-image-generation",
            task_name="Unconditional Image Generation",
            dataset_type=name,
            dataset_name=name,
            dataset_config=options.get("dataset_config_name"),
            dataset_split=options.get("dataset_split"),
            metric_type="frechet_distance",
            metric_name=f"Frechet distance, {setting_name('ctm', row['steps'], row['gamma'])}, "
            f"features {_features(evaluation)}",
            metric_value=round(row["frechet"]["mean"], 6),
        )
        for row in [row for row in rows if row["sampler"] == "ctm"] or rows
    ]


def _features(evaluation: dict[str, Any]) -> str:
    return (evaluation.get("features") or {}).get("name") or "unknown"


def _license_text(license: License) -> str:
    """As a link to the web or into the repository, if it has one."""
    name = _text(license.name or license.id)
    is_link = license.link and re.fullmatch(r"(https?://)?[\w./~%#?=&+-]+", license.link)
    return f"[{name}]({license.link})" if is_link else name


def _link(source: dict[str, Any], kind: str = "") -> str:
    """The name of a model, or of a data set (`kind` is "datasets/"), as a link if it is on the Hub."""
    name = source["name"]
    is_link = source.get("on_hub") and HUB_ID.fullmatch(name)
    return f"[{name}](https://huggingface.co/{kind}{name})" if is_link else _code(name)


def _parameters(folder: str) -> str:
    """How many numbers the weights hold, by the headers of the files: nothing is loaded."""
    total = 0
    for path in Path(folder, "unet").glob("*.safetensors"):
        with safe_open(path, "numpy") as file:
            total += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())
    return f"{total / 1e6:.2f} M"
