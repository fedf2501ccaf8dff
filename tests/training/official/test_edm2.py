# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Official EDM2 checkpoints as EDM2UNet2DModel and back: the authors' numbers, names, shapes and pickles."""

import copy
import functools
import json
import math
import re

import pytest
import torch
import torch.nn.functional as F

from diffusers_ctm import EDM2UNet2DModel
from diffusers_ctm.trajectory import append_dims
from helpers.arithmetic import Arithmetic
from helpers.comparing import close as close_to
from helpers.official_edm2 import official_blocks, oracle_network, precond_of, snapshot
from helpers.places import EDM2_ORACLE
from helpers.tiny_networks import EDM2_KINDS, inputs, make_edm2
from training.cli.errors import UserError
from training.official import edm2
from training.official.families import FAMILIES, find_family
from training.official.files import read_checkpoint
from training.official.layers import shapes_of
from training.official.weights import modules_of, weights_of


NETWORKS = ["edm2_pixel64", "edm2_latent32", "edm2_options16"]
# Arguments that names and shapes do not tell.
UNTOLD = ("attention_head_dim", "dropout", "resample_filter", "clip_act", "label_balance", "concat_balance")
UNTOLD += ("res_balance", "attn_balance")
square = {name: changes for name, changes in EDM2_KINDS.items() if name != "not square"}
every_kind = pytest.mark.parametrize("changes", square.values(), ids=square.keys())
close = functools.partial(close_to, rtol=0, atol=2e-5)


def untold(network) -> dict:
    return {name: network.config[name] for name in UNTOLD}


# The authors' numbers -------------------------------------------------------------------------------------------------


@pytest.fixture
def official(oracle):
    """Read the network `name` of the oracle: (network, preconditioning, official weights, inputs and outputs)."""

    def read(name):
        numbers = oracle(EDM2_ORACLE / f"{name}_io.npz")
        return *oracle_network(name), {key: torch.from_numpy(value) for key, value in numbers.items()}

    return read


def captured(network, names):
    """Latest outputs of submodules, by the official names that `names` maps, in a dict that fills with each call."""
    outputs = {}
    for official, own in names.items():
        network.get_submodule(own).register_forward_hook(
            lambda module, given, output, official=official: outputs.update({official: output})
        )
    return outputs


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_gives_the_authors_numbers(official, name):
    network, preconditioning, _, io = official(name)
    assert not network.training and not network.has_target_time
    x, sigma, labels = io["x"], io["sigma"], io["labels_int"]
    names = {"unet.emb_fourier": "time_proj", "unet.emb_noise": "time_embedding", "unet.emb_label": "class_embedding"}
    names |= {f"unet.enc.{x.shape[-1]}x{x.shape[-1]}_conv": "conv_in", **official_blocks(network)}
    names = {official: own for official, own in names.items() if f"act_{official}" in io}
    inside = captured(network, names)

    net_in = append_dims(preconditioning.scalings(sigma)[2], 4) * x
    close(net_in[:1], io["net_in"])
    close(preconditioning.c_noise(sigma), io["c_noise"])
    close(network(net_in, io["c_noise"], class_labels=labels).sample, io["F"])
    assert len(inside) == len([key for key in io if key.startswith("act_")]) > 10
    for key, output in inside.items():
        expected = io[f"act_{key}"]  # of an image, and only its first rows if it is large
        close(output[: len(expected)] if output.ndim == 2 else output[:1, :, : expected.shape[2]], expected)

    close(preconditioning.denoise(network, x, sigma, class_labels=labels), io["D"])
    close(preconditioning.denoise(network, x[-1:], io["sigma_scalar"], class_labels=labels[-1:]), io["D_scalar"])
    close(network(net_in[:2], io["c_noise"][:2]).sample, io["F_nolabel"])
    close(network(net_in[:1], io["c_noise"][:1], class_labels=io["labels_soft"]).sample, io["F_soft"])
    close(network.log_variance(io["c_noise"]), io["logvar"])
    close(network.log_variance(preconditioning.c_noise(io["logvar_sigmas"])), io["logvar_at"])
    if "F_halfparams" in io:  # they leave weights and gains in float16, here they become float32
        output = network(net_in[:1], io["c_noise"][:1], class_labels=labels[:1]).sample
        assert 2e-5 < (output - io["F_halfparams"]).abs().max() < 1.5e-3


