# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""A run, whatever its loss: averages, second networks, skipped steps, signals, trackers, resuming after any step."""

import functools
import io
import json
import math
import os
import shutil
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

from diffusers_ctm import CTMPipeline
from diffusers_ctm.unet_edm2 import normalize
from helpers.runs import NETWORK, assert_same_weights, fresh_accelerate, same, weights  # noqa: F401
from training import evaluate, train_edm
from training.cli.errors import UserError
from training.data.batches import load_images, step_indices
from training.data.images import ImageDataset
from training.evaluate import EvaluateConfig
from training.networks.build import build_scheduler, build_unet
from training.run import devices, interruption, loop, monitor
from training.run.learner import TrainedNetwork
from training.run.loop import TrainingRun
from training.run.monitor import SIGMA_BINS, Means
from training.train_edm import EDMConfig


TINY = {
    **NETWORK, "label_column": "label", "train_batch_size": 4, "report_to": "none", "sample_every": 0,
    "checkpointing_steps": 0, "logging_steps": 2, "max_train_steps": 4,
}  # fmt: skip


def train(folder, **options):
    return train_edm.main(EDMConfig(output_dir=str(folder), **{**TINY, **options}))


def interrupt(whole, part, step):
    """Make `part` what `whole` was after its checkpoint of `step`, as if it had been killed there."""
    os.makedirs(part)
    os.rename(whole / f"checkpoint-{step}", part / f"checkpoint-{step}")


def test_each_process_drops_out_other_units(tmp_path, monkeypatch):
    """Torch's own random numbers depend on the seed and the process."""
    start_accelerator = Accelerator

    def first_number(process, seed):
        def started(*args, **options):
            accelerator = start_accelerator(*args, **options)
            PartialState._shared_state["process_index"] = process
            return accelerator

        monkeypatch.setattr(devices, "Accelerator", started)
        AcceleratorState._reset_state(reset_partial_state=True)
        devices.make_accelerator(EDMConfig(output_dir=str(tmp_path), seed=seed, report_to="none"))
        return torch.rand(()).item()

    numbers = [first_number(process, seed) for process, seed in ((0, 5), (1, 5), (0, 9), (0, 5))]
    assert numbers[0] == numbers[3] and len(set(numbers)) == 3


# Averages -------------------------------------------------------------------------------------------------------------


def test_each_rate_is_a_pipeline_and_the_targets_rate_is_kept_once(tmp_path):
    path = train(tmp_path / "run", ema_decay=0.5, extra_ema_decays=[0.5, 0.0, 0.9])
    folders = [path, *(f"{path}-ema-{decay}" for decay in (0.0, 0.9))]
    assert sorted(os.listdir(tmp_path / "run")) == ["config.yaml", *map(os.path.basename, folders)]
    for folder in folders:
        assert DiffusionPipeline.from_pretrained(folder).unet.config.sample_size == 8
    assert_same_weights(train(tmp_path / "live", ema_decay=0.0), folders[1])
    assert not same(weights(path), weights(folders[2]))


# A second network -----------------------------------------------------------------------------------------------------


class Judge(torch.nn.Module):
    """A discriminator in small: parameters, buffers that training changes, dropout."""

    def __init__(self):
        super().__init__()
        layers = [torch.nn.Linear(64, 8), torch.nn.BatchNorm1d(8), torch.nn.Dropout(0.2), torch.nn.Linear(8, 1)]
        self.body = torch.nn.Sequential(torch.nn.Flatten(), *layers)

    def forward(self, x):
        return self.body(x)


def start(folder, judges=torch.optim.SGD, **options):
    """A run with a network and its judge, before its first step."""
    config = EDMConfig(output_dir=str(folder), **{**TINY, "dropout": 0.0, **options})
    dataset = load_images(config)
    torch.manual_seed(config.seed)
    network = build_unet(config, dataset, config.dropout, 0.0)
    scheduler = build_scheduler(config, 0.002, 80.0)
    samples = {"heun-18": {"num_inference_steps": 18}}
    run = TrainingRun(config, dataset, network, lambda unet: CTMPipeline(unet, scheduler), samples)
    judge = run.place(Judge())
    run.add_network("judge", judge, judges(judge.parameters(), lr=0.1))
    return run


def learn(run, until=None, broken=lambda step: False):
    """Train both networks until step `until`; at steps with `broken(step)` the loss of the first is infinite."""
    for batch in run.batches():
        if run.step == until:
            break
        with run.accumulate():
            noise = batch.random.normal(*batch.images.shape[1:])
            labels = {"class_labels": batch.labels}
            levels = torch.zeros(len(noise))
            output = run.network(batch.images + noise, levels, **labels).sample
            loss = (output - batch.images).square().mean() * (float("inf") if broken(run.step) else 1)
            run.update(loss, {"loss": loss})
            judge = run.networks["judge"].network
            loss = (judge(batch.images) - judge(noise)).square().mean()
            run.update(loss, {"judge_loss": loss}, network="judge")
    return run


