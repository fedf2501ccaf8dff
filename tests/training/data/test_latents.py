# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Latents of a data set: what the autoencoder gives, in files that are written once and belong to it."""

import copy
import functools
import glob
import os
import pickle
import stat
import time

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffusers_ctm.autoencoder import moments
from helpers.autoencoders import make_autoencoder
from helpers.comparing import close
from helpers.exact import randn
from helpers.runs import fresh_accelerate, in_processes  # noqa: F401
from training.cli.errors import UserError
from training.cli.shared_options import DataOptions
from training.data import latents as module
from training.data.batches import load_batches
from training.data.images import ImageDataset, to_sample
from training.data.latents import Autoencoder, LatentDataset


COUNT = 20  # images, in files of 8
GRAY = {"in_channels": 1, "out_channels": 1}


@pytest.fixture(autouse=True)
def small_files(monkeypatch):
    monkeypatch.setattr(module, "SHARD", 8)
    monkeypatch.setattr(module, "BATCH", 5)


@functools.cache
def digits(**options):
    defaults = {"label_column": "label", "dataset_split": f"train[:{COUNT}]", "random_flip": True}
    return ImageDataset(DataOptions(**{**defaults, **options}))


def autoencoder(name="KL", normalize_images=True, **changes):
    network = make_autoencoder(name, **{**GRAY, **changes}).requires_grad_(False)
    return Autoencoder(network, normalize_images, f"a {name}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Files of the digits by the KL; those who change one put it back."""
    folder = tmp_path_factory.mktemp("data") / "latents"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "SHARD", 8)
        prepared(folder)
    return folder


def prepared(folder, vae=None, images=None):
    dataset = LatentDataset(images or digits(), vae or autoencoder(), str(folder))
    dataset.prepare()
    return dataset


def files(folder):
    return sorted(os.listdir(folder))


def assert_same_files(a, b):
    assert files(a) == files(b)
    assert all((a / name).read_bytes() == (b / name).read_bytes() for name in files(a))


class Numbers:
    """Random numbers of a step that are given."""

    def __init__(self, uniform, normal=None):
        self.uniform = lambda: uniform
        self.normal = lambda *shape: normal.reshape(len(uniform), *shape)


@pytest.mark.parametrize("name, normalize", [("KL", True), ("KL", False), ("Tiny", True)])
@pytest.mark.parametrize("flip", [True, False])
def test_files_hold_what_the_autoencoder_gives(name, normalize, flip, tmp_path, capsys):
    images = digits(random_flip=flip)
    vae = autoencoder(name, normalize, scaling_factor=2.0, shift_factor=0.5)
    dataset = prepared(tmp_path / "latents", vae, images)
    assert files(tmp_path / "latents") == [f"latents-0000{i}-of-00003.safetensors" for i in range(3)]
    side = 2 if name == "KL" else 4
    assert (dataset.channels, dataset.resolution, len(dataset)) == (4, side, COUNT)
    assert f"Latents: 4 x {side} x {side} of a {name}, in {tmp_path}/latents; standard dev" in capsys.readouterr().out
    order = [19, 0, 8, 7, 15, 3]
    values, labels = dataset[order]
    pixels = to_sample(images[order][0])
    turned = [moments(vae.network, each, normalize) for each in ((pixels, pixels.flip(-1)) if flip else (pixels,))]
    assert values.shape == (6, 2 if name == "KL" else 1, 2 if flip else 1, 4, side, side)
    assert values.dtype == torch.float32 and torch.equal(labels, images.labels()[order])
    for way, (mean, std) in enumerate(turned):
        assert (values[:, 0, way] - mean).abs().max() <= 2**-11 * mean.abs().max() + 1e-6  # float16
        if std is not None:
            torch.testing.assert_close(values[:, 1, way], std, rtol=2**-10, atol=1e-6)

    noise, uniform = randn(6, 4, side, side, dtype=torch.float32), torch.tensor([0.1, 0.9, 0.49, 0.5, 0.51, 0.0])
    sample = dataset.to_sample(values, Numbers(uniform, noise))
    mirrored = (uniform < 0.5).float().reshape(-1, 1, 1, 1) if flip else 0
    mean, std = (
        turned[0][part] + mirrored * (turned[-1][part] - turned[0][part]) if turned[0][part] is not None else 0
        for part in range(2)
    )
    close(sample, 2.0 * (mean + std * noise - 0.5), rtol=2e-3, atol=2e-3)
    assert sample.std() > 0.05


