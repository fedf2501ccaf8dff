# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Converted ADM networks against the authors' numbers, and against their block arithmetic written out again here."""

import json
import math
import re

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DModel
from safetensors.torch import load_file

from diffusers_ctm import CTMUNet2DModel
from diffusers_ctm.preconditioning import Preconditioning
from helpers.arithmetic import Arithmetic
from helpers.comparing import seeded
from helpers.places import ORACLE
from helpers.tiny_networks import TINY, UNET_2D_KINDS
from training.cli.errors import UserError
from training.cli.options import parse_config
from training.cli.shared_options import TeacherOptions
from training.convert import ConvertConfig, main
from training.networks.teacher import load_teacher
from training.official import adm, layers
from training.official.families import find_family


HEAD = 16
SIZE = {
    **{"sample_size": 8, "block_out_channels": (32, 64), "layers_per_block": 2, "num_class_embeds": 5},
    **{"down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"), "downsample_type": "resnet"},
    **{"up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"), "upsample_type": "resnet"},
    **{"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 32, "attention_head_dim": HEAD},
}
NVIDIA = {**SIZE, "block_out_channels": (128, 160), "layers_per_block": 1}
FULL_SIZE = {  # name in the key lists: (file, parameters, entries)
    "ctm_imagenet64_cond": ("keys_ctm_adm_fullsize.json", 324_100_611, 617),
    "teacher_imagenet64_cond": ("keys_ctm_adm_fullsize.json", 295_899_267, 541),
    "edm_imagenet64_adm_cond": ("keys_edm_fullsize.json", 295_899_267, 553),
}


# The official networks, written out ---------------------------------------------------------------------------------


def frequencies(timestep, channels):
    """cos, then sin, of timestep * 10000^(-i / half)."""
    half = channels // 2
    angles = timestep[:, None] * torch.exp(-math.log(1e4) * torch.arange(half, dtype=timestep.dtype) / half)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class Official(Arithmetic):
    """An official network of two levels with `layers` blocks; attention in the second level and the middle."""

    def __init__(self, weights, layers=1, heads_first=False):
        super().__init__(weights)
        self.layers, self.heads_first = layers, heads_first

    def norm(self, name, x):
        return super().norm(name, x, 32, 1e-5)

    def resnet(self, names, x, modulation, resample=lambda x: x):
        """`names`: norm, convolution, norm, convolution, skip. `modulation`: (scale, shift), two vectors per sample."""
        norm1, conv1, norm2, conv2, skip = names
        scale, shift = modulation[:, :, None, None].chunk(2, dim=1)
        h = self.conv(conv1, resample(F.silu(self.norm(norm1, x))))
        h = self.conv(conv2, F.silu(self.norm(norm2, h) * (1 + scale) + shift))
        x = resample(x)
        return h + (self.conv(skip, x) if f"{skip}.weight" in self.w else x)

    def attention(self, names, x, split):
        """`split`: (B, 3C, positions) -> query, key, value, each (B, heads, dim, positions)."""
        norm, qkv, proj = names
        parts = split(self.conv(qkv, self.norm(norm, x)).flatten(2))
        return x + self.conv(proj, self.attended(*parts).reshape(x.shape))


