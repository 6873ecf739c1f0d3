"""Attention against the formula, position by position, and its backward against central differences."""

from typing import Any

import numpy as np
from central import check_gradient
from hypothesis import given, settings
from hypothesis import strategies as st
from nf4.lora import Workspace
from nf4.model.attention import Heads, attend, attend_backward
from numpy.typing import NDArray

Array = NDArray[Any]

shapes = st.builds(Heads, st.integers(1, 3), st.integers(1, 3), st.integers(1, 5))
ragged = st.lists(st.integers(1, 11), min_size=1, max_size=3).map(tuple)
windows = st.none() | st.integers(1, 12)


def by_hand(q: Array, k: Array, v: Array, heads: Heads, window: int | None) -> Array:
    """One sequence, one query head and one position at a time; the queries are the last positions."""
    out = np.zeros_like(q)
    past = len(k) - len(q)
    for h in range(heads.kv_heads * heads.group):
        mine = slice(h * heads.dim, (h + 1) * heads.dim)
        g = h // heads.group
        kv = slice(g * heads.dim, (g + 1) * heads.dim)
        for t in range(len(q)):
            first = 0 if window is None else max(0, t + past - window + 1)
            scores = k[first : t + past + 1, kv] @ q[t, mine] / np.sqrt(heads.dim)
            p = np.exp(scores) / np.exp(scores).sum()
            out[t, mine] = p @ v[first : t + past + 1, kv]
    return out


def random_qkv(rng: np.random.Generator, queries: int, keys: int, heads: Heads) -> tuple[Array, Array, Array]:
    width = heads.kv_heads * heads.dim
    q = rng.normal(size=(queries, width * heads.group))
    return q, rng.normal(size=(keys, width)), rng.normal(size=(keys, width))


@settings(deadline=None, max_examples=40)
@given(ragged, shapes, windows, st.integers(1, 12))
def test_forward(lengths: tuple[int, ...], heads: Heads, window: int | None, block: int) -> None:
    q, k, v = random_qkv(np.random.default_rng(block), sum(lengths), sum(lengths), heads)
    out, _ = attend(q, k, v, lengths, heads, window, Workspace(), block)
    start = 0
    for n in lengths:
        rows = slice(start, start + n)
        expected = by_hand(q[rows], k[rows], v[rows], heads, window)
        np.testing.assert_allclose(out[rows], expected, rtol=1e-10, atol=1e-12)
        start += n


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 8), st.integers(0, 8), shapes, windows, st.integers(1, 9))
def test_forward_after_a_past(n: int, past: int, heads: Heads, window: int | None, block: int) -> None:
    q, k, v = random_qkv(np.random.default_rng(n), n, n + past, heads)
    out, _ = attend(q, k, v, (n,), heads, window, Workspace(), block)
    np.testing.assert_allclose(out, by_hand(q, k, v, heads, window), rtol=1e-10, atol=1e-12)


@settings(deadline=None, max_examples=25)
@given(ragged, shapes, windows, st.integers(1, 12))
def test_backward(lengths: tuple[int, ...], heads: Heads, window: int | None, block: int) -> None:
    rng = np.random.default_rng(block)
    q, k, v = random_qkv(rng, sum(lengths), sum(lengths), heads)
    dout = rng.normal(size=q.shape)

    def f() -> float:
        return float(np.sum(attend(q, k, v, lengths, heads, window, Workspace(), block)[0] * dout))

    out, lse = attend(q, k, v, lengths, heads, window, Workspace(), block)
    gradients = attend_backward(dout, q, k, v, out, lse, lengths, heads, window, Workspace(), block)
    for x, gradient in zip((q, k, v), gradients, strict=True):
        check_gradient(f, x, gradient)
