# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Digests of what the programs make, to see that a change changes nothing: `python tests/digests.py > before.json`.

Run it before and after the change, on the same machine, and compare the two files. It takes about two minutes.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

import diffusers_ctm  # noqa: F401
from helpers.places import ORACLE, ROOT


ALONE = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
QUIET = ["--checkpointing_steps", "0", "--sample_every", "0", "--report_to", "none"]
HEADS = {"ctm_adm64_cond": ["--num_head_channels", "16"]}


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def run(program: str, *arguments: str) -> None:
    command = [sys.executable, "-m", f"training.{program}", *arguments]
    subprocess.run(command, cwd=ROOT, env=os.environ | ALONE, check=True, stdout=subprocess.DEVNULL)


def trained(program: str, config: str, steps: int, folder: str) -> str:
    """Digest of the weights after some iterations on one thread."""
    path = f"training/configs/{config}.yaml"
    run(program, "--config", path, "--max_train_steps", str(steps), "--output_dir", folder, *QUIET)
    return digest(Path(folder, "pipeline/unet/diffusion_pytorch_model.safetensors").read_bytes())


def samples(name: str) -> dict[str, str]:
    """Digests of samples by steps and gamma."""
    pipe = DiffusionPipeline.from_pretrained(str(ROOT / "assets" / name))
    pipe.set_progress_bar_config(disable=True)
    result = {}
    for steps in (1, 4):
        for gamma in (0.0, 0.5, 1.0):
            options = {"num_inference_steps": steps, "gamma": gamma, "generator": torch.Generator().manual_seed(3)}
            images = pipe(batch_size=4, output_type="pt", **options).images
            result[f"{name}, {steps} steps, gamma {gamma}"] = digest(images.numpy().tobytes())
    return result


def evaluated(folder: str) -> str:
    """Digest of an evaluation's numbers, times left out."""
    settings = [
        "--num_samples",
        "200",
        "--steps",
        "1",
        "4",
        "--gammas",
        "0",
        "0.5",
        "--seeds",
        "0",
        "1",
        "--kid",
        "true",
    ]
    config = ["--config", "training/configs/digits_evaluate.yaml", "--model", "assets/digits-ctm"]
    run("evaluate", *config, *settings, "--output_dir", folder)
    report = json.loads(Path(folder, "evaluation.json").read_text(encoding="utf-8"))
    rows = [{key: value for key, value in row.items() if "seconds" not in key} for row in report["results"]]
    return digest(json.dumps([rows, report["real_against_real"]], sort_keys=True).encode())


def converted(source: Path, folder: str) -> dict[str, str]:
    """Digests of the files of a converted checkpoint, configs and weights."""
    run("convert", str(source), folder, *HEADS.get(source.stem, []))
    files = sorted(path for path in Path(folder).rglob("*") if path.suffix == ".safetensors" or "config" in path.name)
    return {f"{source.stem}/{path.relative_to(folder)}": digest(path.read_bytes()) for path in files}


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        result = {
            "digits.yaml": trained("train_ctm", "digits", 20, f"{folder}/digits"),
            "digits_adversarial.yaml": trained("train_ctm", "digits_adversarial", 20, f"{folder}/adversarial"),
            "digits_edm.yaml": trained("train_edm", "digits_edm", 5, f"{folder}/edm"),
            **samples("digits-ctm"),
            **samples("emoji-ctm"),
            "evaluation": evaluated(f"{folder}/evaluation"),
        }
        for source in sorted(ORACLE.glob("*_cond.safetensors")) + sorted(ORACLE.glob("*_uncond.safetensors")):
            result |= converted(source, f"{folder}/{source.stem}")
    json.dump(result, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
