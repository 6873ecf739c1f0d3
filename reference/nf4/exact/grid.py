"""Products and sums that need no order: their operands lie on grids on which every partial sum is exact."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nf4.errors import InputError
from nf4.lora import Workspace
from nf4.parallel import map_chunks

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]

PIECE = 4096
"""The terms that a product or a sum has on one grid (NF4-14.2, NF4-14.4)."""

LONG_PIECE = 512
"""The terms of a piece of a product that has more than PIECE (NF4-14.2)."""

SUM_BITS = 41
"""The bits of a term of a sum, relative to the largest of its piece (NF4-14.4): 41 + log2(PIECE) is 53."""

# Elements that a thread rounds at a time: they stay in its cache from pass to pass.
_CACHED = 1 << 15


@dataclass(frozen=True)
class Gridded:
    """An operand of product that is on its grid already (NF4-14.2): one that is used again.

    values has the operand's shape; its dtype is float64, or float32, which holds the same numbers in half the
    memory.
    """

    values: NDArray[Any]

    @property
    def mT(self) -> "Gridded":
        """The transpose: what is on the grid of its rows is then on that of its columns."""
        return Gridded(self.values.mT)


Operand = Float32 | Gridded


class NotFiniteError(InputError):
    """An operand has a NaN or an infinity, which no grid holds (NF4-14.1): a step that has one diverged."""


def product_bits(k: int) -> int:
    """The bits q of the operands of a product that sums k terms, k <= PIECE (NF4-14.2)."""
    return min(24, (53 - max(k - 1, 0).bit_length()) // 2)


def piece_length(k: int) -> int:
    """The terms of each piece but the last of a product that sums k terms (NF4-14.2)."""
    return LONG_PIECE if k > PIECE else max(k, 1)


def rows(a: Float32, out: Float64 | None = None) -> Gridded:
    """Put each row of a left operand a float32 [..., M, K] on its grid (NF4-14.2), in out if given.

    Raises InputError where an element is not finite.
    """
    return Gridded(_on_grid(a, -1, out))


def columns(b: Float32, out: Float64 | None = None) -> Gridded:
    """Put each column of a right operand b float32 [..., K, N] on its grid (NF4-14.2), in out if given.

    Raises InputError where an element is not finite.
    """
    return Gridded(_on_grid(b, -2, out))


def product(a: Operand, b: Operand, out: Float32 | None = None, space: Workspace | None = None) -> Float32:
    """Return a [..., M, K] times b [..., K, N], float32, the same bits in any order of the sums (NF4-14.3).

    Each is a float32 array, or what rows or columns made of one. out: a float32 array to write into. space:
    whose memory to work in. Leading axes broadcast. Raises InputError where an element is not finite.
    """
    space = space or Workspace()
    left = _operand(a, -1, "left", space)
    right = _operand(b, -2, "right", space)
    shape = (*np.broadcast_shapes(left.shape[:-2], right.shape[:-2]), left.shape[-2], right.shape[-1])
    k = left.shape[-1]
    step = piece_length(k)
    out = np.empty(shape, np.float32) if out is None else out
    sums = [
        np.matmul(
            left[..., i : i + step],
            right[..., i : i + step, :],
            out=space.take(f"sums {i}", shape, np.float64),
        )
        for i in range(0, k, step)
    ] or [np.zeros(shape)]
    target, wide = out.reshape(-1), [s.reshape(-1) for s in sums]

    def finish(start: int, stop: int) -> None:
        parts = [s[start:stop] for s in wide]
        with np.errstate(over="ignore", under="ignore"):
            np.copyto(target[start:stop], _sum(parts) if len(parts) > 1 else parts[0], casting="same_kind")
        target[start:stop] += np.float32(0)  # -0 to +0

    map_chunks(finish, target.size, _CACHED)
    return out


def _operand(x: Operand, axis: int, name: str, space: Workspace) -> Float64:
    if not isinstance(x, Gridded):
        memory = x.mT.shape if _transposed(x) else x.shape
        out = space.take(name, memory, np.float64)
        return _on_grid(x, axis, out.mT if _transposed(x) else out)
    if x.values.dtype == np.float64:
        return x.values
    wide = space.take(name, x.values.shape, np.float64)
    np.copyto(wide, x.values)
    return wide


def total(x: NDArray[Any]) -> Float64:
    """Return the sums over the last axis of x [..., n], float32 or float64, in float64 [...] (NF4-14.4).

    Raises InputError where an element is not finite.
    """
    return _total(x.astype(np.float64))


def dot(x: Float32, y: Float32) -> Float64:
    """Return the sums over the last axis of x * y, both float32 [..., n], in float64 [...] (NF4-14.4).

    The products are exact. Raises InputError where an element is not finite.
    """
    terms = x.astype(np.float64)
    with np.errstate(invalid="ignore"):
        terms *= y
    return _total(terms)


def _total(terms: Float64) -> Float64:
    """total of terms [..., n], which are overwritten."""
    n = terms.shape[-1]
    if n <= PIECE:
        return _piece(terms) if n else np.zeros(terms.shape[:-1])
    whole = n - n % PIECE
    sums = [_piece(terms[..., :whole].reshape(*terms.shape[:-1], -1, PIECE))]
    if whole < n:
        sums.append(_piece(terms[..., None, whole:]))
    return _total(np.concatenate(sums, -1))


def _piece(terms: Float64) -> Float64:
    """Sums over the last axis, of 1 to PIECE terms, which are overwritten."""
    big = _magic(_top(terms, -1), SUM_BITS)
    terms += big
    terms -= big
    sums: Float64 = terms.sum(-1)
    return sums


def _sum(terms: Sequence[Float64]) -> Float64:
    """The sum of 1 to PIECE arrays, element by element, as total has it."""
    top = np.abs(terms[0])
    for term in terms[1:]:
        np.maximum(top, np.abs(term), out=top)
    big = _magic(top, SUM_BITS)
    result = np.zeros_like(big)
    for term in terms:
        result += (term + big) - big
    return result


def _transposed(x: NDArray[Any]) -> bool:
    """Whether a column of x lies closer together than a row."""
    return x.ndim > 1 and x.strides[-1] > x.strides[-2]


def _on_grid(x: Float32, axis: int, out: Float64 | None = None) -> Float64:
    """x [..., M, K] with each row (axis -1) or column (-2) rounded to its grid, in the memory order of x."""
    if x.dtype != np.float32:
        raise InputError(f"an operand of an exact product is {x.dtype}; it must be float32")
    if _transposed(x):
        return _on_grid(x.mT, -3 - axis, None if out is None else out.mT).mT
    out = np.empty(x.shape) if out is None else out
    if not x.size:
        return out
    k = x.shape[axis]
    if k > PIECE:
        for i in range(0, k, LONG_PIECE):
            piece = slice(i, i + LONG_PIECE)
            part = (..., piece) if axis == -1 else (..., piece, slice(None))
            _on_grid(x[part], axis, out[part])
        return out
    bits = product_bits(k)
    chunk = max(1, _CACHED // (x.size // len(x)))
    shared: Float64 | None = None
    if x.ndim == 2 and axis == -2:  # otherwise whole rows or columns lie within a chunk
        tops = np.empty((-(-len(x) // chunk), x.shape[1]), np.float32)

        def find(start: int, stop: int) -> None:
            tops[start // chunk] = _top(x[start:stop], -2)

        map_chunks(find, len(x), chunk)
        shared = _magic(tops.max(0), bits)

    def put(start: int, stop: int) -> None:
        part = out[start:stop]
        big = _magic(_top(x[start:stop], axis), bits) if shared is None else shared
        np.copyto(part, x[start:stop])
        np.add(part, big, out=part)
        np.subtract(part, big, out=part)

    map_chunks(put, len(x), chunk)
    return out


def _top(x: NDArray[Any], axis: int) -> NDArray[Any]:
    """The largest magnitudes along an axis, which stays with length 1; a NaN where there is one."""
    top: NDArray[Any] = np.maximum(x.max(axis, keepdims=True), -x.min(axis, keepdims=True))
    return top


def _magic(top: NDArray[Any], bits: int) -> Float64:
    """What rounds a number to a multiple of 2^(e - bits) once it is added and then subtracted, in float64.

    2^(e - 1) <= top < 2^e. A sum of 1.5 * 2^52 units and less than 2^51 has no bits below the unit, and is
    even just where the second term is.
    """
    if not np.isfinite(top).all():
        raise NotFiniteError("an operand of an exact sum or product has a NaN or an infinity (NF4-14.1)")
    _, exponent = np.frexp(top)
    magic: Float64 = np.ldexp(1.5, exponent + (52 - bits))
    return magic
