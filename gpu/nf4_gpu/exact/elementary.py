"""Exponential and logarithm on the device, to the bits of nf4.exact.elementary."""

import cupy
import numpy as np
from cupy.cuda import runtime

from nf4_gpu.compile import kernel


def exp(x: cupy.ndarray) -> cupy.ndarray:
    """Return e^x of contiguous x float32, of any shape, in float32 (NF4-14.5)."""
    return _apply("exponential", x)


def log(x: cupy.ndarray) -> cupy.ndarray:
    """Return the natural logarithm of contiguous x float32, of any shape, in float32 (NF4-14.6)."""
    return _apply("logarithm", x)


def _apply(name: str, x: cupy.ndarray) -> cupy.ndarray:
    y = cupy.empty_like(x)
    if x.size:
        function = kernel(runtime.getDevice(), "exact/elementary.cu", name, DTYPE=0)
        function((-(-x.size // 256),), (256,), (x, np.int64(x.size), y))
    return y
