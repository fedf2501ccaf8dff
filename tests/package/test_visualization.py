# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""The states and jumps that are shown are those of the exact trajectory."""

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_ctm import (
    CTMImg2ImgPipeline,
    CTMPipeline,
    CTMScheduler,
    EDMHeunScheduler,
    gamma_seed_grid,
    steps_gamma_grid,
    trajectory_strip,
)
from helpers.comparing import seeded
from helpers.exact import ExactNetwork, GaussianData, randn


DATA = GaussianData(0.3, mean=0.2)


def pipeline(cls=CTMPipeline, scheduler=None, **options):
    pipe = cls(ExactNetwork(DATA, sigma_data=0.6, **options), scheduler or CTMScheduler(sigma_data=0.6))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
def test_a_strip_is_the_run_and_its_jumps(gamma):
    pipe, options = pipeline(), {"num_inference_steps": 4, "gamma": gamma, "batch_size": 2}
    strip = trajectory_strip(pipe, generator=seeded(), output_type="latent", **options)
    assert len(pipe.unet.calls) == 8
    assert len(strip.levels) == len(strip.states) == len(strip.estimates) == 5
    expected = pipe(generator=seeded(), output_type="latent", **options).images
    torch.testing.assert_close(strip.states[-1], expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(strip.estimates[-1], strip.states[-1]) and strip.levels[-1] == pytest.approx(0.002)
    for level, x_t, estimate in zip(strip.levels, strip.states, strip.estimates, strict=True):
        torch.testing.assert_close(estimate, DATA.jump(x_t, level, 0.002), rtol=1e-5, atol=1e-5)
    for i in range(4):
        follows = torch.isclose(strip.estimates[i], strip.estimates[i + 1], atol=1e-4).all()
        assert bool(follows) == (gamma == 0 or i == 3)  # the ODE does not change its mind


@pytest.mark.parametrize("final, end", [(None, 0.002), (0.0, 0.0), (0.5, 0.5)])
def test_a_strip_of_a_preset_and_of_another_end(final, end):
    presets = {"3": {"sigmas": [70.0, 2.0, 0.7], "target_sigmas": [0.5, 0.7, end]}}
    pipe = pipeline(scheduler=CTMScheduler(sigma_data=0.6, final_sigma=final, presets=presets))
    for steps in (2, 3):
        strip = trajectory_strip(pipe, steps, batch_size=2, generator=seeded(), output_type="latent")
        expected = pipe(num_inference_steps=steps, batch_size=2, generator=seeded(), output_type="latent").images
        torch.testing.assert_close(strip.states[-1], expected, rtol=1e-5, atol=1e-5)
        assert strip.levels[-1] == pytest.approx(end) and (steps == 2 or strip.levels[0] == 70)
        assert torch.equal(strip.estimates[-1], strip.states[-1])
        for level, x_t, estimate in zip(strip.levels[:-1], strip.states, strip.estimates):
            torch.testing.assert_close(estimate, DATA.jump(x_t, level, 0.002), rtol=1e-5, atol=1e-5)


def test_a_strip_as_pictures():
    latents = randn(3, 3, 4, 4, dtype=torch.float32)
    for cls in (CTMPipeline, CTMImg2ImgPipeline):
        strip = trajectory_strip(pipeline(cls), sigmas=[80.0, 1.0], latents=latents)
        assert strip.levels[:2] == [80.0, 1.0]
        for row in (*strip.states, *strip.estimates):
            assert len(row) == 3 and all(isinstance(one, Image.Image) and one.size == (4, 4) for one in row)
    shown = trajectory_strip(pipeline(), 1, latents=latents, output_type="pt").states[0]
    expected = (0.6 / (0.6**2 + 80**2) ** 0.5 * 80 * latents / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(shown, expected, rtol=1e-5, atol=1e-6)


def test_one_latent_at_many_gammas_and_seeds():
    pipe, latent = pipeline(), randn(1, 3, 4, 4, dtype=torch.float32)
    grid = gamma_seed_grid(pipe, (0.0, 0.5, 1.0), np.arange(3, 6), 3, latents=latent, output_type="latent")
    assert len(grid) == 3 and all(row.shape == (3, 3, 4, 4) for row in grid) and len(pipe.unet.calls) == 9
    torch.testing.assert_close(grid[0], DATA.jump(80 * latent, 80.0, 0.002).expand(3, -1, -1, -1).float())
    spread = [float(row.std(0).mean()) for row in grid]
    assert spread[0] == 0 < spread[1] < spread[2]
    expected = pipe(num_inference_steps=3, gamma=0.5, latents=latent, generator=seeded(4), output_type="latent").images
    torch.testing.assert_close(grid[1][1:2], expected)
    drawn = [gamma_seed_grid(pipe, [0.0], [1], generator=seeded(s), output_type="pt")[0] for s in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    classes = pipeline(class_shift=[-5.0, 5.0])
    for label, sign in ((0, -1), (1, 1)):
        rows = gamma_seed_grid(classes, class_labels=label, latents=latent, output_type="latent")
        assert all((sign * row.mean((1, 2, 3)) > 0).all() for row in rows)
    assert isinstance(gamma_seed_grid(pipe)[0][0], Image.Image)


def test_steps_and_gammas_side_by_side():
    steps, gammas = (1, 4, 2), (0.0, 0.5, 1.0)
    for options in ({}, {"class_shift": [-5.0, 5.0]}):
        pipe = pipeline(**options)
        grid = steps_gamma_grid(pipe, steps, gammas, generator=seeded(), output_type="latent")
        assert len(pipe.unet.calls) == 4  # not 3 * (1 + 4 + 2)
        for gamma, row in zip(gammas, grid, strict=True):
            for count, image in zip(steps, row, strict=True):
                alone = pipe(num_inference_steps=count, gamma=gamma, generator=seeded(), output_type="latent").images[0]
                torch.testing.assert_close(image, alone, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(grid[0][1], grid[2][1], atol=0.1)  # noise came in
        assert torch.allclose(grid[0][0], grid[2][0])  # but not in one step
    given = steps_gamma_grid(pipeline(class_shift=[-5.0, 5.0]), (2,), (1.0,), class_labels=1, output_type="latent")
    assert given[0].mean() > 0
    assert isinstance(steps_gamma_grid(pipeline(), (1, 2), (0.0,))[0][1], Image.Image)


def test_offloaded_models_are_freed_and_no_timestep_is_looked_up(monkeypatch):
    monkeypatch.setattr(CTMScheduler, "index_for_timestep", None)
    for function in (steps_gamma_grid, gamma_seed_grid, trajectory_strip):
        pipe, freed = pipeline(), []
        monkeypatch.setattr(pipe, "maybe_free_model_hooks", lambda: freed.append(len(pipe.unet.calls)))  # noqa: B023
        function(pipe)
        assert freed[-1] == len(pipe.unet.calls) > 0  # after the last evaluation


def test_arguments_that_do_not_fit():
    for options, message in (
        ({"steps": []}, "at least one entry"),
        ({"gammas": []}, "at least one entry"),
        ({"gammas": [2.0]}, r"gamma must lie in \[0, 1\]"),
        ({"steps": [1, 0]}, r"steps\[1\]"),
        ({"generator": [seeded()]}, "steps_gamma_grid takes one generator"),
        ({"class_labels": 1}, "this network is unconditional"),
    ):
        with pytest.raises(ValueError, match=message):
            steps_gamma_grid(pipeline(), **options)
    with pytest.raises(ValueError, match="works with CTMScheduler, not with EDMHeunScheduler"):
        steps_gamma_grid(pipeline(scheduler=EDMHeunScheduler(sigma_data=0.6)))
    for options, message in (
        ({"gammas": []}, "at least one entry"),
        ({"seeds": []}, "at least one entry"),
        ({"latents": torch.zeros(2, 3, 4, 4)}, r"latents must have shape \(1, 3, 4, 4\)"),
        ({"gammas": [2.0]}, r"gamma must lie in \[0, 1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            gamma_seed_grid(pipeline(), **options)
    with pytest.raises(ValueError, match="no sample_size"):
        gamma_seed_grid(pipeline(size=None))
    with pytest.raises(ValueError, match="works with CTMScheduler, not with EDMHeunScheduler"):
        trajectory_strip(pipeline(scheduler=EDMHeunScheduler(sigma_data=0.6)))
    with pytest.raises(ValueError, match="this network is unconditional"):
        trajectory_strip(pipeline(), class_labels=1)
