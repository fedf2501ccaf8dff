# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Train a small classifier whose features compare sets of images: `python -m training.features`."""

import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tqdm.auto import tqdm

from .cli.errors import UserError
from .cli.files import atomic_folder, check_writable, write_json
from .cli.names import without_folders
from .cli.options import BELOW_ONE, FOLDER, NOT_NEGATIVE, POSITIVE, SEED, option, run_program
from .cli.shared_options import DataOptions
from .data.images import ImageDataset, mirrored
from .frozen.classifier import CONFIG, FeatureNetwork, is_saved


@dataclass
class FeatureConfig(DataOptions):
    """Train a small classifier on the CPU. `training.evaluate` compares its features."""

    config: str | None = option(None, "YAML file with any of these options; the command line overrides it.")
    output_dir: str = option("runs/features", "Folder of the result; a former result is replaced.", must_be=FOLDER)
    label_column: str | None = option("label", "Column that holds the class of each image.")
    num_features: int = option(
        64,
        "Width of the input of the last layer.",
        must_be=("even and positive", lambda width: width >= 2 and width % 2 == 0),
    )
    num_epochs: int = option(40, "Passes over the training images.", must_be=POSITIVE)
    batch_size: int = option(64, "Images per step.", must_be=POSITIVE)
    learning_rate: float = option(4e-3, "Peak learning rate, of AdamW with a one-cycle schedule.", must_be=POSITIVE)
    weight_decay: float = option(0.05, "Weight decay.", must_be=NOT_NEGATIVE)
    label_smoothing: float = option(0.1, "Share of the target that is spread over all classes.", must_be=BELOW_ONE)
    max_shift: int = option(
        1, "Training images are moved by up to this number of pixels in each direction.", must_be=NOT_NEGATIVE
    )
    held_out: float = option(
        0.2,
        "Share of the images that is kept apart to measure the accuracy.",
        must_be=("in (0, 1)", lambda share: 0 < share < 1),
    )
    seed: int = option(0, "Seed of the split, the weights and the order.", must_be=SEED)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(self.label_column is not None, "label_column", "a column of classes")


def split(length: int, held_out: float, seed: int) -> tuple[list[int], list[int]]:
    """Indices of the training images and of the images held out: a permutation that the seed fixes, cut in two."""
    order = torch.randperm(length, generator=torch.Generator().manual_seed(seed)).tolist()
    count = max(1, round(held_out * length))
    return sorted(order[count:]), sorted(order[:count])


def shifted(images: torch.Tensor, most: int, generator: torch.Generator) -> torch.Tensor:
    """Each image (B, C, H, W) moved by -most..most pixels both ways; border pixels are repeated."""
    count, _, height, width = images.shape
    x = F.pad(images.float(), [most] * 4, mode="replicate").to(images.dtype)
    down, right = torch.randint(0, 2 * most + 1, (2, count, 1), generator=generator)
    rows, columns = torch.arange(height) + down, torch.arange(width) + right
    return x[torch.arange(count)[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


@torch.no_grad()
def accuracy(network: FeatureNetwork, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of images that the network classifies as labeled, in 0..1."""
    classes = torch.cat([network.classify(batch) for batch in images.split(1000)])
    return (classes == labels).float().mean().item()


def train_network(
    config: FeatureConfig, dataset: ImageDataset, images: torch.Tensor, labels: torch.Tensor
) -> FeatureNetwork:
    """A classifier trained on `images` (uint8, (n, C, H, W)) and `labels` (n,); `config` fixes all random numbers."""
    torch.manual_seed(config.seed)
    generator = torch.Generator().manual_seed(config.seed)
    network = FeatureNetwork(dataset.channels, dataset.resolution, dataset.num_classes, config.num_features).train()
    optimizer = torch.optim.AdamW(network.parameters(), config.learning_rate, weight_decay=config.weight_decay)
    steps_per_epoch = math.ceil(len(images) / config.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.learning_rate, epochs=config.num_epochs, steps_per_epoch=steps_per_epoch
    )
    for _ in tqdm(range(config.num_epochs), desc="Training", unit="epoch"):
        for index in torch.randperm(len(images), generator=generator).tensor_split(steps_per_epoch):
            batch = shifted(images[index], config.max_shift, generator)
            if config.random_flip:
                batch = mirrored(batch, torch.rand(len(index), generator=generator))
            logits = network.classifier(network(batch))
            loss = F.cross_entropy(logits, labels[index], label_smoothing=config.label_smoothing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return network.eval()


def main(config: FeatureConfig) -> str:
    """Train, measure, save; return the folder."""
    if os.path.isdir(config.output_dir) and os.listdir(config.output_dir) and not is_saved(config.output_dir):
        raise UserError(f"--output_dir {config.output_dir} holds something else; choose another folder.")
    dataset = ImageDataset(config)
    train, test = split(len(dataset), config.held_out, config.seed)
    if not train:
        raise UserError(f"--dataset_name {config.dataset_name} has {len(dataset)} images, too few to keep some apart.")
    check_writable(config.output_dir)
    images, labels = dataset[train]
    torch.set_num_threads(1)  # the same weights whatever the number of cores; more do not help a network this small
    network = train_network(config, dataset, images, labels)
    test_images, test_labels = dataset[test]
    measured = {
        "accuracy": round(accuracy(network, test_images, test_labels), 6),
        "train_accuracy": round(accuracy(network, images, labels), 6),
        "num_train_images": len(train),
        "num_held_out_images": len(test),
    }
    save(network, config, dataset.id2label, measured)
    print(f"Accuracy {measured['accuracy']:.2%} on {len(test)} images held out. Saved {config.output_dir}")
    return config.output_dir


def save(
    network: FeatureNetwork, config: FeatureConfig, id2label: dict[int, str] | None, measured: dict[str, float]
) -> None:
    """Write weights, config and README as one folder."""
    unwanted = ("config", "output_dir")
    options = {name: without_folders(value) for name, value in asdict(config).items() if name not in unwanted}
    readme = (
        f"A small classifier of the data set `{options['dataset_name']}` whose {config.num_features} features serve to "
        "compare sets of images. Made by\n\n"
        "    python -m training.features --output_dir FOLDER\n\n"
        f"with the options in `{CONFIG}`. "
        f"Accuracy {measured['accuracy']:.2%} on the {measured['num_held_out_images']} images held out, "
        f"{measured['train_accuracy']:.2%} on the {measured['num_train_images']} it was trained on.\n\n"
        "Use: `python -m training.evaluate --features FOLDER`, or "
        "`training.frozen.vectors.load_feature_network(FOLDER)`.\n"
    )
    with atomic_folder(config.output_dir) as draft:
        save_file(network.state_dict(), os.path.join(draft, "model.safetensors"))
        names = {} if id2label is None else {"id2label": id2label}
        about = {"_class_name": FeatureNetwork.__name__, **network.config, **measured, **names, "options": options}
        write_json(about, CONFIG, draft)
        Path(draft, "README.md").write_text(readme, encoding="utf-8")


if __name__ == "__main__":
    run_program(main, FeatureConfig)
