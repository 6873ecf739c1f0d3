"""Launches of what adapters add to a group of linear layers: narrow products, gradients, dropout."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from nf4.errors import InputError
from nf4.random import drop_threshold
from numpy.typing import NDArray

from nf4_gpu.arena import round_up
from nf4_gpu.device import Device
from nf4_gpu.matrix import Matrix
from nf4_gpu.model.ops import BFLOAT16
from nf4_gpu.model.weights import Adapter, Group

SOURCE = "model/lora.cu"
NARROWEST = 64  # columns up to which the kernels of lora.cu are used; wider ones are cuBLAS's
TILES = {4: 64, 8: 128}  # rows of a thread block of so many warps
FEATURES = 256  # of a thread block of gradients
_STAGES, _DEPTH = 4, 64  # as there
_RESIDENT, _WAVES = {4: 3, 8: 2}, 2  # thread blocks that a processor has at a time, and how often
_TOKENS, _BESIDE = 64, 2  # of gradients: tokens at a time; thread blocks that a processor has
_LEAST_TURNS, _MOST_PARTS = 2, 16  # of them: turns of a part; parts that one thread block adds up
GRADIENT = np.dtype(
    [("y", "<u8"), ("z", "<u8"), ("out", "<u8"), ("feature_stride", "<i8"), ("rank_stride", "<i8")]
    + [(name, "<i4") for name in ("y_pitch", "z_pitch", "features", "columns", "slot", "ranks")]
    + [("scale", "<f4"), ("unused", "<i4")]
)


@dataclass(frozen=True)
class Space:
    """Memory that the kernels of a stream share: sums of parts, and counters that are 0 between."""

    partial: int
    counters: int


def space_bytes(processors: int, blocks: int) -> tuple[int, int]:
    """Return the bytes of partial sums and of counters for up to so many thread blocks of a part."""
    most = processors * max(
        _BESIDE * FEATURES, *(_WAVES * _RESIDENT[warps] * tile for warps, tile in TILES.items())
    )
    return most * NARROWEST * 4, blocks * 4


def warps_for(wide: int, processors: int) -> int:
    """Return the warps of thread blocks over so many rows: more where there are many."""
    return 8 if wide >= 16 * processors else 4


def parts_for(blocks: int, stages: int, processors: int, warps: int) -> int:
    """Return the parts that the sums of so many thread blocks are made in, side by side.

    Those with which the processor that has most to do has the fewest stages; of equals the fewest parts, for
    each has a beginning and an end, and is added up.
    """
    beside = _RESIDENT[warps] * processors
    most = max(1, min(_WAVES * beside // blocks, stages // _STAGES))
    return min(range(1, most + 1), key=lambda parts: -(-blocks * parts // beside) * -(-stages // parts))


def project(
    device: Device,
    x: Matrix,
    m: Matrix,
    y: Matrix,
    space: Space,
    *,
    across: bool,
    alpha: float = 1.0,
    copy: Matrix | None = None,
) -> None:
    """y [rows, columns] = alpha x m^T for m [columns, depth], or alpha x m for m [depth, columns] if across.

    Written to `copy` as well, if given. On MAIN, which the space is of.
    """
    if y.columns > NARROWEST:
        device.multiply(x, m, y, transpose_b=not across, alpha=alpha)
        if copy is not None:
            device.copy_rows(copy, y)
        return
    pairs = -(-y.columns // 16)
    warps = warps_for(x.rows, device.processors)
    tiles = -(-x.rows // TILES[warps])
    parts = parts_for(tiles, -(-x.columns // _DEPTH), device.processors, warps)
    device.launch(
        SOURCE,
        "project",
        (tiles, parts),
        32 * warps,
        (
            x.address, x.pitch, m.address, m.pitch, x.rows, x.columns, y.columns, np.float32(alpha),
            y.address, y.pitch, *((copy.address, copy.pitch) if copy else (0, 0)),
            space.partial, space.counters,
        ),
        shared=_shared(pairs, warps),
        DTYPE=BFLOAT16,
        WARPS=warps,
        PAIRS=pairs,
        ACROSS=int(across),
    )  # fmt: skip


def gradient_jobs(
    group: Group,
    x: Matrix,
    dz: Matrix,
    dy: Matrix,
    z: Matrix,
    gradients: int,
    *,
    of_a: bool = True,
    of_b: bool = True,
) -> NDArray[np.void]:
    """Return the parts of the gradients of a group's A and B, for memory at `gradients`, float32.

    x [.., in] is the input, dz [.., narrow] s dy B, dy [.., out], z [.., narrow] x A^T. Raises InputError
    where the group's adapters differ in rank.
    """
    jobs = []
    adapters = group.adapters
    if len({adapter.rank for adapter in adapters}) > 1:  # the A of a group are one matrix
        ranks = ", ".join(f"{adapter.name} of {adapter.rank}" for adapter in adapters)
        raise InputError(
            f"adapters of one input differ in rank ({ranks}); on the GPU they train with one rank"
        )
    for first in range(0, group.inputs if of_a else 0, FEATURES):
        out = gradients + (adapters[0].a + first) * 4
        sizes = (min(FEATURES, group.inputs - first), group.narrow, group.slot, adapters[0].rank)
        jobs.append(_job(x, first, dz, 0, out, (1, group.inputs), sizes, 1.0))
    for module in group.modules:
        adapter = module.adapter
        if adapter is None or not of_b:
            continue
        for first in range(0, module.outputs, FEATURES):
            out = gradients + (adapter.b + first * adapter.rank) * 4
            sizes = (min(FEATURES, module.outputs - first), group.slot, group.slot, adapter.rank)
            y = module.row + first
            jobs.append(_job(dy, y, z, adapter.start, out, (adapter.rank, 1), sizes, adapter.scale))
    return np.array(jobs, GRADIENT)


def input_jobs(group: Group, adapter: Adapter, x: Matrix, dz: Matrix, gradients: int) -> NDArray[np.void]:
    """Return the parts of the gradient of one adapter's A, from an input of its own."""
    jobs = []
    for first in range(0, group.inputs, FEATURES):
        out = gradients + (adapter.a + first) * 4
        sizes = (min(FEATURES, group.inputs - first), group.slot, group.slot, adapter.rank)
        jobs.append(_job(x, first, dz, adapter.start, out, (1, group.inputs), sizes, 1.0))
    return np.array(jobs, GRADIENT)


