"""The study trains, measures, goes on where it was cut off, and reads off its curves what they say."""

import json
import math

import pytest
import torch
import yaml

from training import study
from training.config import CTMConfig, UserError
from training.study import StudyConfig, at, read_variants


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
    timing = json.loads((tmp_path / "study" / "timing.json").read_text())["seconds"]
    assert fast[-1]["seconds"] == 4 * timing["fast"][0] > 0
    for name in ("study.json", "study.md", "study.png"):
        assert (tmp_path / "study" / name).stat().st_size > 100
    monkeypatch.setattr(study, "run_program", None)
    monkeypatch.setattr(study.train_ctm, "main", lambda config: pytest.fail("trained again"))
    again = study.main(StudyConfig(**options))
    assert again["curves"] == report["curves"]


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
