"""The Llama family on the device, in bfloat16: each operation, the model, generation."""
