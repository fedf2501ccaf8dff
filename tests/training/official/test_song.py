# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Official SongUNet checkpoints as EDMUNet2DModel and back: the authors' numbers, names and shapes."""

import argparse
import functools
import json
import math
import re

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import silu

from diffusers_ctm import CTMPipeline, EDMUNet2DModel
from diffusers_ctm.preconditioning import Preconditioning
from diffusers_ctm.trajectory import PURE_NOISE, append_dims
from helpers.arithmetic import Arithmetic
from helpers.comparing import close as close_to
from helpers.places import ORACLE
from helpers.tiny_networks import EDM_KINDS, inputs, make_edm, times
from training.cli.errors import UserError
from training.cli.options import parse_config
from training.convert import ConvertConfig, main
from training.official import song
from training.official.families import find_family
from training.official.layers import shapes_of


EDM = ["edm_ddpmpp_uncond", "edm_ddpmpp_cond", "edm_ncsnpp_cond"]
PRECONDITIONING = Preconditioning(song.DEFAULTS["sigma_data"], song.DEFAULTS["timestep_scale"])
square = {name: changes for name, changes in EDM_KINDS.items() if name != "not square"}
every_kind = pytest.mark.parametrize("changes", square.values(), ids=square.keys())
both_times = pytest.mark.parametrize("target_time", [False, True], ids=["teacher", "ctm"])
close = functools.partial(close_to, rtol=0, atol=2e-5)


@pytest.fixture
def official(oracle):
    """Read the network `name` of the oracle: its state dict, and its inputs and outputs as tensors."""

    def read(name):
        numbers = {key: torch.from_numpy(value) for key, value in oracle(f"{name}_io.npz").items()}
        return load_file(ORACLE / f"{name}.safetensors"), numbers

    return read


def captured(network, **modules):
    """Latest outputs of the named submodules, in a dict that fills as the network is called."""
    outputs = {}
    for key, name in modules.items():
        network.get_submodule(name).register_forward_hook(lambda *call, key=key: outputs.update({key: call[2]}))
    return outputs


# The authors' numbers -------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_ctm_gives_the_authors_numbers(official):
    state_dict, io = official("ctm_cifar_uncond")
    network = song.to_diffusers(state_dict)
    assert network.has_target_time and not network.training
    inside = captured(
        network,
        act_map_layer0="time_embedding.linear_1",
        act_map_layer1="time_embedding.linear_2",
        act_map_layer0_s="target_time_embedding.linear_1",
        act_map_layer1_s="target_time_embedding.linear_2",
        **{"act_enc.32x32_conv": "conv_in", "act_enc.32x32_block0": "down_blocks.0.resnets.0"},
        **{"act_enc.16x16_down": "down_blocks.1.resnets.0", "act_enc.16x16_block0": "down_blocks.1.attentions.1"},
        **{"act_enc.8x8_block3": "down_blocks.2.resnets.4"},
    )
    x, t, s = io["x"], io["t"], io["s"]
    close(network(io["net_in"], t.log() / 4, s.log() / 4).sample, io["F"])
    assert len(inside) == 9
    for name, output in inside.items():
        close(output[: len(io[name])], io[name])
    close(network(io["net_in"], t.log() / 4).sample, io["F_s_eq_t"])
    close(PRECONDITIONING.g(network, x, t, s), io["g"])
    close(PRECONDITIONING.jump(network, x, t, s), io["G"])
    close(PRECONDITIONING.denoise(network, x, t), io["g_s_eq_t"])


@torch.no_grad()
def test_ctms_teacher_gives_the_authors_numbers(official):
    teacher = song.to_diffusers(official("edm_ddpmpp_uncond")[0])
    _, io = official("ctm_cifar_uncond")
    # they recover F from D, which loses digits where t is small
    close(teacher(io["net_in"], io["t"].log() / 4).sample, io["teacher_F"], atol=1e-4)
    close(PRECONDITIONING.denoise(teacher, io["x"], io["t"]), io["teacher_D"])
    close(PRECONDITIONING.denoise(EDMUNet2DModel.from_unet(teacher), io["x"], io["t"]), io["teacher_D"])


