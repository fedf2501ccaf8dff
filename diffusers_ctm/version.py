# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""The version of the package; saved folders carry it into their code."""

__version__ = "0.1.0"
