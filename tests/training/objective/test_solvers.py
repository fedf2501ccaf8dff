# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""The teacher's solvers on flows whose end is known, and against diffusers' own."""

import math

import pytest
import torch
from diffusers import EDMDPMSolverMultistepScheduler

from diffusers_ctm.trajectory import karras_sigmas
from helpers.exact import GaussianData, PixelMixture, randn
from training.objective.solvers import SOLVERS


DATA = PixelMixture()


def down(grid, *starts, steps):
    """The levels of samples that start at these entries of `grid`, shape (steps + 1, samples)."""
    return grid[torch.tensor(starts) + torch.arange(steps + 1)[:, None]]


def error(solve, num_steps, sigma_max=10.0, sigma_min=0.1):
    """Root mean square error at the end of a flow that is not linear, and the number of evaluations."""
    grid, levels = karras_sigmas(num_steps + 1, sigma_min, sigma_max, dtype=torch.float64), []
    x = sigma_max * randn(40, 1, 2, 2)
    end = solve(lambda x, t: levels.append(t) or DATA.denoiser(x, t), x, down(grid, *[0] * 40, steps=num_steps))
    exact = DATA.jump(x, torch.tensor(sigma_max), torch.tensor(sigma_min))
    return (end - exact).square().mean().sqrt().item(), len(levels)


@pytest.mark.parametrize("name, order", [("heun", 2), ("dpm", 2), ("unipc", 3)])
def test_order_and_number_of_evaluations(name, order):
    solver, errors = SOLVERS[name], []
    for num_steps in (64, 128, 256):
        measured, calls = error(solver.solve, num_steps)
        assert calls == solver.evaluations(num_steps)
        errors.append(measured)
    slopes = [math.log2(a / b) for a, b in zip(errors, errors[1:])]
    assert slopes == pytest.approx([order, order], abs=0.3)


def test_unipc_integrates_a_denoiser_that_is_a_parabola_in_ln_level_exactly():
    """x / t changes by the integral of D d(1/t). From the second step on three evaluations determine the parabola."""

    def parabola(x, sigma):
        v = sigma.log().reshape(-1, 1, 1, 1)
        return (1 + 2 * v - 0.5 * v**2).expand_as(x)

    grid = torch.tensor([9.0, 5.0, 2.0, 0.7], dtype=torch.float64)
    x = 9 * randn(1, 1, 2, 2)
    states = [SOLVERS["unipc"].solve(parabola, x, down(grid, 0, steps=steps)) for steps in (1, 2, 3)]
    for row in (1, 2):
        t, s = grid[row], grid[row + 1]
        nodes = torch.linspace((1 / t).item(), (1 / s).item(), 20001, dtype=torch.float64)
        integral = torch.trapezoid(parabola(nodes[:, None, None, None], 1 / nodes).flatten(), nodes)
        torch.testing.assert_close(states[row], s * (states[row - 1] / t + integral), rtol=1e-8, atol=1e-8)


def test_the_first_unipc_step_is_heuns():
    grid = torch.tensor([2.0, 0.5, 0.2], dtype=torch.float64)
    x = 2 * randn(4, 1, 2, 2)
    for steps in (1, 2):
        levels = down(grid, *[0] * 4, steps=steps)
        apart = (
            (SOLVERS["unipc"].solve(DATA.denoiser, x, levels) - SOLVERS["heun"].solve(DATA.denoiser, x, levels))
            .abs()
            .max()
        )
        assert apart == 0 if steps == 1 else apart > 1e-3


def test_dpm_is_that_of_diffusers():
    data, num_steps = GaussianData(0.5), 6
    scheduler = EDMDPMSolverMultistepScheduler(solver_order=2, lower_order_final=False, final_sigmas_type="sigma_min")
    scheduler.set_timesteps(num_steps)
    levels = scheduler.sigmas.double()  # the last is repeated: its step is the identity
    x = 80 * randn(3, 1, 2, 2)
    theirs = x
    for t in scheduler.timesteps[:-1]:
        sigma = levels[scheduler.step_index or 0]
        model_input = scheduler.scale_model_input(theirs, t)
        output = (
            (data.denoiser(theirs, sigma) - theirs * 0.25 / (sigma**2 + 0.25))
            * (sigma**2 + 0.25).sqrt()
            / (sigma * 0.5)
        )
        assert model_input.shape == output.shape
        theirs = scheduler.step(output, t, theirs, return_dict=False)[0]
    ours = SOLVERS["dpm"].solve(data.denoiser, x, down(levels, 0, 0, 0, steps=num_steps - 1))
    torch.testing.assert_close(ours, theirs.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SOLVERS)
def test_each_sample_starts_from_its_own_level(name):
    grid, starts = karras_sigmas(65, 0.1, 10.0, dtype=torch.float64), (0, 20, 44, 5)
    levels, data = down(grid, *starts, steps=20), GaussianData(0.5)
    x = levels[0].reshape(-1, 1, 1, 1) * randn(4, 1, 2, 2)
    together = SOLVERS[name].solve(data.denoiser, x, levels)
    for i in range(4):
        alone = SOLVERS[name].solve(data.denoiser, x[i : i + 1], levels[:, i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone)
    torch.testing.assert_close(together, data.jump(x, levels[0], levels[-1]), rtol=0.04, atol=0.02)
