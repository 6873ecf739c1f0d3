"""Conversion between float32 and the two 16-bit formats, and one correct rounding from the rationals."""

import math
from fractions import Fraction
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOAT16 = np.dtype(np.float16)
FLOAT32 = np.dtype(np.float32)
DTYPES = {"float32": FLOAT32, "float16": FLOAT16, "bfloat16": BFLOAT16}


def widen_into(out: NDArray[np.float32], x: NDArray[Any]) -> None:
    """Write x (float32, float16 or bfloat16) into out (float32) of the same shape, exactly (NF4-7.1).

    A NaN stays one, with bits that depend on the machine; widen gives those of the clause.
    """
    if x.dtype == BFLOAT16:
        np.left_shift(x.view(np.uint16), 16, out=out.view(np.uint32), dtype=np.uint32)
    else:
        np.copyto(out, x)


def widen(x: NDArray[Any]) -> NDArray[np.float32]:
    """Return x (float32, float16 or bfloat16, any shape) as a new float32 array, exactly (NF4-7.1).

    A 16-bit NaN becomes 7fc00000 or, with the sign set, ffc00000.
    """
    out = np.empty(x.shape, np.float32)
    widen_into(out, x)
    if x.dtype != FLOAT32:
        _set_quiet_nans(out, np.isnan(out), 0x7FC00000)
    return out


def narrow_into(out: NDArray[Any], x: NDArray[np.float32]) -> None:
    """Round x (float32, no NaN) to the dtype of out, to nearest with ties to even (NF4-7.2, NF4-7.3).

    The two have one shape. For values that may be NaN use narrow.
    """
    np.copyto(out, x, casting="unsafe")


def narrow(x: NDArray[np.float32], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return x (float32, any shape) rounded once to dtype: float32, float16 or bfloat16 (NF4-7.2, NF4-7.3).

    A NaN becomes 7e00 or 7fc0, with its sign; float32 to float32 changes no bit.
    """
    out = np.empty(x.shape, dtype)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        narrow_into(out, x)
    if dtype != FLOAT32:
        _set_quiet_nans(out, np.isnan(x), 0x7FC0 if dtype == BFLOAT16 else 0x7E00)
    return out


def _set_quiet_nans(out: NDArray[Any], nan: NDArray[np.bool_], quiet: int) -> None:
    """Give out, where nan is true, the bits of quiet with its sign: what a cast gives is the machine's."""
    bits = out.view(np.dtype(f"u{out.itemsize}"))
    sign = 1 << 8 * out.itemsize - 1
    bits[nan] = bits[nan] & sign | quiet


def round_to_float32(x: Fraction) -> np.float32:
    """Return the float32 nearest to the rational x, ties to even, subnormals included (NF4-1.2)."""
    size = abs(x)
    if size == 0:
        return np.float32(0)
    top = size.numerator.bit_length() - size.denominator.bit_length()  # floor(log2 size) is top or top - 1
    if size < Fraction(2) ** top:
        top -= 1
    ulp = max(top - 23, -149)
    significand = round(size / Fraction(2) ** ulp)  # Fraction rounds half to even
    with np.errstate(over="ignore"):
        return np.float32(math.copysign(math.ldexp(significand, ulp), x))
