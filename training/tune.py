"""Find the levels and gamma that suit a checkpoint for given numbers of steps: `python -m training.tune --model runs/digits/pipeline`."""

import datetime
import hashlib
import io
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from tqdm.auto import tqdm

from diffusers_ctm import CTMScheduler

from .cli.device import choose_device, hardware
from .cli.errors import UserError
from .cli.files import WRITE_ERRORS, atomic_folder, check_writable, write_files
from .cli.options import option, run_program
from .cli.shared_options import DataOptions
from .frozen.vectors import FEATURES_HELP
from .hub.client import file_of
from .hub.record import CONVERSION, NOTICE, RECORD
from .measure.distances import MOST_SAMPLES, Distances, reference_features, what_is_compared
from .measure.sampling import Sampling
from .measure.schedules import LEAST_GAP, Schedule, Space, Trial, run_search
from .networks.pipelines import load_model, prepare
from .report.numbers import cell, number, summary


@dataclass
class TuneConfig(DataOptions):
    """Search levels and gamma for given numbers of steps, confirm them on other seeds, save them as the checkpoint's presets.

    Writes tune.json, tune.md, tune.png and `pipeline`, a copy of the model whose scheduler knows the presets. What was measured stays in
    cache.jsonl: the same command goes on where it was interrupted.
    """

    config: str | None = option(None, "YAML file with any of these options; the command line overrides it.")
    model: str | None = option(None, "The CTM: a folder or a repository on the Hub. It is not changed.")
    output_dir: str = option("runs/tune", "Folder for the results.")
    steps: list[int] = option([2, 4], "Numbers of steps; each step is one network evaluation.")
    evaluations: int = option(60, "Most schedules to try for each number of steps.")
    gammas: list[float] = option([0.0, 0.5, 1.0], "Values of gamma to begin with, on the Karras levels.")
    first_level: bool = option(
        False,
        "Search the level of the first step too; otherwise sampling starts at sigma_max. One step has nothing else.",
    )
    num_samples: int | None = option(
        None, f"Images per schedule and seed. Default: as many as there are reference images, at most {MOST_SAMPLES:,}."
    )
    seeds: list[int] = option([0, 1], "Seeds of the search: all schedules are tried on the same noise.")
    confirm_seeds: list[int] = option(
        [100, 101, 102, 103, 104], "Other seeds, on which the best schedule is measured once more; two or more."
    )
    force: bool = option(
        False,
        "Save presets too that are not better, on --confirm_seeds, than what the checkpoint does now by more than the spread of the difference.",
    )
    batch_size: int = option(250, "Most images per network evaluation.")
    features: str = option("digits", FEATURES_HELP)
    device: str = option("auto", "'cpu', 'cuda', 'cuda:1', ..., or 'auto': a GPU if there is one.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.model:
            raise UserError("--model is needed: a folder or a repository on the Hub with a CTM.")
        for name in ("steps", "gammas", "seeds", "confirm_seeds"):
            values = sorted(set(getattr(self, name)))
            self.check(len(values) > 0, name, "one value or more")
            setattr(self, name, values)
        self.check(self.steps[0] >= 1, "steps", "1 or more")
        if self.steps[0] == 1 and not self.first_level:
            raise UserError(
                "--steps 1 has no level and no gamma to choose but where it starts: give --first_level true."
            )
        self.check(0 <= self.gammas[0] and self.gammas[-1] <= 1, "gammas", "in [0, 1]")
        self.check(self.seeds[0] >= 0, "seeds", "0 or more")
        self.check(self.confirm_seeds[0] >= 0, "confirm_seeds", "0 or more")
        self.check(len(self.confirm_seeds) > 1, "confirm_seeds", "two different seeds or more")
        if set(self.seeds) & set(self.confirm_seeds):
            raise UserError("--confirm_seeds must be other seeds than --seeds: those the best schedule was chosen on.")
        self.check(self.num_samples is None or self.num_samples > 1, "num_samples", "2 or more")
        self.check_positive("batch_size", "evaluations")
        self.check(self.evaluations > len(self.gammas), "evaluations", f"more than --gammas has ({len(self.gammas)})")
        self.check_folder("output_dir")
        if os.path.realpath(self.model) == os.path.realpath(self.pipeline_dir):
            raise UserError(
                f"--output_dir {self.output_dir} would replace --model {self.model}; choose another folder."
            )

    @property
    def pipeline_dir(self) -> str:
        return os.path.join(self.output_dir, "pipeline")


# What was measured --------------------------------------------------------------------------------------------------


class Cache:
    """Distances by what they depend on, in a file that grows by a line with each, so that nothing is measured twice.

    Args:
        path: the file.
        common: all that measurements depend on beside schedule and seed. Those of other runs stay in the file and are not used.
    """

    def __init__(self, path: str, common: dict[str, Any]):
        self.path = path
        self.common = hashlib.sha256(json.dumps(common, sort_keys=True).encode()).hexdigest()[:16]
        self.known: dict[str, float] = {}
        try:
            with open(path, encoding="utf-8") as file:
                lines = file.read().splitlines()
        except FileNotFoundError:
            lines = []
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path} cannot be read: {error}. Remove it or choose another --output_dir.") from error
        for line in lines:
            try:
                found = json.loads(line)
                self.known[found["key"]] = float(found["frechet"])
            except (ValueError, KeyError, TypeError):
                continue  # the process was killed in the middle of a line

    def key(self, schedule: Schedule, seed: int) -> str:
        return json.dumps([self.common, schedule.options, seed])

    def get(self, schedule: Schedule, seed: int) -> float | None:
        return self.known.get(self.key(schedule, seed))

    def put(self, schedule: Schedule, seed: int, distance: float) -> None:
        key = self.key(schedule, seed)
        self.known[key] = distance
        try:
            os.makedirs(os.path.dirname(self.path), exist_ok=True)
            with open(self.path, "a", encoding="utf-8") as file:
                file.write("\n" + json.dumps({"key": key, "frechet": distance}))  # a line that was cut off ends here
        except WRITE_ERRORS as error:
            raise UserError(f"{self.path} could not be written: {error}.") from error


