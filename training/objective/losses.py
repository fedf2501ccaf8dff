# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""CTM's loss (Kim et al. 2024, Eqs. 9 to 12) as named terms."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from diffusers_ctm.preconditioning import Preconditioning, condition, edm_loss_weight
from diffusers_ctm.trajectory import append_dims, jump

from ..cli.options import NOT_NEGATIVE, Checked, option
from .distances import Distance, l2_distance
from .times import Times


# (x_t, levels from t to u, class labels) -> x_u
TeacherSolver = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]


@dataclass
class ScoreMatchingOptions(Checked):
    """Denoising score matching."""

    dsm_weight: float = option(1.0, "Weight of denoising score matching; 0 leaves it out.", must_be=NOT_NEGATIVE)
    dsm_adaptive: bool = option(
        True,
        "Scale score matching so that its gradient at the last layer is as long as the trajectory loss's (CTM, Eq. "
        "12).",
        needs="dsm_weight",
    )
    dsm_sigma: str = option(
        "half_lognormal",
        "Noise levels of denoising score matching: 'lognormal' (EDM), or 'half_lognormal': every other sample from "
        "the upper 70 % of the Karras ramp (the authors').",
        ["lognormal", "half_lognormal"],
        needs="dsm_weight",
    )


def dsm_loss(denoised: torch.Tensor, x_0: torch.Tensor, sigma: torch.Tensor, sigma_data: float) -> torch.Tensor:
    """Denoising score matching with EDM's weight, shape (B,) (Karras et al. 2022, Eq. 2 and Table 1)."""
    return edm_loss_weight(sigma, sigma_data) * l2_distance(denoised, x_0)


def adaptive_weight(reference: torch.Tensor, gradient: torch.Tensor, largest: float = 1e4) -> torch.Tensor:
    """|reference| / |gradient|, at most `largest`: makes two losses pull equally at a layer (CTM, Eq. 12; VQGAN)."""
    return (reference.norm() / (gradient.norm() + 1e-4)).clamp(max=largest).detach()


# The jumps of a step --------------------------------------------------------------------------------------------------


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
    """A step's noisy images x_t = x_0 + t noise, and how student and average jump from them.

    Args:
        student: the network that learns, maybe wrapped for several processes.
        student_ema: its moving average, which gets no gradient.
        preconditioning: of both.
        times: of the samples.
        x_0: clean samples in [-1, 1], shape (B, C, H, W).
        noise: standard normal, likewise.
        class_labels: shape (B,), or None.

    Attributes:
        path, t, u, s: the levels of `times` in dtype and on the device of `x_0`.
        x_t: shape (B, C, H, W).
    """

    student: torch.nn.Module
    student_ema: torch.nn.Module
    preconditioning: Preconditioning
    times: Times
    x_0: torch.Tensor
    noise: torch.Tensor
    class_labels: torch.Tensor | None = None

    def __post_init__(self) -> None:
        levels = torch.cat([self.times.path, self.times.s[None]])
        levels = levels.to(self.x_0.dtype).to(self.x_0.device, non_blocking=True)
        self.path, self.s = levels[:-1], levels[-1]
        self.t, self.u = self.path[0], self.path[-1]
        self.x_t = self.x_0 + append_dims(self.t, self.x_0.ndim) * self.noise

    def by(self, network: torch.nn.Module) -> Callable[..., torch.Tensor]:
        """`jump(x, t, s, class_labels)` by `network`."""
        return lambda x, t, s, labels: self.preconditioning.jump(network, x, t, s, **condition(labels))

    def to_end(self, x_s: torch.Tensor) -> torch.Tensor:
        """G_ema(x_s, s, sigma_min), computed only where it is not the identity."""
        end = torch.full_like(self.s, self.times.end)
        return jump_where_needed(self.by(self.student_ema), x_s, self.times.outer, self.s, end, self.class_labels)

    def solve(self, solver: TeacherSolver) -> torch.Tensor:
        """x_u = Solver(x_t, t, u) without gradient."""
        with torch.inference_mode():
            x_u = solver(self.x_t, self.path, self.class_labels)
        return x_u.clone()  # an ordinary tensor again, which autograd may save

    def target(self, x_u: torch.Tensor, inner_target: str) -> torch.Tensor:
        """G_ema(G(x_u, u, s), s, sigma_min) without gradient, G by the average ("ema") or the student ("live")."""
        network = self.student_ema if inner_target == "ema" else self.student
        with torch.no_grad():
            x_s = jump_where_needed(self.by(network), x_u, self.times.inner, self.u, self.s, self.class_labels)
            return self.to_end(x_s)