def halved(x):
    return (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4


def doubled(x):
    return x.repeat_interleave(2, dim=-1).repeat_interleave(2, dim=-2)


class OpenAI(Official):
    """OpenAI's UNetModel, and with `s` the authors' CTM."""

    def block(self, name, x, emb, emb_s, resample=lambda x: x):
        modulation = self.linear(f"{name}.emb_layers.1", F.silu(emb))
        if emb_s is not None:
            modulation = modulation + self.linear(f"{name}.emb_layers_s.1", F.silu(emb_s))
        parts = ("in_layers.0", "in_layers.2", "out_layers.0", "out_layers.3", "skip_connection")
        return self.resnet([f"{name}.{part}" for part in parts], x, modulation, resample)

    def attend(self, name, x):
        def split(qkv):
            if self.heads_first:
                return qkv.unflatten(1, (-1, 3, HEAD)).unbind(2)  # head, three, dim
            return qkv.unflatten(1, (3, -1, HEAD)).unbind(1)  # three, head, dim

        return self.attention([f"{name}.{part}" for part in ("norm", "qkv", "proj_out")], x, split)

    def embed(self, name, time):
        frequency = frequencies(time, self.w[f"{name}.0.weight"].shape[1])
        return self.linear(f"{name}.2", F.silu(self.linear(f"{name}.0", frequency)))

    def __call__(self, x, t, y, s=None):
        emb = self.embed("time_embed", t) + self.w["label_emb.weight"][y]
        emb_s = None if s is None else self.embed("time_embed_s", s)
        n, stack = self.layers, [self.conv("input_blocks.0.0", x)]
        for i in range(1, n + 1):
            stack.append(self.block(f"input_blocks.{i}.0", stack[-1], emb, emb_s))
        stack.append(self.block(f"input_blocks.{n + 1}.0", stack[-1], emb, emb_s, halved))
        for i in range(n + 2, 2 * n + 2):
            stack.append(self.attend(f"input_blocks.{i}.1", self.block(f"input_blocks.{i}.0", stack[-1], emb, emb_s)))
        h = self.block("middle_block.0", stack[-1], emb, emb_s)
        h = self.block("middle_block.2", self.attend("middle_block.1", h), emb, emb_s)
        for i in range(2 * n + 2):
            h = self.block(f"output_blocks.{i}.0", torch.cat([h, stack.pop()], dim=1), emb, emb_s)
            if i <= n:
                h = self.attend(f"output_blocks.{i}.1", h)
            if i == n:
                h = self.block(f"output_blocks.{i}.2", h, emb, emb_s, doubled)
        return self.conv("out.2", F.silu(self.norm("out.0", h)))


class Nvidia(Official):
    """NVIDIA's DhariwalUNet at 8x8 and 4x4. `labels` are vectors."""

    def block(self, name, x, emb, resample=lambda x: x):
        parts = ("norm0", "conv0", "norm1", "conv1", "skip")
        names = [f"{name}.{part}" for part in parts]
        x = self.resnet(names, x, self.linear(f"{name}.affine", emb), resample)
        if f"{name}.qkv.weight" not in self.w:
            return x

        def split(qkv):
            return qkv.unflatten(1, (-1, HEAD, 3)).unbind(3)  # head, dim, three

        return self.attention([f"{name}.{part}" for part in ("norm2", "qkv", "proj")], x, split)

    def __call__(self, x, t, labels):
        emb = frequencies(t, self.w["map_layer0.weight"].shape[1])
        emb = self.linear("map_layer1", F.silu(self.linear("map_layer0", emb)))
        emb = F.silu(emb + self.linear("map_label", labels))
        stack = [self.conv("enc.8x8_conv", x)]
        for name in (f"enc.8x8_block{i}" for i in range(self.layers)):
            stack.append(self.block(name, stack[-1], emb))
        stack.append(self.block("enc.4x4_down", stack[-1], emb, halved))
        for name in (f"enc.4x4_block{i}" for i in range(self.layers)):
            stack.append(self.block(name, stack[-1], emb))
        h = self.block("dec.4x4_in1", self.block("dec.4x4_in0", stack[-1], emb), emb)
        for i in range(self.layers + 1):
            h = self.block(f"dec.4x4_block{i}", torch.cat([h, stack.pop()], dim=1), emb)
        h = self.block("dec.8x8_up", h, emb, doubled)
        for i in range(self.layers + 1):
            h = self.block(f"dec.8x8_block{i}", torch.cat([h, stack.pop()], dim=1), emb)
        return self.conv("out_conv", F.silu(self.norm("out_norm", h)))


# Random official weights --------------------------------------------------------------------------------------------


def shapes_of(flavour, **changes):
    """Names and shapes of an official network. The arithmetic above and the authors' lists below hold the names."""
    kind = CTMUNet2DModel if flavour == "ctm" else UNet2DModel
    with torch.device("meta"):
        network = kind(**(NVIDIA if flavour == "nvidia" else SIZE) | changes)
    return layers.shapes_of(adm.to_official(network, flavour))


def random_weights(flavour, shapes=None, **changes):
    """No layer is zero or the identity. Resampling filters are the constants they are."""
    generator, weights = seeded(), {}
    for name, shape in (shapes or shapes_of(flavour, **changes)).items():
        scale = math.prod(shape[1:]) ** -0.5 if len(shape) > 1 else 0.3
        mean = len(shape) == 1 and name.endswith("weight")  # of a norm
        weights[name] = mean + scale * torch.randn(shape, generator=generator) * (3 if ".qkv." in name else 1)
        if name.endswith("resample_filter"):
            weights[name] = torch.full(shape, 0.25)
    return weights


def convert(flavour, weights=None, **overrides):
    weights = random_weights(flavour) if weights is None else weights
    return adm.to_diffusers(weights, **{"attention_head_dim": HEAD, **overrides})


@pytest.fixture
def inputs():
    x = torch.randn(2, 3, 8, 8, generator=seeded(7), dtype=torch.float64)
    t, s = torch.tensor([0.7, -1.3], dtype=torch.float64), torch.tensor([-0.4, 0.9], dtype=torch.float64)
    return x, t, s, torch.tensor([1, 4])


@torch.no_grad()
@pytest.mark.parametrize("flavour", ["openai", "ctm", "nvidia"])
def test_equals_the_official_arithmetic(flavour, inputs):
    x, t, s, y = inputs
    weights = random_weights(flavour)
    network = convert(flavour, weights).double()
    # Cosines and sines are float32 in diffusers, so times of order one keep the comparison tight.
    targets = (s,) if flavour == "ctm" else ()
    if flavour == "nvidia":
        official = Nvidia(weights)(x, t, F.one_hot(y, 5).double())
    else:
        official = OpenAI(weights, 2)(x, t, y, *targets)
    ours = network(x, t, *targets, y).sample
    assert official.std() > 0.1
    assert (ours - official).abs().max() < 1e-5


def bedroom_shapes(width):
    """Names and shapes of the CTM of LSUN bedrooms, 256x256, by the public options of OpenAI's UNetModel for them.

    channel_mult 1, 1, 2, 2, 4, 4, 2 blocks a level, attention at 32, 16 and 8, resblock_updown, no scale-shift norm,
    no classes; with the CTM's second time.
    """
    multiples, blocks, attention, shapes = (1, 1, 2, 2, 4, 4), 2, (3, 4, 5), {}

    def layer(name, *shape):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = shape, shape[:1]

    def block(name, inside, outside):
        layer(f"{name}.in_layers.0", inside)
        layer(f"{name}.in_layers.2", outside, inside, 3, 3)
        for end in ("", "_s"):
            layer(f"{name}.emb_layers{end}.1", outside, 4 * width)
        layer(f"{name}.out_layers.0", outside)
        layer(f"{name}.out_layers.3", outside, outside, 3, 3)
        if inside != outside:
            layer(f"{name}.skip_connection", outside, inside, 1, 1)

    def attend(name, channels):
        layer(f"{name}.norm", channels)
        layer(f"{name}.qkv", 3 * channels, channels, 1, 1)
        layer(f"{name}.proj_out", channels, channels, 1, 1)

    for name in ("time_embed", "time_embed_s"):
        layer(f"{name}.0", 4 * width, width)
        layer(f"{name}.2", 4 * width, 4 * width)
    layer("input_blocks.0.0", width, 3, 3, 3)
    channels, skips = width, [width]
    for level, multiple in enumerate(multiples):
        for i in range(blocks + (level < len(multiples) - 1)):  # the last one halves the resolution
            block(f"input_blocks.{len(skips)}.0", channels, multiple * width)
            channels = multiple * width
            if level in attention and i < blocks:
                attend(f"input_blocks.{len(skips)}.1", channels)
            skips.append(channels)
    block("middle_block.0", channels, channels)
    attend("middle_block.1", channels)
    block("middle_block.2", channels, channels)
    number = 0
    for level, multiple in reversed(list(enumerate(multiples))):
        for i in range(blocks + 1):
            block(f"output_blocks.{number}.0", channels + skips.pop(), multiple * width)
            channels = multiple * width
            if level in attention:
                attend(f"output_blocks.{number}.1", channels)
            if level > 0 and i == blocks:
                block(f"output_blocks.{number}.{1 + (level in attention)}", channels, channels)
            number += 1
    layer("out.0", channels)
    layer("out.2", 3, channels, 3, 3)
    return shapes


class Bedroom(OpenAI):
    """OpenAI's network of any number of levels without classes and scale-shift, its structure read from its names."""

    def block(self, name, x, emb, resample=lambda x: x):
        h = self.conv(f"{name}.in_layers.2", resample(F.silu(self.norm(f"{name}.in_layers.0", x))))
        for end, one in zip(("", "_s"), emb):
            h = h + self.linear(f"{name}.emb_layers{end}.1", F.silu(one))[:, :, None, None]
        h = self.conv(f"{name}.out_layers.3", F.silu(self.norm(f"{name}.out_layers.0", h)))
        x = resample(x)
        return h + (self.conv(f"{name}.skip_connection", x) if f"{name}.skip_connection.weight" in self.w else x)

    def __call__(self, x, t, s):
        emb, stack, halving = (self.embed("time_embed", t), self.embed("time_embed_s", s)), [], {3, 6, 9, 12, 15}
        for i in range(18):
            if i == 0:
                x = self.conv("input_blocks.0.0", x)
            else:
                x = self.block(f"input_blocks.{i}.0", x, emb, halved if i in halving else lambda x: x)
            if f"input_blocks.{i}.1.qkv.weight" in self.w:
                x = self.attend(f"input_blocks.{i}.1", x)
            stack.append(x)
        x = self.block("middle_block.2", self.attend("middle_block.1", self.block("middle_block.0", x, emb)), emb)
        for i in range(18):
            x = self.block(f"output_blocks.{i}.0", torch.cat([x, stack.pop()], dim=1), emb)
            for part in (f"output_blocks.{i}.1", f"output_blocks.{i}.2"):
                if f"{part}.qkv.weight" in self.w:
                    x = self.attend(part, x)
                elif f"{part}.in_layers.2.weight" in self.w:
                    x = self.block(part, x, emb, doubled)
        return self.conv("out.2", F.silu(self.norm("out.0", x)))


@torch.no_grad()
def test_the_ctm_of_bedrooms():
    for width in (32, 256):
        shapes = bedroom_shapes(width)
        network = adm.network_of(shapes)
        assert layers.shapes_of(adm.to_official(network)) == shapes
        assert (network.config.sample_size, network.config.num_class_embeds) == (256, None)
        assert network.config.block_out_channels == tuple(width * m for m in (1, 1, 2, 2, 4, 4))
    weights = random_weights("ctm", bedroom_shapes(32))
    network = convert("ctm", weights).double()
    x = torch.randn(2, 3, 32, 32, generator=seeded(7), dtype=torch.float64)  # smaller images have the same layers
    t, s = torch.tensor([0.7, -1.3], dtype=torch.float64), torch.tensor([-0.4, 0.9], dtype=torch.float64)
    official, ours = Bedroom(weights)(x, t, s), network(x, t, s).sample
    assert official.std() > 0.1 and (ours - network(x, t).sample).abs().max() > 0.1
    assert (ours - official).abs().max() < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("order, schedule", [("head_three_dim", "linear"), ("three_head_dim", "squaredcos_cap_v2")])
def test_guided_diffusion(order, schedule, inputs, tmp_path):
    """By the real command: one-dimensional convolutions as qkv, in either order; outputs are epsilon and a variance."""
    weights = random_weights("openai", out_channels=6)
    flat = {name: w[..., 0] if name.endswith(("qkv.weight", "proj_out.weight")) else w for name, w in weights.items()}
    torch.save(flat, tmp_path / "64x64_diffusion.pt")

    def run(*options):
        arguments = [tmp_path / "64x64_diffusion.pt", tmp_path / "out", "--num_head_channels", HEAD, *options]
        return main(parse_config(ConvertConfig, [str(argument) for argument in arguments]))

    with pytest.raises(UserError, match="--qkv_order head_three_dim"):
        run()
    with pytest.raises(UserError, match="6 channels for 3.*--prediction_type epsilon"):
        run("--qkv_order", order)
    epsilon = ["--prediction_type", "epsilon", "--beta_schedule", schedule]
    with pytest.raises(UserError, match="--sigma_max does not fit"):
        run("--qkv_order", order, *epsilon, "--sigma_max", 1e9)
    run("--qkv_order", order, *epsilon)

    teacher = load_teacher(TeacherOptions(str(tmp_path / "out")))
    x, _, _, y = inputs
    # data 0, noise n at timestep 700: x / sigma of the variance-exploding process, sqrt(1 - abar) n of the discrete one
    abar = DDPMScheduler(beta_schedule=schedule).alphas_cumprod[700].double()
    sigma = ((1 - abar) / abar).sqrt()
    official = OpenAI(weights, 2, heads_first=order == "head_three_dim")
    epsilon = official(abar.sqrt() * x, torch.full((2,), 700.0, dtype=torch.float64), y)[:, :3]
    denoised = teacher.denoise(x.float(), sigma.float().expand(2), y)
    assert (denoised - (x - sigma * epsilon)).abs().max() < 1e-3 * sigma


def test_without_variances_leaves_others_alone():
    weights = random_weights("openai")
    assert all(without is weights[name] for name, without in adm.without_variances(weights).items())
    with pytest.raises(UserError, match="guided-diffusion"):
        adm.without_variances(random_weights("nvidia"))


def test_split_qkv_takes_rows_by_name():
    rows = [(three, head, dim) for three in range(3) for head in range(2) for dim in range(4)]
    wanted = [[(three, head, dim) for head in range(2) for dim in range(4)] for three in range(3)]
    for order, key in (
        ("three_head_dim", lambda r: r),
        ("head_three_dim", lambda r: (r[1], r[0], r[2])),
        ("head_dim_three", lambda r: (r[1], r[2], r[0])),
    ):
        tensor = torch.tensor(sorted(rows, key=key))
        parts = layers.split_qkv(tensor, 4, order)
        assert [list(map(tuple, part.tolist())) for part in parts] == wanted
        assert torch.equal(layers.join_qkv(parts, 4, order), tensor)


# Back ---------------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("flavour", ["openai", "ctm", "nvidia"])
def test_back_gives_the_official_weights(flavour):
    weights = random_weights(flavour)
    network = convert(flavour, weights)
    assert type(network) is (CTMUNet2DModel if flavour == "ctm" else UNet2DModel) and not network.training
    official = adm.to_official(network, flavour)
    assert official.keys() == weights.keys()
    for name, tensor in weights.items():  # two biases of a CTM return as one
        if ".emb_layers_s." in name and name.endswith("bias"):
            first = name.replace("emb_layers_s", "emb_layers")
            official[first], official[name] = official[first] - tensor, official[name] + tensor
    for name, tensor in weights.items():
        torch.testing.assert_close(official[name], tensor, rtol=0, atol=1e-6 if flavour == "ctm" else 0)
    again = convert(flavour, official)
    assert again.config == network.config


@torch.no_grad()
def test_one_network_has_both_teachers_forms(inputs):
    x, t, _, y = inputs
    weights = random_weights("nvidia")
    network = convert("nvidia", {name.removeprefix("model."): tensor for name, tensor in weights.items()})
    through_openai = convert("openai", adm.to_official(network), sample_size=8)
    assert torch.equal(network(x.float(), t, y).sample, through_openai(x.float(), t, y).sample)


@torch.no_grad()
def test_convolutional_sampling_and_plain_shift_are_placed():
    """The forms of OpenAI's networks beside scale-shift and residual sampling."""
    sampling = {"downsample_type": "conv", "upsample_type": "conv", "resnet_time_scale_shift": "default"}
    kinds = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    unet = UNet2DModel(**SIZE | sampling | kinds | {"layers_per_block": 1}).eval()
    official = adm.to_official(unet)
    assert {"input_blocks.2.0.op.weight", "output_blocks.1.2.conv.weight"} <= official.keys()
    again = convert("openai", official)
    x = torch.randn(1, 3, 8, 8)
    arguments = (x, torch.tensor(0.5), torch.tensor([2]))
    assert torch.equal(unet(*arguments).sample, again(*arguments).sample)


# Errors -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flavour, change, overrides, words",
    [
        ("openai", {}, {"attention_head_dim": 48}, "--num_head_channels 48 does not divide the 64 channels"),
        ("openai", {}, {"color": 3}, "color is not an argument"),
        ("openai", {"time_embed.0.weight": (2**62, 32)}, {}, "No UNet2DModel can be made"),
        ("ctm", {"middle_block.2.out_layers.3.bias": (7,)}, {}, r"middle_block.2.out_layers.3.bias has shape \(7,\)"),
        ("openai", {"output_blocks.6.0.in_layers.0.weight": (1,)}, {}, "7 output_blocks"),
        ("nvidia", {"model.map_augment.weight": (128, 9)}, {}, "map_augment.weight, which has no place"),
        ("nvidia", {"model.enc.8x8_block0.conv0.weight": (64, 64, 3, 3)}, {}, "a quarter as many"),
        ("nvidia", {"map_layer0.bias": (512,)}, {}, "map_layer0.bias twice"),
    ],
)
def test_what_is_no_network_of_the_family(flavour, change, overrides, words):
    with pytest.raises(UserError, match=words):
        adm.network_of({**shapes_of(flavour), **change}, **{"attention_head_dim": HEAD, **overrides})


