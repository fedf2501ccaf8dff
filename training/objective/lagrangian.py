# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""The Lagrangian objective: the end of a jump moves (Sabour et al. 2025, AYF-LMD; Boffi et al. 2025)."""

import torch

from diffusers_ctm.trajectory import append_dims, jump

from .derivatives import DerivativeOptions, along_target, step_within
from .jumps import Jumps


def lagrangian(jumps: Jumps, options: DerivativeOptions) -> dict[str, torch.Tensor]:
    """d( g, sg(D(G(x_t, t, s), s) + a dg/d ln s) ),  a = 1 - s/t.

    With the full gradient d( g - a dg/d ln s, D(G(x_t, t, s), s) ), where the derivative is a difference of two answers
    and nothing is held fixed.
    """
    if options.lagrangian_gradient == "full":
        g, g_beside = jumps.outputs
        change = (g_beside - g) / append_dims(step_within(jumps, options.derivative_step), g.ndim)
        x_s = jump(jumps.x_t, g, jumps.t, jumps.s)
        return {"trajectory_loss": jumps.apart(g - jumps.a * change, jumps.denoised(x_s, jumps.s))}
    with torch.no_grad():
        x_s = jump(jumps.x_t, jumps.g, jumps.t, jumps.s)
        target = jumps.denoised(x_s, jumps.s) + jumps.a * along_target(jumps, options)
    return {"trajectory_loss": jumps.apart(jumps.g, target)}


def beside_target(jumps: Jumps, options: DerivativeOptions) -> list[tuple[torch.Tensor, ...]]:
    """The second point that the full gradient asks the student about: a step up in ln s."""
    if options.lagrangian_gradient == "semi":
        return []
    return [(jumps.x_t, jumps.t, jumps.s * torch.exp(step_within(jumps, options.derivative_step)))]
