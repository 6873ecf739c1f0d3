"""A port for each class of bug in chapters 2 to 7, which does one step wrong."""
# ruff: noqa: D102  the class says what is wrong, its base what the step is

from collections.abc import Iterable
from functools import cache
from typing import Any

import numpy as np

from nf4.codebooks import CODEBOOKS
from nf4.conform.bugs.plain_codec import Array
from nf4.conform.bugs.plain_files import Plain
from nf4.floats import BFLOAT16, FLOAT16, FLOAT32
from nf4.nested import DYNAMIC_MAP

SMALLEST = {FLOAT32: np.float32(2**-126), BFLOAT16: np.float32(2**-126), FLOAT16: np.float32(2**-14)}
"""The smallest normal number of a dtype."""

LARGEST = {BFLOAT16: np.float32(2**128 - 2**120), FLOAT16: np.float32(65504)}
"""The largest number of a dtype."""

EIGHT_DIGITS = {
    0xBF591CD8: 0xBF591CD9,
    0x3DF64862: 0x3DF64863,
    0x3F006D04: 0x3F006D03,
    0x3F5C89DA: 0x3F5C89D9,
}
"""Bits of thresholds of nf4, and of the numbers that 8 decimal digits of them give."""


class CodebookRounded(Plain):
    """The values of the codebook have four decimals, as in torchao and many ports (NF4-2.1)."""

    def values(self, codebook: str) -> Array:
        return np.round(super().values(codebook).astype(np.float64), 4).astype(np.float32)


class CodeOrder(Plain):
    """A rank is taken for its code, which only nf4 and int4 allow (NF4-2.2)."""

    def codes_of(self, ranks: Array, codes: Array) -> Array:
        return ranks


class NearestSearch(Plain):
    """The nearest value by subtraction in float32, the first of two, as in ports with an argmin (NF4-2.2)."""

    def ranks(self, s: Array, distinct: Array) -> Array:
        nearest: Array = np.abs(s[:, None] - distinct).argmin(axis=1)
        return nearest


class ThresholdUlp(Plain):
    """Four thresholds of nf4 are an ulp off: constants of 8 digits, as in ONNX Runtime (NF4-2.3)."""

    def thresholds(self, distinct: Array) -> Array:
        bits = super().thresholds(distinct).view(np.uint32)
        for right, wrong in EIGHT_DIGITS.items():
            bits[bits == right] = wrong
        return bits.view(np.float32)


class TieRule(Plain):
    """A value on a threshold goes up (NF4-3.5)."""

    def ranks(self, s: Array, distinct: Array) -> Array:
        return super().ranks(np.nextafter(s, np.float32(np.inf)), distinct)


class BlocksRestartAtRows(Plain):
    """Every row begins a new block, as where rows are quantized one by one.

    Decoding, blocks are counted by row with whole blocks in each, as bitsandbytes 0.50.2 does on AVX-512
    machines (NF4-3.1, NF4-4.1).
    """

    def blocks(self, shape: Iterable[int], block_size: int, decoding: bool) -> Array:
        size = tuple(shape)
        columns = size[-1] if size else 1
        row, column = np.divmod(super().blocks(size, 1, decoding), max(columns, 1))
        per_row = columns // block_size if decoding else -(-columns // block_size)
        index: Array = row * per_row + column // block_size
        return index


class SignedAbsmax(Plain):
    """absmax is the largest element, not the largest magnitude (NF4-3.2)."""

    def absmax(self, blocks: list[Array]) -> Array:
        return np.array([block.max() for block in blocks], np.float32)


class AbsmaxClamped(Plain):
    """absmax is at least 1e-38, as in bitsandbytes' CPU code (NF4-3.2)."""

    def bounded(self, absmax: Array) -> Array:
        return np.maximum(absmax, np.float32(1e-38))


class ScaleRounded16(Plain):
    """The scale is rounded to float16, as in OpenVINO (NF4-3.2)."""

    def absmax(self, blocks: list[Array]) -> Array:
        return self.widened(self.narrowed(super().absmax(blocks), FLOAT16))


class ReciprocalOverflow(Plain):
    """Up to 2^-128 the reciprocal is infinite, as in ONNX Runtime; a NaN is above no threshold (NF4-3.3)."""

    def scaled(self, x: Array, absmax: Array, tail: Array) -> Array:
        s = x * self.reciprocal(absmax)
        return self.kept(np.where(np.isnan(s), np.float32(-np.inf), s))


class ReciprocalClamped(Plain):
    """The reciprocal is that of at least 1e-38, as in full blocks of bitsandbytes' CPU code (NF4-3.3)."""

    def scaled(self, x: Array, absmax: Array, tail: Array) -> Array:
        return self.kept(x * self.reciprocal(np.maximum(absmax, np.float32(1e-38))))