def test_the_rest_is_the_images():
    images = copy.copy(digits())
    dataset = LatentDataset(images, autoencoder(), "nowhere")
    assert dataset.images is images and dataset.id2label == images.id2label and dataset.num_classes == 10
    assert dataset.options is images.options and dataset.trained_classes == images.trained_classes
    dataset.number_classes(10, {k: str(9 - k) for k in range(10)}, "--teacher")
    assert torch.equal(dataset.labels(), images.labels()) and images.id2label[0] == "9"
    assert dataset.pipeline_options == {"vae": dataset.autoencoder.network, "normalize_images": True}
    with pytest.raises(AttributeError, match="no_such_thing"):
        dataset.no_such_thing  # noqa: B018
    assert not os.path.exists("nowhere")  # before `prepare` nothing is encoded


def test_files_are_written_one_by_one_and_once(tmp_path, folder, monkeypatch):
    encoded, encode = [], LatentDataset._moments

    def counting(self, indices):
        if len(encoded) == 4:  # in the third file
            raise KeyboardInterrupt
        encoded.append(indices)
        return encode(self, indices)

    monkeypatch.setattr(LatentDataset, "_moments", counting)
    with pytest.raises(KeyboardInterrupt):
        prepared(tmp_path / "part")
    assert files(tmp_path / "part") == files(folder)[:2]
    assert [len(indices) for indices in encoded] == [5, 3, 5, 3]
    encoded[:] = [[]]
    resumed = prepared(tmp_path / "part")
    assert encoded[1:] == [[16, 17, 18, 19], [0, 6, 12, 19]]  # the last file, and the spot check
    assert_same_files(tmp_path / "part", folder)
    assert resumed[list(range(COUNT))][0].std() > 0.05
    encoded[:] = [[]]
    prepared(tmp_path / "part")
    assert encoded[1:] == [[0, 6, 12, 19]]


def test_others_may_read_the_files(tmp_path):
    former = os.umask(0o022)
    try:
        prepared(tmp_path)
    finally:
        os.umask(former)
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o644}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"images": {"dataset_split": "train[1:21]"}}, r"dataset_split train\[:20\], here train\[1:21\]"),
        ({"images": {"dataset_split": "train[:5]"}}, "num_images 20, here 5"),  # one file, of another name
        ({"images": {"random_flip": False}}, "random_flip True, here False"),
        ({"images": {"resolution": 16}}, "resolution 8, here 16"),
        ({"vae": {"seed": 1}}, "autoencoder [0-9a-f]{16}, here [0-9a-f]{16}"),
        ({"vae": {"scaling_factor": 0.2}}, "autoencoder [0-9a-f]{16}, here [0-9a-f]{16}"),
        ({"vae": {"normalize_images": False}}, "autoencoder [0-9a-f]{16}, here [0-9a-f]{16}"),
    ],
)
def test_files_of_something_else_are_refused_by_name(changes, message, folder):
    before = {name: (folder / name).read_bytes() for name in files(folder)}
    with pytest.raises(UserError, match=f"--latents {folder} was made otherwise: .*{message}.*Give another folder"):
        LatentDataset(digits(**changes.get("images", {})), autoencoder(**changes.get("vae", {})), str(folder))
    assert {name: (folder / name).read_bytes() for name in files(folder)} == before


