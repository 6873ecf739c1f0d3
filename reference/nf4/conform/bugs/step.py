"""A port for each class of bug in chapter 15, which does one step wrong."""
# ruff: noqa: D102  the class says what is wrong, its base what the step is

import math
from collections.abc import Mapping
from dataclasses import replace
from decimal import Decimal
from fractions import Fraction

import numpy as np

from nf4.conform.bugs.plain_codec import Array
from nf4.conform.bugs.plain_exact import ONE
from nf4.conform.bugs.plain_files import Plain
from nf4.conform.bugs.plain_step import Heads, nearest
from nf4.model.config import LlamaConfig, RopeConfig

# Linear layers


class DropoutDivides(Plain):
    """D divides what it keeps by 1 - q, as in PEFT, and c is RN(s) (NF4-15.1)."""

    def low_rank_factor(self, scale: float, p: float) -> np.float32:
        return self.applied(scale)

    def dropped(self, x: Array, keep: Array) -> Array:
        return np.where(keep > 0, self.kept(x * keep), np.float32(0))


class DroppedMultiplied(Plain):
    """What drops out is multiplied by 0, so that an infinity becomes a NaN (NF4-15.1)."""

    def dropped(self, x: Array, keep: Array) -> Array:
        return self.kept(x * (keep > 0))


class FactorRoundedTwice(Plain):
    """s and the division by what is kept are rounded to float32 before they are multiplied (NF4-15.1)."""

    def low_rank_factor(self, scale: float, p: float) -> np.float32:
        return np.float32(self.applied(scale) * np.float32(1 / self.share(p)))


class ScaleAfterB(Plain):
    """c multiplies the product with B, as in PEFT, and its gradient (NF4-15.1)."""

    def z_of(self, product: Array, c: np.float32) -> Array:
        return self.projected(product)

    def added_term(self, product: Array, c: np.float32) -> Array:
        return self.kept(c * product)

    def adapter_gradient(self, g: Array, c: np.float32) -> Array:
        return self.kept(c * g)

    def e_of(self, product: Array, c: np.float32) -> Array:
        return product


class BiasLast(Plain):
    """The bias is added after what the adapter adds (NF4-15.1)."""

    def output(self, base: Array, bias: Array | None, term: Array | None, residual: Array | None) -> Array:
        y = super().output(base, None, term, None)
        return super().output(y, bias, None, residual)


class SharedInputOrder(Plain):
    """dX of q, k and v are added from the last to the first (NF4-15.1)."""

    def shared_sum(self, parts: list[Array]) -> Array:
        return super().shared_sum(parts[::-1])


class FusedProjections(Plain):
    """Layers that share their X are one product backward, W one below the other (NF4-15.1)."""

    def input_gradients(self, gradients: list[Array], weights: list[Array], terms: list[Array]) -> Array:
        return self.shared_sum(
            [self.times(np.concatenate(gradients, axis=1), np.concatenate(weights)), *terms]
        )


class GradientByBatch(Plain):
    """dA and dB are products over all rows, whatever sequence they are of (NF4-15.1)."""

    def by_sequence(self, a: Array, b: Array, lengths: list[int]) -> Array:
        return self.times(a.T, b)[None]


class EmptySequenceAccepted(Plain):
    """A sequence without rows is taken (NF4-9.2, NF4-15.1, NF4-15.2)."""

    def check_sequences(self, lengths: list[int]) -> None:
        return None


# Attention


class ScaleIntoQuery(Plain):
    """c multiplies the queries instead of the scores, forward and backward (NF4-15.2)."""

    def scored_queries(self, queries: Array, c: np.float32) -> Array:
        return self.kept(c * queries)

    def scores(self, product: Array, c: np.float32) -> Array:
        return product

    def score_gradient(self, f: Array, c: np.float32) -> Array:
        return f

    def query_gradient(self, product: Array, c: np.float32) -> Array:
        return self.kept(c * product)


class ScoreScaleLate(Plain):
    """c multiplies dQ and dK instead of e (NF4-15.2)."""

    def score_gradient(self, f: Array, c: np.float32) -> Array:
        return f

    def query_gradient(self, product: Array, c: np.float32) -> Array:
        return self.kept(c * product)

    def key_gradient(self, product: Array, c: np.float32) -> Array:
        return self.kept(c * product)


