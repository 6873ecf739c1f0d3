"""A port for each class of bug in chapters 9 to 11, which does one step wrong."""
# ruff: noqa: D102  the class says what is wrong, its base what the step is

import math
import zlib
from typing import Any

import numpy as np

from nf4.conform.bugs.codec import to_odd
from nf4.conform.bugs.plain_codec import Array
from nf4.conform.bugs.plain_files import Plain
from nf4.conform.bugs.plain_training import IGNORED, LOW, SHIFT, Scalars
from nf4.floats import BFLOAT16, FLOAT32

# Chapter 11: random numbers


class PhiloxRounds(Plain):
    """Philox runs seven rounds, the fewest that its authors deem safe (NF4-11.1)."""

    rounds = 7


class PhiloxKey(Plain):
    """The key grows before the first round, too (NF4-11.1)."""

    def philox_blocks(self, counters: Array, k0: int, k1: int) -> Array:
        return super().philox_blocks(counters, *self.next_key(k0, k1))


class SeedTruncated(Plain):
    """Only the lower half of the seed makes the key (NF4-11.2)."""

    def key(self, seed: int) -> tuple[int, int]:
        return seed & 0xFFFFFFFF, 0


class SeedHalves(Plain):
    """The two words of the key are exchanged (NF4-11.2)."""

    def key(self, seed: int) -> tuple[int, int]:
        low, high = super().key(seed)
        return high, low


class CounterOrder(Plain):
    """Sample and stream stand in each other's word of the counter (NF4-11.2)."""

    def counter(self, sample: int, stream: int, purpose: int) -> tuple[int, int, int]:
        first, second, third = super().counter(sample, stream, purpose)
        return second, first, third


class SampleCarry(Plain):
    """What a sample has above 2^32 goes into the word of the stream (NF4-11.2)."""

    def counter(self, sample: int, stream: int, purpose: int) -> tuple[int, int, int]:
        return super().counter(sample, stream + (sample >> 32) & 0xFFFFFFFF, purpose)


class StreamHash(Plain):
    """A stream is the Adler-32 of the name (NF4-11.2)."""

    def hashed(self, name: bytes) -> int:
        return zlib.adler32(name)


class StreamEncoding(Plain):
    """A name's characters are cut to a byte each, as with charCodeAt in JavaScript (NF4-11.2)."""

    def name_bytes(self, name: str) -> bytes:
        return name.encode("utf-16-le")[::2]


class WordOrder(Plain):
    """The words of a block are taken from the last to the first (NF4-11.3)."""

    def block_words(self, blocks: Array) -> Array:
        return super().block_words(blocks[:, ::-1])


class UniformBits(Plain):
    """A uniform is all 32 bits of a word, rounded to float32, so that it may be 1 (NF4-11.3)."""

    def fractions(self, words: Array) -> Array:
        return words.astype(np.float32) * np.float32(2**-32)


class LaneOrder(Plain):
    """The high half of a word comes before the low half (NF4-11.4)."""

    def lanes(self, words: Array) -> Array:
        return super().lanes(words).reshape(-1, 2)[:, ::-1].reshape(-1)


class KeepCompare(Plain):
    """An element whose lane equals the threshold is dropped (NF4-11.4)."""

    def keeps(self, lanes: Array, threshold: int) -> Array:
        return lanes > threshold


class MaskInverted(Plain):
    """Elements below the threshold are kept, and the others dropped (NF4-11.4)."""

    def keeps(self, lanes: Array, threshold: int) -> Array:
        return lanes < threshold


class ThresholdRounding(Plain):
    """65536 p is rounded with ties going up (NF4-11.4)."""

    def nearest_threshold(self, p: float) -> int:
        return math.floor(65536 * p + 0.5)


class ThresholdTruncated(Plain):
    """65536 p is rounded down (NF4-11.4)."""

    def nearest_threshold(self, p: float) -> int:
        return math.floor(65536 * p)


class ThresholdTop(Plain):
    """The threshold may reach 65536, so that nothing is kept (NF4-11.4)."""

    def top_threshold(self) -> int:
        return 65536


