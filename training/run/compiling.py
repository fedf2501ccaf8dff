# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""torch.compile for networks that see batches of changing size and whose last layer is differentiated alone."""

import functools

import torch
import torch._dynamo
import torch._functorch.config
import torch.compiler.config
from diffusers.utils import is_torch_version

from ..cli.errors import UserError


VARIANTS = 64  # most versions of one forward: with and without gradient, in inference mode, with one sample


@functools.cache
def keep_reads_after_writes() -> None:
    """Mend torch's compiler for CPUs, which up to 2.13 may forget that a read waits for a write.

    It lost gradients in silence, such as those below an upsampling in bfloat16 (issue 185509 of PyTorch). Raises
    UserError for a version that this does not mend.
    """
    if is_torch_version("<", "2.13"):
        raise UserError("--compile on a CPU needs torch 2.13 or later: compilers before it lose gradients.")
    from torch._inductor.scheduler import SchedulerNode  # slow to import

    recompute = SchedulerNode.recompute_size_and_body

    @functools.wraps(recompute)
    def mended(node: SchedulerNode, *args, **kwargs) -> None:
        recompute(node, *args, **kwargs)
        node.set_read_writes(node.read_writes.rename(node.mutation_renames))

    SchedulerNode.recompute_size_and_body = mended
    torch.compiler.config.cache_key_tag += "reads after writes"  # what was compiled before stays on disk


def compile_network(network: torch.nn.Module, backend: str = "inductor") -> None:
    """Let calls of `network` run compiled, in place: it stays the same module, with the same names of weights.

    The batch size is symbolic: sub-batches of any size share their code (torch treats a single sample apart). The
    network's `last_layer`, if it has one, stays uncompiled: for autograd a compiled region is one node, and the
    gradient at the last layer's weight, which adaptive weights read, would cost a pass through the whole network.

    Copy a network before compiling it: a later copy calls the original. Raises UserError on a CPU with an older torch.
    """
    if next(network.parameters()).device.type == "cpu":
        keep_reads_after_writes()
    torch._functorch.config.donated_buffer = False  # backward frees nothing that a later backward through it reads
    torch._dynamo.config.recompile_limit = max(VARIANTS, torch._dynamo.config.recompile_limit)
    last_layer = getattr(network, "last_layer", None)
    if last_layer is not None:
        last_layer.forward = torch.compiler.disable(last_layer.forward)
    compiled = torch.compile(network.forward, backend=backend)

    @functools.wraps(network.forward)
    def forward(*args, **kwargs):
        for value in (*args, *kwargs.values()):
            if isinstance(value, torch.Tensor) and value.ndim > 0:
                torch._dynamo.maybe_mark_dynamic(value, 0)
        return compiled(*args, **kwargs)

    network.forward = forward
