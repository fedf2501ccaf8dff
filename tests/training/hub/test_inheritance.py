# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Which license weights inherit, and what their records say and do not say."""

import json

import pytest

from training.cli.errors import UserError
from training.cli.names import public_name
from training.hub.inheritance import choose_license
from training.hub.license import License
from training.hub.record import changed_options, origin_record, training_record
from training.train_ctm import CTMConfig


NC = "cc-by-nc-sa-4.0"


@pytest.mark.parametrize(
    "inherited, wanted, allowed",
    [
        (NC, NC, True), (NC, "mit", False), (NC, "cc-by-nc-4.0", False), ("mit", "apache-2.0", True), ("mit", NC, True),
        ("cc-by-sa-4.0", "mit", False), ("openrail", "mit", False), ("other", "mit", False), (None, "mit", True),
        ("other", "other", True),
    ],
)  # fmt: skip
def test_a_license_is_inherited(inherited, wanted, allowed):
    for record, conversion, who in (
        ({"teacher": {"name": "t", "license": inherited}}, {}, "its teacher t has that"),
        ({"first_stage": {"name": "f", "license": inherited}, "license": "mit"}, {}, "its first stage f has that"),
        ({"guidance_teacher": {"name": "g", "license": inherited}}, {}, "its guidance teacher g has that"),
        ({}, {"source": "net.pkl", "license": inherited}, "its original net.pkl has that"),
    ):
        if allowed:
            assert choose_license(record, conversion, License(wanted)) == License(wanted)
        else:
            with pytest.raises(UserError, match=f"{wanted} contradicts {inherited}.*{who}"):
                choose_license(record, conversion, License(wanted))


def test_one_other_license_is_not_another():
    record = {"teacher": {"name": "t", "license": "other", "license_name": "theirs", "license_link": "https://a.b"}}
    for wanted in (License("other"), License("other", "theirs", "https://a.b")):
        assert choose_license(record, {}, wanted) == wanted
    with pytest.raises(UserError, match=r"other \(ours\) contradicts other \(theirs\)"):
        choose_license(record, {}, License("other", "ours"))


@pytest.mark.parametrize(
    "record, conversion, card, expected",
    [
        ({"license": "mit", "teacher": {"name": "t", "license": NC}}, {}, "", NC),  # whatever the run called it
        ({"license": NC, "teacher": {"name": "t", "license": "mit"}}, {}, "", NC),
        ({"license": "mit", "teacher": {"name": "t", "license": "apache-2.0"}}, {}, "", "mit"),
        ({"license": "mit", "teacher": None, "first_stage": {"name": "f", "license": NC}}, {}, "", NC),
        ({"teacher": {"name": "t"}}, {"license": NC}, "mit", NC),
        ({"teacher": None}, {}, "openrail", "openrail"),
        ({}, {"license": None}, "unknown", None),
        ({"license": NC}, {}, "[no yaml", NC),
        ({"license": "mit", "teacher": "t", "first_stage": [NC]}, {}, "mit", "mit"),
    ],
)
def test_a_student_of_a_student_inherits_from_both(record, conversion, card, expected, tmp_path):
    (tmp_path / "training.json").write_text(json.dumps(record))
    (tmp_path / "conversion.json").write_text(json.dumps(conversion))
    if card:
        (tmp_path / "README.md").write_text(f"---\nlicense: {card}\n---\nA card.\n")
    origin = origin_record(str(tmp_path))
    assert (origin.get("license"), origin["name"], origin["on_hub"]) == (expected, tmp_path.name, False)
    options = CTMConfig(output_dir="r", init_from=str(tmp_path), teacher="t")
    run = training_record(options, 1, str(tmp_path))
    assert run["first_stage"] == origin and run.get("license") == expected
    assert "init_from" not in run["options"] and training_record(options, 1)["first_stage"] is None


def test_names_that_may_be_published(tmp_path):
    for path, name in {
        "user/name": "user/name",
        str(tmp_path / "run" / "pipeline"): "run",
        str(tmp_path / "run" / "checkpoint-20"): "run",
        "checkpoint-20": "checkpoint-20",
        "/a/b/images.parquet": "images.parquet",
    }.items():
        assert public_name(path) == name
    options = CTMConfig(
        teacher="t", dataset_name=str(tmp_path), output_dir="/secret/place", learning_rate=1.0, hub_model_id="a/b",
        discriminator_weight=1.0, discriminator_backbones=["/secret/features", "user/name"],
    )  # fmt: skip
    expected = {"dataset_name": tmp_path.name, "learning_rate": 1.0, "pool_size": 8}
    expected |= {"discriminator_weight": 1.0, "discriminator_backbones": ["features", "user/name"]}
    assert changed_options(options) == expected
