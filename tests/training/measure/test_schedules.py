# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Every point of the search is a schedule, and the search finds the best one."""

import numpy as np
import pytest
import torch

from diffusers_ctm import CTMScheduler
from diffusers_ctm.trajectory import karras_ramp
from training.measure.schedules import Space, mean, run_search


@pytest.mark.parametrize("steps", [1, 2, 3, 6])
@pytest.mark.parametrize("final_sigma", [None, 0.0, 0.05])
@pytest.mark.parametrize("first_level", [True, False])
def test_every_point_is_a_schedule(steps, final_sigma, first_level):
    scheduler = CTMScheduler(final_sigma=final_sigma)
    space = Space(steps, scheduler, first_level)

    scheduler.set_timesteps(steps, gamma=0.3)
    expected = scheduler.sigmas.clone(), scheduler.target_sigmas.clone()
    karras = space.setting(space.karras(0.3))
    assert karras.sigmas[0] == pytest.approx(80.0) and karras.nfe == steps
    scheduler.set_timesteps(**karras.options)
    torch.testing.assert_close((scheduler.sigmas, scheduler.target_sigmas), expected, rtol=1e-4, atol=1e-6)

    generator = torch.Generator().manual_seed(0)
    directions = space.directions()
    point, moves = space.karras(0.3), 0
    for choice, stride in zip(torch.rand(200, generator=generator), [0.25, 0.1, 0.02, 1.0] * 50):
        moved = space.moved(point, directions[int(choice * len(directions))], stride) if directions else point
        moves += moved != point
        point, schedule = moved, space.setting(moved)
        scheduler.set_timesteps(**schedule.options)  # raises for what is no schedule
        assert first_level or schedule.sigmas[0] == 80.0
        assert all(a > b for a, b in zip(schedule.sigmas, schedule.sigmas[1:])) and schedule.gamma[-1] == 0
    assert moves > 20 or (steps == 1 and (moves > 0) == first_level)


def test_the_search_finds_the_lowest_point():
    space = Space(3, CTMScheduler(), first_level=False)
    wanted, tried = np.array([0.0, 0.31, 0.77, 0.85, 0.4]), []

    def away(setting):
        return np.array([*[karras_ramp(level, *space.range) for level in setting.sigmas], *setting.gamma[:-1]]) - wanted

    def measure(setting):
        tried.append(setting)
        apart = away(setting)
        return [1 + apart @ apart + 0.5 * apart[1] * apart[3], 3.0]

    trials = run_search(space, [0.0, 0.5, 1.0], 300, measure)
    assert list(trials) == tried and len(trials) < 300  # none twice, and it ends
    best = min(trials, key=lambda setting: mean(trials[setting]))
    assert np.abs(away(best)).max() < 0.03 and mean(trials[best]) < 2.001
    assert [setting.gamma for setting in tried[:3]] == [(g, g, 0.0) for g in (0.0, 0.5, 1.0)]
    assert len(run_search(space, [0.0], 7, measure)) == 7
