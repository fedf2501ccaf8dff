"""Networks that a run starts from, and pipelines that users bring."""
