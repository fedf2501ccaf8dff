# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Time to teacher: which objective trains a CTM soonest. `python -m training.study`."""

import itertools
import json
import math
import os
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

import torch
from tqdm.auto import tqdm

from diffusers_ctm import CTMPipeline, CTMScheduler

from . import train_ctm
from .cli.device import choose_device
from .cli.errors import UserError, loading, naming
from .cli.files import read_json, write_files
from .cli.options import POSITIVE, SEED, Checked, option, read_yaml, run_program, typed_options
from .data.images import ImageDataset
from .frozen.vectors import FeaturesSideBySide
from .measure.distances import features_for, reference_features
from .measure.judges import Judges
from .measure.paired import PairedError, why_unlike
from .measure.reports import facts, write_report
from .measure.sampling import Sampling, Setting
from .networks.pipelines import load_heun, load_model, prepare
from .objective.adversarial import is_discriminator_step
from .objective.distances import DistanceOptions
from .objective.objectives import READERS
from .objective.pool import PoolOptions
from .objective.solvers import SOLVERS
from .report.numbers import cell
from .report.plots import PALETTE, new_figure, plain_ticks
from .report.tables import markdown_table, setting_name
from .run.batch import StepRandom
from .run.loop import TrainingRun
from .studies.curves import leaderboard, seconds_until
from .studies.meters import step_times


BATCH = 250  # most images per network evaluation when a run is measured


