# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Consistency Trajectory Models as a plugin of diffusers.

`import diffusers_ctm` is all that `DiffusionPipeline.from_pretrained` needs to load a CTM.
"""

from .hub import register
from .likelihood import log_likelihood
from .pipeline_ctm import CTMPipeline
from .pipeline_ctm_inversion import CTMInversionPipeline, slerp
from .scheduling_ctm import CTMScheduler, CTMSchedulerOutput
from .scheduling_edm_heun import EDMHeunScheduler, EDMHeunSchedulerOutput
from .unet_2d_ctm import CTMUNet2DModel


__all__ = [
    "CTMInversionPipeline",
    "CTMPipeline",
    "CTMScheduler",
    "CTMSchedulerOutput",
    "CTMUNet2DModel",
    "EDMHeunScheduler",
    "EDMHeunSchedulerOutput",
    "log_likelihood",
    "register",
    "slerp",
]
__version__ = "0.1.0"

register()
