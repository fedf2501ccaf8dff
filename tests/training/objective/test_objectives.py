# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Every objective on a flow that is known: where it is 0, and that its gradient is the one of its formula.

The flow is a mixture's, in float64. The student is the flow's own g plus a few learnable functions, so that every
derivative is also autograd's through a closed form.
"""

import functools
import math
from types import SimpleNamespace

import pytest
import torch
from diffusers import UNet2DModel
from torch import nn

import training.objective.eulerian as eulerian_file
from diffusers_ctm import CTMUNet2DModel
from diffusers_ctm.preconditioning import Preconditioning
from helpers.comparing import close, seeded
from helpers.exact import GaussianData, PixelMixture, levels_like, randn
from helpers.tiny_networks import FAMILIES
from training.objective.derivatives import along_target, along_time
from training.objective.jumps import Jumps
from training.objective.losses import ScoreMatching, training_loss
from training.objective.objectives import OBJECTIVES, ObjectiveOptions
from training.objective.times import Times, TimeSampler


SIGMA_DATA = 0.5
SAMPLER = TimeSampler(18, 0.05, 20.0)
VARIANTS = {
    "ctm": {},
    "regression": {},
    "eulerian": {"derivative": "jvp", "eulerian_warmup": 0.0},
    "lagrangian": {"derivative": "jvp"},
    "semigroup": {},
}


class Mixture(PixelMixture):
    """`PixelMixture` whose jump has derivatives: those of one step of Newton's method, at the root."""

    def jump(self, x, t, s):
        root = super().jump(x.detach(), t.detach(), s.detach())
        z, spread = self._standardized(root, s)
        density = (self.weights * torch.exp(-(z**2) / 2) / (spread * math.sqrt(2 * math.pi))).sum(-1)
        return root - (self.cdf(root, s) - self.cdf(x, t)) / density


DATA = Mixture()


class Student(nn.Module):
    """F of g(x, t, s) = g of `data` + theta . (four functions of x, t, s). The last is 0 at s = t: it is wrong only
    between.
    """

    def __init__(self, *theta, data=DATA):
        super().__init__()
        self.data = data
        self.theta = nn.Parameter(torch.tensor(theta or (0.0,) * 4, dtype=torch.float64))
        self.last_layer = SimpleNamespace(weight=self.theta)

    def g(self, x, t, s):
        wide_t, wide_s = levels_like(t, x), levels_like(s, x)
        between = torch.cos(x) * (1 - wide_s / wide_t)
        wrong = [torch.tanh(x), torch.sin(x) * torch.log1p(wide_t), wide_s / (1 + wide_s) + 0 * x, between]
        return self.data.g(x, t, s) + sum(theta * part for theta, part in zip(self.theta, wrong))

    def forward(self, sample, timestep, target_timestep, return_dict=False):
        t, s = torch.exp(4 * timestep), torch.exp(4 * target_timestep)
        wide_t = levels_like(t, sample)
        total = wide_t**2 + SIGMA_DATA**2
        x = sample * total.sqrt()
        return ((self.g(x, t, s) - SIGMA_DATA**2 / total * x) * total.sqrt() / (wide_t * SIGMA_DATA),)


def jumps_of(name, student, ema, progress=0.5, data=DATA, batch=6, **given):
    """Samples on the flow of the mixture, whose teacher and solver are exact."""
    kinds = {"matching": SAMPLER, "global": TimeSampler(18, 0.05, 20.0, matching="global")}
    kind = OBJECTIVES[name].times
    draw = SAMPLER.draw_between if kind == "between" else kinds[kind].draw
    times = draw(batch, seeded(3))
    x_t = DATA.draw((batch, 1, 2, 2), seeded()) + levels_like(times.t, randn(1, 1, 1, 1)) * randn(batch, 1, 2, 2)
    return Jumps(
        student,
        ema,
        Preconditioning(SIGMA_DATA),
        times,
        x_t,
        solver=lambda x, levels, _: data.jump(x, levels[0], levels[-1]),
        teacher=lambda x, t, _: data.denoiser(x, t),
        progress=progress,
        **given,
    )


def descend(name, jumps, score_matching=None, **options):
    """The terms of the objective `name`, and the gradient at the student's last weights."""
    config, objective = ObjectiveOptions(objective=[name], **options), OBJECTIVES[name]
    terms, beside = functools.partial(objective.terms, options=config), objective.beside(jumps, config)
    last = jumps.student.last_layer.weight
    loss = training_loss(terms, jumps, lambda: last, score_matching, beside=beside)
    return loss.terms, torch.autograd.grad(loss.total, last)[0]


