"""Which choices train a CTM faster: `python -m training.study`."""

import dataclasses
import io
import itertools
import json
import math
import os
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import yaml
from tqdm.auto import tqdm

from diffusers_ctm import CTMScheduler

from . import train_ctm
from .cli.device import choose_device, hardware
from .cli.errors import UserError
from .cli.files import atomic_file, write_files
from .cli.options import Checked, option, run_program
from .data.images import ImageDataset
from .evaluate import EvaluateConfig
from .frozen.vectors import load_feature_network
from .measure.distances import Distances, reference_features
from .measure.sampling import Sampling, Setting
from .networks.pipelines import load_pipelines
from .objective.adversarial import is_discriminator_step
from .objective.solvers import SOLVERS
from .report.numbers import cell
from .run.batch import StepRandom
from .studies.curves import seconds_per_iteration, seconds_until, tabulate
from .studies.meters import step_times
from .train_ctm import CTMConfig


@dataclass
class StudyConfig(Checked):
    """Train variants of one run and compare them at equal iterations, equal time and equal teacher evaluations.

    Writes a folder per run, and study.json, study.md and study.png of all that are finished. Runs that are there are not repeated, one that
    was cut off goes on; several processes may share the work by --seeds or --only and the same --output_dir.
    """

    config: str | None = option(None, "YAML file with any of these options; the command line overrides it.")
    variants: str = option(
        "training/configs/study_digits_variants.yaml",
        "YAML file: `base`, a file of options of training.train_ctm; `common`, options of all runs; `variants`, the options of each by its name. "
        "The first variant is the one that others are compared with.",
    )
    output_dir: str = option("runs/study", "Folder of the study.")
    seeds: list[int] = option([0, 1, 2], "Seeds of the runs of each variant.")
    only: list[str] = option(
        [], "Names of the variants to run; default all. Tables and plot show all that are finished."
    )
    max_train_steps: int = option(800, "Iterations of each run.")
    eval_every: int = option(100, "Measure after every so many iterations.")
    eval_steps: list[int] = option([1, 2, 4], "Sampling steps that are measured, at gamma = 0.")
    num_samples: int = option(1000, "Images per measurement.")
    features: str = option("digits", "Features of the Frechet distance, as in training.evaluate.")
    threads: int = option(1, "CPU threads of a run.")
    timing_steps: int = option(12, "Iterations of each timing, after as many to warm up.")
    timing_rounds: int = option(
        3,
        "Timings of each variant, in turn with the others, after all runs. Let the machine do nothing else meanwhile.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("max_train_steps", "eval_every", "num_samples", "threads", "timing_steps", "timing_rounds")
        self.check(self.max_train_steps % self.eval_every == 0, "eval_every", "a divisor of --max_train_steps")
        self.check(len(self.seeds) > 0, "seeds", "one or more")
        self.check(len(self.eval_steps) > 0 and min(self.eval_steps) > 0, "eval_steps", "one or more, each 1 or more")


def read_variants(path: str) -> dict[str, dict[str, Any]]:
    """The options of `training.train_ctm` for each variant, by name. Raises UserError for a file that is not as StudyConfig says."""
    try:
        with open(path) as file:
            study = yaml.safe_load(file)
        with open(study["base"]) as file:
            base = yaml.safe_load(file)
        shared = {**base, **(study.get("common") or {})}
        variants = {str(name): {**shared, **(options or {})} for name, options in study["variants"].items()}
        for name, options in variants.items():
            try:
                CTMConfig(**options)
            except (UserError, TypeError) as error:
                raise UserError(f"--variants {path}, {name}: {error}") from error
    except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"--variants {path} must be a YAML file with `base` (a file), `common` and `variants`: {error!r}"
        ) from error
    if not variants:
        raise UserError(f"--variants {path} holds no variants.")
    return variants


def teacher_evaluations(config: CTMConfig, scheduler: CTMScheduler, first: int, last: int) -> int:
    """Images that the solver's network sees from iteration `first` to `last` - 1: its times drawn once more."""
    sampler = train_ctm.time_sampler(config, scheduler)
    batch, total = config.train_batch_size, 0
    for step in range(first, last):
        if is_discriminator_step(config, step):
            continue
        random = StepRandom(config.seed, step, batch, slice(0, batch), torch.device("cpu"))
        total += batch * SOLVERS[config.solver].evaluations(sampler.draw(batch, random.host).solver_steps)
    return total


