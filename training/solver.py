"""The teacher's solver of the probability-flow ODE."""

from collections.abc import Callable

import torch

from diffusers_ctm.trajectory import heun_step


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
