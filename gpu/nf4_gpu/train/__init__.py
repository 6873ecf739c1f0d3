"""Training on the device: memory, the optimizer, the engine of a run."""
