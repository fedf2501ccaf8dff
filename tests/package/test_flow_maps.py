# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Networks of the average velocity, between pure noise and images: exact flow maps, and diffusers' own sampler."""

import json
import math

import pytest
import torch
from diffusers import FlowMapEulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler

from diffusers_ctm import (
    CTMImg2ImgPipeline,
    CTMInpaintPipeline,
    CTMInversionPipeline,
    CTMPipeline,
    CTMScheduler,
    EDMHeunScheduler,
    LossGuidance,
    log_likelihood,
    steps_gamma_grid,
    trajectory_strip,
)
from diffusers_ctm.preconditioning import Preconditioning
from diffusers_ctm.scheduler_configs import own_config
from diffusers_ctm.scheduling_karras import level_at, ramp_of, start_levels
from diffusers_ctm.trajectory import PURE_NOISE, flow_level, flow_place
from helpers.comparing import close, close_in_float64, seeded
from helpers.exact import AverageVelocityNetwork, ExactNetwork, GaussianData, randn, sampling_loop
from helpers.tiny_networks import make_edm, make_unet_2d
from training.measure.schedules import Space


DATA = GaussianData(0.4, mean=0.1)
FLOW_MAP = {"prediction_type": "flow_prediction", "sigma_min": 0.0, "sigma_max": math.inf}
GAMMAS = [0.0, 0.3, 0.8, 1.0, [0.9, 0.0, 0.5, 1.0]]


def scheduler_of(**changes):
    return CTMScheduler(**{**FLOW_MAP, **changes})


def pipeline(cls=CTMPipeline, scheduler=None, unet=None):
    pipe = cls(unet or AverageVelocityNetwork(DATA), scheduler or scheduler_of())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def noise(batch=2, seed=3):
    return randn(batch, 3, 4, 4, seed=seed, dtype=torch.float32)


