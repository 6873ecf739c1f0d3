"""Small random models of every kind that the commands take, with adapters, and sequences to train them on."""

from collections.abc import Sequence
from typing import Any

import nf4
import numpy as np
from nf4.formats.peft import linear_shapes
from nf4.lora import init_lora
from nf4.model.config import LlamaConfig
from nf4.model.llama import Llama, parameter_shapes
from nf4.train.data import Example


def tiny_config(kind: str = "llama", **changes: Any) -> LlamaConfig:
    """Return the config of a model of two layers x 32."""
    config: dict[str, Any] = {
        "model_type": kind,
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
        "rope_theta": 10000.0,
    }
    return LlamaConfig.from_dict(config | changes, "a drawn config")


def build(
    kind: str = "llama",
    *,
    targets: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
    rank: int = 4,
    dropout: float = 0.0,
    seed: int = 0,
    block_size: int = 32,
    adapter_dtype: Any = np.float32,
    **changes: Any,
) -> Llama:
    """Return a model in NF4 with adapters, that already do something, on those targets of those layers."""
    config, rng = tiny_config(kind, **changes), np.random.default_rng(seed)
    params: dict[str, Any] = {}
    for name, shape in parameter_shapes(config).items():
        drawn = rng.standard_normal(shape)
        if len(shape) == 1:
            params[name] = ((1 if "norm" in name else 0) + 0.1 * drawn).astype(np.float32)
        else:
            w = (drawn * shape[1] ** -0.5).astype(np.float32)
            params[name] = nf4.quantize(w, block_size, "nf4", True) if "proj" in name else w
    adapters = {}
    for name, (outputs, inputs) in linear_shapes(config).items():
        target, layer = name.rpartition(".")[2], int(name.split(".")[2])
        if (targets is None or target in targets) and (layers is None or layer in layers):
            lora = init_lora(name, inputs, outputs, rank, 2 * rank, dropout, seed)
            lora.B[:] = 0.3 * (4 / rank) ** 0.5 * rng.standard_normal(lora.B.shape)
            lora.A, lora.B = lora.A.astype(adapter_dtype), lora.B.astype(adapter_dtype)
            adapters[name] = lora
    return Llama(config, params, adapters)


def examples(lengths: Sequence[int], vocabulary: int, seed: int = 0, ignored: float = 0.0) -> list[Example]:
    """Return random sequences; a part of their targets, but never the last, is left out."""
    rng = np.random.default_rng(seed)
    found = []
    for length in lengths:
        ids = rng.integers(0, vocabulary, length + 1).astype(np.int32)
        targets = ids[1:].copy()
        targets[rng.random(length) < ignored] = -100
        targets[-1] = ids[-1]
        found.append(Example(ids[:-1], targets))
    return found
