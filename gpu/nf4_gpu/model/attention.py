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

SOURCE = "model/attention.cu"
BACKWARD_ROWS = 64  # queries or keys of a thread block backward
_LOG2E = 1.4426950408889634
_TILE = 4  # ints


@dataclass(frozen=True)
class Shape:
    """How the kernels of a head dimension are cut, and what shared memory they take."""

    dim: int
    rows: int  # queries of a thread block forward
    keys: int
    queries: int
    passes: tuple[int, ...]  # of the backward of keys and values: both at once, or values and then keys

    @property
    def pitch(self) -> int:
        """Bytes of a row in shared memory."""
        return 2 * (-(-self.dim // 16) * 16 + 8)

    @property
    def forward_bytes(self) -> int:
        """Shared memory forward."""
        return (self.rows + 2 * self.keys) * self.pitch

    @property
    def backward_bytes(self) -> int:
        """Shared memory backward, of the kernel that takes more."""
        return (2 * BACKWARD_ROWS + 4 * max(self.keys, self.queries)) * self.pitch

    def defines(self, only: int = 0, shared: bool = False) -> dict[str, int]:
        """What the kernels are compiled with."""
        return {
            "DTYPE": BFLOAT16, "DIM": self.dim, "ROWS": self.rows, "KEYS": self.keys, "QUERIES": self.queries,
            "ONLY": only, "SHARED": int(shared),
        }  # fmt: skip


def shape_for(dim: int, shared_memory: int) -> Shape:
    """Return the cut for heads of a dimension on a device with so much shared memory."""
    for shape in (
        Shape(dim, 128 if dim <= 64 else 64, 64, 64 if dim <= 64 else 32, (0,)),
        Shape(dim, 64, 32, 32, (0,)),
    ):
        if dim <= 128 and max(shape.forward_bytes, shape.backward_bytes) + 2048 <= shared_memory:
            return shape
    return Shape(dim, 64, 32, 32, (1, 2))


def tiles(lengths: Sequence[int], rows: int, count: int, *, late_first: bool) -> NDArray[np.int32]:
    """Return the tiles of packed sequences, `rows` a tile, int32 [count, 4]; those too many are empty.

    Those with most to do come first: the late queries of a sequence, or its early keys.
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
        SOURCE,
        "attend",
        (count, heads.queries),
        128,
        (
            q.address, q.pitch, k.address, k.pitch, v.address, v.pitch, address, heads.group, heads.window,
            _scale(heads), out.address, out.pitch, lse, q.rows,
        ),
        shared=shape.forward_bytes,
        **shape.defines(),
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
    """The gradients of queries, keys and values side by side in d; delta: memory for float32 [queries, tokens].

    With shares, the addresses of float32 [queries, tokens, dim], each query head leaves there what it has of the
    gradients of keys and of values.
    """
    dq, dk, dv = split(d, heads)
    address, count = by_query
    inputs = (q.address, q.pitch, k.address, k.pitch, v.address, v.pitch)
    device.launch(
        SOURCE,
        "attend_backward_queries",
        (count, heads.queries),
        128,
        (
            *inputs, out.address, out.pitch, dout.address, dout.pitch, lse, address, heads.group, heads.window,
            _scale(heads), dq.address, dq.pitch, delta, q.rows,
        ),
        shared=(2 * BACKWARD_ROWS + 4 * shape.keys) * shape.pitch,
        **shape.defines(),
    )  # fmt: skip
    address, count = by_key
    for only in shape.passes:
        device.launch(
            SOURCE,
            "attend_backward_keys",
            (count, heads.keys if shares is None else heads.queries),
            128,
            (
                *inputs, dout.address, dout.pitch, lse, delta, address, heads.group, heads.window,
                _scale(heads), dk.address, dv.address, d.pitch, *(shares or (0, 0)), q.rows,
            ),
            shared=(2 * BACKWARD_ROWS + 4 * shape.queries) * shape.pitch,
            **shape.defines(only, shares is not None),
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
