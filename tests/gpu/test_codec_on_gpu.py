"""Quantize and dequantize on the GPU equal the reference in every bit, and write nothing else."""

import threading
from typing import Any

import cupy
import hypothesis.strategies as st
import ml_dtypes
import nf4
import numpy as np
import pytest
from guarded import Guarded, GuardedTensor, misaligned, same_bits
from hypothesis import given, settings
from nf4.blockwise import BLOCK_SIZES
from nf4.codebooks import CODEBOOKS, Codebook
from nf4.errors import InputError
from nf4.floats import DTYPES
from nf4.nested import DYNAMIC_MAP, NestedAbsmax
from nf4.nested import encode_nested as encode_nested_on_host
from nf4.testing import absmax_lists, quantized, tensors
from nf4_gpu import conform
from nf4_gpu.blockwise import decode_plain, encode_plain
from nf4_gpu.tensor import check, dequantize, quantize, to_device, to_host
from numpy.typing import NDArray

pytestmark = pytest.mark.usefixtures("gpu")
many = settings(deadline=None, max_examples=150)
some = settings(deadline=None, max_examples=40)

UINTS = {"float16": np.uint16, "bfloat16": np.uint16, "float32": np.uint32}
dtypes = pytest.mark.parametrize("dtype", list(DTYPES))
offsets = st.sampled_from([0, 0, 1, 2, 3, 4, 7])


@st.composite
def codebooks(draw: st.DrawFn) -> Codebook:
    """One of the four, or one of somebody's own: any order, equal values, thresholds outside [-1, 1]."""
    if draw(st.integers(0, 3)) > 0:
        return draw(st.sampled_from(list(CODEBOOKS.values())))
    values = draw(st.lists(st.floats(-2, 2, width=32), min_size=16, max_size=16))
    values[draw(st.integers(0, 15))] = draw(st.sampled_from([1.0, 3.0, 1e-40]))
    array = np.array(sorted(values) if draw(st.booleans()) else values, np.float32)
    if len(np.unique(array)) < 2:
        array[0] = -5
    return Codebook("own", array)


def random_bits(seed: int, n: int, dtype: str) -> NDArray[Any]:
    """Finite numbers of every exponent."""
    bits = np.random.default_rng(seed).integers(0, 1 << 8 * DTYPES[dtype].itemsize, n, dtype=np.uint64)
    x = bits.astype(UINTS[dtype]).view(DTYPES[dtype])
    return np.where(np.isfinite(x.astype(np.float32)), x, np.zeros(1, x.dtype))


@dtypes
@given(data=st.data())
@many
def test_quantize(dtype: str, data: st.DataObject) -> None:
    size, book = data.draw(st.sampled_from(BLOCK_SIZES)), data.draw(codebooks())
    x = data.draw(tensors(dtype, size, book))
    double, offset = data.draw(st.booleans()), data.draw(offsets)
    on_device = misaligned(x, offset)
    try:
        expected = nf4.quantize(x, size, book, double)
    except InputError:
        with pytest.raises(InputError, match="cannot double-quantize"):
            quantize(on_device, size, book, double)
        return
    out = GuardedTensor(x, size, book, double, data.draw(offsets))
    assert quantize(on_device, size, book, double, out=out.tensor) is out.tensor
    out.check()
    assert to_host(out.tensor) == expected
    assert to_host(quantize(on_device, size, book, double)) == expected
    assert same_bits(on_device, x)


@dtypes
@given(data=st.data())
@many
def test_dequantize(dtype: str, data: st.DataObject) -> None:
    size, book = data.draw(st.sampled_from(BLOCK_SIZES)), data.draw(codebooks())
    try:
        q = data.draw(quantized(dtype, size, book, data.draw(st.booleans())))
    except InputError:
        return
    moved = to_device(q)
    assert to_host(moved) == q
    for name, kind in DTYPES.items():
        out = Guarded(q.shape, kind, data.draw(offsets))
        dequantize(moved, out=out.array)
        out.check()
        assert same_bits(out.array, nf4.dequantize(q, kind)), name
    assert same_bits(dequantize(moved), nf4.dequantize(q))


@given(absmax_lists())
@many
def test_double_quantization(absmax: NDArray[np.float32]) -> None:
    try:
        expected = encode_nested_on_host(absmax)
    except InputError:
        with pytest.raises(InputError, match="infinity"):
            conform.encode_absmax(absmax)
        return
    found = conform.encode_absmax(absmax)
    assert same_bits(found["offset"], expected.offset.reshape(1))
    assert same_bits(found["absmax_codes"], expected.codes)
    assert same_bits(found["nested_absmax"], expected.absmax)


