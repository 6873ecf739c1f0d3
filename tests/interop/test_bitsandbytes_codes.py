"""Codes, absmax and values against bitsandbytes on the CPU; each known difference has its own test."""

from collections.abc import Iterator
from typing import Any

import bitsandbytes.functional as bnb
import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nf4.codebooks import CODEBOOKS
from nf4.nested import NestedAbsmax, decode_nested
from nf4.tensor import QuantizedTensor, dequantize, quantize
from numpy.typing import NDArray

few = settings(deadline=None, max_examples=25)


@pytest.fixture(autouse=True, scope="module")
def eager() -> Iterator[None]:
    """Keep bitsandbytes from compiling its fallback for each new size."""
    with torch.compiler.set_stance("force_eager"):
        yield


DTYPES = {
    "float32": (np.dtype(np.float32), torch.float32),
    "float16": (np.dtype(np.float16), torch.float16),
    "bfloat16": (np.dtype(ml_dtypes.bfloat16), torch.bfloat16),
}


def to_torch(x: NDArray[Any]) -> Any:
    if x.dtype.itemsize == 4:
        return torch.from_numpy(x)
    kind = torch.float16 if x.dtype == np.float16 else torch.bfloat16
    return torch.from_numpy(x.view(np.int16)).view(kind)


def to_numpy(x: Any) -> NDArray[Any]:
    if x.dtype == torch.bfloat16:
        return np.asarray(x.view(torch.int16).numpy()).view(ml_dtypes.bfloat16)
    return np.asarray(x.numpy())


def theirs(
    x: NDArray[Any], block_size: int, name: str
) -> tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[Any]]:
    """Codes (one an element), absmax and values of flat x; 1-D tensors stay off the wrong AVX-512 path."""
    packed, state = bnb.quantize_4bit(to_torch(x), blocksize=block_size, quant_type=name)
    codes = packed.numpy().reshape(-1)
    return (
        unpacked(codes, x.size),
        state.absmax.numpy(),
        to_numpy(bnb.dequantize_4bit(packed, state)).reshape(-1),
    )


def unpacked(packed: NDArray[np.uint8], n: int) -> NDArray[np.uint8]:
    return np.stack([packed >> 4, packed & 15], axis=1).reshape(-1)[:n]


def absmax_of(q: QuantizedTensor) -> NDArray[np.float32]:
    assert isinstance(q.absmax, np.ndarray)
    return q.absmax


def draw_blocks(data: st.DataObject, dtype: np.dtype[Any], block_size: int) -> NDArray[Any]:
    """Whole blocks with absmax of at least 1e-38: random bit patterns, or normal at any scale."""
    rng = np.random.default_rng(data.draw(st.integers(0, 1 << 32)))
    n = block_size * data.draw(st.integers(1, 4))
    if data.draw(st.booleans()):
        x = rng.integers(0, 1 << 8 * dtype.itemsize, n, dtype=f"u{dtype.itemsize}").view(dtype)
        with np.errstate(invalid="ignore"):
            x[~np.isfinite(x)] = 1
        x[::block_size] = 1
    else:
        scale = 2.0 ** data.draw(st.integers(-10, 10) if dtype == np.float16 else st.integers(-110, 110))
        x = (rng.standard_normal(n) * scale).astype(dtype)
    return x


@few
@given(st.data(), st.sampled_from(list(DTYPES)), st.sampled_from([32, 64, 128, 256, 512, 1024, 2048, 4096]))
def test_nf4_is_the_same(data: st.DataObject, dtype: str, block_size: int) -> None:
    x = draw_blocks(data, DTYPES[dtype][0], block_size)
    codes, absmax, decoded = theirs(x, block_size, "nf4")
    q = quantize(x, block_size)
    assert np.array_equal(unpacked(q.codes, x.size), codes)
    assert absmax_of(q).tobytes() == absmax.tobytes()
    assert dequantize(q).tobytes() == decoded.tobytes()


