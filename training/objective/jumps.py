# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""The samples of a step, and how student, average and teacher act on them: what every objective is given."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from diffusers_ctm.preconditioning import Preconditioning, condition, edm_loss_weight
from diffusers_ctm.trajectory import append_dims, jump

from .distances import Distance, PerceptualDistance, l2_distance
from .times import Times


# (x, t, s): where the student is asked for g
Point = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
# (x, level, class labels) -> D(x, level)
TeacherDenoiser = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
# (x_t, levels from t to u, class labels) -> x_u
TeacherSolver = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]


def noised(x_0: torch.Tensor, sigma: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """x_0 + sigma noise, `sigma` of shape (B,) on any device."""
    sigma = sigma.to(x_0.dtype).to(x_0.device, non_blocking=True)
    return x_0 + append_dims(sigma, x_0.ndim) * noise


def jump_where_needed(
    jump_network: Callable[..., torch.Tensor], x: torch.Tensor, needed: torch.Tensor, *per_sample: torch.Tensor | None
) -> torch.Tensor:
    """`jump_network(x[i], ...)` for the samples `needed` (indices). The jump is the identity for the others: `x`
    unchanged.

    `per_sample` tensors of shape (B, ...) are indexed alike, None stays None.
    """
    if len(needed) == 0:
        return x
    if len(needed) == len(x):
        return jump_network(x, *per_sample)
    rows = needed.to(x.device, non_blocking=True)
    jumped = jump_network(x[rows], *(None if value is None else value[rows] for value in per_sample))
    return x.index_copy(0, rows, jumped)


@dataclass
class Jumps:
    """A step's states x_t on trajectories, and how student, average and teacher act on them.

    An objective reads `x_t`, `t`, `u`, `s`, `g` and calls the networks; `training_loss` sets `outputs` before.

    Args:
        student: the network that learns, maybe wrapped for several processes.
        student_ema: its moving average, which gets no gradient.
        preconditioning: of both.
        times: of the samples.
        x_t: states at level t, shape (B, C, H, W).
        class_labels: shape (B,), or None.
        solver: follows the teacher from t to u. Called in inference mode, where x_u is not known yet.
        teacher: D of the teacher, with gradient if `x` has one.
        known_x_u: states at u of the same trajectories; None asks the solver.
        distance: of two batches of images, shape (B,).
        progress: the part of the run's steps that is done, in [0, 1]; 1 if the student did not start as its teacher.

    Attributes:
        path, t, u, s: the levels of `times` in dtype and on the device of `x_t`.
        outputs: the student's g with graph at the points that the objective asks for, shape (B, C, H, W) each; the
            first at (x_t, t, s).
    """

    student: torch.nn.Module
    student_ema: torch.nn.Module
    preconditioning: Preconditioning
    times: Times
    x_t: torch.Tensor
    class_labels: torch.Tensor | None = None
    solver: TeacherSolver | None = None
    teacher: TeacherDenoiser | None = None
    known_x_u: torch.Tensor | None = None
    distance: Distance = l2_distance
    progress: float = 0.0

    def __post_init__(self) -> None:
        levels = torch.cat([self.times.path, self.times.s[None]])
        levels = levels.to(self.x_t.dtype).to(self.x_t.device, non_blocking=True)
        self.path, self.s = levels[:-1], levels[-1]
        self.t, self.u = self.path[0], self.path[-1]
        self.outputs: tuple[torch.Tensor, ...] = ()

    # The student's answer ---------------------------------------------------------------------------------------------

    @property
    def g(self) -> torch.Tensor:
        """g(x_t, t, s) of the student, with graph."""
        return self.outputs[0]

    @functools.cached_property
    def estimate(self) -> torch.Tensor:
        """G_ema(G(x_t, t, s), s, sigma_min): the image that the student's answer leads to, with graph."""
        return self.to_end(jump(self.x_t, self.g, self.t, self.s))

    @property
    def a(self) -> torch.Tensor:
        """1 - s/t, with the dimensions of `x_t`."""
        return append_dims(1 - self.s / self.t, self.x_t.ndim)

    @property
    def unit(self) -> torch.Tensor:
        """1 / c_out(t) of EDM, in which g is of one size at every level, with the dimensions of `x_t`."""
        return append_dims(edm_loss_weight(self.t, self.preconditioning.sigma_data).sqrt(), self.x_t.ndim)

    def apart(self, g: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The mean distance of two g, 0-d: in units of `unit`, but as images for a distance of their features."""
        if not isinstance(self.distance, PerceptualDistance):
            g, target = self.unit * g, self.unit * target
        return self.distance(g, target).mean()

    # Networks ---------------------------------------------------------------------------------------------------------

    def g_by(self, network: torch.nn.Module, x: torch.Tensor, t: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        """g(x, t, s) by `network`."""
        return self.preconditioning.g(network, x, t, s, **condition(self.class_labels))

    def by(self, network: torch.nn.Module) -> Callable[..., torch.Tensor]:
        """`jump(x, t, s, class_labels)` by `network`."""
        return lambda x, t, s, labels: self.preconditioning.jump(network, x, t, s, **condition(labels))

    def to_end(self, x_s: torch.Tensor) -> torch.Tensor:
        """G_ema(x_s, s, sigma_min), computed only where it is not the identity."""
        end = torch.full_like(self.s, self.times.end)
        return jump_where_needed(self.by(self.student_ema), x_s, self.times.outer, self.s, end, self.class_labels)

    def denoised(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """D(x, t) of the teacher; with gradient at `x` only if that has one."""
        return self.teacher(x, t, self.class_labels)

    @functools.cached_property
    def x_u(self) -> torch.Tensor:
        """The state at u of the teacher's trajectory through x_t, without gradient."""
        if self.known_x_u is not None:
            return self.known_x_u
        with torch.inference_mode():
            x_u = self.solver(self.x_t, self.path, self.class_labels)
        return x_u.clone()  # an ordinary tensor again, which autograd may save

    @property
    def bare(self) -> torch.nn.Module:
        """The student without its wrapper for several processes."""
        return getattr(self.student, "module", self.student)


def student_images(jumps: Jumps) -> torch.Tensor:
    """G_ema(G_student(x_t, t, s), s, sigma_min) without gradient: the fakes of the discriminator's step."""
    with torch.no_grad():
        return jumps.to_end(jumps.by(jumps.student)(jumps.x_t, jumps.t, jumps.s, jumps.class_labels))