def state(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


@pytest.mark.parametrize("accumulation", [1, 2])
def test_two_networks_and_all_averages_resume_bit_for_bit(tmp_path, accumulation):
    options = {"max_train_steps": 5, "lr_scheduler": "cosine", "gradient_accumulation_steps": accumulation}
    options |= {"extra_ema_decays": [0.5], "posthoc_ema": [0.05, 0.1], "posthoc_ema_every": 2}
    adam = functools.partial(torch.optim.Adam, fused=True)
    whole = learn(start(tmp_path / "whole", adam, checkpointing_steps=3, **options))
    interrupt(tmp_path / "whole", tmp_path / "part", 3)
    part = start(tmp_path / "part", adam, resume_from_checkpoint="latest", **options)
    assert part.step == 0 and not same(state(part.networks["judge"].bare), state(whole.networks["judge"].bare))
    learn(part)
    for name in ("main", "judge"):
        assert same(state(part.networks[name].bare), state(whole.networks[name].bare))
        ours, theirs = (run.networks[name].optimizer.state_dict()["state"] for run in (part, whole))
        assert all(same(values, theirs[index]) for index, values in ours.items()) and ours
    assert all(same(state(part.averages[name].module), state(whole.averages[name].module)) for name in whole.averages)
    snapshots = sorted(os.listdir(tmp_path / "whole" / "ema-snapshots"))
    assert snapshots == [f"sigma_rel-{width}-step-{step:06d}" for width in (0.05, 0.1) for step in (2, 4, 5)]
    for name in snapshots[1:3] + snapshots[4:]:
        assert_same_weights(tmp_path / "whole" / "ema-snapshots" / name, tmp_path / "part" / "ema-snapshots" / name)
    assert part.networks["judge"].bare.body[2].num_batches_tracked == 2 * 5 * accumulation  # buffers too


def test_a_step_of_one_network_leaves_the_other(tmp_path):
    run = start(tmp_path / "run", max_train_steps=3, lr_scheduler="linear", learning_rate=1.0)
    main, judge = run.networks["main"], run.networks["judge"]
    rates, steps = [], []
    run.on_step = lambda run: steps.append(run.step)
    for batch in run.batches():
        with run.accumulate():
            before = state(main.bare), state(run.ema.module)
            score = judge.network(run.network(batch.images, torch.zeros(4), class_labels=batch.labels).sample).mean()
            run.update(score, {"score": score}, network="judge")  # its gradient passes through the first network too
            assert same(state(main.bare), before[0]) and same(state(run.ema.module), before[1])
            assert all(parameter.grad is None for parameter in main.bare.parameters())
            rates.append(main.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([1.0, 2 / 3, 1 / 3])  # steps of the run count, whichever network learns
    assert steps == [1, 2, 3]
    assert run.ema.updates == 0 and judge.optimizer.param_groups[0]["lr"] == 0.1


@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_accumulation_and_clipping_of_the_second_network(tmp_path, clip, monkeypatch):
    """One step of plain gradient descent, by hand. The norm that is logged is that before clipping."""
    logged = {}
    monkeypatch.setattr(Accelerator, "log", lambda self, values, step: logged.update(values))
    run = start(tmp_path / "run", max_train_steps=1, gradient_accumulation_steps=2, max_grad_norm=clip)
    judge = run.networks["judge"].bare.eval()
    before, gradients = state(judge), []
    for batch in run.batches():
        with run.accumulate():
            loss = 100 * judge(batch.images).square().mean()
            gradients.append(torch.autograd.grad(loss, list(judge.parameters()), retain_graph=True))
            run.update(loss, {"loss": loss}, network="judge")
    gradient = [(a + b) / 2 for a, b in zip(*gradients, strict=True)]
    norm = torch.cat([value.flatten() for value in gradient]).norm()
    assert norm > 0.5 and logged["train/judge_grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
    factor = clip / norm if clip else 1.0
    for (name, parameter), value in zip(judge.named_parameters(), gradient, strict=True):
        torch.testing.assert_close(parameter, before[name] - 0.1 * value * factor, rtol=1e-4, atol=1e-6)


def test_networks_of_a_checkpoint_must_be_those_of_the_run(tmp_path):
    learn(start(tmp_path / "run", checkpointing_steps=4))
    with pytest.raises(UserError, match="holds the networks main, judge, this run has main.*--init_from"):
        train(tmp_path / "run", dropout=0.0, resume_from_checkpoint="latest", max_train_steps=5)


# Weights that are normalized ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer, rate", [("adam", 0.05), ("radam", 10.0)])  # RAdam starts slowly
def test_weights_are_normalized_after_each_step_that_is_taken(tmp_path, optimizer, rate):
    """After the averages, which see what the optimizer left: at rate 0 they are just that."""
    options = {"architecture": "edm2", "norm_num_groups": 8, "gradient_accumulation_steps": 2, "max_train_steps": 5}
    run = start(tmp_path / "run", optimizer=optimizer, learning_rate=rate, ema_decay=0.0, **options)
    names = [name for name, _ in run.bare_network.named_parameters() if name.endswith("weight")]
    before, moved = [state(run.bare_network)], []

    def check(run):
        now, left = state(run.bare_network), state(run.ema.module)
        if run.step == 4:
            assert same(now, before[-1])  # the step was skipped
        else:
            moved.append(sum(not torch.equal(left[name], before[-1][name]) for name in names))
            for name, value in now.items():
                expected = normalize(left[name], tuple(range(1, value.ndim))) if name in names else left[name]
                torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-7)
        before.append(now)

    run.on_step = check
    learn(run, broken=lambda step: step == 3)
    lengths = torch.cat([before[-1][name].flatten(1).square().mean(1).sqrt() for name in names])
    assert len(moved) == 4 and moved[-1] > 20 and (lengths - 1).abs().max() < 2e-4
    left = torch.cat([state(run.ema.module)[name].flatten(1).square().mean(1).sqrt() for name in names])
    assert (left - 1).abs().max() > 1e-3


# A first stage --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def first_stage(tmp_path_factory):
    """A finished run with a checkpoint, its network, and its averages."""
    AcceleratorState._reset_state(reset_partial_state=True)
    run = start(tmp_path_factory.mktemp("first") / "run", checkpointing_steps=4, extra_ema_decays=[0.5])
    learn(run).finish()
    return run


def started(folder, **options):
    """A run as it stands before its first step."""
    return learn(start(folder, **options), until=0)


@pytest.mark.parametrize("source", [".", "checkpoint-4", "pipeline"])
def test_a_run_starts_from_a_first_stage(tmp_path, first_stage, source):
    path = os.path.join(first_stage.options.output_dir, source)
    run = started(tmp_path / "run", init_from=path, extra_ema_decays=[0.5, 0.25])
    average = state(first_stage.ema.module)
    assert same(state(run.bare_network), average if source == "pipeline" else state(first_stage.bare_network))
    assert same(state(run.ema.module), average) and same(state(run.averages["0.25"].module), average)
    half = average if source == "pipeline" else state(first_stage.averages["0.5"].module)
    assert same(state(run.averages["0.5"].module), half) and not same(half, state(first_stage.bare_network))
    assert run.step == 0 and not run.networks["main"].optimizer.state  # these start anew
    before = state(run.ema.module)
    run.ema.step(run.bare_network)  # and the average goes on: it copies no more
    for name, value in run.bare_network.named_parameters():
        expected = 0.999 * before[name] + 0.001 * value
        torch.testing.assert_close(run.ema.module.state_dict()[name], expected)


def test_resuming_wins_over_a_first_stage(tmp_path, first_stage):
    path = first_stage.options.output_dir
    options = {"max_train_steps": 3, "init_from": path}
    whole = learn(start(tmp_path / "whole", checkpointing_steps=2, **options))
    interrupt(tmp_path / "whole", tmp_path / "part", 2)
    options["init_from"] = "gone"  # nobody looks
    part = learn(start(tmp_path / "part", resume_from_checkpoint="latest", **options))
    assert same(state(part.bare_network), state(whole.bare_network))
    assert same(state(part.ema.module), state(whole.ema.module))
    assert part.folder.record["first_stage"]["name"] == "run"  # the true one


@pytest.mark.parametrize(
    "source, options, message",
    [
        ("nowhere", {}, "--init_from nowhere is no checkpoint folder, no pipeline"),
        (
            None,
            {"block_out_channels": [16, 16]},
            "It is not of the network that this run trains.\n.* size mismatch for",
        ),
        (
            None,
            {"sigma_data": 0.5},
            "run/checkpoint-4 learned with another preconditioning: sigma_data 0.75, here 0.5. ",
        ),
        (
            "pipeline",
            {"sigma_data": 0.5},
            "run/pipeline learned with another preconditioning: sigma_data 0.75, here 0.5. ",
        ),
        (None, {"layers_per_block": 2}, "It is not of the network that this run trains.\n.* Missing key"),
    ],
)
def test_a_first_stage_that_does_not_fit(tmp_path, first_stage, source, options, message):
    with pytest.raises(UserError, match=message):
        folder = first_stage.options.output_dir
        source = os.path.join(folder, "pipeline") if source == "pipeline" else source or folder
        started(tmp_path / "run", init_from=source, **options)
    assert not (tmp_path / "run").exists()


def test_a_damaged_first_stage(tmp_path, first_stage):
    shutil.copytree(os.path.join(first_stage.options.output_dir, "checkpoint-4"), tmp_path / "checkpoint-4")
    with open(tmp_path / "checkpoint-4" / "model.safetensors", "r+b") as file:
        file.truncate(1000)
    with pytest.raises(UserError, match="checkpoint-4 cannot be loaded"):
        started(tmp_path / "run", init_from=str(tmp_path / "checkpoint-4"))


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_a_first_stage_in_other_files(tmp_path, first_stage, variant):
    pipe = DiffusionPipeline.from_pretrained(os.path.join(first_stage.options.output_dir, "pipeline"))
    pipe.save_pretrained(tmp_path / "pipeline", variant=variant, max_shard_size="20KB", safe_serialization=False)
    run = started(tmp_path / "run", init_from=str(tmp_path / "pipeline"))
    assert same(state(run.bare_network), state(first_stage.ema.module))


@pytest.mark.parametrize("place", ["pipeline", "model.safetensors", "run_state.pt"])
def test_a_broken_first_stage_is_named(tmp_path, first_stage, place):
    source = os.path.join(first_stage.options.output_dir, "pipeline" if place == "pipeline" else "checkpoint-4")
    shutil.copytree(source, tmp_path / "source")
    if place == "run_state.pt":
        saved = torch.load(tmp_path / "source" / place, weights_only=True)
        saved["averages"]["0.5"]["weights"]["conv_out.bias"][0] = math.inf
        torch.save(saved, tmp_path / "source" / place)
        name = "average 0.5, conv_out.bias"
    else:
        path = tmp_path / "source" / ("unet/diffusion_pytorch_model.safetensors" if place == "pipeline" else place)
        saved = load_file(path)
        saved["conv_out.bias"][0] = math.nan
        save_file(saved, path, metadata={"format": "pt"})
        name = "unet.conv_out.bias" if place == "pipeline" else "conv_out.bias"
    with pytest.raises(UserError, match=f"^--init_from .*source has infinite or NaN weights: {name}"):
        started(tmp_path / "run", init_from=str(tmp_path / "source"))
    assert not (tmp_path / "run").exists()


# What changes when a run resumes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("then", [5, 8])
@pytest.mark.parametrize(
    "kind, share", [("cosine", lambda x: (1 + math.cos(math.pi * x)) / 2), ("linear", lambda x: 1 - x)]
)
def test_a_jump_of_the_learning_rate_is_said(tmp_path, capsys, kind, share, then):
    steps, rates = 4 if then == 8 else 6, []
    options = {"lr_scheduler": kind, "checkpointing_steps": 4}
    learn(start(tmp_path / "run", max_train_steps=steps, **options), until=5)
    run = start(tmp_path / "run", max_train_steps=then, resume_from_checkpoint="latest", **options)
    run.on_step = lambda run: rates.append(run.lr_scheduler.get_last_lr()[0] / 1e-3)
    capsys.readouterr()
    learn(run)
    said = f"goes from {share(4 / steps):.3f} to {share(4 / then):.3f} of its peak: --lr_scheduler {kind} ends at "
    assert said + f"--max_train_steps, which was {steps} at the checkpoint and is {then}." in capsys.readouterr().out
    assert rates == pytest.approx([share(step / then) for step in range(5, then + 1)], abs=1e-9)


def test_changes_that_count_are_said_and_nothing_else_is(tmp_path, capsys):
    first = start(tmp_path / "run", checkpointing_steps=2, train_batch_size=4, mixed_precision="bf16")
    learn(first, until=3)
    again = {"resume_from_checkpoint": "latest", "checkpointing_steps": 2}
    AcceleratorState._reset_state(reset_partial_state=True)
    learn(start(tmp_path / "run", mixed_precision="bf16", **again), until=3)
    said = capsys.readouterr().out
    assert "Resumed from" in said and "Other options" not in said and "learning rate" not in said
    AcceleratorState._reset_state(reset_partial_state=True)
    split = {"train_batch_size": 2, "gradient_accumulation_steps": 2}
    learn(start(tmp_path / "run", mixed_precision="auto", max_train_steps=3, **split, **again))
    changes = ["max_train_steps was 4, is 3", "train_batch_size was 4, is 2", "gradient_accumulation_steps was 1, is 2"]
    changes = "; --".join([*changes, "mixed_precision was bf16, is no"])
    said = capsys.readouterr().out
    assert f"Other options than at the checkpoint: --{changes}.\n" in said and "learning rate" not in said


@pytest.mark.parametrize("place", ["main: conv_out.bias", "judge: body.2.running_var", "average 0.999: conv_in.weight"])
def test_a_broken_checkpoint_is_named(tmp_path, monkeypatch, place):
    run = start(tmp_path / "run", checkpointing_steps=2)
    title, name = place.split(": ")
    module = run.averages["0.999"].module if title.startswith("average") else run.networks[title].bare
    with monkeypatch.context() as patch:  # the check stands before the saving
        patch.setattr(TrainingRun, "_check_weights", lambda self: module.state_dict()[name].fill_(math.nan))
        learn(run, until=2)
    again = start(tmp_path / "run", resume_from_checkpoint="latest")
    with pytest.raises(UserError, match=f"checkpoint-2 has infinite or NaN weights, in {place}. Resume from another"):
        learn(again)


# Skipped steps --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adam", "radam"])
def test_a_broken_step_changes_nothing_of_that_network(tmp_path, optimizer):
    run = start(tmp_path / "run", max_train_steps=4, optimizer=optimizer, gradient_accumulation_steps=2)
    main, judge = run.networks["main"], run.networks["judge"]

    def snapshot():
        return state(main.bare), state(run.ema.module), main.optimizer.state_dict()["state"][0]

    learn(run, until=2)
    before, judged = (
        [{name: torch.clone(value) for name, value in part.items()} for part in snapshot()],
        state(judge.bare),
    )
    learn(run, until=3, broken=lambda step: step == 2)
    assert all(same(a, b) for a, b in zip(snapshot(), before, strict=True))
    assert not same(state(judge.bare), judged)
    assert (main.skipped, main.skipped_in_a_row, judge.skipped) == (1, 1, 0)
    learn(run)
    assert not any(same(a, b) for a, b in zip(snapshot(), before, strict=True))
    assert (main.skipped, main.skipped_in_a_row) == (1, 0)


def test_an_infinite_gradient_of_a_finite_loss_is_found_too(tmp_path):
    run = start(tmp_path / "run", max_train_steps=2)
    for batch in run.batches():
        with run.accumulate():
            before = state(run.bare_network)
            output = run.network(batch.images, torch.zeros(4), class_labels=batch.labels).sample
            if run.step == 1:
                output.register_hook(lambda gradient: gradient * float("inf"))
            run.update(output.mean(), {"loss": output.mean()})
    assert same(state(run.bare_network), before) and run.networks["main"].skipped == 1


def test_skipped_steps_are_shown_and_counted_on_when_resumed(tmp_path, monkeypatch):
    logged = {}
    monkeypatch.setattr(Accelerator, "log", lambda self, values, step: logged.update({step: values}))
    broken = {1, 2, 4}.__contains__
    options = {"max_train_steps": 6, "logging_steps": 3}
    learn(start(tmp_path / "whole", checkpointing_steps=4, **options), broken=broken)
    skipped = [logged[step]["train/skipped_steps"] for step in (3, 6)]
    losses = [logged[step]["train/loss"] for step in (3, 6)]
    assert skipped == [2, 3] and all(map(math.isfinite, losses))
    interrupt(tmp_path / "whole", tmp_path / "part", 4)
    logged.clear()
    learn(start(tmp_path / "part", resume_from_checkpoint="latest", **options), broken=broken)
    # The mean goes on from the checkpoint's, whose step is one of three.
    assert logged[6]["train/skipped_steps"] == 3 and logged[6]["train/loss"] == losses[1]


def test_too_many_skipped_steps_in_a_row_stop_the_run(tmp_path):
    """No checkpoint is saved while they go on, and no old one is lost."""
    options = {"checkpointing_steps": 2, "checkpoints_total_limit": 1, "max_train_steps": 9, "max_skipped_steps": 3}
    run = start(tmp_path / "run", **options)
    with pytest.raises(
        UserError, match="last 3 steps were left out, up to step 6: loss became .*checkpoint-2 is intact"
    ):
        learn(run, broken=lambda step: step >= 3)
    assert "checkpoint-2" in os.listdir(tmp_path / "run") and "checkpoint-4" not in os.listdir(tmp_path / "run")
    with pytest.raises(UserError, match="no checkpoint had been saved"):  # at the end of a short run
        learn(start(tmp_path / "short"), broken=lambda step: step >= 2)


def test_a_checkpoint_waits_for_the_first_good_step(tmp_path):
    learn(start(tmp_path / "run", checkpointing_steps=2, max_train_steps=6), broken={1, 2}.__contains__)
    assert sorted(os.listdir(tmp_path / "run")) == ["checkpoint-4", "checkpoint-6", "config.yaml"]


def test_half_precision_scales_its_loss_and_each_network_has_its_own_scale(tmp_path):
    """The scaler of fp16, on the CPU: the step is that without it, and an overflow halves the scale."""
    accelerator = SimpleNamespace(
        is_fsdp2=False,
        prepare=lambda *given: (given[0], SimpleNamespace(optimizer=given[1])), device=torch.device("cpu"),
        gradient_accumulation_steps=1, scaler=None,
    )  # fmt: skip

    def trained(scaler):
        torch.manual_seed(0)
        layer = torch.nn.Linear(3, 1)
        return TrainedNetwork(accelerator, layer, torch.optim.Adam(layer.parameters(), fused=True), scaler)

    plain, scaled = trained(None), trained(torch.amp.GradScaler("cpu", init_scale=1024.0))
    x = torch.randn(4, 3)
    for network in (plain, scaled):
        network.backward(network.bare(x).square().mean())
        norm, _ = network.step(0.0)
        assert 0 < norm < 100
    torch.testing.assert_close(scaled.bare.weight, plain.bare.weight)
    before = scaled.bare.weight.clone()
    scaled.backward(scaled.bare(x).square().mean() * 1e36)  # finite itself
    scaled.step(0.0)
    assert torch.equal(scaled.bare.weight, before) and scaled.skipped == 1
    assert scaled.scaler.get_scale() == 512
    again = trained(torch.amp.GradScaler("cpu"))
    again.load_state_dict(scaled.state_dict())
    assert again.scaler.get_scale() == 512 and again.skipped_in_a_row == 1


# Signals, dead processes, full disks ----------------------------------------------------------------------------------


@pytest.mark.parametrize("signum, streaming", [(signal.SIGTERM, False), (signal.SIGINT, False), (signal.SIGTERM, True)])
def test_a_signal_ends_the_run_after_its_step_and_loses_nothing(tmp_path, signum, streaming, capsys):
    """The signal comes in the middle of an accumulated step, with no checkpoint due."""
    options = {"max_train_steps": 5, "gradient_accumulation_steps": 2, "lr_scheduler": "cosine", "optimizer": "adam"}
    options |= {"streaming": True, "shuffle_buffer": 11} if streaming else {}
    whole = learn(start(tmp_path / "whole", **options))
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    run = start(tmp_path / "part", **options)
    with pytest.raises(SystemExit) as stopped:
        learn(run, broken=lambda step: step == 2 and os.kill(os.getpid(), signum))
    assert stopped.value.code == {signal.SIGTERM: 143, signal.SIGINT: 130}[signum]
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers
    said = capsys.readouterr().err
    assert f"\nStopped by {signum.name} after step 3 of 5" in said and "--resume_from_checkpoint latest" in said
    assert sorted(os.listdir(tmp_path / "part")) == ["checkpoint-3", "config.yaml"]
    part = learn(start(tmp_path / "part", resume_from_checkpoint="latest", **options))
    for name in ("main", "judge"):
        assert same(state(part.networks[name].bare), state(whole.networks[name].bare))
    assert same(state(part.ema.module), state(whole.ema.module))


def test_an_impatient_user_is_heard(tmp_path, monkeypatch):
    monkeypatch.setattr(interruption, "IMPATIENCE", 0.0)
    with pytest.raises(KeyboardInterrupt):
        learn(start(tmp_path / "run"), broken=lambda step: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)])
    assert os.listdir(tmp_path / "run") == ["config.yaml"]


