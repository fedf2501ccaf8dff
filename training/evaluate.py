# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Measure a CTM over steps and gamma, beside its teacher.

python -m training.evaluate --model runs/digits/pipeline
"""

import itertools
import math
import os
import time
from dataclasses import dataclass, fields

import torch
from PIL import Image
from tqdm.auto import tqdm

from diffusers_ctm import CTMPipeline

from .cli.device import choose_device
from .cli.errors import UserError
from .cli.files import check_writable
from .cli.options import FOLDER, NOT_NEGATIVE, POSITIVE, SEED, UNIT, option, run_program
from .cli.shared_options import DataOptions
from .data.images import ImageDataset
from .frozen.vectors import FEATURES_HELP, FeaturesSideBySide, load_feature_network
from .measure.distances import (
    MOST_SAMPLES,
    check_counts,
    reference_features,
    what_is_compared,
)
from .measure.judges import Judges, in_shares_of_the_teacher
from .measure.options import PairOptions
from .measure.paired import PAIRED_STEPS, PairedError, why_unlike
from .measure.reference import ReferenceFile, kept_features, read_reference
from .measure.reports import facts, write_report
from .measure.sampling import Sampling, Setting, class_labels, draw, settings_of
from .networks.pipelines import load_pipelines
from .report.numbers import summaries
from .report.pictures import captioned, tiles
from .report.plots import PALETTE, new_figure, plain_ticks
from .report.tables import distance_table, judges_table, setting_name


@dataclass
class EvaluateConfig(PairOptions):
    """Sample over steps and gamma, compare with real images, and write table, plot and pictures."""

    output_dir: str = option(
        "runs/evaluation", "Folder for evaluation.json, .md, .png and gammas.png; others stay.", must_be=FOLDER
    )
    steps: list[int] = option(
        [1, 2, 4, 8, 18], "Numbers of steps of the CTM; each costs one network evaluation.", must_be=POSITIVE
    )
    gammas: list[float] = option(
        [0.0, 0.5, 1.0],
        "Values of gamma in [0, 1]: 0 deterministic, 1 consistency-model multistep. With 1 alone --model may be a "
        "consistency model.",
        must_be=UNIT,
    )
    teacher_steps: list[int] = option(
        [18],
        "Numbers N of Heun steps of the teacher; each costs 2N - 1 evaluations, twice as many if it is guided.",
        must_be=POSITIVE,
    )
    num_samples: int | None = option(
        None,
        f"Images per setting and seed. Default: as many as there are reference images, at most {MOST_SAMPLES:,}.",
        must_be=("4 or more", lambda value: value >= 4),  # precision and recall ask for a third neighbor
    )
    seeds: list[int] = option(
        [0, 1, 2], "Seeds; each is one measurement of every setting, from the same noise.", must_be=SEED
    )
    features: list[str] = option(
        ["digits"],
        FEATURES_HELP + " Of further networks there is the Frechet distance alone: a second judge.",
    )
    reference: str | None = option(
        None,
        "A file .npz with the mean `mu` and covariance `sigma` of real images' features, as others share them for FID: "
        "no data set is needed, and there is no kernel distance. If the file is not there, the features of the data "
        "set are kept in it, and read from it next time.",
        must_be=("a file .npz", lambda path: path.endswith(".npz")),
    )
    kid: bool = option(True, "Measure the kernel distance too.")
    paired_samples: int = option(
        250,
        "Samples per seed that are compared with the teacher's own images from the same noise, where sampling is "
        "deterministic; 0 is none.",
        must_be=NOT_NEGATIVE,
        needs="teacher",
    )
    paired_steps: int = option(
        PAIRED_STEPS,
        "Heun steps N of those images of the teacher; each costs 2N - 1 evaluations.",
        must_be=POSITIVE,
        needs="teacher",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.sort_values("steps", "teacher_steps", "gammas", "seeds")
        several = len(set(self.features)) == len(self.features) > 0
        self.check(several, "features", "one network or several different ones")
        self.check(
            self.reference is None or len(self.features) == 1,
            "features",
            f"one network, because --reference {self.reference} holds the features of one",
        )


@torch.inference_mode()
def main(config: EvaluateConfig) -> dict:
    """Measure, write the four files, print the table; return the content of evaluation.json."""
    began = time.perf_counter()
    device = choose_device(config.device)
    kept = read_reference(config.reference) if config.reference and os.path.exists(config.reference) else None
    if kept is not None and kept.features is None:
        config.refuse(
            [entry.name for entry in fields(DataOptions)],
            f"has no use: --reference {config.reference} is all that samples are compared with",
        )
        dataset, networks = None, [load_feature_network(config.features[0], device)]
        pipelines = load_pipelines(config, None, device, config.gammas)
        num_samples, notes = check_without_images(config, kept, networks[0], pipelines)
    else:
        dataset, networks, notes = ImageDataset(config), [], []
        for name in config.features:
            network, num_samples, new = what_is_compared(dataset, name, config.num_samples, device)
            networks.append(network)
            notes += [note for note in new if note not in notes]
        pipelines = load_pipelines(config, dataset, device, config.gammas)
    for path in (config.output_dir, *([os.path.dirname(config.reference)] if config.reference else [])):
        check_writable(path)

    network, reference, real_labels = FeaturesSideBySide(networks), None, None
    if dataset is not None:
        reference, real_labels = real_features(config, kept, dataset, network, device)
    judges = Judges(network, kept.statistics if reference is None else reference, config.kid)
    sampling = Sampling(pipelines, network, real_labels, num_samples, config.batch_size)
    settings = settings_of(pipelines, config.steps, config.gammas, config.teacher_steps, config.teacher_is_guided)
    sampling.warm_up()
    measured, seconds, unlike = measure(config, sampling, judges, settings, networks[0], real_labels)

    first = next(iter(pipelines.values()))
    conditional = any(pipe.num_classes is not None for pipe in pipelines.values())
    asked = "each in turn" if real_labels is None else "in the shares of the real images"
    report = {
        **facts(config, device),
        "num_samples": num_samples,
        "features": networks[0].about,
        "other_features": [network.about for network in networks[1:]],
        "reference": {
            "dataset_name": config.reference if dataset is None else config.dataset_name,
            "num_images": None if dataset is None else len(dataset),
            "channels": first.image_channels,
            "resolution": first.image_size[0],
        },
        "class_labels": asked if conditional else "none",
        "results": [
            {
                "sampler": setting.sampler,
                "steps": setting.steps,
                "gamma": setting.shown_gamma,
                "nfe": setting.nfe,
                **summaries(measured[setting]),
                "seconds_per_image": seconds[setting] / (num_samples * len(config.seeds)),
            }
            for setting in settings
        ],
        "real_against_real": {}
        if dataset is None
        else judges.real_images(reference, num_samples, config.seeds, real_labels if conditional else None),
        "notes": [*notes, *unlike, *config.notes_on_guidance()],
        "batch_sizes": sorted(set(sampling.sizes)),
        "seconds_in_all": time.perf_counter() - began,
    }
    pictures = {"evaluation": plot(report), "gammas": gammas_picture(config, pipelines)}
    write_report(config.output_dir, "evaluation", report, markdown(report), pictures)
    return report


def measure(
    config: EvaluateConfig,
    sampling: Sampling,
    judges: Judges,
    settings: list[Setting],
    network: torch.nn.Module,
    real_labels: torch.Tensor | None,
) -> tuple[dict[Setting, list[dict[str, float]]], dict[Setting, float], list[str]]:
    """What is measured in each setting, by seed; the seconds that its samples took; notes on what is not measured."""
    pipelines, unlike = sampling.pipelines, why_unlike(sampling.pipelines)
    like = [setting for setting in settings if setting.sampler == "heun" or unlike is None]
    has_pairs = "heun" in pipelines and config.paired_samples > 0
    paired = [setting for setting in like if setting.is_deterministic] if has_pairs else []
    measured: dict[Setting, list[dict[str, float]]] = {setting: [] for setting in settings}
    seconds = dict.fromkeys(settings, 0.0)
    calls = sum(setting.nfe for setting in settings) * len(sampling.sizes)
    if has_pairs:
        truth = Setting("heun", config.paired_steps)
        calls += sum(one.nfe for one in [truth, *paired]) * math.ceil(config.paired_samples / config.batch_size)
    with tqdm(total=calls * len(config.seeds), unit="call") as progress:
        for seed in config.seeds:
            for setting in settings:
                progress.set_description(f"{sum(sampling.sizes):,} images: {setting.name}, seed {seed}")
                features, spent = sampling.features(setting, seed, progress)
                measured[setting].append(judges(features, sampling.labels[setting.sampler]))
                seconds[setting] += spent
            if has_pairs:
                progress.set_description(f"{config.paired_samples:,} pairs with the teacher, seed {seed}")
                labels = class_labels(pipelines["heun"].classes, real_labels, config.paired_samples)
                amounts = config.paired_samples, seed, config.batch_size, config.paired_steps
                error = PairedError(pipelines["heun"], labels, *amounts, network, progress)
                for setting in paired:
                    measured[setting][-1] |= error(pipelines[setting.sampler], setting, progress)
    in_shares_of_the_teacher(measured, like)
    return measured, seconds, [unlike] if unlike else []


def check_without_images(
    config: EvaluateConfig, kept: ReferenceFile, network: torch.nn.Module, pipelines: dict[str, CTMPipeline]
) -> tuple[int, list[str]]:
    """The number of samples, and notes on it, for statistics of images that are not here. Raises UserError."""
    count, num_samples = len(kept.statistics[0]), config.num_samples or MOST_SAMPLES
    if count != network.num_features:
        raise UserError(
            f"--reference {config.reference} is of {count} features, --features {config.features[0]} gives "
            f"{network.num_features}. Give the network that the file was made with."
        )
    for pipe in pipelines.values():
        network.check_images(pipe.image_channels, *pipe.image_size)
    return num_samples, check_counts(num_samples, None, count)


def real_features(
    config: EvaluateConfig,
    kept: ReferenceFile | None,
    dataset: ImageDataset,
    network: FeaturesSideBySide,
    device: torch.device,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Features and classes of all real images. --reference may keep the features, if they are of one network."""
    if config.reference is None:
        workers = config.dataloader_num_workers
        return reference_features(dataset, network, config.batch_size, device, config.random_flip, workers)
    (one,) = network.networks
    features = kept_features(config.reference, kept, config, dataset, one, config.batch_size, device)
    return features, dataset.labels()


