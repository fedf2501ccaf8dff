# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Runs recipes and writes down the Python that does the same."""

import inspect
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

import diffusers_ctm
from diffusers_ctm import CTMPipeline
from training.frozen.classifier import load_saved

from .checkpoints import Checkpoint


@dataclass
class Made:
    """Result of an action: a picture, words below it, the Python that makes the same, and the images one by one."""

    picture: Any
    report: str
    code: str
    images: Any  # for `save_images`
    inputs: dict[str, Image.Image]  # pictures that the Python reads, by file name


class Shown:
    """An argument of a recipe: its value, and the text that stands for it in the shown Python."""

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
        self.pipe = self.model("pipe", checkpoint.source, checkpoint.pipe)

    def model(self, variable: str, source: str, pipe: CTMPipeline) -> Shown:
        """A copy of `pipe` for this request alone, which the shown Python loads from `source` into `variable`."""
        self.sources[variable] = source
        return Shown(self.checkpoint.fresh(pipe), variable)

    def __call__(self, recipe: Callable, *arguments: Any, variable: str = "output") -> Any:
        self.functions[recipe.__name__] = recipe
        self.lines.append(f"{variable} = {recipe.__name__}({', '.join(map(repr, arguments))})")
        shown = [one for one in arguments if isinstance(one, Shown)]
        self.inputs |= {one.file: one.value for one in shown if one.file is not None}
        values = [one.value if isinstance(one, Shown) else one for one in arguments]
        calls = self.checkpoint.calls
        calls.count, start = 0, time.perf_counter()
        result = recipe(*values)
        self.nfe, self.seconds = calls.count, time.perf_counter() - start
        return result

    @property
    def cost(self) -> str:
        """Cost of the last recipe, in words."""
        return f"{self.nfe} network evaluation{'s' * (self.nfe != 1)} each, {1000 * self.seconds:.0f} ms in all"

    def code(self, last: str = 'save_images(output, "samples/{index:03d}.png", overwrite=True)') -> str:
        body = "\n\n\n".join(inspect.getsource(function).strip() for function in self.functions.values())
        device = self.checkpoint.pipe.device.type
        to = "" if device == "cpu" else f'.to("{device}")'
        loads = [f'{name} = DiffusionPipeline.from_pretrained("{place}"){to}' for name, place in self.sources.items()]
        end = "\n".join([*loads, *self.lines, last])
        words = set(re.findall(r"\w+", body + end))
        ours = ", ".join(sorted(words & set(diffusers_ctm.__all__), key=lambda word: (word.islower(), word)))
        imports = ["import torch", "from diffusers import DiffusionPipeline"]
        imports += ["from PIL import Image"] if "Image.open(" in end else []
        imports += ["", f"from diffusers_ctm import {ours}" if ours else "import diffusers_ctm"]
        if load_saved.__name__ in words:
            imports.append(f"from {load_saved.__module__} import {load_saved.__name__}")
        threads = f"torch.set_num_threads({torch.get_num_threads()})  # as the page does"
        return "\n".join([*imports, "", "", body, "", "", threads, end]) + "\n"

    def made(self, picture: Any, report: str, images: Any) -> Made:
        flags = getattr(images, "nsfw_content_detected", None) or []
        if any(flags):
            report += f" The safety checker flagged {sum(flags)} of {len(flags)} images, which are black."
        return Made(picture, report, self.code(), images, self.inputs)
