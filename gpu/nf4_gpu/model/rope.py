"""Rotary positions on the device: tables of angles made on the host, and their launches."""

from dataclasses import dataclass

import numpy as np
from nf4.model.config import LlamaConfig
from nf4.model.rope import inverse_frequencies
from numpy.typing import NDArray

from nf4_gpu.device import Device
from nf4_gpu.matrix import Matrix
from nf4_gpu.model.ops import BFLOAT16, Norm

SOURCE = "model/rope.cu"


class Angles:
    """Cosines and sines of every position that a run can meet, float32 [rows, head_dim / 2].

    Where the frequencies depend on a sequence's length ("dynamic", "longrope"), each kind of sequence has
    rows of its own.
    """

    def __init__(self, config: LlamaConfig, positions: int) -> None:
        self._config, self._positions = config, positions
        short = config.rope.original_max_position_embeddings
        self._split = short if config.rope.type == "longrope" and short < positions else positions
        lengths = [self._split] if self._split == positions else [self._split, positions]
        cosines, sines = [], []
        for length in lengths:
            frequencies, factor = inverse_frequencies(config, length)
            angle = np.arange(positions)[:, None] * frequencies
            cosines.append((np.cos(angle) * factor).astype(np.float32))
            sines.append((np.sin(angle) * factor).astype(np.float32))
        self.cosines, self.sines = np.concatenate(cosines), np.concatenate(sines)

    @staticmethod
    def rows(config: LlamaConfig, positions: int) -> int:
        """Return the rows that the tables will have."""
        short = config.rope.original_max_position_embeddings
        return positions * (2 if config.rope.type == "longrope" and short < positions else 1)

    def places(self, first: int, last: int) -> NDArray[np.int32]:
        """Return the rows of the positions [first, last) of a sequence that is `last` long."""
        shift = self._positions if last > self._split else 0
        return np.arange(first + shift, last + shift, dtype=np.int32)


@dataclass(frozen=True)
class Heads:
    """What rotation and attention know of a layer. cosines, sines: addresses; norms of heads, if any."""

    queries: int
    keys: int
    dim: int
    cosines: int
    sines: int
    query_norm: Norm | None
    key_norm: Norm | None
    window: int

    @property
    def group(self) -> int:
        """Query heads of a key head."""
        return self.queries // self.keys


def lanes(dim: int) -> int:
    """Return the threads that a head gets, as in rope.cu."""
    half = dim // 2
    parts = half // (4 if half % 8 else 8)
    found = 1
    while found < parts:
        found *= 2
    return found


def rotate(device: Device, heads: Heads, x: Matrix, y: Matrix, positions: int) -> None:
    """y = the rotated query and key heads that x begins with, after their norms; y may be x."""
    units = x.rows * (heads.queries + heads.keys) * lanes(heads.dim)
    weights, eps = _norms(heads)
    device.launch(
        SOURCE,
        "rotate",
        (-(-units // 256),),
        256,
        (
            x.address, x.pitch, y.address, y.pitch, positions, heads.cosines, heads.sines, x.rows,
            heads.queries, heads.keys, *weights, eps,
        ),
        DTYPE=BFLOAT16,
        DIM=heads.dim,
        QK_NORM=int(heads.query_norm is not None),
    )  # fmt: skip


def rotate_backward(
    device: Device, heads: Heads, d: Matrix, positions: int, raw: Matrix, shares: tuple[int, int] | None
) -> None:
    """The gradients of queries and keys (and values) in d, back through rotation and norms, in place.

    raw: queries and keys as the products gave them. shares: addresses of the gradients of keys and values
    that each query head left, float32 [queries, tokens, dim], which are added up into d.
    """
    count = heads.queries + heads.keys * (1 if shares is None else 2)
    units = d.rows * count * lanes(heads.dim)
    weights, eps = _norms(heads)
    device.launch(
        SOURCE,
        "rotate_backward",
        (-(-units // 256),),
        256,
        (
            d.address, d.pitch, positions, heads.cosines, heads.sines, d.rows, heads.queries, heads.keys,
            raw.address, raw.pitch, *weights, eps, *(shares or (0, 0)),
        ),
        DTYPE=BFLOAT16,
        DIM=heads.dim,
        QK_NORM=int(heads.query_norm is not None),
        **({} if shares is None else {"SHARES": heads.group}),
    )  # fmt: skip


def _norms(heads: Heads) -> tuple[tuple[int, int], np.float32]:
    if heads.query_norm is None or heads.key_norm is None:
        return (0, 0), np.float32(0)
    return (heads.query_norm.weight, heads.key_norm.weight), np.float32(heads.query_norm.eps)
