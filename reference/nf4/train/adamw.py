"""AdamW with decoupled weight decay, and clipping by the global gradient norm."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from nf4 import parallel
from nf4.errors import InputError
from nf4.exact.grid import NotFiniteError, dot, total

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_CHUNK = (
    1 << 16
)  # elements: parameter, gradient, two states and two temporaries of a chunk stay in the L2 cache


@dataclass(frozen=True)
class Scalars:
    """The factors of one update, worked out in float64 and rounded once (NF4-10.3)."""

    rest1: np.float32  # 1 - beta1
    beta2: np.float32
    rest2: np.float32  # 1 - beta2
    root: np.float32
    eps: np.float32
    step: np.float32
    decay: np.float32  # of arrays of two or more dimensions


class AdamW:
    """AdamW over named arrays, which it updates in place. NF4-10.1, NF4-10.2

    params are float32 or bfloat16, C-contiguous; the states m and v are float32 in every case. Weight decay
    acts on arrays of two or more dimensions, never on norms and biases. Raises ValueError for another
    dtype or layout, and InputError for constants out of their range.
    """

    def __init__(
        self,
        params: Mapping[str, NDArray[Any]],
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        for name, p in params.items():
            if p.dtype not in (np.dtype(np.float32), _BFLOAT16) or not p.flags.c_contiguous:
                raise ValueError(f"{name}: AdamW takes C-contiguous float32 or bfloat16, not {p.dtype}")
        if not all(0 <= beta < 1 for beta in betas):
            raise InputError(f"AdamW's betas are {betas}; each must be at least 0 and below 1")
        for what, value in (("eps", eps), ("weight decay", weight_decay)):
            if not 0 <= value < math.inf:
                raise InputError(f"AdamW's {what} is {value}; it must be finite and at least 0")
        self.params = dict(params)
        self.betas, self.eps, self.weight_decay = betas, eps, weight_decay
        self.m = {name: np.zeros(p.shape, np.float32) for name, p in self.params.items()}
        self.v = {name: np.zeros(p.shape, np.float32) for name, p in self.params.items()}
        self.steps = 0
        self._powers = (1.0, 1.0)  # beta1^steps, beta2^steps

    def restore(self, steps: int, m: Mapping[str, NDArray[Any]], v: Mapping[str, NDArray[Any]]) -> None:
        """Take over the states after a number of steps; the powers of the betas are formed anew. NF4-10.3"""
        for name in self.params:
            np.copyto(self.m[name], m[name])
            np.copyto(self.v[name], v[name])
        power1 = power2 = 1.0
        for _ in range(steps):
            power1, power2 = power1 * self.betas[0], power2 * self.betas[1]
        self.steps, self._powers = steps, (power1, power2)

    def step(self, grads: Mapping[str, NDArray[Any]], lr: float) -> None:
        """Update every parameter once with the gradients of the same names and shapes. NF4-10.4, NF4-10.5

        Raises InputError unless lr is finite and at least 0 (NF4-10.2).
        """
        scalars = self.advance(lr)
        for name, p in self.params.items():
            self._update(p, grads[name], self.m[name], self.v[name], scalars)

    def advance(self, lr: float) -> "Scalars":
        """Count an update with the rate lr; return what it multiplies by. NF4-10.3

        Raises InputError unless lr is finite and at least 0 (NF4-10.2).
        """
        if not 0 <= lr < math.inf:
            raise InputError(f"the learning rate is {lr}; it must be finite and at least 0")
        beta1, beta2 = self.betas
        self.steps += 1
        self._powers = (self._powers[0] * beta1, self._powers[1] * beta2)
        return Scalars(
            rest1=np.float32(1.0 - beta1),
            beta2=np.float32(beta2),
            rest2=np.float32(1.0 - beta2),
            root=np.float32(math.sqrt(1.0 - self._powers[1])),
            eps=np.float32(self.eps),
            step=np.float32(lr / (1.0 - self._powers[0])),
            decay=np.float32(1.0 - lr * self.weight_decay),
        )

    def _update(
        self,
        p: NDArray[Any],
        g: NDArray[Any],
        m: NDArray[np.float32],
        v: NDArray[np.float32],
        scalars: "Scalars",
    ) -> None:
        decay = scalars.decay if p.ndim >= 2 else np.float32(1.0)
        flat_p, flat_m, flat_v = p.reshape(-1), m.reshape(-1), v.reshape(-1)  # views: all are C-contiguous
        flat_g = np.ascontiguousarray(g).reshape(-1)

        def work(start: int, stop: int) -> None:
            part = slice(start, stop)
            g32 = flat_g[part].astype(np.float32, copy=False)
            m_, v_ = flat_m[part], flat_v[part]
            p32 = flat_p[part].astype(np.float32, copy=False)  # the parameter itself if it is float32
            t = np.subtract(g32, m_)
            t *= scalars.rest1
            m_ += t  # m + (1 - beta1)·(g - m)
            np.multiply(g32, g32, out=t)
            t *= scalars.rest2
            v_ *= scalars.beta2
            v_ += t  # beta2·v + (1 - beta2)·(g·g)
            np.sqrt(v_, out=t)
            t /= scalars.root
            t += scalars.eps
            np.divide(m_, t, out=t)
            t *= scalars.step
            p32 *= decay
            p32 -= t
            if flat_p.dtype == _BFLOAT16:
                flat_p[part] = p32.astype(_BFLOAT16)

        parallel.map_chunks(work, flat_p.size, _CHUNK)


def gradient_norm(grads: Mapping[str, NDArray[Any]]) -> float:
    """Return the 2-norm of all gradients together, not finite where one of them isn't. NF4-10.7, NF4-15.7"""
    flats = [grads[name].reshape(-1) for name in sorted(grads)]
    try:
        squares = [float(dot(flat, flat)) for flat in flats]
        return math.sqrt(float(total(np.array(squares))))
    except NotFiniteError:
        return math.nan if any(np.isnan(flat).any() for flat in flats) else math.inf


def clip_grad_norm(grads: Mapping[str, NDArray[Any]], max_norm: float) -> float:
    """Scale the gradients in place so that their norm is at most max_norm; return the norm before. NF4-10.7

    A norm that is not finite leaves the gradients as they are. Raises InputError for a max_norm below 0.
    """
    norm = gradient_norm(grads)
    factor = clip_factor(norm, max_norm)
    if factor < 1.0:
        for g in grads.values():
            np.multiply(g, g.dtype.type(factor), out=g)
    return norm


def clip_factor(norm: float, max_norm: float) -> float:
    """Return what gradients of a norm are multiplied by: 1, or max_norm/(norm + 1e-6) below it. NF4-10.7

    A max_norm of 0 clips nothing, nor is anything clipped where the norm is not finite. Raises InputError
    unless max_norm is at least 0.
    """
    if not max_norm >= 0:
        raise InputError(f"max_norm is {max_norm}; it must be at least 0")
    if max_norm == 0 or not math.isfinite(norm):
        return 1.0
    return min(1.0, max_norm / (norm + 1e-6))
