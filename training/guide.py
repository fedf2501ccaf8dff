# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""How often guidance and rejection lead to the class that was asked.

python -m training.guide --model assets/digits-ctm
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from diffusers_ctm import ClassifierGuidance, CTMPipeline, rejection_sample

from .cli.errors import UserError, loading
from .cli.options import POSITIVE, SEED, TWO_OR_MORE, UNIT, option, run_program
from .cli.shared_options import DataOptions
from .cli.weights import check_finite
from .data.images import ImageDataset, to_sample
from .frozen.classifier import EMBEDDED, FeatureNetwork, load_saved
from .measure.distances import Distances
from .networks.pipelines import load_model, without_classes
from .networks.student import fit_data


FINITE = ("finite numbers", math.isfinite)


@dataclass
class GuideConfig(DataOptions):
    """Ask for samples of classes, by guidance or rejection, and print how many have them, by scale or threshold."""

    config: str | None = option(None, "YAML file with any of these options; the command line overrides it.")
    label_column: str | None = option("label", "Column of the data set that holds the class of each image.")
    model: str = option("assets/digits-ctm", "The CTM: a folder or a repository on the Hub.")
    classifier: str = option(
        "digits",
        "What guides and rejects, and judges: a network of training.features, its folder or 'digits' (embedded).",
    )
    scales: list[float] = option(
        [],
        "Scales of classifier guidance, of a network that is not told the class; 0 is no guidance. "
        "Default: 0, 1, 3 and 10, if neither of the next two is given.",
        must_be=FINITE,
    )
    guidance_scales: list[float] = option(
        [],
        "Scales of classifier-free guidance, of a network trained with --label_dropout that is told the class: "
        "1 is no guidance, 0 does not tell the class.",
        must_be=FINITE,
    )
    thresholds: list[float] = option(
        [],
        "Probabilities that the classifier must give to the class for an image to be kept, in [0, 1]; 0 keeps all.",
        must_be=UNIT,
    )
    max_batches: int = option(
        10, "Most batches of --num_samples images that are drawn for each threshold.", must_be=POSITIVE
    )
    on: list[str] = option(
        ["prediction"],
        "What the classifier sees in guidance: 'prediction', 'image' (a second evaluation) or both.",
        must_be=("'prediction', 'image' or both", lambda seen: seen in ("prediction", "image")),
    )
    num_inference_steps: list[int] = option([8], "Numbers of steps of the sampler.", must_be=POSITIVE)
    gamma: float = option(1.0, "gamma of the sampler, in [0, 1].", must_be=UNIT)
    num_samples: int = option(
        100, "Images for each row, of the classes of as many images of the data set.", must_be=TWO_OR_MORE
    )
    seed: int = option(0, "Seed of the classes and of all noise.", must_be=SEED)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.scales or self.guidance_scales or self.thresholds):
            self.scales = [0.0, 1.0, 3.0, 10.0]
        self.check(self.label_column is not None, "label_column", "a column")
        for name in ("on", "num_inference_steps"):
            self.check(len(getattr(self, name)) > 0, name, "one value or more")


def nearest_class(images: torch.Tensor, examples: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Class of the nearest example of each image, shape (B,): a judge that the guidance did not see."""
    return labels[torch.cdist(images.flatten(1), examples.flatten(1)).argmin(1)]


def samples(
    config: GuideConfig, pipe: CTMPipeline, classifier: FeatureNetwork, target: torch.Tensor, steps: int
) -> Iterator[tuple[str, float, torch.Tensor, torch.Tensor, float]]:
    """(method, value, images unclipped, their classes, share kept) of each row with this number of steps."""
    options = {"num_inference_steps": steps, "gamma": config.gamma, "output_type": "latent"}

    def seeded() -> torch.Generator:
        return torch.Generator().manual_seed(config.seed)

    if config.scales:
        unconditional, told_nothing = without_classes(pipe)
        for on, scale in itertools.product(config.on, config.scales):
            guidance = ClassifierGuidance(classifier.logits, target, scale, on)
            output = unconditional(len(target), generator=seeded(), guidance=guidance, **options, **told_nothing)
            yield on, scale, output.images, target, 1.0
    for scale in config.guidance_scales:
        output = pipe(class_labels=target, guidance_scale=scale, generator=seeded(), **options)
        yield "free", scale, output.images, target, 1.0
    for threshold in config.thresholds:
        kept = rejection_sample(
            pipe, classifier.logits, len(target), target, threshold, batch_size=len(target),
            max_batches=config.max_batches, generator=seeded(), **options,
        )  # fmt: skip
        if len(kept.images) < 2:
            raise UserError(
                f"--thresholds {threshold:g} kept {len(kept.images)} of {kept.num_drawn} images. Give a lower one, or "
                "more --max_batches."
            )
        yield "rejection", threshold, kept.images, kept.class_labels, kept.acceptance_rate


@torch.no_grad()
def main(config: GuideConfig) -> list[dict]:
    """Print the table and return its rows: what was asked, and what came of it."""
    dataset = ImageDataset(config)
    pipe = load_model(config.model, ())
    pipe.set_progress_bar_config(disable=True)
    if config.guidance_scales and not pipe.knows_no_class:
        raise UserError(
            f"--guidance_scales need a network trained with --label_dropout, and --model {config.model} was not."
        )
    with loading(f"--classifier {config.classifier}"):
        classifier = load_saved(EMBEDDED.get(config.classifier, config.classifier)).requires_grad_(False)
        check_finite(f"--classifier {config.classifier}", classifier.state_dict())
    fit_data(
        dataset, (pipe.image_channels, *pipe.image_size), pipe.num_classes, pipe.config.id2label, "--model", config
    )
    dataset.number_classes(classifier.config["num_classes"], classifier.id2label, "--classifier")

    pixels, labels = dataset[list(range(len(dataset)))]
    if config.random_flip:  # the model has learned both
        pixels, labels = torch.cat([pixels, pixels.flip(-1)]), labels.repeat(2)
    examples = to_sample(pixels)
    distances = Distances(classifier(pixels))
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(config.seed))
    target = labels[order].repeat(-(-config.num_samples // len(order)))[: config.num_samples]
    rows = []
    print("| method | value | steps | classifier | nearest | distance | outside | kept |\n|---" + "|--:" * 7 + "|")
    for steps in config.num_inference_steps:
        for method, value, images, classes, kept in samples(config, pipe, classifier, target, steps):
            shown = images.clamp(-1, 1)
            row = {
                "method": method,  # what the classifier saw in guidance, "free" or "rejection"
                "value": value,  # scale or threshold
                "steps": steps,
                # Shares of images that have the class that was asked, by the classifier and by the nearest real image.
                "classifier": (classifier.logits(shown).argmax(1) == classes).float().mean().item(),
                "nearest": (nearest_class(shown, examples, labels) == classes).float().mean().item(),
                # Frechet, in the classifier's features.
                "distance": distances(classifier(((shown + 1) * 127.5).round().to(torch.uint8)))["frechet"],
                "outside": (images.abs() > 1.05).float().mean().item(),  # share of pixels that are clipped
                "kept": kept,  # share of the drawn images
            }
            rows.append(row)
            print("| {} | {:g} | {} | {:.1%} | {:.1%} | {:.2f} | {:.1%} | {:.0%} |".format(*row.values()), flush=True)
    return rows


if __name__ == "__main__":
    run_program(main, GuideConfig)
