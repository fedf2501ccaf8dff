"""Which times a training step asks about: (t, u, s) on the Karras grid, and the levels of score matching."""

from dataclasses import dataclass

import torch

from diffusers_ctm.trajectory import karras_sigma


@dataclass
class Times:
    """Indices into the descending grid of N levels (0 is sigma_max, N - 1 is sigma_min), int64 on the CPU, shape (B,).

    t <= u <= s as indices, so t >= u >= s as levels. `solver_steps` k = u - t is the same for all samples.
    On the CPU, so that the host knows which jumps are identities without waiting for a device.
    """

    t: torch.Tensor
    u: torch.Tensor
    s: torch.Tensor
    solver_steps: int

    def __getitem__(self, rows: slice) -> "Times":
        """The times of some samples."""
        return Times(self.t[rows], self.u[rows], self.s[rows], self.solver_steps)


def draw_solver_steps(max_steps: int, distribution: str, generator: torch.Generator) -> int:
    """k in 1..max_steps with P(k) ~ k ("weighted", the authors') or P(k) equal ("uniform")."""
    weights = torch.ones(max_steps) if distribution == "uniform" else torch.arange(1.0, max_steps + 1)
    return int(torch.multinomial(weights, 1, generator=generator)) + 1


def draw_times(
    batch_size: int,
    num_levels: int,
    matching: str,
    max_solver_steps: int,
    distribution: str,
    generator: torch.Generator,
) -> Times:
    """Times of one step (CTM, Section 3.1).

    t is uniform over the levels from which k solver steps stay on the grid. Then
    "soft": s is uniform over the levels from u down to sigma_min, both included; "local": the same with k = 1; "global": s = u.
    """
    if matching == "local":
        max_solver_steps = 1
    k = draw_solver_steps(max_solver_steps, distribution, generator)
    t = torch.randint(0, num_levels - k, (batch_size,), generator=generator)
    u = t + k
    s = u
    if matching != "global":
        s = u + (torch.rand(batch_size, generator=generator) * (num_levels - u)).long()
    return Times(t, u, s, k)


def draw_times_to_end(batch_size: int, num_levels: int, generator: torch.Generator) -> Times:
    """t uniform over the levels above sigma_min, u = s = sigma_min: the jumps that a consistency model teaches."""
    t = torch.randint(0, num_levels - 1, (batch_size,), generator=generator)
    end = torch.full_like(t, num_levels - 1)
    return Times(t, end, end, 1)


def draw_lognormal_sigma(noise: torch.Tensor, p_mean: float = -1.2, p_std: float = 1.2) -> torch.Tensor:
    """exp(p_mean + p_std * noise) for standard normal `noise` of shape (B,) (Karras et al. 2022, Table 1)."""
    return torch.exp(p_mean + p_std * noise)


def draw_half_lognormal_sigma(
    noise: torch.Tensor, ramp: torch.Tensor, sigma_min: float, sigma_max: float, rho: float, first: int = 0
) -> torch.Tensor:
    """Every other sample log-normal, the others on the Karras ramp at 0.7 * `ramp`, `ramp` uniform in [0, 1], shape (B,).

    The authors' mixture: with sigma_max = 80 the others lie in [0.32, 80]. `first` is the place of sample 0 in the global batch,
    so that every split of it draws the same.
    """
    high = karras_sigma(0.7 * ramp, sigma_min, sigma_max, rho)
    odd = torch.arange(first, first + len(noise), device=noise.device) % 2 == 1
    return torch.where(odd, high, draw_lognormal_sigma(noise))
