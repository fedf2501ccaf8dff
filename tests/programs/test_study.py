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
from training.studies.curves import at, seconds_per_iteration, seconds_until, tabulate
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
    }
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    variants = {"soft": None, "fast": {"solver": "dpm"}}
    content = {"base": str(tmp_path / "base.yaml"), "common": {"learning_rate": 1e-3}, "variants": variants}
    (tmp_path / "variants.yaml").write_text(yaml.safe_dump(content))
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


def test_runs_are_measured_compared_and_not_repeated(variants, tmp_path, monkeypatch):
    options = {"variants": variants, "output_dir": str(tmp_path / "study"), "seeds": [0], "num_samples": 80}
    options |= {"max_train_steps": 4, "eval_every": 2, "eval_steps": [1, 2], "timing_steps": 2, "timing_rounds": 1}
    options |= {"threads": torch.get_num_threads()}
    report = study.main(StudyConfig(only=["soft"], **options))
    assert list(report["curves"]) == ["soft"]
    report = study.main(StudyConfig(**options))
    soft, fast = (report["curves"][name][0]["points"] for name in ("soft", "fast"))
    assert [point["iteration"] for point in soft] == [2, 4] and set(soft[0]["frechet"]) == {"1", "2"}
    assert soft[-1]["teacher_evaluations"] == 2 * fast[-1]["teacher_evaluations"] > 0  # the same times
    row = report["table"]["rows"]["fast"]
    assert row["iteration"]["1"]["mean"] == fast[-1]["frechet"]["1"]
    (timing,) = json.loads((tmp_path / "study" / "timing.json").read_text())["phases"]["fast"]
    assert fast[-1]["seconds"] == 4 * timing["seconds"][0] > 0
    for name in ("study.json", "study.md", "study.png"):
        assert (tmp_path / "study" / name).stat().st_size > 100
    monkeypatch.setattr(study.train_ctm, "main", lambda config: pytest.fail("trained again"))
    assert study.main(StudyConfig(**options))["curves"] == report["curves"]


def test_timed_iterations_are_like_the_runs(variants):
    """They ask the teacher as often on average, and the parts before and in the adversarial stage are timed apart."""
    config = StudyConfig(seeds=[0, 1], max_train_steps=50, eval_every=50, timing_steps=4)
    soft = read_variants(variants)["soft"]
    judge = {"discriminator_weight": 1.0, "discriminator_backbones": ["digits"], "discriminator_start": 20}

    def evaluations(options, first, last):
        return study.teacher_evaluations(CTMConfig(**options), CTMScheduler(), first, last) / (last - first)

    wanted = sum(evaluations({**soft, "seed": seed}, 0, 50) for seed in (0, 1)) / 2
    (whole,) = study.phases(config, soft)
    assert evaluations(whole["options"], 4, 8) == pytest.approx(wanted, rel=0.05)
    before, after = study.phases(config, {**soft, **judge})
    assert (before["iterations"], after["iterations"]) == (20, 30)
    assert evaluations(before["options"], 4, 8) == pytest.approx(wanted, rel=0.05)
    # Every other turn of the adversarial stage asks no teacher.
    assert evaluations(after["options"], 4, 8) == pytest.approx(wanted / 2, rel=0.15)

    before["seconds"], after["seconds"] = [1.0, 3.0, 2.0], [8.0, 10.0, 9.0]
    assert [seconds_until(n, [before, after]) for n in (10, 20, 40)] == [20, 40, 220]
    assert seconds_per_iteration([before, after]) == pytest.approx([5.2, 7.2, 6.2])


def curve(evaluations, *distances):
    points = [
        {"iteration": 10 * n, "seconds": 1.0 * n, "teacher_evaluations": evaluations * n, "frechet": {"1": distance}}
        for n, distance in enumerate(distances, 1)
    ]
    return {"options": {"train_batch_size": 1}, "points": points}


def test_a_variant_stands_beside_the_first_at_as_many_teacher_evaluations():
    """Each as far as both go: neither at the least that any variant reaches, nor at the same iteration."""
    curves = {
        "soft": [curve(100, 8.0, 4.0, 2.0)],
        "few": [curve(25, 9.0, 7.0, 5.0)],
        "more": [curve(50, 9.0, 6.0, 3.0)],
        "most": [curve(200, 7.0, 1.75, 1.0)],
    }
    table = tabulate(curves, {name: [0.1] for name in curves}, [1])
    pairs = {name: row["beside_first"] for name, row in table["rows"].items()}
    assert {name: pair["value"] for name, pair in pairs.items()} == {"soft": 300, "few": 75, "more": 150, "most": 300}
    means = {name: [each and each["mean"] for each in pair["distances"]["1"]] for name, pair in pairs.items()}
    assert means["more"] == pytest.approx([3, math.sqrt(32)]) and means["most"] == pytest.approx([3.5, 2])
    assert means["few"] == [pytest.approx(5), None]  # soft is first measured after that
    report = {"options": vars(StudyConfig(eval_steps=[1])), "hardware": {"device": "cpu"}}
    lines = study.markdown(table, report).splitlines()
    assert "| few | 75 | 5 | - |" in lines and not any(line.startswith("| soft | 75") for line in lines)


def test_reading_between_measurements():
    points = curve(1, 8.0, 2.0, 1.0)["points"]
    assert at(points, "seconds", 1.5, "1") == pytest.approx(math.sqrt(16))
    assert at(points, "seconds", 1.0, "1") == pytest.approx(8) and at(points, "seconds", 3.0, "1") == pytest.approx(1)
    assert at(points, "seconds", 0.5, "1") is None and at(points, "seconds", 3.1, "1") is None


def test_the_shipped_study_has_the_shipped_variants():
    """`make study` repeats them. The report says which of its other rows have options that were removed."""
    variants = read_variants("training/configs/study_digits_variants.yaml")
    assert variants["soft"]["learning_rate"] == 1e-3 and variants["local"]["matching"] == "local"
    curves = json.loads((ROOT / "assets" / "study" / "study.json").read_text())["curves"]
    for name, options in variants.items():
        assert [curve["options"] for curve in curves.pop(name)] == [{**options, "seed": seed} for seed in (0, 1, 2)]
    lines = (ROOT / "assets" / "study" / "study.md").read_text().splitlines()
    (removed,) = (line for line in lines if line.startswith("- Tried and removed: "))
    assert removed.partition(". ")[0] == "- Tried and removed: " + "; ".join(f"'{name}'" for name in curves)


def test_clear_errors(variants, tmp_path):
    with pytest.raises(UserError, match="--only none is no variant"):
        study.main(StudyConfig(variants=variants, output_dir=str(tmp_path / "s"), only=["none"]))
    bad = {"base": str(tmp_path / "base.yaml"), "variants": {"x": {"matching": "hard"}}}
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump(bad))
    with pytest.raises(UserError, match="bad.yaml, x: .*--matching"):
        read_variants(str(tmp_path / "bad.yaml"))
    with pytest.raises(UserError, match="must be a YAML file"):
        read_variants(str(tmp_path / "missing.yaml"))
    with pytest.raises(UserError, match="--eval_every must be a divisor"):
        StudyConfig(max_train_steps=10, eval_every=3)
