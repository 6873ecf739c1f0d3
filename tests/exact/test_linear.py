"""The exact linear layer: near float64, sequence by sequence, several layers on one input, refusals."""

from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from drawn import numbers
from hypothesis import given, settings
from hypothesis import strategies as st
from nf4.errors import InputError
from nf4.exact import grid, linear
from nf4.lora import Dropout, LoRA, LoRALinear, Workspace
from nf4.tensor import quantize
from numpy.typing import NDArray

Array = NDArray[Any]
Float32 = NDArray[np.float32]

few = settings(deadline=None, max_examples=40)


def layer(
    out: int, into: int, rank: int = 3, *, bias: bool = False, dropout: float = 0.0, dtype: Any = np.float32
) -> LoRALinear:
    """A quantized layer with an adapter, both of that dtype and drawn by the shape; rank 0: without one."""
    name = f"{out} {into} {rank}"
    weight = quantize(numbers(f"w{name}", out, into).astype(dtype), 32)
    lora = None
    if rank:
        factors = (
            numbers(f"{x}{name}", *s).astype(dtype) for x, s in (("a", (rank, into)), ("b", (out, rank)))
        )
        lora = LoRA(*factors, 3.0 / rank, dropout, out)
    return LoRALinear(weight, numbers(f"bias{name}", out).astype(dtype) if bias else None, lora)


def wide(narrow: LoRALinear, of: Callable[[Array], Array] = np.asarray) -> LoRALinear:
    """The layer in float64, its numbers as they are or of each what `of` makes of it."""
    lora = narrow.lora
    weight = Workspace().weight(narrow.weight, np.dtype(np.float32))
    numbers = (weight, narrow.bias, *(() if lora is None else (lora.A, lora.B)))
    w, bias, *factors = (None if x is None else of(x.astype(np.float64)) for x in numbers)
    return LoRALinear(w, bias, lora and LoRA(*factors, lora.scale, lora.dropout, lora.stream))  # type: ignore[arg-type]


def forward(module: LoRALinear, x: Float32, dropout: Dropout | None) -> tuple[Float32, linear.LinearCache]:
    y = np.empty((len(x), module.weight.shape[0]), np.float32)
    (cache,) = linear.forward([module], x, dropout, [y], Workspace())
    return y, cache


def backward(
    modules: Sequence[LoRALinear],
    douts: Sequence[Float32],
    caches: Sequence[linear.LinearCache],
    x: Float32,
    drop: Dropout | None,
    lengths: tuple[int, ...],
    need_dx: bool = True,
) -> tuple[Float32 | None, list[tuple[Float32, Float32] | None]]:
    """dx, and dA and dB of the layers that have an adapter."""
    found = [
        None
        if m.lora is None
        else (
            np.empty((len(lengths), *m.lora.A.shape), np.float32),
            np.empty((len(lengths), *m.lora.B.shape), np.float32),
        )
        for m in modules
    ]
    outs = [(None, None) if pair is None else pair for pair in found]
    dx = linear.backward(modules, douts, caches, x, drop, lengths, Workspace(), outs, need_dx)
    return dx, found


def largest(x: Array) -> Array:
    """Everywhere the greatest magnitude: what a grid is as fine as, whatever cancels or is dropped."""
    return np.full_like(x, np.abs(x).max(initial=0))


def near(found: Array, true: Array, bound: float, terms: Array | None = None) -> bool:
    """Whether found is within a bound relative to the largest of true, or of sums of terms of full size."""
    return bool(np.abs(found - true).max() <= bound * np.abs(true if terms is None else terms).max())


@few
@given(
    st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(0, 4)),
    st.lists(st.integers(1, 5), min_size=1, max_size=3),
    st.booleans(),
    st.sampled_from([0.0, 0.1, 0.7]),
    st.sampled_from([np.float32, ml_dtypes.bfloat16]),
)
def test_forward_and_backward_are_near_float64(
    shape: tuple[int, int, int], lengths: list[int], bias: bool, dropout: float, dtype: Any
) -> None:
    module = layer(*shape, bias=bias, dropout=dropout, dtype=dtype)
    rows, (out, into, _) = sum(lengths), shape
    x, dout = numbers("x", rows, into), numbers("dout", rows, out)
    drop = Dropout(5, tuple(lengths), tuple(range(3, 3 + len(lengths))))
    y, cache = forward(module, x, drop)
    true, true_cache = wide(module).forward(x.astype(np.float64), drop)
    # The terms are as large as sum |x| |w|; what is left of them may be small.
    assert near(y, true, 2.0**-18 * max(1.0, np.abs(x).max() * into / np.abs(true).max()))
    dx, (found,) = backward([module], [dout], [cache], x, drop, drop.lengths)
    true_dx, *true_gradients = wide(module).backward(dout.astype(np.float64), true_cache)
    _, sizes_cache = wide(module, largest).forward(largest(x.astype(np.float64)), drop)
    of_dx, *of_gradients = wide(module, largest).backward(largest(dout.astype(np.float64)), sizes_cache)
    assert dx is not None
    assert near(dx, true_dx, 2.0**-20, of_dx)  # type: ignore[arg-type]
    if found is None:
        assert true_gradients == [None, None]
        return
    for mine, theirs, terms in zip(found, true_gradients, of_gradients, strict=True):
        assert len(mine) == len(lengths)
        assert near(mine.astype(np.float64).sum(0), theirs, 2.0**-20, terms)  # type: ignore[arg-type]


