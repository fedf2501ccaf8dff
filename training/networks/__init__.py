# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Networks that a run starts from, and pipelines that users bring."""
