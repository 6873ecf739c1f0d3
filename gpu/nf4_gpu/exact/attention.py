"""Attention of the exact tier on the device, to the bits of nf4.exact.attention: launches of attention.cu."""

import math
from collections.abc import Iterator
from typing import Any

import cupy
import numpy as np
from cupy.cuda import runtime
from nf4.exact.grid import PIECE
from nf4.model.attention import Heads

from nf4_gpu.compile import kernel
from nf4_gpu.exact import ops
from nf4_gpu.exact.grid import Space, columns, finish, product_bits_of, rows, status, sums

_SCORES = 1 << 25  # that exist at a time, unless a sequence of one group of heads has more


def attend(
    q: cupy.ndarray,
    k: cupy.ndarray,
    v: cupy.ndarray,
    lengths: tuple[int, ...],
    heads: Heads,
    window: int | None,
    space: Space,
    out: cupy.ndarray,
) -> cupy.ndarray:
    """softmax(q k^T / sqrt(dim)) v in each sequence, a query seeing itself and what was before (NF4-15.2).

    q [T, kv_heads * group * dim]; k, v [T, kv_heads * dim]; written into out, shaped as q.
    """
    for part in _parts(lengths, heads):
        queries, keys = part.gather(q, True, space, "q"), part.gather(k, False, space, "k")
        _, wide = _probabilities(part, queries, keys, window, space)
        values = part.gather(v, False, space, "v")
        right = columns(values, space.take("v", values.shape, np.float64))
        part.scatter(sums(wide, right, space), out, True)
    return out


def attend_backward(
    dout: cupy.ndarray,
    q: cupy.ndarray,
    k: cupy.ndarray,
    v: cupy.ndarray,
    lengths: tuple[int, ...],
    heads: Heads,
    window: int | None,
    space: Space,
) -> tuple[cupy.ndarray, cupy.ndarray, cupy.ndarray]:
    """dq, dk, dv of attend; the probabilities are computed again, to the same bits (NF4-15.2)."""
    dq, dk, dv = (space.new(x.shape, np.float32) for x in (q, k, v))
    for part in _parts(lengths, heads):
        queries, keys = part.gather(q, True, space, "q"), part.gather(k, False, space, "k")
        values, douts = part.gather(v, False, space, "v"), part.gather(dout, True, space, "dout")
        p, _ = _probabilities(part, queries, keys, window, space)
        wide = columns(p, space.take("by key", p.shape, np.float64))
        right = columns(douts, space.take("right", douts.shape, np.float64))
        part.scatter(sums(wide.mT, right, space), dv, False)

        left = rows(douts, space.take("left", douts.shape, np.float64))
        right = rows(values, space.take("right", values.shape, np.float64))
        e, wide = _scores_backward(part, sums(left, right.mT, space, "scores"), p, window, space)
        right = columns(keys, space.take("right", keys.shape, np.float64))
        part.scatter(sums(wide, right, space), dq, True)
        wide = columns(e, space.take("by key", e.shape, np.float64))
        right = columns(queries, space.take("right", queries.shape, np.float64))
        part.scatter(sums(wide.mT, right, space), dk, False)
    return dq, dk, dv