@pytest.mark.parametrize("name", EDM)
@torch.no_grad()
def test_edm_gives_the_authors_numbers(official, name):
    state_dict, io = official(name)
    network = song.to_diffusers(state_dict)
    inside = captured(network, map_layer1="time_embedding.linear_2")
    x, sigma, augment = io["x"], io["sigma"], io["augment_labels"]
    labels = {"class_labels": io["labels"]} if "labels" in io else {}
    close(network(append_dims(io["c_in"], 4) * x, io["c_noise"], **labels).sample, io["F"])
    close(inside["map_layer1"], io["map_layer1"])
    cosines, sines = io["map_noise"].chunk(2, dim=1)  # the authors swap them afterwards
    close(network.time_proj(io["c_noise"]), torch.cat([sines, cosines], dim=1))
    close(PRECONDITIONING.denoise(network, x, sigma, **labels), io["D"])
    close(PRECONDITIONING.denoise(network, x, sigma, augment_labels=augment, **labels), io["D_augment"])
    if labels:
        close(PRECONDITIONING.denoise(network, x, sigma), io["D_nolabel"])
        one_hot = torch.eye(10)[io["labels"]]
        close(PRECONDITIONING.denoise(network, x, sigma, class_labels=one_hot), io["D"])


# Names and shapes of the full-size networks ---------------------------------------------------------------------------

FULL = {
    "edm_cifar10_ddpmpp_uncond(vp)": 55733891,
    "edm_cifar10_ddpmpp_cond(vp)": 55735299,
    "edm_cifar10_ncsnpp_cond(ve)": 56400643,
    "edm_cifar10_ncsnpp_uncond(ve)": 56397827,
    "ctm_cifar10_uncond": 60395267,
    "ctm_cifar10_cond": 60396675,
}


def full_size(name):
    """Entry of the lists of the authors' keys, or skip where the checkout has none."""
    path = ORACLE / ("keys_ctm_cifar_fullsize.json" if name.startswith("ctm") else "keys_edm_fullsize.json")
    if not path.exists():
        pytest.skip("the oracle folder is not here")
    return json.loads(path.read_text())[name]


@pytest.mark.parametrize("name, count", FULL.items(), ids=FULL.keys())
@pytest.mark.parametrize("prefix", ["model.", ""], ids=["prefix", "no prefix"])
def test_full_size_names_map_one_to_one(name, count, prefix):
    entry = full_size(name)
    expected = {key: tuple(shape) for key, shape, _ in entry["state_dict"]}
    shapes = {prefix + key.removeprefix("model."): shape for key, shape in expected.items()}
    assert song.matches(shapes)
    with torch.device("meta"):
        state_dict = {key: torch.empty(shape) for key, shape in shapes.items()}
    network = song.to_diffusers(state_dict)

    again = song.to_official(network)
    assert shapes_of(again) == expected
    merged = sum(math.prod(shape) for key, shape in expected.items() if key.endswith("affine_s.bias"))
    assert sum(parameter.numel() for parameter in network.parameters()) == count - merged
    assert sum(tensor.numel() for tensor in again.values()) == count + entry["n_buffers"]

    is_ve, is_ctm = "ncsnpp" in name, "ctm" in name
    expected = {
        **{"sample_size": 32, "in_channels": 3, "model_channels": 128, "block_out_channels": (256, 256, 256)},
        **{"layers_per_block": 4, "attention_levels": (1,), "dropout": 0.13, "target_time": is_ctm},
        **{"time_embedding_type": "fourier" if is_ve else "positional", "augment_dim": None if is_ctm else 9},
        **{"encoder_type": "residual" if is_ve else "standard", "resample_filter": (1, 3, 3, 1) if is_ve else (1, 1)},
        **{"num_class_embeds": None if "uncond" in name else 10},
    }
    assert {key: network.config[key] for key in expected} == expected


def test_another_family_does_not_match():
    other = {key: tuple(shape) for key, shape, _ in full_size("edm_imagenet64_adm_cond")["state_dict"]}
    assert not song.matches(other)
    assert not song.matches({"conv_in.weight": (8, 3, 3, 3)}) and not song.matches({})


# The official network, written out ------------------------------------------------------------------------------------


