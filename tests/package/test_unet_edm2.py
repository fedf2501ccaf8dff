# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""EDM2UNet2DModel: its operations against formulas and the authors' numbers, its weights, its second time."""

import copy
import functools
import math

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import nn

from diffusers_ctm import CTMPipeline, CTMScheduler, EDM2UNet2DModel, EDMHeunScheduler
from diffusers_ctm.preconditioning import Preconditioning
from diffusers_ctm.unet_edm2 import (
    EDM2Block2D,
    MPConv2d,
    MPFourier,
    MPLinear,
    mp_cat,
    mp_silu,
    mp_sum,
    normalize,
    resample,
)
from helpers.comparing import close, close_in_float64
from helpers.exact import randn
from helpers.places import EDM2_ORACLE
from helpers.tiny_networks import EDM2_KINDS, inputs, make_edm2
from training.objective.losses import dsm_loss, uncertainty_loss
from training.official.layers import split_qkv


EPS = 1e-4
close_to_oracle = functools.partial(close, rtol=0, atol=2e-5)
every_kind = pytest.mark.parametrize("changes", EDM2_KINDS.values(), ids=EDM2_KINDS.keys())
both_times = pytest.mark.parametrize("target_time", [False, True], ids=["one time", "two times"])


def rms(x, dim=None):
    return x.double().square().mean(dim, keepdim=dim is not None).sqrt()


def rows(weight):
    """A weight of any layer as (output channels, inputs)."""
    return weight.detach().double().flatten(1)


def layers(unet):
    """The layers with normalized weights, by name."""
    return {name: module for name, module in unet.named_modules() if isinstance(module, (MPLinear, MPConv2d))}


@pytest.fixture
def primitives(oracle):
    """The authors' numbers as tensors, by the start of their names."""
    arrays = oracle(EDM2_ORACLE / "edm2_primitives.npz")

    def read(start):
        return {
            name.removeprefix(start): torch.from_numpy(value)
            for name, value in arrays.items()
            if name.startswith(start)
        }

    return read


# Operations -----------------------------------------------------------------------------------------------------------


def test_normalization():
    x = randn(4, 6, 3, 5)
    for dim in (1, (1, 2, 3), (2,)):
        close_in_float64(normalize(x, dim), x / (EPS + rms(x, dim)))
    assert torch.equal(normalize(torch.zeros(2, 3)), torch.zeros(2, 3))
    close(normalize(torch.full((1, 8), EPS)), torch.full((1, 8), 0.5))  # eps stands beside the root, not below
    big = torch.full((1, 1024), 3000.0, dtype=torch.float16)  # whose length is too large for float16
    assert normalize(big).dtype == torch.float16 and torch.equal(normalize(big), torch.ones_like(big))


def test_silu_keeps_the_variance_of_normal_numbers():
    z = torch.linspace(-12, 12, 20_001, dtype=torch.float64)
    close_in_float64(mp_silu(z), z / (1 + (-z).exp()) / 0.596)
    density = (-z.square() / 2).exp() / math.sqrt(2 * math.pi)
    assert torch.trapezoid(density * mp_silu(z).square(), z).item() == pytest.approx(1, abs=3e-3)


@pytest.mark.parametrize("t", [0.0, 0.3, 0.5, 1.0])
def test_sums_and_concatenations_keep_the_variance(t):
    """Exactly, where a and b have unit variance and are orthogonal."""
    a, b = torch.linalg.qr(randn(1, 60, 2))[0][0].T.reshape(2, 1, 6, 5, 2) * math.sqrt(60)
    summed = mp_sum(a, b, t)
    close_in_float64(summed, ((1 - t) * a + t * b) / math.sqrt((1 - t) ** 2 + t**2))
    assert rms(summed).item() == pytest.approx(1, rel=1e-12)
    b = torch.cat([b, b.flip(1), -b], dim=1)
    joined = mp_cat(a, b, t)
    assert joined.shape[1] == 24 and rms(joined).item() == pytest.approx(1, rel=1e-12)
    parts = joined.split([6, 18], dim=1)  # a first, and each has its share of the square, whatever its width
    shares = [part.square().sum() / joined.square().sum() for part in parts]
    assert shares[1].item() == pytest.approx(t**2 / ((1 - t) ** 2 + t**2), abs=1e-12)
    for part, whole in zip(parts, (a, b), strict=True):
        close_in_float64(part / max(rms(part), 1e-30), whole * (rms(part) > 0))


