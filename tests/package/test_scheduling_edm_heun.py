# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""EDMHeunScheduler on exact solutions and against the algorithms written out. What diffusers expects of any scheduler
is in test_scheduling_ctm.py, for both."""

import math

import pytest
import torch

from diffusers_ctm import EDMHeunScheduler
from diffusers_ctm.preconditioning import Preconditioning
from diffusers_ctm.trajectory import heun_step, jump, karras_sigmas
from helpers.comparing import close_in_float64 as close
from helpers.comparing import seeded
from helpers.exact import (
    ExactDenoiserNetwork,
    ExactNetwork,
    GaussianData,
    GaussianMixture,
    PixelMixture,
    randn,
    sampling_loop,
)


def untimed(sample, *times, **_):
    return (torch.sin(3 * sample),)


# Algorithm 1 ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data", [GaussianData(0.5, mean=0.1), PixelMixture(stds=(0.3, 0.4))], ids=["gaussian", "mixture"]
)
@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_order_2_on_the_exact_flow(data, scale):
    x_T, errors = 80 * randn(1, 64), []
    for steps in (16, 32, 64):
        scheduler = EDMHeunScheduler(sigma_data=0.6, timestep_scale=scale)
        scheduler.set_timesteps(steps)
        states = []
        network = ExactDenoiserNetwork(data, sigma_data=0.6, timestep_scale=scale)
        sampling_loop(scheduler, network, x_T, callback=lambda output, states=states: states.append(output.prev_sample))
        assert len(network.calls) == len(scheduler.timesteps) == 2 * steps - 1
        errors.append((states[-2] - data.jump(x_T, 80.0, 0.002)).abs().mean().item())  # before the Euler step to 0
    orders = [math.log2(a / b) for a, b in zip(errors[:-1], errors[1:], strict=True)]
    assert abs(orders[-1] - 2) < 0.15, (errors, orders)


def test_last_step_is_the_denoiser():
    data, x_T = GaussianData(0.5, mean=0.1), 80 * randn(1, 64)
    scheduler, states = EDMHeunScheduler(), []
    scheduler.set_timesteps(5)
    assert scheduler.sigmas[-1] == 0
    image = sampling_loop(scheduler, ExactDenoiserNetwork(data), x_T, callback=states.append)
    close(image, data.denoiser(states[-2].prev_sample, scheduler.sigmas[-2].double()), rtol=1e-5, atol=1e-6)
    close(states[-1].pred_original_sample, image)
    scheduler.set_timesteps(1)  # one step: D(x_T)
    close(sampling_loop(scheduler, ExactDenoiserNetwork(data), x_T), data.denoiser(x_T, 80.0), atol=1e-6)


@pytest.mark.parametrize("sigmas", [None, [60.0, 3.0, 0.4]])
def test_equals_the_function_that_training_calls(sigmas):
    scheduler = EDMHeunScheduler(sigma_data=0.7)
    scheduler.set_timesteps(6 if sigmas is None else None, sigmas=sigmas)
    x = randn(2, 3, 4, 4) * scheduler.init_noise_sigma
    image = sampling_loop(scheduler, untimed, x)

    def denoiser(x, t):
        return Preconditioning(0.7).denoise(untimed, x, t)

    levels = scheduler.sigmas.double()
    for t, t_next in zip(levels[:-2], levels[1:-1], strict=True):
        x = heun_step(denoiser, x, t, t_next)
    close(image, jump(x, denoiser(x, levels[-2]), levels[-2], levels[-1]), rtol=1e-9, atol=1e-9)


def test_levels_of_the_calls():
    # the authors' Heun with 5 steps
    scheduler = EDMHeunScheduler(timestep_scale=1000.0)
    scheduler.set_timesteps(5)
    expected = [80.0, 17.5278, 17.5278, 2.5152, 2.5152, 0.1698, 0.1698, 0.002, 0.002]
    close(scheduler.call_sigmas, expected, rtol=0, atol=6e-5)
    close(scheduler.timesteps, [250 * math.log(level) for level in expected], rtol=0, atol=250 * 5e-4)
    close(scheduler.sigmas[:-1], karras_sigmas(5))
    network = ExactNetwork(timestep_scale=1000.0)  # a CTM: no target is its denoiser
    sampling_loop(scheduler, network, 80 * randn(1, 2))
    close(torch.stack([t for t, _ in network.calls]), scheduler.call_sigmas, rtol=1e-5)
    assert all(s is None for _, s in network.calls)


def test_against_the_oracle_flow(oracle):
    # the authors' Gaussian mixture in the plane, solved to 3e-10 at the levels of the 18-grid
    arrays = oracle("toy_gmm.npz")
    data = GaussianMixture(arrays["weights"], arrays["means"], arrays["covs"])
    scheduler, states, x_T = EDMHeunScheduler(sigma_data=0.6), [], torch.from_numpy(arrays["xT"])

    def network(sample, timestep, **_):
        t = scheduler.t_to_sigma(timestep.double())
        total = t**2 + 0.36
        x = sample * total.sqrt()
        return ((data.denoiser(x, t) - 0.36 / total * x) * total.sqrt() / (0.6 * t),)

    scheduler.set_timesteps(128)
    sampling_loop(scheduler, network, x_T, callback=states.append)
    close(states[0].pred_original_sample, arrays["xT_D"], rtol=0, atol=1e-5)
    error = (states[-2].prev_sample - torch.from_numpy(arrays["xT_G"][-1])).abs().mean().item()
    assert error < 5e-4


# Algorithm 2 ----------------------------------------------------------------------------------------------------------


CHURN = {"s_churn": 8.0, "s_tmin": 0.05, "s_tmax": 50.0, "s_noise": 1.003}


@pytest.mark.parametrize("churn", [CHURN, {"s_churn": 3.0}, {"s_churn": 100.0, "s_tmax": 90.0}])
def test_churn_is_algorithm_2_written_out(churn):
    steps, scheduler = 8, EDMHeunScheduler(sigma_data=0.7, **churn)
    scheduler.set_timesteps(steps)
    start = randn(2, 3, 4, 4) * scheduler.init_noise_sigma
    image = sampling_loop(scheduler, untimed, start, seeded(2))

    # Karras et al. 2022, Algorithm 2, from line 6 of the first pass on: `start` holds the noise of its churn
    levels = [*karras_sigmas(steps, dtype=torch.float64).tolist(), 0.0]
    s_tmin, s_tmax, s_noise = churn.get("s_tmin", 0.0), churn.get("s_tmax", math.inf), churn.get("s_noise", 1.0)
    generator, x = seeded(2), start
    for i in range(steps):
        t, t_next = levels[i], levels[i + 1]
        gamma = min(churn["s_churn"] / steps, math.sqrt(2) - 1) if s_tmin <= t <= s_tmax else 0.0
        t_hat = t + gamma * t
        if i > 0 and gamma > 0:
            noise = s_noise * torch.randn(x.shape, generator=generator, dtype=x.dtype)
            x = x + math.sqrt(t_hat**2 - t**2) * noise
        denoised = Preconditioning(0.7).denoise(untimed, x, torch.tensor(t_hat).double())
        slope = (x - denoised) / t_hat
        x_next = x + (t_next - t_hat) * slope
        if t_next:
            denoised = Preconditioning(0.7).denoise(untimed, x_next, torch.tensor(t_next).double())
            x_next = x + (t_next - t_hat) * (slope + (x_next - denoised) / t_next) / 2
        x = x_next
    close(image, x, rtol=1e-4, atol=1e-5)  # levels are float32


@pytest.mark.parametrize("s_churn", [0.0, 5.0, 20.0])
def test_churn_keeps_the_marginal_variance_and_tells_the_level(s_churn):
    data, count = GaussianData(0.5), 20_000
    scheduler, network = EDMHeunScheduler(s_churn=s_churn), ExactDenoiserNetwork(data)
    scheduler.set_timesteps(128)
    x = randn(count, 1) * math.sqrt(scheduler.init_noise_sigma**2 + 0.25)
    for i, timestep in enumerate(scheduler.timesteps):
        if (
            i % 2 == 0
        ):  # the state of a predictor has the level that the network is told, that of a corrector is an estimate
            told = network.level(timestep).item()
            assert abs(x.std() / math.sqrt(told**2 + 0.25) - 1) < 0.03, (i, told)
        model_output = network(scheduler.scale_model_input(x, timestep), timestep)[0]
        x = scheduler.step(model_output, timestep, x, generator=seeded(i)).prev_sample
    assert abs(x.std() / 0.5 - 1) < 0.03


def test_churn_acts_between_its_bounds_only():
    scheduler = EDMHeunScheduler(**CHURN)
    scheduler.set_timesteps(8)
    level, told = scheduler.sigmas[:-1], scheduler.call_sigmas[::2]
    inside = (level >= 0.05) & (level <= 50.0)
    assert inside.any() and not inside.all()
    close(told / level, torch.where(inside, 1 + math.sqrt(2) - 1, 1.0), rtol=1e-5)  # 8 / 8 is more than its limit
    assert torch.equal(scheduler.call_sigmas[1::2], level[1:])  # a corrector is where its step ends
    assert scheduler.init_noise_sigma == 80.0
    scheduler = EDMHeunScheduler(s_churn=0.3, s_tmin=0.5, s_tmax=5.0)
    scheduler.set_timesteps(sigmas=[80.0, 5.0, 0.5])
    close(scheduler.call_sigmas[::2], [80.0, 5.5, 0.55], rtol=1e-6)  # the bounds are levels at which noise is added
    scheduler = EDMHeunScheduler(s_churn=0.8, s_noise=1.1)
    scheduler.set_timesteps(8)
    close(scheduler.call_sigmas[0], 88.0, rtol=1e-6)
    close(torch.tensor(scheduler.init_noise_sigma), math.sqrt(80**2 + 1.1**2 * (88**2 - 80**2)), rtol=1e-6)


def test_no_churn_draws_no_noise():
    scheduler, x, generator = EDMHeunScheduler(), 80 * randn(1, 3, 4, 4), seeded()
    scheduler.set_timesteps(4)
    before = generator.get_state()
    sampling_loop(scheduler, untimed, x, generator)
    assert torch.equal(generator.get_state(), before)


# Interface ------------------------------------------------------------------------------------------------------------


def test_a_run_begins_with_a_predictor():
    scheduler, x = EDMHeunScheduler(), randn(1, 2)
    scheduler.set_timesteps(4)
    scheduler.set_begin_index(3)
    with pytest.raises(ValueError, match="even index of `timesteps`"):
        scheduler.step(x, scheduler.timesteps[3], x)


def test_by_its_level_a_run_begins_with_the_predictor():
    # corrector and predictor are shown the same level; found by it, the run starts with the step
    scheduler = EDMHeunScheduler()
    scheduler.set_timesteps(4)
    assert scheduler.timesteps[3] == scheduler.timesteps[4]
    assert scheduler.index_for_timestep(scheduler.timesteps[3]) == 4


@pytest.mark.parametrize("name", ["s_churn", "s_tmin", "s_tmax", "s_noise"])
@pytest.mark.parametrize("value", [-1.0, float("nan"), "1"])
def test_churn_that_is_no_number_or_negative(name, value):
    with pytest.raises(ValueError, match=f"{name} must be a number >= 0"):
        EDMHeunScheduler(**{name: value})
