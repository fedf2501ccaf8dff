"""Measure a CTM over steps and gamma, beside its teacher: `python -m training.evaluate --model runs/digits/pipeline`."""

import datetime
import io
import json
import math
import os
import platform
import statistics
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import diffusers
import torch
import torchmetrics
from diffusers import CMStochasticIterativeScheduler, DiffusionPipeline
from diffusers.utils import logging
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance
from tqdm.auto import tqdm

import diffusers_ctm
from diffusers_ctm import CTMPipeline

from .config import DataOptions, TeacherOptions, UserError, option, run_program
from .data import ImageDataset
from .features import FEATURES_HELP, load_feature_network
from .files import check_writable, write_files
from .run import enlarged_grid
from .teacher import ctm_of_consistency_model, teacher_of



logger = logging.get_logger(__name__)

MOST_SAMPLES = 10_000  # of the default of --num_samples
KERNEL_SUBSET = 2_000  # most images of one kernel distance; its time grows with the square


@dataclass
class EvaluateConfig(TeacherOptions, DataOptions):
    """Sample over steps and gamma, compare with real images, and write table, plot and pictures."""

    config: str | None = option(None, "YAML file with any of these options; the command line overrides it.")
    model: str | None = option(
        None,
        "The CTM: a folder or a repository on the Hub (with --gammas 1 also a consistency model). Default: the teacher alone.",
    )
    teacher: str | None = option(None, "A diffusion model to sample with Heun's method, likewise. Default: none.")
    output_dir: str = option("runs/evaluation", "Folder for evaluation.json, .md, .png and gammas.png; others stay.")
    steps: list[int] = option([1, 2, 4, 8, 18], "Numbers of steps of the CTM; each costs one network evaluation.")
    gammas: list[float] = option(
        [0.0, 0.5, 1.0], "Values of gamma in [0, 1]: 0 deterministic, 1 consistency-model multistep."
    )
    teacher_steps: list[int] = option([18], "Numbers N of Heun steps of the teacher; each costs 2N - 1 evaluations.")
    num_samples: int | None = option(
        None, f"Images per setting and seed. Default: as many as there are reference images, at most {MOST_SAMPLES:,}."
    )
    seeds: list[int] = option([0, 1, 2], "Seeds; each is one measurement of every setting, from the same noise.")
    batch_size: int = option(250, "Most images per network evaluation.")
    features: str = option("digits", FEATURES_HELP)
    kid: bool = option(True, "Measure the kernel distance too.")
    device: str = option("auto", "'cpu', 'cuda', 'cuda:1', ..., or 'auto': a GPU if there is one.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model is None and self.teacher is None:
            raise UserError("--model is needed: a folder or a repository on the Hub with a CTM (or --teacher alone).")
        for name in ("steps", "gammas", "teacher_steps", "seeds"):
            values = getattr(self, name)
            self.check(len(values) > 0, name, "one value or more")
            setattr(self, name, sorted(set(values)))
        self.check(min(self.steps) >= 1, "steps", "1 or more")
        self.check(min(self.teacher_steps) >= 1, "teacher_steps", "1 or more")
        self.check(0 <= self.gammas[0] and self.gammas[-1] <= 1, "gammas", "in [0, 1]")
        self.check(self.seeds[0] >= 0, "seeds", "0 or more")
        self.check(self.num_samples is None or self.num_samples > 1, "num_samples", "2 or more")
        self.check_positive("batch_size")
        self.check_folder("output_dir")


# What is sampled ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """One way to sample.

    Args:
        sampler: "ctm" or "heun".
        steps: number of steps.
        gamma: of the CTM; None where it has no effect: in one step, and for Heun.
    """

    sampler: str
    steps: int
    gamma: float | None = None

    @property
    def nfe(self) -> int:
        """Network evaluations."""
        return self.steps if self.sampler == "ctm" else 2 * self.steps - 1

    @property
    def name(self) -> str:
        if self.sampler == "heun":
            return f"teacher, Heun {self.steps}"
        steps = "1 step" if self.steps == 1 else f"{self.steps} steps"
        return steps if self.gamma is None else f"{steps}, gamma {self.gamma:g}"

    @property
    def options(self) -> dict[str, Any]:
        """For `CTMPipeline.__call__`: the Karras levels, which gamma brings, also where the checkpoint carries a schedule for one step."""
        gamma = 0.0 if self.gamma is None and (self.sampler, self.steps) == ("ctm", 1) else self.gamma
        options = {"num_inference_steps": self.steps}
        return options if gamma is None else {**options, "gamma": gamma}


def settings_of(config: EvaluateConfig) -> list[Setting]:
    """All settings. One step goes straight to the end, where gamma adds nothing, and is sampled once."""
    settings = []
    if config.model is not None:
        for steps in config.steps:
            settings += [Setting("ctm", steps, gamma) for gamma in ([None] if steps == 1 else config.gammas)]
    if config.teacher is not None:
        settings += [Setting("heun", steps) for steps in config.teacher_steps]
    return settings


def load_model(name: str, gammas: Sequence[float]) -> CTMPipeline:
    """The CTM in the folder or Hub repository `name`, or the consistency model as one if `gammas` is 1 alone.

    Raises UserError if it cannot be loaded or is neither.
    """
    try:
        pipe = DiffusionPipeline.from_pretrained(name)
    except Exception as error:  # huggingface_hub, safetensors and diffusers each raise their own
        here = "" if os.path.isdir(name) else " No such folder is here."
        raise UserError(
            f"--model {name} cannot be loaded.{here} It must be a CTM's folder or its repository on the Hub.\n"
            f"{type(error).__name__}: {str(error).strip()}"
        ) from error
    scheduler = getattr(pipe, "scheduler", None)
    if isinstance(scheduler, CMStochasticIterativeScheduler):
        if list(gammas) != [1.0]:
            raise UserError(
                f"--model {name} is a consistency model, which has no score and samples with gamma = 1 only: `training.evaluate` takes it with --gammas 1."
            )
        return ctm_of_consistency_model(pipe.unet, scheduler.config)
    if not hasattr(scheduler, "target_timesteps"):
        raise UserError(f"--model {name} is no CTM but {_kind(pipe)}. A diffusion model goes to --teacher.")
    return pipe


def _kind(pipe: DiffusionPipeline) -> str:
    scheduler = getattr(pipe, "scheduler", None)
    return type(pipe).__name__ if scheduler is None else f"a {type(pipe).__name__} with {type(scheduler).__name__}"


def load_pipelines(
    config: TeacherOptions, dataset: ImageDataset, device: torch.device, gammas: Sequence[float] = ()
) -> dict[str, CTMPipeline]:
    """The pipelines of the options `model` ("ctm") and `teacher` ("heun"), on the device, checked against the data.

    A consistency model is taken for a CTM if `gammas` is 1 alone.
    """
    pipelines = {}
    if config.model is not None:
        pipelines["ctm"] = load_model(config.model, gammas)
    if config.teacher is not None:
        teacher = teacher_of(config)
        if teacher.is_consistency_model:
            raise UserError(
                f"--teacher {config.teacher} is a consistency model, which Heun's method cannot sample: it is no denoiser. Measure it with "
                "--model and --gammas 1."
            )
        pipelines["heun"] = CTMPipeline(
            teacher.network, teacher.scheduler, id2label=teacher.id2label, null_class=teacher.null_class
        )
    for sampler, pipe in pipelines.items():
        prepare(pipe, "--model" if sampler == "ctm" else "--teacher", config, dataset, device)
    return pipelines


def prepare(pipe: CTMPipeline, name: str, config: DataOptions, dataset: ImageDataset, device: torch.device) -> None:
    """Check the pipeline of the option `name` against the data, and put it on the device, silent. Raises UserError."""
    network = pipe.unet.config
    size = network.sample_size
    makes = (network.out_channels, *((size, size) if isinstance(size, int) or size is None else size))
    found = (dataset.channels, dataset.resolution, dataset.resolution)
    if makes != found:
        raise UserError(
            f"--dataset_name {config.dataset_name} gives images of shape {found}, {name} makes {makes}; set --resolution "
            "and --image_mode, or choose another data set."
        )
    if pipe.num_classes is not None and (dataset.num_classes or 0) > pipe.num_classes:
        raise UserError(
            f"--label_column {dataset.label_column} has {dataset.num_classes} classes, {name} knows {pipe.num_classes}."
        )
    pipe.to(device)
    pipe.unet.to(memory_format=torch.channels_last)
    pipe.set_progress_bar_config(disable=True)


def class_labels(num_classes: int | None, real_labels: torch.Tensor | None, count: int) -> torch.Tensor | None:
    """Classes of `count` samples, int64: in the shares of the real images, or without their labels each class in turn.

    Classes are spread evenly: any stretch of samples has nearly the same shares.
    """
    if num_classes is None:
        return None
    if real_labels is None:
        return torch.arange(count) % num_classes
    classes = real_labels.sort().values
    sizes = classes.bincount()
    rank = torch.arange(len(classes)) - (sizes.cumsum(0) - sizes)[classes]
    spread = ((rank + 0.5) / sizes[classes]).sort(stable=True).indices
    return classes[spread].repeat(math.ceil(count / len(classes)))[:count]


def draw(
    pipe: CTMPipeline, setting: Setting, count: int, labels: torch.Tensor | None, seed: int, batch: int
) -> torch.Tensor:
    """Samples as a user gets them, rounded: uint8, shape (count, C, H, W), on the device.

    The noise depends on seed, batch and count, not on the setting: all settings start alike.
    """
    device = pipe._execution_device
    generator = torch.Generator(device).manual_seed(seed * 1_000_003 + batch)
    images = pipe(
        batch_size=count, class_labels=labels, generator=generator, output_type="pt", **setting.options
    ).images
    if not torch.isfinite(images).all():
        name = "--model" if setting.sampler == "ctm" else "--teacher"
        raise UserError(f"{name} gives infinite or NaN pixels ({setting.name}); its weights are broken.")
    return (images * 255).round().to(torch.uint8)


class Sampling:
    """All samples of one run, as features, and the time they take.

    Args:
        pipelines: by sampler.
        network: from uint8 images to features.
        real_labels: classes of the reference images, or None.
        num_samples, batch_size: images in all, and at most per call; the batches differ by at most one image.
    """

    def __init__(
        self,
        pipelines: dict[str, CTMPipeline],
        network: nn.Module,
        real_labels: torch.Tensor | None,
        num_samples: int,
        batch_size: int,
    ):
        self.pipelines, self.network = pipelines, network
        num_batches = math.ceil(num_samples / batch_size)
        self.sizes = [num_samples * (i + 1) // num_batches - num_samples * i // num_batches for i in range(num_batches)]
        self.num_samples = num_samples
        self.labels = {
            sampler: class_labels(pipe.num_classes, real_labels, num_samples) for sampler, pipe in pipelines.items()
        }

    def features(self, setting: Setting, seed: int, progress: tqdm) -> tuple[torch.Tensor, float]:
        """Features of one setting and seed, float32 (num_samples, F) on the CPU, and the seconds that sampling took."""
        pipe, labels = self.pipelines[setting.sampler], self.labels[setting.sampler]
        found, seconds, start = [], 0.0, 0
        for batch, size in enumerate(self.sizes):
            own = None if labels is None else labels[start : start + size]
            began = time.perf_counter()
            images = draw(pipe, setting, size, own, seed, batch)
            wait_for(images.device)
            seconds += time.perf_counter() - began
            found.append(self.network(images).float().cpu())
            start += size
            progress.update(setting.nfe)
        return torch.cat(found), seconds

    def warm_up(self) -> None:
        """One call of each network at the size that will be timed."""
        for sampler, pipe in self.pipelines.items():
            labels = self.labels[sampler]
            size = self.sizes[0]
            self.network(draw(pipe, Setting(sampler, 1), size, None if labels is None else labels[:size], 0, 0))


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# How it is compared -------------------------------------------------------------------------------------------------


class _Given(nn.Module):
    """The feature network of torchmetrics' classes when they are given features: the identity."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features


class Distances:
    """Distances of sets of features to those of the reference, by torchmetrics; the reference is taken in once.

    "frechet" is the Frechet distance of two Gaussians with the sets' means and covariances, in float64. "kernel" is the unbiased
    squared maximum mean discrepancy with the kernel (x.y / F + 1)^3, over all images, or where there are more than
    `KERNEL_SUBSET`, the mean over as many random subsets as make up all of them.

    Args:
        reference: shape (N, F).
        kernel: measure the kernel distance too.
    """

    def __init__(self, reference: torch.Tensor, kernel: bool = False):
        # Of several processes of a training one alone measures, and may not wait for the others.
        settings = {"feature": _Given(reference.shape[1]), "reset_real_features": False, "sync_on_compute": False}
        self.num_reference = len(reference)
        self.frechet = FrechetInceptionDistance(**settings)
        self.frechet.update(reference.double(), real=True)
        self.kernel = None
        if kernel:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # it says that it keeps the features in memory
                self.kernel = KernelInceptionDistance(subsets=1, **settings)
            self.kernel.update(reference.float(), real=True)

    def __call__(self, features: torch.Tensor) -> dict[str, float]:
        """Distances of `features`, shape (n, F), by name."""
        self.frechet.update(features.double(), real=False)
        distances = {"frechet": float(self.frechet.compute())}
        self.frechet.reset()
        if self.kernel is not None:
            smaller = min(self.num_reference, len(features))
            self.kernel.subset_size = min(smaller, KERNEL_SUBSET)
            self.kernel.subsets = math.ceil(smaller / self.kernel.subset_size)
            self.kernel.update(features.float(), real=False)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                distances["kernel"] = float(self.kernel.compute()[0])
            self.kernel.reset()
        return distances


@torch.inference_mode()
def reference_features(
    dataset: ImageDataset, network: nn.Module, options: DataOptions, batch_size: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Features (N, F) and classes (N,) of all real images, on the CPU; mirrored at random if the data options say so."""
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_sampler=torch.arange(len(dataset)).split(batch_size),
        collate_fn=lambda batch: batch,
        num_workers=options.dataloader_num_workers,
    )
    mirror = torch.rand(len(dataset), generator=torch.Generator().manual_seed(0)) < 0.5 * options.random_flip
    features, labels = [], []
    for (images, batch_labels), flip in zip(tqdm(loader, "Real images", unit="batch"), mirror.split(batch_size)):
        images = torch.where(flip[:, None, None, None], images.flip(-1), images)
        features.append(network(images.to(device)).float().cpu())
        labels.append(batch_labels)
    return torch.cat(features), None if labels[0] is None else torch.cat(labels)


def real_against_real(
    reference: torch.Tensor,
    distances: Distances,
    num_samples: int,
    seeds: Sequence[int],
    real_labels: torch.Tensor | None = None,
) -> dict:
    """What real images score: the floor that the number of images leaves, since the Frechet distance is biased upwards.

    "resampled": `num_samples` drawn from the reference, with replacement, against the reference: a model that knows it by heart.
    "halves": two halves of the reference against each other, N / 2 images each.
    With `real_labels`, shape (N,), both keep to the classes: the first has those that samples are asked for, halves share alike.
    """
    count = len(reference)
    classes = torch.zeros(count, dtype=torch.int64) if real_labels is None else real_labels
    wanted = class_labels(1, real_labels, num_samples)
    resampled, halves = [], []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(count, generator=generator)
        order = order[classes[order].sort(stable=True).indices]  # class after class
        sizes = classes.bincount(minlength=int(wanted.max()) + 1)
        place = (torch.rand(num_samples, generator=generator, dtype=torch.float64) * sizes[wanted]).long()
        resampled.append(distances(reference[order[(sizes.cumsum(0) - sizes)[wanted] + place]]))
        if count // 2 > reference.shape[1]:
            halves.append(Distances(reference[order[0::2]])(reference[order[1::2]]))
    result = {"resampled": {"num_images": num_samples, **summaries(resampled)}}
    if halves:
        result["halves"] = {"num_images": count // 2, **summaries(halves)}
    return result


def summaries(measured: list[dict[str, float]]) -> dict[str, dict]:
    """Each distance's values by seed, mean, standard deviation (n - 1; None of one seed), lowest and highest."""
    return {name: summary([values[name] for values in measured]) for name in measured[0]}


def summary(values: list[float]) -> dict:
    return {
        "by_seed": values,
        "mean": statistics.fmean(values),
        "std": statistics.stdev(values) if len(values) > 1 else None,
        "min": min(values),
        "max": max(values),
    }


def check_counts(num_samples: int, num_reference: int, num_features: int) -> list[str]:
    """Raise UserError for sets whose covariance would be singular; return notes about sets that are merely small."""
    notes = []
    for name, count, what in (
        ("num_samples", num_samples, "samples"),
        ("dataset_name", num_reference, "real images"),
    ):
        if count <= num_features:
            raise UserError(
                f"--{name}: {count} {what} are too few for {num_features} features; the Frechet distance needs more than "
                f"{num_features} of each. Give more, or --features with fewer."
            )
        if count < 5 * num_features:
            notes.append(f"{count:,} {what} are few for {num_features} features: compare only with the same number.")
    for note in notes:
        logger.warning(note)
    return notes


# The program --------------------------------------------------------------------------------------------------------


def choose_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).cpu()
    except Exception as error:  # RuntimeError or AssertionError, by device and torch version
        raise UserError(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from error
    return device


def what_is_compared(
    features: str, options: DataOptions, num_samples: int | None, device: torch.device
) -> tuple[nn.Module, ImageDataset, int, list[str]]:
    """The feature network, the real images, the number of samples, and remarks on these numbers. Raises UserError if they do not fit."""
    network = load_feature_network(features, device)
    dataset = ImageDataset(options)
    network.check_images(dataset.channels, dataset.resolution, dataset.resolution)
    num_samples = num_samples or min(len(dataset), MOST_SAMPLES)
    notes = check_counts(num_samples, len(dataset), network.num_features)
    return network, dataset, num_samples, notes


@torch.inference_mode()
def main(config: EvaluateConfig) -> dict:
    """Measure, write the four files, print the table; return what evaluation.json holds."""
    began = time.perf_counter()
    device = choose_device(config.device)
    network, dataset, num_samples, notes = what_is_compared(config.features, config, config.num_samples, device)
    pipelines = load_pipelines(config, dataset, device, config.gammas)
    check_writable(config.output_dir)

    reference, real_labels = reference_features(dataset, network, config, config.batch_size, device)
    distances = Distances(reference, config.kid)
    sampling = Sampling(pipelines, network, real_labels, num_samples, config.batch_size)
    settings = settings_of(config)
    measured: dict[Setting, list[dict[str, float]]] = {setting: [] for setting in settings}
    seconds = dict.fromkeys(settings, 0.0)
    sampling.warm_up()
    calls = sum(setting.nfe for setting in settings) * len(sampling.sizes) * len(config.seeds)
    with tqdm(total=calls, unit="call") as progress:
        for seed in config.seeds:
            for setting in settings:
                progress.set_description(f"{num_samples:,} images: {setting.name}, seed {seed}")
                features, taken = sampling.features(setting, seed, progress)
                measured[setting].append(distances(features))
                seconds[setting] += taken

    conditional = any(pipe.unet.config.num_class_embeds is not None for pipe in pipelines.values())
    report = {
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "options": asdict(config),
        "num_samples": num_samples,
        "features": network.about,
        "reference": {
            "dataset_name": config.dataset_name,
            "num_images": len(dataset),
            "channels": dataset.channels,
            "resolution": dataset.resolution,
        },
        "class_labels": _labels_in_words(conditional, real_labels),
        "results": [
            {
                **asdict(setting),
                "nfe": setting.nfe,
                **summaries(measured[setting]),
                "seconds_per_image": seconds[setting] / (num_samples * len(config.seeds)),
            }
            for setting in settings
        ],
        "real_against_real": real_against_real(
            reference, distances, num_samples, config.seeds, real_labels if conditional else None
        ),
        "notes": notes,
        "batch_sizes": sorted(set(sampling.sizes)),
        "hardware": hardware(device),
        "versions": {
            "diffusers_ctm": diffusers_ctm.__version__,
            "diffusers": diffusers.__version__,
            "torch": torch.__version__,
            "torchmetrics": torchmetrics.__version__,
            "python": platform.python_version(),
        },
        "seconds_in_all": time.perf_counter() - began,
    }
    table = markdown(report)
    files = {
        "evaluation.json": (json.dumps(report, indent=2, allow_nan=False) + "\n").encode(),
        "evaluation.md": table.encode(),
        "evaluation.png": plot(report),
        "gammas.png": gammas_picture(config, pipelines),
    }
    write_files(config.output_dir, files)
    print(f"\n{table}")
    return report


def _labels_in_words(conditional: bool, real_labels: torch.Tensor | None) -> str:
    if not conditional:
        return "none"
    return "each in turn" if real_labels is None else "in the shares of the real images"


def hardware(device: torch.device) -> dict[str, Any]:
    """The device, in words, and the CPU threads in use."""
    if device.type == "cuda":
        return {"device": torch.cuda.get_device_name(device), "cpu_threads": torch.get_num_threads()}
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as file:
            name = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), name)
    except OSError:
        pass  # not Linux
    return {"device": f"{device.type}: {name}", "cpu_threads": torch.get_num_threads()}