@few
@given(st.data(), st.sampled_from(list(DTYPES)), st.sampled_from([32, 64, 4096]))
def test_fp4_is_the_same_but_for_the_second_zero(data: st.DataObject, dtype: str, block_size: int) -> None:
    x = draw_blocks(data, DTYPES[dtype][0], block_size)
    codes, absmax, decoded = theirs(x, block_size, "fp4")
    q = quantize(x, block_size, "fp4")
    assert np.array_equal(unpacked(q.codes, x.size), np.where(codes == 8, 0, codes))
    assert absmax_of(q).tobytes() == absmax.tobytes()
    assert np.array_equal(dequantize(q), decoded)


def test_difference_fp4_has_two_zeros_there() -> None:
    """NF4-2.2: from above 0 to the first threshold bitsandbytes emits code 8; it decodes to 0 as code 0."""
    limit = CODEBOOKS["fp4"].thresholds[7]
    x = np.array(
        [1, 0, np.nextafter(np.float32(0), np.float32(1)), limit, np.nextafter(limit, np.float32(1)), -limit]
        * 8
    )
    x = np.pad(x, (0, 16)).astype(np.float32)
    codes, _, decoded = theirs(x, 64, "fp4")
    ours = quantize(x, 64, "fp4")
    assert codes[:6].tolist() == [3, 0, 8, 8, 1, 9]
    assert unpacked(ours.codes, 6).tolist() == [3, 0, 0, 0, 1, 9]
    assert CODEBOOKS["fp4"].values[8].tobytes() == CODEBOOKS["fp4"].values[0].tobytes()
    assert np.array_equal(dequantize(ours), decoded)


def test_difference_the_last_short_block_is_divided_there() -> None:
    """NF4-3.3: true division against a product with the reciprocal; absmax is the same from 1e-38 up."""
    rng = np.random.default_rng(0)
    differing = 0
    for _ in range(400):
        x = rng.standard_normal(63).astype(np.float32)
        # An element whose quotient by absmax is just above a threshold, where the two ways may part.
        x[0] = np.abs(x).max() + np.float32(0.5)
        for i, threshold in enumerate(CODEBOOKS["nf4"].thresholds, 1):
            x[i] = np.nextafter(threshold * x[0], np.float32(9))
        codes, absmax, _ = theirs(x, 64, "nf4")
        q = quantize(x)
        assert np.array_equal(absmax_of(q), absmax)
        different = unpacked(q.codes, 63) != codes
        divided = (x / absmax)[:, None] > CODEBOOKS["nf4"].thresholds
        assert np.array_equal(codes, divided.sum(axis=1))
        assert not different[16:].any()
        differing += int(different.sum())
    assert differing > 0


def test_a_short_last_block_away_from_thresholds_is_the_same() -> None:
    for n in (1, 2, 63, 65, 127, 1001):
        x = np.random.default_rng(n).standard_normal(n).astype(ml_dtypes.bfloat16)
        codes, absmax, decoded = theirs(x, 64, "nf4")
        q = quantize(x)
        assert np.array_equal(unpacked(q.codes, n), codes)
        assert np.array_equal(absmax_of(q), absmax)
        assert dequantize(q).tobytes() == decoded.tobytes()


def test_an_odd_count_is_padded_the_same() -> None:
    x = np.ones(3, np.float32)
    for name in ("nf4", "fp4"):
        packed, _ = bnb.quantize_4bit(torch.from_numpy(x), blocksize=64, quant_type=name)
        assert packed.numpy().reshape(-1).tolist() == quantize(x, 64, name).codes.tolist()


@pytest.mark.parametrize("absmax", [1e-45, 1e-39, 2.0**-128, 9.9e-39])
def test_difference_absmax_under_1e_38_is_raised_there(absmax: float) -> None:
    """NF4-3.3: bitsandbytes scales such a block by 1e38, so that its codes crowd around zero."""
    x = (np.linspace(-1, 1, 64) * absmax).astype(np.float32)
    codes, stored, _ = theirs(x, 64, "nf4")
    s = x * (np.float32(1) / np.float32(1e-38))
    assert np.array_equal(codes, (s[:, None] > CODEBOOKS["nf4"].thresholds).sum(axis=1))
    q = quantize(x)
    assert np.array_equal(absmax_of(q), stored)
    ours = unpacked(q.codes, 64)
    assert (ours[0], ours[-1]) == (0, 15)
    assert not np.array_equal(ours, codes)


