# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""CTM's trajectory loss (Kim et al. 2024, Eq. 9)."""

import torch

from .jumps import Jumps, jump_where_needed
from .solvers import TargetOptions


def ctm(jumps: Jumps, options: TargetOptions) -> dict[str, torch.Tensor]:
    """d( G_ema(G(x_t, t, s), s, 0),  G_ema(G_ema(Solver(x_t, t, u), u, s), s, 0) ), 0 being sigma_min.

    Outer jumps from s = sigma_min and the inner jump from u = s are the identity and are not computed. The inner jump
    is the average's (the paper) or the student's (the authors' code).
    """
    network = jumps.student if options.inner_target == "live" else jumps.student_ema
    with torch.no_grad():
        rest = jumps.u, jumps.s, jumps.class_labels
        x_s = jump_where_needed(jumps.by(network), jumps.x_u, jumps.times.inner, *rest)
        target = jumps.to_end(x_s)
    return {"trajectory_loss": jumps.distance(jumps.estimate, target).mean()}