def markdown(report: dict) -> str:
    """evaluation.md."""
    options, reference, features = report["options"], report["reference"], report["features"]
    seeds, real = options["seeds"], report["real_against_real"]
    from_images = reference["num_images"] is not None
    spread = ("mean ± standard deviation over seeds " if len(seeds) > 1 else "seed ") + ", ".join(map(str, seeds))
    accuracy = f", accuracy {features['accuracy']:.1%} on images held out" if "accuracy" in features else ""
    floor = ""
    if "resampled" in real:
        floor = f"{real['resampled']['num_images']:,} drawn from the reference with replacement, against all of it"
    if "halves" in real:
        floor += f"; two halves: {real['halves']['num_images']:,} against the rest"
    if report["class_labels"].startswith("in the"):
        floor += "; both with classes as asked for"
    notes = [
        f"Samples: {report['num_samples']:,} per setting and seed, pixels rounded to 8 bits. All settings start from "
        "the same noise (on one kind of device) and are compared with the same reference.",
        f"Classes asked for: {report['class_labels']}.",
        f"Reference: all {reference['num_images']:,} images of `{reference['dataset_name']}`, "
        f"split `{options['dataset_split']}`{', mirrored with probability 1/2' if options['random_flip'] else ''}, "
        f"{reference['resolution']}x{reference['resolution']}, {'gray' if reference['channels'] == 1 else 'color'}."
        if from_images
        else f"Reference: mean and covariance in `{os.path.basename(reference['dataset_name'])}`. The file does not "
        "say of which images and features they are; only the number of features was checked. Without the images there "
        "is no kernel distance, no distance of real images, and no classes' frequencies.",
        f"Features: `{features['name']}`, {features['num_features']} numbers per image{accuracy}. Distances in other "
        "features or for other numbers of images cannot be compared with these.",
        *(
            f"Other features: `{other['name']}`, {other['num_features']} numbers per image."
            for other in report["other_features"]
        ),
        (f"Real images: {floor}. " if from_images else "")
        + "The Frechet distance of a perfect sampler is not 0: it falls as one over the number of images.",
        "One step has no gamma: it goes straight to the image. NFE: network evaluations per image. Levels are "
        "Karras's, whatever schedules the checkpoint carries.",
        f"Time: sampling alone, warmed up, batches of {max(report['batch_sizes'])}, on {report['hardware']['device']}, "
        f"{report['hardware']['cpu_threads']} threads; the mean over gamma.",
        *report["notes"],
    ]
    lines = [f"Frechet distance to real images (lower is better), {spread}:", "", *distance_table(report, "frechet")]
    if "kernel" in report["results"][0]:
        lines += [
            "",
            "Kernel distance over the same seeds (lower is better). It is unbiased for independent images, so near 0 "
            "it may be negative. Classes in fixed shares make it a little too low, and so do images that repeat the "
            "reference's, as the real images that are drawn from it do:",
            "",
            *distance_table(report, "kernel"),
        ]
    judges, words = judges_table(report)
    if judges:  # shared statistics without a teacher say no more than the distance
        lines += ["", "Beside the distance, over the same seeds:", "", *judges]
    notes[5:5] = words
    return "\n".join([*lines, "", *(f"- {note}" for note in notes)]) + "\n"