class ReciprocalApproximation(Plain):
    """The reciprocal is an ulp too great, as an approximate one of a GPU may be (NF4-3.3)."""

    def reciprocal(self, absmax: Array) -> Array:
        return np.nextafter(super().reciprocal(absmax), np.float32(np.inf))


class TrueDivision(Plain):
    """Elements are divided by absmax (NF4-3.3)."""

    def scaled(self, x: Array, absmax: Array, tail: Array) -> Array:
        return self.kept(x / absmax)


class TailDivision(Plain):
    """The short last block is divided by absmax, as in bitsandbytes' CPU code (NF4-3.3)."""

    def scaled(self, x: Array, absmax: Array, tail: Array) -> Array:
        return np.where(tail, self.kept(x / absmax), super().scaled(x, absmax, tail))


class ZeroBlock(Plain):
    """0 times infinity is a NaN, above no threshold, as in bitsandbytes' CUDA code (NF4-3.4)."""

    def zero_block(self) -> np.float32:
        return np.float32(-np.inf)


class NibbleOrder(Plain):
    """The first element is in the low bits, as in OpenVINO (NF4-5.1)."""

    def joined(self, first: Array, second: Array) -> Array:
        return super().joined(second, first)

    def split(self, byte: Array) -> tuple[Array, Array]:
        first, second = super().split(byte)
        return second, first


class PadNibble(Plain):
    """The pad is 0, as in bitsandbytes' CUDA code (NF4-5.2)."""

    def pad(self, values: Array) -> int:
        return 0


class CastBeforeMultiply(Plain):
    """Value and absmax are rounded to the output dtype before they are multiplied (NF4-4.2)."""

    def product(self, value: Array, absmax: Array, dtype: np.dtype[Any]) -> Array:
        short, scale = (self.widened(self.narrowed(x, dtype)) for x in (value, absmax))
        return super().product(short, scale, dtype)


class DoubleRounding(Plain):
    """A product is rounded to 16 bits once, not to float32 before (NF4-4.2)."""

    def product(self, value: Array, absmax: Array, dtype: np.dtype[Any]) -> Array:
        if dtype == FLOAT32:
            return super().product(value, absmax, dtype)
        return self.narrowed(to_odd(value.astype(np.float64) * absmax), dtype)


class NegativeZero(Plain):
    """A zero loses its sign (NF4-4.1)."""

    def signed(self, product: Array) -> Array:
        return product + np.float32(0)


class TruncatedConversion(Plain):
    """A float32 becomes a 16-bit number by cutting its lower bits off (NF4-7.2, NF4-7.3)."""

    def rounded(self, x: Array, dtype: np.dtype[Any]) -> Array:
        if dtype == BFLOAT16:
            return (x.view(np.uint32) >> np.uint32(16)).astype(np.uint16).view(dtype)
        short = super().rounded(x, dtype)
        return np.where(np.abs(short) > np.abs(x), np.nextafter(short, FLOAT16.type(0)), short).astype(dtype)


class OverflowClamped(Plain):
    """What passes the largest number of a 16-bit dtype becomes that number (NF4-4.2, NF4-7.2, NF4-7.3)."""

    def rounded(self, x: Array, dtype: np.dtype[Any]) -> Array:
        short = super().rounded(x, dtype)
        largest = np.copysign(LARGEST[dtype], x).astype(dtype)
        return np.where(np.isinf(short), largest, short)


class NanPayload(Plain):
    """A NaN keeps what it can of its payload (NF4-7.1 to NF4-7.3)."""

    def widened_nan(self, x: Array) -> Array:
        bits = x.view(np.uint16).astype(np.uint32)
        if x.dtype == BFLOAT16:
            return bits << np.uint32(16)
        return (
            (bits & np.uint32(0x8000)) << np.uint32(16)
            | 0x7F800000
            | (bits & np.uint32(0x3FF)) << np.uint32(13)
        )

    def narrowed_nan(self, x: Array, dtype: np.dtype[Any]) -> Array:
        bits = x.view(np.uint32)
        sign = bits >> 16 & 0x8000
        payload = bits >> 16 & 0x7FFF | 0x40 if dtype == BFLOAT16 else bits >> 13 & 0x3FF | 0x7E00
        return (sign | payload).astype(np.uint16)


class FlushSubnormal(Plain):
    """Subnormal numbers, read or computed, are taken for zero, as on GPUs with -ftz=true (NF4-1.1)."""

    def kept(self, x: Array) -> Array:
        return np.where(np.abs(x) < SMALLEST[x.dtype], np.copysign(x.dtype.type(0), x), x)


class FmaContraction(Plain):
    """A product and a sum are rounded once, as compilers for FMA like to (NF4-1.2)."""

    def multiply_add(self, a: Array | np.float32, b: Array, c: Array) -> Array:
        return fused(a, b, c)


