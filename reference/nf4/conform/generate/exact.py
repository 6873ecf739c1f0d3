"""Inputs of vectors, and arithmetic beyond float64: the same on every machine, to fifty digits."""

import math
from decimal import Context, Decimal, localcontext
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nf4.floats import DTYPES, narrow, round_to_float32
from nf4.random import stream_of, uniform

Float64 = NDArray[np.float64]

_CONTEXT = Context(prec=50)
_PI = Decimal("3.14159265358979323846264338327950288419716939937510582097494")


def numbers(slug: str, *shape: int, scale: float = 1.0, dtype: str = "float32") -> NDArray[Any]:
    """Numbers from -scale to scale that follow from the slug."""
    u = uniform(0, stream_of(slug), math.prod(shape))
    wide = (u * np.float32(2) - np.float32(1)) * np.float32(scale)
    return narrow(wide, DTYPES[dtype]).reshape(shape)


def matmul(a: NDArray[Any], b: NDArray[Any]) -> Float64:
    """Return a [n, k] times b [k, m], each sum of the float64 products rounded once: exact for float32."""
    left, right = a.astype(np.float64), b.astype(np.float64)
    return np.array([[math.fsum(row * column) for column in right.T] for row in left]).reshape(
        len(left), right.shape[1]
    )


def norm(arrays: list[NDArray[Any]]) -> float:
    """Return the 2-norm of all arrays of float32 together."""
    squares = np.concatenate([np.square(a.astype(np.float64)).reshape(-1) for a in arrays])
    return math.sqrt(math.fsum(squares))


def cos(x: Decimal) -> Decimal:
    """Return the cosine of x, from 0 to 2 pi, to 40 digits and more."""
    with localcontext(_CONTEXT):
        term = total = Decimal(1)
        for k in range(1, 80, 2):
            term *= -x * x / (k * (k + 1))
            total += term
        return total


def normal(u: float, v: float) -> tuple[np.float32, np.float32]:
    """Return 0.02 sqrt(-2 ln(1 - u)) times cosine and sine of 2 pi v, each rounded once (NF4-10.10)."""
    with localcontext(_CONTEXT):
        radius = Decimal("0.02") * (-2 * (1 - Decimal(u)).ln()).sqrt()
        angle = 2 * _PI * Decimal(v)
        both = radius * cos(angle), radius * cos(angle - _PI / 2)
    return round_to_float32(Fraction(both[0])), round_to_float32(Fraction(both[1]))


def half_cosine(done: int, of: int) -> Fraction:
    """Return (1 + cos(pi done / of)) / 2 to 40 digits (NF4-10.6)."""
    if done == of:
        return Fraction(0)
    with localcontext(_CONTEXT):
        return Fraction((1 + cos(_PI * done / of)) / 2)


def cross_entropy(logits: Float64, targets: list[int]) -> tuple[float, Float64]:
    """Return the mean loss over rows [T, vocabulary] and its gradient; -100 is no target (NF4-10.9)."""
    count = sum(target != -100 for target in targets)
    gradient = np.zeros(logits.shape)
    total = Decimal(0)
    with localcontext(_CONTEXT):
        for row, target in enumerate(targets):
            if target == -100:
                continue
            top = Decimal(float(logits[row].max()))
            powers = [(Decimal(float(x)) - top).exp() for x in logits[row]]
            both = sum(powers, Decimal(0))
            total += both.ln() + top - Decimal(float(logits[row, target]))
            for column, power in enumerate(powers):
                gradient[row, column] = float((power / both - (column == target)) / count)
        return float(total / count), gradient
