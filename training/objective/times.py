"""Which (t, u, s) a step asks about."""

from dataclasses import dataclass

import torch

from diffusers_ctm.trajectory import karras_sigma


@dataclass
class Times:
    """The times of a batch, and the paths that the teacher's solver takes for them.

    On the CPU, so that the host knows which jumps are identities without waiting for a device; levels in float64. Sample i uses
    path i // R, with R = B / P samples per path.

    Args:
        t, u, s: levels, shape (B,), t > u >= s >= end.
        path: levels of P paths, shape (K + 1, P), descending; a path shorter than K stays at its last level.
        steps: number of steps of each path, int64, shape (P,), from 1 to K.
        first, last: rows of `path` that hold t and u, int64, shape (B,). With R = 1 they are 0 and `steps`.
        end: sigma_min.
    """

    t: torch.Tensor
    u: torch.Tensor
    s: torch.Tensor
    path: torch.Tensor
    steps: torch.Tensor
    first: torch.Tensor
    last: torch.Tensor
    end: float

    @property
    def per_path(self) -> int:
        """R, samples per path."""
        return len(self.t) // len(self.steps)

    @property
    def outer(self) -> torch.Tensor:
        """Indices of the samples whose jump from s to sigma_min is none of the identity."""
        return (self.s > self.end).nonzero().flatten()

    @property
    def inner(self) -> torch.Tensor:
        """Indices of the samples whose jump from u to s is none of the identity."""
        return (self.u > self.s).nonzero().flatten()

    def __getitem__(self, rows: slice) -> "Times":
        """The times of some samples, with whole paths."""
        paths = slice(rows.start // self.per_path, rows.stop // self.per_path)
        samples = {name: getattr(self, name)[rows] for name in ("t", "u", "s", "first", "last")}
        return Times(**samples, path=self.path[:, paths], steps=self.steps[paths], end=self.end)


@dataclass(frozen=True)
class TimeSampler:
    """Draws the times of training steps (CTM, Section 3.1).

    Places are counted in steps of the Karras grid: 0 is sigma_max, num_levels - 1 is sigma_min. The solver goes k steps from t down to
    u; t is uniform over the places from which that stays on the grid. Then

    - "soft": s is uniform over the places from u down to sigma_min, both included;
    - "local": the same with k = 1;
    - "global": s = u.

    Args:
        num_levels, sigma_min, sigma_max, rho: the grid.
        matching: as above.
        max_steps: largest k.
        distribution: P(k) ~ k ("weighted", the authors') or P(k) equal ("uniform"), k in 1..max_steps.
        per_sample: one k for each path instead of one for the whole batch.
        continuous: t and s between the levels of the grid too. Their distribution is the one above with the rounding to whole places
            left out: the two ends keep a probability of their own, so that sigma_max and s = sigma_min are drawn as such.
        per_path: R, samples that share a path. The first of them goes from its start to its end, the others along a part of it:
            k' in 1..k from the same distribution, from a uniform place on.
        substeps: steps of the solver per step of the grid.
    """

    num_levels: int
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    matching: str = "soft"
    max_steps: int = 1
    distribution: str = "weighted"
    per_sample: bool = False
    continuous: bool = False
    per_path: int = 1
    substeps: int = 1

    def level(self, place: torch.Tensor) -> torch.Tensor:
        """The noise level at a place, float64; the ends are exact."""
        last = self.num_levels - 1
        level = karras_sigma(place.double() / last, self.sigma_min, self.sigma_max, self.rho)
        level = torch.where(place == 0, self.sigma_max, level)
        return torch.where(place == last, self.sigma_min, level)

    def draw(self, batch_size: int, generator: torch.Generator) -> Times:
        """The times of `batch_size` samples, a multiple of `per_path`."""
        num_paths, last_place = batch_size // self.per_path, self.num_levels - 1
        most = torch.tensor([1 if self.matching == "local" else self.max_steps])
        k = self._draw_steps(most.expand(num_paths if self.per_sample else 1), generator).expand(num_paths)
        start = self._draw_places(torch.zeros(num_paths), last_place - k, generator)

        k_sample, offset = k, torch.zeros(num_paths, dtype=torch.long)
        if self.per_path > 1:
            k, start = k.repeat_interleave(self.per_path), start.repeat_interleave(self.per_path)
            whole = torch.arange(batch_size) % self.per_path == 0
            k_sample = torch.where(whole, k, self._draw_steps(k, generator))
            offset = (torch.rand(batch_size, generator=generator, dtype=torch.float64) * (k - k_sample + 1)).long()
        u = start + offset + k_sample
        s = u
        if self.matching != "global":
            s = self._draw_places(u, torch.full_like(u, last_place), generator)

        steps, start = k[:: self.per_path], start[:: self.per_path]
        rows = torch.arange(int(steps.max()) * self.substeps + 1, dtype=torch.float64)
        progress = rows[:, None] / self.substeps
        path = self.level(start + torch.minimum(progress, steps))
        first, last = offset * self.substeps, (offset + k_sample) * self.substeps
        of_path = torch.arange(batch_size) // self.per_path
        level_t, level_u = path[first, of_path], path[last, of_path]
        level_s = torch.where(s == u, level_u, self.level(s))  # to the last digit: the jump is then left out
        return Times(level_t, level_u, level_s, path, steps * self.substeps, first, last, self.sigma_min)

    def draw_to_end(self, batch_size: int, generator: torch.Generator) -> Times:
        """t as for k = 1, u = s = sigma_min in one step: the jumps that a consistency model teaches."""
        last_place = torch.full((batch_size,), self.num_levels - 1.0)
        t = self.level(self._draw_places(torch.zeros(batch_size), last_place - 1, generator))
        end = self.level(last_place)
        steps, first = torch.ones(batch_size, dtype=torch.long), torch.zeros(batch_size, dtype=torch.long)
        return Times(t, end, end, torch.stack([t, end]), steps, first, steps, self.sigma_min)

    def _draw_steps(self, most: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """k in 1..most for each entry of `most`."""
        k = torch.arange(1, self.max_steps + 1)
        weights = torch.ones(len(k)) if self.distribution == "uniform" else k.float()
        weights = torch.where(k <= most[:, None], weights, 0.0)
        return torch.multinomial(weights, 1, generator=generator).flatten() + 1

    def _draw_places(self, first: torch.Tensor, last: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Uniform over the places from `first` to `last`, both included, float64."""
        number = last - first + 1
        ahead = torch.rand(len(first), generator=generator, dtype=torch.float64) * number
        return torch.clamp(first - 0.5 + ahead, first, last) if self.continuous else first + ahead.floor()


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