class DropoutRange(Plain):
    """A dropout outside 0 <= p < 1 is not refused; a NaN is taken for 0 (NF4-11.4)."""

    def threshold(self, p: float) -> int:
        return max(0, min(self.nearest_threshold(p), self.top_threshold())) if not math.isnan(p) else 0


class PermutationWords(Plain):
    """The first word of an entry's value is its high one (NF4-11.5)."""

    def entries(self, pairs: Array) -> Array:
        values: Array = pairs[:, 0] << SHIFT | pairs[:, 1] & LOW
        return values


class EpochIgnored(Plain):
    """Every epoch has the order of the first (NF4-11.5, NF4-10.8)."""

    def epoch_sample(self, epoch: int) -> int:
        return 0


# Chapter 9: the LoRA layer


class InitBound(Plain):
    """The bound of A is sqrt(6 / in), that of a Kaiming-uniform with a = 0 (NF4-9.3)."""

    def initial_bound(self, in_features: int) -> np.float32:
        return np.float32(math.sqrt(6 / in_features))


class InitRoundedOnce(Plain):
    """A in bfloat16 is rounded from the exact product (NF4-9.3)."""

    def initial(self, u: Array, bound: np.float32, dtype: np.dtype[Any]) -> Array:
        if dtype == FLOAT32:
            return super().initial(u, bound, dtype)
        return self.narrowed(to_odd((u.astype(np.float64) * 2 - 1) * np.float64(bound)), dtype)


class ScaleRule(Plain):
    """alpha / r and alpha / sqrt(r) are taken for each other (NF4-9.1)."""

    def scale(self, rank: int, alpha: float, rslora: bool) -> float:
        return super().scale(rank, alpha, not rslora)


class ScaleMissing(Plain):
    """The scale of the adapter is left out (NF4-9.2)."""

    def applied(self, scale: float) -> np.float32:
        return np.float32(1)


class AdapterTransposed(Plain):
    """A and B are read with their axes exchanged, as MLX stores them (NF4-9.1)."""

    accepted = r"has shape \[(\d+), (\d+)\], and this model and r need \[\2, \1\]"

    def factor(self, flat: Array, rows: int, columns: int) -> Array:
        return flat.reshape(columns, rows).T


class WeightTransposed(Plain):
    """The weight is read as [in, out] (NF4-9.2)."""

    def weight_matrix(self, flat: Array, shape: list[int]) -> Array:
        return flat.reshape(shape[::-1]).T


class WeightNotRounded(Plain):
    """The decoded weight stays in float32 (NF4-9.2)."""

    def layer_dtype(self, dtype: str) -> str:
        return "float32"


class BiasOmitted(Plain):
    """The bias is left out (NF4-9.2)."""

    def biased(self, y: Array, bias: Array) -> Array:
        return y


class IntermediateRounded(Plain):
    """Z is rounded to bfloat16, as in PEFT under autocast (NF4-9.2)."""

    def projected(self, z: Array) -> Array:
        return self.widened(self.narrowed(z, BFLOAT16))


class DropoutOnWeight(Plain):
    """The weight, too, multiplies D(X) (NF4-9.2)."""

    def weight_input(self, x: Array, keep: Array) -> Array:
        return x * keep


class DropoutScale(Plain):
    """What is kept is divided by 1 - p, as in PyTorch (NF4-9.4)."""

    def share(self, p: float) -> float:
        return 1 - p


class MaskRestart(Plain):
    """The mask starts anew in every row (NF4-9.4)."""

    def sequence_mask(
        self,
        draw: tuple[int, int],
        samples: list[int],
        lengths: list[int],
        position: int,
        columns: int,
        p: float,
    ) -> Array:
        return np.tile(self.mask(*draw, samples[position], columns, p), lengths[position])


class MaskPacked(Plain):
    """Packed sequences share one mask, of the first sample, through all their rows (NF4-9.4)."""

    def sequence_mask(
        self,
        draw: tuple[int, int],
        samples: list[int],
        lengths: list[int],
        position: int,
        columns: int,
        p: float,
    ) -> Array:
        start = sum(lengths[:position]) * columns
        return self.mask(*draw, samples[0], start + lengths[position] * columns, p)[start:]


