# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""The times (t, u, s) that a step asks about, and the noise levels of score matching."""

from dataclasses import dataclass

import torch

from diffusers_ctm.trajectory import karras_sigma

from ..cli.options import option
from ..cli.training_options import GridOptions


@dataclass
class TimeOptions(GridOptions):
    """The times t, u and s of the trajectory loss."""

    matching: str = option(
        "soft",
        "Where the solver stops: 'soft' (u between s and t), 'local' (one grid step below t) or 'global' (u = s).",
        ["soft", "local", "global"],
    )
    max_solver_steps: int | None = option(
        None,
        "Most grid steps M that the teacher's solver takes in one iteration; 'local' always takes one, and 'global' "
        "learns no longer jump. Default: N - 1.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.matching == "local":
            self.refuse(["max_solver_steps"], "does not go with --matching local, whose solver takes one step")
        most = self.num_train_timesteps - 1
        fits = self.max_solver_steps is None or 1 <= self.max_solver_steps <= most
        self.check(fits, "max_solver_steps", f"in 1..{most} (num_train_timesteps - 1)")


@dataclass
class Times:
    """The times of a batch: t and u are the ends of the paths that the solver goes, s is where the student jumps to.

    They lie on the CPU, so that the host knows which jumps are identities without waiting for a device; levels in
    float64.

    Args:
        path: levels of each sample from t down to u in k steps, shape (k + 1, B).
        s: levels, shape (B,), with u >= s >= end.
        end: sigma_min.
    """

    path: torch.Tensor
    s: torch.Tensor
    end: float

    @property
    def t(self) -> torch.Tensor:
        return self.path[0]

    @property
    def u(self) -> torch.Tensor:
        return self.path[-1]

    @property
    def solver_steps(self) -> int:
        """k."""
        return len(self.path) - 1

    @property
    def outer(self) -> torch.Tensor:
        """Indices of the samples whose jump from s to sigma_min is not the identity."""
        return (self.s > self.end).nonzero().flatten()

    @property
    def inner(self) -> torch.Tensor:
        """Indices of the samples whose jump from u to s is not the identity."""
        return (self.u > self.s).nonzero().flatten()

    def __getitem__(self, samples: slice) -> "Times":
        return Times(self.path[:, samples], self.s[samples], self.end)


@dataclass(frozen=True)
class TimeSampler:
    """Draws the times of training steps (CTM, Section 3.1).

    Places are counted in steps of the Karras grid: 0 is sigma_max, num_levels - 1 is sigma_min. The solver goes k steps
    from t down to u, with P(k) ~ k as the authors draw it, one k for the whole batch. t is uniform over the places from
    which that stays on the grid.

    - "soft": s is uniform over the places from u down to sigma_min, both included;
    - "local": the same with k = 1;
    - "global": s = u.

    Args:
        num_levels, sigma_min, sigma_max, rho: the grid.
        matching: as above.
        max_steps: largest k; None is all steps of the grid.
    """

    num_levels: int
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    matching: str = "soft"
    max_steps: int | None = None

    @property
    def last_place(self) -> int:
        return self.num_levels - 1

    @property
    def most(self) -> int:
        """M, the largest k."""
        return 1 if self.matching == "local" else self.max_steps or self.last_place

    def level(self, place: torch.Tensor) -> torch.Tensor:
        """The noise level at a place, float64; the ends are exact."""
        level = karras_sigma(place.double() / self.last_place, self.sigma_min, self.sigma_max, self.rho)
        level = torch.where(place == 0, self.sigma_max, level)
        return torch.where(place == self.last_place, self.sigma_min, level)

    def draw(self, batch_size: int, generator: torch.Generator) -> Times:
        """The times of `batch_size` samples."""
        weights = torch.arange(1, self.most + 1).float()
        k = torch.multinomial(weights, 1, generator=generator) + 1
        start = self._draw_places(torch.zeros(batch_size), self.last_place - k, generator)
        path = self.level(start + torch.arange(int(k) + 1)[:, None])
        s = path[-1]
        if self.matching != "global":
            u_place = start + k
            s_place = self._draw_places(u_place, self.last_place, generator)
            s = torch.where(
                s_place == u_place, s, self.level(s_place)
            )  # equal to the last digit: the jump is then left out
        return Times(path, s, self.sigma_min)

    def draw_to_end(self, batch_size: int, generator: torch.Generator) -> Times:
        """t as for k = 1, and one step from it to u = s = sigma_min: the jumps that a consistency model teaches."""
        t = self.level(self._draw_places(torch.zeros(batch_size), self.last_place - 1, generator))
        end = torch.full_like(t, self.sigma_min)
        return Times(torch.stack([t, end]), end, self.sigma_min)

    def _draw_places(self, first: torch.Tensor, last: int | torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Uniform over the places from `first` to `last`, both included, float64."""
        number = last - first + 1
        return first + (torch.rand(len(first), generator=generator, dtype=torch.float64) * number).floor()


def draw_lognormal_sigma(noise: torch.Tensor, p_mean: float = -1.2, p_std: float = 1.2) -> torch.Tensor:
    """exp(p_mean + p_std * noise) for standard normal `noise` of shape (B,) (Karras et al. 2022, Table 1)."""
    return torch.exp(p_mean + p_std * noise)


def draw_half_lognormal_sigma(
    noise: torch.Tensor, ramp: torch.Tensor, sigma_min: float, sigma_max: float, rho: float, first: int = 0
) -> torch.Tensor:
    """Every other sample log-normal, the others on the Karras ramp at 0.7 * `ramp`, `ramp` uniform in [0, 1], shape
    (B,).

    The authors' mixture: with sigma_max = 80 the others lie in [0.32, 80]. `first` is the place of sample 0 in the
    global batch, so that every split of it draws the same.
    """
    high = karras_sigma(0.7 * ramp, sigma_min, sigma_max, rho)
    odd = torch.arange(first, first + len(noise), device=noise.device) % 2 == 1
    return torch.where(odd, high, draw_lognormal_sigma(noise))
