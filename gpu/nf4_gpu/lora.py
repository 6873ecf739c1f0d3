"""The LoRA linear layer on the device, in the dtype of its input, with the reference's signatures."""

from dataclasses import dataclass
from typing import Any

import cupy
from nf4.errors import InputError
from nf4.lora import Dropout, LoRA
from nf4.random import drop_threshold
from nf4.tensor import QuantizedTensor

from nf4_gpu.arrays import on_device
from nf4_gpu.blas import multiply
from nf4_gpu.product import matmul, matmul_transposed
from nf4_gpu.random import drop


@dataclass
class LoRACache:
    """What backward needs. x may be set to None by a caller that can recompute it and puts it back."""

    x: cupy.ndarray | None
    z: cupy.ndarray | None  # dropout(x) A^T / (1 - p), [T, rank]
    dropout: Dropout | None


@dataclass
class LoRALinear:
    """y = x W^T + bias + scale * (dropout(x) A^T) B^T, with a quantized W [out, in] frozen (NF4-9.2).

    Computes in the dtype of x (float32, float16 or bfloat16) with float32 sums; gradients of A and B are
    float32. A, B and bias are device arrays. x is contiguous; InputError where something does not fit.
    """

    weight: QuantizedTensor
    bias: cupy.ndarray | None = None
    lora: LoRA | None = None

    def forward(
        self, x: Any, dropout: Dropout | None = None, out: Any = None
    ) -> tuple[cupy.ndarray, LoRACache]:
        """x [T, in] -> y [T, out] (written into out) and the cache of backward (NF4-9.2).

        Without `dropout`, nothing is dropped.
        """
        x = _rows(x, "x")
        y = matmul(x, self.weight, out)
        if self.bias is not None:
            y += self.bias.astype(y.dtype, copy=False)
        cache = self.project(x, dropout)
        if self.lora is not None and cache.z is not None:
            B = self.lora.B.astype(y.dtype, copy=False)
            multiply(cache.z, B, y, transpose_b=True, alpha=self.lora.scale, beta=1.0)
        return y, cache

    def project(self, x: cupy.ndarray, dropout: Dropout | None) -> LoRACache:
        """The cache of forward without its output: all that a recomputation for backward needs."""
        lora = self.lora
        if lora is None:
            return LoRACache(x, None, None)
        cache = LoRACache(x, None, dropout if lora.dropout > 0 else None)
        z = cupy.empty((x.shape[0], lora.A.shape[0]), x.dtype)  # [T, r]
        A = lora.A.astype(x.dtype, copy=False)
        multiply(self._dropped(x, cache), A, z, transpose_b=True, alpha=self._keep_scale(cache))
        cache.z = z
        return cache

    def backward(
        self, dout: Any, cache: LoRACache, need_dx: bool = True
    ) -> tuple[cupy.ndarray | None, cupy.ndarray | None, cupy.ndarray | None]:
        """dout [T, out] -> dx [T, in] (None unless need_dx), dA [r, in], dB [out, r] (None without LoRA).

        NF4-9.5.
        """
        dout = _rows(dout, "dout")
        dx = matmul_transposed(dout, self.weight) if need_dx else None  # [T, in]
        lora = self.lora
        if lora is None:
            return dx, None, None
        assert cache.x is not None
        assert cache.z is not None
        keep = self._keep_scale(cache)
        dB = cupy.empty(lora.B.shape, cupy.float32)
        multiply(dout, cache.z, dB, transpose_a=True, alpha=lora.scale)  # [out, r]
        dz = cupy.empty_like(cache.z)
        multiply(dout, lora.B.astype(dout.dtype, copy=False), dz, alpha=lora.scale * keep)  # [T, r]
        dA = cupy.empty(lora.A.shape, cupy.float32)
        multiply(dz, self._dropped(cache.x, cache), dA, transpose_a=True)  # [r, in]
        if dx is not None:
            A = lora.A.astype(dout.dtype, copy=False)
            if cache.dropout is None:
                multiply(dz, A, dx, beta=1.0)
            else:
                part = cupy.empty_like(dx)
                multiply(dz, A, part)
                drop(cache.dropout, lora.stream, lora.dropout, part, dx, add=True)
        return dx, dA, dB

    def _dropped(self, x: cupy.ndarray, cache: LoRACache) -> cupy.ndarray:
        """x with 0 where the mask drops; drawn again in backward, the same (NF4-9.4)."""
        if self.lora is None or cache.dropout is None:
            return x
        kept = cupy.empty_like(x)
        drop(cache.dropout, self.lora.stream, self.lora.dropout, x, kept)
        return kept

    def _keep_scale(self, cache: LoRACache) -> float:
        """1 / (probability of being kept), which the 16-bit lanes make 65536 / (65536 - threshold)."""
        if self.lora is None or cache.dropout is None:
            return 1.0
        return 65536 / (65536 - drop_threshold(self.lora.dropout))


def _rows(x: Any, what: str) -> cupy.ndarray:
    x = on_device(x, what)
    if x.ndim != 2:
        raise InputError(f"{what} has the shape {list(x.shape)}; a layer takes [T, features]")
    return x
