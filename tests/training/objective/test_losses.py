# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""`ctm_loss` is 0 for the exact jump, equals the loss as the paper writes it, and computes no more than it needs."""

import pytest
import torch

from diffusers_ctm.preconditioning import Preconditioning
from diffusers_ctm.trajectory import karras_sigmas
from helpers.comparing import seeded
from helpers.exact import ExactNetwork, GaussianData, grid_times, randn
from training.objective.distances import l2_distance, pseudo_huber_distance
from training.objective.losses import (
    Adversary,
    Jumps,
    ScoreMatching,
    adaptive_weight,
    ctm_estimate,
    ctm_loss,
    dsm_loss,
    jump_where_needed,
)
from training.objective.solvers import SOLVERS, heun_solve
from training.objective.times import TimeSampler
from training.run.averages import EMA
from training.run.learner import clip_gradient
from training.run.monitor import Means


SIGMA_DATA = 0.5
PRECONDITIONING = Preconditioning(SIGMA_DATA, 1.0)
GRID = karras_sigmas(18, dtype=torch.float64)


def samples(batch=5, shape=(3, 8, 8)):
    """x_0 and noise."""
    return SIGMA_DATA * randn(batch, *shape, seed=1), randn(batch, *shape, seed=2)


def matching(batch=5, **options):
    return ScoreMatching(torch.exp(randn(batch, seed=4)), randn(batch, 3, 8, 8, seed=3), **options)


def jumps_of(student, ema, times, labels):
    return Jumps(student, ema, PRECONDITIONING, times, *samples(), labels)


@pytest.mark.parametrize("kind", ["soft", "local", "global"])
@pytest.mark.parametrize("inner_target", ["ema", "live"])
def test_exact_jump_and_exact_solver_have_no_trajectory_loss(kind, inner_target):
    network = ExactNetwork(GaussianData(SIGMA_DATA), SIGMA_DATA)
    bias = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def solver(x, levels, labels):
        return GaussianData(SIGMA_DATA).jump(x, levels[0], levels[-1])

    def trajectory(times, offset):
        def student(*args, **kwargs):
            return (network(*args, **kwargs)[0] + bias + offset,)

        jumps = Jumps(student, network, PRECONDITIONING, times, *samples(16))
        return ctm_loss(jumps, solver, lambda: bias, inner_target=inner_target).trajectory.item()

    for seed in range(3):
        times = TimeSampler(18, matching=kind).draw(16, seeded(seed))
        assert trajectory(times, 0.0) < 1e-20
        assert trajectory(times, 0.1) > 1e-7  # a student that is off is seen


@pytest.fixture
def networks(make_unet):
    """Student, average and teacher with different random weights, in float64."""
    student, ema, teacher = (make_unet(seed=seed, num_class_embeds=4).double() for seed in range(3))
    return student, ema.requires_grad_(False), teacher.requires_grad_(False)


LABELS = torch.tensor([0, 1, 2, 3, 0])
# Samples 0 and 1 end at sigma_min, samples 1 and 2 have s = u, samples 3 and 4 need every jump.
TIMES = grid_times(GRID, [3, 14, 2, 0, 5], [6, 17, 5, 3, 8], [17, 17, 5, 9, 12])


def along(network, solve=heun_solve):
    """A solver along the score of `network`."""

    def solver(x, levels, labels):
        return solve(lambda x, t: PRECONDITIONING.denoise(network, x, t, class_labels=labels), x, levels)

    return solver