def random_network():
    """A network that is no flow map at all, of both times, with outputs of about 1."""
    unet = make_unet_2d(seed=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        for parameter in unet.conv_out.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    return unet


# Exact flow maps ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1, 1000])
@pytest.mark.parametrize("steps, shift", [(1, 1.0), (2, 1.0), (5, 1.0), (5, 3.0), (18, 0.5)])
def test_n_steps_from_pure_noise_equal_one_step(steps, shift, scale):
    scheduler = scheduler_of(num_diffusion_timesteps=scale, shift=shift)
    scheduler.set_timesteps(steps)
    n, states = randn(1, 3, 4, 4), []
    end = sampling_loop(
        scheduler, AverageVelocityNetwork(DATA, scale), scheduler.init_noise_sigma * n, callback=states.append
    )
    close_in_float64(end, 0.1 + 0.4 * n, rtol=0, atol=2e-6)  # levels are float32
    for sigma, output in zip(scheduler.sigmas[1:], states, strict=True):  # and every state is on the trajectory
        expected = 0.1 + n * (0.4**2 + sigma.double() ** 2).sqrt()
        close_in_float64(output.prev_sample / (1 + sigma), expected / (1 + sigma), rtol=0, atol=2e-6)
    tau = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    tau = shift * tau / (1 + (shift - 1) * tau)
    close(scheduler.timesteps.double(), scale * tau[:-1], rtol=1e-6)
    close(scheduler.target_timesteps.double(), scale * tau[1:], rtol=1e-6)


def test_at_pure_noise_formulas_take_their_limits_to_the_last_bit():
    """The network is shown n at 1, g = n - u, and x_s = s n + g, which nothing rounds but these two operations."""
    scheduler = scheduler_of()
    for dtype in (torch.float32, torch.float64):
        n, u = randn(2, 3, dtype=dtype), randn(2, 3, seed=1, dtype=dtype)
        scheduler.set_timesteps(sigmas=[math.inf, 0.7])
        x = scheduler.init_noise_sigma * n
        assert scheduler.init_noise_sigma == PURE_NOISE and scheduler.timesteps[0] == 1000
        assert torch.equal(scheduler.scale_model_input(x, scheduler.timesteps[0]), n)
        output = scheduler.step(u, scheduler.timesteps[0], x)
        s = scheduler.sigmas[1].item()
        assert torch.equal(output.pred_original_sample, n - u)
        assert torch.equal(output.prev_sample, s * n + (n - u))
        assert torch.equal(scheduler.add_noise(u, n, 1000.0), x)


def test_finite_starts_converge_to_pure_noise():
    n, network = randn(4, 5), AverageVelocityNetwork(DATA)
    ends = []
    for sigma_max in (1e2, 1e3, 1e4, math.inf):
        scheduler = scheduler_of(sigma_max=sigma_max)
        scheduler.set_timesteps(3)
        ends.append(sampling_loop(scheduler, network, scheduler.init_noise_sigma * n))
    errors = [(end - ends[-1]).abs().max().item() for end in ends[:3]]
    assert errors[0] == pytest.approx(10 * errors[1], rel=0.1) and errors[1] == pytest.approx(10 * errors[2], rel=0.1)


def test_jumps_from_pure_noise_compose():
    preconditioning, network = Preconditioning(prediction_type="flow_prediction"), AverageVelocityNetwork(DATA)
    t, m, s = (torch.tensor([level] * 3, dtype=torch.float64) for level in (PURE_NOISE, 1.7, 0.0))
    n = randn(3, 4)
    between = preconditioning.jump(network, PURE_NOISE * n, t, m)
    close_in_float64(between, 0.1 + n * math.sqrt(0.4**2 + 1.7**2))
    close_in_float64(preconditioning.jump(network, between, m, s), preconditioning.jump(network, PURE_NOISE * n, t, s))
    close_in_float64(preconditioning.denoise(network, PURE_NOISE * n, t), torch.full_like(n, 0.1))  # the mean image
    close_in_float64(preconditioning.denoise(network, between, m), DATA.denoiser(between, 1.7))


@pytest.mark.parametrize("gamma", GAMMAS)
def test_every_gamma_keeps_the_marginal_variance(gamma):
    count = 40_000
    scheduler = scheduler_of()
    scheduler.set_timesteps(4, gamma=gamma)
    bound, seen = 5 / math.sqrt(2 * count), []

    def check(output):
        i = len(seen)
        sigma, s = scheduler.sigmas[i + 1].item(), scheduler.target_sigmas[i].item()
        assert abs(output.prev_sample.std() / math.sqrt(sigma**2 + 0.16) - 1) < bound
        assert abs(output.pred_noised_sample.std() / math.sqrt(s**2 + 0.16) - 1) < bound
        assert abs(output.prev_sample.mean() - 0.1) < 5 * math.sqrt((sigma**2 + 0.16) / count)
        kept = math.sqrt(1 - scheduler.gammas[i].item() ** 2)
        assert s == pytest.approx(kept * sigma)  # the paper's Algorithm 3, without sigma_min
        seen.append(s)

    x = scheduler.init_noise_sigma * randn(count, 1)
    sampling_loop(scheduler, AverageVelocityNetwork(DATA), x, seeded(1), callback=check)
    assert len(seen) == 4 and seen[-1] == 0


def test_places_of_levels():
    place = torch.tensor([0.0, 0.2, 0.5, 0.999, 1.0], dtype=torch.float64)
    for shift in (0.5, 1.0, 3.0):
        level = flow_level(place, shift)
        theirs = FlowMapEulerDiscreteScheduler(shift=shift).apply_shift(place)
        close_in_float64(level / (1 + level), theirs)
        close_in_float64(flow_place(level, shift), place)
    assert flow_level(place)[0] == 0 and flow_level(place)[-1] == PURE_NOISE
    for config in (scheduler_of().config, scheduler_of(shift=2.0, sigma_max=50.0).config):
        levels = level_at(config, torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64))
        assert [ramp_of(config, level) for level in levels.tolist()] == pytest.approx([0, 0.3, 1])
        starts = start_levels(config, 10, 0.0)
        assert starts[0] == config.sigma_max and starts[3].item() == pytest.approx(levels[1].item())


# diffusers' sampler ---------------------------------------------------------------------------------------------------


