# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""diffusers' schedulers in this package's words."""

import inspect
from collections.abc import Mapping

import diffusers
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from .checks import as_float64, check_positive, check_steps
from .preconditioning import discrete_levels


def own_config(config: Mapping) -> dict:
    """The config of a scheduler of diffusers in this package's words; one that is ours already, unchanged.

    Families are known by keys that only they have: a config that was never saved does not hold its class. What a file leaves out
    is filled in with the defaults of the class that it names.

    - DDPM and all others with betas: sigma_min and sigma_max are the levels of the first and the last timestep.
    - flow matching: sigma_min is the level of timestep 1 of `num_train_timesteps`; sigma_max is 80 as EDM's, of timestep 987.7 of
      1000, since timestep 1000 has no finite level. `shift` moves timesteps and levels alike and changes nothing here.
    - `ScoreSdeVeScheduler`: levels are doubled, for images in [-1, 1] rather than [0, 1].
    - `CMStochasticIterativeScheduler`: a consistency model.
    - EDM: diffusers' schedulers call F "epsilon". A file with sigma_data and "sample", which no scheduler of diffusers writes, is the
      authors' EDM teacher and shows 1000 ln(sigma) / 4.

    What it returns may be passed again. Raises ValueError for what would be read wrongly (`_why_not`), and for numbers or betas that
    make no levels.
    """
    openai = config.get("prediction_type") == "sample" and "sigma_data" in config
    said = config.get("prediction_type")
    if said is None and "predict_epsilon" in config:  # of the first versions of diffusers
        said = "epsilon" if config["predict_epsilon"] else "sample"
    config = {**_defaults(config.get("_class_name")), **config}
    kind = config.get("prediction_type") if said is None else said
    has_betas = config.get("beta_schedule") is not None or config.get("trained_betas") is not None
    if (
        "sigma_schedule" in config
    ):  # diffusers' EDM schedulers; they carry our numbers along, if they were made from ours
        if kind == "v_prediction" and not has_betas:
            raise ValueError("prediction_type='v_prediction' of diffusers' EDM schedulers, -F, is not supported.")
        return {**config, "prediction_type": "edm"} if kind == "epsilon" and not has_betas else config
    if "timestep_scale" in config:
        return config

    reason = _why_not(config, kind)
    if reason is not None:
        raise ValueError(reason)
    steps = config.get("num_diffusion_timesteps", config.get("num_train_timesteps", 1000))  # ours first
    numbers: dict = {}
    if kind == "flow_prediction" or "shift" in config:
        check_steps(num_train_timesteps=steps)
        if steps < 2:
            raise ValueError(f"A flow with num_train_timesteps={steps} has no levels between its ends.")
        numbers = {"prediction_type": "flow_prediction", "num_diffusion_timesteps": steps}
        numbers |= {"sigma_min": 1 / (steps - 1), "sigma_max": 80.0}
    elif has_betas and not openai:
        if kind is None:
            kind = "epsilon"
        betas = config.get("trained_betas")
        if betas is not None:
            betas = as_float64(betas, "trained_betas").flatten().tolist()
            steps = len(betas)
        process = {"num_diffusion_timesteps": steps, "trained_betas": betas}
        names = ("beta_start", "beta_end", "beta_schedule", "rescale_betas_zero_snr")
        process |= {name: config[name] for name in names if name in config}
        levels = discrete_levels(**process).tolist()
        numbers = {"prediction_type": kind, **process, "sigma_min": levels[0], "sigma_max": levels[-1]}
    elif "sampling_eps" in config:
        check_positive(**{name: config.get(name) for name in ("sigma_min", "sigma_max")})
        numbers = {"prediction_type": "score"}
        numbers |= {"sigma_min": 2 * config["sigma_min"], "sigma_max": 2 * config["sigma_max"]}
    elif openai or "clip_denoised" in config:
        names = ("sigma_min", "sigma_max", "sigma_data", "rho")
        numbers = {"prediction_type": "edm" if openai else "consistency", "timestep_scale": 1000.0}
        numbers |= {name: config[name] for name in names if name in config}
    return numbers or config


def _why_not(config: Mapping, kind: str | None) -> str | None:
    """Why the levels of a scheduler of diffusers are not those that its other numbers say; None if they are."""
    if config.get("invert_sigmas"):
        return "A flow with invert_sigmas=True runs from data to noise, which is not supported."
    if "beta_min" in config:
        return "The continuous times of a ScoreSdeVpScheduler are not supported."
    if config.get("snr_shift_scale", 1.0) != 1.0:
        return f"Betas whose levels snr_shift_scale={config['snr_shift_scale']!r} moves are not supported."
    if config.get("timestep_type") == "continuous" and kind == "v_prediction":
        return "timestep_type='continuous' with v_prediction shows ln(sigma) / 4 instead of timesteps, which is not supported."
    if config.get("use_flow_sigmas") and kind != "flow_prediction":
        return f"use_flow_sigmas=True with prediction_type={kind!r} is not supported, only with 'flow_prediction'."
    if "original_inference_steps" in config:
        return "A network of an LCMScheduler or TCDScheduler jumps to the end of trajectories and is no denoiser; it is not supported."
    return None


def _defaults(class_name: str | None) -> dict:
    """Default config of diffusers' scheduler of that name; nothing for others, ours included."""
    cls = getattr(diffusers, class_name, None) if isinstance(class_name, str) else None
    if not isinstance(cls, type) or not issubclass(cls, SchedulerMixin) or not cls.__module__.startswith("diffusers."):
        return {}
    parameters = inspect.signature(cls.__init__).parameters.values()
    return {parameter.name: parameter.default for parameter in parameters if parameter.default is not parameter.empty}
