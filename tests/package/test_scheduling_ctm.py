# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""CTMScheduler on exact solutions, against diffusers and the authors' numbers; and what diffusers expects of any
scheduler, for both schedulers of the package."""

import json
import math

import numpy as np
import pytest
import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    LCMScheduler,
    ScoreSdeVeScheduler,
)

from diffusers_ctm import CTMPipeline, CTMScheduler, EDMHeunScheduler
from diffusers_ctm.preconditioning import Preconditioning
from diffusers_ctm.scheduler_configs import own_config
from diffusers_ctm.scheduling_ctm import SCHEDULE
from diffusers_ctm.trajectory import jump, karras_sigmas
from helpers.comparing import close_in_float64 as close
from helpers.comparing import seeded
from helpers.exact import (
    ExactNetwork,
    GaussianData,
    ParametrizedCTM,
    ParametrizedNetwork,
    PixelMixture,
    randn,
    sampling_loop,
)


BOTH = pytest.mark.parametrize("cls", [CTMScheduler, EDMHeunScheduler])
CONFIGS = [
    {},
    {"timestep_scale": 1000.0},
    {"sigma_data": 0.7, "sigma_min": 0.01, "sigma_max": 20.0},
    {"rho": 3.0, "num_train_timesteps": 40},
    {"prediction_type": "epsilon", "beta_schedule": "linear", "sigma_min": 0.011, "sigma_max": 150.0},
    {"prediction_type": "v_prediction", "trained_betas": [0.01, 0.02, 0.5, 0.9], "sigma_min": 0.2, "sigma_max": 4.0},
    {"prediction_type": "flow_prediction", "num_diffusion_timesteps": 500},
    {"prediction_type": "score", "sigma_min": 0.02},
    {"prediction_type": "consistency", "timestep_scale": 1000.0},
]
OWN_CONFIGS = [(CTMScheduler, {"gamma": 0.4}), (CTMScheduler, {"clip_sample": True})]
OWN_CONFIGS += [(CTMScheduler, {"final_sigma": 0.0}), (CTMScheduler, {"final_sigma": 0.5})]
OWN_CONFIGS += [(CTMScheduler, {"presets": {"4": {"sigmas": [80.0, 9.0, 2.0, 0.3], "gamma": 0.5}}})]
OWN_CONFIGS += [(EDMHeunScheduler, {"s_churn": 8.0, "s_tmin": 0.1, "s_tmax": 50.0, "s_noise": 1.01})]
EVERY_CONFIG = [(cls, config) for cls in (CTMScheduler, EDMHeunScheduler) for config in CONFIGS] + OWN_CONFIGS


def some_network(sample, *times, return_dict=False, **_):
    """Not linear, and another function at every time."""
    return (3 * torch.sin(3 * sample) + sum(0.01 * (i + 1) * time for i, time in enumerate(times)),)


def run(scheduler, steps=4, seed=0, dtype=torch.float32, **options):
    scheduler.set_timesteps(steps, **options)
    x = randn(2, 3, 4, 4, dtype=dtype) * scheduler.init_noise_sigma
    return sampling_loop(scheduler, some_network, x, seeded(seed))


# What diffusers' common suite expects of a scheduler ------------------------------------------------------------------


@pytest.mark.parametrize("cls, config", EVERY_CONFIG)
def test_saved_and_loaded_it_samples_the_same(cls, config, tmp_path):
    scheduler = cls(**config)
    scheduler.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "scheduler_config.json").read_text())
    for again in (cls.from_pretrained(tmp_path), cls.from_config(scheduler.config)):
        assert type(again) is cls
        for name, value in config.items():
            assert again.config[name] == value == saved[name]  # in plain JSON
        assert torch.equal(run(scheduler), run(again))
    assert not config or not torch.equal(run(scheduler), run(cls()))  # and the config has an effect


@BOTH
def test_another_config_gives_another_preconditioning(cls):
    scheduler = cls(sigma_data=0.5)
    before = scheduler.preconditioning
    assert scheduler.preconditioning == before
    scheduler.register_to_config(sigma_data=0.7, timestep_scale=1000.0)
    assert scheduler.preconditioning == cls(sigma_data=0.7, timestep_scale=1000.0).preconditioning != before
    assert torch.equal(run(scheduler), run(cls(sigma_data=0.7, timestep_scale=1000.0)))


@BOTH
def test_tuple_holds_what_the_output_holds(cls):
    scheduler, x = cls(), randn(2, 3, 4, 4)
    results = []
    for return_dict in (True, False):
        scheduler.set_timesteps(2)
        results.append(
            scheduler.step(some_network(x)[0], scheduler.timesteps[0], x, generator=seeded(), return_dict=return_dict)
        )
    names = ["prev_sample", "pred_noised_sample", "pred_original_sample"]
    assert list(results[0]) == (names if cls is CTMScheduler else names[::2]) and len(results[1]) == len(results[0])
    for from_output, from_tuple in zip(results[0].to_tuple(), results[1], strict=True):
        assert torch.equal(from_output, from_tuple)
    assert torch.equal(results[1][0], results[0].prev_sample)


@pytest.mark.parametrize("cls, config", EVERY_CONFIG)
def test_public_interface(cls, config):
    scheduler = cls(**config)
    sigma_data = scheduler.config.sigma_data
    scheduler.set_timesteps(5)
    assert isinstance(scheduler.init_noise_sigma, float)
    close(
        torch.tensor(scheduler.init_noise_sigma),
        float(scheduler.call_sigmas[0]),
        rtol=2e-2 if "s_noise" in config else 1e-6,
    )
    x = randn(2, 3, 4, 4)
    for i, timestep in enumerate(scheduler.timesteps):
        sigma = scheduler.call_sigmas[i].item()
        scaled = {
            "flow_prediction": x / (1 + sigma),
            "score": (x + 1) / 2,
            **dict.fromkeys(("epsilon", "v_prediction"), x / math.sqrt(sigma**2 + 1)),
        }.get(config.get("prediction_type"), x / math.sqrt(sigma**2 + sigma_data**2))
        close(scheduler.scale_model_input(x, timestep), scaled)
        close(scheduler.t_to_sigma(timestep.double()), sigma, rtol=2e-6)
        scheduler.step(x, timestep, x)
    assert len(scheduler) == scheduler.config.num_train_timesteps
    assert scheduler.order == (1 if cls is CTMScheduler else 2)


@BOTH
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_arithmetic_is_float32_and_the_result_in_the_dtype_of_the_sample(cls, dtype):
    low, high = (
        cls(**({"gamma": 0.5} if cls is CTMScheduler else {})),
        cls(**({"gamma": 0.5} if cls is CTMScheduler else {})),
    )
    low.set_timesteps(4)
    high.set_timesteps(4)
    x, model_output = (80 * randn(2, 3, 4, 4)).to(dtype), randn(2, 3, 4, 4, seed=1).to(dtype)
    timestep = low.timesteps[0]
    actual = low.step(model_output, timestep, x, generator=seeded())
    expected = high.step(model_output.float(), timestep, x.float(), generator=seeded())
    for name, value in actual.items():
        assert value.dtype == dtype and torch.equal(value, expected[name].to(dtype))
    assert low.scale_model_input(x, timestep).dtype == dtype
    # a half-precision network under a float32 state
    assert (
        high.step(model_output, high.timesteps[1], expected.prev_sample, generator=seeded()).prev_sample.dtype
        == torch.float32
    )


@BOTH
@pytest.mark.parametrize("scale", [1.0, 1000.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_add_noise(cls, scale, dtype):
    scheduler = cls(timestep_scale=scale)
    sigmas = torch.tensor([0.002, 0.777, 60.0], dtype=torch.float64)  # not in the schedule
    clean, noise = randn(3, 3, 4, 4).to(dtype), randn(3, 3, 4, 4, seed=1).to(dtype)
    noisy = scheduler.add_noise(clean, noise, scheduler.sigma_to_t(sigmas))
    expected = clean.double() + sigmas.reshape(3, 1, 1, 1) * noise.double()
    assert noisy.dtype == dtype
    # rounded once, to the sample's dtype
    close(noisy.double(), expected, rtol=2 * torch.finfo(dtype).eps if dtype != torch.float64 else 1e-12, atol=1e-6)
    for one in (
        scheduler.sigma_to_t(0.777),
        float(scheduler.sigma_to_t(0.777)),
        [float(scheduler.sigma_to_t(0.777))] * 3,
    ):
        close(
            scheduler.add_noise(clean.double(), noise.double(), one),
            clean.double() + 0.777 * noise.double(),
            rtol=1e-6,
            atol=1e-5,
        )


@BOTH
def test_usable_right_after_init(cls):
    scheduler = cls()
    assert scheduler.num_inference_steps is None and scheduler.step_index is None and scheduler.begin_index is None
    assert scheduler.init_noise_sigma == 80.0
    x = 80 * randn(1, 3, 4, 4)
    assert torch.equal(sampling_loop(scheduler, some_network, x), sampling_loop(set_to(cls(), 18), some_network, x))


def set_to(scheduler, *args, **kwargs):
    scheduler.set_timesteps(*args, **kwargs)
    return scheduler


@BOTH
def test_set_timesteps_starts_anew(cls):
    scheduler = cls()
    first = run(scheduler)
    scheduler.set_timesteps(4)
    scheduler.set_begin_index(2)
    x = randn(2, 3, 4, 4)
    for timestep in scheduler.timesteps[2:4]:
        scheduler.scale_model_input(x, timestep)
        scheduler.step(x, timestep, x)
    assert scheduler.step_index == 4 and scheduler.begin_index == 2
    scheduler.set_timesteps(4)
    assert scheduler.step_index is None and scheduler.begin_index is None
    assert torch.equal(run(scheduler), first)


def test_the_schedule_that_is_kept_is_the_one_that_is_asked():
    # `set_timesteps` keeps what it made last: writing into it, another config or other arguments make another one
    scheduler = CTMScheduler()

    def levels(*args, **kwargs):
        scheduler.set_timesteps(*args, **kwargs)
        return scheduler.sigmas.tolist(), scheduler.gammas.tolist(), scheduler.timesteps.tolist()

    first = levels(3)
    scheduler.sigmas.zero_(), scheduler.timesteps.zero_()
    assert levels(3) == first
    assert levels(3, gamma=0.5)[1] == [0.5] * 3 and levels(3)[1] == [0.0] * 3
    scheduler.register_to_config(gamma=0.25, sigma_max=40.0)
    assert levels(3)[1] == [0.25] * 3 and levels(3)[0][0] == 40.0
    scheduler.register_to_config(presets={"3": {"gamma": 1.0}})
    assert levels(3)[1] == [1.0] * 3
    with pytest.raises(ValueError, match="gamma"):
        levels(3, gamma=1.5)
    assert levels(3)[1] == [1.0] * 3


def test_all_that_a_schedule_sets_is_kept():
    scheduler = CTMScheduler()
    before = dict(vars(scheduler))
    scheduler.set_timesteps(3, gamma=0.5)
    changed = {name for name, value in vars(scheduler).items() if value is not before.get(name)}
    assert {"sigmas", "timesteps"} < changed - {"_kept_schedule"} <= set(SCHEDULE)


@BOTH
@pytest.mark.parametrize("by", ["begin_index", "timestep", "rounded timestep"])
def test_start_in_the_middle(cls, by):
    # what follows from call 4 on is what follows there in the whole run
    start, states = 4, []
    scheduler = set_to(cls(), 6)
    whole = sampling_loop(
        scheduler, some_network, 80 * randn(1, 3, 4, 4), callback=lambda o: states.append(o.prev_sample)
    )
    scheduler.set_timesteps(6)
    if by == "begin_index":
        scheduler.set_begin_index(start)
        assert scheduler.begin_index == start
    x = states[start - 1]
    targets = getattr(scheduler, "target_timesteps", None)
    for i in range(start, len(scheduler.timesteps)):
        timestep = scheduler.timesteps[i]
        shown = timestep * (1 + 1e-6) if by == "rounded timestep" else timestep
        times = (timestep,) if targets is None else (timestep, targets[i])
        model_output = some_network(scheduler.scale_model_input(x, shown), *times)[0]
        x = scheduler.step(model_output, shown, x).prev_sample
        assert scheduler.step_index == i + 1
    assert torch.equal(x, whole)


@BOTH
def test_types_and_places(cls):
    scheduler = set_to(cls(), 5)
    assert scheduler.num_inference_steps == 5 and len(scheduler.sigmas) == 6
    assert scheduler.timesteps.dtype == scheduler.sigmas.dtype == torch.float32
    assert scheduler.sigmas[0] == 80
    assert scheduler.sigmas[-1] == (torch.tensor(0.002) if cls is CTMScheduler else 0)
    scheduler.set_timesteps(5, device="meta")  # stands in for a GPU
    assert scheduler.timesteps.device.type == "meta" and scheduler.sigmas.device.type == "cpu"
    if cls is CTMScheduler:
        assert scheduler.target_timesteps.device.type == "meta" and scheduler.target_sigmas.device.type == "cpu"


@BOTH
@pytest.mark.parametrize("scale", [1.0, 1000.0])
@pytest.mark.parametrize("convert", [list, tuple, np.array, torch.tensor])
def test_custom_sigmas_equal_custom_timesteps(cls, scale, convert):
    levels = [80.0, 6.5, 0.33]
    by_sigmas = set_to(cls(timestep_scale=scale), sigmas=convert(levels))
    timesteps = convert([scale * math.log(level) / 4 for level in levels])
    by_timesteps = set_to(cls(timestep_scale=scale), timesteps=timesteps)
    end = 0.002 if cls is CTMScheduler else 0.0
    for scheduler in (by_sigmas, by_timesteps):
        assert scheduler.num_inference_steps == 3
        close(scheduler.sigmas, levels + [end], rtol=3e-6)
    close(by_sigmas.timesteps, by_timesteps.timesteps, rtol=1e-6)


@BOTH
def test_a_generator_per_sample(cls):
    scheduler = cls(**({"gamma": 0.6} if cls is CTMScheduler else {"s_churn": 10.0}))
    x = 80 * randn(3, 3, 4, 4, dtype=torch.float32)

    def sample(x, generator):
        scheduler.set_timesteps(4)
        return sampling_loop(scheduler, some_network, x, generator)

    together = sample(x, [seeded(i) for i in range(3)])
    for i in range(3):
        assert torch.equal(sample(x[i : i + 1], seeded(i)), together[i : i + 1])
        assert torch.equal(sample(x[i : i + 1], [seeded(i)]), together[i : i + 1])
    assert not torch.equal(sample(x, [seeded(5), seeded(1), seeded(2)])[0], together[0])


@BOTH
@pytest.mark.parametrize("other", [EDMEulerScheduler, EDMDPMSolverMultistepScheduler, CTMScheduler, EDMHeunScheduler])
@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("explicit", [False, True])
def test_round_trip_to_compatible_schedulers(cls, other, saved, explicit, tmp_path):
    """Numbers survive the way there and back, timestep_scale too though diffusers' schedulers do not know it."""

    def through(scheduler_class, scheduler):
        if not saved:
            return scheduler_class.from_config(scheduler.config)
        scheduler.save_pretrained(tmp_path)
        return scheduler_class.from_pretrained(tmp_path)

    numbers = {"sigma_data": 0.7, "sigma_max": 20.0, "rho": 5.0, "timestep_scale": 1000.0}
    scheduler = cls(**numbers, **({"prediction_type": "edm"} if explicit else {}))
    there = through(other, scheduler)
    assert type(there) is other
    for name, value in numbers.items():
        assert there.config[name] == value
    if other.__module__.startswith("diffusers."):
        there.register_to_config(prediction_type="epsilon")  # as the pipeline does
    back = through(cls, there)
    assert type(back) is cls and back.config.prediction_type == "edm"
    for name, value in numbers.items():
        assert back.config[name] == value
    assert torch.equal(run(back), run(scheduler))