def weights_digest(network: torch.nn.Module) -> str:
    """Of all weights and their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class Measure:
    """The distance of a schedule on each of some seeds, from the cache where it is known.

    Args:
        sampling, distances: of `training.evaluate`.
        cache: what is known.
        progress: counts network calls.
    """

    def __init__(self, sampling: Sampling, distances: Distances, cache: Cache, progress: tqdm):
        self.sampling, self.distances, self.cache, self.progress = sampling, distances, cache, progress

    def __call__(self, schedule: Schedule, seeds: Sequence[int]) -> list[float]:
        found = []
        for seed in seeds:
            distance = self.cache.get(schedule, seed)
            if distance is None:
                features, _ = self.sampling.features(schedule, seed, self.progress)
                distance = self.distances(features)["frechet"]
                self.cache.put(schedule, seed, distance)
            else:
                self.progress.update(schedule.nfe * len(self.sampling.sizes))
            found.append(distance)
        return found


def improvement(now: Sequence[float], best: Sequence[float]) -> dict[str, Any]:
    """By how much `best` is lower than `now`, seed by seed.

    `better` if that is, in the mean, more than its standard deviation over the seeds, and more than a thousandth of `now`, which the
    rounding of levels may make.
    """
    found = summary([a - b for a, b in zip(now, best, strict=True)])
    return {**found, "better": found["mean"] > max(found["std"], 1e-3 * sum(now) / len(now))}


# The program --------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def main(config: TuneConfig) -> dict:
    """Search, confirm, write; return what tune.json holds."""
    device = choose_device(config.device)
    network, dataset, num_samples, notes = what_is_compared(config.features, config, config.num_samples, device)
    pipe = load_model(config.model, ())
    prepare(pipe, "--model", config, dataset, device)
    spaces = {steps: Space(steps, pipe.scheduler, config.first_level) for steps in config.steps}
    for steps, space in spaces.items():
        if space.highest < LEAST_GAP * steps:
            raise UserError(f"--steps {steps} is too many to search: levels would lie too near to each other.")
    check_writable(config.output_dir)

    reference, real_labels = reference_features(dataset, network, config, config.batch_size, device)
    distances = Distances(reference)
    sampling = Sampling({"ctm": pipe}, network, real_labels, num_samples, config.batch_size)
    common = {
        "weights": weights_digest(pipe.unet),
        "scheduler": {k: v for k, v in pipe.scheduler.config.items() if not k.startswith("_")},
        "reference": hashlib.sha256(reference.contiguous().numpy().tobytes()).hexdigest(),
        "labels": None if real_labels is None else real_labels.tolist(),
        "sizes": sampling.sizes,
        "device": hardware(device)["device"],
        "torch": torch.__version__,
    }
    cache = Cache(os.path.join(config.output_dir, "cache.jsonl"), common)

    results = []
    calls = len(config.seeds) * config.evaluations + len(config.confirm_seeds) * 3
    with tqdm(total=calls * sum(config.steps) * len(sampling.sizes), unit="call") as progress:
        measure = Measure(sampling, distances, cache, progress)
        for steps, space in spaces.items():
            begun = progress.n
            progress.set_description(f"{num_samples:,} images, {Schedule(steps).name}: search")
            trials = run_search(
                space, config.gammas, config.evaluations, lambda schedule: measure(schedule, config.seeds)
            )
            progress.set_description(f"{num_samples:,} images, {Schedule(steps).name}: other seeds")
            results.append(confirmed(steps, trials, pipe.scheduler, config, measure))
            progress.update(max(0, begun + calls * steps * len(sampling.sizes) - progress.n))  # the search ended early

    report = {
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "options": asdict(config),
        "num_samples": num_samples,
        "num_reference": len(dataset),
        "features": network.about,
        "results": results,
        "notes": notes,
        "hardware": hardware(device),
    }
    presets = {str(row["steps"]): row["preset"] for row in results if row["saved"]}
    write(report, config)
    if presets:
        save_with_presets(presets, config)
    print(f"\n{markdown(report)}")
    refused = [str(row["steps"]) for row in results if not row["saved"]]
    if refused:
        print(
            f"No preset is saved for {', '.join(refused)} steps: on other seeds it is not better than what the checkpoint does now, by more than the "
            "spread of the difference. --force true saves it."
        )
    if presets:
        print(f"{config.pipeline_dir} has presets for {', '.join(presets)} steps.")
    return report


def confirmed(
    steps: int, trials: list[Trial], scheduler: CTMScheduler, config: TuneConfig, measure: Measure
) -> dict[str, Any]:
    """The best of `trials` on the seeds of the search and on others, beside the best of the first gammas and the checkpoint's own schedule."""
    best = min(trials, key=lambda trial: trial.mean)
    karras = min(trials[: len(config.gammas) if steps > 1 else 1], key=lambda trial: trial.mean)
    now = Schedule(steps)
    known = str(steps) in (scheduler.config.presets or {})

    def both(schedule: Schedule) -> dict[str, Any]:
        return {
            "search": summary(measure(schedule, config.seeds)),
            "confirm": summary(measure(schedule, config.confirm_seeds)),
        }

    found = {"now": both(now), "karras": both(karras.schedule), "best": both(best.schedule)}
    gain = improvement(found["now"]["confirm"]["by_seed"], found["best"]["confirm"]["by_seed"])
    return {
        "steps": steps,
        "now_is": "its preset" if known else f"Karras levels, gamma {scheduler.config.gamma:g}",
        "karras_gamma": karras.schedule.gammas[0] if steps > 1 else None,
        "preset": best.schedule.preset,
        **found,
        "improvement": gain,
        "saved": gain["better"] or config.force,
        "trials": [{**trial.schedule.preset, "by_seed": trial.by_seed, "mean": trial.mean} for trial in trials],
    }


