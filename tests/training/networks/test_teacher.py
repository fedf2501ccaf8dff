# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Teachers of every family: the Hub's layouts, what is refused, and students that start as their teacher."""

import functools
import json
import os
import pickle
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, Value
from diffusers import (
    AutoencoderKL,
    CMStochasticIterativeScheduler,
    ConsistencyModelPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    ScoreSdeVeScheduler,
    UNet2DModel,
    VQModel,
)
from PIL import Image as PILImage
from safetensors.torch import load_file, save_file

from diffusers_ctm import CTMPipeline, CTMUNet2DModel, EDMHeunScheduler
from diffusers_ctm.preconditioning import Preconditioning, condition
from helpers.comparing import seeded
from helpers.exact import randn
from helpers.loopback_hub import LoopbackHub, Repo
from helpers.places import ROOT
from helpers.runs import fresh_accelerate, same  # noqa: F401
from helpers.tiny_networks import make_unet_2d
from training import train_ctm
from training.cli.errors import UserError
from training.cli.shared_options import TeacherOptions
from training.cli.weights import load_pipeline
from training.networks import pipelines
from training.networks.student import choose_precision, student_scheduler
from training.networks.teacher import Teacher, load_teacher
from training.objective.jumps import Jumps, noised
from training.objective.losses import ScoreMatching, training_loss
from training.objective.objectives import OBJECTIVES, ObjectiveOptions
from training.objective.times import TimeSampler
from training.train_ctm import CTMConfig


WEIGHTS = "diffusion_pytorch_model.safetensors"
GOOGLE = {"freq_shift": 1, "flip_sin_to_cos": False, "downsample_padding": 0}
SKIPS = {
    "block_out_channels": (32, 32),
    "time_embedding_type": "fourier",
    "center_input_sample": True,
    "down_block_types": ("SkipDownBlock2D", "AttnSkipDownBlock2D"),
    "up_block_types": ("AttnSkipUpBlock2D", "SkipUpBlock2D"),
    "mid_block_scale_factor": 2**0.5,
    "norm_num_groups": None,
    "attention_head_dim": None,
}
OPENAI = {
    "downsample_type": "resnet",
    "upsample_type": "resnet",
    "resnet_time_scale_shift": "scale_shift",
    "num_class_embeds": 10,
    "attn_norm_num_groups": 8,
}