@torch.no_grad()
def test_gives_the_authors_numbers_in_training(official):
    """Weights normalized first; then dropout, once for each block."""
    network, preconditioning, _, io = official("edm2_options16")
    net_in = append_dims(preconditioning.scalings(io["sigma"])[2], 4) * io["x"]
    network.normalize_weights_()
    close(network(net_in, io["c_noise"], class_labels=io["labels_int"]).sample, io["F_train_nodropout"])
    torch.manual_seed(77)
    output = network.train()(net_in, io["c_noise"], class_labels=io["labels_int"]).sample
    close(output, io["F_train_dropout_seed77"])
    assert (output - io["F_train_nodropout"]).abs().max() > 0.1


@pytest.mark.parametrize("name", [*NETWORKS, "edm2_guide_uncond64"])
def test_the_authors_weights_return(name):
    network, _, weights = oracle_network(name)
    again = edm2.to_official(network)
    assert set(again) == set(weights)
    for key, tensor in weights.items():
        assert torch.equal(again[key], tensor.float()), key


# Names and shapes of the full-size networks ---------------------------------------------------------------------------

PRESETS = [f"edm2-img512-{size}" for size in ("xxs", "xs", "s", "m", "l", "xl", "xxl")]
PRESETS += [f"edm2-img64-{size}" for size in ("xs", "s", "m", "l", "xl")]


@pytest.mark.parametrize("name", PRESETS)
def test_full_size_names_map_one_to_one(name):
    path = EDM2_ORACLE / "keys_edm2_fullsize.json"
    if not path.exists():
        pytest.skip("the oracle folder is not here")
    entry = json.loads(path.read_text())["networks"]
    assert set(entry) == set(PRESETS)
    entry = entry[name]
    shapes = {key: tuple(shape) for key, shape, _ in entry["state_dict"]}
    assert [family for family in FAMILIES if family.matches(shapes)] == [edm2]
    with torch.device("meta"):
        state_dict = {key: torch.empty(shape) for key, shape in shapes.items()}
    network = edm2.to_diffusers(state_dict)

    again = edm2.to_official(network)
    assert shapes_of(again) == shapes
    assert network.num_parameters() == entry["n_params"]
    assert sum(tensor.numel() for tensor in again.values()) == entry["n_params"] + entry["n_buffers"]
    own = official_blocks(network)
    attention = {theirs: network.get_submodule(block).attention for theirs, block in own.items()}
    assert len(own) == 36 and entry["num_heads"] == {
        theirs: module.heads for theirs, module in attention.items() if module is not None
    }
    width = entry["init_kwargs"]["model_channels"]
    expected = {
        **{"sample_size": 64, "in_channels": 4 if "512" in name else 3, "layers_per_block": 3},
        **{"block_out_channels": tuple(width * times for times in (1, 2, 3, 4)), "attention_levels": (2, 3)},
        **{"time_proj_dim": width, "time_embedding_dim": 4 * width, "num_class_embeds": 1000, "target_time": False},
        **{"attention_head_dim": 64, "log_variance_channels": 128, "clip_act": 256.0, "resample_filter": (1, 1)},
    }
    assert {key: network.config[key] for key in expected} == expected

    del state_dict["unet.emb_label.weight"]
    unconditional = edm2.to_diffusers(state_dict)
    assert unconditional.config.num_class_embeds is None
    assert unconditional.num_parameters() == entry["n_params_uncond"]


