# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""The Eulerian objective: the start of a jump moves along its trajectory (Sabour et al. 2025, AYF-EMD)."""

import torch

from diffusers_ctm.trajectory import append_dims

from .derivatives import DerivativeOptions, along_time
from .distances import l2_distance
from .jumps import Jumps


MOST = 0.99  # of the derivative's weight r
SMALL = 0.1  # added to the length of h


def eulerian(jumps: Jumps, options: DerivativeOptions) -> dict[str, torch.Tensor]:
    """| g - sg(g - h / (|h| + 0.1)) |^2,  h = (1 - r a) (g - D) + r a dg/d ln t,  a = 1 - s/t.

    dg/d ln t is taken along the teacher's trajectory through x_t. h is 0 for an exact flow map at r = 1, and for a
    student that starts as its teacher at r = 0. So r rises from 0 to 0.99. |h| is a root mean square over an image, in
    units of EDM's c_out(t). The distance is the squared one: another would weigh h, which has its length already.
    """
    r = MOST * min(1.0, jumps.progress / options.eulerian_warmup) if options.eulerian_warmup else MOST
    with torch.no_grad():
        denoised, g = jumps.denoised(jumps.x_t, jumps.t), jumps.g.detach()
        h = (1 - r * jumps.a) * (g - denoised)
        if r > 0:
            h = h + r * jumps.a * along_time(jumps, jumps.x_t - denoised, options)
        length = (jumps.unit * h).square().flatten(1).mean(1).sqrt()
        target = g - h / append_dims(length + SMALL, h.ndim)
    loss = l2_distance(jumps.unit * jumps.g, jumps.unit * target).mean()
    return {"trajectory_loss": loss, "tangent_length": length.mean()}
