# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Derivatives of g along a trajectory and in its target time, without gradient."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffusers_ctm.trajectory import append_dims

from ..cli.options import UNIT, Checked, option
from .jumps import Jumps


@dataclass
class DerivativeOptions(Checked):
    """The objectives of derivatives: eulerian and lagrangian."""

    derivative: str = option(
        "difference",
        "How eulerian and lagrangian get the derivative of g: by a 'difference' over --derivative_step, one forward "
        "pass, or exactly by 'jvp', a Jacobian-vector product, which costs about two and has no fused attention.",
        ["difference", "jvp"],
    )
    derivative_step: float = option(
        0.03,
        "Step of such a difference, in the logarithm of the noise level.",
        must_be=("above 0 and at most 1", lambda step: 0 < step <= 1),
    )
    eulerian_warmup: float = option(
        0.3,
        "Share of the run's steps over which eulerian comes to weigh the derivative in full. With --init_from it does "
        "so at once: the student is no longer its teacher.",
        must_be=UNIT,
    )
    lagrangian_gradient: str = option(
        "semi",
        "'semi': the derivative and the teacher's answer are lagrangian's target; 'full': its gradient goes through "
        "both, for about twice the cost.",
        ["semi", "full"],
    )


def along_time(jumps: Jumps, velocity: torch.Tensor, options: DerivativeOptions) -> torch.Tensor:
    """d g(x, t, s) / d ln t where x moves with `velocity` = dx / d ln t, shape (B, C, H, W).

    A difference goes back in ln t, no farther than to s. Its error is of order 1 in the step.
    """
    if options.derivative == "jvp":
        return _jvp(jumps, velocity, torch.ones_like(jumps.t), torch.zeros_like(jumps.s))
    step = step_within(jumps, options.derivative_step)
    x = jumps.x_t + append_dims(torch.expm1(-step), jumps.x_t.ndim) * velocity
    return _difference(jumps, x, jumps.t * torch.exp(-step), jumps.s, -step)


def along_target(jumps: Jumps, options: DerivativeOptions) -> torch.Tensor:
    """d g(x, t, s) / d ln s, shape (B, C, H, W).

    A difference goes up in ln s, no farther than to t. Its error is of order 1 in the step.
    """
    if options.derivative == "jvp":
        zero = torch.zeros_like(jumps.x_t), torch.zeros_like(jumps.t)
        return _jvp(jumps, *zero, torch.ones_like(jumps.s))
    step = step_within(jumps, options.derivative_step)
    return _difference(jumps, jumps.x_t, jumps.t, jumps.s * torch.exp(step), step)


def step_within(jumps: Jumps, step: float) -> torch.Tensor:
    """`step`, at most ln(t/s), shape (B,). Where s = t, what a derivative says is multiplied by 0."""
    room = (jumps.t / jumps.s).log()
    return torch.where(room > 0, room.clamp(max=step), step)


def _difference(jumps: Jumps, x: torch.Tensor, t: torch.Tensor, s: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """(g(x, t, s) - g(x_t, t, s)) / step."""
    rough = torch.is_autocast_enabled(x.device.type) or is_random(jumps.bare)
    with precisely(jumps):
        here = jumps.g_by(jumps.bare, jumps.x_t, jumps.t, jumps.s) if rough else jumps.g.detach()
        return (jumps.g_by(jumps.bare, x, t, s) - here) / append_dims(step, x.ndim)


def _jvp(jumps: Jumps, *tangents: torch.Tensor) -> torch.Tensor:
    """The derivative of g as a function of (x_t, ln t, ln s) in the direction of `tangents`, by one pass."""

    def g(x: torch.Tensor, ln_t: torch.Tensor, ln_s: torch.Tensor) -> torch.Tensor:
        return jumps.g_by(jumps.bare, x, ln_t.exp(), ln_s.exp())

    # Neither fused attention nor compiled code has a forward derivative.
    with precisely(jumps), sdpa_kernel(SDPBackend.MATH), torch.compiler.set_stance("force_eager"):
        with contiguous_norms(jumps.bare):
            return torch.func.jvp(g, (jumps.x_t, jumps.t.log(), jumps.s.log()), tangents)[1]


def is_random(network: torch.nn.Module) -> bool:
    """Whether two passes of a network in training differ: by dropout of units or of labels."""
    units = any(isinstance(module, torch.nn.Dropout) and module.p > 0 for module in network.modules())
    return network.training and (units or bool(getattr(network, "config", {}).get("label_dropout")))


@contextmanager
def precisely(jumps: Jumps) -> Iterator[None]:
    """Without gradient, in full precision and without dropout: a small step magnifies every noise."""
    training = jumps.bare.training
    jumps.bare.eval()
    try:
        with torch.no_grad(), torch.autocast(jumps.x_t.device.type, enabled=False):
            yield
    finally:
        jumps.bare.train(training)


@contextmanager
def contiguous_norms(network: torch.nn.Module) -> Iterator[None]:
    """Show group norms contiguous tensors only: torch's forward derivative of theirs takes no others."""
    hooks = [
        module.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))
        for module in network.modules()
        if isinstance(module, torch.nn.GroupNorm)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
