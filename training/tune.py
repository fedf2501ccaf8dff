# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Find the levels and gammas that suit a checkpoint for some numbers of steps.

python -m training.tune --model runs/digits/pipeline
"""

import itertools
import json
import os
import shutil
from dataclasses import dataclass

import torch
from tqdm.auto import tqdm

from diffusers_ctm import CTMScheduler

from .cli.device import choose_device, hardware
from .cli.errors import UserError
from .cli.files import atomic_folder, check_writable, read_json, tensors_digest, write_files
from .cli.options import FOLDER, POSITIVE, SEED, TWO_OR_MORE, UNIT, option, run_program
from .data.images import ImageDataset
from .frozen.vectors import FEATURES_HELP
from .hub.client import file_of
from .hub.record import CONVERSION, NOTICE, RECORD
from .measure.distances import MOST_SAMPLES, Distances, reference_features, what_is_compared
from .measure.options import ModelOptions
from .measure.reports import facts, write_report
from .measure.sampling import Sampling, Setting
from .measure.schedules import LEAST_GAP, Space, mean, run_search
from .networks.pipelines import load_model, prepare
from .report.numbers import cell, number, summary
from .report.plots import PALETTE, new_figure, plain_ticks
from .report.tables import markdown_table, setting_name


CACHE = "cache.json"


@dataclass
class TuneConfig(ModelOptions):
    """Search levels and gammas for some numbers of steps, confirm them on other seeds, save them as presets.

    Writes tune.json, tune.md, tune.png and `pipeline`, a copy of the model whose scheduler knows the presets.
    Measurements stay in cache.json: the same command goes on where it was interrupted.
    """

    model: str | None = option(None, "The CTM: a folder or a repository on the Hub. It is not changed.")
    output_dir: str = option("runs/tune", "Folder for the results.", must_be=FOLDER)
    steps: list[int] = option([2, 4], "Numbers of steps; each step is one network evaluation.", must_be=POSITIVE)
    evaluations: int = option(60, "Most schedules to try for each number of steps.")
    gammas: list[float] = option(
        [0.0, 0.5, 1.0], "Values of gamma in [0, 1] to begin with, on the Karras levels.", must_be=UNIT
    )
    first_level: bool = option(
        False,
        "Search the level of the first step too; otherwise sampling starts at sigma_max. One step has nothing else.",
    )
    num_samples: int | None = option(
        None,
        f"Images per schedule and seed. Default: as many as there are reference images, at most {MOST_SAMPLES:,}.",
        must_be=TWO_OR_MORE,
    )
    seeds: list[int] = option([0, 1], "Seeds of the search: all schedules are tried on the same noise.", must_be=SEED)
    confirm_seeds: list[int] = option(
        [100, 101, 102, 103, 104],
        "Other seeds, on which the best schedule is measured once more; two or more.",
        must_be=SEED,
    )
    force: bool = option(
        False,
        "Save presets too that are not better, on --confirm_seeds, than what the checkpoint does now by more than the "
        "spread of the difference.",
    )
    features: str = option("digits", FEATURES_HELP)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(bool(self.model), "model", "a folder or a repository on the Hub with a CTM")
        self.sort_values("steps", "gammas", "seeds", "confirm_seeds")
        self.check(
            self.first_level or self.steps[0] > 1,
            "steps",
            "2 or more, or --first_level true: one step has nothing to choose but the level where it starts",
        )
        self.check(len(self.confirm_seeds) > 1, "confirm_seeds", "two different seeds or more")
        self.check(
            not set(self.seeds) & set(self.confirm_seeds),
            "confirm_seeds",
            "other seeds than --seeds, on which the best schedule was chosen",
        )
        self.check(self.evaluations > len(self.gammas), "evaluations", f"more than --gammas has ({len(self.gammas)})")
        self.check(
            os.path.realpath(self.model) != os.path.realpath(self.pipeline_dir),
            "output_dir",
            f"another folder, because this would replace --model {self.model}",
        )

    @property
    def pipeline_dir(self) -> str:
        return os.path.join(self.output_dir, "pipeline")


class Measure:
    """The distances of a setting on some seeds. Nothing is measured twice: they stay in FOLDER/cache.json.

    Args:
        common: digest of all that distances depend on beside setting and seed. Distances of other runs stay in the
            file unused.
        progress: counts network calls.
    """

    def __init__(self, sampling: Sampling, distances: Distances, folder: str, common: str, progress: tqdm):
        self.sampling, self.distances, self.progress = sampling, distances, progress
        self.folder, self.common = folder, common
        self.cache = read_json(folder, CACHE)

    def __call__(self, setting: Setting, seeds: list[int]) -> list[float]:
        keys = [json.dumps([self.common, setting.options, seed]) for seed in seeds]
        for key, seed in zip(keys, seeds):
            if key in self.cache:
                self.progress.update(setting.nfe * len(self.sampling.sizes))
                continue
            features, _ = self.sampling.features(setting, seed, self.progress)
            self.cache[key] = self.distances(features)["frechet"]
            write_files(self.folder, {CACHE: json.dumps(self.cache, indent=0).encode()})
        return [self.cache[key] for key in keys]


def improvement(now: list[float], best: list[float]) -> dict:
    """By how much `best` is lower than `now`, seed by seed.

    `better` says whether its mean is more than its standard deviation over the seeds, and more than a thousandth of
    `now`, which the rounding of levels may make.
    """
    gain = summary([a - b for a, b in zip(now, best, strict=True)])
    return {**gain, "better": gain["mean"] > max(gain["std"], 1e-3 * sum(now) / len(now))}


@torch.inference_mode()
def main(config: TuneConfig) -> dict:
    """Search, confirm, write; return the content of tune.json."""
    device = choose_device(config.device)
    dataset = ImageDataset(config)
    network, num_samples, notes = what_is_compared(dataset, config.features, config.num_samples, device)
    pipe = load_model(config.model, ())
    prepare(pipe, "--model", config, dataset, device)
    spaces = {steps: Space(steps, pipe.scheduler, config.first_level) for steps in config.steps}
    for steps, space in spaces.items():
        if space.highest < LEAST_GAP * steps:
            raise UserError(f"--steps {steps} is too many to search: levels would lie too near to each other.")
    check_writable(config.output_dir)

    reference, real_labels = reference_features(
        dataset, network, config.batch_size, device, config.random_flip, config.dataloader_num_workers
    )
    sampling = Sampling({"ctm": pipe}, network, real_labels, num_samples, config.batch_size)
    depends_on = {
        "scheduler": {k: v for k, v in pipe.scheduler.config.items() if not k.startswith("_")},
        "labels": None if real_labels is None else real_labels.tolist(),
        "sizes": sampling.sizes,
        "device": hardware(device)["device"],
        "torch": torch.__version__,
    }
    tensors = [("reference", reference), *pipe.unet.state_dict().items()]
    common = tensors_digest(tensors, json.dumps(depends_on, sort_keys=True)).hex()[:16]
    results = []
    most = (len(config.seeds) * config.evaluations + len(config.confirm_seeds) * 3) * len(sampling.sizes)
    with tqdm(total=most * sum(config.steps), unit="call") as progress:  # less if a search ends early
        measure = Measure(sampling, Distances(reference), config.output_dir, common, progress)
        for steps, space in spaces.items():
            progress.set_description(f"{num_samples:,} images, {setting_name('ctm', steps)}")
            trials = run_search(
                space, config.gammas, config.evaluations, lambda setting: measure(setting, config.seeds)
            )
            results.append(confirmed(steps, trials, pipe.scheduler, config, measure))

    report = {
        **facts(config, device),
        "num_samples": num_samples,
        "num_reference": len(dataset),
        "features": network.about,
        "results": results,
        "notes": notes,
    }
    write_report(config.output_dir, "tune", report, markdown(report), {"tune": plot(report)})
    presets = {str(row["steps"]): row["preset"] for row in results if row["saved"]}
    if presets:
        save_with_presets(presets, config)
        print(f"{config.pipeline_dir} has presets for {', '.join(presets)} steps.")
    return report


def confirmed(
    steps: int, trials: dict[Setting, list[float]], scheduler: CTMScheduler, config: TuneConfig, measure: Measure
) -> dict:
    """The best of `trials` on the seeds of the search and on others.

    Beside it stand the best of the first gammas ("karras") and the checkpoint's own schedule ("now").
    """
    means = {setting: mean(by_seed) for setting, by_seed in trials.items()}
    first = list(trials)[: len(config.gammas) if steps > 1 else 1]
    karras, best = min(first, key=means.get), min(trials, key=means.get)
    distances = {
        name: {
            "search": summary(measure(setting, config.seeds)),
            "confirm": summary(measure(setting, config.confirm_seeds)),
        }
        for name, setting in (("now", Setting("ctm", steps)), ("karras", karras), ("best", best))
    }
    gain = improvement(distances["now"]["confirm"]["by_seed"], distances["best"]["confirm"]["by_seed"])
    has_preset = str(steps) in (scheduler.config.presets or {})
    return {
        "steps": steps,
        "now_is": "its preset" if has_preset else f"Karras levels, gamma {scheduler.config.gamma:g}",
        "karras_gamma": karras.gamma[0] if steps > 1 else None,
        "preset": best.options,
        **distances,
        "improvement": gain,
        "saved": gain["better"] or config.force,
        "trials": [
            {**setting.options, "by_seed": by_seed, "mean": means[setting]} for setting, by_seed in trials.items()
        ],
    }


def save_with_presets(presets: dict[str, dict[str, list[float]]], config: TuneConfig) -> None:
    """Write the model with `presets` beside those that it has, and the records of its origin and license."""
    pipe = load_model(config.model, ())  # as it was: the other was moved to the device
    presets = (pipe.scheduler.config.presets or {}) | presets
    pipe.scheduler = CTMScheduler.from_config(pipe.scheduler.config, presets=presets)
    with atomic_folder(config.pipeline_dir) as draft:
        pipe.save_pretrained(draft)
        for name in (RECORD, CONVERSION, NOTICE):
            if source := file_of(config.model, name):
                shutil.copyfile(source, os.path.join(draft, name))


def markdown(report: dict) -> str:
    """tune.md."""
    options = report["options"]
    distances, schedules = [], []
    for row in report["results"]:
        gamma = "" if row["karras_gamma"] is None else f" (gamma {row['karras_gamma']:g})"
        distances.append(
            [
                row["steps"],
                *(cell(row[schedule]["search"]) for schedule in ("now", "best")),
                cell(row["now"]["confirm"]),
                cell(row["karras"]["confirm"]) + gamma,
                cell(row["best"]["confirm"]),
                cell(row["improvement"]),
                "yes" if row["saved"] else "no",
            ]
        )
        levels, gammas = (", ".join(map(number, row["preset"][key])) for key in ("sigmas", "gamma"))
        schedules.append([row["steps"], row["now_is"], levels, gammas, len(row["trials"])])
    seeds, others = (", ".join(map(str, options[name])) for name in ("seeds", "confirm_seeds"))
    notes = [
        f"{report['num_samples']:,} samples per schedule and seed, against {report['num_reference']:,} real images, in "
        f"the features `{report['features']['name']}`. All schedules start from the same noise.",
        f"Search on seeds {seeds}; the distance of the best one is too low there, because it was chosen there. "
        f"Other seeds: {others}.",
        "Improvement: the difference of now and found, seed by seed. A preset is saved if the mean is above the "
        f"standard deviation, or with --force true (here: {str(options['force']).lower()}).",
        f"On {report['hardware']['device']}, {report['hardware']['cpu_threads']} threads.",
        *report["notes"],
    ]
    head = ["steps", "now, search", "found, search", "now, other seeds", "best gamma on Karras levels, other seeds"]
    head += ["found, other seeds", "improvement there", "saved"]
    lines = [
        "Frechet distance to real images (lower is better), mean ± standard deviation over seeds:",
        "",
        *markdown_table(head, distances),
        "",
        *markdown_table(["steps", "now", "levels found", "gammas found", "tried"], schedules),
        "",
        *(f"- {note}" for note in notes),
    ]
    return "\n".join(lines) + "\n"


def plot(report: dict):
    """tune.png: how the search went, and distance against steps before and after, on the other seeds."""
    figure, (left, right) = new_figure(10, 4.2, columns=2)
    results = report["results"]
    for row, color in zip(results, itertools.cycle(PALETTE)):
        means = [trial["mean"] for trial in row["trials"]]
        tried, lowest = range(1, len(means) + 1), list(itertools.accumulate(means, min))
        left.plot(tried, means, ".", color=color, alpha=0.4, markersize=4)
        left.step(tried, lowest, where="post", color=color, label=setting_name("ctm", row["steps"]))
    left.set(yscale="log", xlabel="schedules tried", ylabel="Frechet distance, seeds of the search")
    plain_ticks(left)

    steps = [row["steps"] for row in results]
    marks = {
        "now": ("now", "0.4", 0.96),
        "karras": ("best gamma, Karras levels", "#e69f00", 1.0),
        "best": ("found", "#0072b2", 1.04),
    }
    for key, (label, color, shift) in marks.items():
        places = [shift * n for n in steps]
        means, spreads = ([row[key]["confirm"][name] for row in results] for name in ("mean", "std"))
        right.errorbar(places, means, spreads, fmt="o", color=color, capsize=3, markersize=5, label=label)
    right.set_xscale("log", base=2)
    right.set_xticks(steps, [str(n) for n in steps])
    right.set(
        xlim=(steps[0] * 0.7, steps[-1] * 1.4),
        ylim=(0, None),
        xlabel="steps (network evaluations)",
        ylabel="Frechet distance, other seeds",
    )
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=9, frameon=False)
    return figure


if __name__ == "__main__":
    run_program(main, TuneConfig)