def write(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def flat(folder: Path, pipeline: str, scheduler_class: str) -> None:
    """Make the layout of diffusers' first months: everything at the top."""
    for name in (WEIGHTS, "config.json"):
        os.rename(folder / "unet" / name, folder / name)
    os.rename(folder / "scheduler" / "scheduler_config.json", folder / "scheduler_config.json")
    shutil.rmtree(folder / "unet")
    shutil.rmtree(folder / "scheduler")
    parts = {"scheduler": ["diffusers", scheduler_class], "unet": ["diffusers", "UNet2DModel"]}
    write(folder / "model_index.json", {"_class_name": pipeline, "_diffusers_version": "0.1.1", **parts})


def old_attention_names(path: Path) -> None:
    names = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    weights = {}
    for name, value in load_file(path).items():
        for new, old in names.items():
            name = name.replace(new, old)
        weights[name] = value
    save_file(weights, path, metadata={"format": "pt"})


class Layouts:
    """Tiny folders as the Hub's repositories are laid out; `network` and `expected` say what must be read."""

    def __init__(self, root: Path):
        self.root, self.network, self.expected = root, {}, {}

        def unet(**changes):
            return make_unet_2d(UNet2DModel, **changes)

        def keep(name, network, expected):
            self.network[name], self.expected[name] = network, expected
            return root / name

        # google/ddpm-cifar10-32: at the top, old names of attention, a scheduler's file that leaves much out
        linear = {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02}
        folder = keep("google/ddpm-cifar10-32", unet(**GOOGLE), Preconditioning(prediction_type="epsilon", **linear))
        DDPMPipeline(self.network["google/ddpm-cifar10-32"], DDPMScheduler()).save_pretrained(folder)
        flat(folder, "DDPMPipeline", "DDPMScheduler")
        old_attention_names(folder / WEIGHTS)
        write(folder / "scheduler_config.json", {"_class_name": "DDPMScheduler", "clip_sample": True, **linear})

        # what DDPMPipeline.save_pretrained writes today
        expected = Preconditioning(prediction_type="v_prediction", beta_schedule="squaredcos_cap_v2")
        folder = keep("user/ddpm-v", unet(num_class_embeds=10), expected)
        scheduler = DDIMScheduler(prediction_type="v_prediction", beta_schedule="squaredcos_cap_v2")
        DDPMPipeline(self.network["user/ddpm-v"], scheduler).save_pretrained(folder)

        # google/ncsnpp-*: at the top, scores of images in [0, 1]
        folder = keep("google/ncsnpp", unet(**SKIPS), Preconditioning(prediction_type="score"))
        self.network["google/ncsnpp"].save_pretrained(folder / "unet")
        ScoreSdeVeScheduler().save_pretrained(folder / "scheduler")
        flat(folder, "ScoreSdeVePipeline", "ScoreSdeVeScheduler")

        # the authors' EDM teacher: a pipeline that diffusers never had, "sample" for EDM's F
        name = "dg845/diffusers-cm_edm_imagenet64_ema"
        folder = keep(name, unet(**OPENAI), Preconditioning(0.5, 1000.0, "edm"))
        self.network[name].save_pretrained(folder / "unet")
        numbers = {"sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5, "prediction_type": "sample"}
        write(folder / "scheduler/scheduler_config.json", {"_class_name": "KarrasEDMScheduler", **numbers})
        parts = {"unet": ["diffusers", "UNet2DModel"], "scheduler": ["diffusers", "KarrasEDMScheduler"]}
        write(folder / "model_index.json", {"_class_name": "EDMPipeline", **parts})

        # openai/diffusers-cd_imagenet64_l2
        name = "openai/diffusers-cd_imagenet64_l2"
        folder = keep(name, unet(seed=2, **OPENAI), Preconditioning(0.5, 1000.0, "consistency"))
        pipe = ConsistencyModelPipeline(self.network[name], CMStochasticIterativeScheduler())
        pipe.save_pretrained(folder)

        # a flow, in half precision only
        folder = keep("user/flow", unet(), Preconditioning(prediction_type="flow_prediction"))
        self.network["user/flow"].half().float().half().save_pretrained(folder / "unet", variant="fp16")
        self.network["user/flow"].float()
        FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(folder / "scheduler")

        # ours
        folder = keep("user/edm", unet(num_class_embeds=3), Preconditioning(0.7, 1.0, "edm"))
        scheduler = EDMHeunScheduler(sigma_data=0.7)
        CTMPipeline(self.network["user/edm"], scheduler, id2label={0: "a", 1: "b", 2: "c"}).save_pretrained(folder)


NAMES = ["google/ddpm-cifar10-32", "user/ddpm-v", "google/ncsnpp", "dg845/diffusers-cm_edm_imagenet64_ema"]
NAMES += ["openai/diffusers-cd_imagenet64_l2", "user/flow", "user/edm"]


@pytest.fixture(scope="module")
def layouts(tmp_path_factory):
    return Layouts(tmp_path_factory.mktemp("layouts"))


def load(folder, *given, **options):
    """The teacher in `folder`, with further options in the order or by the names of `TeacherOptions`."""
    return load_teacher(TeacherOptions(str(folder), *given, **{f"teacher_{name}": options[name] for name in options}))


def labels_for(network, batch):
    count = network.config.num_class_embeds
    return None if count is None else torch.arange(batch) % count


# Layouts --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_every_layout_is_read(layouts, name):
    teacher = load(layouts.root / name)
    assert same(teacher.network.state_dict(), layouts.network[name].state_dict())
    assert teacher.preconditioning == layouts.expected[name]
    assert not teacher.network.training and not any(p.requires_grad for p in teacher.network.parameters())
    assert teacher.id2label == ({0: "a", 1: "b", 2: "c"} if name == "user/edm" else None)
    assert teacher.is_consistency_model == ("openai" in name)


@pytest.mark.parametrize("name", NAMES)
def test_students_start_as_their_teachers_and_learn(layouts, name):
    """The student equals the teacher's denoiser at s = t, whatever the target, and learns."""
    teacher = load(layouts.root / name)
    scheduler = student_scheduler(teacher, CTMConfig(teacher="none"))
    preconditioning = scheduler.preconditioning
    assert preconditioning == teacher.preconditioning
    assert scheduler.config.sigma_max == teacher.scheduler.config.sigma_max
    student = CTMUNet2DModel.from_unet(teacher.network).requires_grad_(True)
    low, high = scheduler.config.sigma_min, min(scheduler.config.sigma_max, 150.0)
    t = torch.exp(torch.linspace(low, high, 4).log() * 0.9 + 0.1 * torch.tensor(low).log())
    x, labels = t[:, None, None, None] * randn(4, 3, 8, 8, dtype=torch.float32), labels_for(teacher.network, 4)
    with torch.no_grad():
        g = preconditioning.g(student, x, t, t, **condition(labels))
        if teacher.is_consistency_model:
            end = torch.full_like(t, low)
            jumped = preconditioning.jump(student, x, t, end, **condition(labels))
            torch.testing.assert_close(jumped, teacher.jump_to_end(x, t, labels), rtol=1e-4, atol=1e-4)
        else:
            torch.testing.assert_close(g, teacher.denoise(x, t, labels), rtol=1e-5, atol=1e-5 * high)
            anywhere = preconditioning.g(student, x, t, 0.5 * t, **condition(labels))
            torch.testing.assert_close(anywhere, g, rtol=1e-5, atol=1e-5 * high)

    sampler, config = TimeSampler(18, low, high, max_steps=2), CTMConfig(teacher="none")
    solver = train_ctm.make_solver(config, teacher, teacher.denoise)
    average = CTMUNet2DModel.from_unet(teacher.network)
    with torch.no_grad():
        average.conv_out.weight.mul_(0.9)
    x_0, noise, dsm_noise = (randn(4, 3, 8, 8, seed=seed, dtype=torch.float32) for seed in (1, 2, 3))
    sigma = torch.tensor([low, 0.5, 1.0, high])
    x_sigma, adaptive = noised(0.5 * x_0, sigma, dsm_noise), not teacher.is_consistency_model
    score_matching = ScoreMatching(x_sigma, sigma, 0.5 * x_0, labels, adaptive=adaptive)
    for name in ["ctm"] if teacher.is_consistency_model else OBJECTIVES:
        objective = OBJECTIVES[name]
        draws = {"matching": sampler.draw, "global": replace(sampler, matching="global").draw}
        draws["between"] = sampler.draw_between
        draw = sampler.draw_to_end if teacher.is_consistency_model else draws[objective.times]
        times = draw(4, seeded())
        x_t = noised(0.5 * x_0, times.t, noise)
        given = {"solver": solver, "teacher": teacher.denoise, "progress": 0.5}
        jumps = Jumps(student, average, preconditioning, times, x_t, labels, **given)
        terms = functools.partial(objective.terms, options=ObjectiveOptions(objective=[name]))
        loss = training_loss(terms, jumps, lambda: student.last_layer.weight, score_matching)
        student.zero_grad()
        loss.total.backward()
        assert loss.terms["dsm_loss"] > 0 and torch.isfinite(loss.terms["trajectory_loss"])
        gradient = student.time_embedding.linear_1.weight.grad
        assert gradient.isfinite().all() and gradient.abs().max() > 0, name


def test_a_consistency_model_is_a_teacher_of_its_ends_only(layouts):
    folder = str(layouts.root / "openai/diffusers-cd_imagenet64_l2")
    teacher = load(folder)
    x, t, labels = 3 * randn(3, 3, 8, 8, dtype=torch.float32), torch.tensor([0.1, 3.0, 80.0]), torch.arange(3)
    theirs = CMStochasticIterativeScheduler(clip_denoised=False)
    c_skip, c_out = (v[:, None, None, None] for v in theirs.get_scalings_for_boundary_condition(t))
    scaled = x / (t**2 + 0.25).sqrt()[:, None, None, None]
    with torch.no_grad():
        output = teacher.network(scaled, 250 * t.log(), class_labels=labels).sample
    torch.testing.assert_close(teacher.jump_to_end(x, t, labels), c_skip * x + c_out * output, rtol=1e-5, atol=1e-5)
    for options, message in (
        ({}, "--matching global"),
        ({"objective": ["ctm"], "matching": "global"}, "--dsm_adaptive false"),
        (
            {"objective": ["ctm"], "matching": "global", "dsm_adaptive": False, "dsm_weight": 0.0},
            "--dsm_weight",
        ),
    ):
        with pytest.raises(UserError, match=message):
            train_ctm.check_consistency_teacher(CTMConfig(teacher=folder, **options))
    config = CTMConfig(teacher=folder, objective=["ctm"], matching="global", dsm_adaptive=False)
    train_ctm.check_consistency_teacher(config)
    with pytest.raises(UserError, match="--sigma_min cannot differ"):
        config.sigma_min = 0.01
        student_scheduler(teacher, config)


def test_a_consistency_model_is_evaluated_as_diffusers_samples_it(layouts):
    name = "openai/diffusers-cd_imagenet64_l2"
    with pytest.raises(UserError, match="takes it with --gammas 1"):
        pipelines.load_model(str(layouts.root / name), [0.0, 1.0])
    pipe = pipelines.load_model(str(layouts.root / name), [1.0])
    pipe.set_progress_bar_config(disable=True)
    theirs = ConsistencyModelPipeline.from_pretrained(layouts.root / name)
    theirs.set_progress_bar_config(disable=True)
    theirs.scheduler.register_to_config(clip_denoised=False)
    latents = randn(2, 3, 8, 8, dtype=torch.float32)
    ours = pipe(latents=latents, class_labels=[1, 4], output_type="pt").images
    one = theirs(2, torch.tensor([1, 4]), num_inference_steps=1, latents=latents, output_type="pt").images
    torch.testing.assert_close(ours, one, rtol=1e-4, atol=1e-4)


def test_images_in_0_1_are_brought_to_minus_1_1(layouts):
    """A score network of images in [0, 1] in its own loop, against ours."""
    teacher = load(layouts.root / "google/ncsnpp")
    x, sigma = randn(2, 3, 8, 8, dtype=torch.float32), torch.tensor([0.3, 5.0])
    x01, sigma01 = (x + 1) / 2, sigma / 2
    with torch.no_grad():
        score = teacher.network(x01, sigma01).sample
    clean01 = x01 + sigma01[:, None, None, None] ** 2 * score
    torch.testing.assert_close(teacher.denoise(x, sigma), 2 * clean01 - 1, rtol=1e-5, atol=1e-5)
    assert teacher.scheduler.config.sigma_min == 0.02 and teacher.scheduler.config.sigma_max == 2696.0


# Options and what is refused ------------------------------------------------------------------------------------------


@pytest.fixture
def copy(layouts, tmp_path):
    """Copy a layout to change it."""

    def make(name, to="copy"):
        return Path(shutil.copytree(layouts.root / name, tmp_path / to))

    return make


def test_options_override_the_scheduler(layouts):
    def preconditioning(name, **options):
        return load(layouts.root / name, **options).preconditioning

    linear = {"beta_schedule": "linear"}
    v = preconditioning("google/ddpm-cifar10-32", prediction_type="v_prediction")
    assert v == Preconditioning(prediction_type="v_prediction", **linear)
    assert preconditioning("user/edm", timestep_scale=1000.0) == Preconditioning(0.7, 1000.0)
    with pytest.raises(UserError, match="--teacher_prediction_type epsilon does not fit.*needs the levels"):
        preconditioning("user/edm", prediction_type="epsilon")


def test_several_networks_are_listed(layouts, copy):
    folder = copy("user/edm")
    shutil.copytree(layouts.root / "user/ddpm-v", folder / "older")
    AutoencoderKL(block_out_channels=(8,), norm_num_groups=4).save_pretrained(folder / "other" / "vae")
    with pytest.raises(UserError) as caught:
        load(folder)
    message = str(caught.value)
    assert "holds 2 networks" in message and "Choose one with --teacher_subfolder" in message
    for found in ("older/unet (UNet2DModel)", "unet (UNet2DModel)", "other/vae (AutoencoderKL)"):
        assert found in message
    for subfolder, name in (("unet", "user/edm"), ("older", "user/ddpm-v"), ("older/unet/", "user/ddpm-v")):
        teacher = load(folder, subfolder)
        assert same(teacher.network.state_dict(), layouts.network[name].state_dict())
        assert teacher.preconditioning == layouts.expected[name]  # with the scheduler beside it
    for subfolder in ("other", "nowhere", "olde"):
        with pytest.raises(UserError, match=f"--teacher_subfolder {subfolder} holds no network"):
            load(folder, subfolder)


def test_networks_of_latents_bring_their_autoencoder(copy):
    folder = copy("user/ddpm-v")
    assert load(folder).autoencoder is None
    vae = VQModel(block_out_channels=(8,), norm_num_groups=4)
    vae.save_pretrained(folder / "vqvae")
    autoencoder = load(folder).autoencoder
    assert autoencoder.normalize_images and not autoencoder.network.training
    for name, weight in vae.state_dict().items():
        assert torch.equal(autoencoder.network.state_dict()[name], weight)


def test_empty_and_half_copied_folders(copy, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no network.*It holds: no model at all"):
        load(tmp_path / "empty")
    folder = copy("user/edm")
    (folder / "unet" / WEIGHTS).unlink()
    with pytest.raises(UserError, match="unet has a config.json, but no weights"):
        load(folder)
    folder = copy("user/edm", "damaged")
    (folder / "scheduler" / "scheduler_config.json").write_text('{"sigma')
    with pytest.raises(UserError, match="cannot be loaded.*\n.*JSONDecodeError"):
        load(folder)
    path = copy("user/edm", "cut") / "unet" / WEIGHTS
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(UserError, match=r"--teacher .* cannot be loaded\. It must"):
        load(tmp_path / "cut")
    with pytest.raises(UserError, match=r"--teacher nowhere cannot be loaded\. No such folder is here\. It must"):
        load("nowhere")
    with pytest.raises(UserError, match="--teacher_revision main is for repositories on the Hub"):
        load(folder, revision="main")


def test_a_network_without_a_scheduler(copy):
    folder = copy("user/edm")
    shutil.rmtree(folder / "scheduler")
    with pytest.raises(UserError, match="has no scheduler_config.json.*--teacher_prediction_type"):
        load(folder)
    with pytest.raises(UserError, match="say --teacher_timestep_scale too"):
        load(folder, prediction_type="edm")
    edm = load(folder, prediction_type="edm", timestep_scale=1.0).preconditioning
    assert edm == Preconditioning(0.5, 1.0, "edm")
    for kind, expected in (
        ("sample", Preconditioning(prediction_type="sample", beta_schedule="linear")),
        ("flow_prediction", Preconditioning(prediction_type="flow_prediction")),
        ("score", Preconditioning(prediction_type="score")),
        ("consistency", Preconditioning(0.5, 1000.0, "consistency")),
    ):
        assert load(folder, prediction_type=kind).preconditioning == expected


def test_teachers_may_have_any_number_of_timesteps(copy):
    """1,000 is only the usual one: improved-diffusion has 4,000."""
    folder = copy("user/ddpm-v")
    for scheduler in (DDPMScheduler(num_train_timesteps=400), FlowMatchEulerDiscreteScheduler(num_train_timesteps=400)):
        scheduler.save_pretrained(folder / "scheduler")
        teacher = load(folder)
        expected = EDMHeunScheduler.from_config(scheduler.config)
        assert teacher.preconditioning == expected.preconditioning
        assert teacher.preconditioning.num_diffusion_timesteps == 400
        for name in ("sigma_min", "sigma_max"):
            assert teacher.scheduler.config[name] == expected.config[name]


@pytest.mark.parametrize(
    "file, content, message",
    [
        ("scheduler/scheduler_config.json", [1], "scheduler_config.json of .* is not a JSON object"),
        (
            "scheduler/scheduler_config.json",
            {"_class_name": "KarrasVeScheduler", "sigma_max": 100.0},
            "KarrasVeScheduler, which is not known.*--teacher_prediction_type",
        ),
        (
            "scheduler/scheduler_config.json",
            {"_class_name": "DDPMScheduler", "beta_schedule": "steps"},
            "does not fit its scheduler_config.json: beta_schedule='steps'",
        ),
        ("model_index.json", [1], "model_index.json of .* is not a JSON object"),
        ("model_index.json", {"id2label": ["cat"]}, "id2label"),
        ("model_index.json", {"id2label": {"cat": 0}}, "id2label"),
        ("model_index.json", {"null_class": "none"}, "null_class 'none' in model_index.json: it must be the last"),
    ],
)
def test_files_that_hold_something_else_are_named(file, content, message, copy):
    folder = copy("user/edm")
    write(folder / file, content)
    with pytest.raises(UserError, match=message):
        load(folder)


def test_networks_that_cannot_teach(make_unet, tmp_path):
    for changes, message in (
        ({"out_channels": 6}, "gives 6 channels for 3"),
        ({"time_embedding_type": "learned", "num_train_timesteps": 1000}, "whole timesteps only"),
        ({"class_embed_type": "timestep"}, "numbers that are no classes"),
        ({"sample_size": None}, "write sample_size"),
    ):
        folder = tmp_path / message
        DDPMPipeline(make_unet(UNet2DModel, **changes), DDPMScheduler()).save_pretrained(folder)
        with pytest.raises(UserError, match=message):
            load(folder)


class Trap:
    """Runs a command when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_pickled_weights_are_data_only(layouts, copy, tmp_path):
    folder, name = copy("google/ddpm-cifar10-32"), "diffusion_pytorch_model.bin"
    torch.save(load_file(folder / WEIGHTS), folder / name)
    (folder / WEIGHTS).unlink()
    assert same(load(folder).network.state_dict(), layouts.network["google/ddpm-cifar10-32"].state_dict())
    with open(folder / name, "wb") as file:
        pickle.dump({"conv_in.weight": Trap(tmp_path / "ran")}, file)
    with pytest.raises(UserError, match="cannot be loaded"):
        load(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("variant", [None, "fp16", "non_ema"])
@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("size", ["10GB", "40KB"])
def test_weights_of_every_kind_of_file_are_found(layouts, copy, tmp_path, variant, safe, size):
    folder, network = copy("user/edm"), layouts.network["user/edm"]
    shutil.rmtree(folder / "unet")
    network.save_pretrained(folder / "unet", variant=variant, safe_serialization=safe, max_shard_size=size)
    assert (len(os.listdir(folder / "unet")) > 3) == (size == "40KB")
    assert same(load(folder).network.state_dict(), network.state_dict())
    # The same of a whole pipeline, which diffusers alone finds for the usual names only.
    pipe = load_pipeline("--model", str(folder))
    assert same(pipe.unet.state_dict(), network.state_dict())
    if not safe:
        for file in (folder / "unet").glob("*.bin"):
            file.write_bytes(pickle.dumps({"conv_in.weight": Trap(tmp_path / "ran")}))
        for read in (lambda: load(folder), lambda: load_pipeline("--model", str(folder))):
            with pytest.raises(UserError, match="cannot be loaded"):
                read()
        assert not (tmp_path / "ran").exists()


def test_whole_weights_win_over_a_variant_and_over_pickles(layouts, copy):
    folder, network = copy("user/edm"), layouts.network["user/edm"]
    other = UNet2DModel.from_config(network.config)
    other.save_pretrained(folder / "unet", variant="fp16")
    other.save_pretrained(folder / "unet", safe_serialization=False)
    for read in (lambda: load(folder).network, lambda: load_pipeline("--model", str(folder)).unet):
        assert same(read().state_dict(), network.state_dict())


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_broken_weights_are_named_when_they_are_loaded(layouts, copy, value):
    folder = copy("user/edm")
    weights = load_file(folder / "unet" / WEIGHTS)
    for name, count in (("conv_out.bias", ""), ("conv_in.weight", rf" and 1 more of its {len(weights)} tensors")):
        weights[name].view(-1)[-1] = value
        save_file(weights, folder / "unet" / WEIGHTS, metadata={"format": "pt"})
        with pytest.raises(UserError, match=rf"--teacher .* has infinite or NaN weights: conv_\w+\.\w+{count}\. "):
            load(folder)
        with pytest.raises(UserError, match=rf"^--model x has .*: unet\.conv_\w+\.\w+{count}\. "):
            load_pipeline("--model x", str(folder))


def test_a_model_that_lacks_a_tensor_says_which(layouts, copy):
    folder = copy("user/edm")
    weights = load_file(folder / "unet" / WEIGHTS)
    del weights["conv_in.weight"]
    save_file(weights, folder / "unet" / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(UserError, match=rf"^--model x lacks 1 of its {len(weights) + 1} tensors, such as unet.conv_in"):
        load_pipeline("--model x", str(folder))


def test_the_range_of_levels_can_be_narrowed(layouts):
    teacher = load(layouts.root / "google/ddpm-cifar10-32")
    config = CTMConfig(teacher="google/ddpm-cifar10-32", sigma_min=0.02, sigma_max=80.0)
    scheduler = student_scheduler(teacher, config)
    assert (scheduler.config.sigma_min, scheduler.config.sigma_max) == (0.02, 80.0)
    config.sigma_max = 1000.0
    with pytest.raises(UserError, match="--sigma_max does not fit.*157.407"):
        student_scheduler(teacher, config)


def test_levels_of_score_matching_stay_where_the_network_learned(layouts):
    scheduler = EDMHeunScheduler.from_config(DDPMScheduler().config)
    teacher = Teacher(None, scheduler)
    config = CTMConfig(teacher="none", dsm_sigma="lognormal")
    random = train_ctm.StepRandom(0, 0, 20000, slice(0, 20000), torch.device("cpu"))
    sigma = train_ctm.draw_dsm_sigma(config, student_scheduler(teacher, config), random)
    numbers = scheduler.config
    assert sigma.min().item() == pytest.approx(numbers.sigma_min, rel=1e-6) and sigma.max() < numbers.sigma_max


def test_precision_is_left_alone_where_rounding_is_not_magnified(layouts):
    for name, expected in zip(NAMES, ["no", "auto", "no", "auto", "auto", "auto", "auto"], strict=True):
        teacher = load(layouts.root / name)
        for asked, chosen in (("auto", expected), ("bf16", "bf16")):
            config = CTMConfig(teacher=name, mixed_precision=asked)
            assert choose_precision(config, teacher).mixed_precision == chosen and config.mixed_precision == asked


# The program ----------------------------------------------------------------------------------------------------------

FEW = {"max_solver_steps": 2}
TO_END = {"objective": ["ctm"], "matching": "global", "dsm_adaptive": False}


@pytest.mark.parametrize(
    "name, options",
    [
        ("google/ddpm-cifar10-32", FEW),
        ("user/ddpm-v", FEW),
        ("user/ddpm-v", {"teacher_prediction_type": "sample", **FEW}),
        ("google/ncsnpp", FEW),
        ("user/flow", FEW),
        ("user/edm", FEW),
        ("dg845/diffusers-cm_edm_imagenet64_ema", FEW),
        ("openai/diffusers-cd_imagenet64_l2", TO_END),
    ],
    ids=["epsilon", "v", "sample", "score", "flow", "edm 1", "edm 1000", "consistency"],
)
def test_the_program_distills_every_kind(layouts, name, options, tmp_path):
    """Two small steps: what is saved is near the teacher's denoiser, has begun to look at the target time, and samples
    in one step.

    Near: the error of the teacher's denoiser where it leaves the image as it is (F = 0) is its measure.
    """
    teacher = load(layouts.root / name, prediction_type=options.get("teacher_prediction_type"))
    levels = teacher.scheduler.config
    path = train_ctm.main(
        CTMConfig(
            **options,
            teacher=str(layouts.root / name),
            output_dir=str(tmp_path / "run"),
            dataset_name="digits" if name != "user/edm" else few_classes(tmp_path / "three.parquet"),
            image_mode="RGB",
            label_column=None if teacher.network.config.num_class_embeds is None else "label",
            num_train_timesteps=5,
            sigma_max=min(levels.sigma_max, 80.0),
            max_train_steps=2,
            train_batch_size=4,
            learning_rate=2e-5,
            ema_decay=0.5,
            checkpointing_steps=0,
            sample_every=0,
            report_to="none",
        )
    )
    pipe = DiffusionPipeline.from_pretrained(path)
    pipe.set_progress_bar_config(disable=True)
    preconditioning = pipe.scheduler.preconditioning
    assert preconditioning == teacher.preconditioning and pipe.scheduler.config.sigma_max == min(levels.sigma_max, 80.0)

    t = torch.tensor([0.1, 0.5, 2.0])
    x, labels = randn(3, 3, 8, 8, dtype=torch.float32), labels_for(teacher.network, 3)
    with torch.no_grad():
        g = preconditioning.g(pipe.unet, x, t, t, **condition(labels))
        other = preconditioning.g(pipe.unet, x, t, 0.3 * t, **condition(labels))
        before = preconditioning.g(teacher.network, x, t, **condition(labels))
    assert 0 < (g - before).abs().max() < 0.1 * (before - x).abs().max()
    assert (g - other).abs().max() > 0 or teacher.is_consistency_model  # whose jumps have one end
    image = pipe(class_labels=None if labels is None else [1], output_type="latent").images
    assert image.shape == (1, 3, 8, 8) and image.isfinite().all() and image.std() > 0


def few_classes(path: Path) -> str:
    """Three small gray images of three classes."""
    images = [PILImage.fromarray(np.full((8, 8), value, np.uint8)) for value in (0, 100, 200)] * 2
    columns = {"image": images, "label": [0, 1, 2] * 2}
    Dataset.from_dict(columns, features=Features({"image": Image(), "label": Value("int64")})).to_parquet(path)
    return str(path)


# The Hub and the real command -----------------------------------------------------------------------------------------

PROGRAM = """
import json, sys
from diffusers import DiffusionPipeline
import diffusers_ctm
from training import train_ctm
from training.cli.errors import UserError
from training.cli.options import parse_config
from training.cli.shared_options import TeacherOptions
from training.cli.weights import load_pipeline
from training.networks import teacher

work, names = sys.argv[1], sys.argv[2].split(",")
results = {}
for name in names:
    found = teacher.load_teacher(TeacherOptions(name))
    again = teacher.load_teacher(TeacherOptions(name, teacher_revision=found.revision))
    results[name] = [found.preconditioning.prediction_type, found.revision, again.revision]
    found.network.save_pretrained(f"{work}/{name}")
errors = {}
for arguments in (["nobody/nothing"], [names[0], None, "no-branch"], ["team/two"]):
    try:
        teacher.load_teacher(TeacherOptions(*arguments))
    except UserError as error:
        errors[arguments[0]] = str(error)
results["subfolder"] = teacher.load_teacher(TeacherOptions("team/two", "b/unet")).preconditioning.prediction_type
for index, arguments in enumerate(json.loads(sys.argv[3])):
    folder = f"{work}/run-{index}"
    path = train_ctm.main(parse_config(train_ctm.CTMConfig, [*arguments, "--output_dir", folder]))
    pipe = DiffusionPipeline.from_pretrained(path)
    image = pipe(output_type="latent").images
    results[f"run-{index}"] = [pipe.scheduler.config.prediction_type, list(image.shape), bool(image.isfinite().all())]
json.dump([results, errors], open(f"{work}/results.json", "w"))
"""


@pytest.mark.slow
def test_real_commands_against_the_layouts_on_a_hub(layouts, tmp_path):
    """Loaded, distilled and sampled by repository id, with the real client."""
    small = ["--dataset_name", "digits", "--image_mode", "RGB", "--max_train_steps", "1", "--train_batch_size", "2"]
    small += ["--report_to", "none", "--sample_every", "0", "--checkpointing_steps", "0"]
    few = ["--max_solver_steps", "2", *small]
    labels = ["--label_column", "label"]
    to_end = ["--objective", "ctm", "--matching", "global", "--dsm_adaptive", "false"]
    runs = [
        ["--teacher", "google/ddpm-cifar10-32", *few],
        ["--teacher", "user/ddpm-v", "--sigma_max", "100", *labels, *few],
        ["--teacher", "google/ncsnpp", "--sigma_max", "100", *few],
        ["--teacher", "dg845/diffusers-cm_edm_imagenet64_ema", *labels, *few],
        ["--teacher", "openai/diffusers-cd_imagenet64_l2", *labels, *to_end, *small],
        ["--teacher", "team/two", "--teacher_subfolder", "b", "--teacher_prediction_type", "sample", *labels, *few],
    ]
    with LoopbackHub() as hub:
        for name in NAMES:
            files = {
                path.relative_to(layouts.root / name).as_posix(): path.read_bytes()
                for path in (layouts.root / name).rglob("*")
                if path.is_file()
            }
            hub.repos[f"models/{name}"] = Repo()
            hub.repos[f"models/{name}"].commit({**files, "big.bin": b"0" * 1000})
        both = {}
        for folder, name in (("a", "user/edm"), ("b", "user/ddpm-v")):
            both |= {f"{folder}/{path}": content for path, content in hub.repos[f"models/{name}"].files.items()}
        hub.repos["models/team/two"] = Repo()
        hub.repos["models/team/two"].commit(both)
        env = hub.environment(tmp_path / "home", pythonpath=ROOT) | {"OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", PROGRAM, str(tmp_path), ",".join(NAMES), json.dumps(runs)]
        done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        asked = [path for method, path in hub.requests if method == "GET"]
    results, errors = json.loads((tmp_path / "results.json").read_text())
    for name in NAMES:
        kind, revision, again = results[name]
        assert kind == layouts.expected[name].prediction_type and revision == again == hub.repos[f"models/{name}"].sha()
        assert same(
            UNet2DModel.from_pretrained(tmp_path / name).eval().state_dict(), layouts.network[name].state_dict()
        )
    assert not any(path.endswith(("big.bin", ".py")) for path in asked)  # only what is needed
    assert "RepositoryNotFoundError" in errors["nobody/nothing"] and "HF_TOKEN" in errors["nobody/nothing"]
    assert "RevisionNotFoundError" in errors[NAMES[0]]
    assert "holds 2 networks" in errors["team/two"] and "a/unet (UNet2DModel)" in errors["team/two"]
    assert results["subfolder"] == "v_prediction"
    kinds = ["epsilon", "v_prediction", "score", "edm", "consistency", "sample"]
    assert [results[f"run-{i}"] for i in range(6)] == [[kind, [1, 3, 8, 8], True] for kind in kinds]
    options = (tmp_path / "run-5" / "config.yaml").read_text()
    assert "teacher_subfolder: b" in options and "hf_loopback" not in options


# A real distillation --------------------------------------------------------------------------------------------------


def energy_distance(a, b):
    """Squared energy distance of two sets of images, 0 for equal distributions (Szekely & Rizzo 2013)."""
    a, b = a.flatten(1), b.flatten(1)
    within = [torch.cdist(x, x).sum() / (len(x) * (len(x) - 1)) for x in (a, b)]
    return (2 * torch.cdist(a, b).mean() - sum(within)).item()


def train_ddpm(network, images, steps):
    """Ho et al. 2020, Algorithm 1, with diffusers' scheduler."""
    scheduler, generator = DDPMScheduler(), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(network.parameters(), 2e-3)
    for step in range(steps):
        x_0 = images[torch.randint(len(images), (64,), generator=generator)]
        noise = torch.randn(x_0.shape, generator=generator)
        timesteps = torch.randint(1000, (64,), generator=generator)
        loss = (network(scheduler.add_noise(x_0, noise, timesteps), timesteps).sample - noise).square().mean()
        loss.backward()
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1, 4 * (1 - step / steps))
        optimizer.step()
        optimizer.zero_grad()
    return DDPMPipeline(network.eval(), scheduler)


def four_modes(path):
    """1,000 images of 4x4, written and as a tensor: each half is -0.6 or 0.6, with a little noise."""
    rng = np.random.default_rng(0)
    halves = rng.choice([-0.6, 0.6], (1000, 1, 2)).repeat(2, 2)
    pixels = np.round((halves + rng.normal(0, 0.1, (1000, 4, 4)) + 1) * 127.5).clip(0, 255).astype(np.uint8)
    columns = {"image": [PILImage.fromarray(image) for image in pixels]}
    Dataset.from_dict(columns, features=Features({"image": Image()})).to_parquet(path)
    return torch.from_numpy(pixels)[:, None].float() / 127.5 - 1


@pytest.mark.slow
def test_a_ddpm_becomes_a_ctm(tmp_path):
    """A teacher trained here with DDPM's own loss on epsilon, distilled by the real program.

    One-step samples of the student are closer to the data than those of the untrained student, the teacher's denoiser;
    measured 0.477 against 0.316 in energy distance, a factor of 1.5; asserted 1.25.
    """
    images = four_modes(str(tmp_path / "images.parquet"))
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2, "add_attention": False}
    network = make_unet_2d(UNet2DModel, in_channels=1, out_channels=1, sample_size=4, **blocks)
    train_ddpm(network.train(), images, 300).save_pretrained(tmp_path / "teacher")
    options = {"max_train_steps": 120, "train_batch_size": 64, "learning_rate": 1e-3, "optimizer": "adam"}
    options |= {"lr_scheduler": "cosine", "ema_decay": 0.95, "ema_warmup": True, "max_solver_steps": 2}
    options |= {
        "num_train_timesteps": 8,
        "sigma_max": 20.0,
        "checkpointing_steps": 0,
        "sample_every": 0,
        "report_to": "none",
    }
    options |= {"dataset_name": str(tmp_path / "images.parquet"), "teacher": str(tmp_path / "teacher")}
    path = train_ctm.main(CTMConfig(output_dir=str(tmp_path / "run"), **options))

    def distance(pipe, **settings):
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(1)
        samples = pipe(batch_size=500, generator=generator, output_type="latent", **settings).images
        return energy_distance(samples.clamp(-1, 1), images)

    student = DiffusionPipeline.from_pretrained(path)
    assert student.scheduler.config.prediction_type == "epsilon" and student.scheduler.config.sigma_max == 20.0
    untrained = CTMPipeline(CTMUNet2DModel.from_unet(network), student.scheduler)
    teacher = CTMPipeline(network, EDMHeunScheduler.from_config(student.scheduler.config))
    before, after = distance(untrained), distance(student)
    assert distance(teacher, num_inference_steps=12) < 0.2 * before  # the teacher is worth copying
    assert after < 0.8 * before
