"""What a run shows: means of its losses, samples, distances, steps left out."""

import torch
from accelerate import Accelerator


# Between them the levels whose score-matching losses are told apart; about a factor of 3 each.
SIGMA_EDGES = (0.1, 0.3, 1.0, 3.0, 10.0)

SIGMA_BINS = ("below_0.1", *(f"{low:g}_to_{high:g}" for low, high in zip(SIGMA_EDGES, SIGMA_EDGES[1:])), "from_10")


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
