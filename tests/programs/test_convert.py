# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""`python -m training.convert SOURCE OUT` around the families: sources, checks, what is written and what is said.

A small family of our own stands in for the official networks: diffusers' names in reverse order of their parts.
"""

import functools
import hashlib
import http.server
import json
import math
import os
import pickle
import sys
import threading
import urllib.request
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import safetensors.torch
import torch
from diffusers import UNet2DModel

from diffusers_ctm import CTMPipeline, CTMScheduler, CTMUNet2DModel, EDM2UNet2DModel, EDMHeunScheduler
from diffusers_ctm.preconditioning import condition
from diffusers_ctm.unet_edm2 import MPConv2d, MPLinear
from helpers.autoencoders import make_autoencoder
from helpers.loopback_hub import LoopbackHub, Repo
from helpers.nvidia import Persistent, nvidia_pickle
from helpers.official_edm2 import halves, precond_of, snapshot
from helpers.places import EDM2_ORACLE, ORACLE
from helpers.tiny_networks import make_edm2
from training.cli.errors import UserError
from training.cli.options import parse_config, run_program
from training.cli.shared_options import TeacherOptions
from training.convert import ConvertConfig, main
from training.networks.teacher import load_teacher
from training.official import download, edm2, families
from training.official.files import read_checkpoint
from training.official.weights import said_by_precond


SIZE = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}


# A family -------------------------------------------------------------------------------------------------------------


def official_name(name: str) -> str:
    return "toy/" + "/".join(reversed(name.split(".")))


class Toy:
    NAME, CLASSES = "toy", (UNet2DModel, CTMUNet2DModel)

    def matches(self, shapes):
        return official_name("conv_in.weight") in shapes

    def defaults(self, shapes):
        return {"sigma_data": 0.5, "timestep_scale": 1000.0 if any("target" in name for name in shapes) else 1.0}

    def said_by(self, part):
        return said_by_precond(part)

    def to_diffusers(self, state_dict, attention_head_dim=8, dropout=0.25):
        labels = state_dict.get(official_name("class_embedding.weight"))
        target = official_name("target_time_embedding.linear_1.weight") in state_dict
        network = (CTMUNet2DModel if target else UNet2DModel)(
            **{**SIZE, "attention_head_dim": attention_head_dim, "dropout": dropout},
            num_class_embeds=None if labels is None else len(labels),
        )
        weights = {".".join(reversed(name.split("/")[1:])): tensor for name, tensor in state_dict.items()}
        try:
            network.load_state_dict(weights)
        except RuntimeError as error:
            raise UserError(f"These weights do not fit: {error}") from error
        return network.eval()

    def to_official(self, network, flavour=None):
        return {official_name(name): tensor for name, tensor in network.state_dict().items()}


TOY = Toy()


@pytest.fixture(autouse=True)
def family(monkeypatch):
    monkeypatch.setattr(families, "FAMILIES", (TOY,))


def network_of(cls=CTMUNet2DModel, std=0.1, **changes):
    """A network whose every weight matters."""
    torch.manual_seed(0)
    network = cls(**{**SIZE, "attention_head_dim": 8, **changes}).eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return network


def weights_of(network) -> dict[str, torch.Tensor]:
    return {name: tensor.detach() for name, tensor in TOY.to_official(network).items()}


@pytest.fixture
def student(tmp_path):
    """(network, path of its official checkpoint)"""
    network = network_of()
    torch.save(weights_of(network), tmp_path / "ctm.pt")
    return network, str(tmp_path / "ctm.pt")


def run(*arguments) -> str:
    return main(parse_config(ConvertConfig, [str(argument) for argument in arguments]))


def same_weights(network, other) -> bool:
    other = other.state_dict()
    return all(torch.equal(tensor, other[name]) for name, tensor in network.state_dict().items())


# Conversions ----------------------------------------------------------------------------------------------------------


def test_a_ctm_becomes_a_pipeline(student, tmp_path, capsys):
    network, source = student
    out = tmp_path / "nested" / "out"
    assert run(source, out, "--license", "mit") == str(out)
    pipe = CTMPipeline.from_pretrained(out)
    assert same_weights(network, pipe.unet) and isinstance(pipe.unet, CTMUNet2DModel)
    assert isinstance(pipe.scheduler, CTMScheduler) and pipe.unet.config.dropout == 0.25
    numbers = pipe.scheduler.config
    assert (numbers.num_train_timesteps, numbers.sigma_min, numbers.sigma_max) == (18, 0.002, 80.0)
    assert (numbers.sigma_data, numbers.timestep_scale) == (0.5, 1000.0)
    assert pipe(batch_size=1, num_inference_steps=1, output_type="pt").images.isfinite().all()
    digest = hashlib.sha256(Path(source).read_bytes()).hexdigest()
    assert json.loads((out / "conversion.json").read_text()) == {
        **{"source": "ctm.pt", "revision": None, "sha256": digest, "entry": "", "family": "toy", "license": "mit"}
    }
    said = capsys.readouterr().out
    count = f"{network.num_parameters():,} parameters"
    for words in ("a state dict", count, "CTM with N = 18", "unconditional", "8x8x3", "scale 1000"):
        assert words in said
    assert sorted(os.listdir(tmp_path / "nested")) == ["out"]


def test_an_edm_teacher_with_classes_in_an_entry_of_a_checkpoint(tmp_path, capsys):
    network = network_of(UNet2DModel, num_class_embeds=3)
    average = {f"module.{name}": tensor for name, tensor in weights_of(network).items()}
    other = {name: torch.zeros_like(tensor) for name, tensor in weights_of(network).items()}
    torch.save({"step": 5, "model": other, "ema": average}, tmp_path / "edm.ckpt")
    (tmp_path / "labels.json").write_text('{"0": "cat", "1": "dog", "2": "owl"}')
    run(tmp_path / "edm.ckpt", tmp_path / "out", "--id2label", tmp_path / "labels.json")
    pipe = CTMPipeline.from_pretrained(tmp_path / "out")
    assert same_weights(network, pipe.unet) and type(pipe.unet) is UNet2DModel
    assert isinstance(pipe.scheduler, EDMHeunScheduler) and pipe.scheduler.config.timestep_scale == 1.0
    assert pipe.config.id2label in ({0: "cat", 1: "dog", 2: "owl"}, {"0": "cat", "1": "dog", "2": "owl"})
    said = capsys.readouterr().out
    assert "entry ema" in said and "conditional on 3 classes" in said and "Left out: step, model" in said
    run(tmp_path / "edm.ckpt", tmp_path / "out2", "--entry", "model")
    assert not same_weights(network, CTMPipeline.from_pretrained(tmp_path / "out2").unet)


@pytest.mark.parametrize("wrapper", ["module._orig_mod.", "_orig_mod.module.", "net.model."])
def test_wrappers_in_wrappers_are_left_out(wrapper, student, tmp_path):
    """DistributedDataParallel around torch.compile, the other way round, a trainer's module."""
    average = {"n_averaged": torch.tensor(3)}  # what torch's AveragedModel holds beside the network
    average |= {wrapper + name: tensor for name, tensor in weights_of(student[0]).items()}
    torch.save(average, tmp_path / "wrapped.pt")
    run(tmp_path / "wrapped.pt", tmp_path / "out")
    assert same_weights(student[0], CTMPipeline.from_pretrained(tmp_path / "out").unet)


