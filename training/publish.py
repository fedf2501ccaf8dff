"""Publish a pipeline on the Hub with its card: `python -m training.publish runs/digits/pipeline user/name`."""

import os
import re
import tempfile
from dataclasses import dataclass
from typing import ClassVar

from diffusers_ctm.hub import write_loading_code

from .cli.errors import UserError, error_text
from .cli.names import HUB_ID
from .cli.options import Checked, option, run_program
from .hub.client import api, open_repo, retried
from .hub.inheritance import check_licence_name, choose_licence
from .hub.license import licence_of
from .hub.publication import draw_samples, load_checked, upload
from .hub.staging import stage
from .report.pictures import enlarged_grid


BRANCH = re.compile(r"[\w-][\w./-]*")


@dataclass
class PublishConfig(Checked):
    """Publish the pipeline in FOLDER as NAME on the Hub, with a model card. Checkpoints, logs and unknown files stay.

    Write FOLDER and NAME first: a flag such as --private would take what follows it for its value.
    """

    POSITIONAL: ClassVar[tuple[str, ...]] = ("folder", "name")

    folder: str | None = option(None, "The pipeline's folder: with model_index.json, e.g. runs/digits/pipeline.")
    name: str | None = option(None, "The repository on the Hub, user/name. It is created if it is not there.")
    config: str | None = option(None, "YAML file with any of these options; the command line overrides it.")
    private: bool = option(False, "Create a private repository.")
    license: str | None = option(
        None, "Licence of the weights, as the Hub names it: 'mit', 'cc-by-nc-sa-4.0', ... Default: the teacher's."
    )
    license_name: str | None = option(None, "Name of the licence if --license is 'other'.")
    license_link: str | None = option(None, "Address of the licence if --license is 'other'.")
    overwrite_card: bool = option(False, "Replace the card that is on the Hub even if someone has edited it.")
    revision: str | None = option(None, "Branch to publish on, created if it is not there. Default: main.")
    evaluation: str | None = option(
        None,
        "Folder that training.evaluate, and maybe training.memorisation, wrote. Default: `evaluation` in FOLDER, or beside it if FOLDER is a run's `pipeline`.",
    )
    num_samples: int = option(16, "Samples in the card's picture; 0 is no picture. One is always drawn, as a check.")
    device: str = option("auto", "Where they are drawn: 'auto', 'cpu', 'cuda', 'mps'.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.folder or not self.name:
            raise UserError(
                "FOLDER and NAME are needed: python -m training.publish runs/digits/pipeline user/name. See --help."
            )
        self.check(HUB_ID.fullmatch(self.name) is not None, "name", "a repository on the Hub as user/name")
        revision = self.revision
        self.check(revision is None or BRANCH.fullmatch(revision) is not None, "revision", "the name of a branch")
        self.check_not_negative("num_samples")
        check_licence_name(self.license, "license")
        if self.license == "other" and not (self.license_name and self.license_link):
            raise UserError("--license other needs --license_name and --license_link.")


def main(config: PublishConfig) -> str:
    """Check, then upload in one commit; return its address."""
    folder, repo = os.path.normpath(config.folder), config.name
    evaluation = config.evaluation
    if evaluation is not None and not os.path.isfile(os.path.join(evaluation, "evaluation.json")):
        raise UserError(f"--evaluation {evaluation} has no evaluation.json of training.evaluate.")
    beside = os.path.join(os.path.dirname(os.path.abspath(folder)), "evaluation")
    if (
        evaluation is None
        and not os.path.isdir(os.path.join(folder, "evaluation"))
        and os.path.basename(folder) == "pipeline"
    ):
        evaluation = beside if os.path.isdir(beside) else None
    with tempfile.TemporaryDirectory(prefix="publish-") as target:
        left_out = stage(folder, target, evaluation)
        pipe = load_checked(target, folder)
        write_loading_code(target, pipe)
        images, how = draw_samples(pipe, config.num_samples, folder, config.device)
        wanted = licence_of(
            {"license": config.license, "license_name": config.license_name, "license_link": config.license_link}
        )
        licence = choose_licence(target, wanted)
        if config.num_samples:
            columns = min(8, len(images))
            rows = len(images) // columns
            enlarged_grid(images[: rows * columns], rows, columns).save(os.path.join(target, "samples.png"))
        if left_out:
            print(f"Not uploaded: {', '.join(left_out)}")
        try:
            retried(lambda: open_repo(repo, config.private))
            if config.revision not in (None, "main"):
                retried(lambda: api().create_branch(repo, branch=config.revision, exist_ok=True))
            address, new_card = retried(
                lambda: upload(
                    target,
                    repo,
                    licence,
                    "Publish the pipeline",
                    how if config.num_samples else None,
                    config.overwrite_card,
                    config.revision,
                )
            )
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"{folder} could not be uploaded to {repo}: {error_text(error)}. The repository is as it was before; run the same command "
                "again, and what has arrived is not sent twice."
            ) from error
    if not new_card:
        print(
            f"Kept the card of {repo}, which was edited there; --overwrite_card replaces it. It must name the licence {licence}."
        )
    print(f"Published {folder} under {licence}: {address}")
    return address


if __name__ == "__main__":
    run_program(main, PublishConfig)
