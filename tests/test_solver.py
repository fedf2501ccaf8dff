"""The teacher's solvers on flows whose end is known, and against diffusers' own."""

import math

import pytest
import torch
from diffusers import EDMDPMSolverMultistepScheduler
from exact import GaussianData, PixelMixture, randn

from diffusers_ctm.trajectory import karras_sigmas
from training import train_ctm
from training.config import CTMConfig
from training.solver import SOLVERS, dpm_solve


DATA = PixelMixture()


def counted(denoiser):
    def call(x, sigma):
        call.levels.append(sigma)
        return denoiser(x, sigma)

    call.levels = []
    return call


def error(solve, num_steps, sigma_max=10.0, sigma_min=0.1):
    """Root mean square error at the end of a flow that is not linear, and the number of evaluations."""
    grid = karras_sigmas(num_steps + 1, sigma_min, sigma_max, dtype=torch.float64)
    x = sigma_max * randn(40, 1, 2, 2)
    denoiser = counted(DATA.denoiser)
    end = solve(denoiser, grid, x, torch.zeros(40, dtype=torch.long), num_steps)
    exact = DATA.jump(x, torch.tensor(sigma_max), torch.tensor(sigma_min))
    return (end - exact).square().mean().sqrt().item(), len(denoiser.levels)


@pytest.mark.parametrize("name, evaluations", [("heun", 2), ("dpm", 1)])
def test_order_two(name, evaluations):
    errors = []
    for num_steps in (64, 128, 256):
        found, calls = error(SOLVERS[name], num_steps)
        assert calls == evaluations * num_steps
        errors.append(found)
    slopes = [math.log2(a / b) for a, b in zip(errors, errors[1:])]
    assert slopes == pytest.approx([2, 2], abs=0.25)


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
    ours = dpm_solve(data.denoiser, levels[:num_steps], x, torch.zeros(3, dtype=torch.long), num_steps - 1)
    torch.testing.assert_close(ours, theirs.double(), rtol=1e-5, atol=1e-5)


def test_one_dpm_step_is_the_denoisers_jump():
    data, grid = GaussianData(0.5), torch.tensor([4.0, 2.0, 1.0], dtype=torch.float64)
    x, index = 4 * randn(2, 1, 2, 2), torch.tensor([0, 1])
    t, s = grid[index].reshape(-1, 1, 1, 1), grid[index + 1].reshape(-1, 1, 1, 1)
    euler = s / t * x + (1 - s / t) * data.denoiser(x, grid[index])
    torch.testing.assert_close(dpm_solve(data.denoiser, grid, x, index, 1), euler)


@pytest.mark.parametrize("name", SOLVERS)
def test_each_sample_goes_from_its_own_level(name):
    data, grid = GaussianData(0.5), karras_sigmas(65, 0.1, 10.0, dtype=torch.float64)
    index = torch.tensor([0, 20, 44])
    x = grid[index].reshape(-1, 1, 1, 1) * randn(3, 1, 2, 2)
    together = SOLVERS[name](data.denoiser, grid, x, index, 20)
    alone = [SOLVERS[name](data.denoiser, grid, x[i : i + 1], index[i : i + 1], 20) for i in range(3)]
    torch.testing.assert_close(together, torch.cat(alone))
    torch.testing.assert_close(together, data.jump(x, grid[index], grid[index + 20]), rtol=0.02, atol=0)


@pytest.mark.parametrize("solver, evaluations", [("heun", 2), ("dpm", 1)])
@pytest.mark.parametrize("substeps", [1, 3])
def test_substeps_of_the_program(solver, evaluations, substeps):
    """`teacher_solver` takes k levels of the training grid in k * substeps steps, whose ends are levels of that grid."""
    config = CTMConfig(teacher="somewhere", num_train_timesteps=9, solver=solver, solver_substeps=substeps)
    fine = karras_sigmas(8 * substeps + 1, 0.1, 10.0, dtype=torch.float64)
    grid = karras_sigmas(9, 0.1, 10.0, dtype=torch.float64)
    torch.testing.assert_close(fine[::substeps], grid)
    data = GaussianData(0.5)

    class Teacher:
        is_consistency_model = False
        denoise = staticmethod(lambda x, sigma, class_labels: calls(x, sigma))

    calls = counted(data.denoiser)
    index = torch.tensor([0, 3])
    x = grid[index].reshape(-1, 1, 1, 1) * randn(2, 1, 2, 2)
    x_u = train_ctm.teacher_solver(config, Teacher, fine, None)(x, index, 4)
    assert len(calls.levels) == 4 * substeps * evaluations
    torch.testing.assert_close(calls.levels[0], grid[index])
    exact = data.jump(x, grid[index], grid[index + 4])
    assert ((x_u - exact).abs() / exact.abs()).max() < (0.3 if substeps == 1 else 0.1)