def test_the_default_arguments_are_those_of_the_smallest_published_network():
    with torch.device("meta"):
        network = EDM2UNet2DModel(in_channels=4, out_channels=4, num_class_embeds=1000)
    state_dict = edm2.to_official(network)
    assert network.num_parameters() == 124_713_253 and len(state_dict) == 203  # of EDM2-XS
    config = edm2.to_diffusers(state_dict).config
    inferred = {"time_proj_dim": 128, "time_embedding_dim": 512}
    differing = {name for name, value in config.items() if value != network.config[name] and not name.startswith("_")}
    assert {name: config[name] for name in differing} == inferred


# The official network, written out ------------------------------------------------------------------------------------


def normalized(x, dim):
    return x / (1e-4 + x.square().mean(dim, keepdim=True).sqrt())


def balanced(a, b, t):
    return ((1 - t) * a + t * b) / math.hypot(1 - t, t)


def scaled_silu(x):
    return x * x.sigmoid() / 0.596


class EDM2(Arithmetic):
    """The U-Net of Karras et al. 2024 (Figure 21, Appendix B) as a function of its official state dict."""

    def __init__(self, weights, network):
        self.config = network.config
        super().__init__(weights, self.config.resample_filter)
        self.sizes = [self.config.sample_size >> level for level in range(len(self.config.block_out_channels))]

    def layer(self, name, x, gain=1.0):
        """Linear, or a convolution among zeros: a row of n numbers has length 1, but for 1e-4 sqrt(n)."""
        weight = self.w[f"{name}.weight"]
        rows = weight.flatten(1)
        rows = gain * rows / (1e-4 * math.sqrt(rows.shape[1]) + rows.norm(dim=1, keepdim=True))
        if weight.ndim == 2:
            return x @ rows.T
        return F.conv2d(x, rows.reshape(weight.shape), padding=weight.shape[-1] // 2)

    def waves(self, name, c):
        return math.sqrt(2) * (c[:, None] * self.w[f"{name}.freqs"] + self.w[f"{name}.phases"]).cos()

    def log_variance(self, time):
        return self.layer("logvar_linear", self.waves("logvar_fourier", time.double()))[:, 0]

    def embedding(self, time, labels):
        emb = self.layer("unet.emb_noise", self.waves("unet.emb_fourier", time))
        count = self.config.num_class_embeds
        if count:
            one_hot = torch.zeros(len(time), count) if labels is None else torch.eye(count)[labels]
            emb = balanced(
                emb, self.layer("unet.emb_label", math.sqrt(count) * one_hot.double()), self.config.label_balance
            )
        return scaled_silu(emb)

    def skip(self, name, x):
        return self.layer(f"{name}.conv_skip", x) if f"{name}.conv_skip.weight" in self.w else x

    def block(self, name, x, emb):
        config, is_encoder = self.config, name.startswith("unet.enc")
        if is_encoder:
            x = normalized(self.skip(name, x), 1)
        y = self.layer(f"{name}.conv_res0", scaled_silu(x))
        scale = 1 + self.layer(f"{name}.emb_linear", emb, self.w[f"{name}.emb_gain"])
        y = self.layer(f"{name}.conv_res1", scaled_silu(y * scale[:, :, None, None]))
        x = balanced(x if is_encoder else self.skip(name, x), y, config.res_balance)
        if f"{name}.attn_qkv.weight" in self.w:
            x = balanced(x, self.attention(name, x), config.attn_balance)
        return x.clamp(-config.clip_act, config.clip_act)

    def attention(self, name, x):
        rows = self.layer(f"{name}.attn_qkv", x).reshape(len(x), -1, self.config.attention_head_dim, 3, x[0, 0].numel())
        query, key, value = normalized(rows, 2).unbind(3)
        return self.layer(f"{name}.attn_proj", self.attended(query, key, value).reshape(x.shape))

    def __call__(self, x, time, class_labels=None):
        emb, x = self.embedding(time.double(), class_labels), x.double()
        top = self.sizes[0]
        x = self.layer(f"unet.enc.{top}x{top}_conv", torch.cat([x, torch.ones_like(x[:, :1])], dim=1))
        skips = [x]
        for size in self.sizes:
            name = f"unet.enc.{size}x{size}"
            if size < top:
                x = self.block(f"{name}_down", self.half(x), emb)
                skips.append(x)
            for i in range(self.config.layers_per_block):
                x = self.block(f"{name}_block{i}", x, emb)
                skips.append(x)
        for size in reversed(self.sizes):
            name = f"unet.dec.{size}x{size}"
            if size == self.sizes[-1]:
                x = self.block(f"{name}_in1", self.block(f"{name}_in0", x, emb), emb)
            else:
                x = self.block(f"{name}_up", self.double(x), emb)
            for i in range(self.config.layers_per_block + 1):
                x = self.block(f"{name}_block{i}", self.joined(x, skips.pop()), emb)
        assert not skips
        return self.layer("unet.out_conv", x, self.w["unet.out_gain"])

    def joined(self, a, b):
        """Each counts as its balance says, whatever its number of channels."""
        t, count = self.config.concat_balance, a.shape[1] + b.shape[1]
        a, b = (1 - t) * math.sqrt(count / a.shape[1]) * a, t * math.sqrt(count / b.shape[1]) * b
        return torch.cat([a, b], dim=1) / math.hypot(1 - t, t)


@every_kind
@torch.no_grad()
def test_equals_the_official_arithmetic(changes):
    network = make_edm2(**changes)
    state_dict = edm2.to_official(network)
    official, again = EDM2(state_dict, network), edm2.to_diffusers(state_dict, **untold(network))
    sample, t, _, condition = inputs(network)
    for given in (condition, {}) if condition else ({},):
        expected = official(sample, t, **given)
        assert expected.std() > 0.1
        close(again(sample, t, **given).sample.double(), expected)
    if network.config.log_variance_channels:
        close(again.log_variance(t).double(), official.log_variance(t))


# Without the authors' files -------------------------------------------------------------------------------------------


@every_kind
def test_there_and_back_is_the_same_function(changes):
    network = make_edm2(**changes)
    state_dict = edm2.to_official(network)
    assert [family for family in FAMILIES if family.matches(shapes_of(state_dict))] == [edm2]
    again = edm2.to_diffusers(state_dict, **untold(network))
    sample, t, _, condition = inputs(network)
    assert torch.equal(again(sample, t, **condition).sample, network(sample, t, **condition).sample)
    for name, tensor in network.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    public = {key: value for key, value in network.config.items() if not key.startswith("_")}
    linear = network.time_embedding
    explicit = {"time_proj_dim": linear.in_features, "time_embedding_dim": linear.out_features}
    assert {key: again.config[key] for key in public} == {**public, **explicit}
    assert not {p.data_ptr() for p in again.parameters()} & {tensor.data_ptr() for tensor in state_dict.values()}
    assert all(parameter.requires_grad for parameter in again.parameters())


def test_half_precision_files_become_float32():
    state = {name: tensor.half() for name, tensor in edm2.to_official(make_edm2()).items()}
    network = edm2.to_diffusers(state, attention_head_dim=8)
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}
    phases = network.time_proj.phase_bits.view(torch.float32)
    assert torch.equal(phases, state["unet.emb_fourier.phases"].float())


