# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Guided teachers against the formula and the closed form of the guided flow, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    ConsistencyModelPipeline,
    DDPMPipeline,
    DDPMScheduler,
    UNet2DModel,
)

from diffusers_ctm import CTMPipeline, EDMHeunScheduler
from diffusers_ctm.trajectory import karras_sigmas
from helpers.comparing import close
from helpers.exact import ExactDenoiserNetwork, GaussianData, ParametrizedNetwork, randn
from helpers.gaussian_models import save_exact
from helpers.tiny_networks import make_unet_2d
from training.cli.errors import UserError
from training.cli.shared_options import TeacherOptions
from training.likelihood import LikelihoodConfig
from training.measure.options import PairOptions
from training.networks.pipelines import GuidedNetwork, load_pipelines
from training.networks.student import choose_precision, student_scheduler
from training.networks.teacher import Teacher, load_teacher
from training.objective.solvers import SOLVERS
from training.train_ctm import CTMConfig


OWN, OTHER = 0.5, 0.9  # standard deviations of the teacher's and the reference's data


def autoguided(scale):
    """An EDM teacher of N(0, OWN^2) guided by an "epsilon" model of N(0, OTHER^2)."""
    scheduler = EDMHeunScheduler.from_config(DDPMScheduler().config)
    network = ParametrizedNetwork("epsilon", GaussianData(OTHER), DDPMScheduler().alphas_cumprod)
    teacher = ExactDenoiserNetwork(GaussianData(OWN))
    return Teacher(
        teacher, EDMHeunScheduler(sigma_data=0.5), guidance_scale=scale, reference=Teacher(network, scheduler)
    )


def classifier_free(scale):
    """A teacher of N(m, OWN^2) with m = -1, 2 of the classes and 0 without class."""
    network = ExactDenoiserNetwork(GaussianData(OWN), class_shift=[-1.0, 2.0, 0.0])
    return Teacher(network, EDMHeunScheduler(sigma_data=0.5), null_class=2, guidance_scale=scale)


# The formula and the flow ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.3, 1.0, 2.5])
def test_the_guided_denoiser_is_the_formula(scale):
    x, sigma = randn(4, 3, 4, 4), torch.tensor([0.05, 0.4, 3.0, 60.0], dtype=torch.float64)
    own, other = (GaussianData(std).denoiser(x, sigma) for std in (OWN, OTHER))
    teacher = autoguided(scale)
    close(teacher.denoise(x, sigma), other + scale * (own - other), 1e-6, 1e-6)  # through the levels of 1,000 betas
    assert teacher.is_guided == (scale != 1) and teacher.evaluations == (1 if scale == 1 else 2)

    labels = torch.tensor([0, 1, 1, 2])
    means = torch.tensor([-1.0, 2.0, 2.0, 0.0], dtype=torch.float64)[:, None, None, None]
    shift = means * (sigma**2 / (sigma**2 + OWN**2))[:, None, None, None]  # D of N(m, std^2) is that of m = 0 and this
    close(classifier_free(scale).denoise(x, sigma, labels), own + scale * shift, 1e-12, 1e-12)


def slope_of_heun(teacher, exact, labels=None):
    """The order of Heun's method on the guided ODE, from 80 to 0.02, against `exact(x_t, t, s)`."""
    x = 80 * randn(2, 3, 4, 4)
    errors = []
    for steps in (40, 80, 160):
        levels = karras_sigmas(steps + 1, 0.02, 80.0, 7.0).to(torch.float64)[:, None].expand(-1, 2)
        solved = SOLVERS["heun"].solve(lambda x, sigma: teacher.denoise(x, sigma, labels), x, levels)
        errors.append((solved - exact(x, 80.0, 0.02)).abs().max().item())
    assert errors[-1] < 2e-3
    return torch.tensor(errors).log2().diff().neg().min().item()


