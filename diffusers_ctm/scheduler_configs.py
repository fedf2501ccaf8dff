# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""diffusers' schedulers in this package's words."""

import inspect
from collections.abc import Mapping

import diffusers
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from .preconditioning import PREDICTIONS


def own_config(config: Mapping) -> dict:
    """The config of a scheduler of diffusers in this package's words; one that is ours already, unchanged.

    Each kind of prediction knows the keys that only schedulers of its kind have, since a config that was never saved
    does not hold its class. What a file leaves out is filled in with the defaults of the class that it names.

    - DDPM and all others with betas: sigma_min and sigma_max are the levels of the first and the last timestep.
    - flow matching: sigma_min is the level of timestep 1 of `num_train_timesteps`; sigma_max is 80 as EDM's, since the
      last timestep has no finite level. `shift` moves timesteps and levels alike and changes nothing here. A
      `FlowMapEulerDiscreteScheduler` that says its class (`_class_name`, which saved and loaded configs do) has its
      levels from 0 to infinity and its `shift`.
    - `ScoreSdeVeScheduler`: levels are doubled, for images in [-1, 1] rather than [0, 1].
    - `CMStochasticIterativeScheduler`: a consistency model.
    - EDM: diffusers' schedulers call F "epsilon". A file with sigma_data and "sample", which no scheduler of diffusers
      writes, is the authors' EDM teacher and shows 1000 ln(sigma) / 4.

    The result may be passed again. Raises ValueError for a config that would be misread, and for numbers or betas that
    make no levels.
    """
    said = config.get("prediction_type")
    if said is None and "predict_epsilon" in config:  # the first versions of diffusers
        said = "epsilon" if config["predict_epsilon"] else "sample"
    config = {**_defaults(config.get("_class_name")), **config}
    said = config.get("prediction_type") if said is None else said
    kinds = list(PREDICTIONS.values())
    if "sigma_schedule" in config:  # diffusers' EDM schedulers; made from ours, they carry our numbers along
        kinds = [PREDICTIONS["edm"]]
    elif "timestep_scale" in config:
        return config
    for kind in kinds:
        numbers = kind.numbers_of(config, said)
        if numbers is not None:
            return {**numbers, "prediction_type": kind.name}
    return config


def _defaults(class_name: str | None) -> dict:
    """Default config of diffusers' scheduler of that name; nothing for others, ours included."""
    cls = getattr(diffusers, class_name, None) if isinstance(class_name, str) else None
    if not isinstance(cls, type) or not issubclass(cls, SchedulerMixin) or not cls.__module__.startswith("diffusers."):
        return {}
    return {
        parameter.name: parameter.default
        for parameter in inspect.signature(cls.__init__).parameters.values()
        if parameter.default is not parameter.empty
    }
