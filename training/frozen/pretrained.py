# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Image models of transformers, with all their weights, and their image processors."""

import re

import torch
from torch import nn
from transformers import AutoModel
from transformers.image_processing_base import ImageProcessingMixin
from transformers.utils import logging

from ..cli.errors import UserError


UNUSED = (
    "pooler|hidden_states_norms"  # weights that files may lack: poolers, and norms of backbone classes that start plain
)


def load_pretrained(name: str, model_class: type = AutoModel, **options) -> tuple[nn.Module, list[str]]:
    """`model_class.from_pretrained(name)` in float32, and the names of weights that its files lack: they are random.

    Raises UserError if its files lack other weights than `UNUSED`. No code that comes with the weights is run.
    """
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it reports heads, which are not used; missing weights are checked here
    try:
        network, info = model_class.from_pretrained(
            name, dtype=torch.float32, trust_remote_code=False, output_loading_info=True, **options
        )
    finally:
        logging.set_verbosity(verbosity)
    missing = sorted(info["missing_keys"])
    needed = [key for key in missing if not re.search(UNUSED, key)]
    if needed:
        raise UserError(f"its files lack {len(needed)} of the weights, such as {needed[0]}.")
    return network, missing


def image_processing(name: str) -> tuple[tuple[int, int], torch.Tensor, torch.Tensor]:
    """(side, mean, std) of the image processor in the folder or Hub id `name`.

    `side` is the height and width in pixels that the network is shown. `mean` and `std`, shape (3,), normalize pixels
    in 0..255. The processor's file is read, the processor itself is not built: that may need torchvision.

    Raises OSError if there is no image processor, and UserError if it swaps colors.
    """
    processor, _ = ImageProcessingMixin.get_image_processor_dict(name)
    if processor.get("do_flip_channel_order"):
        raise UserError("its image processor gives it colors in the order blue, green, red, which is not supported.")
    crop = processor.get("do_center_crop", False) and processor.get("crop_size")
    factor = processor.get("rescale_factor", 1 / 255) if processor.get("do_rescale", True) else 1.0
    values = processor if processor.get("do_normalize", True) else {}
    mean = torch.tensor(values.get("image_mean", 0.0), dtype=torch.float32).expand(3) / factor
    std = torch.tensor(values.get("image_std", 1.0), dtype=torch.float32).expand(3) / factor
    return height_width(crop or processor["size"]), mean, std


def height_width(size: int | dict | list) -> tuple[int, int]:
    """An image processor's `size` or `crop_size`, or a model's `image_size`, as (height, width)."""
    if isinstance(size, dict):
        size = size.get("shortest_edge") or (size["height"], size["width"])
    return (size, size) if isinstance(size, int) else tuple(size)
