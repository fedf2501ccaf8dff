# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Exact solutions that can be called: data whose denoiser and trajectories are known, and networks made of them.

A data object has `denoiser(x, t)`, and `jump(x, t, s)` and `g(x, t, s)` where the trajectory is known in closed form.
Formulas are written out here a second time on purpose: nothing below calls the package.
"""

import math
from types import SimpleNamespace

import torch
from torch import nn

from training.objective.times import Times


def levels_like(level, x: torch.Tensor) -> torch.Tensor:
    """`level`, a number or a tensor of shape () or (B,), in the dtype and with the dimensions of `x`."""
    level = torch.as_tensor(level, dtype=x.dtype)
    return level.reshape(-1, *[1] * (x.ndim - 1)) if level.ndim else level


def g_of_jump(x_t, x_s, t, s) -> torch.Tensor:
    """The g for which the jump from `t` to `s` < `t` leads from `x_t` to `x_s`."""
    t, s = levels_like(t, x_t), levels_like(s, x_t)
    return (t * x_s - s * x_t) / (t - s)


class GaussianData:
    """Independent N(mean, std^2): everything is linear in x - mean.

    x_s - mean = (x_t - mean) sqrt((std^2 + s^2) / (std^2 + t^2)), D(x, t) - mean = (x - mean) std^2 / (std^2 + t^2).
    """

    def __init__(self, std: float = 0.5, mean: float | torch.Tensor = 0.0):
        self.std, self.mean = std, mean

    def draw(self, shape, generator=None, dtype=torch.float64) -> torch.Tensor:
        return self.mean + self.std * torch.randn(shape, generator=generator, dtype=dtype)

    def denoiser(self, x, t):
        t = levels_like(t, x)
        return self.mean + (x - self.mean) * self.std**2 / (self.std**2 + t**2)

    def jump(self, x, t, s):
        t, s = levels_like(t, x), levels_like(s, x)
        return self.mean + (x - self.mean) * ((self.std**2 + s**2) / (self.std**2 + t**2)).sqrt()

    def g(self, x, t, s):
        """(x_s - (s/t) x_t) / (1 - s/t) without cancellation: s = t gives the denoiser, s = 0 the jump to 0."""
        t, s = levels_like(t, x), levels_like(s, x)
        variance_t = self.std**2 + t**2
        ratio = ((self.std**2 + s**2) / variance_t).sqrt()
        return self.mean + (x - self.mean) * self.std**2 * (t + s) / (variance_t * (ratio * t + s))


class CorrelatedGaussian:
    """Images whose values, in row-major order, are N(mean, cov): `GaussianData` along each eigenvector of cov."""

    def __init__(self, mean: torch.Tensor, cov: torch.Tensor):
        self.mean, self.cov = mean.double().flatten(), cov.double()
        variances, self.axes = torch.linalg.eigh(self.cov)
        self.along = GaussianData(variances.sqrt())

    def _in_axes(self, function, x, *levels):
        z = (x.double().flatten(1) - self.mean) @ self.axes
        z = function(z, *levels) @ self.axes.T + self.mean
        return z.reshape(x.shape).to(x.dtype)

    def denoiser(self, x, t):
        return self._in_axes(self.along.denoiser, x, t)

    def jump(self, x, t, s):
        return self._in_axes(self.along.jump, x, t, s)

    def g(self, x, t, s):
        return self._in_axes(self.along.g, x, t, s)

    def given(self, a: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and covariance of x given `a` x = `y`, where `a` is a matrix."""
        gain = self.cov @ a.T @ torch.linalg.inv(a @ self.cov @ a.T)
        return self.mean + gain @ (y - a @ self.mean), self.cov - gain @ a @ self.cov


class PixelMixture:
    """Each value independently from a mixture of normals: not linear, but in 1-D the flow keeps the CDF."""

    def __init__(self, weights=(0.3, 0.7), means=(-0.8, 0.5), stds=(0.1, 0.2)):
        as_row = lambda values: torch.tensor(values, dtype=torch.float64)  # noqa: E731
        self.weights, self.means, self.stds = as_row(weights), as_row(means), as_row(stds)

    def _standardized(self, x, t):
        spread = (self.stds**2 + levels_like(t, x.double())[..., None] ** 2).sqrt()
        return (x.double()[..., None] - self.means) / spread, spread

    def draw(self, shape, generator=None) -> torch.Tensor:
        count = math.prod(shape)
        part = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        noise = torch.randn(count, generator=generator, dtype=torch.float64)
        return (self.means[part] + self.stds[part] * noise).reshape(shape)

    def cdf(self, x, t=0.0):
        z, _ = self._standardized(x, t)
        return (self.weights * torch.special.ndtr(z)).sum(-1)

    def denoiser(self, x, t):
        z, spread = self._standardized(x, t)
        posterior = torch.softmax(self.weights.log() - spread.log() - z**2 / 2, dim=-1)
        return (posterior * (self.means + z * self.stds**2 / spread)).sum(-1).to(x.dtype)

    def jump(self, x, t, s):
        """The x_s of the same CDF value, by bisection to the last digits of float64."""
        target = self.cdf(x, t)
        reach = 12 * (levels_like(s, x.double()) + self.stds.max()) + self.means.abs().max()
        low, high = (-reach).expand_as(target).clone(), reach.expand_as(target).clone()
        for _ in range(80):
            middle = (low + high) / 2
            above = self.cdf(middle, s) > target
            low, high = torch.where(above, low, middle), torch.where(above, middle, high)
        return ((low + high) / 2).to(x.dtype)

    def g(self, x, t, s):
        """Like `GaussianData.g`; s = t is the denoiser."""
        t, s = levels_like(t, x.double()), levels_like(s, x.double())
        apart = (t - s) > 1e-9 * t
        if not apart.any():
            return self.denoiser(x, t)
        jumped = (t * self.jump(x.double(), t, s) - s * x.double()) / torch.where(apart, t - s, 1.0)
        return torch.where(apart, jumped, self.denoiser(x.double(), t)).to(x.dtype)


