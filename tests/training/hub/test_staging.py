# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Which files of a folder are uploaded, also of a folder from someone else."""

import json
import shutil

import pytest

from helpers.places import ROOT
from training.cli.errors import UserError
from training.cli.files import write_files
from training.hub.client import files_below
from training.hub.staging import stage


def test_the_embedded_pipelines_are_staged_whole(tmp_path):
    assert stage(str(ROOT / "assets" / "digits-ctm"), str(tmp_path)) == []
    assert "_name_or_path" not in json.loads((tmp_path / "unet" / "config.json").read_text())
    assert (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").exists()
    assert stage(str(ROOT / "assets" / "emoji-ctm"), str(tmp_path / "emoji")) == []
    assert "Twitter, Inc" in (tmp_path / "emoji" / "NOTICE.md").read_text()  # attribution goes along


@pytest.mark.parametrize("part", ["../other", "/etc", "a b", ""])
def test_parts_of_a_pipeline_lie_in_its_folder(part, tmp_path):
    """A folder of someone else may name others in its index."""
    index = json.dumps({part: ["diffusers", "UNet2DModel"]}).encode()
    write_files(str(tmp_path), {"pipeline/model_index.json": index, "other/config.json": b"{}"})
    with pytest.raises(UserError, match="no folders in it"):
        stage(str(tmp_path / "pipeline"), str(tmp_path / "target"))
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize(
    "name", ["NOTICE.md", "training.json", "scheduler/scheduler_config.json", "evaluation/gammas.png"]
)
def test_a_link_out_of_the_folder_is_not_followed(name, tmp_path):
    """As in a folder that was unpacked or cloned; links of the Hub's cache are its way to keep files."""
    folder, index = tmp_path / "pipe", b'{"scheduler": ["diffusers", "DDPMScheduler"]}'
    write_files(
        str(tmp_path), {"pipe/model_index.json": index, f"pipe/{name}": b"", "id_rsa": b"{}", "blobs/5f": b"{}"}
    )
    (folder / name).unlink()
    (folder / name).symlink_to(tmp_path / "id_rsa")
    with pytest.raises(UserError, match="is a link to .*id_rsa"):
        stage(str(folder), str(tmp_path / "refused"))
    (folder / name).unlink()
    (folder / name).symlink_to(tmp_path / "blobs" / "5f")
    stage(str(folder), str(tmp_path / "staged"))
    assert (tmp_path / "staged" / name).exists() and not (tmp_path / "refused" / name).exists()


def test_only_config_and_weights_of_a_component_are_staged(tmp_path):
    """Code is not, unless this program has just written it."""
    folder = tmp_path / "pipeline"
    shutil.copytree(ROOT / "assets" / "digits-edm", folder, ignore=shutil.ignore_patterns("*.png", "*.md"))
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"safety_checker": ["diffusers", "Some"], "feature_extractor": ["transformers", "Other"]}
    wanted = {
        "unet/diffusion_pytorch_model.fp16.safetensors", "safety_checker/model.safetensors",
        "safety_checker/config.json", "feature_extractor/preprocessor_config.json",
    }  # fmt: skip
    code = {"pipeline.py", "unet/diffusers_ctm.py"}
    unwanted = {"unet/notes.json", "unet/other.py", "other.py"}
    files = dict.fromkeys(wanted | code | unwanted, b"{}")
    write_files(str(folder), {**files, "model_index.json": json.dumps(index).encode()})
    before = {path for path in files_below(str(folder)) if not path.endswith(".md")} - code - unwanted
    for with_code in (False, True):
        target = str(tmp_path / f"target{with_code}")
        assert stage(str(folder), target, with_code=with_code) == sorted(unwanted)
        assert set(files_below(target)) == (before | code if with_code else before)
