# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Dormand and Prince's pair of Runge-Kutta methods, with a step that follows the error."""

import math
from collections.abc import Callable

import torch


# Dormand and Prince's coefficients: nodes, stages, and the difference of the orders 5 and 4.
# The last stage is the step itself.
NODES = (0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)

STAGES = (
    (),
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)

ERROR = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)


def dormand_prince(
    field: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    state: torch.Tensor,
    start: torch.Tensor,
    end: torch.Tensor,
    rtol: float,
    atol: float,
    size: int,
    max_evaluations: int = 20_000,
) -> tuple[torch.Tensor, int]:
    """Solve d state / d time = field(time, state) by the embedded Runge-Kutta pair 5(4) of Dormand and Prince (1980).

    A step is accepted if the estimated error, divided by atol + rtol |state|, is at most 1 for every sample: its root
    mean square over the first `size` values (the point) and each of the others (the integrals). The step is shared by
    the batch: an image's result depends on the others within the tolerances.

    Args:
        field: of a 0-d float64 time and a state (B, size + P).
        state: at `start`, (B, size + P).
        start, end: 0-d float64, `start` < `end`.

    Returns:
        The state at `end` and the number of evaluations.

    Raises:
        RuntimeError: the field gave NaN or infinite values, or the tolerances cannot be met.
    """
    time, step = start, (end - start) / 50
    slope, evaluations = field(time, state), 1
    if not slope.isfinite().all():
        raise RuntimeError("The ODE cannot be solved: the network gives values that are NaN or infinite.")
    while time < end:
        step = torch.minimum(step, end - time)
        slopes = [slope]
        for node, weights in zip(NODES[1:], STAGES[1:], strict=True):
            moved = state + step.item() * sum(w * k for w, k in zip(weights, slopes, strict=True) if w)
            slopes.append(field(time + node * step, moved))
        evaluations += len(NODES) - 1
        scale = atol + rtol * torch.maximum(state.abs(), moved.abs())
        error = step.item() * sum(w * k for w, k in zip(ERROR, slopes, strict=True) if w) / scale
        error = torch.cat([error[:, :size].square().mean(1, keepdim=True).sqrt(), error[:, size:].abs()], dim=1)
        worst = error.nan_to_num(nan=math.inf, posinf=math.inf).max().item()
        if worst <= 1:
            time = end if step == end - time else time + step
            state, slope = moved, slopes[-1]
        step = step * min(5.0, max(0.2, 0.9 * max(worst, 1e-10) ** -0.2))
        if evaluations > max_evaluations or step < 1e-9 * (end - start):
            raise RuntimeError(
                f"The ODE solver does not meet rtol={rtol:g}, atol={atol:g} after {evaluations} evaluations; allow "
                "larger errors, or check that the network gives finite values."
            )
    return state, evaluations