class ScoreScaleInFloat32(Plain):
    """c is rounded at the root, too (NF4-15.2)."""

    def score_scale(self, dim: int) -> np.float32:
        return np.float32(ONE / np.sqrt(np.float32(dim)))


class GroupsSummed(Plain):
    """dK and dV are sums of a product for each query head of a group (NF4-15.2)."""

    def over_queries(self, rows: Array, queries: Array, group: int) -> Array:
        parts = zip(np.split(rows, group), np.split(queries, group), strict=True)
        return self.shared_sum([self.times(part.T, own) for part, own in parts])


class CausalGrid(Plain):
    """A query's products with V and K have the terms, and the grids, of what it sees only (NF4-15.2)."""

    def over_keys(self, rows: Array, keys: Array, hidden: Array) -> Array:
        seen = np.tile(~hidden, (len(rows) // len(hidden), 1))
        return np.concatenate(
            [self.times(row[None, own], keys[own]) for row, own in zip(rows, seen, strict=True)]
        )


class MaskAdded(Plain):
    """The mask is added to the scores: where one that is hidden is infinite, a NaN comes of it (NF4-15.2)."""

    def masked(self, z: Array, hidden: Array) -> Array:
        return z + np.where(hidden, np.float32(-np.inf), np.float32(0))


class WindowInclusive(Plain):
    """A window shows w positions beside the query's own (NF4-15.2)."""

    def hidden(self, n: int, window: int | None) -> Array:
        return super().hidden(n, None if window is None else window + 1)


class SequencesMixed(Plain):
    """A query sees the packed sequences before its own (NF4-15.2)."""

    def spans(self, lengths: list[int]) -> list[slice]:
        return [slice(0, sum(lengths))]


class HeadGrouping(Plain):
    """Query head h is of key-value head h mod kv_heads (NF4-15.2)."""

    def query_heads(self, rows: Array, heads: Heads) -> Array:
        return rows.reshape(-1, heads.group, heads.kv, heads.dim).transpose(2, 1, 0, 3)

    def query_rows(self, by_head: Array) -> Array:
        return by_head.transpose(2, 1, 0, 3).reshape(by_head.shape[2], -1)


# Cosine and sine


class FrequencyInFloat32(Plain):
    """The angle a position adds is rounded to float32, as in transformers (NF4-15.3)."""

    def frequency(self, angle: Decimal) -> Decimal:
        return Decimal(float(nearest(angle)))


class AngleInFloat32(Plain):
    """The angle of a position is rounded to float32, as in transformers (NF4-15.3)."""

    def angle(self, position: int, frequency: Decimal) -> Decimal:
        return Decimal(float(nearest(position * frequency)))


class AngleInFloat64(Plain):
    """Angles are float64, and what lies near the middle of two float32 is not looked at again (NF4-15.3)."""

    def frequency(self, angle: Decimal) -> Decimal:
        return Decimal(float(angle))

    def angle(self, position: int, frequency: Decimal) -> Decimal:
        return Decimal(position * float(frequency))


class FactorRounded(Plain):
    """Cosine and sine are rounded before the factor m multiplies them (NF4-15.3)."""

    def entry(self, factor: Decimal, cosine: Decimal) -> np.float32:
        return np.float32(nearest(factor) * nearest(cosine))


class RopeScalingIgnored(Plain):
    """The rope type of config.json is not looked at (NF4-15.3)."""

    def rope_of(self, config: LlamaConfig) -> RopeConfig:
        return replace(config.rope, type="default")


class RopeLengthIgnored(Plain):
    """dynamic and longrope are those of the longest sequence, not of the sequence at hand (NF4-15.3)."""

    def rope_length(self, n: int, positions: int) -> int:
        return positions


class DynamicGrowth(Plain):
    """dynamic lets theta grow by F n / P - (F - 1) in float64, as transformers does (NF4-15.3)."""

    def growth(self, factor: float, n: int, positions: int) -> Decimal:
        return Decimal(factor * n / positions - (factor - 1))


class TableZeroSign(Plain):
    """A negative cosine or sine that rounds to zero gives +0 (NF4-15.3)."""

    def entry(self, factor: Decimal, cosine: Decimal) -> np.float32:
        return super().entry(factor, cosine) + np.float32(0)


class PositionsPacked(Plain):
    """Positions run on through packed sequences (NF4-15.3)."""

    def tables(self, config: LlamaConfig, lengths: list[int]) -> tuple[Array, Array]:
        return self.table(config, sum(lengths))


# The model


class ResidualFirst(Plain):
    """A residual is added to the product with W, before bias and adapter (NF4-15.4)."""

    def output(self, base: Array, bias: Array | None, term: Array | None, residual: Array | None) -> Array:
        return super().output(base if residual is None else self.kept(base + residual), bias, term, None)


class NormAfterRotation(Plain):
    """The norms of q and k come after the rotation (NF4-15.4)."""

    def prepared(
        self, x: Array, weight: Array | None, eps: float, cos: Array, sin: Array
    ) -> tuple[Array, Array, Array]:
        turned = self.turned(x, cos, sin)
        y, rstd = (turned, x[:0]) if weight is None else self.head_norm(turned, weight, eps)
        return y, turned, rstd

    def prepared_back(
        self, d: Array, raw: Array, rstd: Array, weight: Array | None, cos: Array, sin: Array
    ) -> Array:
        d = d if weight is None else self.normed_back(d, raw, weight, rstd)
        return self.turned(d, cos, sin, inverse=True)


class NormOfAllHeads(Plain):
    """The norms of q and k are over all heads of a row (NF4-15.4)."""

    def head_norm(self, x: Array, weight: Array, eps: float) -> tuple[Array, Array]:
        return self.normed(x, self.head_weight(weight, x), eps)

    def head_weight(self, weight: Array, x: Array) -> Array:
        return np.tile(weight, x.shape[1] // weight.size)


class WindowOfAllLayers(Plain):
    """Every layer has the window that some have (NF4-15.4)."""

    def layer_window(self, config: LlamaConfig, index: int) -> int | None:
        return next((window for window in config.sliding_window if window is not None), None)


class LossScaleLate(Plain):
    """The gradients are those of the sum of the losses, divided in the end (NF4-15.5)."""

    def row_scales(self, shares: Array) -> Array:
        return np.ones((len(shares), 1), np.float32)

    def finished(self, gradient: Array, count: int) -> Array:
        return self.kept(gradient * np.float32(1 / count))


# The update


class GradientSequential(Plain):
    """The gradients of sequences are added from the first to the last (NF4-15.6)."""

    def added(self, gradients: Array) -> Array:
        return self.shared_sum(list(gradients))


class GradientHalves(Plain):
    """The gradients of sequences are cut in the middle, again and again (NF4-15.6)."""

    def added(self, gradients: Array) -> Array:
        if len(gradients) == 1:
            return super().added(gradients)
        half = len(gradients) // 2
        return self.kept(self.added(gradients[:half]) + self.added(gradients[half:]))


class NormOrder(Plain):
    """The squares of the norm are summed in float64, from the first to the last (NF4-15.7)."""

    def exact_norm(self, gradients: Mapping[str, Array]) -> float:
        total = 0.0
        for name in sorted(gradients):
            for square in np.square(gradients[name].reshape(-1).astype(np.float64)):
                total += float(square)
        return math.sqrt(total)


class NormOfAll(Plain):
    """The squares of all arrays are the terms of one sum (NF4-15.7)."""

    def exact_norm(self, gradients: Mapping[str, Array]) -> float:
        flats = [gradients[name].reshape(-1) for name in sorted(gradients)]
        return super().exact_norm({"all": np.concatenate([np.empty(0, np.float32), *flats])})


class RateInFloat64(Plain):
    """The rate is computed in float64, every operation rounded, as in transformers (NF4-15.8)."""

    def schedule_angle(self, done: int, span: int) -> Decimal:
        return Decimal(math.pi * (done / span))

    def exact_rate(self, lr: float, share: Fraction) -> float:
        return lr * float(share)