def plain_ctm_loss(student, ema, teacher, dsm, distance, inner, adaptive, generator=None):
    """The loss as it is written in the paper: every jump computed, every gradient by its own backward pass."""
    condition, jump = {"class_labels": LABELS}, PRECONDITIONING.jump
    t, u, s, end = TIMES.t, TIMES.u, TIMES.s, GRID[-1].expand(5)
    x_0, noise = samples()
    x_t = x_0 + t[:, None, None, None] * noise
    with torch.no_grad():
        x_u = along(teacher)(x_t, TIMES.path, LABELS)
    target = jump(ema, jump(ema if inner == "ema" else student, x_u, u, s, **condition), s, end, **condition).detach()
    estimate = jump(ema, jump(student, x_t, t, s, **condition), s, end, **condition)
    trajectory = distance(estimate, target).mean()
    x_sigma = x_0 + dsm.sigma[:, None, None, None] * dsm.noise
    denoised = PRECONDITIONING.denoise(student, x_sigma, dsm.sigma, **condition)
    weight = (dsm.sigma**2 + SIGMA_DATA**2) / (dsm.sigma * SIGMA_DATA) ** 2
    terms = [trajectory, (weight * (denoised - x_0).square().mean((1, 2, 3))).mean()]
    terms += [] if generator is None else [generator(estimate)]
    last = student.conv_out.weight
    lengths = [torch.autograd.grad(term, last, retain_graph=True)[0].norm() for term in terms]
    scales = [(lengths[0] / (length + 1e-4)).detach() if adaptive else 1.0 for length in lengths[1:]]
    if generator is not None:
        scales[1] = scales[1].clamp(0.01, 10)
    return terms, scales, trajectory + sum(scale * term for scale, term in zip(scales, terms[1:], strict=True))


def adversary(images):
    """A term of the estimate with another gradient than the trajectory loss."""
    return -(3 * images[:, :, 1:, :] * images[:, :, :-1, :]).mean()


@pytest.mark.parametrize(
    "distance, inner, adaptive, generator",
    [
        (l2_distance, "ema", True, None),
        (pseudo_huber_distance, "live", True, None),
        (l2_distance, "live", False, None),
        (pseudo_huber_distance, "ema", True, adversary),
    ],
)
def test_equals_the_loss_with_every_jump_computed(networks, distance, inner, adaptive, generator):
    student, ema, teacher = networks
    dsm = matching(adaptive=adaptive)
    terms, scales, total = plain_ctm_loss(student, ema, teacher, dsm, distance, inner, adaptive, generator)
    expected = torch.autograd.grad(total, list(student.parameters()))
    term = Adversary(generator, lambda *gradients: adaptive_weight(*gradients).clamp(0.01, 10))
    loss = ctm_loss(
        jumps_of(student, ema, TIMES, LABELS),
        along(teacher),
        lambda: student.conv_out.weight,
        dsm,
        term if generator else None,
        distance,
        inner,
    )
    loss.total.backward()
    torch.testing.assert_close(loss.total, total)
    ours = [loss.trajectory, loss.dsm, loss.generator]
    for value, plain in zip(ours, terms):
        torch.testing.assert_close(value, plain.detach())
    for value, plain in zip([loss.dsm_weight, loss.generator_weight], scales):
        torch.testing.assert_close(value, torch.as_tensor(plain, dtype=torch.float64))
    for (name, parameter), gradient in zip(student.named_parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, msg=lambda text, name=name: f"{name}: {text}")
    assert all(p.grad is None for network in (ema, teacher) for p in network.parameters())
    # The gradient comes through the outer jump: without it, it would be another one.
    assert student.target_time_embedding.linear_1.weight.grad.norm() > 0


@pytest.mark.parametrize("generator", [None, adversary])
def test_network_calls_forward_and_backward(networks, generator):
    """The average is differentiated once for each term of the estimate, the student once."""
    student, ema, teacher = networks
    rows, backward = {"student": [], "ema": [], "teacher": []}, {"ema": 0, "student": 0}
    for name, network in zip(rows, networks, strict=True):

        def note(module, args, output, name=name):
            rows[name].append((len(args[0]), output[0].requires_grad))

        network.register_forward_hook(note)
    for name, network in (("ema", ema), ("student", student)):

        def watch(module, args, output, name=name):
            if output.requires_grad:
                output.register_hook(lambda gradient: backward.__setitem__(name, backward[name] + 1))

        network.conv_in.register_forward_hook(watch)
    term = Adversary(generator) if generator else None
    jumps = jumps_of(student, ema, TIMES, LABELS)
    ctm_loss(jumps, along(teacher), lambda: student.conv_out.weight, matching(), term).total.backward()
    assert backward == {"ema": 1 if generator is None else 2, "student": 1}
    assert rows["student"] == [(10, True)]  # both losses in one batch
    assert rows["teacher"] == [(5, False)] * 6  # Heun, k = 3
    # inner jump of samples 0, 3, 4; outer ones of samples 2, 3, 4, once without and once with gradient
    assert rows["ema"] == [(3, False), (3, False), (3, True)]