class Measure:
    """Frechet distances of a pipeline's samples, at each number of steps, from the same noise every time."""

    def __init__(self, config: StudyConfig, options: dict[str, Any]):
        data = {f.name: options[f.name] for f in dataclasses.fields(EvaluateConfig) if f.name in options}
        data = {name: value for name, value in data.items() if name not in ("config", "output_dir", "seed")}
        self.config = EvaluateConfig(
            **{**data, "teacher": None, "model": "-", "steps": config.eval_steps, "gammas": [0.0], "seeds": [0]},
            features=config.features,
        )
        self.num_samples = config.num_samples
        self.device = choose_device("auto")
        self.network = load_feature_network(config.features, self.device)
        self.dataset = ImageDataset(self.config)
        self.network.check_images(self.dataset.channels, self.dataset.resolution, self.dataset.resolution)
        reference, self.labels = reference_features(
            self.dataset, self.network, self.config.batch_size, self.device, self.config.random_flip
        )
        self.distances = Distances(reference)

    def __call__(self, pipeline: str) -> dict[str, float]:
        self.config.model = pipeline
        pipelines = load_pipelines(self.config, self.dataset, self.device)
        sampling = Sampling(pipelines, self.network, self.labels, self.num_samples, self.config.batch_size)
        found = {}
        for steps in self.config.steps:
            setting = Setting("ctm", steps, None if steps == 1 else 0.0)
            features, _ = sampling.features(setting, 0, tqdm(disable=True))
            found[str(steps)] = self.distances(features)["frechet"]
        return found


def run_variant(config: StudyConfig, options: dict[str, Any], folder: str, measure: Measure, progress: tqdm) -> None:
    """Train one variant in stretches of `eval_every` iterations, measuring after each; append to folder/curve.json."""
    path = os.path.join(folder, "curve.json")
    curve = json.loads(open(path).read()) if os.path.exists(path) else {"options": options, "points": []}
    if curve["options"] != options:
        raise UserError(f"{folder} holds a run with other options; choose another --output_dir.")
    points = curve["points"]
    trained = os.path.join(folder, "run")

    for until in range(config.eval_every, config.max_train_steps + 1, config.eval_every):
        if points and until <= points[-1]["iteration"]:
            progress.update(config.eval_every)
            continue
        place = {"output_dir": trained, "max_train_steps": until, "resume_from_checkpoint": "latest"}
        pipeline = train_ctm.main(CTMConfig(**{**options, **place}))
        before = points[-1] if points else {"teacher_evaluations": 0, "iteration": 0}
        asked, scheduler = CTMConfig(**options), CTMScheduler.from_pretrained(pipeline, subfolder="scheduler")
        points.append(
            {
                "iteration": until,
                "teacher_evaluations": before["teacher_evaluations"]
                + teacher_evaluations(asked, scheduler, before["iteration"], until),
                "frechet": measure(pipeline),
            }
        )
        with atomic_file(path) as draft, open(draft, "w") as file:
            json.dump(curve, file, indent=1)
        progress.update(config.eval_every)


def phases(config: StudyConfig, options: dict[str, Any]) -> list[dict[str, Any]]:
    """What a run consists of, before and in the adversarial stage: "iterations", "options" of a run whose first iterations are like them, and "seconds"
    per iteration, to be measured.

    The seed of those is one for which the iterations that are timed ask the teacher as often as the study's runs do in the mean: it is what costs most,
    and a dozen iterations draw its number of steps too seldom to come near to that mean by themselves.
    """
    whole, start = config.max_train_steps, 0
    if options.get("discriminator_weight", 0) > 0:
        start = min(options.get("discriminator_start", 0), whole)
    found = []
    if start > 0:
        found.append((start, {**options, "discriminator_start": max(whole, 2 * config.timing_steps)}))
    if start < whole:
        found.append((whole - start, {**options, "discriminator_start": 0} if start else options))
    return [{"iterations": n, "options": {**own, "seed": typical_seed(config, own)}, "seconds": []} for n, own in found]


