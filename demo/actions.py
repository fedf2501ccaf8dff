# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""What each tab does: arguments of visitors checked, a recipe run, its pictures, words and Python made.

Every function here is an endpoint of the page's API, so that its docstring is read there.
"""

import inspect
import os
import re
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gradio as gr
import torch
from PIL import Image, ImageDraw, ImageFont

import diffusers_ctm
from diffusers_ctm import CTMPipeline, save_images

from . import recipes
from .checkpoints import MOST_STOPPED, ROOT, STOPPED, Checkpoint
from .pictures import TEXT_COLOR, captioned, enlarged, grid, rows
from .uploads import CANVAS, background, fitted, flat_drawing, mask_of


MOST_IMAGES, MOST_STEPS, MOST_SEED = 36, 40, 2**31 - 1
EVERY_CLASS = "all"
GRID_STEPS, GRID_GAMMAS = (1, 2, 4, 8, 16), (0.0, 0.25, 0.5, 0.75, 1.0)
STRIP_GAMMAS = (0.0, 0.5, 1.0)
HEUN_STEPS = 18
LONGEST_COMPARISON = 60  # seconds for the likelihood of images to compare with, after which fewer do
FILES = "The images of `{name}` one by one, each with how it was made in it, and the Python that makes them: a .zip."
MOST_TURN = 64  # characters of a turn
STOPPING = threading.Lock()
CHECKPOINTS: dict[str, Checkpoint] = {}  # by name; `app.py` fills it


@dataclass
class Made:
    """What an action gives: the picture to show, words below it, the Python that makes the same, and its images one by one."""

    picture: Any
    report: str
    code: str
    images: Any = None  # what `save_images` takes
    inputs: dict[str, Image.Image] = field(default_factory=dict)  # that the Python reads, by file name


class Shown:
    """An argument of a recipe: its value here, and the text that stands for it in the shown Python."""

    def __init__(self, value: Any, text: str, file: str | None = None):
        self.value, self.text, self.file = value, text, file

    def __repr__(self) -> str:
        return self.text


def given(file: str, image: Image.Image) -> Shown:
    """A picture from a visitor, which the shown Python opens from a file."""
    return Shown(image, f'Image.open("{file}")', file)


class Run:
    """Runs recipes for one request and writes down the Python that does the same."""

    def __init__(self, checkpoint: Checkpoint):
        self.checkpoint = checkpoint
        self.sources, self.functions, self.lines, self.inputs = {}, {}, [], {}
        self.nfe, self.seconds = 0, 0.0

    def model(self, variable: str = "pipe", source: str | None = None, pipe: Any = None) -> Shown:
        """A pipeline of this request's own, which the shown Python loads into `variable`."""
        self.sources[variable] = source or self.checkpoint.source
        return Shown(self.checkpoint.fresh(pipe), variable)

    def __call__(self, recipe: Callable, *arguments: Any, variable: str = "output") -> Any:
        self.functions[recipe.__name__] = recipe
        self.lines.append(f"{variable} = {recipe.__name__}({', '.join(map(repr, arguments))})")
        shown = [one for one in arguments if isinstance(one, Shown)]
        self.inputs |= {one.file: one.value for one in shown if one.file is not None}
        values = [one.value if isinstance(one, Shown) else one for one in arguments]
        calls = self.checkpoint.calls
        calls.count, start = 0, time.perf_counter()
        found = recipe(*values)
        self.nfe, self.seconds = calls.count, time.perf_counter() - start
        return found

    @property
    def cost(self) -> str:
        """Of the last recipe, in words."""
        return f"{self.nfe} network evaluation{'s' * (self.nfe != 1)} each, {1000 * self.seconds:.0f} ms in all"

    def code(self, last: str = 'save_images(output, "samples/{index:03d}.png", overwrite=True)') -> str:
        body = "\n\n\n".join(inspect.getsource(function).strip() for function in self.functions.values())
        loads = [f'{name} = DiffusionPipeline.from_pretrained("{source}")' for name, source in self.sources.items()]
        if self.checkpoint.pipe.device.type != "cpu":
            loads += [f'{name}.to("{self.checkpoint.pipe.device.type}")' for name in self.sources]
        end = "\n".join([*loads, *self.lines, last])
        words = set(re.findall(r"\w+", body + end))
        ours = ", ".join(sorted(words & set(diffusers_ctm.__all__), key=lambda word: (word.islower(), word)))
        imports = ["import torch", "from diffusers import DiffusionPipeline"]
        imports += ["from PIL import Image"] if "Image.open(" in end else []
        imports += ["", f"from diffusers_ctm import {ours}" if ours else "import diffusers_ctm"]
        threads = f"torch.set_num_threads({torch.get_num_threads()})  # as the page does"
        return "\n".join([*imports, "", "", body, "", "", threads, end]) + "\n"

    def made(self, picture: Any, report: str, images: Any) -> Made:
        flags = getattr(images, "nsfw_content_detected", None) or []
        if any(flags):
            report += f" The safety checker flagged {sum(flags)} of {len(flags)} images, which are black."
        return Made(picture, report, self.code(), images, self.inputs)