def test_layers_have_rows_of_length_one():
    torch.manual_seed(0)
    for new in (MPLinear(100, 50), MPConv2d(100, 50, 3)):
        assert new.bias is None and rms(new.weight).item() == pytest.approx(1, abs=0.05)  # N(0, 1)
    for layer, x in (
        (MPLinear(7, 5), randn(4, 7)),
        (MPConv2d(7, 5, 1), randn(2, 7, 4, 4)),
        (MPConv2d(7, 5, 3), randn(2, 7, 4, 4)),
    ):
        layer.double().weight.data.mul_(torch.linspace(0.1, 3, 5).reshape(-1, *[1] * (layer.weight.ndim - 1)))
        weight = rows(layer.weight)
        weight = weight / (EPS * math.sqrt(weight.shape[1]) + weight.norm(dim=1, keepdim=True))
        weight = weight.reshape(layer.weight.shape)
        plain = nn.functional.linear if weight.ndim == 2 else functools.partial(nn.functional.conv2d, padding="same")
        close_in_float64(layer(x), plain(x, weight))
        close_in_float64(layer(x, -0.7), -0.7 * plain(x, weight))


def test_fourier_features():
    """sqrt(2) cos(f c + p), f of standard deviation 2 pi, p anywhere on the circle; so each has unit variance."""
    torch.manual_seed(0)
    layer, c = MPFourier(4096), torch.tensor([-1.5, 0.0, 1.1])
    frequencies, phases = (bits.view(torch.float32).double() for bits in (layer.frequency_bits, layer.phase_bits))
    close(layer(c).double(), math.sqrt(2) * (c[:, None] * frequencies + phases).cos(), rtol=0, atol=1e-5)
    assert (frequencies / (2 * math.pi)).std().item() == pytest.approx(1, abs=0.05)
    assert 0 <= phases.min() < 0.02 and 6.26 < phases.max() <= 2 * math.pi + 1e-6
    assert (rms(layer(c), 1) - 1).abs().max() < 0.05
    assert layer(c.double()).dtype == torch.float64 and layer(c.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("taps", [(1, 1), (2, 2), (1, 3, 3, 1), (1, 2, 4, 4, 2, 1)])
def test_resampling(taps):
    x = randn(2, 3, 8, 6)
    small, large = resample(x, "down", taps), resample(x, "up", taps)
    assert small.shape == (2, 3, 4, 3) and large.shape == (2, 3, 16, 12) and resample(x, None, taps) is x
    kernel = torch.tensor(taps, dtype=torch.float64) / sum(taps)
    padded = nn.functional.pad(x, [len(taps) // 2 - 1] * 4)
    windows = padded.unfold(2, len(taps), 2).unfold(3, len(taps), 2)
    close_in_float64(small, torch.einsum("bchwij,i,j->bchw", windows, kernel, kernel))
    y = randn(2, 3, 16, 12, seed=1)  # "up" is the transpose of "down", four times as strong
    assert (large * y).sum().item() == pytest.approx(4 * (x * resample(y, "down", taps)).sum().item(), rel=1e-10)
    if len(taps) == 2:
        close_in_float64(small, nn.functional.avg_pool2d(x, 2))
        close_in_float64(large, x.repeat_interleave(2, 2).repeat_interleave(2, 3))


# The authors' numbers -------------------------------------------------------------------------------------------------


def test_operations_give_the_authors_numbers(primitives):
    norm, silu, sums, cats = (primitives(start) for start in ("norm_", "silu_", "sum_", "cat_"))
    close_to_oracle(normalize(norm["x"], (1, 2, 3)), norm["all"])
    close_to_oracle(normalize(norm["x"]), norm["dim1"])
    close_to_oracle(normalize(norm["w"], (1, 2, 3)), norm["w_out"])
    close_to_oracle(normalize(normalize(norm["w"], (1, 2, 3)), (1, 2, 3)), norm["w_out_twice"])
    close_to_oracle(mp_silu(silu["x"]), silu["out"])
    for index, t in enumerate(sums["t"].tolist()):
        close_to_oracle(mp_sum(sums["a"], sums["b"], t), sums["out"][index])
    for index, t in enumerate(cats["t"].tolist()):
        close_to_oracle(mp_cat(cats["a"], cats["b"], t), cats["out"][index])
    sampled, fourier = primitives("res_"), primitives("fourier_")
    for direction in ("down", "up"):
        close_to_oracle(resample(sampled["x"], direction, (1, 1)), sampled[f"{direction}_11"])
        close_to_oracle(resample(sampled["x"], direction, (1, 3, 3, 1)), sampled[f"{direction}_1331"])
    layer = MPFourier(len(fourier["freqs"]))
    layer.frequency_bits, layer.phase_bits = (fourier[name].view(torch.int32) for name in ("freqs", "phases"))
    close_to_oracle(layer(fourier["x"]), fourier["out"])


@pytest.mark.parametrize("kind", ["lin", "c1", "c3"])
def test_layers_and_their_gradients_give_the_authors_numbers(kind, primitives):
    numbers = primitives(f"{kind}_")
    shape = numbers["w"].shape
    layer = MPLinear(shape[1], shape[0]) if kind == "lin" else MPConv2d(shape[1], shape[0], shape[2])
    layer.weight.data.copy_(numbers["w"])
    unet = make_edm2()
    unet.conv_in = layer  # for `normalize_weights_`
    close_to_oracle(layer(numbers["x"]), numbers["eval_y_gain1"])
    for mode in ("eval", "train"):
        if mode == "train":
            unet.normalize_weights_()
            close_to_oracle(layer.weight, numbers["train_w_after"])
        x, gain = numbers["x"].clone().requires_grad_(), numbers["gain"].clone().requires_grad_()
        y = layer(x, gain)
        close_to_oracle(y, numbers[f"{mode}_y"])
        of_weight, of_x, of_gain = torch.autograd.grad((y * numbers["r"]).sum(), (layer.weight, x, gain))
        close_to_oracle(of_weight, numbers[f"{mode}_grad_w"])
        close_to_oracle(of_gain, numbers[f"{mode}_grad_gain"])
        close_to_oracle(of_x, numbers["eval_grad_x"], **({} if mode == "eval" else {"atol": 1e-3}))


BLOCKS = {
    "benc": {"in_channels": 6, "out_channels": 8, "encoder": True, "head_dim": 4, "resample": "down"},
    "bkeep": {"in_channels": 8, "out_channels": 8, "encoder": True, "head_dim": None},
    "bdec": {"in_channels": 10, "out_channels": 6, "encoder": False, "head_dim": 3, "resample": "up"},
}


@pytest.mark.parametrize("name", BLOCKS)
@torch.no_grad()
def test_blocks_give_the_authors_numbers(name, primitives):
    numbers, kind = primitives(f"{name}_"), BLOCKS[name]
    usual = {"emb_channels": 9, "target_time": False, "dropout": 0.0, "res_balance": 0.3, "attn_balance": 0.3}
    usual |= {"concat_balance": 0.5, "clip_act": 256.0, "resample_filter": (1, 1)}
    block = EDM2Block2D(**kind, **usual, attention=kind["head_dim"] is not None)
    weights = {"emb_gain": numbers["p_emb_gain"]}
    own = {"conv_res0": "conv1", "emb_linear": "emb_linear", "conv_res1": "conv2", "conv_skip": "conv_shortcut"}
    own = {f"act_{theirs}": ours for theirs, ours in own.items() if f"p_{theirs}.weight" in numbers}
    for theirs, ours in own.items():
        weights[f"{ours}.weight"] = numbers[theirs.replace("act_", "p_") + ".weight"]
    if block.attention is not None:
        qkv = split_qkv(numbers["p_attn_qkv.weight"].flatten(1), kind["head_dim"], "head_dim_three")
        weights |= {f"attention.to_{name}.weight": weight for name, weight in zip("qkv", qkv, strict=True)}
        weights["attention.to_out.0.weight"] = numbers["p_attn_proj.weight"].flatten(1)
    block.load_state_dict(weights)
    seen = {}
    for theirs, ours in own.items():
        block.get_submodule(ours).register_forward_hook(
            lambda module, given, output, theirs=theirs: seen.update({theirs: output})
        )
    close_to_oracle(block(numbers["x"], None, numbers["emb"]), numbers["y"])
    assert seen.keys() == own.keys() and len(own) == 3 + (block.conv_shortcut is not None)
    for theirs, output in seen.items():
        close_to_oracle(output, numbers[theirs])


# Weights --------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def longer(unet, factor):
    """A copy whose rows are `factor` to three times `factor` as long, each by another."""
    unet = copy.deepcopy(unet)
    for layer in layers(unet).values():
        lengths = torch.linspace(1, 3, len(layer.weight), dtype=layer.weight.dtype)
        layer.weight.mul_(factor * lengths.reshape(-1, *[1] * (layer.weight.ndim - 1)))
    return unet


@every_kind
@torch.no_grad()
def test_the_length_of_a_row_does_not_matter(changes):
    """But for what eps makes of it, and that falls as 1 / length."""
    unet = make_edm2(target_time=True, **changes).double()
    assert len(layers(unet)) == len([name for name, _ in unet.named_parameters() if name.endswith("weight")])
    sample, t, s, condition = inputs(unet)
    outputs = [longer(unet, factor)(sample.double(), t, s, **condition).sample for factor in (1, 10, 100, 1e9)]
    errors = torch.stack([rms(output - outputs[-1]) for output in outputs[:-1]])
    assert 1e-5 < errors[0] < 1e-3
    assert ((errors[:-1] / errors[1:]).log10() - 1).abs().max() < 0.05


@every_kind
@torch.no_grad()
def test_normalizing_the_weights(changes):
    unet = make_edm2(target_time=True, **changes).double()
    sample, t, s, condition = inputs(unet)
    once = copy.deepcopy(unet)
    once.normalize_weights_()
    for name, before in unet.state_dict().items():
        after = once.state_dict()[name]
        if not name.endswith("weight"):  # gains and Fourier features
            assert torch.equal(after, before)
            continue
        length = rms(rows(before), 1)
        close_in_float64(rows(after), rows(before) / (EPS + length))
        close_in_float64(rms(rows(after), 1), length / (EPS + length))
    twice = copy.deepcopy(once)
    twice.normalize_weights_()
    first, second, third = (each(sample.double(), t, s, **condition).sample for each in (unet, once, twice))
    assert 1e-5 < rms(second - first) < 1e-3 * rms(first)
    assert 0 < rms(third - second) < 1e-6 * rms(first)
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in once.parameters())


def test_a_gradient_is_orthogonal_to_its_row():
    """So a step turns a row, and lengthens it to second order only: the learning rate is the relative change."""
    unet = make_edm2(num_class_embeds=7, target_time=True, log_variance_channels=None).double()
    unet.normalize_weights_()
    sample, t, s, condition = inputs(unet)
    unet(sample.double(), t, s, **condition).sample.square().mean().backward()
    found = layers(unet)
    assert len(found) == 66
    for name, layer in found.items():
        gradient, weight = rows(layer.weight.grad), rows(layer.weight)
        lengths = gradient.norm(dim=1) * weight.norm(dim=1)
        along = (gradient * weight).sum(1).abs()
        assert (along <= 1.5 * EPS * lengths.max()).all() and lengths.max() > 0, name


@pytest.mark.parametrize("labels", [True, False], ids=["classes", "no classes"])
@pytest.mark.parametrize("random", [True, False], ids=["trained", "new"])
def test_training_reaches_every_weight(labels, random):
    """No weight is without gradient, as distributed training demands: those of the uncertainty too."""
    unet = make_edm2(random=random, num_class_embeds=7).train()
    sample, t, _, condition = inputs(unet)
    condition = condition if labels else {}
    preconditioning, sigma = Preconditioning(0.5, 1.0), (4 * t).exp()
    denoised = preconditioning.denoise(unet, sample, sigma, **condition)
    losses = dsm_loss(denoised, torch.zeros_like(sample), sigma, 0.5)
    uncertainty_loss(losses, unet.log_variance(preconditioning.c_noise(sigma))).mean().backward()
    idle = set()
    for name, parameter in unet.named_parameters():
        assert parameter.grad is not None, name
        if not parameter.grad.any():
            idle.add(name)
    if random:
        assert idle == (set() if labels else {"class_embedding.weight"})
    else:  # the last gain is zero, so nothing passes it
        assert {name for name, _ in unet.named_parameters()} - idle == {"out_gain", "log_variance_linear.weight"}


def test_uncertainty():
    unet = make_edm2(num_class_embeds=7)
    time = torch.tensor([-1.0, 0.2, 1.1])
    waves = unet.log_variance_proj(time).double()
    weight = rows(unet.log_variance_linear.weight)
    expected = waves @ (weight / (EPS + rms(weight, 1)) / math.sqrt(8)).T
    assert unet.log_variance(time).shape == (3,) and expected.std() > 0.1
    close(unet.log_variance(time), expected[:, 0].float())
    low = unet.to(torch.bfloat16).log_variance(time)
    assert low.dtype == torch.float32
    with pytest.raises(ValueError, match="no log_variance_channels"):
        make_edm2(log_variance_channels=None).log_variance(time)


# Growing from a teacher -----------------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_student_is_its_teacher_to_the_last_bit(changes, dtype):
    teacher = make_edm2(**changes).to(dtype)
    student = EDM2UNet2DModel.from_unet(teacher)
    sample, t, s, condition = inputs(teacher)
    expected = teacher(sample.to(dtype), t, **condition).sample
    for target in (s, t, None):
        assert torch.equal(student(sample.to(dtype), t, target, **condition).sample, expected)


def test_what_a_student_has_more_and_less():
    teacher = make_edm2(num_class_embeds=7)
    student = EDM2UNet2DModel.from_unet(teacher)
    old, new = teacher.state_dict(), student.state_dict()
    dropped = {"log_variance_proj.frequency_bits", "log_variance_proj.phase_bits", "log_variance_linear.weight"}
    assert set(old) - set(new) == dropped  # of the teacher's own training
    assert student.config.log_variance_channels is None and teacher.config.log_variance_channels == 8
    assert all(torch.equal(new[name], weight) for name, weight in old.items() if name not in dropped)
    number = len([module for module in student.modules() if isinstance(module, EDM2Block2D)])
    added = {name: weight for name, weight in new.items() if name not in old}
    gains = [weight for name, weight in added.items() if name.endswith("target_emb_gain")]
    assert len(gains) == number == 10 and not torch.stack(gains).any()
    fresh = {f"target_{name}": old[name] for name in old if name.startswith(("time_proj", "time_embedding"))}
    assert added.keys() == fresh.keys() | {name for name in added if "target_emb_" in name} and len(added) == 23
    assert not any(torch.equal(added[name], weight) for name, weight in fresh.items())  # drawn anew, no copies


def test_the_second_time_is_learned_from_its_gains_on():
    student = EDM2UNet2DModel.from_unet(make_edm2(num_class_embeds=7)).train()
    sample, t, s, condition = inputs(student)
    new = {name: parameter for name, parameter in student.named_parameters() if "target_" in name}
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    for step in range(2):
        student(sample, t, s, **condition).sample.square().mean().backward()
        for name, parameter in new.items():
            assert bool(parameter.grad.any()) == (step > 0 or name.endswith("gain")), (step, name)
        assert all(parameter.grad is not None for parameter in student.parameters())
        optimizer.step()
        optimizer.zero_grad()
        student.normalize_weights_()
    assert len(new) == 2 * 10 + 1
    with torch.no_grad():
        assert (
            student(sample, t, s, **condition).sample - student(sample, t, t, **condition).sample
        ).abs().max() > 1e-5


def test_both_times_are_added_in_each_block():
    """1 + gain W emb + gain_s W_s emb_s, and the class belongs to the first alone."""
    unet = make_edm2(num_class_embeds=7, target_time=True)
    sample, t, s, condition = inputs(unet)
    seen = []
    block = unet.down_blocks[1]
    block.register_forward_pre_hook(lambda module, given: seen.append(given[2:]))
    with torch.no_grad():
        unet(sample, t, s, **condition)
        unet(sample, t, s)
        (first, second), (without, same) = seen
        assert torch.equal(second, same) and (first - without).abs().max() > 0.1
        close(second, mp_silu(unet.target_time_embedding(unet.target_time_proj(s))))
        scale = 1 + block.emb_linear(first) * block.emb_gain + block.target_emb_linear(second) * block.target_emb_gain
        close(block._scale(first, second), scale)


# Classes --------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_no_class_is_a_vector_of_zeros():
    """Through the balanced sum, which it does not leave out: the embedding becomes smaller by sqrt(2)."""
    unet = make_edm2(num_class_embeds=7)
    sample, t, _, condition = inputs(unet)
    seen = []
    unet.down_blocks[0].register_forward_pre_hook(lambda module, given: seen.append(given[2]))
    nothing = unet(sample, t).sample
    time = unet.time_embedding(unet.time_proj(t))
    close(seen[0], mp_silu(time / math.sqrt(2)))
    assert torch.equal(unet(sample, t, class_labels=torch.zeros(3, 7)).sample, nothing)

    numbers = condition["class_labels"]
    output = unet(sample, t, class_labels=numbers).sample
    vector = math.sqrt(7) * torch.eye(7)[numbers]
    close(seen[-1], mp_silu((time + unet.class_embedding(vector)) / math.sqrt(2)))
    assert torch.equal(unet(sample, t, class_labels=torch.eye(7)[numbers]).sample, output)
    assert (output - nothing).abs().max() > 1e-2
    unet(sample, t, class_labels=torch.full((3, 7), 1 / 7))
    close(seen[-1], mp_silu((time + unet.class_embedding(torch.full((3, 7), 7**-0.5))) / math.sqrt(2)))


@torch.no_grad()
def test_label_dropout_leaves_the_class_out_in_training_only():
    unet = make_edm2(num_class_embeds=7, label_dropout=0.5, target_time=True)
    sample, labels = randn(1, 3, 8, 8, dtype=torch.float32).repeat(64, 1, 1, 1), torch.full((64,), 2)
    with_class, without = unet(sample, 0.1, -1.0, labels).sample, unet(sample, 0.1, -1.0).sample
    torch.manual_seed(0)
    trained = unet.train()(sample, 0.1, -1.0, labels).sample
    dropped = (trained - without).abs().amax((1, 2, 3)) < 1e-5
    kept = (trained - with_class).abs().amax((1, 2, 3)) < 1e-5
    assert (dropped ^ kept).all() and 16 <= dropped.sum() <= 48


def test_what_the_network_does_not_have():
    unet = make_edm2()
    sample, t, s, _ = inputs(unet)
    with pytest.raises(ValueError, match="target_timestep was given.*no target time"):
        unet(sample, t, s)
    with pytest.raises(ValueError, match="class_labels were given"):
        unet(sample, t, class_labels=torch.arange(3))
    with pytest.raises(ValueError, match=r"class_labels must be 3 class numbers or floats of shape \(3, 7\)"):
        make_edm2(num_class_embeds=7)(sample, t, class_labels=torch.zeros(3, 6))
    with pytest.raises(ValueError, match="no adapter fits"):
        unet.fuse_lora()


# Blocks ---------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_activations_are_clipped_behind_each_block():
    limit = 0.4
    unet = make_edm2(clip_act=limit)
    sample, t, _, _ = inputs(unet)
    largest = {}
    for name, module in unet.named_modules():
        if isinstance(module, EDM2Block2D) or name in ("conv_in", "conv_out"):
            module.register_forward_hook(
                lambda module, given, output, name=name: largest.update({name: output.abs().max()})
            )
    unet(sample, t)
    assert len(largest) == 12
    for name, value in largest.items():
        assert value > 1.5 * limit if name in ("conv_in", "conv_out") else value == torch.tensor(limit), name
    outputs = [make_edm2(clip_act=limit)(sample, t).sample for limit in (0.4, 20.0, 256.0)]
    assert torch.equal(outputs[1], outputs[2]) and (outputs[0] - outputs[1]).abs().max() > 0.1


def test_the_input_has_a_channel_of_ones():
    unet, seen = make_edm2(), []
    unet.conv_in.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    sample, t, _, _ = inputs(unet)
    unet(sample, t)
    assert torch.equal(seen[0][:, :3], sample) and torch.equal(seen[0][:, 3], torch.ones(3, 8, 8))


def test_where_attention_is():
    def attended(unet):
        return {name for name, module in unet.named_modules() if getattr(module, "attention", None) is not None}

    middle = "mid_blocks.0"
    assert attended(make_edm2(attention_levels=())) == {middle}
    # not where the resolution changes: down_blocks.1, up_blocks.2
    assert attended(make_edm2()) == {middle, "down_blocks.2", "up_blocks.0", "up_blocks.1"}
    found = attended(make_edm2(attention_levels=(0,), layers_per_block=2))
    assert found == {middle, "down_blocks.0", "down_blocks.1", *(f"up_blocks.{i}" for i in (4, 5, 6))}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"attention_head_dim": 6}, "attention_head_dim=6 must divide the 16 channels of level 1, which has attention"),
        (
            {"attention_levels": (), "attention_head_dim": 6},
            "attention_head_dim=6 must divide the 16 channels of level 1",
        ),
        ({"attention_levels": (0, 1), "attention_head_dim": 16}, "attention_head_dim=16 must divide the 8 channels"),
        ({"resample_filter": (1, 2, 1)}, r"resample_filter=\(1, 2, 1\) must have an even number of taps"),
        ({"resample_filter": (1, -1)}, "a sum that is not 0"),
    ],
)
def test_arguments_that_do_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        make_edm2(**changes)


