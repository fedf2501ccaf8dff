# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Actions of the tabs: each checks a visitor's arguments, runs a recipe and makes its picture, words and Python.

Each action is an endpoint of the page's API, which shows its docstring.
"""

import os
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import gradio as gr
from PIL import Image

from diffusers_ctm import CTMPipeline, save_images
from training.report.pictures import enlarged, grid, labeled_table, table

from . import recipes
from .checkpoints import EVERY_CLASS, ROOT, Checkpoint
from .plots import histogram
from .recorder import Made, Run, Shown, given
from .requests import (
    MOST_IMAGES,
    MOST_STEPS,
    chosen,
    classes,
    gamma_or_own,
    one_class,
    one_seed,
    refuse,
    seeds_from,
    whole,
    within,
)
from .turns import MOST_TURN, STOPPED
from .uploads import fitted, flat_drawing, mask_of


GRID_STEPS, GRID_GAMMAS = (1, 2, 4, 8, 16), (0.0, 0.25, 0.5, 0.75, 1.0)

STRIP_GAMMAS = (0.0, 0.5, 1.0)

HEUN_STEPS = 18

LONGEST_COMPARISON = 60  # seconds for the likelihood of images to compare with, after which fewer do


def schedule_words(pipe: CTMPipeline) -> str:
    """The levels and gammas of the last run of `pipe`."""
    levels, gammas = pipe.scheduler.sigmas[:-1].tolist(), pipe.scheduler.gammas[:-1].tolist()
    words = f" Tuned schedule: noise levels {', '.join(f'{level:.3g}' for level in levels)}"
    return words + (f"; gamma {', '.join(f'{one:.3g}' for one in gammas)}." if gammas else ".")


def words_of(run: Run, steps: int, seeds: range) -> str:
    count = len(seeds)
    named = f"Seed {seeds[0]}" if count == 1 else f"Seeds {seeds[0]} to {seeds[-1]}"
    return f"{count} image{'s' * (count != 1)}, {steps} step{'s' * (steps != 1)}: {run.cost}. {named}."


# Sampling -------------------------------------------------------------------------------------------------------------


def sample(
    model: str,
    label: str = EVERY_CLASS,
    steps: float = 1,
    gamma: float = 0.0,
    seed: float = 0,
    count: float = 16,
    own_schedule: bool = False,
    progress=gr.Progress(track_tqdm=True),  # noqa: B008 gradio looks for it here
) -> Made:
    """Draw images with a consistency trajectory model. A seed is the same noise at every gamma and number of steps.

    Args:
        model: name of a checkpoint of this page.
        label: class by name or number, "all" for all of them in turn.
        steps: network evaluations for each image, 1 to 40.
        gamma: 0 is deterministic, 1 is multistep sampling of consistency models; counts from two steps on.
        seed: of the first image, which has the number seed; the next has seed + 1 and so on.
        count: images, 1 to 36.
        own_schedule: use the levels and gammas that the checkpoint carries for this number of steps, not `gamma`.
    """
    run, seeds = Run(chosen(model)), seeds_from(seed, count)
    steps, gamma = whole("Steps", steps, 1, MOST_STEPS), within("gamma", gamma, 0, 1)
    gamma, missing = gamma_or_own(run.checkpoint, steps, gamma, own_schedule)
    output = run(recipes.sample, run.pipe, classes(run.checkpoint, label, len(seeds)), steps, gamma, seeds)
    schedule = schedule_words(run.pipe.value) if gamma is None else missing
    return run.made(grid(output.images), words_of(run, steps, seeds) + schedule, output)


def stop(turn: str) -> None:
    """End the run of this page with that turn before its next network evaluation."""
    STOPPED.append(str(turn)[:MOST_TURN])


def trajectory(
    model: str,
    label: str = "0",
    steps: float = 5,
    seed: float = 0,
    progress=gr.Progress(track_tqdm=True),  # noqa: B008
) -> Made:
    """Show every state x_t of one image and its jump to the end, from the same noise at gamma 0, 0.5 and 1.

    Args:
        model: name of a checkpoint of this page.
        label: class by name or number.
        steps: 1 to 8.
        seed: of all noise.
    """
    run, steps, seed = Run(chosen(model)), whole("Steps", steps, 1, 8), one_seed(seed)
    label = one_class(run.checkpoint, label)
    images = run(recipes.trajectory, run.pipe, label, steps, list(STRIP_GAMMAS), seed)
    scheduler = run.pipe.value.scheduler
    scheduler.set_timesteps(steps, gamma=0.0)
    left = [words for gamma in STRIP_GAMMAS for words in (f"gamma {gamma:g}", "its jumps")]
    above = [f"{level:.2g}" if level < 10 else f"{level:.0f}" for level in scheduler.sigmas.tolist()]
    report = (
        f"{len(STRIP_GAMMAS)} times {2 * steps} network evaluations, {1000 * run.seconds:.0f} ms in all. Each column "
        "has its noise level above it. At gamma 0 the jumps agree: the trajectory is fixed. At gamma 1 each step "
        "forgets, and the jump changes."
    )
    return run.made(labeled_table(images, left, above, 72), report, images)


def steps_and_gamma(
    model: str,
    label: str = "0",
    seed: float = 0,
    progress=gr.Progress(track_tqdm=True),  # noqa: B008
) -> Made:
    """One noise at 1 to 16 steps and five gammas, all in one batch.

    Args:
        model: name of a checkpoint of this page.
        label: class by name or number.
        seed: of all noise.
    """
    run, seed = Run(chosen(model)), one_seed(seed)
    label = one_class(run.checkpoint, label)
    images = run(recipes.steps_and_gamma, run.pipe, label, list(GRID_STEPS), list(GRID_GAMMAS), seed)
    left, above = [f"gamma {g:g}" for g in GRID_GAMMAS], [f"{n} step{'s' * (n != 1)}" for n in GRID_STEPS]
    report = f"{len(images)} images in {run.nfe} network evaluations, {1000 * run.seconds:.0f} ms in all. Seed {seed}."
    return run.made(labeled_table(images, left, above, 88), report, images)


def compare(
    model: str,
    label: str = EVERY_CLASS,
    steps: float = 1,
    seed: float = 0,
    count: float = 9,
    own_schedule: bool = False,
    progress=gr.Progress(track_tqdm=True),  # noqa: B008
) -> Made:
    """The CTM in few steps and the diffusion model in 18 Heun steps, from the same noise.

    Args:
        model: name of a checkpoint of this page.
        label: class by name or number, "all" for all of them in turn.
        steps: of the CTM, 1 to 40.
        seed: of the first image.
        count: images, 1 to 36.
        own_schedule: use the noise levels and gammas that the CTM carries for this number of steps, instead of gamma 0.
    """
    run, seeds = Run(chosen(model)), seeds_from(seed, count)
    steps, labels = whole("Steps", steps, 1, MOST_STEPS), classes(run.checkpoint, label, len(seeds))
    gamma, missing = gamma_or_own(run.checkpoint, steps, 0.0, own_schedule)
    ctm = run(recipes.sample, run.pipe, labels, steps, gamma, seeds, variable="ctm")
    report = f"Left: the CTM, {run.cost}.{schedule_words(run.pipe.value) if gamma is None else missing} "
    source, pipe = run.checkpoint.teacher or (run.checkpoint.source, run.checkpoint.pipe)
    name = f"its teacher, {source.rsplit('/', 1)[-1]}"
    if run.checkpoint.teacher is None:
        name = "the CTM's exact score, since its teacher is not here"
    other = run.model("model", source, pipe)
    slow = run(recipes.heun, other, labels, HEUN_STEPS, seeds, variable="heun_images")
    report += f"Right: {name}, in {HEUN_STEPS} Heun steps, {run.cost}."
    run.lines.append("output = ctm.images + heun_images.images")
    return run.made((grid(ctm.images), grid(slow.images)), report, [*ctm.images, *slow.images])


# Editing --------------------------------------------------------------------------------------------------------------


def inpaint(
    model: str,
    drawing: dict | None,
    label: str = "0",
    steps: float = 18,
    gamma: float = 1.0,
    seed: float = 0,
    count: float = 8,
    progress=gr.Progress(track_tqdm=True),  # noqa: B008
) -> Made:
    """Repaint the part of a picture that is drawn over; the rest stays, pixel for pixel.

    Args:
        model: name of a checkpoint of this page.
        drawing: the picture as "background"; the opaque part of its "layers" is repainted.
        label: class by name or number.
        steps: 1 to 40.
        gamma: 0 to 1; 1, which renoises most, is usually best here.
        seed: of the first image.
        count: images, 1 to 36.
    """
    run, seeds = Run(chosen(model)), seeds_from(seed, count)
    steps, gamma = whole("Steps", steps, 1, MOST_STEPS), within("gamma", gamma, 0, 1)
    if not drawing or drawing.get("background") is None:
        raise refuse("Put in a picture first, or take an example.")
    mask = mask_of(drawing, run.checkpoint.size)
    if mask.getextrema()[1] == 0:
        raise refuse("Draw over the part to repaint.")
    picture, label = fitted(drawing["background"], run.checkpoint.pipe), one_class(run.checkpoint, label)
    files = given("image.png", picture), given("mask.png", mask)
    output = run(recipes.inpaint, run.pipe, *files, label, steps, gamma, seeds)
    hidden = picture.convert("RGB")
    hidden.paste((200, 60, 160), mask=mask)
    report = f"First the picture given, then {words_of(run, steps, seeds)}"
    return run.made(grid([hidden, *output.images]), report, output)


def edit(
    model: str,
    drawing: dict | None,
    label: str = "0",
    strength: float = 0.5,
    steps: float = 4,
    gamma: float = 0.0,
    seed: float = 0,
    count: float = 8,
    progress=gr.Progress(track_tqdm=True),  # noqa: B008
) -> Made:
    """Turn strokes into images: noise is added to the drawing, and the model removes it again.

    Args:
        model: name of a checkpoint of this page.
        drawing: "background", "layers" or both, on top of each other.
        label: class by name or number.
        strength: how much noise, 0.05 to 1; at 1 nothing of the drawing is left.
        steps: 1 to 40.
        gamma: 0 to 1.
        seed: of the first image.
        count: images, 1 to 36.
    """
    run, seeds = Run(chosen(model)), seeds_from(seed, count)
    steps, gamma = whole("Steps", steps, 1, MOST_STEPS), within("gamma", gamma, 0, 1)
    strength = within("Strength", strength, 0.05, 1)
    picture, label = fitted(flat_drawing(drawing), run.checkpoint.pipe), one_class(run.checkpoint, label)
    output = run(recipes.edit, run.pipe, given("image.png", picture), strength, label, steps, gamma, seeds)
    report = f"First the picture given, then {words_of(run, steps, seeds)}"
    return run.made(grid([picture, *output.images]), report, output)


def interpolate_seeds(
    model: str,
    label: str = "0",
    first: float = 0,
    second: float = 1,
    steps: float = 4,
    count: float = 9,
    progress=gr.Progress(track_tqdm=True),  # noqa: B008
) -> Made:
    """Images between two seeds: their noises are mixed on the sphere, and each mixture is sampled at gamma 0.

    Args:
        model: name of a checkpoint of this page.
        label: class by name or number.
        first: seed of the first image.
        second: seed of the last image.
        steps: 1 to 40.
        count: images, 2 to 36.
    """
    run, steps = Run(chosen(model)), whole("Steps", steps, 1, MOST_STEPS)
    count = whole("The number of images", count, 2, MOST_IMAGES)
    first, second, label = one_seed(first), one_seed(second), one_class(run.checkpoint, label)
    pipe = run.checkpoint.pipe
    shape = (1, pipe.unet.config.in_channels, *pipe.state_size)
    output = run(recipes.between_seeds, run.pipe, label, steps, shape, first, second, count)
    return run.made(grid(output.images), f"From seed {first} to seed {second}: {run.cost}.", output)


def interpolate_images(
    model: str,
    image: Image.Image | None,
    other_image: Image.Image | None,
    label: str = "0",
    other_label: str = "0",
    count: float = 9,
    progress=gr.Progress(track_tqdm=True),  # noqa: B008
) -> Made:
    """Images between two pictures: the exact score encodes both to their noises, which are mixed and decoded.

    Args:
        model: name of a checkpoint of this page.
        image: the first picture.
        other_image: the last picture.
        label: class of the first, by name or number.
        other_label: class of the last.
        count: images, 2 to 36.
    """
    run, count = Run(chosen(model)), whole("The number of images", count, 2, MOST_IMAGES)
    if image is None or other_image is None:
        raise refuse("Put in two pictures first, or take the example.")
    first, last = (fitted(one, run.checkpoint.pipe) for one in (image, other_image))
    files = given("image.png", first), given("other.png", last)
    labels = [one_class(run.checkpoint, one) for one in (label, other_label)] if run.checkpoint.classes else None
    output = run(recipes.between_images, run.pipe, *files, labels, HEUN_STEPS, count)
    cost = f"{run.nfe} network evaluations, {1000 * run.seconds:.0f} ms"
    return run.made(
        grid([first, *output.images, last]), f"The two pictures and {count} images between them: {cost}.", output
    )


# Guidance and likelihood ----------------------------------------------------------------------------------------------


def guide(
    model: str,
    label: str = "0",
    scale: float = 10.0,
    steps: float = 8,
    gamma: float = 1.0,
    seed: float = 0,
    count: float = 8,
    progress=gr.Progress(track_tqdm=True),  # noqa: B008
) -> Made:
    """Lead samples to a class: by the gradient of a classifier, or classifier-free if the network was trained for it.

    Args:
        model: name of a checkpoint of this page.
        label: the class to lead to, by name or number.
        scale: strength of the guidance, 0 (off) to 20.
        steps: 1 to 40.
        gamma: 0 to 1.
        seed: of the first image.
        count: images, 1 to 16.
    """
    run, seeds = Run(chosen(model)), seeds_from(seed, count, most=16)
    steps, gamma = whole("Steps", steps, 1, MOST_STEPS), within("gamma", gamma, 0, 1)
    scale, checkpoint = within("Scale", scale, 0, 20), run.checkpoint
    if checkpoint.classifier is not None:
        folder, names = checkpoint.classifier
        target_or_label = Shown(ROOT / folder, repr(folder)), one_class(checkpoint, label, names)
        recipe, how = recipes.guide_by_classifier, "the gradient of a classifier"
    elif checkpoint.pipe.knows_no_class:
        target_or_label = (one_class(checkpoint, label),)
        recipe, how = recipes.guide_classifier_free, "classifier-free guidance"
    else:
        raise refuse(
            "This checkpoint cannot be guided here: there is no classifier for its images, and it was not trained with "
            "label dropout."
        )
    without = run(recipe, run.pipe, *target_or_label, 0.0, steps, gamma, seeds, variable="without")
    output = run(recipe, run.pipe, *target_or_label, scale, steps, gamma, seeds)
    picture = table([*without.images, *output.images], len(seeds), 720 // len(seeds))
    return run.made(picture, f"Above without, below with {how}. {words_of(run, steps, seeds)}", output)


def likelihood(
    model: str,
    image: Image.Image | None,
    label: str = "0",
    seed: float = 0,
    progress=gr.Progress(track_tqdm=True),  # noqa: B008
) -> Made:
    """Bits per dimension of a picture under the exact score, beside those of images like the training data.

    Less is likelier. A checkpoint with an autoencoder measures the picture's latents, whose bits may be negative.

    Args:
        model: name of a checkpoint of this page.
        image: the picture.
        label: its class by name or number.
        seed: of the estimate's noise.
    """
    run, seed = Run(chosen(model)), one_seed(seed)
    if image is None:
        raise refuse("Put in a picture first, or take an example.")
    picture, label = fitted(image, run.checkpoint.pipe), one_class(run.checkpoint, label)
    output = run(recipes.likelihood, run.pipe, given("image.png", picture), label, seed)
    bits = output.bits_per_dim.item()
    what, others = among(run.checkpoint, progress)
    beaten = sum(other > bits for other in others)
    of_what = "" if run.checkpoint.pipe.vae is None else " of its latents"
    report = (
        f"**{bits:.2f} bits per dimension{of_what}**, likelier than {beaten} of {len(others)} {what}, which have "
        f"{min(others):.2f} to {max(others):.2f}. {output.nfe} network evaluations with as many backward passes, "
        f"{run.seconds:.1f} s."
    )
    plot = histogram(others, bits, enlarged(picture, 96))
    return Made(plot, report, run.code("print(output.bits_per_dim)"), None, run.inputs)


def among(checkpoint: Checkpoint, progress: Callable) -> tuple[str, list[float]]:
    """Words for images to compare with, and bits per dimension of each.

    They are those that the checkpoint carries, else those of its examples, computed once.
    """
    if checkpoint.likelihood is None:
        what, images, labels = checkpoint.examples
        bits, until = [], time.monotonic() + LONGEST_COMPARISON
        for i in range(0, len(images), 8):
            if i and time.monotonic() > until:  # a large network
                break
            progress(i / len(images), desc=f"Comparing with {len(images)} {what}, once")
            part = slice(i, i + 8)
            output = recipes.likelihood(checkpoint.fresh(), images[part], labels and labels[part], 0)
            bits += output.bits_per_dim.tolist()
        checkpoint.likelihood = what, bits
    return checkpoint.likelihood


# Files ----------------------------------------------------------------------------------------------------------------


def zipped(made: Made, name: str) -> str:
    """Path of a .zip with the images, their provenance, the Python that makes them and the pictures that it reads."""
    folder = tempfile.mkdtemp(prefix="files-", dir=os.environ.get("GRADIO_TEMP_DIR"))  # gradio deletes old files there
    target = Path(folder, f"{name}.zip")
    with tempfile.TemporaryDirectory() as draft, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        save_images(made.images, Path(draft, "samples", "{index:03d}.png"))
        for file, image in made.inputs.items():
            image.save(Path(draft, file))
        Path(draft, "reproduce.py").write_text(made.code, encoding="utf-8")
        for path in sorted(Path(draft).rglob("*.*")):
            archive.write(path, path.relative_to(draft))
    return str(target)