# The exact map --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_exact_map_has_no_loss_and_no_gradient_and_every_other_has(name, monkeypatch):
    monkeypatch.setattr(eulerian_file, "MOST", 1.0)
    terms, gradient = descend(name, jumps_of(name, Student(), Student()), **VARIANTS[name])
    assert terms["trajectory_loss"] < 1e-16 and gradient.abs().max() < 1e-7
    for wrong in range(4):
        theta = [0.1 * (part == wrong) for part in range(4)]
        terms, gradient = descend(name, jumps_of(name, Student(*theta), Student(*theta)), **VARIANTS[name])
        assert terms["trajectory_loss"] > 1e-6 and gradient[wrong].abs() > 1e-4, wrong


@pytest.mark.parametrize("name", OBJECTIVES)
def test_only_score_matching_tells_semigroup_the_data(name):
    """A student that is the exact flow of other data is a fixed point of it, and of nothing else."""
    other = Student(data=GaussianData(0.9))
    jumps, x_0 = jumps_of(name, other, other), DATA.draw((6, 1, 2, 2), seeded())
    x = x_0 + levels_like(jumps.t, x_0) * randn(6, 1, 2, 2, seed=1)
    terms, gradient = descend(name, jumps, ScoreMatching(x, jumps.t, x_0, adaptive=False), **VARIANTS[name])
    assert terms["trajectory_loss"] < 1e-16 if name == "semigroup" else terms["trajectory_loss"] > 1e-3
    assert gradient.abs().max() > 1e-2


def test_eulerian_keeps_a_hundredth_of_the_denoisers_distance():
    """At r = 0.99 the exact map has h = 0.01 (g - D)."""
    jumps = jumps_of("eulerian", Student(), Student())
    terms, _ = descend("eulerian", jumps, **VARIANTS["eulerian"])
    apart = jumps.unit * (DATA.g(jumps.x_t, jumps.t, jumps.s) - DATA.denoiser(jumps.x_t, jumps.t))
    expected = 0.01 * apart.square().flatten(1).mean(1).sqrt().mean()
    torch.testing.assert_close(terms["tangent_length"], expected, rtol=1e-6, atol=0)


def test_a_student_that_starts_as_its_teacher_has_no_tangent(make_unet):
    """Before the warm-up, and with a real network: h = g - D = 0 for every target."""
    teacher = make_unet(UNet2DModel).double().requires_grad_(False)
    student = CTMUNet2DModel.from_unet(teacher).requires_grad_(True)
    preconditioning, times = Preconditioning(SIGMA_DATA), SAMPLER.draw_between(3, seeded())
    x_t = levels_like(times.t, randn(1, 1, 1, 1)) * randn(3, 3, 8, 8)
    lengths = []
    for progress in (0.0, 0.1):
        jumps = Jumps(student, student, preconditioning, times, x_t, progress=progress)
        jumps.teacher = lambda x, t, _: preconditioning.denoise(teacher, x, t)
        terms, gradient = descend("eulerian", jumps)
        lengths.append((terms["tangent_length"].item(), gradient.abs().max().item()))
    assert max(lengths[0]) < 1e-12 and min(lengths[1]) > 1e-4


# The formulas ---------------------------------------------------------------------------------------------------------


