"""The LoRA layer on the GPU: the reference's masks, its results and its gradients."""

from typing import Any

import cupy
import nf4
import numpy as np
import pytest
from guarded import Guarded, same_bits
from nf4.errors import InputError
from nf4.floats import DTYPES
from nf4.lora import Dropout, LoRA
from nf4.lora import LoRALinear as Reference
from nf4.random import keep_mask
from nf4_gpu.lora import LoRALinear
from nf4_gpu.random import drop
from nf4_gpu.tensor import to_device
from numpy.typing import NDArray

pytestmark = pytest.mark.usefixtures("gpu")
dtypes = pytest.mark.parametrize("dtype", list(DTYPES))
TOLERANCE = {"float32": (1e-5, 1e-4), "float16": (4e-3, 4e-3), "bfloat16": (3e-2, 3e-2)}  # forward, backward


@dtypes
@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.99])
def test_masks_are_those_of_the_reference(dtype: str, p: float) -> None:
    lengths, samples, features = (5, 1, 7, 0, 3), (0, 9, 2**32 + 3, 1, 77), 37
    dropout = Dropout(2**63 + 12345, lengths, samples)
    masks = [keep_mask(dropout.seed, 99, s, n * features, p) for n, s in zip(lengths, samples, strict=True)]
    mask = np.concatenate(masks).reshape(-1, features)
    x = np.random.default_rng(0).standard_normal(mask.shape, dtype=np.float32).astype(DTYPES[dtype])
    out = Guarded(x.shape, x.dtype, 1)
    drop(dropout, 99, p, cupy.asarray(x), out.array)
    out.check()
    assert same_bits(out.array, np.where(mask, x, np.zeros(1, x.dtype)))
    base = np.full(x.shape, 2, x.dtype)
    total = cupy.asarray(base)
    drop(dropout, 99, p, cupy.asarray(x), total, add=True)
    assert same_bits(total, np.where(mask, base + x, base))


def layers(dtype: str, bias: bool, p: float) -> tuple[Reference, LoRALinear]:
    generator = np.random.default_rng(7)

    def normal(*shape: int) -> NDArray[Any]:
        return generator.standard_normal(shape, dtype=np.float32)

    q = nf4.quantize((normal(96, 128) * 0.1).astype(DTYPES[dtype]), double_quant=True)
    kind = np.dtype(np.float32) if dtype == "float32" else DTYPES["bfloat16"]
    lora = LoRA((normal(8, 128) * 0.1).astype(kind), (normal(96, 8) * 0.1).astype(kind), 2.0, p, 5)
    b = normal(96) if bias else None
    moved = LoRA(cupy.asarray(lora.A), cupy.asarray(lora.B), lora.scale, lora.dropout, lora.stream)
    there = LoRALinear(to_device(q), None if b is None else cupy.asarray(b), moved)
    return Reference(q, b, lora), there


def near(found: Any, wanted: Any, tolerance: float) -> None:
    found = cupy.asnumpy(found).astype(np.float64)
    assert np.abs(found - wanted).max() <= tolerance * np.abs(wanted).max()


@dtypes
@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("bias", [False, True])
def test_forward_and_backward(dtype: str, p: float, bias: bool) -> None:
    here, there = layers(dtype, bias, p)
    generator = np.random.default_rng(3)
    x = generator.standard_normal((70, 128), dtype=np.float32).astype(DTYPES[dtype])
    dout = generator.standard_normal((70, 96), dtype=np.float32).astype(DTYPES[dtype])
    dropout = Dropout(11, (60, 10), (4, 5))
    y, cache = here.forward(x.astype(np.float32), dropout)
    dx, dA, dB = here.backward(dout.astype(np.float32), cache)
    out = Guarded((70, 96), x.dtype)
    found, moved_cache = there.forward(cupy.asarray(x), dropout, out.array)
    out.check()
    forward, backward = TOLERANCE[dtype]
    near(found, y, forward)
    gradients = there.backward(cupy.asarray(dout), moved_cache)
    for got, want in zip(gradients, (dx, dA, dB), strict=True):
        assert got is not None
        near(got, want, backward)
    assert gradients[1] is not None
    assert gradients[1].dtype == np.float32
    none, *rest = there.backward(cupy.asarray(dout), moved_cache, need_dx=False)
    assert none is None
    assert all(same_bits(a, b) for a, b in zip(rest, gradients[1:], strict=True))


@dtypes
def test_recomputing_the_cache(dtype: str) -> None:
    _, there = layers(dtype, False, 0.25)
    x = cupy.asarray(
        np.random.default_rng(3).standard_normal((9, 128), dtype=np.float32).astype(DTYPES[dtype])
    )
    dropout = Dropout(11, (9,), (4,))
    _, cache = there.forward(x, dropout)
    assert same_bits(there.project(x, dropout).z, cache.z)


def test_without_an_adapter_and_without_rows() -> None:
    _, there = layers("bfloat16", False, 0.25)
    x = cupy.zeros((0, 128), DTYPES["bfloat16"])
    y, cache = there.forward(x, Dropout(1, (), ()))
    assert y.shape == (0, 96)
    dx, dA, dB = there.backward(y, cache)
    assert dx is not None
    assert dx.shape == (0, 128)
    assert same_bits(dA, np.zeros((8, 128), np.float32))
    assert same_bits(dB, np.zeros((96, 8), np.float32))
    there.lora = None
    _, cache = there.forward(cupy.ones((2, 128), DTYPES["bfloat16"]))
    assert there.backward(cupy.ones((2, 96), DTYPES["bfloat16"]), cache)[1:] == (None, None)


def test_a_graph_of_a_step() -> None:
    _, there = layers("bfloat16", True, 0.25)
    dropout = Dropout(11, (70,), (4,))
    x = cupy.ones((70, 128), DTYPES["bfloat16"])
    with cupy.cuda.Stream(non_blocking=True) as stream:
        stream.begin_capture()
        y, cache = there.forward(x, dropout)
        gradients = there.backward(y, cache)
        graph = stream.end_capture()
        graph.launch()
        expected, other = there.forward(x, dropout)
        assert same_bits(y, expected)
        for a, b in zip(gradients, there.backward(expected, other), strict=True):
            assert same_bits(a, b)


def test_bad_input() -> None:
    _, there = layers("bfloat16", False, 0.25)
    x = cupy.zeros((2, 128), DTYPES["bfloat16"])
    with pytest.raises(InputError, match=r"1 samples of lengths \[3\]; x has 2 rows"):
        there.forward(x, Dropout(1, (3,), (0,)))
    with pytest.raises(InputError, match=r"shape \[128\]; a layer takes \[T, features\]"):
        there.forward(x[0])
