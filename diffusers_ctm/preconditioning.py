# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""From a raw network to g, D and G, for each kind of prediction."""

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDPMScheduler

from .checks import as_float64, check_choice, check_count, check_positive
from .trajectory import PURE_NOISE, append_dims, as_level, flow_level, jump


def condition(class_labels: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """Keyword arguments that show a network its classes, of shape (B,); empty without classes."""
    return {} if class_labels is None else {"class_labels": class_labels}


def edm_loss_weight(sigma: torch.Tensor, sigma_data: float = 0.5) -> torch.Tensor:
    """1 / c_out^2, the weight of |D - x_0|^2 that makes the loss of F uniform over levels (Karras et al. 2022)."""
    return (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2


def discrete_levels(
    num_diffusion_timesteps: int = 1000,
    beta_start: float = 0.0001,
    beta_end: float = 0.02,
    beta_schedule: str | None = "linear",
    trained_betas: tuple[float, ...] | None = None,
    rescale_betas_zero_snr: bool = False,
) -> torch.Tensor:
    """Noise levels sqrt((1 - abar) / abar) of the timesteps 0, 1, 2, ... of a DDPM, ascending, float64 on the CPU.

    Arguments, betas and abar are those of diffusers' `DDPMScheduler`, its rounding to float32 included: networks were
    trained with it. With `rescale_betas_zero_snr` the last timestep is pure noise. It has no finite level and is left
    out. Raises ValueError if the levels do not rise or are fewer than two.
    """
    if trained_betas is None:
        check_count(num_diffusion_timesteps=num_diffusion_timesteps)
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
            f"beta_schedule={beta_schedule!r} is not known; use 'linear', 'scaled_linear', 'squaredcos_cap_v2', "
            "'sigmoid' or 'laplace'."
        ) from error
    except (TypeError, RuntimeError) as error:  # the betas are not numbers
        raise ValueError(f"beta_start={beta_start!r} and beta_end={beta_end!r} make no betas.") from error
    alphas_cumprod = scheduler.alphas_cumprod.double()
    levels = ((1 - alphas_cumprod) / alphas_cumprod).sqrt()
    levels = levels[levels.isfinite()]
    if len(levels) < 2 or not (levels[0] > 0 and (levels.diff() > 0).all()):
        raise ValueError("The betas must make two or more noise levels that rise with the timestep.")
    return levels


@functools.lru_cache(maxsize=64)
def _log_levels(process: tuple, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """ln of `discrete_levels(*process)`, kept: training asks at every step."""
    with torch.inference_mode(False), torch.device("cpu"):  # the first caller may be in another mode
        return discrete_levels(*process).log().to(device=device, dtype=dtype)


# The kinds of prediction ----------------------------------------------------------------------------------------------


class Prediction:
    """A kind of prediction: what F says about x = x_0 + sigma n, and what F is shown.

    A new kind is a subclass of this one, listed in `PREDICTIONS`. The argument `p` of its methods is the
    `Preconditioning` that holds the network's numbers; levels and results have one shape.
    """

    name: str  # its `prediction_type`
    numbers: tuple[str, ...] = ("sigma_data", "timestep_scale")  # those of `Preconditioning` that it uses
    input_shift = 0.0  # added to c_in x
    is_denoiser = True  # whether F gives D(x, t); else it knows the end of a trajectory only
    learned_every_level = False  # whether it was trained beyond [sigma_min, sigma_max] too
    magnifies_rounding = False  # whether rounding errors of F reach the image times the noise level
    knows_ends = False  # whether F can be shown the levels 0 and infinity (`PURE_NOISE`) too
    # The diffusers scheduler whose defaults hold if a network comes without one.
    default_scheduler = "EDMEulerScheduler"
    edm_scheduler_type: str | None = None  # what diffusers' EDM schedulers call it; None: they cannot sample it

    def check(self, p: "Preconditioning") -> None:
        """Raise ValueError if a number that this kind needs is missing."""

    def scalings(self, sigma: torch.Tensor, p: "Preconditioning") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(c_skip, c_out, c_in), so that g = c_skip x + c_out F(c_in x + input_shift)."""

    def c_noise(self, level: torch.Tensor, p: "Preconditioning") -> torch.Tensor:
        """The time that F is shown for a noise level."""

    def sigma_of_c_noise(self, timestep: torch.Tensor, p: "Preconditioning") -> torch.Tensor:
        """Inverse of `c_noise`."""

    def level_range(self, p: "Preconditioning") -> tuple[float, float]:
        """Lowest and highest noise level that F can be shown."""
        return 0.0, math.inf

    def loss_weight(self, sigma: torch.Tensor, p: "Preconditioning") -> torch.Tensor:
        """The weight of |D - x_0|^2 in this kind's own training: 1 / c_out^2, the plain loss of F."""
        return 1 / self.scalings(sigma, p)[1] ** 2

    def numbers_of(self, config: Mapping, said: str | None) -> dict[str, Any] | None:
        """Our numbers from a diffusers scheduler's `config`; None if its networks are of another kind.

        `said` is the prediction type that the config names. Raises ValueError for a config that would be misread.
        """


class EDMPrediction(Prediction):
    """F of Karras et al. 2022, Table 1: input and target have unit variance at every level. Shown ln(level) / 4."""

    name = "edm"
    learned_every_level = True
    edm_scheduler_type = "epsilon"

    def scalings(self, sigma, p):
        total = sigma**2 + p.sigma_data**2
        root = total.sqrt()
        return p.sigma_data**2 / total, sigma * p.sigma_data / root, 1 / root

    def c_noise(self, level, p):
        return p.timestep_scale / 4 * torch.log(level)

    def sigma_of_c_noise(self, timestep, p):
        return torch.exp(timestep * (4 / p.timestep_scale))

    def loss_weight(self, sigma, p):
        return edm_loss_weight(sigma, p.sigma_data)

    def numbers_of(self, config, said):
        if "sigma_schedule" in config:  # diffusers' EDM schedulers; with betas they were made from a config of ours
            if said == "v_prediction" and not has_betas(config):
                raise ValueError("prediction_type='v_prediction' of diffusers' EDM schedulers, -F, is not supported.")
            return dict(config) if said == self.edm_scheduler_type and not has_betas(config) else None
        if said == "sample" and "sigma_data" in config:  # the authors' teacher; no scheduler of diffusers writes both
            return _numbers_of_openai(config)
        return None


class DiscretePrediction(Prediction):
    """Base of diffusions in discrete steps, whose betas say the levels. F sees x / sqrt(1 + sigma^2) and a timestep.

    Between two whole timesteps the time is interpolated over ln(level); beyond the first and last it is those. A
    network trained on whole timesteps has to interpolate alike.
    """

    process = (
        "num_diffusion_timesteps",
        "beta_start",
        "beta_end",
        "beta_schedule",
        "trained_betas",
        "rescale_betas_zero_snr",
    )
    numbers = Prediction.numbers + process
    default_scheduler = "DDPMScheduler"

    def check(self, p):
        if p.beta_schedule is None and p.trained_betas is None:
            raise ValueError(
                f"prediction_type={self.name!r} needs the levels of its timesteps: pass beta_schedule (such as "
                "'linear', with beta_start and beta_end) or trained_betas, as in DDPMScheduler."
            )

    def _nodes(self, like: torch.Tensor, p: "Preconditioning") -> torch.Tensor:
        """ln(level) of every whole timestep."""
        return _log_levels(tuple(getattr(p, name) for name in self.process), like.dtype, like.device)

    def c_noise(self, level, p):
        nodes = self._nodes(level, p)
        value = level.log()
        after = torch.searchsorted(nodes, value).clamp(1, len(nodes) - 1)
        low, high = nodes[after - 1], nodes[after]
        return (after - 1 + (value - low) / (high - low)).clamp(0, len(nodes) - 1)

    def sigma_of_c_noise(self, timestep, p):
        nodes = self._nodes(timestep, p)
        timestep = timestep.clamp(0, len(nodes) - 1)
        before = timestep.long().clamp(max=len(nodes) - 2)
        return torch.exp(nodes[before] + (timestep - before) * (nodes[before + 1] - nodes[before]))

    def level_range(self, p):
        levels = self._nodes(torch.zeros((), dtype=torch.float64, device="cpu"), p)
        return levels[0].exp().item(), levels[-1].exp().item()

    def numbers_of(self, config, said):
        if not has_betas(config) or "shift" in config or (said or "epsilon") != self.name:
            return None
        if config.get("snr_shift_scale", 1.0) != 1.0:
            raise ValueError(
                f"Betas whose levels snr_shift_scale={config['snr_shift_scale']!r} moves are not supported."
            )
        if config.get("use_flow_sigmas"):
            raise ValueError(
                f"use_flow_sigmas=True with prediction_type={said!r} is not supported, only with 'flow_prediction'."
            )
        if "original_inference_steps" in config:
            raise ValueError(
                "A network of an LCMScheduler or TCDScheduler jumps to the end of trajectories and is no denoiser; it "
                "is not supported."
            )
        steps, betas = _diffusion_timesteps(config), config.get("trained_betas")
        if betas is not None:
            betas = as_float64(betas, "trained_betas").flatten().tolist()
            steps = len(betas)
        process = {name: config[name] for name in self.process if name in config}
        process |= {"num_diffusion_timesteps": steps, "trained_betas": betas}
        levels = discrete_levels(**process).tolist()
        return {**process, "sigma_min": levels[0], "sigma_max": levels[-1]}


class EpsilonPrediction(DiscretePrediction):
    """The noise n, as DDPM predicts it (Ho et al. 2020). Its errors reach g times sigma."""

    name = "epsilon"
    magnifies_rounding = True

    def scalings(self, sigma, p):
        return torch.ones_like(sigma), -sigma, (1 + sigma**2).rsqrt()


class VelocityPrediction(DiscretePrediction):
    """alpha n - sqrt(1 - alpha^2) x_0 with alpha = 1 / sqrt(1 + sigma^2) (Salimans & Ho 2022)."""

    name = "v_prediction"

    def scalings(self, sigma, p):
        c_in = (1 + sigma**2).rsqrt()
        return c_in**2, -sigma * c_in, c_in

    def numbers_of(self, config, said):
        if said == self.name and config.get("timestep_type") == "continuous":
            raise ValueError(
                "timestep_type='continuous' with v_prediction shows ln(sigma) / 4 instead of timesteps, which is not "
                "supported."
            )
        return super().numbers_of(config, said)


class SamplePrediction(DiscretePrediction):
    """x_0 itself."""

    name = "sample"

    def scalings(self, sigma, p):
        return torch.zeros_like(sigma), torch.ones_like(sigma), (1 + sigma**2).rsqrt()


class FlowPrediction(Prediction):
    """n - x_0, from z = x / (1 + sigma) = (1 - tau) x_0 + tau n, tau = sigma / (1 + sigma) (Lipman et al. 2023).

    It is shown num_diffusion_timesteps * tau. With a second time it is a flow map's average velocity
    u(z, tau_t, tau_s) = (z - z_s) / (tau_t - tau_s) = (z - g) / tau_t (MeanFlow, Geng et al. 2025, Eq. 3).
    """

    name = "flow_prediction"
    numbers = (*Prediction.numbers, "num_diffusion_timesteps")
    knows_ends = True
    default_scheduler = "FlowMatchEulerDiscreteScheduler"

    def scalings(self, sigma, p):
        c_in = 1 / (1 + sigma)
        return c_in, -sigma * c_in, c_in

    def c_noise(self, level, p):
        return p.num_diffusion_timesteps * level / (1 + level)

    def sigma_of_c_noise(self, timestep, p):
        return (timestep / (p.num_diffusion_timesteps - timestep)).clamp(max=PURE_NOISE)

    def numbers_of(self, config, said):
        if said != self.name and "shift" not in config:
            return None
        if config.get("invert_sigmas"):
            raise ValueError("A flow with invert_sigmas=True runs from data to noise, which is not supported.")
        steps = _diffusion_timesteps(config)
        check_count(num_train_timesteps=steps)
        if steps < 2:
            raise ValueError(f"A flow with num_train_timesteps={steps} has no levels between its ends.")
        # A flow map jumps from one end to the other; the second condition is for what was read here before.
        if config.get("_class_name") == "FlowMapEulerDiscreteScheduler" or config.get("sigma_max") == PURE_NOISE:
            ends = {"sigma_min": 0.0, "sigma_max": PURE_NOISE, "shift": config.get("shift", 1.0)}
        else:
            ends = {"sigma_min": 1 / (steps - 1), "sigma_max": 80.0}
        return {"num_diffusion_timesteps": steps, **ends}


class ScorePrediction(Prediction):
    """The score of data in [0, 1] at sigma / 2, from (x + 1) / 2, shown sigma / 2 (Song et al. 2021, VE)."""

    name = "score"
    input_shift = 0.5
    magnifies_rounding = True
    default_scheduler = "ScoreSdeVeScheduler"

    def scalings(self, sigma, p):
        return torch.ones_like(sigma), sigma**2 / 2, torch.full_like(sigma, 0.5)

    def c_noise(self, level, p):
        return level / 2

    def sigma_of_c_noise(self, timestep, p):
        return 2 * timestep

    def loss_weight(self, sigma, p):
        return 1 / sigma**2

    def numbers_of(self, config, said):
        if "beta_min" in config:
            raise ValueError("The continuous times of a ScoreSdeVpScheduler are not supported.")
        if "sampling_eps" not in config:
            return None
        check_positive(**{name: config.get(name) for name in ("sigma_min", "sigma_max")})
        return {"sigma_min": 2 * config["sigma_min"], "sigma_max": 2 * config["sigma_max"]}


class ConsistencyPrediction(EDMPrediction):
    """F of a consistency model (Song et al. 2023, Appendix C), whose f is the jump to sigma_min.

    G(x, sigma, sigma_min) = f, and g is known for that jump only. As sigma_min -> 0 it is "edm".
    """

    name = "consistency"
    numbers = (*Prediction.numbers, "sigma_min")
    is_denoiser = False
    learned_every_level = False
    default_scheduler = "CMStochasticIterativeScheduler"
    edm_scheduler_type = None

    def scalings(self, sigma, p):
        # f = (sigma_min / sigma) x + (1 - sigma_min / sigma) g, solved for g.
        above, total = sigma - p.sigma_min, sigma**2 + p.sigma_data**2
        c_skip = (p.sigma_data**2 - p.sigma_min * above) / (above**2 + p.sigma_data**2)
        return c_skip, sigma * p.sigma_data / total.sqrt(), 1 / total.sqrt()

    def numbers_of(self, config, said):
        return _numbers_of_openai(config) if "clip_denoised" in config else None


def has_betas(config: Mapping) -> bool:
    """Whether a scheduler's config says the betas of a diffusion in discrete steps."""
    return config.get("beta_schedule") is not None or config.get("trained_betas") is not None


def _diffusion_timesteps(config: Mapping) -> int:
    """Number of timesteps in training; in a config made from ours, num_train_timesteps is something else."""
    return config.get("num_diffusion_timesteps", config.get("num_train_timesteps", 1000))


def _numbers_of_openai(config: Mapping) -> dict[str, Any]:
    """Levels and time scale of the networks of the OpenAI, consistency and CTM family."""
    names = ("sigma_min", "sigma_max", "sigma_data", "rho")
    return {"timestep_scale": 1000.0, **{name: config[name] for name in names if name in config}}


# In the order in which they are asked: the first kind that recognizes a scheduler's config wins.
PREDICTIONS = {
    kind.name: kind
    for kind in (
        EDMPrediction(),
        EpsilonPrediction(),
        VelocityPrediction(),
        SamplePrediction(),
        FlowPrediction(),
        ScorePrediction(),
        ConsistencyPrediction(),
    )
}


@dataclass(frozen=True)
class Preconditioning:
    """The numbers that turn a raw network F into g, D and G. They live in a scheduler's config and nowhere else.

    Args:
        sigma_data: standard deviation of the data.
        timestep_scale: "edm" and "consistency" are shown timestep_scale * ln(level) / 4. It is 1 for NVIDIA's EDM, 1000
            for the OpenAI, consistency and CTM family. Part of a checkpoint: with the wrong one, samples are garbage.
        prediction_type: what F predicts, a key of `PREDICTIONS`.
        sigma_min: where the jumps of "consistency" end.
        num_diffusion_timesteps: number of timesteps in training, for "flow_prediction" and the discrete diffusions.
        beta_start, beta_end, beta_schedule, trained_betas, rescale_betas_zero_snr: the discrete diffusions "epsilon",
            "v_prediction" and "sample" have these numbers of diffusers' `DDPMScheduler`, and need `beta_schedule` or
            `trained_betas`. `from_config` of our schedulers reads them from the config of such a scheduler.

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
        check_choice("prediction_type", self.prediction_type, PREDICTIONS)
        self.kind.check(self)

    def __str__(self) -> str:
        numbers = ", ".join(f"{name}={getattr(self, name)!r}" for name in self.kind.numbers)
        return f"prediction_type={self.prediction_type!r}, {numbers}"

    @classmethod
    def from_config(cls, config: Mapping) -> "Preconditioning":
        """Read it from `scheduler.config`. Numbers that the prediction type does not use stay at their defaults."""
        kind = config["prediction_type"]
        names = PREDICTIONS[kind].numbers if kind in PREDICTIONS else ()
        numbers = {name: config[name] for name in names if name in config}
        if numbers.get("trained_betas") is not None:
            numbers["trained_betas"] = tuple(map(float, numbers["trained_betas"]))
        return cls(prediction_type=kind, **numbers)

    @property
    def kind(self) -> Prediction:
        """The kind of prediction, which knows the formulas and the facts of its family."""
        return PREDICTIONS[self.prediction_type]

    @property
    def level_range(self) -> tuple[float, float]:
        """Lowest and highest level that the network knows; (0, infinity) without discrete timesteps."""
        return self.kind.level_range(self)

    def c_noise(self, level: torch.Tensor | float) -> torch.Tensor:
        """The time that the network is shown for a noise level, in its shape."""
        return self.kind.c_noise(as_level(level), self)

    def sigma_of_c_noise(self, timestep: torch.Tensor | float) -> torch.Tensor:
        """The noise level of which `timestep` is the c_noise. Inverse of `c_noise`."""
        return self.kind.sigma_of_c_noise(as_level(timestep), self)

    def scalings(self, sigma: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(c_skip, c_out, c_in) at `sigma`, each in its shape."""
        return self.kind.scalings(sigma, self)

    def loss_weight(self, sigma: torch.Tensor) -> torch.Tensor:
        """The weight of |D - x_0|^2 with which the network's family is trained, in the shape of `sigma`."""
        return self.kind.loss_weight(sigma, self)

    def network_input(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """c_in x, and for "score" 1/2 more; `sigma` of shape (B,) or ()."""
        return self.scaled_input(x, self.scalings(append_dims(sigma, x.ndim))[2])

    def scaled_input(self, x: torch.Tensor, c_in: torch.Tensor | float) -> torch.Tensor:
        """`network_input` by c_in, where it is known already."""
        shift = self.kind.input_shift
        return c_in * x + shift if shift else c_in * x

    def g_of_output(self, model_output: torch.Tensor, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """g = c_skip x + c_out F from the network's output F, in the dtype of `x`; `sigma` of shape (B,) or ()."""
        return self.g_of_scaled(model_output, x, *self.scalings(append_dims(sigma, x.ndim))[:2])

    def g_of_scaled(
        self, model_output: torch.Tensor, x: torch.Tensor, c_skip: torch.Tensor | float, c_out: torch.Tensor | float
    ) -> torch.Tensor:
        """`g_of_output` by c_skip and c_out, where they are known already."""
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

    def average_velocity(
        self, network: Callable, z: torch.Tensor, tau_t: torch.Tensor, tau_s: torch.Tensor, **condition
    ) -> torch.Tensor:
        """u(z, tau_t, tau_s) = (z - g) / tau_t, what the networks of flow maps give, of a CTM of any kind.

        diffusers' `FlowMapEulerDiscreteScheduler` steps by it: z_s = z - (tau_t - tau_s) u.

        Args:
            network: F, as in `g`.
            z: (1 - tau_t) x_0 + tau_t n = x_t / (1 + t), shape (B, ...).
            tau_t: t / (1 + t) of a level that the network knows, shape (B,) or (). Better float64: rounding it to
                float32 moves a level of 80 by 4e-4.
            tau_s: likewise <= tau_t; s = sigma_min is the end.
        """
        t, s = (flow_level(tau).to(z) for tau in (tau_t, tau_s))
        g = self.g(network, (1 + append_dims(t, z.ndim)) * z, t, s, **condition)
        return (z - g) / append_dims(tau_t.to(z), z.ndim)
