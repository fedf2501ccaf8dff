# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""CTM's gamma sampling (Kim et al. 2024, Algorithm 3) as a diffusers scheduler."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor

from .scheduling_utils_ctm import KarrasSchedulerMixin, accumulation_dtype, as_float64
from .trajectory import gamma_split, jump


@dataclass
class CTMSchedulerOutput(BaseOutput):
    """Output of `CTMScheduler.step`. All have the shape and dtype of the sample.

    Args:
        prev_sample: state at the next level t_next, the input of the next step; after the last step, the image.
        pred_noised_sample: x_s = G(x_t, t, s), the jump before noise is added.
        pred_original_sample: g(x_t, t, s), a clean sample: the mean of the denoiser along the trajectory from t to s.
    """

    prev_sample: torch.Tensor
    pred_noised_sample: torch.Tensor
    pred_original_sample: torch.Tensor | None = None


class CTMScheduler(KarrasSchedulerMixin):
    """Samples a consistency trajectory model in any number of steps at any gamma.

    Step i jumps from level t_i down to s_i = sigma_min + sqrt(1 - gamma^2) (t_{i+1} - sigma_min), then adds noise up to
    t_{i+1}. The last step ends at sigma_min and adds none. One network evaluation per step. This is the authors' sampler; the
    paper's Algorithm 3 is its limit sigma_min -> 0.

    - gamma = 0: deterministic jumps along the probability-flow ODE.
    - gamma = 1: multistep sampling of consistency models, step for step.

    The network is shown two times, so both are fixed by `set_timesteps`: call it as
    `unet(scheduler.scale_model_input(x, t), t, target_timestep)` with `t, target_timestep` from
    `zip(scheduler.timesteps, scheduler.target_timesteps)`.

    Args:
        num_train_timesteps: number of noise levels of the training grid. Sampling may use any number.
        sigma_min: lowest noise level, where sampling ends.
        sigma_max: highest noise level, where it starts.
        sigma_data: standard deviation of the data, for preconditioning.
        rho: exponent of the Karras schedule.
        prediction_type: what the network predicts: "edm" (F of Karras et al. 2022, Table 1), "epsilon", "v_prediction", "sample",
            "flow_prediction", "score" or "consistency"; see `trajectory.scalings`.
        timestep_scale: the network is shown timestep_scale * ln(level) / 4. 1 for NVIDIA's EDM, 1000 for the OpenAI, consistency
            and CTM family. Part of a checkpoint: with the wrong one, samples are garbage.
        gamma: what `set_timesteps` uses when it is given none, in [0, 1].
        clip_sample: clamp g to [-1, 1] in each step. g is a mean of the denoiser, so this is right for data in [-1, 1].
        num_diffusion_timesteps: of a network of discrete timesteps or of a flow: their number in its training.
        beta_start, beta_end, beta_schedule, trained_betas, rescale_betas_zero_snr: of a network of discrete timesteps, as in diffusers'
            `DDPMScheduler`; beta_schedule or trained_betas is needed for "epsilon", "v_prediction" and "sample". `from_config`
            reads them from the config of such a scheduler.
    """

    order = 1

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
        clip_sample: bool = False,
        num_diffusion_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str | None = None,
        trained_betas: list[float] | None = None,
        rescale_betas_zero_snr: bool = False,
    ):
        self._init_state()

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[float] | torch.Tensor | None = None,
        sigmas: Sequence[float] | torch.Tensor | None = None,
        gamma: float | Sequence[float] | torch.Tensor | None = None,
    ) -> None:
        """Fix the levels of a run: `sigmas` (N + 1), `target_sigmas`, `timesteps` and `target_timesteps` (N each).

        Args:
            num_inference_steps: N, on the Karras schedule with N + 1 levels.
            device: where `timesteps` and `target_timesteps` go. `sigmas` and `target_sigmas` stay on the CPU.
            timesteps: instead, the c_noise of the level at which each step starts, descending floats.
            sigmas: instead, these levels themselves, descending, e.g. `[80.0, 5.0, 0.6]` for three steps; sigma_min is added.
            gamma: a number in [0, 1] or one per step; None is the config's. The last step never adds noise.

        Raises:
            ValueError: none or two of the three sources, levels that do not descend or leave (sigma_min, sigma_max], integer
                timesteps, gamma outside [0, 1] or of another length than the steps.
        """
        levels = self._start_levels(num_inference_steps, timesteps, sigmas)
        config = self.config
        if levels is None:
            levels = self._karras_levels(num_inference_steps + 1)
        else:
            levels = torch.cat([levels, levels.new_tensor([config.sigma_min])])
        t, t_next = levels[:-1], levels[1:]

        gamma = config.gamma if gamma is None else gamma
        gammas = as_float64(gamma, "gamma")
        if gammas.ndim > 0 and gammas.shape != t.shape:
            raise ValueError(f"gamma must be a number or a list with one value per step ({len(t)}), got {gamma!r}.")
        gammas = gammas.expand_as(t)
        if not ((gammas >= 0) & (gammas <= 1)).all():
            raise ValueError(
                f"gamma must lie in [0, 1] (0: deterministic, 1: consistency-model multistep), got {gamma!r}."
            )
        s, noise_std = gamma_split(t_next, gammas, config.sigma_min)

        self.num_inference_steps = len(t)
        self.sigmas = levels.to(torch.float32)
        self.gammas = gammas.to(torch.float32)
        self.target_sigmas = s.to(torch.float32)
        self.noise_std = noise_std.to(torch.float32)
        self.target_timesteps = self.sigma_to_t(s).to(device=device, dtype=torch.float32)
        self._set_calls(t, device)

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
            project: replaces the image that the jump aims at, for editing. It is given (sigma_min/t) x_t + (1 - sigma_min/t) g and
                what it returns, p, is the state at sigma_min: x_s = r x_t + (1 - r) p with r = (s - sigma_min) / (t - sigma_min).
                The identity changes nothing. At gamma = 1 and in the last step, x_s is p, bit for bit. p is returned as
                `pred_original_sample`.

        Raises:
            ValueError: an integer timestep, or more steps than were set.
        """
        t = self._sigma_of_call(timestep)
        index = self._step_index
        s = self.target_sigmas[index]
        x_t = sample.to(accumulation_dtype(sample))

        g = self._denoised(model_output, x_t, t)
        if self.config.clip_sample:
            g = g.clamp(-1, 1)
        t, s = t.double(), s.double()
        if project is not None:
            end = torch.tensor(self.config.sigma_min, dtype=torch.float32).double()  # rounded as s is: s - end is 0
            g = project(jump(x_t, g, t, end))
            t, s = t - end, s - end  # the image is the state at sigma_min, so levels count from there
        x_s = jump(x_t, g, t, s)
        x_next = x_s
        noise_std = float(self.noise_std[index])
        if noise_std > 0:
            noise = randn_tensor(x_s.shape, generator=generator, device=x_s.device, dtype=x_s.dtype)
            x_next = x_s + noise_std * noise
        self._step_index += 1

        outputs = [value.to(sample.dtype) for value in (x_next, x_s, g)]
        return CTMSchedulerOutput(*outputs) if return_dict else tuple(outputs)
