# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""The times (t, u, s) that a step asks about, and the noise levels of score matching."""

from dataclasses import dataclass

import torch

from diffusers_ctm.trajectory import karras_sigma

from ..cli.options import option
from ..cli.training_options import GridOptions


SHARE_AT_END = 0.3  # of the jumps between the levels


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
        self.check(
            self.max_solver_steps is None or 1 <= self.max_solver_steps <= most,
            "max_solver_steps",
            f"in 1..{most} (num_train_timesteps - 1)",
        )


@dataclass
class Times:
    """The times of a batch: t and u are the ends of the paths that the solver goes, s is where the student jumps to.

    They lie on the CPU, so that the host knows which jumps are identities without waiting for a device; levels in
    float64.

    Args:
        path: levels of each sample from t down to u in k steps, shape (k + 1, B).
        s: levels, shape (B,), with u >= s >= end.
        end: sigma_min.
        places: of `path` on the grid, int64 of shape (k + 1, B); None if times lie between the levels.
    """

    path: torch.Tensor
    s: torch.Tensor
    end: float
    places: torch.Tensor | None = None

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
        places = None if self.places is None else self.places[:, samples]
        return Times(self.path[:, samples], self.s[samples], self.end, places)


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
        """The times of `batch_size` samples for a solver: one k for all of them."""
        weights = torch.arange(1, self.most + 1).float()
        k = torch.multinomial(weights, 1, generator=generator) + 1
        start = self._draw_places(torch.zeros(batch_size), self.last_place - k, generator)
        return self._on_grid(start + torch.arange(int(k) + 1)[:, None], generator)

    def draw_known(self, first: torch.Tensor, generator: torch.Generator) -> Times:
        """The times of samples whose trajectories are known from the places `first` on, shape (B,): a k for each.

        The path has t and u only.
        """
        most = (self.last_place - first).clamp(max=self.most).double()
        # The inverse of P(K <= k) = k (k + 1) / (most (most + 1)).
        share = torch.rand(len(first), generator=generator, dtype=torch.float64) * most * (most + 1)
        k = (((1 + 4 * share).sqrt() - 1) / 2).ceil().clamp(min=1).minimum(most)
        start = self._draw_places(first, self.last_place - k, generator)
        return self._on_grid(torch.stack([start, start + k]), generator)

    def draw_between(self, batch_size: int, generator: torch.Generator) -> Times:
        """Times between the levels: t and s uniform on the ramp, u uniform between them.

        s is sigma_min for a share of `SHARE_AT_END` of the samples: the jumps that one step of sampling takes.
        """
        unit = torch.rand(3, batch_size, generator=generator, dtype=torch.float64)
        at_end = torch.rand(batch_size, generator=generator) < SHARE_AT_END
        t, s = unit[:2].sort(dim=0).values * self.last_place
        s = torch.where(at_end, self.last_place, s)
        u = t + unit[2] * (s - t)
        return Times(self.level(torch.stack([t, u])), self.level(s), self.sigma_min)

    def _on_grid(self, places: torch.Tensor, generator: torch.Generator) -> Times:
        """Times along `places`, shape (k + 1, B), with s drawn below."""
        path = self.level(places)
        s = path[-1]
        if self.matching != "global":
            s_place = self._draw_places(places[-1], self.last_place, generator)
            # Where s is u, it is equal to the last digit: the jump is then left out.
            s = torch.where(s_place == places[-1], s, self.level(s_place))
        return Times(path, s, self.sigma_min, places.long())

    def draw_to_end(self, batch_size: int, generator: torch.Generator) -> Times:
        """t as for k = 1, and one step from it to u = s = sigma_min: the jumps that a consistency model teaches."""
        t = self.level(self._draw_places(torch.zeros(batch_size), self.last_place - 1, generator))
        end = torch.full_like(t, self.sigma_min)
        return Times(torch.stack([t, end]), end, self.sigma_min)

    def _draw_places(self, first: torch.Tensor, last: int | torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Uniform over the places from `first` to `last`, both included, float64."""
        return first + (torch.rand(len(first), generator=generator, dtype=torch.float64) * (last - first + 1)).floor()


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