def test_the_guided_flow_of_two_gaussians_is_its_closed_form():
    """dx/dt = (x - D) / t with D = (w a + (1 - w) b) x, a and b of the two: x_s / x_t = r_a^w r_b^(1 - w)."""
    w = 1.7

    def exact(x, t, s):
        own, other = (((std**2 + s**2) / (std**2 + t**2)) ** 0.5 for std in (OWN, OTHER))
        return x * own**w * other ** (1 - w)

    assert slope_of_heun(autoguided(w), exact) > 1.9


def test_the_guided_flow_of_classes_moves_their_means():
    """Of equal variances, N(m, std^2) against N(0, std^2) gives N(w m, std^2)."""
    means = 3.0 * torch.tensor([2.0, 0.0], dtype=torch.float64)[:, None, None, None]
    exact = GaussianData(OWN, means).jump
    assert slope_of_heun(classifier_free(3.0), exact, torch.tensor([1, 2])) > 1.9


def test_without_class_it_is_one_batch_of_two_and_equals_two_calls():
    network = make_unet_2d(UNet2DModel, num_class_embeds=4)
    scheduler, calls = EDMHeunScheduler(), []
    network.register_forward_pre_hook(lambda _, given: calls.append(len(given[0])))
    x, sigma, labels = randn(3, 3, 8, 8, dtype=torch.float32), torch.tensor([0.1, 1.0, 30.0]), torch.tensor([0, 2, 3])
    guided = Teacher(network, scheduler, null_class=3, guidance_scale=2.0).denoise(x, sigma, labels)
    assert calls == [6]
    plain = Teacher(network, scheduler)
    conditional, null = plain.denoise(x, sigma, labels), plain.denoise(x, sigma, torch.full((3,), 3))
    close(guided, null + 2.0 * (conditional - null), 1e-5, 1e-5)
    close(guided[2], conditional[2], 1e-6, 1e-6)  # its own reference
    assert (guided - conditional)[:2].abs().max() > 1e-3


# Folders --------------------------------------------------------------------------------------------------------------


def save(folder: Path, id2label=None, null_class=None, **changes) -> str:
    network = make_unet_2d(UNet2DModel, **changes)
    CTMPipeline(network, EDMHeunScheduler(), id2label=id2label, null_class=null_class).save_pretrained(str(folder))
    return str(folder)


