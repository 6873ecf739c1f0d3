"""Cosines and sines of positions, each the float32 nearest to the real number (NF4-15.3)."""

from decimal import Decimal, localcontext
from fractions import Fraction
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from nf4.floats import round_to_float32
from nf4.model.config import LlamaConfig
from nf4.model.rope import frequencies
from nf4.reals import CONTEXT, PI, cosine

Float32 = NDArray[np.float32]

_BITS = 64  # of the fraction of a turn that a position takes
# How far a library's cosine or sine of an angle in [-pi, pi], rounded to float64, may lie from the real one.
_DOUBT = 2.0**-49


def rotation(config: LlamaConfig, lengths: tuple[int, ...]) -> tuple[Float32, Float32]:
    """cos and sin float32 [T, head_dim / 2] of packed sequences of these lengths (NF4-15.3)."""
    tables = [(n, *_tables(*frequencies(config, n), 1 << max(n - 1, 0).bit_length())) for n in lengths]
    cos, sin = [cos[:n] for n, cos, _ in tables], [sin[:n] for n, _, sin in tables]
    return np.concatenate(cos), np.concatenate(sin)


@lru_cache(maxsize=32)
def _tables(angles: tuple[Decimal, ...], factor: Decimal, n: int) -> tuple[Float32, Float32]:
    """Of positions 0 to n - 1: for n the next power of two, tables of a few lengths serve all."""
    with localcontext(CONTEXT):
        turns = [angle / (2 * PI) for angle in angles]
        # In 64 bits multiples of 2^-64 of a turn wrap around as turns do; each position may add one of doubt.
        steps = np.array([int(turn % 1 * (1 << _BITS)) for turn in turns], np.uint64)
    positions = np.arange(n, dtype=np.uint64)[:, None]
    angle = (positions * steps).view(np.int64) * (2 * np.pi / 2.0**_BITS)
    doubt = positions * (2 * np.pi / 2.0**_BITS) + _DOUBT
    scale = float(factor)
    both = []
    for function, quarter in ((np.cos, Decimal(0)), (np.sin, Decimal("0.25"))):
        plain = function(angle)
        near = plain * scale
        least, most = (near - doubt * scale).astype(np.float32), (near + doubt * scale).astype(np.float32)
        with localcontext(CONTEXT):
            # Where the sign is in doubt, both may be zeros all the same: m may be small.
            for position, pair in np.argwhere((least != most) | (np.abs(plain) <= doubt)):
                real = factor * cosine(int(position) * turns[pair] - quarter)
                least[position, pair] = round_to_float32(Fraction(real))
        both.append(least)
    return both[0], both[1]
