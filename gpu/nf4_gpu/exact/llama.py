"""The Llama family in the exact tier on the device: the flow of nf4.exact.llama through the rooms here."""

import math
from collections.abc import Mapping
from typing import Any

import cupy
import numpy as np
from cupy.cuda import runtime
from nf4.exact import tables
from nf4.exact.llama import ExactLlama, Rooms
from nf4.lora import LoRA
from nf4.model.config import LlamaConfig
from nf4.model.llama import Llama
from nf4.tensor import QuantizedTensor

from nf4_gpu.exact import attention, linear, ops
from nf4_gpu.exact.grid import Space
from nf4_gpu.exact.head import head
from nf4_gpu.tensor import to_device

_known_tables: dict[tuple[int, LlamaConfig, tuple[int, ...]], tuple[cupy.ndarray, cupy.ndarray]] = {}


def on_device(model: Llama, adapters: dict[str, LoRA]) -> ExactLlama:
    """The exact model of a copy of model's parameters on the current device, with adapters that are there."""

    def moved(value: Any) -> Any:
        if isinstance(value, QuantizedTensor):
            return to_device(value)
        return cupy.asarray(value if value.ndim > 1 else value.astype(np.float32))  # norms and biases

    params = {name: moved(value) for name, value in model.params.items()}
    return ExactLlama(Llama(model.config, params, adapters), DEVICE)


def rotation(config: LlamaConfig, lengths: tuple[int, ...]) -> tuple[cupy.ndarray, cupy.ndarray]:
    """cos and sin float32 [T, head_dim / 2] of packed sequences of these lengths (NF4-15.3)."""
    key = runtime.getDevice(), config, lengths
    if key not in _known_tables:
        cos, sin = tables.rotation(config, lengths)
        _known_tables[key] = cupy.asarray(cos), cupy.asarray(sin)
    return _known_tables[key]


def gradients(params: Mapping[str, cupy.ndarray], sequences: int) -> dict[str, cupy.ndarray]:
    """Memory for the gradients of params by sequence: views of one float32 [sequences, all elements]."""
    memory = cupy.empty((sequences, sum(p.size for p in params.values())), cupy.float32)
    found, start = {}, 0
    for name, p in params.items():
        part = memory[:, start : start + p.size]
        found[name] = cupy.ndarray(
            (sequences, *p.shape), cupy.float32, part.data, strides=(memory.strides[0], *_strides(p.shape))
        )
        start += p.size
    return found


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(4 * math.prod(shape[i + 1 :]) for i in range(len(shape)))


DEVICE = Rooms(ops, linear, attention, ops.embed, head, gradients, rotation, Space)
