# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""The mathematics, once: levels of Karras and of flows and their inverses, jump, gamma, renoise, Heun."""

from collections.abc import Callable

import torch


# The noise level that stands for infinity, where x / t is unit noise. 1 + 2^60 is 2^60 in float64 and a power of two
# rounds nothing, so that formulas take their limits to the last bit: x / (1 + t) is the noise n, and (s/t) x is s n.
PURE_NOISE = 2.0**60


def append_dims(level: torch.Tensor, ndim: int) -> torch.Tensor:
    """View `level` of shape (B,) or () so that it broadcasts against a sample with `ndim` dimensions."""
    return level.reshape(level.shape + (1,) * (ndim - level.ndim)) if level.ndim else level


def as_level(value: torch.Tensor | float) -> torch.Tensor:
    """`value` as a float tensor: a tensor stays where it is, a number goes to the CPU, whatever the default device."""
    value = value if isinstance(value, torch.Tensor) else torch.as_tensor(value, device="cpu")
    return value if value.is_floating_point() else value.float()


def karras_sigma(
    ramp: torch.Tensor, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0
) -> torch.Tensor:
    """Noise level at `ramp` in [0, 1]: 0 gives sigma_max, 1 gives sigma_min (Karras et al. 2022, Eq. 5)."""
    max_root, min_root = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return (max_root + ramp * (min_root - max_root)) ** rho


def karras_ramp(sigma: float, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> float:
    """The place in [0, 1] of the noise level `sigma` on the Karras ramp. Inverse of `karras_sigma`."""
    top, bottom = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return (top - sigma ** (1 / rho)) / (top - bottom)


def karras_sigmas(
    num_levels: int,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """`num_levels` noise levels from sigma_max down to sigma_min, shape (num_levels,); the ends are exact.

    With `num_levels = 1` it is sigma_max alone. Computed in float64 (Karras et al. 2022, Eq. 5).
    """
    ramp = torch.linspace(0, 1, num_levels, dtype=torch.float64, device="cpu")  # whatever the default device
    sigmas = karras_sigma(ramp, sigma_min, sigma_max, rho)
    sigmas[-1] = sigma_min
    sigmas[0] = sigma_max  # last: with one level both are the same
    return sigmas.to(device=device, dtype=dtype)


def karras_starts(
    num_steps: int, end: float, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0
) -> torch.Tensor:
    """Noise levels at which each of `num_steps` steps from sigma_max to `end` starts, shape (num_steps,), float64.

    The steps are those of the Karras schedule from sigma_max to `end`. With `end = 0`, where that schedule has no
    levels, it ends at sigma_min and the last step leads from there to 0, as in Karras et al. 2022, Algorithm 1; a
    single step leads from sigma_max.
    """
    if num_steps == 1:
        return torch.tensor([sigma_max], dtype=torch.float64, device="cpu")
    if end == 0:
        return karras_sigmas(num_steps, sigma_min, sigma_max, rho, dtype=torch.float64)
    return karras_sigmas(num_steps + 1, end, sigma_max, rho, dtype=torch.float64)[:-1]


def flow_level(place: torch.Tensor, shift: float = 1.0) -> torch.Tensor:
    """Noise level at `place` in [0, 1] of a flow's times, t = shift * place / (1 - place): 0 is 0, 1 is PURE_NOISE.

    Without shift the place is the time tau = t / (1 + t) itself; diffusers' shift takes tau to
    shift tau / (1 + (shift - 1) tau).
    """
    return (shift * place / (1 - place)).clamp(max=PURE_NOISE)


def flow_place(level: torch.Tensor, shift: float = 1.0) -> torch.Tensor:
    """The place in [0, 1] of a noise level among a flow's times. Inverse of `flow_level`."""
    return level / (shift + level)


def jump(x_t: torch.Tensor, g: torch.Tensor, t: torch.Tensor | float, s: torch.Tensor | float) -> torch.Tensor:
    """G(x_t, t, s) = (s/t) x_t + (1 - s/t) g, the state at level `s` <= `t` of the trajectory through x_t (CTM, Eq. 5).

    s = t returns x_t, s = 0 returns g. With g(x_t, t, t), the denoiser, it is one Euler step of the probability-flow
    ODE.
    """
    ratio = s / t
    if isinstance(ratio, torch.Tensor):
        ratio = append_dims(ratio, x_t.ndim)
    return ratio * x_t + (1 - ratio) * g


def gamma_split(
    t_next: torch.Tensor, gamma: torch.Tensor | float, sigma_min: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Level s to jump to and standard deviation of the noise that leads from there up to `t_next` (CTM, Algorithm 3).

    s = sigma_min + sqrt(1 - gamma^2) (t_next - sigma_min) and s^2 + std^2 = t_next^2. gamma = 0 jumps to t_next and
    adds nothing (the ODE), gamma = 1 jumps to sigma_min and renoises (consistency-model multistep). The paper's text is
    the limit sigma_min -> 0.
    """
    gamma = torch.as_tensor(gamma, dtype=t_next.dtype, device=t_next.device)
    s = sigma_min + (1 - gamma**2).sqrt() * (t_next - sigma_min)
    s = torch.where(gamma == 0, t_next, s)  # to the last digit
    return s, ((t_next - s) * (t_next + s)).clamp(min=0).sqrt()


def gamma_of_split(t_next: torch.Tensor, s: torch.Tensor, sigma_min: float) -> torch.Tensor:
    """The gamma in [0, 1] for which `gamma_split` jumps to `s`, sigma_min <= s <= t_next. Its inverse.

    0 where t_next <= sigma_min, at which every gamma does the same.
    """
    room = t_next - sigma_min
    ratio = torch.where(room > 0, (s - sigma_min) / torch.where(room > 0, room, 1.0), 1.0)
    return (1 - ratio.clamp(0, 1) ** 2).sqrt()


def heun_step(
    denoiser: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    x_t: torch.Tensor,
    t: torch.Tensor,
    t_next: torch.Tensor,
) -> torch.Tensor:
    """One step of Heun's method along dx/dt = (x - D(x, t)) / t, two evaluations (Karras et al. 2022, Algorithm 1).

    `t` and `t_next` are levels > 0 of shape (B,) or (). The step may go up or down.
    """
    t_x, t_next_x = append_dims(t, x_t.ndim), append_dims(t_next, x_t.ndim)
    slope = (x_t - denoiser(x_t, t)) / t_x
    x_next = x_t + (t_next_x - t_x) * slope
    slope_next = (x_next - denoiser(x_next, t_next)) / t_next_x
    return x_t + (t_next_x - t_x) * (slope + slope_next) / 2