class MaskNotInBackward(Plain):
    """dX lacks the mask of the dropout (NF4-9.5)."""

    def input_mask(self, keep: Array) -> Array:
        return np.ones_like(keep)


# Chapter 10: AdamW and the training step


class DecayOfVectors(Plain):
    """Arrays of fewer than two dimensions decay, too, as in PyTorch (NF4-10.2)."""

    def decays(self, shape: list[int]) -> bool:
        return True


class BiasCorrection(Plain):
    """The corrections by 1 - beta1^t and 1 - beta2^t are left out (NF4-10.3)."""

    def corrections(self, beta1: float, beta2: float, t: int) -> tuple[float, float]:
        return 1.0, 1.0


class PowerFunction(Plain):
    """beta^t is a power, as in PyTorch (NF4-10.3)."""

    def power(self, beta: float, t: int) -> float:
        return math.pow(beta, t)


class ScalarsInFloat32(Plain):
    """The scalars are computed in float32 (NF4-10.3)."""

    def scalars(self, lr: float, betas: tuple[float, float], eps: float, decay: float, t: int) -> Scalars:
        one, rate, (beta1, beta2) = np.float32(1), np.float32(lr), np.array(betas, np.float32)
        power1 = power2 = one
        for _ in range(t):
            power1, power2 = power1 * beta1, power2 * beta2
        keep = one - rate * np.float32(decay)
        return Scalars(
            step=rate / (one - power1),
            root=np.sqrt(one - power2),
            decay=keep,
            rest1=one - beta1,
            beta2=beta2,
            rest2=one - beta2,
            eps=np.float32(eps),
        )


class MomentForm(Plain):
    """m becomes beta1 m + (1 - beta1) g, each product rounded (NF4-10.4)."""

    def first_moment(self, m: Array, g: Array, c: Scalars) -> Array:
        return self.multiply_add(np.float32(1) - c.rest1, m, self.kept(c.rest1 * g))


class EpsilonInside(Plain):
    """eps is added under the square root (NF4-10.4)."""

    def divisor(self, v: Array, c: Scalars) -> Array:
        return self.kept(np.sqrt(self.kept(v + c.eps)) / c.root)


class UpdateOrder(Plain):
    """u is (step m) / d, as in PyTorch (NF4-10.4)."""

    def update(self, m: Array, d: Array, c: Scalars) -> Array:
        return self.kept(self.kept(c.step * m) / d)


class DecayOrder(Plain):
    """The decay multiplies p after the update was subtracted (NF4-10.4)."""

    def moved(self, p: Array, u: Array, c: Scalars, dtype: np.dtype[Any]) -> Array:
        return self.kept(c.decay * self.kept(p - u))


class CoupledDecay(Plain):
    """Weight decay is added to the gradient, as in Adam with L2 (NF4-10.4)."""

    def decayed_gradient(self, g: Array, p: Array, decay: float) -> tuple[Array, float]:
        return self.kept(g + self.kept(np.float32(decay) * p)), 0.0


class StatesRounded(Plain):
    """m and v of a bfloat16 parameter are rounded to bfloat16, as PyTorch keeps them (NF4-10.1)."""

    def stored_state(self, state: Array, dtype: str) -> Array:
        return self.widened(self.narrowed(state, BFLOAT16)) if dtype == "bfloat16" else state


class BfloatRoundedTwice(Plain):
    """A bfloat16 parameter is rounded after the decay and after the update, as in PyTorch (NF4-10.5)."""

    def moved(self, p: Array, u: Array, c: Scalars, dtype: np.dtype[Any]) -> Array:
        return self.kept(self.widened(self.narrowed(self.kept(c.decay * p), dtype)) - u)


class WarmupOffByOne(Plain):
    """A warm-up counts its steps from 1 (NF4-10.6)."""

    def warm(self, step: int, warmup: int) -> float:
        return super().warm(step + 1, warmup)


class ScheduleSpan(Plain):
    """A schedule falls from step 0 on (NF4-10.6)."""

    def fall_start(self, warmup: int) -> int:
        return 0


class ScheduleZeroSpan(Plain):
    """A warm-up as long as the run divides by 0 (NF4-10.6)."""

    def span(self, steps: int, start: int) -> float:
        return np.float64(steps - start)


