"""What is compared: the specification's codebooks, and others that it does not have, derived here."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nf4 import parallel
from nf4.blockwise import block_count
from nf4.codebooks import CODEBOOKS, Codebook
from nf4.evidence.normal import Float64, ScaledNormal
from nf4.floats import narrow, widen
from nf4.tensor import dequantize, quantize

ZERO = 7  # the rank of 0 in a grid of 16
_ROWS = 1 << 16  # elements at a time
_LLOYD = 5000  # rounds at most; about 500 are needed


@dataclass(frozen=True)
class Rounded:
    """A weight after quantization and back, in its own dtype and shape, and the bytes it took between."""

    values: NDArray[Any]
    nbytes: int


@dataclass(frozen=True)
class Quantizer:
    """One way to 4 bits: its name, a few words about it, and round(x, block_size).

    round takes an array of float32, float16 or bfloat16 without NaN and infinity, of any shape in C order.
    """

    name: str
    about: str
    round: Callable[[NDArray[Any], int], Rounded]


@cache
def af4(block_size: int) -> Codebook:
    """The AF4 table of a block size (arXiv 2306.06965), which depends on it.

    Every value but -1, 0 and 1 is the median of its bin, for normal weights over their absmax, so that the
    mean magnitude of the error of scaled weights is least. As published, the bins beside 0 reach up to 0;
    when values go to the nearest entry they end half-way, and so the table is not the best by its own
    measure.
    """
    scaled = ScaledNormal(block_size)

    def centre(values: Float64) -> Float64:
        edges = (values[1:] + values[:-1]) / 2
        lower, upper = edges[:-1].copy(), edges[1:].copy()  # the bins of values 1 to 14
        upper[ZERO - 2] = lower[ZERO] = 0
        return _towards_medians(scaled, values, lower, upper, 0)

    return Codebook(f"af4-{block_size}", _lloyd(centre, (0, ZERO, 15)))


@cache
def bof4(block_size: int, signed: bool = False) -> Codebook:
    """The BOF4 table of a block size, or BOF4-S if signed, for the least mean square (arXiv 2505.06653).

    Every value but 0 and 1 (and -1, unless signed) is the mean of its bin, weighted with the square of the
    absmax: that makes the error of the weights least, not that of the scaled ones.
    """
    scaled = ScaledNormal(block_size, signed)

    def centre(values: Float64) -> Float64:
        edges = np.concatenate([[-1.0], (values[1:] + values[:-1]) / 2, [1.0]])
        found: Float64 = np.diff(scaled.partial(edges, 1, 2)) / np.diff(scaled.partial(edges, 0, 2))
        return found

    fixed = (ZERO, 15) if signed else (0, ZERO, 15)
    return Codebook(f"bof4{'-s' if signed else ''}-{block_size}", _lloyd(centre, fixed))


@cache
def bof4_mean(block_size: int) -> Codebook:
    """The BOF4 table of a block size for the least mean magnitude of the weights' error (arXiv 2505.06653).

    Every value but -1, 0 and 1 is the median of its bin, weighted with the absmax.
    """
    scaled = ScaledNormal(block_size)

    def centre(values: Float64) -> Float64:
        edges = (values[1:] + values[:-1]) / 2
        return _towards_medians(scaled, values, edges[:-1], edges[1:], 1)

    return Codebook(f"bof4-mean-{block_size}", _lloyd(centre, (0, ZERO, 15)))


def _towards_medians(
    scaled: ScaledNormal, values: Float64, lower: Float64, upper: Float64, power: int
) -> Float64:
    """One step of Newton's method from each inner value towards the median of what lies in its bin, where
    each scaled weight counts as its absmax to that power."""
    half = (scaled.partial(lower, 0, power) + scaled.partial(upper, 0, power)) / 2
    inner = values[1:-1]
    step = (scaled.partial(inner, 0, power) - half) * scaled.rest / scaled.density(inner, power)
    return np.concatenate([[-1.0], inner - step, [1.0]])


def _lloyd(centre: Callable[[Float64], Float64], fixed: tuple[int, ...]) -> NDArray[np.float32]:
    """Move each value to the centre of its bin until none moves, but those that are fixed; from nf4."""
    start = CODEBOOKS["nf4"].values.astype(np.float64)
    values = start.copy()
    for _ in range(_LLOYD):
        moved = centre(values)
        moved[list(fixed)] = start[list(fixed)]
        change = float(np.abs(moved - values).max())
        values = moved
        if change < 1e-12:
            break
    return values.astype(np.float32)


def _by_codebook(book: Callable[[int], Codebook], double_quant: bool = False) -> Any:
    def round_trip(x: NDArray[Any], block_size: int) -> Rounded:
        q = quantize(x, block_size, book(block_size), double_quant)
        return Rounded(dequantize(q), q.nbytes)

    return round_trip


def round_signed(x: NDArray[Any], block_size: int) -> Rounded:
    """BOF4-S: a block is divided by its element of the largest magnitude, with its sign.

    The sign is kept as that of the stored absmax, and takes no bits of its own.
    """
    flat = x.reshape(-1)
    blocks = block_count(flat.size, block_size)
    padded = np.zeros(blocks * block_size, x.dtype)
    padded[: flat.size] = flat
    rows = padded.reshape(blocks, block_size)
    largest = np.take_along_axis(rows, np.abs(rows).argmax(1)[:, None], 1)
    sign = np.where(largest < 0, -1, 1).astype(x.dtype)  # [blocks, 1]
    rows *= sign
    q = quantize(rows.reshape(-1)[: flat.size], block_size, bof4(block_size, signed=True))
    padded[: flat.size] = dequantize(q)
    rows *= sign
    return Rounded(padded[: flat.size].reshape(x.shape), q.nbytes)


def round_asymmetric(x: NDArray[Any], block_size: int) -> Rounded:
    """Int4 from the least to the greatest of a block: 16 values with one step, two float32 a block."""
    flat = x.reshape(-1)
    out = np.empty(flat.size, x.dtype)

    def work(start: int, stop: int) -> None:
        part = widen(flat[start:stop])
        body = part.size - part.size % block_size
        decoded = np.empty(part.size, np.float32)
        for first, last in ((0, body), (body, part.size)):  # the last block may be short
            if first < last:
                rows = part[first:last].reshape(-1, min(block_size, last - first))
                least = rows.min(1, keepdims=True)
                step = (rows.max(1, keepdims=True) - least) / np.float32(15)
                code = np.rint((rows - least) / np.where(step > 0, step, np.float32(1)))
                decoded[first:last] = (least + code * step).reshape(-1)
        out[start:stop] = narrow(decoded, x.dtype)

    parallel.map_chunks(work, flat.size, _ROWS)
    return Rounded(out.reshape(x.shape), -(-flat.size // 2) + 8 * block_count(flat.size, block_size))


QUANTIZERS = {
    q.name: q
    for q in (
        Quantizer("nf4", "NF4", _by_codebook(lambda _: CODEBOOKS["nf4"])),
        Quantizer("nf4-dq", "NF4, double quantization", _by_codebook(lambda _: CODEBOOKS["nf4"], True)),
        Quantizer("fp4", "FP4 of bitsandbytes", _by_codebook(lambda _: CODEBOOKS["fp4"])),
        Quantizer("fp4-e2m1", "FP4 of OCP", _by_codebook(lambda _: CODEBOOKS["fp4-e2m1"])),
        Quantizer("int4", "Int4, symmetric (±7)", _by_codebook(lambda _: CODEBOOKS["int4"])),
        Quantizer("int4-asym", "Int4, least to greatest", round_asymmetric),
        Quantizer("af4", "AF4", _by_codebook(af4)),
        Quantizer("bof4", "BOF4 (MSE)", _by_codebook(bof4)),
        Quantizer("bof4-mean", "BOF4 (MAE)", _by_codebook(bof4_mean)),
        Quantizer("bof4-s", "BOF4-S (MSE), signed absmax", round_signed),
    )
}
"""By the names that `nf4 compare` takes. Those beside the codebooks of NF4-2.1 are for comparison only."""