def test_a_consistency_model_samples_as_one(tmp_path, capsys):
    network = network_of(UNet2DModel)
    torch.save(weights_of(network), tmp_path / "cm.pt")
    run(tmp_path / "cm.pt", tmp_path / "out", "--consistency_model", "--timestep_scale", 1000)
    assert "Note: a consistency model" not in capsys.readouterr().out
    pipe = CTMPipeline.from_pretrained(tmp_path / "out")
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    # Song et al. 2023, Appendix C, from level 80
    c_skip, c_out, c_in = 0.25 / ((80 - 0.002) ** 2 + 0.25), (80 - 0.002) * 0.5 / 6400.25**0.5, 6400.25**-0.5
    with torch.no_grad():
        output = network(c_in * 80 * noise, torch.tensor(250 * math.log(80.0))).sample
    expected = c_skip * 80 * noise + c_out * output
    torch.testing.assert_close(pipe(latents=noise, output_type="latent").images, expected, rtol=1e-4, atol=1e-4)
    assert pipe.scheduler.config.gamma == 1.0
    with pytest.raises(UserError, match="--consistency_model is for"):
        torch.save(weights_of(network_of()), tmp_path / "ctm.pt")
        run(tmp_path / "ctm.pt", tmp_path / "other", "--consistency_model")


