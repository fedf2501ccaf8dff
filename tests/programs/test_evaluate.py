# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""training.evaluate on models whose quality is known."""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.gaussian_models import SIGMA_DATA, gaussian_pixels, save_exact, save_parquet
from training.cli.errors import UserError
from training.evaluate import EvaluateConfig, main
from training.report.numbers import cell
from training.report.tables import setting_name


GRAY = {"in_channels": 1, "out_channels": 1}


@pytest.fixture(scope="module")
def gaussian(tmp_path_factory):
    """Paths: `data`, 400 images of N(0, 0.3^2) with two classes; `teacher` and `ctm` exact for them; `wrong_*` for 0.6;
    `cut` and `broken` with damaged weights."""
    root = tmp_path_factory.mktemp("gaussian")
    labels = [int(i % 4 == 0) for i in range(400)]
    paths = {"data": save_parquet(root / "images.parquet", gaussian_pixels(400, 8, 8), labels)}
    for name, sigma_data in (("", SIGMA_DATA), ("wrong_", 0.6)):
        for kind in ("teacher", "ctm"):
            paths[name + kind] = save_exact(root / (name + kind), sigma_data, kind == "ctm", **GRAY)
    paths["broken"] = save_exact(root / "broken", SIGMA_DATA, bias=float("nan"), **GRAY)
    paths["cut"] = str(shutil.copytree(paths["ctm"], root / "cut"))
    weights = root / "cut" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
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
    (row,) = [
        row for row in report["results"] if (row["sampler"], row["steps"], row["gamma"]) == (sampler, steps, gamma)
    ]
    return row[distance]["mean"]


def test_better_model_scores_better_and_more_steps_help(gaussian, config):
    options = {"seeds": [0], "paired_samples": 0}
    right = main(config(teacher=gaussian["teacher"], teacher_steps=[2, 16], **options))
    wrong = main(
        config(model=gaussian["wrong_ctm"], teacher=gaussian["wrong_teacher"], teacher_steps=[16], steps=[3], **options)
    )
    for distance in ("frechet", "kernel"):
        assert mean(right, "ctm", 3, 0.0, distance) < mean(right, "ctm", 1, None, distance)
        assert mean(right, "heun", 16, None, distance) < mean(right, "heun", 2, None, distance)
        assert mean(right, "heun", 16, None, distance) < 0.2 * mean(wrong, "heun", 16, None, distance)
    floor = right["real_against_real"]["resampled"]["frechet"]
    assert mean(right, "heun", 16) < 2 * floor["mean"]  # an exact sampler is as good as real images


def test_files_agree_and_the_same_command_gives_the_same_numbers(gaussian, config, tmp_path, capsys):
    conditional = save_exact(tmp_path / "conditional", SIGMA_DATA, num_class_embeds=2, **GRAY)
    options = config(
        model=conditional, teacher=gaussian["teacher"], teacher_steps=[2], label_column="label", random_flip=True,
        paired_samples=5, paired_steps=2,
    )  # fmt: skip
    report = main(options)
    out = Path(options.output_dir)
    assert sorted(os.listdir(out)) == ["evaluation.json", "evaluation.md", "evaluation.png", "gammas.png"]
    assert json.loads((out / "evaluation.json").read_text()) == json.loads(json.dumps(report))
    text = (out / "evaluation.md").read_text()
    assert text in capsys.readouterr().out
    for stated in (
        "150 per setting", "same noise", "all 400 images", "split `train`", "seeds 0, 1", "accuracy 9", "mirrored",
        "in the shares of the real images", "both with classes as asked for",
    ):  # fmt: skip
        assert stated in text
    frechet, kernel, beside = (
        {line.split(" | ")[0][2:]: line.split(" | ") for line in part.splitlines() if line[:2] == "| "}
        for part in re.split("Kernel distance|Beside the distance", text)
    )
    columns = {None: 2, 0.0: 3, 1.0: 4}
    for result in report["results"]:
        name, column = setting_name(result["sampler"], result["steps"]), columns[result["gamma"]]
        assert frechet[name][1:2] + frechet[name][column : column + 1] == [str(result["nfe"]), cell(result["frechet"])]
        assert kernel[name][column] == cell(result["kernel"]) and result["seconds_per_image"] > 0
        assert len(result["frechet"]["by_seed"]) == 2
        row = beside[setting_name(result["sampler"], result["steps"], result["gamma"])]
        assert row[1:3] == [cell(result["precision"]), cell(result["recall"])]
    assert beside["real images, two halves"][1] == cell(report["real_against_real"]["halves"]["precision"])
    # A teacher without classes has no images to be paired with those of a CTM that is told the class.
    assert "has neither paired error nor diversity: it and the teacher know other classes" in text
    assert beside["1 step"][3:5] == ["-", "-"] and beside["teacher, Heun 2"][3] == "100"
    assert Image.open(out / "evaluation.png").size[0] > 800
    assert Image.open(out / "gammas.png").size == (12 + 2 * (500 + 12), 12 + 3 * (50 + 18 + 12))

    def numbers(report):
        kept = [{k: v for k, v in row.items() if k != "seconds_per_image"} for row in report["results"]]
        return kept, report["real_against_real"], report["features"], report["reference"]

    assert numbers(main(options)) == numbers(report)