def test_difference_a_short_block_stores_at_least_1e_38_there() -> None:
    """NF4-3.2."""
    x = np.full(5, 1e-40, np.float32)
    _, stored, _ = theirs(x, 64, "nf4")
    assert stored == np.float32(1e-38)
    assert absmax_of(quantize(x)) == np.float32(1e-40)


def test_a_zero_block_is_the_same() -> None:
    x = np.zeros(64, np.float32)
    x[::3] = -0.0
    for name in ("nf4", "fp4"):
        codes, absmax, decoded = theirs(x, 64, name)
        q = quantize(x, 64, name)
        assert np.array_equal(unpacked(q.codes, 64), codes)
        assert absmax_of(q).tobytes() == absmax.tobytes()
        assert dequantize(q).tobytes() == decoded.tobytes()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_difference_nan_and_infinity_are_taken_there(value: float) -> None:
    """NF4-12.1: here they are refused (tests/core/test_tensor.py)."""
    x = np.ones(64, np.float32)
    x[3] = value
    codes, absmax, _ = theirs(x, 64, "nf4")
    assert not np.isfinite(absmax[0])
    if np.isnan(value):
        assert set(codes.tolist()) == {15}
    else:
        assert codes[3] == 15  # inf * 0 is NaN, whatever the sign
        assert set(np.delete(codes, 3).tolist()) == {7}


@pytest.mark.parametrize("heavy", [False, True])
def test_double_quantization_stays_near(heavy: bool) -> None:
    """NF4-6.5: the bounds that the specification states, and the same codes of the elements."""
    rng = np.random.default_rng(3)
    for shape in ((576, 576), (300, 70), (1536, 576)):
        x = (
            ((rng.standard_t(4, shape) if heavy else rng.standard_normal(shape)) * 0.05)
            .astype(np.float32)
            .reshape(-1)
        )
        packed, state = bnb.quantize_4bit(
            torch.from_numpy(x), blocksize=64, quant_type="nf4", compress_statistics=True
        )
        q = quantize(x, 64, double_quant=True)
        nested = q.absmax
        assert isinstance(nested, NestedAbsmax)
        assert packed.numpy().reshape(-1).tobytes() == q.codes.tobytes()
        ulp = nested.offset.view(np.int32) - state.offset.numpy().view(np.int32)
        assert abs(int(ulp)) <= 2
        steps = nested.absmax.view(np.int32) - state.state2.absmax.numpy().view(np.int32)
        assert np.abs(steps).max() <= 4
        apart = np.abs(nested.codes.astype(int) - state.absmax.numpy())
        assert apart.max() <= 4
        assert np.mean(apart > 0) <= 0.01
        absmax = absmax_of(quantize(x))
        their_absmax = (bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset).numpy()
        our_absmax = decode_nested(nested)
        assert np.abs(our_absmax - their_absmax).max() <= 0.012 * absmax.max()
        errors = [np.sqrt(np.mean((a - absmax).astype(np.float64) ** 2)) for a in (our_absmax, their_absmax)]
        assert errors[0] == pytest.approx(errors[1], rel=1e-4)


def test_their_nested_state_decodes_here_to_the_same_bits() -> None:
    """With the map, codes and offset of bitsandbytes (whatever its machine made of them) decoding agrees."""
    x = np.random.default_rng(5).standard_normal(64 * 1000).astype(ml_dtypes.bfloat16)
    packed, state = bnb.quantize_4bit(to_torch(x), blocksize=64, quant_type="nf4", compress_statistics=True)
    nested = NestedAbsmax(
        state.absmax.numpy(),
        state.state2.absmax.numpy(),
        np.float32(state.offset.item()),
        state.state2.code.numpy(),
        state.state2.blocksize,
    )
    q = QuantizedTensor(packed.numpy().reshape(-1), nested, x.shape, x.dtype, 64, CODEBOOKS["nf4"])
    assert dequantize(q).tobytes() == to_numpy(bnb.dequantize_4bit(packed, state)).tobytes()
