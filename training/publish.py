"""Publish a pipeline on the Hub with its card: `python -m training.publish runs/digits/pipeline user/name`."""

import json
import os
import re
import shutil
import tempfile
from dataclasses import dataclass
from typing import Any, ClassVar

import diffusers
import torch
from diffusers import DiffusionPipeline

from diffusers_ctm import CTMPipeline
from diffusers_ctm.hub import write_loading_code

from .card import conversion_repo, is_generated, make_card
from .config import Checked, UserError, option, run_program
from .hub import card_licence, commit_folder, error_text, open_repo, present_card, retried
from .record import (
    CONVERSION,
    HUB_ID,
    NOTICE,
    ORIGINS,
    PERMISSIVE,
    RECORD,
    Licence,
    licence_in,
    licence_of,
    public_name,
    read_json,
    strictest,
)


# What of a folder is the pipeline: files of a component, and files beside the components.
COMPONENT_FILES = re.compile(
    r"(config|scheduler_config|preprocessor_config)\.json|(diffusion_pytorch_model|model)[\w.-]*\.safetensors(\.index\.json)?"
)
TOP_FILES = ("model_index.json", RECORD, CONVERSION, NOTICE)
BRANCH = re.compile(r"[\w-][\w./-]*")
PICTURES = ("evaluation.png", "gammas.png", "memorisation.png")
REPORTS = ("evaluation.json", "memorisation.json", "likelihood.json")


