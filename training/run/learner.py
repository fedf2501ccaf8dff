# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""A network with its optimizer and loss scale; steps that are skipped."""

import torch
from accelerate import Accelerator

from .devices import whole


class TrainedNetwork:
    """A network, prepared by Accelerate, with its optimizer and, in fp16, a loss scale of its own.

    A step whose gradient has an infinite or NaN entry is skipped: it changes neither the weights nor the optimizer's
    state.

    Args:
        accelerator: of the run.
        module: on the device.
        optimizer: over parameters of `module`.
        scaler: of its loss; None in other precisions than fp16.

    Attributes:
        network: `module` wrapped for several processes. `bare` is `module`.
        skipped: number of skipped steps, and `skipped_in_a_row` of those since the last that was not skipped: 0-d
            tensors on the device, the same in every process.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        module: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler | None,
    ):
        self.accelerator, self.bare = accelerator, module
        self.scaler = scaler or torch.amp.GradScaler(enabled=False)  # which does nothing
        self.network, prepared = accelerator.prepare(module, optimizer)
        if hasattr(module, "_original_forward"):
            # Accelerate's forward turns autocast on. Here the loop does that, and derivatives are taken without.
            module.forward = module._original_forward
        self.optimizer = prepared.optimizer
        self.parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        self.skipped = torch.zeros((), dtype=torch.int64, device=accelerator.device)
        self.skipped_in_a_row = self.skipped.clone()

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradient of `loss`, divided by the accumulation steps, to that of this network's parameters alone."""
        loss = self.scaler.scale(loss / self.accelerator.gradient_accumulation_steps)
        if self.accelerator.is_fsdp2:  # its graph has other tensors; there is one network
            loss.backward()
        else:
            loss.backward(inputs=self.parameters)

    def step(self, max_grad_norm: float) -> tuple[torch.Tensor, torch.Tensor | bool]:
        """Take the optimizer's step if the gradient is finite, and forget the gradient.

        Args:
            max_grad_norm: clip the gradient's norm to this; 0 is no clipping.

        Returns:
            The norm before clipping, and whether the step was taken: a bool, or 1 or 0 on the device if the host does
            not know.
        """
        self.scaler.unscale_(self.optimizer)
        norm = whole(clip_gradient(self.parameters, max_grad_norm))
        # After the mean over processes the gradients are the same everywhere, so every process decides alike.
        broken = norm.isfinite().logical_not_()
        self.skipped += broken
        self.skipped_in_a_row.add_(1).mul_(broken)
        if getattr(self.optimizer, "_step_supports_amp_scaling", False) and not self.accelerator.is_fsdp2:
            # Fused Adam and AdamW read the flag on the device, as they do for torch's GradScaler: nothing waits for it.
            self.optimizer.found_inf = broken.float()
            self.optimizer.step()
            del self.optimizer.found_inf
            applied = broken.logical_not()
        else:
            # RAdam does not read such a flag: on a GPU the host waits here for the backward pass, once per step.
            applied = not broken.item()
            if applied:
                self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.update()
        return norm, applied

    def state_dict(self) -> dict:
        """What Accelerate does not save: the counts, and the loss scale of a second network."""
        state = {"skipped": self.skipped.item(), "skipped_in_a_row": self.skipped_in_a_row.item()}
        if self.scaler.is_enabled() and self.scaler is not self.accelerator.scaler:
            state["scaler"] = self.scaler.state_dict()
        return state

    def load_state_dict(self, state: dict) -> None:
        self.skipped.fill_(state["skipped"])
        self.skipped_in_a_row.fill_(state["skipped_in_a_row"])
        if self.scaler.is_enabled() and "scaler" in state:  # else the checkpoint is of a run in another precision
            self.scaler.load_state_dict(state["scaler"])


def clip_gradient(parameters: list[torch.nn.Parameter], max_norm: float) -> torch.Tensor:
    """Scale the gradient to at most `max_norm` (0: leave it); return its norm before, 0-d; never wait for a GPU."""
    if max_norm > 0:
        return torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return torch.stack(torch._foreach_norm(gradients)).norm()