KEYS = ["unet.out_gain", "unet.emb_fourier.phases", "unet.emb_noise.weight", "unet.out_conv.weight"]
KEYS += ["unet.enc.8x8_conv.weight", "unet.enc.4x4_down.emb_gain", "unet.enc.4x4_block0.attn_qkv.weight"]
KEYS += ["unet.dec.4x4_in0.attn_proj.weight", "unet.dec.8x8_block1.conv_skip.weight"]
KEYS += ["logvar_fourier.freqs", "logvar_linear.weight"]


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("change", ["missing", "misshapen"])
def test_a_key_that_is_missing_or_misshapen_is_named(key, change):
    state = edm2.to_official(make_edm2(num_class_embeds=7))
    tensor = state.pop(key)
    if change == "misshapen":
        state[key] = torch.zeros(5, *tensor.shape)
    family, weights = find_family({f"module.{name}": tensor for name, tensor in state.items()})
    words = "enc.<size>x<size>_conv.weight" if change == "missing" and key.endswith("8x8_conv.weight") else key
    with pytest.raises(UserError, match=re.escape(words)):
        assert family is edm2
        edm2.to_diffusers(weights, attention_head_dim=8)


def test_parts_that_a_network_need_not_have():
    state = edm2.to_official(make_edm2(num_class_embeds=7))
    without = {name: tensor for name, tensor in state.items() if "emb_label" not in name and "logvar" not in name}
    assert len(without) == len(state) - 4
    config = edm2.to_diffusers(without, attention_head_dim=8).config
    assert config.num_class_embeds is config.log_variance_channels is None


