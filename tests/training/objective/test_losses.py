# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""`training_loss` with CTM's objective equals the loss as the paper writes it, and computes no more than it needs."""

import contextlib
import functools
import math

import pytest
import torch

from diffusers_ctm.preconditioning import Preconditioning
from diffusers_ctm.trajectory import karras_sigmas
from helpers.comparing import close_in_float64, seeded
from helpers.exact import GaussianData, grid_times, randn
from training.objective.distances import l2_distance, pseudo_huber_distance
from training.objective.jumps import Jumps, jump_where_needed, noised, student_images
from training.objective.losses import (
    Adversary,
    ScoreMatching,
    adaptive_weight,
    dsm_loss,
    training_loss,
    uncertainty_loss,
)
from training.objective.objectives import OBJECTIVES, ObjectiveOptions
from training.objective.solvers import SOLVERS
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
    x_0, _ = samples(batch)
    sigma = torch.exp(randn(batch, seed=4))
    return ScoreMatching(noised(x_0, sigma, randn(batch, 3, 8, 8, seed=3)), sigma, x_0, LABELS, **options)


def jumps_of(student, ema, times, labels, solver, **given):
    x_0, noise = samples()
    return Jumps(student, ema, PRECONDITIONING, times, noised(x_0, times.t, noise), labels, solver, **given)


def ctm_loss(jumps, last_weight, *terms, inner_target="ema", **given):
    options = ObjectiveOptions(objective=["ctm"], inner_target=inner_target)
    return training_loss(
        functools.partial(OBJECTIVES["ctm"].terms, options=options), jumps, last_weight, *terms, **given
    )


@pytest.fixture
def networks(make_unet):
    """Student, average and teacher with different random weights, in float64."""
    student, ema, teacher = (make_unet(seed=seed, num_class_embeds=4).double() for seed in range(3))
    return student, ema.requires_grad_(False), teacher.requires_grad_(False)


LABELS = torch.tensor([0, 1, 2, 3, 0])
# Samples 0 and 1 end at sigma_min, samples 1 and 2 have s = u, samples 3 and 4 need every jump.
TIMES = grid_times(GRID, [3, 14, 2, 0, 5], [6, 17, 5, 3, 8], [17, 17, 5, 9, 12])


def along(network, solver="heun"):
    """A solver along the score of `network`."""

    def solve(x, levels, labels):
        return SOLVERS[solver].solve(denoiser(network, labels), x, levels)

    return solve


def denoiser(network, labels):
    return lambda x, t: PRECONDITIONING.denoise(network, x, t, class_labels=labels)


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
    x_sigma = x_0 + dsm.sigma[:, None, None, None] * randn(5, 3, 8, 8, seed=3)
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
    jumps = jumps_of(student, ema, TIMES, LABELS, along(teacher), distance=distance)
    loss = ctm_loss(jumps, lambda: student.conv_out.weight, dsm, term if generator else None, inner_target=inner)
    loss.total.backward()
    torch.testing.assert_close(loss.total, total)
    names = ["trajectory", "dsm", *(["generator"] if generator else [])]
    for name, plain in zip(names, terms, strict=True):
        torch.testing.assert_close(loss.terms[f"{name}_loss"], plain.detach())
    for name, plain in zip(names[1:], scales, strict=True):
        torch.testing.assert_close(loss.terms[f"{name}_weight"], torch.as_tensor(plain, dtype=torch.float64))
    torch.testing.assert_close(loss.dsm_samples.mean(), terms[1].detach())
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
    jumps = jumps_of(student, ema, TIMES, LABELS, along(teacher))
    ctm_loss(jumps, lambda: student.conv_out.weight, matching(), term).total.backward()
    assert backward == {"ema": 1 if generator is None else 2, "student": 1}
    assert rows["student"] == [(10, True)]  # both losses in one batch
    assert rows["teacher"] == [(5, False)] * 6  # Heun, k = 3
    # inner jump of samples 0, 3, 4; outer ones of samples 2, 3, 4, once without and once with gradient
    assert rows["ema"] == [(3, False), (3, False), (3, True)]


def test_estimate_of_the_discriminators_step_is_that_of_the_loss(networks):
    student, ema, teacher = networks
    seen, jumps = [], jumps_of(student, ema, TIMES, LABELS, along(teacher))
    term = Adversary(lambda estimate: seen.append(estimate) or estimate.mean())
    ctm_loss(jumps, lambda: student.conv_out.weight, adversary=term)
    fake = student_images(jumps)
    torch.testing.assert_close(fake, seen[0].detach())
    assert not fake.requires_grad


