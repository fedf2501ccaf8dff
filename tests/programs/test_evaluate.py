"""Distances against closed forms, the evaluation program on models whose quality is known, and the feature networks."""

import dataclasses
import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from diffusers import UNet2DModel
from PIL import Image as PILImage
from torch import nn

from diffusers_ctm import CTMPipeline, CTMScheduler, CTMUNet2DModel, EDMHeunScheduler
from training import evaluate, features
from training.cli.errors import UserError
from training.cli.options import parse_config
from training.cli.shared_options import DataOptions
from training.data.images import ImageDataset
from training.evaluate import EvaluateConfig
from training.features import FeatureConfig
from training.frozen import classifier
from training.frozen.vectors import load_feature_network
from training.measure import distances as measures
from training.measure.distances import Distances
from training.measure.sampling import Setting
from training.networks import pipelines
from training.report import numbers


SIGMA_DATA = 0.3
TINY = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (8,),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",),
    "add_attention": False,
    "norm_num_groups": 4,
}


def save_exact(folder: Path, sigma_data: float, ctm: bool, **changes) -> str:
    """A pipeline whose F is 0: the exact denoiser of N(0, sigma_data^2), and as a CTM its Euler steps."""
    torch.manual_seed(0)
    unet = (CTMUNet2DModel if ctm else UNet2DModel)(**{**TINY, **changes})
    nn.init.zeros_(unet.conv_out.weight)
    nn.init.zeros_(unet.conv_out.bias)
    scheduler = (CTMScheduler if ctm else EDMHeunScheduler)(sigma_data=sigma_data, sigma_max=2.0)
    CTMPipeline(unet, scheduler).save_pretrained(str(folder))
    return str(folder)


@pytest.fixture(scope="module")
def gaussian(tmp_path_factory):
    """Paths: `data`, 400 images of N(0, 0.3^2) with two classes; `teacher` and `ctm` exact for them; `wrong*` for 0.6."""
    root = tmp_path_factory.mktemp("gaussian")
    pixels = np.random.default_rng(0).normal(0, SIGMA_DATA, (400, 8, 8))
    pixels = np.clip(np.round((pixels + 1) * 127.5), 0, 255).astype(np.uint8)
    schema = Features({"image": Image(), "label": ClassLabel(names=["a", "b"])})
    columns = {"image": [PILImage.fromarray(image) for image in pixels], "label": [int(i % 4 == 0) for i in range(400)]}
    paths = {"data": str(root / "images.parquet")}
    Dataset.from_dict(columns, features=schema).to_parquet(paths["data"])
    for name, sigma_data in (("", SIGMA_DATA), ("wrong_", 0.6)):
        paths[name + "teacher"] = save_exact(root / f"{name}teacher", sigma_data, ctm=False)
        paths[name + "ctm"] = save_exact(root / f"{name}ctm", sigma_data, ctm=True)
    return paths


@pytest.fixture
def config(gaussian, tmp_path):
    """Make a small `EvaluateConfig` on the Gaussian images."""

    def make(**changes):
        small = {
            "dataset_name": gaussian["data"],
            "model": gaussian["ctm"],
            "steps": [1, 3],
            "gammas": [0.0, 1.0],
            "num_samples": 150,
            "seeds": [0, 1],
            "batch_size": 100,
            "device": "cpu",
            "output_dir": str(tmp_path / "out"),
        }
        return EvaluateConfig(**{**small, **changes})

    return make


def mean(report: dict, sampler: str, steps: int, gamma: float | None = None, distance: str = "frechet") -> float:
    found = [r for r in report["results"] if (r["sampler"], r["steps"], r["gamma"]) == (sampler, steps, gamma)]
    assert len(found) == 1
    return found[0][distance]["mean"]


# Distances ----------------------------------------------------------------------------------------------------------


def test_frechet_distance_of_gaussians():
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 100_000, 3, generator=generator, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=torch.float64))[0]
    a, b = torch.tensor([1.0, 2.0, 0.5]), torch.tensor([1.5, 1.0, 0.5])
    shift = torch.tensor([0.3, 0.0, -0.4], dtype=torch.float64)
    measured = Distances((first * a) @ rotation)((second * b) @ rotation + shift)["frechet"]
    assert measured == pytest.approx(float((shift**2).sum() + ((a - b) ** 2).sum()), rel=0.02)


