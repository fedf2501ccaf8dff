# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Every program's options, errors, files, names, device and weights."""
