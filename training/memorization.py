"""How near samples are to the training images: `python -m training.memorisation --model assets/emoji-ctm --dataset_name runs/twemoji.parquet`."""

import dataclasses
import datetime
import io
import json
from dataclasses import asdict, dataclass

import torch
from PIL import Image
from torch import nn
from tqdm.auto import tqdm

import diffusers_ctm

from .cli.device import choose_device
from .cli.errors import UserError
from .cli.files import check_writable, write_files
from .cli.options import option, run_program
from .cli.shared_options import DataOptions, TeacherOptions
from .data.images import ImageDataset
from .frozen.vectors import FEATURES_HELP, load_feature_network
from .measure.neighbors import COPY_RATIO, Neighbours, Pixels, find_neighbours
from .measure.sampling import Setting, class_labels, draw
from .networks.pipelines import load_pipelines
from .report.numbers import number
from .report.pictures import captioned, enlarged_grid


@dataclass
class MemorisationConfig(TeacherOptions, DataOptions):
    """Measure the distance of samples to the nearest training image, beside that of real images, and draw both.

    With --random_flip the training images' mirror images count as training images too.
    """

    config: str | None = option(None, "YAML file with any of these options; the command line overrides it.")
    model: str | None = option(None, "The CTM: a folder or a repository on the Hub. Default: the teacher alone.")
    teacher: str | None = option(None, "A diffusion model to sample with Heun's method, likewise. Default: none.")
    output_dir: str = option(
        "runs/memorisation", "Folder for memorisation.json, memorisation.md and memorisation.png; others stay."
    )
    held_out_split: str | None = option(
        None, "Split of the data set that the model was not trained on, measured likewise. Default: none."
    )
    steps: list[int] = option([1, 18], "Numbers of steps of the CTM.")
    gamma: float = option(0.0, "gamma of the CTM in [0, 1], from two steps on.")
    teacher_steps: list[int] = option([18], "Numbers of Heun steps of the teacher.")
    num_samples: int = option(1000, "Samples of each setting, and the most real images that are measured beside them.")
    seed: int = option(0, "Seed of the noise and of the choice of real images.")
    batch_size: int = option(250, "Most images per network evaluation.")
    features: str | None = option(
        None, "Measure on features too, not on pixels alone. " + FEATURES_HELP + " Default: none."
    )
    num_pictures: int = option(12, "Pairs of sample and training image in each group of the picture.")
    device: str = option("auto", "'cpu', 'cuda', 'cuda:1', ..., or 'auto': a GPU if there is one.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model is None and self.teacher is None:
            raise UserError("--model is needed: a folder or a repository on the Hub with a CTM (or --teacher alone).")
        for name in ("steps", "teacher_steps"):
            values = getattr(self, name)
            self.check(len(values) > 0 and min(values) >= 1, name, "one value or more, each 1 or more")
            setattr(self, name, sorted(set(values)))
        self.check(0 <= self.gamma <= 1, "gamma", "in [0, 1]")
        self.check_positive("num_samples", "batch_size", "num_pictures")
        self.check_not_negative("seed")
        self.check_folder("output_dir")


def some(dataset: ImageDataset, count: int, seed: int) -> torch.Tensor:
    """Indices of at most `count` images, drawn without replacement."""
    return torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))[:count].sort().values


