# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Base of both schedulers, and the abilities that a scheduler declares."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from .checks import as_float64, check_count, check_positive, is_integer
from .preconditioning import PREDICTIONS, Preconditioning
from .scheduler_configs import own_config
from .trajectory import (
    PURE_NOISE,
    append_dims,
    flow_level,
    flow_place,
    karras_ramp,
    karras_sigma,
    karras_starts,
)


def has_ends(config: Mapping) -> bool:
    """Whether a scheduler's levels begin at infinity (`PURE_NOISE`) or end at 0, as those of a flow map do."""
    return config.get("sigma_min") == 0 or config.get("sigma_max") == PURE_NOISE


def check_inner_levels(config: Mapping, what: str) -> None:
    """Raise ValueError if `what` was given a scheduler whose levels reach 0 or infinity, between which it works."""
    if has_ends(config):
        raise ValueError(
            f"{what} needs noise levels between 0 and infinity, and the scheduler has "
            f"sigma_min={config['sigma_min']:g} and sigma_max={config['sigma_max']:g}. Make it with "
            "`from_config(pipe.scheduler.config, sigma_min=0.002, sigma_max=80.0)`."
        )


def level_at(config: Mapping, ramp: torch.Tensor) -> torch.Tensor:
    """Noise level at `ramp` in [0, 1] of a scheduler's schedule, float64: 0 gives sigma_max, 1 gives sigma_min.

    It is even in sigma^(1/rho) (Karras et al. 2022, Eq. 5), or if the levels reach 0 or infinity in `flow_place`.
    """
    low, high = config["sigma_min"], config["sigma_max"]
    if not has_ends(config):
        return karras_sigma(ramp, low, high, config["rho"])
    shift = config.get("shift", 1.0)
    bottom, top = (flow_place(as_float64(level, "level"), shift) for level in (low, high))
    return flow_level(top + ramp * (bottom - top), shift)


def ramp_of(config: Mapping, level: float) -> float:
    """The place in [0, 1] of a noise level in a scheduler's schedule. Inverse of `level_at`."""
    low, high = config["sigma_min"], config["sigma_max"]
    if not has_ends(config):
        return karras_ramp(level, low, high, config["rho"])
    bottom, place, top = (
        flow_place(as_float64(value, "level"), config.get("shift", 1.0)).item() for value in (low, level, high)
    )
    return (top - place) / (top - bottom)


def start_levels(config: Mapping, num_steps: int, end: float, top: float | None = None) -> torch.Tensor:
    """Noise levels at which each of `num_steps` steps from `top` to `end` starts, shape (num_steps,), float64.

    They are even as `level_at` says; see `karras_starts`. `top` is sigma_max unless given.
    """
    top = config["sigma_max"] if top is None else top
    if not has_ends(config):
        return karras_starts(num_steps, end, config["sigma_min"], top, config["rho"])
    shift = config.get("shift", 1.0)
    first, last = (flow_place(as_float64(level, "level"), shift).item() for level in (top, end))
    levels = flow_level(torch.linspace(first, last, num_steps + 1, dtype=torch.float64, device="cpu")[:-1], shift)
    levels[0] = top
    return levels


