"""Bits per dimension of a CTM's and a teacher's density on a data set: `python -m training.likelihood --model assets/digits-ctm`."""

import dataclasses
import datetime
import json
from dataclasses import dataclass

import torch
from diffusers.utils import logging
from tqdm.auto import tqdm

import diffusers_ctm
from diffusers_ctm import CTMPipeline, log_likelihood

from .cli.errors import UserError
from .cli.files import check_writable, write_files
from .cli.options import option, run_program
from .cli.shared_options import DataOptions, TeacherOptions
from .data.images import ImageDataset
from .networks.pipelines import load_pipelines


logger = logging.get_logger(__name__)


@dataclass
class LikelihoodConfig(TeacherOptions, DataOptions):
    """Measure the likelihood of images by the probability-flow ODE and by the variational bound."""

    config: str | None = option(None, "YAML file with any of these options; the command line overrides it.")
    model: str | None = option(
        None, "The CTM, of which the exact score is measured: a folder or a repository on the Hub."
    )
    teacher: str | None = option(None, "A diffusion model, likewise.")
    methods: list[str] = option(["ode", "elbo"], "'ode' (the density of the ODE) and 'elbo' (a lower bound).")
    num_images: int | None = option(None, "Images, drawn from the split by --seed. Default: all.")
    num_draws: int | None = option(None, "Estimates per image: default 1 of the ODE, 32 of the bound.")
    num_probes: int = option(1, "Hutchinson probes per ODE.")
    rtol: float = option(1e-4, "Relative tolerance of the ODE solver.")
    atol: float = option(1e-4, "Absolute tolerance, of images and of nats per dimension.")
    seed: int = option(0, "Seed of the images' choice, dequantisation, probes and noise.")
    batch_size: int = option(100, "Most images per network evaluation.")
    output_dir: str | None = option(
        None,
        "Folder for likelihood.json, with the bits per dimension of each image: `evaluation` in the checkpoint's own folder is where "
        "the page looks for it. Default: none.",
    )
    device: str = option("auto", "'cpu', 'cuda', 'cuda:1', ..., or 'auto': a GPU if there is one.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model is None and self.teacher is None:
            raise UserError("--model or --teacher is needed: a folder or a repository on the Hub.")
        known = set(self.methods) <= {"ode", "elbo"} and len(self.methods) > 0
        self.check(known, "methods", "'ode', 'elbo' or both")
        self.check_positive("num_probes", "batch_size", "rtol", "atol")
        for name in ("num_images", "num_draws"):
            self.check(getattr(self, name) is None or getattr(self, name) > 0, name, "positive")
        self.check_not_negative("seed")
        if self.output_dir is not None:
            self.check_folder("output_dir")


@dataclass(frozen=True)
class Measurement:
    """Mean over images of `bits_per_dim`, its standard error (over images, estimates' noise included), evaluations per image.

    `images` holds the bits per dimension of each.
    """

    name: str
    method: str
    bits_per_dim: float
    standard_error: float
    nfe: float
    images: list[float]


def measure(
    name: str, method: str, pipe: CTMPipeline, dataset: ImageDataset, indices: list[int], config: LikelihoodConfig
) -> Measurement:
    """Likelihood of the images `indices` by one method; class-conditional networks are told the class."""
    options = {"num_draws": config.num_draws, "num_probes": config.num_probes, "rtol": config.rtol, "atol": config.atol}
    generator = torch.Generator().manual_seed(config.seed)
    bits, evaluations = [], 0
    for begin in tqdm(range(0, len(indices), config.batch_size), desc=f"{name}, {method}", leave=False):
        images, labels = dataset[indices[begin : begin + config.batch_size]]
        labels = labels if pipe.unet.config.num_class_embeds is not None else None
        found = log_likelihood(pipe, images, labels, method, generator=generator, **options)
        bits.append(found.bits_per_dim)
        evaluations += found.nfe * len(images)
    bits = torch.cat(bits)
    error = (bits.std() / len(bits) ** 0.5).item()
    return Measurement(name, method, bits.mean().item(), error, evaluations / len(bits), bits.tolist())


def main(config: LikelihoodConfig) -> list[Measurement]:
    """Measure, print a table, and write likelihood.json if `output_dir` says where."""
    logging.set_verbosity_info()
    device = torch.device(
        ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
    )
    dataset = ImageDataset(config)
    pipelines = load_pipelines(config, dataset, device)
    names = {"ctm": "CTM, exact score", "heun": "teacher"}
    for sampler, pipe in pipelines.items():
        if pipe.unet.config.num_class_embeds is not None and dataset.label_column is None:
            raise UserError(f"--label_column is needed: the {names[sampler]} is class-conditional.")
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(config.seed)).tolist()
    indices = order[: config.num_images]
    if len(indices) < 2:
        raise UserError("--num_images must leave 2 images or more.")

    if config.output_dir is not None:
        check_writable(config.output_dir)
    rows = [
        measure(names[sampler], method, pipe, dataset, indices, config)
        for sampler, pipe in pipelines.items()
        for method in config.methods
    ]
    print(f"{config.dataset_name}, {config.dataset_split}: {len(indices)} images")
    print("| density | method | bits/dim | evaluations per image |\n|---|---|--:|--:|")
    for row in rows:
        print(f"| {row.name} | {row.method} | {row.bits_per_dim:.3f} ± {row.standard_error:.3f} | {row.nfe:.0f} |")
    if config.output_dir is not None:
        write_files(config.output_dir, {"likelihood.json": report(config, indices, list(pipelines), rows)})
    return rows


def report(config: LikelihoodConfig, indices: list[int], samplers: list[str], rows: list[Measurement]) -> bytes:
    """likelihood.json. "sampler" is "ctm" for the CTM and "heun" for the teacher, as in evaluation.json."""
    of_rows = [sampler for sampler in samplers for _ in config.methods]
    results = []
    for sampler, row in zip(of_rows, rows, strict=True):
        images = [round(bits, 4) for bits in row.images]
        results.append({"sampler": sampler, **dataclasses.asdict(row), "images": images})
    content = {
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "options": dataclasses.asdict(config),
        "indices": indices,
        "results": results,
        "version": diffusers_ctm.__version__,
    }
    return (json.dumps(content, indent=1, allow_nan=False) + "\n").encode()


if __name__ == "__main__":
    run_program(main, LikelihoodConfig)
