"""A correct port in plain NumPy, a method a step, so that a subclass can do one step wrong."""

import math
import zlib
from collections.abc import Iterable
from fractions import Fraction
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nf4.codebooks import CODEBOOKS
from nf4.errors import InputError
from nf4.floats import BFLOAT16, DTYPES, FLOAT32, round_to_float32
from nf4.nested import DYNAMIC_MAP

Array = NDArray[Any]
Outputs = dict[str, Any]
Draw = tuple[Array, Array, Array]
"""Seed, stream and sample, as fields come."""

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCK = 256
TINY, LIFT = np.float32(2**-128), np.float32(2**64)  # NF4-3.3
UNIFORM, DROPOUT, PERMUTATION = 0, 1, 2  # the purposes of NF4-11.2
IGNORED = -100  # a position without a target
SCHEDULES = ("constant", "linear", "cosine")
LOW = np.uint64(0xFFFFFFFF)


class Plain:
    """A port (NF4-13.3) written from the specification, for clarity, not from the reference.

    The methods named as operations are its port; those before them are the steps, each the work of the clause
    it names. InputError refuses an input.
    """

    # Steps: numbers

    def kept(self, x: Array) -> Array:
        """A result as the machine keeps it: subnormal numbers stay (NF4-1.1)."""
        return x

    def multiply_add(self, a: Array | np.float32, b: Array, c: Array) -> Array:
        """RN(RN(a * b) + c): two roundings (NF4-1.2)."""
        return self.kept(self.kept(a * b) + c)

    def mean(self, x: Array) -> Array:
        """The exact mean, rounded once, float32 [1] (NF4-6.1): the sum is an integer of units of 2^-149."""
        total = sum(int(math.ldexp(value, 149)) for value in x.tolist())
        return np.array([round_to_float32(Fraction(total, max(x.size, 1) << 149))], np.float32)

    def widened(self, x: Array) -> Array:
        """NF4-7.1."""
        if x.dtype == FLOAT32:
            return self.kept(x)
        with np.errstate(invalid="ignore"):
            wide = x.astype(np.float32)
        nan = np.isnan(wide)
        wide[nan] = np.copysign(np.float32(np.nan), wide[nan])
        return self.kept(wide)

    def narrowed(self, x: Array, dtype: np.dtype[Any]) -> Array:
        """NF4-7.2, NF4-7.3."""
        if dtype == FLOAT32:
            return self.kept(x)
        with np.errstate(all="ignore"):
            short = self.rounded(x, dtype)
        quiet = 0x7FC0 if dtype == BFLOAT16 else 0x7E00
        nan = np.isnan(x)
        short.view(np.uint16)[nan] = np.where(np.signbit(x[nan]), quiet | 0x8000, quiet)
        return self.kept(short)

    def rounded(self, x: Array, dtype: np.dtype[Any]) -> Array:
        """To the nearest of a 16-bit dtype, ties to even."""
        return x.astype(dtype)

    # Steps: encode (chapter 3)

    def check_finite(self, what: str, x: Array) -> None:
        """NF4-12.1, NF4-12.5."""
        bad = np.flatnonzero(~np.isfinite(x))
        if bad.size:
            raise InputError(f"{what} {bad[0]} is {x[bad[0]]}; it must be finite")

    def values(self, codebook: str) -> Array:
        """The values of a codebook by code (NF4-2.1)."""
        if codebook not in CODEBOOKS:
            raise InputError(f"there is no codebook {codebook!r}; choose one of {', '.join(CODEBOOKS)}")
        return CODEBOOKS[codebook].values

    def blocks(self, shape: Iterable[int], block_size: int, decoding: bool) -> Array:
        """The block of each element (NF4-3.1, NF4-4.1)."""
        return np.arange(math.prod(shape)) // block_size

    def absmax(self, blocks: list[Array]) -> Array:
        """NF4-3.2."""
        return np.array([np.abs(block).max() for block in blocks], np.float32)

    def reciprocal(self, absmax: Array) -> Array:
        """RN(1 / absmax), of what NF4-3.3 has lifted."""
        return self.kept(np.float32(1) / absmax)

    def scaled(self, x: Array, absmax: Array, tail: Array) -> Array:
        """s of NF4-3.3, of x and the absmax of its block; tail marks the elements of a short last one."""
        lift = np.where(absmax <= TINY, LIFT, np.float32(1))
        return self.kept(x * lift * self.reciprocal(absmax * lift))

    def zero_block(self) -> np.float32:
        """s where absmax is 0 (NF4-3.4)."""
        return np.float32(0)

    def ranks(self, s: Array, distinct: Array) -> Array:
        """The number of thresholds strictly below s (NF4-3.5), of ascending values."""
        return np.searchsorted(thresholds(distinct), s, side="left")

    def codes_of(self, ranks: Array, codes: Array) -> Array:
        """The code of each rank (NF4-2.2)."""
        return codes[ranks]

    def encoded(self, x: Array, shape: Iterable[int], block_size: int, values: Array) -> tuple[Array, Array]:
        """The code of each element and absmax of float32 x (chapter 3)."""
        index = self.blocks(shape, block_size, decoding=False)
        starts = np.flatnonzero(np.diff(index, prepend=-1))
        absmax = self.absmax(np.split(x, starts[1:]) if x.size else [])
        of_element = absmax[index]
        tail = np.arange(x.size) >= x.size - x.size % block_size
        with np.errstate(all="ignore"):
            s = np.where(of_element == 0, self.zero_block(), self.scaled(x, of_element, tail))
        return self.codes_of(self.ranks(s, *ranked(values)[:1]), ranked(values)[1]), absmax

    # Steps: packing and decode (chapters 4 and 5)

    def pad(self, values: Array) -> int:
        """The code in the last low nibble where the count is odd (NF4-5.2)."""
        distinct, codes = ranked(values)
        return int(self.codes_of(self.ranks(np.zeros(1, np.float32), distinct), codes)[0])

    def joined(self, first: Array, second: Array) -> Array:
        """The byte of two codes (NF4-5.1)."""
        return first << 4 | second

    def split(self, byte: Array) -> tuple[Array, Array]:
        """The two codes of a byte (NF4-5.1)."""
        return byte >> 4, byte & 15

    def product(self, value: Array, absmax: Array, dtype: np.dtype[Any]) -> Array:
        """RN(v * a), rounded to dtype (NF4-4.1, NF4-4.2)."""
        return self.narrowed(self.kept(value * absmax), dtype)

    # Steps: double quantization (chapter 6)

    def encoder_map(self) -> Array:
        """NF4-6.2."""
        return DYNAMIC_MAP

    def decoder_map(self, stored: Array) -> Array:
        """The map stored with the tensor (NF4-6.2)."""
        return stored

    def nested_scale(self, nested_absmax: Array) -> Array:
        """What a value of the map is multiplied by (NF4-6.4), of each element."""
        return nested_absmax

    def decoder_offset(self, offset: Array) -> Array:
        """What is added to that (NF4-6.4)."""
        return offset

    # Steps: random numbers (chapter 11)

    def stream_number(self, name: str) -> int:
        """NF4-11.2."""
        return zlib.crc32(name.encode())

    def counter(self, sample: int, stream: int, purpose: int) -> tuple[int, int, int]:
        """The words of the counter after the block's number (NF4-11.2)."""
        return sample & 0xFFFFFFFF, stream, purpose

    def lanes(self, words: Array) -> Array:
        """The 16-bit lanes of words, the low half first (NF4-11.4)."""
        return np.stack([words & 0xFFFF, words >> 16], axis=-1).reshape(-1)

    def by_rising(self, keys: Array) -> Array:
        """The order of keys from the lowest on, equal ones as they stand (NF4-11.5, NF4-10.8)."""
        return np.argsort(keys, kind="stable")

    # Steps: the LoRA layer and the training step (chapters 9 and 10)

    def scale(self, rank: int, alpha: float, rslora: bool) -> float:
        """NF4-9.1."""
        if not math.isfinite(alpha):
            raise InputError(f"alpha is {alpha}; it must be finite")
        return alpha / math.sqrt(rank) if rslora else alpha / rank

    def keep_share(self, p: float) -> float:
        """What a kept element is divided by: 1 - q (NF4-9.4)."""
        return 1 - drop_threshold(p) / 65536

    def weight_dtype(self, dtype: str) -> np.dtype[Any]:
        """The dtype that the weight of a layer is decoded to (NF4-9.2)."""
        kind: np.dtype[Any] = DTYPES[dtype]
        return kind

    def corrections(self, beta1: float, beta2: float, updates: int) -> tuple[float, float]:
        """1 - P1 and 1 - P2 of NF4-10.3, after so many updates."""
        powers = [list(accumulate([beta] * updates, lambda a, b: a * b))[-1] for beta in (beta1, beta2)]
        return 1 - powers[0], 1 - powers[1]

    def gradient(self, g: Array, p: Array, weight_decay: float) -> Array:
        """The gradient that the moments see: weight decay has no part in it (NF4-10.4)."""
        return g

    def moved(self, p: Array, decay: np.float32, u: Array) -> Array:
        """Step 5 of NF4-10.4."""
        return self.kept(self.kept(decay * p) - u)

    def adam_step(self, step: np.float32, m: Array, d: Array) -> Array:
        """Step 4 of NF4-10.4."""
        return self.kept(step * self.kept(m / d))

    def decays(self, shape: list[int]) -> bool:
        """Whether weight decay acts on an array (NF4-10.2)."""
        return len(shape) >= 2

    def loss_share(self, count: int, parts: list[int], targets: Array) -> Array:
        """What the loss of each position is multiplied by (NF4-10.9)."""
        return np.full(targets.size, 1 / count)

    # Operations

    def codebook(self, codebook: str) -> Outputs:
        """Values and thresholds (NF4-2.1 to NF4-2.3)."""
        values = self.values(codebook)
        return {"values": values, "thresholds": thresholds(ranked(values)[0])}

    def widen(self, x: Array, dtype: str) -> Outputs:
        """NF4-7.1."""
        check_dtype(dtype)
        return {"y": self.widened(x)}

    def narrow(self, x: Array, dtype: str) -> Outputs:
        """NF4-7.2, NF4-7.3."""
        check_dtype(dtype)
        return {"y": self.narrowed(x, DTYPES[dtype])}

    def quantize(self, x: Array, block_size: int, codebook: str) -> Outputs:
        """Codes and absmax (NF4-3, NF4-5)."""
        check_dtype(str(x.dtype))
        check_block_size(block_size)
        values = self.values(codebook)
        wide = self.widened(x.reshape(-1))
        self.check_finite("element", wide)
        codes, absmax = self.encoded(wide, x.shape, block_size, values)
        padded = np.append(codes, np.full(codes.size % 2, self.pad(values))).astype(np.uint8)
        return {"codes": self.joined(padded[::2], padded[1::2]), "absmax": absmax}

    def encode_absmax(self, absmax: Array) -> Outputs:
        """The 8-bit form of absmax (NF4-6.1 to NF4-6.3)."""
        self.check_finite("absmax of block", absmax)
        if np.any(absmax < 0):
            raise InputError(f"the absmax of block {np.argmax(absmax < 0)} is negative")
        offset = self.mean(absmax)
        with np.errstate(all="ignore"):
            centred = self.kept(absmax - offset)
        nested_map = self.encoder_map()
        codes, nested = self.encoded(centred, absmax.shape, NESTED_BLOCK, nested_map)
        out = {"absmax_codes": codes.astype(np.uint8), "nested_absmax": nested, "offset": offset}
        self._absmax(map=nested_map, **out)  # refuses what would decode to an infinity (NF4-6.6)
        return out

    def quantize_double(self, x: Array, block_size: int, codebook: str) -> Outputs:
        """Codes and the 8-bit form of absmax (NF4-3, NF4-6)."""
        plain = self.quantize(x, block_size, codebook)
        return {"codes": plain["codes"], **self.encode_absmax(plain["absmax"])}

    def decode_absmax(self, absmax_codes: Array, nested_absmax: Array, offset: Array, map: Array) -> Outputs:
        """absmax (NF4-6.4)."""
        return {"absmax": self._absmax(absmax_codes, nested_absmax, offset, map)}

    def _absmax(self, absmax_codes: Array, nested_absmax: Array, offset: Array, map: Array) -> Array:
        check_count("map", map, 256)
        check_count("offset", offset, 1)
        check_count("nested absmax", nested_absmax, -(-absmax_codes.size // NESTED_BLOCK))
        index = self.blocks(absmax_codes.shape, NESTED_BLOCK, decoding=True)
        with np.errstate(all="ignore"):
            scales = self.nested_scale(nested_absmax)[index]
            value = self.decoder_map(map)[absmax_codes]
            absmax = self.multiply_add(value, scales, self.decoder_offset(offset))
        self.check_finite("decoded absmax of block", absmax)
        return absmax

    def dequantize(
        self, codes: Array, absmax: Array, shape: list[int], dtype: str, block_size: int, codebook: str
    ) -> Outputs:
        """y of shape (NF4-4)."""
        check_dtype(dtype)
        check_block_size(block_size)
        values, n = self.values(codebook), math.prod(shape)
        check_count("codes", codes, -(-n // 2))
        check_count("absmax", absmax, -(-n // block_size))
        self.check_finite("absmax of block", absmax)
        each = np.stack(self.split(codes), axis=-1).reshape(-1)[:n]
        index = self.blocks(shape, block_size, decoding=True)
        with np.errstate(all="ignore"):
            return {"y": self.product(values[each], absmax[index], DTYPES[dtype])}

    def dequantize_double(
        self,
        codes: Array,
        absmax_codes: Array,
        nested_absmax: Array,
        offset: Array,
        map: Array,
        shape: list[int],
        dtype: str,
        block_size: int,
        codebook: str,
    ) -> Outputs:
        """y of shape (NF4-4, NF4-6.4)."""
        absmax = self._absmax(absmax_codes, nested_absmax, offset, map)
        return self.dequantize(codes, absmax, shape, dtype, block_size, codebook)

    def storage(self, elements: int, block_size: int, double_quant: bool) -> Outputs:
        """NF4-5.4."""
        check_block_size(block_size)
        blocks = -(-elements // block_size)
        scales = blocks + 4 * -(-blocks // NESTED_BLOCK) + 4 if double_quant else 4 * blocks
        return {"bytes": -(-elements // 2) + scales}

    def philox(self, counter: Array, key: Array) -> Outputs:
        """NF4-11.1."""
        return {"words": philox(counter.reshape(-1, 4), int(key[0]), int(key[1])).reshape(-1)}

    def stream(self, name: str) -> Outputs:
        """NF4-11.2."""
        return {"stream": np.array([self.stream_number(name)], np.uint32)}

    def uniform(self, seed: Array, stream: Array, sample: Array, n: int) -> Outputs:
        """NF4-11.3."""
        words = self._draw((seed, stream, sample), UNIFORM, -(-n // 4)).reshape(-1)[:n]
        return {"y": (words >> 8).astype(np.float32) * np.float32(2**-24)}

    def keep_mask(self, seed: Array, stream: Array, sample: Array, n: int, p: Array) -> Outputs:
        """NF4-11.4."""
        threshold = drop_threshold(float(p[0]))
        lanes = self.lanes(self._draw((seed, stream, sample), DROPOUT, -(-n // 8)))
        return {"mask": (lanes[:n] >= threshold).astype(np.uint8)}

    def permutation(self, seed: Array, epoch: Array, n: int) -> Outputs:
        """NF4-11.5."""
        words = self._draw((seed, np.zeros(1, np.uint32), epoch), PERMUTATION, -(-n // 2))
        pairs = words.astype(np.uint64).reshape(-1, 2)[:n]
        return {"order": self.by_rising(pairs[:, 0] | pairs[:, 1] << np.uint64(32)).astype(np.uint32)}

    def _draw(self, draw: Draw, purpose: int, blocks: int) -> Array:
        """uint32 [blocks, 4] (NF4-11.2)."""
        seed, stream, sample = (int(field[0]) for field in draw)
        counters = np.empty((blocks, 4), np.uint32)
        counters[:, 0] = np.arange(blocks)
        counters[:, 1:] = self.counter(sample, stream, purpose)
        return philox(counters, seed & 0xFFFFFFFF, seed >> 32)

    def init_adapter(self, seed: Array, name: str, in_features: int, rank: int, dtype: str) -> Outputs:
        """A (NF4-9.3)."""
        check_dtype(dtype, ("float32", "bfloat16"))
        check_positive("rank", rank)
        check_positive("in_features", in_features)
        zero = np.zeros(1, np.uint64)
        stream = np.array([self.stream_number(name)], np.uint32)
        u = self.uniform(seed, stream, zero, rank * in_features)["y"]
        bound = np.float32(1 / math.sqrt(in_features))
        return {"A": self.narrowed((u * np.float32(2) - np.float32(1)) * bound, DTYPES[dtype])}

    def init_matrix(self, seed: Array, name: str, n: int) -> Outputs:
        """NF4-10.10."""
        half = -(-n // 2)
        stream = np.array([self.stream_number(name)], np.uint32)
        u = self.uniform(seed, stream, np.zeros(1, np.uint64), 2 * half)["y"].astype(np.float64)
        radius, angle = 0.02 * np.sqrt(-2 * np.log(1 - u[:half])), 2 * np.pi * u[half:]
        y = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:n]
        return {"y": y.astype(np.float32)}

    def lora_forward(self, codes: Array, absmax: Array, **layer: Any) -> Outputs:
        """y (NF4-9.1, NF4-9.2, NF4-9.4)."""
        return {"y": self._forward(self._layer_weight(codes, absmax, **layer), **layer)}

    def lora_backward(self, codes: Array, absmax: Array, dout: Array, **layer: Any) -> Outputs:
        """dx, dA and dB (NF4-9.5)."""
        return self._backward(self._layer_weight(codes, absmax, **layer), dout=dout, **layer)

    def _layer_weight(
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
        check_dtype(dtype)
        kind = next(name for name in DTYPES if DTYPES[name] == self.weight_dtype(dtype))
        return self.widened(self.dequantize(codes, absmax, shape, kind, block_size, codebook)["y"]).reshape(
            shape
        )

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
        """x [T, in], what dropout multiplies it by [T, in], A [rank, in], B [out, rank] and the scale."""
        check_dtype(adapter_dtype, ("float32", "bfloat16"))
        check_positive("rank", rank)
        p, columns = float(dropout[0]), shape[1]
        drop_threshold(p)
        if len(lengths) != len(samples) or sum(lengths) * columns != x.size:
            raise InputError(f"sequences of {lengths} rows with samples {samples} are not those of x")
        masks = [
            self.keep_mask(seed, stream, np.array([sample]), length * columns, dropout)["mask"]
            for length, sample in zip(lengths, samples, strict=True)
        ]
        kept = np.concatenate([*masks, np.empty(0, np.uint8)]).reshape(-1, columns)
        keep = (kept / self.keep_share(p)).astype(np.float32)
        factors = self.widened(A).reshape(rank, columns), self.widened(B).reshape(-1, rank)
        scale = np.float32(self.scale(rank, float(alpha[0]), rslora))
        return x.reshape(-1, columns), keep, *factors, scale

    def _forward(self, weight: Array, bias: Array | None = None, **layer: Any) -> Array:
        """y [T, out] (NF4-9.2)."""
        x, keep, a, b, scale = self._factors(**layer)
        y = x @ weight.T + scale * ((x * keep) @ a.T) @ b.T
        return y if bias is None else y + bias

    def _backward(self, weight: Array, dout: Array, **layer: Any) -> Outputs:
        """dx, dA and dB (NF4-9.5)."""
        x, keep, a, b, scale = self._factors(**layer)
        g = dout.reshape(-1, len(weight))
        dz = scale * (g @ b)
        dropped = x * keep
        return {
            "dx": g @ weight + keep * (dz @ a),
            "dA": dz.T @ dropped,
            "dB": scale * (g.T @ (dropped @ a.T)),
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
        """p, m and v (NF4-10.1 to NF4-10.5)."""
        check_dtype(dtype, ("float32", "bfloat16"))
        rate, b1, b2, epsilon, decay = (float(x[0]) for x in (lr, beta1, beta2, eps, weight_decay))
        if not all(0 <= x < 1 for x in (b1, b2)) or not all(
            0 <= x < math.inf for x in (rate, epsilon, decay)
        ):
            raise InputError(
                f"rate {rate}, betas {b1} and {b2}, eps {epsilon} or decay {decay} is out of range"
            )
        decay = decay if self.decays(shape) else 0.0
        correction1, correction2 = self.corrections(b1, b2, updates + 1)
        step, root = np.float32(rate / correction1), np.float32(math.sqrt(correction2))
        with np.errstate(all="ignore"):
            wide = self.widened(p)
            g = self.gradient(g, wide, decay)
            m = self.multiply_add(np.float32(1 - b1), self.kept(g - m), m)
            square = self.kept(g * g)
            v = self.multiply_add(np.float32(b2), v, self.kept(np.float32(1 - b2) * square))
            d = self.kept(self.kept(self.kept(np.sqrt(v)) / root) + np.float32(epsilon))
            wide = self.moved(wide, np.float32(1 - rate * decay), self.adam_step(step, m, d))
        return {"p": self.narrowed(wide, DTYPES[dtype]), "m": m, "v": v}

    def learning_rate(self, step: int, steps: int, warmup: int, schedule: str, lr: Array) -> Outputs:
        """NF4-10.6."""
        if schedule not in SCHEDULES:
            raise InputError(f"there is no schedule {schedule!r}; choose one of {', '.join(SCHEDULES)}")
        after = max(1, steps - warmup)
        if step < warmup:
            share = step / warmup
        elif schedule == "linear":
            share = max(0.0, (steps - step) / after)
        elif schedule == "cosine":
            share = max(0.0, (1 + math.cos(math.pi * (step - warmup) / after)) / 2)
        else:
            share = 1.0
        return {"lr": np.array([float(lr[0]) * share])}

    def clip(self, gradients: dict[str, Array], max_norm: Array) -> Outputs:
        """The norm and the clipped gradients (NF4-10.7)."""
        most = float(max_norm[0])
        if not most >= 0:
            raise InputError(f"max_norm is {most}; it must be at least 0")
        for name, g in gradients.items():
            self.check_finite(f"gradient {name!r}: element", g.reshape(-1))
        norm = math.sqrt(
            sum(float(np.sum(gradients[name].astype(np.float64) ** 2)) for name in sorted(gradients))
        )
        factor = most / (norm + 1e-6) if most > 0 else 1.0
        if factor < 1:
            gradients = {name: g * g.dtype.type(factor) for name, g in gradients.items()}
        return {"norm": np.array([norm]), "gradients": gradients}

    def example_order(
        self,
        seed: Array,
        examples: int,
        first: int,
        count: int,
        batch: int,
        lengths: list[int] | None = None,
    ) -> Outputs:
        """NF4-10.8."""
        check_positive("examples", examples)
        numbers = range(first, first + count)
        epochs = {n // examples: self._epoch(seed, n // examples, examples, batch, lengths) for n in numbers}
        return {"order": np.array([epochs[n // examples][n % examples] for n in numbers], np.uint32)}

    def _epoch(self, seed: Array, epoch: int, examples: int, batch: int, lengths: list[int] | None) -> Array:
        order: Array = self.permutation(seed, np.array([epoch]), examples)["order"]
        if lengths is None:
            return order
        size, span = np.array(lengths), 50 * batch
        runs = [order[start : start + span] for start in range(0, examples, span)]
        return np.concatenate([run[self.by_rising(-size[run])] for run in runs])

    def held_out(self, seed: Array, examples: int) -> Outputs:
        """NF4-10.8."""
        if examples < 2:
            raise InputError(f"{examples} examples can't be split; there must be two")
        order = self.permutation(seed, np.array([2**32 - 1]), examples)["order"]
        return {"order": order[: max(1, examples // 10)]}

    def loss(self, logits: Array, vocabulary: int, targets: list[int], parts: list[int]) -> Outputs:
        """The loss and its gradient (NF4-10.9)."""
        rows, wanted = logits.reshape(-1, vocabulary).astype(np.float64), np.array(targets)
        if len(rows) != len(wanted) or sum(parts) != len(wanted):
            raise InputError(f"{len(rows)} rows, {len(wanted)} targets and parts of {parts} do not fit")
        learned = wanted != IGNORED
        count = int(learned.sum())
        check_positive("the number of targets", count)
        if wanted[learned].min() < 0 or wanted[learned].max() >= vocabulary:
            raise InputError(f"a target lies outside the vocabulary of {vocabulary}")
        share = self.loss_share(count, parts, wanted) * learned
        powers = np.exp(rows - rows.max(axis=1, keepdims=True))
        softmax = powers / powers.sum(axis=1, keepdims=True)
        at = np.arange(len(wanted)), np.where(learned, wanted, 0)
        total = -np.sum(share * np.log(softmax[at]))
        softmax[at] -= 1
        return {"loss": np.array([total]), "dlogits": (share[:, None] * softmax).astype(np.float32)}

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
        out_features, _ = layer["shape"]
        shaped = (weight.reshape(layer["shape"]), layer["block_size"], layer["codebook"])
        q = self.quantize_double(*shaped) if double_quant else self.quantize(*shaped)
        codes = q.pop("codes")
        absmax = self._absmax(**q, map=DYNAMIC_MAP) if double_quant else q["absmax"]
        decoded = self._layer_weight(codes, absmax, **layer)
        logits = self._forward(decoded, **layer)
        loss = self.loss(logits.reshape(-1), out_features, targets, [len(logits)])
        gradients = self._backward(decoded, dout=loss["dlogits"], **layer)
        clipped = self.clip({"A": gradients["dA"], "B": gradients["dB"]}, max_norm)
        rates = {"lr": lr, "beta1": beta1, "beta2": beta2, "eps": eps, "weight_decay": weight_decay}
        dtype = layer["adapter_dtype"]
        updated = {}
        for name, g in clipped["gradients"].items():
            zeros = np.zeros(g.size, np.float32)
            flat = g.reshape(-1)
            after = self.adamw(layer[name], dtype, flat, zeros, zeros, list(g.shape), 0, **rates)
            updated[name] = after["p"]
        return {"loss": loss["loss"], **gradients, "norm": clipped["norm"], **updated}

    def merge(
        self, weight: Array, shape: list[int], dtype: str, A: Array, B: Array, rank: int, scale: Array
    ) -> Outputs:
        """NF4-8.8."""
        check_dtype(dtype)
        delta = np.float32(scale[0]) * (B.reshape(-1, rank) @ A.reshape(rank, -1))
        with np.errstate(all="ignore"):
            y = self.narrowed(self.widened(weight).reshape(shape) + delta, DTYPES[dtype])
        self.check_finite("merged element", y.reshape(-1))
        return {"y": y}


def thresholds(distinct: Array) -> Array:
    """RN of the midpoints of ascending float32 values, whose sums are exact in float64 (NF4-2.2)."""
    wide = distinct.astype(np.float64)
    return ((wide[:-1] + wide[1:]) / 2).astype(np.float32)


def ranked(values: Array) -> tuple[Array, Array]:
    """The different values of a codebook in ascending order, and the lowest code of each (NF4-2.2)."""
    return np.unique(values, return_index=True)


def philox(counters: Array, k0: int, k1: int) -> Array:
    """Philox4x32-10 of counters uint32 [n, 4] (NF4-11.1)."""
    c0, c1, c2, c3 = counters.T.astype(np.uint64)
    for _ in range(10):
        p, q = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1 = q >> np.uint64(32) ^ c1 ^ np.uint64(k0), q & LOW
        c2, c3 = p >> np.uint64(32) ^ c3 ^ np.uint64(k1), p & LOW
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return np.stack([c0, c1, c2, c3], axis=1).astype(np.uint32)


def drop_threshold(p: float) -> int:
    """h of NF4-11.4. InputError unless p is at least 0 and below 1."""
    if not 0 <= p < 1:
        raise InputError(f"dropout is {p}; it must be at least 0 and below 1")
    return min(round(65536 * p), 65535)


def check_dtype(dtype: str, among: Iterable[str] = tuple(DTYPES)) -> None:
    """InputError unless dtype is one of those (NF4-12.2)."""
    if dtype not in among:
        raise InputError(f"dtype {dtype} is not supported; choose one of {', '.join(among)}")


def check_block_size(block_size: int) -> None:
    """InputError unless NF4-3.1 lists it (NF4-12.3)."""
    if block_size not in BLOCK_SIZES:
        raise InputError(f"block size {block_size} is not supported; choose one of {BLOCK_SIZES}")


def check_count(what: str, array: Array, count: int) -> None:
    """InputError unless array has so many elements (NF4-12.5)."""
    if array.size != count:
        raise InputError(f"{what} has {array.size} elements, must have {count}")


def check_positive(what: str, count: int) -> None:
    """InputError unless count is at least 1."""
    if count < 1:
        raise InputError(f"{what} is {count}; it must be at least 1")
