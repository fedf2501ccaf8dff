"""The study trains, measures, goes on where it was cut off, and reads off its curves what they say."""

import json
import math

import pytest
import torch
import yaml

from diffusers_ctm import CTMScheduler
from training import study
from training.cli.errors import UserError
from training.studies.curves import at
from training.study import StudyConfig, read_variants
from training.train_ctm import CTMConfig


@pytest.fixture
def variants(tmp_path):
    base = {
        "teacher": "assets/digits-edm", "dataset_name": "digits", "label_column": "label", "num_train_timesteps": 5, "train_batch_size": 4,
        "report_to": "none", "sample_every": 0, "checkpointing_steps": 1000,
    }  # fmt: skip
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    content = {"base": str(tmp_path / "base.yaml"), "common": {"learning_rate": 1e-3}, "variants": {"soft": None, "fast": {"solver": "dpm"}}}  # fmt: skip
    (tmp_path / "variants.yaml").write_text(yaml.safe_dump(content))
    return str(tmp_path / "variants.yaml")


def test_runs_are_measured_compared_and_not_repeated(variants, tmp_path, monkeypatch):
    options = {"variants": variants, "output_dir": str(tmp_path / "study"), "seeds": [0], "num_samples": 80}
    options |= {
        "max_train_steps": 4,
        "eval_every": 2,
        "eval_steps": [1, 2],
        "threads": torch.get_num_threads(),
        "timing_steps": 2,
        "timing_rounds": 1,
    }
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
    monkeypatch.setattr(study, "run_program", None)
    monkeypatch.setattr(study.train_ctm, "main", lambda config: pytest.fail("trained again"))
    again = study.main(StudyConfig(**options))
    assert again["curves"] == report["curves"]


def test_what_is_timed_is_like_the_runs(variants):
    """Their number of teacher evaluations in the mean, and both parts of a run in which the adversarial stage begins."""
    config = StudyConfig(seeds=[0, 1], max_train_steps=50, eval_every=50, timing_steps=4)
    soft = {**read_variants(variants)["soft"], "solver_steps_per": "batch"}
    judge = {"discriminator_weight": 1.0, "discriminator_backbones": ["digits"], "discriminator_start": 20}

    def evaluations(options, first, last):
        return study.teacher_evaluations(CTMConfig(**options), CTMScheduler(), first, last) / (last - first)

    wanted = sum(evaluations({**soft, "seed": seed}, 0, 50) for seed in (0, 1)) / 2
    (whole,) = study.phases(config, soft)
    assert evaluations(whole["options"], 4, 8) == pytest.approx(wanted, rel=0.05)
    before, after = study.phases(config, {**soft, **judge})
    assert (before["iterations"], after["iterations"]) == (20, 30)
    assert evaluations(before["options"], 4, 8) == pytest.approx(wanted, rel=0.05)
    assert evaluations(after["options"], 4, 8) == pytest.approx(
        wanted / 2, rel=0.15
    )  # every other turn asks no teacher

    before["seconds"], after["seconds"] = [1.0, 3.0, 2.0], [8.0, 10.0, 9.0]
    assert [study.seconds_until(n, [before, after]) for n in (10, 20, 40)] == [20, 40, 220]
    assert study.seconds_per_iteration([before, after]) == pytest.approx([5.2, 7.2, 6.2])


def test_a_variant_stands_beside_the_first_at_as_many_teacher_evaluations():
    """Each as far as both go: neither at the least that any variant reaches, nor at the same iteration."""

    def curve(evaluations, *distances):
        points = [
            {
                "iteration": 10 * n,
                "seconds": 1.0 * n,
                "teacher_evaluations": evaluations * n,
                "frechet": {"1": distance},
            }
            for n, distance in enumerate(distances, 1)
        ]
        return {"options": {"train_batch_size": 1}, "points": points}

    curves = {
        "soft": [curve(100, 8.0, 4.0, 2.0)],
        "few": [curve(25, 9.0, 7.0, 5.0)],
        "more": [curve(50, 9.0, 6.0, 3.0)],
        "most": [curve(200, 7.0, 1.75, 1.0)],
    }
    config = StudyConfig(eval_steps=[1])
    rows = study.tabulate(curves, {name: [0.1] for name in curves}, config)["rows"]
    pairs = {name: (row["beside_first"]["value"], *row["beside_first"]["distances"]["1"]) for name, row in rows.items()}
    assert pairs["more"][0] == 150 and pairs["few"][0] == 75
    assert pairs["more"][1]["mean"] == pytest.approx(3) and pairs["more"][2]["mean"] == pytest.approx(math.sqrt(32))
    assert pairs["most"][0] == 300 and [pair["mean"] for pair in pairs["most"][1:]] == pytest.approx([3.5, 2])
    assert pairs["few"][1]["mean"] == pytest.approx(5) and pairs["few"][2] is None  # first measured after that
    table = {"common": {"iteration": 30, "seconds": 3.0}, "rows": rows}
    lines = study.markdown(table, config, {"hardware": {"device": "cpu"}}).splitlines()
    assert "| few | 75 | 5 | - |" in lines and not any(line.startswith("| soft | 75") for line in lines)


def test_the_shipped_study_is_that_of_the_shipped_variants():
    """`make study` repeats what assets/study and the README show."""
    variants = read_variants("training/configs/study_digits_variants.yaml")
    with open("assets/study/study.json") as file:
        curves = json.load(file)["curves"]
    for name, options in variants.items():
        assert [curve["options"] for curve in curves.pop(name)] == [{**options, "seed": seed} for seed in (0, 1, 2)]
    assert not curves


def test_reading_between_measurements():
    points = [{"seconds": float(s), "frechet": {"1": d}} for s, d in ((1, 8.0), (3, 2.0), (4, 1.0))]
    assert at(points, "seconds", 2.0, "1") == pytest.approx(math.sqrt(16))
    assert at(points, "seconds", 1.0, "1") == pytest.approx(8) and at(points, "seconds", 4.0, "1") == pytest.approx(1)
    assert at(points, "seconds", 0.5, "1") is None and at(points, "seconds", 4.1, "1") is None


def test_shipped_variants_are_options_of_the_program():
    found = read_variants("training/configs/study_digits_variants.yaml")
    assert found["soft"]["learning_rate"] == 1e-3 and found["local"]["matching"] == "local"
    assert all(CTMConfig(**options).train_batch_size == 32 for options in found.values())


def test_clear_errors(variants, tmp_path):
    with pytest.raises(UserError, match="--only none is no variant"):
        study.main(StudyConfig(variants=variants, output_dir=str(tmp_path / "s"), only=["none"]))
    (tmp_path / "bad.yaml").write_text(
        yaml.safe_dump({"base": str(tmp_path / "base.yaml"), "variants": {"x": {"matching": "hard"}}})
    )
    with pytest.raises(UserError, match="bad.yaml, x: --matching"):
        read_variants(str(tmp_path / "bad.yaml"))
    with pytest.raises(UserError, match="must be a YAML file"):
        read_variants(str(tmp_path / "missing.yaml"))
    with pytest.raises(UserError, match="--eval_every must be a divisor"):
        StudyConfig(max_train_steps=10, eval_every=3)