@BOTH
@pytest.mark.parametrize("other", [EDMEulerScheduler, EDMDPMSolverMultistepScheduler])
@pytest.mark.parametrize("config", [{}, {"prediction_type": "epsilon"}])
def test_the_epsilon_of_diffusers_is_our_edm(cls, other, config, tmp_path):
    theirs = other(sigma_data=0.7, **config)
    theirs.save_pretrained(tmp_path)
    for ours in (
        cls.from_config(theirs.config),
        cls.from_pretrained(tmp_path),
        cls.from_config(other.load_config(tmp_path)),
    ):
        assert ours.config.prediction_type == "edm" and ours.config.sigma_data == 0.7
        assert theirs.config.prediction_type == "epsilon"  # untouched
    x, model_output, sigma = randn(2, 3), randn(2, 3, seed=1), torch.tensor(2.5).double()
    ours = cls.from_config(theirs.config)
    ours.set_timesteps(sigmas=[2.5])
    close(
        ours.step(model_output, ours.timesteps[0], x).pred_original_sample,
        theirs.precondition_outputs(x, model_output, sigma),
    )
    # the epsilon of a DDPM is something else
    assert (
        cls.from_config({"prediction_type": "epsilon", "beta_schedule": "linear"}).config.prediction_type == "epsilon"
    )


