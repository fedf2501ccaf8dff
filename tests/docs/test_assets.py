# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""The embedded checkpoints load and do what the documents say, and the folder stays small."""

import json

import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DModel

import diffusers_ctm
from helpers.places import ROOT
from training.cli.shared_options import DataOptions
from training.data.images import ImageDataset, to_sample
from training.frozen.classifier import load_saved


ASSETS = ROOT / "assets"


def load(name):
    pipe = DiffusionPipeline.from_pretrained(ASSETS / name)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_assets_are_small():
    sizes = {
        path: path.lstat().st_size for path in ASSETS.rglob("*") if path.is_file()
    }  # of links, not what they lead to
    assert max(sizes.values()) < 8 * 2**20 and sum(sizes.values()) < 25 * 2**20


@pytest.mark.parametrize("data", ["digits", "emoji", "mnist"])
def test_checkpoints_are_a_teacher_and_its_student(data):
    teacher, student = load(f"{data}-edm"), load(f"{data}-ctm")
    assert type(teacher.unet) is UNet2DModel and isinstance(student.unet, diffusers_ctm.CTMUNet2DModel)
    names = ("sigma_data", "sigma_min", "sigma_max", "rho", "timestep_scale", "prediction_type")
    assert all(teacher.scheduler.config[name] == student.scheduler.config[name] for name in names)


def test_student_has_the_schedules_of_the_report():
    report = json.loads((ASSETS / "tune" / "tune.json").read_text())
    student = load("digits-ctm")
    assert student.config.id2label[7] == "7"
    assert student.scheduler.config.presets == {str(row["steps"]): row["preset"] for row in report["results"]}
    assert all(row["improvement"]["better"] and not report["options"]["force"] for row in report["results"])
    student(num_inference_steps=2)
    assert student.scheduler.sigmas.tolist() == pytest.approx([*report["results"][0]["preset"]["sigmas"], 0.002])


def nearest_class(images):
    """The class of the nearest digit of the data, and the distance to it, for images in [-1, 1]."""
    pixels, labels = ImageDataset(DataOptions(label_column="label"))[list(range(1797))]
    distance, index = torch.cdist(images.flatten(1), to_sample(pixels).flatten(1)).min(dim=1)
    return labels[index], distance


@pytest.mark.parametrize(
    "options", [{"num_inference_steps": 1}, {"num_inference_steps": 4, "gamma": 0.5}, {"num_inference_steps": 2}]
)
def test_student_draws_the_digit_it_is_asked(options):
    labels = torch.arange(10).repeat(10)
    images = load("digits-ctm")(
        class_labels=labels, generator=torch.Generator().manual_seed(0), output_type="latent", **options
    ).images
    classes, distance = nearest_class(images)
    assert (classes == labels).float().mean() > 0.9
    noise = nearest_class(torch.rand(100, 1, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1)[1]
    assert distance.mean() < noise.mean() / 2


@pytest.mark.parametrize(
    "data, classes, copies, shape, nearer",
    [("digits", 10, 20, (1, 8, 8), 2), ("emoji", 9, 3, (6, 16, 16), 2), ("mnist", 10, 1, (1, 28, 28), 1.3)],
)
def test_student_ends_where_its_teacher_does(data, classes, copies, shape, nearer):
    labels = torch.arange(classes).repeat(copies)
    latents = torch.randn(len(labels), *shape, generator=torch.Generator().manual_seed(0))
    options = {"class_labels": labels, "latents": latents, "output_type": "latent"}
    teacher, student = load(f"{data}-edm"), load(f"{data}-ctm")
    heun, euler = (teacher(num_inference_steps=steps, **options).images for steps in (18, 1))
    one, eight = (student(num_inference_steps=steps, gamma=0.0, **options).images for steps in (1, 8))
    errors = [(images - heun).square().mean().sqrt().item() for images in (eight, one, euler)]
    assert max(errors[:2]) < errors[2] / nearer  # Euler's step is the untrained student
    assert errors[0] < errors[1] or data == "emoji"  # whose student is as far in eight steps as in one


GROUPS = ["smileys", "people", "animals", "food", "travel", "activities", "objects", "symbols", "flags"]


@pytest.mark.parametrize("name", ["emoji-edm", "emoji-ctm"])
def test_emoji_have_groups_and_a_license(name):
    pipe = load(name)
    assert [pipe.config.id2label[i] for i in range(9)] == GROUPS and pipe.num_classes == 9
    assert pipe.config.null_class == 9 and pipe.unet.dtype == pipe.vae.dtype == torch.float32
    assert pipe.image_size == (64, 64)
    assert json.loads((ASSETS / name / "training.json").read_text())["license"] == "cc-by-4.0"


def test_mnist_is_the_digit_that_is_asked():
    labels = torch.arange(10).repeat(10)
    images = load("mnist-ctm")(class_labels=labels, generator=torch.Generator().manual_seed(0), output_type="pt").images
    classes = load_saved(ASSETS / "mnist-features").classify((images * 255).round().to(torch.uint8))
    assert (classes == labels).float().mean() > 0.9


def test_emoji_are_of_the_group_that_is_asked():
    labels = torch.arange(9).repeat(20)
    images = load("emoji-ctm")(class_labels=labels, generator=torch.Generator().manual_seed(0), output_type="pt").images
    classes = load_saved(ASSETS / "emoji-features").classify((images * 255).round().to(torch.uint8))
    assert (classes == labels).float().mean() > 0.4  # a ninth by chance, 0.7 of real images held out
