# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Pictures that the example buttons fill in."""

import torch
from PIL import Image, ImageDraw, ImageOps

from training.report.pictures import enlarged

from . import recipes
from .checkpoints import EVERY_CLASS, Checkpoint
from .requests import chosen, example
from .uploads import CANVAS, background


def own_sample(checkpoint: Checkpoint, label: int, seed: int = 3) -> Image.Image:
    """A sample in eight steps, enlarged for a drawing area."""
    known = checkpoint.pipe.classes
    labels = known and [known[label % len(known)]]
    return enlarged(recipes.sample(checkpoint.fresh(), labels, 8, 0.0, [seed]).images[0], CANVAS)


def canvas(image: Image.Image) -> Image.Image:
    """`image` in the middle of a drawing area, as wide or as high."""
    return ImageOps.pad(image.convert("RGBA"), (CANVAS, CANVAS), Image.Resampling.NEAREST)


def inpaint_example(model: str, which: str) -> tuple[dict, str]:
    """A sample of the checkpoint with a part drawn over, for the tab Inpaint.

    Args:
        model: name of a checkpoint of this page.
        which: "lower half", "middle" or "every other row".
    """
    checkpoint = chosen(model)
    height, low, high = checkpoint.size[1], CANVAS // 4, 3 * CANVAS // 4 - 1
    side = CANVAS / max(checkpoint.size)  # of a pixel
    edges = [round(CANVAS / 2 + (row - height / 2) * side) for row in range(height + 1)]
    rows = [(0, edges[row], CANVAS, edges[row + 1] - 1) for row in range(1, height, 2)]
    parts = {"lower half": [(0, CANVAS // 2, CANVAS, CANVAS)], "middle": [(low, low, high, high)]}
    boxes = example({**parts, "every other row": rows}, which)
    layer = Image.new("RGBA", (CANVAS, CANVAS))
    for box in boxes:
        ImageDraw.Draw(layer).rectangle(box, (200, 60, 160, 255))
    k = {"lower half": 3, "middle": 8, "every other row": 5}[which]
    image = canvas(own_sample(checkpoint, k))
    drawing = {"background": image, "layers": [layer], "composite": Image.alpha_composite(image, layer)}
    return drawing, label_at(checkpoint, k)


def edit_example(model: str, which: str) -> tuple[dict, str]:
    """A drawing for the tab Strokes.

    Args:
        model: name of a checkpoint of this page.
        which: "ring", "bar" or "blocks".
    """
    checkpoint = chosen(model)
    k = example({"ring": 0, "bar": 1, "blocks": 3}, which)
    gray = checkpoint.channels == 1
    image = Image.new("RGBA", (CANVAS, CANVAS), background(checkpoint.channels))
    draw, pen = ImageDraw.Draw(image), "white" if gray else "#f5c33b"
    if which == "ring":
        draw.ellipse([64, 16, 192, 240], None if gray else pen, pen if gray else "#7a4b00", 36 if gray else 8)
    elif which == "bar":
        draw.line([150, 16, 110, 240], pen, 44)
    else:
        halves = [max(2, side // 2) for side in checkpoint.size]
        image = canvas(own_sample(checkpoint, k).resize(halves, Image.Resampling.BOX))
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
    image, generator = images[4], torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (*image.size[::-1], 3), generator=generator, dtype=torch.uint8)
    pictures = {
        "image": image,
        "upside down": image.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        "noise": Image.fromarray(pixels.numpy()).convert(image.mode),
    }
    return enlarged(example(pictures, which), CANVAS), checkpoint.classes[labels[4]] if labels else EVERY_CLASS


def label_at(checkpoint: Checkpoint, k: int) -> str:
    names = checkpoint.offered
    return names[k % len(names)] if names else EVERY_CLASS
