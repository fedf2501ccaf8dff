# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""How good samples are: distances to real images and the teacher's, diversity, nearest images, schedules."""
