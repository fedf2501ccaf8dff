# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Small images enlarged without smoothing, alone or in rows with captions."""

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont


GAP_COLOR = (128, 128, 128)  # shows on light and dark pages, as the letters do
HEADER = 28  # pixels above a table for its words
TEXT_COLOR = (128, 128, 128)


def enlarged(image: Image.Image, side: int) -> Image.Image:
    """`image` with each pixel as a square, as large as fits `side` pixels, at least as it is."""
    factor = max(1, side // max(image.size))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def grid(images: Sequence[Image.Image], side: int = 480, gap: int = 4) -> Image.Image:
    """All images in an almost square grid about `side` pixels wide."""
    columns = next(n for n in range(1, len(images) + 1) if n * n >= len(images))
    columns = next((n for n in range(columns, 2 * columns) if len(images) % n == 0), columns)
    return rows([images[i : i + columns] for i in range(0, len(images), columns)], side // columns, gap)


def rows(table: Sequence[Sequence[Image.Image]], cell: int, gap: int = 4) -> Image.Image:
    """The images of a table, each about `cell` pixels wide."""
    width, height = enlarged(table[0][0], cell).size
    columns = max(map(len, table))
    size = (columns * (width + gap) - gap, len(table) * (height + gap) - gap)
    picture = Image.new("RGB", size, GAP_COLOR)
    for i, row in enumerate(table):
        for j, image in enumerate(row):
            picture.paste(enlarged(image, cell).convert("RGB"), (j * (width + gap), i * (height + gap)))
    return picture


def captioned(
    table: Sequence[Sequence[Image.Image]], left: Sequence[str], above: Sequence[str], cell: int = 72, gap: int = 4
) -> Image.Image:
    """The images of a table with a word before each row and one above each column; its background is transparent."""
    font = ImageFont.load_default(20)
    measure = ImageDraw.Draw(Image.new("L", (1, 1)))
    width, height = enlarged(table[0][0], cell).size
    margin = int(max(measure.textlength(word, font) for word in left)) + 8
    picture = Image.new(
        "RGBA", (margin + len(above) * (width + gap), HEADER + len(table) * (height + gap)), (0, 0, 0, 0)
    )
    draw = ImageDraw.Draw(picture)
    for j, word in enumerate(above):
        draw.text((margin + j * (width + gap) + width / 2, HEADER / 2), word, TEXT_COLOR, font, anchor="mm")
    for i, (word, row) in enumerate(zip(left, table, strict=True)):
        top = HEADER + i * (height + gap)
        draw.text((margin - 8, top + height / 2), word, TEXT_COLOR, font, anchor="rm")
        for j, image in enumerate(row):
            picture.paste(enlarged(image, cell).convert("RGB"), (margin + j * (width + gap), top))
    return picture