class GaussianMixture:
    """A mixture of normals in R^d with full covariances; x has shape (B, d). Only the denoiser is known."""

    def __init__(self, weights, means, covs):
        self.weights, self.means, self.covs = (torch.as_tensor(v, dtype=torch.float64) for v in (weights, means, covs))
        self.variances, self.axes = torch.linalg.eigh(self.covs)

    def denoiser(self, x, t):
        noisy = self.variances + torch.as_tensor(t, dtype=x.dtype).expand(len(x))[:, None, None] ** 2  # (B, K, d)
        along = torch.einsum("bki,kij->bkj", x[:, None] - self.means, self.axes)
        posterior = torch.softmax(self.weights.log() - 0.5 * (along**2 / noisy + noisy.log()).sum(-1), dim=1)
        means = self.means + torch.einsum("bkj,kij->bki", along * self.variances / noisy, self.axes)
        return (posterior[..., None] * means).sum(1)


class ExactDenoiserNetwork(nn.Module):
    """F of an exact EDM teacher, called as `network(sample, timestep, class_labels=None, return_dict=False)[0]`.

    F = (g - c_skip x) / c_out at x = sample / c_in, with the level read back from `timestep`. With `class_shift` the
    data of class k is shifted by `class_shift[k]`. `calls` records the levels of each call.
    """

    times = 1

    def __init__(self, data=None, sigma_data=0.5, timestep_scale=1.0, size=4, channels=3, class_shift=None):
        super().__init__()
        self.data = GaussianData(sigma_data) if data is None else data
        self.sigma_data, self.timestep_scale, self.class_shift = sigma_data, timestep_scale, class_shift
        num_classes = None if class_shift is None else len(class_shift)
        self.config = SimpleNamespace(sample_size=size, in_channels=channels, num_class_embeds=num_classes)
        self.dtype, self.device = torch.float32, torch.device("cpu")
        self.calls = []

    def level(self, timestep):
        return torch.exp(4 * torch.as_tensor(timestep).double() / self.timestep_scale)

    def forward(self, sample, timestep, target_timestep=None, class_labels=None, return_dict=False):
        assert target_timestep is None or self.times == 2, "this network has one time"
        assert (class_labels is None) == (self.class_shift is None)
        t = self.level(timestep)
        s = t if target_timestep is None else self.level(target_timestep)
        self.calls.append((t, s if target_timestep is not None else None))
        wide_t = levels_like(t, sample.double())
        total = self.sigma_data**2 + wide_t**2
        x = sample.double() * total.sqrt()
        shift = 0.0
        if class_labels is not None:
            shift = levels_like(torch.tensor(self.class_shift)[class_labels], x)
        g = shift + self.data.g(x - shift, t, s)
        model_output = (g - x * self.sigma_data**2 / total) * total.sqrt() / (wide_t * self.sigma_data)
        return (model_output.to(sample.dtype),)


class ExactNetwork(ExactDenoiserNetwork):
    """F of an exact CTM, called as `network(sample, timestep, target_timestep=None, ...)[0]`."""

    times = 2
    has_target_time = True  # by this a pipeline knows a network with two times


