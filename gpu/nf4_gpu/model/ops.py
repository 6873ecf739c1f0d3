"""Launches of the operations outside attention and products: norms, SwiGLU, embedding, cross-entropy."""

from dataclasses import dataclass

import numpy as np

from nf4_gpu.device import Device
from nf4_gpu.matrix import Matrix

NORM, NORM_PROJECT, OPS = "model/norm.cu", "model/norm_project.cu", "model/ops.cu"
BFLOAT16 = 2  # DTYPE of the kernels
_OTHER = 1024  # bytes of shared memory that a kernel may take beside what it is given
_NORM_WARPS, _WIDEST = 8, 2048  # of norm_project.cu forward; rows for which it is used
_FORWARD, _BACKWARD = (2, 16), (3, 8)  # there: vectors that a thread holds of a part; rows at a time


@dataclass(frozen=True)
class Norm:
    """A norm's weight, the address of float32 [width], and its epsilon."""

    weight: int
    eps: float


def norm_lanes(width: int) -> int:
    """Return the threads that a row gets: each holds at most four vectors of eight."""
    lanes = 32
    while lanes < 512 and width > 32 * lanes:
        lanes *= 2
    return lanes


def rms_norm(device: Device, x: Matrix, norm: Norm, y: Matrix, rstd: int = 0, index: int = 0) -> None:
    """y [rows, width] from x; rstd: the address of float32 [rows]; index: int32 [rows], rows of x or -1."""
    lanes = norm_lanes(y.columns)
    rows = max(1, 128 // lanes)
    device.launch(
        NORM,
        "rms_norm",
        (-(-y.rows // rows),),
        lanes * rows,
        (
            x.address, x.pitch, index, norm.weight, np.float32(norm.eps), y.rows, y.address, y.pitch, rstd,
        ),
        DTYPE=BFLOAT16,
        WIDTH=y.columns,
        LANES=lanes,
    )  # fmt: skip


def rms_norm_backward(
    device: Device,
    dn: Matrix,
    x: Matrix,
    norm: Norm,
    rstd: int,
    dx: Matrix,
    dy: Matrix | None = None,
    normed: Matrix | None = None,
    index: int = 0,
) -> None:
    """dx = dy + the gradient of x from dn [rows, width]; rms_norm's y again into normed. normed may be dn."""
    lanes = norm_lanes(dn.columns)
    rows = max(1, 128 // lanes)
    device.launch(
        NORM,
        "rms_norm_backward",
        (-(-dn.rows // rows),),
        lanes * rows,
        (
            dn.address, dn.pitch, x.address, x.pitch, index, norm.weight, rstd, dn.rows,
            *((dy.address, dy.pitch) if dy else (0, 0)), dx.address, dx.pitch,
            *((normed.address, normed.pitch) if normed else (0, 0)),
        ),
        DTYPE=BFLOAT16,
        WIDTH=dn.columns,
        LANES=lanes,
    )  # fmt: skip


def norm_defines(width: int, narrow: int) -> dict[str, int]:
    """Return what norms with a narrow product are compiled with."""
    parts = _norm_parts(width, _back_warps(narrow))
    return {"DTYPE": BFLOAT16, "NARROW": narrow, "PARTS": parts}


def norm_projects(width: int, narrow: int, shared_memory: int) -> bool:
    """Say whether a norm with a narrow product is quicker than both alone, and fits a device."""
    least = max(_norm_bytes(width, narrow, _NORM_WARPS, *_FORWARD), _back_bytes(width, narrow, 1))
    return width <= _WIDEST and least + _OTHER <= shared_memory


def rms_norm_project(
    device: Device, x: Matrix, norm: Norm, y: Matrix, rstd: int, a: Matrix, z: Matrix, copy: Matrix | None
) -> None:
    """As rms_norm; and z [rows, narrow], and copy if given, = y a^T for a [narrow, width]."""
    device.launch(
        NORM_PROJECT,
        "rms_norm_project",
        (-(-y.rows // _FORWARD[1]),),
        32 * _NORM_WARPS,
        (
            x.address, x.pitch, norm.weight, np.float32(norm.eps), np.int32(y.columns),
            np.int32(_norm_parts(y.columns, _NORM_WARPS)), y.rows, y.address, y.pitch, rstd,
            a.address, a.pitch, z.address, z.pitch, *((copy.address, copy.pitch) if copy else (0, 0)),
        ),
        shared=_norm_bytes(y.columns, z.columns, _NORM_WARPS, *_FORWARD),
        **norm_defines(y.columns, z.columns),
    )  # fmt: skip


def rms_norm_backward_project(
    device: Device,
    dn: Matrix,
    x: Matrix,
    norm: Norm,
    rstd: int,
    dx: Matrix,
    dy: Matrix,
    normed: Matrix,
    b: Matrix,
    z: Matrix,
) -> None:
    """As rms_norm_backward without an index; and z [rows, narrow] = dx b for b [width, narrow]."""
    width = dn.columns
    stages = next(n for n in (2, 1) if _back_bytes(width, z.columns, n) <= device.shared_memory - _OTHER)
    tiles = -(-dn.rows // _BACKWARD[1])
    device.launch(
        NORM_PROJECT,
        "rms_norm_backward_project",
        (min(tiles, device.processors),),
        32 * _back_warps(z.columns),
        (
            dn.address, dn.pitch, x.address, x.pitch, norm.weight, rstd, np.int32(width),
            np.int32(stages), np.int32(dn.rows), dy.address, dy.pitch,
            dx.address, dx.pitch, normed.address, normed.pitch, b.address, b.pitch, z.address, z.pitch,
        ),
        shared=_back_bytes(width, z.columns, stages),
        **norm_defines(width, z.columns),
    )  # fmt: skip


def _back_warps(narrow: int) -> int:
    """Warps of a thread block of rms_norm_backward_project: as in norm_project.cu."""
    return 16 if narrow > 16 else 32


def _norm_parts(width: int, warps: int) -> int:
    """Parts of 32 columns that a warp has."""
    return -(-width // (32 * warps))


def _norm_bytes(width: int, narrow: int, warps: int, vectors: int, rows: int) -> int:
    return vectors * _norm_parts(width, warps) * 32 * warps * 16 + warps * rows * (narrow + 8) * 4


def _back_bytes(width: int, narrow: int, stages: int) -> int:
    return _norm_bytes(width, narrow, _back_warps(narrow), stages * _BACKWARD[0], _BACKWARD[1])


def swiglu(device: Device, gate_up: Matrix, act: Matrix) -> None:
    """act [rows, inner] = silu(gate) up, side by side in gate_up [rows, 2 inner]."""
    grid, block = _over_row(act)
    device.launch(
        OPS,
        "swiglu",
        grid,
        block,
        (gate_up.address, gate_up.pitch, act.columns, act.address, act.pitch),
        DTYPE=BFLOAT16,
    )


def swiglu_backward(device: Device, gate_up: Matrix, dact: Matrix) -> None:
    """The gradients of gate and up over them, and act over dact [rows, inner]."""
    grid, block = _over_row(dact)
    device.launch(
        OPS,
        "swiglu_backward",
        grid,
        block,
        (gate_up.address, gate_up.pitch, dact.columns, dact.address, dact.pitch),
        DTYPE=BFLOAT16,
    )


def embed(device: Device, table: Matrix, ids: int, x: Matrix) -> None:
    """x [rows, width] = the rows ids, int32 [rows], of a table, which may be the host's pinned memory."""
    block = min(256, -(-x.columns // 256) * 32)
    arguments = (table.address, table.pitch, ids, x.columns, x.address, x.pitch)
    device.launch(OPS, "embed", (x.rows,), block, arguments, DTYPE=BFLOAT16)


def cross_entropy(
    device: Device, logits: Matrix, vocabulary: int, targets: int, scale: int, losses: int
) -> None:
    """losses float32 [rows] of logits [rows, padded] for targets, int32 [rows], -1 for none.

    scale: the address of a float32; the gradient of it times the losses is then written over the logits.
    """
    kept = min(logits.columns // 8, (device.shared_memory - _OTHER) // 16)
    device.launch(
        OPS,
        "cross_entropy",
        (logits.rows,),
        1024,
        (
            logits.address, logits.pitch, np.int32(vocabulary), np.int32(logits.columns), np.int32(kept),
            targets, scale, losses,
        ),
        shared=16 * kept,
        DTYPE=BFLOAT16,
    )  # fmt: skip


def add_up(device: Device, x: int, n: int, total: int) -> None:
    """total (float64) += the sum of x, float32 [n]."""
    device.launch(OPS, "add_up", (1,), 256, (x, n, total), DTYPE=BFLOAT16)


def _over_row(x: Matrix) -> tuple[tuple[int, int], int]:
    """Thread blocks of one row each, and their threads, for a vector of eight a thread."""
    vectors = x.columns // 8
    block = min(256, -(-vectors // 32) * 32)
    return (x.rows, -(-vectors // block)), block
