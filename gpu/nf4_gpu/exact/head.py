"""The end of a model in the exact tier on the device, to the bits of nf4.exact.head."""

from collections.abc import Callable
from typing import Any

import cupy
import numpy as np
from nf4.exact.head import Inputs
from nf4.tensor import QuantizedTensor

from nf4_gpu.exact import ops
from nf4_gpu.exact.grid import Space, columns, finish, rows, sums
from nf4_gpu.tensor import dequantize

HEAD_ELEMENTS = 1 << 26
"""Logits that exist at a time."""


def head(
    x: cupy.ndarray,
    norm: cupy.ndarray,
    eps: float,
    weight: cupy.ndarray | QuantizedTensor,
    inputs: Inputs,
    scale: float | None,
    space: Space,
    trace: Callable[[str, cupy.ndarray], None],
) -> tuple[cupy.ndarray, cupy.ndarray | None]:
    """The losses [T] of the last layer's x [T, hidden], and its gradient unless scale is None (NF4-15.5).

    weight is [vocabulary, hidden]. Rows without a target have the loss +0 and no gradient. trace is shown the
    values of each chunk of rows under their names in NF4-15.5.
    """
    losses = cupy.zeros(len(x), cupy.float32)
    dx = None if scale is None else cupy.zeros_like(x)
    plain: Any = weight
    if isinstance(weight, QuantizedTensor):
        plain = dequantize(weight, out=space.take("plain", weight.shape, weight.dtype))
    wide = space.take("weight", plain.shape, np.float64)
    step = max(1, HEAD_ELEMENTS // len(plain))
    for start in range(0, len(inputs.learned), step):
        at, targets = inputs.learned[start : start + step], inputs.targets[start : start + step]
        part = x[at]
        y, rstd = ops.rms_norm(part, norm, eps)
        left = rows(y, space.take("left", y.shape, np.float64))
        found = sums(left, rows(plain, wide).mT, space)
        logits = finish(found, space.take("logits", found.shape, np.float32))
        trace("normed", y)
        trace("logits", logits)
        losses[at] = ops.cross_entropy(logits, targets, scale)
        if dx is not None:
            trace("dlogits", logits)
            left = rows(logits, space.take("logits", logits.shape, np.float64))
            found = sums(left, columns(plain, wide), space)
            dy = finish(found, cupy.empty_like(part))
            trace("dnormed", dy)
            dx[at] = ops.rms_norm_backward(dy, part, norm, rstd)
    return losses, dx
