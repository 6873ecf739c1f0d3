"""A correct port of chapter 15 in plain NumPy, a method a step, so that a subclass can do one wrong."""

import json
import math
from collections.abc import Mapping
from decimal import Context, Decimal, DecimalException, localcontext
from fractions import Fraction
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from nf4.conform.bugs.plain_codec import Array, Outputs
from nf4.conform.bugs.plain_exact import PlainExact
from nf4.conform.bugs.plain_training import ADAPTER_DTYPES, IGNORED, SCHEDULES
from nf4.errors import InputError
from nf4.floats import FLOAT32, round_to_float32
from nf4.model.config import LlamaConfig, RopeConfig
from nf4.model.llama import check_params
from nf4.nested import DYNAMIC_MAP

DIGITS = Context(prec=60)
PI = Decimal("3.14159265358979323846264338327950288419716939937510582097494")
MOST = 1 << 16  # NF4-15.3
ATTENTION, MLP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
TARGETS = (*ATTENTION, "o_proj", *MLP, "down_proj")  # NF4-9.6


class Adapter(NamedTuple):
    """A [rank, in] and B [out, rank] widened, c, what D keeps [T, in], and A's and B's name without them."""

    a: Array
    b: Array
    c: np.float32
    keep: Array
    module: str


class Linear(NamedTuple):
    """W [out, in] widened, its bias [out] and its adapter, if it has them."""

    weight: Array
    bias: Array | None
    adapter: Adapter | None


class Heads(NamedTuple):
    """Key-value heads, query heads to each, their elements; the lengths of the sequences; the window."""

    kv: int
    group: int
    dim: int
    lengths: list[int]
    window: int | None