def pickled(weights, name="EDMPrecond", **attributes) -> bytes:
    """A file of NVIDIA's with one module in two."""
    inner, outer = (type(kind, (Persistent, torch.nn.Module), {})() for kind in ("UNetBlock", name))
    for key, tensor in weights.items():
        inner.register_parameter(key, torch.nn.Parameter(tensor))
    inner.dropout, outer.model = 0.07, inner
    for key, value in attributes.items():
        setattr(outer, key, value)
    return nvidia_pickle({"ema": outer})


def test_a_pickle_says_what_its_weights_do_not(tmp_path, capsys):
    (tmp_path / "net.pkl").write_bytes(pickled(weights_of(network_of(UNet2DModel)), sigma_data=0.7, img_resolution=8))
    run(tmp_path / "net.pkl", tmp_path / "out")
    pipe = CTMPipeline.from_pretrained(tmp_path / "out")
    assert (pipe.scheduler.config.sigma_data, pipe.unet.config.dropout) == (0.7, 0.07)
    assert "The file itself says: sigma_data 0.7, dropout 0.07" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["VPPrecond", "VEPrecond", "iDDPMPrecond"])
def test_nvidias_other_preconditionings_are_not_taken_for_edm(name, tmp_path, capsys):
    (tmp_path / "net.pkl").write_bytes(pickled(weights_of(network_of(UNet2DModel)), name))
    assert f"holds a {name}, not an EDMPrecond" in fails(capsys, tmp_path / "net.pkl", tmp_path / "out")


def test_options_come_before_what_the_file_says_and_the_family(tmp_path):
    (tmp_path / "net.pkl").write_bytes(pickled(weights_of(network_of()), sigma_data=0.7))
    options = ["--num_head_channels", 4, "--dropout", 0, "--sigma_data", 0.6, "--timestep_scale", 1]
    options += ["--sigma_min", 0.01, "--sigma_max", 50, "--num_train_timesteps", 7]
    run(*options, tmp_path / "net.pkl", tmp_path / "out")  # options first, as well
    pipe = CTMPipeline.from_pretrained(tmp_path / "out")
    assert (pipe.unet.config.attention_head_dim, pipe.unet.config.dropout) == (4, 0)
    numbers = pipe.scheduler.config
    assert (numbers.sigma_data, numbers.timestep_scale, numbers.num_train_timesteps) == (0.6, 1, 7)
    assert (numbers.sigma_min, numbers.sigma_max) == (0.01, 50)


@pytest.mark.parametrize("name", ["official.pt", "official.safetensors"])
def test_back_to_official_and_again(student, name, tmp_path):
    network, source = student
    run(source, tmp_path / "out")
    run(tmp_path / "out", tmp_path / name, "--to", "official")
    written, original = read_checkpoint(tmp_path / name), read_checkpoint(source)
    assert set(written) == set(original) and all(torch.equal(written[key], original[key]) for key in original)
    run(tmp_path / name, tmp_path / "again")
    assert same_weights(network, CTMPipeline.from_pretrained(tmp_path / "again").unet)


