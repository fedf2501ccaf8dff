# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Latents of a data set: what the autoencoder gives, in files that are written once and belong to it."""

import copy
import functools
import glob
import io
import json
import os
import pickle
import stat
import time
import zipfile

import numpy as np
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

    def counting(self, indices, *normalize_images):
        if len(encoded) == 4:  # in the third file
            raise KeyboardInterrupt
        encoded.append(indices)
        return encode(self, indices, *normalize_images)

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


# Latents that others encoded ------------------------------------------------------------------------------------------


def straight(**options):
    """The digits, not mirrored: the tool has no mirrored latents."""
    return digits(random_flip=False, **options)


def means_and_deviations(normalize_images=True, images=None, vae=None):
    """What EDM2's dataset_tool stores of each image, float32 of shape (8, h, w)."""
    pixels = to_sample((images or straight())[list(range(COUNT))][0])
    network = (vae or autoencoder()).network
    return torch.cat(moments(network, pixels, normalize_images), dim=1).numpy()


def tool_files(arrays, labels=None):
    """The tool's files by name. That of image 5 is 00000/img-mean-std-00000005.npy."""
    names = [f"00000/img-mean-std-{number:08d}.npy" for number in range(len(arrays))]
    files = {}
    for name, array in zip(names, arrays):
        np.save(file := io.BytesIO(), array, allow_pickle=True)
        files[name] = file.getvalue()
    pairs = None if labels is None else [[name, int(label)] for name, label in zip(names, labels)]
    return {**files, "dataset.json": json.dumps({"labels": pairs}).encode()}


def write_zip(path, files):
    with zipfile.ZipFile(path, "w") as archive:
        for name in reversed(files):  # their order there means nothing
            archive.writestr(name, files[name])
    return path


def write_folder(path, files):
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


@pytest.mark.parametrize("write, name", [(write_zip, "latents.zip"), (write_folder, "vae-sd")])
@pytest.mark.parametrize("normalize_images", [True, False])
def test_latents_of_the_tool_are_those_encoded_here(write, name, normalize_images, tmp_path, capsys):
    labels = straight().labels()
    files = tool_files(means_and_deviations(normalize_images), labels)
    path, vae = write(tmp_path / "tool" / name if write is write_folder else tmp_path / name, files), autoencoder()
    vae.normalize_images = normalize_images
    before = {each: each.stat().st_mtime_ns for each in tmp_path.rglob("*")}
    dataset = prepared(path, vae, straight())
    assert f"of a KL, in {path}; standard deviation" in capsys.readouterr().out
    here = prepared(tmp_path / "here", vae, straight())
    assert {each: each.stat().st_mtime_ns for each in before} == before
    assert len(list(tmp_path.rglob("*"))) == len(before) + 4  # the folder and files that were written here alone
    order = [19, 0, 8, 7, 15, 3]
    values, classes = dataset[order]
    assert values.dtype == torch.float32 and torch.equal(classes, labels[order])
    assert values.shape == (6, 2, 1, 4, 2, 2) and torch.equal(values.half().float(), here[order][0])
    numbers = Numbers(torch.zeros(6), randn(6, 4, 2, 2, dtype=torch.float32))
    close(dataset.to_sample(values, numbers), here.to_sample(here[order][0], numbers), rtol=2e-3, atol=2e-3)
    for batches in load_batches(dataset, [order], 1, False):
        assert torch.equal(batches[0], values)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_latents_of_the_tool_may_be_encoded_in_half_precision(dtype, tmp_path):
    vae = autoencoder(force_upcast=False)
    vae.network.to(dtype)
    arrays = means_and_deviations(vae=vae)
    assert np.abs(arrays - means_and_deviations()).max() > 0
    prepared(write_zip(tmp_path / "half.zip", tool_files(arrays)), images=straight())


ARRAYS = functools.cache(means_and_deviations)


