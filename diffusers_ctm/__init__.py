# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Consistency Trajectory Models as a plugin of diffusers.

`import diffusers_ctm` is all that `DiffusionPipeline.from_pretrained` needs to load a CTM.
"""

from .hub import register
from .pipeline_ctm import CTMPipeline
from .scheduling_ctm import CTMScheduler, CTMSchedulerOutput
from .scheduling_edm_heun import EDMHeunScheduler, EDMHeunSchedulerOutput
from .unet_2d_ctm import CTMUNet2DModel
from .unet_edm import EDMUNet2DModel


__all__ = [
    "CTMPipeline",
    "CTMScheduler",
    "CTMSchedulerOutput",
    "CTMUNet2DModel",
    "EDMHeunScheduler",
    "EDMHeunSchedulerOutput",
    "EDMUNet2DModel",
    "register",
]
__version__ = "0.1.0"

register()