# What is written ----------------------------------------------------------------------------------------------------


def number(value: float) -> str:
    """Three digits, without an exponent where it reads well."""
    return f"{value:.0f}" if 100 <= abs(value) < 1e6 else f"{value:.3g}"


def cell(values: dict) -> str:
    """Mean +- standard deviation, this with two digits and both with as many decimals."""
    mean, std = values["mean"], values["std"]
    if not std:
        return number(mean)
    decimals = max(0, 1 - math.floor(math.log10(std)))
    return f"{mean:.{decimals}f} ± {std:.{decimals}f}"


def duration(seconds: float) -> str:
    unit, factor = ("s", 1) if seconds >= 1 else ("ms", 1e3) if seconds >= 1e-3 else ("µs", 1e6)
    return f"{seconds * factor:.3g} {unit}"


def distance_table(report: dict, distance: str) -> list[str]:
    """Lines of one table: a row per number of steps, a column per gamma."""
    gammas = sorted({row["gamma"] for row in report["results"] if row["gamma"] is not None})
    lines = [
        "| | NFE | without gamma |" + "".join(f" gamma {gamma:g} |" for gamma in gammas) + " time per image |",
        "|---|--:|--:|" + "--:|" * (len(gammas) + 1),
    ]

    def line(name: str, nfe: int | str, values: dict[float | None, dict], seconds: list[float]) -> str:
        cells = [cell(values[gamma][distance]) if gamma in values else "" for gamma in [None, *gammas]]
        taken = duration(statistics.fmean(seconds)) if seconds else ""
        return f"| {name} | {nfe} | " + " | ".join(cells) + f" | {taken} |"

    rows: dict[tuple[str, int], list[dict]] = {}
    for row in report["results"]:
        rows.setdefault((row["sampler"], row["steps"]), []).append(row)
    for (sampler, steps), found in rows.items():
        values = {row["gamma"]: row for row in found}
        seconds = [row["seconds_per_image"] for row in found]
        lines.append(line(Setting(sampler, steps).name, found[0]["nfe"], values, seconds))
    names = {"resampled": "real images, resampled", "halves": "real images, two halves"}
    for kind, found in report["real_against_real"].items():
        if distance in found:
            lines.append(line(names[kind], "", {None: found}, []))
    return lines