class ParametrizedNetwork(nn.Module):
    """What a network of another family gives for exact data, in that family's own words. It may have two times.

    Args:
        kind: "epsilon", "v_prediction" or "sample" (x = sqrt(abar) x_0 + sqrt(1 - abar) n, shown the timestep),
            "flow_prediction" (x = (1 - tau) x_0 + tau n, shown 1000 tau), "score" (images in [0, 1], shown their sigma)
            or "consistency" (shown 250 ln sigma).
        data: with `g`, and for "consistency" `jump`.
        alphas_cumprod: abar of each timestep. Between two, ln((1 - abar) / abar) is linear in the timestep.
        sigma_data, sigma_min: of "consistency".
    """

    def __init__(self, kind, data, alphas_cumprod=None, sigma_data=0.5, sigma_min=0.002):
        super().__init__()
        self.kind, self.data, self.sigma_data, self.sigma_min = kind, data, sigma_data, sigma_min
        if alphas_cumprod is not None:
            self.log_snr = -torch.log((1 - alphas_cumprod.double()) / alphas_cumprod.double())
        self.config = SimpleNamespace(sample_size=4, in_channels=3, num_class_embeds=None)
        self.dtype, self.device = torch.float32, torch.device("cpu")
        self.shown = []

    def level(self, timestep):
        if self.kind == "flow_prediction":
            return timestep / 1000 / (1 - timestep / 1000)
        if self.kind == "score":
            return 2 * timestep
        if self.kind == "consistency":
            return torch.exp(timestep / 250)
        floor = timestep.floor().clamp(0, len(self.log_snr) - 2).long()
        after = timestep - floor
        return torch.exp(-((1 - after) * self.log_snr[floor] + after * self.log_snr[floor + 1]) / 2)

    def forward(self, sample, timestep, target_timestep=None, return_dict=False):
        self.shown.append(timestep)
        timestep, z = torch.as_tensor(timestep).double(), sample.double()
        t = self.level(timestep)
        s = t if target_timestep is None else self.level(torch.as_tensor(target_timestep).double())
        sigma = levels_like(t, z)
        if self.kind == "consistency":
            total = sigma**2 + self.sigma_data**2
            x, above = z * total.sqrt(), sigma - self.sigma_min
            end = self.data.jump(x, t, self.sigma_min)
            skipped = self.sigma_data**2 / (above**2 + self.sigma_data**2) * x
            output = (end - skipped) / (above * self.sigma_data / total.sqrt())
        elif self.kind == "score":
            clean = (self.data.g(2 * z - 1, t, s) + 1) / 2
            output = (clean - z) / (sigma / 2) ** 2
        elif self.kind == "flow_prediction":
            tau = levels_like(timestep / 1000, z)
            clean = self.data.g(z / (1 - tau), t, s)
            output = (z - (1 - tau) * clean) / tau - clean
        else:
            abar = 1 / (1 + sigma**2)
            clean = self.data.g(z / abar.sqrt(), t, s)
            noise = (z - abar.sqrt() * clean) / (1 - abar).sqrt()
            velocity = abar.sqrt() * noise - (1 - abar).sqrt() * clean
            output = {"epsilon": noise, "v_prediction": velocity, "sample": clean}[self.kind]
        return (output.to(sample.dtype),)


class ParametrizedCTM(ParametrizedNetwork):
    """Likewise with two times: the exact CTM in that parametrization."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.has_target_time = True


class AverageVelocityNetwork(nn.Module):
    """u(z, tau_t, tau_s) of an exact flow map of `GaussianData`, shown `scale` times both times, each in [0, 1].

    z = (1 - tau) x_0 + tau n is N((1 - tau) mean, v), v = (1 - tau)^2 std^2 + tau^2, and the flow keeps
    (z - (1 - tau) mean) / sqrt(v). u = (z_t - z_s) / (tau_t - tau_s) without cancellation: tau_s = tau_t is the
    velocity, and 0 and 1 are times as others.
    """

    has_target_time = True

    def __init__(self, data, scale=1000.0):
        super().__init__()
        self.data, self.scale = data, scale
        self.config = SimpleNamespace(sample_size=4, in_channels=3, num_class_embeds=None)
        self.dtype, self.device = torch.float32, torch.device("cpu")

    def forward(self, sample, timestep, target_timestep=None, return_dict=False):
        z, variance = sample.double(), self.data.std**2
        target_timestep = timestep if target_timestep is None else target_timestep
        tau, end = (levels_like(time, z) / self.scale for time in (timestep, target_timestep))
        v, v_end = ((1 - time) ** 2 * variance + time**2 for time in (tau, end))
        slope = (tau + end - (2 - tau - end) * variance) / (v + (v * v_end).sqrt())
        return ((slope * (z - (1 - tau) * self.data.mean) - self.data.mean).to(sample.dtype),)


def randn(*shape, seed=0, dtype=torch.float64) -> torch.Tensor:
    """Normal values that depend on `seed` alone."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def sampling_loop(scheduler, network, x, generator=None, callback=None):
    """The loop of a user of the schedulers; a network with two times is asked for both."""
    targets = getattr(scheduler, "target_timesteps", [None] * len(scheduler.timesteps))
    for timestep, target in zip(scheduler.timesteps, targets, strict=True):
        times = (timestep,) if target is None else (timestep, target)
        model_output = network(scheduler.scale_model_input(x, timestep), *times, return_dict=False)[0]
        output = scheduler.step(model_output, timestep, x, generator=generator)
        x = output.prev_sample
        if callback is not None:
            callback(output)
    return x


def grid_times(grid: torch.Tensor, t: list[int], u: list[int], s: list[int]) -> Times:
    """The times of samples whose t, u, s are these entries of the descending `grid`; u - t is the same for all."""
    t, u, s = (torch.as_tensor(index) for index in (t, u, s))
    (steps,) = set((u - t).tolist())
    return Times(grid[t + torch.arange(steps + 1)[:, None]], grid[s], grid[-1].item())
