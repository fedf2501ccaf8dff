"""The objective of training: times, solvers, losses, distances, the adversarial stage."""
