"""The operations made of exact products, sums and functions: near float64, row by row, refusals."""

import numpy as np
import pytest
from drawn import numbers
from nf4.errors import InputError
from nf4.exact import ops
from numpy.typing import NDArray

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]

T, N = 100, 700  # rows enough for several chunks
GATE, UP, DOUT = (numbers(name, T, N, scale=6) for name in ("gate", "up", "dout"))
WIDE = {name: x.astype(np.float64) for name, x in (("gate", GATE), ("up", UP), ("dout", DOUT))}


def near(found: Float32, expected: Float64, bound: float = 2.0**-20) -> bool:
    """Within bound of the largest magnitude."""
    return bool(np.abs(found - expected).max() <= bound * np.abs(expected).max())


def sigmoid(x: Float64) -> Float64:
    return 1 / (1 + np.exp(-x))


def test_swiglu() -> None:
    g, u, d = WIDE["gate"], WIDE["up"], WIDE["dout"]
    assert near(ops.swiglu(GATE, UP, np.empty_like(GATE)), g * sigmoid(g) * u)
    dgate, dup = GATE.copy(), UP.copy()
    ops.swiglu_backward(DOUT, dgate, dup)
    assert near(dgate, d * u * sigmoid(g) * (1 + g * (1 - sigmoid(g))))
    assert near(dup, d * g * sigmoid(g))


def test_swiglu_far_out() -> None:
    """Where exp(-g) is infinite, the result is 0, and no NaN."""
    gate = np.array([[-1e30, -200, -88, 88, 1e30]], np.float32)
    dgate, dup = gate.copy(), np.ones_like(gate)
    y = ops.swiglu(gate, dup, np.empty_like(gate))
    assert (y[0, :2] == 0).all()
    assert y[0, 4] == gate[0, 4]
    ops.swiglu_backward(np.ones_like(gate), dgate, dup)
    assert np.isfinite(dgate).all()
    assert np.isfinite(dup).all()


def test_softmax() -> None:
    e = np.exp(WIDE["gate"] - WIDE["gate"].max(1, keepdims=True))
    true = e / e.sum(1, keepdims=True)
    p = ops.softmax(GATE.copy())
    assert near(p, true)
    assert np.abs(p.astype(np.float64).sum(1) - 1).max() < 2.0**-22
    centred = WIDE["dout"] - (true * WIDE["dout"]).sum(1, keepdims=True)
    assert near(ops.softmax_backward(DOUT.copy(), p), true * centred)


def test_softmax_masks() -> None:
    z = np.where(np.tri(9) > 0, GATE[:9, :9], -np.inf).astype(np.float32).reshape(3, 3, 9)
    p = ops.softmax(z.copy()).reshape(9, 9)
    assert (p[np.tri(9) == 0] == 0).all()
    assert p[0, 0] == 1
    for bad in (np.nan, np.inf):
        z[2, 2, 8] = bad
        with pytest.raises(InputError, match="greatest of a row of scores is not finite"):
            ops.softmax(z.copy())
    with pytest.raises(InputError, match="not finite"):
        ops.softmax(np.full((2, 3), -np.inf, np.float32))


def test_rms_norm() -> None:
    x, w, d = WIDE["gate"], WIDE["up"][0], WIDE["dout"]
    r = 1 / np.sqrt((x * x).mean(1, keepdims=True) + 1e-5)
    y, rstd = ops.rms_norm(GATE, UP[0], 1e-5)
    assert near(y, x * r * w)
    assert near(rstd, r, 2.0**-24)
    out = np.empty_like(GATE)
    assert ops.rms_norm(GATE, UP[0], 1e-5, out)[0] is out
    assert (out == y).all()
    dx = ops.rms_norm_backward(DOUT.copy(), GATE, UP[0], rstd)
    assert near(dx, (d * w - x * ((d * w * x).mean(1, keepdims=True) * r * r)) * r)


@pytest.mark.parametrize("eps", [0.0, -1e-5, np.nan, np.inf])
def test_rms_norm_refuses(eps: float) -> None:
    with pytest.raises(InputError, match=f"eps of a norm is {eps}"):
        ops.rms_norm(GATE, UP[0], eps)


def test_cross_entropy() -> None:
    targets = np.arange(T) * 6
    targets[5] = ops.IGNORED
    kept = targets != ops.IGNORED
    e = np.exp(WIDE["gate"] - WIDE["gate"].max(1, keepdims=True))
    p = e / e.sum(1, keepdims=True)
    true = -np.log(p[np.arange(T), targets])
    gradient = p / kept.sum()
    gradient[np.arange(T), targets] -= 1 / kept.sum()
    logits = GATE.copy()
    logits[5] = np.nan
    losses = ops.cross_entropy(logits, targets, 1 / int(kept.sum()))
    assert near(losses[kept], true[kept])
    assert near(logits[kept], gradient[kept])
    assert losses[5] == 0
    assert not logits[5].any()
    assert abs(ops.mean_loss(losses, int(kept.sum())) - true[kept].mean()) < 1e-6
    assert (ops.cross_entropy(GATE.copy(), targets, None) == losses).all()


def test_cross_entropy_refuses() -> None:
    with pytest.raises(InputError, match="row 1 has the target 700; choose one of 700 tokens, or -100"):
        ops.cross_entropy(GATE[:2].copy(), np.array([0, 700]), None)
    with pytest.raises(InputError, match="row 0 has the target -1"):
        ops.cross_entropy(GATE[:2].copy(), np.array([-1, 0]), None)
    with pytest.raises(InputError, match="without a target token"):
        ops.mean_loss(np.zeros(3, np.float32), 0)


def test_rotate() -> None:
    angle = numbers("angle", T, 25, scale=3)
    cos, sin = np.cos(angle), np.sin(angle)
    x = GATE.copy()
    ops.rotate(x, cos, sin)
    halves = WIDE["gate"].reshape(T, 14, 2, 25)
    c, s = cos.astype(np.float64)[:, None], sin.astype(np.float64)[:, None]
    first, second = halves[:, :, 0], halves[:, :, 1]
    assert near(x, np.stack([first * c - second * s, second * c + first * s], 2).reshape(T, N))
    ops.rotate(x, cos, sin, inverse=True)
    assert near(x, WIDE["gate"])


def test_rows_by_themselves_have_the_same_bits() -> None:
    """How rows are cut into chunks, and so the number of threads, cannot be seen."""
    whole = ops.softmax(GATE.copy())
    y, rstd = ops.rms_norm(GATE, UP[0], 1e-5)
    for i in (0, 37, T - 1):
        assert (ops.softmax(GATE[i : i + 1].copy()) == whole[i]).all()
        one = ops.rms_norm(GATE[i : i + 1], UP[0], 1e-5)
        assert (one[0] == y[i]).all()
        assert (one[1] == rstd[i]).all()
