# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""The page in a process of its own, as visitors meet it."""

import contextlib
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx

from helpers.places import ROOT


RUNNING = re.compile(r"Running on local URL: +(http://\S+)\n")
LONGEST_START = 120  # seconds until the page answers; CI is slow and busy


def answers(address: str) -> bool:
    """Whether anybody serves HTTP there, be it to ask for a password."""
    try:
        httpx.get(address, timeout=10)
    except httpx.TransportError:
        return False
    return True


@contextlib.contextmanager
def serving(*arguments: str, environment: dict[str, str] | None = None) -> Iterator[tuple[str, int]]:
    """(address, process id) of `python app.py` with these arguments, once it answers. By default there is no Hub.

    Raises:
        RuntimeError: it ended before its time, or does not answer; with its exit status and what it wrote.
    """
    environment = {
        **({**os.environ, "HF_HUB_OFFLINE": "1"} if environment is None else environment),
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",  # what it wrote is in the log however it ends
        "PYTHONFAULTHANDLER": "1",  # and where it was when it crashed
        "GRADIO_ANALYTICS_ENABLED": "True",  # which the page overrules
    }
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"

        def check(running: bool, otherwise: str) -> None:
            if not running:
                wrote = log.read_text(errors="replace")[-5000:] or "nothing"
                raise RuntimeError(f"app.py {otherwise}, exit status {process.returncode}. It wrote:\n{wrote}")

        # The page takes a free port itself and says which: one that is chosen here could be taken until it starts.
        command = [sys.executable, str(ROOT / "app.py"), *arguments]
        with log.open("wb") as file:
            process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT)
        try:
            until = time.monotonic() + LONGEST_START
            while not ((said := RUNNING.search(log.read_text(errors="replace"))) and answers(said[1])):
                check(process.poll() is None, "ended")
                check(time.monotonic() < until, f"does not answer after {LONGEST_START} s")
                time.sleep(0.1)
            try:
                yield said[1].rstrip("/"), process.pid
            finally:  # a request may have failed because the page was gone
                check(process.poll() is None, "ended while it was used")
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
