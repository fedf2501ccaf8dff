# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Arguments of visitors, checked."""

from collections.abc import Sequence
from typing import Any

import gradio as gr

from diffusers_ctm.class_labels import finder

from .checkpoints import CHECKPOINTS, EVERY_CLASS, Checkpoint


MOST_IMAGES, MOST_STEPS, MOST_SEED = 36, 40, 2**31 - 1


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
    """Number of the class `label`, a name or number as text; for an unconditional checkpoint among `otherwise`."""
    names = checkpoint.classes or otherwise
    offered = checkpoint.offered or otherwise
    text = "" if label is None else str(label).strip()
    if not names:
        return None
    found = finder(dict(enumerate(names)))(text)
    if not found and text.isdecimal() and len(text) < 10:
        found = [int(text)]
    if len(found) == 1 and found[0] < len(names) and names[found[0]] in offered:
        return found[0]
    few = ", ".join(offered[:20]) + (", ..." if len(offered) > 20 else "")
    raise refuse(f"Choose a class: {few}.")


def classes(checkpoint: Checkpoint, label: Any, count: int) -> list[int] | None:
    """`count` class numbers: of one class, or for "all" spread over all classes."""
    known = checkpoint.pipe.classes
    if not known:
        return None
    if label is None or str(label) == EVERY_CLASS:
        return [known[k * len(known) // count if count < len(known) else k % len(known)] for k in range(count)]
    return [one_class(checkpoint, label)] * count


def one_seed(seed: Any) -> int:
    return whole("The seed", seed, 0, MOST_SEED)


def seeds_from(seed: Any, count: Any, most: int = MOST_IMAGES) -> range:
    count, first = whole("The number of images", count, 1, most), one_seed(seed)
    return range(first, first + count)


def example(examples: dict[str, Any], which: Any) -> Any:
    if which not in examples:
        raise refuse(f"The examples are: {', '.join(examples)}.")
    return examples[which]


def gamma_or_own(checkpoint: Checkpoint, steps: int, gamma: float, own_schedule: Any) -> tuple[float | None, str]:
    """gamma for recipes, None for the tuned schedule; and words if the checkpoint has no schedule for `steps`."""
    if not isinstance(own_schedule, bool):
        raise refuse("own_schedule must be true or false.")
    if not own_schedule or steps in checkpoint.presets:
        return None if own_schedule else gamma, ""
    return gamma, f" The checkpoint carries no schedule for {steps} step{'s' * (steps != 1)}: this is gamma {gamma:g}."
