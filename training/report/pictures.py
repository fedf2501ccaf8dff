# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Small images enlarged, in grids, with captions, and pictures as PNG files."""

import io
import math
from collections.abc import Sequence

import torch
from diffusers.utils import make_image_grid
from PIL import Image, ImageDraw, ImageFont, ImageOps


GAP = 4  # pixels between the images of a table

HEADER = 28  # pixels above a table for its words

GRAY = (128, 128, 128)  # of gaps and words; it shows on light and dark pages


def captioned(rows: list[list[tuple[str, Image.Image]]], gap: int = 12, text_height: int = 18) -> Image.Image:
    """Pictures in rows, each under its caption, on white."""
    width, height = rows[0][0][1].size
    columns = max(len(row) for row in rows)
    canvas = Image.new("RGB", (gap + columns * (width + gap), gap + len(rows) * (height + text_height + gap)), "white")
    brush = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(13)
    for i, row in enumerate(rows):
        for j, (caption, picture) in enumerate(row):
            left, top = gap + j * (width + gap), gap + i * (height + text_height + gap)
            brush.text((left, top), caption, fill="black", font=font)
            canvas.paste(picture, (left, top + text_height))
    return canvas


def tiles(images: torch.Tensor, columns: int) -> Image.Image:
    """Images, uint8 or in [0, 1], shape (B, 1 or 3, H, W), in rows of `columns`, each with a white rim."""
    if images.is_floating_point():
        images = (images.clamp(0, 1) * 255).round().to(torch.uint8)
    framed = []
    for pixels in images.permute(0, 2, 3, 1).cpu().numpy():
        image = Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)
        framed.append(ImageOps.expand(image, 1, "white"))
    return enlarged_grid(framed, len(framed) // columns, columns)


def enlarged_grid(images: list[Image.Image], rows: int, columns: int, smallest_side: int = 48) -> Image.Image:
    """Images in rows, small ones enlarged without smoothing."""
    factor = -(-smallest_side // images[0].height)
    return make_image_grid([magnified(image, factor).convert("RGB") for image in images], rows, columns)


def magnified(image: Image.Image, factor: int) -> Image.Image:
    """`image` with each pixel as a square of `factor` pixels, at least one."""
    factor = max(1, factor)
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def enlarged(image: Image.Image, side: int) -> Image.Image:
    """`image` with each pixel as a square, as large as fits `side` pixels, at least as it is."""
    return magnified(image, side // max(image.size))


def grid(images: Sequence[Image.Image]) -> Image.Image:
    """All images in an almost square grid about 480 pixels wide."""
    columns = math.isqrt(len(images) - 1) + 1
    columns = next((n for n in range(columns, 2 * columns) if len(images) % n == 0), columns)
    return table(images, columns, 480 // columns)


def table(images: Sequence[Image.Image], columns: int, cell: int) -> Image.Image:
    """Images in rows of `columns`, each about `cell` pixels wide."""
    images = [enlarged(image, cell).convert("RGB") for image in images]
    width, height = columns * (images[0].width + GAP), math.ceil(len(images) / columns) * (images[0].height + GAP)
    picture = Image.new("RGB", (width - GAP, height - GAP), GRAY)
    _paste(picture, images, columns)
    return picture


def labeled_table(images: Sequence[Image.Image], left: Sequence[str], above: Sequence[str], cell: int) -> Image.Image:
    """A table with a word before each row and one above each column; its background is transparent."""
    images = [enlarged(image, cell).convert("RGB") for image in images]
    width, height = images[0].width + GAP, images[0].height + GAP
    font = ImageFont.load_default(20)
    margin = int(max(map(font.getlength, left))) + 8
    picture = Image.new("RGBA", (margin + len(above) * width, HEADER + len(left) * height))
    brush = ImageDraw.Draw(picture)
    for j, word in enumerate(above):
        brush.text((margin + j * width + images[0].width / 2, HEADER / 2), word, GRAY, font, anchor="mm")
    for i, word in enumerate(left):
        brush.text((margin - 8, HEADER + i * height + images[0].height / 2), word, GRAY, font, anchor="rm")
    _paste(picture, images, len(above), margin, HEADER)
    return picture


def _paste(picture: Image.Image, images: Sequence[Image.Image], columns: int, left: int = 0, top: int = 0) -> None:
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        picture.paste(image, (left + column * (image.width + GAP), top + row * (image.height + GAP)))


def png(picture) -> bytes:
    """The PNG file of a PIL image or of a matplotlib figure. A figure has 256 colors, at a third of the size."""
    file = io.BytesIO()
    if not isinstance(picture, Image.Image):
        picture.savefig(file, format="png")
        drawn = Image.open(file)
        picture, file = drawn.convert("RGB").quantize(dither=Image.Dither.NONE), io.BytesIO()
    picture.save(file, format="PNG")
    return file.getvalue()
