# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Our training step beside one in the authors' order."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

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
from ..objective.ctm import ctm
from ..objective.distances import l2_distance
from ..objective.jumps import Jumps, noised, student_images
from ..objective.losses import Adversary, ScoreMatching, training_loss
from ..objective.pool import PoolOptions, TrajectoryPool
from ..objective.regression import regression
from ..objective.solvers import SOLVERS, TargetOptions
from ..objective.times import Times, TimeSampler, draw_half_lognormal_sigma
from ..run.averages import EMA
from ..run.compiling import compile_network


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
        if self.compile:
            for network in (self.student, self.target.module, self.teacher):
                compile_network(network)

    def inputs(self, k: int, seed: int) -> tuple[Jumps, ScoreMatching]:
        """The inputs of a step whose solver takes `k` steps."""
        sampler = TimeSampler(self.num_train_timesteps, max_steps=k)
        generator = torch.Generator().manual_seed(seed)
        times = sampler.draw(self.batch_size, generator)
        while times.solver_steps < k:
            times = sampler.draw(self.batch_size, generator)
        size = (self.batch_size, 3, self.resolution, self.resolution)
        generator = torch.Generator().manual_seed(seed)
        x_0, noise, dsm_noise = (torch.randn(size, generator=generator).to(self.device) for _ in range(3))
        normal, uniform = torch.randn(size[0], generator=generator), torch.rand(size[0], generator=generator)
        sigma = draw_half_lognormal_sigma(normal, uniform, 0.002, 80.0, 7.0).to(self.device)
        x_0 = 0.5 * x_0
        jumps = Jumps(
            self.student,
            self.target.module,
            self.preconditioning,
            times,
            noised(x_0, times.t, noise),
            solver=lambda x, levels, labels: SOLVERS["heun"].solve(self.denoise, x, levels),
        )
        return jumps, ScoreMatching(noised(x_0, sigma, dsm_noise), sigma, x_0)

    @functools.cached_property
    def pool(self) -> TrajectoryPool:
        """A pool of one trajectory for each sample, filled."""
        sampler, own = TimeSampler(self.num_train_timesteps), [slice(0, self.batch_size)]
        options = PoolOptions(pool_size=1, pool_refresh=16)
        pool = TrajectoryPool(options, SOLVERS["heun"], sampler, self.batch_size, own, self.device)
        self.refreshed_at = 0
        self._draw(pool, 0, "soft")
        return pool

    def _draw(self, pool: TrajectoryPool, step: int, matching: str) -> tuple[Times, torch.Tensor, torch.Tensor]:
        size = (self.batch_size, 3, self.resolution, self.resolution)
        sampler = TimeSampler(self.num_train_timesteps, matching=matching)
        times, x_t, x_u, _ = pool.draw(
            step,
            slice(0, self.batch_size),
            torch.zeros(size, device=self.device),
            None,
            lambda: torch.randn(size, device=self.device),
            lambda x, sigma, labels: self.denoise(x, sigma),
            sampler,
            torch.Generator().manual_seed(step),
        )
        return times, x_t, x_u

    def from_pool(self, jumps: Jumps, matching: str) -> Jumps:
        """`jumps` from states of the pool, without a refresh."""
        pool = self.pool
        times, x_t, x_u = self._draw(pool, self.refreshed_at + 1, matching)
        return replace(jumps, times=times, x_t=x_t, known_x_u=x_u)

    def refresh_pool(self) -> None:
        """What one step in `pool.options.pool_refresh` does besides."""
        pool = self.pool
        self.refreshed_at += pool.options.pool_refresh
        self._draw(pool, self.refreshed_at, "soft")

    def strata(self, count: int) -> list[int]:
        """The numbers of solver steps in the middle of `count` equally probable parts of P(k) ~ k."""
        weights = torch.arange(1.0, self.num_train_timesteps)
        share = weights.cumsum(0) / weights.sum()
        middles = (torch.arange(count) + 0.5) / count
        return (torch.searchsorted(share, middles) + 1).tolist()

    @torch.no_grad()
    def denoise(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return self.preconditioning.denoise(self.teacher, x, sigma)

    def update(self, averages: list[EMA]) -> None:
        """One step of the optimizer and the averages. Gradients stay for the comparison.

        A learning rate near 0 leaves both sides the same networks.
        """
        self.optimizer.step()
        for average in averages:
            average.step(self.student)


# Gives the terms of its losses by name.
Step = Callable[[Problem, Jumps, ScoreMatching], dict[str, torch.Tensor | float]]


def _fill(network: torch.nn.Module) -> None:
    """Random numbers where an untrained network has zeros, so that no gradient is zero."""
    for parameter in network.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)


def plain_estimate(problem: Problem, jumps: Jumps) -> torch.Tensor:
    """Both jumps of every sample, with graph."""
    jump, end = problem.preconditioning.jump, torch.full_like(jumps.s, jumps.times.end)
    return jump(jumps.student_ema, jump(jumps.student, jumps.x_t, jumps.t, jumps.s), jumps.s, end)