def test_official_files_are_checked(tmp_path, monkeypatch):
    """Heads of another width give another function from the same weights: the file would be read wrongly."""
    network = network_of(std=0.5, attention_head_dim=4)
    CTMPipeline(network, CTMScheduler()).save_pretrained(tmp_path / "pipe")
    with pytest.raises(UserError, match="with these options"):
        run(tmp_path / "pipe", tmp_path / "x.pt", "--to", "official")
    assert os.listdir(tmp_path) == ["pipe"]
    run(tmp_path / "pipe", tmp_path / "x.pt", "--to", "official", "--num_head_channels", 4)


@pytest.mark.parametrize("damage, message", [(1e-5, "other weights"), (10.0, "another output")])
def test_a_folder_that_is_not_the_same_network_is_not_written(damage, message, student, tmp_path, monkeypatch):
    loaded = CTMPipeline.from_pretrained

    def damaged(*args, **kwargs):
        pipe = loaded(*args, **kwargs)
        pipe.unet.conv_out.bias.data[1] += damage
        return pipe

    monkeypatch.setattr(CTMPipeline, "from_pretrained", damaged)
    with pytest.raises(UserError, match=message):
        run(student[1], tmp_path / "out")
    assert os.listdir(tmp_path) == ["ctm.pt"]


# The official networks ------------------------------------------------------------------------------------------------

OFFICIAL = {
    "edm_ddpmpp_uncond": [],
    "edm_ncsnpp_cond": [],
    "ctm_cifar_uncond": [],
    "ctm_adm64_cond": ["--num_head_channels", "16"],
}


@pytest.mark.skipif(not ORACLE.exists(), reason="the authors' numbers are not in this checkout")
@pytest.mark.parametrize("name, options", OFFICIAL.items(), ids=OFFICIAL.keys())
def test_official_networks_give_the_authors_numbers(name, options, tmp_path, monkeypatch):
    """From a pickle with averaged weights to a pipeline, and back to official names."""
    monkeypatch.undo()  # the real families
    weights = safetensors.torch.load_file(ORACLE / f"{name}.safetensors")
    with open(tmp_path / "net.pkl", "wb") as file:
        pickle.dump({"ema": weights}, file)
    run(tmp_path / "net.pkl", tmp_path / "out", *options)
    pipe = CTMPipeline.from_pretrained(tmp_path / "out")
    numbers = {key: torch.from_numpy(value) for key, value in np.load(ORACLE / f"{name}_io.npz").items()}
    labels = numbers.get("labels", numbers.get("y"))
    label = condition(None if labels is None else labels.long())
    is_ctm, preconditioning = name.startswith("ctm"), pipe.scheduler.preconditioning
    with torch.no_grad():
        if is_ctm:
            output = preconditioning.jump(pipe.unet, numbers["x"], numbers["t"], numbers["s"], **label)
        else:
            output = preconditioning.denoise(pipe.unet, numbers["x"], numbers["sigma"], **label)
    expected = numbers["G" if is_ctm else "D"]
    assert (output - expected).abs().max() < 2e-5 * max(1, expected.abs().max())
    run(tmp_path / "out", tmp_path / "net.pt", "--to", "official", *options)
    written = read_checkpoint(tmp_path / "net.pt")
    assert set(written) == set(weights)
    for key in weights:  # two biases of a CTM are one
        assert torch.equal(written[key], weights[key]) or (is_ctm and key.endswith("bias")), key


