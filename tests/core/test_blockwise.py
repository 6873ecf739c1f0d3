"""Chapters 3 to 5: quantize and dequantize against the oracle, bit for bit."""

import hypothesis.strategies as st
import numpy as np
import oracle
import pytest
from bits import DTYPES, bits_of, few, finite_bits, from_bits
from hypothesis import given
from nf4.blockwise import BLOCK_SIZES, CHUNK
from nf4.codebooks import CODEBOOKS
from nf4.tensor import QuantizedTensor, dequantize, quantize
from numpy.typing import NDArray

NAMES = tuple(CODEBOOKS)


def nibbles(q: QuantizedTensor) -> list[int]:
    return oracle.unpack(q.codes.tobytes(), q.size)


def float32_bits(bits: list[int], dtype: str) -> list[int]:
    sign = 8 * DTYPES[dtype].itemsize - 1
    return [oracle.rounded(abs(oracle.value(b, dtype)), negative=bool(b >> sign)) for b in bits]


def check(bits: list[int], dtype: str, block_size: int, name: str) -> None:
    """Quantize and dequantize (to each dtype) the array of these bits here and by the oracle."""
    table = bits_of(CODEBOOKS[name].values)
    codes, absmax = oracle.encode(float32_bits(bits, dtype), block_size, table)
    q = quantize(from_bits(bits, dtype), block_size, name)
    assert isinstance(q.absmax, np.ndarray)
    assert nibbles(q) == codes
    assert q.codes.tobytes() == oracle.pack(codes, table)
    assert bits_of(q.absmax) == absmax
    for out in DTYPES:
        assert bits_of(dequantize(q, DTYPES[out])) == oracle.decode(codes, absmax, block_size, table, out)


@few
@given(st.data(), st.sampled_from(list(DTYPES)), st.sampled_from(NAMES), st.sampled_from([32, 64]))
def test_any_bits(data: st.DataObject, dtype: str, name: str, block_size: int) -> None:
    check(data.draw(finite_bits(dtype)), dtype, block_size, name)


@pytest.mark.parametrize("name", NAMES)
def test_at_and_beside_each_threshold(name: str) -> None:
    """absmax is 1 here, so s is the element itself: on a threshold it goes down, one ulp above it goes up."""
    thresholds = CODEBOOKS[name].thresholds
    below, above = np.nextafter(thresholds, np.float32(-2)), np.nextafter(thresholds, np.float32(2))
    x = np.concatenate([[np.float32(1)], below, thresholds, above])
    q = quantize(x, 64, name)
    rank = {int(code): i for i, code in enumerate(CODEBOOKS[name].codes)}
    found = [rank[code] for code in nibbles(q)[1:]]
    steps = list(range(thresholds.size))
    assert found == steps + steps + [i + 1 for i in steps]
    check(bits_of(x), "float32", 64, name)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "bits", [0x00000001, 0x001FFFFF, 0x00200000, 0x00200001, 0x00800000, 0x7E800001, 0x7F7FFFFF]
)
def test_absmax_at_the_ends_of_the_range(bits: int, name: str) -> None:
    """2^-128 (00200000) is the last with an infinite reciprocal; above 2^126 the reciprocal is subnormal."""
    parts = [
        bits,
        bits // 2,
        bits // 3,
        bits - bits // 7,
        0,
        0x80000000,
        bits // 5 | 0x80000000,
        1 | 0x80000000,
    ]
    check(parts * 5, "float32", 32, name)


def test_the_reciprocal_is_rounded_before_the_product() -> None:
    """Beside thresholds, where a true division gives other codes, in full blocks and in a short last one."""
    rng = np.random.default_rng(0)
    thresholds = CODEBOOKS["nf4"].thresholds
    differing = 0
    for _ in range(12):
        absmax = np.float32(rng.uniform(1, 2))
        near = thresholds * absmax
        up, down = np.nextafter(near, np.float32(9)), np.nextafter(near, np.float32(-9))
        block = np.concatenate([[absmax], near, up, down])  # 46 elements
        x = np.concatenate([block, np.zeros(18, np.float32), block])
        check(bits_of(x), "float32", 64, "nf4")
        divided = (block / absmax)[:, None] > thresholds
        differing += int(np.sum(divided.sum(axis=1) != nibbles(quantize(x))[64:]))
    assert differing > 0