def load(teacher, reference=None, scale=2.0, **options):
    given = TeacherOptions(teacher, teacher_guidance_scale=scale, guidance_teacher=reference, **options)
    return load_teacher(given)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Saved models: exact ones of N(0, OWN^2) and N(0, OTHER^2), and conditional ones of three classes."""
    root = tmp_path_factory.mktemp("folders")
    labels, swapped = {0: "a", 1: "b", 2: "c"}, {0: "b", 1: "a", 2: "c"}
    paths = {"own": save_exact(root / "own", OWN, ctm=False), "other": save_exact(root / "other", OTHER, ctm=False)}
    paths["classes"] = save(root / "classes", id2label=labels, num_class_embeds=3)
    paths["swapped"] = save(root / "swapped", id2label=swapped, num_class_embeds=3)
    paths["nameless"] = save(root / "nameless", num_class_embeds=3, seed=1)
    paths["null"] = save(root / "null", id2label=labels, null_class=3, num_class_embeds=4)
    paths["null too"] = save(root / "null too", id2label=labels, null_class=3, num_class_embeds=4, seed=1)
    paths["four"] = save(root / "four", num_class_embeds=4)
    paths["large"] = save(root / "large", sample_size=16)
    paths["gray"] = save(root / "gray", in_channels=1, out_channels=1)
    pipes = {
        "consistency": ConsistencyModelPipeline(make_unet_2d(UNet2DModel), CMStochasticIterativeScheduler()),
        "ddpm": DDPMPipeline(make_unet_2d(UNet2DModel), DDPMScheduler()),
    }
    for name, pipe in pipes.items():
        paths[name] = str(root / name)
        pipe.save_pretrained(paths[name])
    return paths


def test_a_reference_is_loaded_with_its_own_preconditioning(folders):
    teacher = load(folders["own"], folders["other"], 1.5)
    assert teacher.reference.preconditioning.sigma_data == OTHER and teacher.preconditioning.sigma_data == OWN
    assert {role: part.name for role, part in teacher.parts.items()} == {
        "teacher": folders["own"], "guidance_teacher": folders["other"]
    }  # fmt: skip
    assert not any(p.requires_grad for part in teacher.parts.values() for p in part.network.parameters())
    x, sigma = randn(2, 3, 8, 8, dtype=torch.float32), torch.tensor([0.2, 1.5])
    own, other = (GaussianData(std).denoiser(x, sigma) for std in (OWN, OTHER))
    close(teacher.denoise(x, sigma), other + 1.5 * (own - other), 1e-5, 1e-6)
    for teacher, reference in (("classes", "nameless"), ("null", "null too")):
        assert load(folders[teacher], folders[reference]).reference is not None
    assert load(folders["null"]).reference is None and load(folders["null"]).evaluations == 2


def test_a_model_without_classes_guides_one_with_classes(folders):
    """As in EDM2's classifier-free presets: D_ref is not told the class."""
    teacher = load(folders["classes"], folders["own"])
    x, sigma, labels = randn(3, 3, 8, 8, dtype=torch.float32), torch.tensor([0.2, 1.5, 7.0]), torch.tensor([0, 2, 1])
    own = teacher.preconditioning.denoise(teacher.network, x, sigma, class_labels=labels)
    other = GaussianData(OWN).denoiser(x, sigma)
    close(teacher.denoise(x, sigma, labels), other + 2.0 * (own - other), 1e-5, 1e-6)
    assert (own - other).abs().max() > 1e-3


@pytest.mark.parametrize(
    "teacher, reference, message",
    [
        ("own", None, "needs --guidance_teacher, or a teacher that was trained with label dropout"),
        ("classes", None, "has no label for 'no class'"),
        ("classes", "swapped", "has the class 0 'b', and --teacher .* 'a'"),
        ("classes", "four", "has num_class_embeds 4, and --teacher .* 3"),
        ("null", "four", "has null_class None, and --teacher .* 3"),
        ("own", "classes", "has num_class_embeds 3, and --teacher .* None"),
        ("own", "large", r"has images of shape \(3, 16, 16\), and --teacher .* \(3, 8, 8\)"),
        ("own", "gray", r"has images of shape \(1, 8, 8\)"),
        ("own", "consistency", "--guidance_teacher .* is a consistency model"),
        ("consistency", "own", "--teacher_guidance_scale is for denoisers"),
        ("own", "nowhere", "--guidance_teacher nowhere.*No such folder"),
    ],
)
def test_what_cannot_guide_is_refused(folders, teacher, reference, message):
    with pytest.raises(UserError, match=message):
        load(folders[teacher], folders.get(reference, reference))


def test_messages_name_the_option_of_the_reference(folders, tmp_path):
    with pytest.raises(UserError, match="--guidance_teacher_revision main is for repositories"):
        load(folders["own"], folders["other"], guidance_teacher_revision="main")
    with pytest.raises(UserError, match="--guidance_teacher .* --guidance_teacher_subfolder vae holds no network"):
        load(folders["own"], folders["other"], guidance_teacher_subfolder="vae")
    make_unet_2d(UNet2DModel).save_pretrained(tmp_path / "bare")
    with pytest.raises(UserError, match="--guidance_teacher .* has no scheduler_config.json.* Save its scheduler"):
        load(folders["own"], str(tmp_path / "bare"))
    path = tmp_path / "bare" / "scheduler_config.json"
    path.write_text(json.dumps({"_class_name": "OddScheduler"}))
    with pytest.raises(UserError, match="--guidance_teacher .* has a OddScheduler.* Give another model"):
        load(folders["own"], str(tmp_path / "bare"))


