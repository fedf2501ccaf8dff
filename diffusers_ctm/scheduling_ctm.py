# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""CTM's gamma sampling (Kim et al. 2024, Algorithm 3) as a diffusers scheduler."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor

from .checks import as_float64, check_positive
from .scheduling_karras import KarrasSchedulerMixin, accumulation_dtype
from .trajectory import PURE_NOISE, gamma_of_split, gamma_split, jump


# What `set_timesteps` sets.
SCHEDULE = (
    "num_inference_steps",
    "sigmas",
    "gammas",
    "target_sigmas",
    "noise_std",
    "target_timesteps",
    "call_sigmas",
    "timesteps",
    "_call_scalings",
    "_jumps",
    "_step_index",
    "_begin_index",
)
PRESET_KEYS = ("sigmas", "gamma", "target_sigmas", "final_sigma")


@dataclass
class CTMSchedulerOutput(BaseOutput):
    """Output of `CTMScheduler.step`. All have the shape and dtype of the sample.

    Args:
        prev_sample: state at the next level t_next, the input of the next step; after the last step, the image (at
            `final_sigma`).
        pred_noised_sample: x_s = G(x_t, t, s), the jump before noise is added.
        pred_original_sample: g(x_t, t, s), a clean sample: the mean of the denoiser along the trajectory from t to s.
    """

    prev_sample: torch.Tensor
    pred_noised_sample: torch.Tensor
    pred_original_sample: torch.Tensor | None = None


def copied(value: Any) -> Any:
    """A tensor as a new one, so that writing into it changes no other; anything else as it is."""
    return value.clone() if isinstance(value, torch.Tensor) else value


