"""Normal weights over the absmax of their block: their distribution, and the error of a grid on them."""

import math

import numpy as np
from numpy.polynomial.legendre import leggauss
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtr, ndtri

Float64 = NDArray[np.float64]

_NODES = 400  # of the quadrature: the grids below then hold to 1e-7

E_ABS = math.sqrt(2 / math.pi)
"""The mean magnitude of N(0, 1)."""


class ScaledNormal:
    """x = w / M for w of N(0, 1) in blocks of block_size, where M is the largest |w| of its block.

    One weight of a block is +1 or -1; with signed, where M takes that weight's sign, it is +1. Given M, the
    others are normal and cut off at +-M (arXiv 2306.06965, 2505.06653). What is said of x is therefore an
    integral over M, which is one over u = P(|w| < M)^block_size, uniform in (0, 1).
    """

    def __init__(self, block_size: int, signed: bool = False) -> None:
        self.block_size, self.signed = block_size, signed
        u, weight = leggauss(_NODES)
        self._weight: Float64 = weight / 2
        self._inside: Float64 = ((u + 1) / 2) ** (1 / block_size)  # P(|w| < M) for one weight
        self._absmax: Float64 = ndtri((1 + self._inside) / 2)
        self.rest = (block_size - 1) / block_size  # the share of the weights that are not their block's M

    def partial(self, x: ArrayLike, order: int, power: int) -> Float64:
        """E[M^power X^order; X < x] over the weights X that are not their block's M; order is 0, 1 or 2."""
        m = self._absmax
        z = np.multiply.outer(np.clip(np.asarray(x, np.float64), -1, 1), m)
        lowest, at = _normal_density(m), _normal_density(z)
        if order == 0:
            integral = ndtr(z) - ndtr(-m)
        elif order == 1:
            integral = (lowest - at) / m
        else:
            integral = (ndtr(z) - ndtr(-m) - z * at - m * lowest) / m**2
        found: Float64 = np.sum(integral * (self._weight * m**power / self._inside), -1)
        return found

    def density(self, x: ArrayLike, power: int = 0) -> Float64:
        """The density at x in (-1, 1), each weight counted M^power times; those at +-1 are not in it."""
        z = np.multiply.outer(np.asarray(x, np.float64), self._absmax)
        per_node = self.rest * self._absmax ** (1 + power) / self._inside * self._weight
        found: Float64 = np.sum(_normal_density(z) * per_node, -1)
        return found

    def masses(self, thresholds: ArrayLike) -> Float64:
        """The share of the weights in each bin: below the first threshold, between two, above the last."""
        at = np.concatenate([[-1.0], np.asarray(thresholds, np.float64), [1.0]])
        found = self.rest * np.diff(self.partial(at, 0, 0))
        found[-1] += 1 / self.block_size if self.signed else 1 / (2 * self.block_size)
        found[0] += 0 if self.signed else 1 / (2 * self.block_size)
        return found

    def errors(self, values: ArrayLike) -> tuple[float, float]:
        """The RMS and the mean magnitude of the error over those of the weights, to the nearest of ascending
        values that have -1 (unless signed) and +1 among them, times M."""
        v = np.asarray(values, np.float64)
        edges = np.concatenate([[-1.0], (v[1:] + v[:-1]) / 2, [1.0]])
        mass, first, second = (np.diff(self.partial(edges, order, 2)) for order in (0, 1, 2))
        square = float(np.sum(second - 2 * v * first + v * v * mass))
        mass, first = self.partial(edges, 0, 1), self.partial(edges, 1, 1)
        mass_at, first_at = self.partial(v, 0, 1), self.partial(v, 1, 1)
        below = v * (mass_at - mass[:-1]) - (first_at - first[:-1])
        above = (first[1:] - first_at) - v * (mass[1:] - mass_at)
        magnitude = float(np.sum(below + above))
        return math.sqrt(self.rest * square), self.rest * magnitude / E_ABS


def _normal_density(z: Float64) -> Float64:
    density: Float64 = np.exp(-z * z / 2) / math.sqrt(2 * math.pi)
    return density
