# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Accelerate and the optimizer, as the options say; weights that FSDP spreads over processes."""

import os

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedType, GradientAccumulationPlugin, ProjectConfiguration, set_seed
from diffusers.optimization import get_scheduler

from ..cli.errors import UserError
from ..cli.training_options import HardwareOptions, OptimizerOptions, RunOptions


WHAT_WORKS = "training/configs/accelerate has what works: ddp.yaml and fsdp.yaml."


# Backends that a launcher may ask for and this training cannot use.
REFUSED = {
    "DEEPSPEED": "DeepSpeed resumes from pickles, which can run code, and does clipping and the step itself.",
    "MEGATRON_LM": "Megatron-LM trains its own networks only.",
}


def _asked(name: str) -> bool:
    return os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true"


def check_sharding(accelerator: Accelerator, options: HardwareOptions) -> None:
    """Raise UserError for options that do not go with FSDP; leave precision to autocast."""
    if not _asked("FSDP"):
        return
    if accelerator.distributed_type != DistributedType.FSDP:
        raise UserError("Accelerate has FSDP for several processes on GPUs only. Leave it out (ACCELERATE_USE_FSDP).")
    plugin = accelerator.state.fsdp_plugin
    # Other state dicts are read by pickle, which runs code.
    if plugin.fsdp_version != 2 or plugin.state_dict_type.name != "FULL_STATE_DICT":
        raise UserError(
            "FSDP must be version 2 (fsdp_version: 2) and save whole weights (fsdp_state_dict_type: FULL_STATE_DICT). "
            f"{WHAT_WORKS}"
        )
    if options.compile or accelerator.mixed_precision == "fp16":
        raise UserError("--compile and --mixed_precision fp16 cannot be combined with FSDP; leave them out.")
    # FSDP's own policy would round the network's inputs, noise levels included, to bfloat16.
    plugin.mixed_precision_policy = None


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
    for name, reason in REFUSED.items():
        if _asked(name):
            raise UserError(f"{reason} {WHAT_WORKS}")
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
        betas=(0.9, options.adam_beta2),
        weight_decay=options.adam_weight_decay,
        eps=options.adam_epsilon,
        **at_once,
    )


def make_lr_scheduler(options: RunOptions, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    """The learning rate of each step.

    "inverse_sqrt" is EDM2's: constant for `lr_decay_after` steps, then falling as one over the root of their number.
    """
    if options.lr_scheduler != "inverse_sqrt":
        return get_scheduler(
            options.lr_scheduler,
            optimizer,
            num_warmup_steps=options.lr_warmup_steps,
            num_training_steps=options.max_train_steps,
        )

    def factor(step: int) -> float:
        rise = min(step / options.lr_warmup_steps, 1.0) if options.lr_warmup_steps else 1.0
        return rise / max(step / options.lr_decay_after, 1.0) ** 0.5

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


# Weights that FSDP spreads over processes ----------------------------------------------------------------------------


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` with all its entries, of which this process may hold a part. All processes must call it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def load_whole(network: torch.nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """`load_state_dict` of whole weights, which each process has, into a network whose weights may be spread."""
    if any(hasattr(parameter, "full_tensor") for parameter in network.parameters()):
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

        set_model_state_dict(network, weights, options=StateDictOptions(full_state_dict=True))
    else:
        network.load_state_dict(weights)
