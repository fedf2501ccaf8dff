# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Compare choices of training a CTM: `python -m training.study`."""

import itertools
import json
import os
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from tqdm.auto import tqdm

from diffusers_ctm import CTMScheduler

from . import train_ctm
from .cli.device import choose_device
from .cli.errors import UserError, loading, naming
from .cli.files import read_json, write_files
from .cli.options import POSITIVE, SEED, Checked, option, read_yaml, run_program, typed_options
from .cli.shared_options import DataOptions
from .data.images import ImageDataset
from .measure.distances import Distances, features_for, reference_features
from .measure.reports import facts, write_report
from .measure.sampling import Sampling, Setting
from .networks.pipelines import load_model, prepare
from .objective.adversarial import is_discriminator_step
from .objective.solvers import SOLVERS
from .report.numbers import cell
from .report.plots import PALETTE, new_figure
from .run.batch import StepRandom
from .studies.curves import seconds_per_iteration, seconds_until, tabulate
from .studies.meters import step_times


BATCH = 250  # most images per network evaluation when a run is measured


@dataclass
class StudyConfig(Checked):
    """Train variants of one run and compare them at equal iterations, equal time and equal teacher evaluations.

    Writes a folder for each run, and study.json, study.md and study.png of all that are finished. Finished runs are not
    repeated, and a run that was cut off goes on. Several processes may share the work by --seeds or --only and the same
    --output_dir.
    """

    config: str | None = option(None, "YAML file with any of these options; the command line overrides it.")
    variants: str = option(
        "training/configs/study_digits_variants.yaml",
        "YAML file: `base`, a file of options of training.train_ctm; `common`, options of all runs; `variants`, the "
        "options of each by its name. The others are compared with the first variant.",
    )
    output_dir: str = option("runs/study", "Folder of the study.")
    seeds: list[int] = option([0, 1, 2], "Seeds of the runs of each variant.", must_be=SEED)
    only: list[str] = option(
        [], "Names of the variants to run; default all. Tables and plot show all that are finished."
    )
    max_train_steps: int = option(800, "Iterations of each run.", must_be=POSITIVE)
    eval_every: int = option(100, "Measure each time after this number of iterations.", must_be=POSITIVE)
    eval_steps: list[int] = option([1, 2, 4], "Sampling steps that are measured, at gamma = 0.", must_be=POSITIVE)
    num_samples: int = option(1000, "Images per measurement.", must_be=POSITIVE)
    features: str = option("digits", "Features of the Frechet distance, as in training.evaluate.")
    threads: int = option(1, "CPU threads of a run.", must_be=POSITIVE)
    timing_steps: int = option(12, "Iterations of each timing, after as many to warm up.", must_be=POSITIVE)
    timing_rounds: int = option(
        3,
        "Timings of each variant, in turn with the others, after all runs. Let the machine do nothing else meanwhile.",
        must_be=POSITIVE,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(self.max_train_steps % self.eval_every == 0, "eval_every", "a divisor of --max_train_steps")
        for name in ("seeds", "eval_steps"):
            self.check(len(getattr(self, name)) > 0, name, "one or more")


def read_variants(path: str) -> dict[str, dict[str, Any]]:
    """The options of `training.train_ctm` for each variant, by name. Raises UserError for a file of another form."""
    with loading(f"--variants {path}", "It must be a YAML file with `base` (a file), `common` and `variants`."):
        study = read_yaml(path)
        base = read_yaml(study["base"])
        shared = {**base, **(study.get("common") or {})}
        variants = {str(name): {**shared, **(options or {})} for name, options in study["variants"].items()}
        for name, options in variants.items():
            with naming(f"variants {path}, {name}"):
                variants[name] = typed_options(train_ctm.CTMConfig, options)
    return variants


def teacher_evaluations(config: train_ctm.CTMConfig, scheduler: CTMScheduler, first: int, last: int) -> int:
    """The images that the solver's network sees from iteration `first` to `last` - 1: their times are drawn again."""
    sampler = train_ctm.time_sampler(config, scheduler)
    batch, total = config.train_batch_size, 0
    for step in range(first, last):
        if not is_discriminator_step(config, step):
            random = StepRandom(config.seed, step, batch, slice(0, batch), torch.device("cpu"))
            total += batch * SOLVERS[config.solver].evaluations(sampler.draw(batch, random.host).solver_steps)
    return total * (2 if config.teacher_is_guided else 1)


# Runs -----------------------------------------------------------------------------------------------------------------


class Measure:
    """Frechet distances of a pipeline's samples, at each number of steps, from the same noise every time."""

    def __init__(self, config: StudyConfig, data: DataOptions):
        self.config, self.data, self.device = config, data, choose_device("auto")
        self.dataset = ImageDataset(data)
        self.network = features_for(self.dataset, config.features, self.device)
        reference, self.labels = reference_features(self.dataset, self.network, BATCH, self.device, data.random_flip)
        self.distances = Distances(reference)

    def __call__(self, pipeline: str) -> dict[str, float]:
        pipe = load_model(pipeline, ())
        prepare(pipe, "--model", self.data, self.dataset, self.device)
        sampling = Sampling({"ctm": pipe}, self.network, self.labels, self.config.num_samples, BATCH)
        features = {
            str(steps): sampling.features(Setting("ctm", steps, 0.0), 0, tqdm(disable=True))[0]
            for steps in self.config.eval_steps
        }
        return {steps: self.distances(each)["frechet"] for steps, each in features.items()}


def run_variant(config: StudyConfig, options: dict[str, Any], folder: str, measure: Measure, progress: tqdm) -> None:
    """Train one variant in stretches of `eval_every` iterations, measure after each, and add to folder/curve.json."""
    curve = read_json(folder, "curve.json") or {"options": options, "points": []}
    if curve["options"] != options:
        raise UserError(f"{folder} holds a run with other options; choose another --output_dir.")
    before = curve["points"][-1] if curve["points"] else {"teacher_evaluations": 0, "iteration": 0}
    for until in range(config.eval_every, config.max_train_steps + 1, config.eval_every):
        if until > before["iteration"]:
            run = {"output_dir": f"{folder}/run", "max_train_steps": until, "resume_from_checkpoint": "latest"}
            pipeline = train_ctm.main(train_ctm.CTMConfig(**{**options, **run}))
            scheduler = CTMScheduler.from_pretrained(pipeline, subfolder="scheduler")
            evaluations = teacher_evaluations(train_ctm.CTMConfig(**options), scheduler, before["iteration"], until)
            before = {
                "iteration": until,
                "teacher_evaluations": before["teacher_evaluations"] + evaluations,
                "frechet": measure(pipeline),
            }
            curve["points"].append(before)
            write_files(folder, {"curve.json": json.dumps(curve, indent=1).encode()})
        progress.update(config.eval_every)


def finished_curves(config: StudyConfig, names: Iterable[str]) -> dict[str, list[dict]]:
    """The curves of all finished runs in the study's folder, by the name of the variant."""
    curves = {name: [] for name in names}
    for folder in sorted(os.listdir(config.output_dir)):
        runs = curves.get(folder.rpartition("-seed")[0])
        curve = read_json(os.path.join(config.output_dir, folder), "curve.json")
        points = [p for p in curve.get("points", []) if p["iteration"] <= config.max_train_steps]
        if runs is not None and points and points[-1]["iteration"] == config.max_train_steps:
            runs.append({**curve, "points": points})
    return {name: runs for name, runs in curves.items() if runs}


# Time -----------------------------------------------------------------------------------------------------------------


def phases(config: StudyConfig, options: dict[str, Any]) -> list[dict[str, Any]]:
    """The parts of a run, before and in the adversarial stage.

    Each has "iterations", "options" of a run whose first iterations are like them, and "seconds" per iteration, to be
    measured.

    The options have a seed for which the timed iterations ask the teacher as often as the study's runs do on average.
    The teacher costs most, and a dozen iterations draw its number of steps too seldom to come near that average by
    themselves.
    """
    iterations = config.max_train_steps
    start = min(options.get("discriminator_start", 0), iterations) if options.get("discriminator_weight", 0) > 0 else 0
    parts = []
    if start > 0:
        parts.append((start, {**options, "discriminator_start": max(iterations, 2 * config.timing_steps)}))
    if start < iterations:
        parts.append((iterations - start, {**options, "discriminator_start": 0} if start else options))
    return [{"iterations": n, "options": {**o, "seed": typical_seed(config, o)}, "seconds": []} for n, o in parts]


def typical_seed(config: StudyConfig, options: dict[str, Any]) -> int:
    """The one of a hundred seeds whose timed iterations ask the teacher most nearly as often as the runs on average."""

    def average(seeds: Iterable[int], first: int, last: int) -> float:
        runs = [train_ctm.CTMConfig(**{**options, "seed": seed}) for seed in seeds]
        return statistics.fmean(teacher_evaluations(run, CTMScheduler(), first, last) for run in runs) / (last - first)

    wanted = average(config.seeds, 0, config.max_train_steps)
    warm = config.timing_steps
    return min(range(100), key=lambda seed: abs(average([seed], warm, 2 * warm) - wanted))


def time_variants(config: StudyConfig, variants: dict[str, dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The timed `phases` of each variant, one value a round.

    They are kept in output_dir/timing.json, so that only new variants bring a new timing.
    """
    timed = {name: phases(config, options) for name, options in variants.items()}
    kept = read_json(config.output_dir, "timing.json").get("phases", {})
    untimed = {name: [{**phase, "seconds": []} for phase in parts] for name, parts in kept.items()}
    if untimed == timed and all(len(p["seconds"]) >= config.timing_rounds for parts in kept.values() for p in parts):
        return kept
    for _ in tqdm(range(config.timing_rounds), "Timing", unit="round"):
        for phase in itertools.chain.from_iterable(timed.values()):
            marks = step_times(train_ctm.main, train_ctm.CTMConfig(**phase["options"]), 2 * config.timing_steps)
            phase["seconds"].append((marks[-1] - marks[config.timing_steps - 1]) / config.timing_steps)
    write_files(config.output_dir, {"timing.json": json.dumps({"phases": timed}, indent=1).encode()})
    return timed


# Report ---------------------------------------------------------------------------------------------------------------

AXES = {
    "iteration": "iterations",
    "seconds": "seconds of training",
    "teacher_evaluations": "images through the teacher",
}


def table_lines(head: list[str], rows: list[list[str]]) -> list[str]:
    """A table in Markdown, with an empty line after it."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, *rows)]
    return [lines[0], "|---" + "|--:" * (len(head) - 1) + "|", *lines[1:], ""]


def markdown(table: dict[str, Any], report: dict) -> str:
    """study.md."""
    options, common, rows = report["options"], table["common"], table["rows"]
    steps = list(map(str, options["eval_steps"]))
    names = [f"{n} step{'s' if n != '1' else ''}" for n in steps]
    lines = [
        f"Frechet distance (lower is better; features `{options['features']}`, {options['num_samples']:,} samples at "
        "gamma = 0), mean ± standard deviation over the seeds of training. The last columns are numbers of steps.",
        "",
    ]
    for axis in ("iteration", "seconds"):
        lines += [f"At equal {AXES[axis]}, {common[axis]:,.0f}:", ""]
        cells = []
        for name, row in rows.items():
            measured = [row["milliseconds_per_iteration"], row["teacher_evaluations_per_image"], *row[axis].values()]
            cells.append([name, str(row["runs"]), *(cell(value) if value else "-" for value in measured)])
        lines += table_lines(["", "runs", "ms per iteration", "teacher evaluations per image", *names], cells)
    first, *others = rows
    if others:  # at the evaluations that all variants reach, those that ask the teacher most have hardly begun
        lines += [f"At equal {AXES['teacher_evaluations']}, as many as both a variant and {first} reach:", ""]
        cells = []
        for name in others:
            beside = rows[name]["beside_first"]
            pairs = [value for n in steps for value in beside["distances"][n]]
            cells.append([name, f"{beside['value']:,.0f}", *(cell(value) if value else "-" for value in pairs)])
        head = [words + of for words in names for of in ("", f", {first}")]
        lines += table_lines(["", AXES["teacher_evaluations"], *head], cells)
    lines += [
        f"- {options['max_train_steps']:,} iterations per run, measured every {options['eval_every']}. Between "
        "measurements, distances lie on a line in the logarithm.",
        f"- Seconds: iterations times the median of {options['timing_rounds']} timings of {options['timing_steps']} "
        "iterations that ask the teacher as often as the runs do on average. The time before the adversarial stage and "
        "the time in it are measured apart. All variants in turn, "
        f"on {report['hardware']['device']}, {options['threads']} thread(s).",
        "- '-': the variant's runs end, or are first measured, beyond that point.",
    ]
    return "\n".join(lines) + "\n"


def plot(curves: dict[str, list[dict]], steps: str):
    """study.png: distance in `steps` steps against each axis, a line per variant, a band from best to worst seed."""
    figure, axes = new_figure(15, 5.2, columns=3, dpi=110, sharey=True)
    for place, (axis, words) in zip(axes, AXES.items()):
        for number, (name, runs) in enumerate(curves.items()):
            style, color = ("-", "--", ":")[number // len(PALETTE) % 3], PALETTE[number % len(PALETTE)]
            rows = list(zip(*(run["points"] for run in runs)))
            across = [statistics.fmean(point[axis] for point in row) for row in rows]
            values = [[point["frechet"][steps] for point in row] for row in rows]
            mean = [statistics.geometric_mean(row) for row in values]
            place.fill_between(across, list(map(min, values)), list(map(max, values)), color=color, alpha=0.08)
            place.plot(across, mean, style, color=color, marker="o", markersize=3, linewidth=1.4, label=name)
        place.set(xlabel=words, yscale="log")
        place.grid(alpha=0.3, which="both")
    axes[0].set_ylabel(f"Frechet distance, {steps} step{'s' if steps != '1' else ''}")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=9, frameon=False)
    return figure


def main(config: StudyConfig) -> dict:
    """Run what is missing, then compare all finished runs; return the content of study.json."""
    torch.set_num_threads(config.threads)
    variants = read_variants(config.variants)
    for name in config.only:
        if name not in variants:
            raise UserError(f"--only {name} is no variant of {config.variants}; it has {', '.join(variants)}.")
    wanted = [(name, seed) for seed in config.seeds for name in config.only or variants]
    measure = Measure(config, train_ctm.CTMConfig(**next(iter(variants.values()))))
    with tqdm(total=len(wanted) * config.max_train_steps, unit="iteration") as progress:
        for name, seed in wanted:
            progress.set_description(f"{name}, seed {seed}")
            folder = os.path.join(config.output_dir, f"{name}-seed{seed}")
            run_variant(config, {**variants[name], "seed": seed}, folder, measure, progress)

    curves = finished_curves(config, variants)
    timed = time_variants(config, {name: variants[name] for name in curves})
    for name, runs in curves.items():
        for point in itertools.chain.from_iterable(curve["points"] for curve in runs):
            point["seconds"] = seconds_until(point["iteration"], timed[name])
    seconds = {name: seconds_per_iteration(parts) for name, parts in timed.items()}
    table = tabulate(curves, seconds, config.eval_steps)
    report = {**facts(config, torch.device("cpu")), "curves": curves, "table": table}
    figure = plot(curves, str(config.eval_steps[0]))
    write_report(config.output_dir, "study", report, markdown(table, report), {"study": figure})
    return report


if __name__ == "__main__":
    run_program(main, StudyConfig)
