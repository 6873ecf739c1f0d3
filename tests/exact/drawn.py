"""Numbers, small models and batches that follow from names: the same on every machine."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from nf4.lora import LoRA
from nf4.model.config import LlamaConfig
from nf4.model.llama import TARGETS, Batch, Llama, parameter_shapes
from nf4.model.ops import IGNORED
from nf4.random import stream_of, uniform
from nf4.tensor import QuantizedTensor, dequantize, quantize
from nf4.train.data import Example
from nf4.train.step import make_batch
from numpy.typing import DTypeLike, NDArray

Float32 = NDArray[np.float32]


def numbers(name: str, *shape: int, scale: float = 1.0) -> Float32:
    """Numbers from -scale to scale that follow from the name, of exponents that differ by up to 12."""
    u = uniform(0, stream_of(name), 2 * int(np.prod(shape)))
    spread = np.ldexp(np.float32(scale), -np.floor(u[1::2] * 12).astype(np.int64))
    return ((u[::2] * 2 - 1) * spread).astype(np.float32).reshape(shape)


SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 64,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": 3},
    "qwen2": {"use_sliding_window": True, "sliding_window": 2, "max_window_layers": 1},
    "qwen3": {"tie_word_embeddings": True},
}


def model(
    kind: str = "llama",
    *,
    targets: Sequence[str] = TARGETS,
    layers: Sequence[int] | None = None,
    dropout: float = 0.0,
    dtype: DTypeLike = np.float32,
    adapter_dtype: DTypeLike = np.float32,
    **config: Any,
) -> Llama:
    """A quantized model of a family, its matrices uniform like initialised ones, with adapters of rank 2."""
    shape = LlamaConfig.from_dict({"model_type": kind, **SIZES, **FAMILIES[kind], **config}, "drawn")
    params: dict[str, Any] = {}
    for name, sizes in parameter_shapes(shape).items():
        u = uniform(0, stream_of(name), int(np.prod(sizes))).reshape(sizes)
        scale = 0.2 if len(sizes) == 1 else (6 / sizes[1]) ** 0.5
        weight = ((u * 2 - 1) * np.float32(scale) + np.float32("norm" in name)).astype(dtype)
        params[name] = quantize(weight) if "_proj.weight" in name else weight
    adapters = {}
    for name, weight in params.items():
        index = int(name.split(".")[2]) if name.startswith("model.layers.") else -1
        target = name.split(".")[-2]
        if isinstance(weight, QuantizedTensor) and target in targets and (layers is None or index in layers):
            module = name.removesuffix(".weight")
            (out, into), stream = weight.shape, stream_of(module)
            a, b = (
                ((uniform(1 + i, stream, n * 2) * 2 - 1) * np.float32(0.3)).astype(adapter_dtype)
                for i, n in enumerate((into, out))
            )
            adapters[module] = LoRA(a.reshape(2, into), b.reshape(out, 2), 1.5, dropout, stream)
    return Llama(shape, params, adapters)


def wide(narrow: Llama) -> Llama:
    """The same model in float64, its weights decoded."""
    params: dict[str, Any] = {
        name: (dequantize(p) if isinstance(p, QuantizedTensor) else p).astype(np.float64)
        for name, p in narrow.params.items()
    }
    adapters = {
        name: LoRA(
            lora.A.astype(np.float64), lora.B.astype(np.float64), lora.scale, lora.dropout, lora.stream
        )
        for name, lora in narrow.adapters.items()
    }
    return Llama(narrow.config, params, adapters)


def examples(config: LlamaConfig, lengths: Sequence[int], name: str = "tokens") -> list[Example]:
    """Sequences of these lengths, a fifth of their targets left out, but the last one is there."""
    found = []
    for i, n in enumerate(lengths):
        u = uniform(0, stream_of(f"{name}{i}"), 3 * n).reshape(3, n)
        ids, targets = np.floor(u[:2] * config.vocab_size).astype(np.int32)
        left_out = (u[2] < 0.2) & (np.arange(n) < n - 1)
        found.append(Example(ids, np.where(left_out, np.int32(IGNORED), targets)))
    return found


def batch(config: LlamaConfig, lengths: Sequence[int], name: str = "tokens") -> Batch:
    """examples, packed; their samples are numbered from 10 on."""
    return make_batch(examples(config, lengths, name), range(10, 10 + len(lengths)))
