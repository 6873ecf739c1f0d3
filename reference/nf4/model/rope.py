"""Rotary position embeddings and their scaling variants."""

import math
from decimal import Decimal, DivisionByZero, localcontext
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from nf4.errors import InputError
from nf4.lora import Workspace
from nf4.model.config import LlamaConfig, RopeConfig
from nf4.reals import CONTEXT, PI

Array = NDArray[Any]

_MOST = 1 << 16  # of an angle or of the factor: beyond it a config is wrong, and digits run out


def inverse_frequencies(config: LlamaConfig, length: int) -> tuple[NDArray[np.float64], float]:
    """frequencies in float64, [head_dim / 2], and its factor."""
    angles, factor = frequencies(config, length)
    return np.array([float(angle) for angle in angles]), float(factor)


def frequencies(config: LlamaConfig, length: int) -> tuple[tuple[Decimal, ...], Decimal]:
    """The angle a position adds to each pair of a head, and a factor on cos and sin, to 60 digits (NF4-15.3).

    length: positions in the sequence; "dynamic" and "longrope" change their frequencies with it. Raises
    InputError for parameters that give no such numbers, or absurd ones.
    """
    rope = config.rope
    if rope.type == "dynamic":
        length = max(length, config.max_position_embeddings)
    else:  # of one cached answer, or two
        length = int(length > rope.original_max_position_embeddings)
    try:
        return _frequencies(rope, config.head_dim, config.max_position_embeddings, length)
    except DivisionByZero:
        raise InputError(f"the RoPE parameters {rope} divide by 0 (NF4-15.3)") from None


@cache
def _frequencies(
    rope: RopeConfig, dim: int, positions: int, length: int
) -> tuple[tuple[Decimal, ...], Decimal]:
    with localcontext(CONTEXT):
        theta, factor, attention = Decimal(rope.theta), Decimal(rope.factor), Decimal(1)
        if rope.type == "dynamic":
            growth = 1 + factor * (length - positions) / positions  # no difference of large numbers
            theta *= growth ** (Decimal(dim) / (dim - 2))
        plain = [theta ** (Decimal(-2 * i) / dim) for i in range(dim // 2)]
        if rope.type == "linear":
            plain = [angle / factor for angle in plain]
        elif rope.type == "llama3":
            plain = _llama3(rope, plain)
        elif rope.type == "yarn":
            plain, attention = _yarn(rope, plain, dim)
        elif rope.type == "longrope":
            plain, attention = _longrope(rope, plain, bool(length))
    if max(*plain, attention) > _MOST:
        raise InputError(f"the RoPE parameters {rope} turn or scale by more than {_MOST} (NF4-15.3)")
    return tuple(plain), attention


def _llama3(rope: RopeConfig, plain: list[Decimal]) -> list[Decimal]:
    """Llama 3.1: long wavelengths are divided by the factor, short ones kept, those between blended."""
    low, high, factor = Decimal(rope.low_freq_factor), Decimal(rope.high_freq_factor), Decimal(rope.factor)
    scaled = []
    for angle in plain:
        turns = rope.original_max_position_embeddings * angle / (2 * PI)
        kept = min(max((turns - low) / (high - low), Decimal(0)), Decimal(1))
        scaled.append(angle * (kept + (1 - kept) / factor))
    return scaled


def _yarn(rope: RopeConfig, plain: list[Decimal], dim: int) -> tuple[list[Decimal], Decimal]:
    """YaRN (arXiv 2309.00071): interpolate slow pairs, keep fast ones, ramp between; soften attention."""
    original, factor = rope.original_max_position_embeddings, Decimal(rope.factor)

    def pair_turning(turns: float) -> Decimal:
        return dim * (original / (Decimal(turns) * 2 * PI)).ln() / (2 * Decimal(rope.theta).ln())

    low, high = pair_turning(rope.beta_fast), pair_turning(rope.beta_slow)
    if rope.truncate:
        low, high = Decimal(math.floor(low)), Decimal(math.ceil(high))
    low, high = max(low, Decimal(0)), min(high, Decimal(dim - 1))
    width = high - low if high != low else Decimal("0.001")

    def mscale(weight: float) -> Decimal:
        return Decimal("0.1") * Decimal(weight) * factor.ln() + 1 if factor > 1 else Decimal(1)

    if rope.attention_factor is not None:
        attention = Decimal(rope.attention_factor)
    elif rope.mscale and rope.mscale_all_dim:
        attention = mscale(rope.mscale) / mscale(rope.mscale_all_dim)
    else:
        attention = mscale(1)
    scaled = []
    for i, angle in enumerate(plain):
        interpolated = min(max((i - low) / width, Decimal(0)), Decimal(1))
        scaled.append(angle * (interpolated / factor + (1 - interpolated)))
    return scaled, attention


def _longrope(rope: RopeConfig, plain: list[Decimal], long: bool) -> tuple[list[Decimal], Decimal]:
    """LongRoPE (arXiv 2402.13753): a divisor for each pair, one list up to the trained length, one beyond."""
    factor = Decimal(rope.factor)
    if rope.attention_factor is not None:
        attention = Decimal(rope.attention_factor)
    elif factor > 1:
        attention = (1 + factor.ln() / Decimal(rope.original_max_position_embeddings).ln()).sqrt()
    else:
        attention = Decimal(1)
    divisors = rope.long_factor if long else rope.short_factor
    return [angle / Decimal(d) for angle, d in zip(plain, divisors, strict=True)], attention


def rotation(
    config: LlamaConfig, lengths: tuple[int, ...], dtype: DTypeLike, past: int = 0
) -> tuple[Array, Array]:
    """cos and signed sin of packed rows: two arrays [T, heads * head_dim]; k uses their first columns.

    lengths: of the packed sequences; past: positions before the first row (a generation's cache). A row holds
    (cos, cos) and (-sin, sin) for each head, so that applying them is a product with whole rows.
    """
    cos, sin = [], []
    for n in lengths:
        inv_freq, factor = inverse_frequencies(config, past + n)
        angle = np.arange(past, past + n)[:, None] * inv_freq  # [n, head_dim / 2], float64
        c, s = np.cos(angle) * factor, np.sin(angle) * factor
        cos.append(np.concatenate([c, c], 1))
        sin.append(np.concatenate([-s, s], 1))
    heads = (1, config.num_attention_heads)
    return (
        np.tile(np.concatenate(cos).astype(dtype), heads),
        np.tile(np.concatenate(sin).astype(dtype), heads),
    )


def rotate(
    x: Array, tables: tuple[Array, Array], head_dim: int, space: Workspace, inverse: bool = False
) -> None:
    """Rotate x [T, heads * head_dim] in place, with Hugging Face's halves; `inverse` takes gradients back."""
    cos, sin = (table[:, : x.shape[1]] for table in tables)
    swapped = space.take("input", x.shape, x.dtype)
    halves = x.reshape(len(x), -1, 2, head_dim // 2)
    swapped.reshape(halves.shape)[...] = halves[:, :, ::-1]
    swapped *= sin
    x *= cos
    if inverse:
        x -= swapped
    else:
        x += swapped
