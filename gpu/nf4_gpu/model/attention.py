"""Launches of attention over packed sequences, and the tiles that its thread blocks take."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nf4_gpu.device import Device
from nf4_gpu.matrix import Matrix
from nf4_gpu.model.ops import BFLOAT16
from nf4_gpu.model.rope import Heads

_LOG2E = 1.4426950408889634
_TILE = 4  # ints
_OTHER = 3072  # bytes of shared memory that the kernels take beside what they are given


@dataclass(frozen=True)
class Shape:
    """How the kernels of a head dimension are cut, and what shared memory they take.

    rows: queries of a thread block forward; back: queries or keys backward; passes: of the backward of keys
    and values, both at once or values and then keys.
    """

    source: str
    threads: int
    rows: int
    back: int
    forward_bytes: int
    queries_bytes: int
    keys_bytes: int
    passes: tuple[int, ...]
    defines: tuple[tuple[str, int], ...]

    @property
    def most_bytes(self) -> int:
        """Shared memory of the kernel that takes most."""
        return max(self.forward_bytes, self.queries_bytes, self.keys_bytes) + _OTHER

    def defined(self, only: int = 0, shared: bool = False) -> dict[str, int]:
        """What the kernels are compiled with."""
        found = dict(self.defines) | {"DTYPE": BFLOAT16, "SHARED": int(shared)}
        return found | ({"ONLY": only} if "KEYS" in found else {})


def shape_for(dim: int, capability: int, shared_memory: int) -> Shape:
    """Return the cut for heads of a dimension on a device of a compute capability, such as 90 for 9.0."""
    if capability == 90 and dim in (64, 128):
        return _by_warpgroups(dim)
    if dim <= 128:
        for shape in (
            _by_warps(dim, 128 if dim <= 64 else 64, 64, 64 if dim <= 64 else 32, (0,)),
            _by_warps(dim, 64, 32, 32, (0,)),
        ):
            if shape.most_bytes <= shared_memory:
                return shape
    return _by_warps(dim, 64, 32, 32, (1, 2))


def _by_warpgroups(dim: int) -> Shape:
    """The cut of attention90.cu: 128 rows of both sides forward, 64 of one backward."""
    tile, part = 128 * dim * 2, 64 * dim * 2
    back = 1024 + 2 * tile + 6 * part
    return Shape("model/attention90.cu", 384, 128, 128, 1024 + 5 * tile, back, back, (0,), (("DIM", dim),))


def _by_warps(dim: int, rows: int, keys: int, queries: int, passes: tuple[int, ...]) -> Shape:
    """The cut of attention.cu: so many queries a thread block forward, keys or queries at a time."""
    pitch = 2 * (-(-dim // 16) * 16 + 8)
    return Shape(
        "model/attention.cu",
        128,
        rows,
        64,
        (rows + 2 * keys) * pitch,
        (128 + 4 * keys) * pitch,
        (128 + 4 * queries) * pitch,
        passes,
        (("DIM", dim), ("ROWS", rows), ("KEYS", keys), ("QUERIES", queries)),
    )


def tiles(lengths: Sequence[int], rows: int, count: int, *, late_first: bool) -> NDArray[np.int32]:
    """Return the tiles of packed sequences, `rows` a tile, int32 [count, 4]; those too many are empty.

    Those with most to do come first, of all heads: the late queries of a sequence, or its early keys.
    """
    found, start = [], 0
    for length in lengths:
        found += [
            (start, length, first, length - first if not late_first else first + 1)
            for first in range(0, length, rows)
        ]
        start += length
    found.sort(key=lambda tile: -tile[3])
    result = np.zeros((count, _TILE), np.int32)
    result[: len(found)] = found
    return result


def attend(
    device: Device,
    shape: Shape,
    heads: Heads,
    q: Matrix,
    k: Matrix,
    v: Matrix,
    where: tuple[int, int],
    out: Matrix,
    lse: int,
) -> None:
    """out [tokens, queries dim] and lse, float32 [queries, tokens]; where: the address and count of tiles."""
    address, count = where
    device.launch(
        shape.source,
        "attend",
        (heads.queries, count),
        shape.threads,
        (
            q.address, q.pitch, k.address, k.pitch, v.address, v.pitch, address, heads.group, heads.window,
            _scale(heads), out.address, out.pitch, lse, q.rows,
        ),
        shared=shape.forward_bytes,
        **shape.defined(),
    )  # fmt: skip


def attend_backward(
    device: Device,
    shape: Shape,
    heads: Heads,
    q: Matrix,
    k: Matrix,
    v: Matrix,
    out: Matrix,
    dout: Matrix,
    lse: int,
    delta: int,
    by_query: tuple[int, int],
    by_key: tuple[int, int],
    d: Matrix,
    shares: tuple[int, int] | None,
) -> None:
    """The gradients of queries, keys and values, into d; delta: memory for float32 [queries, tokens].

    With shares, the addresses of float32 [queries, tokens, dim], each query head leaves there what it has
    of the gradients of keys and of values.
    """
    dq, dk, dv = split(d, heads)
    address, count = by_query
    inputs = (q.address, q.pitch, k.address, k.pitch, v.address, v.pitch)
    device.launch(
        shape.source,
        "attend_backward_queries",
        (heads.queries, count),
        shape.threads,
        (
            *inputs, out.address, out.pitch, dout.address, dout.pitch, lse, address, heads.group,
            heads.window, _scale(heads), dq.address, dq.pitch, delta, q.rows,
        ),
        shared=shape.queries_bytes,
        **shape.defined(),
    )  # fmt: skip
    address, count = by_key
    for only in shape.passes:
        device.launch(
            shape.source,
            "attend_backward_keys",
            (heads.keys if shares is None else heads.queries, count),
            shape.threads,
            (
                *inputs, dout.address, dout.pitch, lse, delta, address, heads.group, heads.window,
                _scale(heads), dk.address, dv.address, d.pitch, *(shares or (0, 0)), q.rows,
            ),
            shared=shape.keys_bytes,
            **shape.defined(only, shares is not None),
        )  # fmt: skip


def split(qkv: Matrix, heads: Heads) -> tuple[Matrix, Matrix, Matrix]:
    """Return the columns of queries, keys and values."""
    first, second = heads.queries * heads.dim, (heads.queries + heads.keys) * heads.dim
    last = second + heads.keys * heads.dim
    return (
        qkv.part(columns=slice(0, first)),
        qkv.part(columns=slice(first, second)),
        qkv.part(columns=slice(second, last)),
    )


def _scale(heads: Heads) -> np.float32:
    return np.float32(_LOG2E / math.sqrt(heads.dim))
