# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""The objectives, in one table, and the stages of a run."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from itertools import pairwise

import torch

from ..cli.options import option
from .ctm import ctm
from .derivatives import DerivativeOptions
from .eulerian import eulerian
from .jumps import Jumps, Point
from .lagrangian import beside_target, lagrangian
from .pool import PoolOptions
from .regression import regression
from .semigroup import semigroup
from .solvers import TargetOptions
from .times import TimeOptions


@dataclass(frozen=True)
class Objective:
    """What a student learns besides score matching.

    Args:
        terms: `(jumps, options)` -> named terms, 0-d, of which "trajectory_loss" is descended.
        times: what it asks about: "matching", the times of --matching; "global", jumps to where the solver stops;
            "between", times between the levels, without a solver.
        beside: `(jumps, options)` -> further points at which the student is asked with gradient.
    """

    terms: Callable[[Jumps, "ObjectiveOptions"], dict[str, torch.Tensor]]
    times: str
    beside: Callable[[Jumps, "ObjectiveOptions"], list[Point]] = lambda jumps, options: []


OBJECTIVES = {
    "ctm": Objective(ctm, "matching"),
    "regression": Objective(regression, "global"),
    "eulerian": Objective(eulerian, "between"),
    "lagrangian": Objective(lagrangian, "between", beside_target),
    "semigroup": Objective(semigroup, "between"),
}

# The options that only some objectives read.
READERS = {
    "matching": {"ctm"},
    "inner_target": {"ctm"},
    "max_solver_steps": {"ctm", "regression"},
    "solver": {"ctm", "regression"},
    "pool_size": {"ctm", "regression"},
    "distance": {"ctm", "regression", "lagrangian", "semigroup"},
    "derivative": {"eulerian", "lagrangian"},
    "derivative_step": {"eulerian", "lagrangian"},
    "eulerian_warmup": {"eulerian"},
    "lagrangian_gradient": {"lagrangian"},
}


@dataclass(frozen=True)
class Stage:
    """An objective and the step at which it begins."""

    name: str
    start: int

    @property
    def objective(self) -> Objective:
        return OBJECTIVES[self.name]


@dataclass
class ObjectiveOptions(DerivativeOptions, PoolOptions, TimeOptions, TargetOptions):
    """What the student learns."""

    objective: list[str] = option(
        ["regression"],
        f"What the student learns besides score matching: {', '.join(OBJECTIVES)}. Several follow each other, each but "
        "the first with the step at which it begins, as in 'regression eulerian@600'.",
    )

    def __post_init__(self) -> None:
        """Refuse what no objective of the run reads, and fill in the size of the pool."""
        super().__post_init__()
        parts = self._parts
        starts = [int(start) if start.isdecimal() else -1 for _, _, start in parts[1:]]
        self.check(
            bool(parts)
            and {name for name, _, _ in parts} <= OBJECTIVES.keys()
            and parts[0][1:] == ("", "")
            and all(before < after for before, after in pairwise([0, *starts])),
            "objective",
            f"one or several of {', '.join(OBJECTIVES)}, each but the first with a later step at which it begins, as "
            "in regression eulerian@600",
        )
        names = {name for name, _, _ in parts}
        for entry, readers in READERS.items():
            if not names & readers:
                self.refuse([entry], f"is for --objective {' or '.join(sorted(readers))}", "give that, or leave it out")
        if self.pool_size is None and "regression" in names:
            self.pool_size = 8
        if not self.pool_size:
            pooled = [entry.name for entry in fields(PoolOptions) if entry.name != "pool_size"]
            self.refuse(pooled, "needs a pool, --pool_size")
        if self.lagrangian_gradient == "full":
            self.check(self.derivative == "difference", "derivative", "difference with --lagrangian_gradient full")

    @property
    def _parts(self) -> list[tuple[str, str, str]]:
        """The name of each objective, "@" and the step at which it begins; the last two are empty if not given."""
        return [text.partition("@") for text in self.objective]

    @property
    def stages(self) -> list[Stage]:
        """The objectives in their order."""
        return [Stage(name, int(start or 0)) for name, _, start in self._parts]

    def stage_at(self, step: int) -> Stage:
        """The stage of a step."""
        return next(stage for stage in reversed(self.stages) if stage.start <= step)