@dataclass
class StudyConfig(Checked):
    """Train one student by several recipes and see which comes to the quality of the first one soonest.

    Writes a folder for each run, and study.json, study.md and study.png of all that are finished. Finished runs are not
    repeated, and a run that was cut off goes on. Several processes may share the work by --seeds or --only and the same
    --output_dir.
    """

    config: str | None = option(None, "YAML file with any of these options; the command line overrides it.")
    variants: str = option(
        "training/configs/study_digits_variants.yaml",
        "YAML file: `base`, a file of options of training.train_ctm; `common`, options of all runs; `variants`, the "
        "options of each by its name. The others are measured by the first variant.",
    )
    output_dir: str = option("runs/study", "Folder of the study.")
    seeds: list[int] = option([0, 1, 2], "Seeds of the runs of each variant.", must_be=SEED)
    only: list[str] = option(
        [], "Names of the variants to run; default all. Tables and plot show all that are finished."
    )
    eval_every: int = option(250, "Measure each time after this number of iterations.", must_be=POSITIVE)
    eval_steps: list[int] = option([1, 2, 4, 18], "Sampling steps that are measured, at gamma = 0.", must_be=POSITIVE)
    num_samples: int = option(500, "Images per measurement.", must_be=POSITIVE)
    features: list[str] = option(
        ["digits", "assets/digits-perceptual"],
        "Networks of the Frechet distances, as in training.evaluate. The first decides what the target is.",
    )
    paired_samples: int = option(
        250, "Images that are compared with the teacher's own from the same noise.", must_be=POSITIVE
    )
    threads: int = option(1, "CPU threads of a run.", must_be=POSITIVE)
    timing_steps: int = option(12, "Iterations of each timing, after as many to warm up.", must_be=POSITIVE)
    timing_rounds: int = option(
        3,
        "Timings of each variant, in turn with the others, after all runs. Let the machine do nothing else meanwhile.",
        must_be=POSITIVE,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("seeds", "eval_steps", "features"):
            self.check(len(getattr(self, name)) > 0, name, "one or more")
        self.eval_steps = sorted(set(self.eval_steps))

    @property
    def judges(self) -> list[str]:
        """The names of what is measured, as in training.evaluate; the first decides."""
        return ["frechet", *(f"frechet_{number}" for number in range(2, len(self.features) + 1)), "paired"]


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


# Runs -----------------------------------------------------------------------------------------------------------------


class Measure:
    """What all judges say of a CTM, at each number of steps, from the same noise every time."""

    def __init__(self, config: StudyConfig, data: train_ctm.CTMConfig):
        self.config, self.data, self.device = config, data, choose_device("auto")
        self.dataset = ImageDataset(data)
        self.network = FeaturesSideBySide([features_for(self.dataset, name, self.device) for name in config.features])
        reference, self.labels = reference_features(self.dataset, self.network, BATCH, self.device, data.random_flip)
        self.judges = Judges(self.network, reference, kid=False)
        self._paired: PairedError | None = None

    def paired(self, sampling: Sampling) -> PairedError:
        """The teacher's own images from the same noise, made once."""
        if self._paired is None:
            teacher = load_heun(self.data)
            prepare(teacher, "--teacher", self.data, self.dataset, self.device)
            if unlike := why_unlike({"ctm": sampling.pipelines["ctm"], "heun": teacher}):
                raise UserError(f"--variants {self.config.variants}: {unlike}")
            labels = sampling.labels["ctm"]
            labels = None if labels is None else labels[: self.config.paired_samples]
            self._paired = PairedError(teacher, labels, self.config.paired_samples, batch_size=BATCH)
        return self._paired

    def __call__(self, pipe: CTMPipeline) -> dict[str, dict[str, float]]:
        """By number of steps, by judge."""
        prepare(pipe, "--model", self.data, self.dataset, self.device)
        sampling = Sampling({"ctm": pipe}, self.network, self.labels, self.config.num_samples, BATCH)
        judged = {}
        for steps in self.config.eval_steps:
            setting = Setting("ctm", steps, 0.0)
            features, _ = sampling.features(setting, 0, tqdm(disable=True))
            all_judged = {**self.judges(features, None), **self.paired(sampling)(pipe, setting)}
            judged[str(steps)] = {judge: all_judged[judge] for judge in self.config.judges}
        return judged


def run_variant(config: StudyConfig, options: dict[str, Any], folder: str, measure: Measure, progress: tqdm) -> None:
    """Train one variant, measure after every `eval_every` iterations and at the end, and add to folder/curve.json."""
    curve = read_json(folder, "curve.json") or {"options": options, "points": []}
    if curve["options"] != options:
        raise UserError(f"{folder} holds a run with other options; choose another --output_dir.")

    def note(iteration: int, evaluations: int, pipe: CTMPipeline) -> None:
        points = [point for point in curve["points"] if point["iteration"] < iteration]  # what is done again
        point = {"iteration": iteration, "teacher_evaluations": evaluations, "judged": measure(pipe)}
        curve["points"] = [*points, point]
        write_files(folder, {"curve.json": json.dumps(curve, indent=1).encode()})

    def watch(run: TrainingRun) -> None:
        progress.update(1)
        if run.step % config.eval_every == 0 or run.step == options["max_train_steps"]:
            note(run.step, run.folder.record["teacher_evaluations"], run.make_pipeline(run.ema.module))

    run = {"output_dir": f"{folder}/run", "resume_from_checkpoint": "latest", "checkpointing_steps": config.eval_every}
    last = curve["points"][-1]["iteration"] if curve["points"] else 0
    if last < options["max_train_steps"]:
        pipeline = train_ctm.main(train_ctm.CTMConfig(**{**options, **run}), on_step=watch)
        if curve["points"][-1]["iteration"] < options["max_train_steps"]:  # it was cut off after its last checkpoint
            evaluations = read_json(pipeline, "training.json")["teacher_evaluations"]
            note(options["max_train_steps"], evaluations, load_model(pipeline, ()))


def finished_curves(config: StudyConfig, variants: dict[str, dict[str, Any]]) -> dict[str, list[dict]]:
    """The curves of all finished runs in the study's folder, by the name of the variant."""
    curves = {name: [] for name in variants}
    for folder in sorted(os.listdir(config.output_dir)):
        name = folder.rpartition("-seed")[0]
        curve = read_json(os.path.join(config.output_dir, folder), "curve.json")
        points = curve.get("points", [])
        if name in curves and points and points[-1]["iteration"] == variants[name]["max_train_steps"]:
            curves[name].append(curve)
    return {name: runs for name, runs in curves.items() if runs}


# Time -----------------------------------------------------------------------------------------------------------------


def teacher_evaluations(config: train_ctm.CTMConfig, scheduler: CTMScheduler, first: int, last: int) -> int:
    """The images that a solver without a pool shows the teacher in iterations `first` to `last` - 1."""
    sampler = train_ctm.time_sampler(config, scheduler)
    batch, total = config.train_batch_size, 0
    for step in range(first, last):
        if not is_discriminator_step(config, step):
            random = StepRandom(config.seed, step, batch, slice(0, batch), torch.device("cpu"))
            total += batch * SOLVERS[config.solver].evaluations(sampler.draw(batch, random.host).solver_steps)
    return total


def phases(config: StudyConfig, options: dict[str, Any]) -> list[dict[str, Any]]:
    """The parts of a run that take different times: each objective, before and in the adversarial stage, and the first
    iterations, which fill a pool.

    Each has "iterations"; "options" of a run whose iterations "warm" to "until" are like them; and "seconds" per
    iteration, to be measured.
    """
    whole, last = train_ctm.CTMConfig(**options), options["max_train_steps"]
    adversarial = min(whole.discriminator_start, last) if whole.discriminator_weight > 0 else last
    depth = min(whole.pool_size or 0, last)
    fill = depth if depth > 1 else 0
    bounds = sorted({0, last, adversarial, fill, *(stage.start for stage in whole.stages)})
    parts = []
    for start, end in itertools.pairwise(bounds):
        name = whole.stage_at(start).name
        unread = {entry for entry, readers in READERS.items() if name not in readers}
        own = {**options, "objective": [name], "pool_size": whole.pool_size}
        for first, group in (("pool_size", PoolOptions), ("distance", DistanceOptions)):
            if first in unread:
                unread |= {entry.name for entry in fields(group)}
        own = {entry: value for entry, value in own.items() if entry not in unread}
        if whole.discriminator_weight > 0:
            own["discriminator_start"] = 0 if start >= adversarial else 10**6
        warm = timed = config.timing_steps
        if start < fill:
            warm, timed = 1, fill - 1  # the first one also warms up
        elif own.get("pool_size"):  # as many refreshes as there are on average
            warm, timed = max(warm, depth), math.ceil(timed / whole.pool_refresh) * whole.pool_refresh
        own["seed"] = typical_seed(config, own, warm, timed)
        parts.append({"iterations": end - start, "options": own, "warm": warm, "until": warm + timed, "seconds": []})
    return parts


def typical_seed(config: StudyConfig, options: dict[str, Any], warm: int, timed: int) -> int:
    """The one of a hundred seeds whose timed iterations ask the teacher most nearly as often as the runs on average.

    Without a pool, the teacher costs most, and a dozen iterations draw its number of steps too seldom to come near that
    average by themselves.
    """
    if options.get("pool_size") or options["objective"] != ["ctm"]:  # no solver, or one batch now and then
        return config.seeds[0]

    def average(seeds: Iterable[int], first: int, last: int) -> float:
        runs = [train_ctm.CTMConfig(**{**options, "seed": seed}) for seed in seeds]
        return statistics.fmean(teacher_evaluations(run, CTMScheduler(), first, last) for run in runs) / (last - first)

    wanted = average(config.seeds, 0, options["max_train_steps"])
    return min(range(100), key=lambda seed: abs(average([seed], warm, warm + timed) - wanted))


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
            warm, until = phase["warm"], phase["until"]
            marks = step_times(train_ctm.main, train_ctm.CTMConfig(**phase["options"]), until)
            phase["seconds"].append((marks[until - 1] - marks[warm - 1]) / (until - warm))
    write_files(config.output_dir, {"timing.json": json.dumps({"phases": timed}, indent=1).encode()})
    return timed


# Report ---------------------------------------------------------------------------------------------------------------

AXES = {
    "iteration": "iterations",
    "seconds": "seconds of training",
    "teacher_evaluations": "images through the teacher",
}


def cell_or_dash(values: dict | None) -> str:
    return cell(values) if values else "-"


def on_command_line(options: dict[str, Any]) -> str:
    """Options as one types them; None is no option."""
    given = {name: value for name, value in options.items() if value is not None}
    values = {name: value if isinstance(value, list) else [value] for name, value in given.items()}
    return " ".join(f"--{name} {' '.join(map(str, value))}" for name, value in values.items())


def markdown(table: dict[str, Any], report: dict) -> str:
    """study.md."""
    options, rows = report["options"], table["rows"]
    steps = list(map(str, options["eval_steps"]))
    names = [*(f"Frechet distance, `{name}`" for name in options["features"]), "Paired error"]
    judges = dict(zip(report["judges"], names))
    first, decides = next(iter(rows)), report["judges"][0]
    few = setting_name("ctm", options["eval_steps"][0])
    lines = [
        f"Target: the distance {table['target']:.4f} in {few} that {first} reaches at the end, after "
        f"{table['seconds']:,.0f} seconds and {table['teacher_evaluations']:,.0f} images through the teacher "
        f"({judges[decides]}, {options['num_samples']:,} samples at gamma = 0). Mean ± standard deviation over the "
        "seeds of training.",
        "",
    ]
    head = ["", "runs", "iterations to the target", "seconds", f"of {first}'s", "teacher evaluations", f"of {first}'s"]
    costs = [
        [
            name,
            row["runs"],
            cell_or_dash(row["target"]["iteration"]),
            cell_or_dash(row["target"]["seconds"]),
            cell_or_dash(row["share_of_seconds"]),
            cell_or_dash(row["target"]["teacher_evaluations"]),
            cell_or_dash(row["share_of_evaluations"]),
        ]
        for name, row in rows.items()
    ]
    lines += [*markdown_table(head, costs), ""]
    places = {
        "at_target": "Where the target is reached",
        "at_a_third": f"After a third of {first}'s seconds, {table['seconds'] / 3:,.0f}",
        "at_the_end": "At the end of each run",
    }
    for (place, words), (judge, judged) in itertools.product(places.items(), judges.items()):
        lines += [f"{words}, by numbers of steps. {judged}:", ""]
        head = ["", *(["seconds"] if place == "at_the_end" else []), *steps]
        cells = []
        for name, row in rows.items():
            seconds = [cell(row["seconds"])] if place == "at_the_end" else []
            cells.append([name, *seconds, *(cell_or_dash(row[place] and row[place][n][judge]) for n in steps)])
        lines += [*markdown_table(head, cells), ""]
    shared = report["curves"][first][0]["options"]
    lines += [f"A row is `python -m training.train_ctm` with the options of {options['variants']}. {first} has:", ""]
    lines += [f"`{on_command_line(shared)}`", "", "The others have besides:", ""]
    for name, (run, *_) in report["curves"].items():
        own = {entry: value for entry, value in run["options"].items() if shared.get(entry) != value}
        lines += [f"- {name}: `{on_command_line(own)}`"] if own else []
    lines += [
        "",
        "- Between measurements, the points of study.png, what a judge says lies on a line in its logarithm. A run "
        "that is below the target at its first measurement counts as arriving there. '-': not reached, or not measured "
        "there.",
        f"- Paired error: root mean squared difference of {options['paired_samples']} images from the teacher's own "
        "from the same noise, in [-1, 1].",
        f"- Seconds: iterations times the median of {options['timing_rounds']} timings of {options['timing_steps']} "
        "iterations or more, which ask the teacher as often as the run does on average. Each stage, and the filling of "
        "a pool, is timed apart. All variants in turn, "
        f"on {report['hardware']['device']}, {options['threads']} thread(s).",
    ]
    return "\n".join(lines) + "\n"


def plot(curves: dict[str, list[dict]], steps: str, judge: str, target: float):
    """study.png: what a judge says in `steps` steps against each cost, a line per variant, a band over the seeds."""
    figure, axes = new_figure(15, 5.2, columns=3, dpi=110, sharey=True)
    for place, (axis, words) in zip(axes, AXES.items()):
        for number, (name, runs) in enumerate(curves.items()):
            style, color = ("-", "--", ":")[number // len(PALETTE) % 3], PALETTE[number % len(PALETTE)]
            rows = list(zip(*(run["points"] for run in runs)))
            across = [statistics.fmean(point[axis] for point in row) for row in rows]
            values = [[point["judged"][steps][judge] for point in row] for row in rows]
            mean = [statistics.geometric_mean(row) for row in values]
            place.fill_between(across, list(map(min, values)), list(map(max, values)), color=color, alpha=0.08)
            place.plot(across, mean, style, color=color, marker="o", markersize=3, linewidth=1.4, label=name)
        place.axhline(target, color="black", linewidth=0.8, linestyle=":")
        place.set(xlabel=words, yscale="log")
        place.locator_params(axis="x", nbins=5)
        place.grid(alpha=0.3, which="both")
    plain_ticks(axes[0])
    axes[0].set_ylabel(f"Frechet distance, {setting_name('ctm', int(steps))}")
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
    with tqdm(total=sum(variants[name]["max_train_steps"] for name, _ in wanted), unit="iteration") as progress:
        for name, seed in wanted:
            progress.set_description(f"{name}, seed {seed}")
            folder = os.path.join(config.output_dir, f"{name}-seed{seed}")
            run_variant(config, {**variants[name], "seed": seed}, folder, measure, progress)

    curves = finished_curves(config, variants)
    timed = time_variants(config, {name: variants[name] for name in curves})
    for name, runs in curves.items():
        for point in itertools.chain.from_iterable(curve["points"] for curve in runs):
            point["seconds"] = seconds_until(point["iteration"], timed[name])
    points = {name: [curve["points"] for curve in runs] for name, runs in curves.items()}
    table = leaderboard(points, config.eval_steps, config.judges)
    report = {**facts(config, torch.device("cpu")), "judges": config.judges, "curves": curves, "table": table}
    figure = plot(curves, str(config.eval_steps[0]), config.judges[0], table["target"])
    write_report(config.output_dir, "study", report, markdown(table, report), {"study": figure})
    return report


if __name__ == "__main__":
    run_program(main, StudyConfig)
