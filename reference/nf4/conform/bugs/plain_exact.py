"""A correct port of chapter 14 in plain NumPy, a method a step, so that a subclass can do one wrong."""

import math
from typing import Any

import numpy as np

from nf4.conform.bugs.plain_codec import Array, Outputs
from nf4.conform.bugs.plain_training import IGNORED, PlainTraining
from nf4.errors import InputError

PIECE, LONG_PIECE = 4096, 512
EXP = (
    *("0x1.62e42ff0e191bp-1", "0x1.ebfbe07786d64p-3", "0x1.c6b08ac069726p-5", "0x1.3b29f39d8a1c5p-7"),
    *("0x1.5d8a86032650bp-10", "0x1.445c83de9f053p-13", "0x1.fde5f7c280a5dp-17"),
)
LOG = ("0x1.555554fda11eep-1", "0x1.999a7a84d63d3p-2", "0x1.2438d8d9ccdfep-2", "0x1.e2f639984fc29p-3")
ONE = np.float32(1)


class PlainExact(PlainTraining):
    """The operations of chapter 14 (NF4-13.3), each from steps that carry out one sentence of it."""

    # Steps: grids, products, sums

    def product_bits(self, k: int) -> int:
        """q (NF4-14.2)."""
        return min(24, (53 - math.ceil(math.log2(max(k, 1)))) // 2)

    def exponents(self, top: Array) -> Array:
        """e of largest magnitudes (NF4-14.2, NF4-14.4); that of 0 does not matter."""
        exponents: Array = np.frexp(top)[1]
        return exponents

    def tops(self, rows: Array) -> Array:
        """The largest magnitude of each row of an operand of a product, [M, 1] (NF4-14.2)."""
        top: Array = np.abs(rows).max(1, keepdims=True, initial=0)
        return top

    def nearest(self, units: Array) -> Array:
        """The nearest integers, ties to even (NF4-14.2, NF4-14.4)."""
        return np.rint(units)

    def on_grid(self, x: Array, top: Array, bits: int) -> Array:
        """x in float64 as multiples of 2^(e - bits) (NF4-14.2, NF4-14.4)."""
        shift = bits - self.exponents(top)
        near: Array = np.ldexp(self.nearest(np.ldexp(x.astype(np.float64), shift)), -shift)
        return near

    def product_pieces(self, k: int) -> list[slice]:
        """Where the terms of a product are cut (NF4-14.2)."""
        step = self.product_piece(k)
        return [slice(i, i + step) for i in range(0, max(k, 1), step)]

    def product_piece(self, k: int) -> int:
        """The terms of a piece of a product of k (NF4-14.2)."""
        return LONG_PIECE if k > PIECE else max(k, 1)

    def gridded(self, rows: Array) -> Array:
        """The rows of a piece of an operand on their grids (NF4-14.2)."""
        self.check_finite("operand", rows.reshape(-1))
        return self.on_grid(rows, self.tops(rows), self.product_bits(rows.shape[1]))

    def product_sums(self, left: Array, right: Array) -> Array:
        """S of a piece (NF4-14.3), of left [M, K] and right [N, K]."""
        return left @ right.T

    def pieces_added(self, sums: Array) -> Array:
        """S of several pieces, of their sums [n, pieces] (NF4-14.3)."""
        return self.summed(sums)

    def times(self, a: Array, b: Array) -> Array:
        """The product of a [M, K] and b [K, N] (NF4-14.3)."""
        sums = [
            self.product_sums(self.gridded(a[:, piece]), self.gridded(b[piece].T))
            for piece in self.product_pieces(a.shape[1])
        ]
        total = sums[0]
        if len(sums) > 1:
            total = self.pieces_added(np.stack(sums, axis=-1).reshape(-1, len(sums))).reshape(total.shape)
        return self.plus_zero(self.single(total))

    def plus_zero(self, y: Array) -> Array:
        """A zero becomes +0 (NF4-14.3)."""
        return y + np.float32(0)

    def single(self, x: Array) -> Array:
        """float64 rounded to float32 (NF4-14.3)."""
        return self.kept(x.astype(np.float32))

    def pieces(self, terms: Array) -> list[Array]:
        """The terms [T, n] in pieces (NF4-14.4)."""
        return [terms[:, i : i + PIECE] for i in range(0, terms.shape[1], PIECE)]

    def terms(self, x: Array, y: Array) -> Array:
        """The products whose sum is taken, in float64 (NF4-14.4)."""
        return x.astype(np.float64) * y

    def piece_sum(self, terms: Array) -> Array:
        """The sum of a piece [T, n] (NF4-14.4)."""
        bits = self.sum_bits(terms.shape[1])
        sums: Array = self.on_grid(terms, np.abs(terms).max(1, keepdims=True), bits).sum(1)
        return sums + 0.0

    def sum_bits(self, n: int) -> int:
        """The bits of a term of a piece of n (NF4-14.4)."""
        return 41

    def summed(self, terms: Array) -> Array:
        """The sums of rows [T, n] in float64 (NF4-14.4)."""
        self.check_finite("term", terms.reshape(-1))
        if not terms.shape[1]:
            return np.zeros(len(terms))
        sums = np.stack([self.piece_sum(piece) for piece in self.pieces(terms)], axis=1)
        return self.summed(sums) if sums.shape[1] > 1 else sums[:, 0]

    # Steps: functions

    def exponential(self, x: Array) -> Array:
        """e^x (NF4-14.5)."""
        t = np.clip(x, np.float32(-104), np.float32(89)).astype(np.float64) * float.fromhex(
            "0x1.71547652b82fep+0"
        )
        k = np.rint(t)
        f = t - k
        p = np.zeros_like(f)
        for c in reversed(EXP):
            p = (p + float.fromhex(c)) * f
        return self.single(np.ldexp(p + 1.0, np.where(np.isnan(k), 0, k).astype(np.int64)))

    def logarithm(self, x: Array) -> Array:
        """ln x (NF4-14.6)."""
        m, k = np.frexp(np.where((x > 0) & (x < np.inf), x, ONE).astype(np.float64))
        low = m < math.sqrt(0.5)
        m, k = np.where(low, 2 * m, m), k - low
        f = m - 1.0
        s = f / (m + 1.0)
        z = s * s
        p = np.zeros_like(z)
        for c in reversed(LOG):
            p = (p + float.fromhex(c)) * z
        y = self.single((p + 2.0) * s + k * float.fromhex("0x1.62e42fefa39efp-1"))
        return np.select([x == 0, x == np.inf, ~(x > 0)], [-np.inf, np.inf, np.nan], y).astype(np.float32)

    # Steps: what is made of them

    def sigmoid(self, g: Array) -> Array:
        """w (NF4-14.7)."""
        return self.kept(ONE / (ONE + self.exponential(-g)))

    def activated(self, g: Array) -> Array:
        """a (NF4-14.7)."""
        return self.kept(g * self.sigmoid(g))

    def row_terms(self, rows: Array) -> tuple[Array, Array, Array]:
        """E [T, n], N and the greatest [T, 1] of rows (NF4-14.8)."""
        top = rows.max(1, keepdims=True, initial=-np.inf)
        self.check_finite("greatest", top.reshape(-1))
        powers = self.exponential(self.kept(self.shifted(rows)))
        return powers, self.single(self.summed(powers.astype(np.float64)))[:, None], top

    def probabilities(self, powers: Array, norm: Array) -> Array:
        """p (NF4-14.8)."""
        return self.kept(powers / norm)

    def reciprocal_rms(self, squares: Array, n: int, eps: float) -> Array:
        """r of the sums of squares [T] (NF4-14.9)."""
        return self.single(1.0 / np.sqrt(squares / n + eps))

    def logit_gradient(self, powers: Array, norm: Array, hit: Array, scale: Array) -> Array:
        """The gradient of logits [T, V]; hit: 1 at the target (NF4-14.10)."""
        return self.kept(self.kept(powers * self.kept(scale / norm)) - hit * scale)

    def head_halves(self, x: Array) -> tuple[Array, Array]:
        """The halves of heads [T, heads, 2 h] (NF4-14.11)."""
        h = x.shape[2] // 2
        return x[..., :h], x[..., h:]

    def head_joined(self, x: Array, y: Array) -> Array:
        """Halves put together again (NF4-14.11)."""
        return np.concatenate([x, y], axis=2)

    def turn(self, sin: Array, inverse: bool) -> Array:
        """The sines of a rotation, or of that back (NF4-14.11)."""
        return -sin if inverse else sin

    # Operations

    def exact_product(self, a: Array, b: Array, shape: list[int]) -> Outputs:
        """NF4-14.3."""
        if len(shape) != 3 or min(shape) < 0:
            raise InputError(f"shape is {shape}; it must be M, K and N")
        m, k, n = shape
        left, right = self.fitting("a", a, m * k), self.fitting("b", b, k * n)
        with np.errstate(all="ignore"):
            return {"y": self.times(left.reshape(m, k), right.reshape(k, n))}

    def exact_sum(self, x: Array, y: Array | None = None) -> Outputs:
        """NF4-14.4."""
        other = np.ones_like(x) if y is None else self.fitting("y", y, x.size)
        with np.errstate(all="ignore"):
            return {"sum": self.summed(self.terms(x, other)[None])}

    def exact_exp(self, x: Array) -> Outputs:
        """NF4-14.5."""
        with np.errstate(all="ignore"):
            return {"y": self.exponential(self.kept(x))}

    def exact_log(self, x: Array) -> Outputs:
        """NF4-14.6."""
        with np.errstate(all="ignore"):
            return {"y": self.logarithm(self.kept(x))}

    def exact_swiglu(self, gate: Array, up: Array) -> Outputs:
        """NF4-14.7."""
        with np.errstate(all="ignore"):
            return {"y": self.kept(self.activated(gate) * self.fitting("up", up, gate.size))}

    def exact_swiglu_backward(self, dout: Array, gate: Array, up: Array) -> Outputs:
        """NF4-14.7."""
        self.fitting("up", up, gate.size)
        self.fitting("dout", dout, gate.size)
        with np.errstate(all="ignore"):
            w, a = self.sigmoid(gate), self.activated(gate)
            slope = self.kept(self.kept(self.kept(gate - a) + ONE) * w)
            dgate = self.kept(self.kept(slope * dout) * up)
            return {"dgate": dgate, "dup": self.kept(dout * a)}

    def exact_softmax(self, z: Array, columns: int) -> Outputs:
        """NF4-14.8."""
        with np.errstate(all="ignore"):
            powers, norm, _ = self.row_terms(_rows(z, columns))
            return {"p": self.probabilities(powers, norm)}

    def exact_softmax_backward(self, dout: Array, p: Array, columns: int) -> Outputs:
        """NF4-14.8."""
        p = _rows(p, columns)
        dout = self.fitting("dout", dout, p.size).reshape(p.shape)
        with np.errstate(all="ignore"):
            lower = self.kept(dout - self.single(self.summed(self.terms(p, dout)))[:, None])
            return {"dz": self.kept(p * lower)}

    def exact_rms_norm(self, x: Array, weight: Array, eps: Array) -> Outputs:
        """NF4-14.9."""
        eps = self.fitting("eps", eps, 1)
        if not 0 < eps[0] < np.inf:
            raise InputError(f"eps is {eps[0]}; it must be positive and finite")
        x = _rows(x, weight.size)
        with np.errstate(all="ignore"):
            r = self.reciprocal_rms(self.summed(self.terms(x, x)), weight.size, float(eps[0]))
            return {"y": self.kept(self.kept(x * r[:, None]) * weight), "rstd": r}

    def exact_rms_norm_backward(self, dout: Array, x: Array, weight: Array, rstd: Array) -> Outputs:
        """NF4-14.9."""
        x = _rows(x, weight.size)
        r = self.fitting("rstd", rstd, len(x))[:, None]
        with np.errstate(all="ignore"):
            h = self.kept(self.fitting("dout", dout, x.size).reshape(x.shape) * weight)
            b = self.single(self.summed(self.terms(h, x))[:, None] * r * r / weight.size)
            return {"dx": self.kept(self.kept(h - self.kept(x * b)) * r)}

    def exact_cross_entropy(self, logits: Array, vocabulary: int, targets: list[int]) -> Outputs:
        """NF4-14.10."""
        rows, wanted = _rows(logits, vocabulary).copy(), np.array(targets, np.int64)
        self.fitting("targets", wanted, len(rows))
        kept = wanted != IGNORED
        if not kept.any() or any(not 0 <= t < vocabulary for t in wanted[kept]):
            raise InputError(f"targets {targets} have none, or one that is not in the vocabulary")
        losses, gradient = np.zeros(len(rows), np.float32), np.zeros_like(rows)
        scales = np.full((int(kept.sum()), 1), 1 / kept.sum(), np.float32)
        losses[kept], gradient[kept] = self.cross_entropies(rows[kept], wanted[kept], scales)
        return {"losses": losses, "loss": self.mean_of(losses, wanted), "dlogits": gradient}

    def cross_entropies(self, rows: Array, wanted: Array, scales: Array) -> tuple[Array, Array]:
        """The losses of rows that have a target, and their gradients, scaled by scales [T, 1] (NF4-14.10)."""
        hit = np.arange(rows.shape[1]) == wanted[:, None]
        with np.errstate(all="ignore"):
            powers, norm, top = self.row_terms(rows)
            picked = np.where(hit, rows - top, np.float32(0)).sum(1)
            losses = self.kept(self.logarithm(norm[:, 0]) - picked)
            return losses, self.logit_gradient(powers, norm, hit.astype(np.float32), scales)

    def mean_of(self, losses: Array, wanted: Array) -> Array:
        """The loss of a step of rows (NF4-14.10)."""
        return self.summed(losses[None].astype(np.float64)) / self.target_count(wanted)

    def exact_rotate(self, x: Array, cos: Array, sin: Array, head_dim: int, inverse: bool) -> Outputs:
        """NF4-14.11."""
        if head_dim < 2 or head_dim % 2:
            raise InputError(f"head_dim is {head_dim}; it must be even")
        c = _rows(cos, head_dim // 2)[:, None]
        s = self.turn(self.fitting("sin", sin, c.size).reshape(c.shape), inverse)
        if x.size % max(1, len(c) * head_dim) or (x.size and not len(c)):
            raise InputError(f"x has {x.size} elements, which are no heads of {len(c)} rows")
        heads = x.size // max(1, len(c) * head_dim)
        left, right = self.head_halves(x.reshape(len(c), heads, head_dim))
        with np.errstate(all="ignore"):
            first = self.kept(self.kept(left * c) - self.kept(right * s))
            second = self.kept(self.kept(right * c) + self.kept(left * s))
        return {"y": self.head_joined(first, second)}


def _rows(x: Array, columns: int) -> Any:
    if columns < 1 or x.size % columns:
        raise InputError(f"{x.size} elements are no rows of {columns}")
    return x.reshape(-1, columns)
