"""Encoding, decoding and packing of blocks: chunks that stay in the cache, over the threads of the pool."""

import threading
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from nf4.codebooks import Codebook
from nf4.errors import InputError
from nf4.floats import FLOAT32, narrow_into, widen, widen_into
from nf4.parallel import map_spans

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
CHUNK = 1 << 17  # elements: a multiple of every block size; fewer cost more calls, more leave the caches

_MAGNITUDE = np.int32(0x7FFFFFFF)  # of the bits of a float32; as integers magnitudes order like their values
_INFINITY = np.int32(0x7F800000)  # a NaN is above
_TINY = np.float32(2**-128)  # up to here RN(1 / absmax) is infinite
_LIFT = np.float32(2**64)
_JOIN_NIBBLES = np.uint16(0x1001)  # times first + 256 second, its upper byte is 16 first + second

_buffers = threading.local()


def check_block_size(block_size: int) -> None:
    """Raise InputError unless block_size is one of BLOCK_SIZES (NF4-3.1, NF4-12.3)."""
    if block_size not in BLOCK_SIZES:
        choices = ", ".join(str(size) for size in BLOCK_SIZES)
        raise InputError(f"block size {block_size!r} is not supported; choose one of {choices}")


def block_count(n: int, block_size: int) -> int:
    """Return the number of blocks of n elements; the last may be short (NF4-3.1)."""
    return -(-n // block_size)


def check_array(what: str, array: NDArray[Any], dtype: DTypeLike, size: int) -> None:
    """Raise InputError unless array is of dtype and one-dimensional of that size."""
    if array.dtype != dtype or array.shape != (size,):
        raise InputError(f"{what} is {array.dtype} {list(array.shape)}, must be {np.dtype(dtype)} [{size}]")


def scale_rows(x: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return s = x / absmax, as NF4-3.2, NF4-3.3 and NF4-3.4 say, and absmax [rows], of x [rows, block].

    Where x has a NaN or an infinity, absmax of that row is a NaN or infinite and s means nothing.
    """
    with np.errstate(all="ignore"):
        absmax = np.abs(x).max(axis=1)  # NaN where there is one
        tiny = absmax <= _TINY
        # Times 2^64 is exact, and takes the reciprocal of any absmax but 0 into range.
        lift = np.where(tiny, _LIFT, np.float32(1))[:, None]
        reciprocal = np.where(absmax > 0, 1 / (absmax * lift[:, 0]), np.float32(0))
        return x * lift * reciprocal[:, None], absmax


def encode(
    x: NDArray[Any], block_size: int, codebook: Codebook
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Return (packed codes uint8 [ceil(n / 2)], absmax float32 [block_count]) of flat x [n] (NF4-3, NF4-5).

    x is float32, float16 or bfloat16, contiguous. Raises InputError where x has a NaN or an infinity.
    """
    packed = np.empty(-(-x.size // 2), np.uint8)
    absmax = np.empty(block_count(x.size, block_size), np.float32)
    body = x.size - x.size % block_size

    def work(start: int, stop: int) -> None:
        # Few calls a chunk, and little between them: that is when the threads wait for one another's GIL.
        size = min(CHUNK, stop - start)
        s, wide = _buffer("s", np.float32, size), _buffer("wide", np.float32, size)
        reciprocal = _buffer("reciprocal", np.float32, size // block_size)
        starts = np.arange(0, size, block_size)
        scratch = _pack_scratch(size, codebook)
        with np.errstate(all="ignore"):
            for first in range(start, stop, size):
                n = min(size, stop - first)
                rows, chunk = n // block_size, x[first : first + n]
                if x.dtype != FLOAT32:
                    widen_into(wide[:n], chunk)
                    chunk = wide[:n]
                blocks = absmax[first // block_size :][:rows]
                magnitude = s[:n].view(np.int32)  # borrow the memory of s
                np.bitwise_and(chunk.view(np.int32), _MAGNITUDE, out=magnitude)
                np.maximum.reduceat(magnitude, starts[:rows], out=blocks.view(np.int32))
                np.divide(1, blocks, out=reciprocal[:rows])
                scaled = s[:n].reshape(rows, block_size)
                np.multiply(chunk.reshape(rows, block_size), reciprocal[:rows, None], out=scaled)
                _pack(s[:n], codebook, packed[first // 2 : (first + n) // 2], *scratch)

    map_spans(work, body, CHUNK)
    _refuse_nonfinite_blocks(x, block_size, absmax[: body // block_size])
    tiny = np.flatnonzero(absmax[: body // block_size] <= _TINY)  # whose reciprocal was infinite
    step = CHUNK // block_size
    for some in (tiny[k : k + step] for k in range(0, tiny.size, step)):
        s, _ = scale_rows(widen(x[:body].reshape(-1, block_size)[some]))
        codes = np.empty(s.size // 2, np.uint8)
        _pack(s.reshape(-1), codebook, codes, *_pack_scratch(s.size, codebook))
        packed[: body // 2].reshape(-1, block_size // 2)[some] = codes.reshape(len(some), -1)
    if body < x.size:  # the short last block
        s, absmax[-1:] = scale_rows(widen(x[None, body:]))
        _refuse_nonfinite_blocks(x, block_size, absmax)
        _pack(s[0], codebook, packed[body // 2 :], *_pack_scratch(s.size, codebook))
    return packed, absmax


def _pack_scratch(n: int, codebook: Codebook) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return what _pack needs for up to n elements."""
    return _buffer("codes", np.uint8, n + 1), _buffer("above", np.uint8, codebook.thresholds.size * n)


def _pack(
    s: NDArray[np.float32],
    codebook: Codebook,
    packed: NDArray[np.uint8],
    codes: NDArray[np.uint8],
    above: NDArray[np.uint8],
) -> None:
    """Write the codes of s [n], two a byte, into packed [ceil(n / 2)] (NF4-3.5, NF4-5)."""
    n, thresholds = s.size, codebook.thresholds
    ranks = codes[:n]
    passed = above[: thresholds.size * n].reshape(thresholds.size, n)
    np.greater(s, thresholds[:, None], out=passed.view(np.bool_))
    np.add.reduce(passed, axis=0, out=ranks)
    if not codebook.in_order:
        np.take(codebook.codes, ranks, out=ranks, mode="clip")
    codes[n] = codebook.zero_code  # the pad nibble, where n is odd
    pairs = codes[: n + n % 2].view("<u2")  # first element in the low byte
    pairs *= _JOIN_NIBBLES
    np.right_shift(pairs, 8, out=packed, casting="unsafe")


def _refuse_nonfinite_blocks(x: NDArray[Any], block_size: int, absmax: NDArray[np.float32]) -> None:
    bad = np.flatnonzero(absmax.view(np.int32) >= _INFINITY)
    if bad.size:
        start = int(bad[0]) * block_size
        block = widen(x[start : start + block_size])
        at = int(np.flatnonzero(~np.isfinite(block))[0])
        raise NonFiniteError(start + at, float(block[at]))


class NonFiniteError(InputError):
    """A NaN or an infinity at a flat index (NF4-12.1); the caller, who knows the shape, says it in full."""

    def __init__(self, index: int, value: float) -> None:
        super().__init__(f"element {index} is {value}")
        self.index = index
        self.value = value


def decode(
    packed: NDArray[np.uint8],
    absmax: NDArray[np.float32],
    block_size: int,
    codebook: Codebook,
    out: NDArray[Any],
) -> None:
    """Write value * absmax into flat out [n], rounded once to its dtype (NF4-4.1, NF4-4.2).

    packed is uint8 [ceil(n / 2)], absmax float32 [block_count], with any strides; out is contiguous.
    """
    body = out.size - out.size % block_size
    pairs = np.ascontiguousarray(packed[: body // 2]).view(np.uint16)  # four elements each
    scales = absmax[:, None]
    direct = out.dtype == FLOAT32

    def work(start: int, stop: int) -> None:
        size = min(CHUNK, stop - start)
        index = _buffer("index", np.intp, size // 4)  # np.take would make one each time
        scratch = _buffer("s", np.float32, size)
        with np.errstate(all="ignore"):
            for first in range(start, stop, size):
                n = min(size, stop - first)
                values = out[first : first + n] if direct else scratch[:n]
                quads, rows = index[: n // 4], values.reshape(-1, block_size)
                np.copyto(quads, pairs[first // 4 : (first + n) // 4])
                np.take(codebook.quads, quads, axis=0, out=values.reshape(-1, 4), mode="wrap")  # fastest mode
                np.multiply(rows, scales[first // block_size :][: len(rows)], out=rows)
                if not direct:
                    narrow_into(out[first : first + n], values)

    map_spans(work, body, CHUNK)
    if body < out.size:  # the short last block
        tail = packed[body // 2 :]
        codes = np.stack((tail >> 4, tail & 15), axis=1).reshape(-1)[: out.size - body]
        with np.errstate(all="ignore"):
            values = codebook.values[codes] * absmax[-1]
            narrow_into(out[body:], values)


def _buffer(name: str, dtype: Any, n: int) -> NDArray[Any]:
    """Return n elements of this thread's buffer of that name: fresh memory would cost page faults."""
    key = f"{name}:{np.dtype(dtype).name}"
    buffer: NDArray[Any] | None = getattr(_buffers, key, None)
    if buffer is None or buffer.size < n:
        buffer = np.empty(n, dtype)
        setattr(_buffers, key, buffer)
    return buffer[:n]