def loaded(theirs, folder):
    """A scheduler as a loaded pipeline has it, whose config says its class."""
    theirs.save_pretrained(folder)
    return type(theirs).from_pretrained(folder)


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
@pytest.mark.parametrize("options", [{}, {"shift": 5.0}, {"num_train_timesteps": 500}])
@torch.no_grad()
def test_deterministic_steps_are_those_of_diffusers(steps, options, tmp_path):
    theirs, network = loaded(FlowMapEulerDiscreteScheduler(**options), tmp_path), random_network()
    ours, n = CTMScheduler.from_config(theirs.config), randn(2, 3, 8, 8, dtype=torch.float32)
    theirs.set_timesteps(steps)
    ours.set_timesteps(steps)
    z, x = n, ours.init_noise_sigma * n
    for i in range(steps):
        t, r = theirs.timesteps[i].float(), theirs.config.num_train_timesteps * theirs.sigmas[i + 1].float()
        z = theirs.step(network(z, t, r).sample, theirs.timesteps[i], z, r).prev_sample
        timestep, target = ours.timesteps[i], ours.target_timesteps[i]
        u = network(ours.scale_model_input(x, timestep), timestep, target).sample
        x = ours.step(u, timestep, x).prev_sample
        close(x / (1 + ours.sigmas[i + 1]), z, rtol=0)
    assert z.std() > 0.3
    pipe = pipeline(scheduler=ours, unet=network)
    close(pipe(latents=n, num_inference_steps=steps, output_type="latent").images, z, rtol=0)


@pytest.mark.parametrize("steps", [1, 4])
@torch.no_grad()
def test_a_ctm_of_another_kind_in_diffusers_sampler(steps):
    """By its average velocity, between the levels that it knows."""
    ours, network = CTMScheduler(), random_network()
    ours.set_timesteps(steps)
    n = randn(2, 3, 8, 8, dtype=torch.float32)
    expected = sampling_loop(ours, network, 80 * n)
    levels = ours.sigmas.double()
    taus = levels / (1 + levels)
    theirs, z = FlowMapEulerDiscreteScheduler(), taus[0].float() * n
    theirs.set_timesteps(sigmas=taus[:-1].tolist())
    for tau, tau_next in zip(taus, taus[1:]):
        u = ours.preconditioning.average_velocity(network, z, tau, tau_next)
        z = theirs.step(u, 1000 * tau, z, 1000 * tau_next).prev_sample
    close(1.002 * z, expected, rtol=0)


def test_the_average_velocity_of_every_kind_is_that_of_the_flow():
    tau_t, tau_s = torch.tensor([0.9, 0.5, 0.3]).double(), torch.tensor([0.1, 0.5, 0.0019]).double()
    z, exact = randn(3, 5), AverageVelocityNetwork(DATA, 1.0)
    expected = exact(z, tau_t, tau_s)[0]
    for network, preconditioning in (
        (ExactNetwork(DATA), Preconditioning()),
        (AverageVelocityNetwork(DATA), Preconditioning(prediction_type="flow_prediction")),
    ):
        close_in_float64(preconditioning.average_velocity(network, z, tau_t, tau_s), expected, rtol=1e-9)
    one = torch.tensor(1.0, dtype=torch.float64)  # of the flow itself, pure noise too
    close_in_float64(preconditioning.average_velocity(network, z, one, 0 * one), exact(z, one, 0 * one)[0])


# Configs --------------------------------------------------------------------------------------------------------------


def test_configs_of_flow_maps_are_read(tmp_path):
    theirs = loaded(FlowMapEulerDiscreteScheduler(num_train_timesteps=500, shift=5.0), tmp_path)
    expected = {"sigma_min": 0.0, "sigma_max": PURE_NOISE, "shift": 5.0, "num_diffusion_timesteps": 500}
    once = own_config(theirs.config)
    assert own_config(once) == once
    for config in (theirs.config, once, {"_class_name": "FlowMapEulerDiscreteScheduler", **theirs.config}):
        ours = CTMScheduler.from_config(config)
        assert {name: ours.config[name] for name in expected} == expected
        assert ours.preconditioning == Preconditioning(prediction_type="flow_prediction", num_diffusion_timesteps=500)
    # a config that was never saved does not say its class, and is a flow's: it is told
    live = FlowMapEulerDiscreteScheduler(shift=5.0).config
    assert CTMScheduler.from_config(live).config.sigma_max == 80
    told = CTMScheduler.from_config(live, sigma_min=0.0, sigma_max=math.inf, shift=5.0)
    assert told.config.sigma_max == PURE_NOISE and told.config.sigma_min == 0
    assert CTMScheduler.from_config(FlowMatchEulerDiscreteScheduler(shift=5.0).config).config.shift == 1.0

    heun = EDMHeunScheduler.from_config(theirs.config)  # which needs levels between
    assert (heun.config.sigma_min, heun.config.sigma_max) == (0.002, 80.0)
    assert EDMHeunScheduler.from_config(ours.config).preconditioning == ours.preconditioning


