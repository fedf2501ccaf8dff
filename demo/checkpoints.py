# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints of the page, with their teacher, evaluation and license."""

import copy
import math
import os
import threading
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from PIL import Image

from diffusers_ctm import CTMPipeline
from diffusers_ctm.scheduling_karras import jumps
from training.cli.errors import UserError, loading
from training.cli.files import read_json
from training.cli.names import public_name
from training.cli.weights import load_pipeline
from training.data.sources import digits
from training.hub.client import file_of
from training.hub.license import license_in

from . import recipes
from .turns import STOPPED, TURN, Superseded


ROOT = Path(__file__).parents[1]

MOST_SIDE = 512  # pixels of a checkpoint's images

SMALL = 10_000_000  # parameters, below which one thread is as fast as several, and much faster beside others

EVERY_CLASS = "all"

EXAMPLES = 32  # real images whose likelihood is computed for comparison


@dataclass
class Checkpoint:
    """A CTM as the page uses it.

    Args:
        source: a Hub id, or a folder without the path to it, as the shown Python names it.
        pipe: is never sampled; `fresh` copies it.
        teacher: (source, pipeline) of the teacher, if it lies beside the checkpoint.
        evaluation: the report of `training.evaluate`; empty if the checkpoint carries none.
        likelihood: (words for the images, bits per dimension of each) from `training.likelihood`, if it carries them.
        notice: license, attribution and warnings, in Markdown.
        dataset: name of the training data, "" if unknown.
    """

    source: str
    pipe: CTMPipeline
    teacher: tuple[str, CTMPipeline] | None = None
    evaluation: dict = field(default_factory=dict)
    likelihood: tuple[str, list[float]] | None = None
    notice: str = ""
    dataset: str = ""
    calls: threading.local = field(default_factory=threading.local, repr=False)

    def __post_init__(self):
        for pipe in (self.pipe, *(self.teacher or ())[1:]):
            pipe.unet.register_forward_pre_hook(self._count)

    def _count(self, *_):
        self.calls.count = getattr(self.calls, "count", 0) + 1
        if TURN.get() in STOPPED:
            raise Superseded

    @property
    def name(self) -> str:
        """Its name in the page, its links and its API."""
        return self.source.rstrip("/").rsplit("/", 1)[-1] if self.source.startswith("assets/") else self.source

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of its images, in PIL's order."""
        return tuple(reversed(self.pipe.image_size))

    @property
    def channels(self) -> int:
        return self.pipe.image_channels

    @property
    def classes(self) -> list[str]:
        """Name or number of each class, with its number if others have the name; empty for an unconditional one."""
        given = {int(k): str(v) for k, v in (self.pipe.config.id2label or {}).items()}
        names = [given.get(k, str(k)) for k in range(self.pipe.num_classes or 0)]
        taken = Counter([EVERY_CLASS, *names])
        return [name if taken[name] == 1 else f"{name} ({k})" for k, name in enumerate(names)]

    @property
    def offered(self) -> list[str]:
        """Those of `classes` that had images in training."""
        return [self.classes[k] for k in self.pipe.classes or []]

    @property
    def presets(self) -> list[int]:
        """Numbers of steps for which the checkpoint carries a tuned schedule."""
        return sorted(map(int, self.pipe.scheduler.config.get("presets") or {}))

    @cached_property
    def classifier(self) -> tuple[str, list[str]] | None:
        """(Folder, classes) of the shipped classifier of these images; assets/digits-ctm has assets/digits-features."""
        folder = f"{self.source.removesuffix('-ctm')}-features"
        config = read_json(ROOT / folder, "config.json") if folder.startswith("assets/") else {}
        names = self.classes or [str(k) for k in range(config.get("num_classes", 0))]
        network = [config.get(name) for name in ("channels", "resolution", "resolution", "num_classes")]
        return (folder, names) if network == [self.channels, *self.size, len(names)] else None

    def fresh(self, pipe: CTMPipeline | None = None) -> CTMPipeline:
        """A pipeline for one request, which may put another scheduler in place; the networks are shared."""
        return copy.copy(pipe or self.pipe)

    @cached_property
    def examples(self) -> tuple[str, list[Image.Image], list[int] | None]:
        """(Words for them, images, classes): of the data set for digits, else samples of the checkpoint in 18 steps."""
        classes = self.pipe.classes
        if self.dataset == "digits":
            data = digits()[:EXAMPLES]
            return "images of the data set", data["image"], data["label"] if classes else None
        labels = classes and [classes[k * len(classes) // EXAMPLES] for k in range(EXAMPLES)]
        images = recipes.sample(self.fresh(), labels, 18, 0.0, range(EXAMPLES)).images
        return "samples of this checkpoint", images, labels


CHECKPOINTS: dict[str, Checkpoint] = {}  # by name; `app.py` fills it


def shipped() -> list[str]:
    """The CTMs in the folder assets, MNIST first."""
    ours = ["diffusers_ctm", "CTMScheduler"]
    folders = [index.parent for index in (ROOT / "assets").glob("*/model_index.json")]
    names = [f"assets/{one.name}" for one in folders if read_json(one, "model_index.json").get("scheduler") == ours]
    return sorted(names, key=lambda name: (name != "assets/mnist-ctm", name))


def load(source: str) -> Checkpoint:
    """The CTM in a folder or repository on the Hub. Code in it does not run.

    Raises:
        UserError: it cannot be loaded, or the page cannot show its images.
    """
    folder = ROOT / source if source.startswith("assets/") and not os.path.isdir(source) else Path(source)
    place = str(folder) if folder.is_dir() else source
    advice = "It must be the folder of a CTM, or its repository on the Hub (which needs a network the first time)."
    pipe = load_pipeline(source, place, advice)
    if not isinstance(pipe, CTMPipeline) or not jumps(pipe.scheduler):
        raise UserError(
            f"{source} is no CTM but a {type(pipe).__name__} with {type(getattr(pipe, 'scheduler', None)).__name__}. "
            f"Distill it first: python -m training.train_ctm --teacher {source}"
        )
    size, channels = pipe.image_size, pipe.image_channels
    if channels not in (1, 3) or size is None or max(size) > MOST_SIDE:
        raise UserError(
            f"{source} makes images of {channels} channels and {size or 'any'} pixels; the page shows gray and color "
            f"images of one size up to {MOST_SIDE} pixels."
        )
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    pipe.unet.requires_grad_(False)

    record = _json_beside(place, "training.json")
    shown = public_name(source) if os.path.isabs(source) else source
    teacher, name = None, Path(_name_in(record, "teacher")).name
    beside = folder.parent / name
    if folder.is_dir() and name and (beside / "model_index.json").is_file():
        with loading(f"The teacher {name} beside {source}"):
            other = load_pipeline(f"The teacher {name} beside {source}", str(beside)).to(pipe.device)
            fits = isinstance(other, CTMPipeline) and other.image_size == pipe.image_size
            if not fits or other.num_classes != pipe.num_classes:
                raise ValueError("its images or classes are not those of the CTM")
            teacher = (f"{os.path.dirname(shown)}/{name}".lstrip("/"), other)
    evaluation = _json_beside(place, "evaluation/evaluation.json")
    likelihood = _likelihood(_json_beside(place, "evaluation/likelihood.json"))
    return Checkpoint(
        shown, pipe, teacher, evaluation, likelihood, _notice(pipe, record, place), _name_in(record, "dataset")
    )


def _likelihood(report: dict) -> tuple[str, list[float]] | None:
    """`Checkpoint.likelihood` from likelihood.json; None if that is missing or from another program."""
    try:
        row = next(one for one in report["results"] if (one["sampler"], one["method"]) == ("ctm", "ode"))
        bits = [float(one) for one in row["images"]]
        name = Path(str(report["options"]["dataset_name"])).stem
    except (KeyError, TypeError, ValueError, StopIteration):
        return None
    return (f"images of the data set {name}", bits) if bits and all(map(math.isfinite, bits)) else None


def _json_beside(place: str, name: str) -> dict:
    """The JSON file `name` of a folder or repository; empty if there is none."""
    return read_json("", file_of(place, name) or "")


def _name_in(record: dict, key: str) -> str:
    return str((record.get(key) or {}).get("name") or "")


def _notice(pipe: CTMPipeline, record: dict, place: str) -> str:
    """License, attribution and warnings, in Markdown."""
    card, notice = (file_of(place, name) for name in ("README.md", "NOTICE.md"))
    lines = ["The images are synthetic: say so where you show them."]
    license = (license_in(Path(card).read_text(encoding="utf-8")) if card else None) or record.get("license")
    if license:
        lines.append(f"License of the weights: {license}.")
    if notice:
        lines.append(Path(notice).read_text(encoding="utf-8")[:2000].strip())
    if pipe.safety_checker is not None:
        lines.append("A safety checker looks at each image; what it flags is returned black.")
    elif pipe.config.requires_safety_checker:
        lines.append("**This checkpoint asks for a safety checker and has none: its images are shown unchecked.**")
    return " ".join(lines)