def test_a_snapshot_of_edm2_becomes_a_pipeline(tmp_path, monkeypatch, capsys):
    monkeypatch.undo()  # the real families
    network = make_edm2(num_class_embeds=3, clip_act=1.5, res_balance=0.25, attention_head_dim=4, dropout=0.1)
    source, out = tmp_path / "network-snapshot-0000001-0.050.pkl", tmp_path / "out"
    source.write_bytes(snapshot(precond_of(network, sigma_data=0.7)))
    run(source, out, "--license", "cc-by-nc-sa-4.0")
    pipe = CTMPipeline.from_pretrained(out)
    written = edm2.to_official(pipe.unet)
    assert all(torch.equal(written[name], tensor) for name, tensor in halves(edm2.to_official(network)).items())
    config = {name: network.config[name] for name in ("clip_act", "res_balance", "attention_head_dim", "dropout")}
    assert {name: pipe.unet.config[name] for name in config} == config and type(pipe.unet) is EDM2UNet2DModel
    assert isinstance(pipe.scheduler, EDMHeunScheduler)
    assert (pipe.scheduler.config.sigma_data, pipe.scheduler.config.timestep_scale) == (0.7, 1.0)
    pipe.set_progress_bar_config(disable=True)
    assert pipe(class_labels=[2], num_inference_steps=2, output_type="pt").images.isfinite().all()
    record = json.loads((out / "conversion.json").read_text())
    assert (record["family"], record["entry"], record["license"]) == ("edm2", "ema", "cc-by-nc-sa-4.0")
    said = capsys.readouterr().out
    for words in ("entry ema", "conditional on 3 classes", "class EDM2UNet2DModel", "sigma_data 0.7", "clip_act 1.5"):
        assert words in said
    run(source, tmp_path / "other", "--dropout", 0.3)
    assert CTMPipeline.from_pretrained(tmp_path / "other").unet.config.dropout == 0.3

    with pytest.raises(UserError, match="with these options"):  # names and shapes do not tell clip_act
        run(out, tmp_path / "back.pt", "--to", "official", "--num_head_channels", 4)


@torch.no_grad()
def test_edm2_weights_that_were_not_normalized_are_noted(tmp_path, monkeypatch, capsys):
    """Nothing fails with them: their length is divided out."""
    monkeypatch.undo()  # the real families
    network = make_edm2(log_variance_channels=None)
    network.normalize_weights_()

    def converted(name):
        (tmp_path / f"{name}.pkl").write_bytes(snapshot(precond_of(network)))
        run(tmp_path / f"{name}.pkl", tmp_path / name)
        load_teacher(TeacherOptions(teacher=str(tmp_path / name)))
        return CTMPipeline.from_pretrained(tmp_path / name).unet, capsys.readouterr().out

    plain, said = converted("as EDM2's")
    assert "Note" not in said
    for module in network.modules():
        if isinstance(module, (MPLinear, MPConv2d)):
            module.weight.mul_(0.05)
    short, said = converted("short")
    assert said.count("the rows of its weights have a root mean square of 0.05") == 2
    assert "Note on --teacher" in said and "if it was trained without that, its images are wrong" in said
    x, c_noise = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0.3, -0.5])
    assert (plain(x, c_noise).sample - short(x, c_noise).sample).abs().max() < 0.02


def test_edm2s_usual_networks_return_to_official_names(tmp_path, monkeypatch):
    monkeypatch.undo()  # the real families
    network = make_edm2(num_class_embeds=3)
    CTMPipeline(network, EDMHeunScheduler()).save_pretrained(tmp_path / "pipe")
    run(tmp_path / "pipe", tmp_path / "net.safetensors", "--to", "official", "--num_head_channels", 8)
    written, expected = read_checkpoint(tmp_path / "net.safetensors"), edm2.to_official(network)
    assert set(written) == set(expected) and all(torch.equal(written[name], expected[name]) for name in expected)


