# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Programs that train EDM teachers, distill them into consistency trajectory models, and measure the result."""
