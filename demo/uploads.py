# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Pictures from visitors: opened with limits on size and kind, made ready for the network, and never trusted."""

import io
import threading
import warnings

import gradio as gr
from gradio.components.base import server
from gradio.components.image_editor import AcceptBlobs
from PIL import Image, ImageOps


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
    refused = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit below is lower
            image = Image.open(source, formats=FORMATS)
        if max(image.size) > MOST_SIDE:
            refused = f"{name} is {image.width}x{image.height} pixels; the limit is {MOST_SIDE} on a side."
        elif image.mode.startswith(("I", "F")):
            refused = f"{name} has more than 8 bits per value. Save it as an ordinary 8-bit picture first."
        else:
            if getattr(image, "is_animated", False):
                gr.Info(f"{name} is animated; its first frame is used.")
            image.load()
            return ImageOps.exif_transpose(image).convert("RGBA")
    except Image.DecompressionBombError:
        refused = f"{name} is too large: the limit is {MOST_SIDE} pixels on a side."
    except Exception:  # decoders raise many kinds for a broken file
        refused = f"{name} cannot be read. PNG, JPEG, WebP, GIF and BMP pictures work."
    raise gr.Error(refused, print_exception=False)


def fitted(image: Image.Image, pipe) -> Image.Image:
    """An "RGBA" picture, center-cropped and resized for the network. Transparency becomes the background."""
    height, width = pipe.image_size
    channels = pipe.unet.config.in_channels
    flat = Image.new("RGBA", image.size, background(channels))
    flat.alpha_composite(image)
    mode = "L" if channels == 1 else "RGB"
    return ImageOps.fit(flat.convert(mode), (width, height), Image.Resampling.BOX)


def background(channels: int) -> str:
    """Color behind transparency: gray data sets are white on black, color ones on white."""
    return "black" if channels == 1 else "white"


def mask_of(drawing: dict, size: tuple[int, int]) -> Image.Image:
    """White ("L", of `size`) where a third or more of a pixel is drawn over in any layer."""
    drawn = Image.new("L", (CANVAS, CANVAS))
    for layer in drawing["layers"]:
        alpha = ImageOps.fit(layer.getchannel("A"), drawn.size, Image.Resampling.NEAREST)
        drawn.paste(255, mask=alpha.point(lambda value: 255 * (value > 64)))
    return drawn.resize(size, Image.Resampling.BOX).point(lambda value: 255 * (value > 84))


def flat_drawing(drawing: dict) -> Image.Image | None:
    """Background and layers of a drawing as one "RGBA" picture; None if there is nothing."""
    parts = [part for part in (drawing["background"], *drawing["layers"]) if part is not None]
    if not parts:
        return None
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
            raise gr.Error("Send the picture as a file.", print_exception=False)
        return open_upload(payload.path)


class Drawing(gr.ImageEditor):
    """gr.ImageEditor that opens pictures by `open_upload`, layers at canvas size, and keeps few in memory."""

    is_template = True

    lock = threading.Lock()

    def preprocess(self, payload):
        if payload is not None:
            if len(payload.layers) > MOST_LAYERS:
                raise gr.Error(TOO_MANY_LAYERS, print_exception=False)
            payload = payload.model_copy(update={"composite": None})  # it is made of the others
        return super().preprocess(payload)

    def convert_and_format_image(self, file, flatten_on_white=False):
        if file is None:
            return None
        source = io.BytesIO(file) if isinstance(file, (bytes, bytearray, memoryview)) else file.path
        image = open_upload(source, "The drawing")
        is_layer = not flatten_on_white  # gradio calls it so; no layer stays large in memory
        return ImageOps.fit(image, (CANVAS, CANVAS), Image.Resampling.NEAREST) if is_layer else image

    @server
    def accept_blobs(self, data: AcceptBlobs):
        if str(data.data.get("index")) not in ("None", "null", "", *map(str, range(MOST_LAYERS))):
            raise gr.Error(TOO_MANY_LAYERS, print_exception=False)
        if any(len(content) > MOST_BYTES for _, content in data.files):
            raise gr.Error("The drawing is too large.", print_exception=False)
        with self.lock:
            while len(self.blob_storage) >= MOST_DRAWINGS:
                del self.blob_storage[next(iter(self.blob_storage))]
            return super().accept_blobs(data)
