# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""training.tune measures nothing twice, and saves only what is better on other seeds."""

import json
import math
import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from diffusers import DiffusionPipeline
from huggingface_hub.errors import EntryNotFoundError
from PIL import Image
from tqdm.auto import tqdm

from diffusers_ctm import CTMPipeline, CTMScheduler
from training.cli.errors import UserError
from training.measure.sampling import Sampling, Setting
from training.tune import Measure, TuneConfig, improvement, load_model, main, save_with_presets


@pytest.mark.parametrize(
    "best, mean, better",
    [
        ([2.0, 2.9, 4.1], 1.0, True),
        ([1.0, 4.5, 5.5], 1 / 3, False),  # the spread is 1.4
        ([3.1, 4.1, 5.1], -0.1, False),
        ([3.0, 4.0, 5.0], 0.0, False),
        ([2.999, 3.999, 4.999], 0.001, False),
    ],
)
def test_a_preset_must_be_better_by_more_than_its_spread(best, mean, better):
    gain = improvement([3.0, 4.0, 5.0], best)
    assert gain["mean"] == pytest.approx(mean) and gain["better"] == better


def test_the_cache_holds_what_other_runs_measured_too(tmp_path):
    sampling = SimpleNamespace(sizes=[80], features=lambda setting, seed, progress: (asked.append(seed) or seed, 0.0))

    def measured(common, setting, seeds):
        folder, distances = str(tmp_path / "deep"), lambda features: {"frechet": 0.25 + features}
        return Measure(sampling, distances, folder, common, tqdm(disable=True))(setting, seeds)

    asked, first = [], Setting("ctm", 2, (0.5, 0.0), (80.0, 1.0))
    assert measured("one", first, [0, 1]) == measured("one", first, [0, 1]) == [0.25, 1.25]
    for other in (("two", first), ("one", Setting("ctm", 2)), ("one", first)):
        assert measured(*other, [0]) == [0.25]
    assert asked == [0, 1, 0, 0]
    (tmp_path / "deep" / "cache.json").write_text('{"key": "abc')  # as a disk may leave it
    assert measured("one", first, [0]) == [0.25] and len(asked) == 5


BAD = {"4": {"gamma": 0.0, "final_sigma": 0.7}}  # leaves noise in the images


@pytest.fixture
def model(tmp_path):
    """The shipped CTM, whose scheduler has one bad preset."""
    pipe = DiffusionPipeline.from_pretrained("assets/digits-ctm")
    pipe.scheduler = CTMScheduler.from_config(pipe.scheduler.config, presets={**BAD, "7": {"gamma": [0.5] * 7}})
    pipe.save_pretrained(tmp_path / "model")
    shutil.copy("assets/digits-ctm/training.json", tmp_path / "model")
    shutil.copy("assets/emoji-ctm/NOTICE.md", tmp_path / "model")
    return str(tmp_path / "model")


def small(model, tmp_path, **options):
    options = {
        "label_column": "label", "steps": [4], "evaluations": 4, "gammas": [0.0, 1.0], "num_samples": 80, "seeds": [0],
        "confirm_seeds": [5, 6], "output_dir": str(tmp_path / "out"), "device": "cpu", **options,
    }  # fmt: skip
    return TuneConfig(model=model, **options)


def counted(monkeypatch, most=math.inf):
    """Count measurements; the one after `most` fails as a machine does that is switched off."""
    calls, features = [], Sampling.features

    def counting(self, setting, seed, progress):
        if len(calls) >= most:
            raise KeyboardInterrupt
        calls.append((setting, seed))
        return features(self, setting, seed, progress)

    monkeypatch.setattr(Sampling, "features", counting)
    return calls


