"""Other people's checkpoint files: read without running them, and converted both ways."""