def test_frechet_distance_falls_to_zero_with_the_number_of_samples():
    data = torch.randn(2, 16_000, 8, generator=torch.Generator().manual_seed(0))
    values = [Distances(data[0, :n])(data[1, :n])["frechet"] for n in (1_000, 16_000)]
    assert values[0] / values[1] == pytest.approx(16, rel=0.35)  # the bias is proportional to 1 / n
    assert Distances(data[0])(data[0])["frechet"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("subset", [300, 100])
def test_kernel_distance_is_the_unbiased_estimate(monkeypatch, subset):
    monkeypatch.setattr(measures, "KERNEL_SUBSET", subset)
    x, y = torch.randn(2, 300, 4, generator=torch.Generator().manual_seed(0))
    y = y + 0.3

    def kernel(a, b):
        return (a @ b.T / 4 + 1) ** 3

    n = len(x)
    within = sum((kernel(z, z).sum() - kernel(z, z).diag().sum()) / (n * (n - 1)) for z in (x, y))
    expected = float(within - 2 * kernel(x, y).mean())
    distances = Distances(x, kernel=True)
    measured = distances(y)["kernel"]
    assert measured == pytest.approx(expected, rel=1e-4 if subset == n else 0.3)
    state = torch.random.get_rng_state()
    assert distances(y)["kernel"] == measured
    assert torch.equal(torch.random.get_rng_state(), state)


def test_real_digits_are_closer_to_real_digits_than_noise_is():
    images, _ = ImageDataset(DataOptions())[list(range(1797))]
    network = load_feature_network("digits")
    noise = torch.randint(0, 256, (800, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    distances = Distances(network(images[:900]), kernel=True)
    real, fake = distances(network(images[900:])), distances(network(noise))
    assert real["frechet"] < 0.05 * fake["frechet"] and real["kernel"] < 0.05 * fake["kernel"]


def test_floor_of_real_images():
    reference = torch.randn(2_000, 8, generator=torch.Generator().manual_seed(0))
    found = evaluate.real_against_real(reference, Distances(reference), 2_000, range(5))
    # Two sets of n and m samples of one Gaussian are C (1/n + 1/m) apart; of the resampled ones only one is random.
    assert found["halves"]["frechet"]["mean"] / found["resampled"]["frechet"]["mean"] == pytest.approx(4, rel=0.3)
    # Classes far apart: random shares of them move the mean, equal shares do not.
    labels = torch.arange(2_000) % 4
    apart = reference + 10 * torch.nn.functional.one_hot(labels, 8)
    random = evaluate.real_against_real(apart, Distances(apart), 2_000, range(3))
    kept = evaluate.real_against_real(apart, Distances(apart), 2_000, range(3), labels)
    for kind in ("resampled", "halves"):
        assert kept[kind]["frechet"]["mean"] == pytest.approx(found[kind]["frechet"]["mean"], rel=0.4)
        assert random[kind]["frechet"]["mean"] > 1.5 * kept[kind]["frechet"]["mean"]
    few = reference[:15]
    assert "halves" not in evaluate.real_against_real(few, Distances(few), 20, [0])


# Settings -----------------------------------------------------------------------------------------------------------


def test_settings_sample_one_step_once_and_know_their_cost(gaussian, config):
    settings = evaluate.settings_of(config(teacher=gaussian["teacher"], teacher_steps=[5, 2]))
    assert settings == [
        Setting("ctm", 1), Setting("ctm", 3, 0.0), Setting("ctm", 3, 1.0), Setting("heun", 2), Setting("heun", 5)
    ]  # fmt: skip
    options = config(teacher=gaussian["teacher"])
    pipelines = evaluate.load_pipelines(options, ImageDataset(options), torch.device("cpu"))
    for setting in settings:
        evaluate.draw(pipelines[setting.sampler], setting, 2, None, 0, 0)
        assert pipelines[setting.sampler].num_timesteps == setting.nfe


def test_gamma_has_no_effect_in_one_step(make_unet):
    pipe = CTMPipeline(make_unet(in_channels=1, out_channels=1), CTMScheduler())
    pipe.set_progress_bar_config(disable=True)
    images = [evaluate.draw(pipe, Setting("ctm", 1, gamma), 4, None, 0, 0) for gamma in (None, 0.0, 0.5, 1.0)]
    assert images[0].dtype == torch.uint8 and images[0].float().std() > 1
    assert all(torch.equal(image, images[0]) for image in images)
    assert not torch.equal(images[0], evaluate.draw(pipe, Setting("ctm", 1), 4, None, 0, 1))
    pipe.scheduler = CTMScheduler(presets={"1": {"sigmas": [2.0]}})  # passed over, as those for more steps are
    assert torch.equal(evaluate.draw(pipe, Setting("ctm", 1), 4, None, 0, 0), images[0])


def test_every_setting_starts_from_the_same_noise(gaussian, config, monkeypatch):
    starts = []
    prepare = CTMPipeline.prepare_latents

    def recorded(self, *args):
        starts.append(prepare(self, *args))
        return starts[-1]

    monkeypatch.setattr(CTMPipeline, "prepare_latents", recorded)
    options = config(teacher=gaussian["teacher"])
    pipelines = evaluate.load_pipelines(options, ImageDataset(options), torch.device("cpu"))
    for setting in evaluate.settings_of(options):
        evaluate.draw(pipelines[setting.sampler], setting, 3, None, 1, 2)
    assert all(torch.equal(start, starts[0]) for start in starts)


def test_pixels_are_those_of_the_saved_picture(gaussian):
    pipe = pipelines.load_model(gaussian["ctm"], [0.0])
    drawn = evaluate.draw(pipe, Setting("ctm", 3, 0.5), 5, None, 2, 1)
    generator = torch.Generator().manual_seed(2 * 1_000_003 + 1)
    pictures = pipe(batch_size=5, num_inference_steps=3, gamma=0.5, generator=generator).images
    assert np.array_equal(np.stack([np.asarray(picture) for picture in pictures]), drawn[:, 0].numpy())


def test_classes_are_those_of_the_data_or_take_turns():
    real = torch.tensor([0, 0, 0, 1, 2, 2])
    assert evaluate.class_labels(3, real, 12).bincount().tolist() == [6, 2, 4]
    many = torch.arange(1_000).square() % 7  # shares 1, 2, 2, 0, 2, 0, 0 of 7
    for count in (70, 333, 1_000, 1_400):
        shares = evaluate.class_labels(7, many, count).bincount(minlength=7) / count
        torch.testing.assert_close(shares, many.bincount(minlength=7) / 1_000, rtol=0, atol=1.5 / count)
    assert evaluate.class_labels(3, None, 7).tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert evaluate.class_labels(None, real, 7) is None


# The program --------------------------------------------------------------------------------------------------------


def test_better_model_scores_better_and_more_steps_help(gaussian, config):
    right = evaluate.main(config(teacher=gaussian["teacher"], teacher_steps=[2, 16], seeds=[0]))
    wrong = evaluate.main(
        config(model=gaussian["wrong_ctm"], teacher=gaussian["wrong_teacher"], teacher_steps=[16], steps=[3], seeds=[0])
    )
    for distance in ("frechet", "kernel"):
        assert mean(right, "ctm", 3, 0.0, distance) < mean(right, "ctm", 1, None, distance)
        assert mean(right, "heun", 16, None, distance) < mean(right, "heun", 2, None, distance)
        assert mean(right, "heun", 16, None, distance) < 0.2 * mean(wrong, "heun", 16, None, distance)
    floor = right["real_against_real"]["resampled"]["frechet"]
    assert mean(right, "heun", 16) < 2 * floor["mean"]  # an exact sampler is as good as real images


def test_same_model_same_numbers(config):
    def numbers(report):
        kept = [{k: v for k, v in row.items() if k != "seconds_per_image"} for row in report["results"]]
        return kept, report["real_against_real"], report["features"], report["reference"]

    assert numbers(evaluate.main(config())) == numbers(evaluate.main(config()))


def test_files_agree(gaussian, config, capsys):
    options = config(teacher=gaussian["teacher"], teacher_steps=[2], label_column="label")
    report = evaluate.main(options)
    out = Path(options.output_dir)
    assert sorted(os.listdir(out)) == ["evaluation.json", "evaluation.md", "evaluation.png", "gammas.png"]
    assert json.loads((out / "evaluation.json").read_text()) == json.loads(json.dumps(report))
    text = (out / "evaluation.md").read_text()
    assert text in capsys.readouterr().out

    frechet, kernel = text.split("Kernel distance")
    for part, distance in ((frechet, "frechet"), (kernel, "kernel")):
        lines = [
            [entry.strip() for entry in line.split("|")[1:-1]] for line in part.splitlines() if line.startswith("|")
        ]
        head, rows = lines[0], {line[0]: line for line in lines[2:]}
        assert head[1:5] == ["NFE", "without gamma", "gamma 0", "gamma 1"]
        for result in report["results"]:
            row = rows[Setting(result["sampler"], result["steps"]).name]
            column = 2 if result["gamma"] is None else head.index(f"gamma {result['gamma']:g}")
            assert row[1] == str(result["nfe"]) and row[column] == numbers.cell(result[distance])
            values = result[distance]["by_seed"]
            assert len(values) == 2 and result[distance]["mean"] == pytest.approx(np.mean(values))
            assert result[distance]["std"] == pytest.approx(np.std(values, ddof=1))
            assert result["seconds_per_image"] > 0
    for stated in (
        "150 per setting",
        "same noise",
        "all 400 images",
        "split `train`",
        "seeds 0, 1",
        "accuracy 9",
        "asked for: none",
    ):
        assert stated in text
    assert PILImage.open(out / "evaluation.png").size[0] > 800
    grid = PILImage.open(out / "gammas.png")
    assert grid.size == (12 + 2 * (500 + 12), 12 + 3 * (50 + 18 + 12))


def test_one_seed_and_the_teacher_alone(gaussian, config):
    report = evaluate.main(config(model=None, teacher=gaussian["teacher"], teacher_steps=[2], seeds=[3], kid=False))
    assert [row["sampler"] for row in report["results"]] == ["heun"]
    assert set(report["results"][0]) == {"sampler", "steps", "gamma", "nfe", "frechet", "seconds_per_image"}
    text = Path(report["options"]["output_dir"], "evaluation.md").read_text()
    assert "seed 3" in text and "±" not in text and "Kernel" not in text


def test_classes_are_asked_for_in_the_proportions_of_the_data(gaussian, config, tmp_path, monkeypatch):
    model = save_exact(tmp_path / "conditional", SIGMA_DATA, ctm=True, num_class_embeds=2)
    asked = []
    draw = evaluate.draw
    monkeypatch.setattr(
        evaluate, "draw", lambda pipe, s, n, labels, *rest: asked.append(labels) or draw(pipe, s, n, labels, *rest)
    )
    report = evaluate.main(config(model=model, label_column="label", num_samples=400, seeds=[0], steps=[1], kid=False))
    batches = asked[1:5]  # after the warm-up
    assert [len(labels) for labels in batches] == [100] * 4 and torch.cat(batches).bincount().tolist() == [300, 100]
    assert report["class_labels"] == "in the shares of the real images"


def test_mirrored_reference(config):
    options = config()
    network = load_feature_network("digits")
    dataset = ImageDataset(options)
    plain, labels = evaluate.reference_features(dataset, network, options, torch.device("cpu"))
    mirrored, _ = evaluate.reference_features(
        dataset, network, dataclasses.replace(options, random_flip=True), torch.device("cpu")
    )
    images = dataset[list(range(400))][0]
    same = (mirrored == plain).all(1)
    assert labels is None and 150 < same.sum() < 250
    torch.testing.assert_close(mirrored[~same], network(images.flip(-1))[~same])


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"model": None}, "--model is needed"),
        ({"gammas": [0.0, 1.5]}, r"--gammas must be in \[0, 1\]"),
        ({"steps": [0, 1]}, "--steps must be 1 or more"),
        ({"seeds": []}, "--seeds must be one value"),
        ({"num_samples": 64}, "--num_samples: 64 samples are too few for 64 features"),
        ({"model": "no/such/folder"}, r"--model no/such/folder cannot be loaded\. No such folder is here\. It must"),
        ({"model": "{teacher}"}, "is no CTM but a CTMPipeline with EDMHeunScheduler.*--teacher"),
        ({"teacher": "no/such/folder"}, "--teacher no/such/folder cannot be loaded"),
        ({"features": "no/such/folder"}, "--features no/such/folder cannot be loaded"),
        ({"features": "{teacher}"}, "--features .* cannot be loaded"),
        ({"device": "cuda:77"}, "--device cuda:77 cannot be used"),
        ({"device": "meta"}, "--device meta cannot be used"),
        ({"resolution": 16}, "--features is a network for 8x8 images, these are 16x16"),
        ({"image_mode": "RGB"}, r"gives images of shape \(3, 8, 8\), --model makes \(1, 8, 8\)"),
        ({"output_dir": "{data}"}, "--output_dir must be a folder"),
        ({"output_dir": "{data}/results"}, "results cannot be written"),
    ],
)
def test_errors_name_the_option_and_leave_nothing(gaussian, config, monkeypatch, changes, words):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    filled = {name: value.format(**gaussian) if isinstance(value, str) else value for name, value in changes.items()}
    options = None
    with pytest.raises(UserError, match=words):
        options = config(**filled)
        evaluate.main(options)
    assert options is None or not os.path.exists(options.output_dir)


