# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Accelerate and the optimizer, as the options say."""

import os

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import GradientAccumulationPlugin, ProjectConfiguration, set_seed

from ..cli.errors import UserError
from ..cli.training_options import OptimizerOptions, RunOptions
from .sharding import check_launch, check_sharding


def make_accelerator(options: RunOptions) -> Accelerator:
    """Accelerate with the options' precision, accumulation and tracker; seeds every process."""
    precision = options.mixed_precision
    if precision == "auto":
        precision = (
            "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False) else "no"
        )
    tracker = options.report_to
    if tracker != "none" and tracker not in map(str, get_available_trackers()):
        raise UserError(f"--report_to {tracker} needs the package {tracker}: pip install {tracker}, or choose 'none'.")
    if precision == "fp16" and not torch.cuda.is_available():
        raise UserError("--mixed_precision fp16 needs a GPU; use bf16 or no.")
    check_launch()
    accelerator = Accelerator(
        mixed_precision=precision,
        # The environment would overrule a plain number.
        gradient_accumulation_plugin=GradientAccumulationPlugin(options.gradient_accumulation_steps),
        log_with=None if tracker == "none" else tracker,
        project_config=ProjectConfiguration(options.output_dir, logging_dir=os.path.join(options.output_dir, "logs")),
    )
    check_sharding(accelerator, options)
    set_seed(options.seed, device_specific=True)
    return accelerator


def make_optimizer(options: OptimizerOptions, network: torch.nn.Module) -> torch.optim.Optimizer:
    """RAdam, Adam or AdamW over the parameters that learn; torch updates all of them at once."""
    classes = {"radam": torch.optim.RAdam, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    at_once = {"foreach": True} if options.optimizer == "radam" else {"fused": True}
    return classes[options.optimizer](
        [parameter for parameter in network.parameters() if parameter.requires_grad],
        lr=options.learning_rate,
        betas=(options.adam_beta1, options.adam_beta2),
        weight_decay=options.adam_weight_decay,
        eps=options.adam_epsilon,
        **at_once,
    )