@pytest.mark.skipif(not EDM2_ORACLE.exists(), reason="the authors' numbers are not in this checkout")
@pytest.mark.parametrize("name, weights", [("rgb", "edm2_guide_cond64"), ("latent", "edm2_snapshot_latent")])
def test_snapshots_of_edm2s_authors_become_pipelines(name, weights, tmp_path, monkeypatch):
    monkeypatch.undo()  # the real families
    given = EDM2_ORACLE / f"edm2_snapshot_{name}.pkl", tmp_path / "out"
    if name == "latent":
        with pytest.raises(UserError, match="sees 4 channels: latents. Give their autoencoder with --vae"):
            run(*given)
        make_autoencoder("KL").save_pretrained(tmp_path / "vae")
    run(*given, *(["--vae", tmp_path / "vae"] if name == "latent" else []))
    pipe = CTMPipeline.from_pretrained(tmp_path / "out")
    written = edm2.to_official(pipe.unet)
    expected = safetensors.torch.load_file(EDM2_ORACLE / f"{weights}.safetensors")
    assert set(written) == set(expected) and {tensor.dtype for tensor in expected.values()} == {torch.float16}
    for key, tensor in expected.items():
        assert torch.equal(written[key], tensor.float()), key
    assert pipe.unet.config.attention_head_dim == 4 and pipe.scheduler.config.sigma_data == 0.5
    assert pipe.unet.config.dropout == {"rgb": 0.0, "latent": 0.1}[name]
    assert (pipe.vae is None) == (name == "rgb") == pipe.config.normalize_images
    if name == "latent":  # final = (raw - mean) / std * 0.5
        assert pipe.vae.config.latents_mean == pytest.approx([5.81, 3.25, 0.12, -2.15], rel=1e-6)
        assert pipe.vae.config.latents_std == pytest.approx([8.34, 9.24, 7.42, 6.56], rel=1e-6)
        assert pipe.vae.config.scaling_factor == 1 and pipe.vae.config.shift_factor is None


@pytest.mark.parametrize("flavour", [None, "nvidia"])
def test_sizes_that_official_names_do_not_tell_are_refused(flavour, tmp_path, monkeypatch):
    monkeypatch.undo()  # the real families
    wide = {"block_out_channels": (128, 128), "norm_num_groups": 32, "downsample_type": "resnet", "norm_eps": 1e-5}
    wide |= {"down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"), "attn_norm_num_groups": 32}
    wide |= {"up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"), "upsample_type": "resnet"}
    network = network_of(UNet2DModel, std=0.02, sample_size=12, resnet_time_scale_shift="scale_shift", **wide)
    CTMPipeline(network, EDMHeunScheduler()).save_pretrained(tmp_path / "pipe")
    options = ["--to", "official", "--num_head_channels", 8, *(["--flavour", flavour] if flavour else [])]
    if flavour is None:  # OpenAI's
        with pytest.raises(UserError, match="12 x 12 pixels.* 2 levels is read as one for 16 x 16. Sizes are"):
            run(tmp_path / "pipe", tmp_path / "x.pt", *options)
        assert os.listdir(tmp_path) == ["pipe"]
    else:
        run(tmp_path / "pipe", tmp_path / "x.pt", *options)


# Errors ---------------------------------------------------------------------------------------------------------------