def test_a_tiny_block_loses_nothing() -> None:
    x = np.linspace(-1, 1, 64, dtype=np.float32)
    assert np.array_equal(
        quantize(np.ldexp(np.round(x * 2**20), -149)).codes, quantize(np.round(x * 2**20)).codes
    )


@pytest.mark.parametrize("name", NAMES)
def test_zeros_of_either_sign_decode_to_plus_zero(name: str) -> None:
    x = np.array([0.0, -0.0] * 40 + [1.0], np.float32)
    q = quantize(x, 64, name)
    assert isinstance(q.absmax, np.ndarray)
    assert bits_of(q.absmax) == [0, 0x3F800000]
    assert set(nibbles(q)[:80]) == {CODEBOOKS[name].zero_code}
    assert bits_of(dequantize(q))[:80] == [0] * 80


def test_a_zero_block_of_nf4_has_code_7() -> None:
    assert quantize(np.zeros(5, np.float32)).codes.tolist() == [0x77, 0x77, 0x77]


@pytest.mark.parametrize(
    ("absmax", "half"), [(0x40008000, 0x3F80), (0x40018000, 0x3F82), (0x40008001, 0x3F81)]
)
def test_a_product_between_two_bfloat16_goes_to_even(absmax: int, half: int) -> None:
    x = from_bits([absmax, absmax - 0x00800000], "float32")  # code 5 of fp4 is 1/2
    q = quantize(x, 32, "fp4")
    assert nibbles(q) == [3, 5]
    assert bits_of(dequantize(q, DTYPES["bfloat16"])) == [half + 0x80, half]
    check(bits_of(x) * 33, "float32", 64, "fp4")


def test_the_negative_zero_of_fp4_e2m1_decodes_with_its_sign() -> None:
    q = QuantizedTensor(
        np.array([0x80], np.uint8), np.ones(1, np.float32), (2,), DTYPES["float32"], 32, CODEBOOKS["fp4-e2m1"]
    )
    assert bits_of(dequantize(q)) == [0x80000000, 0]
    assert bits_of(dequantize(q, DTYPES["bfloat16"])) == [0x8000, 0]


def reference_codes(x: NDArray[np.float32], block_size: int) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Chapter 3 by plain NumPy, a block at a time; for sizes beyond the oracle's patience."""
    codes, absmax = [], []
    for start in range(0, x.size, block_size):
        block = x[start : start + block_size]
        absmax.append(np.abs(block).max())
        s = block * (np.float32(1) / absmax[-1])
        codes.append((s[:, None] > CODEBOOKS["nf4"].thresholds).sum(axis=1))
    return np.concatenate(codes).astype(np.uint8), np.array(absmax, np.float32)


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("extra", [0, 1, 2, 3, 5, -1])
def test_every_block_size_with_tails(block_size: int, extra: int) -> None:
    rng = np.random.default_rng(block_size)
    x = rng.standard_normal(2 * block_size + extra).astype(np.float32)
    codes, absmax = reference_codes(x, block_size)
    q = quantize(x, block_size)
    assert isinstance(q.absmax, np.ndarray)
    assert nibbles(q) == codes.tolist()
    assert np.array_equal(q.absmax, absmax)
    decoded = CODEBOOKS["nf4"].values[codes] * np.repeat(absmax, block_size)[: x.size]
    assert np.array_equal(dequantize(q), decoded)


@pytest.mark.parametrize("n", [CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 67])
def test_chunks_join_without_a_seam(n: int) -> None:
    """Several chunks, over threads, with a short last block and an odd count."""
    x = np.random.default_rng(n).standard_normal(n).astype(np.float32)
    codes, absmax = reference_codes(x, 256)
    q = quantize(x, 256)
    assert isinstance(q.absmax, np.ndarray)
    assert np.array_equal(q.absmax, absmax)
    assert np.array_equal(np.stack([q.codes >> 4, q.codes & 15], axis=1).reshape(-1)[:n], codes)
    decoded = CODEBOOKS["nf4"].values[codes] * np.repeat(absmax, 256)[:n]
    for dtype in DTYPES.values():
        assert dequantize(q, dtype).tobytes() == decoded.astype(dtype).tobytes()
