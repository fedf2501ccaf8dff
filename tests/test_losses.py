import copy

import pytest
import torch
from exact import ExactNetwork, GaussianData, randn

from diffusers_ctm import CTMUNet2DModel
from diffusers_ctm.trajectory import Preconditioning, karras_sigmas
from training.losses import (
    DISTANCES,
    adaptive_weight,
    ctm_loss,
    dsm_loss,
    jump_where_needed,
    l2_distance,
    pseudo_huber_distance,
)
from training.solver import heun_solve
from training.time_sampling import Times, draw_times


SIGMA_DATA = 0.5
PRECONDITIONING = Preconditioning(SIGMA_DATA, 1.0)
GRID = karras_sigmas(18, dtype=torch.float64)


def times_of(t, u, s):
    return Times(torch.tensor(t), torch.tensor(u), torch.tensor(s), u[0] - t[0])


def inputs(batch=5, dtype=torch.float64, shape=(3, 8, 8)):
    sigma = torch.exp(randn(batch, seed=4, dtype=dtype))
    return {
        "x_0": SIGMA_DATA * randn(batch, *shape, seed=1, dtype=dtype),
        "noise": randn(batch, *shape, seed=2, dtype=dtype),
        "dsm_sigma": sigma,
        "dsm_noise": randn(batch, *shape, seed=3, dtype=dtype),
    }


def exact_solver(x_t, index, num_steps):
    return GaussianData(SIGMA_DATA).jump(x_t, GRID[index], GRID[index + num_steps])


@pytest.mark.parametrize("matching", ["soft", "local", "global"])
@pytest.mark.parametrize("inner_target", ["ema", "live"])
def test_exact_jump_and_exact_solver_have_no_trajectory_loss(matching, inner_target):
    network = ExactNetwork(GaussianData(SIGMA_DATA), SIGMA_DATA)
    bias = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def student(*args, offset=0.0, **kwargs):
        return (network(*args, **kwargs)[0] + bias + offset,)

    for seed in range(3):
        times = draw_times(16, 18, matching, 17, "weighted", torch.Generator().manual_seed(seed))
        values = inputs(16)
        options = {"inner_target": inner_target, "dsm_weight": 0.0, "last_weight": bias}
        loss = ctm_loss(student, network, exact_solver, PRECONDITIONING, GRID, times, **values, **options)
        assert loss.trajectory.item() < 1e-20
        off = ctm_loss(
            lambda *a, **k: student(*a, offset=0.1, **k),
            network,
            exact_solver,
            PRECONDITIONING,
            GRID,
            times,
            **values,
            **options,
        )
        assert off.trajectory.item() > 1e-7  # a student that is off is seen


@pytest.fixture
def networks(make_unet):
    """Student, average and teacher with different random weights, in float64."""
    student = make_unet(seed=0, num_class_embeds=4).double()
    ema = make_unet(seed=1, num_class_embeds=4).double().requires_grad_(False)
    teacher = make_unet(seed=2, num_class_embeds=4).double().requires_grad_(False)
    return student, ema, teacher


LABELS = torch.tensor([0, 1, 2, 3, 0])
# Samples 0 and 1 end at sigma_min, samples 1 and 2 have s = u, samples 3 and 4 need every jump.
TIMES = times_of([3, 14, 2, 0, 5], [6, 17, 5, 3, 8], [17, 17, 5, 9, 12])


def plain_ctm_loss(student, ema, teacher, times, values, distance, inner, adaptive):
    """The loss as it is written in the paper: every jump computed, every gradient by its own backward pass."""
    condition = {"class_labels": LABELS}
    t, u, s = GRID[times.t], GRID[times.u], GRID[times.s]
    end = GRID[-1].expand(5)
    jump = PRECONDITIONING.jump
    x_t = values["x_0"] + t[:, None, None, None] * values["noise"]
    x_u = heun_solve(
        lambda x, sigma: PRECONDITIONING.denoise(teacher, x, sigma, **condition), GRID, x_t, times.t, times.solver_steps
    )
    x_u = x_u.detach()
    target = jump(ema, jump(ema if inner == "ema" else student, x_u, u, s, **condition), s, end, **condition).detach()
    estimate = jump(ema, jump(student, x_t, t, s, **condition), s, end, **condition)
    trajectory = distance(estimate, target).mean()
    sigma = values["dsm_sigma"]
    x_sigma = values["x_0"] + sigma[:, None, None, None] * values["dsm_noise"]
    denoised = PRECONDITIONING.denoise(student, x_sigma, sigma, **condition)
    weight = (sigma**2 + SIGMA_DATA**2) / (sigma * SIGMA_DATA) ** 2
    dsm = (weight * (denoised - values["x_0"]).square().mean((1, 2, 3))).mean()
    last = student.conv_out.weight
    lengths = [torch.autograd.grad(term, last, retain_graph=True)[0].norm() for term in (trajectory, dsm)]
    scale = (lengths[0] / (lengths[1] + 1e-4)).detach() if adaptive else 1.0
    return trajectory, dsm, scale, trajectory + scale * dsm


