"""model_card.md filled with records and reports that are handed in."""

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

import diffusers_ctm

from ..cli.files import read_json
from ..cli.names import HUB_ID, public_name
from ..report.tables import distance_table
from .license import Licence, licence_fields, licence_of
from .record import CONVERSION, ORIGINS, RECORD, conversion_repo


TEMPLATE = Path(__file__).resolve().parents[2] / "model_card.md"

MARK = re.compile(r"\n<!-- diffusers-ctm card ([0-9a-f]{16}): replaced when published again, kept if edited -->\n$")

TWEMOJI = "twemoji.parquet"  # as the README has training.emoji write it

CLASS_NAMES = 20  # most that are listed


def is_generated(card: str) -> bool:
    """Whether `card` is as this program wrote it, unedited."""
    mark = MARK.search(card)
    return mark is not None and _digest(card[: mark.start()]) == mark[1]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def make_card(folder: str, repo: str, licence: Licence, samples: str | None = None, revision: str | None = None) -> str:
    """README.md of the pipeline in `folder`, published as `repo`.

    Args:
        folder: with model_index.json, and maybe training.json, conversion.json and evaluation/.
        samples: what samples.png shows, if it is there.
        revision: the branch that it is published on; None is main.
    """
    scheduler = read_json(os.path.join(folder, "scheduler"), "scheduler_config.json")
    unet = read_json(os.path.join(folder, "unet"), "config.json")
    record, conversion = read_json(folder, RECORD), read_json(folder, CONVERSION)
    evaluation = read_json(os.path.join(folder, "evaluation"), "evaluation.json")
    memorisation = read_json(os.path.join(folder, "evaluation"), "memorisation.json")
    index = read_json(folder, "model_index.json")
    names = index.get("id2label") or {}
    is_ctm = unet.get("_class_name") == "CTMUNet2DModel" or scheduler.get("_class_name") == "CTMScheduler"
    dataset = record.get("dataset") or {}
    size = unet.get("sample_size")
    height, width = (size, size) if isinstance(size, int) or size is None else size
    num_classes = unet.get("num_class_embeds") or len(names) or None
    if unet.get("num_class_embeds") and index.get("null_class") is not None:
        num_classes -= 1  # the label that means "no class"
    steps, images = record.get("steps"), record.get("images_per_step")
    versions = ", ".join(f"{_text(name)} {_text(version)}" for name, version in (record.get("versions") or {}).items())
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
        "licence": _licence_text(licence),
        "samples": samples,
        "teacher": _source_text(record, conversion),
        "teacher_licence": _text(licence_of(record.get("teacher")) or licence_of(conversion) or ""),
        "first_stage": _origin_text(record.get("first_stage") or {}),
        "first_stage_licence": _text(licence_of(record.get("first_stage")) or ""),
        "conversion": f"Converted from {_text(conversion['family'])} weights." if conversion.get("family") else "",
        "dataset": _dataset_text(dataset),
        "trained": bool(record),
        "training": f"{_text(record.get('program'))}, {steps:,} steps of {images:,} images; {versions}"
        if steps and images
        else "",
        "distance": _distance_text(record.get("distance") or {}),
        "options": sorted((_code(name), _code(value)) for name, value in (record.get("options") or {}).items()),
        "evaluation_table": _table(evaluation),
        "features": _features(evaluation),
        "num_samples": f"{evaluation.get('num_samples', 0):,}",
        "plot": os.path.isfile(os.path.join(folder, "evaluation", "evaluation.png")),
        "gammas": os.path.isfile(os.path.join(folder, "evaluation", "gammas.png")),
        "memorisation": _memorisation_text(memorisation),
        "neighbours": os.path.isfile(os.path.join(folder, "evaluation", "memorisation.png")),
        "version": diffusers_ctm.__version__,
    }
    data = card_data(repo, licence, is_ctm, record, conversion, dataset, evaluation)
    text = ModelCard.from_template(data, template_str=TEMPLATE.read_text(encoding="utf-8"), **values).content
    text = text.rstrip() + "\n"
    return f"{text}\n<!-- diffusers-ctm card {_digest(text)}: replaced when published again, kept if edited -->\n"


def _text(value: Any) -> str:
    """`value`, which someone else may have written, as one line that is no markdown."""
    line = " ".join("".join(c if c.isprintable() else " " for c in str(value)).split())
    return re.sub(r"([\\`*\[\]<>|])", r"\\\1", line)


def _code(value: Any) -> str:
    """`value` in backticks, on one line, in a table too."""
    line = "".join(c if c.isprintable() else " " for c in str(value)).replace("`", "'")
    return "`" + line.replace("|", r"\|") + "`"


def base_model(record: dict, conversion: dict) -> str | None:
    """The Hub id that the weights come from, if it is known."""
    for role in ORIGINS:
        origin = record.get(role) or {}
        if origin.get("on_hub"):
            return origin["name"]
    return conversion_repo(conversion)


def card_data(
    repo: str, licence: Licence, is_ctm: bool, record: dict, conversion: dict, dataset: dict, evaluation: dict
) -> ModelCardData:
    """The metadata, as the Hub reads it."""
    source = base_model(record, conversion)
    trained = any(
        record.get(role) for role in ORIGINS
    )  # the Hub has no relation "distilled"; a student starts as its teacher
    results = _results(evaluation, dataset)
    return ModelCardData(
        **licence_fields(licence),
        library_name="diffusers",
        pipeline_tag="unconditional-image-generation",
        base_model=source,
        base_model_relation="finetune" if source and trained else None,
        datasets=[dataset["name"]] if dataset.get("on_hub") else None,
        tags=[
            "diffusers-ctm",
            *(["consistency-trajectory-model", "ctm", "few-step"] if is_ctm else ["edm", "diffusion"]),
        ],
        eval_results=results or None,
        model_name=repo.split("/")[-1] if results else None,
    )


