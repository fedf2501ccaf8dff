"""Measure a CTM over steps and gamma, beside its teacher: `python -m training.evaluate --model runs/digits/pipeline`."""

import datetime
import io
import json
import os
import platform
import time
from dataclasses import asdict, dataclass

import diffusers
import torch
import torchmetrics
from PIL import Image, ImageOps
from tqdm.auto import tqdm

import diffusers_ctm
from diffusers_ctm import CTMPipeline

from .cli.device import choose_device, hardware
from .cli.errors import UserError
from .cli.files import check_writable, write_files
from .cli.options import option, run_program
from .cli.shared_options import DataOptions, TeacherOptions
from .frozen.vectors import FEATURES_HELP
from .measure.distances import MOST_SAMPLES, Distances, real_against_real, reference_features, what_is_compared
from .measure.sampling import Sampling, Setting, class_labels, draw
from .networks.pipelines import load_pipelines
from .report.numbers import summaries
from .report.pictures import captioned, enlarged_grid
from .report.plots import _plain_ticks
from .report.tables import distance_table


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


def settings_of(config: EvaluateConfig) -> list[Setting]:
    """All settings. One step goes straight to the end, where gamma adds nothing, and is sampled once."""
    settings = []
    if config.model is not None:
        for steps in config.steps:
            settings += [Setting("ctm", steps, gamma) for gamma in ([None] if steps == 1 else config.gammas)]
    if config.teacher is not None:
        settings += [Setting("heun", steps) for steps in config.teacher_steps]
    return settings


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


if __name__ == "__main__":
    run_program(main, EvaluateConfig)
