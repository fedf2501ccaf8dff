# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""A CTM of a mixture of normals in the plane, whose flow is known, trained by the real loss and network."""

import pytest
import torch
from diffusers import UNet2DModel

from diffusers_ctm import CTMUNet2DModel
from diffusers_ctm.preconditioning import Preconditioning
from diffusers_ctm.trajectory import heun_step, karras_sigmas
from helpers.exact import GaussianMixture, randn
from training.objective.losses import Jumps, ScoreMatching, ctm_loss
from training.objective.solvers import heun_solve
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


def train(data, steps):
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
    sampler = TimeSampler(18)
    generator = torch.Generator().manual_seed(0)

    def denoise(x, sigma):
        return data.denoiser(x.flatten(1).double(), sigma.double()).reshape(x.shape).float()

    def draw():
        part = torch.multinomial(data.weights, 128, replacement=True, generator=generator)
        noise = torch.randn(128, 2, 1, generator=generator, dtype=torch.float64)
        return (data.means[part] + (torch.linalg.cholesky(data.covs)[part] @ noise)[..., 0]).float()[..., None, None]

    yield ema.module
    for step in range(max(steps)):
        x_0 = draw()
        noise, dsm_noise = (torch.randn(x_0.shape, generator=generator) for _ in range(2))
        ramp = torch.rand(128, generator=generator)
        sigma = draw_half_lognormal_sigma(torch.randn(128, generator=generator), ramp, 0.002, 80.0, 7.0)
        loss = ctm_loss(
            Jumps(student, ema.module, preconditioning, sampler.draw(128, generator), x_0, noise),
            lambda x, levels, labels: heun_solve(denoise, x, levels),
            lambda: student.last_layer.weight,
            ScoreMatching(sigma, dsm_noise),
        )
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
        ema.step(student)
        if step + 1 in steps:
            yield ema.module


@pytest.mark.slow
@pytest.mark.parametrize("source", ["own", "oracle"])
def test_error_against_the_exact_flow_falls(source, request):
    data, noise, exact = own_problem() if source == "own" else oracle_problem(request.getfixturevalue("oracle"))
    x, errors = noise.float()[..., None, None], []
    for network in train(data, (50, 150)):
        with torch.no_grad():
            jumped = Preconditioning(SIGMA_DATA).jump(network, x, torch.tensor(80.0), torch.tensor(0.002))
        errors.append((jumped.flatten(1) - exact).norm(dim=1).mean().item())
    untrained, early, late = errors
    assert late < early < untrained and late < untrained / 4, errors
