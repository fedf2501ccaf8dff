# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Folders that tests read."""

from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]  # of this checkout
# Numbers of the authors' code; tests that read them skip without them.
ORACLE = ROOT.parent / "shared" / "oracle"
EDM2_ORACLE = ROOT.parent / "shared" / "oracle-edm2"
