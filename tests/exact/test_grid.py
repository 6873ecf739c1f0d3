"""Exact products and sums: the oracle's bits, in any order, within the stated bound; what is refused."""

import math
from typing import Any

import numpy as np
import oracle
import oracle_exact
import pytest
from drawn import numbers
from hypothesis import given, settings
from hypothesis import strategies as st
from nf4.errors import InputError
from nf4.exact import grid
from numpy.typing import NDArray

Float32 = NDArray[np.float32]

few = settings(deadline=None, max_examples=60)


def floats(size: int) -> st.SearchStrategy[Float32]:
    """Any finite float32: any bits, or exponents near one another, where the grid rounds."""
    near = st.integers(0, 30).map(lambda low: 0x3F800000 - (low << 23))
    magnitude = st.one_of(
        st.integers(0, 0x7F7FFFFF),
        st.builds(int.__add__, near, st.integers(0, 0x7FFFFF)),
        st.sampled_from([0, 1]),
    )
    element = st.builds(lambda m, sign: m | sign << 31, magnitude, st.integers(0, 1))
    return st.lists(element, min_size=size, max_size=size).map(
        lambda bits: np.array(bits, np.uint32).view(np.float32)
    )


def bits(x: NDArray[Any]) -> list[int]:
    flat = np.ascontiguousarray(x).reshape(-1)
    return [int(b) for b in flat.view(f"u{flat.itemsize}")]


@few
@given(st.data(), st.integers(0, 4), st.integers(0, 40), st.integers(0, 4))
def test_a_product_is_the_oracles(data: st.DataObject, m: int, k: int, n: int) -> None:
    a, b = data.draw(floats(m * k)).reshape(m, k), data.draw(floats(k * n)).reshape(k, n)
    rows, columns = [bits(row) for row in a], [bits(column) for column in b.T]
    expected = [x for row in oracle_exact.product(rows, columns) for x in row]
    assert bits(grid.product(a, b)) == expected


@settings(deadline=None, max_examples=12)
@given(st.data(), st.integers(0, 4090), st.integers(1, 3))
def test_a_long_product_is_the_oracles(data: st.DataObject, first: int, rest: int) -> None:
    """Of several pieces, whose sums are the terms of another (NF4-14.2, NF4-14.3)."""
    a, b = np.zeros((2, 1, 4096 + rest), np.float32)
    for x in (a, b):
        x[0, first : first + 2], x[0, 4096 - rest :] = data.draw(floats(2)), data.draw(floats(2 * rest))
    assert [bits(grid.product(a, b.T))] == oracle_exact.product([bits(a)], [bits(b)])


def test_the_pieces_of_a_long_product_have_grids_of_their_own() -> None:
    a, b = numbers("a", 3, 9000), numbers("b", 9000, 2)
    parts = [slice(0, 4096), slice(4096, 8192), slice(8192, 9000)]
    once = grid.product(a, b)
    mixed = np.concatenate([np.arange(9000)[part][::-1] for part in parts])
    assert bits(grid.product(a[:, mixed], b[mixed])) == bits(once)
    sums = [grid.rows(a[:, p]).values @ grid.columns(b[p]).values for p in parts]
    assert bits(grid.total(np.stack(sums, -1)).astype(np.float32)) == bits(once)
    assert (grid.rows(a).values[:, parts[1]] == grid.rows(a[:, parts[1]]).values).all()


def test_the_sums_of_pieces_meet_on_a_grid() -> None:
    """-2^-43 of the first is lost there, so that a tie of two float32 is one, and goes to the even one."""
    a, b = np.zeros((2, 1, 4098), np.float32)
    a[0, [0, 4096, 4097]] = -(2.0**-20), 1, 2.0**-21
    b[0, [0, 4096, 4097]] = 2.0**-23, 1 + 2.0**-23, 2.0**-3
    assert grid.product(a, b.T) == 1 + 2.0**-22


@pytest.mark.parametrize(("m", "k", "n"), [(9, 4096, 7), (70, 700, 50), (1, 3300, 2), (40, 1, 40)])
def test_the_order_of_the_terms_does_not_matter(m: int, k: int, n: int) -> None:
    a, b = numbers("a", m, k), numbers("b", k, n)
    once = grid.product(a, b)
    order = np.argsort(numbers("order", k))
    assert bits(grid.product(a[:, order], b[order])) == bits(once)
    assert bits(grid.product(b.T, a.T).T) == bits(once)
    left, right = grid.rows(a).values, grid.columns(b).values
    halves = left[:, ::2] @ right[::2] + left[:, 1::2] @ right[1::2]
    assert bits(halves.astype(np.float32) + np.float32(0)) == bits(once)