@pytest.mark.parametrize(
    "flavour, keys",
    [
        ("openai", ["time_embed.0.weight", "input_blocks.0.0.weight", "out.2.weight", "input_blocks.4.1.qkv.weight"]),
        ("ctm", ["time_embed_s.0.weight", "input_blocks.3.0.in_layers.2.weight"]),
        ("ctm", ["output_blocks.2.2.in_layers.0.weight"]),
        ("nvidia", ["map_layer0.weight", "out_conv.weight", "enc.8x8_conv.weight", "dec.4x4_in0.qkv.weight"]),
    ],
)
def test_weights_that_lack_one_tensor_are_recognized_and_it_is_named(flavour, keys):
    prefix = "model." if flavour == "nvidia" else ""
    state = {name: torch.empty(shape, device="meta") for name, shape in shapes_of(flavour).items()}
    for key in keys:
        lacking = {name: tensor for name, tensor in state.items() if name != prefix + key}
        family, weights = find_family({"_orig_mod." + name: tensor for name, tensor in lacking.items()})
        with pytest.raises(UserError, match=f"has no {re.escape(key)}"):
            assert family is adm
            family.to_diffusers(weights, attention_head_dim=HEAD)


def test_what_is_missing_and_what_is_left_over_is_listed():
    shapes = shapes_of("openai")
    for i in range(5):
        shapes[f"surplus.{i}"] = (1,)
    for name in ("out.0.weight", "out.0.bias"):
        del shapes[name]
    words = "no out.0.weight, out.0.bias, which .* has surplus.0, surplus.1, surplus.2 and 2 more"
    with pytest.raises(UserError, match=words):
        adm.network_of(shapes, attention_head_dim=HEAD)


