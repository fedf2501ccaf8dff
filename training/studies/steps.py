# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Our training step beside one in the authors' order."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from diffusers_ctm import EDMUNet2DModel
from diffusers_ctm.preconditioning import Preconditioning
from diffusers_ctm.trajectory import append_dims

from ..frozen.maps import load_backbone
from ..objective.adversarial import (
    DiscriminatorOptions,
    ProjectedDiscriminator,
    discriminator_hinge_loss,
    discriminator_loss,
    discriminator_optimizer,
    generator_hinge_loss,
    generator_loss,
    generator_weight,
)
from ..objective.distances import l2_distance
from ..objective.losses import Adversary, Jumps, ScoreMatching, ctm_estimate, ctm_loss
from ..objective.solvers import SOLVERS
from ..objective.times import Times, TimeSampler, draw_half_lognormal_sigma
from ..run.averages import EMA
from ..run.compiling import compile_network


@dataclass
class Inputs:
    """The inputs of a step: times, and tensors of shape (B, C, H, W), or (B,) for `dsm_sigma`, on the device."""

    times: Times
    x_0: torch.Tensor
    noise: torch.Tensor
    dsm_noise: torch.Tensor
    dsm_sigma: torch.Tensor


@dataclass
class Problem:
    """The networks of a step, the same for both sides, and their inputs.

    There are three averages, as in the plain loop: the target's network `target`, and two that are evaluated,
    `duplicate` with the target's rate and `slow`. `judge` is there if `adversarial`: a discriminator on the features of
    the embedded classifier, without augmentation.

    Args:
        channels: of the network, EDM's DDPM++ for CIFAR-10.
        resolution, batch_size: of the images.
        num_train_timesteps: N, the levels of the grid; the solver takes up to N - 1 steps.
    """

    channels: int
    resolution: int
    batch_size: int
    num_train_timesteps: int
    device: torch.device
    adversarial: bool = False
    compile: bool = False

    def __post_init__(self):
        torch.manual_seed(0)
        self.teacher = EDMUNet2DModel(
            sample_size=self.resolution, model_channels=self.channels, block_out_channels=(2 * self.channels,) * 3
        )
        self.teacher.eval().requires_grad_(False)
        _fill(self.teacher)
        self.student = EDMUNet2DModel.from_unet(self.teacher).requires_grad_(True)
        _fill(self.student)
        for network in (self.teacher, self.student):
            network.to(self.device, memory_format=torch.channels_last)
        self.target, self.duplicate, self.slow = (EMA(self.student, decay) for decay in (0.999, 0.999, 0.9999))
        self.optimizer = torch.optim.RAdam(self.student.parameters(), lr=1e-6)
        self.judge = None
        if self.adversarial:
            backbones = {"digits": load_backbone("digits", self.resolution)}
            self.judge = ProjectedDiscriminator(backbones, 0, channels=self.channels, augment=False)
            self.judge.to(self.device, memory_format=torch.channels_last)
            self.judge_optimizer = discriminator_optimizer(
                DiscriminatorOptions(discriminator_learning_rate=1e-6), self.judge
            )
        self.preconditioning = Preconditioning()
        self.call = {"student": self.student, "ema": self.target.module, "teacher": self.teacher}
        if self.compile:
            for network in self.call.values():
                compile_network(network)

    def inputs(self, k: int, seed: int) -> Inputs:
        """The inputs of a step whose solver takes `k` steps."""
        sampler = TimeSampler(self.num_train_timesteps, max_steps=k)
        generator = torch.Generator().manual_seed(seed)
        times = sampler.draw(self.batch_size, generator)
        while times.solver_steps < k:
            times = sampler.draw(self.batch_size, generator)
        size = (self.batch_size, 3, self.resolution, self.resolution)
        x_0, noise, dsm_noise = (torch.randn(size, generator=generator) for _ in range(3))
        normal, uniform = torch.randn(size[0], generator=generator), torch.rand(size[0], generator=generator)
        sigma = draw_half_lognormal_sigma(normal, uniform, 0.002, 80.0, 7.0)
        return Inputs(times, *(value.to(self.device) for value in (0.5 * x_0, noise, dsm_noise, sigma)))

    def strata(self, count: int) -> list[int]:
        """The numbers of solver steps in the middle of `count` equally probable parts of P(k) ~ k."""
        weights = torch.arange(1.0, self.num_train_timesteps)
        share = weights.cumsum(0) / weights.sum()
        middles = (torch.arange(count) + 0.5) / count
        return (torch.searchsorted(share, middles) + 1).tolist()

    @torch.no_grad()
    def denoise(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return self.preconditioning.denoise(self.call["teacher"], x, sigma)

    def update(self, averages: list[EMA]) -> None:
        """One step of the optimizer and the averages. Gradients stay for the comparison.

        A learning rate near 0 leaves both sides the same networks.
        """
        self.optimizer.step()
        for average in averages:
            average.step(self.student)


Step = Callable[[Problem, Inputs], dict[str, torch.Tensor | float]]  # gives the terms of its losses by name


def _fill(network: torch.nn.Module) -> None:
    """Random numbers where an untrained network has zeros, so that no gradient is zero."""
    for parameter in network.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)


