# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Averages of weights: their recursion, and the reconstruction of averages that were not kept."""

import os

import pytest
import torch
from diffusers import UNet2DModel

from diffusers_ctm import CTMPipeline, EDMHeunScheduler
from training import ema as ema_module
from training.cli.errors import UserError
from training.cli.files import read_json
from training.cli.options import parse_config
from training.ema import PostHocConfig, reconstruction
from training.hub.record import write_record
from training.run.averages import EMA, power_decay, snapshot_folder


def network(value):
    layer = torch.nn.Linear(2, 1)
    with torch.no_grad():
        layer.weight.fill_(value)
        layer.bias.fill_(value)
    return layer


def move(ema, values):
    for value in values:
        ema.step(network(value))
    return ema.module.weight[0, 0].item()


@pytest.mark.parametrize("warmup", [False, True])
def test_decay_is_constant_or_rises_to_its_value(warmup):
    ema = EMA(network(0.0), decay=0.5, warmup=warmup)
    expected = 0.0
    for step in range(12):
        decay = min((1 + step) / (10 + step), 0.5) if warmup else 0.5
        decay = decay if step else 0.0  # the first step copies
        expected = decay * expected + (1 - decay) * (step + 1.0)
        assert abs(move(ema, [step + 1.0]) - expected) < 1e-5
    assert decay == 0.5


def test_module_is_the_average_and_stays_it_after_loading():
    ema = EMA(network(1.0), decay=0.9)
    move(ema, [2.0, 3.0])
    weight = ema.module.weight
    other = EMA(network(5.0), decay=0.9)
    other.load_state_dict(ema.state_dict())
    assert move(other, [7.0]) == move(ema, [7.0])
    assert ema.module.weight is weight and not weight.requires_grad and not ema.module.training


def test_a_step_that_the_device_has_not_applied_leaves_the_average():
    known, unknown = EMA(network(1.0), decay=0.9), EMA(network(1.0), decay=0.9)
    for value in (2.0, 3.0):
        known.step(network(value))
        unknown.step(network(value), applied=torch.tensor(1.0))
    torch.testing.assert_close(unknown.module.weight, known.module.weight)
    before = unknown.module.weight.clone()
    unknown.step(network(9.0), applied=torch.tensor(0.0))
    assert torch.equal(unknown.module.weight, before)


@pytest.mark.parametrize("sigma_rel", [0.05, 0.1, 0.25])
def test_power_function_weighs_time_as_its_name_says(sigma_rel):
    """The recursion's weights over a long training have the asked standard deviation, and the density ~ t^gamma."""
    steps, decay = 4000, power_decay(sigma_rel)
    weights = torch.zeros(steps, dtype=torch.float64)
    for step in range(1, steps + 1):
        weights *= decay(step)
        weights[step - 1] += 1 - decay(step)
    time = torch.arange(1, steps + 1, dtype=torch.float64) / steps
    mean = weights @ time
    assert ((weights @ (time - mean).square()).sqrt() - sigma_rel).abs() < 1e-3
    gamma = (weights[-1] / weights[steps // 2 - 1]).log2()
    assert mean.item() == pytest.approx((gamma + 1).item() / (gamma + 2).item(), abs=1e-3)


def test_an_average_that_was_not_kept_is_reconstructed():
    """The reconstruction equals the average that was kept, for a random walk."""
    generator = torch.Generator().manual_seed(0)
    walk = torch.randn(2000, generator=generator, dtype=torch.float64).cumsum(0)
    kept = {width: 0.0 for width in (0.05, 0.1, 0.07, 0.14)}
    snapshots = []
    for step, value in enumerate(walk.tolist(), 1):
        for width in kept:
            decay = power_decay(width)(step)
            kept[width] = decay * kept[width] + (1 - decay) * value
        if step % 50 == 0:
            snapshots += [(width, step, kept[width]) for width in (0.05, 0.1)]
    widths, steps, values = map(list, zip(*snapshots, strict=True))
    for width, tolerance in ((0.05, 1e-6), (0.07, 0.01), (0.14, 0.1)):
        weights, error = reconstruction(widths, steps, width, 2000)
        assert (weights @ torch.tensor(values, dtype=torch.float64)).item() == pytest.approx(kept[width], abs=tolerance)
        assert error < 0.003 and weights.sum().item() == pytest.approx(1, abs=1e-12)
    assert reconstruction([0.05, 0.1], [2000, 2000], 0.25, 2000)[1] > 0.2  # and it tells when it fails


@pytest.fixture
def run_with_snapshots(tmp_path, make_unet):
    """A run's folder with snapshots of weights that grow by one each step; returns it and the weights of the last."""
    averages = {width: EMA(make_unet(UNet2DModel), power_decay(width)) for width in (0.05, 0.1)}
    unet = make_unet(UNet2DModel)
    for step in range(1, 41):
        with torch.no_grad():
            unet.conv_in.bias.fill_(float(step))
        for width, average in averages.items():
            average.step(unet)
            if step % 4 == 0:
                folder = snapshot_folder(str(tmp_path), width, step)
                CTMPipeline(average.module, EDMHeunScheduler()).save_pretrained(folder)
                write_record({"average": {"sigma_rel": width, "updates": step}}, step, folder)
    return tmp_path, averages


def test_program_makes_a_pipeline(run_with_snapshots, capsys):
    folder, averages = run_with_snapshots
    path = ema_module.main(parse_config(PostHocConfig, [str(folder), "--sigma_rel", "0.1"]))
    assert (
        path == os.path.join(folder, "pipeline-ema-sigma_rel-0.1")
        and "off that of an average" in capsys.readouterr().out
    )
    unet = CTMPipeline.from_pretrained(path).unet
    for name, value in averages[0.1].module.state_dict().items():
        torch.testing.assert_close(unet.state_dict()[name], value, rtol=1e-5, atol=1e-5, msg=name)
    earlier = ema_module.main(PostHocConfig(run=str(folder), sigma_rel=0.07, step=20))
    bias = CTMPipeline.from_pretrained(earlier).unet.conv_in.bias[0].item()
    expected, decay = 0.0, power_decay(0.07)
    for step in range(1, 21):
        expected = decay(step) * expected + (1 - decay(step)) * step
    assert bias == pytest.approx(expected, abs=0.1)
    record = read_json(earlier, "training.json")
    assert record["average"]["sigma_rel"] == 0.07 and record["steps"] == 20


def test_averages_that_cannot_be_reconstructed(run_with_snapshots, tmp_path_factory):
    folder, _ = run_with_snapshots
    with pytest.raises(UserError, match="--step 21 has no snapshot; there are some of the steps 4, 8"):
        ema_module.main(PostHocConfig(run=str(folder), sigma_rel=0.1, step=21))
    with pytest.raises(UserError, match="--posthoc_ema 0.05 0.1 keeps them"):
        ema_module.main(PostHocConfig(run=str(tmp_path_factory.mktemp("empty")), sigma_rel=0.1))
    for wrong in (0.0, 0.3):
        with pytest.raises(UserError, match="--sigma_rel must be in"):
            PostHocConfig(run=str(folder), sigma_rel=wrong)
    weights = os.path.join(snapshot_folder(str(folder), 0.05, 8), "unet", "diffusion_pytorch_model.safetensors")
    with open(weights, "r+b") as file:
        file.truncate(1000)
    with pytest.raises(UserError, match="sigma_rel-0.05-step-000008 cannot be loaded"):
        ema_module.main(PostHocConfig(run=str(folder), sigma_rel=0.1))
