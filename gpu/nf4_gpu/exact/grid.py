"""Products and sums on the device, to the bits of nf4.exact.grid: launches of grid.cu, products by cuBLAS."""

import math
from typing import Any

import cupy
import numpy as np
from cupy.cuda import runtime
from nf4.exact.grid import NotFiniteError, piece_length, product_bits
from nf4.lora import Workspace
from numpy.typing import DTypeLike

from nf4_gpu import blas
from nf4_gpu.arrays import KINDS, scratch
from nf4_gpu.compile import kernel

_SOURCE = "exact/grid.cu"
KNOWN = 16
"""Batches, by the lengths of their sequences, whose tables stay on the device: a run has ever new ones."""
_VALUES = (1, 2, 4, 6, 8, 12, 16, 20, 24, 32)  # of a lane, in rows


class Space(Workspace):
    """Device memory that one call reuses from layer to layer."""

    _empty = staticmethod(cupy.empty)

    def new(self, shape: tuple[int, ...], dtype: DTypeLike) -> cupy.ndarray:
        """An uninitialised array that nothing overwrites."""
        return cupy.empty(shape, dtype)


def place() -> tuple[int, int]:
    """Return the current device and stream: tables made there are read there, and their memory used again."""
    return runtime.getDevice(), cupy.cuda.get_current_stream().ptr


def status() -> cupy.ndarray:
    """Whether something was not finite where it must be: int32 [1] of this thread and stream, 0 at first."""
    return scratch.take("exact", 1, cupy.int32, zeroed=True)


def check(found: int) -> None:
    """Reset the status, of which this was read; raise NotFiniteError unless it was 0."""
    if found:
        status().fill(0)
        raise NotFiniteError("an operand of an exact sum or product has a NaN or an infinity (NF4-14.1)")


def rows(x: cupy.ndarray, out: cupy.ndarray) -> cupy.ndarray:
    """Put each row of x [..., K] on its grid, into out, float64 of that shape (NF4-14.2).

    x is float32, float16 or bfloat16. Both are contiguous, or matrices whose rows are.
    """
    k = x.shape[-1]
    count = x.size // k if k else 0
    if count:
        piece = piece_length(k)
        lanes = 32 if piece <= 1024 else 256
        values = -(-piece // lanes)
        # A number of values that is a power of two, or near it: few kernels serve all.
        function = _kernel("rows", x, LANES=lanes, VALUES=next(n for n in _VALUES if n >= values))
        sizes = np.int64(count), np.int32(k), np.int32(piece), _ld(x), out, _ld(out)
        function((-(-count // (256 // lanes)),), (256,), (x, *sizes, *_bits(k), status()))
    return out


def columns(x: cupy.ndarray, out: cupy.ndarray) -> cupy.ndarray:
    """Put each column of x [..., K, N] on its grid, into out, float64 of that shape (NF4-14.2).

    As rows in everything else; leading axes are of contiguous arrays.
    """
    k, n = x.shape[-2:]
    batch = math.prod(x.shape[:-2])
    if x.size:
        piece, following = piece_length(k), np.int64(k * n)
        sizes = np.int32(k), np.int32(piece), np.int32(n), _ld(x), following, out, _ld(out), following
        launch = (-(-n // 8), batch, -(-k // piece))
        _kernel("columns", x)(launch, (512,), (x, *sizes, *_bits(k), status()))
    return out


def product_bits_of(k: int) -> np.int32:
    """q of the terms of a product that is not cut (NF4-14.2)."""
    return np.int32(product_bits(k))


def _bits(k: int) -> tuple[np.int32, np.int32]:
    """q of the pieces of K terms, and of the last (NF4-14.2)."""
    piece = piece_length(k)
    return product_bits_of(piece), product_bits_of(k % piece or piece)


def sums(left: cupy.ndarray, right: cupy.ndarray, space: Space, name: str = "sums") -> cupy.ndarray:
    """The sums of left [..., M, K] times right [..., K, N], on grids: float64 [..., M, N] (NF4-14.3)."""
    k = left.shape[-1]
    piece = piece_length(k)
    pieces, whole = max(1, -(-k // piece)), k // piece
    out = space.take(name, (pieces, *left.shape[:-1], right.shape[-1]), np.float64)
    if k == 0:
        out.fill(0)
    if whole == pieces == 1:
        blas.multiply_float64(left, right, out[0])
    elif left.ndim == 2 and whole:
        blas.multiply_float64(_pieces(left, -1, piece, whole), _pieces(right, -2, piece, whole), out[:whole])
    else:
        for i in range(whole):
            part = slice(i * piece, i * piece + piece)
            blas.multiply_float64(left[..., part], right[..., part, :], out[i])
    if k and whole < pieces:
        blas.multiply_float64(left[..., whole * piece :], right[..., whole * piece :, :], out[whole])
    if pieces > 1 and out.size:
        n = out[0].size
        _kernel("combine", out)((-(-n // 256),), (256,), (out, np.int64(n), np.int64(n), np.int32(pieces)))
    found: cupy.ndarray = out[0]
    return found


def _pieces(x: cupy.ndarray, axis: int, piece: int, count: int) -> cupy.ndarray:
    """The first pieces of a matrix along an axis, as a view [count, ...]."""
    shape = [*x.shape]
    shape[axis] = piece
    strides = (x.strides[axis] * piece, *x.strides)
    return cupy.ndarray((count, *shape), x.dtype, x.data, strides=strides)


def finish(found: cupy.ndarray, out: cupy.ndarray, factor: float = 1.0) -> cupy.ndarray:
    """The product whose sums [..., N] these are, times factor, into out float32 [..., N] (NF4-14.3)."""
    n = found.shape[-1]
    if out.size:
        head = found, np.int64(n), _ld(found), np.float32(factor), out
        _kernel("finish", out)((out.size // n,), (64 if n <= 256 else 256,), head)
    return out


def product(a: cupy.ndarray, b: cupy.ndarray, out: cupy.ndarray, space: Space) -> cupy.ndarray:
    """a [..., M, K] times b [..., K, N] into out, all float32 (NF4-14.3)."""
    left = rows(a, space.take("left", a.shape, np.float64))
    right = columns(b, space.take("right", b.shape, np.float64))
    return finish(sums(left, right, space), out)


def add(x: cupy.ndarray, y: cupy.ndarray) -> None:
    """Add y to x, in place, both float32 of one shape (NF4-14.1)."""
    if x.size:
        _kernel("add", x)((-(-x.size // 256),), (256,), (x, y, np.int64(x.size)))


def squares(x: cupy.ndarray, starts: cupy.ndarray, space: Space) -> cupy.ndarray:
    """The sums of squares of pieces of x float32: float64 [pieces]; starts int64 [pieces + 1] (NF4-14.4)."""
    pieces = starts.size - 1
    found = space.take("squares", (pieces,), np.float64)
    _kernel("squares", x)((pieces,), (256,), (x, starts, found, status()))
    return found


def _kernel(name: str, x: cupy.ndarray, LANES: int = 32, VALUES: int = 1) -> Any:
    defines = {"DTYPE": KINDS.get(x.dtype, 0), "LANES": LANES, "VALUES": VALUES}
    return kernel(runtime.getDevice(), _SOURCE, name, **defines)


def _ld(x: cupy.ndarray) -> np.int64:
    """The elements from one row to the next."""
    return np.int64(x.strides[-2] // x.itemsize if x.ndim > 1 else x.size)