# CTMScheduler on the exact solutions ----------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 1000.0])
@pytest.mark.parametrize("steps", [2, 5, 18])
@pytest.mark.parametrize("data", [GaussianData(0.4, mean=0.1), PixelMixture()], ids=["gaussian", "mixture"])
def test_n_steps_equal_one_step_at_gamma_0(data, steps, scale):
    network = ExactNetwork(data, sigma_data=0.6, timestep_scale=scale)
    scheduler = CTMScheduler(sigma_data=0.6, timestep_scale=scale)
    x_T = 80 * randn(1, 3, 4, 4)
    exact = data.jump(x_T, 80.0, 0.002)
    # levels are shown in float32; the mixture is steep between its two peaks
    tolerance = {"rtol": 0, "atol": 2e-6} if isinstance(data, GaussianData) else {"rtol": 0, "atol": 1e-4}
    close(sampling_loop(set_to(scheduler, 1), network, x_T), exact, **tolerance)
    states = []
    close(sampling_loop(set_to(scheduler, steps), network, x_T, callback=states.append), exact, **tolerance)
    for i, output in enumerate(states):  # and every state between lies on the trajectory
        sigma = scheduler.sigmas[i + 1].double()
        close(output.prev_sample / (1 + sigma), data.jump(x_T, 80.0, sigma) / (1 + sigma), **tolerance)
        assert torch.equal(output.prev_sample, output.pred_noised_sample)
    assert len(network.calls) == 1 + steps


GAMMAS = [0.0, 0.3, 0.8, 1.0, [0.9, 0.0, 0.5, 1.0]]


@pytest.mark.parametrize("gamma", GAMMAS)
def test_every_gamma_keeps_the_marginal_variance(gamma):
    data, count = GaussianData(0.5), 40_000
    scheduler = CTMScheduler()
    scheduler.set_timesteps(4, gamma=gamma)
    x = randn(count, 1) * math.sqrt(80**2 + 0.5**2)
    bound = 5 / math.sqrt(2 * count)  # five standard errors of a relative standard deviation
    states = [x]

    def check(output):
        i = len(states)
        sigma, s = scheduler.sigmas[i].item(), scheduler.target_sigmas[i - 1].item()
        assert abs(output.prev_sample.std() / math.sqrt(sigma**2 + 0.25) - 1) < bound
        assert abs(output.pred_noised_sample.std() / math.sqrt(s**2 + 0.25) - 1) < bound
        # what is left of the state before: all at gamma 0, only the image at gamma 1
        correlation = torch.corrcoef(torch.cat([states[-1], output.prev_sample], dim=1).T)[0, 1]
        assert abs(correlation - math.sqrt((s**2 + 0.25) / (sigma**2 + 0.25))) < 5 / math.sqrt(count)
        states.append(output.prev_sample)

    sampling_loop(scheduler, ExactNetwork(data), x, seeded(1), callback=check)


@pytest.mark.parametrize("gamma", GAMMAS)
def test_every_gamma_samples_the_data(gamma):
    data, count = PixelMixture(), 20_000
    scheduler = CTMScheduler(sigma_data=0.6)
    scheduler.set_timesteps(4, gamma=gamma)
    x = 80 * randn(count, 1) + data.draw((count, 1), seeded(3))
    samples = sampling_loop(scheduler, ExactNetwork(data, sigma_data=0.6), x, seeded(1))
    values = data.cdf(samples[:, 0], 0.002).sort().values  # uniform if the samples are right
    distance = (values - (torch.arange(count) + 0.5) / count).abs().max()
    assert distance < 1.95 / math.sqrt(count)  # Kolmogorov-Smirnov at 0.1 %


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
def test_step_is_jump_and_renoise(gamma):
    # the scheduler's loop and the functions that training calls give the same tensor
    scheduler = CTMScheduler(sigma_data=0.7, gamma=gamma)
    scheduler.set_timesteps(5)
    preconditioning, generator = scheduler.preconditioning, seeded(4)
    assert preconditioning == Preconditioning(0.7, 1.0, "edm")
    untimed = lambda sample, *times, **_: (torch.sin(3 * sample),)  # noqa: E731
    x, states = 80 * randn(2, 3, 4, 4), []
    sampling_loop(scheduler, untimed, x, seeded(4), callback=states.append)
    for i, output in enumerate(states):
        t, s = scheduler.sigmas[i].double(), scheduler.target_sigmas[i].double()
        close(output.pred_original_sample, preconditioning.g(untimed, x, t, s))
        close(output.pred_noised_sample, preconditioning.jump(untimed, x, t, s))
        x = preconditioning.jump(untimed, x, t, s)
        if gamma and i < 4:
            std = scheduler.noise_std[i].double()
            close(s**2 + std**2, scheduler.sigmas[i + 1].double() ** 2, rtol=1e-6)
            x = x + std * torch.randn(x.shape, generator=generator, dtype=x.dtype)
        close(output.prev_sample, x)


@pytest.mark.parametrize("gamma, draws", [(0.0, 0), (0.5, 3), ([0.0, 0.4, 0.0, 1.0], 1)])
def test_noise_is_drawn_where_it_is_added_only(gamma, draws):
    scheduler, x, generator, plain = CTMScheduler(), 80 * randn(1, 3, 4, 4), seeded(), seeded()
    scheduler.set_timesteps(4, gamma=gamma)
    sampling_loop(scheduler, some_network, x, generator)
    for _ in range(draws):  # the last step ends at sigma_min, whatever gamma
        torch.randn(x.shape, generator=plain, dtype=x.dtype)
    assert torch.equal(generator.get_state(), plain.get_state())


