# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Consistency Trajectory Models as a plugin of diffusers.

`import diffusers_ctm` is all that `DiffusionPipeline.from_pretrained` needs to load a CTM.
"""

from .guidance import ClassAverage, ClassifierGuidance, Guidance, LossGuidance
from .hub import register
from .likelihood import log_likelihood
from .linear_operators import BlockAverageOperator, GrayscaleOperator, LinearOperator, MaskOperator
from .pipeline_ctm import CTMPipeline
from .pipeline_ctm_img2img import CTMImg2ImgPipeline
from .pipeline_ctm_inpaint import CTMInpaintPipeline
from .pipeline_ctm_inversion import CTMInversionPipeline, slerp
from .pipeline_ctm_restoration import CTMRestorationPipeline
from .pipeline_output import CTMPipelineOutput
from .provenance import read_provenance, save_images
from .rejection import RejectionSamplingOutput, rejection_sample
from .safety import OpenNSFWSafetyChecker
from .scheduling_ctm import CTMScheduler, CTMSchedulerOutput
from .scheduling_edm_heun import EDMHeunScheduler, EDMHeunSchedulerOutput
from .transformer_dit_ctm import CTMDiTTransformer2DModel
from .unet_2d_ctm import CTMUNet2DModel
from .unet_edm import EDMUNet2DModel
from .unet_edm2 import EDM2UNet2DModel
from .version import __version__
from .visualization import gamma_seed_grid, steps_gamma_grid, trajectory_strip


__all__ = [
    "BlockAverageOperator",
    "CTMDiTTransformer2DModel",
    "CTMImg2ImgPipeline",
    "CTMInpaintPipeline",
    "CTMInversionPipeline",
    "CTMPipeline",
    "CTMPipelineOutput",
    "CTMRestorationPipeline",
    "CTMScheduler",
    "CTMSchedulerOutput",
    "CTMUNet2DModel",
    "ClassAverage",
    "ClassifierGuidance",
    "EDM2UNet2DModel",
    "EDMHeunScheduler",
    "EDMHeunSchedulerOutput",
    "EDMUNet2DModel",
    "GrayscaleOperator",
    "Guidance",
    "LinearOperator",
    "LossGuidance",
    "MaskOperator",
    "OpenNSFWSafetyChecker",
    "RejectionSamplingOutput",
    "__version__",
    "gamma_seed_grid",
    "log_likelihood",
    "read_provenance",
    "register",
    "rejection_sample",
    "save_images",
    "slerp",
    "steps_gamma_grid",
    "trajectory_strip",
]

register()
