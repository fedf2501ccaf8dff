# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Errors to the teacher's own images on data whose trajectories are known."""

import math

import pytest
import torch

from diffusers_ctm import CTMPipeline, CTMScheduler, EDMHeunScheduler
from helpers.exact import ExactDenoiserNetwork, ExactNetwork, GaussianData
from training.measure.paired import PairedError, why_unlike
from training.measure.sampling import Setting


STD, SIGMA_MAX = 0.1, 20.0  # pixels stay in [-1, 1]: nothing is clipped

SHRINKS = STD / math.sqrt(STD**2 + SIGMA_MAX**2)  # x_0 - mean = (x_T - mean) SHRINKS


def pipeline(ctm=True, std=STD, mean=0.0, class_shift=None, sigma_max=SIGMA_MAX) -> CTMPipeline:
    """The exact CTM, or the exact teacher, of N(mean, std^2)."""
    scheduler = (CTMScheduler if ctm else EDMHeunScheduler)(sigma_min=1e-4, sigma_max=sigma_max, timestep_scale=1.0)
    network = (ExactNetwork if ctm else ExactDenoiserNetwork)(GaussianData(std, mean), class_shift=class_shift)
    pipe = CTMPipeline(network, scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def error(pipe: CTMPipeline, steps: int = 1, heun: int = 200, labels=None, class_shift=None, **options) -> dict:
    teacher = pipeline(ctm=False, class_shift=class_shift)
    return PairedError(teacher, labels, 40, 3, 25, heun, **options)(pipe, Setting("ctm", steps, 0.0))


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_a_perfect_student_has_the_error_of_the_teachers_solver_which_is_of_order_two(steps):
    coarse, fine = (error(pipeline(), steps, heun)["paired"] for heun in (40, 160))
    assert coarse / fine == pytest.approx(16, rel=0.35)
    assert error(pipeline(), steps, 400)["paired"] < 2e-5


@pytest.mark.parametrize("steps", [1, 3])
def test_the_error_of_a_biased_student_is_the_closed_form(steps):
    shifted = error(pipeline(mean=0.2), steps)
    assert shifted["paired"] == pytest.approx(0.2 * (1 - SHRINKS), rel=1e-3)
    # A student that blurs: the error is (1 - 0.7) std, although the noise at the start has few numbers.
    blurred = error(pipeline(std=0.7 * STD), steps)
    assert blurred["paired"] == pytest.approx(0.3 * STD, rel=0.03)


def test_the_error_in_features_is_the_distance_of_the_rounded_images_features():
    def two(images: torch.Tensor) -> torch.Tensor:
        return torch.stack([images.float().mean((1, 2, 3)), images.float()[:, 0, 0, 0]], 1)

    errors = error(pipeline(mean=0.2), network=two)
    assert errors["paired_features"] == pytest.approx(math.sqrt(2) * 127.5 * errors["paired"], rel=0.01)


def test_each_sample_has_its_class():
    shift, labels = [-0.3, 0.3], (torch.arange(40) % 4 == 0).long()
    assert error(pipeline(class_shift=shift), labels=labels, class_shift=shift)["paired"] < 1e-4
    wrong = error(pipeline(class_shift=[-0.3, 0.1]), labels=labels, class_shift=shift)  # in a quarter of the samples
    assert wrong["paired"] == pytest.approx(0.2 * (1 - SHRINKS) / 2, rel=1e-3)


def test_coarse_steps_of_the_teacher_have_an_error_too():
    teacher = pipeline(ctm=False)
    paired = PairedError(teacher, None, 40, steps=200)
    errors = [paired(teacher, Setting("heun", steps))["paired"] for steps in (25, 50, 200)]
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.35) and errors[2] == 0


def test_samples_that_start_elsewhere_or_know_other_classes_have_no_pairs():
    teacher = pipeline(ctm=False)
    assert why_unlike({"ctm": pipeline(), "heun": teacher}) is why_unlike({"heun": teacher}) is None
    assert "starts at level 40, the teacher at 20" in why_unlike({"ctm": pipeline(sigma_max=40.0), "heun": teacher})
    assert "other classes" in why_unlike({"ctm": pipeline(class_shift=[0.0, 0.1]), "heun": teacher})
