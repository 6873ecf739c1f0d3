"""The type QuantizedTensor, and what quantize and dequantize refuse (NF4-5 and NF4-12)."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bits import DTYPES
from nf4.codebooks import CODEBOOKS
from nf4.errors import InputError
from nf4.nested import NestedAbsmax
from nf4.tensor import QuantizedTensor, dequantize, quantize


def sample(*shape: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(
    ("block_size", "double_quant", "bits"),
    [
        (64, False, 4.5),
        (32, False, 5.0),
        (4096, False, 4 + 32 / 4096),
        (64, True, 4 + 8 / 64 + 32 / (64 * 256) + 32 / 2**20),
    ],
)
def test_bits_per_weight(block_size: int, double_quant: bool, bits: float) -> None:
    q = quantize(sample(1024, 1024), block_size, double_quant=double_quant)
    assert q.bits_per_weight == bits
    assert q.size == 2**20
    assert q.nbytes == bits * 2**20 / 8


def test_shape_and_dtype_come_back() -> None:
    for dtype in DTYPES.values():
        for shape in ((7, 3, 5), (1,), (), (0, 4), (64,)):
            x = np.ones(shape, dtype)
            for double_quant in (False, True):
                y = dequantize(quantize(x, double_quant=double_quant))
                assert (y.shape, y.dtype) == (x.shape, x.dtype)
                assert np.array_equal(y, x)


def test_empty_arrays_have_no_codes_and_no_blocks() -> None:
    q = quantize(np.empty((0, 3), np.float32), double_quant=True)
    assert (q.codes.size, q.size, q.bits_per_weight) == (0, 0, 0)
    assert isinstance(q.absmax, NestedAbsmax)
    assert q.absmax.offset == 0


def test_any_memory_order_is_read_in_c_order() -> None:
    x = sample(48, 40)
    assert quantize(np.asfortranarray(x)) == quantize(x)
    assert quantize(x[::2, 1::3]) == quantize(x[::2, 1::3].copy())
    assert quantize(x.T) == quantize(x.T.copy())


def test_the_input_is_left_alone() -> None:
    x = sample(100)
    before = x.tobytes()
    quantize(x, double_quant=True)
    assert x.tobytes() == before


def test_out_is_filled_and_returned() -> None:
    q = quantize(sample(9, 7))
    for dtype in DTYPES.values():
        for shape in ((9, 7), (63,)):
            out = np.full(shape, 9, dtype)
            assert dequantize(q, out=out) is out
            assert out.tobytes() == dequantize(q, dtype).tobytes()


def test_an_out_that_does_not_fit_is_refused() -> None:
    q = quantize(sample(8, 8))
    with pytest.raises(
        InputError, match=r"out is float32 \[8, 9\], must be contiguous float32 of shape \[8, 8\] or \[64\]"
    ):
        dequantize(q, out=np.empty((8, 9), np.float32))
    with pytest.raises(InputError, match="out is float16"):
        dequantize(q, np.float32, out=np.empty((8, 8), np.float16))
    with pytest.raises(InputError, match="not contiguous"):
        dequantize(q, out=np.empty((8, 16), np.float32)[:, ::2])
    with pytest.raises(InputError, match="dtype float64 is not supported"):
        dequantize(q, np.float64)


def test_codes_at_an_odd_address_decode_the_same() -> None:
    q = quantize(sample(1001))
    raw = np.empty(q.codes.size + 1, np.uint8)
    raw[1:] = q.codes
    assert np.array_equal(dequantize(replace(q, codes=raw[1:])), dequantize(q))


def test_codes_and_absmax_with_gaps_decode_the_same() -> None:
    q = quantize(sample(1001))
    assert isinstance(q.absmax, np.ndarray)
    gaps = replace(q, codes=np.stack([q.codes, q.codes], 1)[:, 1], absmax=q.absmax[::-1].copy()[::-1])
    assert np.array_equal(dequantize(gaps), dequantize(q))


def test_equality_is_by_bits() -> None:
    q = quantize(sample(4, 64))
    assert q == quantize(sample(4, 64))
    assert hash(q) == hash(quantize(sample(4, 64)))
    assert isinstance(q.absmax, np.ndarray)
    others = [
        replace(q, shape=(256,)),
        replace(q, dtype=DTYPES["float16"]),
        replace(q, codebook=CODEBOOKS["int4"]),
        replace(q, codes=q.codes ^ np.uint8(1)),
        replace(q, absmax=np.nextafter(q.absmax, np.float32(9))),
        replace(q, absmax=-np.zeros_like(q.absmax)),
        quantize(sample(4, 64), double_quant=True),
        quantize(sample(4, 64), 32),
    ]
    assert q not in others
    assert replace(q, absmax=-np.zeros_like(q.absmax)) != replace(q, absmax=np.zeros_like(q.absmax))
    assert quantize(sample(4, 64), double_quant=True) == quantize(sample(4, 64), double_quant=True)
    assert q != "q"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_nan_and_infinity_are_refused_with_their_place(value: float, dtype: str) -> None:
    x = np.ones((3, 50), DTYPES[dtype])
    x[1, 7] = value
    x[2, 1] = np.nan
    with pytest.raises(InputError) as error:
        quantize(x)
    assert str(error.value) == (
        f"cannot quantize: element 57 (index [1, 7]) is {value}; "
        "replace NaN and infinities with finite values first"
    )


def test_the_first_bad_element_is_named_whatever_the_threads_do() -> None:
    x = np.ones(1 << 19, np.float32)
    x[[7000, 123456, 400000]] = np.nan
    with pytest.raises(InputError, match=r"element 7000 \(index \[7000\]\) is nan"):
        quantize(x)
    with pytest.raises(InputError, match=r"element 0 \(index \[\]\) is inf"):
        quantize(np.array(np.inf, np.float32))


def test_a_damaged_absmax_is_refused() -> None:
    q = quantize(sample(200))
    assert isinstance(q.absmax, np.ndarray)
    bad = q.absmax.copy()
    bad[2] = np.nan
    with pytest.raises(InputError, match="cannot dequantize: the absmax of block 2 is nan"):
        dequantize(replace(q, absmax=bad))
    nested = quantize(sample(200), double_quant=True)
    assert isinstance(nested.absmax, NestedAbsmax)
    with pytest.raises(InputError, match="absmax of block 0 is inf"):
        dequantize(replace(nested, absmax=replace(nested.absmax, offset=np.float32(np.inf))))


@pytest.mark.parametrize("block_size", [0, 1, 16, 63, 96, 8192, -64])
def test_other_block_sizes_are_refused(block_size: int) -> None:
    with pytest.raises(
        InputError, match=f"block size {block_size} is not supported; choose one of 32, 64, 128"
    ):
        quantize(np.ones(4, np.float32), block_size)


@pytest.mark.parametrize("dtype", [np.float64, np.int32, np.dtype(">f4"), np.complex64])
def test_other_dtypes_are_refused(dtype: Any) -> None:
    with pytest.raises(
        InputError, match="is not supported; convert to one of float32, float16, bfloat16 first"
    ):
        quantize(np.ones(4, dtype))


def test_parts_that_do_not_fit_are_refused() -> None:
    q = quantize(sample(3, 50))
    with pytest.raises(
        InputError, match=r"shape \[3, 51\], block size 64: codes is uint8 \[75\], must be uint8 \[77\]"
    ):
        replace(q, shape=(3, 51))
    with pytest.raises(InputError, match=r"absmax is float32 \[3\], must be float32 \[5\]"):
        replace(q, block_size=32)
    with pytest.raises(InputError, match="absmax is float64"):
        replace(q, absmax=np.ones(3))  # type: ignore[arg-type]
    nested = quantize(sample(3, 50), double_quant=True)
    with pytest.raises(InputError, match=r"absmax is uint8 \[3\], must be uint8 \[5\]"):
        replace(nested, block_size=32)
    with pytest.raises(InputError, match="block size 48"):
        replace(q, block_size=48)
    with pytest.raises(InputError, match="dtype int8"):
        replace(q, dtype=np.dtype(np.int8))


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_save_and_load(tmp_path: Path, name: str, double_quant: bool) -> None:
    q = quantize(sample(33, 65).astype(DTYPES["bfloat16"]), 128, name, double_quant)
    path = tmp_path / "weight.safetensors"
    q.save(path)
    assert QuantizedTensor.load(path) == q
