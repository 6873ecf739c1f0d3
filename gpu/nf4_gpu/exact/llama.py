"""The Llama family in the exact tier on the device: the flow of nf4.exact.llama through the rooms here."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import cupy
import numpy as np
from nf4.errors import InputError
from nf4.exact import tables
from nf4.exact.grid import PIECE
from nf4.exact.head import Inputs, inputs_of
from nf4.exact.llama import ExactLlama, Rooms, Trace, silent
from nf4.lora import LoRA
from nf4.model.config import LlamaConfig
from nf4.model.llama import Batch, Llama
from nf4.random import drop_threshold
from nf4.tensor import QuantizedTensor

from nf4_gpu.exact import attention, linear, ops
from nf4_gpu.exact.grid import KNOWN, Space, place
from nf4_gpu.exact.head import head
from nf4_gpu.launch import capture
from nf4_gpu.tensor import to_device


@dataclass(frozen=True)
class _Captured:
    """A graph of one micro-batch, where it reads, and what it leaves; its memory is nobody else's.

    tables: what it reads of those that are kept for some batches only.
    """

    graph: Any
    inputs: Any
    tables: Any
    results: tuple[cupy.ndarray, dict[str, cupy.ndarray]]
    memory: cupy.cuda.MemoryPool


class DeviceLlama(ExactLlama):
    """The exact model on the current device, with adapters that are there.

    Where micro-batches of one shape follow one another, the second is captured as a graph that all later ones
    run: the host then launches one thing instead of thousands. It works on the current stream.
    """

    def __init__(self, model: Llama, adapters: dict[str, LoRA]) -> None:
        def moved(value: Any) -> Any:
            if isinstance(value, QuantizedTensor):
                return to_device(value)
            return cupy.asarray(value if value.ndim > 1 else value.astype(np.float32))  # norms and biases

        params = {name: moved(value) for name, value in model.params.items()}
        super().__init__(Llama(model.config, params, adapters), DEVICE)
        for name, lora in adapters.items():
            if len(lora.A) > PIECE:
                raise InputError(
                    f"the adapter of {name} has rank {len(lora.A)}; on the GPU {PIECE} is the most"
                )
        # What is drawn for dropout differs from one micro-batch to the next, and goes into the launches.
        self._repeats = not any(drop_threshold(lora.dropout) for lora in adapters.values())
        self._shape: Any = None
        self._captured: _Captured | None = None

    def losses_and_gradients(
        self, batch: Batch, *, scale: float, checkpointing: bool, seed: int, trace: Trace = silent
    ) -> tuple[cupy.ndarray, dict[str, cupy.ndarray]]:
        """As ExactLlama's, in device arrays; those of the last call but one may be overwritten."""
        stream = cupy.cuda.get_current_stream()
        host = inputs_of(batch)
        shape = batch.lengths, scale, checkpointing, host.learned.tobytes()
        again, self._shape = shape == self._shape, shape
        if trace is not silent or not self._repeats or not again or not stream.ptr:
            self._captured = None
            return super().losses_and_gradients(
                batch, scale=scale, checkpointing=checkpointing, seed=seed, trace=trace
            )
        self.model.check_batch(batch.ids, batch.targets, batch.lengths)
        if self._captured is None:
            self._captured = self._capture(batch, scale, checkpointing, stream)
        found = self._captured
        found.inputs.ids.set(host.ids)
        found.inputs.targets.set(host.targets)
        found.graph.launch(stream)
        return found.results

    def _capture(self, batch: Batch, scale: float, checkpointing: bool, stream: Any) -> _Captured:
        self._spaces.clear()
        cupy.get_default_memory_pool().free_all_blocks()  # of the first time
        memory = cupy.cuda.MemoryPool()
        with cupy.cuda.using_allocator(memory.malloc), self._call(batch, None, silent) as call:
            inputs = to_inputs(batch)
            read = rotation(self.config, batch.lengths), linear.starts(batch.lengths)
            stream.synchronize()
            graph, results = capture(
                stream, lambda: self._losses_and_gradients(inputs, scale, checkpointing, call)
            )
        return _Captured(graph, inputs, read, results, memory)


def to_inputs(batch: Batch) -> Inputs:
    """The inputs of a batch, on the device."""
    host = inputs_of(batch)
    return Inputs(*(cupy.asarray(array) for array in (host.ids, host.learned, host.targets)))


def rotation(config: LlamaConfig, lengths: tuple[int, ...]) -> tuple[cupy.ndarray, cupy.ndarray]:
    """cos and sin float32 [T, head_dim / 2] of packed sequences of these lengths (NF4-15.3)."""
    return _rotation(*place(), config, lengths)


@lru_cache(maxsize=KNOWN)
def _rotation(
    device: int, stream: int, config: LlamaConfig, lengths: tuple[int, ...]
) -> tuple[cupy.ndarray, cupy.ndarray]:
    cos, sin = tables.rotation(config, lengths)
    return cupy.asarray(cos), cupy.asarray(sin)


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


DEVICE = Rooms(ops, linear, attention, to_inputs, ops.embed, head, gradients, rotation, Space)
