# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""torch.compile for networks that see batches of changing size and whose last layer is differentiated alone."""

import functools

import torch


VARIANTS = 64  # most versions of one forward: with and without gradient, in inference mode, with one sample


def compile_network(network: torch.nn.Module, backend: str = "inductor") -> None:
    """Let calls of `network` run compiled, in place: it stays the same module, with the same names of weights.

    The batch size is symbolic: sub-batches of any size share their code (torch treats a single sample apart). The
    network's `last_layer`, if it has one, stays uncompiled: for autograd a compiled region is one node, and the
    gradient at the last layer's weight, which adaptive weights read, would cost a pass through the whole network.

    Copy a network before compiling it: a later copy calls the original.
    """
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
