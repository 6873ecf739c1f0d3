"""Each operation's backward against central differences, and its forward against the formula."""

import numpy as np
from central import check_gradient
from hypothesis import given, settings
from hypothesis import strategies as st
from nf4.lora import Workspace
from nf4.model.ops import (
    add_embedding_grad,
    cross_entropy,
    head_loss,
    rms_norm,
    rms_norm_backward,
    rms_norm_dweight,
    swiglu,
    swiglu_backward,
)

few = settings(deadline=None, max_examples=25)
size = st.integers(1, 9)


@few
@given(size, size, st.integers(0, 99))
def test_rms_norm(t: int, n: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, w, dy = rng.normal(size=(t, n)), rng.normal(size=n), rng.normal(size=(t, n))
    y, rstd = rms_norm(x, w, 1e-2)
    np.testing.assert_allclose(y, x / np.sqrt((x * x).mean(1, keepdims=True) + 1e-2) * w, rtol=1e-12)

    def f() -> float:
        return float(np.sum(rms_norm(x, w, 1e-2)[0] * dy))

    check_gradient(f, w, rms_norm_dweight(dy, x, rstd))
    check_gradient(f, x, rms_norm_backward(dy.copy(), x, w, rstd))


@few
@given(size, st.integers(1, 70_000), st.integers(0, 99))
def test_swiglu(t: int, n: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    gate, up, dy = rng.normal(size=(3, t, n))
    out = swiglu(gate, up, np.empty_like(gate))
    np.testing.assert_allclose(out, gate / (1 + np.exp(-gate)) * up, rtol=1e-12)

    def f() -> float:
        return float(np.sum(swiglu(gate, up, np.empty_like(gate)) * dy))

    dgate, dup = gate.copy(), up.copy()
    swiglu_backward(dy, dgate, dup)
    check_gradient(f, gate, dgate)
    check_gradient(f, up, dup)


def test_swiglu_of_huge_gates_is_finite() -> None:
    gate = np.array([[-1000.0, -90.0, 0.0, 90.0, 1000.0]], np.float32)
    one = np.ones_like(gate)
    assert swiglu(gate, one, np.empty_like(gate)).tolist() == [[0.0, 0.0, 0.0, 90.0, 1000.0]]
    dgate = gate.copy()
    swiglu_backward(one, dgate, one.copy())
    np.testing.assert_allclose(dgate, [[0, 0, 0.5, 1, 1]], atol=1e-6)


@few
@given(st.integers(0, 12), size, st.integers(2, 9), st.integers(1, 60), st.booleans())
def test_head_loss(t: int, n: int, vocabulary: int, elements: int, full: bool) -> None:
    rng = np.random.default_rng(t)
    x, w = rng.normal(size=(t, n)), rng.normal(size=(vocabulary, n))
    targets = rng.integers(vocabulary, size=t)
    dw = np.ones_like(w) if full else None
    loss, dx = head_loss(x, w, targets, Workspace(), 0.3, dw, elements)
    logits = x @ w.T
    expected = np.log(np.exp(logits).sum(1)) - logits[np.arange(t), targets]
    np.testing.assert_allclose(loss, expected.sum(), rtol=1e-12, atol=1e-12)

    def f() -> float:
        return 0.3 * head_loss(x, w, targets, Workspace(), elements=elements)[0]

    assert dx is not None
    check_gradient(f, x, dx)
    if dw is not None:
        check_gradient(f, w, dw - 1)  # it is added to what dweight held


def test_cross_entropy_of_huge_logits() -> None:
    logits = np.array([[1e4, -1e4, 0.0]], np.float32)
    assert cross_entropy(logits, np.array([1]), 1.0) == 2e4
    assert logits.tolist() == [[1.0, -1.0, 0.0]]


@few
@given(st.lists(st.integers(0, 4), min_size=1, max_size=20))
def test_embedding_grad(ids: list[int]) -> None:
    dx = np.random.default_rng(0).normal(size=(len(ids), 3))
    dw = np.ones((5, 3))
    add_embedding_grad(dw, np.array(ids), dx)
    expected = np.ones((5, 3))
    np.add.at(expected, ids, dx)
    np.testing.assert_allclose(dw, expected, rtol=1e-12)