def test_pairs_and_diversity_say_what_a_gaussian_student_lacks(gaussian, config):
    """In one Euler step from 2.0 the CTM draws x_T 0.3^2 / (0.3^2 + 2^2), which the flow takes to x_T 0.3 / 2.02."""
    pairs = {"paired_samples": 100, "paired_steps": 20, "kid": False, "seeds": [0]}
    report = main(config(teacher=gaussian["teacher"], teacher_steps=[3, 14], **pairs))
    spread = (0.3**2 + 2.0**2) ** 0.5
    drawn, true = 2 * 0.3**2 / spread**2, 2 * 0.3 / spread  # standard deviations
    assert mean(report, "ctm", 1, distance="paired") == pytest.approx(true - drawn, rel=0.04)
    assert mean(report, "ctm", 1, distance="paired") > 2 * mean(report, "ctm", 3, 0.0, "paired")
    assert mean(report, "heun", 14, distance="paired") < 0.1 * mean(report, "heun", 3, distance="paired")
    assert mean(report, "heun", 14, distance="diversity") == 100
    assert mean(report, "ctm", 1, distance="diversity") < mean(report, "ctm", 3, 0.0, "diversity") < 95
    (noisy,) = [row for row in report["results"] if row["gamma"] == 1]
    assert "paired" not in noisy and "diversity" in noisy


def test_a_further_network_gives_the_distance_that_it_gives_alone(gaussian, config, tmp_path, capsys):
    other, options = str(pooling(tmp_path)), {"steps": [1], "seeds": [0]}
    plain, alone = main(config(**options)), main(config(features=[other], **options))
    capsys.readouterr()
    both = main(config(features=["digits", other], **options))
    assert [one["name"] for one in (both["features"], *both["other_features"])] == ["digits", other]
    for row, first, second in zip(both["results"], plain["results"], alone["results"], strict=True):
        assert row["frechet_2"]["mean"] == pytest.approx(second["frechet"]["mean"], abs=1e-9)
        assert {key: row[key] for key in first if "seconds" not in key} == {
            k: first[k] for k in first if "sec" not in k
        }
    for kind, values in both["real_against_real"].items():
        assert values["frechet_2"] == alone["real_against_real"][kind]["frechet"]
    assert f"| Frechet, `{other}` |" in capsys.readouterr().out


def test_one_seed_and_the_teacher_alone(gaussian, config):
    report = main(
        config(model=None, teacher=gaussian["teacher"], teacher_steps=[2], seeds=[3], kid=False, paired_samples=5)
    )
    assert [row["sampler"] for row in report["results"]] == ["heun"]
    judges = {"frechet", "precision", "recall", "diversity", "paired", "paired_features"}
    assert set(report["results"][0]) == {"sampler", "steps", "gamma", "nfe", "seconds_per_image"} | judges
    text = Path(report["options"]["output_dir"], "evaluation.md").read_text(encoding="utf-8")
    assert "seed 3" in text and "±" not in text and "Kernel" not in text and "asked for: none" in text


def test_a_guided_teacher_is_said_and_costs_twice(gaussian, config):
    """Halfway between too wide a model and too narrow a one it is nearer to the data than either."""
    save = Path(gaussian["data"]).parent
    wide, narrow = gaussian["wrong_teacher"], save_exact(save / "narrow", 0.15, ctm=False, **GRAY)  # 0.6 and 0.15
    shared = {"model": None, "teacher_steps": [8], "seeds": [0], "kid": False}
    alone = [main(config(teacher=name, **shared)) for name in (wide, narrow)]
    report = main(config(teacher=wide, guidance_teacher=narrow, teacher_guidance_scale=0.5, **shared))
    assert mean(report, "heun", 8) < 0.3 * min(mean(each, "heun", 8) for each in alone)
    assert report["results"][0]["nfe"] == 2 * 15
    text = Path(report["options"]["output_dir"], "evaluation.md").read_text(encoding="utf-8")
    assert "| teacher, Heun" not in text  # in no table
    assert "| guided teacher, Heun 8 | 30 |" in text and "guided by `narrow`, scale 0.5; each call is two" in text


