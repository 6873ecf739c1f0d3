"""Exact attention: near float64 with groups, windows and packed sequences; its parts can't be seen."""

from typing import Any

import numpy as np
import pytest
from drawn import numbers
from hypothesis import given, settings
from hypothesis import strategies as st
from nf4.errors import InputError
from nf4.exact import attention, grid
from nf4.exact.ops import softmax
from nf4.lora import Workspace
from nf4.model import attention as fast
from nf4.model.attention import Heads
from numpy.typing import NDArray

Array = NDArray[Any]
Float32 = NDArray[np.float32]
Drawn = tuple[Float32, Float32, Float32, Float32]


def drawn(heads: Heads, lengths: tuple[int, ...]) -> Drawn:
    """q, k, v and the gradient of the output."""
    rows, wide = sum(lengths), heads.kv_heads * heads.dim
    shapes = {"q": wide * heads.group, "k": wide, "v": wide, "dout": wide * heads.group}
    q, k, v, dout = (numbers(name, rows, columns, scale=3) for name, columns in shapes.items())
    return q, k, v, dout


def both(
    arrays: Drawn, lengths: tuple[int, ...], heads: Heads, window: int | None
) -> tuple[Float32, Float32, Float32, Float32]:
    """The output, dq, dk and dv."""
    q, k, v, dout = arrays
    y = attention.attend(q, k, v, lengths, heads, window, Workspace(), np.empty_like(q))
    return y, *attention.attend_backward(dout, q, k, v, lengths, heads, window, Workspace())


def same(one: Any, other: Any) -> bool:
    return all((a == b).all() for a, b in zip(one, other, strict=True))


@settings(deadline=None, max_examples=40)
@given(
    st.builds(Heads, st.integers(1, 3), st.integers(1, 3), st.integers(1, 12)),
    st.lists(st.integers(1, 40), min_size=1, max_size=3).map(tuple),
    st.none() | st.integers(1, 50),
)
def test_it_is_near_float64(heads: Heads, lengths: tuple[int, ...], window: int | None) -> None:
    arrays = drawn(heads, lengths)
    found = both(arrays, lengths, heads, window)
    q, k, v, dout = (x.astype(np.float64) for x in arrays)
    y, lse = fast.attend(q, k, v, lengths, heads, window, Workspace())
    rest = fast.attend_backward(dout, q, k, v, y, lse, lengths, heads, window, Workspace())
    for mine, true in zip(found, (y, *rest), strict=True):
        assert np.abs(mine - true).max() <= 2.0**-16 * max(np.abs(true).max(), 0.1)


@pytest.mark.parametrize("window", [None, 4])
def test_a_sequence_alone_has_the_same_bits(window: int | None) -> None:
    heads, lengths = Heads(2, 3, 8), (5, 1, 30)
    arrays = drawn(heads, lengths)
    whole = both(arrays, lengths, heads, window)
    start = 0
    for n in lengths:
        rows = slice(start, start + n)
        q, k, v, dout = (x[rows] for x in arrays)
        assert same(both((q, k, v, dout), (n,), heads, window), [x[rows] for x in whole])
        start += n


def test_the_parts_can_not_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    heads, lengths = Heads(4, 2, 6), (20, 7)
    whole = both(drawn(heads, lengths), lengths, heads, 5)
    monkeypatch.setattr(attention, "_SCORES", 1)
    assert same(both(drawn(heads, lengths), lengths, heads, 5), whole)


def test_it_is_what_the_text_says_of_one_head() -> None:
    """Products over all columns, hidden ones too, and one product over the query heads of a group."""
    heads, n = Heads(1, 2, 6), 9
    q, k, v, dout = drawn(heads, (n,))
    y, dq, dk, dv = both((q, k, v, dout), (n,), heads, None)
    own, g = (x.reshape(n, 2, 6).transpose(1, 0, 2).reshape(2 * n, 6) for x in (q, dout))
    c = np.float32(1 / np.sqrt(np.float64(6)))
    hidden = np.tile(np.arange(n) > np.arange(n)[:, None], (2, 1))
    p = softmax(np.where(hidden, np.float32(-np.inf), c * grid.product(own, k.T)))
    assert (y.reshape(n, 2, 6).transpose(1, 0, 2).reshape(2 * n, 6) == grid.product(p, v)).all()
    assert (dv == grid.product(p.T, g)).all()
    assert dq.shape == q.shape
    assert dk.shape == k.shape


def test_a_window_as_long_as_the_sequence_is_none() -> None:
    heads, lengths = Heads(1, 2, 4), (9, 3)
    arrays = drawn(heads, lengths)
    assert same(both(arrays, lengths, heads, 9), both(arrays, lengths, heads, None))
    assert not same(both(arrays, lengths, heads, 8), both(arrays, lengths, heads, None))


def test_the_future_moves_nothing_but_last_bits() -> None:
    """The grids of v span the sequence, so a large value that comes later coarsens all rows (NF4-15.2)."""
    heads, n = Heads(1, 1, 4), 16
    q, k, v, dout = drawn(heads, (n,))
    later = v.copy()
    later[-1] *= 1000
    before, after = (both((q, k, x, dout), (n,), heads, None)[0][:-1] for x in (v, later))
    assert not (before == after).all()
    assert np.abs(before - after).max() <= 2.0**-22 * np.abs(later).max()


def test_a_hidden_score_may_be_infinite() -> None:
    heads, lengths = Heads(1, 1, 4), (2, 3)
    arrays = drawn(heads, lengths)
    arrays[0][2], arrays[1][4] = 2.0**70, 2.0**70
    assert all(np.isfinite(x).all() for x in both(arrays, lengths, heads, None))
    arrays[0][4] = 2.0**70
    with pytest.raises(InputError, match="greatest of a row of scores is not finite"):
        both(arrays, lengths, heads, None)


@pytest.mark.parametrize("which", range(4))
def test_what_is_not_finite_is_refused(which: int) -> None:
    arrays = drawn(Heads(1, 1, 4), (5,))
    arrays[which][3, 1] = np.nan
    with pytest.raises(InputError, match=r"NaN or an infinity \(NF4-14.1\)"):
        both(arrays, (5,), Heads(1, 1, 4), None)
