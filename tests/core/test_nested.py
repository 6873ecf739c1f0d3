"""Chapter 6: the exact mean, the map and the 8-bit codes, against the oracle."""

from fractions import Fraction
from itertools import pairwise

import hypothesis.strategies as st
import numpy as np
import oracle
import pytest
from bits import bits_of, few, finite_bits, from_bits, spec_block
from hypothesis import given
from nf4.errors import InputError
from nf4.nested import DYNAMIC_MAP, NestedAbsmax, decode_nested, encode_nested, exact_mean
from nf4.tensor import quantize

MAP = bits_of(DYNAMIC_MAP)


def test_map_is_that_of_the_specification() -> None:
    assert spec_block("6.2") == MAP
    assert (np.diff(DYNAMIC_MAP) > 0).all()


def test_map_is_the_dynamic_map_without_fused_multiply_add() -> None:
    """The middles of 2^i equal steps from 0.1 to 1, times 10^(i - 6): within 2 ulp of the real ones."""
    real = [Fraction(0), Fraction(1)]
    for i in range(7):
        steps = [Fraction(1, 10) + Fraction(9, 10) * Fraction(k, 2**i) for k in range(2**i + 1)]
        middles = [(a + b) / 2 / 10 ** (6 - i) for a, b in pairwise(steps)]
        real += middles + [-m for m in middles]
    for bits, value in zip(MAP, sorted(real), strict=True):
        assert abs(bits - oracle.rounded(value)) <= 2


@few
@given(finite_bits("float32", min_size=0))
def test_mean_is_the_rounded_fraction_in_any_order(bits: list[int]) -> None:
    expected = oracle.mean(bits)
    for order in (bits, sorted(bits), bits[::-1]):
        assert bits_of(np.array([exact_mean(from_bits(order, "float32"))])) == [expected]


def test_mean_does_not_lose_what_float64_would() -> None:
    x = np.array([2.0**100, 1.5, -(2.0**100), 1.5], np.float32)
    assert exact_mean(x) == np.float32(0.75)
    assert exact_mean(np.full(3, np.finfo(np.float32).max)) == np.finfo(np.float32).max


@few
@given(
    st.one_of(
        finite_bits("float32", max_size=300), finite_bits("bfloat16").map(lambda b: [i << 16 for i in b])
    )
)
def test_codes_and_values(bits: list[int]) -> None:
    bits = [b & 0x7EFFFFFF for b in bits]  # absmax is not negative, and r stays finite
    codes, scales, offset = oracle.encode_nested(bits, MAP)
    nested = encode_nested(from_bits(bits, "float32"))
    assert bits_of(np.array([nested.offset])) == [offset]
    assert nested.codes.tolist() == codes
    assert bits_of(nested.absmax) == scales
    assert bits_of(decode_nested(nested)) == oracle.decode_nested(codes, scales, offset, MAP)


def test_a_value_on_a_threshold_goes_down() -> None:
    """Values in pairs around 1, from 0 to 2: offset and nested absmax 1, s the value less 1: a threshold."""
    thresholds = from_bits(oracle.midpoints(MAP), "float32")
    thresholds = thresholds[thresholds < -0.5]  # so that 1 more is exact
    nested = encode_nested(np.concatenate([1 + thresholds, 1 - thresholds, [np.float32(0), np.float32(2)]]))
    assert (nested.offset, nested.absmax.tolist()) == (1, [1])
    assert nested.codes[: thresholds.size].tolist() == list(range(thresholds.size))


@pytest.mark.parametrize("bits", [0x7F800000, 0x7FC00000, 0xBF800000, 0x80000001])
def test_what_is_no_absmax_is_refused(bits: int) -> None:
    with pytest.raises(InputError, match=r"cannot double-quantize: the absmax of block 1 is .*not negative"):
        encode_nested(from_bits([0x3F800000, bits], "float32"))


