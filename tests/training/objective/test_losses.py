import copy
import functools

import pytest
import torch

from diffusers_ctm import CTMUNet2DModel
from diffusers_ctm.preconditioning import Preconditioning
from diffusers_ctm.trajectory import heun_step, karras_sigmas
from helpers.exact import ExactNetwork, GaussianData, grid_times, randn
from training.objective.losses import (
    DISTANCES,
    adaptive_weight,
    ctm_estimate,
    ctm_loss,
    dsm_loss,
    jump_where_needed,
    l2_distance,
    make_jumps,
    pseudo_huber_distance,
    solve_paths,
)
from training.objective.solvers import dpm_solve, heun_solve, unipc_solve
from training.objective.times import TimeSampler
from training.run.averages import EMA
from training.run.learner import clip_gradient
from training.run.monitor import Means


SIGMA_DATA = 0.5
PRECONDITIONING = Preconditioning(SIGMA_DATA, 1.0)
GRID = karras_sigmas(18, dtype=torch.float64)


def inputs(batch=5, dtype=torch.float64, shape=(3, 8, 8)):
    sigma = torch.exp(randn(batch, seed=4, dtype=dtype))
    return {
        "x_0": SIGMA_DATA * randn(batch, *shape, seed=1, dtype=dtype),
        "noise": randn(batch, *shape, seed=2, dtype=dtype),
        "dsm_sigma": sigma,
        "dsm_noise": randn(batch, *shape, seed=3, dtype=dtype),
    }


def exact_solver(x, levels, steps, labels):
    return [GaussianData(SIGMA_DATA).jump(x, levels[0], level) for level in levels]


