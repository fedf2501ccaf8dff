# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""The mathematics, against identities, closed-form solutions, diffusers and the authors' numbers."""

import math

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    DDIMScheduler,
    DDPMScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    ScoreSdeVeScheduler,
)

from diffusers_ctm.preconditioning import (
    PREDICTIONS,
    DiscretePrediction,
    Preconditioning,
    discrete_levels,
    edm_loss_weight,
)
from diffusers_ctm.trajectory import (
    append_dims,
    gamma_of_split,
    gamma_split,
    heun_step,
    jump,
    karras_ramp,
    karras_sigma,
    karras_sigmas,
    karras_starts,
)
from helpers.comparing import close_in_float64 as close
from helpers.exact import (
    ExactDenoiserNetwork,
    ExactNetwork,
    GaussianData,
    GaussianMixture,
    ParametrizedCTM,
    ParametrizedNetwork,
    PixelMixture,
    g_of_jump,
    randn,
)


LEVELS = torch.tensor([0.002, 0.03, 0.5, 2.5, 80.0], dtype=torch.float64)
GAMMAS = [0.0, 1e-3, 0.2, 0.5, 0.9, 1.0]


# The jump -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_jump_ends(dtype):
    x, g, t = randn(5, 3, 4, 4, dtype=dtype), randn(5, 3, 4, 4, seed=1, dtype=dtype), LEVELS.to(dtype)
    assert torch.equal(jump(x, g, t, t), x)  # G(x, t, t) = x
    assert torch.equal(jump(x, g, t, torch.zeros_like(t)), g)  # G(x, t, 0) = g


def test_jump_is_straight_in_s():
    # (G - x) / (s - t) = (x - g) / t: the mean slope of the jump is the slope of the ODE with g for D
    x, g, t, s = randn(5, 7), randn(5, 7, seed=1), LEVELS, 0.37 * LEVELS
    close((jump(x, g, t, s) - x) / append_dims(s - t, 2), (x - g) / append_dims(t, 2))