def typical_seed(config: StudyConfig, options: dict[str, Any]) -> int:
    """The one of a hundred seeds whose timed iterations ask the teacher most nearly as often as those of the study's seeds in the mean."""

    def mean(seeds: Iterable[int], first: int, last: int) -> float:
        runs = [CTMConfig(**{**options, "seed": seed}) for seed in seeds]
        return statistics.fmean(teacher_evaluations(run, CTMScheduler(), first, last) for run in runs) / (last - first)

    wanted = mean(config.seeds, 0, config.max_train_steps)
    timed = config.timing_steps, 2 * config.timing_steps
    return min(range(100), key=lambda seed: abs(mean([seed], *timed) - wanted))


def time_variants(config: StudyConfig, variants: dict[str, dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The `phases` of each variant, timed, a value a round; kept in output_dir/timing.json, so that only new variants
    bring a new timing."""
    timed = {name: phases(config, options) for name, options in variants.items()}
    path = os.path.join(config.output_dir, "timing.json")
    if os.path.exists(path):
        with open(path) as file:
            kept = json.load(file).get("phases", {})
        same = {name: [{**phase, "seconds": []} for phase in found] for name, found in kept.items()} == timed
        if same and all(len(p["seconds"]) >= config.timing_rounds for found in kept.values() for p in found):
            return kept
    for _ in tqdm(range(config.timing_rounds), "Timing", unit="round"):
        for phase in itertools.chain.from_iterable(timed.values()):
            marks = step_times(phase["options"], 2 * config.timing_steps)
            taken = (marks[-1] - marks[config.timing_steps - 1]) / config.timing_steps
            phase["seconds"].append(taken)
    with atomic_file(path) as draft, open(draft, "w") as file:
        json.dump({"phases": timed}, file, indent=1)
    return timed


AXES = {
    "iteration": "iterations",
    "seconds": "seconds of training",
    "teacher_evaluations": "images through the teacher",
}


def markdown(table: dict[str, Any], config: StudyConfig, report: dict) -> str:
    common = table["common"]
    lines = [
        f"Frechet distance (lower is better; features `{config.features}`, {config.num_samples:,} samples at gamma = 0), mean ± standard deviation "
        f"over the seeds of training; in columns the number of sampling steps.",
        "",
    ]
    steps = list(map(str, config.eval_steps))
    rows, names = table["rows"], [f"{n} step{'s' if n != '1' else ''}" for n in steps]
    for axis in ("iteration", "seconds"):
        lines += [f"At equal {AXES[axis]}, {common[axis]:,.0f}:", ""]
        head = ["", "runs", "ms per iteration", "teacher evaluations per image", *names]
        lines += ["| " + " | ".join(head) + " |", "|---" + "|--:" * (len(head) - 1) + "|"]
        for name, row in rows.items():
            cells = [name, str(row["runs"])]
            cells += [cell(row[column]) for column in ("milliseconds_per_iteration", "teacher_evaluations_per_image")]
            cells += [cell(row[axis][n]) if row[axis][n] else "-" for n in steps]
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    first, *others = rows
    if others:  # At what all reach, those that ask the teacher most have hardly begun.
        lines += [f"At equal {AXES['teacher_evaluations']}, as many as both a variant and {first} reach:", ""]
        head = ["", AXES["teacher_evaluations"], *(f"{words}{of}" for words in names for of in ("", f", {first}"))]
        lines += ["| " + " | ".join(head) + " |", "|---" + "|--:" * (len(head) - 1) + "|"]
    for name in others:
        beside_first = rows[name]["beside_first"]
        pairs = [value for n in steps for value in beside_first["distances"][n]]
        cells = [name, f"{beside_first['value']:,.0f}", *(cell(value) if value else "-" for value in pairs)]
        lines.append("| " + " | ".join(cells) + " |")
    lines.append("")
    lines += [
        f"- {config.max_train_steps:,} iterations per run, measured every {config.eval_every}; between measurements along a line in the logarithm.",
        f"- Seconds: iterations times the median of {config.timing_rounds} timings of {config.timing_steps} iterations that ask the teacher as often "
        "as the runs do in the mean, before and in the adversarial stage apart; all variants in turn, on "
        f"{report['hardware']['device']}, {config.threads} thread(s).",
        "- '-': the variant's runs end, or are first measured, beyond that point.",
    ]
    return "\n".join(lines) + "\n"


def plot(curves: dict[str, list[dict]], config: StudyConfig) -> bytes:
    """study.png: distance in the fewest steps against each axis, a line per variant, bands from the best to the worst seed."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 5.2), dpi=110, layout="constrained")
    steps = str(config.eval_steps[0])
    axes = figure.subplots(1, 3, sharey=True)
    for place, (axis, words) in zip(axes, AXES.items()):
        for number, (name, runs) in enumerate(curves.items()):
            colour, style = colormaps["tab10"](number % 10), ("-", "--", ":")[number // 10 % 3]
            rows = list(zip(*(run["points"] for run in runs)))
            across = [sum(point[axis] for point in row) / len(row) for row in rows]
            values = [[point["frechet"][steps] for point in row] for row in rows]
            mean = [math.exp(sum(map(math.log, row)) / len(row)) for row in values]
            place.fill_between(across, list(map(min, values)), list(map(max, values)), color=colour, alpha=0.08)
            place.plot(across, mean, style, color=colour, marker="o", markersize=3, linewidth=1.4, label=name)
        place.set_xlabel(words)
        place.set_yscale("log")
        place.grid(alpha=0.3, which="both")
    axes[0].set_ylabel(f"Frechet distance, {steps} step{'s' if steps != '1' else ''}")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=9, frameon=False)
    picture = io.BytesIO()
    FigureCanvasAgg(figure).print_png(picture)
    return picture.getvalue()


def main(config: StudyConfig) -> dict:
    """Run what is missing, then compare all finished runs; return what study.json holds."""
    torch.set_num_threads(config.threads)
    variants = read_variants(config.variants)
    unknown = [name for name in config.only if name not in variants]
    if unknown:
        raise UserError(f"--only {unknown[0]} is no variant of {config.variants}; it has {', '.join(variants)}.")
    measure = None
    wanted = [(name, seed) for seed in config.seeds for name in variants if not config.only or name in config.only]
    with tqdm(total=len(wanted) * config.max_train_steps, unit="iteration") as progress:
        for name, seed in wanted:
            progress.set_description(f"{name}, seed {seed}")
            options = {**variants[name], "seed": seed}
            measure = measure or Measure(config, options)
            run_variant(config, options, os.path.join(config.output_dir, f"{name}-seed{seed}"), measure, progress)

    curves: dict[str, list[dict]] = {}
    for name in variants:
        for folder in sorted(os.listdir(config.output_dir)):
            path = os.path.join(config.output_dir, folder, "curve.json")
            if folder.rpartition("-seed")[0] == name and os.path.exists(path):
                curve = json.loads(open(path).read())
                if curve["points"] and curve["points"][-1]["iteration"] >= config.max_train_steps:
                    curve["points"] = [p for p in curve["points"] if p["iteration"] <= config.max_train_steps]
                    curves.setdefault(name, []).append(curve)
    timed = time_variants(config, {name: options for name, options in variants.items() if name in curves})
    for name, runs in curves.items():
        for curve in runs:
            for point in curve["points"]:
                point["seconds"] = seconds_until(point["iteration"], timed[name])
    seconds = {name: seconds_per_iteration(found) for name, found in timed.items()}
    report = {"options": dataclasses.asdict(config), "hardware": hardware(torch.device("cpu")), "curves": curves}
    report["table"] = tabulate(curves, seconds, config.eval_steps)
    text = markdown(report["table"], config, report)
    files = {
        "study.json": (json.dumps(report, indent=1) + "\n").encode(),
        "study.md": text.encode(),
        "study.png": plot(curves, config),
    }
    write_files(config.output_dir, files)
    print(f"\n{text}")
    return report


if __name__ == "__main__":
    run_program(main, StudyConfig)