@pytest.mark.parametrize(
    "key", ["unet.enc.8x8_block0.conv_res2.weight", "sigma_data", "logvar", "unet.dec.4x4_in1.attn_qkv.weight"]
)
def test_a_surplus_key_is_named(key):
    state = {**edm2.to_official(make_edm2()), key: torch.zeros(3)}
    with pytest.raises(UserError, match=f"has {key}, which has no place"):
        edm2.to_diffusers(state, attention_head_dim=8)


@pytest.mark.parametrize(
    "overrides, words",
    [
        ({"no_such": 1}, "no_such is not an argument of EDM2UNet2DModel"),
        ({}, "attention_head_dim=64 must divide the 16 channels of level 1"),
        ({"attention_head_dim": 8, "resample_filter": (1, 2, 1)}, "resample_filter=.* an even number of taps"),
        ({"attention_head_dim": 8, "dropout": 1.5}, "No EDM2UNet2DModel can be made of the checkpoint: dropout"),
        ({"attention_head_dim": 8, "target_time": True}, "has no .*|no official name"),
        ({"attention_head_dim": 8, "qkv_order": "three_head_dim"}, "--qkv_order is for ADM networks"),
    ],
)
def test_overrides_that_do_not_fit(overrides, words):
    with pytest.raises(UserError, match=words):
        edm2.to_diffusers(edm2.to_official(make_edm2()), **overrides)


def test_what_has_no_official_form():
    with pytest.raises(UserError, match="no network with a target time"):
        edm2.to_official(make_edm2(target_time=True))
    with pytest.raises(UserError, match=r"sample_size=\(8, 16\)"):
        edm2.to_official(make_edm2(sample_size=(8, 16)))
    with pytest.raises(UserError, match="--flavour is for ADM networks"):
        edm2.to_official(make_edm2(), "nvidia")
    with pytest.raises(UserError, match="--prediction_type epsilon"):
        edm2.without_variances({})
    peft = pytest.importorskip("peft")
    network = make_edm2()
    network.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(UserError, match="to_q.* has no official name.*; unload adapters"):
        edm2.to_official(network)


# What pickles say -----------------------------------------------------------------------------------------------------

FACTS = {"dropout": 0.1, "label_balance": 0.35, "concat_balance": 0.4, "res_balance": 0.25, "attn_balance": 0.45}
FACTS |= {"clip_act": 1.5, "attention_head_dim": 4, "resample_filter": (1, 3, 3, 1)}