def test_teacher_of_another_family(gaussian, config, tmp_path):
    folder = Path(save_exact(tmp_path / "ddpm", SIGMA_DATA, ctm=False))
    (folder / "scheduler" / "scheduler_config.json").write_text('{"_class_name": "KarrasVeScheduler"}')
    with pytest.raises(UserError, match="--teacher .* KarrasVeScheduler, which is not known: not of the EDM family"):
        evaluate.main(config(teacher=str(folder)))


def test_broken_weights_are_reported(gaussian, config, tmp_path):
    pipe = pipelines.load_model(gaussian["ctm"], [0.0])
    nn.init.constant_(pipe.unet.conv_out.bias, float("nan"))
    pipe.save_pretrained(str(tmp_path / "broken"))
    options = config(model=str(tmp_path / "broken"))
    with pytest.raises(UserError, match="--model gives infinite or NaN pixels"):
        evaluate.main(options)
    assert not os.path.exists(options.output_dir)


def test_a_failure_keeps_the_former_result(config, monkeypatch):
    options = config(seeds=[0], steps=[1])
    evaluate.main(options)
    before = {path: path.read_bytes() for path in Path(options.output_dir).iterdir()}
    monkeypatch.setattr(evaluate, "gammas_picture", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        evaluate.main(config(seeds=[1], steps=[1]))
    assert {path: path.read_bytes() for path in Path(options.output_dir).iterdir()} == before


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_full_disk_keeps_the_former_result(config):
    options = config(seeds=[0], steps=[1])
    evaluate.main(options)
    folder = Path(options.output_dir)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    (folder / ".gammas.draft.png").symlink_to("/dev/full")  # where the last file is written
    with pytest.raises(UserError, match="gammas.png could not be written: .*No space left"):
        evaluate.main(config(seeds=[1], steps=[1]))
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_corrupted_weights_are_no_model(gaussian, config, tmp_path):
    shutil.copytree(gaussian["ctm"], tmp_path / "cut")
    weights = tmp_path / "cut" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    options = config(model=str(tmp_path / "cut"))
    with pytest.raises(UserError, match=r"--model .*cut cannot be loaded\. It must"):
        evaluate.main(options)
    assert not os.path.exists(options.output_dir)


def test_few_images_are_noted(config):
    assert measures.check_counts(1_000, 1_000, 64) == []
    notes = measures.check_counts(200, 1_000, 64)
    assert len(notes) == 1 and "200 samples are few" in notes[0]
    with pytest.raises(UserError, match="--dataset_name: 60 real images"):
        measures.check_counts(1_000, 60, 64)


def test_command_line():
    parsed = parse_config(
        EvaluateConfig, ["--model", "m", "--steps", "4", "1", "4", "--gammas", "1", "0", "--kid", "False"]
    )
    assert (parsed.steps, parsed.gammas, parsed.kid, parsed.seeds) == ([1, 4], [0.0, 1.0], False, [0, 1, 2])
    with pytest.raises(SystemExit):
        parse_config(EvaluateConfig, ["--model", "m", "--gammas", "2"])


def test_cells():
    values = {"by_seed": [], "min": 0, "max": 0}
    assert numbers.cell({**values, "mean": 8.304, "std": 0.0521}) == "8.304 ± 0.052"
    assert numbers.cell({**values, "mean": -0.01186, "std": 0.000114}) == "-0.01186 ± 0.00011"
    assert numbers.cell({**values, "mean": 1234.4, "std": 31.0}) == "1234 ± 31"
    assert numbers.cell({**values, "mean": 1.2345, "std": None}) == "1.23"
    assert [numbers.duration(s) for s in (2.5, 0.0123, 4.2e-5)] == ["2.5 s", "12.3 ms", "42 µs"]


# Feature networks ---------------------------------------------------------------------------------------------------


def test_embedded_features_have_the_accuracy_they_state():
    network = load_feature_network("digits")
    stored = json.loads((classifier.EMBEDDED["digits"] / "config.json").read_text())
    options = FeatureConfig(**stored["options"])
    dataset = ImageDataset(options)
    _, held_out = features.split(len(dataset), options.held_out, options.seed)
    images, labels = dataset[held_out]
    accuracy = (network.classify(images) == labels).float().mean().item()
    assert len(held_out) == stored["num_held_out_images"]
    assert accuracy == pytest.approx(stored["accuracy"], abs=1e-6) and accuracy > 0.95
    assert network.about["accuracy"] == stored["accuracy"] and network.about["name"] == "digits"
    output = network(images[:5])
    assert output.shape == (5, network.num_features) == (5, 64) and output.dtype == torch.float32
    torch.testing.assert_close(network(images[:5].expand(-1, 3, -1, -1)), output, rtol=1e-4, atol=1e-4)
    assert sum(file.stat().st_size for file in classifier.EMBEDDED["digits"].iterdir()) < 500_000


def test_training_features_is_reproducible_and_replaces_only_its_own(tmp_path, gaussian):
    paths = [tmp_path / "a", tmp_path / "b", tmp_path / "a"]
    weights = []
    for path in paths:
        features.main(FeatureConfig(dataset_name=gaussian["data"], output_dir=str(path), num_epochs=1, num_features=8))
        weights.append((path / "model.safetensors").read_bytes())
    assert weights[0] == weights[1] == weights[2]
    network = load_feature_network(str(paths[0]))
    assert network.num_features == 8 and network.about["num_classes"] == 2
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="--output_dir .* holds something else"):
        features.main(FeatureConfig(dataset_name=gaussian["data"], output_dir=str(tmp_path / "other"), num_epochs=1))
    assert (tmp_path / "other" / "thesis.txt").exists()
    for wrong in ("", str(tmp_path / "other" / "thesis.txt")):
        with pytest.raises(UserError, match="--output_dir must be a folder"):
            FeatureConfig(output_dir=wrong)


