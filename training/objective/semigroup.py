# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""The semigroup objective: a jump equals two jumps (Frans et al. 2025, shortcut models; Boffi et al. 2025, PSD)."""

import torch

from diffusers_ctm.trajectory import append_dims, jump

from .jumps import Jumps


def semigroup(jumps: Jumps, options: object) -> dict[str, torch.Tensor]:
    """d( g(x_t, t, s), sg(lam g(x_t, t, u) + (1 - lam) g(G(x_t, t, u), u, s)) ),  lam = s (t - u) / (u (t - s)).

    u lies between t and s. Both jumps are the average's. The teacher is not asked: what g is at s = t comes from score
    matching alone.
    """
    t, u, s = jumps.t, jumps.u, jumps.s
    with torch.no_grad():
        first = jumps.g_by(jumps.student_ema, jumps.x_t, t, u)
        second = jumps.g_by(jumps.student_ema, jump(jumps.x_t, first, t, u), u, s)
        share = append_dims(s * (t - u) / (u * (t - s)), first.ndim)
        target = share * first + (1 - share) * second
    return {"trajectory_loss": jumps.apart(jumps.g, target)}
