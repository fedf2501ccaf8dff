# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Weights spread over processes by torch's FSDP2, through Accelerate: which launches work, and how weights are read and set."""

import os

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from ..cli.errors import UserError
from ..cli.training_options import HardwareOptions


WHAT_WORKS = "training/configs/accelerate has what works: ddp.yaml and fsdp.yaml."


def _asked(name: str) -> bool:
    return os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true"


def check_launch() -> None:
    """Raise UserError if the launcher asks for a backend that this training cannot use."""
    if _asked("DEEPSPEED"):
        raise UserError(
            f"DeepSpeed resumes from pickles, which can run code, and does clipping and the step itself. {WHAT_WORKS}"
        )
    if _asked("MEGATRON_LM"):
        raise UserError(f"Megatron-LM trains its own networks only. {WHAT_WORKS}")


def check_sharding(accelerator: Accelerator, options: HardwareOptions) -> None:
    """Raise UserError for options that do not go with FSDP; leave precision to autocast."""
    if not _asked("FSDP"):
        return
    if accelerator.distributed_type != DistributedType.FSDP:
        raise UserError("Accelerate has FSDP for several processes on GPUs only. Leave it out (ACCELERATE_USE_FSDP).")
    plugin = accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise UserError(f"FSDP must be version 2 (fsdp_version: 2). {WHAT_WORKS}")
    if plugin.state_dict_type.name != "FULL_STATE_DICT":  # the others are read by pickle, which runs code
        raise UserError(f"FSDP must save whole weights (fsdp_state_dict_type: FULL_STATE_DICT). {WHAT_WORKS}")
    if options.compile:
        raise UserError("--compile cannot be combined with FSDP; leave one of them out.")
    if accelerator.mixed_precision == "fp16":
        raise UserError("--mixed_precision fp16 cannot be combined with FSDP; use bf16 or no.")
    # FSDP's own policy would round the network's inputs, noise levels included, to bfloat16.
    plugin.mixed_precision_policy = None


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` with all its entries, of which this process may hold a part. All processes must call it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def load_whole(network: torch.nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """`load_state_dict` of whole weights, which each process has, into a network whose weights may be spread."""
    if not any(hasattr(parameter, "full_tensor") for parameter in network.parameters()):
        network.load_state_dict(weights)
        return
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    set_model_state_dict(network, weights, options=StateDictOptions(full_state_dict=True))