def markdown(report: dict) -> str:
    """evaluation.md."""
    options, reference, features = report["options"], report["reference"], report["features"]
    seeds = options["seeds"]
    spread = (
        f"mean ± standard deviation over seeds {', '.join(map(str, seeds))}" if len(seeds) > 1 else f"seed {seeds[0]}"
    )
    known = f", accuracy {features['accuracy']:.1%} on images held out" if "accuracy" in features else ""
    real = report["real_against_real"]
    floor = f"{real['resampled']['num_images']:,} drawn from the reference with replacement, against all of it"
    if "halves" in real:
        floor += f"; two halves: {real['halves']['num_images']:,} against the rest"
    if report["class_labels"].startswith("in the"):
        floor += "; both with classes as asked for"
    notes = [
        f"Samples: {report['num_samples']:,} per setting and seed, pixels rounded to 8 bits. All settings start from the same noise "
        "(on one kind of device) and are compared with the same reference.",
        f"Classes asked for: {report['class_labels']}.",
        f"Reference: all {reference['num_images']:,} images of `{reference['dataset_name']}`, "
        f"split `{options['dataset_split']}`{', mirrored with probability 1/2' if options['random_flip'] else ''}, "
        f"{reference['resolution']}x{reference['resolution']}, {'grey' if reference['channels'] == 1 else 'colour'}.",
        f"Features: `{features['name']}`, {features['num_features']} numbers per image{known}. Distances in other features or for "
        "other numbers of images cannot be compared with these.",
        f"Real images: {floor}. The Frechet distance of a perfect sampler is not 0: it falls as one over the number of images.",
        "One step has no gamma: it goes straight to the image. NFE: network evaluations per image. Levels are Karras's, whatever schedules "
        "the checkpoint carries.",
        f"Time: sampling alone, warmed up, batches of {max(report['batch_sizes'])}, on {report['hardware']['device']}, "
        f"{report['hardware']['cpu_threads']} threads; the mean over gamma.",
        *report["notes"],
    ]
    lines = [
        f"Frechet distance to real images (lower is better), {spread}:",
        "",
        *distance_table(report, "frechet"),
        "",
    ]
    if options["kid"]:
        lines += [
            "Kernel distance (lower is better; unbiased for independent images, so near 0 it may be negative; classes in fixed shares "
            "make it a little too low, and so do images that repeat the reference's, as the real ones drawn from it do), likewise:",
            "",
        ]
        lines += [*distance_table(report, "kernel"), ""]
    return "\n".join(lines + [f"- {note}" for note in notes]) + "\n"


