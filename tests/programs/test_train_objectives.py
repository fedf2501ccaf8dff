# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""The objectives in runs: with every other option, in stages, from a pool, resumed, split and counted."""

import functools
import json
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import (
    CMStochasticIterativeScheduler,
    DDPMScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    ScoreSdeVeScheduler,
)

from helpers import runs
from helpers.runs import NETWORK, assert_same_weights, fresh_accelerate, in_processes, weights  # noqa: F401
from training import train_ctm, train_edm
from training.cli.errors import UserError
from training.networks.teacher import load_teacher
from training.run import loop
from training.run.compiling import compile_network
from training.train_ctm import CTMConfig
from training.train_edm import EDMConfig


SMALL = {**runs.SMALL, "logging_steps": 1}
# One step of each, with the derivative in full.
ALL = {
    "objective": ["ctm", "regression@1", "eulerian@2", "lagrangian@3", "semigroup@4"],
    "eulerian_warmup": 0.0,
    "max_train_steps": 5,
}
FULL = {"lagrangian_gradient": "full", "dropout": 0.0}
# Adam moves the weights from the first step on; its epsilon leaves rounding small.
STEADY = {"dropout": 0.0, "ema_decay": 0.0, "optimizer": "adam", "adam_epsilon": 1e-3}
ADVERSARIAL = {"discriminator_weight": 1.0, "discriminator_backbones": ["digits"], "discriminator_channels": 8}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A tiny teacher with classes and with a label for none, trained for a few steps."""
    AcceleratorState._reset_state(reset_partial_state=True)  # another module may have left its precision
    folder = tmp_path_factory.mktemp("teacher") / "run"
    options = {"max_train_steps": 6, "ema_warmup": True, "label_dropout": 0.3, **SMALL, **NETWORK}
    return train_edm.main(EDMConfig(output_dir=str(folder), **options))


def distill(teacher, folder, **options):
    AcceleratorState._reset_state(reset_partial_state=True)
    few = {"objective": ["ctm"], "max_train_steps": 4, "max_solver_steps": 2, "learning_rate": 1e-3}
    options = {**few, **SMALL, **options}
    if not {"ctm", "regression"} & {name.partition("@")[0] for name in options["objective"]}:
        del options["max_solver_steps"]
    return train_ctm.main(CTMConfig(teacher=teacher, output_dir=str(folder), **options))


@pytest.fixture
def logs(monkeypatch):
    """The numbers of each step, by name."""
    logged = []

    def log(self, values, step):
        logged.append({name.removeprefix("train/"): value for name, value in values.items()})

    monkeypatch.setattr(Accelerator, "log", log)
    return logged


def assert_learned(logs, steps):
    """Every step had finite losses and was taken."""
    assert len(logs) == steps and logs[-1]["skipped_steps"] == 0
    for step in logs:
        assert step.get("trajectory_loss", step.get("discriminator_loss")) > 0


def record_of(pipeline):
    return json.loads((Path(pipeline) / "training.json").read_text())


# Every objective with every other choice ------------------------------------------------------------------------------


KINDS = {
    "edm": lambda: EDMEulerScheduler(sigma_data=0.75),
    "epsilon": DDPMScheduler,
    "v_prediction": lambda: DDPMScheduler(prediction_type="v_prediction"),
    "sample": lambda: DDPMScheduler(prediction_type="sample"),
    "flow_prediction": FlowMatchEulerDiscreteScheduler,
    "score": ScoreSdeVeScheduler,
}


@pytest.mark.parametrize("derivative", ["difference", "jvp"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_prediction(teacher, tmp_path, kind, derivative, logs):
    """The network is random for most of them, so that high levels would carry it away."""
    folder = shutil.copytree(teacher, tmp_path / "teacher")
    shutil.rmtree(folder / "scheduler")
    KINDS[kind]().save_pretrained(folder / "scheduler")
    options = {"sigma_max": 3.0, "learning_rate": 1e-5, "dropout": 0.0, "derivative": derivative}
    saved = distill(str(folder), tmp_path / "run", **ALL, **options)
    assert_learned(logs, 5)
    scheduler = json.loads((Path(saved) / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["prediction_type"] == kind


@pytest.mark.parametrize(
    "options",
    [
        {"dsm_weight": 0.5, "dsm_adaptive": False, "distance": "features", "distance_network": "digits"},
        {"label_dropout": 0.5, "distance": "pseudo_huber", "mixed_precision": "bf16", "derivative": "jvp"},
        {"dropout": 0.1, "gradient_checkpointing": True, "gradient_accumulation_steps": 2, "derivative": "jvp"},
        {"solver_model": "ema", "dropout": 0.1, "inner_target": "live"},
        {"pool_size": 2, "pool_from_data": 0.5, "mixed_precision": "bf16", "dsm_target": "teacher"},
        {**FULL, "mixed_precision": "bf16", "gradient_checkpointing": True},
        {**FULL, "distance": "pseudo_huber", "solver_model": "ema"},
    ],
)
def test_every_other_choice(teacher, tmp_path, options, logs):
    saved = distill(teacher, tmp_path / "run", **ALL, **options)
    assert_learned(logs, 5)
    assert all("dsm_weight" in step for step in logs)
    assert all(value.isfinite().all() and value.dtype == torch.float32 for value in weights(saved).values())


@pytest.mark.parametrize("name", ["ctm", "regression", "eulerian", "lagrangian"])
def test_without_score_matching(teacher, tmp_path, name, logs):
    distill(teacher, tmp_path / "run", objective=[name], dsm_weight=0.0, max_train_steps=2)
    assert_learned(logs, 2)
    assert not any(key.startswith("dsm") for step in logs for key in step)


@pytest.mark.parametrize("options", [{}, FULL, {"pool_size": 2}])
def test_the_adversarial_stage_lies_over_all(teacher, tmp_path, options, logs, capfd):
    """It takes turns with each objective."""
    stages = {**ALL, "max_train_steps": 10}
    stages["objective"] = [name if at == 0 else f"{name}@{2 * at}" for at, name in enumerate(train_ctm_names())]
    saved = distill(teacher, tmp_path / "run", **stages, **ADVERSARIAL, **options)
    assert_learned(logs, 10)
    assert all("generator_loss" in step for step in logs[::2]) and all("dsm_loss" not in step for step in logs[1::2])
    said = re.findall(r"Training \(([^)]*)\)", capfd.readouterr().err)
    assert list(dict.fromkeys(said)) == [f"{name}, adversarial" for name in train_ctm_names()]
    assert record_of(saved)["objective"] == stages["objective"]


def train_ctm_names():
    return [text.partition("@")[0] for text in ALL["objective"]]


def test_a_student_that_starts_as_its_teacher_takes_the_first_eulerian_step(teacher, tmp_path, logs):
    """Its loss is 0 but for rounding, so that score matching has nothing to be weighed by. Then both learn."""
    distill(teacher, tmp_path / "run", objective=["eulerian"], dropout=0.0)
    assert logs[0]["trajectory_loss"] < 1e-10 and logs[0]["dsm_weight"] < 1e-5 and logs[0]["grad_norm"] < 1e-5
    assert_learned(logs[1:], 3)
    assert all(step["trajectory_loss"] > 1e-6 and step["dsm_weight"] > 1e-3 for step in logs[1:])


@pytest.mark.parametrize("options", [{"dropout": 0.0}, {"dropout": 0.1}, {"mixed_precision": "bf16", "dropout": 0.0}])
def test_a_difference_is_a_derivative_whatever_the_noise_of_the_network(teacher, tmp_path, options, logs):
    """Dropout or rounding in it would be magnified 300 times."""
    options = {"objective": ["eulerian"], "eulerian_warmup": 0.0, "max_train_steps": 1, **options}
    for name, more in (("jvp", {"derivative": "jvp"}), ("difference", {"derivative_step": 0.003})):
        distill(teacher, tmp_path / name, **options, **more)
    exact, difference = (step["tangent_length"] for step in logs)
    assert difference == pytest.approx(exact, rel=0.02)


def test_the_full_gradient_takes_no_dropout(teacher, tmp_path):
    options = {"objective": ["lagrangian"], "lagrangian_gradient": "full"}
    with pytest.raises(UserError, match="--lagrangian_gradient full .* dropout .*Give --dropout 0, or"):
        distill(teacher, tmp_path / "run", **options)  # the teacher's own
    assert not (tmp_path / "run").exists()


def test_gradient_checkpointing_changes_nothing(teacher, tmp_path):
    plain = distill(teacher, tmp_path / "plain", **ALL, **STEADY)
    saving = distill(teacher, tmp_path / "saving", gradient_checkpointing=True, **ALL, **STEADY)
    assert_same_weights(plain, saving, rtol=1e-5, atol=1e-6)


def test_the_students_own_average_can_be_followed(teacher, tmp_path):
    """With an average that never moves the two are the same run: the student starts as its teacher."""
    options = {**ALL, **STEADY, "ema_decay": 0.9999999}
    by_teacher = distill(teacher, tmp_path / "teacher", **options)
    by_itself = distill(teacher, tmp_path / "ema", solver_model="ema", **options)
    assert_same_weights(by_teacher, by_itself, rtol=1e-4, atol=1e-6)


def test_eulerian_warms_up_where_the_student_starts_as_its_teacher(teacher, tmp_path, monkeypatch):
    """A warm-up in a later stage would teach the denoiser at every target, and undo the jumps that were learned."""
    seen = []

    class Watched(train_ctm.Jumps):
        def __post_init__(self):
            super().__post_init__()
            seen.append(self.progress)

    monkeypatch.setattr(train_ctm, "Jumps", Watched)
    first = distill(teacher, tmp_path / "first", objective=["regression", "eulerian@2"])
    assert seen == [0, 0.25, 0.5, 0.75]
    seen.clear()
    distill(teacher, tmp_path / "second", objective=["eulerian"], init_from=first, max_train_steps=2)
    assert seen == [1, 1]


def test_a_second_run_goes_on_from_the_weights_of_the_first(teacher, tmp_path, logs):
    """The student is no longer its teacher, so that the first eulerian step has something to learn."""
    first = distill(teacher, tmp_path / "first", **ALL, **{**STEADY, "learning_rate": 0.01})
    distill(teacher, tmp_path / "second", objective=["eulerian"], dropout=0.0, init_from=first, max_train_steps=1)
    assert_learned(logs, 6)
    assert logs[-1]["trajectory_loss"] > 1e-6


# A step that is split -------------------------------------------------------------------------------------------------


POOL = {"num_train_timesteps": 6, "pool_from_data": 0.5}  # a short grid, for speed
SPLIT = {**ALL, **STEADY, "dsm_adaptive": False, "dsm_share": 0.5, "pool_size": 2, "pool_refresh": 1, **POOL}


def test_accumulated_passes_are_one(teacher, tmp_path):
    one = distill(teacher, tmp_path / "one", **SPLIT)
    two = distill(teacher, tmp_path / "two", train_batch_size=4, gradient_accumulation_steps=2, **SPLIT)
    assert_same_weights(one, two, rtol=1e-4, atol=2e-5)
    assert record_of(one)["teacher_evaluations"] == record_of(two)["teacher_evaluations"] > 0


def test_two_processes_are_one(teacher, tmp_path):
    """And a pool that two have filled serves one."""
    options = {**SPLIT, "teacher": teacher, "learning_rate": 1e-3, "checkpointing_steps": 5}
    for processes in (1, 2):
        small = {**SMALL, "train_batch_size": 8 // processes, "output_dir": str(tmp_path / str(processes))}
        in_processes(processes, train_ctm.main, CTMConfig(**{**small, **options}))
    one, two = (str(tmp_path / name / "pipeline") for name in "12")
    assert_same_weights(one, two, rtol=1e-4, atol=2e-5)
    assert record_of(one)["teacher_evaluations"] == record_of(two)["teacher_evaluations"] > 0
    pools = [
        torch.load(tmp_path / name / "checkpoint-5" / "run_state.pt", weights_only=True)["kept"]["pool"]
        for name in "12"
    ]
    torch.testing.assert_close(*pools, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("derivative", ["difference", "jvp"])
def test_compiled_derivatives_are_the_same(teacher, tmp_path, derivative, monkeypatch):
    """Dynamo alone: a compiler of code takes minutes."""
    monkeypatch.setattr(loop, "compile_network", functools.partial(compile_network, backend="eager"))
    options = {"objective": ["eulerian"], "eulerian_warmup": 0.0, "derivative": derivative, "max_train_steps": 2}
    plain = distill(teacher, tmp_path / "plain", **options, **STEADY)
    compiled = distill(teacher, tmp_path / "compiled", compile=True, **options, **STEADY)
    assert_same_weights(plain, compiled, rtol=1e-4, atol=1e-6)


# Resuming -------------------------------------------------------------------------------------------------------------


def test_resumed_in_any_stage_with_any_pool_is_uninterrupted_bit_for_bit(teacher, tmp_path):
    """A pool of three trajectories a sample: two in the first stage, the third in the last, then others."""
    options = {
        "objective": ["regression", "eulerian@2", "ctm@4"],
        "max_train_steps": 8,
        "pool_size": 3,
        "pool_refresh": 2,
        **POOL,
        "gradient_accumulation_steps": 2,
        "train_batch_size": 4,
        "lr_scheduler": "cosine",
    }
    whole = distill(teacher, tmp_path / "whole", checkpointing_steps=1, checkpoints_total_limit=0, **options)
    filled = []
    for step in (1, 2, 5, 7):
        folder = tmp_path / f"part-{step}"
        os.makedirs(folder)
        os.rename(tmp_path / "whole" / f"checkpoint-{step}", folder / f"checkpoint-{step}")  # as if it had stopped
        state = torch.load(folder / f"checkpoint-{step}" / "run_state.pt", weights_only=True)["kept"]
        filled.append(state["pool"]["refreshes"])
        part = distill(teacher, folder, resume_from_checkpoint="latest", **options)
        assert_same_weights(whole, part)
        assert {**record_of(part), "options": 0} == {**record_of(whole), "options": 0}
    assert filled == [1, 2, 3, 4]
    with pytest.raises(UserError, match="--objective was .*regression.*, is .*ctm"):
        distill(teacher, folder, resume_from_checkpoint="latest", **{**options, "objective": ["ctm"]})


# The record -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch):
    """The number of images that each call of a teacher's network has seen."""
    seen = []

    def load(options):
        loaded = load_teacher(options)
        for part in loaded.parts.values():
            part.network.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
        return loaded

    monkeypatch.setattr(train_ctm, "load_teacher", load)
    return seen


