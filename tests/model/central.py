"""Central differences, and a tiny model of any family, for the tests of gradients."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from nf4.lora import init_lora
from nf4.model.config import LlamaConfig
from nf4.model.llama import TARGETS, Batch, Llama, parameter_shapes
from numpy.typing import NDArray

Array = NDArray[Any]


def check_gradient(f: Callable[[], float], x: Array, gradient: Array, seed: int = 0) -> None:
    """Assert that gradient is that of f by x (changed in place): its slopes along three random directions."""
    assert gradient.shape == x.shape
    assert gradient.dtype == x.dtype == np.float64
    rng = np.random.default_rng(seed)
    start = x.copy()
    for _ in range(3):
        direction = rng.normal(size=x.shape)
        step = 1e-5 / max(1.0, float(np.abs(direction).max(initial=0)))
        x[...] = start + step * direction
        above = f()
        x[...] = start - step * direction
        below = f()
        x[...] = start
        slope = (above - below) / (2 * step)
        size = float(np.sqrt(np.sum(gradient**2) * np.sum(direction**2)))
        assert np.sum(gradient * direction) == pytest.approx(slope, rel=1e-5, abs=1e-6 * max(1e-3, size))


def tiny_config(kind: str = "llama", **changes: Any) -> LlamaConfig:
    settings = {
        "model_type": kind,
        "vocab_size": 19,
        "hidden_size": 8,
        "intermediate_size": 10,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 4,
        "max_position_embeddings": 64,
    }
    return LlamaConfig.from_dict(settings | changes, "config.json")


def tiny_model(
    config: LlamaConfig,
    targets: tuple[str, ...] = (),
    layers: tuple[int, ...] = (0, 1),
    dropout: float = 0.0,
    seed: int = 0,
    dtype: Any = np.float64,
) -> Llama:
    """Random parameters, and on `targets` of `layers` adapters whose B isn't zero."""
    rng = np.random.default_rng(seed)
    params: dict[str, Any] = {
        name: (0.4 * rng.normal(size=shape) + ("norm" in name)).astype(dtype)
        for name, shape in parameter_shapes(config).items()
    }
    adapters = {}
    for i in layers:
        for target in targets:
            name = f"model.layers.{i}.{'self_attn' if target in TARGETS[:4] else 'mlp'}.{target}"
            out, into = params[f"{name}.weight"].shape
            lora = init_lora(name, into, out, 2, 3, dropout, seed)
            lora.A = lora.A.astype(dtype)
            lora.B = (0.4 * rng.normal(size=lora.B.shape)).astype(dtype)
            adapters[name] = lora
    return Llama(config, params, adapters)


def random_batch(config: LlamaConfig, lengths: tuple[int, ...], seed: int = 0, ignored: float = 0.2) -> Batch:
    rng = np.random.default_rng(seed)
    tokens = sum(lengths)
    targets = rng.integers(config.vocab_size, size=tokens).astype(np.int32)
    targets[rng.random(tokens) < ignored] = -100
    ids = rng.integers(config.vocab_size, size=tokens).astype(np.int32)
    return Batch(ids, targets, lengths, tuple(range(10, 10 + len(lengths))))
