"""Programs that train EDM teachers, distil them into consistency trajectory models, and measure the result."""