class MeanOrder(Plain):
    """The mean is a float32 sum from the first to the last, divided by their number (NF4-6.1)."""

    def mean(self, x: Array) -> Array:
        with np.errstate(over="ignore"):
            return np.array(
                [np.cumsum(x, dtype=np.float32)[-1] / np.float32(x.size) if x.size else 0], np.float32
            )


class DynamicMapRounding(Plain):
    """The 8-bit map is the one that bitsandbytes computes on a machine with FMA (NF4-6.2)."""

    def encoder_map(self) -> Array:
        return fused_map()


class MapIgnored(Plain):
    """The 8-bit codes are decoded with the map of the specification (NF4-6.2)."""

    accepted = "map' is missing"

    def decoder_map(self, stored: Array) -> Array:
        return DYNAMIC_MAP

    def stored_values(self, stored: Array, codebook: str) -> Array:
        return CODEBOOKS[codebook].values


class NestedAbsmaxIgnored(Plain):
    """The absmax of the nested blocks is left out, as in some loaders of checkpoints (NF4-6.4)."""

    def nested_scale(self, nested_absmax: Array) -> Array:
        return np.ones_like(nested_absmax)


class OffsetOmitted(Plain):
    """The offset is left out of decoding (NF4-6.4)."""

    accepted = r"missing or unknown: \['nested_offset'\]"

    def decoder_offset(self, offset: Array) -> Array:
        return np.zeros_like(offset)


class InfiniteAbsmaxAccepted(Plain):
    """An absmax that would decode to an infinity is double-quantized, as in bitsandbytes (NF4-6.6)."""

    def check_decodes(self, absmax: Array) -> None:
        return None


class NonFiniteAccepted(Plain):
    """A NaN or an infinity is taken, as in every library (NF4-12.1, NF4-12.5)."""

    accepted = "holds (-?inf|nan|NaN)|is (-?inf|nan);|[0-9] isn't a finite float32|NaN is not JSON"

    def check_finite(self, what: str, x: Array) -> None:
        return None

    def mean(self, x: Array) -> Array:
        # The exact mean is one of finite numbers.
        return super().mean(x) if np.isfinite(x).all() else np.mean(x, keepdims=True)


class BlockSizeAccepted(Plain):
    """A block size other than the eight is taken; one below 1 as 32 (NF4-12.3)."""

    def usable(self, block_size: int) -> int:
        return block_size if block_size > 0 else 32


class DtypeAccepted(Plain):
    """Another dtype is taken, and computed with in float32 (NF4-12.2)."""

    def check_dtype(self, dtype: str, among: Iterable[str] = ()) -> None:
        return None


class LengthAccepted(Plain):
    """Arrays that are too short or too long are repeated or cut to fit (NF4-12.5)."""

    def fitting(self, what: str, array: Array, count: int) -> Array:
        return np.resize(array, count)


class NegativeAccepted(Plain):
    """A negative size, count or index is taken for its magnitude (NF4-1.4)."""

    def whole(self, what: str, number: int) -> int:
        return abs(number)


def to_odd(x: Array) -> Array:
    """Return float64 x as float32, so that rounding it to 16 bits is as if x were rounded at once.

    It is truncated, and its last bit set where that lost something.
    """
    near = x.astype(np.float32)
    lower = np.where(np.abs(near) > np.abs(x), np.nextafter(near, np.float32(0)), near)
    odd: Array = (lower.view(np.uint32) | (lower != x).astype(np.uint32)).view(np.float32)
    return odd


def fused(a: Array | np.float32, b: Array, c: Array) -> Array:
    """Return a * b + c of float32, rounded once: the product is exact in float64, the sum rounded to odd."""
    product = np.float64(a) * b.astype(np.float64)
    total = product + c
    error = (product - (total - (total - product))) + (c - (total - product))
    bits = total.view(np.int64)
    inexact = np.isfinite(total) & (error != 0) & (bits & 1 == 0)
    towards = np.where((error > 0) == (total > 0), 1, -1)
    return np.where(inexact, bits + towards, bits).view(np.float64).astype(np.float32)


@cache
def fused_map() -> Array:
    """Return the dynamic map that PyTorch makes with fused multiply-add, float32 [256] (NF4-6.2)."""
    start, stop = np.float32(0.1), np.float32(1)
    entries: list[Array] = [np.zeros(1, np.float32), np.ones(1, np.float32)]
    for i in range(7):
        n = 2**i + 1
        step = (stop - start) / np.float32(n - 1)
        k = np.arange(n, dtype=np.float32)
        below = fused(step, k, np.full(n, start))
        above = fused(-step, np.float32(n - 1) - k, np.full(n, stop))
        bounds = np.where(k < n // 2, below, above)
        middles = (bounds[:-1] + bounds[1:]) / np.float32(2) * np.float32(10.0 ** (i - 6))
        entries += [middles, -middles]
    return np.sort(np.concatenate(entries))
