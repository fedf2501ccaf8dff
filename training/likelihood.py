# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Bits per dimension of images under a CTM and a teacher: `python -m training.likelihood --model assets/digits-ctm`."""

import itertools
from dataclasses import dataclass

import torch
from diffusers.utils import logging
from tqdm.auto import tqdm

from diffusers_ctm import CTMPipeline, log_likelihood

from .cli.device import choose_device
from .cli.errors import UserError
from .cli.files import check_writable
from .cli.options import FOLDER, POSITIVE, SEED, option, run_program
from .data.images import ImageDataset
from .measure.options import PairOptions
from .measure.reports import facts, write_report
from .networks.pipelines import load_pipelines
from .report.tables import markdown_table


NAMES = {"ctm": "CTM, exact score", "heun": "teacher"}


@dataclass
class LikelihoodConfig(PairOptions):
    """Measure the likelihood of images by the probability-flow ODE and by the variational bound.

    A CTM is measured by its exact score.
    """

    methods: list[str] = option(
        ["ode", "elbo"],
        "'ode' (the density of the ODE) and 'elbo' (a lower bound).",
        must_be=("'ode', 'elbo' or both", lambda method: method in ("ode", "elbo")),
    )
    num_images: int | None = option(
        None, "Images, two or more, drawn from the split by --seed. Default: all.", must_be=POSITIVE
    )
    num_draws: int | None = option(
        None, "Estimates per image: default 1 of the ODE, 32 of the bound.", must_be=POSITIVE
    )
    num_probes: int = option(1, "Hutchinson probes per ODE.", must_be=POSITIVE)
    rtol: float = option(1e-4, "Relative tolerance of the ODE solver.", must_be=POSITIVE)
    atol: float = option(1e-4, "Absolute tolerance, of images and of nats per dimension.", must_be=POSITIVE)
    seed: int = option(0, "Seed of the images' choice, dequantization, probes and noise.", must_be=SEED)
    batch_size: int = option(100, "Most images per network evaluation.", must_be=POSITIVE)
    output_dir: str | None = option(
        None,
        "Folder for likelihood.json, with the bits per dimension of each image. The page looks for it in the folder "
        "`evaluation` of the checkpoint. Default: no file.",
        must_be=FOLDER,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(len(self.methods) > 0, "methods", "one value or more")
        self.refuse(["teacher_guidance_scale"], "has no place here: a guided denoiser is not that of any noisy images")


def measure(
    sampler: str, method: str, pipe: CTMPipeline, dataset: ImageDataset, indices: list[int], config: LikelihoodConfig
) -> dict:
    """Likelihood of the images `indices` by one method, as likelihood.json has it.

    "sampler" is "ctm" for the CTM and "heun" for the teacher, as in evaluation.json; "name" is the model in words, and
    that its density is one of latents.
    "bits_per_dim" is the mean over images, and "standard_error" its error over images, the noise of estimates
    included. "nfe" are the network evaluations per image, and "images" the bits per dimension of each.
    Class-conditional networks are told the class.
    """
    generator = torch.Generator().manual_seed(config.seed)
    bits, evaluations = [], 0
    batches = range(0, len(indices), config.batch_size)
    for begin in tqdm(batches, desc=f"{NAMES[sampler]}, {method}", leave=False):
        images, labels = dataset[indices[begin : begin + config.batch_size]]
        labels = None if pipe.num_classes is None else labels
        likelihood = log_likelihood(
            pipe,
            images,
            labels,
            method,
            num_draws=config.num_draws,
            num_probes=config.num_probes,
            rtol=config.rtol,
            atol=config.atol,
            generator=generator,
        )
        bits.append(likelihood.bits_per_dim)
        evaluations += likelihood.nfe * len(images)
    bits = torch.cat(bits)
    return {
        "sampler": sampler,
        "name": NAMES[sampler] + ("" if pipe.vae is None else ", of latents"),
        "method": method,
        "bits_per_dim": bits.mean().item(),
        "standard_error": (bits.std() / len(bits) ** 0.5).item(),
        "nfe": evaluations / len(bits),
        "images": [round(value, 4) for value in bits.tolist()],
    }


def main(config: LikelihoodConfig) -> list[dict]:
    """Measure, print a table, and write likelihood.json if `output_dir` says where."""
    logging.set_verbosity_info()
    device = choose_device(config.device)
    dataset = ImageDataset(config)
    pipelines = load_pipelines(config, dataset, device)
    for sampler, pipe in pipelines.items():
        if pipe.num_classes is not None and dataset.label_column is None:
            raise UserError(f"--label_column is needed: the {NAMES[sampler]} is class-conditional.")
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(config.seed))
    indices = order[: config.num_images].tolist()
    if len(indices) < 2:
        raise UserError("--num_images must leave 2 images or more.")
    if config.output_dir is not None:
        check_writable(config.output_dir)

    rows = [
        measure(sampler, method, pipelines[sampler], dataset, indices, config)
        for sampler, method in itertools.product(pipelines, config.methods)
    ]
    print(f"{config.dataset_name}, {config.dataset_split}: {len(indices)} images")
    cells = [
        [row["name"], row["method"], "{bits_per_dim:.3f} ± {standard_error:.3f}".format(**row), f"{row['nfe']:.0f}"]
        for row in rows
    ]
    print(*markdown_table(["density", "method", "bits/dim", "evaluations per image"], cells), sep="\n")
    if config.output_dir is not None:
        report = {**facts(config, device), "indices": indices, "results": rows}
        write_report(config.output_dir, "likelihood", report)
    return rows


if __name__ == "__main__":
    run_program(main, LikelihoodConfig)
