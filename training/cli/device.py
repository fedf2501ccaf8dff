# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""The device, in code and in words; waiting for it; the versions of the software; what the main process says."""

import os
import platform
from types import ModuleType

import torch

from .errors import UserError


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def choose_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).cpu()
    except Exception as error:  # RuntimeError or AssertionError, by device and torch version
        raise UserError(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from error
    return device


def hardware(device: torch.device) -> dict[str, str | int]:
    """The device, in words, and the CPU threads in use."""
    if device.type == "cuda":
        return {"device": torch.cuda.get_device_name(device), "cpu_threads": torch.get_num_threads()}
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            name = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), name)
    except OSError:
        pass  # not Linux
    return {"device": f"{device.type}: {name}", "cpu_threads": torch.get_num_threads()}


def versions(*packages: ModuleType) -> dict[str, str]:
    """The versions of packages by name, and Python's."""
    return {**{package.__name__: package.__version__ for package in packages}, "python": platform.python_version()}


def say(line: str) -> None:
    """Print a line in the main process, also before the processes meet: launchers set RANK."""
    if os.environ.get("RANK", "0") == "0":
        print(line)
