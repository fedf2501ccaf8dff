# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Pictures from visitors: opened with limits on size and kind, made ready for the network, and never trusted."""

import io
import threading

import gradio as gr
from gradio.components.base import server
from gradio.components.image_editor import AcceptBlobs
from PIL import Image, ImageOps

from .requests import refuse


MOST_BYTES = 8 * 2**20  # of a file
MOST_SIDE = 4096  # pixels
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
CANVAS = 256  # pixels of the drawing area, which is square
MOST_LAYERS = 8  # of a drawing
MOST_DRAWINGS = 32  # kept in memory between their upload and their use

TOO_MANY_LAYERS = f"A drawing has {MOST_LAYERS} layers at most."


def open_upload(source, name: str = "The picture") -> Image.Image:
    """The picture in the file (a path or binary stream) `source` as "RGBA", of an animation the first frame.

    Raises:
        gr.Error: not a picture, another format, too large.
    """
    try:
        image = Image.open(source, formats=FORMATS)
        if max(image.size) > MOST_SIDE:
            raise refuse(f"{name} is {image.width}x{image.height} pixels; the limit is {MOST_SIDE} on a side.")
        if image.mode.startswith(("I", "F")):
            raise refuse(f"{name} has more than 8 bits per value. Save it as an ordinary 8-bit picture first.")
        if getattr(image, "is_animated", False):
            gr.Info(f"{name} is animated; its first frame is used.")
        return ImageOps.exif_transpose(image).convert("RGBA")
    except gr.Error:
        raise
    except Exception as error:  # decoders raise many kinds for a broken file, and for one of far too many pixels
        raise refuse(
            f"{name} cannot be read. PNG, JPEG, WebP, GIF and BMP pictures up to {MOST_SIDE} pixels on a side work."
        ) from error


def fitted(image: Image.Image, pipe) -> Image.Image:
    """An "RGBA" picture, center-cropped and resized for the network. Transparency becomes the background."""
    height, width = pipe.image_size
    channels = pipe.image_channels
    flat = Image.alpha_composite(Image.new("RGBA", image.size, background(channels)), image)
    return ImageOps.fit(flat.convert("L" if channels == 1 else "RGB"), (width, height), Image.Resampling.BOX)


def background(channels: int) -> str:
    """Color behind transparency: gray data sets are white on black, color ones on white."""
    return "black" if channels == 1 else "white"


def mask_of(drawing: dict, size: tuple[int, int]) -> Image.Image:
    """White ("L", of `size`) where a third or more of a pixel is drawn over in any layer."""
    drawn = Image.new("L", (CANVAS, CANVAS))
    for layer in drawing["layers"]:
        alpha = ImageOps.fit(layer.getchannel("A"), drawn.size, Image.Resampling.NEAREST)
        drawn.paste(255, mask=alpha.point(lambda value: 255 * (value > 64)))
    return ImageOps.fit(drawn, size, Image.Resampling.BOX).point(lambda value: 255 * (value > 84))


def flat_drawing(drawing: dict | None) -> Image.Image:
    """Background and layers of a drawing as one "RGBA" picture."""
    parts = [part for part in (drawing["background"], *drawing["layers"]) if part is not None] if drawing else []
    if not parts:
        raise refuse("Draw something first, or take an example.")
    flat = Image.new("RGBA", (CANVAS, CANVAS))
    for part in parts:
        flat.alpha_composite(ImageOps.fit(part, flat.size, Image.Resampling.NEAREST))
    return flat


class Picture(gr.Image):
    """gr.Image that hands on "RGBA" pictures opened by `open_upload`."""

    is_template = True

    def preprocess(self, payload):
        if payload is None:
            return None
        if payload.path is None or (payload.url or "").startswith("data:"):
            raise refuse("Send the picture as a file.")
        return open_upload(payload.path)


class Drawing(gr.ImageEditor):
    """gr.ImageEditor that opens pictures by `open_upload`, layers at canvas size, and keeps few in memory."""

    is_template = True

    lock = threading.Lock()

    def preprocess(self, payload):
        if payload is not None:
            if len(payload.layers) > MOST_LAYERS:
                raise refuse(TOO_MANY_LAYERS)
            payload = payload.model_copy(update={"composite": None})  # it is made of the others
        return super().preprocess(payload)

    def convert_and_format_image(self, file, flatten_on_white=False):
        if file is None:
            return None
        source = io.BytesIO(file) if isinstance(file, (bytes, bytearray, memoryview)) else file.path
        image = open_upload(source, "The drawing")
        # Gradio flattens the background alone. No layer stays large in memory.
        return image if flatten_on_white else ImageOps.fit(image, (CANVAS, CANVAS), Image.Resampling.NEAREST)

    @server
    def accept_blobs(self, data: AcceptBlobs):
        if str(data.data.get("index")) not in ("None", "null", "", *map(str, range(MOST_LAYERS))):
            raise refuse(TOO_MANY_LAYERS)
        if any(len(content) > MOST_BYTES for _, content in data.files):
            raise refuse("The drawing is too large.")
        with self.lock:
            while len(self.blob_storage) >= MOST_DRAWINGS:
                del self.blob_storage[next(iter(self.blob_storage))]
            return super().accept_blobs(data)