@pytest.mark.parametrize(
    "distance, inner, adaptive", [("l2", "ema", True), ("pseudo_huber", "live", True), ("l2", "live", False)]
)
def test_equals_the_loss_with_every_jump_computed(networks, distance, inner, adaptive):
    student, ema, teacher = networks
    values = inputs()
    plain = plain_ctm_loss(student, ema, teacher, TIMES, values, DISTANCES[distance], inner, adaptive)
    expected = torch.autograd.grad(plain[3], list(student.parameters()))

    def solver(x, index, steps):
        return heun_solve(
            lambda x, sigma: PRECONDITIONING.denoise(teacher, x, sigma, class_labels=LABELS), GRID, x, index, steps
        )

    loss = ctm_loss(
        student, ema, solver, PRECONDITIONING, GRID, TIMES, **values, last_weight=student.conv_out.weight, class_labels=LABELS,
        distance=DISTANCES[distance], inner_target=inner, dsm_adaptive=adaptive,
    )  # fmt: skip
    loss.backward.backward()
    torch.testing.assert_close(loss.trajectory, plain[0].detach())
    torch.testing.assert_close(loss.dsm, plain[1].detach())
    torch.testing.assert_close(loss.dsm_weight, torch.as_tensor(plain[2], dtype=torch.float64))
    for (name, parameter), gradient in zip(student.named_parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, msg=lambda text, name=name: f"{name}: {text}")
    assert all(p.grad is None for network in (ema, teacher) for p in network.parameters())
    # The gradient comes through the outer jump: without it, it would be another one.
    assert student.target_time_embedding.linear_1.weight.grad.norm() > 0


def test_adaptive_weight_is_that_of_the_reduced_gradients(networks):
    student, ema, _ = networks
    seen = []

    def reduce(gradient):  # as if the other processes had other gradients
        seen.append(gradient)
        return gradient * (3.0 if len(seen) == 1 else 0.5)

    arguments = (student, ema, lambda x, index, k: x * 0.5, PRECONDITIONING, GRID, TIMES)
    options = {**inputs(), "last_weight": student.conv_out.weight, "class_labels": LABELS, "dsm_weight": 0.7}
    weight = ctm_loss(*arguments, **options, reduce_gradient=reduce).dsm_weight
    torch.testing.assert_close(weight, 0.7 * adaptive_weight(3.0 * seen[0], 0.5 * seen[1]))


def test_counts_network_evaluations(networks):
    student, ema, teacher = networks
    rows = {"student": [], "ema": [], "teacher": []}
    for name, network in zip(rows, networks, strict=True):
        network.register_forward_hook(
            lambda module, args, output, name=name: rows[name].append((len(args[0]), output[0].requires_grad))
        )

    def solver(x, index, steps):
        return heun_solve(
            lambda x, sigma: PRECONDITIONING.denoise(teacher, x, sigma, class_labels=LABELS), GRID, x, index, steps
        )

    ctm_loss(
        student,
        ema,
        solver,
        PRECONDITIONING,
        GRID,
        TIMES,
        **inputs(),
        last_weight=student.conv_out.weight,
        class_labels=LABELS,
    )
    assert rows["student"] == [(10, True)]  # both losses in one batch
    assert rows["teacher"] == [(5, False)] * 6  # Heun, k = 3
    # inner jump of samples 0, 3, 4; outer ones of samples 2, 3, 4, once without and once with gradient
    assert rows["ema"] == [(3, False), (3, False), (3, True)]