@pytest.mark.parametrize(
    "arrays, message",
    [
        (lambda: np.roll(ARRAYS(), 1, axis=0), "does not hold the latents of these images by the autoencoder a KL"),
        (lambda: ARRAYS()[:, :, :, ::-1], "does not hold the latents"),  # of mirrored images, nearly
        (lambda: np.concatenate([ARRAYS()[:, 4:], ARRAYS()[:, :4]], axis=1), "does not hold the latents"),
        (lambda: np.concatenate([ARRAYS()[:, :4], 2 * np.log(ARRAYS()[:, 4:])], axis=1), "does not hold the latents"),
        (lambda: means_and_deviations(vae=autoencoder(seed=1)), "does not hold the latents"),
        (lambda: 0.18215 * ARRAYS(), "does not hold the latents"),
        (lambda: np.nan * ARRAYS(), "does not hold the latents"),
        (
            lambda: means_and_deviations(False),
            r"in \[0, 1\], and the autoencoder a KL is shown images in \[-1, 1\]. Give --vae_unit_range true",
        ),
        (lambda: ARRAYS()[:19], "holds the latents of 19 images, and --dataset_name digits has 20. They must be of"),
        (lambda: ARRAYS()[:, :4], r"shape \(4, 2, 2\); means and deviations .* have \(8, 2, 2\). Give others, or set"),
        (lambda: np.repeat(ARRAYS(), 2, axis=3), r"shape \(8, 2, 4\); means"),
        (lambda: np.array([[{}]] * COUNT), "img-mean-std-00000000.npy of --latents .* cannot be loaded"),  # a pickle
        (lambda: [], "holds no latents"),
    ],
)
def test_other_latents_of_the_tool_are_refused(arrays, message, tmp_path):
    path = write_zip(tmp_path / "tool.zip", tool_files(arrays()))
    content = path.read_bytes()
    with pytest.raises(UserError, match=message):
        prepared(path, images=straight())
    assert path.read_bytes() == content and files(tmp_path) == ["tool.zip"]


def test_latents_of_the_tool_that_do_not_go_with_the_data(tmp_path):
    labels = straight().labels()
    path = write_zip(tmp_path / "tool.zip", tool_files(ARRAYS(), labels))
    with pytest.raises(UserError, match="--random_flip must be false with --latents .*tool.zip"):
        LatentDataset(digits(), autoencoder(), str(path))
    with pytest.raises(UserError, match=r"--latents: .*none.zip cannot be loaded.*\n.*No such file"):
        LatentDataset(straight(), autoencoder(), str(tmp_path / "none.zip"))
    with pytest.raises(UserError, match="shape .8, 2, 2.; means and deviations .* have .8, 4, 4."):
        LatentDataset(straight(resolution=16), autoencoder(), str(path))
    with pytest.raises(UserError, match="--dataset_name .*tool.zip holds latents, which go to --latents"):
        straight(dataset_name=str(path))
    swapped = [labels[1], labels[0], *labels[2:]]
    other = write_zip(tmp_path / "other.zip", tool_files(ARRAYS(), swapped))
    with pytest.raises(UserError, match="its dataset.json puts the images into other classes than --label_column"):
        LatentDataset(straight(), autoencoder(), str(other))
    prepared(other, images=straight(label_column=None))  # no class is asked for
    prepared(write_zip(tmp_path / "turned.zip", tool_files(ARRAYS(), 9 - labels)), images=straight())  # same classes
    broken = tool_files(ARRAYS())
    broken["00000/img-mean-std-00000007.npy"] = broken["00000/img-mean-std-00000007.npy"][:-3]
    dataset = prepared(write_zip(tmp_path / "broken.zip", broken), images=straight())
    with pytest.raises(UserError, match="00000/img-mean-std-00000007.npy of --latents .*broken.zip cannot be loaded"):
        dataset[[6, 7]]
    assert len(files(tmp_path)) == 4