def plain_estimate(problem: Problem, inputs: Inputs) -> torch.Tensor:
    """Both jumps of every sample, with graph."""
    jump, call, times, x_0 = problem.preconditioning.jump, problem.call, inputs.times, inputs.x_0
    t, s = times.t.to(x_0), times.s.to(x_0)
    x_t = x_0 + append_dims(t, 4) * inputs.noise
    return jump(call["ema"], jump(call["student"], x_t, t, s), s, torch.full_like(s, times.end))


def plain_target(problem: Problem, inputs: Inputs) -> torch.Tensor:
    """Heun's method down the path, then both jumps of every sample, without graph."""
    jump, average, times, x_0 = problem.preconditioning.jump, problem.call["ema"], inputs.times, inputs.x_0
    path, s = times.path.to(x_0), times.s.to(x_0)
    x_u = x_0 + append_dims(path[0], 4) * inputs.noise
    for level, next_level in zip(path, path[1:]):
        slope = (x_u - problem.denoise(x_u, level)) / append_dims(level, 4)
        euler = x_u + append_dims(next_level - level, 4) * slope
        next_slope = (euler - problem.denoise(euler, next_level)) / append_dims(next_level, 4)
        x_u = x_u + append_dims(next_level - level, 4) * (slope + next_slope) / 2
    with torch.no_grad():
        return jump(average, jump(average, x_u, path[-1], s), s, torch.full_like(s, times.end))


def plain_step(problem: Problem, inputs: Inputs) -> dict[str, float]:
    """A step in the authors' order: every jump is computed, and each weight and the update has passes of its own.

    Teacher, student and average are called as there: 2k times, twice, and three times (once with graph); there are
    three averages.
    """
    precondition, x_0, sigma = problem.preconditioning, inputs.x_0, inputs.dsm_sigma
    target = plain_target(problem, inputs)
    estimate = plain_estimate(problem, inputs)
    trajectory = l2_distance(estimate, target).mean()
    denoised = precondition.g(problem.call["student"], x_0 + append_dims(sigma, 4) * inputs.dsm_noise, sigma, sigma)
    dsm = (precondition.loss_weight(sigma) * l2_distance(denoised, x_0)).mean()

    def weigh(loss: torch.Tensor, smallest: float, largest: float) -> torch.Tensor:
        last = problem.student.last_layer.weight
        lengths = [torch.autograd.grad(each, last, retain_graph=True)[0].norm() for each in (trajectory, loss)]
        return (lengths[0] / (lengths[1] + 1e-4)).clamp(smallest, largest).detach()

    weight = weigh(dsm, 0.0, 1e4)
    total = trajectory + weight * dsm
    terms = {"trajectory": trajectory.item(), "dsm": dsm.item(), "weight": weight.item()}  # read to log them
    if problem.judge is not None:
        with problem.judge.frozen():
            generator = generator_hinge_loss(problem.judge(estimate))
        weight = weigh(generator, 0.01, 10.0)
        total = total + weight * generator
        terms |= {"generator": generator.item(), "generator_weight": weight.item()}
    total.backward()
    problem.update([problem.target, problem.duplicate, problem.slow])
    return terms