def test_an_interrupted_run_goes_on_and_saves_what_is_better(model, tmp_path, monkeypatch, capsys):
    before = {path: path.read_bytes() for path in (tmp_path / "model").rglob("*") if path.is_file()}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        counted(patch, most=3)
        main(small(model, tmp_path))
    assert os.listdir(tmp_path / "out") == ["cache.json"]
    with monkeypatch.context() as patch:
        rest = counted(patch)
        report = main(small(model, tmp_path))
    with monkeypatch.context() as patch:
        whole = counted(patch)
        other = main(small(model, tmp_path, output_dir=str(tmp_path / "other")))
    (row,) = report["results"]
    assert len(set(whole)) == len(whole) and len(rest) == len(whole) - 3
    assert row == other["results"][0]
    assert {seed for _, seed in whole} == {0, 5, 6}

    # The search is what it says: the lowest mean, confirmed on the other seeds.
    assert len(row["trials"]) == 4 and row["now_is"] == "its preset"
    assert row["best"]["search"]["mean"] == min(trial["mean"] for trial in row["trials"])
    assert row["karras"]["search"]["mean"] == min(trial["mean"] for trial in row["trials"][:2])
    gains = np.subtract(row["now"]["confirm"]["by_seed"], row["best"]["confirm"]["by_seed"])
    assert row["improvement"]["by_seed"] == gains.tolist() and gains.min() > 0 and row["saved"]

    # The new folder has the preset beside the others and the records, and the model is as it was.
    tuned = DiffusionPipeline.from_pretrained(tmp_path / "out" / "pipeline")
    assert type(tuned) is CTMPipeline and set(tuned.scheduler.config.presets) == {"4", "7"}
    assert tuned.scheduler.config.presets["4"] == row["preset"]
    assert (tmp_path / "out" / "pipeline" / "training.json").exists()
    assert before == {path: path.read_bytes() for path in (tmp_path / "model").rglob("*") if path.is_file()}

    assert json.loads((tmp_path / "out" / "tune.json").read_text())["results"] == report["results"]
    text = (tmp_path / "out" / "tune.md").read_text()
    assert "Other seeds: 5, 6" in text and text in capsys.readouterr().out and str(tmp_path) not in text
    with Image.open(tmp_path / "out" / "tune.png") as picture:
        assert np.asarray(picture.convert("L")).std() > 10


def test_what_is_not_better_is_not_saved_unless_forced(model, tmp_path, monkeypatch, capsys):
    class Same:
        """All features are equally near, but on the seed of the search distances fall: the best is one by chance."""

        def __init__(self, reference):
            self.calls = 0

        def __call__(self, features):
            self.calls += 1
            return {"frechet": 1.0 - 0.01 * self.calls if self.calls <= 4 else 0.5}

    monkeypatch.setattr("training.tune.Distances", Same)
    report = main(small(model, tmp_path))
    assert not report["results"][0]["saved"] and not (tmp_path / "out" / "pipeline").exists()
    assert "| no |" in capsys.readouterr().out
    report = main(small(model, tmp_path, force=True))
    assert report["results"][0]["saved"] and not report["results"][0]["improvement"]["better"]
    presets = DiffusionPipeline.from_pretrained(tmp_path / "out" / "pipeline").scheduler.config.presets
    assert presets["4"] == report["results"][0]["preset"] != BAD["4"]


def test_what_a_model_on_the_hub_says_of_its_making_goes_with_it(model, tmp_path, monkeypatch):
    """Its license stands there, too."""

    def download(repo, name):
        if name == "conversion.json":
            raise EntryNotFoundError("none")
        assert repo == "user/name"
        return os.path.join(model, name)

    monkeypatch.setattr("training.tune.load_model", lambda name, gammas: load_model(model, gammas))
    monkeypatch.setattr("training.hub.client.api", lambda: SimpleNamespace(hf_hub_download=download))
    save_with_presets({"2": {"gamma": [0.5, 0.0]}}, small("user/name", tmp_path))
    saved = tmp_path / "out" / "pipeline"
    for name in ("training.json", "NOTICE.md"):
        assert (saved / name).read_bytes() == (tmp_path / "model" / name).read_bytes()
    assert not (saved / "conversion.json").exists()
    assert set(json.loads((saved / "scheduler" / "scheduler_config.json").read_text())["presets"]) == {"2", "4", "7"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": None}, "--model must be a folder or a repository"),
        ({"steps": [1]}, "--steps must be 2 or more, or --first_level true"),
        ({"steps": [0, 2]}, "--steps must be positive"),
        ({"steps": [120], "evaluations": 300}, "--steps 120 is too many to search"),
        ({"gammas": [0.5, 1.5]}, r"--gammas must be in \[0, 1\]"),
        ({"seeds": [0, 3], "confirm_seeds": [3, 4]}, "--confirm_seeds must be other seeds than --seeds"),
        ({"confirm_seeds": [7, 7]}, "--confirm_seeds must be two different seeds"),
        ({"evaluations": 2}, r"--evaluations must be more than --gammas has \(2\)"),
        ({"batch_size": 0}, "--batch_size must be positive"),
        (
            {"model": "runs/a/pipeline", "output_dir": "runs/a"},
            "--output_dir must be another folder, because this would replace --model",
        ),
    ],
)
def test_options_that_do_not_fit(options, message, tmp_path):
    with pytest.raises(UserError, match=message):
        main(small(options.pop("model", "assets/digits-ctm"), tmp_path, **options))
