"""Products with a quantized weight: within the bound of NF4-4.3, the same each run, exact where possible."""

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import cupy
import hypothesis.strategies as st
import nf4
import numpy as np
import pytest
from guarded import Guarded, misaligned, same_bits
from hypothesis import given, settings
from nf4.codebooks import CODEBOOKS, Codebook
from nf4.errors import InputError
from nf4.floats import DTYPES, narrow
from nf4.nested import NestedAbsmax
from nf4_gpu.product import matmul, matmul_plain, matmul_transposed
from nf4_gpu.tensor import quantize, to_device, to_host
from numpy.typing import NDArray

pytestmark = pytest.mark.usefixtures("gpu")
BOUNDS = {"float16": 2.0**-9, "bfloat16": 2.0**-6}
INTEGERS = Codebook("integers", np.arange(-7, 9, dtype=np.float32))  # exact in both 16-bit dtypes
POWERS = np.exp2(np.arange(256) % 5 - 2.0).astype(np.float32)
dtypes = pytest.mark.parametrize("dtype", list(DTYPES))
columns_of_a_product = [st.integers(1, 40).map((32).__mul__), st.integers(1, 12).map((256).__mul__)]
rows_of_a_product = st.one_of(st.integers(1, 70), st.sampled_from([1, 8, 9, 16, 17, 32, 33, 64, 65, 130]))


@pytest.fixture(autouse=True, scope="module")
def kernels_for_small_weights_too() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nf4_gpu.product.SMALL", 0)
        yield


def check_bound(y: Any, x: NDArray[Any], w: NDArray[Any], terms: int) -> None:
    """NF4-4.3, x [rows, terms] and w [terms, columns]."""
    bound = BOUNDS.get(x.dtype.name, (terms + 2) * 2.0**-24)
    x64, w64 = x.astype(np.float64), w.astype(np.float64)
    error = np.abs(cupy.asnumpy(y).astype(np.float64) - x64 @ w64)
    assert (error <= bound * (np.abs(x64) @ np.abs(w64))).all()


def decoded(q: nf4.QuantizedTensor, dtype: str) -> NDArray[Any]:
    return nf4.dequantize(q) if dtype == "float32" else nf4.dequantize(q, np.float32)


@dtypes
@given(data=st.data())
@settings(deadline=None, max_examples=80)
def test_the_bound(dtype: str, data: st.DataObject) -> None:
    rows, outputs = data.draw(rows_of_a_product), data.draw(st.integers(1, 400))
    inputs = data.draw(st.one_of(*columns_of_a_product, st.integers(1, 700)))
    size, book = data.draw(st.sampled_from([32, 64, 128, 4096])), data.draw(st.sampled_from(list(CODEBOOKS)))
    double, own = data.draw(st.booleans()), data.draw(st.sampled_from(list(DTYPES)))
    generator = np.random.default_rng(data.draw(st.integers(0, 99)))
    w = generator.standard_normal((outputs, inputs), dtype=np.float32)
    q = nf4.quantize(w.astype(DTYPES[own]), size, book, double)
    x = (generator.standard_normal((rows, inputs), dtype=np.float32) * 4).astype(DTYPES[dtype])
    dy = generator.standard_normal((rows, outputs), dtype=np.float32).astype(DTYPES[dtype])
    moved = to_device(q)
    out = Guarded((rows, outputs), x.dtype, data.draw(st.sampled_from([0, 1, 3])))
    y = matmul(misaligned(x, data.draw(st.sampled_from([0, 0, 8, 1]))), moved, out.array)
    out.check()
    check_bound(y, x, decoded(q, dtype).T, inputs)
    dx = matmul_transposed(cupy.asarray(dy), moved)
    check_bound(dx, dy, decoded(q, dtype), outputs)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@given(data=st.data())
