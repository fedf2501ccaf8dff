"""How often classifier guidance leads to the class that was asked: `python -m training.guide --model assets/digits-ctm`."""

import math
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import nn

from diffusers_ctm import ClassifierGuidance, CTMPipeline

from .config import DataOptions, UserError, option, run_program
from .data import ImageDataset, to_sample
from .evaluate import load_model
from .features import EMBEDDED, load_saved


@dataclass
class GuideConfig(DataOptions):
    """Guide samples towards classes that the network is not told, and print how many arrive, against the guidance scale."""

    config: str | None = option(None, "YAML file with any of these options; the command line overrides it.")
    label_column: str | None = option("label", "Column of the data set that holds the class of each image.")
    model: str = option("assets/digits-ctm", "The CTM that is guided: a folder or a repository on the Hub.")
    classifier: str = option(
        "digits", "What guides: a network of training.features, its folder or 'digits' (embedded)."
    )
    scales: list[float] = option([0.0, 1.0, 3.0, 10.0], "Guidance scales; 0 is none.")
    on: list[str] = option(
        ["prediction"], "What the classifier sees: 'prediction', 'image' (a second evaluation) or both."
    )
    num_inference_steps: int = option(8, "Steps of the sampler.")
    gamma: float = option(1.0, "gamma of the sampler.")
    num_samples: int = option(100, "Images for each scale, the classes in turn.")
    seed: int = option(0, "Seed of all noise.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(self.label_column is not None, "label_column", "a column")
        self.check(len(self.scales) > 0 and all(map(math.isfinite, self.scales)), "scales", "finite numbers")
        self.check(len(self.on) > 0 and set(self.on) <= {"prediction", "image"}, "on", "'prediction', 'image' or both")
        self.check_positive("num_inference_steps", "num_samples")
        self.check(0 <= self.gamma <= 1, "gamma", "in [0, 1]")


class ClassAverage(nn.Module):
    """F averaged over all classes: as a denoiser, that of the geometric mean of the class densities. It is told no class.

    A conditional network has no other output that does not depend on the class, unless it was trained with label dropout.
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network
        self.config = SimpleNamespace(**{**network.config, "num_class_embeds": None})
        self.num_classes, self.dtype, self.device = network.config.num_class_embeds, network.dtype, network.device
        self.has_target_time = getattr(network, "has_target_time", False)

    def forward(self, sample: torch.Tensor, *times: torch.Tensor, return_dict: bool = False) -> tuple[torch.Tensor]:
        labels = torch.arange(self.num_classes, device=sample.device).repeat_interleave(len(sample))
        repeated = sample.repeat(self.num_classes, 1, 1, 1)
        output = self.network(repeated, *times, class_labels=labels, return_dict=False)[0]
        return (output.unflatten(0, (self.num_classes, len(sample))).mean(0),)


def without_classes(pipe: CTMPipeline) -> tuple[CTMPipeline, dict]:
    """(a silent pipeline that samples without being told a class, what to call it with)."""
    options = {}
    pipe.unet.requires_grad_(False)
    if pipe.knows_no_class:
        options["guidance_scale"] = 0.0
    elif pipe.num_classes is not None:
        pipe = CTMPipeline(ClassAverage(pipe.unet), pipe.scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe, options


def nearest_class(images: torch.Tensor, examples: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Class of the nearest example of each image, shape (B,): a judge that the guidance did not see."""
    return labels[torch.cdist(images.flatten(1), examples.flatten(1)).argmin(1)]


def main(config: GuideConfig) -> dict[tuple[str, float], tuple[float, float]]:
    """Print the table and return {(on, scale): (share by the classifier that guides, share by the nearest real image)}."""
    dataset = ImageDataset(config)
    examples, labels = dataset[list(range(len(dataset)))]
    examples = to_sample(examples)
    pipe = load_model(config.model, ())
    try:
        features = load_saved(EMBEDDED.get(config.classifier, config.classifier)).requires_grad_(False)
    except Exception as error:  # json, torch and safetensors each raise their own
        raise UserError(f"--classifier cannot be loaded: {type(error).__name__}: {error}") from error

    pipe, options = without_classes(pipe)
    options |= {"num_inference_steps": config.num_inference_steps, "gamma": config.gamma, "output_type": "latent"}

    target = torch.arange(config.num_samples) % dataset.num_classes
    shares = {}
    print(f"{'on':<12}{'scale':>7}{'classifier':>12}{'nearest':>9}")
    for on in config.on:
        for scale in config.scales:
            images = pipe(
                batch_size=config.num_samples,
                generator=torch.Generator().manual_seed(config.seed),
                guidance=ClassifierGuidance(features.logits, target, scale, on),
                **options,
            ).images.clamp(-1, 1)
            found = features.logits(images).argmax(1), nearest_class(images, examples, labels)
            shares[on, scale] = tuple((classes == target).float().mean().item() for classes in found)
            print(f"{on:<12}{scale:>7g}{shares[on, scale][0]:>12.2f}{shares[on, scale][1]:>9.2f}", flush=True)
    return shares


if __name__ == "__main__":
    run_program(main, GuideConfig)
