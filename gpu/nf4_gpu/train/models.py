"""Llama-shaped models with random weights, made on the GPU: the same for whoever is measured."""

import zlib
from collections.abc import Iterator
from typing import Any

import cupy
from nf4.bench.train import CONFIG
from nf4.floats import BFLOAT16
from nf4.model.config import LlamaConfig
from nf4.model.llama import parameter_shapes

_DEVIATION = 0.02

CONFIGS: dict[str, dict[str, Any]] = {
    "135M": CONFIG,
    "1.2B": CONFIG
    | {
        "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "rope_theta": 500000.0,
    },
    "8B": CONFIG
    | {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "rope_theta": 500000.0,
        "tie_word_embeddings": False,
    },
}  # fmt: skip
"""config.json of each: SmolLM2-135M, Llama 3.2 1B, Llama 3.1 8B in shape."""


def config_of(name: str) -> LlamaConfig:
    """Return a model's config."""
    return LlamaConfig.from_dict(CONFIGS[name], name)


def weights(name: str) -> Iterator[tuple[str, cupy.ndarray]]:
    """Yield a model's parameters, bfloat16: matrices N(0, 0.02) from a seed of their own, norms 1."""
    for parameter, shape in parameter_shapes(config_of(name)).items():
        if len(shape) == 1:
            yield parameter, cupy.ones(shape, BFLOAT16)
            continue
        generator = cupy.random.Generator(cupy.random.XORWOW(zlib.crc32(parameter.encode())))
        values = generator.standard_normal(shape, dtype=cupy.float32)
        values *= cupy.float32(_DEVIATION)
        yield parameter, values.astype(BFLOAT16)
        del values
        cupy.get_default_memory_pool().free_all_blocks()
