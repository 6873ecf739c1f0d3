"""One exact step of SmolLM2-135M: its loss and gradients as a SHA-256 that every machine must give."""

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
from battery import numbers
from nf4.formats.peft import linear_shapes
from nf4.lora import LoRA, init_lora
from nf4.model.llama import Llama
from nf4.train.data import Example

PINNED = "609e0c2743f9e8da1f356398be8bab1766de4b6f193b7ff55888b056bcada526"
TOKENS = 64


def adapters(model: Llama) -> dict[str, LoRA]:
    """Of rank 8 on all linear layers, with a B that is not zero, so that every gradient says something."""
    found = {}
    for name, (outputs, inputs) in linear_shapes(model.config).items():
        found[name] = lora = init_lora(name, inputs, outputs, 8, alpha=16, dropout=0.0, seed=0)
        lora.B[...] = numbers(f"{name}.B", outputs, 8, scale=0.02)
    return found


def example(text: bytes, model: Llama) -> Example:
    """So many ids that follow from a text's bytes, each of which predicts the next."""
    ids = (np.frombuffer(text[: TOKENS + 1], np.uint8).astype(np.int32) * 191 + 7) % model.config.vocab_size
    return Example(ids[:-1].copy(), ids[1:].copy())


def digest(loss: float, gradients: dict[str, Any], to_host: Callable[[Any], Any] = np.asarray) -> str:
    """Of the loss and the gradients, arrays by name."""
    total = hashlib.sha256(np.float64(loss).tobytes())
    for name in sorted(gradients):
        total.update(name.encode())
        total.update(np.ascontiguousarray(to_host(gradients[name]), np.float32).tobytes())
    return total.hexdigest()