class _Part:
    """Neighbouring sequences of one length: their rows, and what their matrices have in common."""

    def __init__(self, first: int, sequences: int, n: int, heads: Heads) -> None:
        self.rows = slice(first, first + sequences * n)
        self.n, self.heads, self.batch = n, heads, sequences * heads.kv_heads

    def gather(self, x: cupy.ndarray, grouped: bool, space: Space, name: str) -> cupy.ndarray:
        """Rows of heads as float32 [batch, group * n, dim], head after head."""
        group = self.heads.group if grouped else 1
        out = space.take(f"{name} of heads", (self.batch, group * self.n, self.heads.dim), np.float32)
        function = kernel(runtime.getDevice(), "exact/attention.cu", "gather", DTYPE=0, LANES=32, VALUES=4)
        rows_ = self.batch * group * self.n
        function((-(-rows_ // 8),), (256,), (x[self.rows], *self._sizes(group), np.int64(rows_), out))
        return out

    def scatter(self, found: cupy.ndarray, out: cupy.ndarray, grouped: bool) -> None:
        """The product of these sums [batch, group * n, dim] as rows of heads."""
        group = self.heads.group if grouped else 1
        rows_ = self.batch * group * self.n
        function = kernel(runtime.getDevice(), "exact/attention.cu", "scatter", DTYPE=0, LANES=32, VALUES=4)
        tail = (*self._sizes(group), np.int64(rows_), out[self.rows])
        function((-(-rows_ // 8),), (256,), (found, *tail))

    def _sizes(self, group: int) -> tuple[np.int32, ...]:
        return np.int32(self.n), np.int32(self.heads.kv_heads), np.int32(group), np.int32(self.heads.dim)


def _parts(lengths: tuple[int, ...], heads: Heads) -> Iterator[_Part]:
    start = i = 0
    while i < len(lengths):
        n = lengths[i]
        most = max(1, _SCORES // (heads.kv_heads * heads.group * n * n))
        count = 1
        while count < most and i + count < len(lengths) and lengths[i + count] == n:
            count += 1
        yield _Part(start, count, n, heads)
        start += count * n
        i += count


def _probabilities(
    part: _Part, queries: cupy.ndarray, keys: cupy.ndarray, window: int | None, space: Space
) -> tuple[cupy.ndarray, cupy.ndarray]:
    """p float32 [batch, group * n, n], and p on the grids of its rows."""
    left = rows(queries, space.take("left", queries.shape, np.float64))
    right = rows(keys, space.take("right", keys.shape, np.float64))
    found = sums(left, right.mT, space, "scores")
    p = space.take("p", found.shape, np.float32)
    n, seen = part.n, np.int32(part.n if window is None else window)
    if n > PIECE:
        finish(found, p, _scale(part.heads))
        _launch("hide", n, p.size, p, np.int64(p.size), np.int32(n), seen)
        ops.softmax(p)
        return p, rows(p, found)
    tail = (np.int64(p.size // n), np.int32(n), seen, np.float32(_scale(part.heads)), product_bits_of(n))
    _launch("probabilities", n, p.size // n * _lanes(n)[0], found, *tail, p, status())
    return p, found


def _scores_backward(
    part: _Part, found: cupy.ndarray, p: cupy.ndarray, window: int | None, space: Space
) -> tuple[cupy.ndarray, cupy.ndarray]:
    """e float32 [batch, group * n, n] of the sums of the gradient of p, and e on the grids of its rows."""
    e = space.take("e", p.shape, np.float32)
    n, seen = part.n, np.int32(part.n if window is None else window)
    if n > PIECE:
        finish(found, e)
        ops.softmax_backward(e, p, _scale(part.heads))
        return e, rows(e, found)
    tail = (np.int64(p.size // n), np.int32(n), seen, np.float32(_scale(part.heads)), product_bits_of(n))
    _launch("scores_backward", n, p.size // n * _lanes(n)[0], found, p, *tail, e, status())
    return e, found


def _scale(heads: Heads) -> float:
    return float(np.float32(1 / math.sqrt(heads.dim)))


def _lanes(n: int) -> tuple[int, int]:
    """Threads of a row, and the keys of a thread."""
    lanes = 32 if n <= 1024 else 256
    return lanes, max(4, 1 << (-(-n // lanes) - 1).bit_length())


def _launch(name: str, n: int, threads: int, *arguments: Any) -> None:
    lanes, values = _lanes(min(n, PIECE))
    function = kernel(runtime.getDevice(), "exact/attention.cu", name, DTYPE=0, LANES=lanes, VALUES=values)
    function((-(-threads // 256),), (256,), arguments)
