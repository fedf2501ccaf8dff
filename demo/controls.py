# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Controls for visitors, and places for results. Some follow the checkpoint, some are restored by a link."""

from collections.abc import Callable

import gradio as gr

from .checkpoints import CHECKPOINTS, EVERY_CLASS
from .requests import MOST_IMAGES, MOST_SEED, MOST_STEPS
from .uploads import CANVAS, Drawing, Picture


def class_choices(model: str, every: bool) -> dict:
    names = CHECKPOINTS[model].offered
    value = EVERY_CLASS if every or not names else names[min(3, len(names) - 1)]
    return {"choices": [EVERY_CLASS] * every + names, "value": value, "visible": bool(names)}


class ClassChoice(gr.Dropdown):
    """gr.Dropdown that the API does not bind to the classes of the first checkpoint; actions check the class."""

    is_template = True

    def api_info(self) -> dict:
        return {"type": "string"}


def following(kind: type, properties: Callable[[str], dict], **options):
    """A component with `options` and with the `properties` of a checkpoint, which change when another is chosen."""
    field = kind(**properties(next(iter(CHECKPOINTS))), **options)
    field.properties_for = properties
    return field


def class_choice(label: str = "Class", every: bool = False) -> gr.Dropdown:
    """The class to draw."""
    return following(ClassChoice, lambda model: class_choices(model, every), label=label, allow_custom_value=True)


def own_schedule(instead_of: str) -> gr.Checkbox:
    """Checkbox for the schedule that `training.tune` saved; visible where the checkpoint carries one."""

    def properties(model: str) -> dict:
        steps = [str(number) for number in CHECKPOINTS[model].presets]
        numbers = " and ".join(filter(None, [", ".join(steps[:-1]), *steps[-1:]]))
        info = f"Noise levels and gamma that the checkpoint carries for {numbers} steps, instead of {instead_of}."
        return {"value": False, "visible": bool(steps), "info": info}

    return following(gr.Checkbox, properties, label="Tuned schedule")


def steps(value: int, most: int = MOST_STEPS) -> gr.Slider:
    return gr.Slider(1, most, value, step=1, label="Steps", info="Network evaluations for each image.")


def gamma(value: float) -> gr.Slider:
    info = "0: the path is fixed. 1: each step forgets where it was. Counts from two steps on."
    return gr.Slider(0, 1, value, step=0.05, label="gamma", info=info)


def seed(label: str = "Seed", value: int = 0) -> gr.Number:
    return gr.Number(
        value, label=label, precision=0, minimum=0, maximum=MOST_SEED, info="The number that the noise is made from."
    )


def count(value: int, most: int = MOST_IMAGES, least: int = 1) -> gr.Slider:
    return gr.Slider(least, most, value, step=1, label="Images")


def seed_buttons(field: gr.Number) -> None:
    """Another seed, and back to the one before."""
    with gr.Row():
        for label, script in (("New seed", "ctmNewSeed"), ("Seed before", "ctmLastSeed")):
            button = gr.Button(label, size="sm", min_width=80)
            button.click(None, field, field, js=f"(seed) => window.{script}(seed)").then(
                None, js="() => window.ctmRun()"
            )


def drawing(label: str, colors: list[str], size: int) -> Drawing:
    return Drawing(
        label=label,
        show_label=False,
        type="pil",
        format="png",
        image_mode="RGBA",
        sources=("upload", "clipboard"),
        canvas_size=(CANVAS, CANVAS),
        fixed_canvas=True,
        height=420,
        layers=False,
        transforms=(),
        brush=gr.Brush(default_size=size, colors=colors, color_mode="fixed"),
        buttons=[],
        elem_classes="pixels",
    )


def picture(label: str) -> Picture:
    return Picture(
        label=label, format="png", sources=["upload", "clipboard"], height=240, elem_classes="pixels", buttons=[]
    )


def result(*classes: str) -> gr.Image:
    return gr.Image(
        label="Images",
        show_label=False,
        format="png",
        interactive=False,
        buttons=["download", "fullscreen"],
        elem_classes=["pixels", *classes],
    )


def restored(field: gr.components.Component, text: str, model: str):
    """`text` of a link as an update of `field`; None if it cannot be its value."""
    if hasattr(field, "properties_for"):
        properties = field.properties_for(model)
        values = {"false": False, "true": True} if properties["visible"] else {"false": False}
        if isinstance(field, gr.Dropdown):
            values = {one: one for one in properties["choices"]}
        return gr.update(**{**properties, "value": values[text]}) if text in values else None
    try:
        value = float(text)
    except ValueError:
        return None
    if not field.minimum <= value <= field.maximum:
        return None
    return value if field.step and field.step < 1 else int(value)