def test_clip_sample_clamps_g():
    plain, clipped = set_to(CTMScheduler(), 3), set_to(CTMScheduler(clip_sample=True), 3)
    x, model_output = 40 * randn(2, 3, 4, 4), 3 * randn(2, 3, 4, 4, seed=1)
    timestep = plain.timesteps[0]
    g = plain.step(model_output, timestep, x).pred_original_sample
    output = clipped.step(model_output, timestep, x)
    assert g.abs().max() > 1
    assert torch.equal(output.pred_original_sample, g.clamp(-1, 1))
    close(output.prev_sample, jump(x, g.clamp(-1, 1), plain.sigmas[0].double(), plain.sigmas[1].double()))


# Against other implementations ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 4, 18])
@pytest.mark.parametrize("scale_config", [{}, {"sigma_data": 0.7, "sigma_min": 0.01, "sigma_max": 20.0, "rho": 4.0}])
def test_gamma_1_equals_consistency_models(steps, scale_config):
    theirs = CMStochasticIterativeScheduler(num_train_timesteps=40, clip_denoised=False, **scale_config)
    ours = CTMScheduler(timestep_scale=1000.0, gamma=1.0, **scale_config)
    theirs.set_timesteps(steps)
    ours.set_timesteps(sigmas=theirs.sigmas[:-1])
    close(ours.timesteps, theirs.timesteps.float(), rtol=1e-5, atol=1e-4)
    close(ours.sigmas, theirs.sigmas, rtol=1e-6)
    sigma_min = ours.config.sigma_min
    x_ours = x_theirs = randn(2, 3, 4, 4) * ours.init_noise_sigma
    generator_ours, generator_theirs = seeded(7), seeded(7)
    for i in range(steps):
        t = theirs.sigmas[i].double()
        close(ours.target_sigmas[i], sigma_min, rtol=1e-6)
        close(
            ours.scale_model_input(x_ours, ours.timesteps[i]),
            theirs.scale_model_input(x_theirs, theirs.timesteps[i]),
            rtol=1e-5,
            atol=1e-6,
        )
        # one consistency function in both parametrizations: theirs is the identity at sigma_min by its c_skip, c_out,
        # ours by the jump
        model_output = randn(2, 3, 4, 4, seed=i)
        clean = jump(x_theirs, theirs_g(ours, model_output, x_theirs, t), t, torch.tensor(sigma_min).double())
        c_skip, c_out = theirs.get_scalings_for_boundary_condition(t)
        x_ours = ours.step(model_output, ours.timesteps[i], x_ours, generator_ours).prev_sample
        x_theirs = theirs.step(
            (clean - c_skip * x_theirs) / c_out, theirs.timesteps[i], x_theirs, generator_theirs
        ).prev_sample
        close(x_ours, x_theirs, rtol=1e-5, atol=2e-6)


def theirs_g(scheduler, model_output, x, t):
    return scheduler.preconditioning.g(lambda *args, **kwargs: (model_output,), x, t)


LISTED_LEVELS = karras_sigmas(18)[[0, 6, 12]].tolist()  # the last of their indices, 17, is sigma_min: ours is implied

# The pairs (t, s) that the authors' samplers ask of the network, to four decimals
WRITTEN_PAIRS = {
    "exact_4": ((4, 0.0), [(80.0, 17.5278), (17.5278, 2.5152), (2.5152, 0.1698), (0.1698, 0.002)]),
    "gamma0.5_4": ((4, 0.5), [(80.0, 15.1798), (17.5278, 2.1785), (2.5152, 0.1473), (0.1698, 0.002)]),
    "gamma0.5_ts": ((LISTED_LEVELS, 0.5), [(80.0, 7.2757), (8.4009, 0.2570), (0.2964, 0.002)]),
    "cm_4": ((4, 1.0), [(80.0, 0.002), (17.5278, 0.002), (2.5152, 0.002), (0.1698, 0.002)]),
}


def pairs(steps, gamma=None, scale=1000.0, **options):
    """(t, s) of every network call, read from what the network is shown."""
    scheduler = CTMScheduler(timestep_scale=scale)
    options |= {"num_inference_steps" if isinstance(steps, int) else "sigmas": steps, "gamma": gamma}
    scheduler.set_timesteps(**options)
    network = ExactNetwork(timestep_scale=scale)
    sampling_loop(scheduler, network, 80 * randn(1, 1, 2, 2), seeded())
    close(
        torch.stack([scheduler.sigmas[:-1], scheduler.target_sigmas]).double(), torch.tensor(network.calls).T, rtol=1e-5
    )
    return torch.tensor(network.calls, dtype=torch.float64)


@pytest.mark.parametrize("name", WRITTEN_PAIRS)
@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_pairs_of_the_authors(name, scale):
    arguments, expected = WRITTEN_PAIRS[name]
    close(pairs(*arguments, scale=scale), expected, rtol=0, atol=6e-5)


ORACLE_RUNS = {f"{kind}_{n}": (n, gamma) for kind, gamma in (("exact", 0.0), ("gamma0.5", 0.5)) for n in (1, 2, 4, 8)}
ORACLE_RUNS |= {f"cm_{n}": (n, 1.0) for n in (1, 2, 4)}


def test_pairs_of_the_authors_all_digits(oracle):
    arrays = oracle("samplers_cifar_some.npz")
    grid = arrays["sigmas_karras_18"]
    runs = {**ORACLE_RUNS, "exact_ts": (grid[[0, 6, 12]], 0.0), "gamma0.5_ts": (grid[[0, 6, 12]], 0.5)}
    for name, arguments in runs.items():
        close(pairs(*arguments), arrays[f"{name}__calls_ts"], rtol=1e-5, atol=0)
    missing = {name.removesuffix("__calls_ts") for name in arrays if name.endswith("__calls_ts")} - set(runs)
    assert missing == {"gamma2_ind5_3", "heun_ctm_18", "heun_teacher_18", "heun_teacher_5"}  # tested elsewhere


def test_two_step_index_sampler_written_out():
    expected = [(80.0, 12.9101), (28.3746, 0.002)]
    grid = karras_sigmas(18)
    close(pairs(grid[[0, 3]], target_sigmas=grid[[5, 17]]), expected, rtol=1e-5)
    gamma = math.sqrt(1 - ((12.9101 - 0.002) / (28.3746 - 0.002)) ** 2)
    close(pairs([80.0, 28.3746], [gamma, 0.5]), expected, rtol=1e-5)
    scheduler = set_to(CTMScheduler(), sigmas=[80.0, 28.3746], target_sigmas=[12.9101, 0.002])
    close(scheduler.noise_std, [math.sqrt(28.3746**2 - 12.9101**2), 0.0], rtol=1e-6)
    close(scheduler.gammas, [gamma, 0.0], rtol=1e-5)


@pytest.mark.parametrize("convert", [list, tuple, np.array, torch.tensor])
@pytest.mark.parametrize("gamma", [0.0, 1.0, [0.9, 0.0, 0.5, 1.0]])
def test_targets_of_a_gamma_give_the_same_run(gamma, convert):
    scheduler = CTMScheduler()
    expected = run(scheduler, 4, gamma=gamma)
    targets, gammas = convert(scheduler.target_sigmas.tolist()), scheduler.gammas
    close(run(scheduler, 4, target_sigmas=targets), expected, rtol=1e-4, atol=1e-4)
    close(scheduler.gammas[:-1], gammas[:-1], rtol=1e-5, atol=1e-3)  # gamma is steep in s at 0
    assert scheduler.noise_std[-1] == 0


