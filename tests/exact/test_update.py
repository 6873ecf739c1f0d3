"""What makes a step of gradients: their sum in pairs, the norm, clipping, the rate; the oracle's bits."""

import math
from fractions import Fraction

import numpy as np
import oracle
import oracle_exact
import oracle_step
import pytest
from drawn import numbers
from hypothesis import given, settings
from hypothesis import strategies as st
from nf4.errors import InputError
from nf4.train.adamw import clip_grad_norm, gradient_norm
from nf4.train.schedule import SCHEDULES, learning_rate
from nf4.train.shares import PairwiseSum
from numpy.typing import NDArray

Float32 = NDArray[np.float32]
few = settings(deadline=None, max_examples=60)


def bits(x: NDArray[np.float32]) -> list[int]:
    return [int(b) for b in np.ascontiguousarray(x).reshape(-1).view(np.uint32)]


def by_definition(arrays: list[Float32]) -> Float32:
    if len(arrays) == 1:
        return arrays[0]
    h = max(2**i for i in range(len(arrays)) if 2**i < len(arrays))
    return by_definition(arrays[:h]) + by_definition(arrays[h:])


@pytest.mark.parametrize("count", range(1, 41))
def test_sums_in_pairs(count: int) -> None:
    arrays = [numbers(f"{count} {i}", 2, 3) for i in range(count)]
    pairwise, held = PairwiseSum(), 0
    for array in arrays:
        pairwise.add(array.copy())
        held = max(held, len(pairwise.nodes))
    assert held <= count.bit_length()
    found = pairwise.total()
    assert (found == by_definition(arrays)).all()
    assert bits(found) == oracle_step.paired([bits(array) for array in arrays])


def test_neighbours_may_be_summed_apart() -> None:
    """As threads or machines do that have 2^k sequences each, and the last of them the rest."""
    arrays = [numbers(f"apart {i}", 50) for i in range(11)]
    parts = []
    for start in (0, 4, 8):
        part = PairwiseSum()
        for array in arrays[start : start + 4]:
            part.add(array.copy())
        parts.append(part.total())
    assert (by_definition(parts) == by_definition(arrays)).all()


@few
@given(
    st.dictionaries(
        st.sampled_from(["b", "a.lora_A", "a.lora_B", "B", "\u00e9"]), st.integers(0, 6), max_size=5
    ),
    st.sampled_from([0.0, 0.01, 1.0, 1e30]),
    st.integers(-60, 60),
)
def test_clipping_is_the_oracles(sizes: dict[str, int], max_norm: float, exponent: int) -> None:
    gradients = {name: np.ldexp(numbers(name, n), exponent) for name, n in sizes.items()}
    norm, expected = oracle_step.clip({name: bits(g) for name, g in gradients.items()}, max_norm)
    assert Fraction(gradient_norm(gradients)) == norm
    assert Fraction(clip_grad_norm(gradients, max_norm)) == norm
    assert {name: bits(g) for name, g in gradients.items()} == expected


def test_the_norm_does_not_depend_on_the_order_within_a_piece() -> None:
    g = numbers("norm", 4096)
    assert gradient_norm({"g": g}) == gradient_norm({"g": g[::-1].copy()})
    assert gradient_norm({"g": g}) == gradient_norm({"g": g.reshape(64, 64)})
    assert gradient_norm({"g": g}) == pytest.approx(np.linalg.norm(g.astype(np.float64)), rel=1e-12)
    long = numbers("long norm", 10_000)
    squares = oracle_exact.sum_of(bits(long), bits(long))
    root = oracle.value(oracle.root(oracle_exact.summed([squares]), "float64"), "float64")
    assert Fraction(gradient_norm({"g": long})) == root


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_norm_that_is_not_finite_clips_nothing(bad: float) -> None:
    gradients = {"a": np.array([1, bad], np.float32), "b": np.ones(1, np.float32)}
    norm = clip_grad_norm(gradients, 1.0)
    assert math.isnan(norm) if math.isnan(bad) else math.isinf(norm)
    assert gradients["b"] == 1
    with pytest.raises(InputError, match="max_norm is -1"):
        clip_grad_norm(gradients, -1)


@settings(deadline=None, max_examples=300)
@given(
    st.integers(0, 400),
    st.integers(1, 200),
    st.integers(0, 50),
    st.sampled_from(SCHEDULES),
    st.floats(0, 1) | st.sampled_from([5e-324, 1e308]),
)
def test_the_rate_is_the_oracles(step: int, steps: int, warmup: int, schedule: str, lr: float) -> None:
    rate = learning_rate(step, steps=steps, lr=lr, schedule=schedule, warmup=warmup)
    assert int(np.float64(rate).view(np.uint64)) == oracle_step.learning_rate(
        step, steps, warmup, schedule, lr
    )


@pytest.mark.parametrize("third", [1, 2, 5, 7, 8, 13])
@pytest.mark.parametrize("lr", ["0x1.0000000000001p+0", "0x1.0000000000002p+0", "0x1.0000000000003p+0"])
def test_rates_midway_between_two_float64_go_to_the_even_one(third: int, lr: str) -> None:
    """cos is 1/2 or -1/2 there: three quarters of 1 + 2^-51 need one bit more than float64 has (NF4-15.8)."""
    peak = float.fromhex(lr)
    share = Fraction(3 if math.cos(math.pi * third / 3) > 0 else 1, 4)
    assert learning_rate(third, steps=3, lr=peak, schedule="cosine") == float(Fraction(peak) * share)
