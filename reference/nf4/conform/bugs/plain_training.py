"""A correct port of chapters 9 to 11 in plain NumPy, a method a step, so that a subclass can do one wrong."""

import math
import zlib
from typing import Any, NamedTuple

import numpy as np

from nf4.conform.bugs.plain_codec import Array, Outputs, PlainCodec, dtype_of
from nf4.errors import InputError
from nf4.nested import DYNAMIC_MAP

ADAPTER_DTYPES = ("float32", "bfloat16")
UNIFORM, DROPOUT, PERMUTATION = 0, 1, 2  # the purposes of NF4-11.2
IGNORED = -100  # a position without a target
SCHEDULES = ("constant", "linear", "cosine")
SPLIT_EPOCH = 2**32 - 1  # NF4-10.8
RUN = 50  # batches that are sorted by length together
LOW = np.uint64(0xFFFFFFFF)
SHIFT = np.uint64(32)


class Scalars(NamedTuple):
    """The float32 of NF4-10.3; rest1 is 1 - beta1, rest2 is 1 - beta2."""

    step: np.float32
    root: np.float32
    decay: np.float32
    rest1: np.float32
    beta2: np.float32
    rest2: np.float32
    eps: np.float32


class PlainTraining(PlainCodec):
    """A port (NF4-13.3) written from the specification, for clarity, not from the reference.

    The methods named as operations are its port; those before them are the steps, each the work of the clause
    it names. InputError refuses an input.
    """

    # Steps: random numbers (chapter 11)

    rounds = 10  # NF4-11.1

    def next_key(self, k0: int, k1: int) -> tuple[int, int]:
        """The key of the next round (NF4-11.1)."""
        return (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF

    def key(self, seed: int) -> tuple[int, int]:
        """NF4-11.2."""
        return seed & 0xFFFFFFFF, seed >> 32

    def counter(self, sample: int, stream: int, purpose: int) -> tuple[int, int, int]:
        """The words of the counter after the number of the block (NF4-11.2)."""
        return sample & 0xFFFFFFFF, stream, purpose

    def name_bytes(self, name: str) -> bytes:
        """The bytes that a name is hashed by (NF4-11.2)."""
        return name.encode()

    def hashed(self, name: bytes) -> int:
        """The stream of a name (NF4-11.2)."""
        return zlib.crc32(name)

    def block_words(self, blocks: Array) -> Array:
        """The words [n] of blocks [b, 4] in the order in which they are used (NF4-11.3, NF4-11.4)."""
        return blocks.reshape(-1)

    def fractions(self, words: Array) -> Array:
        """The uniforms of words (NF4-11.3)."""
        return (words >> 8).astype(np.float32) * np.float32(2**-24)

    def lanes(self, words: Array) -> Array:
        """The 16-bit lanes of words, the low half first (NF4-11.4)."""
        return np.stack([words & 0xFFFF, words >> 16], axis=-1).reshape(-1)

    def nearest_threshold(self, p: float) -> int:
        """65536 p as an integer, a tie to the even one (NF4-11.4)."""
        return round(65536 * p)

    def top_threshold(self) -> int:
        """The greatest h (NF4-11.4)."""
        return 65535

    def threshold(self, p: float) -> int:
        """h of NF4-11.4."""
        if not 0 <= p < 1:
            raise InputError(f"dropout is {p}; it must be at least 0 and below 1")
        return min(self.nearest_threshold(p), self.top_threshold())

    def keeps(self, lanes: Array, threshold: int) -> Array:
        """Whether elements of these lanes are kept (NF4-11.4)."""
        return lanes >= threshold

    def entries(self, pairs: Array) -> Array:
        """The 64-bit values of pairs of words uint64 [n, 2] (NF4-11.5)."""
        values: Array = pairs[:, 0] | pairs[:, 1] << SHIFT
        return values

    def epoch_sample(self, epoch: int) -> int:
        """The sample that an epoch is drawn with (NF4-11.5)."""
        return epoch

    def drawn(self, seed: int, stream: int, sample: int, purpose: int, blocks: int) -> Array:
        """Blocks of a draw, uint32 [blocks, 4] (NF4-11.2)."""
        if blocks > 1 << 32:
            raise InputError(f"a draw of {blocks} blocks; there are at most 2^32")
        counters = np.empty((blocks, 4), np.uint32)
        counters[:, 0] = np.arange(blocks)
        counters[:, 1:] = self.counter(sample, stream, purpose)
        return self.philox_blocks(counters, *self.key(seed))

    def philox_blocks(self, counters: Array, k0: int, k1: int) -> Array:
        """Philox of counters uint32 [n, 4] (NF4-11.1)."""
        c0, c1, c2, c3 = counters.T.astype(np.uint64)
        for _ in range(self.rounds):
            p, q = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
            c0, c1 = q >> SHIFT ^ c1 ^ np.uint64(k0), q & LOW
            c2, c3 = p >> SHIFT ^ c3 ^ np.uint64(k1), p & LOW
            k0, k1 = self.next_key(k0, k1)
        return np.stack([c0, c1, c2, c3], axis=1).astype(np.uint32)

    def uniforms(self, seed: int, stream: int, sample: int, n: int) -> Array:
        """NF4-11.3."""
        words = self.block_words(self.drawn(seed, stream, sample, UNIFORM, -(-n // 4)))
        return self.fractions(words[:n])

    def mask(self, seed: int, stream: int, sample: int, n: int, p: float) -> Array:
        """1 where an element is kept, uint8 [n] (NF4-11.4)."""
        threshold = self.threshold(p)
        lanes = self.lanes(self.block_words(self.drawn(seed, stream, sample, DROPOUT, -(-n // 8))))
        return self.keeps(lanes[:n], threshold).astype(np.uint8)

    def ordered(self, seed: int, epoch: int, n: int) -> Array:
        """The permutation of an epoch, uint32 [n] (NF4-11.5)."""
        words = self.drawn(seed, 0, epoch, PERMUTATION, -(-n // 2))
        entries = self.entries(words.astype(np.uint64).reshape(-1, 2)[:n])
        return np.argsort(entries, kind="stable").astype(np.uint32)

    # Steps: the LoRA layer (chapter 9)

    def initial_bound(self, in_features: int) -> np.float32:
        """NF4-9.3."""
        return np.float32(1 / math.sqrt(in_features))

    def initial(self, u: Array, bound: np.float32, dtype: np.dtype[Any]) -> Array:
        """A of uniforms (NF4-9.3)."""
        return self.narrowed(self.kept((u * np.float32(2) - np.float32(1)) * bound), dtype)

    def scale(self, rank: int, alpha: float, rslora: bool) -> float:
        """s of NF4-9.1."""
        return alpha / math.sqrt(rank) if rslora else alpha / rank

    def applied(self, scale: float) -> np.float32:
        """s as the elements are multiplied by it (NF4-9.2, NF4-8.8)."""
        return np.float32(scale)

    def weight_matrix(self, flat: Array, shape: list[int]) -> Array:
        """W [out, in] of its elements (NF4-9.2)."""
        return flat.reshape(shape)

    def layer_dtype(self, dtype: str) -> str:
        """What the weight of a layer is decoded to (NF4-9.2)."""
        return dtype

    def factor(self, flat: Array, rows: int, columns: int) -> Array:
        """A [rank, in] or B [out, rank] of its elements (NF4-9.1)."""
        return flat.reshape(rows, columns)

    def share(self, p: float) -> float:
        """1 - q, what a kept element is divided by (NF4-9.4)."""
        return 1 - self.threshold(p) / 65536

    def check_sequences(self, lengths: list[int]) -> None:
        """There is a sequence, and each has a row (NF4-9.2, NF4-15.1, NF4-15.2)."""
        if min(lengths, default=0) < 1:
            raise InputError(f"sequences of {lengths} rows; there must be one, and a row in each")

    def sequence_mask(
        self,
        draw: tuple[int, int],
        samples: list[int],
        lengths: list[int],
        position: int,
        columns: int,
        p: float,
    ) -> Array:
        """The mask of one of the packed sequences, under a seed and stream (NF4-9.4)."""
        return self.mask(*draw, samples[position], lengths[position] * columns, p)

    def projected(self, z: Array) -> Array:
        """Z as it goes on (NF4-9.2)."""
        return z

    def weight_input(self, x: Array, keep: Array) -> Array:
        """What W is applied to (NF4-9.2)."""
        return x

    def input_mask(self, keep: Array) -> Array:
        """What the gradient of the adapter's input is multiplied by (NF4-9.5)."""
        return keep

    def biased(self, y: Array, bias: Array) -> Array:
        """NF4-9.2."""
        return y + bias

    def merged(self, weight: Array, delta: Array) -> Array:
        """W + scale (B A), rounded once to the dtype of W (NF4-8.8)."""
        return self.narrowed(self.widened(weight) + delta, weight.dtype)

    # Steps: AdamW and the training step (chapter 10)

    def check_rates(self, lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
        """NF4-10.2."""
        if not all(0 <= beta < 1 for beta in betas):
            raise InputError(f"betas are {betas}; they must be at least 0 and below 1")
        if not all(0 <= x < math.inf for x in (lr, eps, weight_decay)):
            raise InputError(f"rate {lr}, eps {eps} or decay {weight_decay} is out of range")

    def decays(self, shape: list[int]) -> bool:
        """Whether weight decay acts on an array (NF4-10.2)."""
        return len(shape) >= 2

    def power(self, beta: float, t: int) -> float:
        """beta^t as a running product (NF4-10.3)."""
        product = 1.0
        for _ in range(t):
            product *= beta
        return product

    def corrections(self, beta1: float, beta2: float, t: int) -> tuple[float, float]:
        """1 - P1 and 1 - P2 of NF4-10.3."""
        return 1 - self.power(beta1, t), 1 - self.power(beta2, t)

    def scalars(self, lr: float, betas: tuple[float, float], eps: float, decay: float, t: int) -> Scalars:
        """NF4-10.3, in float64, each rounded once."""
        correction1, correction2 = self.corrections(*betas, t)
        step, root = lr / correction1, math.sqrt(correction2)
        doubles = (step, root, 1 - lr * decay, 1 - betas[0], betas[1], 1 - betas[1], eps)
        return Scalars(*(np.float32(x) for x in doubles))

    def decayed_gradient(self, g: Array, p: Array, decay: float) -> tuple[Array, float]:
        """The gradient that the states see, without weight decay, and the decay that is left (NF4-10.4)."""
        return g, decay

    def first_moment(self, m: Array, g: Array, c: Scalars) -> Array:
        """Step 1 of NF4-10.4."""
        return self.multiply_add(c.rest1, self.kept(g - m), m)

    def second_moment(self, v: Array, g: Array, c: Scalars) -> Array:
        """Step 2 of NF4-10.4."""
        return self.multiply_add(c.rest2, self.kept(g * g), self.kept(c.beta2 * v))

    def divisor(self, v: Array, c: Scalars) -> Array:
        """Step 3 of NF4-10.4."""
        return self.kept(self.kept(self.kept(np.sqrt(v)) / c.root) + c.eps)

    def update(self, m: Array, d: Array, c: Scalars) -> Array:
        """Step 4 of NF4-10.4."""
        return self.kept(c.step * self.kept(m / d))

    def moved(self, p: Array, u: Array, c: Scalars, dtype: np.dtype[Any]) -> Array:
        """Step 5 of NF4-10.4, of a parameter of dtype."""
        return self.multiply_add(c.decay, p, -u)

    def stored_state(self, state: Array, dtype: str) -> Array:
        """m or v as it is kept beside a parameter of dtype (NF4-10.1)."""
        return state

    def warm(self, step: int, warmup: int) -> float:
        """f in the warm-up (NF4-10.6)."""
        return step / warmup

    def fall_start(self, warmup: int) -> int:
        """The step from which a schedule falls (NF4-10.6)."""
        return warmup

    def span(self, steps: int, start: int) -> float:
        """The steps that it falls over (NF4-10.6)."""
        return max(1, steps - start)

    def floor(self, share: float) -> float:
        """A schedule's factor, which ends at 0 (NF4-10.6)."""
        return max(0.0, share)

    def norm(self, gradients: dict[str, Array]) -> float:
        """NF4-10.7."""
        return math.sqrt(sum(float(np.sum(g.astype(np.float64) ** 2)) for _, g in sorted(gradients.items())))

    def clip_factors(self, gradients: dict[str, Array], max_norm: float) -> dict[str, float]:
        """c of NF4-10.7, the same for every array."""
        return dict.fromkeys(gradients, self.clip_factor(self.norm(gradients), max_norm))

    def clip_factor(self, norm: float, max_norm: float) -> float:
        """c of NF4-10.7, or 1 where nothing is clipped."""
        return min(1.0, max_norm / (norm + 1e-6)) if max_norm > 0 else 1.0

    def order_by_length(self, lengths: Array) -> Array:
        """Longest first, ties as they stand (NF4-10.8)."""
        return np.argsort(-lengths, kind="stable")

    def run_length(self, examples: int, batch: int) -> int:
        """The entries that are sorted together (NF4-10.8)."""
        return RUN * batch

    def held_out_epoch(self) -> int:
        """NF4-10.8."""
        return SPLIT_EPOCH

    def held_out_count(self, examples: int) -> int:
        """NF4-10.8."""
        return max(1, examples // 10)

    def target_count(self, targets: Array) -> int:
        """What the loss is divided by (NF4-10.9)."""
        return int(np.sum(targets != IGNORED))

    def shares(self, parts: list[int], targets: Array) -> Array:
        """The weight of each position in the loss (NF4-10.9), 0 where there is no target."""
        count = self.target_count(targets)
        if count < 1:
            raise InputError("there is no target")
        share: Array = (targets != IGNORED) / count
        return share

    def shifted(self, rows: Array) -> Array:
        """What is exponentiated: logits less the greatest of their row (NF4-10.9)."""
        lower: Array = rows - rows.max(axis=1, keepdims=True)
        return lower

    def normal_uniform(self, u: Array) -> Array:
        """What the logarithm of NF4-10.10 is taken of."""
        return 1 - u

    def paired(self, cosines: Array, sines: Array) -> Array:
        """The order of the numbers of NF4-10.10."""
        return np.concatenate([cosines, sines])

    # Operations

    def philox(self, counter: Array, key: Array) -> Outputs:
        """NF4-11.1."""
        return {"words": self.philox_blocks(counter.reshape(-1, 4), int(key[0]), int(key[1])).reshape(-1)}

    def stream(self, name: str) -> Outputs:
        """NF4-11.2."""
        return {"stream": np.array([self.hashed(self.name_bytes(name))], np.uint32)}

    def uniform(self, seed: Array, stream: Array, sample: Array, n: int) -> Outputs:
        """NF4-11.3."""
        return {"y": self.uniforms(int(seed[0]), int(stream[0]), int(sample[0]), self.whole("n", n))}

    def keep_mask(self, seed: Array, stream: Array, sample: Array, n: int, p: Array) -> Outputs:
        """NF4-11.4."""
        key = int(seed[0]), int(stream[0]), int(sample[0])
        return {"mask": self.mask(*key, self.whole("n", n), float(p[0]))}

    def permutation(self, seed: Array, epoch: Array, n: int) -> Outputs:
        """NF4-11.5."""
        return {"order": self.ordered(int(seed[0]), self.epoch_sample(int(epoch[0])), self.whole("n", n))}

    def init_adapter(self, seed: Array, name: str, in_features: int, rank: int, dtype: str) -> Outputs:
        """A (NF4-9.3)."""
        self.check_dtype(dtype, ADAPTER_DTYPES)
        check_positive("rank", rank)
        check_positive("in_features", in_features)
        u = self.uniforms(int(seed[0]), self.hashed(self.name_bytes(name)), 0, rank * in_features)
        return {"A": self.initial(u, self.initial_bound(in_features), dtype_of(dtype))}

    def init_matrix(self, seed: Array, name: str, n: int) -> Outputs:
        """NF4-10.10."""
        n = self.whole("n", n)
        half = -(-n // 2)
        u = self.uniforms(int(seed[0]), self.hashed(self.name_bytes(name)), 0, 2 * half).astype(np.float64)
        with np.errstate(all="ignore"):
            radius = 0.02 * np.sqrt(-2 * np.log(self.normal_uniform(u[:half])))
        angle = 2 * np.pi * u[half:]
        y = self.paired(radius * np.cos(angle), radius * np.sin(angle))[:n]
        return {"y": y.astype(np.float32)}

    def lora_forward(self, codes: Array, absmax: Array, **layer: Any) -> Outputs:
        """y [T, out] (NF4-9.2)."""
        return {"y": self._forward(self._weight(codes, absmax, **layer), **layer)}

    def lora_backward(self, codes: Array, absmax: Array, dout: Array, **layer: Any) -> Outputs:
        """dx, dA and dB (NF4-9.5)."""
        weight = self._weight(codes, absmax, **layer)
        if "bias" in layer:
            self.fitting("bias", layer["bias"], len(weight))
        return self._backward(weight, dout, **layer)

    def _weight(
        self,
        codes: Array,
        absmax: Array,
        shape: list[int],
        dtype: str,
        block_size: int,
        codebook: str,
        **_: Any,
    ) -> Array:
        """The weight, widened, [out, in] (NF4-9.2)."""
        if len(shape) != 2:
            raise InputError(f"a weight of shape {shape} must have two dimensions")
        self.check_dtype(dtype)
        decoded = self.dequantize(codes, absmax, shape, self.layer_dtype(dtype), block_size, codebook)
        return self.weight_matrix(self.widened(decoded["y"]), shape)

    def _factors(
        self,
        x: Array,
        A: Array,
        B: Array,
        adapter_dtype: str,
        rank: int,
        alpha: Array,
        rslora: bool,
        dropout: Array,
        seed: Array,
        stream: Array,
        lengths: list[int],
        samples: list[int],
        shape: list[int],
        **_: Any,
    ) -> tuple[Array, Array, Array, Array, np.float32]:
        """x [T, in], what D multiplies it by [T, in], A [rank, in], B [out, rank] and the scale."""
        self.check_dtype(adapter_dtype, ADAPTER_DTYPES)
        check_positive("rank", rank)
        check_positive("in", shape[1])
        p, columns = float(dropout[0]), shape[1]
        if not math.isfinite(alpha[0]):
            raise InputError(f"alpha is {alpha[0]}; it must be finite")
        self.check_sequences(lengths)
        samples = [self.whole("sample", sample) for sample in samples]
        if len(lengths) != len(samples) or sum(lengths) * columns != x.size:
            raise InputError(f"sequences of {lengths} rows with samples {samples} are not those of x")
        draw = int(seed[0]), int(stream[0])
        masks = [
            self.sequence_mask(draw, samples, lengths, position, columns, p)
            for position in range(len(lengths))
        ]
        kept = np.concatenate([np.empty(0, np.uint8), *masks]).reshape(-1, columns)
        keep = (kept / self.share(p)).astype(np.float32)
        a = self.factor(self.widened(A), rank, columns)
        b = self.factor(self.widened(B), shape[0], rank)
        return x.reshape(-1, columns), keep, a, b, self.applied(self.scale(rank, float(alpha[0]), rslora))

    def _forward(self, weight: Array, bias: Array | None = None, **layer: Any) -> Array:
        """y [T, out] (NF4-9.2)."""
        x, keep, a, b, scale = self._factors(**layer)
        z = self.projected((x * keep) @ a.T)
        y = self.weight_input(x, keep) @ weight.T + scale * z @ b.T
        return y if bias is None else self.biased(y, self.fitting("bias", bias, len(weight)))

    def _backward(self, weight: Array, dout: Array, **layer: Any) -> Outputs:
        """dx, dA and dB (NF4-9.5)."""
        x, keep, a, b, scale = self._factors(**layer)
        g = dout.reshape(-1, len(weight))
        dz = scale * (g @ b)
        dropped = x * keep
        z = self.projected(dropped @ a.T)
        return {
            "dx": g @ weight + self.input_mask(keep) * (dz @ a),
            "dA": dz.T @ dropped,
            "dB": scale * (g.T @ z),
        }

    def adamw(
        self,
        p: Array,
        dtype: str,
        g: Array,
        m: Array,
        v: Array,
        shape: list[int],
        updates: int,
        lr: Array,
        beta1: Array,
        beta2: Array,
        eps: Array,
        weight_decay: Array,
    ) -> Outputs:
        """p, m and v after an update (NF4-10.1 to NF4-10.5)."""
        self.check_dtype(dtype, ADAPTER_DTYPES)
        rate, betas, decay = float(lr[0]), (float(beta1[0]), float(beta2[0])), float(weight_decay[0])
        self.check_rates(rate, betas, float(eps[0]), decay)
        decay = decay if self.decays(shape) else 0.0
        updates = self.whole("updates", updates)
        for what, array in (("p", p), ("g", g), ("m", m), ("v", v)):
            self.fitting(what, array, self.counted(shape))
        with np.errstate(all="ignore"):
            wide = self.widened(p)
            g, decay = self.decayed_gradient(self.kept(g), wide, decay)
            c = self.scalars(rate, betas, float(eps[0]), decay, updates + 1)
            m, v = self.first_moment(self.kept(m), g, c), self.second_moment(self.kept(v), g, c)
            u = self.update(m, self.divisor(v, c), c)
            wide = self.moved(wide, u, c, dtype_of(dtype))
        states = {"m": self.stored_state(m, dtype), "v": self.stored_state(v, dtype)}
        return {"p": self.narrowed(wide, dtype_of(dtype)), **states}

    def learning_rate(self, step: int, steps: int, warmup: int, schedule: str, lr: Array) -> Outputs:
        """NF4-10.6."""
        if schedule not in SCHEDULES:
            raise InputError(f"there is no schedule {schedule!r}; choose one of {', '.join(SCHEDULES)}")
        step, steps, warmup = (self.whole("step", number) for number in (step, steps, warmup))
        start = self.fall_start(warmup)
        span = self.span(steps, start)
        with np.errstate(all="ignore"):
            if step < warmup:
                share = self.warm(step, warmup)
            elif schedule == "linear":
                share = self.floor((steps - step) / span)
            elif schedule == "cosine":
                share = self.floor((1 + np.cos(np.pi * ((step - start) / span))) / 2)
            else:
                share = 1.0
        return {"lr": np.array([float(lr[0]) * share])}

    def clip(self, gradients: dict[str, Array], max_norm: Array) -> Outputs:
        """The norm and the clipped gradients (NF4-10.7)."""
        most = float(max_norm[0])
        if not most >= 0:
            raise InputError(f"max_norm is {most}; it must be at least 0")
        with np.errstate(all="ignore"):
            for name, g in gradients.items():
                self.check_finite(f"gradient {name!r}: element", g.reshape(-1))
            factors = self.clip_factors(gradients, most)
            clipped = {
                name: g if factors[name] == 1 else g * g.dtype.type(factors[name])
                for name, g in gradients.items()
            }
            return {"norm": np.array([self.norm(gradients)]), "gradients": clipped}

    def example_order(
        self, seed: Array, examples: int, first: int, count: int, batch: int, lengths: list[int] | None = None
    ) -> Outputs:
        """NF4-10.8."""
        check_positive("examples", examples)
        first, count, batch = (self.whole("number", number) for number in (first, count, batch))
        numbers = range(first, first + count)
        epochs = {
            epoch: self._epoch(int(seed[0]), epoch, examples, batch, lengths)
            for epoch in {n // examples for n in numbers}
        }
        return {"order": np.array([epochs[n // examples][n % examples] for n in numbers], np.uint32)}

    def _epoch(self, seed: int, epoch: int, examples: int, batch: int, lengths: list[int] | None) -> Array:
        order = self.ordered(seed, self.epoch_sample(epoch), examples)
        if lengths is None:
            return order
        size = np.array([self.whole("length", length) for length in lengths])
        span = self.run_length(examples, batch)
        runs = [order[start : start + span] for start in range(0, examples, span)]
        return np.concatenate([run[self.order_by_length(size[run])] for run in runs])

    def held_out(self, seed: Array, examples: int) -> Outputs:
        """NF4-10.8."""
        if examples < 2:
            raise InputError(f"{examples} examples can't be split; there must be two")
        order = self.ordered(int(seed[0]), self.held_out_epoch(), examples)
        return {"order": order[: self.held_out_count(examples)]}

    def loss(self, logits: Array, vocabulary: int, targets: list[int], parts: list[int]) -> Outputs:
        """The loss and its gradient (NF4-10.9)."""
        rows, wanted = logits.reshape(-1, vocabulary), np.array(targets)
        if len(rows) != len(wanted) or sum(parts) != len(wanted):
            raise InputError(f"{len(rows)} rows, {len(wanted)} targets and parts of {parts} do not fit")
        learned = wanted != IGNORED
        if np.any(learned & ((wanted < 0) | (wanted >= vocabulary))):
            raise InputError(f"a target lies outside the vocabulary of {vocabulary}")
        share = self.shares(parts, wanted)
        at = np.arange(len(wanted)), np.where(learned, wanted, 0)
        with np.errstate(all="ignore"):
            shifted = self.shifted(rows)
            powers = np.exp(shifted)
            norms = powers.sum(axis=1, keepdims=True)
            lost = np.log(norms[:, 0].astype(np.float64)) - shifted[at]
            total = np.sum((share * lost)[learned])
            gradient = powers / norms
        self.check_finite("loss", np.array([total]))
        gradient[at] -= 1
        dlogits = np.where(learned[:, None], share[:, None] * gradient, 0)
        return {"loss": np.array([total]), "dlogits": dlogits.astype(np.float32)}

    def lora_step(
        self,
        weight: Array,
        double_quant: bool,
        targets: list[int],
        max_norm: Array,
        lr: Array,
        beta1: Array,
        beta2: Array,
        eps: Array,
        weight_decay: Array,
        **layer: Any,
    ) -> Outputs:
        """Quantize, forward, loss, backward, clip and update (NF4-3, NF4-9, NF4-10)."""
        shaped = (weight.reshape(layer["shape"]), layer["block_size"], layer["codebook"])
        q = self.quantize_double(*shaped) if double_quant else self.quantize(*shaped)
        codes = q.pop("codes")
        absmax = self._absmax(**q, map=DYNAMIC_MAP) if double_quant else q["absmax"]
        decoded = self._weight(codes, absmax, **layer)
        logits = self._forward(decoded, **layer)
        loss = self.loss(logits.reshape(-1), layer["shape"][0], targets, [len(logits)])
        gradients = self._backward(decoded, loss["dlogits"], **layer)
        clipped = self.clip({"A": gradients["dA"], "B": gradients["dB"]}, max_norm)
        rates = {"lr": lr, "beta1": beta1, "beta2": beta2, "eps": eps, "weight_decay": weight_decay}
        updated = {}
        for name, g in clipped["gradients"].items():
            zeros = np.zeros(g.size, np.float32)
            arrays = {"p": layer[name], "g": g.reshape(-1), "m": zeros, "v": zeros}
            after = self.adamw(
                **arrays, dtype=layer["adapter_dtype"], shape=list(g.shape), updates=0, **rates
            )
            updated[name] = after["p"]
        return {"loss": loss["loss"], **gradients, "norm": clipped["norm"], **updated}

    def merge(
        self, weight: Array, shape: list[int], dtype: str, A: Array, B: Array, rank: int, scale: Array
    ) -> Outputs:
        """NF4-8.8."""
        self.check_dtype(dtype)
        check_positive("rank", rank)
        weight = self.fitting("weight", weight, self.counted(shape))
        product = self.factor(B, shape[0], rank) @ self.factor(A, rank, shape[1])
        delta = self.applied(float(scale[0])) * product
        with np.errstate(all="ignore"):
            y = self.merged(weight.reshape(shape), delta)
        self.check_finite("merged element", y.reshape(-1))
        return {"y": y}


def check_positive(what: str, count: int) -> None:
    """InputError unless count is at least 1."""
    if count < 1:
        raise InputError(f"{what} is {count}; it must be at least 1")