@pytest.mark.parametrize(
    "change, flavour, words",
    [
        ({"norm_eps": 1e-6}, None, "norm_eps"),
        ({"flip_sin_to_cos": False}, None, "flip_sin_to_cos"),
        ({"center_input_sample": True}, None, "center_input_sample"),
        ({"sample_size": (8, 16)}, "nvidia", "sample_size"),
        ({}, "ctm", "flavour 'ctm'"),
        ({}, "sony", "--flavour must be"),
    ],
)
def test_networks_without_official_form(change, flavour, words):
    with pytest.raises(UserError, match=words):
        adm.to_official(UNet2DModel(**SIZE | change), flavour)


@pytest.mark.parametrize("changes", UNET_2D_KINDS.values(), ids=UNET_2D_KINDS.keys())
def test_other_networks_of_diffusers_have_no_official_form(changes):
    """With norms of 8 groups, and blocks and embeddings that ADM does not know."""
    with pytest.raises(UserError):
        adm.to_official(UNet2DModel(**TINY | changes))


# The authors' numbers and names -------------------------------------------------------------------------------------


def full_size(name):
    file, parameters, entries = FULL_SIZE[name]
    if not (ORACLE / file).exists():
        pytest.skip("the oracle folder is not here")
    keys = json.loads((ORACLE / file).read_text())[name]
    assert keys["n_params"] == parameters and len(keys["state_dict"]) == entries
    return {key: torch.empty(shape, device="meta") for key, shape, _ in keys["state_dict"]}


