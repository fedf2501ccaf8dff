# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""The card of a pipeline, by its records and reports."""

import json
import re

import pytest
from huggingface_hub import ModelCard

from diffusers_ctm import CTMPipeline, CTMScheduler
from training.cli.files import write_files
from training.hub.card import make_card
from training.hub.license import License
from training.hub.publication import draw_samples


def card_of(folder, license=License("mit"), record=None, conversion=None, **files):  # noqa: B008
    """The card of a folder with `files`: JSON objects by path with __ for / and without .json."""
    contents = {f"{name.replace('__', '/')}.json": json.dumps(value).encode() for name, value in files.items()}
    write_files(str(folder), contents)
    return make_card(str(folder), "a/b", license, record or {}, conversion or {})


@pytest.mark.parametrize("teacher", [None, {"name": "t", "license": "mit"}])
def test_a_first_stage_and_its_license_are_named(teacher, tmp_path):
    record = {"teacher": teacher, "first_stage": {"name": "first", "license": "openrail"}}
    card = card_of(tmp_path, record=record)
    assert "started from the weights of `first`, whose license is openrail" in card
    assert ("Distilled from `t`." in card) == (teacher is not None) and "from scratch" not in card


@pytest.mark.parametrize(
    "reference", [None, {"name": "u/bad", "on_hub": True, "revision": "c1", "license": "openrail"}]
)
def test_distilled_guidance_is_said(reference, tmp_path):
    """With its scale and by whom; the weights come from the teacher alone."""
    teacher = {"name": "u/good", "on_hub": True, "license": "mit"}
    record = {"teacher": teacher, "guidance_teacher": reference, "options": {"teacher_guidance_scale": 1.5}}
    card = card_of(tmp_path, License("openrail"), record)
    by = "by itself without class (classifier-free guidance)"
    if reference is not None:
        by = "by [u/bad](https://huggingface.co/u/bad), commit `c1`, whose license is openrail (autoguidance)"
    assert f"The teacher was guided with scale `1.5` {by}.\nThis model has learned that guidance" in card
    assert ModelCard(card).data.to_dict()["base_model"] == "u/good"
    assert "guided" not in card_of(tmp_path, record={"teacher": teacher, "options": {}})


def test_the_objective_and_its_pool_are_said(tmp_path):
    record = {"steps": 9, "images_per_step": 4, "objective": ["regression", "eulerian@6"], "options": {}}
    sentence = "- Objective besides score matching: `regression eulerian@6`"
    assert f"{sentence}.\n" in card_of(tmp_path, record=record)
    record["pool_size"] = 8
    assert f"{sentence}, from a pool of 8 trajectories of the teacher for each image of a step.\n" in card_of(
        tmp_path, record=record
    )
    del record["objective"]
    assert "Objective" not in card_of(tmp_path, record=record)


def test_memorization_attribution_and_the_classes_that_can_be_asked(tmp_path):
    rows = [
        {"name": "1 step", "num_images": 1000, "pixels": {"median": 31.26, "copies": 0.012}},
        {"name": "held-out images", "num_images": 50, "pixels": {"median": 40.0, "copies": 0.0}},
    ]
    record = {"program": "training.train_ctm", "dataset": {"name": "twemoji.parquet"}, "steps": 9, "images_per_step": 4}
    card = card_of(
        tmp_path,
        record=record,
        evaluation__memorization={"results": rows, "num_training_images": 1865},
        unet__config={"num_class_embeds": 3, "sample_size": 16},
        model_index={"null_class": 2, "id2label": {"0": "a", "1": "b"}},
    )
    assert "| Classes | 2 |" in card and "from 0 to 1" in card
    assert "1 step: 31.3, 1.2% of 1,000; held-out images: 40.0, 0.0% of 50." in card and "1,865 training images" in card
    assert "Twitter, Inc and other contributors" in card and "made smaller" in card and "](evaluation/" not in card
    (tmp_path / "evaluation" / "memorization.png").write_bytes(b"0")
    assert "](evaluation/memori" in card_of(tmp_path)
    (tmp_path / "evaluation" / "memorization.json").unlink()
    assert "nearest to" not in card_of(tmp_path)


def test_what_others_wrote_stays_text(tmp_path):
    """A teacher's license, classes and records come from its author, but no line, link or heading of the card."""
    evil = "a`b|c\n---\nlicense: mit\n# Run [this](https://evil.example)\n<script>"
    origin = {"name": evil, "revision": evil, "license": "other", "license_name": evil, "license_link": "javascript:x"}
    record = {
        "program": evil,
        "teacher": origin,
        "guidance_teacher": origin,
        "first_stage": origin,
        "steps": 1,
        "images_per_step": 1,
    }
    record |= {"dataset": {"name": evil, "split": evil}, "versions": {evil: evil}}
    record |= {"options": {evil: evil, "teacher_guidance_scale": evil}, "pool_size": evil}
    record |= {"distance": {"name": evil, evil: evil}, "objective": [evil]}
    license, conversion = License("other", evil, "javascript:x"), {"source": evil, "family": evil}
    card = card_of(tmp_path, license, record, conversion, model_index={"id2label": {"0": evil}})
    assert ModelCard(card).data.to_dict()["license"] == "other"
    body = card.split("\n---\n", 1)[1]
    assert "\n# Run" not in body and "\n---" not in body and "javascript:" not in body
    assert not re.search(r"(?<!\\)(<script|\[this\])", re.sub(r"`[^`\n]*`", "", body))
    for line in body.splitlines():
        if line.startswith("| ") and "---" not in line:
            assert len(re.findall(r"(?<!\\)\|", line)) == 3, line


@pytest.mark.parametrize(
    "link, written", [("https://a.example/x", True), ("LICENSE", True), ("ftp://a", False), ("x) [y](https://z", False)]
)
def test_a_license_links_to_the_web_or_into_the_repository(link, written, tmp_path):
    assert (f"[My terms]({link})" in card_of(tmp_path, License("other", "My terms", link))) == written


@pytest.mark.parametrize("presets", [{}, {"10": {"gamma": 0.2}, "2": {"sigmas": [80.0, 1.0]}}])
def test_presets_are_named(presets, tmp_path):
    card = card_of(tmp_path, scheduler__scheduler_config={"_class_name": "CTMScheduler", "presets": presets})
    assert ("presets" in card) == ("\n- 2, 10 steps have schedules of their own" in card) == bool(presets)


def test_a_null_class_is_not_sampled(make_unet, monkeypatch):
    asked, call = [], CTMPipeline.__call__

    def listening(self, **options):
        asked.append(options["class_labels"])
        return call(self, **options)

    monkeypatch.setattr(CTMPipeline, "__call__", listening)
    draw_samples(CTMPipeline(make_unet(num_class_embeds=3), CTMScheduler(), null_class=2), 4, "x", "cpu")
    assert asked == [[0, 1, 0, 1]]