def test_what_would_decode_to_an_infinity_is_refused() -> None:
    """The one below the mean sets the nested absmax; s of the others is 0.5, whose code stands for more."""
    absmax = from_bits([0x7F400000, 0x7F7FFFFF, 0x7F7FFFFF], "float32")
    with pytest.raises(InputError, match=r"the absmax of block 1, 3\.40.*e\+38, would decode to an infinity"):
        encode_nested(absmax)
    with pytest.raises(InputError, match="cannot double-quantize: the absmax of block 1"):
        quantize(np.repeat(absmax, 32), 32, double_quant=True)
    largest = np.full(3, np.finfo(np.float32).max)
    assert np.array_equal(decode_nested(encode_nested(largest)), largest)


def test_what_decodes_to_an_infinity_is_refused() -> None:
    nested = NestedAbsmax(
        np.array([127, 255], np.uint8), np.array([3e38], np.float32), np.float32(3e38), DYNAMIC_MAP
    )
    with pytest.raises(InputError, match="cannot dequantize: the absmax of block 1 is inf"):
        decode_nested(nested)


def test_no_two_thresholds_share_an_upper_half() -> None:
    """What the one-step search of the encoder rests on."""
    halves = [bits >> 16 for bits in oracle.midpoints(MAP)]
    assert len(set(halves)) == 255


@pytest.mark.parametrize("n", [1, 256, 600])
def test_equal_blocks_have_code_127_and_decode_exactly(n: int) -> None:
    nested = encode_nested(np.full(n, 0.3, np.float32))
    assert set(nested.codes.tolist()) == {127}
    assert not nested.absmax.any()
    assert np.array_equal(decode_nested(nested), np.full(n, 0.3, np.float32))


def test_no_blocks() -> None:
    nested = encode_nested(np.empty(0, np.float32))
    assert (nested.codes.size, nested.absmax.size, nested.offset) == (0, 0, 0)
    assert decode_nested(nested).size == 0


def test_decoding_takes_the_map_that_came_with_the_codes() -> None:
    nested = encode_nested(np.arange(300, dtype=np.float32))
    other = NestedAbsmax(nested.codes, nested.absmax, nested.offset, DYNAMIC_MAP / 2)
    expected = DYNAMIC_MAP[nested.codes] / 2 * np.repeat(nested.absmax, 256)[:300] + nested.offset
    assert np.array_equal(decode_nested(other), expected)


def test_equality_is_by_bits() -> None:
    nested = encode_nested(np.arange(5, dtype=np.float32))
    same = NestedAbsmax(nested.codes.copy(), nested.absmax.copy(), nested.offset, nested.map)
    assert nested == same
    assert hash(nested) == hash(same)
    assert nested != NestedAbsmax(
        nested.codes, nested.absmax, np.nextafter(nested.offset, np.float32(9)), nested.map
    )
    assert nested != NestedAbsmax(nested.codes, nested.absmax, nested.offset, nested.map, 128)
    assert nested != "nested"


def test_parts_that_do_not_fit_are_refused() -> None:
    nested = encode_nested(np.arange(300, dtype=np.float32))
    with pytest.raises(InputError, match=r"nested absmax: absmax is float32 \[1\], must be float32 \[2\]"):
        NestedAbsmax(nested.codes, nested.absmax[:1], nested.offset, nested.map)
    with pytest.raises(InputError, match=r"nested absmax: map is float32 \[16\]"):
        NestedAbsmax(nested.codes, nested.absmax, nested.offset, nested.map[:16])
    with pytest.raises(InputError, match="codes is int64"):
        NestedAbsmax(nested.codes.astype(np.int64), nested.absmax, nested.offset, nested.map)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="nested block size 0"):
        NestedAbsmax(nested.codes, nested.absmax, nested.offset, nested.map, 0)


def test_the_mean_sees_what_a_float64_sum_would_lose() -> None:
    """Half an ulp over 1, and 2^-59 that decides: lost in float64, where the tie would go to even."""
    x = np.array([1, 2**-24, 2**-60, 2**-60], np.float32)
    assert exact_mean(x) == np.float32(0.25 * (1 + 2**-23))
    assert exact_mean(x[:2]) == np.float32(0.5)