class ByHand:
    """The objectives as their papers write them, for each pixel alone: x, t, u, s have shape (pixels, 1)."""

    def __init__(self, jumps):
        self.x, self.num_images = jumps.x_t.reshape(-1, 1), len(jumps.x_t)
        pixels = len(self.x) // self.num_images
        self.t, self.u, self.s = (level.repeat_interleave(pixels) for level in (jumps.t, jumps.u, jumps.s))
        self.wide_t, self.wide_u, self.wide_s = (level[:, None] for level in (self.t, self.u, self.s))
        self.weight = (self.wide_t**2 + SIGMA_DATA**2) / (self.wide_t * SIGMA_DATA) ** 2
        self.theta, self.ema = jumps.student, jumps.student_ema
        self.progress = jumps.progress

    def jumped(self, network, x, t, s):
        wide_t, wide_s = t[:, None], s[:, None]
        return wide_s / wide_t * x + (1 - wide_s / wide_t) * network.g(x, t, s)

    def partials(self, network):
        """dg/dx, dg/dt and dg/ds of `network`."""
        x, t, s = (value.detach().requires_grad_() for value in (self.x, self.t, self.s))
        parts = torch.autograd.grad(network.g(x, t, s).sum(), (x, t, s))
        return parts[0], parts[1][:, None], parts[2][:, None]

    def semi(self, residual):
        """The gradient of mean w (g - sg(g - residual))^2."""
        g = self.theta.g(self.x, self.t, self.s)
        return torch.autograd.grad((2 * self.weight * residual.detach() * g).mean(), self.theta.theta)[0]

    def regression(self):
        """The teacher's mean velocity from t to s is that of the student: (x - g) / t = (x - x_s) / (t - s)."""
        x_s = DATA.jump(self.x, self.t, self.s)
        g = self.theta.g(self.x, self.t, self.s)
        residual = (self.x - g) / self.wide_t - (self.x - x_s) / (self.wide_t - self.wide_s)
        loss = (self.weight * (self.wide_t * residual) ** 2).mean()
        return torch.autograd.grad(loss, self.theta.theta)[0]

    def eulerian(self):
        """AYF, Eq. 6 and 7: dG/dt = 0 along the teacher's ODE, with the warm-up of its tangent and its length."""
        r = 0.99 * min(1, self.progress / 0.3)
        denoised, g = DATA.denoiser(self.x, self.t), self.theta.g(self.x, self.t, self.s)
        dg_dx, dg_dt, _ = self.partials(self.theta)
        total = self.wide_t * ((self.x - denoised) / self.wide_t * dg_dx + dg_dt)
        a = 1 - self.wide_s / self.wide_t
        h = (1 - r * a) * (g - denoised) + r * a * total
        images = (self.weight * h**2).reshape(self.num_images, -1)
        length = images.mean(1).sqrt().repeat_interleave(images.shape[1])[:, None]
        return self.semi(h / (length + 0.1))

    def lagrangian(self):
        """AYF, Eq. 9: dG/ds is the teacher's velocity at the end."""
        x_s = self.jumped(self.theta, self.x, self.t, self.s)
        _, _, dg_ds = self.partials(self.theta)
        g = self.theta.g(self.x, self.t, self.s)
        dG_ds = (self.x - g) / self.wide_t + (1 - self.wide_s / self.wide_t) * dg_ds
        velocity = (x_s - DATA.denoiser(x_s, self.s)) / self.wide_s
        return self.semi(self.wide_s * (velocity - dG_ds))

    def semigroup(self):
        """Two jumps of the average, as the g of one."""
        x_s = self.jumped(self.ema, self.jumped(self.ema, self.x, self.t, self.u), self.u, self.s)
        target = (self.wide_t * x_s - self.wide_s * self.x) / (self.wide_t - self.wide_s)
        return self.semi(self.theta.g(self.x, self.t, self.s) - target)

    def lagrangian_full(self, step):
        """The same residual as `lagrangian` with everything differentiated; dg/ds is a difference."""
        step = step * torch.ones_like(self.t)
        step = step.minimum((self.t / self.s).log())
        g, up = self.theta.g(self.x, self.t, self.s), self.theta.g(self.x, self.t, self.s * step.exp())
        a = 1 - self.wide_s / self.wide_t
        x_s = self.jumped(self.theta, self.x, self.t, self.s)
        residual = g - a * (up - g) / step[:, None] - DATA.denoiser(x_s, self.s)
        return torch.autograd.grad((self.weight * residual**2).mean(), self.theta.theta)[0]


WRONG, WRONG_EMA = (0.2, -0.1, 0.15, 0.3), (0.1, 0.05, -0.2, 0.25)


@pytest.mark.parametrize(
    "name, progress",
    [("regression", 0.5), ("eulerian", 0.0), ("eulerian", 0.12), ("eulerian", 0.5), ("lagrangian", 0.5),
     ("semigroup", 0.5)],
)  # fmt: skip
def test_the_gradient_is_that_of_the_formula(name, progress):
    """CTM's is in test_losses.py."""
    jumps = jumps_of(name, Student(*WRONG), Student(*WRONG_EMA), progress)
    options = VARIANTS[name] | ({"eulerian_warmup": 0.3} if name == "eulerian" else {})
    _, gradient = descend(name, jumps, **options)
    torch.testing.assert_close(gradient, getattr(ByHand(jumps), name)(), rtol=1e-8, atol=1e-10)