def save_with_presets(presets: dict[str, dict[str, list[float]]], config: TuneConfig) -> None:
    """Write the model with `presets` beside those that it has, and with what its folder says of how it was made and whose it is."""
    pipe = load_model(config.model, ())  # as it was: the other was moved to the device
    known = pipe.scheduler.config.presets or {}
    pipe.scheduler = CTMScheduler.from_config(pipe.scheduler.config, presets={**known, **presets})
    with atomic_folder(config.pipeline_dir) as draft:
        pipe.save_pretrained(draft)
        for name in (RECORD, CONVERSION, NOTICE):
            if found := file_of(config.model, name):
                shutil.copyfile(found, os.path.join(draft, name))


# What is written ----------------------------------------------------------------------------------------------------


def write(report: dict, config: TuneConfig) -> None:
    files = {
        "tune.json": (json.dumps(report, indent=2, allow_nan=False) + "\n").encode(),
        "tune.md": markdown(report).encode(),
        "tune.png": plot(report),
    }
    write_files(config.output_dir, files)


def markdown(report: dict) -> str:
    """tune.md."""
    options = report["options"]
    lines = [
        "Frechet distance to real images (lower is better), mean ± standard deviation over seeds:",
        "",
        "| steps | now, search | found, search | now, other seeds | best gamma on Karras levels, other seeds | found, other seeds | improvement there | saved |",
        "|--:|--:|--:|--:|--:|--:|--:|---|",
    ]
    for row in report["results"]:
        gamma = "" if row["karras_gamma"] is None else f" (gamma {row['karras_gamma']:g})"
        lines.append(
            f"| {row['steps']} | {cell(row['now']['search'])} | {cell(row['best']['search'])} | {cell(row['now']['confirm'])} | "
            f"{cell(row['karras']['confirm'])}{gamma} | {cell(row['best']['confirm'])} | {cell(row['improvement'])} | "
            f"{'yes' if row['saved'] else 'no'} |"
        )
    lines += ["", "| steps | now | levels found | gammas found | tried |", "|--:|---|---|---|--:|"]
    for row in report["results"]:
        levels, gammas = (", ".join(map(number, row["preset"][key])) for key in ("sigmas", "gamma"))
        lines.append(f"| {row['steps']} | {row['now_is']} | {levels} | {gammas} | {len(row['trials'])} |")
    seeds, others = (", ".join(map(str, options[name])) for name in ("seeds", "confirm_seeds"))
    lines += [
        "",
        f"- {report['num_samples']:,} samples per schedule and seed, against {report['num_reference']:,} real images, in the features "
        f"`{report['features']['name']}`. All schedules start from the same noise.",
        f"- Search on seeds {seeds}; the distance of the best one is too low there, because it was chosen there. Other seeds: {others}.",
        "- Improvement: the difference of now and found, seed by seed. Saved where its mean is above its standard deviation"
        + (", or because of --force." if options["force"] else "."),
        f"- On {report['hardware']['device']}, {report['hardware']['cpu_threads']} threads.",
        *[f"- {note}" for note in report["notes"]],
    ]
    return "\n".join(lines) + "\n"


