"""Chapters 1 and 7: conversion of every 16-bit pattern, and rounding against the oracle."""

from fractions import Fraction

import hypothesis.strategies as st
import numpy as np
import oracle
import pytest
from bits import DTYPES, INFINITY, bits_of, few, from_bits
from hypothesis import example, given
from nf4.floats import narrow, round_to_float32, widen

ALL = np.arange(65536, dtype=np.uint16)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_16_bit_pattern_widens_exactly_and_comes_back(dtype: str) -> None:
    x = ALL.view(DTYPES[dtype])
    wide = widen(x)
    magnitude, infinity = ALL & 0x7FFF, INFINITY[dtype]
    finite = magnitude < infinity
    expected = [
        oracle.rounded(abs(oracle.value(b, dtype)), negative=bool(b >> 15)) for b in ALL[finite].tolist()
    ]
    assert bits_of(wide[finite]) == expected
    infinite = magnitude == infinity
    assert bits_of(wide[infinite]) == [0x7F800000, 0xFF800000]
    assert set(bits_of(wide[magnitude > infinity])) == {0x7FC00000, 0xFFC00000}
    assert np.array_equal(np.signbit(wide), ALL >= 0x8000)
    assert narrow(wide[~np.isnan(wide)], DTYPES[dtype]).tobytes() == x[~np.isnan(wide)].tobytes()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_midpoint_of_two_16_bit_numbers_goes_to_even_and_its_neighbours_to_theirs(dtype: str) -> None:
    positive = ALL[: INFINITY[dtype]]
    low = widen(positive[:-1].view(DTYPES[dtype])).astype(np.float64)
    high = widen(positive[1:].view(DTYPES[dtype])).astype(np.float64)
    middle = ((low + high) / 2).astype(np.float32)
    keep = (
        middle.astype(np.float64) == (low + high) / 2
    )  # bfloat16's smallest midpoints are float32 numbers too
    assert keep.all()
    for sign in (0, 0x80000000):
        bits = middle.view(np.uint32) | np.uint32(sign)
        for offset, expected in (
            (-1, positive[:-1]),
            (0, positive[:-1] + (positive[:-1] & 1)),
            (1, positive[1:]),
        ):
            rounded = narrow((bits + np.int32(offset).astype(np.uint32)).view(np.float32), DTYPES[dtype])
            assert np.array_equal(rounded.view(np.uint16), expected | (sign >> 16))


@few
@given(
    st.lists(st.integers(0, 0xFFFFFFFF), min_size=1, max_size=50), st.sampled_from(["float16", "bfloat16"])
)
@example([0x477FEFFF, 0x477FF000, 0x33000000, 0x33000001, 0x7F7F7FFF, 0x7F7F8000, 0x80000001], "float16")
@example([0x477FEFFF, 0x477FF000, 0x33000000, 0x33000001, 0x7F7F7FFF, 0x7F7F8000, 0x80000001], "bfloat16")
def test_narrowing_any_finite_float32(bits: list[int], dtype: str) -> None:
    bits = [b for b in bits if b & 0x7F800000 != 0x7F800000]
    expected = [oracle.rounded(abs(oracle.value(b)), dtype, negative=bool(b >> 31)) for b in bits]
    assert bits_of(narrow(from_bits(bits, "float32"), DTYPES[dtype])) == expected


def test_nan_and_infinity_narrow_to_themselves() -> None:
    x = from_bits([0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0xFF800001, 0x7F800000, 0xFF800000], "float32")
    assert bits_of(narrow(x, DTYPES["bfloat16"])) == [0x7FC0, 0xFFC0, 0x7FC0, 0xFFC0, 0x7F80, 0xFF80]
    assert bits_of(narrow(x, DTYPES["float16"])) == [0x7E00, 0xFE00, 0x7E00, 0xFE00, 0x7C00, 0xFC00]


@few
@given(st.fractions(), st.integers(-320, 300))
@example(Fraction(1, 2), -149)
@example(Fraction(3, 2), -149)
@example(Fraction(2**25 - 1, 2**24), 126)
@example(Fraction(2**25 - 1, 2**24), 127)
def test_rounding_a_fraction(x: Fraction, exponent: int) -> None:
    x *= Fraction(2) ** max(-320, min(exponent, 127))
    if abs(x) < 2**128:
        assert bits_of(np.array([round_to_float32(x)])) == [oracle.rounded(x)]