def test_saved_and_loaded_it_samples_the_same(tmp_path):
    presets = {"2": {"sigmas": [math.inf, 1.0]}}
    pipe = pipeline(scheduler=scheduler_of(shift=2.0, gamma=0.4, presets=presets), unet=random_network())
    pipe.save_pretrained(tmp_path)

    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    json.loads((tmp_path / "scheduler" / "scheduler_config.json").read_text(), parse_constant=refuse)
    again = CTMPipeline.from_pretrained(tmp_path)
    for name in ("sigma_min", "sigma_max", "shift", "presets"):
        assert again.scheduler.config[name] == pipe.scheduler.config[name]
    images = [
        one(batch_size=2, num_inference_steps=3, output_type="latent", generator=seeded()).images
        for one in (pipe, again)
    ]
    assert torch.equal(*images)


def test_heun_samples_a_flow_map_by_its_exact_score():
    pipe, errors = pipeline(), []
    pipe.scheduler = EDMHeunScheduler.from_config(pipe.scheduler.config)
    for steps in (40, 80):
        images = pipe(latents=noise(), num_inference_steps=steps, output_type="latent").images
        errors.append((images - DATA.jump(80 * noise(), 80.0, 0.0)).abs().max().item())
    assert errors[1] < 4e-3 and errors[0] / errors[1] > 3  # second order


def test_back_from_heun_it_jumps_from_pure_noise_again(tmp_path):
    ours = scheduler_of(shift=3.0, gamma=0.4)
    heun = loaded(EDMHeunScheduler.from_config(ours.config), tmp_path)
    assert (heun.config.sigma_min, heun.config.sigma_max) == (0.002, 80.0)
    again = CTMScheduler.from_config(EDMHeunScheduler.from_config(heun.config).config)
    for name in ("sigma_min", "sigma_max", "shift", "gamma"):
        assert again.config[name] == ours.config[name]
    assert "_ends" not in again.config
    asked = CTMScheduler.from_config(heun.config, sigma_min=0.01, sigma_max=50.0)
    assert (asked.config.sigma_min, asked.config.sigma_max) == (0.01, 50.0)
    between = EDMHeunScheduler.from_config(scheduler_of(sigma_min=0.01, sigma_max=50.0).config)
    assert CTMScheduler.from_config(between.config).config.sigma_max == 50


@pytest.mark.parametrize(
    "config, message",
    [
        ({"sigma_min": 0.0}, "sigma_min must be a positive number"),
        ({"sigma_max": math.inf}, "sigma_max must be a positive number"),
        ({"prediction_type": "score", "sigma_max": math.inf}, "sigma_max must be a positive number"),
        ({**FLOW_MAP, "sigma_min": -1.0}, "sigma_min must be a positive number"),
        ({**FLOW_MAP, "shift": 0.0}, "shift must be a positive number"),
        ({**FLOW_MAP, "shift": math.inf}, "shift must be a positive number"),
    ],
)
def test_levels_that_a_kind_does_not_know_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        CTMScheduler(**config)