class KarrasSchedulerMixin(SchedulerMixin, ConfigMixin):
    """Base of this package's schedulers.

    A subclass says what it can do by the class attributes `jumps` and `schedule_options`, and writes:

    - `__init__` with `@register_to_config`: `num_train_timesteps`, `sigma_min`, `sigma_max`, `rho` and the numbers of
      `Preconditioning`; it ends with `self._init_state()`.
    - `set_timesteps`: levels from `_start_levels`, kept in `sigmas` with the end of the last step, the noise level of
      every network call to `_set_calls`, and `num_inference_steps`.
    - `step`: the level from `sigma_of_call`, g from `g_of_call`, and `self._step_index += 1`.

    diffusers' schedulers lack the two attributes: they do not jump, and choose their levels themselves.
    """

    # Schedulers to swap in, as diffusers lists them; it looks the names up among its own and ours.
    _compatibles = ["CTMScheduler", "EDMHeunScheduler", "EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"]

    # Whether the network is shown where each step ends too (`target_timesteps`). `step` then takes `project`.
    jumps = False

    # Arguments of `set_timesteps` beside the number of steps and the device.
    schedule_options: tuple[str, ...] = ("timesteps", "sigmas")

    timesteps: torch.Tensor
    call_sigmas: torch.Tensor
    _preconditioning: tuple[Mapping, Preconditioning] | None = None  # the config that was read last, and its numbers

    @classmethod
    def from_config(cls, config=None, return_unused_kwargs: bool = False, **kwargs):
        if isinstance(config, dict):
            config = own_config(config)
            kind = PREDICTIONS.get(config.get("prediction_type"))
            if not cls.jumps and kind is not None and kind.knows_ends and has_ends(config):
                ends = [config["sigma_min"], config["sigma_max"]]  # which only a jump reaches, kept for the way back
                config = {**config, "sigma_min": 0.002, "sigma_max": 80.0, "_ends": ends}
            elif cls.jumps and "_ends" in config:
                config = {**config}
                config["sigma_min"], config["sigma_max"] = config.pop("_ends")
        return super().from_config(config, return_unused_kwargs=return_unused_kwargs, **kwargs)

    def _init_state(self) -> None:
        """Check the registered numbers and make the scheduler usable before `set_timesteps`, as diffusers' are."""
        knows_ends = self.preconditioning.kind.knows_ends
        if knows_ends and self.config.sigma_max == math.inf:
            self.register_to_config(sigma_max=PURE_NOISE)
        config = self.config
        check_count(
            num_train_timesteps=config.num_train_timesteps, num_diffusion_timesteps=config.num_diffusion_timesteps
        )
        if knows_ends and not self.jumps:
            check_inner_levels(config, type(self).__name__)
        names = ["sigma_max", "sigma_data", "rho", "timestep_scale"]
        if not (knows_ends and config.sigma_min == 0):
            names.insert(0, "sigma_min")
        check_positive(**{name: config[name] for name in names})
        if config.sigma_min >= config.sigma_max:
            raise ValueError(f"sigma_min={config.sigma_min} must be below sigma_max={config.sigma_max}.")
        low, high = self.preconditioning.level_range
        if config.sigma_min < low * (1 - 1e-4) or config.sigma_max > high * (1 + 1e-4):
            raise ValueError(
                f"sigma_min={config.sigma_min:g} and sigma_max={config.sigma_max:g} must lie in [{low:.6g}, "
                f"{high:.6g}], the levels of the timesteps that the network was trained on."
            )
        self.set_timesteps(config.num_train_timesteps)
        self.num_inference_steps = None

    @property
    def preconditioning(self) -> Preconditioning:
        """The config's numbers as functions g, D and G of a network."""
        config = self.config  # never changed in place: `register_to_config` makes a new one
        if self._preconditioning is None or self._preconditioning[0] is not config:
            self._preconditioning = (config, Preconditioning.from_config(config))
        return self._preconditioning[1]

    @property
    def init_noise_sigma(self) -> float:
        """Standard deviation of the first sample: unit noise is multiplied by it."""
        return float(self.call_sigmas[0])

    @property
    def step_index(self) -> int | None:
        """Number of network calls done since `set_timesteps`, None before the first."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """Index of the first network call, if a pipeline set one."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start at `timesteps[begin_index]`, for instance for image-to-image."""
        self._begin_index = begin_index

    def sigma_to_t(self, sigma: torch.Tensor | float) -> torch.Tensor:
        """c_noise(sigma), what the network is shown for a noise level."""
        return self.preconditioning.c_noise(sigma)

    def t_to_sigma(self, timestep: torch.Tensor | float) -> torch.Tensor:
        """The noise level whose c_noise is `timestep`."""
        return self.preconditioning.sigma_of_c_noise(timestep)

    def _start_levels(self, num_inference_steps, timesteps, sigmas, end: float) -> torch.Tensor:
        """Checked noise levels at which steps start, float64 on the CPU and descending; the last step ends at `end`."""
        config = self.config
        if sum(value is not None for value in (num_inference_steps, timesteps, sigmas)) != 1:
            raise ValueError("Pass exactly one of `num_inference_steps`, `timesteps` and `sigmas`.")
        if num_inference_steps is not None:
            check_count(num_inference_steps=num_inference_steps)
            return start_levels(config, num_inference_steps, end)

        name = "timesteps" if timesteps is not None else "sigmas"
        if timesteps is not None and is_integer(timesteps):
            raise ValueError(
                "timesteps are c_noise values (floats, e.g. `scheduler.sigma_to_t(sigma)`), not indices. To choose "
                "noise levels pass `sigmas=[80.0, ...]`; to choose how many, `num_inference_steps`."
            )
        levels = as_float64(timesteps if timesteps is not None else sigmas, name)
        if levels.ndim != 1 or len(levels) == 0:
            raise ValueError(f"{name} must be a list with one value per step, got shape {tuple(levels.shape)}.")
        if timesteps is not None:
            levels = self.t_to_sigma(levels)
        if config.sigma_max == PURE_NOISE:
            levels = levels.clamp(max=PURE_NOISE)  # infinity
        if not levels.isfinite().all() or (levels[1:] >= levels[:-1]).any():
            raise ValueError(
                f"{name} must be finite and strictly descending, from much noise to little; got {levels.tolist()} as "
                "noise levels."
            )
        lowest = config.sigma_min * (1 - 1e-4) if end == 0 else end * (1 + 1e-4)
        if levels[-1] < lowest or levels[-1] == 0:
            added = "sigma_min" if end == config.sigma_min else f"{end:g}"
            raise ValueError(
                f"{name} ends at noise level {levels[-1].item():g}. It holds the level at which each step starts, none "
                f"below sigma_min={config.sigma_min:g}. The end of the last step, {added}, is added for you: leave it "
                "out."
            )
        if levels[0] > config.sigma_max * (1 + 1e-4):
            raise ValueError(
                f"{name} starts at noise level {levels[0].item():g}, above sigma_max={config.sigma_max:g}, where the "
                "network was not trained."
            )
        return levels.clamp(max=config.sigma_max)

    def _set_calls(self, call_sigmas: torch.Tensor, device) -> None:
        """Record the noise level of every network call and start counting anew."""
        self.call_sigmas = call_sigmas.to(torch.float32)  # on the CPU: reading it never waits for a device
        self.timesteps = self.sigma_to_t(call_sigmas).to(device=device, dtype=torch.float32)
        # Numbers for `step`, which needs no small tensors then.
        self._call_scalings = list(zip(*(c.tolist() for c in self.preconditioning.scalings(self.call_sigmas.double()))))
        self._step_index = None
        self._begin_index = None

    def index_for_timestep(self, timestep: torch.Tensor | float, schedule_timesteps: torch.Tensor | None = None) -> int:
        """Index of the call whose timestep is nearest; the last one where several are equal."""
        schedule = self.timesteps if schedule_timesteps is None else schedule_timesteps
        distance = (as_float64(schedule, "schedule_timesteps") - as_float64(timestep, "timestep")).abs()
        return int((distance == distance.min()).nonzero()[-1])

    def sigma_of_call(self, timestep) -> torch.Tensor:
        """Noise level (0-d, CPU) of the current call; the first call of a run is found by its `timestep`."""
        if is_integer(timestep):
            raise ValueError(
                "Integer timesteps, such as indices from `enumerate(scheduler.timesteps)`, are not supported: pass "
                "one of `scheduler.timesteps`, or `scheduler.sigma_to_t(sigma)` for a noise level."
            )
        if self._step_index is None:
            self._step_index = self.index_for_timestep(timestep) if self._begin_index is None else self._begin_index
        if self._step_index >= len(self.call_sigmas):
            raise ValueError("All steps are done; call `set_timesteps` before sampling again.")
        return self.call_sigmas[self._step_index]

    def scale_model_input(self, sample: torch.Tensor, timestep: torch.Tensor | float) -> torch.Tensor:
        """c_in(t) * sample (for "score" plus 1/2), the input of the network. Same shape and dtype as `sample`."""
        self.sigma_of_call(timestep)
        return self.preconditioning.scaled_input(sample, self._call_scalings[self._step_index][2])

    def g_of_call(self, model_output: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """g = c_skip x + c_out F of the current call, whose level is known, in the dtype of `x`."""
        return self.preconditioning.g_of_scaled(model_output, x, *self._call_scalings[self._step_index][:2])

    def levels_of_call(self, timestep) -> tuple[float, float]:
        """(t, s) of the current call: its noise level, and the one that it jumps to, t itself without jumps."""
        t = self.sigma_of_call(timestep).item()
        return t, self.target_sigmas[self._step_index].item() if self.jumps else t

    def add_noise(
        self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor | float | Sequence[float]
    ) -> torch.Tensor:
        """x_t = x_0 + sigma noise, with sigma the level of each of `timesteps` (c_noise values, shape (B,) or ()).

        Any level may be asked, also one that is not in the schedule.
        """
        if is_integer(timesteps):
            raise ValueError("Integer timesteps are not supported: pass `scheduler.sigma_to_t(sigma)`, shape (B,).")
        dtype = accumulation_dtype(original_samples)
        sigma = self.t_to_sigma(as_float64(timesteps, "timesteps"))
        sigma = append_dims(sigma.to(device=original_samples.device, dtype=dtype), original_samples.ndim)
        return (original_samples.to(dtype) + sigma * noise.to(dtype)).to(original_samples.dtype)

    def __len__(self) -> int:
        return self.config.num_train_timesteps


def accumulation_dtype(sample: torch.Tensor) -> torch.dtype:
    """The dtype of a step's arithmetic: float32, or float64 for a float64 sample."""
    return torch.float64 if sample.dtype == torch.float64 else torch.float32


def jumps(scheduler: Any) -> bool:
    """Whether a scheduler samples by jumps, as `CTMScheduler` does. No scheduler of diffusers does."""
    return getattr(scheduler, "jumps", False)


def preconditioning_of(scheduler: Any) -> Preconditioning | None:
    """The preconditioning of a scheduler of this package; None for one of diffusers."""
    return getattr(scheduler, "preconditioning", None)


def default_num_steps(scheduler: Any) -> int:
    """How many steps a pipeline takes if nobody says: 1 with a scheduler that jumps, 18 with others."""
    return 1 if jumps(scheduler) else 18
