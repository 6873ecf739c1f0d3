"""exp and log: the oracle's bits, the worst inputs, the stated errors."""

from decimal import Decimal, localcontext
from fractions import Fraction
from typing import Any

import numpy as np
import oracle_exact
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nf4.conform.vectors import SPECIFICATION
from nf4.exact import elementary
from numpy.typing import NDArray

Float32 = NDArray[np.float32]

few = settings(deadline=None, max_examples=100)
any_bits = st.lists(
    st.one_of(
        st.integers(0, 2**32 - 1), st.integers(0x3C000000, 0x42C00000), st.integers(0xBC000000, 0xC2D80000)
    ),
    max_size=20,
).map(lambda found: np.array(found, np.uint32).view(np.float32))

# By exhaustive.py over all 2^32 inputs.
WORST = [("exp", 0x4097281F, 0.500686), ("exp", 0xBFC1CEE1, 0.500687), ("log", 0x3F66F71F, 0.500062)]


def from_bits(*patterns: int) -> Float32:
    return np.array(patterns, np.uint32).view(np.float32)


def same(found: Float32, expected: list[int]) -> bool:
    """Bit by bit, but that one NaN is as good as another."""
    right = np.array(expected, np.uint32)
    return bool(
        ((found.view(np.uint32) == right) | (np.isnan(found) & np.isnan(right.view(np.float32)))).all()
    )


@few
@given(any_bits)
def test_they_are_the_oracles(x: Float32) -> None:
    words = [int(b) for b in x.view(np.uint32)]
    assert same(elementary.exp(x), [oracle_exact.exp(b) for b in words])
    assert same(elementary.log(x), [oracle_exact.log(b) for b in words])


@pytest.mark.parametrize(("name", "bits", "stated"), WORST)
def test_the_worst_input(name: str, bits: int, stated: float) -> None:
    x = from_bits(bits)
    y = getattr(elementary, name)(x)
    with localcontext() as context:
        context.prec = 60
        given = Decimal(float(x[0]))
        true = Fraction(given.exp() if name == "exp" else given.ln())
    error = abs(Fraction(float(y[0])) - true) / Fraction(float(np.spacing(np.abs(y[0]))))
    assert stated - 1e-6 < float(error) < stated + 1e-6


@pytest.mark.parametrize(
    ("name", "first", "last"),
    [("exp", 0x33000000, 0x42B17217), ("exp", 0xB3000000, 0xC2AEAC4F), ("log", 1, 0x7F7FFFFF)],
)
def test_a_sample_is_within_the_stated_error(name: str, first: int, last: int) -> None:
    x = np.linspace(first, last, 500_000).astype(np.uint32).view(np.float32)
    true = getattr(np, name)(x.astype(np.float64))
    y = getattr(elementary, name)(x)
    ulp = np.spacing(np.abs(true.astype(np.float32))).astype(np.float64)
    assert (np.abs(y - true) / ulp).max() < 0.501


def test_where_exp_ends() -> None:
    x = from_bits(0x42B17217, 0x42B17218, 0xC2AEAC4F, 0xC2AEAC50, 0xC2CFF1B4, 0xC2CFF1B5, 0x80000000, 0)
    y = elementary.exp(x)
    assert np.isfinite(y).tolist() == [True, False] + [True] * 6
    smallest = np.finfo(np.float32).smallest_normal
    assert (y[2] >= smallest) & (y[3] < smallest)
    assert y[4:].tolist() == [2.0**-149, 0, 1, 1]


def test_shapes_and_memory() -> None:
    x = np.linspace(-3, 3, 120_000, dtype=np.float32).reshape(300, 400)
    y = elementary.exp(x)
    assert y.shape == x.shape
    assert (elementary.exp(x.T) == y.T).all()
    assert (elementary.exp(x[::2, ::3]) == y[::2, ::3]).all()
    assert elementary.exp(np.float32(0)).shape == ()  # type: ignore[arg-type]
    assert elementary.exp(x[:0]).shape == (0, 400)
    own = x.copy()
    assert elementary.exp(own, own) is own
    assert (own == y).all()
    own[0, :4] = (0, -1, np.nan, np.inf)
    expected = elementary.log(own)
    assert np.array_equal(elementary.log(own, own), expected, equal_nan=True)
    with pytest.raises(ValueError, match="copy"):
        elementary.exp(x, np.empty((400, 300), np.float32).T)


def test_the_text_has_these_constants() -> None:
    text = next(SPECIFICATION.glob("14-*.md")).read_text("utf-8")
    constants: tuple[Any, ...] = (*elementary.EXP_COEFFICIENTS, *elementary.LOG_COEFFICIENTS)
    for c in (*constants, elementary.LOG2_E, elementary.LN_2):
        mantissa, exponent = c.hex().split("p")
        assert f"{mantissa.rstrip('0')}p{exponent}" in text or c.hex() in text