def read_snapshot(folder, network, sigma_data=0.5):
    """The `ema` of a snapshot of the authors' modules with the weights of `network`."""
    path = folder / "network-snapshot.pkl"
    path.write_bytes(snapshot(precond_of(network, sigma_data)))
    return read_checkpoint(path)["ema"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return read_snapshot(tmp_path_factory.mktemp("edm2"), make_edm2())


@pytest.fixture
def part(tiny):
    """A network that was pickled, to be changed."""
    return copy.deepcopy(tiny)


def blocks_of(part):
    """The attributes of its blocks, those of the encoder first."""
    return [state for _, state in modules_of(part) if "num_heads" in state]


def test_a_pickle_says_what_shapes_do_not(tmp_path):
    network = make_edm2(num_class_embeds=7, **FACTS)
    part = read_snapshot(tmp_path, network, sigma_data=0.7)
    said = edm2.said_by(part)
    assert said == {"sigma_data": 0.7, **FACTS}
    del said["sigma_data"]
    again = edm2.to_diffusers(weights_of(part), **said)
    sample, t, _, condition = inputs(network)
    for name, tensor in edm2.to_official(network).items():
        assert torch.equal(edm2.to_official(again)[name], tensor.half().float()), name
    output = again(sample, t, **condition).sample
    assert (output - network(sample, t, **condition).sample).abs().max() < 0.02  # of 0.5; their weights are halves
    usual = edm2.to_diffusers(weights_of(part), attention_head_dim=4, resample_filter=(1, 3, 3, 1))
    assert (output - usual(sample, t, **condition).sample).abs().max() > 0.1


@pytest.mark.parametrize(
    "name, value", [("res_balance", 0.4), ("clip_act", 255), ("dropout", 0.1), ("resample_filter", [1, 3, 3, 1])]
)
def test_blocks_that_say_different_things_are_refused(name, value, part):
    blocks_of(part)[4][name] = value
    with pytest.raises(UserError, match=f"say different things of {name}"):
        edm2.said_by(part)


def test_heads_of_two_sizes_are_refused(part):
    attended = [block for block in blocks_of(part) if block["num_heads"]]
    assert {block["out_channels"] // block["num_heads"] for block in attended} == {8} and len(attended) == 4
    attended[-1]["num_heads"] = 4
    with pytest.raises(UserError, match="say different things of attention_head_dim"):
        edm2.said_by(part)


HUGE = 10**5000  # Python does not even print it
HOSTILE = [("res_balance", math.nan), ("attn_balance", math.inf), ("clip_act", HUGE), ("clip_act", "256")]
HOSTILE += [("dropout", math.nan), ("dropout", -0.5), ("dropout", True), ("dropout", 10**20), ("res_balance", None)]
HOSTILE += [("num_heads", -2), ("num_heads", 0), ("num_heads", HUGE), ("num_heads", 2.0), ("num_heads", [1])]
HOSTILE += [("out_channels", HUGE), ("out_channels", -8), ("out_channels", None), ("out_channels", 24)]
HOSTILE += [("resample_filter", taps) for taps in ([], [1], [1, 2, 1], [1, -1], [math.nan, 1], ["1", 1], [HUGE, 1])]
HOSTILE += [("resample_filter", taps) for taps in ([1] * 1000, [[1, 1]], 3, "11", (1, 1), torch.ones(2), [1] * 16)]


@pytest.mark.parametrize("name, value", HOSTILE, ids=[f"{name} {index}" for index, (name, _) in enumerate(HOSTILE)])
@torch.no_grad()
def test_a_pickle_that_says_nonsense_is_refused_or_not_believed(name, value, part):
    for block in blocks_of(part):
        block[name] = value
    try:
        said = edm2.said_by(part)
        del said["sigma_data"]
        network = edm2.to_diffusers(weights_of(part), **{"attention_head_dim": 8, **said})
    except UserError as error:
        assert len(str(error)) < 500
        return
    sample, t, _, _ = inputs(network)
    assert network(sample, t).sample.isfinite().all()
    json.dumps(dict(network.config), allow_nan=False)


@pytest.mark.parametrize("value", [0, -0.5, math.nan, math.inf, "0.5", None, [0.5], torch.tensor(0.5)])
def test_a_sigma_data_that_cannot_be_is_not_believed(value, part):
    part.state["sigma_data"] = value
    assert "sigma_data" not in edm2.said_by(part)
