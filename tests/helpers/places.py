# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Folders that tests read."""

from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]  # of this checkout
ORACLE = ROOT.parent / "shared" / "oracle"  # numbers of the authors' code; tests that read it skip without it