@pytest.mark.parametrize("name", FULL_SIZE)
def test_full_size_names_one_to_one(name):
    state_dict, parameters = full_size(name), FULL_SIZE[name][1]
    flavour = adm.flavour_of(state_dict)
    with torch.device("meta"):
        network = adm.to_diffusers(state_dict)
    merged = sum(t.numel() for key, t in state_dict.items() if ".emb_layers_s." in key and key.endswith("bias"))
    assert sum(p.numel() for p in network.parameters()) == parameters - merged
    official = adm.to_official(network, flavour)
    assert {key: tensor.shape for key, tensor in official.items()} == {k: t.shape for k, t in state_dict.items()}
    config = network.config
    assert (config.block_out_channels, config.layers_per_block) == ((192, 384, 576, 768), 3)
    assert (config.sample_size, config.num_class_embeds, config.attention_head_dim) == (64, 1000, 64)
    assert [kind.startswith("Attn") for kind in config.down_block_types] == [False, True, True, True]
    assert adm.defaults(state_dict)["timestep_scale"] == (1.0 if flavour == "nvidia" else 1000.0)


@pytest.fixture
def authors(oracle):
    """The small ImageNet-64 CTM of the authors' code: weights, and arrays by name."""
    arrays = oracle("ctm_adm64_cond_io.npz")
    return load_file(ORACLE / "ctm_adm64_cond.safetensors"), lambda name: torch.from_numpy(arrays[name])


