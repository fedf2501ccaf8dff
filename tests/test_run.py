"""What every run does around its loss: several averages, second networks, skipped steps, signals, trackers; interrupted at any step."""

import os

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from training import train_edm
from training.config import EDMConfig
from training.ema import EMA


TINY = {
    "label_column": "label", "train_batch_size": 4, "report_to": "none", "sample_every": 0, "checkpointing_steps": 0, "logging_steps": 2,
    "block_out_channels": [8, 16], "layers_per_block": 1, "attention_levels": [1], "attention_head_dim": 8, "norm_num_groups": 4,
    "sigma_data": 0.75, "dropout": 0.1, "max_train_steps": 4,
}  # fmt: skip


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Each test may ask for another precision, as another process would."""
    AcceleratorState._reset_state(reset_partial_state=True)


def train(folder, **options):
    return train_edm.main(EDMConfig(output_dir=str(folder), **{**TINY, **options}))


def weights(pipeline):
    return load_file(os.path.join(pipeline, "unet", "diffusion_pytorch_model.safetensors"))


def files_of(folder):
    """Contents of all weight files below a folder, by path."""
    found = {}
    for parent, _, names in os.walk(folder):
        for name in names:
            if name.endswith(".safetensors"):
                path = os.path.join(parent, name)
                found[os.path.relpath(path, folder)] = load_file(path)
    return found


def assert_same(a, b):
    """Two runs left the same weights, to the last bit, under the same names."""
    first, second = files_of(a), files_of(b)
    assert first.keys() == second.keys() and first
    for path in first:
        for name, value in first[path].items():
            torch.testing.assert_close(second[path][name], value, rtol=0, atol=0, msg=f"{path}: {name}")


def interrupt(whole, part, step):
    """Make `part` what `whole` was after its checkpoint of `step`, as if it had been killed there."""
    os.makedirs(part)
    os.rename(whole / f"checkpoint-{step}", part / f"checkpoint-{step}")


# Averages ---------------------------------------------------------------------------------------------------------------


def test_each_rate_is_a_pipeline_and_the_targets_rate_is_kept_once(tmp_path, monkeypatch):
    made = []
    init = EMA.__init__
    monkeypatch.setattr(EMA, "__init__", lambda self, *given: made.append(given[1]) or init(self, *given))
    path = train(tmp_path / "run", ema_decay=0.5, extra_ema_decays=[0.5, 0.0, 0.9])
    assert made == [0.5, 0.0, 0.9]
    folders = [path, *(f"{path}-ema-{decay}" for decay in (0.0, 0.9))]
    assert sorted(os.listdir(tmp_path / "run")) == ["config.yaml", *map(os.path.basename, folders)]
    for folder in folders:
        assert DiffusionPipeline.from_pretrained(folder).unet.config.sample_size == 8
    live = weights(train(tmp_path / "live", ema_decay=0.0))
    extra = weights(folders[1])
    assert all(torch.equal(value, extra[name]) for name, value in live.items())
    assert any(not torch.equal(value, weights(folders[2])[name]) for name, value in weights(path).items())


def test_all_averages_resume_bit_for_bit(tmp_path):
    options = {"extra_ema_decays": [0.5], "posthoc_ema": [0.05, 0.1], "posthoc_ema_every": 2, "max_train_steps": 5}
    train(tmp_path / "whole", checkpointing_steps=3, **options)
    interrupt(tmp_path / "whole", tmp_path / "part", 3)
    train(tmp_path / "part", resume_from_checkpoint="latest", **options)
    snapshots = sorted(os.listdir(tmp_path / "whole" / "ema-snapshots"))
    assert snapshots == [f"sigma_rel-{width}-step-{step:06d}" for width in (0.05, 0.1) for step in (2, 4, 5)]
    for name in [*(f"ema-snapshots/{name}" for name in snapshots[1:3] + snapshots[4:]), "pipeline", "pipeline-ema-0.5"]:
        assert_same(tmp_path / "whole" / name, tmp_path / "part" / name)
