# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Small images enlarged, in grids, with captions, and pictures as PNG files."""

import io

import torch
from diffusers.utils import make_image_grid
from PIL import Image, ImageDraw, ImageFont, ImageOps


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
    factor = max(1, -(-smallest_side // images[0].height))
    size = (images[0].width * factor, images[0].height * factor)
    return make_image_grid(
        [image.resize(size, Image.Resampling.NEAREST).convert("RGB") for image in images], rows, columns
    )


def png(picture) -> bytes:
    """The PNG file of a PIL image or of a matplotlib figure."""
    file = io.BytesIO()
    save = picture.save if isinstance(picture, Image.Image) else picture.savefig
    save(file, format="png")
    return file.getvalue()