def test_a_reading_process_that_dies(tmp_path, monkeypatch):
    """It reads the batch of the third step."""
    whole, read = learn(start(tmp_path / "whole")), ImageDataset.__getitem__

    def broken(self, indices):
        if indices == list(step_indices(1797, 4, 0, 2, 3, [0], 1))[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        return read(self, indices)

    with monkeypatch.context() as patch:
        patch.setattr(ImageDataset, "__getitems__", broken)
        with pytest.raises(UserError, match="died .*Lower --dataloader_num_workers 1.*checkpoint-[12] is saved"):
            learn(start(tmp_path / "part", dataloader_num_workers=1))
    part = learn(start(tmp_path / "part", resume_from_checkpoint="latest"))
    assert same(state(part.bare_network), state(whole.bare_network))


@pytest.mark.parametrize("error", [ConnectionResetError(104, "Connection reset by peer"), EOFError()])
def test_a_reading_process_that_died_with_images_to_fetch(tmp_path, monkeypatch, error):
    """Torch hears of it only when it is gone, else it would raise the death in whatever line runs then."""
    handlers = []
    loader = torch.utils.data.dataloader._MultiProcessingDataLoaderIter
    end = loader._shutdown_workers

    def record(self):
        if not self._shutdown:  # it is called again when this is collected
            handlers.append(signal.getsignal(signal.SIGCHLD))
        end(self)

    def fetch(*args, **kwargs):
        raise error

    monkeypatch.setattr(loader, "_shutdown_workers", record)
    monkeypatch.setattr(loader, "_try_get_data", fetch)
    reason = "reset" if error.args else "EOFError"
    with pytest.raises(UserError, match=f"died .*({reason}).*Lower --dataloader_num_workers 1"):
        learn(start(tmp_path / "run", dataloader_num_workers=1))
    assert handlers == [signal.SIG_DFL] and callable(signal.getsignal(signal.SIGCHLD))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_cannot_be_read_is_named(tmp_path, monkeypatch, workers):
    """This process reads it, or another one."""
    bad = list(step_indices(1797, 4, 0, 2, 3, [0], 1))[0][1]

    class Source(list):
        def __getitem__(self, index):
            rows = self.rows[index]
            if bad in index:
                rows["image"][index.index(bad)] = {"bytes": b"no image", "path": None}
            return rows

    run = start(tmp_path / "run", dataloader_num_workers=workers)
    source = Source()
    source.rows = run.dataset.source
    run.dataset.source = source
    run.dataset.__class__ = type("Data", (ImageDataset,), {"__len__": lambda self: len(self.source.rows)})
    with pytest.raises(
        UserError, match=f"(?s)^Image {bad} of the data set cannot be loaded.*cannot identify.*checkpoint-2 is saved"
    ):
        learn(run)


def test_samples_and_logs_that_cannot_be_written_end_nothing(tmp_path, capsys, monkeypatch):
    def full(self, values, step):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Accelerator, "log", full)

    def unsavable(*given):
        picture = Image.new("RGB", (4, 4))
        picture.save = lambda draft: full(None, None, None)
        return picture

    monkeypatch.setattr(monitor, "enlarged_grid", unsavable)
    path = train(tmp_path / "run", sample_every=2, logging_steps=1, report_to="tensorboard")
    said = capsys.readouterr().err
    for what in ("the samples", "the logs"):
        assert said.count(f"Warning: {what}: ") == 1
    assert weights(path) and not os.listdir(tmp_path / "run" / "samples")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_streamed_run_resumes_bit_for_bit(tmp_path, workers, monkeypatch):
    options = {"streaming": True, "shuffle_buffer": 9, "gradient_accumulation_steps": 2, "max_train_steps": 5}
    whole = train(tmp_path / "whole", checkpointing_steps=3, **options)
    interrupt(tmp_path / "whole", tmp_path / "part", 3)
    options["dataloader_num_workers"] = workers
    begun = []
    read = loop.run_batches
    monkeypatch.setattr(loop, "run_batches", lambda *given, **named: begun.append(given[5]) or read(*given, **named))
    part = train(tmp_path / "part", resume_from_checkpoint="latest", **options)
    assert_same_weights(whole, part)
    assert begun[0]["first"] == 18  # of 24 images: the third window of 9
    del options["streaming"], options["shuffle_buffer"]
    plain = train(tmp_path / "plain", **options)
    assert not same(weights(plain), weights(part))


