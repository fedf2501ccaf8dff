"""Parts of benchmark and study."""
