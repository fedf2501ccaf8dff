# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Regression on the teacher's trajectories (Hu et al. 2026, CMT)."""

import torch

from diffusers_ctm.trajectory import append_dims

from .jumps import Jumps


def regression(jumps: Jumps, options: object) -> dict[str, torch.Tensor]:
    """d( g(x_t, t, s), (x_s - (s/t) x_t) / (1 - s/t) ), x_s = Solver(x_t, t, s).

    The target is the g with which the jump ends at x_s. The student learns its solver's map, errors included.
    """
    ratio = append_dims(jumps.s / jumps.t, jumps.x_t.ndim)
    target = (jumps.x_u - ratio * jumps.x_t) / (1 - ratio)
    return {"trajectory_loss": jumps.apart(jumps.g, target)}