@settings(deadline=None, max_examples=80)
def test_integers_multiply_exactly(dtype: str, data: st.DataObject) -> None:
    """Whole numbers of which every sum is exact: one wrong index or scale shows."""
    rows, outputs = data.draw(st.integers(1, 64)), data.draw(st.integers(1, 600))
    inputs, size = (
        data.draw(st.one_of(*columns_of_a_product)),
        data.draw(st.sampled_from([32, 64, 128, 4096])),
    )
    if inputs % min(size, 64):
        inputs *= 2
    generator = np.random.default_rng(data.draw(st.integers(0, 99)))
    n = outputs * inputs
    codes = generator.integers(0, 256, n // 2, dtype=np.uint8)
    powers = generator.integers(0, 5, -(-n // size), dtype=np.uint8)
    absmax: Any = POWERS[powers]
    if data.draw(st.booleans()):
        halves = np.exp2(generator.integers(-1, 1, -(-powers.size // 256))).astype(np.float32)
        absmax = NestedAbsmax(powers, halves, np.float32(0), POWERS, 256)
    q = nf4.QuantizedTensor(codes, absmax, (outputs, inputs), DTYPES[dtype], size, INTEGERS)
    x = generator.integers(-3, 4, (rows, inputs)).astype(DTYPES[dtype])
    exact = x.astype(np.float64) @ nf4.dequantize(q, np.float32).astype(np.float64).T
    moved = to_device(q)
    y = matmul(cupy.asarray(x), moved)
    if not isinstance(absmax, NestedAbsmax):
        plain = cupy.empty_like(y)
        matmul_plain(cupy.asarray(x), moved, plain)
        assert same_bits(y, plain)
    assert same_bits(y, narrow(exact.astype(np.float32), DTYPES[dtype]))


@dtypes
@pytest.mark.parametrize("rows", [1, 9, 16, 30, 64, 100])
def test_every_run_and_stream_gives_the_same_bits(dtype: str, rows: int) -> None:
    generator = np.random.default_rng(rows)
    q = to_device(nf4.quantize(generator.standard_normal((1000, 2048), dtype=np.float32), double_quant=True))
    x = cupy.asarray(generator.standard_normal((rows, 2048), dtype=np.float32).astype(DTYPES[dtype]))
    dy = cupy.asarray(generator.standard_normal((rows, 1000), dtype=np.float32).astype(DTYPES[dtype]))
    y, dx = matmul(x, q), matmul_transposed(dy, q)
    cupy.cuda.Device().synchronize()
    streams = [cupy.cuda.Stream(non_blocking=True) for _ in range(3)]
    for _ in range(5):
        for stream in streams:
            with stream:
                again, dx_again = matmul(x, q), matmul_transposed(dy, q)
                stream.synchronize()
            assert same_bits(again, y)
            assert same_bits(dx_again, dx)


@dtypes
@pytest.mark.parametrize("rows", [3, 100])
def test_a_graph_replays_what_the_call_does(dtype: str, rows: int) -> None:
    generator = np.random.default_rng(rows)
    q = to_device(nf4.quantize(generator.standard_normal((300, 512), dtype=np.float32), double_quant=True))
    x = cupy.empty((rows, 512), DTYPES[dtype])
    with cupy.cuda.Stream(non_blocking=True) as stream:
        y, dx = cupy.empty((rows, 300), x.dtype), cupy.empty((rows, 512), x.dtype)
        stream.begin_capture()
        matmul(x, q, y)
        matmul_transposed(y, q, dx)
        graph = stream.end_capture()
        for _ in range(3):
            x.set(generator.standard_normal((rows, 512), dtype=np.float32).astype(x.dtype))
            graph.launch()
            assert same_bits(y, matmul(x, q))
            assert same_bits(dx, matmul_transposed(y, q))


@pytest.mark.parametrize("rows", [3, 12, 40])
@pytest.mark.parametrize("anew", [False, True])
def test_a_product_that_overlaps_others_sees_their_results(rows: int, anew: bool) -> None:
    """Each x is the product before; W may be written anew in between, and x is once by a copy."""
    generator = np.random.default_rng(rows)
    w = [cupy.asarray(generator.standard_normal((1024, 1024), dtype=np.float32) / 32) for _ in range(3)]
    q = quantize(w[0], double_quant=True)
    x = [cupy.asarray(generator.standard_normal((rows, 1024), dtype=np.float32).astype(np.float16))]
    x += [cupy.empty_like(x[0]) for _ in range(9)]

    def run(wait: bool) -> None:
        for i in range(1, 10):
            if anew and i % 3 == 1:
                quantize(w[i // 3], double_quant=True, out=q, check=False)
            if wait:
                cupy.cuda.Device().synchronize()
            matmul(x[i - 1], q, x[i])
            if i == 5:
                x[i][...] = x[1]

    with cupy.cuda.Stream(non_blocking=True) as stream:
        run(wait=True)
        stream.synchronize()
        expected = [cupy.asnumpy(part) for part in x]
        for part in x[1:]:
            part.fill(0)
        stream.begin_capture()
        run(wait=False)
        graph = stream.end_capture()
        for play in (graph.launch, lambda: run(wait=False)) * 5:
            play()
            stream.synchronize()
            assert all(same_bits(*pair) for pair in zip(x, expected, strict=True))


@dtypes
@pytest.mark.parametrize("rows", [2, 80])
def test_what_is_not_finite_stays_so(dtype: str, rows: int) -> None:
    q = quantize(cupy.asarray(np.random.default_rng(0).standard_normal((64, 64), dtype=np.float32)))
    x = np.ones((rows, 64), DTYPES[dtype])
    x[0, 5] = np.nan
    y = cupy.asnumpy(matmul(cupy.asarray(x), q)).astype(np.float32)
    assert np.isnan(y[0]).all()
    assert np.isfinite(y[1:]).all()


def test_more_rows_of_a_small_weight_go_through_cublas(monkeypatch: pytest.MonkeyPatch) -> None:
    q = nf4.quantize(np.random.default_rng(0).standard_normal((96, 64), dtype=np.float32))
    x = np.random.default_rng(1).standard_normal((33, 64), dtype=np.float32).astype(DTYPES["bfloat16"])
    monkeypatch.setattr("nf4_gpu.product.SMALL", q.size + 1)
    monkeypatch.setattr("nf4_gpu.product._few_rows", None)
    check_bound(matmul(cupy.asarray(x), to_device(q)), x, decoded(q, "bfloat16").T, 64)


def test_a_copy_of_a_tensor_keeps_nothing_of_its_products() -> None:
    q = quantize(cupy.asarray(np.random.default_rng(0).standard_normal((64, 256), dtype=np.float32)))
    x = cupy.ones((3, 256), np.float16)
    y = matmul(x, q)
    for again in (copy.deepcopy(q), pickle.loads(pickle.dumps(q))):
        again.codes[...] = again.codes[::-1]
        assert same_bits(matmul(x, again), matmul(x, to_device(to_host(again))))
    assert same_bits(matmul(x, q), y)


def test_leading_dimensions_are_rows() -> None:
    q = quantize(cupy.asarray(np.random.default_rng(0).standard_normal((96, 64), dtype=np.float32)))
    x = cupy.asarray(
        np.random.default_rng(1).standard_normal((2, 3, 64), dtype=np.float32).astype(np.float16)
    )
    assert same_bits(matmul(x, q).reshape(6, 96), matmul(x.reshape(6, 64), q))
    assert matmul(x[0, 0], q).shape == (96,)
    assert matmul_transposed(matmul(x, q), q).shape == x.shape
    assert matmul(x[:0], q).shape == (0, 3, 96)


def test_sums_of_nothing_are_zero() -> None:
    none = quantize(cupy.zeros((5, 0), np.float32))
    assert same_bits(matmul(cupy.zeros((2, 0), np.float16), none), np.zeros((2, 5), np.float16))
    none = quantize(cupy.zeros((0, 5), np.float32))
    assert same_bits(matmul_transposed(cupy.zeros((2, 0), np.float16), none), np.zeros((2, 5), np.float16))


def test_bad_input() -> None:
    q = quantize(cupy.zeros((96, 64), np.float32))
    x = cupy.zeros((2, 64), np.float16)
    cases: list[tuple[Any, str]] = [
        (lambda: matmul(np.zeros((2, 64), np.float16), q), "x is a numpy.ndarray in host memory"),
        (lambda: matmul(x[:, ::2], q), "is not contiguous"),
        (lambda: matmul(cupy.zeros((2, 65), np.float16), q), r"\[\.\.\., 64\] for a weight \[96, 64\]"),
        (lambda: matmul(cupy.zeros((2, 64), np.float64), q), "x is float64"),
        (lambda: matmul(x, quantize(cupy.zeros(64, np.float32))), r"shape \[64\]; a product needs"),
        (
            lambda: matmul(x, q, cupy.zeros((2, 96), np.float32)),
            r"out is float32 .*must be float16 \[2, 96\]",
        ),
        (lambda: matmul_transposed(x, q), r"dy is float16 \[2, 64\]; .* \[\.\.\., 96\]"),
        (lambda: matmul(x, nf4.quantize(np.zeros((96, 64), np.float32))), "in host memory"),
    ]
    for call, words in cases:
        with pytest.raises(InputError, match=words):
            call()
    assert same_bits(matmul(x, q), np.zeros((2, 96), np.float16))