def ctm_estimate(jumps: Jumps) -> torch.Tensor:
    """G_ema(G_student(x_t, t, s), s, sigma_min) without gradient: the fakes of the discriminator's step."""
    with torch.no_grad():
        return jumps.to_end(jumps.by(jumps.student)(jumps.x_t, jumps.t, jumps.s, jumps.class_labels))


# The loss -------------------------------------------------------------------------------------------------------------


@dataclass
class ScoreMatching:
    """The score matching of a step.

    Args:
        sigma: levels, shape (B,).
        noise: standard normal, shape (B, C, H, W).
        weight: of the term, times the adaptive weight if `adaptive`.
    """

    sigma: torch.Tensor
    noise: torch.Tensor
    weight: float = 1.0
    adaptive: bool = True


@dataclass
class Adversary:
    """The adversarial term of a step: its loss, a function of the estimate, and its weight.

    The weight is a function of two gradients at the last layer, those of the trajectory loss and of this one.
    """

    loss: Callable[[torch.Tensor], torch.Tensor]
    weight: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = adaptive_weight


class GradientAtJump:
    """The gradient of each term of the estimate at the student's jump x_s.

    The estimate is the average's jump from x_s to the end. The adaptive weights ask for a term's gradient at the
    student's last layer, the update for its gradient at all weights of the student. Both go through x_s. So each term
    goes backward through the average once, as far as x_s; from there, the last layer is near, and the weighted sum of
    the gradients goes through the student once.

    Args:
        x_s: the student's jump, with graph.
        to_end: the average's jump from x_s to the end.
        last_weight: the student's weight at which gradients are compared.
        reduce: mean over processes, so that all use one adaptive weight.
    """

    def __init__(
        self,
        x_s: torch.Tensor,
        to_end: Callable[[torch.Tensor], torch.Tensor],
        last_weight: torch.Tensor,
        reduce: Callable[[torch.Tensor], torch.Tensor],
    ):
        self.last_weight, self.reduce = last_weight, reduce
        self.leaf = x_s.detach().requires_grad_()
        self.estimate = to_end(self.leaf)
        # Gradients of a mean over all pixels are too small for fp16 on their way through the network.
        self.magnify = 2.0 ** round(math.log2(x_s.numel()))

    def of(self, term: torch.Tensor) -> torch.Tensor:
        """The gradient of `term`, a function of `estimate`, at x_s. Frees the graph of the term only."""
        (gradient,) = torch.autograd.grad(self.magnify * term, self.estimate)
        (gradient,) = torch.autograd.grad(self.estimate, self.leaf, gradient, retain_graph=True)
        return gradient / self.magnify

    def at_last_layer(self, output: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        """The gradient at the last layer, of which `output` has `gradient`."""
        (gradient,) = torch.autograd.grad(output, self.last_weight, self.magnify * gradient, retain_graph=True)
        return self.reduce(gradient / self.magnify)


@dataclass
class CTMLoss:
    """The terms of a step, and their sum.

    Args:
        trajectory, dsm, generator: the three terms, detached; 0 if left out.
        dsm_weight, generator_weight: their weights in the sum.
        total: trajectory + generator_weight * generator + dsm_weight * dsm, with the gradient of that.
        dsm_samples: the losses of the samples, whose mean is `dsm`, shape (B,); None without score matching.
    """

    trajectory: torch.Tensor
    dsm: torch.Tensor
    dsm_weight: torch.Tensor
    generator: torch.Tensor
    generator_weight: torch.Tensor
    total: torch.Tensor
    dsm_samples: torch.Tensor | None = None


def student_pass(jumps: Jumps, dsm: ScoreMatching | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The student's jumps x_s, and its denoised images of score matching: one pass over the inputs of both."""
    x_t, t, s, labels = jumps.x_t, jumps.t, jumps.s, jumps.class_labels
    if dsm is not None:
        x_sigma = jumps.x_0 + append_dims(dsm.sigma, x_t.ndim) * dsm.noise
        x_t, t, s = torch.cat([x_t, x_sigma]), torch.cat([t, dsm.sigma]), torch.cat([s, dsm.sigma])
        labels = None if labels is None else torch.cat([labels, labels])
    g = jumps.preconditioning.g(jumps.student, x_t, t, s, **condition(labels))
    g, *denoised = g.split(len(jumps.x_0))
    return jump(jumps.x_t, g, jumps.t, jumps.s), denoised[0] if denoised else None


def ctm_loss(
    jumps: Jumps,
    solver: TeacherSolver,
    last_weight: Callable[[], torch.Tensor],
    score_matching: ScoreMatching | None = None,
    adversary: Adversary | None = None,
    distance: Distance = l2_distance,
    inner_target: str = "ema",
    reduce_gradient: Callable[[torch.Tensor], torch.Tensor] = lambda gradient: gradient,
) -> CTMLoss:
    """CTM's loss: trajectory, score matching, adversarial (Kim et al. 2024, Eqs. 9 to 12), with no avoidable network
    calls.

        estimate   = G_ema(G_student(x_t, t, s), s, sigma_min)
        target     = G_ema(G_ema(Solver(x_t, t, u), u, s), s, sigma_min)
        trajectory = distance(estimate, target)

    Outer jumps from s = sigma_min and the target's inner jump from u = s are the identity and are not computed.

    Args:
        jumps: the networks and the samples of the step.
        solver: follows the teacher from t to u. Called in inference mode.
        last_weight: gives the weight at which gradients are compared, after the student's pass: a network that is
            spread over processes has it whole only then.
        score_matching, adversary: the two other terms; None leaves one out.
        distance: of two batches, shape (B,).
        inner_target: "ema" (the paper) or "live" (the authors' code), the network of the jump from u to s.
        reduce_gradient: mean over processes, so that all use one adaptive weight.
    """
    x_u = jumps.solve(solver)
    x_s, denoised = student_pass(jumps, score_matching)
    target = jumps.target(x_u, inner_target)
    at_jump = GradientAtJump(x_s, jumps.to_end, last_weight(), reduce_gradient)

    trajectory = distance(at_jump.estimate, target).mean()
    gradient = at_jump.of(trajectory)
    if adversary is not None or (score_matching is not None and score_matching.adaptive):
        reference = at_jump.at_last_layer(x_s, gradient)

    generator = generator_weight = dsm = dsm_weight = torch.zeros_like(trajectory)
    if adversary is not None:
        generator = adversary.loss(at_jump.estimate)
        generator_gradient = at_jump.of(generator)
        generator_weight = adversary.weight(reference, at_jump.at_last_layer(x_s, generator_gradient))
        gradient = gradient + generator_weight * generator_gradient
    update = (x_s * gradient).sum()  # a number whose gradient at x_s is `gradient`

    dsm_samples = None
    if score_matching is not None:
        dsm_samples = jumps.preconditioning.loss_weight(score_matching.sigma) * l2_distance(denoised, jumps.x_0)
        dsm = dsm_samples.mean()
        dsm_samples = dsm_samples.detach()
        dsm_weight = torch.full_like(dsm, score_matching.weight)  # made on the device: nothing waits for it
        if score_matching.adaptive:
            dsm_gradient = at_jump.at_last_layer(dsm, torch.ones_like(dsm))
            dsm_weight = dsm_weight * adaptive_weight(reference, dsm_gradient)
        update = update + dsm_weight * dsm

    terms = [term.detach() for term in (trajectory, dsm, dsm_weight, generator, generator_weight)]
    value = trajectory + generator_weight * generator + dsm_weight * dsm
    return CTMLoss(*terms, value.detach() + (update - update.detach()), dsm_samples)
