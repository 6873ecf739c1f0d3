"""The operations of a layer outside its products, to the bits of nf4.exact.ops: launches of ops.cu.

Arrays are contiguous float32. What is not finite where it must be is noted in grid.status.
"""

from typing import Any

import cupy
import numpy as np
from cupy.cuda import runtime

from nf4_gpu.arrays import KINDS
from nf4_gpu.compile import kernel
from nf4_gpu.exact.grid import add, status

__all__ = [
    "add",
    "cross_entropy",
    "embed",
    "rms_norm",
    "rms_norm_backward",
    "rms_scale",
    "rotate",
    "softmax",
    "softmax_backward",
    "swiglu",
    "swiglu_backward",
]

_THREADS = 256


def embed(table: cupy.ndarray, ids: cupy.ndarray) -> cupy.ndarray:
    """The rows of the tokens ids int32 [T], widened: float32 [T, hidden] (NF4-15.4)."""
    out = cupy.empty((len(ids), table.shape[1]), cupy.float32)
    function = kernel(runtime.getDevice(), "exact/ops.cu", "embed", DTYPE=KINDS[table.dtype])
    tail = np.int32(table.shape[1]), np.int64(out.size), out
    function((-(-out.size // _THREADS),), (_THREADS,), (table, ids, *tail))
    return out


def swiglu(gate: cupy.ndarray, up: cupy.ndarray, out: cupy.ndarray) -> cupy.ndarray:
    """silu(gate) * up (NF4-14.7), written into out."""
    _elements("swiglu", gate.size, gate, up, np.int64(gate.size), out)
    return out


def swiglu_backward(dout: cupy.ndarray, gate: cupy.ndarray, up: cupy.ndarray) -> None:
    """The gradients of gate and up (NF4-14.7), written over gate and up."""
    _elements("swiglu_backward", gate.size, dout, gate, up, np.int64(gate.size))


def rms_norm(
    x: cupy.ndarray, weight: cupy.ndarray, eps: float, out: cupy.ndarray | None = None
) -> tuple[cupy.ndarray, cupy.ndarray]:
    """y = x / rms(x) * weight over the last axis of x [T, n], into out, and 1 / rms [T, 1] (NF4-14.9)."""
    y = cupy.empty_like(x) if out is None else out
    rstd = cupy.empty((len(x), 1), cupy.float32)
    tail = np.int32(x.shape[1]), np.float64(eps), y, rstd, status()
    _rows("rms_norm", x, x, weight, *tail)
    return y, rstd


def rms_scale(x: cupy.ndarray, weight: cupy.ndarray, rstd: cupy.ndarray, out: cupy.ndarray) -> cupy.ndarray:
    """The output of rms_norm [T, n] once 1 / rms is known, written into out (NF4-14.9)."""
    _rows("rms_scale", x, x, weight, rstd, np.int32(x.shape[1]), out)
    return out


def rms_norm_backward(
    dy: cupy.ndarray, x: cupy.ndarray, weight: cupy.ndarray, rstd: cupy.ndarray
) -> cupy.ndarray:
    """dx of rms_norm [T, n], written over dy (NF4-14.9)."""
    _rows("rms_norm_backward", x, dy, x, weight, rstd, np.int32(x.shape[1]), status())
    return dy


def rotate(x: cupy.ndarray, cos: cupy.ndarray, sin: cupy.ndarray, inverse: bool = False) -> None:
    """Rotate x [T, heads * head_dim] in place; cos and sin [T, head_dim / 2] (NF4-14.11)."""
    half = cos.shape[1]
    heads = x.shape[1] // (2 * half)
    _rows("rotate", x, x, cos, sin, np.int32(heads), np.int32(half), np.bool_(inverse))


def softmax(scores: cupy.ndarray) -> cupy.ndarray:
    """Softmax of each row of scores [..., n], written over them (NF4-14.8)."""
    _rows("softmax", scores, scores, np.int32(scores.shape[-1]), status())
    return scores


def softmax_backward(dout: cupy.ndarray, p: cupy.ndarray, factor: float = 1.0) -> cupy.ndarray:
    """The gradient of the scores [..., n] times factor, written over dout (NF4-14.8)."""
    _rows("softmax_backward", p, dout, p, np.int32(p.shape[-1]), np.float32(factor), status())
    return dout


def cross_entropy(logits: cupy.ndarray, targets: cupy.ndarray, scale: float | None) -> cupy.ndarray:
    """The losses [T] of logits [T, vocabulary], over which the gradient is written (NF4-14.10).

    targets int32 [T], all in the vocabulary. Without a scale there is no gradient, and logits are scratch.
    """
    losses = cupy.empty(len(logits), cupy.float32)
    scalars = np.int32(logits.shape[1]), np.float32(scale or 0), np.bool_(scale is not None)
    _rows("cross_entropy", logits, logits, targets, *scalars, losses, status())
    return losses


def _rows(name: str, x: cupy.ndarray, *arguments: Any) -> None:
    """A block for each row of x."""
    n = x.shape[-1]
    if x.size:
        threads = 1024 if n > 4096 else _THREADS if n > 128 else 64
        _kernel(name)((x.size // n,), (threads,), arguments)


def _elements(name: str, n: int, *arguments: Any) -> None:
    if n:
        _kernel(name)((-(-n // _THREADS),), (_THREADS,), arguments)


def _kernel(name: str) -> Any:
    return kernel(runtime.getDevice(), "exact/ops.cu", name, DTYPE=0)