def test_adaptive_weight_is_that_of_the_reduced_gradients(networks):
    student, ema, _ = networks
    seen = []

    def reduce(gradient):  # as if the other processes had other gradients
        seen.append(gradient)
        return gradient * (3.0 if len(seen) == 1 else 0.5)

    jumps, last = jumps_of(student, ema, TIMES, LABELS, lambda x, *_: 0.5 * x), student.conv_out.weight
    loss = ctm_loss(jumps, lambda: last, matching(weight=0.7), reduce_gradient=reduce)
    torch.testing.assert_close(loss.terms["dsm_weight"], 0.7 * adaptive_weight(3.0 * seen[0], 0.5 * seen[1]))


def test_no_jump_is_computed_where_all_are_identities(networks):
    student, ema, _ = networks
    ema.register_forward_hook(lambda *_: pytest.fail("the average was called"))
    jumps = jumps_of(student, ema, TimeSampler(18).draw_to_end(5, seeded()), LABELS, lambda x, *_: 0.1 * x)
    assert ctm_loss(jumps, lambda: student.conv_out.weight, matching()).terms["trajectory_loss"] > 0


STEPS = [
    *(("ctm", {"solver": solver}) for solver in SOLVERS),
    ("regression", {}),
    ("eulerian", {}),
    ("eulerian", {"derivative": "jvp"}),
    ("lagrangian", {}),
    ("lagrangian", {"derivative": "jvp"}),
    ("lagrangian", {"lagrangian_gradient": "full"}),
    ("semigroup", {}),
]


@pytest.mark.parametrize("name, options", STEPS, ids=lambda value: value if isinstance(value, str) else str(value))
def test_a_step_does_not_wait_for_the_device(networks, name, options, monkeypatch):
    """On the device "meta" whoever reads a value, or a shape that depends on values, raises."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # it does not know "meta"
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda _: True)
    student, ema, teacher = (network.to("meta") for network in networks)
    average, means, dsm = EMA(student, 0.9), Means(), matching()
    dsm = ScoreMatching(*(value.to("meta") for value in (dsm.x, dsm.sigma, dsm.target, dsm.class_labels)))
    objective, config = OBJECTIVES[name], ObjectiveOptions(objective=[name], **options)
    between = objective.times == "between"
    times = TimeSampler(18).draw_between(5, seeded()) if between else TIMES
    x_0, noise = (value.to("meta") for value in samples())
    jumps = Jumps(
        student.train(), ema, PRECONDITIONING, times, noised(x_0, times.t, noise), LABELS.to("meta"),
        along(teacher, config.solver), lambda x, t, labels: denoiser(teacher, labels)(x, t), progress=0.5,
    )  # fmt: skip
    terms, beside = functools.partial(objective.terms, options=config), objective.beside(jumps, config)
    last = student.conv_out.weight
    loss = training_loss(terms, jumps, lambda: last, dsm, Adversary(adversary), beside)
    finite = means.add({name: value for name, value in loss.terms.items() if name.endswith("loss")})
    (loss.total * torch.where(finite, 1.0, float("nan"))).backward()
    norm = clip_gradient(list(student.parameters()), 1.0)
    average.step(student, norm.isfinite())
    assert student_images(jumps).device.type == "meta"


def test_score_matching_of_the_exact_denoiser_is_one_at_every_level():
    data = GaussianData(SIGMA_DATA)
    for level in (0.01, 0.3, 5.0, 80.0):
        x_0 = data.draw((2000, 1, 4, 4), seeded())
        sigma = torch.full((2000,), level, dtype=torch.float64)
        x = x_0 + level * randn(2000, 1, 4, 4, seed=1)
        assert dsm_loss(data.denoiser(x, sigma), x_0, sigma, SIGMA_DATA).mean().item() == pytest.approx(1, abs=0.03)
        assert dsm_loss(1.1 * data.denoiser(x, sigma) + 0.1, x_0, sigma, SIGMA_DATA).mean().item() > 1.03


def test_the_uncertainty_that_is_best_is_the_logarithm_of_the_loss():
    """losses / exp(u) + u; then every level has the same loss 1, and that is no smaller for any other u."""
    losses = torch.tensor([0.03, 1.0, 20.0], dtype=torch.float64)
    u = losses.log().requires_grad_()
    best = uncertainty_loss(losses, u)
    close_in_float64(best.detach(), 1 + losses.log())
    (gradient,) = torch.autograd.grad(best.sum(), u)
    assert gradient.abs().max() < 1e-12
    for shift in (-0.5, 0.1, 2.0):
        more = uncertainty_loss(losses, u + shift) - best
        assert more.tolist() == pytest.approx([math.exp(-shift) - 1 + shift] * 3, rel=1e-9)
    assert torch.equal(uncertainty_loss(losses, torch.zeros(3)), losses)


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
