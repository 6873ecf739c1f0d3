"""Grouped-query causal attention over packed sequences, in blocks of queries, and its backward."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nf4.lora import Workspace

Array = NDArray[Any]

# Queries at a time: causality then skips most of the keys to come, and the scores stay in the cache.
BLOCK = 64


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
    for a, b, first, last, hidden in _blocks(lengths, len(k) - len(q), window, block):
        for g in range(heads.kv_heads):
            wide, narrow, lanes = _columns(g, heads)
            scores, _ = _scores(
                q[a:b, wide], k[first:last, narrow], hidden, heads, space
            )  # [(b - a) group, keys]
            top = scores.max(1, keepdims=True)
            scores -= top
            np.exp(scores, out=scores)
            norm = scores.sum(1, keepdims=True)  # [(b - a) group, 1]
            rows = scores @ v[first:last, narrow]  # [(b - a) group, dim]
            rows /= norm
            out[a:b, wide] = rows.reshape(b - a, -1)
            lse[a:b, lanes] = (np.log(norm) + top).reshape(b - a, -1)
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
    for a, b, first, last, hidden in _blocks(lengths, len(k) - len(q), window, block):
        for g in range(heads.kv_heads):
            wide, narrow, lanes = _columns(g, heads)
            keys, values = k[first:last, narrow], v[first:last, narrow]  # [s, dim]
            p, scaled = _scores(q[a:b, wide], keys, hidden, heads, space)  # [(b - a) group, s]
            p -= lse[a:b, lanes].reshape(-1, 1)
            np.exp(p, out=p)
            drows = dout[a:b, wide].reshape(-1, heads.dim)  # [(b - a) group, dim]
            dv[first:last, narrow] += p.T @ drows
            ds = np.matmul(drows, values.T, out=space.take("dscores", p.shape, p.dtype))
            ds -= correction[a:b, lanes].reshape(-1, 1)
            ds *= p
            dk[first:last, narrow] += ds.T @ scaled  # scaled = q / sqrt(dim)
            np.multiply((ds @ keys).reshape(b - a, -1), scale, out=dq[a:b, wide])
    return dq, dk, dv


def _blocks(
    lengths: tuple[int, ...], past: int, window: int | None, block: int
) -> list[tuple[int, int, int, int, NDArray[np.bool_]]]:
    """Each block's queries [a, b), keys [first, last), and a mask [b - a, 1, keys] of the pairs left out."""
    found = []
    start = 0
    for n in lengths:
        for a in range(start, start + n, block):
            b = min(a + block, start + n)
            first = start if window is None else max(start, a + past - window + 1)
            last = b + past
            ahead = np.arange(first, last) - np.arange(a + past, last)[:, None]  # key position less query's
            hidden = ahead > 0
            if window is not None:
                hidden |= ahead <= -window
            found.append((a, b, first, last, hidden[:, None, :]))
        start += n
    return found


def _columns(g: int, heads: Heads) -> tuple[slice, slice, slice]:
    """Where the group g lies in rows of queries, in rows of keys or values, and among the query heads."""
    dim, group = heads.dim, heads.group
    return (
        slice(g * group * dim, (g + 1) * group * dim),
        slice(g * dim, (g + 1) * dim),
        slice(g * group, (g + 1) * group),
    )


def _scores(
    q: Array, keys: Array, hidden: NDArray[np.bool_], heads: Heads, space: Workspace
) -> tuple[Array, Array]:
    """q [t, group * dim], keys [s, dim] -> masked scores [t * group, s], q / sqrt(dim) [t * group, dim]."""
    scaled = space.take("queries", (len(q) * heads.group, heads.dim), q.dtype)
    np.multiply(q, 1 / math.sqrt(heads.dim), out=scaled.reshape(q.shape))
    scores = space.take("scores", (len(scaled), len(keys)), q.dtype)
    np.matmul(scaled, keys.T, out=scores)
    np.copyto(scores.reshape(len(q), heads.group, -1), -np.inf, where=hidden)
    return scores, scaled