@pytest.mark.parametrize(("m", "k", "n"), [(20, 3, 20), (20, 64, 20), (20, 576, 20), (4, 4096, 4)])
def test_the_error_is_within_the_bound(m: int, k: int, n: int) -> None:
    """Of NF4-14.3, of a piece; float64 sums of these are off by far less."""
    a, b = numbers("a", m, k), numbers("b", k, n)
    wide_a, wide_b = a.astype(np.float64), b.astype(np.float64)
    alpha, beta = np.abs(wide_a).max(1)[:, None], np.abs(wide_b).max(0)
    u = 2.0 ** -grid.product_bits(k)
    bound = u * (beta * np.abs(wide_a).sum(1)[:, None] + alpha * np.abs(wide_b).sum(0) + u * k * alpha * beta)
    error = np.abs(grid.product(a, b) - wide_a @ wide_b)
    assert (error <= bound + np.abs(wide_a @ wide_b) * 2.0**-24).all()
    assert (bound <= u * k * alpha * beta * (2 + u) * (1 + 1e-12)).all()


def test_bits_by_length() -> None:
    lengths = {0: 24, 1: 24, 32: 24, 33: 23, 128: 23, 129: 22, 576: 21, 2048: 21, 2049: 20, 4096: 20}
    assert {k: grid.product_bits(k) for k in lengths} == lengths
    for k in range(1, grid.PIECE + 1):
        assert 2 * grid.product_bits(k) + math.ceil(math.log2(k)) <= 53


def test_operands_in_any_memory_order_and_batch() -> None:
    a, b = numbers("a", 3, 40, 500), numbers("b", 3, 500, 60)
    whole = grid.product(a, b)
    for i in range(3):
        one = grid.product(a[i], b[i])
        assert bits(one) == bits(whole[i])
        assert bits(grid.product(np.asfortranarray(a[i]), np.asfortranarray(b[i]))) == bits(one)
        assert bits(grid.product(np.repeat(a[i], 2, 1)[:, ::2], b[i][:, ::-1])[:, ::-1]) == bits(one)
    assert bits(grid.product(a.mT.copy().mT, b.mT.copy().mT)) == bits(whole)


def test_an_operand_is_put_on_its_grid_once() -> None:
    """It may be kept in float32, which holds it (NF4-14.2)."""
    a, b = numbers("a", 30, 700), numbers("b", 700, 20)
    expected, left, right = bits(grid.product(a, b)), grid.rows(a), grid.columns(b)
    out = np.empty((30, 20), np.float32)
    assert grid.product(left, right, out) is out
    assert bits(out) == expected
    kept = grid.Gridded(right.values.astype(np.float32))
    assert (kept.values == right.values).all()
    assert bits(grid.product(a, kept)) == expected
    assert (grid.rows(left.values.astype(np.float32)).values == left.values).all()


@few
@given(st.data(), st.integers(0, 30), st.booleans())
def test_a_sum_is_the_oracles(data: st.DataObject, n: int, products: bool) -> None:
    x = data.draw(floats(n))
    y = data.draw(floats(n)) if products else np.ones(n, np.float32)
    found = grid.dot(x, y) if products else grid.total(x)
    assert bits(found) == [oracle.rounded(oracle_exact.sum_of(bits(x), bits(y)), "float64")]


@pytest.mark.parametrize("n", [4095, 4096, 4097, 8193])
def test_a_long_sum_is_the_oracles_and_has_no_order_in_its_pieces(n: int) -> None:
    x = numbers("long", 2, n)
    expected = [oracle.rounded(oracle_exact.sum_of_terms(bits(row)), "float64") for row in x]
    assert bits(grid.total(x)) == expected
    mixed = x.copy()
    mixed[:, :4095] = x[:, :4095][:, ::-1]
    assert bits(grid.total(mixed)) == expected
    assert np.abs(grid.total(x) - x.astype(np.float64).sum(1)).max() < n * 2.0**-41


def test_a_piece_with_all_bits_set_is_exact() -> None:
    """4096 terms just below a power of two fill 53 bits; one more bit a term would overflow them."""
    x = np.full(4096, np.float64(2) - 2.0**-40)
    assert grid.total(x)[()] == 4096 * (2 - 2.0**-40)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused(bad: float) -> None:
    good = np.ones((300, 300), np.float32)
    x = good.copy()
    x[299, 1] = bad
    for call in (
        lambda: grid.product(x, good),
        lambda: grid.product(good, x),
        lambda: grid.product(good, x.T),
        lambda: grid.total(x),
        lambda: grid.dot(np.zeros_like(x), x),
    ):
        with pytest.raises(InputError, match=r"has a NaN or an infinity \(NF4-14.1\)"):
            call()


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(InputError, match="is float64; it must be float32"):
        grid.rows(np.ones((2, 2)))  # type: ignore[arg-type]


def test_zeros_are_positive() -> None:
    x = np.array([[-0.0, 0.0], [-1.0, 1.0]], np.float32)
    ones = np.ones((2, 2), np.float32)
    assert bits(grid.product(x, -ones)) == [0, 0, 0, 0]
    assert bits(grid.product(np.full((1, 1), -1e-30, np.float32), np.full((1, 1), 1e-30, np.float32))) == [0]
    assert bits(grid.total(x)) == [0, 0]
    assert bits(grid.total(np.zeros((2, 0), np.float32))) == [0, 0]
