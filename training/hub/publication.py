# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Publish a pipeline: check it, draw samples, write its card, upload."""

import functools
import os
import tempfile
from pathlib import Path
from typing import Any

import diffusers
import torch

from diffusers_ctm import CTMPipeline
from diffusers_ctm.hub import write_loading_code
from diffusers_ctm.scheduling_karras import jumps

from ..cli.device import choose_device
from ..cli.errors import UserError, error_text, loading
from ..cli.files import read_json
from ..cli.weights import kind_of_weights, load_pipeline
from ..report.pictures import enlarged_grid
from .card import is_generated, make_card
from .client import api, commit_folder, open_repo, read_card, retried
from .inheritance import choose_license, may_be_published
from .license import License, license_in
from .record import CONVERSION, RECORD
from .staging import stage


def publish(
    folder: str,
    repo: str,
    *,
    private: bool = False,
    license: License | None = None,
    overwrite_card: bool = False,
    revision: str | None = None,
    evaluation: str | None = None,
    num_samples: int = 16,
    device: str = "auto",
) -> list[str]:
    """Check the pipeline in `folder`, draw samples, write its card, and upload all in one commit. Raises UserError.

    Returns what was done, in sentences; the last one ends with the address of the commit.

    Args:
        repo: user/name on the Hub. It is created if it is not there.
        license: of the weights. Default: the one that their records name.
        overwrite_card: replace the card that is on the Hub even if someone has edited it.
        revision: branch, created if it is not there. Default: main.
        evaluation: folder of its measurements, as in `stage`.
        num_samples: samples in the card's picture; 0 is no picture. One is always drawn, as a check.
        device: where they are drawn.
    """
    with tempfile.TemporaryDirectory(prefix="publish-") as target:
        left_out = stage(folder, target, evaluation)
        pipe = load_checked(target, folder)
        write_loading_code(target, pipe)
        images, how = draw_samples(pipe, max(1, num_samples), folder, choose_device(device))
        record, conversion = read_json(target, RECORD), read_json(target, CONVERSION)
        license = choose_license(record, conversion, license)
        if num_samples:
            columns = min(8, len(images))
            rows = len(images) // columns
            enlarged_grid(images[: rows * columns], rows, columns).save(os.path.join(target, "samples.png"))
        about = {"samples": how if num_samples else None, "overwrite": overwrite_card, "revision": revision}
        send = functools.partial(upload, target, repo, private, license, record, conversion, **about)
        try:
            address, new_card = retried(send)
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"{folder} could not be uploaded to {repo}: {error_text(error)}. The repository is as it was before; "
                "run the same command again, and what has arrived is not sent twice."
            ) from error
    done = [f"Not uploaded: {', '.join(left_out)}"] if left_out else []
    if not new_card:
        done.append(
            f"Kept the card of {repo}, which was edited there; --overwrite_card replaces it. It must name the license "
            f"{license}."
        )
    return [*done, f"Published {folder} under {license}: {address}"]


def load_checked(folder: str, name: str) -> CTMPipeline:
    """Load the pipeline that will be uploaded, without running code in it. Messages call it `name`."""
    what, nothing = f"The pipeline {name}", "Nothing was published."
    with loading(what, nothing):
        unet = Path(folder, "unet")
        kind, files = kind_of_weights(os.listdir(unet) if unet.is_dir() else ()) or ("none", [])
        if "variant" in kind:
            raise UserError(
                f"{what} has its weights as a variant only ({files[0]}), which readers would have to ask for. Load it "
                "with that variant and save it without. " + nothing
            )
        network_class = getattr(diffusers, read_json(folder, "unet/config.json").get("_class_name", "UNet2DModel"))
        _, report = network_class.from_pretrained(folder, subfolder="unet", output_loading_info=True)
    wrong = {kind: list(report[kind])[:3] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    if any(wrong.values()):
        raise UserError(f"The weights of {name} do not fit its unet: {wrong}. Nothing was published.")
    pipe = load_pipeline(what, folder, nothing)  # which is silent only if it loads the network itself
    if not isinstance(pipe, CTMPipeline):
        raise UserError(f"{name} is a {type(pipe).__name__}; this program publishes CTMPipeline only.")
    return pipe


def draw_samples(pipe: CTMPipeline, count: int, name: str, device: torch.device) -> tuple[list, str]:
    """Images, and words on how they were drawn. Raises UserError if the pipeline does not sample."""
    steps, how = (1, "one step") if jumps(pipe.scheduler) else (18, "18 steps of Heun's method")
    try:
        pipe = pipe.to(device)
        pipe.set_progress_bar_config(disable=True)
        images = pipe(
            batch_size=count,
            class_labels=pipe.classes and [pipe.classes[index % len(pipe.classes)] for index in range(count)],
            num_inference_steps=steps,
            generator=torch.Generator(device).manual_seed(0),
            output_type="np",
        ).images
    except Exception as error:
        raise UserError(f"{name} loads but does not sample: {error_text(error)}") from error
    if images.std() == 0:
        raise UserError(f"{name} samples images that are all alike; nothing was published.")
    return pipe.numpy_to_pil(images), how


def upload(
    target: str,
    repo: str,
    private: bool,
    license: License,
    record: dict[str, Any],
    conversion: dict[str, Any],
    message: str = "Publish the pipeline",
    samples: str | None = None,
    overwrite: bool = False,
    revision: str | None = None,
) -> tuple[str, bool]:
    """Upload a staged pipeline with its card in one commit; return its address, and whether the card is new.

    A card that someone has edited on the Hub stays, also one that was edited while the files were sent: the Hub then
    refuses the commit, and `retried` calls this once more. Raises UserError if the card names a license that the
    weights may not have, or as `open_repo` and `commit_folder` do.
    """
    open_repo(repo, private)
    if revision not in (None, "main"):
        api().create_branch(repo, branch=revision, exist_ok=True)
    commit = api().model_info(repo, revision=revision).sha  # the cache may hold an older card than the one of now
    present = read_card(repo, commit)
    new_card = present is None or overwrite or is_generated(present)
    Path(target, "README.md").unlink(missing_ok=True)  # of an attempt before this one
    if new_card:
        card = make_card(target, repo, license, record, conversion, samples, revision)
        Path(target, "README.md").write_text(card, encoding="utf-8", newline="\n")
    elif (kept := license_in(present)) and not may_be_published(license, kept):
        raise UserError(
            f"The card of {repo} was edited there and would be kept, but its license {kept} contradicts {license}, "
            "which these weights have. Correct it there, or give --overwrite_card."
        )
    return commit_folder(repo, target, message, commit, revision), new_card
