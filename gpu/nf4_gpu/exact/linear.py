"""The LoRA layer of the exact tier on the device, to the bits of nf4.exact.linear: launches of linear.cu."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import cupy
import numpy as np
from cupy.cuda import runtime
from nf4.exact.grid import PIECE
from nf4.exact.linear import scale
from nf4.lora import Dropout, LoRA, LoRALinear
from nf4.random import drop_threshold
from nf4.tensor import QuantizedTensor

from nf4_gpu.arrays import KINDS
from nf4_gpu.compile import kernel
from nf4_gpu.exact import grid
from nf4_gpu.exact.grid import (
    KNOWN,
    Space,
    columns,
    finish,
    place,
    product_bits_of,
    rows,
    status,
    sums,
)
from nf4_gpu.random import drop
from nf4_gpu.tensor import dequantize

_ROWS, _COLUMNS, _RANKS, _WARPS, _ROW_WARPS = 32, 128, 16, 16, 8  # of a block, as in linear.cu
_SHARED = 64 << 10  # bytes, of a block of gradient
Gradients = tuple[cupy.ndarray, cupy.ndarray] | tuple[None, None]


@dataclass
class LinearCache:
    """What backward needs of a layer, beside its input: Z [T, rank]; drops: whether a mask is drawn."""

    z: cupy.ndarray | None
    drops: bool


def forward(
    layers: Sequence[LoRALinear],
    x: cupy.ndarray,
    dropout: Dropout | None,
    outs: Sequence[cupy.ndarray],
    space: Space,
) -> list[LinearCache]:
    """Write y [T, out] of each layer for the x [T, in] they share into its out (NF4-15.1)."""
    left = rows(x, space.take("input", x.shape, np.float64))
    # The weights of all, the rows of each A below its W: one product makes everything.
    heights = [
        layer.weight.shape[0]
        + (0 if layer.lora is None or _drops(layer.lora, dropout) else len(layer.lora.A))
        for layer in layers
    ]
    right = space.take("weight", (sum(heights), x.shape[1]), np.float64)
    start = 0
    for layer, height in zip(layers, heights, strict=True):
        outputs, stop = layer.weight.shape[0], start + height
        rows(_plain(layer.weight, space), right[start : start + outputs])
        if layer.lora is not None and height > outputs:
            rows(layer.lora.A, right[start + outputs : stop])
        start = stop
    found = sums(left, right.mT, space)
    caches = []
    start = 0
    for layer, height, y in zip(layers, heights, outs, strict=True):
        outputs, stop = layer.weight.shape[0], start + height
        lora, drops = layer.lora, _drops(layer.lora, dropout)
        cache, low, factor = LinearCache(None, drops), None, None
        if lora is not None:
            inner = _inner(lora, x, dropout, space) if drops else found[:, start + outputs : stop]
            cache.z, low = _low_rank(inner, scale(lora, drops), space)
            factor = _transposed(lora.B, space)
        _finish(found[:, start : start + outputs], layer.bias, low, factor, y)
        caches.append(cache)
        start = stop
    return caches


def project(
    layer: LoRALinear, x: cupy.ndarray, left: None, dropout: Dropout | None, space: Space
) -> LinearCache:
    """The cache of forward without its output: all that a recomputation for backward needs."""
    lora = layer.lora
    if lora is None:
        return LinearCache(None, False)
    drops = _drops(lora, dropout)
    inner = _inner(lora, x, dropout if drops else None, space)
    return LinearCache(_low_rank(inner, scale(lora, drops), space)[0], drops)


def backward(
    layers: Sequence[LoRALinear],
    douts: Sequence[cupy.ndarray],
    caches: Sequence[LinearCache],
    x: cupy.ndarray,
    dropout: Dropout | None,
    lengths: tuple[int, ...],
    space: Space,
    outs: Sequence[Gradients],
    need_dx: bool = True,
) -> cupy.ndarray | None:
    """dout [T, out] of each layer -> the sum of their dx [T, in], None unless need_dx (NF4-15.1).

    dA and dB are written into outs, [sequences, ...], of the layers that have an adapter.
    """
    dx: cupy.ndarray | None = None
    for layer, dout, cache, (dA, dB) in zip(layers, douts, caches, outs, strict=True):
        if dA is None and not need_dx:
            continue
        outputs, inputs = layer.weight.shape
        lora = layer.lora if dA is not None else None
        rank, first = 0 if lora is None else len(lora.A), inputs if need_dx else 0
        left = rows(dout, space.take("gradient", dout.shape, np.float64))
        right = space.take("weight", (outputs, first + rank), np.float64)
        if need_dx:
            columns(_plain(layer.weight, space), right[:, :inputs])
        if lora is not None:
            columns(lora.B, right[:, first:])
        found = sums(left, right, space)
        low: cupy.ndarray | None = None
        factor: cupy.ndarray | None = None
        if lora is not None and dA is not None and dB is not None:
            dz, low = _low_rank(found[:, first:], scale(lora, cache.drops), space)
            kept = x
            if cache.drops and dropout is not None:
                kept = space.take("kept", x.shape, np.float32)
                drop(dropout, lora.stream, lora.dropout, x, kept)
            _gradient(dz, kept, lengths, dA, False, space)
            _gradient(cache.z, dout, lengths, dB, True, space)
            factor = columns(lora.A, space.take("factor", lora.A.shape, np.float64))
        if not need_dx:
            continue
        add = dx is not None
        if dx is None:
            dx = space.new(x.shape, np.float32)
        if lora is None or not cache.drops or dropout is None:
            _finish(found[:, :inputs], None, low, factor, dx, add)
            continue
        # What is dropped of the low-rank part is not added.
        part = space.take("part", x.shape, np.float32) if add else dx
        _finish(found[:, :inputs], None, None, None, part)
        inner = space.take("low rank", x.shape, np.float32)
        _finish(None, None, low, factor, inner)
        drop(dropout, lora.stream, lora.dropout, inner, part, add=True)
        if add:
            grid.add(dx, part)
    return dx


def _drops(lora: LoRA | None, dropout: Dropout | None) -> bool:
    return lora is not None and dropout is not None and drop_threshold(lora.dropout) > 0


def _plain(weight: Any, space: Space) -> cupy.ndarray:
    """The weight in its own dtype (NF4-4)."""
    if isinstance(weight, QuantizedTensor):
        return dequantize(weight, out=space.take("plain", weight.shape, weight.dtype))
    return weight


def _inner(lora: LoRA, x: cupy.ndarray, dropout: Dropout | None, space: Space) -> cupy.ndarray:
    """The sums of D(x) times A^T [T, rank]."""
    kept = x
    if dropout is not None:
        kept = space.take("kept", x.shape, np.float32)
        drop(dropout, lora.stream, lora.dropout, x, kept)
    left = rows(kept, space.take("kept", x.shape, np.float64))
    right = rows(lora.A, space.take("factor", lora.A.shape, np.float64))
    return sums(left, right.mT, space, "inner sums")


def _low_rank(found: cupy.ndarray, factor: np.float32, space: Space) -> tuple[cupy.ndarray, cupy.ndarray]:
    """factor times the product of these sums [T, rank], float32, and that on the grids of its rows."""
    count, rank = found.shape
    z = cupy.empty((count, rank), cupy.float32)
    low = space.take("low rank", (count, rank), np.float64)
    function = kernel(runtime.getDevice(), "exact/linear.cu", "low_rank", DTYPE=0)
    head = (found, np.int64(count), np.int32(rank), _ld(found), factor)
    function((-(-count // _ROW_WARPS),), (32 * _ROW_WARPS,), (*head, product_bits_of(rank), z, low, status()))
    return z, low


def _transposed(B: cupy.ndarray, space: Space) -> cupy.ndarray:
    """B^T [rank, out] with its columns on their grids."""
    outputs, rank = B.shape
    out = space.take("factor", (rank, outputs), np.float64)
    function = kernel(runtime.getDevice(), "exact/linear.cu", "transposed", DTYPE=KINDS[B.dtype])
    bits = product_bits_of(rank)
    sizes = np.int32(outputs), np.int32(rank), bits
    function((-(-outputs // _ROW_WARPS),), (32 * _ROW_WARPS,), (B, *sizes, out, status()))
    return out


def _finish(
    found: cupy.ndarray | None,
    bias: cupy.ndarray | None,
    low: cupy.ndarray | None,
    factor: cupy.ndarray | None,
    y: cupy.ndarray,
    add: bool = False,
) -> None:
    """y [T, n] = the product of these sums + bias + low [T, rank] times factor [rank, n]; add: added to y."""
    count, n = y.shape
    rank = 0 if low is None else low.shape[1]
    function = kernel(runtime.getDevice(), "exact/linear.cu", "finish_linear", DTYPE=0)
    arrays = [0 if array is None else array for array in (found, bias, low, factor)]
    head = (arrays[0], np.int64(count), np.int32(n), np.int64(0) if found is None else _ld(found))
    tail = (*arrays[1:], np.int32(rank), np.bool_(add), y)
    function((-(-n // _COLUMNS), -(-count // _ROWS)), (_COLUMNS,), (*head, *tail))


def _gradient(
    left: cupy.ndarray,
    right: cupy.ndarray,
    lengths: tuple[int, ...],
    out: cupy.ndarray,
    transposed: bool,
    space: Space,
) -> None:
    """For each sequence left^T right, [rank, n], or its transpose, into out [sequences, ...] (NF4-15.1)."""
    rank, n = left.shape[1], right.shape[1]
    if max(lengths) > PIECE:
        _long_gradient(left, right, lengths, out, transposed, space)
        return
    function = kernel(runtime.getDevice(), "exact/linear.cu", "gradient", _SHARED, DTYPE=0)
    by = (np.int64(1), np.int64(rank)) if transposed else (np.int64(n), np.int64(1))
    following = np.int64(out.strides[0] // 4)
    grid = (-(-n // 32), -(-rank // _RANKS), len(lengths))
    head = (left, right, starts(lengths), np.int32(rank), np.int32(n))
    function(grid, (32 * _WARPS,), (*head, out, following, *by, status()), shared_mem=_SHARED)


def _long_gradient(
    left: cupy.ndarray,
    right: cupy.ndarray,
    lengths: tuple[int, ...],
    out: cupy.ndarray,
    transposed: bool,
    space: Space,
) -> None:
    start = 0
    for i, n in enumerate(lengths):
        a, b = left[start : start + n], right[start : start + n]
        if transposed:
            a, b = b, a
        wide = columns(a, space.take("long left", a.shape, np.float64))
        other = columns(b, space.take("long right", b.shape, np.float64))
        finish(sums(wide.mT, other, space, "gradient sums"), out[i])
        start += n


def starts(lengths: tuple[int, ...]) -> cupy.ndarray:
    """Return where the sequences begin, and the last ends: int32 [sequences + 1], on the device."""
    return _starts(*place(), lengths)


@lru_cache(maxsize=KNOWN)
def _starts(device: int, stream: int, lengths: tuple[int, ...]) -> cupy.ndarray:
    return cupy.asarray(np.cumsum([0, *lengths]).astype(np.int32))


def _ld(found: cupy.ndarray) -> np.int64:
    """The elements from a row to the next."""
    return np.int64(found.strides[0] // found.itemsize)
