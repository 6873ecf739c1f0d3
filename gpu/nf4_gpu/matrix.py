"""A matrix in device memory, by its address: what kernels, products and copies are told."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Matrix:
    """rows x columns elements, the rows `pitch` elements apart."""

    address: int
    rows: int
    columns: int
    pitch: int
    dtype: np.dtype[Any]

    def part(self, rows: slice | None = None, columns: slice | None = None) -> "Matrix":
        """Return the rows and columns of two slices with both ends given, in the same memory."""
        first, last = (0, self.rows) if rows is None else (rows.start, rows.stop)
        left, right = (0, self.columns) if columns is None else (columns.start, columns.stop)
        assert 0 <= first <= last <= self.rows
        assert 0 <= left <= right <= self.pitch
        address = self.address + (first * self.pitch + left) * self.dtype.itemsize
        return replace(self, address=address, rows=last - first, columns=right - left)

    @property
    def nbytes(self) -> int:
        """Bytes from the first element to the end of the last row's pitch."""
        return self.rows * self.pitch * self.dtype.itemsize
