"""Grouped-query causal attention over packed sequences, in blocks of queries, and its backward."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nf4.lora import Workspace

Array = NDArray[Any]

# Queries at a time: causality then skips most of the keys to come.
BLOCK = 32
# Scores of several groups of heads at a time: few large calls, whose arrays yet stay in the cache.
_SCORES = 1 << 17


@dataclass(frozen=True)
class Heads:
    """kv_heads groups of `group` query heads, each head `dim` wide."""

    kv_heads: int
    group: int
    dim: int


def attend(
    q: Array,
    k: Array,
    v: Array,
    lengths: tuple[int, ...],
    heads: Heads,
    window: int | None,
    space: Workspace,
    block: int = BLOCK,
    out: Array | None = None,
) -> tuple[Array, Array]:
    """softmax(q k^T / sqrt(dim)) v within each sequence, a query seeing itself and what came before.

    q [T, kv_heads * group * dim]; k, v [S, kv_heads * dim]. S is T, or more with one sequence whose last T
    positions are the queries. window: how many positions, its own included, a query sees; None for all.
    Returns out, shaped as q, and the log of each softmax's denominator [T, heads], which backward takes.
    """
    out = np.empty_like(q) if out is None else out
    lse = np.empty((len(q), heads.kv_heads * heads.group), q.dtype)
    qs, outs, lses = _queries(q, heads), _queries(out, heads), _queries(lse, heads)
    ks, vs = _keys(k, heads), _keys(v, heads)
    for g, a, b, first, last, hidden in _blocks(lengths, len(k) - len(q), heads, window, block):
        scores, _ = _scores(qs[g, a:b], ks[g, first:last], hidden, space)  # [g, (b - a) group, keys]
        top = scores.max(-1, keepdims=True)
        scores -= top
        np.exp(scores, out=scores)
        norm = scores.sum(-1, keepdims=True)  # [g, (b - a) group, 1]
        rows = scores @ vs[g, first:last]  # [g, (b - a) group, dim]
        rows /= norm
        outs[g, a:b] = rows.reshape(outs[g, a:b].shape)
        lses[g, a:b] = (np.log(norm) + top).reshape(lses[g, a:b].shape)
    return out, lse


def attend_backward(
    dout: Array,
    q: Array,
    k: Array,
    v: Array,
    out: Array,
    lse: Array,
    lengths: tuple[int, ...],
    heads: Heads,
    window: int | None,
    space: Workspace,
    block: int = BLOCK,
) -> tuple[Array, Array, Array]:
    """dq, dk, dv of attend; the probabilities are computed again rather than kept (arXiv 2205.14135)."""
    dq, dk, dv = np.empty_like(q), np.zeros_like(k), np.zeros_like(v)
    scale = 1 / math.sqrt(heads.dim)
    split = (len(q), -1, heads.dim)
    # Softmax's backward subtracts sum_j p_j dp_j from each row, which is dout . out.
    correction = np.vecdot(dout.reshape(split), out.reshape(split))  # [T, heads]
    qs, dqs, douts = _queries(q, heads), _queries(dq, heads), _queries(dout, heads)
    lses, corrections = _queries(lse, heads), _queries(correction, heads)
    ks, vs, dks, dvs = _keys(k, heads), _keys(v, heads), _keys(dk, heads), _keys(dv, heads)
    for g, a, b, first, last, hidden in _blocks(lengths, len(k) - len(q), heads, window, block):
        keys, values = ks[g, first:last], vs[g, first:last]  # [g, s, dim]
        p, scaled = _scores(qs[g, a:b], keys, hidden, space)  # [g, (b - a) group, s]
        rows = (len(p), p.shape[1], -1)
        p -= lses[g, a:b].reshape(rows)
        np.exp(p, out=p)
        drows = douts[g, a:b].reshape(rows)  # [g, (b - a) group, dim]
        dvs[g, first:last] += p.mT @ drows
        ds = np.matmul(drows, values.mT, out=space.take("dscores", p.shape, p.dtype))
        ds -= corrections[g, a:b].reshape(rows)
        ds *= p
        dks[g, first:last] += ds.mT @ scaled  # scaled = q / sqrt(dim)
        np.multiply((ds @ keys).reshape(dqs[g, a:b].shape), scale, out=dqs[g, a:b])
    return dq, dk, dv


def _queries(x: Array, heads: Heads) -> Array:
    """A view of rows of query heads [T, kv_heads * group * n] as [kv_heads, T, group, n]."""
    return x.reshape(len(x), heads.kv_heads, heads.group, -1).swapaxes(0, 1)


def _keys(x: Array, heads: Heads) -> Array:
    """A view of rows of key or value heads [T, kv_heads * dim] as [kv_heads, T, dim]."""
    return x.reshape(len(x), heads.kv_heads, -1).swapaxes(0, 1)


def _blocks(
    lengths: tuple[int, ...], past: int, heads: Heads, window: int | None, block: int
) -> list[tuple[slice, int, int, int, int, NDArray[np.bool_]]]:
    """Groups of heads, queries [a, b), keys [first, last), and a mask of the pairs left out.

    The mask [b - a, 1, n] is for the last n of the keys; the queries see all the keys before.
    """
    found = []
    start = 0
    for n in lengths:
        for a in range(start, start + n, block):
            b = min(a + block, start + n)
            first = start if window is None else max(start, a + past - window + 1)
            last = b + past
            masked = a + past if window is None else first
            ahead = np.arange(masked, last) - np.arange(a + past, last)[:, None]  # key position less query's
            hidden = ahead > 0
            if window is not None:
                hidden |= ahead <= -window
            step = max(1, _SCORES // ((b - a) * heads.group * (last - first)))
            for g in range(0, heads.kv_heads, step):
                found.append((slice(g, g + step), a, b, first, last, hidden[:, None, :]))
        start += n
    return found


def _scores(q: Array, keys: Array, hidden: NDArray[np.bool_], space: Workspace) -> tuple[Array, Array]:
    """q [g, t, group, dim], keys [g, s, dim] -> masked scores [g, t * group, s], q / sqrt(dim) as rows."""
    groups, t, group, dim = q.shape
    scaled = space.take("queries", q.shape, q.dtype)
    np.multiply(q, 1 / math.sqrt(dim), out=scaled)
    scaled = scaled.reshape(groups, t * group, dim)
    scores = np.matmul(scaled, keys.mT, out=space.take("scores", (groups, t * group, keys.shape[1]), q.dtype))
    seen = keys.shape[1] - hidden.shape[-1]
    np.copyto(scores.reshape(groups, t, group, -1)[..., seen:], -np.inf, where=hidden)
    return scores, scaled