@pytest.mark.parametrize("matching", ["soft", "local", "global"])
@pytest.mark.parametrize("inner_target", ["ema", "live"])
@pytest.mark.parametrize("mode", [{}, {"continuous": True, "per_sample": True}, {"per_path": 4}])
def test_exact_jump_and_exact_solver_have_no_trajectory_loss(matching, inner_target, mode):
    network = ExactNetwork(GaussianData(SIGMA_DATA), SIGMA_DATA)
    bias = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def student(*args, offset=0.0, **kwargs):
        return (network(*args, **kwargs)[0] + bias + offset,)

    for seed in range(3):
        sampler = TimeSampler(18, matching=matching, max_steps=17, **mode)
        times = sampler.draw(16, torch.Generator().manual_seed(seed))
        values = inputs(16)
        options = {"inner_target": inner_target, "dsm_weight": 0.0, "last_weight": bias}
        loss = ctm_loss(student, network, exact_solver, PRECONDITIONING, times, **values, **options)
        assert loss.trajectory.item() < 1e-20
        off = ctm_loss(
            lambda *a, **k: student(*a, offset=0.1, **k),
            network,
            exact_solver,
            PRECONDITIONING,
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
TIMES = grid_times(GRID, [3, 14, 2, 0, 5], [6, 17, 5, 3, 8], [17, 17, 5, 9, 12])


def heun_of(network):
    """Heun's method along the score of `network`."""

    def denoiser(x, sigma, labels):
        return PRECONDITIONING.denoise(network, x, sigma, class_labels=labels)

    return functools.partial(heun_solve, denoiser)


def by_hand(network, x, levels, class_labels):
    """The Heun solution at the last of `levels`, shape (k + 1,), of one sample."""
    for t, t_next in zip(levels[:-1], levels[1:]):
        x = heun_step(
            lambda x, t: PRECONDITIONING.denoise(network, x, t.expand(1), class_labels=class_labels), x, t, t_next
        )
    return x


def plain_ctm_loss(student, ema, teacher, times, values, distance, inner, adaptive, generator=None):
    """The loss as it is written in the paper: every jump computed, every gradient by its own backward pass."""
    labels = {"class_labels": LABELS}
    of_path = torch.arange(5) // times.per_path * times.per_path  # the image that a sample's path starts from
    condition = {"class_labels": LABELS[of_path]}
    t, u, s = times.t, times.u, times.s
    end = GRID[-1].expand(5)
    jump = PRECONDITIONING.jump
    x_t, x_u = [], []
    with torch.no_grad():
        for i in range(5):
            path, image = times.path[:, i // times.per_path], of_path[i : i + 1]
            x = values["x_0"][image] + path[0] * values["noise"][image]
            for states, row in ((x_t, times.first[i]), (x_u, times.last[i])):
                states.append(by_hand(teacher, x, path[: row + 1], LABELS[image]))
    x_t, x_u = torch.cat(x_t), torch.cat(x_u)
    target = jump(ema, jump(ema if inner == "ema" else student, x_u, u, s, **condition), s, end, **condition).detach()
    estimate = jump(ema, jump(student, x_t, t, s, **condition), s, end, **condition)
    trajectory = distance(estimate, target).mean()
    sigma = values["dsm_sigma"]
    x_sigma = values["x_0"] + sigma[:, None, None, None] * values["dsm_noise"]
    denoised = PRECONDITIONING.denoise(student, x_sigma, sigma, **labels)
    weight = (sigma**2 + SIGMA_DATA**2) / (sigma * SIGMA_DATA) ** 2
    dsm = (weight * (denoised - values["x_0"]).square().mean((1, 2, 3))).mean()
    terms = [trajectory, dsm] + ([] if generator is None else [generator(estimate)])
    last = student.conv_out.weight
    lengths = [torch.autograd.grad(term, last, retain_graph=True)[0].norm() for term in terms]
    scales = [(lengths[0] / (length + 1e-4)).detach() if adaptive else 1.0 for length in lengths[1:]]
    if generator is not None:
        scales[1] = scales[1].clamp(0.01, 10)
    total = trajectory + sum(scale * term for scale, term in zip(scales, terms[1:], strict=True))
    return terms, scales, total


def adversary(images):
    """A term of the estimate with another gradient than the trajectory loss."""
    return -(3 * images[:, :, 1:, :] * images[:, :, :-1, :]).mean()


SHARED = TimeSampler(18, max_steps=6, per_path=5).draw(5, torch.Generator().manual_seed(3))
OWN_STEPS = grid_times(GRID, [3, 14, 2, 0, 5], [6, 17, 3, 4, 8], [17, 17, 3, 9, 12])


@pytest.mark.parametrize(
    "times, distance, inner, adaptive, generator",
    [
        (TIMES, "l2", "ema", True, None),
        (TIMES, "pseudo_huber", "live", True, None),
        (TIMES, "l2", "live", False, None),
        (OWN_STEPS, "l2", "ema", True, None),
        (SHARED, "l2", "ema", True, None),
        (TIMES, "pseudo_huber", "ema", True, adversary),
        (SHARED, "l2", "live", True, adversary),
    ],
)
def test_equals_the_loss_with_every_jump_computed(networks, times, distance, inner, adaptive, generator):
    student, ema, teacher = networks
    values = inputs()
    terms, scales, total = plain_ctm_loss(
        student, ema, teacher, times, values, DISTANCES[distance], inner, adaptive, generator
    )
    expected = torch.autograd.grad(total, list(student.parameters()))
    loss = ctm_loss(
        student, ema, heun_of(teacher), PRECONDITIONING, times, **values, last_weight=student.conv_out.weight, class_labels=LABELS,
        distance=DISTANCES[distance], inner_target=inner, dsm_adaptive=adaptive, generator_loss=generator,
        generator_weight=lambda *gradients: adaptive_weight(*gradients).clamp(0.01, 10),
    )  # fmt: skip
    loss.backward.backward()
    found = [loss.trajectory, loss.dsm] + ([] if generator is None else [loss.generator])
    for ours, plain in zip(found, terms, strict=True):
        torch.testing.assert_close(ours, plain.detach())
    found = [loss.dsm_weight] + ([] if generator is None else [loss.generator_weight])
    for ours, plain in zip(found, scales, strict=True):
        torch.testing.assert_close(ours, torch.as_tensor(plain, dtype=torch.float64))
    for (name, parameter), gradient in zip(student.named_parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, msg=lambda text, name=name: f"{name}: {text}")
    assert all(p.grad is None for network in (ema, teacher) for p in network.parameters())
    # The gradient comes through the outer jump: without it, it would be another one.
    assert student.target_time_embedding.linear_1.weight.grad.norm() > 0


@pytest.mark.parametrize("generator", [None, adversary])
def test_the_average_is_gone_through_backward_once_for_each_loss_on_the_estimate(networks, generator):
    student, ema, teacher = networks
    seen = {"ema": 0, "student": 0}

    def watch(name, output):
        if output.requires_grad:
            output.register_hook(lambda gradient: seen.__setitem__(name, seen[name] + 1))

    ema.conv_in.register_forward_hook(lambda module, args, output: watch("ema", output))
    student.conv_in.register_forward_hook(lambda module, args, output: watch("student", output))
    loss = ctm_loss(
        student, ema, heun_of(teacher), PRECONDITIONING, TIMES, **inputs(), last_weight=student.conv_out.weight, class_labels=LABELS,
        generator_loss=generator,
    )  # fmt: skip
    loss.backward.backward()
    assert seen == {"ema": 1 if generator is None else 2, "student": 1}


def test_estimate_of_the_discriminators_step_is_that_of_the_loss(networks):
    student, ema, teacher = networks
    values, seen = inputs(), []
    ctm_loss(
        student, ema, heun_of(teacher), PRECONDITIONING, TIMES, **values, last_weight=student.conv_out.weight, class_labels=LABELS,
        generator_loss=lambda estimate: seen.append(estimate) or estimate.mean(),
    )  # fmt: skip
    jumps = make_jumps(student, ema, PRECONDITIONING, TIMES, values["x_0"], LABELS)
    fake = ctm_estimate(jumps, values["x_0"], values["noise"])
    torch.testing.assert_close(fake, seen[0].detach())
    assert not fake.requires_grad


def test_own_average_as_solver(networks):
    """Without a teacher the path is that of the average's own score, at target = time."""
    _, ema, _ = networks
    values = inputs()

    def denoiser(x, sigma, labels):
        return PRECONDITIONING.g(ema, x, sigma, sigma, class_labels=labels)

    x_t, x_u = solve_paths(functools.partial(heun_solve, denoiser), TIMES, values["x_0"], values["noise"], LABELS)
    torch.testing.assert_close(x_t, values["x_0"] + TIMES.t[:, None, None, None] * values["noise"])
    expected = [by_hand(ema, x_t[i : i + 1], TIMES.path[:, i], LABELS[i : i + 1]) for i in range(5)]
    torch.testing.assert_close(x_u, torch.cat(expected).detach())


def test_adaptive_weight_is_that_of_the_reduced_gradients(networks):
    student, ema, _ = networks
    seen = []

    def reduce(gradient):  # as if the other processes had other gradients
        seen.append(gradient)
        return gradient * (3.0 if len(seen) == 1 else 0.5)

    arguments = (student, ema, lambda x, *_: [x, x * 0.5], PRECONDITIONING, TIMES)
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

    ctm_loss(
        student,
        ema,
        heun_of(teacher),
        PRECONDITIONING,
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
    times = grid_times(GRID, [3, 14, 2, 0, 5], [17] * 5, [17] * 5)
    loss = ctm_loss(
        student, ema, lambda x, *_: [x, x * 0.1], PRECONDITIONING, times, **inputs(), last_weight=student.conv_out.weight,
        class_labels=LABELS,
    )  # fmt: skip
    assert loss.trajectory > 0


@pytest.mark.parametrize("times", [TIMES, OWN_STEPS, SHARED], ids=["one number of steps", "its own", "shared paths"])
@pytest.mark.parametrize("solver", [heun_solve, dpm_solve, unipc_solve])
def test_a_step_does_not_wait_for_the_device(networks, times, solver):
    """On the device "meta" whoever reads a value, or a shape that depends on values, raises."""
    student, ema, teacher = (network.to("meta") for network in networks)
    values = {name: value.to("meta") for name, value in inputs().items()}
    labels, average, means = LABELS.to("meta"), EMA(student, 0.9), Means()

    def denoiser(x, sigma, labels):
        return PRECONDITIONING.denoise(teacher, x, sigma, class_labels=labels)

    loss = ctm_loss(
        student, ema, functools.partial(solver, denoiser), PRECONDITIONING, times, **values, last_weight=student.conv_out.weight,
        class_labels=labels, generator_loss=adversary,
    )  # fmt: skip
    finite = means.add({"trajectory_loss": loss.trajectory, "dsm_loss": loss.dsm})
    (loss.backward * torch.where(finite, 1.0, float("nan"))).backward()
    norm = clip_gradient(list(student.parameters()), 1.0)
    average.step(student, norm.isfinite())
    jumps = make_jumps(student, ema, PRECONDITIONING, times, values["x_0"], labels)
    assert ctm_estimate(jumps, values["x_0"], values["noise"]).device.type == "meta"


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
