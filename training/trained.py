"""One network that learns: its optimiser, the scale of its loss, and the steps that are left out because something was not finite."""

import torch
from accelerate import Accelerator

from .sharding import whole


# Between them the levels whose score-matching losses are told apart; about a factor of 3 each.
SIGMA_EDGES = (0.1, 0.3, 1.0, 3.0, 10.0)
SIGMA_BINS = ("below_0.1", *(f"{low:g}_to_{high:g}" for low, high in zip(SIGMA_EDGES, SIGMA_EDGES[1:])), "from_10")


class TrainedNetwork:
    """A network, prepared by Accelerate, with its optimiser and, in fp16, a loss scale of its own.

    A step whose gradient has an infinite or NaN entry changes nothing: neither the weights nor the optimiser's state.

    Args:
        accelerator: of the run.
        module: on the device.
        optimizer: over parameters of `module`.
        scaler: of its loss; None in other precisions than fp16.

    Attributes:
        network: `module` wrapped for several processes. `bare` is `module`.
        skipped: number of steps left out, and `skipped_in_a_row` of those since the last that was not: 0-d tensors on the device, the same
            in every process.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        module: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler | None,
    ):
        self.accelerator, self.bare, self.scaler = accelerator, module, scaler
        self.network, prepared = accelerator.prepare(module, optimizer)
        self.optimizer = prepared.optimizer
        self.parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        self.skipped = torch.zeros((), dtype=torch.int64, device=accelerator.device)
        self.skipped_in_a_row = self.skipped.clone()

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradient of `loss`, divided by the number of accumulation steps, to that of this network's parameters alone."""
        loss = loss / self.accelerator.gradient_accumulation_steps
        if self.scaler is not None:
            loss = self.scaler.scale(loss)
        if self.accelerator.is_fsdp2:  # whose graph has other tensors; there is one network
            loss.backward()
        else:
            loss.backward(inputs=self.parameters)

    def step(self, max_grad_norm: float) -> tuple[torch.Tensor, torch.Tensor | bool]:
        """Take the optimiser's step if the gradient is finite, and forget the gradient.

        Args:
            max_grad_norm: clip the gradient's norm to this; 0 is no clipping.

        Returns:
            The norm before clipping, and whether the step was taken: 1 or 0 on the device, where that alone knows it, or a bool.
        """
        optimizer = self.optimizer
        if self.scaler is not None:
            self.scaler.unscale_(optimizer)
        norm = whole(clip_gradient(self.parameters, max_grad_norm))
        # After the mean over processes the gradients are the same everywhere, so every process decides alike.
        broken = norm.isfinite().logical_not_()
        self.skipped += broken
        self.skipped_in_a_row += 1
        self.skipped_in_a_row *= broken
        if getattr(optimizer, "_step_supports_amp_scaling", False) and not self.accelerator.is_fsdp2:
            # Fused Adam and AdamW read the flag on the device, as they do for torch's GradScaler: nothing waits for it.
            optimizer.found_inf = broken.float()
            optimizer.step()
            del optimizer.found_inf
            applied = broken.logical_not()
        else:
            # RAdam has no such way: on a GPU the host waits here for the backward pass, once per step.
            applied = not broken.item()
            if applied:
                optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if self.scaler is not None:
            self.scaler.update()
        return norm, applied

    def state_dict(self) -> dict:
        """What Accelerate does not save: the counts, and the loss scale of a second network."""
        state = {"skipped": self.skipped.item(), "skipped_in_a_row": self.skipped_in_a_row.item()}
        if self.scaler is not None and self.scaler is not self.accelerator.scaler:
            state["scaler"] = self.scaler.state_dict()
        return state

    def load_state_dict(self, state: dict) -> None:
        self.skipped.fill_(state.get("skipped", 0))
        self.skipped_in_a_row.fill_(state.get("skipped_in_a_row", 0))
        if self.scaler is not None and "scaler" in state:
            self.scaler.load_state_dict(state["scaler"])


def clip_gradient(parameters: list[torch.nn.Parameter], max_norm: float) -> torch.Tensor:
    """Scale the gradient to at most `max_norm` (0: leave it); return its norm before, 0-d. Nothing waits for the device."""
    if max_norm > 0:
        return torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return torch.stack(torch._foreach_norm(gradients)).norm()


class Means:
    """Means of named numbers over the passes of some steps and over all processes, summed on the device.

    What is infinite or NaN is left out of the means and counted.
    """

    def __init__(self):
        self.sums: dict[tuple[str, ...], torch.Tensor] = {}  # sum and number of finite values of each, shape (2, names)
        self.passes: dict[str, int] = {}

    @torch.no_grad()
    def add(self, values: dict[str, torch.Tensor]) -> torch.Tensor:
        """Add one number of each name; return whether all are finite, 0-d on their device."""
        names = tuple(values)
        stacked = torch.stack([value.detach().float() for value in values.values()])
        finite = stacked.isfinite()
        row = torch.stack([torch.where(finite, stacked, 0), finite.float()])
        self.sums[names] = self.sums[names] + row if names in self.sums else row
        for name in names:
            self.passes[name] = self.passes.get(name, 0) + 1
        return finite.all()

    @torch.no_grad()
    def add_by_level(self, name: str, values: torch.Tensor, sigma: torch.Tensor) -> None:
        """Add each of `values`, shape (B,), to the mean of its noise level's bin, "name/bin" of `SIGMA_BINS`. Nothing waits for the device."""
        above = torch.stack([sigma >= edge for edge in SIGMA_EDGES]).sum(0)
        inside = (above == torch.arange(len(SIGMA_BINS), device=sigma.device)[:, None]) & values.isfinite()
        row = torch.stack([torch.where(inside, values.float(), 0).sum(1), inside.sum(1).float()])
        names = tuple(f"{name}/{bin}" for bin in SIGMA_BINS)
        self.sums[names] = self.sums[names] + row if names in self.sums else row

    def read(self, accelerator: Accelerator) -> tuple[dict[str, float], list[str]]:
        """The means, and the names that were not always finite. Waits for the device, and starts anew."""
        names = [name for group in self.sums for name in group]
        passes, means, broken = self.passes, {}, []
        if names:
            sums = torch.cat(list(self.sums.values()), dim=1)
            for name, total, count in zip(names, *accelerator.reduce(sums, "sum").tolist(), strict=True):
                if count > 0:
                    means[name] = total / count
                if count < passes.get(name, 0) * accelerator.num_processes:
                    broken.append(name)
        self.sums, self.passes = {}, {}
        return means, broken

    def state_dict(self, accelerator: Accelerator) -> list:
        """What is summed so far, over all processes: for one of them to load."""
        return [
            (list(names), accelerator.reduce(row, "sum").cpu(), [self.passes.get(name, 0) for name in names])
            for names, row in self.sums.items()
        ]

    def load_state_dict(self, state: list, device: torch.device, sums: bool) -> None:
        """Go on from `state`; the one process that loads it with `sums` has those of all."""
        self.sums, self.passes = {}, {}
        for names, row, passes in state:
            self.sums[tuple(names)] = row.to(device) if sums else torch.zeros_like(row, device=device)
            self.passes.update(zip(names, passes, strict=True))