def gradients(device: Device, address: int, jobs: NDArray[np.void], tokens: int, space: Space) -> None:
    """Add the gradients of jobs, which lie at an address, over so many tokens."""
    pairs = -(-int(jobs["columns"].max()) // 16)
    turns = -(-tokens // _TOKENS)
    parts = max(1, min(_BESIDE * device.processors // len(jobs), turns // _LEAST_TURNS, _MOST_PARTS))
    pitch = 16 * pairs + 8
    device.launch(
        SOURCE,
        "gradients",
        (len(jobs), parts),
        FEATURES,
        (address, tokens, space.partial, space.counters),
        shared=2 * (_TOKENS * FEATURES * 2 + _TOKENS * pitch * 2),
        DTYPE=BFLOAT16,
        WARPS=4,
        PAIRS=pairs,
        ACROSS=0,
    )


def wide_gradients(
    device: Device, group: Group, x: Matrix, dz: Matrix, dy: Matrix, z: Matrix, at: int, *, inputs: bool
) -> None:
    """The same by cuBLAS, for more columns than the kernel takes; those of A only if inputs."""
    for module in group.modules:
        adapter = module.adapter
        if adapter is None:
            continue
        columns = slice(adapter.start, adapter.start + adapter.rank)
        if inputs:
            wide_input_gradient(device, group, adapter, x, dz, at)
        b = _parameters(at + adapter.b * 4, module.outputs, adapter.rank)
        rows = dy.part(columns=slice(module.row, module.row + module.outputs))
        device.multiply(rows, z.part(columns=columns), b, transpose_a=True, alpha=adapter.scale, add=b)


def wide_input_gradient(
    device: Device, group: Group, adapter: Adapter, x: Matrix, dz: Matrix, at: int
) -> None:
    """The gradient of one adapter's A by cuBLAS."""
    columns = slice(adapter.start, adapter.start + adapter.rank)
    a = _parameters(at + adapter.a * 4, adapter.rank, group.inputs)
    device.multiply(dz.part(columns=columns), x, a, transpose_a=True, add=a)


@dataclass(frozen=True)
class Dropped:
    """What keys a batch's dropout: addresses of the sample and the place in it of each row, and the seed."""

    samples: int
    places: int
    seed: int

    def rows(self, device: Device, adapter: Adapter, x: Matrix, y: Matrix, *, add: bool = False) -> None:
        """Y = x where the adapter's mask keeps, else 0; or y += that (NF4-9.4)."""
        vectors = x.columns // 8
        block = min(256, round_up(vectors, 32))
        device.launch(
            SOURCE,
            "drop_rows",
            (x.rows, -(-vectors // block)),
            block,
            (
                x.address, x.pitch, x.columns, self.samples, self.places, np.uint32(self.seed & 0xFFFFFFFF),
                np.uint32(self.seed >> 32 & 0xFFFFFFFF), np.uint32(adapter.stream & 0xFFFFFFFF),
                np.uint32(drop_threshold(adapter.dropout)), add, y.address, y.pitch,
            ),
            DTYPE=BFLOAT16,
            WARPS=4,
            PAIRS=1,
            ACROSS=0,
        )  # fmt: skip


def keep_scale(adapter: Adapter) -> float:
    """Return 1 / (probability of being kept), which the 16-bit lanes make 65536 / (65536 - threshold)."""
    return 65536 / (65536 - drop_threshold(adapter.dropout))


def _job(
    y: Matrix,
    feature: int,
    z: Matrix,
    column: int,
    out: int,
    strides: tuple[int, int],
    sizes: Sequence[int],
    scale: float,
) -> tuple[float, ...]:
    features, columns, slot, ranks = sizes
    return (
        y.address + 2 * feature, z.address + 2 * column, out, *strides, y.pitch, z.pitch, features, columns,
        slot, ranks, scale, 0,
    )  # fmt: skip


def _parameters(address: int, rows: int, columns: int) -> Matrix:
    return Matrix(address, rows, columns, columns, np.dtype(np.float32))


def _shared(pairs: int, warps: int) -> int:
    """Bytes of dynamic shared memory of project: as in lora.cu."""
    narrow, wide = 16 * pairs, TILES[warps]
    return 2 * _STAGES * (wide * (_DEPTH + 8) + max(_DEPTH * (narrow + 8), narrow * (_DEPTH + 8)))