@pytest.mark.parametrize(
    "options, message",
    [
        ({"target_sigmas": [1.0, 0.002], "gamma": 0.0}, "target_sigmas and gamma contradict each other"),
        ({"target_sigmas": [1.0, 0.002], "final_sigma": 0.0}, "target_sigmas and final_sigma contradict each other"),
        ({"target_sigmas": [0.002]}, r"one level per step \(2\)"),
        ({"target_sigmas": [1.0, 0.5, 0.002]}, r"one level per step \(2\)"),
        ({"target_sigmas": [9.0, 0.002]}, r"target_sigmas\[0\]=9 must lie between sigma_min=0.002 and 5.*never down"),
        ({"target_sigmas": [0.001, 0.002]}, r"target_sigmas\[0\]=0.001 must lie between sigma_min=0.002 and 5"),
        ({"target_sigmas": [0.0, 0.002]}, r"target_sigmas\[0\]=0 must lie between"),
        ({"target_sigmas": [float("nan"), 0.002]}, r"target_sigmas\[0\]=nan must lie between"),
        ({"target_sigmas": [1.0, float("nan")]}, r"target_sigmas\[-1\] must be 0, or lie between sigma_min=0.002"),
        ({"target_sigmas": []}, "one level per step"),
        ({"target_sigmas": 0.002}, "one level per step"),
        ({"target_sigmas": [1.0, 6.0]}, "sigmas ends at noise level 5.*The end of the last step, 6, is added"),
        ({"final_sigma": 0.001}, "final_sigma must be 0, or lie between sigma_min=0.002 .* got 0.001"),
        ({"final_sigma": -1.0}, "final_sigma must be 0"),
        ({"final_sigma": float("nan")}, "final_sigma must be 0"),
        ({"final_sigma": [0.5]}, "final_sigma must be 0"),
        ({"final_sigma": 5.0}, "sigmas ends at noise level 5"),
        ({"final_sigma": 80.0}, "final_sigma=80 must lie below sigma_max=80"),
    ],
)
def test_targets_and_ends_that_do_not_fit(options, message):
    scheduler = CTMScheduler()
    with pytest.raises(ValueError, match=message):
        scheduler.set_timesteps(sigmas=[80.0, 5.0], **options)
    assert len(scheduler.timesteps) == 18  # as it was


# Where sampling ends --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 4])
def test_final_sigma_leaves_the_noise_of_its_level(steps):
    data, final = GaussianData(0.4, mean=0.1), 0.3
    x_T = 80 * randn(1, 3, 4, 4)
    for scheduler, options in ((CTMScheduler(), {"final_sigma": final}), (CTMScheduler(final_sigma=final), {})):
        scheduler.set_timesteps(steps, **options)
        close(scheduler.sigmas.double(), karras_sigmas(steps + 1, final, dtype=torch.float64), rtol=1e-6)
        close(sampling_loop(scheduler, ExactNetwork(data), x_T), data.jump(x_T, 80.0, final), rtol=0, atol=2e-6)
    scheduler.set_timesteps(steps, final_sigma=0.002)  # a call says otherwise
    close(sampling_loop(scheduler, ExactNetwork(data), x_T), data.jump(x_T, 80.0, 0.002), rtol=0, atol=2e-6)
    scheduler.set_timesteps(steps, gamma=1.0)  # it adds no noise in the last step, and jumps to sigma_min before
    last = [(scheduler.sigmas[-2].item(), final)]
    network = ExactNetwork(data)
    sampling_loop(scheduler, network, x_T, seeded())
    expected = [(t, 0.002) for t in scheduler.sigmas[:-2].tolist()] + last
    close(torch.tensor(network.calls), expected, rtol=1e-5)
    assert scheduler.noise_std[-1] == 0


def test_sampling_ends_at_zero_through_the_denoiser():
    """The error is of second order in sigma_min, for spread-out pixels and for those that do not vary."""
    data, x_T = GaussianData(torch.tensor([[0.5, 1e-6]]).double()), 80 * randn(64, 2)
    exact, errors = data.jump(x_T, 80.0, 0.0), []
    for sigma_min in (0.04, 0.02, 0.01):
        scheduler, network = set_to(CTMScheduler(sigma_min=sigma_min, final_sigma=0.0), 3), ExactNetwork(data)
        heun = set_to(EDMHeunScheduler(sigma_min=sigma_min), 3)
        assert torch.equal(scheduler.sigmas, heun.sigmas)
        image = sampling_loop(scheduler, network, x_T)
        assert len(network.calls) == 3
        close(torch.tensor(network.calls[-1]), [sigma_min, sigma_min], rtol=1e-6)  # the network is shown no 0
        errors.append((image - exact).abs().amax(0))
    errors = torch.stack(errors)
    assert (errors[:, 1] < 1e-5).all() and 0 < errors[2, 0] < 1e-3
    assert ((errors[:-1, 0] / errors[1:, 0]).log2() - 2).abs().max() < 0.05
    # stopping at sigma_min leaves noise where pixels do not vary, and one step to 0 leaves it where they do
    stopped = sampling_loop(set_to(CTMScheduler(sigma_min=0.01), 3), ExactNetwork(data), x_T) - exact
    close(stopped[:, 1], 0.01 * x_T[:, 1] / 80, rtol=1e-3)
    one = sampling_loop(set_to(CTMScheduler(sigma_min=0.01, final_sigma=0.0), 1), ExactNetwork(data), x_T) - exact
    close(one[:, 0], -0.01 * x_T[:, 0] / 80, rtol=2e-2)
    assert one[:, 1].abs().max() < 1e-5


def test_the_last_step_to_zero_is_edms():
    x = randn(2, 3)
    ours, theirs = set_to(CTMScheduler(final_sigma=0.0), 5), set_to(EDMHeunScheduler(), 5)
    ours.set_begin_index(4)
    theirs.set_begin_index(8)
    model_output = some_network(x)[0]
    a = ours.step(model_output, ours.timesteps[4], x).prev_sample
    assert ours.target_timesteps[4] == ours.timesteps[4]
    close(a, theirs.step(model_output, theirs.timesteps[8], x).prev_sample)
    with pytest.raises(ValueError, match="project needs a run that ends at sigma_min"):
        set_to(ours, 1).step(model_output, ours.timesteps[0], x, project=lambda image: image)


# Schedules of a checkpoint --------------------------------------------------------------------------------------------

PRESETS = {
    "1": {"sigmas": [40.0]},
    "2": {"sigmas": [80.0, 1.5], "gamma": [0.3, 0.0]},
    "3": {"gamma": 0.7},
    "4": {"sigmas": [60.0, 9.0, 2.0, 0.3], "target_sigmas": [5.0, 2.0, 0.1, 0.002]},
    "18": {"final_sigma": 0.0},
}


def test_presets_are_what_their_number_of_steps_gives(tmp_path):
    scheduler = CTMScheduler(presets=PRESETS, gamma=0.2)
    assert (
        len(scheduler.timesteps) == 18 and scheduler.sigmas[-1] == 0
    )  # the default number is asked for by itself, too
    scheduler.save_pretrained(tmp_path)
    through_others = CTMScheduler.from_config(EDMEulerScheduler.from_config(scheduler.config).config)
    for one in (scheduler, CTMScheduler.from_pretrained(tmp_path), through_others):
        assert one.config.presets == PRESETS
        for steps, preset in PRESETS.items():
            plain = CTMScheduler(gamma=0.2)
            plain.set_timesteps(**{**({} if "sigmas" in preset else {"num_inference_steps": int(steps)}), **preset})
            one.set_timesteps(int(steps))
            for name in ("sigmas", "target_sigmas", "timesteps", "target_timesteps", "noise_std"):
                assert torch.equal(getattr(one, name), getattr(plain, name))
            assert one.num_inference_steps == int(steps)
    numbers = CTMScheduler(presets={2: {"sigmas": torch.tensor([80.0, 1.5]), "gamma": np.array([0.3, 0.0])}})
    assert torch.equal(set_to(numbers, 2).target_sigmas, set_to(scheduler, 2).target_sigmas)
    numbers.save_pretrained(tmp_path)  # as JSON
    assert set(CTMScheduler.load_config(tmp_path)["presets"]["2"]) == {"sigmas", "gamma"}


