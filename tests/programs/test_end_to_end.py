# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""The README's commands in a row, against a Hub on loopback: publish, distill by name, push, evaluate."""

import json
import os
import subprocess
import sys

import pytest
import torch
from diffusers import UNet2DModel

from diffusers_ctm import CTMPipeline, EDMHeunScheduler
from helpers.loopback_hub import LoopbackHub, Repo
from helpers.places import ROOT
from helpers.tiny_networks import TINY
from training.data.sources import digits


@pytest.mark.slow
def test_from_a_published_teacher_to_an_evaluated_student(tmp_path):
    torch.manual_seed(0)
    unet = UNet2DModel(**{**TINY, "in_channels": 1, "out_channels": 1, "num_class_embeds": 10})
    names = {number: str(number) for number in range(10)}
    CTMPipeline(unet, EDMHeunScheduler(sigma_data=0.75), id2label=names).save_pretrained(str(tmp_path / "teacher"))
    images = digits().select(range(200)).rename_columns({"image": "scan", "label": "digit"})
    images.to_parquet(tmp_path / "images.parquet")
    with LoopbackHub() as hub:
        hub.repos["datasets/team/scans"] = Repo()
        hub.repos["datasets/team/scans"].commit({"data/train.parquet": (tmp_path / "images.parquet").read_bytes()})
        environment = hub.environment(tmp_path / "home") | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}

        def command(*arguments):
            done = subprocess.run(
                [sys.executable, "-m", *map(str, arguments)], cwd=ROOT, env=environment, capture_output=True, text=True
            )
            assert done.returncode == 0, done.stderr[-3000:]
            return done.stdout

        command("training.publish", tmp_path / "teacher", "team/teacher", "--license", "cc-by-nc-sa-4.0")
        data = ["--dataset_name", "team/scans", "--image_column", "scan", "--label_column", "digit"]
        options = ["--teacher", "team/teacher", *data, "--max_train_steps", 2, "--train_batch_size", 4]
        options += ["--checkpointing_steps", 1, "--sample_every", 0, "--output_dir", tmp_path / "run"]
        launcher = ["accelerate.commands.launch", "--cpu", "--num_processes", 1, "-m", "training.train_ctm"]
        command(*launcher, *options, "--push_to_hub", "--hub_model_id", "team/student")
        files = hub.repos["models/team/student"].files
        assert "unet/diffusion_pytorch_model.safetensors" in files and not any("checkpoint" in path for path in files)
        card = files["README.md"].decode()
        assert "license: cc-by-nc-sa-4.0" in card and "base_model: team/teacher" in card

        evaluation = [*data, "--num_samples", 80, "--seeds", 0, "--kid", "false"]
        evaluation += ["--steps", 1, "--gammas", 0, "--teacher_steps", 2, "--paired_samples", 10]
        evaluation += ["--output_dir", tmp_path / "evaluation"]
        command("training.evaluate", "--model", "team/student", "--teacher", "team/teacher", *evaluation)
    report = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())
    assert {row["sampler"] for row in report["results"]} == {"ctm", "heun"}
    assert report["reference"]["dataset_name"] == "team/scans" and report["reference"]["num_images"] == 200
    assert os.path.getsize(tmp_path / "evaluation" / "evaluation.png") > 5000
