"""The moving average of a network's weights, as a network that can be called."""

import copy

import torch
from diffusers.training_utils import EMAModel


class EMA:
    """diffusers' `EMAModel` whose averages are the parameters of `module`, a frozen copy of `network` in evaluation mode.

    The average that the losses call and the one that is saved are thus the same storage.

    Args:
        network: what is averaged.
        decay: per step, in [0, 1).
        warmup: let the decay rise as (1 + step) / (10 + step) up to `decay`; else it is constant.
    """

    def __init__(self, network: torch.nn.Module, decay: float, warmup: bool = False):
        self.module = copy.deepcopy(network).requires_grad_(False).eval()
        self.average = EMAModel([], decay=decay, min_decay=0.0 if warmup else decay, foreach=True)
        self.average.shadow_params = [parameter.data for parameter in self.module.parameters()]

    def step(self, network: torch.nn.Module) -> None:
        """Move towards the weights of `network`."""
        self.average.step(network.parameters())

    def state_dict(self) -> dict:
        return {"optimization_step": self.average.optimization_step, "weights": self.module.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.average.optimization_step = state["optimization_step"]
        self.module.load_state_dict(state["weights"])  # copies in place
