# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""The programs at tiny size: what they save, that they resume, share work among processes and lose nothing."""

import dataclasses
import glob
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from torch._dynamo.utils import counters

import diffusers_ctm
from helpers.places import ROOT
from helpers.runs import NETWORK, SMALL, assert_same_weights, fresh_accelerate, in_processes, weights  # noqa: F401
from training import train_ctm, train_edm
from training.cli.errors import UserError
from training.cli.options import parse_config
from training.cli.shared_options import TeacherOptions
from training.data.images import ImageDataset
from training.networks import student
from training.networks.teacher import Teacher, load_teacher
from training.objective import adversarial
from training.objective.adversarial import ProjectedDiscriminator
from training.objective.losses import training_loss
from training.objective.times import TimeSampler
from training.run import devices
from training.run import loop as run_module
from training.run.batch import StepRandom
from training.run.compiling import compile_network
from training.run.monitor import SIGMA_BINS, SIGMA_EDGES
from training.train_ctm import CTMConfig
from training.train_edm import EDMConfig


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A tiny teacher, trained for a few steps."""
    AcceleratorState._reset_state(reset_partial_state=True)  # another module may have left its precision
    folder = tmp_path_factory.mktemp("teacher") / "run"
    return train_edm.main(EDMConfig(output_dir=str(folder), max_train_steps=6, ema_warmup=True, **SMALL, **NETWORK))


def distill(teacher, folder, **options):
    options = {"max_train_steps": 4, "max_solver_steps": 2, "learning_rate": 1e-3, **SMALL, **options}
    options = {"objective": ["ctm"], **options}
    return train_ctm.main(CTMConfig(teacher=teacher, output_dir=str(folder), **options))


def test_saved_pipelines_load_and_sample(teacher, tmp_path, capfd):
    student = distill(teacher, tmp_path / "run", sample_every=2, checkpointing_steps=2, report_to="tensorboard")
    bar = capfd.readouterr().err.splitlines()[-1]
    assert "4/4" in bar and all(
        f"{name}=" in bar for name in ("trajectory_loss", "dsm_loss", "dsm_weight", "grad_norm")
    )
    pipe = DiffusionPipeline.from_pretrained(student)
    pipe.set_progress_bar_config(disable=True)
    assert isinstance(pipe, diffusers_ctm.CTMPipeline)
    assert pipe.scheduler.config.sigma_data == 0.75 and pipe.unet.config.dropout == 0.1
    images = pipe(class_labels=["0", "9"], num_inference_steps=2, gamma=0.5).images
    assert len(images) == 2 and images[0].size == (8, 8)
    teacher_weights, student_weights = weights(teacher), weights(student)
    moved = [n for n in teacher_weights if n in student_weights and not n.endswith("time_emb_proj.weight")]
    assert any(not torch.equal(teacher_weights[n], student_weights[n]) for n in moved)
    assert any(v[:, v.shape[1] // 2 :].any() for n, v in student_weights.items() if n.endswith("time_emb_proj.weight"))
    assert sorted(os.listdir(tmp_path / "run" / "samples")) == [
        f"step-{step:06d}-{name}.png" for step in (2, 4) for name in ("1-step", "4-steps")
    ]
    assert glob.glob(str(tmp_path / "run" / "logs" / "**" / "events*"), recursive=True)
    assert not glob.glob(str(tmp_path / "run" / ".*"))  # no drafts left
    config = json.loads((Path(student) / "unet" / "config.json").read_text())
    assert "_name_or_path" not in config  # whoever gets the student does not learn where the teacher lay


def test_label_dropout(teacher, tmp_path):
    options = {"max_train_steps": 3, "label_dropout": 0.5, **SMALL, **NETWORK}
    with_null = train_edm.main(EDMConfig(output_dir=str(tmp_path / "edm"), **options))
    student = distill(with_null, tmp_path / "ctm", learning_rate=0.01)  # RAdam starts slowly
    for folder in (with_null, student):
        pipe = DiffusionPipeline.from_pretrained(folder)
        pipe.set_progress_bar_config(disable=True)
        assert pipe.config.null_class == 10 and pipe.num_classes == 10 and pipe.unet.config.num_class_embeds == 11
        images = [
            pipe(class_labels="3", guidance_scale=scale, latents=torch.ones(1, 1, 8, 8), output_type="latent").images
            for scale in (0.0, 1.0, 3.0)
        ]
        assert not torch.equal(images[0], images[1])
        if folder == student:  # one jump: an image is affine in F
            torch.testing.assert_close(images[2], images[0] + 3 * (images[1] - images[0]), rtol=1e-4, atol=1e-4)
    rows = [weights(folder)["class_embedding.weight"][10] for folder in (with_null, student)]
    assert not torch.equal(*rows)  # the student learns "no class" too
    with pytest.raises(UserError, match="--label_dropout needs a teacher that was trained with it"):
        distill(teacher, tmp_path / "no", label_dropout=0.1)


@pytest.mark.parametrize("by", ["another model", "no class"])
def test_guided_teachers_are_distilled_resumed_and_recorded(teacher, tmp_path, by, capsys):
    options = {"teacher_guidance_scale": 3.0, "checkpointing_steps": 2}
    if by == "no class":
        edm = {"max_train_steps": 3, "label_dropout": 0.5, "learning_rate": 1e-2, **SMALL, **NETWORK}
        teacher = train_edm.main(EDMConfig(output_dir=str(tmp_path / "edm"), **edm))
    else:
        edm = {"max_train_steps": 2, "seed": 5, **SMALL, **NETWORK, "block_out_channels": [4, 8]}
        options["guidance_teacher"] = train_edm.main(EDMConfig(output_dir=str(tmp_path / "bad"), **edm))
    whole = distill(teacher, tmp_path / "whole", **options)
    with pytest.raises(AssertionError):  # the guidance is learned
        assert_same_weights(whole, distill(teacher, tmp_path / "plain"))
    os.makedirs(tmp_path / "part")
    os.rename(tmp_path / "whole" / "checkpoint-2", tmp_path / "part" / "checkpoint-2")
    part = distill(teacher, tmp_path / "part", resume_from_checkpoint="latest", **options)
    assert_same_weights(whole, part)
    record = json.loads((Path(part) / "training.json").read_text())
    assert record["options"]["teacher_guidance_scale"] == 3.0 and "guidance_teacher" not in record["options"]
    named = {"name": "bad", "on_hub": False, "revision": None}
    assert record["guidance_teacher"] == (None if by == "no class" else named)

    resumed = {"resume_from_checkpoint": "latest", "max_train_steps": 4, "teacher_guidance_scale": 3.0}
    with pytest.raises(UserError, match="--teacher_guidance_scale was 3.0, is 2.0"):
        distill(teacher, tmp_path / "part", **{**options, **resumed, "teacher_guidance_scale": 2.0})
    if by == "another model":
        capsys.readouterr()
        distill(teacher, tmp_path / "part", **resumed, guidance_teacher=teacher)
        assert "--guidance_teacher was bad, is run" in capsys.readouterr().out


def test_labels_are_dropped_at_the_rate_that_was_asked():
    labels = torch.arange(10_000) % 10

    def batch():
        random = StepRandom(0, 0, len(labels), slice(None), torch.device("cpu"))
        return run_module.Batch(torch.zeros(len(labels), 1), labels, random)

    dropped = batch().dropped_labels(0.2, 10)
    assert abs((dropped == 10).float().mean() - 0.2) < 0.02 and torch.equal(dropped[dropped < 10], labels[dropped < 10])
    one = batch()
    assert one.dropped_labels(0.0, None) is labels
    assert torch.equal(
        one.random.uniform(), batch().random.uniform()
    )  # nothing was drawn: earlier runs stay what they were


def test_resumed_is_uninterrupted_bit_for_bit(teacher, tmp_path):
    options = {"lr_scheduler": "cosine", "max_train_steps": 6}
    whole = distill(teacher, tmp_path / "whole", checkpointing_steps=4, **options)
    os.makedirs(tmp_path / "part")
    os.rename(tmp_path / "whole" / "checkpoint-4", tmp_path / "part" / "checkpoint-4")  # as if it had stopped there
    part = distill(teacher, tmp_path / "part", resume_from_checkpoint="latest", **options)
    assert_same_weights(whole, part)
    other = distill(teacher, tmp_path / "other", seed=1, **options)
    with pytest.raises(AssertionError):  # dropout, data and noise do depend on the seed
        assert_same_weights(whole, other)


def test_the_environment_does_not_overrule_accumulation(teacher, tmp_path, monkeypatch):
    """Accelerate reads it, and with it steps of several passes would be taken for one."""
    one = distill(teacher, tmp_path / "one", max_train_steps=2, ema_decay=0.0, optimizer="adam")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")
    two = distill(teacher, tmp_path / "two", max_train_steps=2, ema_decay=0.0, optimizer="adam")
    assert_same_weights(one, two)


def test_accumulation_may_change_when_a_run_is_resumed(teacher, tmp_path):
    """Passes of any size see the same data and noise: three of 4 to step 1, then two of 6.

    Without counting passes anew, the first one after resuming would end a step.
    """
    options = {"dropout": 0.0, "dsm_adaptive": False, "ema_decay": 0.0, "optimizer": "adam", "adam_epsilon": 1e-3}
    options |= {"max_train_steps": 2, "checkpointing_steps": 1, "train_batch_size": 4, "gradient_accumulation_steps": 3}
    same = distill(teacher, tmp_path / "same", **options)
    os.makedirs(tmp_path / "other")
    os.rename(tmp_path / "same" / "checkpoint-1", tmp_path / "other" / "checkpoint-1")
    options |= {"train_batch_size": 6, "gradient_accumulation_steps": 2}
    other = distill(teacher, tmp_path / "other", resume_from_checkpoint="latest", **options)
    assert_same_weights(same, other, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(
    "name, more, factors",
    [
        ("constant_with_warmup", {}, [0.5, 1, 1, 1, 1, 1]),
        ("linear", {}, [0.5, 1, 0.75, 0.5, 0.25, 0]),
        ("cosine", {}, [0.5, 1, 0.8535534, 0.5, 0.1464466, 0]),
        ("inverse_sqrt", {"lr_decay_after": 3}, [0.5, 1, 1, 0.75**0.5, 0.6**0.5, 0.5**0.5]),
        ("inverse_sqrt", {"lr_decay_after": 1}, [0.5, 0.5**0.5, 3**-0.5, 0.5, 0.2**0.5, 6**-0.5]),
    ],
)
def test_learning_rate_over_the_steps(tmp_path, monkeypatch, name, more, factors):
    """After step i, so that the last is that of a step never taken."""
    logged = []
    monkeypatch.setattr(Accelerator, "log", lambda self, values, step: logged.append(values))
    options = {**SMALL, **NETWORK, "logging_steps": 1, "learning_rate": 1e-3, "max_train_steps": 6, **more}
    train_edm.main(EDMConfig(output_dir=str(tmp_path / "run"), lr_scheduler=name, lr_warmup_steps=2, **options))
    rates = [values["train/learning_rate"] / 1e-3 for values in logged]
    assert rates == pytest.approx(factors, abs=1e-6)


def test_noise_levels_of_the_teacher_are_those_asked(tmp_path, monkeypatch):
    drawn = []

    def record(denoised, x_0, sigma, sigma_data):
        drawn.append(sigma)
        return (denoised - x_0).square().mean((1, 2, 3))

    monkeypatch.setattr(train_edm, "dsm_loss", record)
    options = {**SMALL, **NETWORK, "train_batch_size": 2000, "max_train_steps": 1, "p_mean": 0.4, "p_std": 0.3}
    train_edm.main(EDMConfig(output_dir=str(tmp_path / "run"), **options))
    logs = torch.cat(drawn).log()
    assert logs.mean().item() == pytest.approx(0.4, abs=4 * 0.3 / 2000**0.5)
    assert logs.std().item() == pytest.approx(0.3, abs=4 * 0.3 / 4000**0.5)


@pytest.mark.slow
def test_two_processes_are_one(teacher, tmp_path, capfd):
    arguments = ["--teacher", teacher, "--max_train_steps", "3", "--max_solver_steps", "2", "--dropout", "0"]
    # RAdam would hardly move in three steps.
    options = {**SMALL, "learning_rate": 1e-3, "ema_decay": 0.0, "optimizer": "adam", "adam_epsilon": 1e-3}
    for name, value in options.items():
        arguments += [f"--{name}", str(value)]
    shown = {}
    folders = {1: tmp_path / "one", 2: tmp_path / "two"}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    for processes, folder in folders.items():
        own = [*arguments, "--output_dir", str(folder), "--train_batch_size", str(8 // processes)]
        own += ["--checkpointing_steps", "3", "--eval_every", "3", "--eval_samples", "300"]  # in two batches
        if processes == 1:
            in_processes(1, train_ctm.main, parse_config(CTMConfig, own))
            err = capfd.readouterr().err
        else:
            launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
            command = [*launch, "-m", "training.train_ctm", *own]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
            err = done.stderr
            assert done.returncode == 0, err[-2000:]
        states = glob.glob(str(folder / "checkpoint-3" / "random_states_*.pkl"))
        assert len(states) == processes  # so many took part
        shown[processes] = {n: float(v) for n, v in re.findall(r"(\w+)=([\d.e+-]+)", err)}  # the last of each
    assert shown[1].keys() == shown[2].keys() >= {"trajectory_loss", "dsm_loss", "dsm_weight", "grad_norm"}
    assert shown[2] == pytest.approx(shown[1], rel=0.006)  # three digits
    assert_same_weights(str(folders[1] / "pipeline"), str(folders[2] / "pipeline"), rtol=1e-4, atol=2e-5)
    one, two = (json.loads((folder / "metrics.jsonl").read_text())["frechet"] for folder in folders.values())
    assert two == pytest.approx(one, rel=1e-3) and one.keys() == {"1-step", "4-steps"}


def test_checkpoints_rotate_and_the_folder_is_not_overwritten(teacher, tmp_path):
    folder = tmp_path / "run"
    first = distill(teacher, folder, checkpointing_steps=1, checkpoints_total_limit=2)
    assert sorted(os.listdir(folder)) == ["checkpoint-3", "checkpoint-4", "config.yaml", "pipeline"]
    before = weights(first)
    with pytest.raises(UserError, match="Continue that run with --resume_from_checkpoint latest"):
        distill(teacher, folder)
    (tmp_path / "failed").mkdir()
    (tmp_path / "failed" / "config.yaml").touch()  # such as a picture that cannot be read leaves
    with pytest.raises(
        UserError, match="No checkpoint is in it: start it afresh there with --resume_from_checkpoint latest"
    ):
        distill(teacher, tmp_path / "failed")
    assert all(torch.equal(before[name], value) for name, value in weights(first).items())
    distill(teacher, folder, resume_from_checkpoint="latest")  # a finished run: nothing to do, the same result
    assert all(torch.equal(before[name], value) for name, value in weights(first).items())


def test_resuming_from_an_older_checkpoint_loses_no_newer_one(teacher, tmp_path):
    folder = tmp_path / "run"
    distill(teacher, folder, checkpointing_steps=2)
    with pytest.raises(UserError, match="holds .*checkpoint-4"):
        distill(teacher, folder, checkpointing_steps=1, resume_from_checkpoint=str(folder / "checkpoint-2"))
    assert {"checkpoint-2", "checkpoint-4"} <= set(os.listdir(folder))
    options = {"max_train_steps": 3, "checkpointing_steps": 1}
    distill(teacher, tmp_path / "branch", resume_from_checkpoint=str(folder / "checkpoint-2"), **options)
    assert "checkpoint-3" in os.listdir(tmp_path / "branch")


def test_levels_of_score_matching_do_not_depend_on_the_split():
    def draw(own):
        random = run_module.StepRandom(0, 5, 6, own, torch.device("cpu"))
        return train_ctm.draw_dsm_sigma(CTMConfig(teacher="none"), diffusers_ctm.CTMScheduler(), random)

    whole = draw(slice(0, 6))
    for size in (1, 2, 3):
        parts = [draw(slice(begin, begin + size)) for begin in range(0, 6, size)]
        torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=0)


def test_score_matching_is_logged_by_noise_level(teacher, tmp_path, monkeypatch):
    """Each loss with its own level: the shares of the bins make the mean."""
    drawn, logged = [], []
    draw = train_ctm.draw_dsm_sigma
    monkeypatch.setattr(train_ctm, "draw_dsm_sigma", lambda *given: drawn.append(draw(*given)) or drawn[-1])
    monkeypatch.setattr(Accelerator, "log", lambda self, values, step: logged.append(values))
    distill(teacher, tmp_path / "run", max_train_steps=2)
    bins = torch.bucketize(torch.cat(drawn), torch.tensor(SIGMA_EDGES), right=True)
    shares = {f"dsm_loss_by_sigma/{SIGMA_BINS[index]}": (bins == index).float().mean() for index in set(bins.tolist())}
    assert shares.keys() == {name for name in logged[0] if name.startswith("dsm")} and len(shares) > 2
    total = sum(share * logged[0][name] for name, share in shares.items())
    assert total.item() == pytest.approx(logged[0]["train/dsm_loss"], rel=1e-5)


def test_random_numbers_of_a_step():
    def draw(seed, step, own=slice(0, 4)):
        random = run_module.StepRandom(seed, step, 4, own, torch.device("cpu"))
        return random.normal(2), random.uniform()

    for a, b in zip(draw(0, 1), draw(0, 1, slice(1, 3)), strict=True):
        torch.testing.assert_close(a[1:3], b, rtol=0, atol=0)
    for other in (draw(0, 2), draw(1, 1)):
        assert not any(torch.equal(a, b) for a, b in zip(draw(0, 1), other, strict=True))


def test_random_flip_mirrors_half_of_the_images():
    images = torch.tensor([0, 255], dtype=torch.uint8).expand(200, 1, 1, 2)
    options = EDMConfig(random_flip=True)
    random = run_module.StepRandom(0, 0, 200, slice(0, 200), torch.device("cpu"))
    dataset = ImageDataset(options)
    run = SimpleNamespace(dataset=dataset, device=torch.device("cpu"), _memory_format=torch.contiguous_format)
    mirrored = (run_module.TrainingRun._batch(run, images, None, random).images.diff(dim=-1) < 0).float().mean()
    assert 0.4 < mirrored < 0.6


@pytest.mark.parametrize(
    "name, kind", [("radam", torch.optim.RAdam), ("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)]
)
def test_options_reach_the_optimizer(name, kind):
    options = {
        "learning_rate": 0.1,
        "adam_beta2": 0.6,
        "adam_weight_decay": 0.2,
        "adam_epsilon": 0.3,
    }
    optimizer = devices.make_optimizer(EDMConfig(optimizer=name, **options), torch.nn.Linear(1, 1))
    assert type(optimizer) is kind
    assert [optimizer.defaults[key] for key in ("lr", "betas", "weight_decay", "eps")] == [0.1, (0.9, 0.6), 0.2, 0.3]


def test_the_students_numbers_are_its_teachers():
    numbers = {"sigma_min": 0.01, "sigma_max": 50.0, "sigma_data": 0.7, "rho": 5.0, "timestep_scale": 1000.0}
    teacher = Teacher(None, diffusers_ctm.EDMHeunScheduler(**numbers))
    config = student.student_scheduler(teacher, CTMConfig(teacher="none", num_train_timesteps=40)).config
    assert {name: config[name] for name in numbers} == numbers and config.num_train_timesteps == 40


def test_dropout_of_the_student_is_that_of_a_network_built_with_it(make_unet):
    def probabilities(network):
        return [module.p for module in network.modules() if isinstance(module, torch.nn.Dropout)]

    changed, built = make_unet(), make_unet(dropout=0.3)
    student.set_dropout(changed, 0.3)
    assert probabilities(changed) == probabilities(built) and changed.config.dropout == 0.3
    assert set(probabilities(built)) == {0.0, 0.3}  # attention has its own, which the option leaves alone


@pytest.mark.parametrize(
    "options, most", [({}, 2), ({"matching": "local", "max_solver_steps": None}, 1), ({"matching": "global"}, 2)]
)
def test_every_choice_of_times_runs_and_moves_the_student(teacher, tmp_path, options, most, monkeypatch):
    samplers, calls = [], []
    monkeypatch.setattr(train_ctm, "TimeSampler", lambda **given: samplers.append(TimeSampler(**given)) or samplers[-1])
    monkeypatch.setattr(
        train_ctm,
        "training_loss",
        lambda objective, jumps, **given: (
            calls.append((objective, jumps, given)) or training_loss(objective, jumps, **given)
        ),
    )
    live = options.get("matching") != "global"
    options |= {"inner_target": "live"} if live else {}
    options |= {"distance": "pseudo_huber", "dsm_sigma": "lognormal", "dsm_weight": 0.7, "dsm_adaptive": not live}
    saved = distill(teacher, tmp_path / "run", max_train_steps=2, **options)
    assert not torch.equal(weights(saved)["conv_out.weight"], weights(teacher)["conv_out.weight"])
    assert (samplers[0].num_levels, samplers[0].matching) == (18, options.get("matching", "soft"))
    objective, jumps, given = calls[0]
    assert samplers[0].most == most >= jumps.times.solver_steps
    inner_target = objective.keywords["options"].inner_target
    assert (jumps.distance.about["name"], inner_target) == ("pseudo_huber", "live" if live else None)
    assert (given["score_matching"].weight, given["score_matching"].adaptive) == (0.7, not live)
    assert given["last_weight"]() is jumps.student.conv_out.weight
    assert torch.equal(jumps.student_ema.conv_out.weight, weights(saved)["conv_out.weight"])  # what is saved


def test_without_a_teacher_the_student_follows_its_own_average(tmp_path, monkeypatch):
    solved = []

    def states(denoiser, x, levels):
        solved.append(denoiser(x, levels[0]))
        yield x

    monkeypatch.setitem(train_ctm.SOLVERS, "heun", dataclasses.replace(train_ctm.SOLVERS["heun"], states=states))
    network = {"block_out_channels": [16, 32], "layers_per_block": 1, "attention_head_dim": 8, "sigma_data": 0.75}
    saved = distill(None, tmp_path / "scratch", max_train_steps=2, solver_model="ema", **network)
    assert len(solved) == 2
    pipe = DiffusionPipeline.from_pretrained(saved)
    assert list(pipe.unet.config.block_out_channels) == [16, 32] and pipe.scheduler.config.sigma_data == 0.75
    assert pipe.unet.conv_out.weight.abs().max() > 0
    record = json.loads((Path(saved) / "training.json").read_text())
    assert record["program"] == "training.train_ctm" and record["teacher"] is None
    assert record["options"]["solver_model"] == "ema"


def test_the_run_is_told_the_commit_of_its_teacher_and_counts_its_steps(teacher, tmp_path, monkeypatch):
    loaded = dataclasses.replace(load_teacher(TeacherOptions(teacher)), revision="0123abc")
    monkeypatch.setattr(train_ctm, "load_teacher", lambda options: loaded)
    seen, steps = {}, []

    class Told(run_module.TrainingRun):
        def __init__(self, *given, revisions=None, **named):
            seen["revisions"] = revisions
            super().__init__(*given, **named)

    monkeypatch.setattr(train_ctm, "TrainingRun", Told)
    options = {"teacher": teacher, "output_dir": str(tmp_path / "run"), "max_solver_steps": 2, "max_train_steps": 3}
    train_ctm.main(CTMConfig(**SMALL, **options), on_step=lambda run: steps.append(run.step))
    assert seen["revisions"] == {"teacher": "0123abc"} and steps == [1, 2, 3]


def test_the_students_own_average_can_solve_from_a_teachers_weights(teacher, tmp_path):
    """With an average that never moves the two are the same run: the student starts as its teacher."""
    options = {"max_train_steps": 2, "ema_decay": 0.9999999, "dropout": 0.0}
    by_teacher = distill(teacher, tmp_path / "teacher", **options)
    by_itself = distill(teacher, tmp_path / "ema", solver_model="ema", **options)
    assert_same_weights(by_teacher, by_itself, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"teacher": None}, "--teacher is needed.*--solver_model ema"),
        ({"layers_per_block": 3}, "--layers_per_block is for a run without --teacher"),
        ({"teacher": None, "solver_model": "ema", "teacher_revision": "main"}, "--teacher_revision needs --teacher"),
        ({"matching": "local", "max_solver_steps": 3}, "--max_solver_steps does not go with --matching local"),
        ({"matching": "global", "inner_target": "ema"}, "--inner_target does not go with --matching global"),
        ({"max_solver_steps": 0}, "--max_solver_steps must be in 1..17"),
        ({"dsm_weight": 0, "dsm_sigma": "lognormal"}, "--dsm_sigma needs --dsm_weight; give both, or neither"),
        ({"dsm_weight": 0, "dsm_adaptive": False}, "--dsm_adaptive needs --dsm_weight"),
        ({"posthoc_ema_every": 7}, "--posthoc_ema_every needs --posthoc_ema"),
        ({"shuffle_buffer": 7}, "--shuffle_buffer needs --streaming"),
        ({"label_dropout": 0.1}, "--label_dropout needs --label_column"),
        ({"push_to_hub": True}, "--push_to_hub needs --hub_model_id"),
        ({"discriminator_start": 5}, "--discriminator_start needs --discriminator_weight"),
        (
            {"teacher": None, "solver_model": "ema", "architecture": "ddpmpp", "norm_num_groups": 4},
            "--norm_num_groups is not for --architecture ddpmpp",
        ),
        ({"lr_scheduler": "inverse_sqrt"}, "--lr_decay_after must be given with --lr_scheduler inverse_sqrt"),
        ({"lr_decay_after": 5}, "--lr_decay_after is for --lr_scheduler inverse_sqrt"),
        ({"teacher": None, "solver_model": "ema", "patch_size": 4}, "--patch_size is for --architecture dit"),
        ({"streaming": True, "eval_every": 1}, "--eval_every must be 0 with --streaming"),
        ({"dataset_name": "cifar10", "eval_every": 1}, "--eval_features must be given with --eval_every"),
    ],
)
def test_choices_that_contradict_each_other_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        CTMConfig(**{"teacher": "folder", "objective": ["ctm"], **options})


def test_edms_own_network_is_trained_and_distilled(tmp_path):
    options = {"architecture": "ddpmpp", "block_out_channels": [16, 16], "layers_per_block": 1, "attention_head_dim": 8}
    edm = train_edm.main(EDMConfig(output_dir=str(tmp_path / "edm"), max_train_steps=2, **SMALL, **options))
    student = distill(edm, tmp_path / "ctm", max_train_steps=2)
    for folder, target_time in ((edm, False), (student, True)):
        unet = DiffusionPipeline.from_pretrained(folder).unet
        assert type(unet).__name__ == "EDMUNet2DModel" and unet.has_target_time == target_time
        assert unet.config.model_channels == 8 and list(unet.config.block_out_channels) == [16, 16]


EDM2 = {
    "architecture": "edm2",
    "block_out_channels": [8, 12],
    "layers_per_block": 1,
    "attention_head_dim": 4,
    "dropout": 0.1,
    "lr_scheduler": "inverse_sqrt",
    "lr_decay_after": 2,
}


def test_edm2s_network_is_trained_distilled_and_resumed_bit_for_bit(tmp_path, monkeypatch):
    logged = []
    monkeypatch.setattr(Accelerator, "log", lambda self, values, step: logged.append(values))

    def edm(folder, **options):
        options = {"max_train_steps": 4, "ema_decay": 0.5, **SMALL, **EDM2, **options}
        return train_edm.main(EDMConfig(output_dir=str(folder), **options))

    programs = {"edm": edm}
    for name in ("edm", "ctm"):
        whole, part = tmp_path / name, tmp_path / f"{name}-part"
        saved = programs[name](whole, checkpointing_steps=2)
        os.makedirs(part)
        os.rename(whole / "checkpoint-2", part / "checkpoint-2")
        assert_same_weights(saved, programs[name](part, resume_from_checkpoint="latest"))
        programs["ctm"] = lambda folder, teacher=saved, **options: distill(
            teacher, folder, lr_scheduler="inverse_sqrt", lr_decay_after=2, **options
        )
        unet = DiffusionPipeline.from_pretrained(saved).unet
        assert type(unet).__name__ == "EDM2UNet2DModel" and unet.config.dropout == 0.1
        assert unet.has_target_time == (name == "ctm")
        assert (unet.log_variance_linear is None) == (name == "ctm")
        gains = [value for gain, value in unet.named_parameters() if gain.endswith("emb_gain")]
        assert len(gains) == 10 * (2 if name == "ctm" else 1) and all(gains)  # each has learned
    losses = {name.removeprefix("train/") for values in logged for name in values}
    assert {"dsm_loss", "uncertainty_loss", "trajectory_loss"} <= losses
    assert all(math.isfinite(value) for values in logged for value in values.values())


def test_two_processes_train_edm2s_network_as_one(tmp_path):
    """Its uncertainty is no part of the wrapped network's output, and its weights are normalized in each process."""
    options = {**SMALL, **EDM2, "dropout": 0.0, "max_train_steps": 3, "ema_decay": 0.0, "adam_epsilon": 1e-3}
    for processes in (1, 2):
        own = {"train_batch_size": 8 // processes, "output_dir": str(tmp_path / str(processes))}
        in_processes(processes, train_edm.main, EDMConfig(**{**options, **own}))
    one, two = (str(tmp_path / name / "pipeline") for name in "12")
    assert_same_weights(one, two, rtol=1e-4, atol=2e-5)


def test_a_dit_is_trained_and_distilled(tmp_path, monkeypatch):
    options = {"architecture": "dit", "block_out_channels": [16], "layers_per_block": 2, "attention_head_dim": 8}
    options |= {"label_dropout": 0.5, "dropout": 0.1}
    edm = train_edm.main(EDMConfig(output_dir=str(tmp_path / "edm"), max_train_steps=3, **SMALL, **options))
    logged = []
    monkeypatch.setattr(Accelerator, "log", lambda self, values, step: logged.append(values))
    few = {"max_train_steps": 3, "logging_steps": 1, "optimizer": "adam"}
    student = distill(edm, tmp_path / "ctm", **few, dropout=0.2)
    assert len(logged) == 3 and all(math.isfinite(value) for values in logged for value in values.values())
    pipes = {folder: DiffusionPipeline.from_pretrained(folder) for folder in (edm, student)}
    for folder, pipe in pipes.items():
        assert type(pipe.unet).__name__ == "CTMDiTTransformer2DModel" and pipe.unet.has_target_time == (folder != edm)
        assert len(pipe.unet.transformer_blocks) == pipe.unet.config.patch_size == 2
        assert pipe.unet.config.num_class_embeds == 11 and pipe.config.null_class == 10
        pipe.set_progress_bar_config(disable=True)
        image = pipe(class_labels="3", guidance_scale=2.0, num_inference_steps=2, output_type="pt").images
        assert image.shape == (1, 1, 8, 8) and image.isfinite().all()
    assert pipes[student].unet.config.dropout == 0.2
    before, after = weights(edm), weights(student)
    assert all(not torch.equal(after[name], before[name]) for name in before if "norm1.linear" in name)
    assert after["target_time_embedding.linear_2.weight"].any()  # at first zero


ADVERSARIAL = {
    "discriminator_weight": 1.0,
    "discriminator_backbones": ["digits"],
    "discriminator_channels": 8,
    "discriminator_start": 2,
    "dropout": 0.0,
}


def test_adversarial_stage_takes_turns_and_resumes_bit_for_bit(teacher, tmp_path):
    options = {**ADVERSARIAL, "checkpointing_steps": 1, "checkpoints_total_limit": 0, "max_train_steps": 6}
    whole = distill(teacher, tmp_path / "whole", **options)

    def saved(step):
        """Student, discriminator, the student's average."""
        folder = tmp_path / "whole" / f"checkpoint-{step}"
        files = sorted(folder.glob("model*.safetensors"))
        assert len(files) == 2, sorted(os.listdir(folder))
        schedule = torch.load(folder / "custom_checkpoint_0.pkl", weights_only=True)
        assert schedule["last_epoch"] == step  # the learning rate's schedule counts the turns of both
        (average,) = torch.load(folder / "run_state.pt", weights_only=True)["averages"].values()
        return [*map(load_file, files), average["weights"]]

    def moved(step):
        return [
            any(not torch.equal(value, after[name]) for name, value in before.items())
            for before, after in zip(saved(step), saved(step + 1), strict=True)
        ]

    # Steps 1 and 2 are the student's; from then on it and the discriminator take turns.
    of_student, of_discriminator = [True, False, True], [False, True, False]
    turns = [of_student, of_student, of_discriminator, of_student, of_discriminator]
    assert [moved(step) for step in range(1, 6)] == turns
    frozen = [name for name in saved(1)[1] if "projections" in name or "fingerprints" in name]
    assert frozen and all(torch.equal(saved(1)[1][name], saved(6)[1][name]) for name in frozen)

    for stop in (3, 4):  # before a turn of each
        folder = tmp_path / f"cut-{stop}"
        distill(teacher, folder, **{**options, "max_train_steps": stop})
        resumed = distill(teacher, folder, resume_from_checkpoint="latest", **options)
        assert_same_weights(whole, resumed)
        for file in sorted((folder / "checkpoint-6").glob("model*.safetensors")):
            ours, theirs = load_file(file), load_file(tmp_path / "whole" / "checkpoint-6" / file.name)
            assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_adversarial_term_moves_the_student_and_its_weight_counts(teacher, tmp_path):
    # With dropout: the discriminator draws nothing from the random numbers of the student.
    options = {**ADVERSARIAL, "discriminator_start": 0, "max_train_steps": 1, "dropout": 0.1}
    without = distill(teacher, tmp_path / "without", max_train_steps=1, dropout=0.1)
    students = [
        distill(teacher, tmp_path / f"weight-{weight}", **{**options, "discriminator_weight": weight})
        for weight in (1e-12, 1.0)
    ]
    assert_same_weights(without, students[0], rtol=1e-5, atol=1e-7)
    assert not torch.allclose(weights(without)["conv_out.weight"], weights(students[1])["conv_out.weight"], atol=1e-7)


def test_turn_of_the_discriminator(teacher, tmp_path, monkeypatch):
    events, seen = [], {}

    def watch(owner, name, event):
        original = getattr(owner, name)

        def watched(*args, **kwargs):
            events.append(event)
            seen[event] = args
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, watched)

    watch(Teacher, "denoise", "teacher")
    watch(train_ctm, "generator_loss", "generator")
    watch(train_ctm, "discriminator_loss", "discriminator")
    watch(train_ctm, "student_images", "fakes")
    options = {**ADVERSARIAL, "discriminator_start": 0, "max_train_steps": 2}
    saved = distill(teacher, tmp_path / "run", **options)
    # The student's step asks the teacher before the discriminator; the discriminator's step does not ask it at all.
    assert "teacher" in events[:-3] and events[-3:] == ["generator", "fakes", "discriminator"]
    (jumps,) = seen["fakes"]
    assert torch.equal(jumps.student_ema.conv_out.weight, weights(saved)["conv_out.weight"])
    _, estimate, augment = seen["generator"]
    assert estimate.requires_grad and [len(parameters.brightness) for parameters in augment] == [8]
    _, real, fake, augment = seen["discriminator"]
    assert not fake.requires_grad and fake.shape == real.shape and not torch.equal(fake, real)
    assert all(not torch.equal(*parameters.brightness.chunk(2)) for parameters in augment)  # fakes and data


