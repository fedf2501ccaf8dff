# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""The objective of training: times, solvers, losses, distances, the adversarial stage."""
