"""Image models of transformers, whole, and their image processors."""

import re
from dataclasses import dataclass

import torch
from torch import nn

from ..cli.errors import UserError


def load_pretrained(model_class: type, name: str, unused: str = "pooler", **options) -> tuple[nn.Module, list[str]]:
    """`model_class.from_pretrained(name)` in float32, and those weights that its files lack, so that they are random numbers.

    Raises UserError if they lack others than those in whose names `unused`, a regular expression, is found.
    """
    from transformers.utils import logging

    options = {"dtype": torch.float32, "trust_remote_code": False, "output_loading_info": True, **options}
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it reports heads, which are not used; what is missing is checked here
    try:
        network, info = model_class.from_pretrained(name, **options)
    finally:
        logging.set_verbosity(verbosity)
    lacking = sorted(info["missing_keys"])
    needed = [key for key in lacking if not re.search(unused, key)]
    if needed:
        raise UserError(f"its files lack {len(needed)} of the weights, such as {needed[0]}")
    return network, lacking


@dataclass
class ImageProcessing:
    """What an image processor of transformers does.

    Args:
        side: height and width in pixels of what the network sees.
        mean, std: of the pixels, in 0..255, shape (3,), that it subtracts and divides by.
    """

    side: tuple[int, int]
    mean: torch.Tensor
    std: torch.Tensor


def image_processing(name: str) -> ImageProcessing:
    """Of the folder or Hub id `name`. Raises OSError if it has no image processor, UserError if that swaps colours.

    Its file is read, the processor itself is not built: that may need torchvision.
    """
    from transformers.image_processing_base import ImageProcessingMixin

    processor, _ = ImageProcessingMixin.get_image_processor_dict(name)
    if processor.get("do_flip_channel_order"):
        raise UserError("its image processor gives it colours in the order blue, green, red, which is not done here")
    crop = processor.get("do_center_crop", False) and processor.get("crop_size")
    factor = processor.get("rescale_factor", 1 / 255) if processor.get("do_rescale", True) else 1.0
    values = {"image_mean": 0.0, "image_std": 1.0}
    if processor.get("do_normalize", True):
        values = {key: processor.get(key, neutral) for key, neutral in values.items()}
    mean, std = (torch.tensor(value, dtype=torch.float32).expand(3) / factor for value in values.values())
    return ImageProcessing(_height_width(crop or processor["size"]), mean, std)


def _height_width(size: int | dict) -> tuple[int, int]:
    """An image processor's `size` or `crop_size` as (height, width)."""
    if isinstance(size, dict):
        side = size.get("shortest_edge")
        return (size["height"], size["width"]) if side is None else (side, side)
    return (size, size) if isinstance(size, int) else tuple(size)