def plot(report: dict):
    """evaluation.png: Frechet distance against network evaluations, a line per gamma."""
    figure, axes = new_figure(7, 4.6, dpi=130)
    results = report["results"]
    ctm = [row for row in results if row["sampler"] == "ctm"]
    gammas = sorted({row["gamma"] for row in ctm if row["gamma"] is not None})
    for gamma, color in zip(gammas or [None], itertools.cycle(PALETTE)):
        rows = [row for row in ctm if row["gamma"] in (None, gamma)]
        nfe = [row["nfe"] for row in rows]
        low, mean, high = ([row["frechet"][key] for row in rows] for key in ("min", "mean", "max"))
        axes.fill_between(nfe, low, high, color=color, alpha=0.2, linewidth=0)
        label = "CTM" if gamma is None else f"CTM, gamma {gamma:g}"
        axes.plot(nfe, mean, "o-", color=color, markersize=5, label=label if rows else None)
    heun = (row for row in results if row["sampler"] == "heun")
    for row, style in zip(heun, itertools.cycle(["--", "-.", (0, (5, 1)), (0, (1, 1))])):
        name = setting_name("heun", row["steps"], guided=report["options"]["teacher_guidance_scale"] != 1)
        values, label = row["frechet"], f"{name} steps ({row['nfe']} NFE)"
        axes.axhspan(values["min"], values["max"], color="black", alpha=0.12, linewidth=0)
        axes.axhline(values["mean"], color="black", linestyle=style, linewidth=1.2, label=label)
    if "resampled" in report["real_against_real"]:
        floor = report["real_against_real"]["resampled"]["frechet"]["mean"]
        axes.axhline(floor, color="gray", linestyle=":", linewidth=1.5, label="real images, resampled")
    ticks = sorted({row["nfe"] for row in ctm or results})
    axes.set(yscale="log", xlabel="network evaluations per image (NFE)", ylabel="Frechet distance, lower is better")
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    plain_ticks(axes)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9, frameon=False)
    seeds = len(report["options"]["seeds"])
    bands = f", bands: lowest to highest of {seeds} seeds" if seeds > 1 else ""
    features = os.path.basename(report["features"]["name"].rstrip("/"))
    axes.set_title(f"{report['num_samples']:,} samples, features: {features}{bands}", fontsize=10)
    return figure


def gammas_picture(config: EvaluateConfig, pipelines: dict[str, CTMPipeline]) -> Image.Image:
    """gammas.png: samples from the same noise, a row per gamma, a group per number of steps; the teacher's below."""
    _, width = next(iter(pipelines.values())).image_size
    count = min(10, max(1, 2000 // (len(config.steps) * max(50, width))))  # images per group

    def group(caption: str, setting: Setting) -> tuple[str, Image.Image]:
        pipe = pipelines[setting.sampler]
        labels = class_labels(pipe.classes, None, count)
        return caption, tiles(draw(pipe, setting, count, labels, config.seeds[0], 0), count)

    rows = []
    for gamma in config.gammas if "ctm" in pipelines else []:
        caption = f"gamma {gamma:g}, "
        rows.append([group(caption + setting_name("ctm", n), Setting("ctm", n, gamma)) for n in config.steps])
    if "heun" in pipelines:
        settings = [Setting("heun", n, guided=config.teacher_is_guided) for n in config.teacher_steps]
        rows.append([group(f"{setting.name} steps", setting) for setting in settings])
    return captioned(rows)


if __name__ == "__main__":
    run_program(main, EvaluateConfig)
