"""Memory of the device laid out by host arithmetic: once to count it, once more where it has been taken."""

from collections import Counter
from typing import Any

import numpy as np
from nf4.floats import BFLOAT16

from nf4_gpu.matrix import Matrix

_ALIGNMENT = 256  # bytes


def round_up(n: int, to: int) -> int:
    """Return the least multiple of `to` that is at least n."""
    return -(-n // to) * to


class Arena:
    """Hands out addresses from a base on, one after the other, and counts bytes by what they are for.

    With the base 0 nothing may be used: it is the plan of one with another base.
    """

    def __init__(self, base: int = 0) -> None:
        self.base = base
        self.size = 0
        self.use: Counter[str] = Counter()

    def take(self, use: str, nbytes: int) -> int:
        """Return the address of so many bytes."""
        address = self.base + self.size
        size = round_up(nbytes, _ALIGNMENT)
        self.size += size
        self.use[use] += size
        return address

    def matrix(
        self, use: str, rows: int, columns: int, dtype: np.dtype[Any] = BFLOAT16, tail: int = 0
    ) -> Matrix:
        """Return a matrix whose rows have room for `tail` more columns, each at a multiple of 128 bytes."""
        pitch = columns
        if rows > 1:
            pitch = round_up(columns + tail, 128 // dtype.itemsize)
        address = self.take(use, rows * pitch * dtype.itemsize)
        return Matrix(address, rows, columns, pitch, dtype)
