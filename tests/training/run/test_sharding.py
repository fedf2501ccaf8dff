# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Weights spread over processes by FSDP learn the same; launches that cannot train are refused; shipped configs fit."""

import os
import shutil
from types import SimpleNamespace

import accelerate.commands.config  # noqa: F401  (before launch, which imports it in a circle)
import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env
from torch.distributed.fsdp import StateDictType

from helpers.places import ROOT
from helpers.runs import NETWORK, fresh_accelerate, in_processes, weights  # noqa: F401
from helpers.sharded_on_cpu import sharded
from training import train_ctm, train_edm
from training.cli.errors import UserError
from training.run.checkpoints import load_first_stage
from training.run.devices import check_sharding
from training.train_ctm import CTMConfig
from training.train_edm import EDMConfig


CONFIGS = sorted((ROOT / "training" / "configs" / "accelerate").glob("*.yaml"))
SMALL = {"label_column": "label", "report_to": "none", "sample_every": 0, "logging_steps": 1, "max_train_steps": 3}


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        monkeypatch.delenv(f"ACCELERATE_USE_{name}", raising=False)


@pytest.mark.slow
def test_spread_weights_learn_as_whole_ones_and_are_resumed(tmp_path):
    """Two processes on a CPU, where a launcher stands in for the line of Accelerate that wants GPUs."""
    small = {**SMALL, "train_batch_size": 8}
    teacher = train_edm.main(EDMConfig(output_dir=str(tmp_path / "teacher"), checkpointing_steps=0, **small, **NETWORK))
    options = {"teacher": teacher, "max_solver_steps": 2, "dropout": 0.0, "learning_rate": 1e-3, "max_grad_norm": 0.5}
    options |= {"streaming": True, "shuffle_buffer": 50}  # which the processes share
    options |= {"ema_decay": 0.5, "optimizer": "adam", "adam_epsilon": 1e-3, "checkpointing_steps": 2}
    whole = train_ctm.main(CTMConfig(output_dir=str(tmp_path / "whole"), **{**small, **options}))

    def spread(folder, **more):
        own = {**small, **options, "train_batch_size": 4, "output_dir": str(folder), **more}
        AcceleratorState._reset_state(reset_partial_state=True)
        in_processes(2, sharded, train_ctm.main, CTMConfig(**own))
        return str(folder / "pipeline")

    first = spread(tmp_path / "spread")
    start = weights(teacher)
    for name, value in weights(first).items():
        torch.testing.assert_close(value, weights(whole)[name], rtol=1e-4, atol=2e-5)
    assert max((weights(first)[name] - value).abs().max() for name, value in start.items() if "emb" not in name) > 1e-3
    os.makedirs(tmp_path / "part")
    checkpoint = shutil.copytree(tmp_path / "spread" / "checkpoint-2", tmp_path / "part" / "checkpoint-2")
    second = spread(tmp_path / "part", resume_from_checkpoint="latest")
    assert all(torch.equal(value, weights(second)[name]) for name, value in weights(first).items())
    stage, other = (load_first_stage(str(path)).weights for path in (checkpoint, tmp_path / "whole" / "checkpoint-2"))
    assert stage.keys() == other.keys()
    for name, value in stage.items():
        torch.testing.assert_close(value, other[name], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(
    "name, message",
    [
        ("DEEPSPEED", "DeepSpeed resumes from pickles.*ddp.yaml and fsdp.yaml"),
        ("MEGATRON_LM", "Megatron-LM trains its own networks only.*ddp.yaml"),
        ("FSDP", "FSDP for several processes on GPUs only"),
    ],
)
def test_launches_that_cannot_train_are_refused(tmp_path, monkeypatch, name, message):
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    with pytest.raises(UserError, match=message):
        train_edm.main(EDMConfig(output_dir=str(tmp_path / "run"), **SMALL, **NETWORK))
    assert not (tmp_path / "run").exists()


def launched(config, monkeypatch):
    """The environment that `accelerate launch` makes from a config file."""
    arguments = launch_command_parser().parse_args(["--config_file", str(config), "-m", "training.train_ctm"])
    arguments, _, _ = _validate_launch_command(arguments)
    environment = prepare_multi_gpu_env(arguments)
    for name, value in environment.items():
        if name.startswith(("FSDP", "ACCELERATE_")):
            monkeypatch.setenv(name, value)
    return environment


def fake(plugin, precision="bf16"):
    state = SimpleNamespace(fsdp_plugin=plugin)
    return SimpleNamespace(distributed_type=DistributedType.FSDP, state=state, mixed_precision=precision)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_the_training_takes_the_shipped_configs(config, monkeypatch):
    environment = launched(config, monkeypatch)
    assert environment["ACCELERATE_MIXED_PRECISION"] == "no"
    assert (environment.get("ACCELERATE_USE_FSDP") == "true") == (config.stem == "fsdp")
    if config.stem == "fsdp":
        plugin = FullyShardedDataParallelPlugin()
        plugin.set_mixed_precision("bf16")
        check_sharding(fake(plugin), EDMConfig())
        assert plugin.mixed_precision_policy is None  # of noise levels too


def test_options_that_do_not_go_with_spread_weights(monkeypatch):
    launched(ROOT / "training" / "configs" / "accelerate" / "fsdp.yaml", monkeypatch)
    plugin = FullyShardedDataParallelPlugin()
    for precision, options in (("bf16", EDMConfig(compile=True)), ("fp16", EDMConfig())):
        with pytest.raises(UserError, match="--compile and --mixed_precision fp16 cannot"):
            check_sharding(fake(plugin, precision), options)
    for name, value in (("state_dict_type", StateDictType.SHARDED_STATE_DICT), ("fsdp_version", 1)):
        wrong = FullyShardedDataParallelPlugin()
        setattr(wrong, name, value)
        with pytest.raises(UserError, match="fsdp_version: 2.*FULL_STATE_DICT"):
            check_sharding(fake(wrong), EDMConfig())
