"""The operations of a transformer layer outside its products, exact to the bit, each with its backward.

As nf4.model.ops, but every operation is rounded by itself and every sum is exact (NF4-14.1). Rows are
independent, so threads take chunks of them.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from nf4.errors import InputError
from nf4.exact.elementary import exp, log
from nf4.exact.grid import NotFiniteError, dot, total
from nf4.model.ops import IGNORED
from nf4.parallel import map_chunks

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]

_CACHED = 1 << 16  # elements of the rows that a thread takes at a time
_ONE = np.float32(1)


def add(x: Float32, y: Float32) -> None:
    """Add y to x, in place, both float32 of one shape (NF4-14.1)."""
    with np.errstate(over="ignore", invalid="ignore"):
        x += y


def swiglu(gate: Float32, up: Float32, out: Float32) -> Float32:
    """silu(gate) * up (NF4-14.7), each float32 [T, n], written into out."""

    def work(start: int, stop: int) -> None:
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            g, o = gate[start:stop], out[start:stop]
            np.multiply(g, _sigmoid(g), out=o)
            np.multiply(o, up[start:stop], out=o)

    map_chunks(work, len(gate), _chunk(gate))
    return out


def swiglu_backward(dout: Float32, gate: Float32, up: Float32) -> None:
    """The gradients of gate and up (NF4-14.7), written over gate and up, all float32 [T, n]."""

    def work(start: int, stop: int) -> None:
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            d, g, u = dout[start:stop], gate[start:stop], up[start:stop]
            sigmoid = _sigmoid(g)
            silu = g * sigmoid
            g -= silu
            g += _ONE
            g *= sigmoid
            g *= d
            g *= u
            np.multiply(d, silu, out=u)

    map_chunks(work, len(gate), _chunk(gate))


def softmax(scores: Float32) -> Float32:
    """Softmax of each row of scores float32 [..., n], n > 0, written over them (NF4-14.8).

    A score of -infinity has the probability +0. Raises InputError where a row's greatest is not finite.
    """
    rows = _rows(scores)

    def work(start: int, stop: int) -> None:
        part = rows[start:stop]
        norm, _ = _exponentials(part)
        with np.errstate(under="ignore"):
            part /= norm

    map_chunks(work, len(rows), _chunk(rows))
    return scores


def softmax_backward(dout: Float32, p: Float32) -> Float32:
    """The gradient of the scores, float32 [..., n], written over dout; p is softmax's result (NF4-14.8).

    Raises InputError where an element of either is not finite.
    """
    rows, probabilities = _rows(dout), _rows(p)

    def work(start: int, stop: int) -> None:
        part, own = rows[start:stop], probabilities[start:stop]
        with np.errstate(over="ignore", under="ignore"):
            part -= dot(own, part).astype(np.float32)[:, None]
            part *= own

    map_chunks(work, len(rows), _chunk(rows))
    return dout


def rms_norm(x: Float32, weight: Float32, eps: float, out: Float32 | None = None) -> tuple[Float32, Float32]:
    """y = x / rms(x) * weight over the last axis (NF4-14.9).

    x [T, n], n > 0, weight [n], float32 -> y [T, n] (written into out) and 1 / rms, [T, 1], which backward
    takes. Raises InputError for an eps that is not positive and finite, and where x has a NaN or an infinity.
    """
    if not 0 < eps < np.inf:
        raise InputError(f"eps of a norm is {eps}; it must be positive and finite (NF4-14.9)")
    y = np.empty_like(x) if out is None else out
    rstd = np.empty((len(x), 1), np.float32)

    def work(start: int, stop: int) -> None:
        part = x[start:stop]
        mean = dot(part, part)
        mean /= x.shape[1]
        mean += eps
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            rstd[start:stop, 0] = 1 / np.sqrt(mean)
            np.multiply(part, rstd[start:stop], out=y[start:stop])
            y[start:stop] *= weight

    map_chunks(work, len(x), _chunk(x))
    return y, rstd


def rms_scale(x: Float32, weight: Float32, rstd: Float32, out: Float32) -> Float32:
    """The output of rms_norm [T, n] once 1 / rms is known, written into out (NF4-14.9)."""

    def work(start: int, stop: int) -> None:
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            np.multiply(x[start:stop], rstd[start:stop], out=out[start:stop])
            out[start:stop] *= weight

    map_chunks(work, len(x), _chunk(x))
    return out


def rms_norm_backward(dy: Float32, x: Float32, weight: Float32, rstd: Float32) -> Float32:
    """dx of rms_norm (NF4-14.9), float32 [T, n], written over dy.

    Raises InputError where dy * weight or x has an element that is not finite.
    """

    def work(start: int, stop: int) -> None:
        part, own, r = dy[start:stop], x[start:stop], rstd[start:stop]
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            part *= weight
            mean = dot(part, own)[:, None]
            mean *= r
            mean *= r
            mean /= x.shape[1]
            part -= own * mean.astype(np.float32)
            part *= r

    map_chunks(work, len(x), _chunk(x))
    return dy


def cross_entropy(logits: Float32, targets: NDArray[np.integer[Any]], scale: float | None) -> Float32:
    """-log softmax(logits)[target] of each row, float32 [T], +0 where the target is IGNORED (NF4-14.10).

    logits float32 [T, vocabulary] are overwritten: by the gradient of scale times the losses' sum, or by
    scratch where scale is None. Raises InputError for a target that is neither IGNORED nor in the vocabulary,
    and where the greatest logit of a row with a target is not finite.
    """
    losses = np.zeros(len(logits), np.float32)
    wrong = (targets != IGNORED) & ((targets < 0) | (targets >= logits.shape[1]))
    if wrong.any():
        row = int(wrong.argmax())
        raise InputError(
            f"row {row} has the target {targets[row]}; choose one of {logits.shape[1]} tokens, or {IGNORED}"
        )

    def work(start: int, stop: int) -> None:
        part, target = logits[start:stop], targets[start:stop]
        kept = target != IGNORED
        if not kept.all():
            part[~kept] = 0  # what a row without a target holds matters to nobody
        at = np.arange(len(part)), np.where(kept, target, 0)
        picked = part[at]
        norm, top = _exponentials(part)
        with np.errstate(over="ignore", under="ignore"):
            picked -= top[:, 0]
            np.subtract(log(norm[:, 0]), picked, out=losses[start:stop], where=kept)
            if scale is not None:
                part *= np.float32(scale) / norm
                part[at] -= np.float32(scale)
                if not kept.all():
                    part[~kept] = 0

    map_chunks(work, len(logits), _chunk(logits))
    return losses


def mean_loss(losses: Float32, count: int) -> float:
    """The sum of the losses float32 [T] of a step over the number of its targets, in float64 (NF4-14.10).

    Raises InputError where there is no target, or a loss is not finite.
    """
    if count < 1:
        raise InputError("a step without a target token has no loss (NF4-10.9)")
    return float(total(losses) / count)


def rotate(x: Float32, cos: Float32, sin: Float32, inverse: bool = False) -> None:
    """Rotate x float32 [T, heads * head_dim] in place, with Hugging Face's halves (NF4-14.11).

    cos and sin float32 [T, head_dim / 2]; `inverse` takes gradients back.
    """
    half = cos.shape[1]
    pairs = x.reshape(len(x), x.shape[1] // (2 * half), 2, half, copy=False)

    def work(start: int, stop: int) -> None:
        first, second = pairs[start:stop, :, 0], pairs[start:stop, :, 1]
        c, s = cos[start:stop, None], sin[start:stop, None]
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            left, right = second * s, first * s
            first *= c
            second *= c
            if inverse:
                first += left
                second -= right
            else:
                first -= left
                second += right

    map_chunks(work, len(x), _chunk(x))


def _sigmoid(x: Float32) -> Float32:
    """RN(1 / RN(1 + exp(-x)))."""
    y = np.negative(x)
    exp(y, y)
    y += _ONE
    return np.divide(_ONE, y, out=y)


def _exponentials(rows: Float32) -> tuple[Float32, Float32]:
    """Replace rows [T, n] by exp(row - greatest); their sums in float32 and the greatest, [T, 1] each."""
    top = rows.max(-1, keepdims=True)
    if not np.isfinite(top).all():
        raise NotFiniteError("the greatest of a row of scores is not finite (NF4-14.8)")
    with np.errstate(over="ignore"):
        rows -= top
    exp(rows, rows)
    return total(rows).astype(np.float32)[:, None], top


def _rows(x: Float32) -> Float32:
    """A view of x [..., n], C-contiguous, as rows."""
    return x.reshape(x.size // x.shape[-1], x.shape[-1], copy=False)


def _chunk(x: Float32) -> int:
    return max(1, _CACHED // max(1, int(x.shape[1])))