def rewritten(path, change):
    """Write a file anew with other tensors, for what it was made from."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file(change(load_file(path)), path, metadata)


def test_files_that_hold_something_else_are_noticed(folder):
    first = folder / files(folder)[0]
    good = first.read_bytes()
    for change in (
        lambda tensors: {name: value.flip(0) for name, value in tensors.items()},  # the images in another order
        lambda tensors: {**tensors, "mean": tensors["mean"] * float("nan")},
        lambda tensors: {**tensors, "mean": tensors["mean"] + 0.05 * tensors["mean"].std()},
    ):
        rewritten(first, change)
        with pytest.raises(UserError, match=f"--latents {folder} does not hold the latents of these images"):
            prepared(folder)
    first.write_bytes(good)
    prepared(folder)
    for damage in (lambda: first.write_bytes(good[:-100]), lambda: first.write_bytes(b"")):
        damage()
        with pytest.raises(UserError, match=f"(?s){first} cannot be loaded. Remove it to have it written anew.*Safe"):
            prepared(folder)
    first.unlink()
    prepared(folder)  # as the message says
    assert first.read_bytes() == good
    rewritten(first, lambda tensors: {name: value[:4].contiguous() for name, value in tensors.items()})
    with pytest.raises(UserError, match=f"{first} cannot be loaded"):
        prepared(folder)
    save_file({"mean": torch.zeros(1)}, first)  # of another program
    with pytest.raises(UserError, match="was made otherwise: dataset_name None, here digits"):
        prepared(folder)
    first.write_bytes(good)


def test_what_an_autoencoder_cannot_encode(tmp_path):
    with pytest.raises(UserError, match="--resolution 10: the autoencoder a KL takes multiples of 4"):
        LatentDataset(digits(resolution=10), autoencoder(), str(tmp_path))
    with pytest.raises(UserError, match="--image_mode: the autoencoder a KL takes images with 3 channels, .* have 1"):
        LatentDataset(digits(), autoencoder(in_channels=3), str(tmp_path))
    broken = autoencoder("Tiny")
    broken.network.encoder.layers[-1].bias.data += 1e6
    with pytest.raises(UserError, match="a Tiny gives latents that are NaN or infinite, or beyond float16, .* 0 to 4"):
        prepared(tmp_path, broken)
    assert not files(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="could not be written"):
        prepared(tmp_path / "file")


def test_processes_read_the_files_ahead(folder):
    dataset = LatentDataset(digits(), autoencoder(), str(folder))
    batches = [[0, 9, 18], [7, 8, 19]]
    for workers in (0, 1):
        for numbers, (values, labels, _) in zip(batches, load_batches(dataset, batches, workers, False), strict=True):
            assert torch.equal(values, dataset[numbers][0]) and torch.equal(labels, dataset[numbers][1])


def test_a_pickled_data_set_reads_and_carries_no_weights(folder):
    dataset = LatentDataset(digits(), autoencoder(), str(folder))
    content = pickle.dumps(dataset)
    again = pickle.loads(content)
    assert torch.equal(again[[3, 17]][0], dataset[[3, 17]][0]) and again.autoencoder is None
    assert dataset.autoencoder.network.encoder.conv_in.weight.numpy().tobytes() not in content


def encode_late(folder):
    """Like `prepared`, the second process not before the first has written a file, if that does not wait for it."""
    AcceleratorState._reset_state(reset_partial_state=True)  # the parent's, which knows of one process
    state = Accelerator().state
    assert state.num_processes == 2
    end = time.monotonic() + state.process_index
    while time.monotonic() < end and not glob.glob(str(folder / "latents-*")):
        time.sleep(0.02)
    prepared(folder)


def test_two_processes_share_the_work(tmp_path, folder):
    in_processes(2, encode_late, tmp_path / "two")
    assert_same_files(tmp_path / "two", folder)
