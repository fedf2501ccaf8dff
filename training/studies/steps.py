"""Our training step beside one in the authors' order."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

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
from ..objective.solvers import SOLVERS, heun_solve
from ..objective.times import Times, TimeSampler, draw_half_lognormal_sigma
from ..run.averages import EMA
from ..run.compiling import compile_network


@dataclass
class Problem:
    """Networks and the inputs of a step, the same for both sides.

    `averages` are the plain loop's: the target's network and the two that are evaluated, of which one has the target's rate. `judge` is there
    if `adversarial`: a discriminator on the features of the embedded classifier, without augmentation.
    """

    config: Any
    device: torch.device
    adversarial: bool = False
    student: torch.nn.Module = field(init=False)
    teacher: torch.nn.Module = field(init=False)

    def __post_init__(self):
        config = self.config
        torch.manual_seed(0)
        shape = {"model_channels": config.channels, "block_out_channels": (2 * config.channels,) * 3}
        self.teacher = EDMUNet2DModel(sample_size=config.resolution, **shape).eval().requires_grad_(False)
        _fill(self.teacher)
        self.student = EDMUNet2DModel.from_unet(self.teacher).requires_grad_(True)
        _fill(self.student)
        for network in (self.teacher, self.student):
            network.to(self.device, memory_format=torch.channels_last)
        self.target = EMA(self.student, 0.999)
        self.duplicate, self.slow = EMA(self.student, 0.999), EMA(self.student, 0.9999)
        self.optimizer = torch.optim.RAdam(self.student.parameters(), lr=1e-6)
        self.judge = None
        if self.adversarial:
            backbones = {"digits": load_backbone("digits", config.resolution)}
            judge = ProjectedDiscriminator(backbones, 0, channels=config.channels, augment=False)
            self.judge = judge.to(self.device, memory_format=torch.channels_last)
            options = DiscriminatorOptions(discriminator_learning_rate=1e-6)
            self.judge_optimizer = discriminator_optimizer(options, self.judge)
        self.preconditioning = Preconditioning()
        self.call = {"student": self.student, "ema": self.target.module, "teacher": self.teacher}
        if config.compile:
            for network in self.call.values():
                compile_network(network)

    def inputs(self, seed: int) -> dict[str, torch.Tensor]:
        size = (self.config.batch_size, 3, self.config.resolution, self.config.resolution)
        generator = torch.Generator().manual_seed(seed)
        x_0, noise, dsm_noise = (torch.randn(size, generator=generator) for _ in range(3))
        normal, uniform = torch.randn(size[0], generator=generator), torch.rand(size[0], generator=generator)
        sigma = draw_half_lognormal_sigma(normal, uniform, 0.002, 80.0, 7.0)
        values = {"x_0": 0.5 * x_0, "noise": noise, "dsm_noise": dsm_noise, "dsm_sigma": sigma}
        return {name: value.to(self.device) for name, value in values.items()}

    def times(self, k: int, seed: int) -> Times:
        """Times of a step whose solver takes `k` steps."""
        sampler = TimeSampler(self.config.num_train_timesteps, max_steps=k)
        generator = torch.Generator().manual_seed(seed)
        while True:
            times = sampler.draw(self.config.batch_size, generator)
            if times.solver_steps == k:
                return times

    def strata(self) -> list[int]:
        """Numbers of solver steps in the middle of equally probable parts of P(k) ~ k."""
        weights = torch.arange(1.0, self.config.num_train_timesteps)
        share = weights.cumsum(0) / weights.sum()
        middles = (torch.arange(self.config.strata) + 0.5) / self.config.strata
        return (torch.searchsorted(share, middles) + 1).tolist()

    def denoise(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return self.preconditioning.denoise(self.call["teacher"], x, sigma)


def _fill(network: torch.nn.Module) -> None:
    """Random numbers where an untrained network has zeros, so that every gradient is one."""
    for parameter in network.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)


def plain_estimate(problem: Problem, times: Times, values: dict[str, torch.Tensor]) -> torch.Tensor:
    """Both jumps of every sample, with graph."""
    jump, call = problem.preconditioning.jump, problem.call
    t, s = times.t.to(values["x_0"]), times.s.to(values["x_0"])
    x_t = values["x_0"] + append_dims(t, 4) * values["noise"]
    return jump(call["ema"], jump(call["student"], x_t, t, s), s, torch.full_like(s, times.end))


def plain_step(problem: Problem, times: Times, values: dict[str, torch.Tensor]) -> dict[str, float]:
    """A step as the authors' loop orders it: every jump computed, gradients for each weight and for the update by passes of their own.

    Teacher, student and average are called as there: 2k times, twice, and three times (once with graph); the averages are three.
    """
    precondition, call = problem.preconditioning, problem.call
    x_0 = values["x_0"]
    t, u, s = (level.to(x_0) for level in (times.t, times.u, times.s))
    end = torch.full_like(s, times.end)

    x_u = x_0 + append_dims(t, 4) * values["noise"]
    path = times.path.to(x_0)
    for row in range(times.solver_steps):
        level, next_level = path[row], path[row + 1]
        slope = (x_u - problem.denoise(x_u, level)) / append_dims(level, 4)
        euler = x_u + append_dims(next_level - level, 4) * slope
        next_slope = (euler - problem.denoise(euler, next_level)) / append_dims(next_level, 4)
        x_u = x_u + append_dims(next_level - level, 4) * (slope + next_slope) / 2
    estimate = plain_estimate(problem, times, values)
    with torch.no_grad():
        target = precondition.jump(call["ema"], precondition.jump(call["ema"], x_u, u, s), s, end)
    trajectory = l2_distance(estimate, target).mean()

    sigma = values["dsm_sigma"]
    x_sigma = x_0 + append_dims(sigma, 4) * values["dsm_noise"]
    denoised = precondition.g(call["student"], x_sigma, sigma, sigma)
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
    _finish(problem, [problem.target, problem.duplicate, problem.slow])
    return terms


def plain_discriminator_step(problem: Problem, times: Times, values: dict[str, torch.Tensor]) -> dict[str, float]:
    """The discriminator's turn in that order: fakes made with a graph that nobody goes back through; fakes and data by passes of their own."""
    fake = plain_estimate(problem, times, values).detach()
    fake_logits, real_logits = problem.judge(fake), problem.judge(values["x_0"])
    loss = discriminator_hinge_loss(real_logits, fake_logits)
    loss.backward()
    problem.judge_optimizer.step()
    return {"discriminator": loss.item()}


