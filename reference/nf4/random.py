"""Counter-based random numbers: Philox4x32-10 uniforms, dropout masks and permutations."""

import zlib

import numpy as np
from numpy.typing import NDArray

from nf4.errors import InputError

# The fourth counter word: it keeps draws for different purposes apart under one seed.
UNIFORM, DROPOUT, PERMUTATION = 0, 1, 2

_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_LOW, _SHIFT = np.uint64(0xFFFFFFFF), np.uint64(32)
_CHUNK = 16384  # counters worked on at a time: their scratch stays in the second-level cache


def philox4x32(counter: NDArray[np.uint32], key: tuple[int, int]) -> NDArray[np.uint32]:
    """Philox4x32-10 of Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3" (NF4-11.1).

    counter: uint32 [n, 4]; key: two 32-bit words. Returns uint32 [n, 4].
    """
    out = np.empty(counter.shape, np.uint32)
    for start in range(0, len(counter), _CHUNK):
        words = counter[start : start + _CHUNK].T.astype(np.uint64)  # [4, c], each word below 2^32
        _rounds(words, key)
        out[start : start + _CHUNK] = words.T
    return out


def stream_of(name: str) -> int:
    """The stream of a named module: CRC-32 of its UTF-8 name (NF4-11.2)."""
    return zlib.crc32(name.encode())


def uniform(seed: int, stream: int, n: int, sample: int = 0) -> NDArray[np.float32]:
    """n numbers in [0, 1), multiples of 2^-24 (NF4-11.3). Returns float32 [n]."""
    words = _draw(seed, -(-n // 4), sample, stream, UNIFORM).reshape(-1)[:n]
    return (words >> np.uint32(8)).astype(np.float32) * np.float32(2**-24)


def drop_threshold(p: float) -> int:
    """The 16-bit lane value below which an element is dropped: round(65536 p) (NF4-11.4).

    Raises InputError unless 0 <= p < 1.
    """
    if not 0 <= p < 1:
        raise InputError(f"dropout is {p}; it must be at least 0 and below 1")
    return min(round(p * 65536), 65535)


def keep_mask(seed: int, stream: int, sample: int, n: int, p: float) -> NDArray[np.bool_]:
    """The dropout mask of one sequence's input rows: True where the element is kept (NF4-11.4).

    sample: index of the sequence in the whole run; n: rows times columns. Returns bool [n].
    Raises InputError unless 0 <= p < 1.
    """
    threshold = np.uint16(drop_threshold(p))
    words = _draw(seed, -(-n // 8), sample, stream, DROPOUT)
    lanes = words.astype("<u4", copy=False).view("<u2").reshape(-1)[:n]  # low half of each word first
    return lanes >= threshold


def permutation(seed: int, epoch: int, n: int) -> NDArray[np.int64]:
    """The order of n things in an epoch: a stable sort by 64-bit draws (NF4-11.5). Returns int64 [n]."""
    words = _draw(seed, -(-n // 2), epoch, 0, PERMUTATION).astype(np.uint64).reshape(-1, 2)[:n]
    return np.argsort(words[:, 0] | words[:, 1] << _SHIFT, kind="stable")


def _draw(seed: int, blocks: int, sample: int, stream: int, purpose: int) -> NDArray[np.uint32]:
    """Philox of the counters (i, sample, stream, purpose) for i below blocks, keyed by the seed (NF4-11.2).

    Raises InputError for more blocks than the 32-bit counter can number.
    """
    if blocks > 1 << 32:
        raise InputError(f"a draw of {blocks} blocks; at most 2^32 can be numbered, so split it over samples")
    key = (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF)
    out = np.empty((blocks, 4), np.uint32)
    words = np.empty((4, min(blocks, _CHUNK)), np.uint64)
    for start in range(0, blocks, _CHUNK):
        stop = min(start + _CHUNK, blocks)
        part = words[:, : stop - start]
        part[0] = np.arange(start, stop, dtype=np.uint64)
        part[1], part[2], part[3] = sample & 0xFFFFFFFF, stream & 0xFFFFFFFF, purpose
        _rounds(part, key)
        out[start:stop] = part.T
    return out


def _rounds(words: NDArray[np.uint64], key: tuple[int, int]) -> None:
    """Ten Philox rounds in place on [4, c] words held in 64 bits, so that a product is one operation."""
    c0, c1, c2, c3 = words
    p0, p1 = np.empty_like(c0), np.empty_like(c0)
    k0, k1 = key
    for _ in range(10):
        np.multiply(c0, _M0, out=p0)
        np.multiply(c2, _M1, out=p1)
        np.right_shift(p1, _SHIFT, out=c0)  # new c0 = hi(p1) ^ c1 ^ k0
        c0 ^= c1
        c0 ^= np.uint64(k0)
        np.bitwise_and(p1, _LOW, out=c1)  # new c1 = lo(p1)
        np.right_shift(p0, _SHIFT, out=c2)  # new c2 = hi(p0) ^ c3 ^ k1
        c2 ^= c3
        c2 ^= np.uint64(k1)
        np.bitwise_and(p0, _LOW, out=c3)  # new c3 = lo(p0)
        k0, k1 = (k0 + _W0) & 0xFFFFFFFF, (k1 + _W1) & 0xFFFFFFFF
