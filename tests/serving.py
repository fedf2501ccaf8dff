# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""The page in a process of its own, as visitors meet it."""

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path


ROOT = Path(__file__).parents[1]


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@contextlib.contextmanager
def serving(*arguments: str, environment: dict[str, str] | None = None) -> Iterator[tuple[str, int]]:
    """(address, process id) of `python app.py` with these arguments, once it answers. Without `environment`, no Hub is there."""
    port = free_port()
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"} if environment is None else environment
    environment = {
        **environment,
        "PYTHONPATH": str(ROOT),
        "GRADIO_ANALYTICS_ENABLED": "True",
    }  # which the page overrules
    with tempfile.TemporaryFile("w+") as log:
        command = [sys.executable, str(ROOT / "app.py"), "--port", str(port), *arguments]
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            address = f"http://127.0.0.1:{port}"
            for _ in range(600):
                with contextlib.suppress(OSError):
                    urllib.request.urlopen(address, timeout=5).read()
                    break
                if process.poll() is not None:
                    log.seek(0)
                    raise RuntimeError(f"app.py ended with {process.returncode}:\n{log.read()[-3000:]}")
                time.sleep(0.1)
            yield address, process.pid
        finally:
            process.terminate()
            process.wait(20)