# Distances, logs, trackers --------------------------------------------------------------------------------------------


def lines_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_distance_measured_during_training_is_that_of_evaluate(tmp_path, capsys):
    options = {"eval_every": 3, "eval_samples": 100}
    path = train(tmp_path / "run", **options)
    assert [line["step"] for line in lines_of(tmp_path / "run")] == [3, 4]
    last = lines_of(tmp_path / "run")[-1]
    config = EvaluateConfig(
        teacher=path, label_column="label", output_dir=str(tmp_path / "out"), num_samples=100, seeds=[0], kid=False,
        paired_samples=0,
    )  # fmt: skip
    expected = evaluate.main(config)["results"][0]["frechet"]["mean"]
    assert last["frechet"]["heun-18"] == pytest.approx(expected, rel=1e-4)
    assert (last["num_samples"], last["num_reference"], last["features"]) == (100, 1797, "digits")
    assert f"Step 4: Frechet distance {expected:.4g} (heun-18)" in capsys.readouterr().err
    plain = train(tmp_path / "plain")
    assert_same_weights(plain, path)  # measuring changes nothing


def test_metrics_of_a_resumed_run_are_those_of_an_uninterrupted_one(tmp_path):
    options = {"eval_every": 1, "eval_samples": 70, "max_train_steps": 5, "ema_decay": 0.5, "learning_rate": 0.01}
    learn(start(tmp_path / "run", checkpointing_steps=2, checkpoints_total_limit=0, **options))
    whole = lines_of(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint-5")
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")  # as if killed at step 3, with two more lines written
    learn(start(tmp_path / "run", resume_from_checkpoint="latest", **options), until=2)
    assert lines_of(tmp_path / "run") == whole[:2]
    learn(start(tmp_path / "run", resume_from_checkpoint="latest", **options))
    assert lines_of(tmp_path / "run") == whole and [line["step"] for line in whole] == [1, 2, 3, 4, 5]


def test_measurements_that_cannot_be_made_are_refused_at_the_start(tmp_path):
    for options, message in (
        ({"eval_samples": 60}, "--eval_samples: 60 samples are too few for 64 features.*--eval_features with fewer"),
        ({"resolution": 16}, "--eval_features is a network for 8x8 images"),
    ):
        with pytest.raises(UserError, match=message):
            train(tmp_path / "run", eval_every=1, **options)
    assert not (tmp_path / "run").exists()


def test_broken_samples_are_a_missing_number(tmp_path, capsys):
    run = start(tmp_path / "run", eval_every=1, eval_samples=70)
    with torch.no_grad():
        run.ema.module.conv_in.bias.fill_(float("nan"))
    run.monitor.measure(1, run.make_pipeline(run.ema.module))
    assert lines_of(tmp_path / "run")[0]["frechet"] == {"heun-18": None}
    capsys.readouterr()
    run.monitor.save_samples(1, run.make_pipeline(run.ema.module))
    assert "Step 1: no samples of heun-18. The network gave NaN" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.png"))


def test_tensorboard_has_each_step_once_and_pictures(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = {
        "report_to": "tensorboard",
        "logging_steps": 1,
        "max_train_steps": 5,
        "eval_every": 5,
        "eval_samples": 70,
    }
    train(tmp_path / "run", checkpointing_steps=2, checkpoints_total_limit=0, **options)
    shutil.rmtree(tmp_path / "run" / "checkpoint-5")
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    train(tmp_path / "run", resume_from_checkpoint="latest", sample_every=5, **options)
    events = EventAccumulator(str(tmp_path / "run" / "logs" / "diffusers-ctm")).Reload()
    names = {"dsm_loss", "grad_norm", "learning_rate", "skipped_steps", "images_per_second"}
    by_level = {f"dsm_loss_by_sigma/{name}" for name in SIGMA_BINS}
    shown = {f"train/{name}" for name in names} | {"frechet/heun-18"}
    assert shown == set(events.Tags()["scalars"]) - by_level and by_level & set(events.Tags()["scalars"])
    for name in names:
        assert [event.step for event in events.Scalars(f"train/{name}")] == [1, 2, 3, 4, 5]
    assert all(event.value > 0 for event in events.Scalars("train/images_per_second"))
    (picture,) = events.Images("samples/heun-18")
    saved = Image.open(tmp_path / "run" / "samples" / "step-000005-heun-18.png")
    drawn = Image.open(io.BytesIO(picture.encoded_image_string))
    assert np.array_equal(np.asarray(drawn), np.asarray(saved))


def test_losses_by_noise_level():
    sigma = torch.tensor([0.002, 0.1, 0.2999, 0.3, 2.0, 9.0, 10.0, 80.0, 0.05, 0.5])
    values = torch.tensor([1.0, 2.0, 4.0, 5.0, 6.0, 7.0, 8.0, 12.0, math.nan, math.inf])
    means, accelerator = Means(), Accelerator()
    means.add_by_level("x", values[:4], sigma[:4])
    means.add_by_level("x", values[4:], sigma[4:])
    saved, other = means.state_dict(accelerator), Means()
    other.load_state_dict(saved, torch.device("cpu"), True)
    expected = {"below_0.1": 1, "0.1_to_0.3": 3, "0.3_to_1": 5, "1_to_3": 6, "3_to_10": 7, "from_10": 10}
    for each in (means, other):
        assert each.read(accelerator) == ({f"x/{name}": value for name, value in expected.items()}, [])
    Means().add_by_level("x", values.to("meta"), sigma.to("meta"))  # its numbers cannot be read


def test_the_trackers_run_is_kept_when_resumed(tmp_path, monkeypatch):
    """Weights & Biases knows it by its id."""
    begun = []
    monkeypatch.setattr(Accelerator, "init_trackers", lambda self, *given: begun.append(given[2]["wandb"]))
    monkeypatch.setattr(devices, "get_available_trackers", lambda: ["wandb"])
    options = {"report_to": "wandb", "checkpointing_steps": 2}
    train(tmp_path / "run", max_train_steps=2, **options)
    train(tmp_path / "run", resume_from_checkpoint="latest", **options)
    train(tmp_path / "other", max_train_steps=1, **options)
    ids = [settings["id"] for settings in begun]
    assert ids[0] == ids[1] != ids[2] and begun[0]["resume"] == "allow" and begun[0]["name"] == "run"

    def refuse(self, *given):
        raise ValueError("api_key not configured")

    monkeypatch.setattr(Accelerator, "init_trackers", refuse)
    with pytest.raises(UserError, match="tracker wandb cannot be loaded.*WANDB_MODE=offline.*\nValueError: api_key"):
        train(tmp_path / "third", **options)