@pytest.mark.slow
def test_processes_of_the_adversarial_stage_are_accumulation_steps(teacher, tmp_path, monkeypatch):
    """Batch statistics are those of a pass, so a process is compared with an accumulation step of as many images."""
    options = {
        **SMALL,
        **ADVERSARIAL,
        "teacher": teacher,
        "max_train_steps": 4,
        "max_solver_steps": 2,
        "learning_rate": 1e-3,
        "ema_decay": 0.0,
        "train_batch_size": 4,
        "checkpointing_steps": 4,
        "discriminator_start": 0,
        "dsm_adaptive": False,
    }
    # Constant weights: those of gradients are of a pass with accumulation, of all processes without.
    monkeypatch.setattr(adversarial, "GENERATOR_WEIGHTS", (1.0, 1.0))
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        config = CTMConfig(**options, output_dir=str(folder), gradient_accumulation_steps=2 // processes)
        in_processes(processes, train_ctm.main, config)
        assert len(glob.glob(str(folder / "checkpoint-4" / "random_states_*.pkl"))) == processes
    assert_same_weights(str(tmp_path / "1" / "pipeline"), str(tmp_path / "2" / "pipeline"), rtol=1e-4, atol=2e-5)
    one, two = (load_file(tmp_path / name / "checkpoint-4" / "model_1.safetensors") for name in "12")
    assert one.keys() == two.keys()
    # What batch norm keeps of the passes it saw is of the first process, and training does not use it.
    for name in (name for name in one if "running_" not in name and "num_batches" not in name):
        torch.testing.assert_close(
            one[name], two[name], rtol=1e-4, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_single_images_cannot_train_discriminators_of_one_pixel(teacher, tmp_path, monkeypatch):
    class Mean(torch.nn.Module):
        resolution = 8

        def forward(self, images):
            return [images.mean((2, 3), keepdim=True)]

    monkeypatch.setattr(train_ctm, "make_discriminator", lambda *_: ProjectedDiscriminator({"mean": Mean()}, 0, 1, 4))
    options = {**ADVERSARIAL, "discriminator_start": 0, "max_train_steps": 2}
    with pytest.raises(UserError, match="--train_batch_size must be 2 or more with these discriminators"):
        distill(teacher, tmp_path / "one", train_batch_size=1, **options)
    assert not (tmp_path / "one").exists()
    distill(teacher, tmp_path / "two", train_batch_size=2, **options)
    monkeypatch.undo()  # whose maps have several pixels
    distill(teacher, tmp_path / "digits", train_batch_size=1, **options)


def test_gradient_checkpointing_changes_nothing(teacher, tmp_path):
    options = {"max_train_steps": 2, "dropout": 0.0, "ema_decay": 0.0}
    plain = distill(teacher, tmp_path / "plain", **options)
    saving = distill(teacher, tmp_path / "saving", gradient_checkpointing=True, **options)
    assert_same_weights(plain, saving, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_compiled_training_is_the_same_and_is_not_compiled_again(teacher, tmp_path, monkeypatch):
    """The sub-batches of soft matching vary from step to step. (Dynamo alone: a compiler of code takes minutes.)"""
    compiled = []
    monkeypatch.setattr(
        run_module, "compile_network", lambda network: compiled.append(network) or compile_network(network, "eager")
    )
    graphs = []
    update = run_module.TrainingRun.update
    monkeypatch.setattr(
        run_module.TrainingRun,
        "update",
        lambda *given: update(*given) or graphs.append(counters["stats"]["unique_graphs"]),
    )
    options = {"dropout": 0.0, "ema_decay": 0.0, "max_train_steps": 12, "train_batch_size": 12, "seed": 3}
    plain = distill(teacher, tmp_path / "plain", **options)
    graphs.clear()
    student = distill(teacher, tmp_path / "compiled", compile=True, **options)
    assert len(compiled) == 3 and 3 <= graphs[5] <= 8  # student, average, teacher; with a gradient and without
    assert len(set(graphs[5:])) == 1
    assert_same_weights(plain, student, rtol=1e-4, atol=1e-6)
    assert DiffusionPipeline.from_pretrained(student).unet.config.sample_size == 8


def test_bf16_runs(teacher, tmp_path):
    student = distill(teacher, tmp_path / "bf16", mixed_precision="bf16", max_train_steps=2)
    assert all(value.isfinite().all() and value.dtype == torch.float32 for value in weights(student).values())


# What a careless user does --------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has fp16")
def test_fp16_without_a_gpu(teacher, tmp_path):
    with pytest.raises(UserError, match="--mixed_precision fp16 needs a GPU"):
        distill(teacher, tmp_path / "run", mixed_precision="fp16")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"label_column": None}, "--label_column is needed"),
        ({"resolution": 16}, "Set --resolution"),
        ({"image_mode": "RGB"}, "--image_mode"),
        ({"label_column": "digit"}, "--label_column digit is not a column"),
        ({"resume_from_checkpoint": "nowhere"}, "--resume_from_checkpoint nowhere"),
        (
            {"discriminator_weight": 1.0, "discriminator_backbones": ["nowhere"]},
            "The feature network nowhere cannot be",
        ),
    ],
)
def test_what_does_not_fit_is_said_before_anything_is_written(teacher, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        distill(teacher, tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_a_ctm_is_no_teacher(teacher, tmp_path):
    student = distill(teacher, tmp_path / "run", max_train_steps=1)
    with pytest.raises(UserError, match="cannot become a CTM"):
        distill(student, tmp_path / "again")


def test_folder_that_cannot_be_made_and_tracker_that_is_not_installed(teacher, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="config.yaml could not be written"):
        distill(teacher, tmp_path / "file" / "run")
    monkeypatch.setattr(devices, "get_available_trackers", list)
    with pytest.raises(UserError, match="--report_to wandb needs the package wandb"):
        distill(teacher, tmp_path / "run", report_to="wandb")
    assert not (tmp_path / "run").exists()


def test_resolution_must_fit_the_teachers_levels(tmp_path):
    with pytest.raises(UserError, match="--resolution must be a multiple of 2"):
        train_edm.main(EDMConfig(output_dir=str(tmp_path / "run"), resolution=7, **SMALL, **NETWORK))


def test_resuming_with_other_options_or_from_a_damaged_checkpoint_is_refused(teacher, tmp_path):
    folder = tmp_path / "run"
    distill(teacher, folder, max_train_steps=2, checkpointing_steps=2)
    for changed, named in (
        ({"learning_rate": 1e-2}, "learning_rate was 0.001, is 0.01"),
        ({"train_batch_size": 4}, "was 8, is 4"),
    ):
        with pytest.raises(UserError, match=named):
            distill(teacher, folder, max_train_steps=4, resume_from_checkpoint="latest", **changed)
    path = folder / "checkpoint-2" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="checkpoint-2 cannot be loaded"):
        distill(teacher, folder, max_train_steps=4, resume_from_checkpoint="latest")


def test_full_disk_leaves_older_checkpoints_whole(teacher, tmp_path):
    """A limit on the size of files refuses the write, as a full disk does."""
    folder = tmp_path / "run"
    distill(teacher, folder, max_train_steps=2, checkpointing_steps=2)
    listing = sorted(os.listdir(folder / "checkpoint-2"))
    code = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "import training.train_ctm as t; from training.cli.options import run_program;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000)); run_program(t.main, t.CTMConfig)"
    )
    arguments = [
        "--teacher",
        teacher,
        "--output_dir",
        str(folder),
        "--max_train_steps",
        "4",
        "--objective",
        "ctm",
        "--max_solver_steps",
        "2",
    ]
    for name, value in {
        **SMALL,
        "learning_rate": 1e-3,
        "checkpointing_steps": 2,
        "resume_from_checkpoint": "latest",
    }.items():
        arguments += [f"--{name}", str(value)]
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr[-2000:]
    assert "could not be written" in done.stderr and "Traceback" not in done.stderr
    assert sorted(os.listdir(folder)) == ["checkpoint-2", "config.yaml", "pipeline"]
    assert sorted(os.listdir(folder / "checkpoint-2")) == listing
    distill(
        teacher, folder, max_train_steps=4, checkpointing_steps=2, resume_from_checkpoint="latest"
    )  # with room again


def test_program_exits_with_a_message(tmp_path):
    arguments = ["--teacher", "nowhere", "--output_dir", str(tmp_path / "run")]
    command = [sys.executable, "-m", "training.train_ctm", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "error: --teacher nowhere cannot be loaded" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "run").exists()
