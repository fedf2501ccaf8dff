# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Other people's checkpoint files: read without running them, and converted both ways."""