def plot(report: dict) -> bytes:
    """evaluation.png: Frechet distance against network evaluations, a line per gamma."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.6), dpi=130, layout="constrained")
    axes = figure.subplots()
    results = report["results"]
    ctm = [row for row in results if row["sampler"] == "ctm"]
    shared = [row for row in ctm if row["gamma"] is None]
    gammas = sorted({row["gamma"] for row in ctm if row["gamma"] is not None})
    colours = ["#0072b2", "#e69f00", "#d55e00", "#009e73", "#cc79a7", "#56b4e9"]
    for i, gamma in enumerate(gammas or [None]):
        rows = sorted(
            shared + [row for row in ctm if row["gamma"] == gamma and gamma is not None], key=lambda row: row["nfe"]
        )
        if not rows:
            continue
        nfe = [row["nfe"] for row in rows]
        low, mean, high = ([row["frechet"][key] for row in rows] for key in ("min", "mean", "max"))
        colour = colours[i % len(colours)]
        label = "CTM" if gamma is None else f"CTM, gamma {gamma:g}"
        axes.fill_between(nfe, low, high, color=colour, alpha=0.2, linewidth=0)
        axes.plot(nfe, mean, "o-", color=colour, markersize=5, label=label)
    for row, style in zip(
        [row for row in results if row["sampler"] == "heun"], ["--", "-.", (0, (5, 1)), (0, (1, 1))] * 9
    ):
        values = row["frechet"]
        axes.axhspan(values["min"], values["max"], color="black", alpha=0.12, linewidth=0)
        axes.axhline(
            values["mean"],
            color="black",
            linestyle=style,
            linewidth=1.2,
            label=f"teacher, Heun {row['steps']} steps ({row['nfe']} NFE)",
        )
    floor = report["real_against_real"]["resampled"]["frechet"]
    axes.axhline(floor["mean"], color="grey", linestyle=":", linewidth=1.5, label="real images, resampled")
    ticks = sorted({row["nfe"] for row in ctm} or {row["nfe"] for row in results})
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    _plain_ticks(axes)
    axes.set_xlabel("network evaluations per image (NFE)")
    axes.set_ylabel("Frechet distance, lower is better")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9, frameon=False)
    seeds = len(report["options"]["seeds"])
    bands = f", bands: lowest to highest of {seeds} seeds" if seeds > 1 else ""
    axes.set_title(
        f"{report['num_samples']:,} samples, features: {os.path.basename(report['features']['name'].rstrip('/'))}{bands}",
        fontsize=10,
    )
    picture = io.BytesIO()
    FigureCanvasAgg(figure).print_png(picture)
    return picture.getvalue()


def _plain_ticks(axes) -> None:
    """Distances at 1, 2, 5 times powers of ten, in plain digits."""
    low, high = axes.get_ylim()
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if len(decades) <= 4 else (1,)
    ticks = [factor * 10.0**decade for decade in decades for factor in factors]
    ticks = [tick for tick in ticks if low <= tick <= high] or [low, high]
    axes.set_yticks(ticks, [number(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_ylim(low, high)


def gammas_picture(config: EvaluateConfig, pipelines: dict[str, CTMPipeline]) -> bytes:
    """gammas.png: samples from the same noise, a row per gamma, a group per number of steps; the teacher's below."""
    size = next(iter(pipelines.values())).unet.config.sample_size
    width = max(50, size if isinstance(size, int) else size[1])
    count = min(10, max(1, 2000 // (len(config.steps) * width)))  # images per group

    def group(setting: Setting) -> Image.Image:
        pipe = pipelines[setting.sampler]
        labels = class_labels(pipe.num_classes, None, count)
        pixels = draw(pipe, setting, count, labels, config.seeds[0], 0).permute(0, 2, 3, 1).cpu().numpy()
        images = [Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image) for image in pixels]
        return enlarged_grid([ImageOps.expand(image, 1, "white") for image in images], 1, count)

    drawn = {setting: group(setting) for setting in settings_of(config)}
    rows = []
    if "ctm" in pipelines:
        for gamma in config.gammas:
            settings = [Setting("ctm", steps, None if steps == 1 else gamma) for steps in config.steps]
            rows.append([(f"gamma {gamma:g}, {Setting('ctm', s.steps).name}", drawn[s]) for s in settings])
    if "heun" in pipelines:
        rows.append(
            [(setting.name + " steps", picture) for setting, picture in drawn.items() if setting.sampler == "heun"]
        )
    picture = io.BytesIO()
    captioned(rows).save(picture, "PNG")
    return picture.getvalue()


def captioned(rows: list[list[tuple[str, Image.Image]]], gap: int = 12, text_height: int = 18) -> Image.Image:
    """Pictures in rows, each under its caption, on white."""
    width, height = rows[0][0][1].size
    columns = max(len(row) for row in rows)
    canvas = Image.new("RGB", (gap + columns * (width + gap), gap + len(rows) * (height + text_height + gap)), "white")
    brush = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(13)
    for i, row in enumerate(rows):
        for j, (caption, picture) in enumerate(row):
            left, top = gap + j * (width + gap), gap + i * (height + text_height + gap)
            brush.text((left, top), caption, fill="black", font=font)
            canvas.paste(picture, (left, top + text_height))
    return canvas


if __name__ == "__main__":
    run_program(main, EvaluateConfig)