@pytest.mark.parametrize("options", [{"gamma": 0.0}, {"final_sigma": 0.5}, {"target_sigmas": [1.0, 0.002]}])
def test_what_the_caller_says_goes_before_a_preset(options):
    scheduler, plain = CTMScheduler(presets=PRESETS), CTMScheduler()
    for steps in (2, 5):
        if steps == 5 and "target_sigmas" in options:
            continue
        assert torch.equal(set_to(scheduler, steps, **options).sigmas, set_to(plain, steps, **options).sigmas)
        assert torch.equal(scheduler.target_sigmas, plain.target_sigmas)
    levels = [70.0, 3.0]
    assert torch.equal(set_to(scheduler, sigmas=levels).target_sigmas, set_to(plain, sigmas=levels).target_sigmas)
    assert torch.equal(set_to(scheduler, 5).target_sigmas, set_to(plain, 5).target_sigmas)  # there is none for 5


@pytest.mark.parametrize(
    "presets, message",
    [
        ([], "presets must be a dict"),
        ({"two": {"gamma": 0.5}}, "presets is a dict by number of steps.*got the key 'two'"),
        ({"0": {"gamma": 0.5}}, "got the key '0'"),
        ({"02": {"gamma": 0.5}}, "got the key '02'"),
        ({2.0: {"gamma": 0.5}}, "got the key 2.0"),
        ({"2": {}}, r"presets\['2'\] must be a dict with one or more of"),
        ({"2": 0.5}, r"presets\['2'\] must be a dict"),
        ({"2": {"sigma": [80.0, 1.0]}}, r"presets\['2'\] must be a dict with one or more of .*'sigmas'"),
        ({"2": {"sigmas": "80, 1"}}, r"presets\['2'\] must hold numbers"),
        ({"2": {"gamma": None}}, r"presets\['2'\] must hold numbers"),
        ({"2": {"sigmas": [80.0]}}, r"presets\['2'\] of the config is no schedule. sigmas must hold 2 levels"),
        ({"2": {"sigmas": [90.0, 1.0]}}, r"presets\['2'\] of the config is no schedule. .*above sigma_max=80"),
        ({"2": {"gamma": [0.5]}}, r"presets\['2'\] of the config is no schedule. gamma must be"),
        ({"18": {"gamma": 1.5}}, r"presets\['18'\] of the config is no schedule. gamma must lie"),
        ({"2": {"gamma": 0.5, "target_sigmas": [1.0, 0.002]}}, "no schedule. target_sigmas and gamma contradict"),
    ],
)
def test_presets_are_checked_when_they_are_loaded(presets, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        CTMScheduler(presets=presets)
    if all(isinstance(steps, str) for steps in presets):
        CTMScheduler().save_pretrained(tmp_path)
        path = tmp_path / "scheduler_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "presets": presets}))
        with pytest.raises(ValueError, match=message):
            CTMScheduler.from_pretrained(tmp_path)


def test_presets_may_be_left_behind():
    config = CTMScheduler(presets={"2": {"sigmas": [80.0, 1.0]}}).config
    with pytest.raises(ValueError, match=r"above sigma_max=40.* Pass `presets=None`"):
        CTMScheduler.from_config(config, sigma_max=40.0)
    assert CTMScheduler.from_config(config, sigma_max=40.0, presets=None).sigmas[0] == 40


def test_gamma_of_the_config_is_the_default():
    assert torch.equal(run(CTMScheduler(gamma=0.7)), run(CTMScheduler(), gamma=0.7))
    assert torch.equal(run(CTMScheduler(gamma=0.7), gamma=0.0), run(CTMScheduler()))
    for same in (0.7, [0.7] * 4, torch.tensor(0.7).double(), torch.full((4,), 0.7).double(), np.full(4, 0.7)):
        assert torch.equal(run(CTMScheduler(), gamma=same), run(CTMScheduler(gamma=0.7)))
    assert not torch.equal(run(CTMScheduler(gamma=0.7), seed=1), run(CTMScheduler(gamma=0.7), seed=2))
    assert torch.equal(run(CTMScheduler(gamma=0.0), seed=1), run(CTMScheduler(gamma=0.0), seed=2))
    # one step has no place for noise
    assert torch.equal(run(CTMScheduler(gamma=1.0), steps=1, seed=1), run(CTMScheduler(gamma=0.0), steps=1, seed=2))


# Errors ---------------------------------------------------------------------------------------------------------------


NOT_NUMBERS = ["0.5", ["0.5"], [None, 0.5], {"a": 1.0}, 1j]


@pytest.mark.parametrize(
    "gamma, message",
    [
        *((gamma, r"gamma must lie in \[0, 1\]") for gamma in (-0.1, 1.0001, math.nan, math.inf, [0.5, 2.0, 0.0])),
        *((gamma, r"one value per step \(3\)") for gamma in ([0.5], [], [[0.5, 0.5, 0.5]], [0.5] * 4)),
        *((gamma, "gamma must be a number or a list of numbers") for gamma in NOT_NUMBERS),
    ],
)
def test_gamma_that_is_refused(gamma, message):
    with pytest.raises(ValueError, match=message):
        CTMScheduler().set_timesteps(3, gamma=gamma)
    if isinstance(gamma, float):
        with pytest.raises(ValueError, match=message):
            CTMScheduler(gamma=gamma)


@BOTH
@pytest.mark.parametrize(
    "given, message",
    [
        ({}, "exactly one of"),
        ({"num_inference_steps": 2, "sigmas": [1.0]}, "exactly one of"),
        ({"timesteps": [0.1], "sigmas": [1.0]}, "exactly one of"),
        *(({"num_inference_steps": steps}, "whole number >= 1") for steps in (0, -3, 2.0, "2")),
        *(({"sigmas": levels}, "one value per step") for levels in ([], [[80.0, 1.0]], 80.0)),
        *(({"sigmas": wrong}, "sigmas must be a number or a list of numbers") for wrong in NOT_NUMBERS),
        ({"timesteps": "0.5"}, "timesteps must be a number or a list of numbers"),
    ],
)
def test_levels_that_are_refused(cls, given, message):
    with pytest.raises(ValueError, match=message):
        cls().set_timesteps(**given)


POSITIVE = ["sigma_min", "sigma_max", "sigma_data", "rho", "timestep_scale"]


@BOTH
@pytest.mark.parametrize(
    "config, message",
    [
        *(({name: 0}, f"{name} must be a positive number") for name in POSITIVE),
        *(({"rho": value}, "rho must be a positive number") for value in (-1.0, math.nan, math.inf, "1", None)),
        ({"sigma_min": 3.0, "sigma_max": 2.0}, "sigma_min=3.0 must be below sigma_max=2.0"),
        ({"prediction_type": "F"}, "prediction_type='F' is not known.*'edm'"),
        ({"num_train_timesteps": 0}, "num_train_timesteps must be a whole number >= 1"),
        ({"num_diffusion_timesteps": -1}, "num_diffusion_timesteps must be a whole number >= 1"),
    ],
)
def test_numbers_of_the_config_that_are_refused(cls, config, message):
    with pytest.raises(ValueError, match=message):
        cls(**config)


@BOTH
@pytest.mark.parametrize("source", ["sigmas", "timesteps"])
@pytest.mark.parametrize("levels", [[1.0, 5.0], [5.0, 5.0], [80.0, 5.0, 6.0], [float("nan")], [5.0, float("nan"), 1.0]])
def test_levels_that_do_not_descend(cls, source, levels):
    values = levels if source == "sigmas" else [Preconditioning().c_noise(level).item() for level in levels]
    with pytest.raises(ValueError, match=f"{source} must be finite and strictly descending"):
        cls().set_timesteps(**{source: values})


@BOTH
@pytest.mark.parametrize("source", ["sigmas", "timesteps"])
def test_levels_outside_the_range(cls, source):
    def give(*levels):
        values = levels if source == "sigmas" else [Preconditioning().c_noise(level).item() for level in levels]
        scheduler = cls()
        scheduler.set_timesteps(**{source: values})
        return scheduler.sigmas[0]

    with pytest.raises(ValueError, match=f"{source} ends at noise level 0.001.*leave it out"):
        give(80.0, 0.001)
    with pytest.raises(ValueError, match=f"{source} starts at noise level 90, above sigma_max=80"):
        give(90.0, 1.0)
    if cls is CTMScheduler:  # the end of its last step
        with pytest.raises(
            ValueError, match=f"{source} ends at noise level 0.002.*sigma_min, is added for you: leave it out"
        ):
            give(80.0, 0.002)
    else:  # there its last step starts, and leads to 0
        give(80.0, 0.002)
    assert 79.99 < give(80.0 * (1 + 3e-5), 0.0021) <= 80  # rounding is no error and does not leave the range


INTEGERS = [3, np.int64(3), torch.tensor(3), torch.tensor([3, 3])]


@BOTH
@pytest.mark.parametrize("timestep", INTEGERS)
def test_integer_timesteps(cls, timestep):
    scheduler, x = cls(), randn(2, 3)
    with pytest.raises(ValueError, match="Integer timesteps"):
        scheduler.step(x, timestep, x)
    with pytest.raises(ValueError, match="Integer timesteps"):
        scheduler.scale_model_input(x, timestep)
    with pytest.raises(ValueError, match="Integer timesteps"):
        scheduler.add_noise(x, x, timestep)
    for several in ([17, 5], np.array([17, 5]), torch.tensor([17, 5])):
        with pytest.raises(ValueError, match="timesteps are c_noise values .* not indices"):
            scheduler.set_timesteps(timesteps=several)
        with pytest.raises(ValueError, match="Integer timesteps"):
            scheduler.add_noise(x, x, several)


@BOTH
def test_step_after_the_end(cls):
    scheduler = set_to(cls(), 2)
    x = sampling_loop(scheduler, some_network, 80 * randn(1, 3))
    for call in (lambda: scheduler.step(x, scheduler.timesteps[-1], x), lambda: scheduler.scale_model_input(x, 1.0)):
        with pytest.raises(ValueError, match="All steps are done; call `set_timesteps`"):
            call()


# Networks of other families -------------------------------------------------------------------------------------------

LINEAR = {"num_diffusion_timesteps": 1000, "beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}
FLOW = {"prediction_type": "flow_prediction", "num_diffusion_timesteps": 1000, "sigma_min": 1 / 999, "sigma_max": 80.0}
FAMILIES = {
    "DDPM": (DDPMScheduler(), {"prediction_type": "epsilon", **LINEAR}),
    "DDIM v": (DDIMScheduler(prediction_type="v_prediction"), {"prediction_type": "v_prediction", **LINEAR}),
    "DPM sample": (DPMSolverMultistepScheduler(prediction_type="sample"), {"prediction_type": "sample", **LINEAR}),
    "DPM flow": (DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True), FLOW),
    "trained": (
        DDPMScheduler(num_train_timesteps=4, trained_betas=np.array([0.01, 0.02, 0.5, 0.9])),
        {"prediction_type": "epsilon", "num_diffusion_timesteps": 4, "trained_betas": [0.01, 0.02, 0.5, 0.9]},
    ),
    "4,000 timesteps": (
        DDPMScheduler(num_train_timesteps=4000, beta_schedule="squaredcos_cap_v2"),
        {"prediction_type": "epsilon", "num_diffusion_timesteps": 4000, "beta_schedule": "squaredcos_cap_v2"},
    ),
    "flow": (FlowMatchEulerDiscreteScheduler(shift=3.0), FLOW),
    "500 flow": (
        FlowMatchEulerDiscreteScheduler(num_train_timesteps=500),
        {**FLOW, "num_diffusion_timesteps": 500, "sigma_min": 1 / 499},
    ),
    "flow Heun": (FlowMatchHeunDiscreteScheduler(), FLOW),
    "score": (
        ScoreSdeVeScheduler(sigma_max=50.0),
        {"prediction_type": "score", "sigma_min": 0.02, "sigma_max": 100.0},
    ),
    "consistency": (
        CMStochasticIterativeScheduler(sigma_data=0.6, sigma_max=70.0),
        {"prediction_type": "consistency", "timestep_scale": 1000.0, "sigma_data": 0.6, "sigma_max": 70.0, "rho": 7.0},
    ),
}


@BOTH
@pytest.mark.parametrize("family", FAMILIES)
def test_configs_of_diffusers_schedulers_are_read(cls, family, tmp_path):
    theirs, expected = FAMILIES[family]
    theirs.save_pretrained(tmp_path)
    partial = {"_class_name": type(theirs).__name__}  # what files leave out is the default of the class
    partial |= {k: v for k, v in theirs.config.items() if k not in theirs.config.get("_use_default_values", [])}
    read = [cls.from_config(theirs.config), cls.from_pretrained(tmp_path), cls.from_config(partial)]
    for ours in read:
        assert {name: ours.config[name] for name in expected} == expected
        assert ours.config.num_train_timesteps == 18 and "clip_sample_range" not in ours.config  # nothing of theirs
        assert not ours.config.get("clip_sample")
        assert ours.preconditioning == read[0].preconditioning
    if "beta_schedule" in theirs.config and "flow" not in family:  # the levels of the first and of the last timestep
        abar = theirs.alphas_cumprod.double()
        levels = ((1 - abar) / abar).sqrt()
        close(torch.tensor([read[0].config.sigma_min, read[0].config.sigma_max]).double(), levels[[0, -1]], rtol=1e-6)
        assert read[0].timesteps[0].item() == pytest.approx(len(levels) - 1, abs=1e-3)
    again = CTMScheduler.from_config(EDMHeunScheduler.from_config(read[0].config).config)
    assert again.preconditioning == read[0].preconditioning
    once = own_config(theirs.config)
    assert own_config(once) == once


@BOTH
def test_terminal_timestep_without_signal_is_left_out(cls):
    ours = cls.from_config(DDIMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction").config)
    assert ours.config.rescale_betas_zero_snr is True
    assert ours.timesteps[0].item() == pytest.approx(998, abs=1e-3) and ours.init_noise_sigma < 1e5


@BOTH
def test_the_authors_edm_file_is_read(cls):
    """Of the Hub's copy of their ImageNet-64 teacher; no scheduler of diffusers has sigma_data and "sample"."""
    numbers = {"sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5, "prediction_type": "sample"}
    for name in ("HeunDiscreteScheduler", "KarrasEDMScheduler"):  # a class with betas or one that never was
        ours = cls.from_config({"_class_name": name, "num_train_timesteps": 40, **numbers})
        assert ours.preconditioning == Preconditioning(0.5, 1000.0, "edm")


@BOTH
def test_what_the_first_versions_of_diffusers_said_is_heard(cls):
    for beside in ({"_class_name": "DDPMScheduler"}, {"beta_schedule": "linear"}):
        for epsilon, kind in ((False, "sample"), (True, "epsilon")):
            assert cls.from_config({**beside, "predict_epsilon": epsilon}).config.prediction_type == kind


@BOTH
@pytest.mark.parametrize(
    "config, message",
    [
        (
            {"_class_name": "ScoreSdeVpScheduler", "beta_min": 0.1, "beta_max": 20, "sampling_eps": 1e-3},
            "continuous times",
        ),
        ({"_class_name": "CogVideoXDDIMScheduler"}, "snr_shift_scale=3.0"),
        (
            EulerDiscreteScheduler(timestep_type="continuous", prediction_type="v_prediction").config,
            "shows ln.sigma. / 4",
        ),
        (DPMSolverMultistepScheduler(use_flow_sigmas=True).config, "only with 'flow_prediction'"),
        (LCMScheduler().config, "no denoiser"),
        (EDMEulerScheduler(prediction_type="v_prediction").config, "-F, is not supported"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1}, "no levels between its ends"),
        (
            {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": "9"},
            "num_train_timesteps must be a whole",
        ),
        ({"_class_name": "DDPMScheduler", "num_train_timesteps": -1}, "num_diffusion_timesteps must be a whole"),
        ({"_class_name": "DDPMScheduler", "beta_start": "x"}, "beta_start='x'"),
        ({"_class_name": "DDPMScheduler", "trained_betas": ["x"]}, "trained_betas must be"),
        ({"_class_name": "DDPMScheduler", "trained_betas": 3}, "two or more noise levels"),
        ({"_class_name": "ScoreSdeVeScheduler", "sigma_min": None}, "sigma_min must be a positive"),
    ],
)
def test_configs_whose_levels_are_others_or_none_are_refused(cls, config, message):
    with pytest.raises(ValueError, match=message):
        cls.from_config(config)


KINDS = ["epsilon", "v_prediction", "sample", "flow_prediction", "score"]


def exact_pair(kind, data, network_class):
    """An exact network of a family, and the config of our scheduler for it."""
    if kind in ("flow_prediction", "score"):
        theirs = {"flow_prediction": FlowMatchEulerDiscreteScheduler, "score": ScoreSdeVeScheduler}[kind]()
        return network_class(kind, data), {**EDMHeunScheduler.from_config(theirs.config).config, "sigma_max": 80.0}
    theirs = DDPMScheduler(prediction_type=kind)
    return network_class(kind, data, theirs.alphas_cumprod), EDMHeunScheduler.from_config(theirs.config).config


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gamma", [0.0, 0.5])
def test_exact_networks_of_every_family_give_the_exact_sample(kind, gamma):
    data = GaussianData(0.3, mean=0.2)
    network, config = exact_pair(kind, data, ParametrizedCTM)
    scheduler = CTMScheduler.from_config(config)
    low, high = scheduler.config.sigma_min, scheduler.config.sigma_max
    x = high * randn(4, 5)
    close(sampling_loop(set_to(scheduler, 1), network, x), data.jump(x, high, low), rtol=1e-5, atol=1e-5)
    scheduler.set_timesteps(4, gamma=gamma)
    images = sampling_loop(scheduler, network, high * randn(4, 20000), seeded(9))
    if gamma == 0:
        x = high * randn(4, 20000)
        close(images, data.jump(x, high, low), rtol=1e-4, atol=1e-4)
    assert images.mean().item() == pytest.approx(0.2, abs=0.01)
    assert images.std().item() == pytest.approx((0.3**2 + low**2) ** 0.5, rel=0.01)


@pytest.mark.parametrize("kind", KINDS)
def test_heun_samples_teachers_of_every_family(kind):
    data = GaussianData(0.5, mean=0.1)
    network, config = exact_pair(kind, data, ParametrizedNetwork)
    scheduler, errors = EDMHeunScheduler.from_config(config), []
    x = scheduler.config.sigma_max * randn(2, 64)
    for steps in (20, 40, 80):
        out = sampling_loop(set_to(scheduler, steps), network, x)
        errors.append((out - data.jump(x, scheduler.config.sigma_max, 0.0)).abs().max().item())
    assert errors[2] < 5e-3 and errors[0] / errors[1] > 3 and errors[1] / errors[2] > 3  # second order
    times = torch.as_tensor(network.shown[-(2 * 80 - 1) :])
    close(times.double(), scheduler.timesteps.double(), rtol=1e-6)


@BOTH
def test_levels_that_the_network_never_saw_are_refused(cls):
    for options in ({"sigma_min": 0.002}, {"sigma_min": 0.02, "sigma_max": 200.0}):
        with pytest.raises(ValueError, match=r"must lie in \[0.0100013, 157.407\]"):
            cls(prediction_type="epsilon", beta_schedule="linear", **options)
    with pytest.raises(ValueError, match="needs the levels of its timesteps: pass beta_schedule"):
        cls(prediction_type="epsilon")
    with pytest.raises(ValueError, match="invert_sigmas=True runs from data to noise"):
        cls.from_config(FlowMatchEulerDiscreteScheduler(invert_sigmas=True).config)


@pytest.mark.parametrize("theirs", [EDMEulerScheduler, EDMDPMSolverMultistepScheduler])
@pytest.mark.parametrize("kind", [*KINDS, "consistency"])
def test_diffusers_edm_samplers_are_refused_for_other_networks(theirs, kind, tmp_path):
    """They would read the "epsilon" of a DDPM as EDM's F: the sample is garbage, and nothing says so."""
    data = GaussianData(0.5)
    if kind == "consistency":
        network, config = ParametrizedCTM(kind, data), CTMScheduler(prediction_type=kind, timestep_scale=1000.0).config
    else:
        network, config = exact_pair(kind, data, ParametrizedCTM)
    refusal = pytest.raises(ValueError, match=f"samples EDM networks only, and this one has prediction_type='{kind}'")
    with refusal:
        CTMPipeline(network, theirs.from_config(config))
    CTMScheduler.from_config(config).save_pretrained(tmp_path)
    pipe = CTMPipeline(network, CTMScheduler.from_config(config))
    for scheduler in (theirs.from_config(config), theirs.from_pretrained(tmp_path), theirs()):
        pipe.scheduler = scheduler
        with refusal:
            pipe()
        with refusal:
            pipe.save_pretrained(tmp_path / "pipeline")
    back = CTMScheduler.from_config(theirs.from_config(config).config)  # and the way back loses nothing
    assert back.preconditioning == CTMScheduler.from_config(config).preconditioning
    pipe.scheduler = back
    assert pipe(output_type="latent", generator=seeded()).images.isfinite().all()
    pipe.scheduler = CTMScheduler()
    with pytest.raises(
        ValueError, match="has prediction_type='edm'.*but this network was loaded with prediction_type='" + kind
    ):
        pipe()


def test_a_consistency_model_has_no_score():
    network = ParametrizedNetwork("consistency", GaussianData(0.5))
    heun = EDMHeunScheduler.from_config(CMStochasticIterativeScheduler().config)
    with pytest.raises(ValueError, match="needs a denoiser.*CTMUNet2DModel.from_unet"):
        CTMPipeline(network, heun)
    # a CTM that started from one has learned it
    CTMPipeline(ParametrizedCTM("consistency", GaussianData(0.5)), heun)
