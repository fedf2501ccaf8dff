# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""EDM's second-order samplers (Karras et al. 2022, Algorithms 1 and 2) as a diffusers scheduler."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor

from .scheduling_karras import KarrasSchedulerMixin, accumulation_dtype


@dataclass
class EDMHeunSchedulerOutput(BaseOutput):
    """Output of `EDMHeunScheduler.step`. Both have the shape and dtype of the sample.

    Args:
        prev_sample: input of the next network call; after the last, the image.
        pred_original_sample: the denoiser's output D in this call.
    """

    prev_sample: torch.Tensor
    pred_original_sample: torch.Tensor | None = None


class EDMHeunScheduler(KarrasSchedulerMixin):
    """EDM's Heun sampler for denoisers: an EDM teacher, or a CTM asked for its exact score (target time = time).

    N steps cost 2N - 1 network calls: `timesteps` lists the level of every call, two per step (predictor, corrector)
    and one in the last step, which is an Euler step to 0. Second order in the step size.

    With `s_churn` > 0 it is Algorithm 2: before step i noise lifts t_i to t_i (1 + min(s_churn / N, sqrt(2) - 1)) if
    s_tmin <= t_i <= s_tmax. The noise of step i + 1 is added at the end of step i, and that of step 0 is part of
    `init_noise_sigma`, so that the network always sees the level it is told.

    The method needs levels between 0 and infinity: `from_config` replaces those of a flow map by 0.002 and 80.

    Args:
        num_train_timesteps: N before `set_timesteps` is called.
        sigma_min: last level before 0.
        sigma_max: first level.
        rho: exponent of the Karras schedule.
        sigma_data, prediction_type, timestep_scale, num_diffusion_timesteps, beta_start, beta_end, beta_schedule,
            trained_betas, rescale_betas_zero_snr: the numbers of the network, see `preconditioning.Preconditioning`.
        s_churn: amount of noise per run; 0 is the deterministic Algorithm 1.
        s_tmin: lowest level at which noise is added.
        s_tmax: highest one; None is no limit.
        s_noise: standard deviation of the added noise, relative to what would keep the level.
    """

    order = 2

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
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float | None = None,
        s_noise: float = 1.0,
        num_diffusion_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str | None = None,
        trained_betas: list[float] | None = None,
        rescale_betas_zero_snr: bool = False,
    ):
        churn = {"s_churn": s_churn, "s_tmin": s_tmin, "s_tmax": 0.0 if s_tmax is None else s_tmax, "s_noise": s_noise}
        for name, value in churn.items():
            if not (isinstance(value, (int, float)) and value >= 0):
                raise ValueError(f"{name} must be a number >= 0, got {value!r}.")
        self._init_state()

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[float] | torch.Tensor | None = None,
        sigmas: Sequence[float] | torch.Tensor | None = None,
    ) -> None:
        """Fix the levels of a run: `sigmas` (N + 1, ending at 0) and `timesteps` (2N - 1).

        Args:
            num_inference_steps: N, on the Karras schedule with N levels.
            device: where `timesteps` goes. `sigmas` stays on the CPU.
            timesteps: instead, the c_noise of the level at which each step starts, N descending floats.
            sigmas: instead, these levels themselves, descending; 0 is added.

        Raises:
            ValueError: none or two of the three sources, levels that do not descend or leave (sigma_min, sigma_max],
                integer timesteps.
        """
        levels = self._start_levels(num_inference_steps, timesteps, sigmas, end=0.0)
        self.num_inference_steps = len(levels)
        config = self.config

        churned = (levels >= config.s_tmin) & (levels <= (float("inf") if config.s_tmax is None else config.s_tmax))
        lifted = levels * (1 + churned * min(config.s_churn / self.num_inference_steps, 2**0.5 - 1))
        self.sigmas = torch.cat([levels, levels.new_zeros(1)]).to(torch.float32)
        # predictor of step 0 | corrector of step 0, predictor of step 1 | ... | predictor of step N - 1
        calls = torch.cat([lifted[:1], torch.stack([levels[1:], lifted[1:]], dim=1).flatten()])
        self._predictor_state = None
        self._set_calls(calls, device)

    @property
    def init_noise_sigma(self) -> float:
        """Standard deviation of the first sample, the noise of step 0's churn included."""
        level, lifted = float(self.sigmas[0]), float(self.call_sigmas[0])
        return (level**2 + self.config.s_noise**2 * (lifted**2 - level**2)) ** 0.5

    def step(
        self,
        model_output: torch.Tensor,
        timestep: torch.Tensor | float,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> EDMHeunSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """The predictor or the corrector of a Heun step, whichever is due.

        Args:
            model_output: F at `sample`, shape (B, C, H, W).
            timestep: the current one of `timesteps`. Needed for the first call of a run; then calls are counted.
            sample: `prev_sample` of the call before. Arithmetic is float32, or float64 for a float64 sample.
            generator: source of the churn's noise, or one per sample. Not used without churn.
            return_dict: return an `EDMHeunSchedulerOutput` rather than a tuple.

        Raises:
            ValueError: an integer timestep, more calls than were set, or a first call in the middle of a step.
        """
        sigma = self.sigma_of_call(timestep)
        call = self._step_index
        x = sample.to(accumulation_dtype(sample))
        denoised = self.g_of_call(model_output, x)
        slope = (x - denoised) / float(sigma)

        if call % 2 == 0:  # predictor: an Euler step, kept for the corrector
            dt = float(self.sigmas[call // 2 + 1].double() - sigma.double())
            x_next = x + dt * slope
            self._predictor_state = (x, slope, dt)
        else:
            if self._predictor_state is None:
                raise ValueError("A run must begin with the first call of a step: an even index of `timesteps`.")
            x, first_slope, dt = self._predictor_state
            x_next = x + dt * (first_slope + slope) / 2
            x_next = self._churn(x_next, call + 1, generator)
            self._predictor_state = None
        self._step_index += 1

        outputs = (x_next.to(sample.dtype), denoised.to(sample.dtype))
        return EDMHeunSchedulerOutput(*outputs) if return_dict else outputs

    def _churn(self, x: torch.Tensor, call: int, generator) -> torch.Tensor:
        """Lift `x` to the level of predictor number `call` (Algorithm 2, lines 5 and 6)."""
        level, lifted = self.sigmas[call // 2].double(), self.call_sigmas[call].double()
        if lifted <= level:
            return x
        noise = randn_tensor(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        return x + float((lifted**2 - level**2).sqrt()) * self.config.s_noise * noise