def plain_discriminator_step(problem: Problem, inputs: Inputs) -> dict[str, float]:
    """The discriminator's turn in that order: fakes have an unused graph, fakes and data have passes of their own."""
    fake = plain_estimate(problem, inputs).detach()
    fake_logits, real_logits = problem.judge(fake), problem.judge(inputs.x_0)
    loss = discriminator_hinge_loss(real_logits, fake_logits)
    loss.backward()
    problem.judge_optimizer.step()
    return {"discriminator": loss.item()}


def our_jumps(problem: Problem, inputs: Inputs) -> Jumps:
    return Jumps(
        problem.call["student"],
        problem.call["ema"],
        problem.preconditioning,
        inputs.times,
        inputs.x_0,
        inputs.noise,
    )


def our_step(problem: Problem, inputs: Inputs, solver: str = "heun") -> dict[str, torch.Tensor]:
    """The step of `training.train_ctm`."""
    adversary = None
    if problem.judge is not None:
        adversary = Adversary(functools.partial(generator_loss, problem.judge), generator_weight)
    loss = ctm_loss(
        our_jumps(problem, inputs),
        lambda x, levels, labels: SOLVERS[solver].solve(problem.denoise, x, levels),
        last_weight=lambda: problem.student.last_layer.weight,
        score_matching=ScoreMatching(inputs.dsm_sigma, inputs.dsm_noise),
        adversary=adversary,
    )
    loss.total.backward()
    problem.update([problem.target, problem.slow])
    terms = {"trajectory": loss.trajectory, "dsm": loss.dsm, "weight": loss.dsm_weight}
    if adversary is not None:
        terms |= {"generator": loss.generator, "generator_weight": loss.generator_weight}
    return terms


def our_discriminator_step(problem: Problem, inputs: Inputs) -> dict[str, torch.Tensor]:
    """The discriminator's turn of `training.train_ctm`."""
    loss = discriminator_loss(problem.judge, inputs.x_0, ctm_estimate(our_jumps(problem, inputs)))
    loss.backward()
    problem.judge_optimizer.step()
    return {"discriminator": loss.detach()}


def both(student_step: Step, discriminator_step: Step) -> Step:
    """A turn of the student and one of the discriminator."""
    return lambda problem, inputs: {**student_step(problem, inputs), **discriminator_step(problem, inputs)}


# The steps that are compared, "plain" first.
TRAINING: dict[str, Step] = {
    "plain": plain_step,
    "exact": our_step,
    "--solver unipc": functools.partial(our_step, solver="unipc"),
    "--solver dpm": functools.partial(our_step, solver="dpm"),
}
ADVERSARIAL: dict[str, Step] = {
    "plain": both(plain_step, plain_discriminator_step),
    "exact": both(our_step, our_discriminator_step),
}


@contextlib.contextmanager
def restored(problem: Problem) -> Iterator[None]:
    """Run a step whose changes to the networks are taken back."""
    networks = [problem.student, problem.target.module] + ([problem.judge] if problem.adversarial else [])
    before = [{name: value.clone() for name, value in network.state_dict().items()} for network in networks]
    for network in networks:
        network.zero_grad(set_to_none=True)
    yield
    for network, state in zip(networks, before):
        network.load_state_dict(state)


def same_result(problem: Problem, steps: dict[str, Step], k: int) -> dict[str, float]:
    """The largest differences of losses and gradients of the exact step from the plain one, relative to the largest."""
    terms, gradients = {}, {}
    for name in ("plain", "exact"):
        inputs = problem.inputs(k, 0)
        with restored(problem):
            terms[name] = torch.tensor([float(value) for value in steps[name](problem, inputs).values()])
            gradients[name] = [
                [parameter.grad.clone() for parameter in network.parameters() if parameter.grad is not None]
                for network in (problem.student, problem.judge)
                if network is not None
            ]
    differences = [
        max((a - b).abs().max() for a, b in zip(ours, plain, strict=True)) / max(b.abs().max() for b in plain)
        for ours, plain in zip(gradients["exact"], gradients["plain"], strict=True)
    ]
    return {
        "losses": float(((terms["exact"] - terms["plain"]) / terms["plain"]).abs().max()),
        "gradients": float(max(differences)),
    }