def test_a_sequence_alone_has_the_same_bits() -> None:
    """Its output, its part of dx and its gradients: nothing tells how the sequences are packed."""
    module = layer(30, 50, bias=True, dropout=0.2)
    lengths, samples = (3, 40, 1), (8, 2, 5)
    x, dout = numbers("x", 44, 50), numbers("dout", 44, 30)
    whole = Dropout(1, lengths, samples)
    y, cache = forward(module, x, whole)
    dx, (found,) = backward([module], [dout], [cache], x, whole, lengths)
    assert found is not None
    assert dx is not None
    start = 0
    for i, n in enumerate(lengths):
        rows = slice(start, start + n)
        one = Dropout(1, (n,), (samples[i],))
        own, own_cache = forward(module, x[rows], one)
        assert (own == y[rows]).all()
        own_dx, (gradients,) = backward([module], [dout[rows]], [own_cache], x[rows], one, (n,))
        assert (own_dx == dx[rows]).all()
        assert gradients is not None
        assert all((a[0] == b[i]).all() for a, b in zip(gradients, found, strict=True))
        start += n


def test_layers_that_share_their_input() -> None:
    """Each has the bits that it has alone; their dx are added from the first to the last."""
    x, lengths = numbers("x", 9, 40), (4, 5)
    drop = Dropout(0, lengths, (0, 1))
    modules = [layer(20, 40, dropout=0.1), layer(7, 40, 0), layer(30, 40, bias=True)]
    douts = [numbers(f"dout{i}", 9, m.weight.shape[0]) for i, m in enumerate(modules)]
    outs = [np.empty_like(d) for d in douts]
    caches = linear.forward(modules, x, drop, outs, Workspace())
    dx, gradients = backward(modules, douts, caches, x, drop, lengths)
    total = np.zeros((0, 0), np.float32)
    for i, module in enumerate(modules):
        y, cache = forward(module, x, drop)
        assert (y == outs[i]).all()
        one, (own,) = backward([module], [douts[i]], [cache], x, drop, lengths)
        assert one is not None
        total = one if not i else total + one
        found = gradients[i]
        assert (own is None) == (found is None) == (i == 1)
        if own is not None and found is not None:
            assert all((a == b).all() for a, b in zip(own, found, strict=True))
    assert (dx == total).all()


def test_what_is_not_needed_is_not_computed() -> None:
    """Nor refused: a gradient that no adapter and nothing below asks for may be infinite."""
    modules = [layer(20, 40), layer(7, 40, 0)]
    x = numbers("x", 5, 40)
    outs = [np.empty((5, 20), np.float32), np.empty((5, 7), np.float32)]
    caches = linear.forward(modules, x, None, outs, Workspace())
    douts = [numbers("dout", 5, 20), np.full((5, 7), np.inf, np.float32)]
    dx, found = backward(modules, douts, caches, x, None, (5,), need_dx=False)
    assert dx is None
    assert found[0] is not None
    assert found[1] is None
    with pytest.raises(InputError, match="NaN or an infinity"):
        backward(modules, douts, caches, x, None, (5,))


def test_projection_is_that_of_the_forward_pass() -> None:
    module, x = layer(20, 40, dropout=0.3), numbers("x", 12, 40)
    drop = Dropout(3, (12,), (0,))
    _, cache = forward(module, x, drop)
    again = linear.project(module, x, None, drop, Workspace())
    assert cache.z is not None
    assert cache.bits is not None
    assert (again.z == cache.z).all()
    assert (again.bits == cache.bits).all()
    assert linear.project(module, x, None, None, Workspace()).bits is None


def test_the_factor_is_rounded_once() -> None:
    """c is RN of the float64 product of s and 65536 / (65536 - h) (NF4-15.1)."""
    module = layer(4, 6, 1, dropout=0.3)
    assert module.lora is not None
    module.lora.scale, module.lora.A[:] = 0.7, 1
    drop = Dropout(0, (1,), (0,))
    (kept,) = np.nonzero(np.unpackbits(drop.mask(module.lora, 6), count=6))
    x = np.zeros((1, 6), np.float32)
    x[0, kept[0]] = 1
    _, cache = forward(module, x, drop)
    keep = 65536 / (65536 - round(65536 * 0.3))
    assert cache.z is not None
    assert cache.z[0, 0] == np.float32(0.7 * keep) != np.float32(0.7) * np.float32(keep)


def test_what_drops_out_is_zero_even_if_it_was_infinite() -> None:
    module, x = layer(3, 40, 1, dropout=0.5), np.full((2, 40), 1e-20, np.float32)
    assert module.lora is not None
    module.lora.A[:], module.lora.B[:] = 3e38, 1e3
    drop = Dropout(0, (2,), (0,))
    cache = linear.project(module, x, None, drop, Workspace())
    dout = np.ones((2, 3), np.float32)
    with np.errstate(over="ignore"):
        dx, _ = backward([module], [dout], [cache], x, drop, (2,))
    kept = np.unpackbits(drop.mask(module.lora, 40), count=80).reshape(2, 40)
    assert dx is not None
    assert np.isinf(dx[kept == 1]).all()
    weight = Workspace().weight(module.weight, np.dtype(np.float32))
    assert (dx[kept == 0] == grid.product(dout, weight)[kept == 0]).all()


@pytest.mark.parametrize("where", ["x", "bias", "A", "B"])
def test_what_is_not_finite_is_refused(where: str) -> None:
    """But for a bias, which is no operand: what comes of it is."""
    module, x = layer(4, 6, bias=True), numbers("x", 3, 6)
    assert module.lora is not None
    assert module.bias is not None
    array = {"x": x, "bias": module.bias, "A": module.lora.A, "B": module.lora.B}[where]
    array.reshape(-1)[0] = np.inf
    if where == "bias":
        assert np.isinf(forward(module, x, None)[0][:, 0]).all()
    else:
        with pytest.raises(InputError, match=r"NaN or an infinity \(NF4-14.1\)"):
            forward(module, x, None)
