# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""A CTM of a mixture of normals in the plane, whose flow is known, trained by the real loss and network."""

import functools

import pytest
import torch
from diffusers import UNet2DModel

from diffusers_ctm import CTMUNet2DModel
from diffusers_ctm.preconditioning import Preconditioning
from diffusers_ctm.trajectory import heun_step, karras_sigmas
from helpers.exact import GaussianMixture, randn
from training.objective.jumps import Jumps, noised
from training.objective.losses import ScoreMatching, training_loss
from training.objective.objectives import ObjectiveOptions
from training.objective.pool import TrajectoryPool
from training.objective.solvers import SOLVERS
from training.objective.times import TimeSampler, draw_half_lognormal_sigma
from training.run.averages import EMA


SIGMA_DATA = 0.6


def own_problem():
    """Three normals, 256 points at sigma_max and where the flow takes them, by Heun in 600 steps."""
    covs = torch.tensor([[[0.02, 0.0], [0.0, 0.05]], [[0.04, 0.02], [0.02, 0.03]], [[0.03, 0.0], [0.0, 0.03]]])
    data = GaussianMixture([0.5, 0.3, 0.2], [[-0.7, 0.2], [0.5, 0.6], [0.4, -0.7]], covs)
    x = noise = 80 * randn(256, 2, seed=9)
    levels = karras_sigmas(601, dtype=torch.float64)
    for t, t_next in zip(levels[:-1], levels[1:], strict=True):
        x = heun_step(lambda x, t: data.denoiser(x, t), x, t, t_next)
    return data, noise, x


def oracle_problem(oracle):
    """The same from the authors' side: `toy_gmm`, exact to 3e-10."""
    arrays = oracle("toy_gmm.npz")
    data = GaussianMixture(arrays["weights"], arrays["means"], arrays["covs"])
    exact = torch.from_numpy(arrays["xT_G"])
    return data, torch.from_numpy(arrays["xT"]), exact[torch.from_numpy(arrays["xT_s"]).sub(0.002).abs().argmin()]


def train(data, steps, **options):
    """Distill the exact denoiser; the averaged network before training and after each of `steps` iterations."""
    torch.manual_seed(0)
    settings = {"block_out_channels": (32,), "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    settings |= {"sample_size": 1, "in_channels": 2, "out_channels": 2, "layers_per_block": 1, "norm_num_groups": 8}
    unet = UNet2DModel(add_attention=False, **settings)
    torch.nn.init.zeros_(unet.conv_out.weight)
    student = CTMUNet2DModel.from_unet(unet)
    ema = EMA(student, 0.98, warmup=True)
    optimizer = torch.optim.RAdam(student.parameters(), lr=8e-3)
    preconditioning = Preconditioning(SIGMA_DATA)
    config = ObjectiveOptions(**options)
    objective = config.stage_at(0).objective
    sampler = TimeSampler(18, matching="global" if objective.times == "global" else "soft")
    if config.pool_size:
        pool = TrajectoryPool(config, SOLVERS["heun"], sampler, 64, [slice(0, 64)], torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)

    def denoise(x, sigma, labels=None):
        return data.denoiser(x.flatten(1).double(), sigma.double()).reshape(x.shape).float()

    def draw():
        part = torch.multinomial(data.weights, 64, replacement=True, generator=generator)
        noise = torch.randn(64, 2, 1, generator=generator, dtype=torch.float64)
        return (data.means[part] + (torch.linalg.cholesky(data.covs)[part] @ noise)[..., 0]).float()[..., None, None]

    def states(step, x_0, noise):
        """Times, x_t, and x_u where it is known."""
        if config.pool_size:
            return pool.draw(step, slice(0, 64), x_0, None, lambda: noise, denoise, sampler, generator)[:3]
        times = (sampler.draw_between if objective.times == "between" else sampler.draw)(64, generator)
        return times, noised(x_0, times.t, noise), None

    yield ema.module
    for step in range(max(steps)):
        x_0 = draw()
        noise, dsm_noise = (torch.randn(x_0.shape, generator=generator) for _ in range(2))
        ramp = torch.rand(64, generator=generator)
        sigma = draw_half_lognormal_sigma(torch.randn(64, generator=generator), ramp, 0.002, 80.0, 7.0)
        times, x_t, x_u = states(step, x_0, noise)
        jumps = Jumps(
            student,
            ema.module,
            preconditioning,
            times,
            x_t,
            solver=lambda x, levels, labels: SOLVERS["heun"].solve(denoise, x, levels),
            teacher=denoise,
            known_x_u=x_u,
            progress=step / max(steps),
        )
        loss = training_loss(
            functools.partial(objective.terms, options=config),
            jumps,
            lambda: student.last_layer.weight,
            ScoreMatching(noised(x_0, sigma, dsm_noise), sigma, x_0),
            beside=objective.beside(jumps, config),
        )
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
        ema.step(student)
        if step + 1 in steps:
            yield ema.module


POOL = {"pool_size": 8, "pool_refresh": 4}
# Options, iterations, and the part of the error that may be left: measured 0.13 to 0.25, by derivatives 0.58 to 0.78.
CASES = {
    "ctm": ({}, 150, 0.25),
    "ctm from a pool": ({"objective": ["ctm"], **POOL}, 150, 0.25),
    "regression": ({"objective": ["regression"], **POOL}, 150, 0.25),
    "semigroup": ({"objective": ["semigroup"]}, 150, 0.5),
    "eulerian": ({"objective": ["eulerian"]}, 100, 0.7),
    "lagrangian": ({"objective": ["lagrangian"]}, 100, 0.75),
    "lagrangian, full gradient": ({"objective": ["lagrangian"], "lagrangian_gradient": "full"}, 100, 0.9),
}


def errors(problem, options, steps):
    """Mean distance of one jump from sigma_max to the flow's end: before training, after a third, and at the end."""
    data, noise, exact = problem
    x, errors = noise.float()[..., None, None], []
    for network in train(data, (steps // 3, steps), **options):
        with torch.no_grad():
            jumped = Preconditioning(SIGMA_DATA).jump(network, x, torch.tensor(80.0), torch.tensor(0.002))
        errors.append((jumped.flatten(1) - exact).norm(dim=1).mean().item())
    return errors


@pytest.mark.slow
@pytest.mark.parametrize("source, name", [*(("own", name) for name in CASES), ("oracle", "ctm")])
def test_error_against_the_exact_flow_falls(source, name, request):
    problem = own_problem() if source == "own" else oracle_problem(request.getfixturevalue("oracle"))
    options, steps, left = CASES[name]
    untrained, early, late = errors(problem, options, steps)
    assert late < early < untrained and late < left * untrained, (untrained, early, late)
