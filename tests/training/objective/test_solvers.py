"""The teacher's solvers on flows whose end is known, and against diffusers' own."""

import math

import pytest
import torch
from diffusers import EDMDPMSolverMultistepScheduler

from diffusers_ctm.trajectory import karras_sigmas
from helpers.exact import GaussianData, PixelMixture, randn
from training.objective.solvers import SOLVERS, dpm_solve, evaluations, heun_solve, unipc_solve


DATA = PixelMixture()


def counted(denoiser):
    def call(x, sigma, *labels):
        call.levels.append(sigma)
        return denoiser(x, sigma)

    call.levels = []
    return call


def down(grid, *index, steps):
    """`levels` and `steps` of samples that start at these entries of `grid`."""
    steps = torch.as_tensor(steps).expand(len(index))
    rows = torch.minimum(torch.arange(int(steps.max()) + 1)[:, None], steps)
    return grid[torch.tensor(index) + rows], steps


def error(solve, num_steps, sigma_max=10.0, sigma_min=0.1):
    """Root mean square error at the end of a flow that is not linear, and the number of evaluations."""
    grid = karras_sigmas(num_steps + 1, sigma_min, sigma_max, dtype=torch.float64)
    x = sigma_max * randn(40, 1, 2, 2)
    denoiser = counted(DATA.denoiser)
    end = solve(denoiser, x, *down(grid, *[0] * 40, steps=num_steps))[-1]
    exact = DATA.jump(x, torch.tensor(sigma_max), torch.tensor(sigma_min))
    return (end - exact).square().mean().sqrt().item(), len(denoiser.levels)


@pytest.mark.parametrize("name, order", [("heun", 2), ("dpm", 2), ("unipc", 3)])
def test_order_and_number_of_evaluations(name, order):
    errors = []
    for num_steps in (64, 128, 256):
        found, calls = error(SOLVERS[name], num_steps)
        assert (
            calls
            == evaluations(name, torch.tensor(num_steps))
            == {"heun": 2, "dpm": 1, "unipc": 1}[name] * num_steps + (name == "unipc")
        )
        errors.append(found)
    slopes = [math.log2(a / b) for a, b in zip(errors, errors[1:])]
    assert slopes == pytest.approx([order, order], abs=0.3)


def test_unipc_integrates_a_denoiser_that_is_a_parabola_in_ln_level_exactly():
    """x / t changes by the integral of D d(1/t). From the second step on three evaluations determine the parabola."""

    def parabola(x, sigma, *_):
        v = sigma.log().reshape(-1, 1, 1, 1)
        return (1 + 2 * v - 0.5 * v**2).expand_as(x)

    grid = torch.tensor([9.0, 5.0, 2.0, 0.7], dtype=torch.float64)
    x = 9 * randn(1, 1, 2, 2)
    states = unipc_solve(parabola, x, *down(grid, 0, steps=3))
    for row in (1, 2):
        t, s = grid[row], grid[row + 1]
        nodes = torch.linspace((1 / t).item(), (1 / s).item(), 20001, dtype=torch.float64)
        integral = torch.trapezoid(parabola(nodes[:, None, None, None], 1 / nodes).flatten(), nodes)
        torch.testing.assert_close(states[row + 1], s * (states[row] / t + integral), rtol=1e-8, atol=1e-8)


def test_the_first_unipc_step_is_heuns():
    grid = torch.tensor([2.0, 0.5, 0.2], dtype=torch.float64)
    x = 2 * randn(4, 1, 2, 2)
    ours, heuns = (solve(DATA.denoiser, x, *down(grid, *[0] * 4, steps=2)) for solve in (unipc_solve, heun_solve))
    assert torch.equal(ours[1], heuns[1]) and (ours[2] - heuns[2]).abs().max() > 1e-3


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
    ours = dpm_solve(data.denoiser, x, *down(levels, 0, 0, 0, steps=num_steps - 1))[-1]
    torch.testing.assert_close(ours, theirs.double(), rtol=1e-5, atol=1e-5)


def test_one_dpm_step_is_the_denoisers_jump():
    data, grid = GaussianData(0.5), torch.tensor([4.0, 2.0, 1.0], dtype=torch.float64)
    x, index = 4 * randn(2, 1, 2, 2), torch.tensor([0, 1])
    t, s = grid[index].reshape(-1, 1, 1, 1), grid[index + 1].reshape(-1, 1, 1, 1)
    euler = s / t * x + (1 - s / t) * data.denoiser(x, grid[index])
    torch.testing.assert_close(dpm_solve(data.denoiser, x, *down(grid, 0, 1, steps=1))[-1], euler)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("steps", [(20, 20, 20, 20), (3, 20, 11, 20)])
def test_each_sample_goes_its_own_way(name, steps):
    """From its own level, a number of steps of its own, with its own label; what is done is not evaluated again."""
    means, grid = torch.tensor([-0.4, 0.0, 0.7], dtype=torch.float64), karras_sigmas(65, 0.1, 10.0, dtype=torch.float64)
    rows, index, labels = [], (0, 20, 44, 5), torch.tensor([2, 0, 1, 0])

    def denoiser(x, sigma, labels):
        rows.append(len(x))
        return GaussianData(0.5, means[labels].reshape(-1, 1, 1, 1)).denoiser(x, sigma)

    x = grid[torch.tensor(index)].reshape(-1, 1, 1, 1) * randn(4, 1, 2, 2)
    levels, steps = down(grid, *index, steps=steps)
    together = SOLVERS[name](denoiser, x, levels, steps, labels)
    assert sum(rows) == int(evaluations(name, steps).sum())
    assert torch.equal(together[0], x) and len(together) == 21
    for i in range(4):
        own = slice(i, i + 1)
        alone = SOLVERS[name](denoiser, x[own], levels[: steps[i] + 1, own], steps[own], labels[own])
        for row, state in enumerate(together):
            torch.testing.assert_close(state[own], alone[min(row, int(steps[i]))])
        exact = GaussianData(0.5, means[labels[i]]).jump(x[own], levels[0, i], levels[steps[i], i])
        torch.testing.assert_close(together[-1][own], exact, rtol=0.04, atol=0.02)
