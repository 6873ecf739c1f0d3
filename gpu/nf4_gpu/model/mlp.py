"""Launches of SwiGLU with what the adapters of the layers around it need, where they have the same ranks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nf4_gpu.arena import Arena, round_up
from nf4_gpu.device import Device
from nf4_gpu.matrix import Matrix
from nf4_gpu.model.ops import BFLOAT16
from nf4_gpu.model.weights import Group

SOURCE = "model/mlp.cu"
_THREADS, _TOKENS, _COLUMNS = 256, 16, 256  # of a thread block; tokens at a time: as there
_FORWARD, _BACKWARD = 3, 2  # thread blocks that a processor has at a time
_LEAST_STEPS = 4  # of a thread block


@dataclass(frozen=True)
class Sums:
    """Memory for the sums of thread blocks: float32 of tokens and, where there is a backward, of features."""

    of_tokens: int
    of_features: int


def suits(groups: Mapping[str, Group], tokens: int) -> bool:
    """Say whether gate, up and down of a layer have adapters whose ranks the kernels take.

    And whether passes of up to so many tokens have few enough elements to be counted in 32 bits.
    """
    gate_up, down = groups["gate_up"], groups["down"]
    adapted = len(gate_up.adapters) == 2 and len(down.adapters) == 1
    few = (tokens + 4 * _TOKENS) * (round_up(gate_up.buffer(0).rows, 64) + 64) < 1 << 32
    return adapted and few and {gate_up.slot, down.slot} in ({8}, {16})


def take_sums(arena: Arena, tokens: int, inner: int, slot: int, processors: int, *, training: bool) -> Sums:
    """Take the memory that passes of up to so many tokens need."""
    columns = 2 * slot if training else slot
    parts = _parts(tokens, inner, _BACKWARD, processors) if training else 0
    return Sums(
        arena.take("buffers", 4 * _blocks(inner) * tokens * columns),
        arena.take("buffers", 4 * parts * 3 * slot * inner),
    )


def swiglu_project(
    device: Device, gate_up: Matrix, act: Matrix, a: Matrix, sums: Sums, z: Matrix, copy: Matrix | None
) -> None:
    """act [tokens, inner] = silu(gate) up, side by side in gate_up; z [tokens, slot], and copy, = act a^T."""
    tokens, inner, slot = act.rows, act.columns, z.columns
    device.launch(
        SOURCE,
        "swiglu_project",
        (_blocks(inner), _parts(tokens, inner, _FORWARD, device.processors)),
        _THREADS,
        (
            gate_up.address, np.uint32(gate_up.pitch), np.int32(inner), np.int32(tokens),
            act.address, np.uint32(act.pitch),
            a.address, a.pitch, sums.of_tokens,
        ),
        shared=2 * 4 * _THREADS * 16 + _exchange(slot),
        DTYPE=BFLOAT16,
        SLOT=slot,
    )  # fmt: skip
    none, no = np.int32(0), np.float32(0)
    nothing = (0, none, np.int32(inner), none, none, no, no, 0, 0, 0)
    _add_up(device, tokens * slot // 4, inner, slot, sums, z, copy, nothing)


def swiglu_backward_project(
    device: Device,
    groups: Mapping[str, Group],
    gate_up: Matrix,
    dact: Matrix,
    b: Matrix,
    z: Matrix,
    dz_down: Matrix,
    dz: Matrix,
    sums: Sums,
    gradients: int,
) -> None:
    """The gradients of gate and up over them, from dact [tokens, inner]; dz [tokens, 2 slot] of them and b.

    b [2 inner, 2 slot] is s B of gate and up, z [tokens, 2 slot] what they had of x A^T, dz_down [tokens,
    slot] s dy B of down. The gradients of B of gate and up, and of A of down, are added to `gradients`.
    """
    tokens, inner, slot = dact.rows, dact.columns, dz_down.columns
    parts = _parts(tokens, inner, _BACKWARD, device.processors)
    device.launch(
        SOURCE,
        "swiglu_backward_project",
        (_blocks(inner), parts),
        _THREADS,
        (
            gate_up.address, gate_up.pitch, np.int32(inner), np.int32(tokens), dact.address, dact.pitch,
            b.address, b.pitch, z.address, z.pitch, dz_down.address, dz_down.pitch,
            sums.of_tokens, sums.of_features,
        ),
        shared=2 * (6 * _THREADS * 16 + _TOKENS * (56 if slot == 16 else 40) * 2) + _exchange(2 * slot),
        DTYPE=BFLOAT16,
        SLOT=slot,
    )  # fmt: skip
    gate, up = groups["gate_up"].adapters
    down = groups["down"].adapters[0]
    ranks = (np.int32(gate.rank), np.int32(down.rank))
    of_features = (
        sums.of_features, np.int32(parts), np.int32(inner), *ranks, np.float32(gate.scale),
        np.float32(up.scale), *(gradients + 4 * at for at in (gate.b, up.b, down.a)),
    )  # fmt: skip
    units = tokens * dz.columns // 4 + 3 * slot * inner // 4
    _add_up(device, units, inner, slot, sums, dz, None, of_features)


def _add_up(
    device: Device,
    units: int,
    inner: int,
    slot: int,
    sums: Sums,
    y: Matrix,
    copy: Matrix | None,
    of_features: Sequence[Any],
) -> None:
    device.launch(
        SOURCE,
        "add_up_blocks",
        (-(-units // _THREADS),),
        _THREADS,
        (
            sums.of_tokens, np.int32(_blocks(inner)), np.int32(y.rows), np.int32(y.columns),
            y.address, y.pitch, *((copy.address, copy.pitch) if copy else (0, 0)), *of_features,
        ),
        DTYPE=BFLOAT16,
        SLOT=slot,
    )  # fmt: skip


def _blocks(inner: int) -> int:
    return -(-inner // _COLUMNS)


def _parts(tokens: int, inner: int, beside: int, processors: int) -> int:
    """Parts of the tokens: as many as there is room for at a time, of some steps each."""
    steps = -(-tokens // _TOKENS)
    return max(1, min(beside * processors // _blocks(inner), steps // _LEAST_STEPS))


def _exchange(columns: int) -> int:
    """Bytes of shared memory in which the warps add up: as in mlp.cu."""
    return 2 * _THREADS // 32 * _TOKENS * (columns + 8) * 4
