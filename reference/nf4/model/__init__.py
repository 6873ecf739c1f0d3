"""The Llama-family causal language model with hand-written gradients."""
