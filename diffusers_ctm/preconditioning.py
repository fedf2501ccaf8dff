# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""From a raw network to g, D and G, for each kind of prediction."""

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields

import torch
from diffusers import DDPMScheduler

from .checks import check_steps
from .trajectory import append_dims, as_level, jump


DISCRETE_TYPES = ("epsilon", "v_prediction", "sample")  # of a diffusion in discrete steps, whose levels its betas give

PREDICTION_TYPES = ("edm", *DISCRETE_TYPES, "flow_prediction", "score", "consistency")


def c_noise(sigma: torch.Tensor | float, timestep_scale: float = 1.0) -> torch.Tensor:
    """What the network is shown of a noise level: timestep_scale * ln(sigma) / 4.

    timestep_scale = 1 is NVIDIA's EDM (Karras et al. 2022, Table 1), 1000 the OpenAI / consistency / CTM family.
    sigma = 0 gives -inf: no network sees a level below sigma_min.
    """
    return timestep_scale / 4 * torch.log(as_level(sigma))


def sigma_of_c_noise(timestep: torch.Tensor | float, timestep_scale: float = 1.0) -> torch.Tensor:
    """The noise level of which `timestep` is the c_noise. Inverse of `c_noise`."""
    return torch.exp(as_level(timestep) * (4 / timestep_scale))


def discrete_levels(
    num_diffusion_timesteps: int = 1000,
    beta_start: float = 0.0001,
    beta_end: float = 0.02,
    beta_schedule: str | None = "linear",
    trained_betas: tuple[float, ...] | None = None,
    rescale_betas_zero_snr: bool = False,
) -> torch.Tensor:
    """Noise levels sqrt((1 - abar) / abar) of the timesteps 0, 1, 2, ... of a DDPM, ascending, float64 on the CPU.

    Arguments, betas and abar are those of diffusers' `DDPMScheduler`, its rounding to float32 included: networks were trained
    with it. With `rescale_betas_zero_snr` the last timestep is pure noise, has no finite level and is left out. Raises
    ValueError if the levels do not rise or are fewer than two.
    """
    if trained_betas is None:
        check_steps(num_diffusion_timesteps=num_diffusion_timesteps)
    try:
        scheduler = DDPMScheduler(
            num_train_timesteps=num_diffusion_timesteps,
            beta_start=beta_start,
            beta_end=beta_end,
            beta_schedule=beta_schedule,
            trained_betas=None if trained_betas is None else list(trained_betas),
            rescale_betas_zero_snr=rescale_betas_zero_snr,
        )
    except NotImplementedError as error:
        raise ValueError(
            f"beta_schedule={beta_schedule!r} is not known; use 'linear', 'scaled_linear', 'squaredcos_cap_v2', 'sigmoid' or 'laplace'."
        ) from error
    except (TypeError, RuntimeError) as error:  # of what is no number
        raise ValueError(f"beta_start={beta_start!r} and beta_end={beta_end!r} make no betas.") from error
    alphas_cumprod = scheduler.alphas_cumprod.double()
    levels = ((1 - alphas_cumprod) / alphas_cumprod).sqrt()
    levels = levels[levels.isfinite()]
    if len(levels) < 2 or not (levels[0] > 0 and (levels.diff() > 0).all()):
        raise ValueError("The betas must make two or more noise levels that rise with the timestep.")
    return levels