@torch.inference_mode()
def main(config: MemorisationConfig) -> dict:
    """Measure, write the three files, print the table; return what memorisation.json holds."""
    device = choose_device(config.device)
    networks: dict[str, nn.Module] = {"pixels": Pixels()}
    dataset = ImageDataset(config)
    if len(dataset) < 3:
        raise UserError(f"--dataset_name {config.dataset_name} holds {len(dataset)} images; 3 or more are needed.")
    if config.features is not None:
        networks["features"] = load_feature_network(config.features, device)
        networks["features"].check_images(dataset.channels, dataset.resolution, dataset.resolution)
    held_out = None
    if config.held_out_split is not None:
        held_out = ImageDataset(
            dataclasses.replace(
                config,
                dataset_split=config.held_out_split,
                resolution=dataset.resolution,
                image_mode=dataset.mode,
            )
        )
    pipelines = load_pipelines(config, dataset, device)
    check_writable(config.output_dir)

    settings = []
    if "ctm" in pipelines:
        settings += [Setting("ctm", steps, None if steps == 1 else config.gamma) for steps in config.steps]
    if "heun" in pipelines:
        settings += [Setting("heun", steps) for steps in config.teacher_steps]
    real_labels = dataset.labels()
    groups: dict[str, tuple[torch.Tensor, torch.Tensor | None]] = {}
    for setting in tqdm(settings, desc="Samples", unit="setting"):
        pipe = pipelines[setting.sampler]
        labels = class_labels(pipe.num_classes, real_labels, config.num_samples)
        parts = torch.arange(config.num_samples).split(config.batch_size)
        images = [
            draw(pipe, setting, len(part), None if labels is None else labels[part], config.seed, i)
            for i, part in enumerate(parts)
        ]
        groups[setting.name] = torch.cat(images).cpu(), None
    chosen = some(dataset, config.num_samples, config.seed)
    real = "training images, each without itself"
    groups[real] = dataset[chosen.tolist()][0], chosen
    if held_out is not None:
        groups["held-out images"] = held_out[some(held_out, config.num_samples, config.seed).tolist()][0], None

    found = {
        kind: find_neighbours(groups, dataset, network, config.random_flip, config.batch_size, device)
        for kind, network in networks.items()
    }
    report = {
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "options": asdict(config),
        "num_training_images": len(dataset),
        "features": None if config.features is None else networks["features"].about,
        "copy_ratio": COPY_RATIO,
        "results": [
            {
                "name": name,
                "num_images": len(images),
                **{kind: neighbours[name].summary() for kind, neighbours in found.items()},
            }
            for name, (images, _) in groups.items()
        ],
        "version": diffusers_ctm.__version__,
    }
    table = markdown(report)
    kind = list(found)[-1]
    files = {
        "memorisation.json": (json.dumps(report, indent=2, allow_nan=False) + "\n").encode(),
        "memorisation.md": table.encode(),
        "memorisation.png": picture(groups, found[kind], dataset, config.num_pictures),
    }
    write_files(config.output_dir, files)
    print(f"\n{table}")
    return report


def markdown(report: dict) -> str:
    """memorisation.md."""
    kinds = ["pixels"] + (["features"] if report["features"] is not None else [])
    lines = ["Distance to the nearest training image:", ""]
    columns = [f"{kind}: {column}" for kind in kinds for column in ("median", "5th percentile", "lowest", "copies")]
    lines += ["| | " + " | ".join(columns) + " |", "|---|" + "--:|" * len(columns)]
    for row in report["results"]:
        cells = []
        for kind in kinds:
            values = row[kind]
            cells += [number(round(values[name], 3)) for name in ("median", "percentile_5", "min")] + [
                f"{values['copies']:.1%}"
            ]
        lines.append(f"| {row['name']} ({row['num_images']:,}) | " + " | ".join(cells) + " |")
    mirrored = ", and of their mirror images" if report["options"]["random_flip"] else ""
    notes = [
        f"Nearest of {report['num_training_images']:,} training images{mirrored}.",
        "Pixels: root mean square of the differences, in 0..255.",
        "Copies: nearer to the nearest than a third of the distance to the second nearest (Yoon et al. 2023).",
        "A sampler that repeats its training images has distances near 0; one that draws new images of the same kind has those of real "
        "images it has not seen, or of training images to the others.",
    ]
    if report["features"] is not None:
        notes.insert(2, f"Features: `{report['features']['name']}`, Euclidean distance.")
    return "\n".join([*lines, "", *(f"- {note}" for note in notes)]) + "\n"


def picture(
    groups: dict[str, tuple[torch.Tensor, torch.Tensor | None]],
    found: dict[str, Neighbours],
    dataset: ImageDataset,
    count: int,
) -> bytes:
    """memorisation.png: of each group the images nearest to a training image, and some as they come, each above its neighbour."""
    rows = []
    for name, (images, _) in groups.items():
        neighbours = found[name]
        order = neighbours.distances[:, 0].argsort()[:count]
        row = []
        for caption, places in ((f"{name}: nearest", order), (f"{name}: as they come", torch.arange(len(order)))):
            nearest, _ = dataset[neighbours.indices[places].tolist()]
            flip = neighbours.mirrored[places][:, None, None, None]
            nearest = torch.where(flip, nearest.flip(-1), nearest)
            pixels = torch.cat([images[places], nearest])
            pixels = torch.nn.functional.pad(pixels, [1] * 4, value=255).permute(0, 2, 3, 1).numpy()
            tiles = [Image.fromarray(tile.squeeze(-1) if tile.shape[-1] == 1 else tile) for tile in pixels]
            row.append((caption, enlarged_grid(tiles, 2, len(places))))
        rows.append(row)
    file = io.BytesIO()
    captioned(rows).save(file, "PNG")
    return file.getvalue()


if __name__ == "__main__":
    run_program(main, MemorisationConfig)