def _results(evaluation: dict, dataset: dict) -> list[EvalResult]:
    """Frechet distances for `model-index`: of the CTM where there is one, else of the other sampler."""
    reference = _public_dataset(evaluation, dataset)
    rows = [row for row in evaluation.get("results") or [] if isinstance(row.get("frechet"), dict)]
    ours = [row for row in rows if row["sampler"] == "ctm"] or rows
    features = _features(evaluation)
    found = []
    for row in ours:
        gamma = "" if row["gamma"] is None else f", gamma {row['gamma']:g}"
        steps = f"{row['steps']} step{'' if row['steps'] == 1 else 's'}{gamma}"
        found.append(
            EvalResult(
                task_type="unconditional-image-generation",
                task_name="Unconditional Image Generation",
                dataset_type=reference,
                dataset_name=reference,
                dataset_config=(evaluation.get("options") or {}).get("dataset_config_name"),
                dataset_split=(evaluation.get("options") or {}).get("dataset_split"),
                metric_type="frechet_distance",
                metric_name=f"Frechet distance, {steps}, features {features}",
                metric_value=round(row["frechet"]["mean"], 6),
            )
        )
    return found


def _features(evaluation: dict) -> str:
    return public_name(str((evaluation.get("features") or {}).get("name") or "unknown"))


def _public_dataset(evaluation: dict, dataset: dict) -> str:
    return public_name(str((evaluation.get("reference") or {}).get("dataset_name") or dataset.get("name") or "unknown"))


def _table(evaluation: dict) -> str:
    if not evaluation:
        return ""
    return "\n".join(distance_table(evaluation, "frechet"))


def _memorisation_text(report: dict) -> str:
    """What training.memorisation measured, on pixels, in sentences."""
    if not report:
        return ""

    def values(row: dict) -> str:
        pixels = row["pixels"]
        copies = f"{pixels['copies']:.1%} of {row['num_images']:,}"
        return f"{row['name']}: {pixels['median']:.1f}, {copies}"

    rows = "; ".join(values(row) for row in report["results"])
    return (
        f"Median distance to the nearest of {report['num_training_images']:,} training images (root mean square of pixels in 0..255), and share "
        f"of copies, which are nearer than a third of the distance to the second nearest: {rows}."
    )


def _licence_text(licence: Licence) -> str:
    """As a link to the web or into the repository, if it has one."""
    name = _text(licence.name or licence.id)
    is_link = licence.link and re.fullmatch(r"(https?://)?[\w./~%#?=&+-]+", licence.link)
    return f"[{name}]({licence.link})" if is_link else name


def _class_names(names: dict[str, str]) -> str:
    listed = [str(name) for _, name in sorted(names.items(), key=lambda item: int(item[0]))]
    more = ", ..." if len(listed) > CLASS_NAMES else ""
    return ", ".join(map(_code, listed[:CLASS_NAMES])) + more


def _source_text(record: dict, conversion: dict) -> str:
    if record.get("teacher"):
        return _origin_text(record["teacher"])
    return _code(conversion["source"]) if conversion.get("source") else ""


def _origin_text(origin: dict) -> str:
    """A teacher or a first stage, as a link if it is on the Hub."""
    if not origin.get("name"):
        return ""
    name = origin["name"]
    is_link = origin.get("on_hub") and HUB_ID.fullmatch(name)
    text = f"[{name}](https://huggingface.co/{name})" if is_link else _code(name)
    return text + (f", commit {_code(origin['revision'])}" if origin.get("revision") else "")


def _dataset_text(dataset: dict) -> str:
    if not dataset.get("name"):
        return ""
    name = dataset["name"]
    if name == "digits":
        return "scikit-learn's 1,797 handwritten digits (E. Alpaydin and C. Kaynak, UCI, CC BY 4.0)"
    if name == TWEMOJI:
        return (
            "[Twemoji](https://github.com/jdecked/twemoji)'s graphics, copyright Twitter, Inc and other contributors, "
            "[CC BY 4.0](https://creativecommons.org/licenses/by/4.0/), made smaller and laid on white"
        )
    is_link = dataset.get("on_hub") and HUB_ID.fullmatch(name)
    text = f"[{name}](https://huggingface.co/datasets/{name})" if is_link else _code(name)
    return text + (f", split {_code(dataset['split'])}" if dataset.get("split") else "")


def _distance_text(distance: dict) -> str:
    """`name` and what else the record of a distance says."""
    details = ", ".join(f"{_text(name)} {_text(value)}" for name, value in distance.items() if name != "name")
    return f"{_code(distance['name'])}{f' ({details})' if details else ''}" if distance.get("name") else ""


def _parameters(folder: str) -> str:
    """How many numbers the weights hold, from the headers of the files: nothing is loaded."""
    total = 0
    for path in Path(folder, "unet").glob("*.safetensors"):
        with open(path, "rb") as file:
            header: dict[str, Any] = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        for name, entry in header.items():
            if name != "__metadata__":
                count = 1
                for side in entry["shape"]:
                    count *= side
                total += count
    return f"{total / 1e6:.2f} M"
