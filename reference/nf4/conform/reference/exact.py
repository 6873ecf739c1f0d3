"""The operations of chapter 14 on the reference: products, sums, functions, and what is made of them."""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nf4.conform.reference.training import scalar
from nf4.errors import InputError
from nf4.exact import elementary, grid, ops
from nf4.model.ops import IGNORED

Float32 = NDArray[np.float32]
Outputs = dict[str, Any]


def exact_product(a: Float32, b: Float32, shape: list[int]) -> Outputs:
    """Return y [M, N] of a [M, K] and b [K, N], shape being M, K and N (NF4-14.2, NF4-14.3)."""
    if len(shape) != 3:
        raise InputError(f"shape is {shape}; it must be M, K and N")
    m, k, n = shape
    return {"y": grid.product(_shaped("a", a, m, k), _shaped("b", b, k, n))}


def exact_sum(x: Float32, y: Float32 | None = None) -> Outputs:
    """Return sum float64 [1] of x [n], or of x * y (NF4-14.4)."""
    value = grid.total(x) if y is None else grid.dot(x, _shaped("y", y, x.size))
    return {"sum": np.array([value])}


def exact_exp(x: Float32) -> Outputs:
    """Return y = e^x [n] (NF4-14.5)."""
    return {"y": elementary.exp(x)}


def exact_log(x: Float32) -> Outputs:
    """Return y = ln x [n] (NF4-14.6)."""
    return {"y": elementary.log(x)}


def exact_swiglu(gate: Float32, up: Float32) -> Outputs:
    """Return y = silu(gate) * up [n] (NF4-14.7)."""
    rows = gate[None]
    return {"y": ops.swiglu(rows, _shaped("up", up, 1, gate.size), np.empty_like(rows))}


def exact_swiglu_backward(dout: Float32, gate: Float32, up: Float32) -> Outputs:
    """Return dgate and dup [n] (NF4-14.7)."""
    dgate, dup = gate[None].copy(), _shaped("up", up, 1, gate.size).copy()
    ops.swiglu_backward(_shaped("dout", dout, 1, gate.size), dgate, dup)
    return {"dgate": dgate, "dup": dup}


def exact_softmax(z: Float32, columns: int) -> Outputs:
    """Return p [T, columns] (NF4-14.8)."""
    return {"p": ops.softmax(_rows("z", z, columns).copy())}


def exact_softmax_backward(dout: Float32, p: Float32, columns: int) -> Outputs:
    """Return dz [T, columns] (NF4-14.8)."""
    rows = _rows("p", p, columns)
    return {"dz": ops.softmax_backward(_shaped("dout", dout, *rows.shape).copy(), rows)}


def exact_rms_norm(x: Float32, weight: Float32, eps: Any) -> Outputs:
    """Return y [T, n] and rstd [T] (NF4-14.9)."""
    y, rstd = ops.rms_norm(_rows("x", x, weight.size), weight, scalar(eps))
    return {"y": y, "rstd": rstd}


def exact_rms_norm_backward(dout: Float32, x: Float32, weight: Float32, rstd: Float32) -> Outputs:
    """Return dx [T, n] (NF4-14.9)."""
    rows = _rows("x", x, weight.size)
    factors = _shaped("rstd", rstd, len(rows), 1)
    return {"dx": ops.rms_norm_backward(_shaped("dout", dout, *rows.shape).copy(), rows, weight, factors)}


def exact_cross_entropy(logits: Float32, vocabulary: int, targets: list[int]) -> Outputs:
    """Return losses [T], loss float64 [1] and dlogits [T, vocabulary] (NF4-14.10)."""
    rows = _rows("logits", logits, vocabulary).copy()
    if len(rows) != len(targets):
        raise InputError(f"{len(rows)} rows of logits have {len(targets)} targets")
    count = sum(target != IGNORED for target in targets)
    losses = ops.cross_entropy(rows, np.array(targets, np.int64), 1 / count if count else None)
    return {"losses": losses, "loss": np.array([ops.mean_loss(losses, count)]), "dlogits": rows}


def exact_rotate(x: Float32, cos: Float32, sin: Float32, head_dim: int, inverse: bool) -> Outputs:
    """Return y [T, heads, head_dim] of x, with cos and sin [T, head_dim / 2] (NF4-14.11)."""
    if head_dim < 2 or head_dim % 2:
        raise InputError(f"head_dim is {head_dim}; it must be even and at least 2")
    angles = _rows("cos", cos, head_dim // 2)
    if x.size % max(1, len(angles) * head_dim) or (x.size and not len(angles)):
        raise InputError(f"x has {x.size} elements, which are no heads of {len(angles)} rows")
    y = x.reshape(len(angles), -1 if len(angles) else 0).copy()
    ops.rotate(y, angles, _shaped("sin", sin, *angles.shape), inverse)
    return {"y": y}


def _shaped(what: str, array: Float32, *shape: int) -> Float32:
    if min(shape) < 0 or array.size != math.prod(shape):
        raise InputError(f"{what} has {array.size} elements; it must have {' x '.join(map(str, shape))}")
    return array.reshape(shape)


def _rows(what: str, array: Float32, columns: int) -> Float32:
    if columns < 1 or array.size % columns:
        raise InputError(f"{what} has {array.size} elements, which are no rows of {columns}")
    return array.reshape(-1, columns)
