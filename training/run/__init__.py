"""Around the loss of every run: devices, batches, averages, checkpoints, logs."""
