# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""`make distill` with programs that only note how they are called."""

import shutil
import subprocess

import pytest

from helpers.places import ROOT


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("ending", ["exit 0", "kill -INT 0", "exit 3"])
def test_a_distillation_that_does_not_finish_says_how_it_goes_on(tmp_path, ending):
    """`kill -INT 0` is Ctrl-C: every process of the terminal gets it, make and its shell too."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, body in (("torchrun", ending), ("python", "exit 0")):
        (programs / name).write_text(f'#!/bin/sh\necho "$0 $*" >> {tmp_path}/calls\n{body}\n')
        (programs / name).chmod(0o755)
    (tmp_path / ".installed").touch()
    command = ["make", "-C", str(ROOT), "distill", f"VENV={tmp_path}", "OUT=runs/mine"]
    done = subprocess.run(command, capture_output=True, text=True, start_new_session=True, timeout=60)
    finished = ending == "exit 0"
    calls = (tmp_path / "calls").read_text().splitlines()
    assert "--output_dir runs/mine --resume_from_checkpoint latest" in calls[0]
    assert len(calls) == (2 if finished else 1) and (done.returncode == 0) is finished
    last = [line for line in done.stdout.splitlines() if line and not line.startswith("make")][-1]
    goes_on = "Not finished. The same command goes on from the newest checkpoint in runs/mine."
    assert last == (
        "Pictures: runs/mine/evaluation/evaluation.png and gammas.png, runs/mine/samples" if finished else goes_on
    )