class ScheduleFloor(Plain):
    """Past the end of the run the rate falls below 0 (NF4-10.6)."""

    def floor(self, share: float) -> float:
        return share


class NormInFloat32(Plain):
    """The squares of the norm are taken and summed in float32 (NF4-10.7)."""

    def norm(self, gradients: dict[str, Array]) -> float:
        return float(np.sqrt(sum((np.sum(g * g) for _, g in sorted(gradients.items())), np.float32(0))))


class ClipPerArray(Plain):
    """Each array of gradients is clipped by its own norm (NF4-10.7)."""

    def clip_factors(self, gradients: dict[str, Array], max_norm: float) -> dict[str, float]:
        return {name: self.clip_factor(self.norm({name: g}), max_norm) for name, g in gradients.items()}


class ClipEpsilon(Plain):
    """c is max_norm / norm (NF4-10.7)."""

    def clip_factor(self, norm: float, max_norm: float) -> float:
        return min(1.0, max_norm / norm) if max_norm > 0 and norm > 0 else 1.0


class ClipAlways(Plain):
    """Gradients are scaled to max_norm where their norm is below it, too (NF4-10.7)."""

    def clip_factor(self, norm: float, max_norm: float) -> float:
        return max_norm / (norm + 1e-6) if max_norm > 0 else 1.0


class ClipZero(Plain):
    """A max_norm of 0 makes all gradients 0 (NF4-10.7)."""

    def clip_factor(self, norm: float, max_norm: float) -> float:
        return min(1.0, max_norm / (norm + 1e-6))


class LengthAscending(Plain):
    """Grouped by length, the shortest come first (NF4-10.8)."""

    def order_by_length(self, lengths: Array) -> Array:
        return super().order_by_length(-lengths)


class UnstableSort(Plain):
    """Entries of equal length do not keep their order: they are reversed (NF4-10.8)."""

    def order_by_length(self, lengths: Array) -> Array:
        return np.lexsort((-np.arange(lengths.size), -lengths))


class GroupSpan(Plain):
    """Grouping by length sorts a whole epoch (NF4-10.8)."""

    def run_length(self, examples: int, batch: int) -> int:
        return examples


class SplitEpoch(Plain):
    """Examples are held out by the permutation of epoch 0 (NF4-10.8)."""

    def held_out_epoch(self) -> int:
        return 0


class HeldOutCount(Plain):
    """The tenth that is held out is rounded up (NF4-10.8)."""

    def held_out_count(self, examples: int) -> int:
        return -(-examples // 10)


class HeldOutNone(Plain):
    """Of fewer than ten examples none is held out (NF4-10.8)."""

    def held_out_count(self, examples: int) -> int:
        return examples // 10


class LossIsSum(Plain):
    """The loss is the sum over the targets (NF4-10.9)."""

    def shares(self, parts: list[int], targets: Array) -> Array:
        return (super().shares(parts, targets) > 0).astype(np.float64)


class LossPerMicroBatch(Plain):
    """Each micro-batch is averaged by itself, and then the micro-batches (NF4-10.9)."""

    def shares(self, parts: list[int], targets: Array) -> Array:
        learned = np.split(targets != IGNORED, np.cumsum(parts)[:-1])
        counted = [part / max(part.sum(), 1) for part in learned]
        return np.concatenate(counted) / max(sum(part.any() for part in learned), 1)


class IgnoredCounted(Plain):
    """Rows without a target count in the divisor (NF4-10.9)."""

    def target_count(self, targets: Array) -> int:
        return targets.size


class SoftmaxOverflow(Plain):
    """Logits are exponentiated without subtracting the greatest (NF4-10.9)."""

    def shifted(self, rows: Array) -> Array:
        return rows


class InterleavedPairs(Plain):
    """Cosine and sine of a pair of uniforms become neighbours (NF4-10.10)."""

    def paired(self, cosines: Array, sines: Array) -> Array:
        return np.stack([cosines, sines], axis=1).reshape(-1)


class LogOfU(Plain):
    """The radius is that of ln(u), which is infinite for u = 0 (NF4-10.10)."""

    def normal_uniform(self, u: Array) -> Array:
        return u