# Casting, saving, sampling --------------------------------------------------------------------------------------------


def features(unet):
    """The frequencies and phases of the network, float32."""
    return {
        f"{name}.{part}": buffer.view(torch.float32)
        for name, module in unet.named_modules()
        if isinstance(module, MPFourier)
        for part, buffer in module.named_buffers()
    }


def test_fourier_features_are_float32_whatever_the_network_is_cast_to(tmp_path):
    unet = make_edm2(target_time=True)
    expected, time = features(unet), torch.tensor([0.3, -1.2])
    waves = unet.time_proj(time)
    assert len(expected) == 6 and not any(torch.equal(v, v.bfloat16().float()) for v in expected.values())
    unet.save_pretrained(tmp_path)
    for cast in (
        copy.deepcopy(unet).to(torch.bfloat16),
        copy.deepcopy(unet).half(),
        copy.deepcopy(unet).double(),
        EDM2UNet2DModel.from_pretrained(tmp_path),
        EDM2UNet2DModel.from_pretrained(tmp_path, dtype=torch.bfloat16),
        EDM2UNet2DModel.from_unet(make_edm2().to(torch.bfloat16)),
    ):
        found = features(cast)
        assert all(torch.equal(found[name], expected[name]) for name in found if "target" not in name)
        assert torch.equal(cast.time_proj(time), waves)
    low = copy.deepcopy(unet).to(torch.bfloat16)
    low.save_pretrained(tmp_path / "low")
    assert all(
        torch.equal(features(EDM2UNet2DModel.from_pretrained(tmp_path / "low"))[name], expected[name])
        for name in expected
    )


@both_times
def test_pipelines_save_load_and_sample(target_time, tmp_path):
    unet = make_edm2(target_time=target_time, num_class_embeds=3)
    scheduler = CTMScheduler(timestep_scale=1.0) if target_time else EDMHeunScheduler(timestep_scale=1.0)
    CTMPipeline(unet, scheduler, id2label={0: "ant", 1: "bee", 2: "cow"}).save_pretrained(tmp_path)
    pipe = DiffusionPipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe) is CTMPipeline and type(pipe.unet) is EDM2UNet2DModel
    start = randn(2, 3, 8, 8, dtype=torch.float32)
    images = pipe(num_inference_steps=1, class_labels=["cow", "ant"], latents=start, output_type="latent").images
    preconditioning, top = Preconditioning(0.5, 1.0), torch.tensor([80.0, 80.0])
    labels = torch.tensor([2, 0])
    with torch.no_grad():
        if target_time:
            end = torch.full((2,), pipe.scheduler.config.sigma_min)
            expected = preconditioning.jump(unet, 80 * start, top, end, class_labels=labels)
        else:
            expected = preconditioning.denoise(unet, 80 * start, top, class_labels=labels)
    close(images, expected, rtol=1e-4, atol=1e-4)