@pytest.mark.parametrize(
    "options",
    [
        {},
        {
            "gradient_accumulation_steps": 2,
            "pool_size": 4,
            "pool_refresh": 1,
            "solver": "unipc",
            "pool_substeps": 2,
            **POOL,
        },
        {"teacher_guidance_scale": 2.0, "label_dropout": 0.5},
        {"dsm_target": "teacher", "dsm_share": 0.5, **FULL},
        {**ADVERSARIAL, "pool_size": 2, "pool_refresh": 1, "objective": ["eulerian", "regression@2"], **POOL},
    ],
)
def test_evaluations_of_the_teacher_are_counted(teacher, tmp_path, options, asked):
    """In the adversarial case the last step is the discriminator's, and fills the pool."""
    options = {**ALL, **({"max_train_steps": 4} if "discriminator_weight" in options else {}), **options}
    saved = distill(teacher, tmp_path / "run", checkpointing_steps=2, **options)
    assert record_of(saved)["teacher_evaluations"] == sum(asked) > 0
    distill(teacher, tmp_path / "run", resume_from_checkpoint="latest", **options)  # nothing is left to do
    assert record_of(saved)["teacher_evaluations"] == sum(asked)


def test_evaluations_of_a_guided_teacher_are_those_of_both_networks(teacher, tmp_path, asked):
    options = {"guidance_teacher": teacher, "teacher_guidance_scale": 2.0, "objective": ["lagrangian"]}
    saved = distill(teacher, tmp_path / "run", max_train_steps=2, **options)
    # The target, and what score matching learns, of 8 images in 2 steps by 2 networks.
    assert record_of(saved)["teacher_evaluations"] == sum(asked) == 2 * 8 * 2 * 2