@pytest.mark.parametrize("change", [{"sigma_max": 80.0}, {"sigma_min": 0.002}, {}])
def test_what_needs_levels_between_says_so(change):
    asked = r"needs noise levels between 0 and infinity.*sigma_min=0.002, sigma_max=80.0"
    with pytest.raises(ValueError, match="EDMHeunScheduler " + asked):
        EDMHeunScheduler(**{**FLOW_MAP, **change})
    pipe = pipeline(CTMInversionPipeline, scheduler_of(**change))
    image = torch.full((1, 3, 4, 4), 0.6)
    with pytest.raises(ValueError, match="Inversion " + asked):
        pipe(image)
    with pytest.raises(ValueError, match="Inversion " + asked):
        pipe.decode(noise())
    pipe.unet.eval()
    with pytest.raises(ValueError, match="log_likelihood " + asked):
        log_likelihood(pipe, image, dequantize=False)
    # and the advice helps
    pipe.scheduler = CTMScheduler.from_config(pipe.scheduler.config, sigma_min=0.002, sigma_max=80.0)
    latents = pipe(image, num_inference_steps=40).latents
    close(latents, DATA.jump(2 * image - 1, 0.002, 80.0) / 80, rtol=0, atol=5e-3)
    assert log_likelihood(pipe, image, dequantize=False).bits_per_dim.isfinite().all()


@pytest.mark.parametrize("levels", [[math.inf, 0.0], [5.0, math.inf], [math.nan, 1.0], [-1.0]])
def test_levels_of_a_call_that_are_refused(levels):
    with pytest.raises(ValueError, match="sigmas (must be finite and strictly descending|ends at noise level)"):
        scheduler_of().set_timesteps(sigmas=levels)
    with pytest.raises(ValueError, match="starts at noise level inf, above sigma_max=80|must be finite"):
        scheduler_of(sigma_max=80.0).set_timesteps(sigmas=[math.inf, 1.0])


# Editing, guidance and pictures ---------------------------------------------------------------------------------------


def test_strength_is_a_place_in_the_schedule():
    pipe, image = pipeline(CTMImg2ImgPipeline, scheduler_of(shift=3.0)), torch.full((2, 3, 4, 4), 0.7)
    options = {"latents": noise(), "output_type": "latent", "num_inference_steps": 3}
    close(pipe(image, strength=1.0, **options).images, 0.1 + 0.4 * noise())  # nothing is left of the image
    for strength in (0.25, 0.5):
        level = 3 * strength / (1 - strength)
        expected = DATA.jump(0.4 + level * noise(), level, 0.0)
        close(pipe(image, strength=strength, **options).images, expected, rtol=0, atol=2e-5)
        assert pipe.scheduler.sigmas[0].item() == pytest.approx(level)
    with pytest.raises(ValueError, match="sigma must be a positive number"):
        pipe(image, sigma=math.inf)
    heun = pipeline(CTMImg2ImgPipeline, EDMHeunScheduler.from_config(scheduler_of().config))
    images = heun(image, sigma=2.0, latents=noise(), output_type="latent", num_inference_steps=80).images
    close(images, DATA.jump(0.4 + 2 * noise(), 2.0, 0.0), rtol=0, atol=2e-3)


def test_inpainting_keeps_what_is_known_and_draws_the_rest():
    image, mask = torch.full((1, 3, 4, 4), 0.7), torch.zeros(1, 1, 4, 4)
    mask[..., :2] = 1
    pipe = pipeline(CTMInpaintPipeline)
    result = pipe(image, mask, num_inference_steps=1, latents=noise(), output_type="latent").images
    # the network sees unit noise at tau = 1, whatever is known
    close(result[..., :2], (0.1 + 0.4 * noise())[..., :2])
    close(result[..., 2:], torch.full((2, 3, 4, 2), 0.4))
    result = pipe(image, mask, num_inference_steps=6, batch_size=2000, generator=seeded(), output_type="latent").images
    drawn = result[..., :2]  # values are independent: what is known says nothing of the rest
    assert abs(drawn.mean() - 0.1) < 5 * 0.4 / math.sqrt(drawn.numel())
    assert abs(drawn.std() / 0.4 - 1) < 5 / math.sqrt(2 * drawn.numel())


SLOPE = torch.tensor([0.8, -0.4, 0.0, 2.0])