def fails(capsys, *arguments) -> str:
    """The one line, behind progress bars, of a run that stops with status 1."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(sys, "argv", ["convert", *map(str, arguments)])
        run_program(main, ConvertConfig)
    said = capsys.readouterr().err
    message = said[said.rfind("error: ") :]
    assert stopped.value.code == 1 and message.startswith("error: ") and "Traceback" not in said
    return message


def test_what_is_there_is_not_replaced(student, tmp_path, capsys):
    source, out, home = student[1], _folder(tmp_path / "out"), _folder(tmp_path / "home")
    run(source, out)  # an empty folder is no loss
    before = (out / "model_index.json").stat().st_mtime_ns
    (home / "thesis.tex").write_text("x")
    for words, *arguments in [
        ("--overwrite", source, out),
        ("no pipeline", source, home, "--overwrite"),
        ("no pipeline", source, source, "--overwrite"),
        ("--overwrite", out, source, "--to", "official"),
        ("is no file", out, _folder(tmp_path / "x.pt"), "--to", "official", "--overwrite"),
    ]:
        assert words in fails(capsys, *arguments)
    assert (out / "model_index.json").stat().st_mtime_ns == before
    run(source, out, "--overwrite", "--license", "mit")
    assert json.loads((out / "conversion.json").read_text())["license"] == "mit"


def _folder(path: Path) -> Path:
    path.mkdir()
    return path


def test_errors_stop_with_status_1_and_leave_nothing(student, tmp_path, capsys):
    _, source = student
    (tmp_path / "evil.pkl").write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")
    weights = weights_of(network_of())
    last = list(weights)[-1]
    one = torch.zeros(max(tensor.numel() for tensor in weights.values()))  # that all tensors are parts of
    files = {
        "unknown": {"a": torch.ones(2)},
        "short": {name: tensor for name, tensor in weights.items() if name != last},
        "nan": {**weights, last: torch.full_like(weights[last], math.nan)},
        "huge": {**weights, last: torch.full_like(weights[last], 3e38)},
        "own": {"step": torch.zeros(1), **network_of().state_dict()},
        "int8": {name: tensor.to(torch.int8) for name, tensor in weights.items()},
        "one": {name: one[: tensor.numel()].view_as(tensor) for name, tensor in weights.items()},
        "long": {f"{'x.' * 5000}{name}": tensor for name, tensor in weights.items()},
    }
    for name, content in files.items():
        torch.save(content, tmp_path / f"{name}.pt")
    (tmp_path / "labels.json").write_text('["a"]')
    (tmp_path / "broken.json").write_text('{"a": ')
    before = sorted(os.listdir(tmp_path))
    for arguments, words in [
        ([tmp_path / "evil.pkl"], "os.system"),
        ([tmp_path / "unknown.pt"], "no network that is known"),
        ([tmp_path / "short.pt"], "do not fit"),
        ([tmp_path / "nan.pt"], "SOURCE nan.pt has infinite or NaN weights: toy/bias/linear_2/target"),
        ([tmp_path / "huge.pt"], "output is not finite"),
        ([tmp_path / "own.pt"], "These have the names of diffusers"),
        ([tmp_path / "int8.pt"], "quantized"),
        ([tmp_path / "one.pt"], "repeat each other"),
        ([tmp_path / "long.pt"], "no network that is known"),
        ([tmp_path / "absent.pt"], "not there"),
        (["absent"], "not there"),
        ([tmp_path], "is a folder"),
        ([source, "--entry", "ema"], "--entry ema"),
        ([source, "--id2label", tmp_path / "labels.json"], "unconditional"),
        ([source, "--id2label", tmp_path / "broken.json"], "--id2label"),
        (["http://example.com/x.pt"], "no https"),
        (["user/repo/file.pt"], "Hub"),  # tests are offline
        (["http://127.0.0.1.example.com/x"], "no https"),
        (["ftp://127.0.0.1/x"], "is not there"),
        (["file:///etc/passwd"], "is not there"),
        (["http://example.com:none/x"], "no https"),
        (["https://someone:secret@example.com/x"], "a user or a password"),
        (["https://example.com:none/x"], "Is the address right?"),
        (["https://example.com/a b.pt?token=secret a"], "Is the address right?"),
        ([tmp_path, "--to", "official", "--out", tmp_path / "x.pt"], "pipeline"),
    ]:
        options = arguments if "--out" in arguments else [arguments[0], tmp_path / "out", *arguments[1:]]
        message = fails(capsys, *options)
        assert words in message and "secret" not in message, arguments
        assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize(
    "arguments, word",
    [
        ([], "SOURCE"),
        (["a"], "OUT"),
        (["a", "b", "c"], "unrecognized"),
        (["a", "b", "--dropout", "1"], "dropout"),
        (["a", "b", "--sigma_data", "0"], "sigma_data"),
        (["a", "b", "--sigma_max", "0.001"], "sigma_max"),
        (["a", "b", "--to", "onnx"], "--to"),
        (["a", "b", "--to", "official"], ".safetensors"),
        (["a", "b.pt", "--to", "official", "--qkv_order", "three_head_dim"], "qkv_order"),
        (["a", "b", "--qkv_order", "dim"], "qkv_order"),
        (["a", "b", "--prediction_type", "epsilon"], "--beta_schedule"),
        (["a", "b", "--beta_schedule", "linear"], "--prediction_type epsilon"),
        (["a", "b", "--prediction_type", "epsilon", "--beta_schedule", "linear", "--sigma_data", "1"], "--sigma_data"),
    ],
)
def test_impossible_options_name_themselves(arguments, word, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_config(ConvertConfig, arguments)
    assert stopped.value.code == 2 and word in capsys.readouterr().err


def test_source_and_out_may_be_anywhere_and_in_yaml(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("source: from-yaml\nout: there\ndropout: 0.5\n")
    assert parse_config(ConvertConfig, ["--config", str(path)]).source == "from-yaml"
    for arguments in ("a b --dropout 0.1", "--dropout 0.1 a b", "a --dropout 0.1 b"):
        config = parse_config(ConvertConfig, ["--config", str(path), *arguments.split()])
        assert (config.source, config.out, config.dropout) == ("a", "b", 0.1)


# Addresses ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def website(student, monkeypatch):
    """A web server with the student's checkpoint, whole, cut off and behind redirections."""
    content = Path(student[1]).read_bytes()
    length = {"Content-Length": str(len(content))}
    answers = {
        "/near": (302, {"Location": "/ctm.pt"}, b""),
        "/away": (302, {"Location": "http://example.com/x.pt"}, b""),
        "/ctm.pt": (200, length, content),
        "/short.pt": (200, length, content[:-1]),
    }

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            status, headers, body = answers.get(self.path.partition("?")[0], (404, {}, b""))
            self.send_response(status)
            for header in headers.items():
                self.send_header(*header)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_downloads_are_whole_or_refused(website, student, tmp_path, capsys, monkeypatch):
    scratch = _folder(tmp_path / "scratch")
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    run(f"{website}/near?token=secret", tmp_path / "out")
    assert same_weights(student[0], CTMPipeline.from_pretrained(tmp_path / "out").unet)
    record = (tmp_path / "out" / "conversion.json").read_text()
    assert f"{website}/near" in record and "secret" not in record + capsys.readouterr().out
    for path, word in [
        ("/short.pt?token=secret", "broke off"),
        ("/absent.pt?token=secret", "404"),
        ("/away?token=secret", "no https"),
    ]:
        message = fails(capsys, f"{website}{path}", tmp_path / "other")
        assert word in message and "secret" not in message
    assert os.listdir(scratch) == [] and not (tmp_path / "other").exists()


