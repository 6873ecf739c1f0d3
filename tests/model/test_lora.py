"""The LoRA linear layer: what it computes, its gradients, its initialisation."""

import ml_dtypes
import numpy as np
import pytest
from central import check_gradient
from hypothesis import given, settings
from hypothesis import strategies as st
from nf4.errors import InputError
from nf4.lora import Dropout, LoRA, LoRALinear, Workspace, init_lora
from nf4.random import keep_mask
from nf4.tensor import dequantize, quantize


def random_layer(rng: np.random.Generator, n_in: int, n_out: int, rank: int, dropout: float) -> LoRALinear:
    lora = LoRA(rng.normal(size=(rank, n_in)), rng.normal(size=(n_out, rank)), 0.7, dropout, stream=5)
    return LoRALinear(rng.normal(size=(n_out, n_in)), rng.normal(size=n_out), lora)


@settings(deadline=None, max_examples=25)
@given(
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(1, 4),
    st.lists(st.integers(1, 5), min_size=1, max_size=3),
    st.sampled_from([0.0, 0.3]),
)
def test_gradients(n_in: int, n_out: int, rank: int, lengths: list[int], p: float) -> None:
    rng = np.random.default_rng(n_in)
    layer = random_layer(rng, n_in, n_out, rank, p)
    assert layer.lora is not None
    x = rng.normal(size=(sum(lengths), n_in))
    dout = rng.normal(size=(len(x), n_out))
    dropout = Dropout(3, tuple(lengths), tuple(range(len(lengths))))

    def f() -> float:
        return float(np.sum(layer.forward(x, dropout)[0] * dout))

    _, cache = layer.forward(x, dropout)
    dx, dA, dB = layer.backward(dout, cache)
    assert dx is not None
    assert dA is not None
    assert dB is not None
    check_gradient(f, x, dx)
    check_gradient(f, layer.lora.A, dA)
    check_gradient(f, layer.lora.B, dB)
    no_dx, same_dA, same_dB = layer.backward(dout, cache, need_dx=False)
    assert no_dx is None
    assert np.array_equal(dA, same_dA)
    assert np.array_equal(dB, same_dB)


def test_the_formula_on_a_quantized_weight() -> None:
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(24, 40)).astype(ml_dtypes.bfloat16)
    quantized = quantize(weight, double_quant=True)
    lora = LoRA(
        rng.normal(size=(3, 40)).astype(np.float32), rng.normal(size=(24, 3)).astype(np.float32), 0.5, 0.25, 9
    )
    bias = rng.normal(size=24).astype(np.float32)
    x = rng.normal(size=(7, 40)).astype(np.float32)
    y, _ = LoRALinear(quantized, bias, lora).forward(x, Dropout(1, (4, 3), (8, 6)), Workspace())
    kept = np.concatenate([keep_mask(1, 9, 8, 4 * 40, 0.25), keep_mask(1, 9, 6, 3 * 40, 0.25)]).reshape(
        x.shape
    )
    w = dequantize(quantized).astype(np.float64)
    expected = x @ w.T + bias + 0.5 * (x * kept / 0.75) @ lora.A.astype(float).T @ lora.B.astype(float).T
    assert y.dtype == np.float32
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)


def test_masks_do_not_depend_on_the_packing() -> None:
    rng = np.random.default_rng(1)
    layer = random_layer(rng, 5, 4, 2, 0.5)
    x = rng.normal(size=(9, 5))
    packed, _ = layer.forward(x, Dropout(2, (3, 6), (7, 4)))
    first, _ = layer.forward(x[:3], Dropout(2, (3,), (7,)))
    second, _ = layer.forward(x[3:], Dropout(2, (6,), (4,)))
    np.testing.assert_allclose(packed, np.concatenate([first, second]), rtol=1e-12)
    other, _ = layer.forward(x[:3], Dropout(2, (3,), (8,)))
    assert not np.allclose(first, other)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_init(dtype: type) -> None:
    lora = init_lora("model.layers.0.mlp.up_proj", 400, 30, 4, 8, 0.1, seed=3, dtype=dtype)
    assert lora.A.dtype == lora.B.dtype == dtype
    assert lora.A.shape == (4, 400)
    assert lora.B.shape == (30, 4)
    assert not lora.B.any()
    assert lora.scale == 2.0
    spread = lora.A.astype(np.float64)
    assert 0.045 < np.abs(spread).max() < 0.0501  # bfloat16 rounds
    assert abs(spread.std() - 0.05 / np.sqrt(3)) < 0.001
    assert init_lora("x", 400, 30, 4, 8, 0.0, 3, rslora=True).scale == 4.0
    assert not np.array_equal(lora.A, init_lora("y", 400, 30, 4, 8, 0.1, seed=3, dtype=dtype).A)


def test_bad_adapters_are_refused() -> None:
    with pytest.raises(InputError, match="rank 0 for up_proj"):
        init_lora("up_proj", 4, 4, 0, 8, 0.0, 0)
    with pytest.raises(InputError, match="float16"):
        init_lora("up_proj", 4, 4, 1, 8, 0.0, 0, dtype=np.float16)
