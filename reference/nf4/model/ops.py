"""The operations of a transformer layer outside attention, each with its hand-written backward."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from nf4.lora import Workspace

Array = NDArray[Any]

IGNORED = -100  # the target that has no loss, as in PyTorch
# Elementwise chains work on this many elements at a time, so that all passes but the first read the cache.
_CACHED = 1 << 16
# Logits that exist at a time: 64 MiB in float32.
HEAD_ELEMENTS = 1 << 24


def rms_norm(x: Array, weight: Array, eps: float, out: Array | None = None) -> tuple[Array, Array]:
    """y = x / rms(x) * weight over the last axis (arXiv 1910.07467).

    x [T, n], weight [n] -> y [T, n] (written into out) and 1 / rms, [T, 1], which backward takes.
    """
    rstd = np.vecdot(x, x)[:, None]  # [T, 1]
    rstd /= x.shape[1]
    rstd += eps
    np.sqrt(rstd, out=rstd)
    np.reciprocal(rstd, out=rstd)
    return rms_scale(x, weight, rstd, out), rstd


def rms_scale(x: Array, weight: Array, rstd: Array, out: Array | None = None) -> Array:
    """The output of rms_norm [T, n] once 1 / rms is known: cheap enough to recompute rather than keep."""
    y: Array = np.multiply(x, rstd, out=out)
    y *= weight.astype(x.dtype, copy=False)
    return y


def rms_norm_backward(dy: Array, x: Array, weight: Array, rstd: Array) -> Array:
    """dx [T, n] of rms_norm, written over dy."""
    dy *= weight.astype(x.dtype, copy=False)
    mean = np.vecdot(dy, x)[:, None] * (rstd * rstd)  # [T, 1]
    mean /= x.shape[1]
    dy -= x * mean
    dy *= rstd
    return dy


def rms_norm_dweight(dy: Array, x: Array, rstd: Array) -> Array:
    """The gradient of the weight [n] of rms_norm; call it before rms_norm_backward overwrites dy."""
    scaled = x * rstd
    scaled *= dy
    dweight: Array = scaled.sum(0)
    return dweight


def swiglu(gate: Array, up: Array, out: Array) -> Array:
    """silu(gate) * up (arXiv 2002.05202), each [T, n], written into out."""
    with np.errstate(over="ignore"):  # exp of a large -gate is inf, and 1 / inf the right 0
        for rows in _cached_rows(gate):
            g, o = gate[rows], out[rows]
            np.negative(g, out=o)
            np.exp(o, out=o)
            o += 1
            np.divide(g, o, out=o)
            o *= up[rows]
    return out


def swiglu_backward(dout: Array, gate: Array, up: Array) -> None:
    """The gradients of gate and up, written over gate and up."""
    with np.errstate(over="ignore"):
        for rows in _cached_rows(gate):
            d, g, u = dout[rows], gate[rows], up[rows]
            sigmoid = np.negative(g)
            np.exp(sigmoid, out=sigmoid)
            sigmoid += 1
            np.reciprocal(sigmoid, out=sigmoid)
            silu = g * sigmoid
            g -= silu  # silu' = sigmoid * (1 + gate - silu)
            g += 1
            g *= sigmoid
            g *= d
            g *= u
            np.multiply(d, silu, out=u)


def cross_entropy(logits: Array, targets: NDArray[np.integer[Any]], scale: float | None) -> float:
    """The sum of -log softmax(logits)[target] over rows, in float64.

    logits [T, vocabulary] are overwritten: by the gradient of scale times the sum, or by scratch.
    """
    total = 0.0
    for rows in _cached_rows(logits):
        part, target = logits[rows], targets[rows]
        at = np.arange(len(part)), target
        top = part.max(1, keepdims=True)  # [t, 1]
        picked = (part[at] - top[:, 0]).astype(np.float64)
        part -= top
        np.exp(part, out=part)
        norm = part.sum(1, keepdims=True)
        total += float(np.sum(np.log(norm[:, 0].astype(np.float64)) - picked))
        if scale is not None:
            part *= scale / norm
            part[at] -= part.dtype.type(scale)
    return total


def head_loss(
    x: Array,
    weight: Array,
    targets: NDArray[np.integer[Any]],
    space: Workspace,
    scale: float | None = None,
    dweight: Array | None = None,
    elements: int = HEAD_ELEMENTS,
) -> tuple[float, Array | None]:
    """Output projection and cross-entropy, forward and backward in one pass over chunks of rows.

    x [T, hidden], weight [vocabulary, hidden], targets [T], none ignored. Returns the sum of the losses and
    dx [T, hidden] of scale times it (None if scale is None); adds the weight's gradient to dweight if given.
    At most about `elements` logits exist at a time.
    """
    vocabulary = len(weight)
    dx = None if scale is None else np.empty_like(x)
    chunks = max(1, -(-x.size // x.shape[1] * vocabulary // elements))
    rows = max(1, -(-len(x) // chunks))
    total = 0.0
    for start in range(0, len(x), rows):
        part = x[start : start + rows]
        logits = space.take("logits", (len(part), vocabulary), x.dtype)
        np.matmul(part, weight.T, out=logits)
        total += cross_entropy(logits, targets[start : start + rows], scale)
        if dx is not None:
            np.matmul(logits, weight, out=dx[start : start + rows])
        if dweight is not None:
            dweight += np.matmul(logits.T, part, out=space.take("dweight", weight.shape, x.dtype))
    return total, dx


def add_embedding_grad(dweight: Array, ids: NDArray[np.integer[Any]], dx: Array) -> None:
    """Add the rows dx [T, hidden] to the rows ids [T] of dweight, repeated ids in their order."""
    order = np.argsort(ids, kind="stable")
    unique, starts = np.unique(ids[order], return_index=True)
    dweight[unique] += np.add.reduceat(dx[order], starts, axis=0)


def _cached_rows(x: Array) -> list[slice]:
    # Single rows, even long ones, would cost the threads more in turns of the GIL than the cache saves.
    step = max(4, _CACHED // x.shape[1])
    return [slice(i, i + step) for i in range(0, len(x), step)]