def test_a_website_does_not_reach_what_is_served_on_this_machine():
    redirect = download._OnlySecure().redirect_request
    local = "http://127.0.0.1:8000/shutdown"
    with pytest.raises(UserError, match="no https"):
        redirect(urllib.request.Request("https://example.com/x.pt"), None, 302, "Found", {}, local)
    assert redirect(urllib.request.Request("http://127.0.0.1/x"), None, 302, "Found", {}, local).full_url == local


# The Hub --------------------------------------------------------------------------------------------------------------


def test_a_file_on_the_hub(student, tmp_path, monkeypatch, capsys):
    network, source = student
    second = network_of(UNet2DModel)
    with LoopbackHub() as hub:
        repo = hub.repos["models/user/repo"] = Repo()
        repo.commit({"deep/ctm.pt": Path(source).read_bytes()})
        revision = repo.sha()
        repo.commit({"deep/ctm.pt": safetensors.torch.save(weights_of(second))})
        client = functools.partial(huggingface_hub.hf_hub_download, endpoint=hub.url, cache_dir=tmp_path / "cache")
        monkeypatch.setattr(download, "hf_hub_download", client)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        file = "user/repo/deep/ctm.pt"
        run(file, tmp_path / "old", "--revision", revision)
        run(file, tmp_path / "new")
        assert "the Hub does not give it" in fails(capsys, "user/repo/absent.pt", tmp_path / "absent")
        assert "the Hub does not give it" in fails(capsys, file, tmp_path / "absent", "--revision", "none")
    assert same_weights(network, CTMPipeline.from_pretrained(tmp_path / "old").unet)
    assert same_weights(second, CTMPipeline.from_pretrained(tmp_path / "new").unet)
    record = json.loads((tmp_path / "old" / "conversion.json").read_text())
    assert record["source"] == file and record["revision"] == revision
