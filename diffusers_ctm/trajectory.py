# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""The mathematics of consistency trajectory models, once.

Letters are the paper's (Kim et al., ICLR 2024, arXiv 2310.02279): `t`, `s`, `sigma` are noise levels (standard deviations
of the added noise, in units of the data), `x_t` is a sample at level `t`. What a network is shown is never a noise level but
`c_noise(level)`, called `timestep`. Every function is pure, works in the dtype of its tensors and broadcasts; levels of shape
(B,) are brought to the shape of a sample by `append_dims`.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


PREDICTION_TYPES = ("edm",)


def append_dims(level: torch.Tensor, ndim: int) -> torch.Tensor:
    """View `level` of shape (B,) or () so that it broadcasts against a sample with `ndim` dimensions."""
    return level.reshape(level.shape + (1,) * (ndim - level.ndim)) if level.ndim else level


def karras_sigma(
    ramp: torch.Tensor, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0
) -> torch.Tensor:
    """Noise level at `ramp` in [0, 1]: 0 gives sigma_max, 1 gives sigma_min (Karras et al. 2022, Eq. 5)."""
    max_root, min_root = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return (max_root + ramp * (min_root - max_root)) ** rho


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
    sigmas = karras_sigma(torch.linspace(0, 1, num_levels, dtype=torch.float64), sigma_min, sigma_max, rho)
    sigmas[0] = sigma_max
    if num_levels > 1:
        sigmas[-1] = sigma_min
    return sigmas.to(device=device, dtype=dtype)


def c_noise(sigma: torch.Tensor | float, timestep_scale: float = 1.0) -> torch.Tensor:
    """What the network is shown of a noise level: timestep_scale * ln(sigma) / 4.

    timestep_scale = 1 is NVIDIA's EDM (Karras et al. 2022, Table 1), 1000 the OpenAI / consistency / CTM family.
    sigma = 0 gives -inf: no network sees a level below sigma_min.
    """
    return timestep_scale / 4 * torch.log(torch.as_tensor(sigma))


def sigma_of_c_noise(timestep: torch.Tensor | float, timestep_scale: float = 1.0) -> torch.Tensor:
    """The noise level of which `timestep` is the c_noise. Inverse of `c_noise`."""
    return torch.exp(torch.as_tensor(timestep) * (4 / timestep_scale))


def scalings(
    sigma: torch.Tensor, sigma_data: float = 0.5, prediction_type: str = "edm"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(c_skip, c_out, c_in), so that g = c_skip x + c_out F(c_in x). Each has the shape of `sigma`.

    "edm" is Karras et al. 2022, Table 1: input and target of F have unit variance at every level.
    """
    if prediction_type != "edm":
        raise ValueError(f"prediction_type={prediction_type!r} is not known; use one of {PREDICTION_TYPES}.")
    total = sigma**2 + sigma_data**2
    return sigma_data**2 / total, sigma * sigma_data / total.sqrt(), 1 / total.sqrt()


def edm_loss_weight(sigma: torch.Tensor, sigma_data: float = 0.5) -> torch.Tensor:
    """1 / c_out^2: the weight of |D - x_0|^2 that makes the loss of F uniform over levels (Karras et al. 2022, Table 1)."""
    return (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2


def jump(x_t: torch.Tensor, g: torch.Tensor, t: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """G(x_t, t, s) = (s/t) x_t + (1 - s/t) g, the state at level `s` <= `t` of the trajectory through x_t (CTM, Eq. 5).

    s = t returns x_t, s = 0 returns g. With g(x_t, t, t), the denoiser, it is one Euler step of the probability-flow ODE.
    """
    t, s = append_dims(t, x_t.ndim), append_dims(s, x_t.ndim)
    ratio = s / t
    return ratio * x_t + (1 - ratio) * g


def g_of_jump(x_t: torch.Tensor, x_s: torch.Tensor, t: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """The g for which `jump(x_t, g, t, s)` is `x_s`; `s` < `t`. Inverse of `jump`."""
    t, s = append_dims(t, x_t.ndim), append_dims(s, x_t.ndim)
    return (t * x_s - s * x_t) / (t - s)


def gamma_split(
    t_next: torch.Tensor, gamma: torch.Tensor | float, sigma_min: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Level s to jump to and standard deviation of the noise that leads from there up to `t_next` (CTM, Algorithm 3).

    s = sigma_min + sqrt(1 - gamma^2) (t_next - sigma_min) and s^2 + std^2 = t_next^2. gamma = 0 jumps to t_next and adds
    nothing (the ODE), gamma = 1 jumps to sigma_min and renoises (consistency-model multistep). The paper's text is the limit
    sigma_min -> 0.
    """
    gamma = torch.as_tensor(gamma, dtype=t_next.dtype, device=t_next.device)
    s = sigma_min + (1 - gamma**2).sqrt() * (t_next - sigma_min)
    s = torch.where(gamma == 0, t_next, s)  # to the last digit
    return s, ((t_next - s) * (t_next + s)).clamp(min=0).sqrt()


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


@dataclass(frozen=True)
class Preconditioning:
    """The numbers that turn a raw network F into g, D and G. They live in a scheduler's config and nowhere else.

    Args:
        sigma_data: standard deviation of the data.
        timestep_scale: the network is shown timestep_scale * ln(level) / 4.
        prediction_type: what F predicts, one of `PREDICTION_TYPES`.
    """

    sigma_data: float = 0.5
    timestep_scale: float = 1.0
    prediction_type: str = "edm"

    @classmethod
    def from_config(cls, config: Mapping) -> "Preconditioning":
        """Read it from `scheduler.config`."""
        return cls(config["sigma_data"], config["timestep_scale"], config["prediction_type"])

    def g(
        self, network: Callable, x_t: torch.Tensor, t: torch.Tensor, s: torch.Tensor | None = None, **condition
    ) -> torch.Tensor:
        """g(x_t, t, s) = c_skip(t) x_t + c_out(t) F(c_in(t) x_t, c_noise(t), c_noise(s)) (CTM, Eq. 6).

        Args:
            network: F, called as `network(sample, timestep, [target_timestep,] **condition, return_dict=False)[0]`.
            x_t: samples, shape (B, ...).
            t: levels, shape (B,) or ().
            s: levels <= t; None is s = t, the denoiser, and works with a network that has no second time.
        """
        c_skip, c_out, c_in = scalings(append_dims(t, x_t.ndim), self.sigma_data, self.prediction_type)
        times = [c_noise(level, self.timestep_scale) for level in ((t,) if s is None else (t, s))]
        model_output = network(c_in * x_t, *times, **condition, return_dict=False)[0]
        return c_skip * x_t + c_out * model_output.to(x_t.dtype)

    def denoise(self, network: Callable, x_t: torch.Tensor, t: torch.Tensor, **condition) -> torch.Tensor:
        """D(x_t, t) = g(x_t, t, t), the minimum mean squared error estimate of the clean sample."""
        return self.g(network, x_t, t, None, **condition)

    def jump(self, network: Callable, x_t: torch.Tensor, t: torch.Tensor, s: torch.Tensor, **condition) -> torch.Tensor:
        """G(x_t, t, s), one evaluation of `network`."""
        return jump(x_t, self.g(network, x_t, t, s, **condition), t, s)


def check_positive(**values: float) -> None:
    """Raise ValueError naming the first argument that is not a positive finite number."""
    for name, value in values.items():
        if not (isinstance(value, (int, float)) and math.isfinite(value) and value > 0):
            raise ValueError(f"{name} must be a positive number, got {value!r}.")