def condition(class_labels: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """Keyword arguments that show a network its classes, of shape (B,); none without classes."""
    return {} if class_labels is None else {"class_labels": class_labels}


@functools.lru_cache(maxsize=64)
def _log_levels(process: tuple, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """ln of `discrete_levels(*process)`, kept: training asks at every step."""
    with torch.inference_mode(False), torch.device("cpu"):  # whoever asks first
        return discrete_levels(*process).log().to(device=device, dtype=dtype)


def scalings(
    sigma: torch.Tensor, sigma_data: float = 0.5, prediction_type: str = "edm", sigma_min: float = 0.002
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(c_skip, c_out, c_in), so that g = c_skip x + c_out F(c_in x). Each has the shape of `sigma`.

    The state x = x_0 + sigma n is variance exploding for all of them. What F predicts, by `prediction_type`:

    - "edm": F of Karras et al. 2022, Table 1; its input and target have unit variance at every level.
    - "epsilon": the noise n, from x / sqrt(1 + sigma^2), as DDPM does (Ho et al. 2020). Its errors reach g times sigma.
    - "v_prediction": alpha n - sqrt(1 - alpha^2) x_0 with alpha = 1 / sqrt(1 + sigma^2), from the same input (Salimans & Ho 2022).
    - "sample": x_0, from the same input.
    - "flow_prediction": n - x_0, from x / (1 + sigma) = (1 - tau) x_0 + tau n (Lipman et al. 2023).
    - "score": the score of data in [0, 1] at sigma / 2, from (x + 1) / 2, whose 1/2 is `input_shift` (Song et al. 2021, VE).
    - "consistency": F of a consistency model, whose f is the jump to sigma_min: G(x, sigma, sigma_min) = f with the boundary
      scalings of Song et al. 2023, Appendix C. Only there is g known; as sigma_min -> 0 it is "edm".
    """
    one = torch.ones_like(sigma)
    if prediction_type == "edm":
        total = sigma**2 + sigma_data**2
        return sigma_data**2 / total, sigma * sigma_data / total.sqrt(), 1 / total.sqrt()
    if prediction_type == "epsilon":
        return one, -sigma, (1 + sigma**2).rsqrt()
    if prediction_type == "v_prediction":
        c_in = (1 + sigma**2).rsqrt()
        return c_in**2, -sigma * c_in, c_in
    if prediction_type == "sample":
        return 0 * one, one, (1 + sigma**2).rsqrt()
    if prediction_type == "flow_prediction":
        c_in = 1 / (1 + sigma)
        return c_in, -sigma * c_in, c_in
    if prediction_type == "score":
        return one, sigma**2 / 2, one / 2
    if prediction_type == "consistency":
        # f = (sigma_min / sigma) x + (1 - sigma_min / sigma) g, solved for g.
        above, total = sigma - sigma_min, sigma**2 + sigma_data**2
        c_skip = (sigma_data**2 - sigma_min * above) / (above**2 + sigma_data**2)
        return c_skip, sigma * sigma_data / total.sqrt(), 1 / total.sqrt()
    raise ValueError(f"prediction_type={prediction_type!r} is not known; use one of {PREDICTION_TYPES}.")


def input_shift(prediction_type: str) -> float:
    """What is added to c_in x before the network: 1/2 for "score", whose images lie in [0, 1] and not in [-1, 1]."""
    return 0.5 if prediction_type == "score" else 0.0


def edm_loss_weight(sigma: torch.Tensor, sigma_data: float = 0.5) -> torch.Tensor:
    """1 / c_out^2: the weight of |D - x_0|^2 that makes the loss of F uniform over levels (Karras et al. 2022, Table 1)."""
    return (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2


@dataclass(frozen=True)
class Preconditioning:
    """The numbers that turn a raw network F into g, D and G. They live in a scheduler's config and nowhere else.

    Args:
        sigma_data: standard deviation of the data.
        timestep_scale: of "edm" and "consistency": the network is shown timestep_scale * ln(level) / 4.
        prediction_type: what F predicts, one of `PREDICTION_TYPES`; see `scalings`.
        sigma_min: of "consistency": where its jumps end.
        num_diffusion_timesteps: of a discrete diffusion and of a flow: number of timesteps in training.
        beta_start, beta_end, beta_schedule, trained_betas, rescale_betas_zero_snr: of a discrete diffusion, as in
            diffusers' `DDPMScheduler`. A discrete prediction type needs `beta_schedule` or `trained_betas`.

    Raises ValueError for an unknown prediction type, or a discrete one without betas.
    """

    sigma_data: float = 0.5
    timestep_scale: float = 1.0
    prediction_type: str = "edm"
    sigma_min: float = 0.002
    num_diffusion_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str | None = None
    trained_betas: tuple[float, ...] | None = None
    rescale_betas_zero_snr: bool = False

    def __post_init__(self):
        if self.prediction_type not in PREDICTION_TYPES:
            raise ValueError(f"prediction_type={self.prediction_type!r} is not known; use one of {PREDICTION_TYPES}.")
        if self.is_discrete and self.beta_schedule is None and self.trained_betas is None:
            raise ValueError(
                f"prediction_type={self.prediction_type!r} needs the levels of its timesteps: pass beta_schedule (such as 'linear', with "
                "beta_start and beta_end) or trained_betas, as in DDPMScheduler."
            )

    @classmethod
    def from_config(cls, config: Mapping) -> "Preconditioning":
        """Read it from `scheduler.config`. Numbers that the prediction type does not use stay at their defaults."""
        kind = config["prediction_type"]
        names = ["sigma_data", "timestep_scale"] + ["sigma_min"] * (kind == "consistency")
        if kind in DISCRETE_TYPES or kind == "flow_prediction":
            names += [field.name for field in fields(cls) if "beta" in field.name and kind != "flow_prediction"]
            names.append("num_diffusion_timesteps")
        numbers = {name: config[name] for name in names if name in config}
        if numbers.get("trained_betas") is not None:
            numbers["trained_betas"] = tuple(map(float, numbers["trained_betas"]))
        return cls(prediction_type=kind, **numbers)

    @property
    def is_discrete(self) -> bool:
        """Whether the network learnt the levels of whole timesteps only."""
        return self.prediction_type in DISCRETE_TYPES

    @property
    def level_range(self) -> tuple[float, float]:
        """Lowest and highest level that the network knows; (0, infinity) without discrete timesteps."""
        if not self.is_discrete:
            return 0.0, math.inf
        levels = self._log_levels(torch.zeros((), dtype=torch.float64, device="cpu"))
        return levels[0].exp().item(), levels[-1].exp().item()

    def _log_levels(self, like: torch.Tensor) -> torch.Tensor:
        process = (
            self.num_diffusion_timesteps,
            self.beta_start,
            self.beta_end,
            self.beta_schedule,
            self.trained_betas,
            self.rescale_betas_zero_snr,
        )
        return _log_levels(process, like.dtype, like.device)

    def c_noise(self, level: torch.Tensor | float) -> torch.Tensor:
        """What the network is shown of a noise level, in its shape.

        "edm", "consistency": timestep_scale * ln(level) / 4. "flow_prediction": num_diffusion_timesteps * tau,
        tau = level / (1 + level). "score": level / 2. Discrete diffusions: the timestep of that level, between two whole timesteps
        interpolated over ln(level), beyond the first and last those. A network trained on whole timesteps has to interpolate
        alike. How much it matters: shown a time that is half a step off, the exact network of data N(0, 0.5^2) and 1,000 linear betas
        errs in D by at most 0.10 % ("epsilon"), 0.13 % ("v_prediction") or 0.22 % ("sample") of 0.5.
        """
        level = as_level(level)
        if self.prediction_type == "flow_prediction":
            return self.num_diffusion_timesteps * level / (1 + level)
        if self.prediction_type == "score":
            return level / 2
        if not self.is_discrete:
            return c_noise(level, self.timestep_scale)
        nodes = self._log_levels(level)
        value = level.log()
        after = torch.searchsorted(nodes, value).clamp(1, len(nodes) - 1)
        low, high = nodes[after - 1], nodes[after]
        return (after - 1 + (value - low) / (high - low)).clamp(0, len(nodes) - 1)

    def sigma_of_c_noise(self, timestep: torch.Tensor | float) -> torch.Tensor:
        """The noise level of which `timestep` is the c_noise. Inverse of `c_noise`."""
        timestep = as_level(timestep)
        if self.prediction_type == "flow_prediction":
            return timestep / (self.num_diffusion_timesteps - timestep)
        if self.prediction_type == "score":
            return 2 * timestep
        if not self.is_discrete:
            return sigma_of_c_noise(timestep, self.timestep_scale)
        nodes = self._log_levels(timestep)
        timestep = timestep.clamp(0, len(nodes) - 1)
        before = timestep.long().clamp(max=len(nodes) - 2)
        return torch.exp(nodes[before] + (timestep - before) * (nodes[before + 1] - nodes[before]))

    def scalings(self, sigma: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(c_skip, c_out, c_in) at `sigma`."""
        return scalings(sigma, self.sigma_data, self.prediction_type, self.sigma_min)

    def loss_weight(self, sigma: torch.Tensor) -> torch.Tensor:
        """The weight of |D - x_0|^2 with which the network's family is trained, in the shape of `sigma`.

        1 / c_out^2, the plain loss of what F predicts; "score" has 1 / sigma^2 (Song et al. 2021), "consistency" that of "edm".
        """
        if self.prediction_type in ("edm", "consistency"):
            return edm_loss_weight(sigma, self.sigma_data)
        if self.prediction_type == "score":
            return 1 / sigma**2
        return 1 / self.scalings(sigma)[1] ** 2

    def network_input(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """c_in x, and for "score" 1/2 more; `sigma` of shape (B,) or ()."""
        c_in, shift = self.scalings(append_dims(sigma, x.ndim))[2], input_shift(self.prediction_type)
        return c_in * x + shift if shift else c_in * x

    def g_of_output(self, model_output: torch.Tensor, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """g = c_skip x + c_out F from the network's output F, in the dtype of `x`; `sigma` of shape (B,) or ()."""
        c_skip, c_out, _ = self.scalings(append_dims(sigma, x.ndim))
        return c_skip * x + c_out * model_output.to(x.dtype)

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
        times = [self.c_noise(level) for level in ((t,) if s is None else (t, s))]
        model_output = network(self.network_input(x_t, t), *times, **condition, return_dict=False)[0]
        return self.g_of_output(model_output, x_t, t)

    def denoise(self, network: Callable, x_t: torch.Tensor, t: torch.Tensor, **condition) -> torch.Tensor:
        """D(x_t, t) = g(x_t, t, t), the minimum mean squared error estimate of the clean sample."""
        return self.g(network, x_t, t, None, **condition)

    def jump(self, network: Callable, x_t: torch.Tensor, t: torch.Tensor, s: torch.Tensor, **condition) -> torch.Tensor:
        """G(x_t, t, s), one evaluation of `network`."""
        return jump(x_t, self.g(network, x_t, t, s, **condition), t, s)
