"""Programs that train EDM teachers, distill them into consistency trajectory models, and measure the result."""
