"""`publish(folder, repo, ...)`: check, sample, card, upload."""

import os

import diffusers
import torch
from diffusers import DiffusionPipeline

from diffusers_ctm import CTMPipeline
from diffusers_ctm.scheduling_karras import jumps

from ..cli.errors import UserError
from ..cli.files import read_json
from .card import is_generated, make_card
from .client import commit_folder, present_card
from .inheritance import check_inheritance
from .license import Licence, licence_in
from .staging import components


def load_checked(folder: str, name: str) -> CTMPipeline:
    """Load the pipeline that will be uploaded, without running code of it. `name` is what to call it in a message."""
    try:
        network_class = getattr(diffusers, read_json(folder, "unet/config.json").get("_class_name", "UNet2DModel"))
        _, report = network_class.from_pretrained(folder, subfolder="unet", output_loading_info=True)
        pipe = DiffusionPipeline.from_pretrained(folder)  # which is silent only if it loads the network itself
    except Exception as error:  # diffusers, safetensors and json each raise their own
        raise UserError(
            f"{name} does not load as a pipeline, so nothing was published: {type(error).__name__}: {str(error).replace(folder, name)}"
        ) from error
    if not isinstance(pipe, CTMPipeline):
        raise UserError(f"{name} is a {type(pipe).__name__}; this program publishes CTMPipeline only.")
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report.get(kind):
            raise UserError(
                f"{name} does not load as a pipeline, so nothing was published: unet has {kind.replace('_', ' ')}: {list(report[kind])[:3]}."
            )
    return pipe


def draw_samples(pipe: CTMPipeline, count: int, name: str, device: str) -> tuple[list, str]:
    """At least one image, and how they were drawn. Raises UserError if the pipeline does not sample."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    is_ctm = jumps(pipe.scheduler)
    num_classes = pipe.num_classes
    settings: dict = {"num_inference_steps": 1 if is_ctm else 18, "output_type": "np"}
    if num_classes:
        settings["class_labels"] = [index % num_classes for index in range(max(1, count))]
    try:
        pipe = pipe.to(device)
        pipe.set_progress_bar_config(disable=True)
        images = pipe(batch_size=max(1, count), generator=torch.Generator(device).manual_seed(0), **settings).images
    except Exception as error:
        raise UserError(f"{name} loads but does not sample: {type(error).__name__}: {error}") from error
    if images.min() != images.min() or float(images.std()) == 0.0:
        raise UserError(f"{name} samples images that are not finite or all alike; nothing was published.")
    how = "one step" if is_ctm else "18 steps of Heun's method"
    return pipe.numpy_to_pil(images), how


def add_card(
    target: str, repo: str, licence: Licence, samples: str | None, overwrite: bool, revision: str | None
) -> bool:
    """Write README.md unless the Hub has one that someone has edited; return whether it was written.

    Raises UserError if the card that is kept names a licence that the weights may not have.
    """
    present = present_card(repo, revision)
    if present is not None and not overwrite and not is_generated(present):
        kept = licence_in(present)
        if kept is not None:
            try:
                check_inheritance(licence, "you publish them so, or their teacher has it", kept)
            except UserError as error:
                raise UserError(
                    f"The card of {repo} would be kept, and says otherwise: {error} Correct it there, or give --overwrite_card."
                ) from error
        return False
    with open(os.path.join(target, "README.md"), "w", encoding="utf-8", newline="\n") as file:
        file.write(make_card(target, repo, licence, samples, revision))
    return True


def upload(
    target: str,
    repo: str,
    licence: Licence,
    message: str,
    samples: str | None = None,
    overwrite: bool = False,
    revision: str | None = None,
) -> tuple[str, bool]:
    """Add the card to the staged pipeline and commit all; return the commit's address and whether the card is new."""
    written = add_card(target, repo, licence, samples, overwrite, revision)
    return commit_folder(repo, target, message, components(target), revision), written
