"""The teacher's solvers of the probability-flow ODE."""

from collections.abc import Callable

import torch

from diffusers_ctm.trajectory import append_dims, heun_step, jump


def heun_solve(
    denoiser: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    grid: torch.Tensor,
    x_t: torch.Tensor,
    index: torch.Tensor,
    num_steps: int,
) -> torch.Tensor:
    """`num_steps` Heun steps down the grid, each sample from its own level; 2 * num_steps evaluations.

    Args:
        denoiser: D(x, sigma) with sigma of shape (B,).
        grid: descending levels, shape (N,), none of them 0.
        x_t: states at levels grid[index], shape (B, ...).
        index: where each sample starts, shape (B,), with index + num_steps < N.
    """
    for step in range(num_steps):
        x_t = heun_step(denoiser, x_t, grid[index + step], grid[index + step + 1])
    return x_t


def dpm_solve(
    denoiser: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    grid: torch.Tensor,
    x_t: torch.Tensor,
    index: torch.Tensor,
    num_steps: int,
) -> torch.Tensor:
    """`num_steps` steps of DPM-Solver++(2M) down the grid, one evaluation each (Lu et al. 2022, Algorithm 2).

    Order 2 from the second step on: D along a step is extrapolated from the last two evaluations, linearly in ln(level). The first step
    is the jump with D. Arguments as `heun_solve`.
    """
    denoised, log_step = None, None
    for step in range(num_steps):
        t, t_next = grid[index + step], grid[index + step + 1]
        before, log_step_before = denoised, log_step
        denoised, log_step = denoiser(x_t, t), (t / t_next).log()
        estimate = denoised
        if before is not None:
            ratio = append_dims(log_step / (2 * log_step_before), x_t.ndim)
            estimate = denoised + ratio * (denoised - before)
        x_t = jump(x_t, estimate, t, t_next)
    return x_t


SOLVERS = {"heun": heun_solve, "dpm": dpm_solve}