def test_the_full_gradient_of_lagrangian_is_autograds():
    jumps, step = jumps_of("lagrangian", Student(*WRONG), Student(*WRONG_EMA)), 0.02
    _, gradient = descend("lagrangian", jumps, lagrangian_gradient="full", derivative_step=step)
    torch.testing.assert_close(gradient, ByHand(jumps).lagrangian_full(step), rtol=1e-8, atol=1e-10)
    _, semi = descend("lagrangian", jumps, derivative_step=step)
    assert (gradient - semi).norm() > 0.1 * semi.norm()


# Derivatives ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, options", [("eulerian", {}), ("lagrangian", {}), ("lagrangian", {"lagrangian_gradient": "full"})]
)
def test_by_a_difference_the_exact_map_is_0_to_order_1(name, options, monkeypatch):
    monkeypatch.setattr(eulerian_file, "MOST", 1.0)
    residuals = []
    for step in (0.04, 0.02, 0.01):
        terms, _ = descend(name, jumps_of(name, Student(), Student()), derivative_step=step, **options)
        residuals.append(terms.get("tangent_length", terms["trajectory_loss"].sqrt()).item())
    slopes = [math.log2(a / b) for a, b in zip(residuals, residuals[1:])]
    assert residuals[-1] < 0.02 and slopes == pytest.approx([1, 1], abs=0.1)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_jvp_of_real_networks_is_that_of_reverse_mode(name):
    """w . (J v) = (J^T w) . v, of a network with attention and classes in training."""
    family = FAMILIES[name]
    wider = {name: (16,) for name in family.small if name == "block_out_channels"}
    student = family.make_student(**family.small | wider).double().train()
    jumps = real_jumps(student, family.timestep_scale)
    velocity, w = (randn(3, 3, 8, 8, seed=seed) for seed in (5, 6))
    options = ObjectiveOptions(objective=["eulerian"], derivative="jvp")
    x, ln_t, ln_s = (value.clone().requires_grad_() for value in (jumps.x_t, jumps.t.log(), jumps.s.log()))
    g = jumps.g_by(student, x, ln_t.exp(), ln_s.exp())
    by_x, by_t, by_s = torch.autograd.grad((w * g).sum(), (x, ln_t, ln_s))
    close((w * along_time(jumps, velocity, options)).sum(), (by_x * velocity).sum() + by_t.sum(), 1e-5, 0)
    close((w * along_target(jumps, options)).sum(), by_s.sum(), 1e-5, 0)
    assert student.training and by_s.sum().abs() > 1e-3


def real_jumps(student, timestep_scale=1.0, dtype=torch.float64):
    levels = torch.tensor([[9.0, 2.0, 0.5], [1.0, 1.0, 0.1]], dtype=torch.float64)
    x_t = levels_like(levels[0], randn(1, 1, 1, 1)) * randn(3, 3, 8, 8)
    labels = None if student.config.num_class_embeds is None else torch.tensor([0, 1, 2])
    preconditioning = Preconditioning(SIGMA_DATA, timestep_scale)
    jumps = Jumps(student, student, preconditioning, Times(levels, levels[1], 0.05), x_t.to(dtype), labels)
    with torch.no_grad():
        jumps.outputs = (jumps.g_by(student, jumps.x_t, jumps.t, jumps.s),)
    return jumps


@pytest.mark.parametrize("derivative", ["difference", "jvp"])
def test_dropout_and_half_precision_leave_derivatives_as_they_are(make_unet, derivative):
    student = make_unet(CTMUNet2DModel, dropout=0.4)
    options = ObjectiveOptions(objective=["eulerian"], derivative=derivative)

    def derivatives(mode, precision):
        student.train(mode)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision):
            jumps = real_jumps(student, dtype=torch.float32)
            found = along_time(jumps, 0.5 * jumps.x_t, options), along_target(jumps, options)
        assert student.training == mode and all(value.dtype == torch.float32 for value in found)
        return jumps.g, found

    g, plain = derivatives(False, False)
    for mode, precision in ((True, False), (False, True), (True, True)):
        g_other, found = derivatives(mode, precision)
        assert (g_other - g).abs().max() > 1e-3
        for ours, expected in zip(found, plain):
            torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4)