@pytest.mark.parametrize("seed", range(4))
def test_double_quantization_of_many(seed: int) -> None:
    n = (1 << 20) + 77
    absmax = np.abs(random_bits(seed, n, "float32"))
    if seed:
        absmax = np.abs(np.random.default_rng(seed).standard_normal(n, dtype=np.float32)) * np.float32(
            10.0**-seed
        )
    expected = encode_nested_on_host(absmax)
    found = conform.encode_absmax(absmax)
    assert same_bits(found["offset"], expected.offset.reshape(1))
    assert same_bits(found["absmax_codes"], expected.codes)


@dtypes
@pytest.mark.parametrize("size", BLOCK_SIZES)
@pytest.mark.parametrize("book", ["nf4", "fp4"])
def test_the_fast_kernels_equal_the_plain_ones(dtype: str, size: int, book: str) -> None:
    x = cupy.asarray(random_bits(size, 300_001, dtype))
    fast = quantize(x, size, book)
    codes, absmax = cupy.empty_like(fast.codes), cupy.empty_like(fast.absmax)
    encode_plain(x, size, CODEBOOKS[book], codes, absmax)
    assert same_bits(fast.codes, codes)
    assert same_bits(fast.absmax, absmax)
    plain = cupy.empty_like(x)
    decode_plain(codes, absmax, size, CODEBOOKS[book], plain)
    assert same_bits(dequantize(fast), plain)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_16_bit_number(dtype: str) -> None:
    x = np.arange(65536, dtype=np.uint16).view(DTYPES[dtype])
    x = np.where(np.isfinite(x.astype(np.float32)), x, np.zeros(1, x.dtype))
    mixed = np.random.default_rng(0).permutation(x)
    for size in BLOCK_SIZES:
        for array in (x, mixed):
            for double in (False, True):
                expected = nf4.quantize(array, size, "nf4", double)
                assert to_host(quantize(cupy.asarray(array), size, "nf4", double)) == expected


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_rounding_to_16_bits(dtype: str) -> None:
    """Every 16-bit number and every midpoint, and their neighbours, as an absmax that code 14 gives back."""
    exact = np.arange(32768, dtype=np.uint16).view(DTYPES[dtype]).astype(np.float32)
    exact = exact[np.isfinite(exact)]
    bits = exact.view(np.uint32)
    middle = bits[:-1] + (bits[1:] - bits[:-1]) // 2
    around = np.concatenate(
        [(edge + step) for edge in (bits, middle) for step in (np.uint32(0), np.uint32(1))]
    )
    absmax = np.concatenate([around, np.maximum(around, 2) - np.uint32(1)]).view(np.float32)
    absmax = absmax[np.isfinite(absmax)]
    n = 32 * absmax.size
    q = nf4.QuantizedTensor(
        np.full(n // 2, 0xE0, np.uint8), absmax, (n,), DTYPES[dtype], 32, CODEBOOKS["int4"]
    )
    assert same_bits(dequantize(to_device(q)), nf4.dequantize(q))


@dtypes
@pytest.mark.parametrize("book", list(CODEBOOKS))
def test_every_byte(dtype: str, book: str) -> None:
    codes = np.tile(np.arange(256, dtype=np.uint8), 64)
    absmax = np.abs(random_bits(1, codes.size * 2 // 64, "float32"))
    q = nf4.QuantizedTensor(codes, absmax, (codes.size * 2,), DTYPES[dtype], 64, CODEBOOKS[book])
    assert same_bits(dequantize(to_device(q)), nf4.dequantize(q))


def test_more_than_2_to_the_31_elements() -> None:
    n = (1 << 31) + 12345
    part = random_bits(3, 1 << 20, "bfloat16")
    x = cupy.empty(n, part.dtype)
    pattern = cupy.asarray(part)
    for start in range(0, n, part.size):
        x[start : start + part.size] = pattern[: min(part.size, n - start)]
    q = quantize(x, 64, "nf4", double_quant=True)
    plain = quantize(x, 64)
    expected = nf4.quantize(part, 64)
    assert isinstance(plain.absmax, cupy.ndarray)
    start = (n - 12345) // 2  # a multiple of the pattern's length
    assert same_bits(plain.codes[start : start + 6173], nf4.quantize(part[:12345], 64).codes)
    assert same_bits(q.codes[start : start + 6173], plain.codes[start : start + 6173])
    assert same_bits(plain.codes[: part.size // 2], expected.codes)
    assert same_bits(plain.absmax[(n - 12345) // 64 :], nf4.quantize(part[:12345], 64).absmax)
    out = x  # overwritten
    dequantize(plain, out=out)
    assert same_bits(out[n - 12345 :], nf4.dequantize(nf4.quantize(part[:12345], 64)))
    del x, out, q, plain, pattern
    cupy.get_default_memory_pool().free_all_blocks()


# Streams and graphs


@given(st.data())
@some
def test_a_stream_of_the_callers(data: st.DataObject) -> None:
    x = data.draw(tensors("bfloat16", 64))
    with cupy.cuda.Stream(non_blocking=True) as stream:
        on_device = cupy.asarray(x)
        q = quantize(on_device, 64, "nf4", double_quant=True, check=False)
        y = dequantize(q, np.float32)
        found = cupy.asnumpy(y, stream=stream)
        stream.synchronize()  # to copy an empty array waits for nothing
    expected = nf4.quantize(x, 64, "nf4", double_quant=True)
    assert same_bits(found, nf4.dequantize(expected, np.float32))
    assert to_host(q) == expected


def test_threads_on_one_stream_keep_apart() -> None:
    tables = [random_bits(seed, 100_000, "bfloat16") for seed in range(4)]
    expected = [nf4.quantize(x, 64, "nf4", double_quant=True) for x in tables]
    wrong: list[int] = []

    def work(i: int) -> None:
        x = cupy.asarray(tables[i])
        for _ in range(20):
            if to_host(quantize(x, 64, "nf4", double_quant=True)) != expected[i]:
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@dtypes
@pytest.mark.parametrize("double", [False, True])
def test_a_graph_replays_what_the_call_does(dtype: str, double: bool) -> None:
    """Captured on a stream that has no scratch memory yet, and replayed on other inputs."""
    inputs = [random_bits(seed, 70_001, dtype) for seed in range(3)]
    x = cupy.asarray(inputs[0])
    with cupy.cuda.Stream(non_blocking=True) as stream:
        out = GuardedTensor(x, 128, "nf4", double)
        y = Guarded(x.shape, np.float32)
        stream.begin_capture()
        quantize(x, 128, "nf4", double, out=out.tensor)
        dequantize(out.tensor, out=y.array)
        graph = stream.end_capture()
        for array in (*inputs, inputs[0]):
            x.set(array)
            graph.launch()
            expected = nf4.quantize(array, 128, "nf4", double)
            assert to_host(out.tensor) == expected
            assert same_bits(y.array, nf4.dequantize(expected, np.float32))
            assert to_host(quantize(x, 128, "nf4", double)) == expected  # in between, on the same stream
        out.check()
        y.check()


# What is refused


@dtypes
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite(dtype: str, double: bool, value: float) -> None:
    x = np.ones((7, 1000), DTYPES[dtype])
    x[5, 321] = x[6, 0] = value
    with pytest.raises(InputError) as expected:
        nf4.quantize(x)
    for size in (64, 4096):
        with pytest.raises(InputError) as found:
            quantize(cupy.asarray(x), size, "nf4", double)
        assert str(found.value) == str(expected.value)
    q = quantize(cupy.asarray(x), 64, "nf4", double, check=False)
    with pytest.raises(InputError, match="what was quantized had a NaN or an infinity"):
        check(q)
    x[5, 321] = x[6, 0] = 1
    assert to_host(quantize(cupy.asarray(x), 64, "nf4", double)) == nf4.quantize(x, 64, "nf4", double)


def test_what_cannot_be_double_quantized() -> None:
    x = np.zeros(192, np.float32)
    x[64:] = np.finfo(np.float32).max
    with pytest.raises(InputError, match="an absmax would decode to an infinity"):
        quantize(cupy.asarray(x), 64, "nf4", double_quant=True)
    with pytest.raises(InputError, match="too large to be double-quantized"):
        check(quantize(cupy.asarray(x), 64, "nf4", double_quant=True, check=False))


def test_bad_input() -> None:
    x = cupy.zeros((8, 64), np.float32)
    host = nf4.quantize(np.zeros((8, 64), np.float32), double_quant=True)
    q, double = quantize(x), quantize(x, double_quant=True)
    own_map = DYNAMIC_MAP.copy()
    own_map[3] = -0.5
    assert isinstance(host.absmax, NestedAbsmax)
    assert isinstance(double.absmax, NestedAbsmax)
    own = to_device(
        nf4.QuantizedTensor(
            host.codes,
            NestedAbsmax(host.absmax.codes, host.absmax.absmax, host.absmax.offset, own_map),
            *(host.shape, host.dtype, 64, CODEBOOKS["nf4"]),
        )
    )
    mixed = nf4.QuantizedTensor(
        double.codes,
        NestedAbsmax(double.absmax.codes, double.absmax.absmax, host.absmax.offset, double.absmax.map),
        *(double.shape, double.dtype, 64, CODEBOOKS["nf4"]),
    )
    cases: list[tuple[Any, str]] = [
        (lambda: quantize(np.zeros(3)), "in host memory"),
        (lambda: quantize(x.astype(np.float64)), "float64 is not supported"),
        (lambda: quantize(x.T), "is not contiguous"),
        (lambda: quantize(x, 48), "block size 48"),
        (lambda: quantize(x, codebook="nf5"), "nf5"),
        (lambda: quantize(x, out=double), "double-quantized: True"),
        (lambda: quantize(x, codebook="int4", out=q), "codebook nf4, not int4"),
        (lambda: quantize(x, double_quant=True, out=own), "a map or nested blocks of its own"),
        (lambda: quantize(x, out=host), "in host memory"),
        (lambda: dequantize(host), "the codes of the quantized tensor is a numpy.ndarray in host memory"),
        (lambda: dequantize(mixed), "the offset of the quantized tensor is a numpy.float32 in host memory"),
        (lambda: dequantize(q, np.int8), "int8"),
        (lambda: dequantize(q, out=np.zeros((8, 64), np.float32)), "out is a numpy.ndarray in host memory"),
        (lambda: dequantize(q, out=cupy.zeros((64, 8), np.float32)), r"must be float32 \[8, 64\] or \[512\]"),
        (lambda: dequantize(q, np.float16, out=x), "must be float16"),
        (lambda: to_device(nf4.QuantizedTensor(*damaged())), "the absmax of block 1 is nan"),
    ]
    for call, words in cases:
        with pytest.raises(InputError, match=words):
            call()
    assert to_host(q) == nf4.quantize(np.zeros((8, 64), np.float32))


def damaged() -> tuple[Any, ...]:
    absmax = np.array([1, np.nan], np.float32)
    return np.zeros(64, np.uint8), absmax, (128,), DTYPES["float32"], 64, CODEBOOKS["nf4"]


@dtypes
def test_nothing_and_one(dtype: str) -> None:
    for shape in ((0,), (3, 0), (), (1,)):
        x = np.ones(shape, DTYPES[dtype])
        for double in (False, True):
            q = quantize(cupy.asarray(x), double_quant=double)
            assert to_host(q) == nf4.quantize(x, double_quant=double)
            assert same_bits(dequantize(q), nf4.dequantize(nf4.quantize(x, double_quant=double)))


def test_out_of_memory_leaves_the_device_usable() -> None:
    x = random_bits(5, 1 << 16, "bfloat16")
    q = quantize(cupy.asarray(x), double_quant=True)
    pool = cupy.get_default_memory_pool()
    pool.free_all_blocks()
    wide = nf4.QuantizedTensor(
        cupy.zeros(1 << 24, np.uint8), cupy.zeros(1 << 19, np.float32), (1 << 25,), *(DTYPES["float32"], 64),
        CODEBOOKS["nf4"],
    )  # fmt: skip
    pool.set_limit(size=pool.total_bytes() + (1 << 20))
    try:
        with pytest.raises(MemoryError):
            dequantize(wide)
    finally:
        pool.set_limit(size=0)
    assert to_host(q) == nf4.quantize(x, double_quant=True)


def test_torch_tensors_come_and_go_without_a_copy(torch: Any) -> None:
    x = torch.arange(-5000, 5000, device="cuda", dtype=torch.bfloat16).reshape(100, 100)
    q = quantize(x)
    host = x.cpu().view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    assert to_host(q) == nf4.quantize(host)
    y = torch.empty(100, 100, device="cuda", dtype=torch.float32)
    dequantize(q, out=y)
    assert same_bits(y.cpu().numpy(), nf4.dequantize(nf4.quantize(host), np.float32))
    back = torch.from_dlpack(dequantize(q, np.float32))
    assert torch.equal(back, y)
    with pytest.raises(InputError, match=r"x is a torch.Tensor in host memory"):
        quantize(x.cpu())
