# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""The parts of a run around its loss: devices, batches, averages, checkpoints, logs."""