@torch.no_grad()
def test_the_authors_ctm(authors):
    weights, array = authors
    network = convert("ctm", weights)
    seen = {}
    for own, name in {
        "time_embedding": "time_embed",
        "target_time_embedding": "time_embed_s",
        "conv_in": "input_blocks.0",
        "down_blocks.0.resnets.0": "input_blocks.1",
        "down_blocks.3.attentions.2": "input_blocks.15",
        "mid_block": "middle_block",
    }.items():
        network.get_submodule(own).register_forward_hook(lambda *a, name=name: seen.update({name: a[2]}))
    output = network(array("net_in"), array("rescaled_t"), array("rescaled_s"), array("y")).sample
    for name, activation in dict(seen).items():
        expected = array(f"act_{name}")
        scale = expected.abs().max().clamp(min=1)  # inside the network up to 40
        assert (activation[: len(expected)] - expected).abs().max() < 2e-5 * scale, name
    assert (output - array("F")).abs().max() < 2e-5

    numbers = adm.defaults(weights)
    preconditioning = Preconditioning(numbers["sigma_data"], numbers["timestep_scale"])
    x, t, s, y = (array(name) for name in ("x", "t", "s", "y"))
    for name, value in {
        "g": preconditioning.g(network, x, t, s, class_labels=y),
        "G": preconditioning.jump(network, x, t, s, class_labels=y),
        "g_s_eq_t": preconditioning.denoise(network, x, t, class_labels=y),
    }.items():
        assert (value - array(name)).abs().max() < 2e-5, name
    s_is_t = network(array("net_in"), array("rescaled_t"), class_labels=y).sample
    assert (s_is_t - array("F_s_eq_t")).abs().max() < 2e-5


@torch.no_grad()
def test_the_authors_teacher(authors):
    weights, array = authors
    shared = {name: tensor for name, tensor in weights.items() if "_s." not in name}
    inputs = array("net_in"), array("rescaled_t"), array("y")
    assert (convert("openai", shared)(*inputs).sample - array("F_s_none")).abs().max() < 2e-5

    teacher = convert("openai", {name: 0.9 * w if w.ndim >= 2 else w for name, w in shared.items()})
    assert (teacher(*inputs).sample - array("teacher_F")).abs().max() < 2e-5
    denoised = Preconditioning(0.5, 1000.0).denoise(teacher, array("x"), array("t"), class_labels=array("y"))
    assert (denoised - array("teacher_D")).abs().max() < 2e-5
