# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""The study trains, measures, goes on where it was cut off, and reads its tables off the curves."""

import json
import math

import pytest
import torch
import yaml

from diffusers_ctm import CTMScheduler
from helpers.places import ROOT
from training import study
from training.cli.errors import UserError
from training.studies.curves import judged_at, leaderboard, reached, seconds_until
from training.study import StudyConfig, read_variants
from training.train_ctm import CTMConfig


@pytest.fixture
def variants(tmp_path):
    base = {
        "teacher": "assets/digits-edm",
        "dataset_name": "digits",
        "label_column": "label",
        "num_train_timesteps": 5,
        "train_batch_size": 4,
        "report_to": "none",
        "sample_every": 0,
        "checkpointing_steps": 1000,
        "max_train_steps": 4,
    }
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    variants = {"soft": None, "pool": {"pool_size": 1, "pool_refresh": 2}}
    content = {"base": str(tmp_path / "base.yaml"), "common": {"learning_rate": 1e-3}, "variants": variants}
    (tmp_path / "variants.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return str(tmp_path / "variants.yaml")


def test_options_of_variants_are_read_as_by_the_program(tmp_path):
    base, path = tmp_path / "base.yaml", tmp_path / "variants.yaml"
    base.write_text("teacher: assets/digits-edm\nlearning_rate: 1e-3\nmixed_precision: no\ndropout: null\n")
    path.write_text(f"base: {base}\ncommon: {{adam_epsilon: 1e-7}}\nvariants:\n  1: {{learning_rate: 2e-3}}\n")
    read = {"teacher": "assets/digits-edm", "learning_rate": 2e-3, "mixed_precision": "no", "dropout": None}
    assert read_variants(str(path)) == {"1": {**read, "adam_epsilon": 1e-7}}
    path.write_text(f"base: {base}\nvariants: {{one: {{learning_rate: high}}}}\n")
    with pytest.raises(UserError, match="variants.yaml, one: .*--learning_rate.* invalid float value: 'high'"):
        read_variants(str(path))


def options_of(variants, tmp_path, **more):
    options = {"variants": variants, "output_dir": str(tmp_path / "study"), "seeds": [0], "num_samples": 80}
    options |= {"eval_every": 2, "eval_steps": [1, 2], "timing_steps": 2, "timing_rounds": 1, "paired_samples": 8}
    return options | {"features": ["digits"], "threads": torch.get_num_threads()} | more


def test_runs_are_measured_compared_and_not_repeated(variants, tmp_path, monkeypatch):
    options = options_of(variants, tmp_path)
    report = study.main(StudyConfig(only=["soft"], **options))
    assert list(report["curves"]) == ["soft"]
    report = study.main(StudyConfig(**options))
    soft, pool = (report["curves"][name][0]["points"] for name in ("soft", "pool"))
    assert [point["iteration"] for point in soft] == [2, 4] and set(soft[0]["judged"]) == {"1", "2"}
    assert set(soft[0]["judged"]["1"]) == {"frechet", "paired"}
    # One trajectory of Heun's on five levels for each of four images, filled once and refreshed after two steps.
    assert [point["teacher_evaluations"] for point in pool] == [4 * 8, 2 * 4 * 8]
    row = report["table"]["rows"]["pool"]
    assert row["at_the_end"]["1"]["frechet"]["mean"] == pytest.approx(pool[-1]["judged"]["1"]["frechet"])
    assert report["table"]["target"] == soft[-1]["judged"]["1"]["frechet"]
    (timing,) = json.loads((tmp_path / "study" / "timing.json").read_text())["phases"]["soft"]
    assert soft[-1]["seconds"] == 4 * timing["seconds"][0] > 0
    for name in ("study.json", "study.md", "study.png"):
        assert (tmp_path / "study" / name).stat().st_size > 100
    assert "- pool: `--pool_size 1 --pool_refresh 2`" in (tmp_path / "study" / "study.md").read_text()
    monkeypatch.setattr(study.train_ctm, "main", lambda *_, **__: pytest.fail("trained again"))
    assert study.main(StudyConfig(**options))["curves"] == report["curves"]


def test_a_run_that_was_cut_off_goes_on_to_the_same_curve(variants, tmp_path, monkeypatch):
    whole = study.main(StudyConfig(only=["soft"], **options_of(variants, tmp_path)))["curves"]["soft"]
    measure = study.Measure.__call__

    def cut_off(self, pipe):
        if (tmp_path / "cut" / "soft-seed0" / "curve.json").exists():
            raise KeyboardInterrupt  # as the second point is measured, after its checkpoint was saved
        return measure(self, pipe)

    options = options_of(variants, tmp_path, output_dir=str(tmp_path / "cut"))
    monkeypatch.setattr(study.Measure, "__call__", cut_off)
    with pytest.raises(KeyboardInterrupt):
        study.main(StudyConfig(only=["soft"], **options))
    monkeypatch.setattr(study.Measure, "__call__", measure)
    points = study.main(StudyConfig(only=["soft"], **options))["curves"]["soft"][0]["points"]
    for point, expected in zip(points, whole[0]["points"], strict=True):
        assert {**point, "seconds": 0} == {**expected, "seconds": 0}


def test_timed_iterations_are_like_the_runs(variants):
    """They ask the teacher as often on average, and each part of a run is timed apart."""
    config = StudyConfig(seeds=[0, 1], timing_steps=4)
    soft = {**read_variants(variants)["soft"], "objective": ["ctm"], "max_train_steps": 50}
    judge = {"discriminator_weight": 1.0, "discriminator_backbones": ["digits"], "discriminator_start": 20}

    def evaluations(options, first, last):
        return study.teacher_evaluations(CTMConfig(**options), CTMScheduler(), first, last) / (last - first)

    wanted = sum(evaluations({**soft, "seed": seed}, 0, 50) for seed in (0, 1)) / 2
    (whole,) = study.phases(config, soft)
    assert evaluations(whole["options"], whole["warm"], whole["until"]) == pytest.approx(wanted, rel=0.05)
    before, after = study.phases(config, {**soft, **judge})
    assert (before["iterations"], after["iterations"]) == (20, 30)
    assert evaluations(before["options"], before["warm"], before["until"]) == pytest.approx(wanted, rel=0.05)
    # Every other turn of the adversarial stage asks no teacher.
    assert evaluations(after["options"], after["warm"], after["until"]) == pytest.approx(wanted / 2, rel=0.15)

    before["seconds"], after["seconds"] = [1.0, 3.0, 2.0], [8.0, 10.0, 9.0]
    assert [seconds_until(n, [before, after]) for n in (10, 20, 40)] == [20, 40, 220]


def test_filling_a_pool_and_each_objective_are_timed_apart(variants):
    """Between two refreshes a pool asks no teacher: the timed iterations hold a whole number of them."""
    options = read_variants(variants)["soft"] | {"max_train_steps": 50, "pool_size": 3, "pool_refresh": 5}
    options |= {"objective": ["regression", "eulerian@30"], "eulerian_warmup": 0.5}
    fill, steady, late = study.phases(StudyConfig(timing_steps=4), options)
    assert [part["iterations"] for part in (fill, steady, late)] == [3, 27, 20]
    assert (fill["warm"], fill["until"]) == (1, 3) and fill["options"]["objective"] == ["regression"]
    assert steady["warm"] >= 3 and steady["until"] - steady["warm"] == 5
    assert late["options"]["objective"] == ["eulerian"] and "pool_size" not in late["options"]
    assert "eulerian_warmup" not in steady["options"] and late["options"]["eulerian_warmup"] == 0.5
    for part in (fill, steady, late):
        CTMConfig(**part["options"])  # nothing that it would refuse


def points_of(*distances, seconds=1.0, evaluations=100):
    return [
        {
            "iteration": 10 * n,
            "seconds": seconds * n,
            "teacher_evaluations": evaluations * n,
            "judged": {"1": {"frechet": distance, "paired": 2 * distance}},
        }
        for n, distance in enumerate(distances, 1)
    ]


def test_the_leaderboard_says_when_each_comes_to_the_first_ones_end():
    curves = {
        "ctm": [points_of(8.0, 4.0, 2.0), points_of(8.0, 4.0, 2.0)],
        "fast": [points_of(4.0, 1.0, 0.5, seconds=0.2, evaluations=10), points_of(2.0, 1.0, 0.5, seconds=0.2)],
        "never": [points_of(8.0, 2.5, 2.1), points_of(8.0, 1.0)],
    }
    table = leaderboard(curves, [1], ["frechet", "paired"])
    assert table["target"] == 2 and table["seconds"] == 3
    fast = table["rows"]["fast"]
    # The first run crosses 2 in the middle of its second stretch, in the logarithm; the other begins there.
    assert fast["target"]["iteration"]["by_seed"] == pytest.approx([15, 10])
    assert fast["share_of_seconds"]["by_seed"] == pytest.approx([0.1, 0.2 / 3])
    assert fast["share_of_evaluations"]["by_seed"] == pytest.approx([0.05, 1 / 3])
    assert fast["at_target"]["1"]["paired"]["by_seed"] == pytest.approx([4, 4])
    assert table["rows"]["ctm"]["at_a_third"]["1"]["frechet"]["mean"] == pytest.approx(8)
    assert table["rows"]["never"]["at_target"] is None and table["rows"]["never"]["target"]["seconds"] is None
    assert table["rows"]["ctm"]["share_of_seconds"]["mean"] == pytest.approx(1)


def test_reading_between_measurements():
    points = points_of(8.0, 2.0, 1.0)
    assert judged_at(points, "seconds", 1.5, "1", "frechet") == pytest.approx(math.sqrt(16))
    assert judged_at(points, "seconds", 1.0, "1", "paired") == pytest.approx(16)
    assert judged_at(points, "seconds", 3.0, "1", "frechet") == pytest.approx(1)
    assert (
        judged_at(points, "seconds", 0.5, "1", "frechet") is None is judged_at(points, "seconds", 3.1, "1", "frechet")
    )
    assert reached(points, 4.0, "1", "frechet")["seconds"] == pytest.approx(1.5)
    assert reached(points, 9.0, "1", "frechet")["seconds"] == 1 and reached(points, 0.9, "1", "frechet") is None


def test_the_shipped_study_has_the_shipped_variants():
    """`make study` repeats them."""
    variants = read_variants(StudyConfig().variants)
    assert variants["ctm"]["learning_rate"] == 1e-3 and variants["regression, l2"]["distance"] == "l2"
    report = json.loads((ROOT / "assets" / "study" / "study.json").read_text())
    assert report["curves"].keys() == variants.keys()
    for name, options in variants.items():
        ran = [{**curve["options"], "output_dir": options["output_dir"]} for curve in report["curves"][name]]
        assert ran == [{**options, "seed": seed} for seed in range(len(ran))], name
    same = ("eval_every", "eval_steps", "num_samples", "features", "paired_samples", "variants")
    assert all(report["options"][name] == getattr(StudyConfig(), name) for name in same)


def test_clear_errors(variants, tmp_path):
    with pytest.raises(UserError, match="--only none is no variant"):
        study.main(StudyConfig(variants=variants, output_dir=str(tmp_path / "s"), only=["none"]))
    bad = {"base": str(tmp_path / "base.yaml"), "variants": {"x": {"matching": "hard"}}}
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump(bad))
    with pytest.raises(UserError, match="bad.yaml, x: .*--matching"):
        read_variants(str(tmp_path / "bad.yaml"))
    with pytest.raises(UserError, match="must be a YAML file"):
        read_variants(str(tmp_path / "missing.yaml"))