def test_no_jump_is_computed_where_all_are_identities(networks):
    student, ema, _ = networks
    ema.register_forward_hook(lambda *_: pytest.fail("the average was called"))
    times = times_of([3, 14, 2, 0, 5], [17, 17, 17, 17, 17], [17, 17, 17, 17, 17])
    times.solver_steps = 3
    loss = ctm_loss(
        student, ema, lambda x, index, k: x * 0.1, PRECONDITIONING, GRID, times, **inputs(), last_weight=student.conv_out.weight,
        class_labels=LABELS,
    )  # fmt: skip
    assert loss.trajectory > 0


def test_untrained_student_is_the_euler_step_of_its_teacher(exact_teacher):
    teacher = exact_teacher().double()
    student = CTMUNet2DModel.from_unet(teacher)
    x_t = 10 * randn(4, 3, 8, 8)
    t, s = torch.tensor([10.0, 5.0, 2.0, 1.0]).double(), torch.tensor([3.0, 0.002, 1.0, 0.5]).double()
    slope = (x_t - GaussianData(SIGMA_DATA).denoiser(x_t, t)) / t[:, None, None, None]
    euler = x_t + (s - t)[:, None, None, None] * slope
    torch.testing.assert_close(PRECONDITIONING.jump(student, x_t, t, s), euler, rtol=1e-6, atol=1e-6)


def test_score_matching_of_the_exact_denoiser_is_one_at_every_level():
    data = GaussianData(SIGMA_DATA)
    for level in (0.01, 0.3, 5.0, 80.0):
        x_0 = data.draw((2000, 1, 4, 4), torch.Generator().manual_seed(0))
        sigma = torch.full((2000,), level, dtype=torch.float64)
        x = x_0 + level * randn(2000, 1, 4, 4, seed=1)
        assert dsm_loss(data.denoiser(x, sigma), x_0, sigma, SIGMA_DATA).mean().item() == pytest.approx(1, abs=0.03)
        assert dsm_loss(1.1 * data.denoiser(x, sigma) + 0.1, x_0, sigma, SIGMA_DATA).mean().item() > 1.03


def test_distances():
    a, b = randn(3, 2, 4, 4), randn(3, 2, 4, 4, seed=1)
    for i in range(3):
        squared = ((a[i] - b[i]) ** 2).sum()
        c = 0.00054 * 32**0.5
        torch.testing.assert_close(l2_distance(a, b)[i], squared / 32)
        torch.testing.assert_close(pseudo_huber_distance(a, b)[i], (squared + c**2).sqrt() - c)
    assert (pseudo_huber_distance(a, a) == 0).all()


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


def test_heun_solve_goes_from_each_samples_own_level():
    data = GaussianData(SIGMA_DATA)
    index = torch.tensor([0, 5, 9])
    x = randn(3, 1, 4, 4) * GRID[index][:, None, None, None]
    calls = []

    def denoiser(x, sigma):
        calls.append(sigma)
        return data.denoiser(x, sigma)

    exact = data.jump(x, GRID[index], GRID[index + 4])
    error = (heun_solve(denoiser, GRID, x, index, 4) - exact).abs().amax((1, 2, 3)) / exact.abs().amax((1, 2, 3))
    assert len(calls) == 8 and (error < 0.05).all()
    fine = karras_sigmas(18 * 4 - 3, dtype=torch.float64)  # holds the same levels, four times as fine
    torch.testing.assert_close(fine[index * 4], GRID[index])
    fine_error = (heun_solve(denoiser, fine, x, index * 4, 16) - exact).abs().amax((1, 2, 3)) / exact.abs().amax(
        (1, 2, 3)
    )
    assert (fine_error < error / 10).all()  # second order: a sixteenth


def test_training_jump_is_the_schedulers_step(networks):
    from diffusers_ctm import CTMScheduler

    network = copy.deepcopy(networks[0])
    scheduler = CTMScheduler(sigma_data=SIGMA_DATA)
    scheduler.set_timesteps(3, gamma=0.4)
    x = 80 * randn(5, 3, 8, 8)
    t, s = scheduler.timesteps[0], scheduler.target_timesteps[0]
    with torch.no_grad():
        output = network(scheduler.scale_model_input(x, t), t, s, class_labels=LABELS, return_dict=False)[0]
        stepped = scheduler.step(output, t, x).pred_noised_sample
        levels = (scheduler.sigmas[0].double(), scheduler.target_sigmas[0].double())
        jumped = scheduler.preconditioning.jump(network, x, *levels, class_labels=LABELS)
    torch.testing.assert_close(stepped, jumped, rtol=1e-5, atol=1e-5)