def test_options_that_would_be_idle_are_refused():
    for options, message in (
        ({"teacher": "t", "guidance_teacher": "r"}, "--guidance_teacher has no use at --teacher_guidance_scale 1"),
        ({"teacher": "t", "teacher_guidance_scale": 0.0}, "--teacher_guidance_scale must be positive"),
        ({"teacher_guidance_scale": 2.0}, "--teacher_guidance_scale needs --teacher"),
        ({"teacher": "t", "guidance_teacher_revision": "x"}, "--guidance_teacher_revision needs --guidance_teacher"),
    ):
        with pytest.raises(UserError, match=message):
            TeacherOptions(**options)
    with pytest.raises(UserError, match="--teacher_guidance_scale has no use with --solver_model ema"):
        CTMConfig(teacher="t", solver_model="ema", teacher_guidance_scale=2.0)
    with pytest.raises(UserError, match="--teacher_guidance_scale has no place here"):
        LikelihoodConfig(teacher="t", teacher_guidance_scale=2.0)


def test_levels_that_the_reference_does_not_know_are_refused(folders):
    """DDPM's are 0.01 to 157: a student has EDM's 0.002 to 80 only in part."""
    teacher = load(folders["own"], folders["ddpm"])
    options = {"teacher": "t", "sigma_max": 80.0}
    with pytest.raises(UserError, match=r"--guidance_teacher .* does not know.* must lie in \[0.01.*by --sigma_min"):
        student_scheduler(teacher, CTMConfig(**options))
    assert student_scheduler(teacher, CTMConfig(**options, sigma_min=0.02)).config.sigma_min == 0.02
    pair = PairOptions(teacher=folders["own"], guidance_teacher=folders["ddpm"], teacher_guidance_scale=2.0)
    with pytest.raises(UserError, match="--guidance_teacher .* does not know"):
        load_pipelines(pair, None, torch.device("cpu"))


def test_rounding_of_the_reference_is_minded_too(folders):
    for reference, chosen in (("other", "auto"), ("ddpm", "no")):
        config = choose_precision(CTMConfig(teacher="t"), load(folders["own"], folders[reference]))
        assert config.mixed_precision == chosen


# Sampling it ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "teacher, reference, label", [("own", "other", None), ("null", "null too", 1), ("null", None, 2)]
)
def test_a_pipeline_samples_the_guided_teacher(folders, teacher, reference, label):
    """As Heun's method with its denoiser, and without another model as the pipeline's own guidance."""
    options = PairOptions(teacher=folders[teacher], guidance_teacher=folders.get(reference), teacher_guidance_scale=1.8)
    pipe = load_pipelines(options, None, torch.device("cpu"))["heun"]
    assert isinstance(pipe.unet, GuidedNetwork)
    start = randn(2, 3, 8, 8, dtype=torch.float32)
    given = {"class_labels": label, "num_inference_steps": 6, "output_type": "latent"}
    drawn = pipe(latents=start, **given).images

    guided = load_teacher(options)
    labels = None if label is None else torch.full((2,), label)
    levels = pipe.scheduler.sigmas.float()
    x = SOLVERS["heun"].solve(
        lambda x, sigma: guided.denoise(x, sigma, labels), start * levels[0], levels[:-1, None].expand(-1, 2)
    )
    x = guided.denoise(x, levels[-2].expand(2), labels)  # the last step ends at 0 and is Euler's
    close(drawn, x, 1e-4, 1e-4)
    if reference is None:
        plain = CTMPipeline(guided.network, guided.scheduler, id2label=guided.id2label, null_class=guided.null_class)
        plain.set_progress_bar_config(disable=True)
        close(drawn, plain(latents=start, guidance_scale=1.8, **given).images, 1e-4, 1e-4)