class PlainStep(PlainExact):
    """The operations of chapter 15 (NF4-13.3), each from steps that carry out one sentence of it."""

    # Steps: linear layers (NF4-15.1)

    def low_rank_factor(self, scale: float, p: float) -> np.float32:
        """c: s and the division by what is kept (NF4-15.1)."""
        return self.applied(scale * (1 / self.share(p)))

    def dropped(self, x: Array, keep: Array) -> Array:
        """D: +0 where dropout drops, keep [T, in] being 0 there and elsewhere 1 / (1 - q) (NF4-15.1)."""
        return np.where(keep > 0, x, np.float32(0))

    def z_of(self, product: Array, c: np.float32) -> Array:
        """Z (NF4-15.1)."""
        return self.projected(self.kept(c * product))

    def added_term(self, product: Array, c: np.float32) -> Array:
        """What the adapter adds to Y (NF4-15.1)."""
        return product

    def adapter_gradient(self, g: Array, c: np.float32) -> Array:
        """The gradient of what the adapter adds (NF4-15.1)."""
        return g

    def e_of(self, product: Array, c: np.float32) -> Array:
        """E (NF4-15.1)."""
        return self.kept(c * product)

    def output(self, base: Array, bias: Array | None, term: Array | None, residual: Array | None) -> Array:
        """Y, and what is added to it where a residual follows (NF4-15.1, NF4-15.4)."""
        y = base if bias is None else self.biased(base, bias)
        y = y if term is None else self.kept(y + term)
        return y if residual is None else self.kept(y + residual)

    def by_sequence(self, a: Array, b: Array, lengths: list[int]) -> Array:
        """The products of aᵀ and b over the rows of each sequence (NF4-15.1)."""
        cuts = np.cumsum(lengths)[:-1]
        parts = zip(np.split(a, cuts), np.split(b, cuts), strict=True)
        return np.stack([self.times(left.T, right) for left, right in parts])

    def input_gradients(self, gradients: list[Array], weights: list[Array], terms: list[Array]) -> Array:
        """dX of layers that share their X; terms: what their adapters add, 0 without one (NF4-15.1)."""
        return self.shared_sum(
            [
                self.kept(self.times(g, weight) + term)
                for g, weight, term in zip(gradients, weights, terms, strict=True)
            ]
        )

    def shared_sum(self, parts: list[Array]) -> Array:
        """The sum of the dX of layers that share their X, from the first on (NF4-15.1)."""
        total = parts[0]
        for part in parts[1:]:
            total = self.kept(total + part)
        return total

    # Steps: attention (NF4-15.2)

    def spans(self, lengths: list[int]) -> list[slice]:
        """The rows of each sequence (NF4-15.2)."""
        stops = np.cumsum(lengths)
        return [slice(stop - n, stop) for n, stop in zip(lengths, stops, strict=True)]

    def query_heads(self, rows: Array, heads: Heads) -> Array:
        """Rows of query heads [n, width] as [kv, group, n, dim] (NF4-15.2)."""
        return rows.reshape(-1, heads.kv, heads.group, heads.dim).transpose(1, 2, 0, 3)

    def query_rows(self, by_head: Array) -> Array:
        """query_heads undone (NF4-15.2)."""
        return by_head.transpose(2, 0, 1, 3).reshape(by_head.shape[2], -1)

    def hidden(self, n: int, window: int | None) -> Array:
        """Where a key is hidden from a query, [n, n] (NF4-15.2)."""
        behind = np.arange(n)[:, None] - np.arange(n)
        return (behind < 0) | (behind >= (n if window is None else window))

    def score_scale(self, dim: int) -> np.float32:
        """c (NF4-15.2)."""
        return np.float32(1 / np.sqrt(np.float64(dim)))

    def scored_queries(self, queries: Array, c: np.float32) -> Array:
        """What the keys are multiplied with (NF4-15.2)."""
        return queries

    def scores(self, product: Array, c: np.float32) -> Array:
        """z before it is masked (NF4-15.2)."""
        return self.kept(c * product)

    def masked(self, z: Array, hidden: Array) -> Array:
        """z with -infinity where a key is hidden (NF4-15.2)."""
        return np.where(hidden, np.float32(-np.inf), z)

    def score_gradient(self, f: Array, c: np.float32) -> Array:
        """e (NF4-15.2)."""
        return self.kept(c * f)

    def query_gradient(self, product: Array, c: np.float32) -> Array:
        """dQ of its product with e (NF4-15.2)."""
        return product

    def key_gradient(self, product: Array, c: np.float32) -> Array:
        """dK of its product with e (NF4-15.2)."""
        return product

    def over_keys(self, rows: Array, keys: Array, hidden: Array) -> Array:
        """The product of p or e [g n, n] and V or K [n, d] (NF4-15.2)."""
        return self.times(rows, keys)

    def over_queries(self, rows: Array, queries: Array, group: int) -> Array:
        """The product of pᵀ or eᵀ and G or Q [g n, d] (NF4-15.2)."""
        return self.times(rows.T, queries)

    def weights(self, queries: Array, keys: Array, hidden: Array, c: np.float32) -> Array:
        """p [g n, n] of one key-value head (NF4-15.2)."""
        z = self.scores(self.times(self.scored_queries(queries, c), keys.T), c)
        z = self.masked(z, np.tile(hidden, (len(z) // len(hidden), 1)))
        p: Array = self.exact_softmax(z.reshape(-1), z.shape[1])["p"]
        return p

    def attended(self, q: Array, k: Array, v: Array, heads: Heads) -> Array:
        """The output of attention [T, kv group dim] (NF4-15.2)."""
        y, c = np.empty_like(q), self.score_scale(heads.dim)
        for span in self.spans(heads.lengths):
            queries = self.query_heads(q[span], heads)
            keys, values = (x[span].reshape(-1, heads.kv, heads.dim) for x in (k, v))
            hidden = self.hidden(len(keys), heads.window)
            mixed = np.empty_like(queries)
            for h in range(heads.kv):
                p = self.weights(queries[h].reshape(-1, heads.dim), keys[:, h], hidden, c)
                mixed[h] = self.over_keys(p, values[:, h], hidden).reshape(queries[h].shape)
            y[span] = self.query_rows(mixed)
        return y

    def attention_gradients(
        self, dout: Array, q: Array, k: Array, v: Array, heads: Heads
    ) -> tuple[Array, Array, Array]:
        """dQ, dK and dV (NF4-15.2)."""
        dq, dk, dv, c = np.empty_like(q), np.empty_like(k), np.empty_like(v), self.score_scale(heads.dim)
        for span in self.spans(heads.lengths):
            queries, douts = (self.query_heads(x[span], heads) for x in (q, dout))
            keys, values = (x[span].reshape(-1, heads.kv, heads.dim) for x in (k, v))
            dkeys, dvalues = (x[span].reshape(-1, heads.kv, heads.dim) for x in (dk, dv))
            hidden = self.hidden(len(keys), heads.window)
            dqueries = np.empty_like(queries)
            for h in range(heads.kv):
                own, g = (x[h].reshape(-1, heads.dim) for x in (queries, douts))
                p = self.weights(own, keys[:, h], hidden, c)
                dvalues[:, h] = self.over_queries(p, g, heads.group)
                dp = self.times(g, values[:, h].T)
                f = self.exact_softmax_backward(dp.reshape(-1), p.reshape(-1), p.shape[1])["dz"]
                e = self.score_gradient(f.reshape(p.shape), c)
                dqueries[h] = self.query_gradient(self.over_keys(e, keys[:, h], hidden), c).reshape(
                    queries[h].shape
                )
                dkeys[:, h] = self.key_gradient(
                    self.over_queries(e, self.scored_queries(own, c), heads.group), c
                )
            dq[span] = self.query_rows(dqueries)
        return dq, dk, dv

    # Steps: cosine and sine (NF4-15.3)

    def rope_of(self, config: LlamaConfig) -> RopeConfig:
        """The rotation that config.json asks for (NF4-15.3)."""
        return config.rope

    def rope_length(self, n: int, positions: int) -> int:
        """The length that a rotation is for (NF4-15.3)."""
        return n

    def growth(self, factor: float, n: int, positions: int) -> Decimal:
        """What theta grows by under dynamic, before the power (NF4-15.3)."""
        return 1 + Decimal(factor) * (n - positions) / positions

    def frequency(self, angle: Decimal) -> Decimal:
        """φ, a real number (NF4-15.3)."""
        return angle

    def angle(self, position: int, frequency: Decimal) -> Decimal:
        """t φ, a real number (NF4-15.3)."""
        return position * frequency

    def entry(self, factor: Decimal, cosine: Decimal) -> np.float32:
        """RN(m cos) (NF4-15.3)."""
        return nearest(factor * cosine)

    def table(self, config: LlamaConfig, n: int) -> tuple[Array, Array]:
        """cos and sin [n, d / 2] of a sequence of n (NF4-15.3)."""
        with localcontext(DIGITS):
            rope, positions = self.rope_of(config), config.max_position_embeddings
            try:
                length = self.rope_length(n, positions)
                growth = self.growth(rope.factor, max(length, positions), positions)
                angles, factor = rotation(rope, config.head_dim, growth, length)
            except DecimalException:
                raise InputError(f"the rotation of {rope} divides by 0") from None
            if max(*angles, factor) > MOST:
                raise InputError(f"the rotation of {rope} has an angle or a factor above {MOST}")
            pairs = [
                [cosine_and_sine(self.angle(t, self.frequency(angle))) for angle in angles] for t in range(n)
            ]
            both = [[[self.entry(factor, x) for x in pair] for pair in row] for row in pairs]
        found = np.array(both, np.float32).reshape(n, len(angles), 2)
        return found[..., 0], found[..., 1]

    def tables(self, config: LlamaConfig, lengths: list[int]) -> tuple[Array, Array]:
        """cos and sin [T, d / 2] of packed sequences, each from position 0 (NF4-15.3)."""
        cos, sin = zip(*(self.table(config, n) for n in lengths), strict=True)
        return np.concatenate(cos), np.concatenate(sin)

    # Steps: the model (NF4-15.4, NF4-15.5)

    def layer_window(self, config: LlamaConfig, index: int) -> int | None:
        """The window of a layer (NF4-15.4)."""
        return config.sliding_window[index]

    def head_norm(self, x: Array, weight: Array, eps: float) -> tuple[Array, Array]:
        """Norm and 1 / rms of each head of x [T, heads dim] (NF4-15.4)."""
        y, rstd = self.normed(x.reshape(-1, weight.size), weight, eps)
        return y.reshape(x.shape), rstd

    def prepared(
        self, x: Array, weight: Array | None, eps: float, cos: Array, sin: Array
    ) -> tuple[Array, Array, Array]:
        """q or k through its norm, if there is one, and turned; the norm's input and 1 / rms (NF4-15.4)."""
        y, rstd = (x, x[:0]) if weight is None else self.head_norm(x, weight, eps)
        return self.turned(y, cos, sin), x, rstd

    def prepared_back(
        self, d: Array, raw: Array, rstd: Array, weight: Array | None, cos: Array, sin: Array
    ) -> Array:
        """The gradient of prepared's x (NF4-15.4)."""
        d = self.turned(d, cos, sin, inverse=True)
        return d if weight is None else self.normed_back(d, raw, self.head_weight(weight, raw), rstd)

    def head_weight(self, weight: Array, x: Array) -> Array:
        """The weights of the rows that head_norm takes of x (NF4-15.4)."""
        return weight

    def normed_back(self, d: Array, x: Array, weight: Array, rstd: Array) -> Array:
        """The gradient of a norm's x, in the shape of x (NF4-14.9)."""
        dx: Array = self.exact_rms_norm_backward(d.reshape(-1), x.reshape(-1), weight, rstd)["dx"]
        return dx.reshape(x.shape)

    def normed(self, x: Array, weight: Array, eps: float) -> tuple[Array, Array]:
        """Norm and 1 / rms of rows (NF4-14.9)."""
        found = self.exact_rms_norm(x.reshape(-1), weight, np.array([eps]))
        return found["y"], found["rstd"]

    def turned(self, x: Array, cos: Array, sin: Array, inverse: bool = False) -> Array:
        """Heads turned (NF4-14.11)."""
        y: Array = self.exact_rotate(
            x.reshape(-1), cos.reshape(-1), sin.reshape(-1), 2 * cos.shape[1], inverse
        )["y"]
        return y.reshape(x.shape)

    def row_scales(self, shares: Array) -> Array:
        """s by row that has a target (NF4-14.10, NF4-15.5)."""
        return shares.astype(np.float32)[:, None]

    def finished(self, gradient: Array, count: int) -> Array:
        """A gradient of the step, once it is summed (NF4-15.6)."""
        return gradient

    # Steps: the update (NF4-15.6 to NF4-15.8)

    def added(self, gradients: Array) -> Array:
        """The sum of gradients [N, ...] (NF4-15.6)."""
        if len(gradients) == 1:
            first: Array = gradients[0]
            return first
        half = 1 << (len(gradients) - 1).bit_length() - 1
        return self.kept(self.added(gradients[:half]) + self.added(gradients[half:]))

    def exact_norm(self, gradients: Mapping[str, Array]) -> float:
        """The norm (NF4-15.7)."""
        flats = [gradients[name].reshape(1, -1) for name in sorted(gradients)]
        squares = [self.summed(self.terms(flat, flat)) for flat in flats]
        return math.sqrt(self.summed(np.concatenate(squares)[None])[0]) if squares else 0.0

    def exact_share(self, step: int, steps: int, warmup: int, schedule: str) -> Fraction:
        """f, a real number to sixty digits (NF4-10.6, NF4-15.8)."""
        start = self.fall_start(warmup)
        span = max(1, steps - start)
        if step < warmup:
            return Fraction(step, warmup)
        if schedule == "linear":
            return max(Fraction(0), Fraction(steps - step, span))
        if schedule == "cosine":
            with localcontext(DIGITS):
                cosine = Fraction(cosine_and_sine(self.schedule_angle(step - start, span))[0])
            halves = Fraction(round(2 * cosine), 2)  # a rational cosine is a number of halves
            return (1 + (halves if abs(cosine - halves) < Fraction(1, 10**50) else cosine)) / 2
        return Fraction(1)

    def schedule_angle(self, done: int, span: int) -> Decimal:
        """What the cosine of a schedule is taken of (NF4-10.6)."""
        return PI * done / span

    def exact_rate(self, lr: float, share: Fraction) -> float:
        """RN64 of lr f (NF4-15.8)."""
        return float(Fraction(lr) * share)

    # Operations

    def exact_linear(self, codes: Array, absmax: Array, **layer: Any) -> Outputs:
        """NF4-15.1."""
        with np.errstate(all="ignore"):
            x, linear = self._layer(codes, absmax, **layer)
            return {"y": self._linear(linear, x)[0]}

    def exact_linear_backward(self, codes: Array, absmax: Array, dout: Array, **layer: Any) -> Outputs:
        """NF4-15.1."""
        with np.errstate(all="ignore"):
            x, linear = self._layer(codes, absmax, **layer)
            g = self.fitting("dout", dout, len(x) * len(linear.weight)).reshape(len(x), -1)
            dx, found = self._linear_back([linear], [g], [self._low_rank(linear, x)], x, layer["lengths"])
        return {"dx": dx, **{f"d{side}": gradient for (_, side), gradient in found.items()}}

    def exact_attention(self, q: Array, k: Array, v: Array, **heads: Any) -> Outputs:
        """NF4-15.2."""
        with np.errstate(all="ignore"):
            return {"y": self.attended(*self._heads(heads, q, k, v))}

    def exact_attention_backward(self, dout: Array, q: Array, k: Array, v: Array, **heads: Any) -> Outputs:
        """NF4-15.2."""
        q, k, v, shape = self._heads(heads, q, k, v)
        dout = self.fitting("dout", dout, q.size).reshape(q.shape)
        with np.errstate(all="ignore"):
            found = self.attention_gradients(dout, q, k, v, shape)
        return dict(zip(("dq", "dk", "dv"), found, strict=True))

    def rotation_table(self, rope: str, head_dim: int, max_positions: int, length: int) -> Outputs:
        """NF4-15.3."""
        if length < 1:
            raise InputError(f"a sequence of {length} positions has none")
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        own = {"model_type": "llama", "head_dim": head_dim, "max_position_embeddings": max_positions}
        keys = json.loads(rope) | dict.fromkeys(sizes, 1) | own
        cos, sin = self.tables(LlamaConfig.from_dict(keys, "rope"), [length])
        return {"cos": cos, "sin": sin}

    def exact_gradient(self, gradients: Array, count: int) -> Outputs:
        """NF4-15.6."""
        if count < 1 or gradients.size % count:
            raise InputError(f"{gradients.size} elements are no {count} gradients")
        with np.errstate(all="ignore"):
            return {"sum": self.added(gradients.reshape(count, -1))}

    def exact_clip(self, gradients: dict[str, Array], max_norm: Array) -> Outputs:
        """NF4-15.7."""
        most = float(max_norm[0])
        if not most >= 0 or any(g.dtype != FLOAT32 for g in gradients.values()):
            raise InputError(f"max_norm is {most}, gradients are {[g.dtype for g in gradients.values()]}")
        with np.errstate(all="ignore"):
            norm = self.exact_norm(gradients)
            c = self.clip_factor(norm, most)
            clipped = {name: g if c == 1 else self.kept(g * np.float32(c)) for name, g in gradients.items()}
        return {"norm": np.array([norm]), "gradients": clipped}

    def exact_learning_rate(self, step: int, steps: int, warmup: int, schedule: str, lr: Array) -> Outputs:
        """NF4-15.8."""
        rate = float(lr[0])
        if schedule not in SCHEDULES or not 0 <= rate < math.inf or min(step, steps, warmup) < 0:
            raise InputError(f"no schedule {schedule!r} of step {step}, {steps} steps, {warmup}, rate {rate}")
        return {"lr": np.array([self.exact_rate(rate, self.exact_share(step, steps, warmup, schedule))])}

    def exact_step(
        self,
        config: str,
        tensors: Mapping[str, Array],
        adapters: Mapping[str, Array],
        ids: list[int],
        targets: list[int],
        lengths: list[int],
        max_norm: Array,
        lr: Array,
        beta1: Array,
        beta2: Array,
        eps: Array,
        weight_decay: Array,
        **options: Any,
    ) -> Outputs:
        """NF4-15.4 to NF4-15.9."""
        shape = LlamaConfig.from_dict(json.loads(config), "config")
        check_params(shape, tensors)
        for name, tensor in tensors.items():
            self.check_dtype(str(tensor.dtype))
            self.check_finite(name, self.widened(tensor).reshape(-1))
        wanted = np.array(targets, np.int64)
        self._check_tokens(shape.vocab_size, ids, wanted, lengths, options["samples"])
        run = _Run(self, shape, tensors, adapters, lengths, options)
        with np.errstate(all="ignore"):
            losses, by_sequence = run.gradients(np.array(ids), wanted)
            loss = self.mean_of(losses, wanted)
            count = self.target_count(wanted)
            gradients = {
                name: self.finished(self.added(found), count) for name, found in sorted(by_sequence.items())
            }
            clipped = self.exact_clip(gradients, max_norm)
        rates = {"lr": lr, "beta1": beta1, "beta2": beta2, "eps": eps, "weight_decay": weight_decay}
        updated = {}
        for name, g in clipped["gradients"].items():
            zeros = np.zeros(g.size, np.float32)
            p = adapters[name]
            arrays = {"p": p.reshape(-1), "g": g.reshape(-1), "m": zeros, "v": zeros}
            after = self.adamw(**arrays, dtype=str(p.dtype), shape=list(p.shape), updates=0, **rates)
            updated[name] = after["p"].reshape(p.shape)
        out = {"losses": losses, "loss": loss, "gradients": gradients, "norm": clipped["norm"]}
        return {**out, "adapters": updated}

    def _check_tokens(
        self, vocabulary: int, ids: list[int], wanted: Array, lengths: list[int], samples: list[int]
    ) -> None:
        if not len(ids) == len(wanted) == sum(lengths) or len(samples) != len(lengths) or min(lengths) < 1:
            raise InputError(f"{len(ids)} ids, {len(wanted)} targets, lengths {lengths}, samples {samples}")
        learned = wanted[wanted != IGNORED]
        for token in (*ids, *learned.tolist()):
            if not 0 <= token < vocabulary:
                raise InputError(f"the token {token} is not in the vocabulary of {vocabulary}")
        if not learned.size:
            raise InputError("there is no target")

    def _layer(self, codes: Array, absmax: Array, **layer: Any) -> tuple[Array, Linear]:
        """X [T, in] and the layer of an operation."""
        weight = self._weight(codes, absmax, **layer)
        x, keep, a, b, _ = self._factors(**layer)
        scale = self.scale(layer["rank"], float(layer["alpha"][0]), layer["rslora"])
        c = self.low_rank_factor(scale, float(layer["dropout"][0]))
        bias = layer.get("bias")
        bias = None if bias is None else self.fitting("bias", bias, len(weight))
        return x, Linear(weight, bias, Adapter(a, b, c, keep, ""))

    def _heads(self, fields: Mapping[str, Any], *arrays: Array) -> tuple[Array, Array, Array, Heads]:
        sizes = fields["kv_heads"], fields["group"], fields["head_dim"]
        heads = Heads(*sizes, fields["lengths"], fields.get("window"))
        self.check_sequences(heads.lengths)
        if min(*sizes, 1 if heads.window is None else heads.window) < 1:
            raise InputError(f"{heads} has a number below 1")
        rows, keys = sum(heads.lengths), heads.kv * heads.dim
        q, k, v = (
            self.fitting("heads", array, rows * columns).reshape(rows, columns)
            for array, columns in zip(arrays, (keys * heads.group, keys, keys), strict=True)
        )
        return q, k, v, heads

    def _linear(self, layer: Linear, x: Array, residual: Array | None = None) -> tuple[Array, Array | None]:
        """Y, with a residual if there is one, and Z (NF4-15.1)."""
        lora, term, z = layer.adapter, None, self._low_rank(layer, x)
        base = self.times(x if lora is None else self.weight_input(x, lora.keep), layer.weight.T)
        if lora is not None and z is not None:
            term = self.added_term(self.times(z, lora.b.T), lora.c)
        return self.output(base, layer.bias, term, residual), z

    def _low_rank(self, layer: Linear, x: Array) -> Array | None:
        """Z, which is all that backward needs of forward (NF4-15.1)."""
        lora = layer.adapter
        if lora is None:
            return None
        return self.z_of(self.times(self.dropped(x, lora.keep), lora.a.T), lora.c)

    def _linear_back(
        self,
        layers: list[Linear],
        douts: list[Array],
        zs: list[Array | None],
        x: Array,
        lengths: list[int],
        needed: bool = True,
    ) -> tuple[Array | None, dict[tuple[str, str], Array]]:
        """dX of layers that share X, if it is needed, and dA and dB by module and side (NF4-15.1)."""
        terms, found = [], {}
        for layer, g, z in zip(layers, douts, zs, strict=True):
            lora, term = layer.adapter, np.zeros_like(x)
            if lora is not None and z is not None:
                own = self.adapter_gradient(g, lora.c)
                e = self.e_of(self.times(own, lora.b), lora.c)
                found[lora.module, "A"] = self.by_sequence(e, self.dropped(x, lora.keep), lengths)
                found[lora.module, "B"] = self.by_sequence(own, z, lengths)
                if needed:
                    term = self.dropped(self.times(e, lora.a), self.input_mask(lora.keep))
            terms.append(term)
        dx = self.input_gradients(douts, [layer.weight for layer in layers], terms) if needed else None
        return dx, found


class _Run:
    """One step's forward and backward (NF4-15.4, NF4-15.5), by the steps of a port."""

    def __init__(
        self,
        port: PlainStep,
        config: LlamaConfig,
        tensors: Mapping[str, Array],
        adapters: Mapping[str, Array],
        lengths: list[int],
        options: Mapping[str, Any],
    ) -> None:
        self.port, self.config, self.lengths, self.options = port, config, lengths, options
        self.vectors = {name: port.widened(tensor) for name, tensor in tensors.items() if tensor.ndim == 1}
        self.embedding = port.widened(tensors["model.embed_tokens.weight"])
        self.head = self.embedding if config.tie_word_embeddings else port.widened(tensors["lm_head.weight"])
        sides: dict[str, dict[str, Array]] = {}
        for name, array in adapters.items():
            module, _, side = name.rpartition(".")
            sides.setdefault(module, {})[side] = array
        self.layers = []
        for index in range(config.num_hidden_layers):
            layer = {}
            for target in TARGETS:
                module = self._name(index, target)
                adapter = self._adapter(module, sides.pop(module, None), tensors[f"{module}.weight"].shape)
                bias = self.vectors.get(f"{module}.bias")
                layer[target] = Linear(self._weight(tensors[f"{module}.weight"]), bias, adapter)
            self.layers.append(layer)
        if sides or not adapters:
            raise InputError(f"adapters of {list(sides)} have no linear layer, or there are none")
        self.bottom = min(i for i, layer in enumerate(self.layers) if self._adapted(layer, TARGETS))

    def _name(self, index: int, target: str) -> str:
        block = "self_attn" if target in (*ATTENTION, "o_proj") else "mlp"
        return f"model.layers.{index}.{block}.{target}"

    def _adapted(self, layer: Mapping[str, Linear], targets: tuple[str, ...]) -> bool:
        return any(layer[target].adapter is not None for target in targets)

    def _weight(self, weight: Array) -> Array:
        """A weight quantized, decoded and widened (NF4-3, NF4-4, NF4-15.1)."""
        port, o = self.port, self.options
        quantize = port.quantize_double if o["double_quant"] else port.quantize
        q = quantize(weight, o["block_size"], o["codebook"])
        codes = q.pop("codes")
        absmax = port._absmax(**q, map=DYNAMIC_MAP) if o["double_quant"] else q["absmax"]
        kind = {"dtype": str(weight.dtype), "block_size": o["block_size"], "codebook": o["codebook"]}
        return port._weight(codes, absmax, list(weight.shape), **kind)

    def _adapter(
        self, module: str, sides: Mapping[str, Array] | None, shape: tuple[int, ...]
    ) -> Adapter | None:
        if sides is None:
            return None
        if set(sides) != {"A", "B"}:
            raise InputError(f"the adapter of {module} has {', '.join(sides)}; it must have A and B")
        A, B = sides["A"], sides["B"]
        rank = len(A) if A.ndim else 0
        if A.shape != (rank, shape[1]) or B.shape != (shape[0], rank):
            raise InputError(f"the adapter of {module} has A {A.dtype} {A.shape}, B {B.dtype} {B.shape}")
        port, o = self.port, self.options
        port.check_dtype(str(B.dtype), ADAPTER_DTYPES)
        stream = np.array([port.hashed(port.name_bytes(module))], np.uint32)
        same: dict[str, Any] = {name: o[name] for name in ("alpha", "rslora", "dropout", "seed", "samples")}
        fields: dict[str, Any] = {
            "rank": rank,
            "adapter_dtype": str(A.dtype),
            "stream": stream,
            "lengths": self.lengths,
        }
        x = np.zeros(sum(self.lengths) * shape[1], np.float32)
        _, keep, a, b, _ = port._factors(
            x=x, A=A.reshape(-1), B=B.reshape(-1), shape=list(shape), **same, **fields
        )
        scale = port.scale(rank, float(o["alpha"][0]), o["rslora"])
        return Adapter(a, b, port.low_rank_factor(scale, float(o["dropout"][0])), keep, module)

    def gradients(self, ids: Array, wanted: Array) -> tuple[Array, dict[str, Array]]:
        """The losses of the rows [T] and the gradients [sequences, ...] by M.A and M.B."""
        cos, sin = self.port.tables(self.config, self.lengths)
        x, kept = self.embedding[ids], []
        for index in range(len(self.layers)):
            x, values = self._forward(index, x, cos, sin)
            kept.append(values)
        losses, dy = self._loss(x, wanted)
        found: dict[tuple[str, str], Array] = {}
        for index in reversed(range(self.bottom, len(self.layers))):
            dy = self._backward(index, dy, kept[index], cos, sin, found)
        return losses, {f"{module}.{side}": gradient for (module, side), gradient in found.items()}

    def _loss(self, x: Array, wanted: Array) -> tuple[Array, Array]:
        """The losses [T], and the gradient of the last layer's y (NF4-15.5)."""
        port, norm = self.port, self.vectors["model.norm.weight"]
        rows = np.flatnonzero(wanted != IGNORED)
        normed, rstd = port.normed(x[rows], norm, self.config.rms_norm_eps)
        logits = port.times(normed, self.head.T)
        losses, dx = np.zeros(len(x), np.float32), np.zeros_like(x)
        scales = port.row_scales(port.shares(self.lengths, wanted)[rows])
        losses[rows], dlogits = port.cross_entropies(logits, wanted[rows], scales)
        dx[rows] = port.normed_back(port.times(dlogits, self.head), x[rows], norm, rstd)
        return losses, dx

    def _norm(self, index: int, name: str) -> Array:
        return self.vectors[f"model.layers.{index}.{name}.weight"]

    def _heads(self, index: int) -> Heads:
        c = self.config
        window = self.port.layer_window(c, index)
        kv = c.num_key_value_heads
        return Heads(kv, c.num_attention_heads // kv, c.head_dim, self.lengths, window)

    def _forward(self, index: int, x: Array, cos: Array, sin: Array) -> tuple[Array, dict[str, Any]]:
        """A layer's y, and what its backward takes (NF4-15.4)."""
        port, layer, eps = self.port, self.layers[index], self.config.rms_norm_eps
        v: dict[str, Any] = {"x": x, "z": {}}

        def linear(target: str, rows: Array, residual: Array | None = None) -> Array:
            y, v["z"][target] = port._linear(layer[target], rows, residual)
            return y

        v["normed1"], v["rstd1"] = port.normed(x, self._norm(index, "input_layernorm"), eps)
        for target in ATTENTION:
            v[target[0]] = linear(target, v["normed1"])
        for name in "qk":
            norm = self.vectors.get(f"model.layers.{index}.self_attn.{name}_norm.weight")
            found = port.prepared(v[name], norm, eps, cos, sin)
            v[f"{name}_turned"], v[f"{name}_raw"], v[f"{name}_rstd"] = found
        v["mixed"] = port.attended(v["q_turned"], v["k_turned"], v["v"], self._heads(index))
        v["middle"] = linear("o_proj", v["mixed"], x)
        v["normed2"], v["rstd2"] = port.normed(
            v["middle"], self._norm(index, "post_attention_layernorm"), eps
        )
        v["gate"], v["up"] = (linear(target, v["normed2"]) for target in MLP)
        act = port.exact_swiglu(v["gate"].reshape(-1), v["up"].reshape(-1))["y"]
        v["act"] = act.reshape(v["gate"].shape)
        return linear("down_proj", v["act"], v["middle"]), v

    def _backward(
        self,
        index: int,
        dy: Array,
        v: dict[str, Any],
        cos: Array,
        sin: Array,
        found: dict[tuple[str, str], Array],
    ) -> Array:
        """The gradient of a layer's x; those of its adapters into found (NF4-15.4)."""
        port, layer, lowest = self.port, self.layers[index], index == self.bottom

        def linear(targets: tuple[str, ...], douts: list[Array], x: Array, needed: bool) -> Array | None:
            some = [i for i, t in enumerate(targets) if needed or layer[t].adapter is not None]
            layers, zs = [layer[targets[i]] for i in some], [v["z"][targets[i]] for i in some]
            dx, own = port._linear_back(layers, [douts[i] for i in some], zs, x, self.lengths, needed)
            found.update(own)
            return dx

        def norm(d: Array, x: Array, name: str, rstd: Array) -> Array:
            return port.normed_back(d, x, self._norm(index, name), rstd)

        attention = not lowest or self._adapted(layer, (*ATTENTION, "o_proj"))
        dact = linear(("down_proj",), [dy], v["act"], attention or self._adapted(layer, MLP))
        if dact is None:
            return dy
        flat = port.exact_swiglu_backward(*(a.reshape(-1) for a in (dact, v["gate"], v["up"])))
        both = [flat[name].reshape(dact.shape) for name in ("dgate", "dup")]
        dnormed2 = linear(MLP, both, v["normed2"], attention)
        if dnormed2 is None:
            return dy
        dmiddle = port.kept(dy + norm(dnormed2, v["middle"], "post_attention_layernorm", v["rstd2"]))
        dmixed = linear(("o_proj",), [dmiddle], v["mixed"], not lowest or self._adapted(layer, ATTENTION))
        if dmixed is None:
            return dmiddle
        dq, dk, dv = port.attention_gradients(
            dmixed, v["q_turned"], v["k_turned"], v["v"], self._heads(index)
        )
        before = []
        for name, d in (("q", dq), ("k", dk)):
            weight = self.vectors.get(f"model.layers.{index}.self_attn.{name}_norm.weight")
            raw = v[f"{name}_raw"], v[f"{name}_rstd"]
            before.append(port.prepared_back(d, *raw, weight, cos, sin))
        dnormed1 = linear(ATTENTION, [*before, dv], v["normed1"], not lowest)
        if dnormed1 is None:
            return dmiddle
        return port.kept(dmiddle + norm(dnormed1, v["x"], "input_layernorm", v["rstd1"]))


def rotation(rope: RopeConfig, d: int, growth: Decimal, n: int) -> tuple[list[Decimal], Decimal]:
    """φ by pair, and m (NF4-15.3), to sixty digits; growth is that of dynamic."""
    theta, factor, m = Decimal(rope.theta), Decimal(rope.factor), Decimal(1)
    original = Decimal(rope.original_max_position_embeddings)
    if rope.type == "dynamic":
        theta *= growth ** (Decimal(d) / (d - 2))
    angles = [theta ** (Decimal(-2 * i) / d) for i in range(d // 2)]
    if rope.type == "linear":
        angles = [angle / factor for angle in angles]
    if rope.type == "llama3":
        low, high = Decimal(rope.low_freq_factor), Decimal(rope.high_freq_factor)
        shares = [clamped((original * angle / (2 * PI) - low) / (high - low)) for angle in angles]
        angles = [angle * (k + (1 - k) / factor) for angle, k in zip(angles, shares, strict=True)]
    if rope.type == "yarn":

        def pair_of(turns: float) -> Decimal:
            return d * (original / (2 * PI * Decimal(turns))).ln() / (2 * theta.ln())

        def mscale(x: float) -> Decimal:
            return Decimal("0.1") * Decimal(x) * factor.ln() + 1 if factor > 1 else Decimal(1)

        a, b = pair_of(rope.beta_fast), pair_of(rope.beta_slow)
        if rope.truncate:
            a, b = Decimal(math.floor(a)), Decimal(math.ceil(b))
        a, b = max(a, Decimal(0)), min(b, Decimal(d - 1))
        if a == b:
            b += Decimal("0.001")
        shares = [clamped((i - a) / (b - a)) for i in range(d // 2)]
        angles = [angle * (k / factor + 1 - k) for angle, k in zip(angles, shares, strict=True)]
        m = mscale(1)
        if rope.mscale and rope.mscale_all_dim:
            m = mscale(rope.mscale) / mscale(rope.mscale_all_dim)
    if rope.type == "longrope":
        divisors = rope.long_factor if n > original else rope.short_factor
        angles = [angle / Decimal(x) for angle, x in zip(angles, divisors, strict=True)]
        if factor > 1 and rope.attention_factor is None:
            m = (1 + factor.ln() / original.ln()).sqrt()
    if rope.type in ("yarn", "longrope") and rope.attention_factor is not None:
        m = Decimal(rope.attention_factor)
    return angles, m


def clamped(k: Decimal) -> Decimal:
    """k, at least 0 and at most 1."""
    return min(max(k, Decimal(0)), Decimal(1))


@cache
def cosine_and_sine(x: Decimal) -> tuple[Decimal, Decimal]:
    """Of an angle of any size, to some fifty digits."""
    with localcontext(DIGITS):
        quarters = (x * 2 / PI).to_integral_value()
        rest = x - quarters * PI / 2
        series = [Decimal(0), Decimal(0)]
        term, k = Decimal(1), 0
        while abs(term) > Decimal("1e-60"):
            series[k % 2] += term if k % 4 < 2 else -term
            k += 1
            term *= rest / k
        cos, sin = series
        turns = [(cos, sin), (-sin, cos), (-cos, -sin), (sin, -cos)]
        return turns[int(quarters) % 4]


def nearest(x: Decimal) -> np.float32:
    """RN of a real number; of 0 +0."""
    return np.float32(round_to_float32(Fraction(x)))