def test_estimate_of_the_discriminators_step_is_that_of_the_loss(networks):
    student, ema, teacher = networks
    seen, jumps = [], jumps_of(student, ema, TIMES, LABELS)
    term = Adversary(lambda estimate: seen.append(estimate) or estimate.mean())
    ctm_loss(jumps, along(teacher), lambda: student.conv_out.weight, adversary=term)
    fake = ctm_estimate(jumps)
    torch.testing.assert_close(fake, seen[0].detach())
    assert not fake.requires_grad


def test_adaptive_weight_is_that_of_the_reduced_gradients(networks):
    student, ema, _ = networks
    seen = []

    def reduce(gradient):  # as if the other processes had other gradients
        seen.append(gradient)
        return gradient * (3.0 if len(seen) == 1 else 0.5)

    jumps, last = jumps_of(student, ema, TIMES, LABELS), student.conv_out.weight
    loss = ctm_loss(jumps, lambda x, *_: 0.5 * x, lambda: last, matching(weight=0.7), reduce_gradient=reduce)
    torch.testing.assert_close(loss.dsm_weight, 0.7 * adaptive_weight(3.0 * seen[0], 0.5 * seen[1]))


def test_no_jump_is_computed_where_all_are_identities(networks):
    student, ema, _ = networks
    ema.register_forward_hook(lambda *_: pytest.fail("the average was called"))
    jumps = jumps_of(student, ema, TimeSampler(18).draw_to_end(5, seeded()), LABELS)
    assert ctm_loss(jumps, lambda x, *_: 0.1 * x, lambda: student.conv_out.weight, matching()).trajectory > 0


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_step_does_not_wait_for_the_device(networks, solver):
    """On the device "meta" whoever reads a value, or a shape that depends on values, raises."""
    student, ema, teacher = (network.to("meta") for network in networks)
    average, means, dsm = EMA(student, 0.9), Means(), matching()
    dsm = ScoreMatching(dsm.sigma.to("meta"), dsm.noise.to("meta"))
    x_0, noise = (value.to("meta") for value in samples())
    jumps = Jumps(student, ema, PRECONDITIONING, TIMES, x_0, noise, LABELS.to("meta"))
    last = student.conv_out.weight
    loss = ctm_loss(jumps, along(teacher, SOLVERS[solver].solve), lambda: last, dsm, Adversary(adversary))
    finite = means.add({"trajectory_loss": loss.trajectory, "dsm_loss": loss.dsm})
    (loss.total * torch.where(finite, 1.0, float("nan"))).backward()
    norm = clip_gradient(list(student.parameters()), 1.0)
    average.step(student, norm.isfinite())
    assert ctm_estimate(jumps).device.type == "meta"


def test_score_matching_of_the_exact_denoiser_is_one_at_every_level():
    data = GaussianData(SIGMA_DATA)
    for level in (0.01, 0.3, 5.0, 80.0):
        x_0 = data.draw((2000, 1, 4, 4), seeded())
        sigma = torch.full((2000,), level, dtype=torch.float64)
        x = x_0 + level * randn(2000, 1, 4, 4, seed=1)
        assert dsm_loss(data.denoiser(x, sigma), x_0, sigma, SIGMA_DATA).mean().item() == pytest.approx(1, abs=0.03)
        assert dsm_loss(1.1 * data.denoiser(x, sigma) + 0.1, x_0, sigma, SIGMA_DATA).mean().item() > 1.03


def test_adaptive_weight_is_a_ratio_of_lengths_with_a_limit():
    assert adaptive_weight(torch.tensor([3.0, 4.0]), torch.tensor([0.0, 2.0])).item() == pytest.approx(5 / 2.0001)
    assert adaptive_weight(torch.ones(4), torch.zeros(4)).item() == 1e4
    assert not adaptive_weight(torch.ones(4, requires_grad=True), torch.ones(4)).requires_grad


def test_jump_where_needed_touches_only_these():
    x = randn(4, 1, 2, 2)
    out = jump_where_needed(
        lambda x, f, none: x * f[:, None, None, None], x, torch.tensor([1, 3]), torch.arange(4.0).double(), None
    )
    torch.testing.assert_close(out, torch.stack([x[0], x[1] * 1, x[2], x[3] * 3]))
    assert jump_where_needed(lambda x: pytest.fail("called"), x, torch.tensor([], dtype=torch.long)) is x