def plain_target(problem: Problem, jumps: Jumps) -> torch.Tensor:
    """Heun's method down the path, then both jumps of every sample, without graph."""
    jump, average, x_u = problem.preconditioning.jump, jumps.student_ema, jumps.x_t
    for level, next_level in zip(jumps.path, jumps.path[1:]):
        slope = (x_u - problem.denoise(x_u, level)) / append_dims(level, 4)
        euler = x_u + append_dims(next_level - level, 4) * slope
        next_slope = (euler - problem.denoise(euler, next_level)) / append_dims(next_level, 4)
        x_u = x_u + append_dims(next_level - level, 4) * (slope + next_slope) / 2
    with torch.no_grad():
        x_s = jump(average, x_u, jumps.u, jumps.s)
        return jump(average, x_s, jumps.s, torch.full_like(jumps.s, jumps.times.end))


def plain_step(problem: Problem, jumps: Jumps, score_matching: ScoreMatching) -> dict[str, float]:
    """A step in the authors' order: every jump is computed, and each weight and the update has passes of its own.

    Teacher, student and average are called as there: 2k times, twice, and three times (once with graph); there are
    three averages.
    """
    precondition, x_0, sigma = problem.preconditioning, score_matching.target, score_matching.sigma
    target = plain_target(problem, jumps)
    estimate = plain_estimate(problem, jumps)
    trajectory = l2_distance(estimate, target).mean()
    denoised = precondition.g(problem.student, score_matching.x, sigma, sigma)
    dsm = (precondition.loss_weight(sigma) * l2_distance(denoised, x_0)).mean()

    def weigh(loss: torch.Tensor, smallest: float, largest: float) -> torch.Tensor:
        last = problem.student.last_layer.weight
        lengths = [torch.autograd.grad(each, last, retain_graph=True)[0].norm() for each in (trajectory, loss)]
        return (lengths[0] / (lengths[1] + 1e-4)).clamp(smallest, largest).detach()

    weight = weigh(dsm, 0.0, 1e4)
    total = trajectory + weight * dsm
    terms = {"trajectory": trajectory.item(), "dsm": dsm.item(), "dsm_weight": weight.item()}  # read to log them
    if problem.judge is not None:
        with problem.judge.frozen():
            generator = generator_hinge_loss(problem.judge(estimate))
        weight = weigh(generator, 0.01, 10.0)
        total = total + weight * generator
        terms |= {"generator": generator.item(), "generator_weight": weight.item()}
    total.backward()
    problem.update([problem.target, problem.duplicate, problem.slow])
    return terms


def plain_discriminator_step(problem: Problem, jumps: Jumps, score_matching: ScoreMatching) -> dict[str, float]:
    """The discriminator's turn in that order: fakes have an unused graph, fakes and data have passes of their own."""
    fake_logits = problem.judge(plain_estimate(problem, jumps).detach())
    loss = discriminator_hinge_loss(problem.judge(score_matching.target), fake_logits)
    loss.backward()
    problem.judge_optimizer.step()
    return {"discriminator": loss.item()}


def our_step(
    problem: Problem, jumps: Jumps, score_matching: ScoreMatching, objective: Callable = ctm
) -> dict[str, torch.Tensor]:
    """The step of `training.train_ctm`."""
    adversary = None
    if problem.judge is not None:
        adversary = Adversary(functools.partial(generator_loss, problem.judge), generator_weight)
    loss = training_loss(
        functools.partial(objective, options=TargetOptions()),
        jumps,
        last_weight=lambda: problem.student.last_layer.weight,
        score_matching=score_matching,
        adversary=adversary,
    )
    loss.total.backward()
    problem.update([problem.target, problem.slow])
    return {name.removesuffix("_loss"): value for name, value in loss.terms.items()}


def solved_by(solver: str) -> Step:
    """Our step with another solver."""

    def step(problem: Problem, jumps: Jumps, score_matching: ScoreMatching) -> dict[str, torch.Tensor]:
        solve = SOLVERS[solver].solve
        jumps.solver = lambda x, levels, labels: solve(problem.denoise, x, levels)
        return our_step(problem, jumps, score_matching)

    return step


@dataclass(frozen=True)
class PooledStep:
    """Our step from a pool, whose refreshes are measured apart.

    Args:
        objective: ctm or regression.
        matching: of its times.
    """

    objective: Callable
    matching: str

    def __call__(self, problem: Problem, jumps: Jumps, score_matching: ScoreMatching) -> dict[str, torch.Tensor]:
        return our_step(problem, problem.from_pool(jumps, self.matching), score_matching, self.objective)


def our_discriminator_step(problem: Problem, jumps: Jumps, score_matching: ScoreMatching) -> dict[str, torch.Tensor]:
    """The discriminator's turn of `training.train_ctm`."""
    loss = discriminator_loss(problem.judge, score_matching.target, student_images(jumps))
    loss.backward()
    problem.judge_optimizer.step()
    return {"discriminator": loss.detach()}


def both(student_step: Step, discriminator_step: Step) -> Step:
    """A turn of the student and one of the discriminator."""
    return lambda *inputs: {**student_step(*inputs), **discriminator_step(*inputs)}


# The steps that are compared, "plain" first.
TRAINING: dict[str, Step] = {
    "plain": plain_step,
    "exact": our_step,
    "--solver unipc": solved_by("unipc"),
    "--solver dpm": solved_by("dpm"),
    "--pool_size": PooledStep(ctm, "soft"),
    "--objective regression --pool_size": PooledStep(regression, "global"),
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
            terms[name] = torch.tensor([float(value) for _, value in sorted(steps[name](problem, *inputs).items())])
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
