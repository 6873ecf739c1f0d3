"""Launches of the operations outside attention and products: norms, SwiGLU, embedding, cross-entropy."""

from dataclasses import dataclass

import numpy as np

from nf4_gpu.device import Device
from nf4_gpu.matrix import Matrix

NORM, OPS = "model/norm.cu", "model/ops.cu"
BFLOAT16 = 2  # DTYPE of the kernels


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
    arguments = (logits.address, logits.pitch, vocabulary, logits.columns, targets, scale, losses)
    device.launch(OPS, "cross_entropy", (logits.rows,), 512, arguments, DTYPE=BFLOAT16)


def add_up(device: Device, x: int, n: int, total: int) -> None:
    """total (float64) += the sum of x, float32 [n]."""
    device.launch(OPS, "add_up", (1,), 256, (x, n, total), DTYPE=BFLOAT16)


def _over_row(x: Matrix) -> tuple[tuple[int, int], int]:
    """Thread blocks of one row each, and their threads, for a vector of eight a thread."""
    vectors = x.columns // 8
    block = min(256, -(-vectors // 32) * 32)
    return (x.rows, -(-vectors // block)), block
