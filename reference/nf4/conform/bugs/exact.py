"""A port for each class of bug in chapter 14, which does one step wrong."""
# ruff: noqa: D102  the class says what is wrong, its base what the step is

import math

import numpy as np

from nf4.conform.bugs.plain_codec import Array
from nf4.conform.bugs.plain_exact import ONE
from nf4.conform.bugs.plain_files import Plain

# Products and sums


class ProductOrder(Plain):
    """A product is summed in float32, from the first term to the last, each rounded (NF4-14.3)."""

    def gridded(self, rows: Array) -> Array:
        self.check_finite("operand", rows.reshape(-1))
        return rows

    def product_sums(self, left: Array, right: Array) -> Array:
        sums = np.zeros((len(left), len(right)), np.float32)
        for a, b in zip(left.T, right.T, strict=True):
            sums = sums + a[:, None] * b
        return sums


class GridMissing(Plain):
    """Operands and terms are summed as they are, without a grid (NF4-14.2, NF4-14.4)."""

    def on_grid(self, x: Array, top: Array, bits: int) -> Array:
        return x.astype(np.float64)


class GridShared(Plain):
    """All rows of an operand have the grid of the largest element (NF4-14.2)."""

    def tops(self, rows: Array) -> Array:
        return np.broadcast_to(np.abs(rows).max(initial=0), (len(rows), 1))


class GridExponent(Plain):
    """A largest magnitude that is a power of two gets the exponent below (NF4-14.2, NF4-14.4)."""

    def exponents(self, top: Array) -> Array:
        fraction, exponent = np.frexp(top)
        lower: Array = exponent - (fraction == 0.5)
        return lower


class GridTies(Plain):
    """A tie on a grid goes away from zero (NF4-14.2, NF4-14.4)."""

    def nearest(self, units: Array) -> Array:
        return np.copysign(np.floor(np.abs(units) + 0.5), units)


class GridTruncated(Plain):
    """What a grid does not hold is cut off (NF4-14.2, NF4-14.4)."""

    def nearest(self, units: Array) -> Array:
        return np.trunc(units)


class GridBits(Plain):
    """q takes log2 K rounded down, so that sums may need 54 bits (NF4-14.2)."""

    def product_bits(self, k: int) -> int:
        return min(24, (53 - math.floor(math.log2(max(k, 1)))) // 2)


class LongProductOneGrid(Plain):
    """A product has one grid however long it is, with the bits that its length leaves (NF4-14.2)."""

    def product_pieces(self, k: int) -> list[slice]:
        return [slice(0, k)]


class PiecesAdded(Plain):
    """The sums of a product's pieces are added as they are, in float64 (NF4-14.3)."""

    def pieces_added(self, sums: Array) -> Array:
        added: Array = sums.sum(1)
        return added


class ProductZeroSign(Plain):
    """A negative sum that rounds to zero gives -0 (NF4-14.3)."""

    def plus_zero(self, y: Array) -> Array:
        return y


class SumInOnePiece(Plain):
    """A sum has one grid however long it is, with the bits that its length leaves (NF4-14.4)."""

    def pieces(self, terms: Array) -> list[Array]:
        return [terms]


class SumBits(Plain):
    """Terms of a sum keep as many bits as the length of the piece leaves, not 41 (NF4-14.4)."""

    def sum_bits(self, n: int) -> int:
        return 53 - math.ceil(math.log2(n))


class TermsRounded(Plain):
    """The products of a sum are rounded to float32 (NF4-14.4)."""

    def terms(self, x: Array, y: Array) -> Array:
        return (x * y).astype(np.float64)


# Functions


class LibraryExp(Plain):
    """exp is the library's, in float64, rounded: nearly always the nearest (NF4-14.5)."""

    def exponential(self, x: Array) -> Array:
        return self.single(np.exp(x.astype(np.float64)))


class LibraryLog(Plain):
    """log is the library's, in float64, rounded: nearly always the nearest (NF4-14.6)."""

    def logarithm(self, x: Array) -> Array:
        return self.single(np.log(x.astype(np.float64)))


# What is made of them


class SwigluQuotient(Plain):
    """a is g / (1 + exp(-g)), as in PyTorch (NF4-14.7)."""

    def activated(self, g: Array) -> Array:
        return self.kept(g / (ONE + self.exponential(-g)))


class SoftmaxReciprocal(Plain):
    """A row is multiplied by 1 / N (NF4-14.8)."""

    def probabilities(self, powers: Array, norm: Array) -> Array:
        return self.kept(powers * self.kept(ONE / norm))


class RmsInFloat32(Plain):
    """The scale of a row is computed in float32 (NF4-14.9)."""

    def reciprocal_rms(self, squares: Array, n: int, eps: float) -> Array:
        return ONE / np.sqrt(self.single(squares) / np.float32(n) + np.float32(eps))


class EpsilonOutside(Plain):
    """eps is added to the root of the mean of squares (NF4-14.9)."""

    def reciprocal_rms(self, squares: Array, n: int, eps: float) -> Array:
        return self.single(1.0 / (np.sqrt(squares / n) + eps))


class SoftmaxGradientScaled(Plain):
    """The gradient of logits is (p - 1) s, of the rounded p (NF4-14.10)."""

    def logit_gradient(self, powers: Array, norm: Array, hit: Array, scale: Array) -> Array:
        return self.kept(self.kept(self.probabilities(powers, norm) - hit) * scale)


class RotationPairs(Plain):
    """A rotation turns neighbours, as Meta's files need it (NF4-14.11)."""

    def head_halves(self, x: Array) -> tuple[Array, Array]:
        return x[..., ::2], x[..., 1::2]

    def head_joined(self, x: Array, y: Array) -> Array:
        return np.stack([x, y], axis=-1).reshape(*x.shape[:2], -1)


class RotationForward(Plain):
    """Gradients are turned forward, like what they are of (NF4-14.11)."""

    def turn(self, sin: Array, inverse: bool) -> Array:
        return sin