@pytest.mark.parametrize("data", [GaussianData(0.7, mean=0.2), PixelMixture()], ids=["gaussian", "mixture"])
def test_semigroup_of_the_exact_flow(data):
    # t -> u -> s is t -> s, with g taken from the exact jump and brought back by `jump`
    t, u, s = torch.tensor([5.0, 2.0]).double(), torch.tensor([1.1, 0.9]).double(), torch.tensor([0.3, 0.002]).double()
    x_t = append_dims(t, 2) * randn(2, 16)
    x_u = jump(x_t, data.g(x_t, t, u), t, u)
    x_s = jump(x_u, data.g(x_u, u, s), u, s)
    close(x_s, data.jump(x_t, t, s), rtol=1e-9, atol=1e-9)
    close(x_s, jump(x_t, data.g(x_t, t, s), t, s), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("data", [GaussianData(0.7, mean=0.2), PixelMixture()], ids=["gaussian", "mixture"])
def test_g_of_the_exact_flow(data):
    t, s = torch.tensor(2.0).double(), torch.tensor(0.3).double()
    x = 2 * randn(2, 8)
    close(g_of_jump(x, data.jump(x, t, s), t, s), data.g(x, t, s), rtol=1e-9, atol=1e-9)
    close(data.g(x, t, t * 0), data.jump(x, t, t * 0), rtol=1e-9, atol=1e-9)
    # s -> t is the denoiser: the jump to t - h is an Euler step up to h^2
    for h in (1e-3, 1e-4):
        error = (g_of_jump(x, data.jump(x, t, t - h), t, t - h) - data.denoiser(x, t)).abs().max()
        assert error < 0.5 * h


@pytest.mark.parametrize("data", [GaussianData(0.7), PixelMixture()], ids=["gaussian", "mixture"])
def test_g_is_a_mean_of_denoisers(data):
    # g(x_t, t, s) = x_t + t / (t - s) int_t^s (x_u - D(x_u, u)) / u du (CTM, Eq. 4), by Gauss-Legendre
    t, s, x = 2.0, 0.4, 2 * randn(2, 8)
    nodes, weights = (torch.from_numpy(v) for v in np.polynomial.legendre.leggauss(60))
    integral = torch.zeros_like(x)
    for node, weight in zip(nodes, weights, strict=True):
        u = (t + s) / 2 + (s - t) / 2 * node
        x_u = data.jump(x, t, u)
        integral += weight * (s - t) / 2 * (x_u - data.denoiser(x_u, u)) / u
    t, s = torch.tensor(t).double(), torch.tensor(s).double()
    close(g_of_jump(x, data.jump(x, t, s), t, s), x + t / (t - s) * integral, rtol=1e-8, atol=1e-8)


# gamma ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("sigma_min", [0.002, 0.1])
def test_gamma_split_keeps_the_level(gamma, sigma_min):
    t_next = torch.tensor([sigma_min, 2 * sigma_min, 1.0, 80.0], dtype=torch.float64)
    s, std = gamma_split(t_next, gamma, sigma_min)
    close((s**2 + std**2).sqrt(), t_next)
    assert (s >= sigma_min).all() and (s <= t_next).all()
    close(s, [math.sqrt(1 - gamma**2) * (t - sigma_min) + sigma_min for t in t_next.tolist()])  # the authors' sampler
    assert s[0] == sigma_min and std[0] == 0  # no noise where sampling ends, whatever gamma


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gamma_ends_to_the_last_digit(dtype):
    t_next = torch.cat([LEVELS, karras_sigmas(200, dtype=torch.float64)]).to(dtype)
    s, std = gamma_split(t_next, 0.0, 0.002)
    assert torch.equal(s, t_next) and torch.equal(std, torch.zeros_like(t_next))
    s, std = gamma_split(t_next, 1.0, 0.002)
    assert torch.equal(s, torch.full_like(t_next, 0.002))
    # float32 does not hold 0.002, so its lowest level is a little off
    tolerance = {"rtol": 1e-6, "atol": 1e-6} if dtype == torch.float32 else {}
    close(std, (t_next.double() ** 2 - 0.002**2).clamp(min=0).sqrt(), **tolerance)
    assert s.dtype == std.dtype == dtype


def test_gamma_is_monotone_and_may_differ_by_step():
    gammas = torch.tensor(GAMMAS, dtype=torch.float64)
    s, std = gamma_split(torch.full_like(gammas, 3.0), gammas, 0.002)
    assert (s.diff() < 0).all() and (std.diff() > 0).all()
    for gamma, one_s, one_std in zip(GAMMAS, s, std, strict=True):
        for actual, expected in zip(
            (one_s, one_std), gamma_split(torch.tensor(3.0).double(), gamma, 0.002), strict=True
        ):
            close(actual, expected)


def test_gamma_of_a_split_is_its_gamma():
    t_next = torch.tensor([0.002, 0.01, 1.0, 80.0], dtype=torch.float64)
    for gamma in GAMMAS:
        s, _ = gamma_split(t_next, gamma, 0.002)
        close(
            gamma_of_split(t_next, s, 0.002), [0.0, gamma, gamma, gamma], atol=1e-7
        )  # of the first, every gamma is one
    close(gamma_of_split(torch.tensor(10.002), torch.tensor(6.002), 0.002), 0.8, rtol=1e-6)


@pytest.mark.parametrize("num_steps", [1, 2, 5])
def test_where_steps_start(num_steps):
    for end in (0.002, 0.3):
        levels = karras_sigmas(num_steps + 1, end, 20.0, 3.0, dtype=torch.float64)
        assert torch.equal(karras_starts(num_steps, end, 0.002, 20.0, 3.0), levels[:-1])
    # Karras et al.'s Algorithm 1 ends at 0 after sigma_min
    starts = karras_starts(num_steps, 0.0, 0.002, 20.0, 3.0)
    assert torch.equal(starts, karras_sigmas(num_steps, 0.002, 20.0, 3.0, dtype=torch.float64))
    assert starts[0] == 20 and (num_steps == 1 or starts[-1] == 0.002)


@pytest.mark.parametrize("gamma", GAMMAS)
def test_paper_is_the_limit_of_small_sigma_min(gamma):
    # Algorithm 3 of the paper: s = sqrt(1 - gamma^2) t, noise gamma t
    t_next = torch.tensor([0.5, 80.0], dtype=torch.float64)
    s, std = gamma_split(t_next, gamma, 1e-12)
    close(s, math.sqrt(1 - gamma**2) * t_next, atol=1e-11)
    close(std, gamma * t_next, rtol=1e-8, atol=1e-11)


# Noise levels ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma_min, sigma_max, rho", [(0.002, 80.0, 7.0), (0.02, 10.0, 3.0), (0.1, 5.0, 1.0)])
@pytest.mark.parametrize("count", [2, 5, 18, 40])
def test_karras_equals_diffusers(sigma_min, sigma_max, rho, count):
    config = {"sigma_min": sigma_min, "sigma_max": sigma_max, "rho": rho}
    ramp = torch.linspace(0, 1, count, dtype=torch.float64)
    ours = karras_sigmas(count, **config, dtype=torch.float64)
    close(ours, EDMEulerScheduler(**config)._compute_karras_sigmas(ramp))
    close(ours, CMStochasticIterativeScheduler(**config)._convert_to_karras(ramp.numpy()))
    close(ours, karras_sigma(ramp, **config))
    close(ramp, [karras_ramp(level, **config) for level in ours.tolist()])
    assert ours[0] == sigma_max and ours[-1] == sigma_min  # exactly
    assert (ours.diff() < 0).all()


def test_karras_numbers(oracle):
    arrays = oracle("samplers_cifar_some.npz")
    for count in (1, 2, 3, 4, 5, 6, 8, 9, 18, 19, 40, 41):
        # the authors compute in float32 and append a 0
        close(karras_sigmas(count), arrays[f"sigmas_karras_{count}"][:-1], rtol=3e-6, atol=0)
    for count in (18, 40):
        close(karras_sigmas(count), arrays[f"train_get_t_{count}"], rtol=3e-6, atol=0)


@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_c_noise_equals_diffusers_and_inverts(scale):
    preconditioning = Preconditioning(timestep_scale=scale)
    timestep = preconditioning.c_noise(LEVELS)
    if scale == 1.0:
        close(timestep, EDMEulerScheduler().precondition_noise(LEVELS))
    else:
        close(timestep, CMStochasticIterativeScheduler().sigma_to_t(LEVELS.numpy()))
    close(preconditioning.sigma_of_c_noise(timestep), LEVELS)
    assert (timestep.diff() > 0).all()
    assert preconditioning.c_noise(1.0) == 0 and preconditioning.c_noise(0.0) == -torch.inf
    assert preconditioning.c_noise(LEVELS.float()).dtype == torch.float32


# Preconditioning ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma_data", [0.3, 0.5, 1.4])
def test_scalings_give_unit_variance(sigma_data):
    c_skip, c_out, c_in = Preconditioning(sigma_data).scalings(LEVELS)
    total = sigma_data**2 + LEVELS**2
    close(c_in**2 * total, torch.ones(5))  # of the input of F
    # of its target (x_0 - c_skip x) / c_out with x = x_0 + t n: coefficient 1 - c_skip of x_0, -c_skip t of n
    close(((1 - c_skip) ** 2 * sigma_data**2 + (c_skip * LEVELS) ** 2) / c_out**2, torch.ones(5))
    # and no linear function of x predicts that target, or F would have work left that c_skip could do
    close(((1 - c_skip) * sigma_data**2 - c_skip * LEVELS**2) / total, torch.zeros(5))
    close(torch.stack(Preconditioning(sigma_data).scalings(torch.zeros(()).double())), [1.0, 0.0, 1 / sigma_data])


def test_scalings_equal_diffusers():
    scheduler, x, model_output = EDMEulerScheduler(sigma_data=0.7), randn(5), randn(5, seed=1)
    c_skip, c_out, c_in = Preconditioning(0.7).scalings(LEVELS)
    close(c_in * x, scheduler.precondition_inputs(x, LEVELS))
    close(c_skip * x + c_out * model_output, scheduler.precondition_outputs(x, model_output, LEVELS))


@pytest.mark.parametrize("sigma_data", [0.3, 0.5, 1.4])
def test_loss_weight_makes_the_loss_of_F_uniform(sigma_data):
    _, c_out, _ = Preconditioning(sigma_data).scalings(LEVELS)
    close(edm_loss_weight(LEVELS, sigma_data), 1 / c_out**2)
    # for Gaussian data the best denoiser leaves the variance sd^2 t^2 / (sd^2 + t^2): weighted, 1 at every level
    residual = sigma_data**2 * LEVELS**2 / (sigma_data**2 + LEVELS**2)
    close(edm_loss_weight(LEVELS, sigma_data) * residual, torch.ones(5))


@pytest.mark.parametrize("scale", [1.0, 1000.0])
@pytest.mark.parametrize("data", [GaussianData(0.9, mean=0.3), PixelMixture()], ids=["gaussian", "mixture"])
def test_preconditioning_recovers_the_exact_solution(data, scale):
    preconditioning = Preconditioning(sigma_data=0.6, timestep_scale=scale)
    network = ExactNetwork(data, sigma_data=0.6, timestep_scale=scale)
    t, s = torch.tensor([5.0, 0.7, 80.0]).double(), torch.tensor([1.0, 0.002, 79.0]).double()
    x = append_dims(t, 4) * randn(3, 1, 2, 2)
    tolerance = {"rtol": 1e-7, "atol": 1e-7}
    close(preconditioning.g(network, x, t, s), data.g(x, t, s), **tolerance)
    close(preconditioning.jump(network, x, t, s), data.jump(x, t, s), **tolerance)
    close(preconditioning.denoise(network, x, t), data.denoiser(x, t), **tolerance)
    close(preconditioning.g(network, x, t, t), data.denoiser(x, t), **tolerance)  # g(x, t, t) = D


def test_preconditioning_hands_over_conditions_and_times():
    network = ExactDenoiserNetwork(GaussianData(0.5), class_shift=[0.0, 3.0])
    x, t = randn(2, 1, 2, 2), torch.tensor(1.5).double()
    # the network has one time and asserts that it is shown one
    denoised = Preconditioning().denoise(network, x, t, class_labels=torch.tensor([0, 1]))
    close(denoised[0], GaussianData(0.5).denoiser(x[0], t))
    close(denoised[1], GaussianData(0.5, mean=3.0).denoiser(x[1], t))
    config = {"sigma_data": 0.7, "timestep_scale": 1000.0, "prediction_type": "edm", "rho": 7.0}
    assert Preconditioning.from_config(config) == Preconditioning(0.7, 1000.0, "edm")


@pytest.mark.parametrize("sigma_data", [0.5, 0.8])
def test_a_network_that_says_zero_is_an_exact_teacher(exact_teacher, sigma_data):
    x, t = 4 * randn(2, 3, 8, 8, dtype=torch.float32), torch.tensor([4.0, 0.1])
    denoised = Preconditioning(sigma_data, 1000.0).denoise(exact_teacher(), x, t)
    close(denoised, GaussianData(sigma_data).denoiser(x, t), rtol=1e-6)


# Heun -----------------------------------------------------------------------------------------------------------------


def measured_order(data, step, counts=(16, 32, 64, 128)) -> list[float]:
    """log2 of the error's decrease each time the number of steps from t = 5 to 0.05 doubles."""
    x, errors = 5 * randn(1, 32), []
    for count in counts:
        levels = torch.logspace(math.log10(5), math.log10(0.05), count + 1, dtype=torch.float64)
        state = x
        for t, t_next in zip(levels[:-1], levels[1:], strict=True):
            state = step(state, t, t_next)
        errors.append((state - data.jump(x, 5.0, 0.05)).abs().mean().item())
    return [math.log2(a / b) for a, b in zip(errors[:-1], errors[1:], strict=True)]


@pytest.mark.parametrize(
    "data", [GaussianData(0.5, mean=0.1), PixelMixture(stds=(0.3, 0.4))], ids=["gaussian", "mixture"]
)
def test_heun_has_order_2_and_the_denoiser_jump_order_1(data):
    heun = measured_order(data, lambda x, t, u: heun_step(data.denoiser, x, t, u))
    assert abs(heun[-1] - 2) < 0.1, heun
    euler = measured_order(data, lambda x, t, u: jump(x, data.denoiser(x, t), t, u))
    assert abs(euler[-1] - 1) < 0.1, euler


def test_heun_goes_up_as_well_as_down():
    data, x = GaussianData(0.5), randn(1, 8)
    for start, end in ((1.0, 1.01), (1.01, 1.0)):
        start, end = torch.tensor(start).double(), torch.tensor(end).double()
        close(heun_step(data.denoiser, x, start, end), data.jump(x, start, end), rtol=1e-6)  # local error h^3


# Shapes and dtypes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5,), (5, 2), (5, 3, 4, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_levels_of_a_batch_act_on_each_sample_alone(shape, dtype):
    data = GaussianData(0.5)
    x, g, t = randn(*shape, dtype=dtype), randn(*shape, seed=1, dtype=dtype), LEVELS.to(dtype)
    s = t / 3
    functions = {
        "jump": lambda x, g, t, s: jump(x, g, t, s),
        "heun": lambda x, g, t, s: heun_step(data.denoiser, x, t, s),
        "g": lambda x, g, t, s: Preconditioning().g(lambda sample, *times, **_: (sample.sin(),), x, t, s),
    }
    for name, function in functions.items():
        together = function(x, g, t, s)
        assert together.shape == x.shape and together.dtype == dtype, name
        for i in range(5):
            close(
                function(x[i : i + 1], g[i : i + 1], t[i], s[i])[0],
                together[i],
                rtol=2e-5 if dtype == torch.float32 else 1e-12,
            )


# The toy of the authors' folder: five correlated normals in the plane, flow solved to 3e-10 ---------------------------


@pytest.fixture
def toy(oracle):
    arrays = oracle("toy_gmm.npz")
    arrays = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    return arrays, GaussianMixture(arrays["weights"], arrays["means"], arrays["covs"])


def test_toy_denoiser(toy):
    arrays, data = toy
    close(data.denoiser(arrays["tab_x"], arrays["tab_t"]), arrays["tab_D"], atol=1e-9)
    close(data.denoiser(arrays["xT"], 80.0), arrays["xT_D"], atol=1e-9)


def test_toy_jump(toy):
    arrays, _ = toy
    for i in range(6):
        t, x = arrays[f"mid{i}_t"], arrays[f"mid{i}_x"]
        for s, g, x_s in zip(arrays[f"mid{i}_s"], arrays[f"mid{i}_g"], arrays[f"mid{i}_G"], strict=True):
            close(jump(x, g, t, s), x_s, atol=1e-10)
            # 3e-10 of G are amplified by t / (t - s)
            close(g_of_jump(x, x_s, t, s), g, rtol=0, atol=1e-9 * float(t / (t - s)))


def test_toy_flow_by_heun(toy):
    arrays, data = toy
    errors = []
    for refine in (16, 32):
        ramp = torch.linspace(0, 1, 17 * refine + 1, dtype=torch.float64)
        levels = karras_sigma(ramp)
        x, error = arrays["xT"], 0.0
        for i, (t, t_next) in enumerate(zip(levels[:-1], levels[1:], strict=True)):
            x = heun_step(data.denoiser, x, t, t_next)
            if (i + 1) % refine == 0:  # at a level of the 18-grid
                error = max(error, (x - arrays["xT_G"][i // refine]).abs().mean().item())
        errors.append(error)
    assert errors[-1] < 1e-4 and 1.8 < math.log2(errors[0] / errors[1]) < 2.2, errors


# Other parametrizations -----------------------------------------------------------------------------------------------

PROCESSES = {
    "linear": {"beta_schedule": "linear"},
    "scaled": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "trained": {"trained_betas": tuple(0.01 + 0.002 * k for k in range(50))},
    "zero snr": {"beta_schedule": "scaled_linear", "rescale_betas_zero_snr": True},
}


def theirs(process, scheduler_class=DDPMScheduler, **options):
    """diffusers' scheduler of a process, 1,000 timesteps unless its betas are listed."""
    betas = process.get("trained_betas")
    listed = {} if betas is None else {"trained_betas": list(betas), "num_train_timesteps": len(betas)}
    return scheduler_class(clip_sample=False, **{**process, **listed}, **options)


def ours(kind, process=None, **options):
    betas = (process or {}).get("trained_betas")
    steps = {} if betas is None else {"num_diffusion_timesteps": len(betas)}
    return Preconditioning(prediction_type=kind, **(process or {}), **steps, **options)


DISCRETE = [(kind, name) for kind in ("epsilon", "v_prediction", "sample") for name in PROCESSES]
CASES = [*DISCRETE, ("flow_prediction", None), ("score", None)]


def exact_network(kind, name, data, network_class=ParametrizedNetwork):
    abar = None if name is None else theirs(PROCESSES[name]).alphas_cumprod
    return network_class(kind, data, abar)


@pytest.mark.parametrize("data", [GaussianData(0.5), PixelMixture()], ids=["gaussian", "mixture"])
@pytest.mark.parametrize("kind, name", CASES)
def test_every_parametrization_recovers_the_exact_solution(kind, name, data):
    """On the levels of whole timesteps, between them, and from any level to any lower one."""
    preconditioning = ours(kind, PROCESSES.get(name))
    low, high = (0.02, 80.0) if name is None else preconditioning.level_range
    t = torch.exp(torch.linspace(math.log(low), math.log(min(high, 200.0)), 41, dtype=torch.float64))
    if name is not None:
        levels = theirs(PROCESSES[name]).alphas_cumprod.double()
        t = torch.cat([t, ((1 - levels) / levels).sqrt()[[0, 1, 20, 40]]])
    x = t[:, None] * randn(len(t), 6)
    tolerance = {"rtol": 2e-6, "atol": 2e-6}
    network = exact_network(kind, name, data)
    close(preconditioning.denoise(network, x, t), data.denoiser(x, t), **tolerance)
    s = 0.7 * t + 0.3 * low
    network = exact_network(kind, name, data, ParametrizedCTM)
    close(preconditioning.jump(network, x, t, s), data.jump(x, t, s), **tolerance)
    close(preconditioning.g(network, x, t, t), data.denoiser(x, t), **tolerance)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("name", PROCESSES)
def test_discrete_parametrizations_equal_diffusers(kind, name):
    """Clean sample and DDIM's step of diffusers at whole timesteps, in its own state x / sqrt(1 + sigma^2)."""
    process = PROCESSES[name]
    ddim = theirs(process, DDIMScheduler, prediction_type=kind, set_alpha_to_one=False)
    preconditioning = ours(kind, process)
    steps = len(ddim.alphas_cumprod)
    ddim.set_timesteps(10)
    x_vp, output = randn(4, 3), randn(4, 3, seed=1)
    last = steps - 2 if process.get("rescale_betas_zero_snr") else steps - 1
    for timestep in [t for t in ddim.timesteps.tolist() if 0 < t <= last]:
        level = preconditioning.sigma_of_c_noise(torch.tensor(float(timestep)).double())
        assert preconditioning.c_noise(level).item() == pytest.approx(timestep, abs=1e-6)
        x = x_vp * (1 + level**2).sqrt()
        close(preconditioning.network_input(x, level), x_vp, rtol=1e-9, atol=1e-9)
        clean = preconditioning.g_of_output(output, x, level)
        expected = ddim.step(output, timestep, x_vp)
        scale = 1e-6 * (1 + level.item())
        close(clean, expected.pred_original_sample, rtol=1e-5, atol=scale)
        ddpm = theirs(process, DDPMScheduler, prediction_type=kind).step(output, timestep, x_vp)
        close(clean, ddpm.pred_original_sample, rtol=1e-5, atol=scale)
        before = timestep - steps // 10
        if before >= 0:  # DDIM's step is our jump with the denoiser
            lower = preconditioning.sigma_of_c_noise(torch.tensor(float(before)).double())
            close(jump(x, clean, level, lower), expected.prev_sample * (1 + lower**2).sqrt(), rtol=1e-5, atol=scale)


@pytest.mark.parametrize("name", PROCESSES)
def test_levels_of_diffusers_timesteps(name):
    process = PROCESSES[name]
    abar = theirs(process).alphas_cumprod.double()
    levels = ((1 - abar) / abar).sqrt()
    finite = levels[:-1] if process.get("rescale_betas_zero_snr") else levels
    assert levels[len(finite) :].isinf().all()  # pure noise has no level
    preconditioning = ours("epsilon", process)
    low, high = preconditioning.level_range
    assert (low, high) == (pytest.approx(finite[0].item(), rel=1e-12), pytest.approx(finite[-1].item(), rel=1e-12))
    whole = torch.arange(len(finite), dtype=torch.float64)
    close(preconditioning.c_noise(finite), whole, rtol=0, atol=1e-7)
    close(preconditioning.sigma_of_c_noise(whole), finite)
    between = whole[:-1] + 0.5  # the geometric mean of two levels
    close(preconditioning.sigma_of_c_noise(between), (finite[1:] * finite[:-1]).sqrt())
    close(preconditioning.c_noise((finite[1:] * finite[:-1]).sqrt()), between, rtol=0, atol=1e-7)
    ends = torch.tensor([low / 7, high * 7], dtype=torch.float64)  # beyond, the network is shown what it knows
    close(preconditioning.c_noise(ends), [0.0, len(finite) - 1])
    close(preconditioning.sigma_of_c_noise(torch.tensor([-3.0, len(finite) + 3.0], dtype=torch.float64)), [low, high])
    assert preconditioning.c_noise(finite.float()).dtype == torch.float32
    assert (preconditioning.c_noise(finite.float()) - whole).abs().max() < 0.01  # float32, as training has it


@pytest.mark.parametrize("kind", ["edm", "flow_prediction", "score", "consistency"])
def test_levels_of_continuous_times(kind):
    preconditioning = Preconditioning(prediction_type=kind, timestep_scale=1000.0)
    shown = preconditioning.c_noise(LEVELS)
    expected = {"flow_prediction": 1000 * LEVELS / (1 + LEVELS), "score": LEVELS / 2}.get(kind, 250 * LEVELS.log())
    close(shown, expected)
    close(preconditioning.sigma_of_c_noise(shown), LEVELS)
    assert preconditioning.level_range == (0.0, math.inf)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_matching_equals_diffusers(shift):
    """diffusers' Euler step along the flow is our jump with the denoiser, and its times are ours whatever the shift."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(8)
    preconditioning = Preconditioning(prediction_type="flow_prediction")
    x_tau, output = randn(4, 3), randn(4, 3, seed=1)
    for i, timestep in enumerate(scheduler.timesteps[1:-1], start=1):  # the first has no finite level
        tau, tau_next = scheduler.sigmas[i].double(), scheduler.sigmas[i + 1].double()
        t, s = tau / (1 - tau), tau_next / (1 - tau_next)
        close(preconditioning.c_noise(t), timestep.double(), rtol=1e-6)
        x = x_tau / (1 - tau)
        close(preconditioning.network_input(x, t), x_tau)
        clean = preconditioning.g_of_output(output, x, t)
        close(clean, x_tau - tau * output)
        scheduler._step_index = i
        euler = scheduler.step(output, timestep, x_tau).prev_sample
        close(jump(x, clean, t, s) * (1 - tau_next), euler, rtol=1e-6, atol=1e-6)


def test_scores_equal_diffusers():
    """Half of diffusers' reverse drift (its step adds noise too) is our ODE, for images in [0, 1] and in [-1, 1]."""
    scheduler = ScoreSdeVeScheduler(num_train_timesteps=50)
    preconditioning = Preconditioning(prediction_type="score")
    x01, score = randn(4, 3), randn(4, 3, seed=1)
    for index in (49, 30, 1):
        time = torch.tensor(index / 49 + 1e-6).double()
        moved = scheduler.step_pred(score, time, x01).prev_sample_mean - x01
        sigma01, below = scheduler.discrete_sigmas[index].double(), scheduler.discrete_sigmas[index - 1].double()
        level, x = 2 * sigma01, 2 * x01 - 1
        close(preconditioning.c_noise(level), sigma01)
        close(preconditioning.network_input(x, level), x01)
        slope = (x - preconditioning.g_of_output(score, x, level)) / level  # dx / dsigma
        # d(sigma01^2) = 2 sigma01 dsigma01, and dx / dsigma is the same in both ranges
        close(
            -slope * (sigma01**2 - below**2) / (2 * sigma01), moved / 2, rtol=1e-5, atol=1e-6 * moved.abs().max().item()
        )


@pytest.mark.parametrize("sigma_min", [0.002, 0.1])
def test_consistency_models_equal_diffusers(sigma_min):
    """The jump to sigma_min is f of diffusers' scheduler at every level; at s = sigma_min only is g known."""
    scheduler = CMStochasticIterativeScheduler(sigma_min=sigma_min, sigma_data=0.7, clip_denoised=False)
    preconditioning = Preconditioning(0.7, 1000.0, "consistency", sigma_min)
    x, output, end = randn(4, 3), randn(4, 3, seed=1), torch.tensor(sigma_min, dtype=torch.float64)
    for t in torch.tensor([1.001 * sigma_min, 0.3, 2.0, 80.0], dtype=torch.float64):
        c_skip, c_out = scheduler.get_scalings_for_boundary_condition(t)
        f = jump(x, preconditioning.g_of_output(output, x, t), t, end)
        close(f, c_skip * x + c_out * output)
        close(preconditioning.c_noise(t), scheduler.sigma_to_t(t.item()))
        close(preconditioning.network_input(x, t), x / (t**2 + 0.7**2).sqrt())
    # exact end points are an exact CTM there, and in the limit it is EDM's form
    data, t = PixelMixture(), torch.tensor([0.5, 3.0, 80.0]).double()
    x = t[:, None] * randn(3, 5)
    network = ParametrizedNetwork("consistency", data, sigma_data=0.7, sigma_min=sigma_min)
    g = preconditioning.g(network, x, t)
    close(jump(x, g, t, end.expand(3)), data.jump(x, t, sigma_min), rtol=1e-6, atol=1e-6)
    assert (g - data.denoiser(x, t)).abs().max() > 0.1  # and no denoiser
    limit = Preconditioning(0.7, prediction_type="consistency", sigma_min=1e-9).scalings(LEVELS)
    close(torch.stack(limit), torch.stack(Preconditioning(0.7).scalings(LEVELS)), rtol=1e-5)


def test_facts_of_the_kinds():
    """Programs ask for these instead of comparing names; a new kind must say them too."""
    facts = {name: (k.is_denoiser, k.learned_every_level, k.magnifies_rounding) for name, k in PREDICTIONS.items()}
    assert [name for name, (is_denoiser, *_) in facts.items() if not is_denoiser] == ["consistency"]
    assert [name for name, (_, learned_every_level, _) in facts.items() if learned_every_level] == ["edm"]
    assert [name for name, (*_, magnifies_rounding) in facts.items() if magnifies_rounding] == ["epsilon", "score"]
    for name, kind in PREDICTIONS.items():
        assert hasattr(diffusers, kind.default_scheduler) and kind.name == name
        assert (kind.default_scheduler == "DDPMScheduler") == isinstance(kind, DiscretePrediction)


def test_discrete_parametrizations_need_their_betas():
    with pytest.raises(ValueError, match="prediction_type='epsilon' needs the levels.*beta_schedule"):
        Preconditioning(prediction_type="epsilon")
    with pytest.raises(ValueError, match="beta_schedule='steps' is not known; use 'linear'"):
        discrete_levels(beta_schedule="steps")
    with pytest.raises(ValueError, match="rise with the timestep"):
        discrete_levels(trained_betas=(0.1, 0.0, 0.1), num_diffusion_timesteps=3)


def test_loss_weights_are_the_plain_losses_of_each_family():
    """weight |D - x_0|^2 = |F - target|^2 for the F that a family regresses on; a score's times its variance."""
    x_0, noise, sigma = randn(5, 3), randn(5, 3, seed=1), LEVELS[:, None]
    x, output = x_0 + sigma * noise, randn(5, 3, seed=2)
    alpha = 1 / (1 + sigma**2).sqrt()
    targets = {
        "epsilon": (noise, 1.0),
        "v_prediction": (alpha * noise - (1 - alpha**2).sqrt() * x_0, 1.0),
        "sample": (x_0, 1.0),
        "flow_prediction": (noise - x_0, 1.0),
        "score": (-noise / (sigma / 2), (sigma / 2) ** 2),
    }
    for kind, (target, weight) in targets.items():
        preconditioning = ours(kind, PROCESSES["linear"])
        denoised = preconditioning.g_of_output(output, x, LEVELS)
        loss = preconditioning.loss_weight(LEVELS)[:, None] * (denoised - x_0).square()
        close(loss, weight * (output - target).square(), rtol=1e-6, atol=1e-9)
    for kind in ("edm", "consistency"):
        weights = Preconditioning(0.7, prediction_type=kind).loss_weight(LEVELS)
        assert torch.equal(weights, edm_loss_weight(LEVELS, 0.7))


def test_levels_asked_in_inference_mode_serve_training():
    process = {"beta_schedule": "linear", "beta_end": 0.0123}  # asked by no other test
    with torch.inference_mode():
        ours("epsilon", process).c_noise(torch.tensor([1.0]))
    level = torch.tensor([1.0, 2.0], requires_grad=True)
    ours("epsilon", process).c_noise(level).sum().backward()
    assert (level.grad > 0).all()


def test_numbers_that_a_parametrization_does_not_use_make_no_difference():
    config = {"sigma_data": 0.5, "timestep_scale": 1.0, "sigma_min": 0.01, "beta_schedule": "linear", "beta_end": 0.02}
    config |= {"trained_betas": None, "num_diffusion_timesteps": 1000}
    for kind, changed, same in (
        ("edm", {"sigma_min": 0.1, "beta_end": 0.5}, True),
        ("edm", {"timestep_scale": 2.0}, False),
        ("epsilon", {"sigma_min": 0.1}, True),
        ("epsilon", {"beta_end": 0.5}, False),
        ("epsilon", {"trained_betas": [0.1, 0.2]}, False),
        ("flow_prediction", {"beta_end": 0.5}, True),
        ("flow_prediction", {"num_diffusion_timesteps": 1}, False),
        ("consistency", {"sigma_min": 0.1}, False),
    ):
        one, other = ({**config, "prediction_type": kind, **more} for more in ({}, changed))
        assert (Preconditioning.from_config(one) == Preconditioning.from_config(other)) == same, (kind, changed)
