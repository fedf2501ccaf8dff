# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Converted ADM networks against the authors' numbers, and against their block arithmetic written out again here."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DModel
from safetensors.torch import load_file

from diffusers_ctm import CTMUNet2DModel
from diffusers_ctm.preconditioning import Preconditioning
from helpers.places import ORACLE
from training.cli.errors import UserError
from training.cli.options import parse_config
from training.convert import ConvertConfig, main
from training.networks.teacher import load_teacher
from training.official import adm as convert_adm
from training.official import layers


HEAD = 16
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


class Official:
    """An official network of two levels as a function of its state dict, in float64.

    Its arithmetic is spelled with elementary operations, its graph with the official names. Two levels with `layers` blocks; attention
    in the second level and the middle.
    """

    def __init__(self, weights, layers=1, heads_first=False):
        self.w = {name: tensor.double() for name, tensor in weights.items()}
        self.layers, self.heads_first = layers, heads_first

    def linear(self, name, x):
        bias = self.w.get(f"{name}.bias")
        return x @ self.w[f"{name}.weight"].T + (0 if bias is None else bias)

    def conv(self, name, x):
        weight = self.w[f"{name}.weight"]
        return F.conv2d(x, weight, self.w[f"{name}.bias"], padding=weight.shape[-1] // 2)

    def norm(self, name, x):
        groups = x.reshape(len(x), 32, -1)
        centred = groups - groups.mean(-1, keepdim=True)
        normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return normed.reshape(x.shape) * self.w[f"{name}.weight"][:, None, None] + self.w[f"{name}.bias"][:, None, None]

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
        q, k, v = split(self.conv(qkv, self.norm(norm, x)).flatten(2))
        weights = torch.einsum("bhdi,bhdj->bhij", q, k).div(math.sqrt(HEAD)).softmax(-1)
        return x + self.conv(proj, torch.einsum("bhij,bhdj->bhdi", weights, v).reshape(x.shape))


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
        names = [f"model.{name}.{part}" for part in parts]
        x = self.resnet(names, x, self.linear(f"model.{name}.affine", emb), resample)
        if f"model.{name}.qkv.weight" not in self.w:
            return x

        def split(qkv):
            return qkv.unflatten(1, (-1, HEAD, 3)).unbind(3)  # head, dim, three

        return self.attention([f"model.{name}.{part}" for part in ("norm2", "qkv", "proj")], x, split)

    def __call__(self, x, t, labels):
        emb = frequencies(t, self.w["model.map_layer0.weight"].shape[1])
        emb = self.linear("model.map_layer1", F.silu(self.linear("model.map_layer0", emb)))
        emb = F.silu(emb + self.linear("model.map_label", labels))
        stack = [self.conv("model.enc.8x8_conv", x)]
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
        return self.conv("model.out_conv", F.silu(self.norm("model.out_norm", h)))


# Random official weights --------------------------------------------------------------------------------------------


def shapes_of(flavour, widths=(32, 64), classes=5, layers=1, channels_out=3):
    """Names and shapes of an official network of two levels, written as its authors' constructor makes them."""
    emb, (a, b) = 4 * widths[0], widths
    shapes = {}

    def layer(name, *weight, bias=True):
        shapes[f"{name}.weight"] = weight
        if bias:
            shapes[f"{name}.bias"] = weight[:1]

    nvidia = flavour == "nvidia"
    parts = ("norm0", "conv0", "affine", "norm1", "conv1", "skip")
    if not nvidia:
        parts = ("in_layers.0", "in_layers.2", "emb_layers.1", "out_layers.0", "out_layers.3", "skip_connection")

    def block(name, c_in, c_out, filters=False):
        layer(f"{name}.{parts[0]}", c_in)
        layer(f"{name}.{parts[1]}", c_out, c_in, 3, 3)
        layer(f"{name}.{parts[2]}", 2 * c_out, emb)
        if flavour == "ctm":
            layer(f"{name}.emb_layers_s.1", 2 * c_out, emb)
        layer(f"{name}.{parts[3]}", c_out)
        layer(f"{name}.{parts[4]}", c_out, c_out, 3, 3)
        if c_in != c_out:
            layer(f"{name}.{parts[5]}", c_out, c_in, 1, 1)
        if filters and nvidia:
            shapes[f"{name}.conv0.resample_filter"] = shapes[f"{name}.skip.resample_filter"] = (1, 1, 2, 2)

    def attention(name, c):
        for part, *weight in (
            ("norm2" if nvidia else "norm", c),
            ("qkv", 3 * c, c, 1, 1),
            ("proj" if nvidia else "proj_out", c, c, 1, 1),
        ):
            layer(f"{name}.{part}", *weight)

    for time in {"nvidia": (), "openai": ("time_embed",), "ctm": ("time_embed", "time_embed_s")}[flavour]:
        layer(f"{time}.0", emb, a)
        layer(f"{time}.2", emb, emb)
    down = [(a, a)] * layers + [(a, a)] + [(a, b)] + [(b, b)] * (layers - 1)
    skips = [a, *(c_out for _, c_out in down)]
    up = [b] * (layers + 1) + [a] * (layers + 1)
    below = [b] * (layers + 2) + [a] * layers
    if nvidia:
        layer("model.map_layer0", emb, a)
        layer("model.map_layer1", emb, emb)
        layer("model.map_label", emb, classes, bias=False)
        layer("model.enc.8x8_conv", a, 3, 3, 3)
        enc = [f"8x8_block{i}" for i in range(layers)] + ["4x4_down"] + [f"4x4_block{i}" for i in range(layers)]
        for name, (c_in, c_out) in zip(enc, down, strict=True):
            block(f"model.enc.{name}", c_in, c_out, filters="down" in name)
            if name.startswith("4x4_block"):
                attention(f"model.enc.{name}", c_out)
        block("model.dec.4x4_in0", b, b)
        attention("model.dec.4x4_in0", b)
        block("model.dec.4x4_in1", b, b)
        for i, (c_in, c_out) in enumerate(zip(below, up, strict=True)):
            name = f"model.dec.{'4x4' if i <= layers else '8x8'}_block{i % (layers + 1)}"
            block(name, c_in + skips.pop(), c_out)
            if i <= layers:
                attention(name, c_out)
            if i == layers:
                block("model.dec.8x8_up", b, b, filters=True)
        layer("model.out_norm", a)
        layer("model.out_conv", 3, a, 3, 3)
        return shapes
    layer("label_emb", classes, emb, bias=False)
    layer("input_blocks.0.0", a, 3, 3, 3)
    for i, (c_in, c_out) in enumerate(down, start=1):
        block(f"input_blocks.{i}.0", c_in, c_out)
        if i > layers + 1:
            attention(f"input_blocks.{i}.1", c_out)
    block("middle_block.0", b, b)
    attention("middle_block.1", b)
    block("middle_block.2", b, b)
    for i, (c_in, c_out) in enumerate(zip(below, up, strict=True)):
        block(f"output_blocks.{i}.0", c_in + skips.pop(), c_out)
        if i <= layers:
            attention(f"output_blocks.{i}.1", c_out)
        if i == layers:
            block(f"output_blocks.{i}.2", b, b)
    layer("out.0", a)
    layer("out.2", channels_out, a, 3, 3)
    return shapes


def random_weights(flavour, seed=0, **sizes):
    """No layer is zero or the identity. Resampling filters are the constants they are."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in shapes_of(flavour, **sizes).items():
        if name.endswith("resample_filter"):
            weights[name] = torch.full(shape, 0.25)
        else:
            scale = math.prod(shape[1:]) ** -0.5 if len(shape) > 1 else 0.3
            weights[name] = scale * torch.randn(shape, generator=generator) * (3 if ".qkv." in name else 1)
            if len(shape) == 1 and name.endswith("weight"):
                weights[name] += 1
    return weights


SIZES = {"openai": {"layers": 2}, "ctm": {"layers": 2}, "nvidia": {"widths": (128, 160)}}


def convert(flavour, weights=None, **overrides):
    weights = random_weights(flavour, **SIZES[flavour]) if weights is None else weights
    return convert_adm.to_diffusers(weights, **{"num_head_channels": HEAD, **overrides})


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(2, 3, 8, 8, generator=generator, dtype=torch.float64)
    t, s = torch.tensor([0.7, -1.3], dtype=torch.float64), torch.tensor([-0.4, 0.9], dtype=torch.float64)
    return x, t, s, torch.tensor([1, 4])


@torch.no_grad()
@pytest.mark.parametrize("flavour", ["openai", "ctm", "nvidia"])
def test_equals_the_official_arithmetic(flavour, inputs):
    x, t, s, y = inputs
    weights = random_weights(flavour, **SIZES[flavour])
    network = convert(flavour, weights).double()
    # Cosines and sines are float32 in diffusers, so times of order one keep the comparison tight.
    if flavour == "ctm":
        official = OpenAI(weights, 2)(x, t, y, s)
        ours = network(x, t, s, y).sample
    elif flavour == "openai":
        official = OpenAI(weights, 2)(x, t, y)
        ours = network(x, t, y).sample
    else:
        official = Nvidia(weights)(x, t, F.one_hot(y, 5).double())
        ours = network(x, t, y).sample
    assert official.std() > 0.1
    assert (ours - official).abs().max() < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("flavour", ["openai", "nvidia"])
def test_every_other_order_of_qkv_is_another_function(flavour, inputs):
    x, t, _, y = inputs
    weights = random_weights(flavour, **SIZES[flavour])
    right = "head_dim_three" if flavour == "nvidia" else "three_head_dim"
    outputs = {
        order: convert_adm.to_diffusers(weights, qkv_order=order, num_head_channels=HEAD)(x.float(), t, y).sample
        for order in convert_adm.QKV_ORDERS
    }
    assert torch.equal(outputs[right], convert(flavour, weights)(x.float(), t, y).sample)
    for order in set(outputs) - {right}:
        assert (outputs[order] - outputs[right]).abs().max() > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("order, schedule", [("head_three_dim", "linear"), ("three_head_dim", "squaredcos_cap_v2")])
def test_guided_diffusion(order, schedule, inputs, tmp_path, capsys):
    """Its qkv are one-dimensional convolutions in either order, its outputs epsilon and a variance: a teacher by the real command."""
    weights = random_weights("openai", channels_out=6, **SIZES["openai"])
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
    assert "teacher, conditional on 5 classes" in capsys.readouterr().out

    teacher = load_teacher(str(tmp_path / "out"))
    x, _, _, y = inputs
    # data 0, noise n at timestep 700: x / sigma of the variance-exploding process, sqrt(1 - abar) n of the discrete one
    abar = DDPMScheduler(beta_schedule=schedule).alphas_cumprod[700].double()
    sigma = ((1 - abar) / abar).sqrt()
    official = OpenAI(weights, 2, heads_first=order == "head_three_dim")
    epsilon = official(abar.sqrt() * x, torch.full((2,), 700.0, dtype=torch.float64), y)[:, :3]
    found = teacher.denoise(x.float(), sigma.float().expand(2), y)
    assert (found - (x - sigma * epsilon)).abs().max() < 1e-3 * sigma
    assert teacher.scheduler.config.sigma_max > 100


def test_without_variances_leaves_others_alone():
    weights = random_weights("openai")
    assert all(without is weights[name] for name, without in convert_adm.without_variances(weights).items())
    with pytest.raises(UserError, match="guided-diffusion"):
        convert_adm.without_variances(random_weights("nvidia", **SIZES["nvidia"]))


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


@torch.no_grad()
def test_the_label_enters_with_the_time_only(inputs):
    x, t, s, y = inputs
    network = convert("ctm").double()
    for block in network.modules():  # cut the time and keep the target
        if hasattr(block, "time_emb_proj"):
            block.time_emb_proj.weight[:, : block.time_emb_proj.in_features // 2] = 0
    assert torch.equal(network(x, t, s, y).sample, network(x, t, s, (y + 1) % 5).sample)
    assert not torch.equal(network(x, t, s, y).sample, network(x, t, s + 1, y).sample)


# Back ---------------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("flavour", ["openai", "ctm", "nvidia"])
def test_back_gives_the_official_weights(flavour):
    weights = random_weights(flavour, **SIZES[flavour])
    network = convert(flavour, weights)
    assert type(network) is (CTMUNet2DModel if flavour == "ctm" else UNet2DModel) and not network.training
    official = convert_adm.to_official(network, flavour)
    assert official.keys() == weights.keys()
    for name, tensor in official.items():
        if ".emb_layers_s." in name and name.endswith("bias"):
            assert not tensor.any()
        elif ".emb_layers." in name and name.endswith("bias") and flavour == "ctm":
            assert torch.equal(tensor, weights[name] + weights[name.replace("emb_layers", "emb_layers_s")])
        else:
            assert torch.equal(tensor, weights[name]), name
    again = convert(flavour, official)
    assert again.config == network.config
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, network.state_dict()[name])


@torch.no_grad()
def test_one_network_has_both_teachers_forms(inputs):
    x, t, _, y = inputs
    network = convert("nvidia")
    through_openai = convert("openai", convert_adm.to_official(network), sample_size=8)
    assert torch.equal(network(x.float(), t, y).sample, through_openai(x.float(), t, y).sample)


def test_storage_is_not_shared():
    weights = random_weights("openai", **SIZES["openai"])
    network = convert("openai", weights)
    before = network.conv_in.weight.clone()
    weights["input_blocks.0.0.weight"].zero_()
    convert_adm.to_official(network)["input_blocks.0.0.weight"].zero_()
    assert torch.equal(network.conv_in.weight, before) and network.conv_in.weight.requires_grad


def test_half_precision_and_an_absent_prefix():
    weights = random_weights("nvidia", **SIZES["nvidia"])
    bare = {name.removeprefix("model."): tensor.half() for name, tensor in weights.items()}
    assert convert_adm.matches(bare) and convert_adm.defaults(bare)["timestep_scale"] == 1.0
    assert convert("nvidia", bare).dtype == torch.float32


@torch.no_grad()
def test_convolutional_sampling_and_plain_shift_are_placed():
    """The forms of OpenAI's networks beside scale-shift and residual sampling."""
    unet = UNet2DModel(
        **{
            **convert_adm.config_of(shapes_of("openai"), num_head_channels=HEAD),
            "downsample_type": "conv",
            "upsample_type": "conv",
            "resnet_time_scale_shift": "default",
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        }
    ).eval()
    official = convert_adm.to_official(unet)
    assert {"input_blocks.2.0.op.weight", "output_blocks.1.2.conv.weight"} <= official.keys()
    again = convert("openai", official)
    x = torch.randn(1, 3, 8, 8)
    arguments = (x, torch.tensor(0.5), torch.tensor([2]))
    assert torch.equal(unet(*arguments).sample, again(*arguments).sample)


# Errors -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flavour", ["openai", "ctm", "nvidia"])
def test_keys_that_do_not_fit_are_named(flavour):
    shapes = shapes_of(flavour, **SIZES[flavour])
    assert convert_adm.flavour_of(shapes) == flavour
    name = next(name for name in shapes if name.endswith(("conv1.bias", "middle_block.2.out_layers.3.bias")))
    for change in (
        {key: shape for key, shape in shapes.items() if key != name},
        {**shapes, name: (7,)},
        {**shapes, f"{name}_train": (7,)},
    ):
        with pytest.raises(UserError, match=name.replace(".", r"\.")):
            convert_adm.config_of(change, num_head_channels=HEAD)


def test_errors():
    shapes = shapes_of("openai")
    assert not convert_adm.matches({"model.enc.8x8_conv.weight": (1,), "model.dec.8x8_aux_conv.weight": (1,)})
    with pytest.raises(UserError, match="no ADM network"):
        convert_adm.config_of({"conv.weight": (3, 3, 3, 3)})
    with pytest.raises(UserError, match="num_head_channels=48 does not divide"):
        convert_adm.config_of(shapes, num_head_channels=48)
    with pytest.raises(UserError, match="colour is not an argument"):
        convert_adm.config_of(shapes, colour=3)
    with pytest.raises(UserError, match="a quarter as many"):
        convert_adm.config_of(shapes_of("nvidia"), num_head_channels=HEAD)
    nvidia = shapes_of("nvidia", **SIZES["nvidia"])
    with pytest.raises(UserError, match="map_augment"):
        convert_adm.config_of({**nvidia, "model.map_augment.weight": (128, 9)}, num_head_channels=HEAD)
    weights = random_weights("nvidia", **SIZES["nvidia"])
    weights["model.dec.8x8_up.skip.resample_filter"] = torch.tensor([[[[0.1, 0.4], [0.4, 0.1]]]])
    with pytest.raises(UserError, match="dec.8x8_up.skip.resample_filter"):
        convert("nvidia", weights)
    flat = {name: w[..., 0] if ".qkv.weight" in name else w for name, w in random_weights("openai").items()}
    with pytest.raises(UserError, match="qkv_order"):
        convert("openai", flat)
    ordered = convert_adm.to_diffusers(flat, qkv_order="three_head_dim", num_head_channels=HEAD)
    assert torch.equal(ordered.mid_block.attentions[0].to_k.weight, convert("openai", random_weights("openai")).mid_block.attentions[0].to_k.weight)  # fmt: skip


def test_networks_without_official_form(make_unet):
    ctm = make_unet(block_out_channels=(32, 32), norm_num_groups=8)
    with pytest.raises(UserError, match="resnet_time_scale_shift|norm_num_groups"):
        convert_adm.to_official(ctm)
    with pytest.raises(UserError, match="flavour 'nvidia'"):
        convert_adm.to_official(convert("ctm"), "nvidia")
    with pytest.raises(UserError, match="flavour must be"):
        convert_adm.to_official(convert("ctm"), "sony")
    network = convert("openai")
    for name, value in (("norm_eps", 1e-6), ("flip_sin_to_cos", False), ("center_input_sample", True)):
        config = {key: entry for key, entry in network.config.items() if not key.startswith("_")}
        other = UNet2DModel(**{**config, name: value})
        with pytest.raises(UserError, match=name):
            convert_adm.to_official(other)


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
    flavour = convert_adm.flavour_of(state_dict)
    with torch.device("meta"):
        network = convert_adm.to_diffusers(state_dict)
    merged = sum(t.numel() for key, t in state_dict.items() if ".emb_layers_s." in key and key.endswith("bias"))
    assert sum(p.numel() for p in network.parameters()) == parameters - merged
    assert (merged > 0) == (flavour == "ctm")
    official = convert_adm.to_official(network, flavour)
    assert {key: tensor.shape for key, tensor in official.items()} == {k: t.shape for k, t in state_dict.items()}
    config = network.config
    assert (config.block_out_channels, config.layers_per_block) == ((192, 384, 576, 768), 3)
    assert (config.sample_size, config.num_class_embeds, config.attention_head_dim) == (64, 1000, 64)
    assert [kind.startswith("Attn") for kind in config.down_block_types] == [False, True, True, True]
    assert convert_adm.defaults(state_dict)["timestep_scale"] == (1.0 if flavour == "nvidia" else 1000.0)


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

    numbers = convert_adm.defaults(weights)
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


def test_names_that_say_more_than_any_network_has():
    top = 2**501
    shapes = {f"enc.{top}x{top}_conv.weight": (128, 3, 3, 3), "out_conv.weight": (3, 128, 3, 3)}
    shapes |= {f"enc.{top >> i}x{top >> i}_block0.conv0.weight": (128, 128, 3, 3) for i in range(500)}
    shapes |= {f"enc.{top}x{top}_block{i}.conv0.weight": (128, 128, 3, 3) for i in range(500)}
    shapes |= {"map_layer0.weight": (512, 128), f"enc.{top}x{top}_block0.affine.weight": (256, 512)}
    with pytest.raises(UserError, match="tensors for 500 levels of 500 blocks"):
        convert_adm.config_of(shapes)
    huge = {**shapes_of("openai"), "time_embed.0.weight": (2**62, 32)}
    with pytest.raises(UserError, match="No ADM network can be made"):
        convert_adm.config_of(huge)