@pytest.mark.parametrize("on", ["prediction", "image"])
@pytest.mark.parametrize("steps", [1, 3])
def test_a_linear_loss_is_exact_from_pure_noise(steps, on):
    """The posterior of exp(SLOPE x_0) is the data moved by its variance times SLOPE."""
    guidance = LossGuidance(lambda x_0: -(SLOPE * x_0).flatten(1).sum(1), on=on)
    pipe = pipeline(scheduler=scheduler_of(sigma_data=0.4))
    images = pipe(latents=noise(), num_inference_steps=steps, output_type="latent", guidance=guidance).images
    close(images, 0.1 + 0.4 * noise() + 0.16 * SLOPE, rtol=0, atol=2e-5)


def test_pictures_of_runs_from_pure_noise():
    pipe = pipeline()
    strip = trajectory_strip(pipe, 3, latents=noise(), output_type="latent")
    run = pipe(latents=noise(), num_inference_steps=3, output_type="latent").images
    assert torch.equal(strip.states[-1], run) and strip.levels == pytest.approx([PURE_NOISE, 2.0, 0.5, 0.0])
    for estimate in strip.estimates:
        close(estimate, 0.1 + 0.4 * noise())
    shown = trajectory_strip(pipe, 1, latents=0.5 * noise(), output_type="pt").states[0]
    close(shown, ((0.5 * 0.5 * noise() + 1) / 2).clamp(0, 1))  # sigma_data times unit noise
    table = steps_gamma_grid(pipe, (1, 3), (0.0, 0.7), generator=seeded(5), output_type="pt")
    for row, gamma in zip(table, (0.0, 0.7), strict=True):
        for image, steps in zip(row, (1, 3), strict=True):
            alone = pipe(num_inference_steps=steps, gamma=gamma, generator=seeded(5), output_type="pt").images
            close(image[None], alone)


@pytest.mark.parametrize("first_level", [False, True])
def test_every_point_of_a_search_is_a_schedule(first_level):
    scheduler = scheduler_of(shift=2.0)
    space = Space(3, scheduler, first_level)
    scheduler.set_timesteps(3, gamma=0.3)
    start = space.setting(space.karras(0.3))
    assert start.sigmas == pytest.approx(scheduler.sigmas[:-1].tolist(), rel=1e-5)
    point = space.karras(0.3)
    for stride in (0.25, 0.1, 1.0):
        for direction in space.directions():
            point = space.moved(point, direction, stride)
            scheduler.set_timesteps(**space.setting(point).options)  # raises for what is no schedule
            assert scheduler.sigmas[-2] > 0 and (first_level or scheduler.sigmas[0] == PURE_NOISE)


# MeanFlow's network ---------------------------------------------------------------------------------------------------


def test_a_network_of_time_and_interval(tmp_path):
    network = make_edm(target_time=True, target_time_type="interval", time_proj_dim=16, augment_dim=6)
    x, t, s = randn(3, 3, 8, 8, dtype=torch.float32), torch.tensor([1.0, 0.6, 0.3]), torch.tensor([0.0, 0.6, 0.1])
    output = network(x, t, s).sample
    shown = torch.cat([network.time_proj(t), network.time_proj(t - s)], dim=1)
    asked = []
    network.time_embedding.register_forward_pre_hook(lambda module, args: asked.append(args[0]))
    assert torch.equal(network(x, t, s).sample, output) and torch.equal(asked[0], shown)
    assert torch.equal(network(x, t).sample, network(x, t, t).sample)  # no target is no interval: the velocity
    assert torch.equal(output[1], network(x, t).sample[1]) and not torch.equal(output[0], network(x, t).sample[0])
    assert network.has_target_time and network.target_time_embedding is None
    network.save_pretrained(tmp_path)
    assert torch.equal(type(network).from_pretrained(tmp_path)(x, t, s).sample, output)
    with pytest.raises(ValueError, match="target_time_type='interval' is not known; use one of .'separate',."):
        make_edm(target_time_type="interval")
    pipe = pipeline(scheduler=scheduler_of(num_diffusion_timesteps=1), unet=network)
    images = pipe(latents=randn(2, 3, 8, 8, dtype=torch.float32), output_type="latent").images
    n = randn(2, 3, 8, 8, dtype=torch.float32)
    close(images, n - network(n, torch.tensor(1.0), torch.tensor(0.0)).sample)  # MeanFlow's own sampler