def our_step(
    problem: Problem, times: Times, values: dict[str, torch.Tensor], solver: Callable = heun_solve
) -> dict[str, torch.Tensor]:
    """The step of `training.train_ctm`."""
    x_0, noise, call = values["x_0"], values["noise"], problem.call
    jumps = Jumps(call["student"], call["ema"], problem.preconditioning, times, x_0, noise)
    adversary = None
    if problem.judge is not None:
        adversary = Adversary(functools.partial(generator_loss, problem.judge), generator_weight)
    loss = ctm_loss(
        jumps,
        lambda x, levels, labels: solver(problem.denoise, x, levels),
        last_weight=lambda: problem.student.last_layer.weight,
        score_matching=ScoreMatching(values["dsm_sigma"], values["dsm_noise"]),
        adversary=adversary,
    )
    loss.total.backward()
    _finish(problem, [problem.target, problem.slow])
    terms = {"trajectory": loss.trajectory, "dsm": loss.dsm, "weight": loss.dsm_weight}
    if problem.judge is not None:
        terms |= {"generator": loss.generator, "generator_weight": loss.generator_weight}
    return terms


def our_discriminator_step(problem: Problem, times: Times, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The discriminator's turn of `training.train_ctm`."""
    x_0, call = values["x_0"], problem.call
    jumps = Jumps(call["student"], call["ema"], problem.preconditioning, times, x_0, values["noise"])
    loss = discriminator_loss(problem.judge, x_0, ctm_estimate(jumps))
    loss.backward()
    problem.judge_optimizer.step()
    return {"discriminator": loss.detach()}


def _finish(problem: Problem, averages: list[EMA]) -> None:
    """Optimiser and averages; gradients stay for the comparison. A learning rate near 0 leaves both sides the same networks."""
    problem.optimizer.step()
    for average in averages:
        average.step(problem.student)


@contextlib.contextmanager
def restored(problem: Problem) -> Iterator[None]:
    """Run a step whose changes to the networks are taken back."""
    networks = [problem.student, problem.target.module] + ([problem.judge] if problem.judge is not None else [])
    before = [{name: value.clone() for name, value in network.state_dict().items()} for network in networks]
    for network in networks:
        network.zero_grad(set_to_none=True)
    yield
    for network, state in zip(networks, before):
        network.load_state_dict(state)


def training_variants() -> dict[str, Callable]:
    """Steps to compare, called with problem, k, seed and inputs; "plain" first."""

    def plain(problem, k, seed, values):
        return plain_step(problem, problem.times(k, seed), values)

    def ours(solver):
        return lambda problem, k, seed, values: our_step(problem, problem.times(k, seed), values, SOLVERS[solver].solve)

    return {
        "plain": plain,
        "exact": ours("heun"),
        "--solver unipc": ours("unipc"),
        "--solver dpm": ours("dpm"),
    }


def adversarial_variants() -> dict[str, Callable]:
    """A turn of the student and one of the discriminator, likewise."""

    def turns(student, discriminator):
        def run(problem, k, seed, values):
            times = problem.times(k, seed)
            return {**student(problem, times, values), **discriminator(problem, times, values)}

        return run

    return {"plain": turns(plain_step, plain_discriminator_step), "exact": turns(our_step, our_discriminator_step)}


def same_result(problem: Problem, variants: dict[str, Callable]) -> dict[str, float]:
    """How far losses and gradients of the exact step are from those of the plain one, relative to the largest of a network."""
    found = {}
    k = problem.strata()[0]
    for name in ("plain", "exact"):
        values = problem.inputs(0)
        with restored(problem):
            terms = variants[name](problem, k, 0, values)
            gradients = [
                [parameter.grad.clone() for parameter in network.parameters() if parameter.grad is not None]
                for network in (problem.student, problem.judge)
                if network is not None
            ]
        found[name] = (torch.tensor([float(value) for value in terms.values()]), gradients)
    (plain_terms, plain_gradients), (terms, gradients) = found["plain"], found["exact"]
    differences = [
        max((a - b).abs().max() for a, b in zip(ours, plain, strict=True)) / max(b.abs().max() for b in plain)
        for ours, plain in zip(gradients, plain_gradients, strict=True)
    ]
    return {
        "losses": float(((terms - plain_terms) / plain_terms).abs().max()),
        "gradients": float(max(differences)),
    }