def _presets_in_json(presets: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """`presets` of `CTMScheduler` as strings, lists and floats. Raises ValueError for another structure."""
    if not isinstance(presets, Mapping):
        raise ValueError(f"presets must be a dict of schedules by number of steps, got {presets!r}.")
    checked = {}
    for steps, preset in presets.items():
        name = str(steps)
        if not name.isdecimal() or name != str(int(name)) or name == "0":
            raise ValueError(f"presets is a dict by number of steps, such as '2'; got the key {steps!r}.")
        if not isinstance(preset, Mapping) or not preset or not set(preset) <= set(PRESET_KEYS):
            raise ValueError(f"presets[{name!r}] must be a dict with one or more of {PRESET_KEYS}, got {preset!r}.")
        try:
            values = {key: as_float64(value, key) for key, value in preset.items()}
            checked[name] = {key: value.clamp(max=PURE_NOISE).tolist() for key, value in values.items()}
        except (TypeError, ValueError) as error:
            raise ValueError(f"presets[{name!r}] must hold numbers, got {preset!r}.") from error
    return checked


class CTMScheduler(KarrasSchedulerMixin):
    """Samples a consistency trajectory model in any number of steps at any gamma.

    Step i jumps from level t_i down to s_i = sigma_min + sqrt(1 - gamma^2) (t_{i+1} - sigma_min), then adds noise up to
    t_{i+1}. The last step ends at sigma_min and adds none. One network evaluation per step. This is the authors'
    sampler; the paper's Algorithm 3 is its limit sigma_min -> 0.

    - gamma = 0: deterministic jumps along the probability-flow ODE.
    - gamma = 1: multistep sampling of consistency models, step for step.
    - `target_sigmas` in place of gamma: any s_i. The authors' two-step index sampler, with the indices 5 and 3 of an
      18-level grid, is `set_timesteps(sigmas=[grid[0], grid[3]], target_sigmas=[grid[5], grid[17]])`.

    The network is shown two times, so both are fixed by `set_timesteps`: call it as
    `unet(scheduler.scale_model_input(x, t), t, target_timestep)` with `t, target_timestep` from
    `zip(scheduler.timesteps, scheduler.target_timesteps)`.

    Args:
        num_train_timesteps: number of noise levels of the training grid. Sampling may use any number.
        sigma_min: lowest noise level, where sampling ends. With "flow_prediction" it may be 0.
        sigma_max: highest noise level, where it starts. With "flow_prediction" it may be infinity, pure noise, which
            is kept as `PURE_NOISE`, 2^60; a state there is 2^60 times unit noise, too much for float16. If the levels
            reach 0 or infinity, the schedule is even in the flow's time tau = t / (1 + t).
        rho: exponent of the Karras schedule.
        sigma_data, prediction_type, timestep_scale, num_diffusion_timesteps, beta_start, beta_end, beta_schedule,
            trained_betas, rescale_betas_zero_snr: the numbers of the network, see `preconditioning.Preconditioning`.
        gamma: what `set_timesteps` uses when it is given none, in [0, 1].
        final_sigma: likewise, the level at which the last step ends; None is sigma_min. See `set_timesteps`.
        presets: schedules by number of steps, which `set_timesteps(N)` uses when it is told N and nothing else, such as
            `{"2": {"sigmas": [80.0, 1.5], "gamma": [0.3, 0.0]}}`. Each has one or more of `sigmas`, `gamma`,
            `target_sigmas`, `final_sigma`. They are measured for one checkpoint, by `training.tune`, and saved with it.
        shift: of a schedule that is even in tau, as in diffusers' flow schedulers: above 1 more steps at high noise.
        clip_sample: clamp g to [-1, 1] in each step. g is a mean of the denoiser, so this is right for data in [-1, 1].
    """

    order = 1
    jumps = True
    schedule_options = ("timesteps", "sigmas", "gamma", "target_sigmas", "final_sigma")
    # The config, what `set_timesteps` was asked last, and what it set.
    _kept_schedule: tuple[Mapping, list, dict[str, Any]] | None = None

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 18,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        sigma_data: float = 0.5,
        rho: float = 7.0,
        prediction_type: str = "edm",
        timestep_scale: float = 1.0,
        gamma: float = 0.0,
        final_sigma: float | None = None,
        presets: Mapping[str, Mapping[str, Any]] | None = None,
        clip_sample: bool = False,
        num_diffusion_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str | None = None,
        trained_betas: list[float] | None = None,
        rescale_betas_zero_snr: bool = False,
        shift: float = 1.0,
    ):
        check_positive(shift=shift)
        if presets is not None:
            self.register_to_config(presets=_presets_in_json(presets))
        self._init_state()
        for num_steps in self.config.presets or {}:
            self.set_timesteps(int(num_steps))  # raises for one that is no schedule
        if presets:
            self._init_state()

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[float] | torch.Tensor | None = None,
        sigmas: Sequence[float] | torch.Tensor | None = None,
        gamma: float | Sequence[float] | torch.Tensor | None = None,
        target_sigmas: Sequence[float] | torch.Tensor | None = None,
        final_sigma: float | None = None,
    ) -> None:
        """Fix the levels of a run: `sigmas` (N + 1), `target_sigmas`, `timesteps` and `target_timesteps` (N each).

        Args:
            num_inference_steps: N, on the Karras schedule (of a flow map that of `start_levels`) with N + 1 levels, or
                if nothing else is given and the config's `presets` have an entry for N, on that.
                `gamma=scheduler.config.gamma` passes it over.
            device: where `timesteps` and `target_timesteps` go. `sigmas` and `target_sigmas` stay on the CPU.
            timesteps: instead, the c_noise of the level at which each step starts, descending floats.
            sigmas: instead, these levels themselves, descending, e.g. `[80.0, 5.0, 0.6]` for three steps; the end is
                added.
            gamma: a number in [0, 1] or one per step. None is the preset's for N if nothing else is given, else the
                config's. The last step never adds noise.
            target_sigmas: in place of gamma, the level s to which each step jumps: not below sigma_min and not above
                the start of the next step, up to which noise of variance t_next^2 - s^2 leads. The last one is where
                sampling ends.
            final_sigma: the level at which the last step ends: None is the config's, by default sigma_min. Higher, it
                leaves noise of that standard deviation in the image. At 0, N steps have the Karras schedule with N
                levels, and the last leads from sigma_min to 0 through the denoiser, x = g(x_t, t, t), as EDM's does;
                the error is of order sigma_min^2. The network is never shown less than sigma_min: a last step to 0 that
                starts higher, as a single step does, gives g(x_t, t, sigma_min), which differs from the end of the
                trajectory by about sigma_min.

        Raises:
            ValueError: none or two of the three sources, levels that do not descend or leave (sigma_min, sigma_max],
                integer timesteps, gamma outside [0, 1] or of another length than the steps, target levels that the
                steps cannot reach or beside gamma or final_sigma, a final_sigma between 0 and sigma_min or not below
                the start of the last step.
        """
        options = {
            "timesteps": timesteps,
            "sigmas": sigmas,
            "gamma": gamma,
            "target_sigmas": target_sigmas,
            "final_sigma": final_sigma,
        }
        asked = [(type(value), value) for value in (num_inference_steps, *options.values())]
        if not all(kind in (int, float, type(None)) for kind, _ in asked):
            self._choose_schedule(num_inference_steps, device, options)
            return
        asked.append((type(device), device))
        if self._kept_schedule is None or self._kept_schedule[0] is not self.config or self._kept_schedule[1] != asked:
            self._choose_schedule(num_inference_steps, device, options)
            self._kept_schedule = self.config, asked, {name: copied(vars(self)[name]) for name in SCHEDULE}
        else:
            vars(self).update({name: copied(value) for name, value in self._kept_schedule[2].items()})

    def _choose_schedule(self, num_inference_steps, device, options: dict[str, Any]) -> None:
        """`set_timesteps`: by the preset for this number of steps, or by `options`."""
        preset = (self.config.presets or {}).get(str(num_inference_steps))
        if preset is None or any(value is not None for value in options.values()):
            self._set_schedule(num_inference_steps, device, **options)
            return
        try:
            self._set_schedule(None if "sigmas" in preset else num_inference_steps, device, **{**options, **preset})
            if self.num_inference_steps != num_inference_steps:
                raise ValueError(f"sigmas must hold {num_inference_steps} levels, got {preset['sigmas']}.")
        except ValueError as error:
            raise ValueError(
                f"presets['{num_inference_steps}'] of the config is no schedule. {error} Pass `presets=None` for none."
            ) from error

    def _set_schedule(self, num_inference_steps, device, timesteps, sigmas, gamma, target_sigmas, final_sigma) -> None:
        """`set_timesteps` without presets."""
        config = self.config
        targets = None if target_sigmas is None else as_float64(target_sigmas, "target_sigmas")
        if targets is not None:
            if gamma is not None or final_sigma is not None:
                other = "gamma" if gamma is not None else "final_sigma"
                raise ValueError(
                    f"target_sigmas and {other} contradict each other: target_sigmas says where each step jumps to, "
                    "the last one included. Pass one of them."
                )
            if targets.ndim != 1 or len(targets) == 0:
                raise ValueError(
                    f"target_sigmas must be a list with one level per step, got shape {tuple(targets.shape)}."
                )
            final_sigma = targets[-1]
        name = "final_sigma" if targets is None else "target_sigmas[-1]"
        end = self._end(name, final_sigma)
        if end >= config.sigma_max:
            raise ValueError(f"{name}={end:g} must lie below sigma_max={config.sigma_max:g}, where sampling starts.")
        t = self._start_levels(num_inference_steps, timesteps, sigmas, end)
        levels = torch.cat([t, t.new_tensor([end])])
        t_next = levels[1:]

        if targets is None:
            gamma = config.gamma if gamma is None else gamma
            gammas = as_float64(gamma, "gamma")
            if gammas.ndim > 0 and gammas.shape != t.shape:
                raise ValueError(f"gamma must be a number or a list with one value per step ({len(t)}), got {gamma!r}.")
            gammas = gammas.expand_as(t)
            if not all(0 <= value <= 1 for value in gammas.tolist()):
                raise ValueError(
                    f"gamma must lie in [0, 1] (0: deterministic, 1: consistency-model multistep), got {gamma!r}."
                )
            s, noise_std = t_next.clone(), torch.zeros_like(t_next)
            if len(t) > 1:  # the last step, often the only one, leads to its end without noise
                s[:-1], noise_std[:-1] = gamma_split(t_next[:-1], gammas[:-1], config.sigma_min)
        else:
            s = self._reachable(targets, t_next)
            noise_std = ((t_next - s) * (t_next + s)).sqrt()
            gammas = gamma_of_split(t_next, s, config.sigma_min)
            s[-1], noise_std[-1] = end, 0.0

        self.num_inference_steps = len(t)
        self.sigmas = levels.to(torch.float32)
        self.gammas = gammas.to(torch.float32)
        self.target_sigmas = s.to(torch.float32)
        self.noise_std = noise_std.to(torch.float32)
        self.target_timesteps = self.sigma_to_t(s.clamp(min=config.sigma_min)).to(device=device, dtype=torch.float32)
        self._jumps = list(zip(self.target_sigmas.tolist(), self.noise_std.tolist()))
        self._set_calls(t, device)

    def _end(self, name: str, final_sigma: float | torch.Tensor | None) -> float:
        """The level at which the last step ends, checked: 0, or from sigma_min on."""
        sigma_min = self.config.sigma_min
        if final_sigma is None:
            final_sigma = self.config.final_sigma
        if final_sigma is None:
            return sigma_min
        final_sigma = as_float64(final_sigma, name)
        if final_sigma.ndim > 0 or not (final_sigma == 0 or final_sigma >= sigma_min * (1 - 1e-4)):
            raise ValueError(
                f"{name} must be 0, or lie between sigma_min={sigma_min:g} and the level at which the last step "
                f"starts, got {final_sigma.tolist()}: the network knows no level between 0 and sigma_min."
            )
        final_sigma = final_sigma.item()
        return sigma_min if abs(final_sigma - sigma_min) <= 1e-4 * sigma_min else final_sigma

    def _reachable(self, targets: torch.Tensor, t_next: torch.Tensor) -> torch.Tensor:
        """`targets`, checked: a step jumps at most down to sigma_min and at least down to the start of the next."""
        sigma_min = self.config.sigma_min
        if targets.shape != t_next.shape:
            raise ValueError(
                f"target_sigmas must hold one level per step ({len(t_next)}), the last one where sampling ends, got "
                f"{targets.tolist()}."
            )
        for i, (s, high) in enumerate(zip(targets[:-1].tolist(), t_next[:-1].tolist())):
            if not sigma_min * (1 - 1e-4) <= s <= high * (1 + 1e-6):
                raise ValueError(
                    f"target_sigmas[{i}]={s:g} must lie between sigma_min={sigma_min:g} and {high:g}, the level at "
                    f"which step {i + 1} starts: noise leads up to it, never down."
                )
        # A target that differs by float32 rounding is meant to be equal: the square root would be noise.
        return torch.where(targets >= t_next * (1 - 1e-6), t_next, targets.clamp(min=sigma_min))

    def step(
        self,
        model_output: torch.Tensor,
        timestep: torch.Tensor | float,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
        project: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> CTMSchedulerOutput | tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Jump from t to s, then add noise up to the next level (CTM, Algorithm 3).

        Args:
            model_output: F(c_in x_t, c_noise(t), c_noise(s)), shape (B, C, H, W).
            timestep: the current one of `timesteps`. Needed for the first call of a run; then steps are counted.
            sample: x_t, shape (B, C, H, W). Arithmetic is float32, or float64 for a float64 sample.
            generator: source of the noise, or one per sample. Not used where gamma is 0.
            return_dict: return a `CTMSchedulerOutput` rather than a tuple.
            project: replaces the image that the jump aims at, for editing. It is given (sigma_min/t) x_t + (1 -
                sigma_min/t) g and what it returns, p, is the state at sigma_min: x_s = r x_t + (1 - r) p with r = (s -
                sigma_min) / (t - sigma_min). The identity changes nothing. At gamma = 1 and in a last step to
                sigma_min, x_s is p, bit for bit. p is returned as `pred_original_sample`. Not in a step that ends at 0.

        Raises:
            ValueError: an integer timestep, more steps than were set, or `project` in a step that ends below sigma_min.
        """
        t = self.sigma_of_call(timestep).item()
        s, noise_std = self._jumps[self._step_index]
        x_t = sample.to(accumulation_dtype(sample))

        g = self.g_of_call(model_output, x_t)
        if self.config.clip_sample:
            g = g.clamp(-1, 1)
        if project is not None:
            end = torch.tensor(self.config.sigma_min, dtype=torch.float32, device="cpu").item()  # rounded as s is
            if s < end:
                raise ValueError(
                    "project needs a run that ends at sigma_min: `set_timesteps(..., final_sigma=sigma_min)`."
                )
            g = project(jump(x_t, g, t, end))
            t, s = t - end, s - end  # the image is the state at sigma_min, so levels count from there
        x_s = jump(x_t, g, t, s)
        x_next = x_s
        if noise_std > 0:
            noise = randn_tensor(x_s.shape, generator=generator, device=x_s.device, dtype=x_s.dtype)
            x_next = x_s + noise_std * noise
        self._step_index += 1

        outputs = [value.to(sample.dtype) for value in (x_next, x_s, g)]
        return CTMSchedulerOutput(*outputs) if return_dict else tuple(outputs)