def plot(report: dict) -> bytes:
    """tune.png: how the search went, and distance against steps before and after, on the other seeds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    figure = Figure(figsize=(10, 4.2), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2)
    colours = ["#0072b2", "#e69f00", "#d55e00", "#009e73", "#cc79a7", "#56b4e9"]
    for i, row in enumerate(report["results"]):
        colour = colours[i % len(colours)]
        means = [trial["mean"] for trial in row["trials"]]
        lowest = [min(means[: j + 1]) for j in range(len(means))]
        tried = range(1, len(means) + 1)
        left.plot(tried, means, ".", color=colour, alpha=0.4, markersize=4)
        left.step(tried, lowest, where="post", color=colour, label=Schedule(row["steps"]).name)
    left.set_xlabel("schedules tried")
    left.set_ylabel("Frechet distance, seeds of the search")
    left.set_yscale("log")
    left.legend(fontsize=9, frameon=False)

    steps = [row["steps"] for row in report["results"]]
    for offset, (key, label, colour) in enumerate(
        (("now", "now", "0.4"), ("karras", "best gamma, Karras levels", "#e69f00"), ("best", "found", "#0072b2"))
    ):
        rows = [row[key]["confirm"] for row in report["results"]]
        places = [n * 2 ** (0.06 * (offset - 1)) for n in steps]
        right.errorbar(
            places,
            [row["mean"] for row in rows],
            [row["std"] for row in rows],
            fmt="o",
            color=colour,
            capsize=3,
            markersize=5,
            label=label,
        )
    right.set_xscale("log", base=2)
    right.set_xticks(steps, [str(n) for n in steps])
    right.set_xlim(steps[0] * 0.7, steps[-1] * 1.4)
    right.set_xlabel("steps (network evaluations)")
    right.set_ylabel("Frechet distance, other seeds")
    right.set_ylim(bottom=0)
    right.legend(fontsize=9, frameon=False)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    left.yaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
    left.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: number(value)))
    picture = io.BytesIO()
    FigureCanvasAgg(figure).print_png(picture)
    return picture.getvalue()


if __name__ == "__main__":
    run_program(main, TuneConfig)
