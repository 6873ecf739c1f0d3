"""The LoRA adapter, and the linear layer that adds it to a frozen, quantized weight."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike, NDArray

from nf4.errors import InputError
from nf4.random import drop_threshold, keep_mask, stream_of, uniform
from nf4.tensor import QuantizedTensor, dequantize

Array = NDArray[Any]


@dataclass
class LoRA:
    """One adapter (NF4-9.1): A [rank, in], B [out, rank], float32 or bfloat16; scale: alpha/r, or /sqrt(r).

    dropout: probability of dropping an element of the adapter's input; stream: the module's random stream.
    """

    A: Array
    B: Array
    scale: float
    dropout: float
    stream: int


def init_lora(
    name: str,
    in_features: int,
    out_features: int,
    rank: int,
    alpha: float,
    dropout: float,
    seed: int,
    rslora: bool = False,
    dtype: DTypeLike = np.float32,
) -> LoRA:
    """A fresh adapter for the module `name` (NF4-9.3): A uniform in +-1/sqrt(in), B zero.

    Raises InputError for a rank or a number of inputs below 1, a dropout outside [0, 1) or a dtype other than
    float32 and bfloat16.
    """
    for what, count in (("rank", rank), ("number of inputs", in_features)):
        if count < 1:
            raise InputError(f"LoRA {what} {count} for {name}: it must be at least 1")
    if np.dtype(dtype) not in (np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)):
        raise InputError(f"LoRA dtype {np.dtype(dtype)} for {name}: choose float32 or bfloat16")
    drop_threshold(dropout)
    stream = stream_of(name)
    # Kaiming-uniform with a = sqrt(5) has the bound sqrt(6 / ((1 + 5) in)) = 1 / sqrt(in).
    bound = np.float32(1 / math.sqrt(in_features))
    A = (uniform(seed, stream, rank * in_features) * np.float32(2) - np.float32(1)) * bound
    scale = alpha / math.sqrt(rank) if rslora else alpha / rank
    B = np.zeros((out_features, rank), dtype)
    return LoRA(A.reshape(rank, in_features).astype(dtype, copy=False), B, scale, dropout, stream)


class Workspace:
    """Scratch memory that one call reuses from layer to layer; a thread has its own."""

    _empty: Callable[..., Any] = staticmethod(np.empty)

    def __init__(self) -> None:
        self._arrays: dict[tuple[str, np.dtype[Any]], Array] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
        """An uninitialised array of this shape; the next take of the same name and dtype overwrites it."""
        size = math.prod(shape)
        key = (name, np.dtype(dtype))
        flat = self._arrays.get(key)
        if flat is None or flat.size < size:
            flat = self._arrays[key] = self._empty(size, dtype)
        return flat[:size].reshape(shape)

    def new(self, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
        """An uninitialised array that nothing overwrites."""
        return np.empty(shape, dtype)

    def weight(self, weight: "Array | QuantizedTensor", dtype: np.dtype[Any]) -> Array:
        """The weight as an array of the compute dtype: itself if it is one, else in the reused buffer.

        A quantized weight is decoded to its own dtype (NF4-4) and then widened, as bitsandbytes does.
        """
        if isinstance(weight, QuantizedTensor):
            decoded = dequantize(weight, out=self.take("weight", weight.shape, weight.dtype))
        else:
            decoded = weight
        if decoded.dtype == dtype:
            return decoded
        wide = self.take("weight", decoded.shape, dtype)
        wide[...] = decoded
        return wide


@dataclass(frozen=True)
class Dropout:
    """What keys a call's masks: the run's seed, and each packed sequence's length and index in the run."""

    seed: int
    lengths: tuple[int, ...]
    samples: tuple[int, ...]

    def mask(self, lora: LoRA, features: int) -> NDArray[np.uint8]:
        """The kept elements of [T, features] rows as bits, each sequence from a fresh byte (NF4-9.4)."""
        parts = [
            np.packbits(keep_mask(self.seed, lora.stream, sample, n * features, lora.dropout))
            for n, sample in zip(self.lengths, self.samples, strict=True)
        ]
        return np.concatenate(parts)

    def apply(self, bits: NDArray[np.uint8], x: Array, out: Array) -> Array:
        """Write x where the bits keep it, else +0, into out [T, features]; out may be x."""
        whole, written = (array.view(f"i{x.itemsize}") for array in (x, out))
        byte = row = 0
        for n in self.lengths:
            size = n * x.shape[1]
            nbytes = -(-size // 8)
            kept = np.unpackbits(bits[byte : byte + nbytes], count=size).reshape(n, -1)
            # All bits of an element or none: a product with 0 would make a NaN of an infinity.
            mask = -kept.astype(whole.dtype)
            np.bitwise_and(whole[row : row + n], mask, out=written[row : row + n])
            byte, row = byte + nbytes, row + n
        return out


@dataclass
class LoRACache:
    """What backward needs. x may be set to None by a caller that can recompute it and puts it back."""

    x: Array | None
    z: Array | None  # dropout(x) A^T / (1 - p), [T, rank]
    bits: NDArray[np.uint8] | None
    dropout: Dropout | None


@dataclass
class LoRALinear:
    """y = x W^T + bias + scale * (dropout(x) A^T) B^T, with W [out, in] frozen (NF4-9.2).

    Computes in the dtype of x (float32, or float64 for the tests of gradients).
    """

    weight: "Array | QuantizedTensor"
    bias: Array | None = None
    lora: LoRA | None = None

    def forward(
        self,
        x: Array,
        dropout: Dropout | None = None,
        space: Workspace | None = None,
        out: Array | None = None,
    ) -> tuple[Array, LoRACache]:
        """x [T, in] -> y [T, out] (written into out) and the cache of backward (NF4-9.2).

        Without `dropout`, nothing is dropped.
        """
        space = space or Workspace()
        y: Array = np.matmul(x, space.weight(self.weight, x.dtype).T, out=out)  # [T, out]
        if self.bias is not None:
            y += self.bias.astype(x.dtype, copy=False)
        cache = self.project(x, dropout, space)
        if self.lora is not None and cache.z is not None:
            B = self.lora.B.astype(x.dtype, copy=False)
            scaled = cache.z * x.dtype.type(self.lora.scale)  # [T, r]
            y += np.matmul(scaled, B.T, out=space.take("output", y.shape, y.dtype))
        return y, cache

    def project(self, x: Array, dropout: Dropout | None, space: Workspace) -> LoRACache:
        """The cache of forward without its output: all that a recomputation for backward needs."""
        lora = self.lora
        if lora is None:
            return LoRACache(x, None, None, None)
        cache = LoRACache(x, None, None, dropout if lora.dropout > 0 else None)
        kept = x
        if cache.dropout is not None:
            cache.bits = cache.dropout.mask(lora, x.shape[1])
            kept = cache.dropout.apply(cache.bits, x, space.take("input", x.shape, x.dtype))
        cache.z = kept @ lora.A.astype(x.dtype, copy=False).T  # [T, r]
        cache.z *= self._keep_scale(cache)
        return cache

    def backward(
        self, dout: Array, cache: LoRACache, space: Workspace | None = None, need_dx: bool = True
    ) -> tuple[Array | None, Array | None, Array | None]:
        """dout [T, out] -> dx [T, in] (None unless need_dx), dA [r, in], dB [out, r] (None without LoRA).

        NF4-9.5.
        """
        space = space or Workspace()
        dx = dout @ space.weight(self.weight, dout.dtype) if need_dx else None  # [T, in]
        lora = self.lora
        if lora is None:
            return dx, None, None
        assert cache.x is not None
        assert cache.z is not None
        dtype = dout.dtype.type
        dB = dout.T @ cache.z  # [out, r]
        dB *= dtype(lora.scale)
        dz = dout @ lora.B.astype(dtype, copy=False)  # [T, r]
        dz *= dtype(lora.scale) * self._keep_scale(cache)
        A = lora.A.astype(dtype, copy=False)
        x, scratch = cache.x, space.take("input", cache.x.shape, dtype)
        if cache.bits is None or cache.dropout is None:
            dA = dz.T @ x  # [r, in]
        else:
            dA = dz.T @ cache.dropout.apply(cache.bits, x, scratch)
        if dx is not None:
            np.matmul(dz, A, out=scratch)  # [T, in]
            if cache.bits is not None and cache.dropout is not None:
                cache.dropout.apply(cache.bits, scratch, scratch)
            dx += scratch
        return dx, dA, dB

    def _keep_scale(self, cache: LoRACache) -> Any:
        """1 / (probability of being kept), which the 16-bit lanes make 65536 / (65536 - threshold)."""
        if self.lora is None or cache.dropout is None:
            return 1.0
        return 65536 / (65536 - drop_threshold(self.lora.dropout))