def test_evaluations_of_a_consistency_model_are_counted(teacher, tmp_path, asked):
    folder = shutil.copytree(teacher, tmp_path / "teacher")
    shutil.rmtree(folder / "scheduler")
    CMStochasticIterativeScheduler().save_pretrained(folder / "scheduler")
    options = {"matching": "global", "dsm_adaptive": False, "max_solver_steps": None}
    saved = distill(str(folder), tmp_path / "run", max_train_steps=2, **options)
    assert record_of(saved)["teacher_evaluations"] == sum(asked) == 2 * 8
    for idle in ({"pool_size": 2}, {"dsm_target": "teacher"}):
        with pytest.raises(UserError, match=f"--{next(iter(idle))} has no use: .* is a consistency model"):
            distill(str(folder), tmp_path / "no", **options, **idle)
    with pytest.raises(UserError, match="is a consistency model.*Give --matching global with --objective ctm"):
        distill(str(folder), tmp_path / "no", objective=["eulerian"], dsm_adaptive=False)


# What a careless user does --------------------------------------------------------------------------------------------


CHOICES = "--objective must be one or several of ctm, regression, eulerian, lagrangian, semigroup, each but the first"


@pytest.mark.parametrize(
    "options, message",
    [
        ({"objective": ["regresion"]}, CHOICES),
        ({"objective": []}, CHOICES),
        ({"objective": ["ctm@5"]}, CHOICES),
        ({"objective": ["ctm", "regression"]}, CHOICES),
        ({"objective": ["ctm", "regression@x"]}, CHOICES),
        ({"objective": ["ctm", "regression@9", "eulerian@9"]}, CHOICES),
        (
            {"objective": ["ctm", "eulerian@50"], "max_train_steps": 50},
            "--objective must be such that eulerian begins before --max_train_steps 50",
        ),
        (
            {"objective": ["eulerian"], "pool_size": 8},
            "--pool_size is for --objective ctm or regression; give that, or leave it out",
        ),
        ({"objective": ["regression"], "matching": "local"}, "--matching is for --objective ctm"),
        ({"objective": ["semigroup"], "solver": "dpm"}, "--solver is for --objective ctm or regression"),
        ({"derivative": "jvp"}, "--derivative is for --objective eulerian or lagrangian"),
        ({"eulerian_warmup": 0.1, "objective": ["lagrangian"]}, "--eulerian_warmup is for --objective eulerian"),
        (
            {"lagrangian_gradient": "full", "objective": ["eulerian"]},
            "--lagrangian_gradient is for --objective lagrangian",
        ),
        (
            {"lagrangian_gradient": "full", "objective": ["lagrangian"], "derivative": "jvp"},
            "--derivative must be difference with --lagrangian_gradient full",
        ),
        ({"pool_refresh": 4, "pool_size": 0}, "--pool_refresh needs a pool, --pool_size"),
        ({"pool_from_data": 1.5, "pool_size": 8}, "--pool_from_data must be in"),
        ({"pool_size": -1}, "--pool_size must be"),
        ({"objective": ["ctm", "semigroup@9"], "dsm_weight": 0.0}, "--dsm_weight must be above 0 with semigroup"),
        ({"solver_model": "ema", "dsm_target": "teacher"}, "--dsm_target does not go with --solver_model ema"),
    ],
)
def test_choices_that_contradict_each_other_are_refused(options, message):
    with pytest.raises(UserError, match=re.escape(message)) as error:
        CTMConfig(**{"teacher": "folder", **options})
    assert "\n" not in str(error.value)


def test_a_pool_that_takes_more_memory_than_is_free_is_refused(teacher, tmp_path, monkeypatch):
    # A trajectory is 18 states of 8 x 8 numbers of 4 bytes; a step has 8 images.
    monkeypatch.setattr(train_ctm.psutil, "virtual_memory", lambda: SimpleNamespace(available=20 * 18 * 8 * 8 * 4))
    with pytest.raises(UserError, match="--pool_size must be at most 2: each takes .* GiB .*got 3"):
        distill(teacher, tmp_path / "run", pool_size=3)
    assert not (tmp_path / "run").exists()
    distill(teacher, tmp_path / "run", pool_size=2, max_train_steps=1)
