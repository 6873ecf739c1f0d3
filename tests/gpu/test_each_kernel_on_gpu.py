"""Every kernel on a few sizes that end anywhere: what compute-sanitizer is run over.

    NF4_SANITIZE=1 compute-sanitizer --tool memcheck python -m pytest tests/gpu/test_each_kernel_on_gpu.py

and likewise with racecheck and initcheck.
"""

from collections.abc import Iterator
from typing import Any

import cupy
import nf4
import numpy as np
import pytest
from guarded import misaligned, same_bits
from nf4.codebooks import CODEBOOKS
from nf4.floats import DTYPES
from nf4.lora import Dropout
from nf4.nested import encode_nested
from nf4_gpu import conform
from nf4_gpu.blockwise import decode_plain, encode_plain
from nf4_gpu.product import matmul, matmul_transposed
from nf4_gpu.random import drop
from nf4_gpu.tensor import check, dequantize, quantize, to_device, to_host
from numpy.typing import NDArray

pytestmark = pytest.mark.usefixtures("gpu")


@pytest.fixture(autouse=True, scope="module")
def kernels_for_small_weights_too() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nf4_gpu.product.SMALL", 0)
        yield


def normal(*shape: int, dtype: str = "float32") -> NDArray[Any]:
    return np.random.default_rng(sum(shape)).standard_normal(shape, dtype=np.float32).astype(DTYPES[dtype])


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize(("n", "offset", "size"), [(40_001, 0, 64), (999, 1, 32), (20_007, 0, 4096)])
def test_the_codec(dtype: str, n: int, offset: int, size: int) -> None:
    x = normal(n, dtype=dtype)
    moved = misaligned(x, offset)
    for book in ("nf4", "fp4"):
        for double in (False, True):
            q = quantize(moved, size, book, double)
            check(q)
            assert to_host(q) == nf4.quantize(x, size, book, double)
            assert same_bits(dequantize(q), nf4.dequantize(nf4.quantize(x, size, book, double)))
    plain = quantize(moved, size)
    codes, absmax, y = cupy.zeros_like(plain.codes), cupy.zeros_like(plain.absmax), cupy.zeros_like(moved)
    encode_plain(moved, size, CODEBOOKS["nf4"], codes, absmax)
    decode_plain(codes, absmax, size, CODEBOOKS["nf4"], y)
    assert same_bits(codes, plain.codes)
    assert same_bits(y, dequantize(plain))


def test_the_absmax() -> None:
    absmax = np.abs(normal(5000))
    expected = encode_nested(absmax)
    assert same_bits(conform.encode_absmax(absmax)["absmax_codes"], expected.codes)


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_dropout(dtype: str) -> None:
    x = cupy.ones((5, 37), DTYPES[dtype])
    drop(Dropout(1, (2, 3), (4, 5)), 6, 0.3, x, x)
    drop(Dropout(1, (2, 3), (4, 5)), 6, 0.3, cupy.ones_like(x), x, add=True)
    assert set(cupy.asnumpy(x).astype(np.float32).ravel()) == {0.0, 2.0}


@pytest.mark.parametrize("rows", [1, 9, 30, 64])
@pytest.mark.parametrize(
    ("outputs", "inputs", "size"), [(300, 64 * 9, 64), (129, 32 * 33, 32), (200, 768, 64), (9000, 256, 128)]
)
@pytest.mark.parametrize("double", [False, True])
def test_the_product(rows: int, outputs: int, inputs: int, size: int, double: bool) -> None:
    q = to_device(nf4.quantize(normal(outputs, inputs), size, "nf4", double))
    x = cupy.asarray(normal(rows, inputs, dtype="bfloat16"))
    y = matmul(x, q)
    wanted = cupy.asnumpy(x).astype(np.float64) @ cupy.asnumpy(dequantize(q)).astype(np.float64).T
    assert np.abs(cupy.asnumpy(y).astype(np.float64) - wanted).max() < 0.02 * np.abs(wanted).max()
    assert matmul_transposed(y, q).shape == x.shape