class Song(Arithmetic):
    """The U-Net of Karras et al. 2022 (Appendix F.1; after Song et al. 2021), a function of its official state dict."""

    def __init__(self, weights, network):
        config = network.config
        super().__init__(weights, config.resample_filter)
        self.encoder, self.decoder, self.head_dim = config.encoder_type, config.decoder_type, config.attention_head_dim
        self.sizes = [config.sample_size >> level for level in range(len(config.block_out_channels))]
        self.layers = config.layers_per_block

    def norm(self, name, x):
        return super().norm(name, x, min(32, x.shape[1] // 4), 1e-6)

    def block(self, name, x, embs, resample=lambda x: x):
        h = self.conv(f"{name}.conv0", resample(silu(self.norm(f"{name}.norm0", x))))
        for emb, end in zip(embs, ("affine", "affine_s")):
            h = h + self.linear(f"{name}.{end}", emb)[:, :, None, None]
        h = self.conv(f"{name}.conv1", silu(self.norm(f"{name}.norm1", h)))
        x = resample(x)
        x = (h + (self.conv(f"{name}.skip", x) if f"{name}.skip.weight" in self.w else x)) / math.sqrt(2)
        return (x + self.attention(name, x)) / math.sqrt(2) if f"{name}.qkv.weight" in self.w else x

    def attention(self, name, x):
        dim = self.head_dim or x.shape[1]
        rows = self.conv(f"{name}.qkv", self.norm(f"{name}.norm2", x)).reshape(len(x), -1, dim, 3, x[0, 0].numel())
        return self.conv(f"{name}.proj", self.attended(*rows.unbind(3)).reshape(x.shape))

    def embedding(self, time, condition, end):
        if "map_noise.freqs" in self.w:
            angles = 2 * math.pi * time[:, None] * self.w["map_noise.freqs"]
        else:
            half = self.w["map_layer0.weight"].shape[1] // 2
            angles = time[:, None] * 1e-4 ** (torch.arange(half, dtype=torch.float64) / (half - 1))
        emb = torch.cat([angles.sin(), angles.cos()], dim=1)
        if "map_label.weight" in self.w:
            count = self.w["map_label.weight"].shape[1]
            emb = emb + self.linear(
                "map_label", math.sqrt(count) * torch.eye(count).double()[condition["class_labels"]]
            )
        if "map_augment.weight" in self.w:
            emb = emb + self.linear("map_augment", condition["augment_labels"].double())
        return silu(self.linear(f"map_layer1{end}", silu(self.linear(f"map_layer0{end}", emb))))

    def embeddings(self, times, condition):
        return [self.embedding(time, condition, end) for time, end in zip(times, ("", "_s"))]

    def __call__(self, x, *times, **condition):
        embs = self.embeddings([time.double() for time in times], condition)
        image = x = x.double()
        skips = []
        for level, size in enumerate(self.sizes):
            name = f"enc.{size}x{size}"
            if level == 0:
                x = self.conv(f"{name}_conv", x)
            else:
                x = self.block(f"{name}_down", x, embs, self.half)
                if self.encoder == "skip":  # the input itself, smaller, is added at every level
                    image = self.half(image)
                    x = x + self.conv(f"{name}_aux_skip", image)
                elif self.encoder == "residual":  # a way of convolutions beside the blocks; both go on as their sum
                    pad = len(self.taps) // 2 - 1
                    matrix = self.halving(image.shape[-1] + 2 * pad, 0)
                    image = matrix @ self.conv(f"{name}_aux_residual", image, pad) @ matrix.T
                    x = image = (x + image) / math.sqrt(2)
            skips.append(x)
            for i in range(self.layers):
                x = self.block(f"{name}_block{i}", x, embs)
                skips.append(x)

        output = 0
        for level, size in reversed(list(enumerate(self.sizes))):
            name = f"dec.{size}x{size}"
            if size == self.sizes[-1]:
                x = self.block(f"{name}_in1", self.block(f"{name}_in0", x, embs), embs)
            else:
                x = self.block(f"{name}_up", x, embs, self.double)
            for i in range(self.layers + 1):
                x = self.block(f"{name}_block{i}", torch.cat([x, skips.pop()], dim=1), embs)
            if self.decoder == "skip" or level == 0:  # "skip": every level gives an image, added to the larger ones
                part = self.conv(f"{name}_aux_conv", silu(self.norm(f"{name}_aux_norm", x)))
                output = part if isinstance(output, int) else part + self.double(output)
        assert not skips
        return output


@every_kind
@both_times
@torch.no_grad()
def test_equals_the_official_arithmetic(changes, target_time):
    network = make_edm(target_time=target_time, **changes)
    sample, t, s, condition = inputs(network)
    official = Song(song.to_official(network), network)(sample, *times(network, t, s), **condition)
    assert official.std() > 0.1
    close(network(sample, *times(network, t, s), **condition).sample.double(), official)


# MeanFlow's network ---------------------------------------------------------------------------------------------------

MEANFLOW = {
    **{"block_out_channels": (16, 16, 16), "layers_per_block": 2, "resample_filter": (1, 3, 3, 1), "augment_dim": 6},
    **{"time_proj_dim": 16, "target_time": True, "target_time_type": "interval"},
}


class MeanFlow(Song):
    """The U-Net of the public PyTorch code of Geng et al. 2025 for CIFAR-10.

    One embedding reads the sines of t and of t - s side by side, and qkv holds all queries, then keys, then values.
    """

    def embeddings(self, times, condition):
        half = self.w["map_layer0.weight"].shape[1] // 4
        frequencies = 1e-4 ** (torch.arange(half, dtype=torch.float64) / (half - 1))
        angles = [time[:, None] * frequencies for time in (times[0], times[0] - times[1])]
        emb = torch.cat([wave for angle in angles for wave in (angle.sin(), angle.cos())], dim=1)
        emb = emb + self.linear("map_augment", condition["augment_labels"].double())
        return [silu(self.linear("map_layer1", silu(self.linear("map_layer0", emb))))]

    def attention(self, name, x):
        rows = self.conv(f"{name}.qkv", self.norm(f"{name}.norm2", x)).reshape(len(x), 3, 1, x.shape[1], -1)
        return self.conv(f"{name}.proj", self.attended(*rows.unbind(1)).reshape(x.shape))


@torch.no_grad()
def test_meanflows_network_from_its_training_file(tmp_path, capsys):
    """By the real command: the file holds the network and its averages, of which the first is what samples."""
    network = make_edm(**MEANFLOW)
    state = song.to_official(network)
    flat = {"num_updates": torch.tensor(7)}
    for name, factor in (("net", 0.5), ("net_ema", 1.0), ("net_ema1", 0.9)):
        flat |= {f"{name}.{key}": value if "filter" in key else factor * value for key, value in state.items()}
    others = {"optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}}, "epoch": 3, "args": argparse.Namespace(lr=0.1)}
    torch.save({"model": flat, **others}, tmp_path / "model.pth")

    def run(out, *options):
        main(parse_config(ConvertConfig, [str(tmp_path / "model.pth"), str(tmp_path / out), *options]))
        return CTMPipeline.from_pretrained(tmp_path / out)

    pipe = run("out")
    assert "entry model.net_ema with" in (said := capsys.readouterr().out) and "Found: flow map, unconditional" in said
    sample, t, s, condition = inputs(network)
    ours = pipe.unet(sample, t, s, **condition).sample
    assert ours.std() > 0.1
    close(ours.double(), MeanFlow(state, network)(sample, t, s, **condition))
    expected = {**MEANFLOW, "dropout": 0.2, "model_channels": 8, "attention_levels": (1,), "num_class_embeds": None}
    assert {name: pipe.unet.config[name] for name in expected} == {
        name: list(value) if isinstance(value, tuple) else value for name, value in expected.items()
    }
    numbers = pipe.scheduler.config
    assert (numbers.sigma_min, numbers.sigma_max, numbers.num_diffusion_timesteps) == (0.0, PURE_NOISE, 1)

    # their sampler: one step from tau = 1 to 0 by the average velocity, without augmentation
    labels, n = {"augment_labels": torch.zeros(3, 6)}, sample
    expected = n.double() - MeanFlow(state, network)(n, torch.ones(3), torch.zeros(3), **labels)
    close(pipe(latents=n, output_type="latent").images.double(), expected)

    again = song.to_official(pipe.unet)
    assert all(torch.equal(again[name], tensor) for name, tensor in state.items()) and again.keys() == state.keys()
    other = run("other", "--entry", "model.net_ema1", "--dropout", "0").unet
    close(other.conv_out.weight, 0.9 * network.conv_out.weight)


def test_meanflow_at_full_size():
    with torch.device("meta"):
        network = EDMUNet2DModel(
            **MEANFLOW
            | {"sample_size": 32, "model_channels": 128, "block_out_channels": (256,) * 3, "layers_per_block": 4}
            | {"time_proj_dim": 256}
        )
        state = song.to_official(network)
    assert tuple(state["map_layer0.weight"].shape) == (512, 512) and tuple(state["map_augment.weight"].shape) == (
        512,
        6,
    )
    family, weights = find_family({f"module.net_ema.{name}": tensor for name, tensor in state.items()})
    assert family is song and song.to_diffusers(weights).config.target_time_type == "interval"
    lacking = {name: tensor for name, tensor in state.items() if name != "map_layer0.bias"}
    with pytest.raises(UserError, match="has no map_layer0.bias"):
        song.to_diffusers(lacking)


def test_transformers_of_flow_maps_are_not_converted():
    names = ["x_embedder.proj", "t_embedder.mlp.0", "r_embedder.mlp.0", "blocks.0.attn.qkv", "final_layer.linear"]
    with pytest.raises(UserError, match="of a transformer .DiT, SiT., which are not converted: pass a teacher in"):
        find_family({f"module.{name}.weight": torch.zeros(2, 2) for name in names})


# Without the authors' files -------------------------------------------------------------------------------------------


@every_kind
@both_times
def test_there_and_back_is_the_same_function(changes, target_time):
    network = make_edm(target_time=target_time, **changes)
    state_dict = song.to_official(network)
    overrides = {name: changes[name] for name in ("attention_head_dim", "decoder_type") if name in changes}
    assert song.matches(shapes_of(state_dict))
    again = song.to_diffusers(state_dict, dropout=0.0, **overrides)
    sample, t, s, condition = inputs(network)
    pair = times(network, t, s)
    assert torch.equal(again(sample, *pair, **condition).sample, network(sample, *pair, **condition).sample)
    public = {key: value for key, value in network.config.items() if not key.startswith("_")}
    explicit = {"time_proj_dim": network.time_embedding.linear_1.in_features, "time_embedding_dim": 32}
    assert {key: again.config[key] for key in public} == {**public, **explicit}
    assert not {p.data_ptr() for p in again.parameters()} & {tensor.data_ptr() for tensor in state_dict.values()}
    assert {tuple(p.shape) for p in again.parameters() if not p.requires_grad} == set()


def test_half_precision_files_become_float32():
    state = {name: tensor.half() for name, tensor in song.to_official(make_edm(**EDM_KINDS["NCSN++"])).items()}
    network = song.to_diffusers(state)
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}
    frequencies = network.time_proj.frequency_bits.view(torch.float32)
    assert torch.equal(frequencies, state["model.map_noise.freqs"].float())


def test_overrides_win():
    shapes = shapes_of(song.to_official(make_edm(num_class_embeds=7)))
    for overrides in ({}, {"dropout": 0.3, "attention_head_dim": 8}):
        config = song.network_of(shapes, **overrides).config
        expected = {
            "dropout": 0.13,
            "attention_head_dim": None,
            "label_dropout": 0.0,
            "num_class_embeds": 7,
            **overrides,
        }
        assert {name: config[name] for name in expected} == expected


@pytest.mark.parametrize(
    "key",
    [
        "map_layer0.weight",
        "map_label.bias",
        "enc.4x4_down.skip.resample_filter",
        "enc.4x4_block0.norm2.weight",
        "dec.8x8_block1.affine.weight",
        "dec.8x8_aux_conv.weight",
    ],
)
@pytest.mark.parametrize("change", ["missing", "misshapen"])
def test_a_key_that_is_missing_or_misshapen_is_named(key, change):
    state = song.to_official(make_edm(num_class_embeds=7))
    tensor = state.pop("model." + key)
    if change == "misshapen":
        state["model." + key] = torch.zeros(5, *tensor.shape)
    with pytest.raises(UserError, match=key):
        song.to_diffusers(state)


@pytest.mark.parametrize(
    "kind, target_time, keys",
    [
        ("NCSN++", False, ["map_noise.freqs", "enc.4x4_aux_residual.weight", "dec.8x8_aux_norm.bias"]),
        ("skip", True, ["map_layer0.weight", "map_layer0_s.weight", "dec.4x4_aux_conv.weight"]),
        ("classes", True, ["enc.8x8_conv.weight", "dec.8x8_aux_conv.weight", "map_label.weight"]),
    ],
)
def test_weights_that_lack_one_tensor_are_recognized_and_it_is_named(kind, target_time, keys):
    state = song.to_official(make_edm(**EDM_KINDS[kind], target_time=target_time))
    for key in keys:
        lacking = {name: tensor for name, tensor in state.items() if name != "model." + key}
        family, weights = find_family({"module." + name: tensor for name, tensor in lacking.items()})
        with pytest.raises(UserError, match=f"has no {re.escape(key)}"):
            assert family is song
            family.to_diffusers(weights)


@pytest.mark.parametrize(
    "key", ["model.enc.8x8_block0.affine_train.weight", "model.sigma_min", "logvar", "enc.4x4_block7.norm0.weight"]
)
def test_a_surplus_key_is_named(key):
    state = {**song.to_official(make_edm()), key: torch.zeros(3)}
    with pytest.raises(UserError, match=f"has {key.removeprefix('model.')}, which has no place"):
        song.to_diffusers(state)


@pytest.mark.parametrize(
    "overrides, words",
    [
        ({"no_such": 1}, "no_such is not an argument of EDMUNet2DModel"),
        ({"encoder_type": "dense"}, "encoder_type='dense' is not known"),
        ({"target_time": True}, "has no .*_s.*is it complete"),
    ],
)
def test_overrides_that_do_not_fit(overrides, words):
    with pytest.raises(UserError, match=words):
        song.network_of(shapes_of(song.to_official(make_edm())), **overrides)


def test_what_cannot_be_placed():
    state = song.to_official(make_edm())
    shapes = shapes_of(state)
    filters = {name: tensor for name, tensor in state.items() if name.endswith("resample_filter")}
    with pytest.raises(UserError, match="has map_layer0.bias twice, with and without the prefix 'model.'"):
        song.network_of({**shapes, "map_layer0.bias": shapes["model.map_layer0.bias"]})
    with pytest.raises(UserError, match="first convolution enc.<size>x<size>_conv"):
        song.network_of({name: shape for name, shape in shapes.items() if "enc.8x8_conv." not in name})
    with pytest.raises(UserError, match=r"has 6 taps; EDMUNet2DModel knows the filters"):
        song.network_of({**shapes, **dict.fromkeys(filters, (1, 1, 6, 6))})
    with pytest.raises(UserError, match=r"has dec.4x4_block|has no dec.8x8|has enc.4x4"):
        song.network_of({name: shape for name, shape in shapes.items() if ".4x4_block0." not in name})
    triangle = {name: torch.ones_like(tensor) / 3 for name, tensor in filters.items()}
    with pytest.raises(UserError, match=r"resample_filter is not the filter \(1, 1\)"):
        song.to_diffusers({**state, **triangle})


def test_what_only_adm_has():
    state = song.to_official(make_edm())
    for call in (
        lambda: song.to_diffusers(state, qkv_order="three_head_dim"),
        lambda: song.to_official(make_edm(), "nvidia"),
        lambda: song.without_variances(state),
    ):
        with pytest.raises(UserError, match="this is a SongUNet"):
            call()


def test_networks_that_have_no_official_names():
    with pytest.raises(UserError, match=r"sample_size=\(8, 16\)"):
        song.to_official(make_edm(sample_size=(8, 16)))
    peft = pytest.importorskip("peft")
    network = make_edm()
    network.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(UserError, match="to_q.* has no official name.*; unload adapters"):
        song.to_official(network)


def test_names_that_say_more_blocks_than_there_are_tensors():
    """13 levels of 500 blocks, in 600 names, would take minutes and gigabytes to be made."""
    sizes = [2**level for level in range(12, -1, -1)]
    names = ["enc.4096x4096_conv.weight", *(f"enc.4096x4096_block{i}.conv0.weight" for i in range(500))]
    names += [f"enc.{size}x{size}_block0.conv0.weight" for size in sizes]
    with pytest.raises(UserError, match="tensors for 13 levels of 500 blocks"):
        song.network_of(dict.fromkeys(names, (8, 8, 3, 3)))
