# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""The output of the pipelines."""

from dataclasses import dataclass
from typing import Any

from diffusers import ImagePipelineOutput


@dataclass
class CTMPipelineOutput(ImagePipelineOutput):
    """Output of `CTMPipeline` and of the pipelines that build on it.

    Args:
        images: as `output_type` asked: PIL images, an array (B, H, W, C) or a tensor (B, C, H, W). Those that a safety
            checker flagged are black.
        nsfw_content_detected: whether each image was flagged; None without a safety checker.
        provenance: how each image was made, a dict with the keys of `provenance.FIELDS`; what `save_images` writes.
    """

    nsfw_content_detected: list[bool] | None = None
    provenance: list[dict[str, Any]] | None = None
