"""The end of a model in the exact tier: final norm, head and loss, forward and backward by chunks of rows."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nf4.exact import ops
from nf4.exact.grid import columns, product, rows
from nf4.lora import Workspace
from nf4.model.llama import Batch
from nf4.model.ops import HEAD_ELEMENTS, IGNORED
from nf4.tensor import QuantizedTensor

Float32 = NDArray[np.float32]


@dataclass(frozen=True)
class Inputs:
    """What a batch brings: token ids int32 [T], the rows that have a target, and those targets."""

    ids: NDArray[np.int32]
    learned: NDArray[np.int64]
    targets: NDArray[np.int32]


def inputs_of(batch: Batch) -> Inputs:
    """The inputs of a batch, on the host."""
    learned = np.flatnonzero(batch.targets != IGNORED)
    return Inputs(batch.ids, learned, batch.targets[learned])


def head(
    x: Float32,
    norm: NDArray[Any],
    eps: float,
    weight: NDArray[Any] | QuantizedTensor,
    inputs: Inputs,
    scale: float | None,
    space: Workspace,
    trace: Callable[[str, NDArray[Any]], None],
) -> tuple[Float32, Float32 | None]:
    """The losses [T] of the last layer's x [T, hidden], and its gradient unless scale is None (NF4-15.5).

    weight is [vocabulary, hidden]. Rows without a target have the loss +0 and no gradient. trace is shown the
    values of each chunk of rows under their names in NF4-15.5.
    """
    losses = np.zeros(len(x), np.float32)
    dx = None if scale is None else np.zeros_like(x)
    step = max(1, HEAD_ELEMENTS // weight.shape[0])
    for start in range(0, len(inputs.learned), step):
        at, targets = inputs.learned[start : start + step], inputs.targets[start : start + step]
        part = x[at]
        y, rstd = ops.rms_norm(part, norm, eps)
        plain = space.weight(weight, np.dtype(np.float32))
        wide = space.take("weight", plain.shape, np.float64)
        logits = space.take("logits", (len(at), len(plain)), np.float32)
        product(y, rows(plain, wide).mT, logits, space)
        trace("normed", y)
        trace("logits", logits)
        losses[at] = ops.cross_entropy(logits, targets, scale)
        if dx is not None:
            trace("dlogits", logits)
            dy = product(logits, columns(plain, wide), space=space)
            trace("dnormed", dy)
            dx[at] = ops.rms_norm_backward(dy, part, norm, rstd)
    return losses, dx