def test_shift_moves_images_by_whole_pixels():
    images = torch.randint(0, 256, (50, 2, 6, 6), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    moved = features.shifted(images, 1, torch.Generator().manual_seed(0))
    found = set()
    for old, new in zip(images, moved):
        match = [
            (dy, dx)
            for dy in (-1, 0, 1)
            for dx in (-1, 0, 1)
            if torch.equal(new[:, 1:-1, 1:-1], old[:, 1 + dy : 5 + dy, 1 + dx : 5 + dx])
        ]
        assert len(match) == 1
        found.update(match)
    assert len(found) == 9
    assert torch.equal(features.shifted(images, 0, torch.Generator().manual_seed(0)), images)


class Pooling(nn.Module):
    """Stands for FID's Inception: the mean of each channel."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert x.shape[2] == 299 and x.shape[3] == 299
        return x.mean(dim=[2, 3])


class ResizingPooling(nn.Module):
    """Stands for NVIDIA's file, which takes uint8 and resizes by itself."""

    def forward(self, img: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        x = img.float().mean(dim=[2, 3])
        return x if return_features else x[:, :1]


def test_torchscript_features(tmp_path):
    images = torch.randint(0, 256, (4, 1, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    for module, low, high in ((Pooling(), -1, 1), (ResizingPooling(), 0, 255)):
        path = str(tmp_path / f"{type(module).__name__}.pt")
        torch.jit.script(module).save(path)
        network = load_feature_network(path)
        assert network.num_features == 3
        output = network(images)
        expected = low + (high - low) * images.float().mean((1, 2, 3)) / 255
        torch.testing.assert_close(output, expected[:, None].expand(4, 3), rtol=0, atol=0.01 * (high - low))
    (tmp_path / "broken.pt").write_bytes(b"no TorchScript")
    with pytest.raises(UserError, match="--features .*broken.pt cannot be loaded"):
        load_feature_network(str(tmp_path / "broken.pt"))


def test_transformers_features(tmp_path):
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = ViTModel(ViTConfig(**sizes, image_size=32, patch_size=8)).eval()
    model.save_pretrained(tmp_path)
    processor = {"size": {"height": 32, "width": 32}, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.25, 0.2]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    network = load_feature_network(str(tmp_path))
    images = torch.randint(0, 256, (3, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    x = images / 255
    x = (x - torch.tensor(processor["image_mean"])[:, None, None]) / torch.tensor(processor["image_std"])[:, None, None]
    with torch.no_grad():
        torch.testing.assert_close(network(images), model(pixel_values=x).pooler_output)
    assert network.num_features == 16
    grey = network(torch.full((2, 1, 8, 8), 100, dtype=torch.uint8))
    torch.testing.assert_close(grey, network(torch.full((2, 3, 32, 32), 100, dtype=torch.uint8)))


def test_features_have_no_random_weights(tmp_path):
    from safetensors.torch import load_file, save_file
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = ViTForImageClassification(ViTConfig(**sizes, image_size=8, patch_size=4)).eval()  # without a pooler
    model.save_pretrained(tmp_path)
    processor = {"size": 8, "image_mean": 0.5, "image_std": 0.5}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    images = torch.randint(0, 256, (3, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    with torch.no_grad():
        expected = model.vit(pixel_values=images / 127.5 - 1).last_hidden_state.mean(1)
    torch.testing.assert_close(load_feature_network(str(tmp_path))(images), expected)

    weights = load_file(tmp_path / "model.safetensors")
    lost = next(name for name in weights if name.endswith("layernorm.weight"))
    save_file({name: value for name, value in weights.items() if name != lost}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="--features .*: its files lack 1 of the weights, such as layernorm.weight"):
        load_feature_network(str(tmp_path))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**processor, "do_flip_channel_order": True}))
    with pytest.raises(UserError, match="--features .*blue, green, red"):
        load_feature_network(str(tmp_path))


def test_features_of_an_image_and_text_model(tmp_path):
    from transformers import CLIPConfig, CLIPModel

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    text = {**sizes, "vocab_size": 20, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    vision = {**sizes, "image_size": 16, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)).save_pretrained(tmp_path)
    processor = {"size": {"shortest_edge": 24}, "crop_size": {"height": 16, "width": 16}, "do_center_crop": True}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    network = load_feature_network(str(tmp_path))
    assert network.num_features == 12 and network.side == (16, 16)
    assert math.isfinite(network(torch.zeros(2, 1, 20, 20, dtype=torch.uint8)).sum())
