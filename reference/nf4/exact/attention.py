"""Causal attention of the exact tier over packed sequences: the scores of a sequence's head as a whole."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from nf4.exact.grid import product
from nf4.exact.ops import softmax, softmax_backward
from nf4.lora import Workspace
from nf4.model.attention import Heads

Float32 = NDArray[np.float32]

# Scores of several groups of heads at a time.
_SCORES = 1 << 22


def attend(
    q: Float32,
    k: Float32,
    v: Float32,
    lengths: tuple[int, ...],
    heads: Heads,
    window: int | None,
    space: Workspace,
    out: Float32,
) -> Float32:
    """softmax(q k^T / sqrt(dim)) v in each sequence, a query seeing itself and what was before (NF4-15.2).

    q [T, kv_heads * group * dim]; k, v [T, kv_heads * dim]; window: how many positions, its own included, a
    query sees, None for all. Written into out, shaped as q. Raises InputError where an element is not finite.
    """
    for sequence, groups in _parts(lengths, heads):
        keys, values = (_of_heads(x, sequence, groups, heads.kv_heads) for x in (k, v))
        queries = _of_heads(q, sequence, groups, heads.kv_heads, heads.group)
        p = _probabilities(queries, keys, heads, window, space)
        mixed = product(p, values, space.take("mixed heads", queries.shape, np.float32), space)
        _put(out, mixed, sequence, groups, heads, heads.group)
    return out


def attend_backward(
    dout: Float32,
    q: Float32,
    k: Float32,
    v: Float32,
    lengths: tuple[int, ...],
    heads: Heads,
    window: int | None,
    space: Workspace,
) -> tuple[Float32, Float32, Float32]:
    """dq, dk, dv of attend; the probabilities are computed again, to the same bits (NF4-15.2)."""
    dq, dk, dv = np.empty_like(q), np.empty_like(k), np.empty_like(v)
    for sequence, groups in _parts(lengths, heads):
        keys, values = (_of_heads(x, sequence, groups, heads.kv_heads) for x in (k, v))
        queries, douts = (_of_heads(x, sequence, groups, heads.kv_heads, heads.group) for x in (q, dout))
        p = _probabilities(queries, keys, heads, window, space)
        _put(dv, product(p.mT, douts, space=space), sequence, groups, heads, 1)
        scores = product(douts, values.mT, space.take("dscores", p.shape, np.float32), space)
        softmax_backward(scores, p)
        scores *= _scale(heads)
        _put(dq, product(scores, keys, space=space), sequence, groups, heads, heads.group)
        _put(dk, product(scores.mT, queries, space=space), sequence, groups, heads, 1)
    return dq, dk, dv


def _probabilities(
    queries: Float32, keys: Float32, heads: Heads, window: int | None, space: Workspace
) -> Float32:
    """p [groups, group * n, n] of queries [groups, group * n, dim] and keys [groups, n, dim]."""
    groups, n, _ = keys.shape
    shape = (groups, queries.shape[1], n)
    scores = product(queries, keys.mT, space.take("scores", shape, np.float32), space)
    scores *= _scale(heads)
    ahead = np.arange(n) - np.arange(n)[:, None]  # key position less query's
    hidden = ahead > 0
    if window is not None:
        hidden |= ahead <= -window
    np.copyto(scores.reshape(groups, heads.group, n, n), -np.inf, where=hidden)
    return softmax(scores)


def _scale(heads: Heads) -> np.float32:
    return np.float32(1 / np.sqrt(np.float64(heads.dim)))


def _parts(lengths: tuple[int, ...], heads: Heads) -> Iterator[tuple[slice, slice]]:
    """The rows of a sequence, and some of the groups of heads: as many scores as _SCORES, or one group's."""
    start = 0
    for n in lengths:
        step = max(1, _SCORES // (heads.group * n * n))
        for first in range(0, heads.kv_heads, step):
            yield slice(start, start + n), slice(first, min(first + step, heads.kv_heads))
        start += n


def _of_heads(x: Float32, sequence: slice, groups: slice, kv_heads: int, group: int = 1) -> Float32:
    """Rows of heads [T, kv_heads * group * dim] as [groups, group * n, dim], head after head."""
    rows = x[sequence].reshape(sequence.stop - sequence.start, kv_heads, group, -1)[:, groups]
    n, some, _, dim = rows.shape
    return np.ascontiguousarray(rows.transpose(1, 2, 0, 3)).reshape(some, group * n, dim)


def _put(out: Float32, x: Float32, sequence: slice, groups: slice, heads: Heads, group: int) -> None:
    """Write [groups, group * n, dim] back as rows of heads."""
    n = sequence.stop - sequence.start
    target = out[sequence].reshape(n, heads.kv_heads, group, heads.dim)
    target[:, groups] = x.reshape(len(x), group, n, heads.dim).transpose(2, 0, 1, 3)
