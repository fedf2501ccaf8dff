# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""The solvers that follow the teacher from t to u, in one table."""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from diffusers_ctm.trajectory import append_dims, heun_step, jump

from ..cli.options import Checked, option


Denoiser = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def heun_states(denoiser: Denoiser, x: torch.Tensor, levels: torch.Tensor) -> Iterator[torch.Tensor]:
    """The states at levels[1], levels[2], ... by Heun's method, two evaluations a step (Karras et al. 2022, Algorithm
    1).

    Args:
        denoiser: D(x, sigma), sigma of shape (B,).
        x: states at levels[0], shape (B, ...).
        levels: shape (k + 1, B), descending along the first dimension, none of them 0; on the device of `x`.
    """
    for t, t_next in zip(levels, levels[1:]):
        x = heun_step(denoiser, x, t, t_next)
        yield x


def dpm_states(denoiser: Denoiser, x: torch.Tensor, levels: torch.Tensor) -> Iterator[torch.Tensor]:
    """The states at levels[1], levels[2], ... by DPM-Solver++(2M), one evaluation a step (Lu et al. 2022, Algorithm 2).

    The order is 2 from the second step on: D along a step is extrapolated from the last two evaluations, linearly in
    ln(level). The first step is the jump with D. Arguments as of `heun_states`.
    """
    denoised = denoiser(x, levels[0])
    x = jump(x, denoised, levels[0], levels[1])
    yield x
    for t_before, t, t_next in zip(levels, levels[1:], levels[2:]):
        before, denoised = denoised, denoiser(x, t)
        ratio = append_dims((t / t_next).log() / (2 * (t_before / t).log()), x.ndim)
        x = jump(x, denoised + ratio * (denoised - before), t, t_next)
        yield x


def unipc_states(denoiser: Denoiser, x: torch.Tensor, levels: torch.Tensor) -> Iterator[torch.Tensor]:
    """The states at levels[1], levels[2], ... by UniPC of order 3, one evaluation a step and one more (Zhao et al.
    2023, Algorithm 1).

    A step is predicted as by `dpm_states`, D is evaluated at the prediction, and the step is done once more with D
    interpolated through it. The next step uses that evaluation too. The first step is Heun's: students of UniPC's own
    first step, which errs the other way on a coarse grid, were worse in several steps (docs/study.md). Arguments as of
    `heun_states`.
    """
    evaluations = []

    def remember(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        evaluations.append(denoiser(x, sigma))
        return evaluations[-1]

    x = heun_step(remember, x, levels[0], levels[1])
    yield x
    before, denoised = evaluations
    for t_before, t, t_next in zip(levels, levels[1:], levels[2:]):
        h, h_before = (t / t_next).log(), (t_before / t).log()
        ratio = append_dims(h_before / h, x.ndim)
        predicted = jump(x, denoised + (denoised - before) / (2 * ratio), t, t_next)
        after = denoiser(predicted, t_next)

        # Weights of y and y (y - 1) in the integral of e^(h (y - 1)) h dy over the step, y from 0 to 1.
        h = append_dims(h, x.ndim)
        linear = 1 + torch.expm1(-h) / h
        square = 1 - 2 * linear / h
        bend = (before - denoised + ratio * (after - denoised)) / (ratio * (ratio + 1))
        x = jump(x, denoised, t, t_next) + (linear * (after - denoised) + (square - linear) * bend)
        before, denoised = denoised, after
        yield x


@dataclass(frozen=True)
class Solver:
    """A solver: its states along a path, and the number of evaluations of the denoiser that k steps take."""

    states: Callable[[Denoiser, torch.Tensor, torch.Tensor], Iterator[torch.Tensor]]
    evaluations: Callable[[int], int]

    def solve(self, denoiser: Denoiser, x: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
        """The state at levels[-1], from `x` at levels[0]; arguments as of `heun_states`."""
        return deque(self.states(denoiser, x, levels), maxlen=1).pop()


SOLVERS = {
    "heun": Solver(heun_states, lambda k: 2 * k),
    "unipc": Solver(unipc_states, lambda k: k + 1),
    "dpm": Solver(dpm_states, lambda k: k),
}


@dataclass
class TargetOptions(Checked):
    """The objectives of trajectories, ctm and regression: the solver from t to u, and ctm's jump from there to s."""

    solver_model: str = option(
        "teacher",
        "Whose score the solver follows: 'teacher', or 'ema', the student's own average (CTM without a teacher). With "
        "'ema' a --teacher is what the student starts from; without one it starts from nothing, with the network that "
        "--block_out_channels and the like describe.",
        ["teacher", "ema"],
    )
    solver: str = option(
        "heun",
        "The teacher's solver for k steps: 'heun' (order 2, 2k evaluations; the paper's), 'unipc' (order 3 after a "
        "first step of Heun's, k + 1 evaluations) or 'dpm' (DPM-Solver++(2M), order 2 but for its first step, k "
        "evaluations).",
        SOLVERS,
    )
    inner_target: str | None = option(
        None,
        "Network of the target's jump from u to s: 'ema' (the paper, the default) or 'live' (the authors' code).",
        [None, "ema", "live"],
    )
