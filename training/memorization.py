# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""How near samples are to training images.

python -m training.memorization --model assets/emoji-ctm --dataset_name runs/twemoji.parquet
"""

from dataclasses import dataclass, replace

import torch
from PIL import Image
from tqdm.auto import tqdm

from .cli.device import choose_device
from .cli.errors import UserError
from .cli.files import check_writable
from .cli.options import FOLDER, POSITIVE, SEED, UNIT, option, run_program
from .data.images import ImageDataset
from .frozen.vectors import FEATURES_HELP
from .measure.distances import features_for
from .measure.neighbors import COPY_RATIO, Neighbors, find_neighbors, pixels
from .measure.options import PairOptions
from .measure.reports import facts, write_report
from .measure.sampling import Sampling, settings_of
from .networks.pipelines import load_pipelines
from .report.numbers import number
from .report.pictures import captioned, tiles
from .report.tables import markdown_table


@dataclass
class MemorizationConfig(PairOptions):
    """Measure the distance of samples to the nearest training image, beside that of real images, and draw both.

    With --random_flip the mirror images of training images count as training images too.
    """

    output_dir: str = option(
        "runs/memorization",
        "Folder for memorization.json, memorization.md and memorization.png; others stay.",
        must_be=FOLDER,
    )
    held_out_split: str | None = option(
        None, "Split of the data set that the model was not trained on, to be measured too. Default: none."
    )
    steps: list[int] = option([1, 18], "Numbers of steps of the CTM.", must_be=POSITIVE)
    gamma: float = option(0.0, "gamma of the CTM in [0, 1], from two steps on.", must_be=UNIT)
    teacher_steps: list[int] = option([18], "Numbers of Heun steps of the teacher.", must_be=POSITIVE)
    num_samples: int = option(
        1000, "Samples of each setting, and the most real images that are measured beside them.", must_be=POSITIVE
    )
    seed: int = option(0, "Seed of the noise and of the choice of real images.", must_be=SEED)
    features: str | None = option(
        None, "Measure on features too, not on pixels alone. " + FEATURES_HELP + " Default: none."
    )
    num_pictures: int = option(12, "Pairs of sample and training image in each group of the picture.", must_be=POSITIVE)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.sort_values("steps", "teacher_steps")


def some(dataset: ImageDataset, count: int, seed: int) -> torch.Tensor:
    """Indices of at most `count` images, drawn without replacement."""
    return torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))[:count].sort().values


@torch.inference_mode()
def main(config: MemorizationConfig) -> dict:
    """Measure, write the three files, print the table; return the content of memorization.json."""
    device = choose_device(config.device)
    dataset = ImageDataset(config)
    if len(dataset) < 3:
        raise UserError(f"--dataset_name {config.dataset_name} holds {len(dataset)} images; 3 or more are needed.")
    networks = {"pixels": pixels}
    if config.features is not None:
        networks["features"] = features_for(dataset, config.features, device)
    held_out = None
    if config.held_out_split is not None:
        split, size, mode = config.held_out_split, dataset.resolution, dataset.mode
        held_out = ImageDataset(replace(config, dataset_split=split, resolution=size, image_mode=mode))
    pipelines = load_pipelines(config, dataset, device)
    check_writable(config.output_dir)

    groups: dict[str, tuple[torch.Tensor, torch.Tensor | None]] = {}
    sampling = Sampling(pipelines, torch.nn.Identity(), dataset.labels(), config.num_samples, config.batch_size)
    settings = settings_of(pipelines, config.steps, [config.gamma], config.teacher_steps, config.teacher_is_guided)
    with tqdm(total=sum(one.nfe for one in settings) * len(sampling.sizes), desc="Samples", unit="call") as progress:
        for setting in settings:
            images, _ = sampling.features(setting, config.seed, progress)
            groups[setting.name] = images.to(torch.uint8), None
    chosen = some(dataset, config.num_samples, config.seed)
    groups["training images, each without itself"] = dataset[chosen.tolist()][0], chosen
    if held_out is not None:
        groups["held-out images"] = held_out[some(held_out, config.num_samples, config.seed).tolist()][0], None
    neighbors = {
        kind: find_neighbors(groups, dataset, network, config.random_flip, config.batch_size, device)
        for kind, network in networks.items()
    }
    results = [{"name": name, "num_images": len(images)} for name, (images, _) in groups.items()]
    for row in results:
        row |= {kind: nearest[row["name"]].summary() for kind, nearest in neighbors.items()}
    report = {
        **facts(config, device),
        "num_training_images": len(dataset),
        "features": networks["features"].about if config.features is not None else None,
        "copy_ratio": COPY_RATIO,
        "results": results,
        "notes": config.notes_on_guidance(),
    }
    nearest = neighbors["features" if "features" in neighbors else "pixels"]
    rows = [pairs(name, images, nearest[name], dataset, config.num_pictures) for name, (images, _) in groups.items()]
    write_report(config.output_dir, "memorization", report, markdown(report), {"memorization": captioned(rows)})
    return report


def markdown(report: dict) -> str:
    """memorization.md."""
    kinds = ["pixels"] + (["features"] if report["features"] is not None else [])
    columns = [f"{kind}: {column}" for kind in kinds for column in ("median", "5th percentile", "lowest", "copies")]
    rows = []
    for row in report["results"]:
        cells = [f"{row['name']} ({row['num_images']:,})"]
        for values in (row[kind] for kind in kinds):
            distances = (number(round(values[name], 3)) for name in ("median", "percentile_5", "min"))
            cells += [*distances, f"{values['copies']:.1%}"]
        rows.append(cells)
    mirrored = ", and of their mirror images" if report["options"]["random_flip"] else ""
    notes = [
        f"Nearest of {report['num_training_images']:,} training images{mirrored}.",
        "Pixels: root mean square of the differences, in 0..255.",
        "Copies: nearer to the nearest than a third of the distance to the second nearest (Yoon et al. 2023).",
        "A sampler that repeats its training images has distances near 0. One that draws new images of the same kind "
        "has those of real images that it has not seen, or of training images to the others.",
    ]
    if report["features"] is not None:
        notes.insert(2, f"Features: `{report['features']['name']}`, Euclidean distance.")
    lines = ["Distance to the nearest training image:", "", *markdown_table(["", *columns], rows), ""]
    return "\n".join([*lines, *(f"- {note}" for note in [*notes, *report["notes"]])]) + "\n"


def pairs(
    name: str, images: torch.Tensor, neighbors: Neighbors, dataset: ImageDataset, count: int
) -> list[tuple[str, Image.Image]]:
    """A row of memorization.png: the images nearest to training images, and the first ones, above their neighbors."""
    order = neighbors.distances[:, 0].argsort()[:count]
    row = []
    for caption, places in (("nearest", order), ("as they come", torch.arange(len(order)))):
        nearest, _ = dataset[neighbors.indices[places].tolist()]
        flip = neighbors.mirrored[places][:, None, None, None]
        nearest = torch.where(flip, nearest.flip(-1), nearest)
        row.append((f"{name}: {caption}", tiles(torch.cat([images[places], nearest]), len(places))))
    return row


if __name__ == "__main__":
    run_program(main, MemorizationConfig)
