"""AdamW against the same recurrence in exact order, and against the formula in float64."""

import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from nf4.errors import InputError
from nf4.train.adamw import AdamW, clip_grad_norm, gradient_norm

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
LIGHT = settings(deadline=None, max_examples=40)

shapes = st.sampled_from([(1,), (7,), (3, 5), (2, 3, 4), (257, 3)])
values = st.floats(-4, 4, width=32).filter(lambda x: x == 0 or abs(x) > 1e-6)
rates = st.floats(1e-6, 0.1)
decays = st.sampled_from([0.0, 0.01, 0.3])


def one(p: np.float32, g: np.float32, m: np.float32, v: np.float32, t: int, lr: float, decay: float):
    """NF4-10.3 and NF4-10.4 for one element, each operation on its own."""
    f = np.float32
    power1 = power2 = 1.0
    for _ in range(t):
        power1, power2 = power1 * 0.9, power2 * 0.999
    step, root = f(lr / (1 - power1)), f(math.sqrt(1 - power2))
    m = f(m + f(f(1 - 0.9) * f(g - m)))
    v = f(f(f(0.999) * v) + f(f(1 - 0.999) * f(g * g)))
    d = f(f(np.sqrt(v) / root) + f(1e-8))
    u = f(step * f(m / d))
    return f(f(f(1 - lr * decay) * p) - u), m, v


@LIGHT
@given(data=st.data(), lr=rates, decay=decays, steps=st.integers(1, 4))
def test_every_bit_follows_the_stated_order(data: st.DataObject, lr: float, decay: float, steps: int) -> None:
    shape = data.draw(st.sampled_from([(3,), (2, 3)]))
    p = data.draw(arrays(np.float32, shape, elements=values))
    expected = [(x, np.float32(0), np.float32(0)) for x in p.reshape(-1)]
    optimizer = AdamW({"p": p}, weight_decay=decay)
    for t in range(1, steps + 1):
        g = data.draw(arrays(np.float32, shape, elements=values))
        optimizer.step({"p": g}, lr)
        active = decay if p.ndim >= 2 else 0.0
        expected = [
            one(*state[:1], x, *state[1:], t, lr, active)
            for state, x in zip(expected, g.reshape(-1), strict=True)
        ]
    assert p.reshape(-1).tobytes() == np.array([state[0] for state in expected]).tobytes()
    assert optimizer.m["p"].reshape(-1).tobytes() == np.array([state[1] for state in expected]).tobytes()
    assert optimizer.v["p"].reshape(-1).tobytes() == np.array([state[2] for state in expected]).tobytes()


@LIGHT
@given(data=st.data(), shape=shapes, lr=rates, decay=decays, steps=st.integers(1, 5))
def test_float64_oracle(
    data: st.DataObject, shape: tuple[int, ...], lr: float, decay: float, steps: int
) -> None:
    seed = data.draw(st.integers(0, 1 << 16))
    generator = np.random.default_rng(seed)
    p = generator.standard_normal(shape).astype(np.float32)
    exact = p.astype(np.float64)
    m, v = np.zeros(shape), np.zeros(shape)
    optimizer = AdamW({"p": p}, weight_decay=decay)
    for t in range(1, steps + 1):
        g = generator.standard_normal(shape).astype(np.float32)
        optimizer.step({"p": g}, lr)
        m = 0.9 * m + 0.1 * g
        v = 0.999 * v + 0.001 * np.square(g, dtype=np.float64)
        if len(shape) >= 2:
            exact -= lr * decay * exact
        exact -= lr * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
    np.testing.assert_allclose(p, exact, rtol=2e-6, atol=2e-6 * lr * steps + 1e-6)


@LIGHT
@given(seed=st.integers(0, 1 << 16), lr=rates)
def test_bfloat16_is_the_float32_update_rounded_once(seed: int, lr: float) -> None:
    generator = np.random.default_rng(seed)
    p = generator.standard_normal((5, 9)).astype(BFLOAT16)
    wide = p.astype(np.float32)
    g = generator.standard_normal((5, 9)).astype(np.float32)
    low, high = AdamW({"p": p}, weight_decay=0.1), AdamW({"p": wide}, weight_decay=0.1)
    low.step({"p": g}, lr)
    high.step({"p": g}, lr)
    assert p.tobytes() == wide.astype(BFLOAT16).tobytes()
    assert low.v["p"].dtype == np.float32


def test_restored_states_go_on_with_the_same_bits() -> None:
    generator = np.random.default_rng(1)
    p = generator.standard_normal((70_000, 2)).astype(np.float32)  # more than one chunk
    grads = [generator.standard_normal(p.shape).astype(np.float32) for _ in range(4)]
    straight = p.copy()
    optimizer = AdamW({"p": straight}, weight_decay=0.1)
    for g in grads[:2]:
        optimizer.step({"p": g}, 0.01)
    taken_up = straight.copy()
    second = AdamW({"p": taken_up}, weight_decay=0.1)
    second.restore(2, optimizer.m, optimizer.v)
    for g in grads[2:]:
        optimizer.step({"p": g}, 0.01)
        second.step({"p": g}, 0.01)
    assert taken_up.tobytes() == straight.tobytes()


@pytest.mark.parametrize("p", [np.zeros(3), np.zeros((4, 4), np.float32).T[:2]])
def test_other_arrays_are_refused(p: np.ndarray) -> None:
    with pytest.raises(ValueError, match="C-contiguous float32 or bfloat16"):
        AdamW({"p": p})


@LIGHT
@given(seed=st.integers(0, 1 << 16), max_norm=st.sampled_from([0.0, 1e-3, 1.0, 1e6]))
def test_clipping_scales_to_the_norm_and_reports_the_one_before(seed: int, max_norm: float) -> None:
    generator = np.random.default_rng(seed)
    grads = {name: generator.standard_normal(n).astype(np.float32) for name, n in (("b", 7), ("a", 70_000))}
    before = {name: g.copy() for name, g in grads.items()}
    exact = math.sqrt(math.fsum(float(x) ** 2 for g in before.values() for x in g))
    norm = clip_grad_norm(grads, max_norm)
    assert norm == pytest.approx(exact, rel=1e-12)
    if max_norm == 0 or norm < max_norm:
        assert all((grads[name] == before[name]).all() for name in grads)
    else:
        assert gradient_norm(grads) == pytest.approx(max_norm, rel=1e-5)
        np.testing.assert_allclose(grads["a"] / before["a"], max_norm / norm, rtol=1e-5)


def test_a_norm_that_is_not_finite_changes_nothing() -> None:
    grads = {"a": np.array([1.0, np.inf], np.float32)}
    assert clip_grad_norm(grads, 1.0) == math.inf
    assert grads["a"].tolist() == [1.0, math.inf]


@pytest.mark.parametrize(
    "options",
    [
        {"betas": (1.0, 0.999)},
        {"betas": (0.9, 1.0)},
        {"betas": (-0.1, 0.999)},
        {"betas": (math.nan, 0.999)},
        {"eps": -1e-8},
        {"eps": math.inf},
        {"weight_decay": math.nan},
    ],
)
def test_constants_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="must be"):
        AdamW({"p": np.zeros(3, np.float32)}, **options)


@pytest.mark.parametrize("bad", [-1e-3, math.nan, math.inf])
def test_a_rate_or_norm_out_of_range_is_refused(bad: float) -> None:
    p = {"p": np.ones(3, np.float32)}
    with pytest.raises(InputError, match="learning rate"):
        AdamW(p).step(p, bad)
    if not bad > 0:
        with pytest.raises(InputError, match="max_norm"):
            clip_grad_norm(p, bad)
