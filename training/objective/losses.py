# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""The loss of a step: an objective, score matching and the adversarial term, balanced at the last layer."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from diffusers_ctm.preconditioning import condition, edm_loss_weight

from ..cli.options import NOT_NEGATIVE, Checked, option
from .distances import l2_distance
from .jumps import Jumps, Point


@dataclass
class ScoreMatchingOptions(Checked):
    """Denoising score matching."""

    dsm_weight: float = option(1.0, "Weight of denoising score matching; 0 leaves it out.", must_be=NOT_NEGATIVE)
    dsm_adaptive: bool = option(
        True,
        "Scale score matching so that its gradient at the last layer is as long as the objective's (CTM, Eq. 12).",
        needs="dsm_weight",
    )
    dsm_target: str = option(
        "data",
        "What score matching learns: 'data', the clean images; 'teacher', what the teacher makes of the noisy ones, "
        "which has no noise of its own. For a guided teacher it is always the latter.",
        ["data", "teacher"],
        needs="dsm_weight",
    )
    dsm_share: float = option(
        1.0,
        "Share of a pass's images that score matching sees.",
        must_be=("in (0, 1]", lambda share: 0 < share <= 1),
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


def uncertainty_loss(losses: torch.Tensor, log_variance: torch.Tensor) -> torch.Tensor:
    """losses / exp(u) + u, shape (B,): every noise level weighs alike once u is the logarithm of its loss.

    Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models", Eq. 21.
    """
    return losses / log_variance.exp() + log_variance


def adaptive_weight(reference: torch.Tensor, gradient: torch.Tensor, largest: float = 1e4) -> torch.Tensor:
    """|reference| / |gradient|, at most `largest`: makes two losses pull equally at a layer (CTM, Eq. 12; VQGAN)."""
    return (reference.norm() / (gradient.norm() + 1e-4)).clamp(max=largest).detach()


# The balance ----------------------------------------------------------------------------------------------------------


@dataclass
class ScoreMatching:
    """The score matching of a step: g at s = t shall be the denoised image.

    Args:
        x: images with noise, shape (B, C, H, W).
        sigma: their levels, shape (B,).
        target: what is learned: the clean images, or what a guided teacher makes of `x`.
        class_labels: shape (B,), or None.
        weight: of the term, times the adaptive weight if `adaptive`.
    """

    x: torch.Tensor
    sigma: torch.Tensor
    target: torch.Tensor
    class_labels: torch.Tensor | None = None
    weight: float = 1.0
    adaptive: bool = True


@dataclass
class Adversary:
    """The adversarial term of a step: its loss, a function of the estimate, and its weight.

    The weight is a function of two gradients at the last layer, those of the objective and of this term.
    """

    loss: Callable[[torch.Tensor], torch.Tensor]
    weight: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = adaptive_weight


class GradientAtOutput:
    """The gradient of each term at the student's answers g.

    The adaptive weights ask for a term's gradient at the student's last layer, the update for its gradient at all
    weights of the student. Both go through g. So each term goes backward once, as far as g. From there the last layer
    is near, and the weighted sum of the gradients goes through the student once.

    Args:
        g: the student's answers, with graph.
        last_weight: the student's weight at which gradients are compared.
        reduce: mean over processes, so that all use one adaptive weight.

    Attributes:
        leaf: the same answers, where the terms begin.
    """

    def __init__(self, g: torch.Tensor, last_weight: torch.Tensor, reduce: Callable[[torch.Tensor], torch.Tensor]):
        self.g, self.last_weight, self.reduce = g, last_weight, reduce
        self.leaf = g.detach().requires_grad_()
        # Gradients of a mean over all pixels are too small for fp16 on their way through the network.
        self.magnify = 2.0 ** round(math.log2(g.numel()))

    def of(self, term: torch.Tensor, keep: bool = False) -> torch.Tensor:
        """The gradient of `term` at g. `keep` keeps what terms have in common."""
        (gradient,) = torch.autograd.grad(self.magnify * term, self.leaf, retain_graph=keep)
        return gradient / self.magnify

    def at_last_layer(self, gradient: torch.Tensor) -> torch.Tensor:
        """The gradient at the last layer, for `gradient` at g."""
        (gradient,) = torch.autograd.grad(self.g, self.last_weight, self.magnify * gradient, retain_graph=True)
        return self.reduce(gradient / self.magnify)


@dataclass
class TrainingLoss:
    """The loss of a step.

    Args:
        terms: by name, 0-d and detached: "trajectory_loss", the objective's; what else it tells; "dsm_loss" and
            "generator_loss", each with its weight in the sum, "dsm_weight" and "generator_weight".
        total: the sum, with its gradient.
        dsm_samples: the losses of score matching of the samples, shape (B,); None without it.
    """

    terms: dict[str, torch.Tensor]
    total: torch.Tensor
    dsm_samples: torch.Tensor | None = None


def student_pass(jumps: Jumps, points: list[Point], dsm: ScoreMatching | None) -> torch.Tensor:
    """The student's g at `points` (x, t, s) and, for score matching, its denoised images: one pass over all inputs."""
    labels = [jumps.class_labels] * len(points)
    if dsm is not None:
        points, labels = [*points, (dsm.x, dsm.sigma, dsm.sigma)], [*labels, dsm.class_labels]
    x, t, s = (torch.cat(values) for values in zip(*points))
    labels = None if labels[0] is None else torch.cat(labels)
    return jumps.preconditioning.g(jumps.student, x, t, s, **condition(labels))


def training_loss(
    objective: Callable[[Jumps], dict[str, torch.Tensor]],
    jumps: Jumps,
    last_weight: Callable[[], torch.Tensor],
    score_matching: ScoreMatching | None = None,
    adversary: Adversary | None = None,
    beside: Sequence[Point] = (),
    reduce_gradient: Callable[[torch.Tensor], torch.Tensor] = lambda gradient: gradient,
) -> TrainingLoss:
    """objective + dsm_weight * score matching + generator_weight * adversarial (Kim et al. 2024, Eq. 12).

    No network is called more often than the terms need.

    Args:
        objective: gives named terms of `jumps`, of which "trajectory_loss" is descended.
        jumps: the networks and the samples of the step.
        last_weight: gives the weight at which gradients are compared, after the student's pass: a network that is
            spread over processes has it whole only then.
        score_matching, adversary: the two other terms; None leaves one out.
        beside: further points (x, t, s) at which the objective asks the student with gradient.
        reduce_gradient: mean over processes, so that all use one adaptive weight.
    """
    points = [(jumps.x_t, jumps.t, jumps.s), *beside]
    at = GradientAtOutput(student_pass(jumps, points, score_matching), last_weight(), reduce_gradient)
    answers = at.leaf.split(len(jumps.x_t))
    jumps.outputs = answers[: len(points)]
    named = objective(jumps)
    gradient = at.of(named["trajectory_loss"], keep=adversary is not None)
    terms = {name: value.detach() for name, value in named.items()}
    total = terms["trajectory_loss"]
    del named  # and with it what only the objective's distance needs
    if adversary is not None or (score_matching is not None and score_matching.adaptive):
        reference = at.at_last_layer(gradient)

    def add(name: str, loss: torch.Tensor, weigh: Callable[[torch.Tensor], torch.Tensor]) -> None:
        nonlocal total, gradient
        own = at.of(loss)
        weight = weigh(own)
        terms[f"{name}_loss"], terms[f"{name}_weight"] = loss.detach(), weight
        total, gradient = total + weight * loss.detach(), gradient + weight * own

    if adversary is not None:
        add("generator", adversary.loss(jumps.estimate), lambda own: adversary.weight(reference, at.at_last_layer(own)))
    samples = None
    if score_matching is not None:
        weights = jumps.preconditioning.loss_weight(score_matching.sigma)
        samples = weights * l2_distance(answers[-1], score_matching.target)

        def weigh(own: torch.Tensor) -> torch.Tensor:
            weight = torch.full_like(total, score_matching.weight)  # made on the device: nothing waits for it
            return weight * adaptive_weight(reference, at.at_last_layer(own)) if score_matching.adaptive else weight

        add("dsm", samples.mean(), weigh)
        samples = samples.detach()
    update = (at.g * gradient).sum()  # a number whose gradient at g is `gradient`
    return TrainingLoss(terms, total + (update - update.detach()), samples)
