# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Images: where they come from, how they are read, in which batches."""
