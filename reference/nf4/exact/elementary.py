"""Exponential and logarithm of float32 as fixed sequences of float64 operations, rounded once."""

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from nf4.parallel import map_spans

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]

LOG2_E = float.fromhex("0x1.71547652b82fep+0")
LN_2 = float.fromhex("0x1.62e42fefa39efp-1")

EXP_COEFFICIENTS = tuple(
    float.fromhex(text)
    for text in (
        "0x1.62e42ff0e191bp-1",
        "0x1.ebfbe07786d64p-3",
        "0x1.c6b08ac069726p-5",
        "0x1.3b29f39d8a1c5p-7",
        "0x1.5d8a86032650bp-10",
        "0x1.445c83de9f053p-13",
        "0x1.fde5f7c280a5dp-17",
    )
)
"""c1 to c7 of NF4-14.5: 1 + c1 f + ... + c7 f^7 is 2^f to 4.7e-11 of it for |f| <= 1/2."""

LOG_COEFFICIENTS = tuple(
    float.fromhex(text)
    for text in (
        "0x1.555554fda11eep-1",
        "0x1.999a7a84d63d3p-2",
        "0x1.2438d8d9ccdfep-2",
        "0x1.e2f639984fc29p-3",
    )
)
"""c1 to c4 of NF4-14.6: s (2 + c1 z + ... + c4 z^4), z = s^2, is 2 artanh(s) to 4.8e-12 of it."""

# 1.5 * 2^52: a float64 of at most 2^51 that is added to it is rounded to an integer, which the low bits hold.
_INTEGER = 1.5 * 2.0**52
_SQRT_HALF = np.array(math.sqrt(0.5)).view(np.int64)
_ONE = np.array(1.0).view(np.int64)
# Elements that go through all passes at a time: three arrays of float64 stay in the cache.
_CACHED = 1 << 15


def exp(x: Float32, out: Float32 | None = None) -> Float32:
    """Return e^x of x float32, of any shape, in float32, within 0.502 ulp (NF4-14.5).

    Every x has a result: infinite from 88.7228394 on, +0 below -103.972084, a NaN for a NaN. out: a float32
    array of the same shape, C-contiguous, to write into, which may be x.
    """
    return _by_chunks(_exp_into, x, out)


def log(x: Float32, out: Float32 | None = None) -> Float32:
    """Return the natural logarithm of x float32, of any shape, in float32, within 0.501 ulp (NF4-14.6).

    It is -inf for a zero, a NaN for a NaN and below zero, +0 for 1. out: as in exp.
    """
    return _by_chunks(_log_into, x, out)


def _by_chunks(into: Callable[[Float32, Float32, Float64], None], x: Float32, out: Float32 | None) -> Float32:
    out = np.empty(x.shape, np.float32) if out is None else out
    source, target = np.ascontiguousarray(x, np.float32).reshape(-1), out.reshape(-1, copy=False)

    def work(start: int, stop: int) -> None:
        scratch = np.empty((3, min(_CACHED, stop - start)))
        with np.errstate(all="ignore"):
            for i in range(start, stop, _CACHED):
                j = min(i + _CACHED, stop)
                into(source[i:j], target[i:j], scratch[:, : j - i])

    map_spans(work, source.size, _CACHED)
    return out


def _exp_into(x: Float32, out: Float32, scratch: Float64) -> None:
    f, p, k = scratch
    np.clip(x, np.float32(-104), np.float32(89), out=out)
    np.copyto(f, out)
    np.multiply(f, LOG2_E, out=f)
    np.add(f, _INTEGER, out=k)
    np.subtract(k, _INTEGER, out=p)
    np.subtract(f, p, out=f)
    np.multiply(f, EXP_COEFFICIENTS[-1], out=p)
    for c in EXP_COEFFICIENTS[-2::-1]:
        np.add(p, c, out=p)
        np.multiply(p, f, out=p)
    np.add(p, 1.0, out=p)
    scale, bits = k.view(np.int64), p.view(np.int64)
    np.left_shift(scale, 52, out=scale)  # k as an exponent: what stood above it falls off
    np.add(bits, scale, out=bits)
    np.copyto(out, p, casting="same_kind")


def _log_into(x: Float32, out: Float32, scratch: Float64) -> None:
    special = [(x == 0, -np.inf), (x == np.inf, np.inf), (~(x >= 0), np.nan)]  # out may be x
    m, p, z = scratch
    np.copyto(m, x)
    bits = m.view(np.int64)
    k = (bits - _SQRT_HALF) >> 52
    bits -= k << 52
    s = (m - 1.0) / (m + 1.0)
    np.multiply(s, s, out=z)
    np.multiply(z, LOG_COEFFICIENTS[-1], out=p)
    for c in LOG_COEFFICIENTS[-2::-1]:
        np.add(p, c, out=p)
        np.multiply(p, z, out=p)
    p += 2.0
    p *= s
    p += k * LN_2
    np.copyto(out, p, casting="same_kind")
    for where, value in special:
        out[where] = value
