# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Calls of one pipeline in several threads: each runs on a copy of the pipeline, with a scheduler of its own."""

import copy
import functools
from collections.abc import Callable
from typing import Any


class Run:
    """A call of `pipe` on `own`, a shallow copy that shares its networks.

    Whatever the call sets on `own` or its scheduler stays there until `show` lets `pipe` and its scheduler, which stay
    the same objects, have it too. A scheduler's `set_timesteps` makes new tensors and lists, so that copies share none
    that a step changes.
    """

    def __init__(self, pipe: Any):
        self.own, scheduler = copy.copy(pipe), copy.copy(pipe.scheduler)
        vars(self.own)["scheduler"] = scheduler  # not by setattr, which writes the config anew
        self._pairs = [(pipe, self.own), (pipe.scheduler, scheduler)]
        self._start = [dict(vars(own)) for _, own in self._pairs]
        self._changed: list[set[str]] = [set(), set()]
        self.pipe = pipe
        vars(self.own)["_interrupt"] = False

    def show(self) -> None:
        """Let the pipeline and its scheduler have all attributes that the call has changed."""
        for (shared, own), start, changed in zip(self._pairs, self._start, self._changed, strict=True):
            changed.update(name for name, value in vars(own).items() if name not in start or start[name] is not value)
            vars(shared).update({name: vars(own)[name] for name in changed if name in vars(own)})


# Calls that run now, by their copy of the pipeline.
_RUNS: dict[Any, Run] = {}


def own_run(call: Callable) -> Callable:
    """Let each `call(pipe, ...)`, of a method or a function, run on a copy of `pipe`, undisturbed by other threads.

    What the call leaves in its copy, also by an error, is in `pipe` afterwards: `pipe.scheduler` shows the schedule of
    the call that ended last.
    """

    @functools.wraps(call)
    def run(pipe, *args, **kwargs):
        current = Run(pipe)
        _RUNS[current.own] = current
        try:
            return call(current.own, *args, **kwargs)
        finally:
            del _RUNS[current.own]
            current.show()

    return run


def runs_of(pipe: Any) -> list[Any]:
    """The copies of `pipe` on which calls run now."""
    return [run.own for run in _RUNS.copy().values() if run.pipe is pipe]


def show_run(own: Any) -> None:
    """In a call: let its pipeline show how far it is, for those who do not hold its copy `own`."""
    if own in _RUNS:
        _RUNS[own].show()