def test_kept_features_and_shared_statistics_give_the_same_distance(gaussian, config, tmp_path):
    conditional = save_exact(tmp_path / "conditional", SIGMA_DATA, num_class_embeds=2, **GRAY)
    plain = main(config())
    path = str(tmp_path / "kept.npz")
    for _ in range(2):  # written, read
        report = main(config(reference=path))
        assert report["real_against_real"] == plain["real_against_real"] and report["reference"] == plain["reference"]
        for row, same in zip(report["results"], plain["results"]):
            assert row["frechet"] == same["frechet"] and row["kernel"] == same["kernel"]

    with np.load(path) as file:
        np.savez(tmp_path / "fid.npz", mu=file["mu"], sigma=file["sigma"])
    shared = {"reference": str(tmp_path / "fid.npz"), "dataset_name": "digits"}
    report = main(config(**shared))
    for row, same in zip(report["results"], plain["results"]):
        assert row["frechet"]["by_seed"] == pytest.approx(same["frechet"]["by_seed"], abs=1e-6)
        assert "kernel" not in row
    assert report["real_against_real"] == {} and report["reference"]["num_images"] is None
    out = Path(report["options"]["output_dir"])
    text = (out / "evaluation.md").read_text(encoding="utf-8")
    assert "`fid.npz`. The file does not say" in text and "no kernel distance" in text and "Kernel" not in text
    assert "Real images:" not in text and Image.open(out / "evaluation.png").size[0] > 800
    assert main(config(model=conditional, **shared))["class_labels"] == "each in turn"
    for changes, words in [
        ({"dataset_name": gaussian["data"]}, "--dataset_name has no use: --reference .*fid.npz is all"),
        ({"label_column": "label"}, "--label_column has no use"),
        ({"num_samples": 60}, "--num_samples: 60 samples are too few"),
        ({"features": [str(pooling(tmp_path))]}, "fid.npz is of 64 features, --features .* gives 3"),
        ({"model": save_exact(tmp_path / "wide", SIGMA_DATA, sample_size=16, **GRAY)}, "is a network for 8x8 images"),
    ]:
        with pytest.raises(UserError, match=words):
            main(config(**{**shared, **changes}))
    with pytest.raises(UserError, match="kept.npz was made otherwise: random_flip False, here True"):
        main(config(reference=path, random_flip=True))


def pooling(folder: Path) -> Path:
    """A feature network of three features."""

    class Pooling(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.mean(dim=[2, 3])

    torch.jit.script(Pooling()).save(folder / "pooling.pt")
    return folder / "pooling.pt"


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"model": None}, "--model or --teacher is needed"),
        ({"gammas": [0.0, 1.5]}, r"--gammas must be in \[0, 1\]"),
        ({"steps": [0, 1]}, "--steps must be positive"),
        ({"seeds": []}, "--seeds must be one value"),
        ({"num_samples": 64}, "--num_samples: 64 samples are too few for 64 features"),
        ({"model": "no/such/folder"}, r"--model no/such/folder cannot be loaded\. No such folder is here\. It must"),
        ({"model": "{cut}"}, r"--model .*cut cannot be loaded\. It must"),
        ({"model": "{broken}"}, "--model .*broken has infinite or NaN weights: unet.conv_out.bias"),
        ({"model": "{teacher}"}, "is no CTM but a CTMPipeline with EDMHeunScheduler.*--teacher"),
        ({"teacher": "no/such/folder"}, "--teacher no/such/folder cannot be loaded"),
        ({"features": ["no/such/folder"]}, "--features no/such/folder cannot be loaded"),
        ({"features": ["digits", "{teacher}"]}, "--features .* cannot be loaded"),
        ({"features": ["digits", "digits"]}, "--features must be one network or several different ones"),
        ({"features": ["digits", "x.pt"], "reference": "kept.npz"}, "--features must be one network, because --refer"),
        ({"num_samples": 3}, "--num_samples must be 4 or more"),
        ({"paired_samples": 10}, "--paired_samples needs --teacher"),
        ({"device": "cuda:77"}, "--device cuda:77 cannot be used"),
        ({"device": "meta"}, "--device meta cannot be used"),
        ({"resolution": 16}, "--features is a network for 8x8 images, these are 16x16"),
        ({"image_mode": "RGB"}, r"gives images of shape \(3, 8, 8\), --model makes \(1, 8, 8\)"),
        ({"reference": "fid.csv"}, "--reference must be a file .npz"),
        ({"output_dir": "{data}"}, "--output_dir must be a folder"),
        ({"output_dir": "{data}/results"}, "results cannot be written"),
    ],
)
def test_errors_name_the_option_and_leave_nothing(gaussian, config, tmp_path, monkeypatch, changes, words):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def fill(value):
        if isinstance(value, list):
            return [fill(each) for each in value]
        return value.format(**gaussian) if isinstance(value, str) else value

    filled = {name: fill(value) for name, value in changes.items()}
    with pytest.raises(UserError, match=words):
        main(config(**filled))
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_full_disk_keeps_the_former_result(config):
    options = config(seeds=[0], steps=[1])
    main(options)
    folder = Path(options.output_dir)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    (folder / ".gammas.draft.png").symlink_to("/dev/full")  # where the last file is written
    with pytest.raises(UserError, match="gammas.png could not be written: .*No space left"):
        main(config(seeds=[1], steps=[1]))
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