# Checks ---------------------------------------------------------------------------------------------------------------


def refuse(message: str) -> gr.Error:
    return gr.Error(message, print_exception=False)


def chosen(model: str) -> Checkpoint:
    if not isinstance(model, str) or model not in CHECKPOINTS:
        raise refuse(f"There is no checkpoint of that name here. There is: {', '.join(CHECKPOINTS)}.")
    return CHECKPOINTS[model]


def whole(name: str, value: Any, low: int, high: int) -> int:
    number = within(name, value, low, high)
    if number != int(number):
        raise refuse(f"{name} must be a whole number.")
    return int(number)


def within(name: str, value: Any, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise refuse(f"{name} must be a number from {low:g} to {high:g}.")
    return float(value)


def one_class(checkpoint: Checkpoint, label: Any, otherwise: Sequence[str] = ()) -> int | None:
    """The number of the class `label`, a name or number as text; of `otherwise` if the checkpoint is unconditional."""
    names = checkpoint.classes or otherwise
    text = "" if label is None else str(label)[:100].strip()
    if not names:
        return None
    for k, name in enumerate(names):
        if text.lower() == name.lower():
            return k
    if text.isdecimal() and len(text) < 10 and int(text) < len(names):
        return int(text)
    few = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
    raise refuse(f"Choose a class: {few}.")


def classes(checkpoint: Checkpoint, label: Any, count: int) -> list[int] | None:
    """As many class numbers: those of one class, or for "all" spread over all."""
    total = len(checkpoint.classes)
    if not total:
        return None
    if label is None or str(label) == EVERY_CLASS:
        return [k * total // count if count < total else k % total for k in range(count)]
    return [one_class(checkpoint, label)] * count


def seeds_from(seed: Any, count: Any) -> range:
    count = whole("The number of images", count, 1, MOST_IMAGES)
    first = whole("The seed", seed, 0, MOST_SEED)
    return range(first, first + count)


def gamma_or_own(checkpoint: Checkpoint, steps: int, gamma: float, own_schedule: Any) -> tuple[float | None, str]:
    """What recipes take for gamma, None for the checkpoint's own schedule; and words if there is none for `steps`."""
    if not isinstance(own_schedule, bool):
        raise refuse("own_schedule must be true or false.")
    if not own_schedule or steps in checkpoint.presets:
        return None if own_schedule else gamma, ""
    return gamma, f" The checkpoint carries no schedule for {steps} step{'s' * (steps != 1)}: this is gamma {gamma:g}."


def schedule_words(pipe: CTMPipeline) -> str:
    """The levels and gammas of the last run of `pipe`."""
    levels, gammas = pipe.scheduler.sigmas[:-1].tolist(), pipe.scheduler.gammas[:-1].tolist()
    said = f" Tuned schedule: noise levels {', '.join(f'{level:.3g}' for level in levels)}"
    return said + (f"; gamma {', '.join(f'{one:.3g}' for one in gammas)}." if gammas else ".")


def words_of(run: Run, count: int, steps: int, seeds: range) -> str:
    images = "1 image" if count == 1 else f"{count} images"
    named = f"seed {seeds[0]}" if count == 1 else f"seeds {seeds[0]} to {seeds[-1]}"
    return f"{images}, {steps} step{'s' * (steps != 1)}: {run.cost}. {named.capitalize()}."


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
    """Draw images with a consistency trajectory model. The same seed is the same noise at every gamma and number of steps.

    Args:
        model: name of a checkpoint of this page.
        label: class by name or number, "all" for all of them in turn.
        steps: network evaluations for each image, 1 to 40.
        gamma: 0 is deterministic, 1 is multistep sampling of consistency models; counts from two steps on.
        seed: of the first image, which has the number seed; the next has seed + 1 and so on.
        count: images, 1 to 36.
        own_schedule: noise levels and gamma that were tuned for this checkpoint and number of steps, instead of gamma, if it carries them.
    """
    checkpoint, seeds = chosen(model), seeds_from(seed, count)
    steps, gamma = whole("Steps", steps, 1, MOST_STEPS), within("gamma", gamma, 0, 1)
    gamma, missing = gamma_or_own(checkpoint, steps, gamma, own_schedule)
    run = Run(checkpoint)
    pipe = run.model()
    output = run(recipes.sample, pipe, classes(checkpoint, label, len(seeds)), steps, gamma, seeds)
    report = words_of(run, len(seeds), steps, seeds) + (schedule_words(pipe.value) if gamma is None else missing)
    return run.made(grid(output.images), report, output)


def stop(turn: str) -> None:
    """End the run of this page with that turn before its next network evaluation."""
    if not isinstance(turn, str) or not 0 < len(turn) <= MOST_TURN:
        raise refuse("There is no such turn.")
    with STOPPING:
        STOPPED[turn] = None
        if len(STOPPED) > MOST_STOPPED:
            del STOPPED[next(iter(STOPPED))]


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
    checkpoint, steps = chosen(model), whole("Steps", steps, 1, 8)
    seed = seeds_from(seed, 1)[0]
    run = Run(checkpoint)
    pipe = run.model()
    images = run(recipes.trajectory, pipe, one_class(checkpoint, label), steps, list(STRIP_GAMMAS), seed)
    length = steps + 1
    table = [images[i : i + length] for i in range(0, len(images), length)]
    left = [words for gamma in STRIP_GAMMAS for words in (f"gamma {gamma:g}", "its jumps")]
    pipe.value._set_timesteps(steps, "cpu", None, None, 0.0)
    above = [f"{level:.2g}" if level < 10 else f"{level:.0f}" for level in pipe.value.scheduler.sigmas.tolist()]
    report = (
        f"{len(STRIP_GAMMAS)} times {2 * steps} network evaluations, {1000 * run.seconds:.0f} ms in all. Above each column stands its noise level. "
        "At gamma 0 the jumps agree: the trajectory is fixed. At gamma 1 each step forgets, and the jump changes its mind."
    )
    return run.made(captioned(table, left, above), report, images)


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
    checkpoint, seed = chosen(model), seeds_from(seed, 1)[0]
    run = Run(checkpoint)
    label = one_class(checkpoint, label)
    images = run(recipes.steps_and_gamma, run.model(), label, list(GRID_STEPS), list(GRID_GAMMAS), seed)
    table = [images[i : i + len(GRID_STEPS)] for i in range(0, len(images), len(GRID_STEPS))]
    picture = captioned(
        table, [f"gamma {g:g}" for g in GRID_GAMMAS], [f"{n} steps" if n > 1 else "1 step" for n in GRID_STEPS], 88
    )
    report = f"{len(images)} images in {run.nfe} network evaluations, {1000 * run.seconds:.0f} ms in all. Seed {seed}."
    return run.made(picture, report, images)


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
        own_schedule: of the CTM, noise levels and gamma that were tuned for this number of steps, instead of gamma 0, if it carries them.
    """
    checkpoint, seeds = chosen(model), seeds_from(seed, count)
    steps, labels = whole("Steps", steps, 1, MOST_STEPS), classes(checkpoint, label, len(seeds))
    gamma, missing = gamma_or_own(checkpoint, steps, 0.0, own_schedule)
    run = Run(checkpoint)
    pipe = run.model()
    ctm = run(recipes.sample, pipe, labels, steps, gamma, seeds, variable="ctm")
    report = f"Left: the CTM, {run.cost}.{schedule_words(pipe.value) if gamma is None else missing} "
    if checkpoint.teacher is None:
        other, name = run.model("model"), "the CTM's own exact score, as its teacher is not here"
    else:
        other, name = (
            run.model("model", *checkpoint.teacher),
            f"its teacher, {checkpoint.teacher[0].rsplit('/', 1)[-1]}",
        )
    slow = run(recipes.heun, other, labels, HEUN_STEPS, seeds, variable="heun_images")
    report += f"Right: {name}, in {HEUN_STEPS} Heun steps, {run.cost}."
    run.lines.append("output = ctm.images + heun_images.images")
    images = list(ctm.images) + list(slow.images)
    return run.made((grid(ctm.images), grid(slow.images)), report, images)


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
    """Repaint what is drawn over in a picture; the rest stays, pixel for pixel.

    Args:
        model: name of a checkpoint of this page.
        drawing: the picture as "background"; what is not transparent in its "layers" is repainted.
        label: class by name or number.
        steps: 1 to 40.
        gamma: 0 to 1; 1, which renoises most, is usually best here.
        seed: of the first image.
        count: images, 1 to 36.
    """
    checkpoint, seeds = chosen(model), seeds_from(seed, count)
    steps, gamma = whole("Steps", steps, 1, MOST_STEPS), within("gamma", gamma, 0, 1)
    if not drawing or drawing.get("background") is None:
        raise refuse("Put in a picture first, or take an example.")
    mask = mask_of(drawing, checkpoint.size)
    if mask.getextrema()[1] == 0:
        raise refuse("Draw over the part that is to be repainted.")
    picture = fitted(drawing["background"], checkpoint.pipe)
    run = Run(checkpoint)
    files = given("image.png", picture), given("mask.png", mask)
    label = one_class(checkpoint, label)
    output = run(recipes.inpaint, run.model(), *files, label, steps, gamma, seeds)
    hidden = picture.convert("RGB")
    hidden.paste((200, 60, 160), mask=mask)
    report = f"First what was given, then {words_of(run, len(seeds), steps, seeds)}"
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
    """Make images of strokes: noise is added to the drawing, and the model takes it away again.

    Args:
        model: name of a checkpoint of this page.
        drawing: "background", "layers" or both, which are put upon each other.
        label: class by name or number.
        strength: how much noise, 0.05 to 1; at 1 nothing of the drawing is left.
        steps: 1 to 40.
        gamma: 0 to 1.
        seed: of the first image.
        count: images, 1 to 36.
    """
    checkpoint, seeds = chosen(model), seeds_from(seed, count)
    steps, gamma = whole("Steps", steps, 1, MOST_STEPS), within("gamma", gamma, 0, 1)
    strength = within("Strength", strength, 0.05, 1)
    flat = flat_drawing(drawing) if drawing else None
    if flat is None:
        raise refuse("Draw something first, or take an example.")
    picture = fitted(flat, checkpoint.pipe)
    run = Run(checkpoint)
    label, file = one_class(checkpoint, label), given("image.png", picture)
    output = run(recipes.edit, run.model(), file, strength, label, steps, gamma, seeds)
    report = f"First what was given, then {words_of(run, len(seeds), steps, seeds)}"
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
    checkpoint, steps = chosen(model), whole("Steps", steps, 1, MOST_STEPS)
    count = whole("The number of images", count, 2, MOST_IMAGES)
    first, second = (whole("The seed", seed, 0, MOST_SEED) for seed in (first, second))
    run = Run(checkpoint)
    shape = (1, checkpoint.channels, *reversed(checkpoint.size))
    label = one_class(checkpoint, label)
    output = run(recipes.between_seeds, run.model(), label, steps, shape, first, second, count)
    report = f"From seed {first} to seed {second}: {run.cost}."
    return run.made(grid(output.images), report, output)


def interpolate_images(
    model: str,
    image: Image.Image | None,
    other_image: Image.Image | None,
    label: str = "0",
    other_label: str = "0",
    count: float = 9,
    progress=gr.Progress(track_tqdm=True),  # noqa: B008
) -> Made:
    """Images between two pictures: both are led back to their noise by the exact score, mixed, and led forward again.

    Args:
        model: name of a checkpoint of this page.
        image: the first picture.
        other_image: the last picture.
        label: class of the first, by name or number.
        other_label: class of the last.
        count: images, 2 to 36.
    """
    checkpoint = chosen(model)
    count = whole("The number of images", count, 2, MOST_IMAGES)
    if image is None or other_image is None:
        raise refuse("Put in two pictures first, or take the example.")
    pair = [
        given(name, fitted(one, checkpoint.pipe)) for name, one in (("image.png", image), ("other.png", other_image))
    ]
    labels = [one_class(checkpoint, one) for one in (label, other_label)] if checkpoint.classes else None
    run = Run(checkpoint)
    output = run(recipes.between_images, run.model(), *pair, labels, HEUN_STEPS, count)
    report = f"The two pictures, and {count} images from the one to the other: {run.nfe} network evaluations, {1000 * run.seconds:.0f} ms."
    return run.made(grid([pair[0].value, *output.images, pair[1].value]), report, output)


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
    """Lead samples to a class that the network is not told: by a classifier's gradient, or classifier-free where it was trained so.

    Args:
        model: name of a checkpoint of this page.
        label: the class that is wanted, by name or number.
        scale: of the guidance, 0 (none) to 20.
        steps: 1 to 40.
        gamma: 0 to 1.
        seed: of the first image.
        count: images, 1 to 16.
    """
    checkpoint, seeds = chosen(model), seeds_from(seed, count)
    count = whole("The number of images", count, 1, 16)
    steps, gamma = whole("Steps", steps, 1, MOST_STEPS), within("gamma", gamma, 0, 1)
    scale = within("Scale", scale, 0, 20)
    run = Run(checkpoint)
    if checkpoint.classifier is not None:
        folder, known = checkpoint.classifier
        target, folder = one_class(checkpoint, label, known), Shown(ROOT / folder, repr(folder))
        recipe, target_or_label = recipes.guide_by_classifier, (folder, target)
        how = "the gradient of a classifier"
    elif checkpoint.classifier_free:
        recipe, target_or_label = recipes.guide_classifier_free, (one_class(checkpoint, label),)
        how = "classifier-free guidance"
    else:
        raise refuse(
            "This checkpoint cannot be guided here: there is no classifier for its images, and it was not trained with label dropout."
        )
    pipe = run.model()
    without = run(recipe, pipe, *target_or_label, 0.0, steps, gamma, seeds, variable="without")
    output = run(recipe, pipe, *target_or_label, scale, steps, gamma, seeds)
    found = f"Above without, below with {how}. {words_of(run, count, steps, seeds)}"
    return run.made(rows([without.images, output.images], max(24, 720 // count)), found, output)


def likelihood(
    model: str,
    image: Image.Image | None,
    label: str = "0",
    seed: float = 0,
    progress=gr.Progress(track_tqdm=True),  # noqa: B008
) -> Made:
    """Bits per dimension of a picture under the model's exact score, among those of images that belong there. Less is likelier.

    Args:
        model: name of a checkpoint of this page.
        image: the picture.
        label: its class by name or number.
        seed: of the estimate's noise.
    """
    checkpoint, seed = chosen(model), seeds_from(seed, 1)[0]
    if image is None:
        raise refuse("Put in a picture first, or take an example.")
    picture, label = fitted(image, checkpoint.pipe), one_class(checkpoint, label)
    run = Run(checkpoint)
    found = run(recipes.likelihood, run.model(), given("image.png", picture), label, seed)
    bits, nfe, seconds = found.bits_per_dim.item(), found.nfe, run.seconds
    what, others = among(checkpoint, progress)
    beaten = sum(other > bits for other in others)
    report = (
        f"**{bits:.2f} bits per dimension**, likelier than {beaten} of {len(others)} {what}, which have {min(others):.2f} to {max(others):.2f}. "
        f"{nfe} network evaluations with as many backward passes, {seconds:.1f} s."
    )
    return Made(
        histogram(others, bits, enlarged(picture, 96)), report, run.code("print(output.bits_per_dim)"), None, run.inputs
    )


def among(checkpoint: Checkpoint, progress: Callable) -> tuple[str, list[float]]:
    """What images to compare with, and the bits per dimension of each: those the checkpoint carries, else its examples, computed once."""
    if checkpoint.likelihood is None:
        what, images, labels = checkpoint.examples
        bits, until = [], time.monotonic() + LONGEST_COMPARISON
        for i in range(0, len(images), 8):
            if i and time.monotonic() > until:  # a large network
                break
            progress(i / len(images), desc=f"Comparing with {len(images)} {what}, once")
            part = slice(i, i + 8)
            found = recipes.likelihood(checkpoint.fresh(), images[part], labels and labels[part], 0)
            bits += found.bits_per_dim.tolist()
        checkpoint.likelihood = what, bits
    return checkpoint.likelihood


def histogram(values: list[float], mark: float, image: Image.Image) -> Image.Image:
    """How many of `values` lie where, with a line at `mark`, upon which `image` stands."""
    low, high = min(*values, mark), max(*values, mark)
    width, height, bins, base = 640, 264, 32, 225
    picture = Image.new("RGBA", (width, height), (0, 0, 0, 0))
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(24)
    span = max(high - low, 1e-6)
    place = [min(bins - 1, int((value - low) / span * bins)) for value in values]
    counts = [place.count(k) for k in range(bins)]
    unit = width / bins
    for k, count in enumerate(counts):
        if count:
            top = base - 100 * count / max(counts)
            draw.rectangle([k * unit + 1, top, (k + 1) * unit - 1, base], fill=(118, 118, 118, 255))
    x = min(width - 2, int((mark - low) / span * (width - 1)))
    draw.line([x, 100, x, base], fill=(200, 60, 160, 255), width=3)
    picture.paste(image.convert("RGB"), (max(0, min(width - image.width, x - image.width // 2)), 0))
    for value, anchor, at in ((low, "lm", 0), (high, "rm", width)):
        draw.text((at, base + 21), f"{value:.2f}", TEXT_COLOR, font, anchor=anchor)
    draw.text((width / 2, base + 21), "bits per dimension", TEXT_COLOR, font, anchor="mm")
    return picture


# Files ----------------------------------------------------------------------------------------------------------------


def zipped(made: Made, name: str) -> str:
    """A .zip of the images with their provenance, the Python that makes them, and the pictures that it reads."""
    folder = Path(
        tempfile.mkdtemp(prefix="files-", dir=os.environ.get("GRADIO_TEMP_DIR"))
    )  # whose old files gradio deletes
    with tempfile.TemporaryDirectory() as draft:
        paths = []
        if made.images is not None:
            paths = save_images(made.images, Path(draft) / "samples" / "{index:03d}.png")
        for file, image in made.inputs.items():
            image.save(Path(draft) / file)
            paths.append(Path(draft) / file)
        (Path(draft) / "reproduce.py").write_text(made.code)
        paths.append(Path(draft) / "reproduce.py")
        target = folder / f"{name}.zip"
        with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
            for path in paths:
                archive.write(path, path.relative_to(draft))
    return str(target)


# Examples -------------------------------------------------------------------------------------------------------------


def own_sample(checkpoint: Checkpoint, label: int, seed: int = 3) -> Image.Image:
    """A sample in eight steps, enlarged for a drawing area."""
    labels = [label % len(checkpoint.classes)] if checkpoint.classes else None
    return enlarged(recipes.sample(checkpoint.fresh(), labels, 8, 0.0, [seed]).images[0], CANVAS)


def canvas(image: Image.Image) -> Image.Image:
    return image.convert("RGBA").resize((CANVAS, CANVAS), Image.Resampling.NEAREST)


def inpaint_example(model: str, which: str) -> tuple[dict, str]:
    """A sample of the checkpoint with a part drawn over, for the tab Inpaint.

    Args:
        model: name of a checkpoint of this page.
        which: "lower half", "middle" or "every other row".
    """
    checkpoint = chosen(model)
    k = {"lower half": 3, "middle": 8, "every other row": 5}.get(which)
    if k is None:
        raise refuse("The examples are: lower half, middle, every other row.")
    layer = Image.new("RGBA", (CANVAS, CANVAS), (0, 0, 0, 0))
    draw, pen, height = ImageDraw.Draw(layer), (200, 60, 160, 255), checkpoint.size[1]
    if which == "lower half":
        draw.rectangle([0, CANVAS // 2, CANVAS, CANVAS], pen)
    elif which == "middle":
        draw.rectangle([CANVAS // 4, CANVAS // 4, 3 * CANVAS // 4 - 1, 3 * CANVAS // 4 - 1], pen)
    else:
        for row in range(1, height, 2):
            draw.rectangle([0, row * CANVAS // height, CANVAS, (row + 1) * CANVAS // height - 1], pen)
    image = canvas(own_sample(checkpoint, k))
    return {"background": image, "layers": [layer], "composite": Image.alpha_composite(image, layer)}, label_at(
        checkpoint, k
    )


def edit_example(model: str, which: str) -> tuple[dict, str]:
    """A drawing for the tab Strokes.

    Args:
        model: name of a checkpoint of this page.
        which: "ring", "bar" or "blocks".
    """
    checkpoint = chosen(model)
    if which not in ("ring", "bar", "blocks"):
        raise refuse("The examples are: ring, bar, blocks.")
    grey = checkpoint.channels == 1
    image = Image.new("RGBA", (CANVAS, CANVAS), background(checkpoint.channels))
    draw, pen = ImageDraw.Draw(image), "white" if grey else "#f5c33b"
    k = {"ring": 0, "bar": 1, "blocks": 3}[which]
    if which == "ring":
        draw.ellipse([64, 16, 192, 240], None if grey else pen, pen if grey else "#7a4b00", 36 if grey else 8)
    elif which == "bar":
        draw.line([150, 16, 110, 240], pen, 44)
    else:
        width, height = checkpoint.size
        small = own_sample(checkpoint, k).resize((max(2, width // 2), max(2, height // 2)), Image.Resampling.BOX)
        image = canvas(small)
    return {"background": image, "layers": [], "composite": image}, label_at(checkpoint, k)


def interpolate_example(model: str) -> tuple[Image.Image, Image.Image, str, str]:
    """Two samples of the checkpoint for the tab Interpolate, and the classes of both.

    Args:
        model: name of a checkpoint of this page.
    """
    checkpoint = chosen(model)
    return *(own_sample(checkpoint, k) for k in (3, 8)), *(label_at(checkpoint, k) for k in (3, 8))


def likelihood_example(model: str, which: str) -> tuple[Image.Image, str]:
    """A picture for the tab Likelihood.

    Args:
        model: name of a checkpoint of this page.
        which: "image", "upside down" or "noise".
    """
    checkpoint = chosen(model)
    _, images, labels = checkpoint.examples
    image, label = images[4], (label_at(checkpoint, labels[4]) if labels else EVERY_CLASS)
    if which == "upside down":
        image = image.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    elif which == "noise":
        pixels = torch.randint(
            256, (*image.size[::-1], 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
        )
        image = Image.fromarray(pixels.numpy()).convert(image.mode)
    elif which != "image":
        raise refuse("The examples are: image, upside down, noise.")
    return enlarged(image, CANVAS), label


def label_at(checkpoint: Checkpoint, k: int) -> str:
    names = checkpoint.classes
    return names[k % len(names)] if names else EVERY_CLASS
