"""Training on the device."""
