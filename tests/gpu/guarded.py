"""Device memory that shows what was written where it should not be, and what was not written."""

import math
from typing import Any

import cupy
import numpy as np
from nf4.blockwise import block_count
from nf4.codebooks import get_codebook
from nf4.nested import NestedAbsmax
from nf4.tensor import QuantizedTensor
from nf4_gpu.codebooks import dynamic_map

GUARD, POISON = 64, 0xA5


class Guarded:
    """An array of poison with guard bytes around it; offset: elements by which it is misaligned."""

    def __init__(self, shape: tuple[int, ...], dtype: Any, offset: int = 0) -> None:
        dtype = np.dtype(dtype)
        self._start = 256 + offset * dtype.itemsize
        self._stop = self._start + math.prod(shape) * dtype.itemsize
        self._memory = cupy.full(self._stop + GUARD, POISON, np.uint8)
        self.array = self._memory[self._start : self._stop].view(dtype).reshape(shape)

    def check(self) -> None:
        around = cupy.asnumpy(self._memory)
        around[self._start : self._stop] = POISON
        assert (around == POISON).all(), "written beside the array"


class GuardedTensor:
    """A quantized tensor of poison, each of its arrays guarded."""

    def __init__(self, x: Any, block_size: int, codebook: Any, double_quant: bool, offset: int = 0) -> None:
        blocks = block_count(x.size, block_size)
        codes = Guarded((-(-x.size // 2),), np.uint8, offset)
        self._parts = [codes]
        if double_quant:
            shapes = ((blocks,), np.uint8), ((block_count(blocks, 256),), np.float32), ((1,), np.float32)
            parts = [Guarded(shape, dtype, offset) for shape, dtype in shapes]
            arrays: list[Any] = [part.array for part in parts]
            arrays.append(dynamic_map(cupy.cuda.runtime.getDevice())[0])
            scales: Any = NestedAbsmax(*arrays)
            self._parts += parts
        else:
            self._parts.append(Guarded((blocks,), np.float32, offset))
            scales = self._parts[-1].array
        book = get_codebook(codebook)
        self.tensor = QuantizedTensor(codes.array, scales, x.shape, x.dtype, block_size, book)

    def check(self) -> None:
        for part in self._parts:
            part.check()


def misaligned(x: np.ndarray[Any, Any], offset: int) -> cupy.ndarray:
    """x on the device, so many elements behind an aligned address."""
    memory = cupy.empty(x.size + offset, x.dtype)
    view = memory[offset:].reshape(x.shape)
    view.set(x)
    return view


def same_bits(a: Any, b: Any) -> bool:
    """Whether two arrays, on the device or not, are of one dtype and shape and equal in every bit."""
    a, b = cupy.asnumpy(a), cupy.asnumpy(b)
    return bool(a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes())
