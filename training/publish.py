# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Publish a pipeline on the Hub with its card: `python -m training.publish runs/digits/pipeline user/name`."""

import os
import re
from dataclasses import dataclass
from typing import ClassVar

from .cli.errors import UserError
from .cli.names import HUB_ID
from .cli.options import NOT_NEGATIVE, Checked, option, run_program
from .hub.license import check_license_name, license_of
from .hub.publication import publish


@dataclass
class PublishConfig(Checked):
    """Publish the pipeline in FOLDER as NAME on the Hub, with a model card. Checkpoints, logs and unknown files stay.

    Write FOLDER and NAME first: a flag such as --private would take what follows it for its value.
    """

    POSITIONAL: ClassVar[tuple[str, ...]] = ("folder", "name")

    folder: str | None = option(None, "The pipeline's folder: with model_index.json, e.g. runs/digits/pipeline.")
    name: str | None = option(
        None,
        "The repository on the Hub, user/name. It is created if it is not there.",
        must_be=("a repository on the Hub as user/name", HUB_ID.fullmatch),
    )
    config: str | None = option(None, "YAML file with any of these options; the command line overrides it.")
    private: bool = option(False, "Create a private repository.")
    license: str | None = option(
        None, "License of the weights, as the Hub names it: 'mit', 'cc-by-nc-sa-4.0', ... Default: the teacher's."
    )
    license_name: str | None = option(None, "Name of the license if --license is 'other'.")
    license_link: str | None = option(None, "Address of the license if --license is 'other'.")
    overwrite_card: bool = option(False, "Replace the card that is on the Hub even if someone has edited it.")
    revision: str | None = option(
        None,
        "Branch to publish on, created if it is not there. Default: main.",
        must_be=("the name of a branch", re.compile(r"[\w-][\w./-]*").fullmatch),
    )
    evaluation: str | None = option(
        None,
        "Folder that training.evaluate, and maybe training.memorization, wrote. Default: `evaluation` in FOLDER, or "
        "beside it if FOLDER is a run's `pipeline`.",
    )
    num_samples: int = option(
        16, "Samples in the card's picture; 0 is no picture. One is always drawn, as a check.", must_be=NOT_NEGATIVE
    )
    device: str = option("auto", "Where they are drawn: 'auto', 'cpu', 'cuda', 'mps'.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.folder or not self.name:
            raise UserError(
                "FOLDER and NAME are needed: python -m training.publish runs/digits/pipeline user/name. See --help."
            )
        check_license_name(self.license, "license")
        if self.license == "other" and not (self.license_name and self.license_link):
            raise UserError("--license other needs --license_name and --license_link.")


def main(config: PublishConfig) -> str:
    """Publish, say what was done, and return the last sentence, which ends with the commit's address."""
    if config.evaluation is not None and not os.path.isfile(os.path.join(config.evaluation, "evaluation.json")):
        raise UserError(f"--evaluation {config.evaluation} has no evaluation.json of training.evaluate.")
    done = publish(
        config.folder,
        config.name,
        private=config.private,
        license=license_of(vars(config)),
        overwrite_card=config.overwrite_card,
        revision=config.revision,
        evaluation=config.evaluation,
        num_samples=config.num_samples,
        device=config.device,
    )
    print("\n".join(done))
    return done[-1]


if __name__ == "__main__":
    run_program(main, PublishConfig)
