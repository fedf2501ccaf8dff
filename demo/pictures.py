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


def histogram(values: list[float], mark: float, image: Image.Image) -> Image.Image:
    """Histogram of `values` with a line at `mark`, below `image`."""
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
