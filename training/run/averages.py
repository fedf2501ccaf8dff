# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Moving averages of a network's weights, as networks that can be called."""

import copy
import os
from collections.abc import Callable

import torch
from ema_pytorch.post_hoc_ema import sigma_rel_to_gamma

from ..cli.training_options import AverageOptions
from .devices import whole


SNAPSHOTS = "ema-snapshots"


def exponential_decay(decay: float, warmup: bool = False) -> Callable[[int], float]:
    """The decay of update n = 1, 2, ...: `decay`, or with `warmup` n / (9 + n) up to it. The first update copies."""

    def at(update: int) -> float:
        if update == 1:
            return 0.0
        return min(update / (9 + update), decay) if warmup else decay

    return at


def power_decay(sigma_rel: float) -> Callable[[int], float]:
    """(1 - 1/n)^(gamma + 1): the average then weighs update m by about m^gamma (Karras et al. 2024, Eqs. 125 to 127).

    `sigma_rel` in (0, 1/sqrt(12)) is the standard deviation of these weights over the training so far, 0.1 a tenth
    of it.
    """
    exponent = sigma_rel_to_gamma(sigma_rel) + 1
    return lambda update: (1 - 1 / update) ** exponent


class EMA:
    """The average as the parameters of `module`, a frozen copy of `network` in evaluation mode.

    The losses call the same storage that is saved.

    Args:
        network: what is averaged.
        decay: per update, in [0, 1), or a function of the number of the update, from 1.
        warmup: let a constant decay rise to its value as n / (9 + n).
    """

    def __init__(self, network: torch.nn.Module, decay: float | Callable[[int], float], warmup: bool = False):
        self.module = copy.deepcopy(network).requires_grad_(False).eval()
        self.decay = decay if callable(decay) else exponential_decay(decay, warmup)
        self.updates = 0

    @torch.no_grad()
    def step(self, network: torch.nn.Module, applied: torch.Tensor | None = None) -> None:
        """Move toward the weights of `network`.

        `applied`, 1 or 0 on the device, says whether the optimizer has moved them; at 0 the average stays too. The host
        need not know it. (diffusers' `EMAModel` has no such switch.)
        """
        self.updates += 1
        weight = 1 - self.decay(self.updates)
        averages = [parameter.data for parameter in self.module.parameters()]
        current = [whole(parameter.data) for parameter in network.parameters()]
        if applied is None:
            torch._foreach_lerp_(averages, current, weight)
        else:
            difference = torch._foreach_sub(current, averages)
            torch._foreach_mul_(difference, weight * applied)
            torch._foreach_add_(averages, difference)

    def start_from(self, weights: dict[str, torch.Tensor]) -> None:
        """Go on from an average of another run, at the full decay: neither copying at first nor warming up."""
        self.module.load_state_dict(weights)
        self.updates = 10**9  # after which every warm-up is over

    def state_dict(self) -> dict:
        return {"updates": self.updates, "weights": self.module.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.updates = state["updates"]
        self.module.load_state_dict(state["weights"])  # copies in place


def make_averages(options: AverageOptions, network: torch.nn.Module) -> dict[str, EMA]:
    """The averages that the options ask for, by name: a decay in digits, or sigma_rel-WIDTH."""
    decays = dict.fromkeys([options.ema_decay, *options.extra_ema_decays])
    averages = {str(decay): EMA(network, decay, options.ema_warmup) for decay in decays}
    for width in options.posthoc_ema:
        averages[f"sigma_rel-{width:g}"] = EMA(network, power_decay(width))
    return averages


def snapshot_folder(output_dir: str, sigma_rel: float, step: int) -> str:
    """The folder that keeps the power-function average of width `sigma_rel` as it was after `step`, as a pipeline."""
    return os.path.join(output_dir, SNAPSHOTS, f"sigma_rel-{sigma_rel:g}-step-{step:06d}")