@dataclass
class PublishConfig(Checked):
    """Publish the pipeline in FOLDER as NAME on the Hub, with a model card. Checkpoints, logs and unknown files stay.

    Write FOLDER and NAME first: a flag such as --private would take what follows it for its value.
    """

    POSITIONAL: ClassVar[tuple[str, ...]] = ("folder", "name")

    folder: str | None = option(None, "The pipeline's folder: with model_index.json, e.g. runs/digits/pipeline.")
    name: str | None = option(None, "The repository on the Hub, user/name. It is created if it is not there.")
    config: str | None = option(None, "YAML file with any of these options; the command line overrides it.")
    private: bool = option(False, "Create a private repository.")
    license: str | None = option(
        None, "Licence of the weights, as the Hub names it: 'mit', 'cc-by-nc-sa-4.0', ... Default: the teacher's."
    )
    license_name: str | None = option(None, "Name of the licence if --license is 'other'.")
    license_link: str | None = option(None, "Address of the licence if --license is 'other'.")
    overwrite_card: bool = option(False, "Replace the card that is on the Hub even if someone has edited it.")
    revision: str | None = option(None, "Branch to publish on, created if it is not there. Default: main.")
    evaluation: str | None = option(
        None,
        "Folder that training.evaluate, and maybe training.memorisation, wrote. Default: `evaluation` in FOLDER, or beside it if FOLDER is a run's `pipeline`.",
    )
    num_samples: int = option(16, "Samples in the card's picture; 0 is no picture. One is always drawn, as a check.")
    device: str = option("auto", "Where they are drawn: 'auto', 'cpu', 'cuda', 'mps'.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.folder or not self.name:
            raise UserError(
                "FOLDER and NAME are needed: python -m training.publish runs/digits/pipeline user/name. See --help."
            )
        self.check(HUB_ID.fullmatch(self.name) is not None, "name", "a repository on the Hub as user/name")
        revision = self.revision
        self.check(revision is None or BRANCH.fullmatch(revision) is not None, "revision", "the name of a branch")
        self.check_not_negative("num_samples")
        check_licence_name(self.license, "license")
        if self.license == "other" and not (self.license_name and self.license_link):
            raise UserError("--license other needs --license_name and --license_link.")


def check_licence_name(name: str | None, field: str) -> None:
    if name is not None and re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", name) is None:
        raise UserError(
            f"--{field} must be a licence as the Hub names it, e.g. 'mit' or 'cc-by-nc-sa-4.0', got {name!r}."
        )


# The licence ----------------------------------------------------------------------------------------------------------


def teachers_licence(folder: str) -> tuple[Licence | None, str]:
    """The strictest of what the weights in `folder` inherit, and where that is said: records of the run or the conversion, or a card."""
    record, conversion = read_json(folder, RECORD), read_json(folder, CONVERSION)
    origins = []
    for role, title in ORIGINS.items():
        origin = record.get(role) or {}
        repo = origin["name"] if origin.get("on_hub") else None
        origins.append((origin, repo, f"its {title} {origin.get('name')} has that"))
    origins.append((conversion, conversion_repo(conversion), f"{CONVERSION} says so of {conversion.get('source')}"))
    reasons = []
    for origin, repo, reason in origins:
        if (found := licence_of(origin)) is not None:
            reasons.append((found, reason))
        elif repo is not None and (found := card_licence(repo, origin.get("revision"))) is not None:
            reasons.append((found, f"the card of {repo} says so"))
    inherited = strictest(found for found, _ in reasons)
    return next(((found, reason) for found, reason in reasons if found is inherited), (None, ""))


def choose_licence(folder: str, wanted: Licence | None, option_name: str = "license") -> Licence:
    """The licence to publish under. Raises UserError if `wanted` is not what the teacher's allows, or if none is known."""
    inherited, reason = teachers_licence(folder)
    wanted = wanted or licence_of(read_json(folder, RECORD)) or inherited
    if wanted is None:
        raise UserError(
            f"--{option_name} is needed: neither {RECORD} nor {CONVERSION} nor a card on the Hub says the licence of these weights or "
            "of their teacher. Weights that were distilled from others must keep that licence."
        )
    check_inheritance(inherited, reason, wanted)
    return wanted


def check_inheritance(inherited: Licence | None, reason: str, wanted: Licence) -> None:
    """Raise UserError if weights that inherit one licence may not be published under the other."""
    if inherited is None or inherited.id in PERMISSIVE:
        return
    if wanted.id == inherited.id and wanted.name in (None, inherited.name):  # several are "other"
        return
    kind = " (non-commercial)" if re.search(r"(^|-)nc(-|$)", inherited.id) else ""
    raise UserError(
        f"The licence {wanted} contradicts {inherited}{kind}, which these weights have: {reason}. Publish them under {inherited}: leave the "
        "licence out or give that one."
    )


# What is uploaded -----------------------------------------------------------------------------------------------------


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


def load_checked(folder: str, name: str) -> CTMPipeline:
    """Load the pipeline that will be uploaded, without running code of it. `name` is what to call it in a message."""
    try:
        network_class = getattr(diffusers, read_json(folder, "unet/config.json").get("_class_name", "UNet2DModel"))
        _, report = network_class.from_pretrained(folder, subfolder="unet", output_loading_info=True)
        pipe = DiffusionPipeline.from_pretrained(folder)  # which is silent only if it loads the network itself
    except Exception as error:  # diffusers, safetensors and json each raise their own
        raise UserError(
            f"{name} does not load as a pipeline, so nothing was published: {type(error).__name__}: {str(error).replace(folder, name)}"
        ) from error
    if not isinstance(pipe, CTMPipeline):
        raise UserError(f"{name} is a {type(pipe).__name__}; this program publishes CTMPipeline only.")
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report.get(kind):
            raise UserError(
                f"{name} does not load as a pipeline, so nothing was published: unet has {kind.replace('_', ' ')}: {list(report[kind])[:3]}."
            )
    return pipe


def draw_samples(pipe: CTMPipeline, count: int, name: str, device: str) -> tuple[list, str]:
    """At least one image, and how they were drawn. Raises UserError if the pipeline does not sample."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    is_ctm = hasattr(pipe.scheduler, "target_timesteps")
    num_classes = pipe.num_classes
    settings: dict = {"num_inference_steps": 1 if is_ctm else 18, "output_type": "np"}
    if num_classes:
        settings["class_labels"] = [index % num_classes for index in range(max(1, count))]
    try:
        pipe = pipe.to(device)
        pipe.set_progress_bar_config(disable=True)
        images = pipe(batch_size=max(1, count), generator=torch.Generator(device).manual_seed(0), **settings).images
    except Exception as error:
        raise UserError(f"{name} loads but does not sample: {type(error).__name__}: {error}") from error
    if images.min() != images.min() or float(images.std()) == 0.0:
        raise UserError(f"{name} samples images that are not finite or all alike; nothing was published.")
    how = "one step" if is_ctm else "18 steps of Heun's method"
    return pipe.numpy_to_pil(images), how


def add_card(
    target: str, repo: str, licence: Licence, samples: str | None, overwrite: bool, revision: str | None
) -> bool:
    """Write README.md unless the Hub has one that someone has edited; return whether it was written.

    Raises UserError if the card that is kept names a licence that the weights may not have.
    """
    present = present_card(repo, revision)
    if present is not None and not overwrite and not is_generated(present):
        kept = licence_in(present)
        if kept is not None:
            try:
                check_inheritance(licence, "you publish them so, or their teacher has it", kept)
            except UserError as error:
                raise UserError(
                    f"The card of {repo} would be kept, and says otherwise: {error} Correct it there, or give --overwrite_card."
                ) from error
        return False
    with open(os.path.join(target, "README.md"), "w", encoding="utf-8", newline="\n") as file:
        file.write(make_card(target, repo, licence, samples, revision))
    return True


def components(target: str) -> tuple[str, ...]:
    """The folders of a pipeline's components."""
    return tuple(
        name
        for name in sorted(os.listdir(target))
        if name != "evaluation" and os.path.isdir(os.path.join(target, name))
    )


def upload(
    target: str,
    repo: str,
    licence: Licence,
    message: str,
    samples: str | None = None,
    overwrite: bool = False,
    revision: str | None = None,
) -> tuple[str, bool]:
    """Add the card to the staged pipeline and commit all; return the commit's address and whether the card is new."""
    written = add_card(target, repo, licence, samples, overwrite, revision)
    return commit_folder(repo, target, message, components(target), revision), written


def main(config: PublishConfig) -> str:
    """Check, then upload in one commit; return its address."""
    folder, repo = os.path.normpath(config.folder), config.name
    evaluation = config.evaluation
    if evaluation is not None and not os.path.isfile(os.path.join(evaluation, "evaluation.json")):
        raise UserError(f"--evaluation {evaluation} has no evaluation.json of training.evaluate.")
    beside = os.path.join(os.path.dirname(os.path.abspath(folder)), "evaluation")
    if (
        evaluation is None
        and not os.path.isdir(os.path.join(folder, "evaluation"))
        and os.path.basename(folder) == "pipeline"
    ):
        evaluation = beside if os.path.isdir(beside) else None
    with tempfile.TemporaryDirectory(prefix="publish-") as target:
        left_out = stage(folder, target, evaluation)
        pipe = load_checked(target, folder)
        write_loading_code(target, pipe)
        images, how = draw_samples(pipe, config.num_samples, folder, config.device)
        wanted = licence_of(
            {"license": config.license, "license_name": config.license_name, "license_link": config.license_link}
        )
        licence = choose_licence(target, wanted)
        if config.num_samples:
            from .run import enlarged_grid

            columns = min(8, len(images))
            rows = len(images) // columns
            enlarged_grid(images[: rows * columns], rows, columns).save(os.path.join(target, "samples.png"))
        if left_out:
            print(f"Not uploaded: {', '.join(left_out)}")
        try:
            retried(lambda: open_repo(repo, config.private))
            if config.revision not in (None, "main"):
                from .hub import api

                retried(lambda: api().create_branch(repo, branch=config.revision, exist_ok=True))
            address, new_card = retried(
                lambda: upload(
                    target,
                    repo,
                    licence,
                    "Publish the pipeline",
                    how if config.num_samples else None,
                    config.overwrite_card,
                    config.revision,
                )
            )
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"{folder} could not be uploaded to {repo}: {error_text(error)}. The repository is as it was before; run the same command "
                "again, and what has arrived is not sent twice."
            ) from error
    if not new_card:
        print(
            f"Kept the card of {repo}, which was edited there; --overwrite_card replaces it. It must name the licence {licence}."
        )
    print(f"Published {folder} under {licence}: {address}")
    return address


if __name__ == "__main__":
    run_program(main, PublishConfig)
