"""Rotary position embeddings and their scaling variants."""

import math
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from nf4.lora import Workspace
from nf4.model.config import LlamaConfig, RopeConfig

Array = NDArray[Any]


def inverse_frequencies(config: LlamaConfig, length: int) -> tuple[NDArray[np.float64], float]:
    """The angle a position adds to each pair of a head, float64 [head_dim / 2], and a factor on cos and sin.

    length: positions in the sequence; "dynamic" and "longrope" change their frequencies with it.
    """
    rope, dim = config.rope, config.head_dim
    theta = rope.theta
    factor = rope.factor
    if rope.type == "dynamic":
        longest = max(length, config.max_position_embeddings)
        growth = factor * longest / config.max_position_embeddings - (factor - 1)
        theta *= growth ** (dim / (dim - 2))
    inv_freq = theta ** -(np.arange(0, dim, 2, dtype=np.float64) / dim)
    if rope.type == "linear":
        return inv_freq / factor, 1.0
    if rope.type == "llama3":
        return _llama3(rope, inv_freq), 1.0
    if rope.type == "yarn":
        return _yarn(rope, inv_freq, dim)
    if rope.type == "longrope":
        return _longrope(rope, inv_freq, length)
    return inv_freq, 1.0


def _llama3(rope: RopeConfig, inv_freq: NDArray[np.float64]) -> NDArray[np.float64]:
    """Llama 3.1: long wavelengths are divided by the factor, short ones kept, those between blended."""
    turns = rope.original_max_position_embeddings * inv_freq / (2 * math.pi)
    kept = np.clip((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor), 0, 1)
    return inv_freq * (kept + (1 - kept) / rope.factor)


def _yarn(rope: RopeConfig, inv_freq: NDArray[np.float64], dim: int) -> tuple[NDArray[np.float64], float]:
    """YaRN (arXiv 2309.00071): interpolate slow pairs, keep fast ones, ramp between; soften attention."""
    original = rope.original_max_position_embeddings

    def pair_turning(turns: float) -> float:
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = pair_turning(rope.beta_fast), pair_turning(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = high - low if high != low else 0.001
    interpolated = np.clip((np.arange(dim // 2) - low) / width, 0, 1)

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0

    attention = rope.attention_factor
    if attention is None:
        both = rope.mscale and rope.mscale_all_dim
        attention = mscale(rope.mscale or 1) / mscale(rope.mscale_all_dim or 1) if both else mscale(1)
    return inv_freq * (interpolated / rope.factor + (1 - interpolated)), attention


def _longrope(
    rope: RopeConfig, inv_freq: NDArray[np.float64], length: int
) -> tuple[NDArray[np.float64], float]:
    """LongRoPE (arXiv 2402.13753): a divisor for each pair, one list up to the trained length, one beyond."""
    original = rope.original_max_position_embeddings
    attention = rope.attention_factor
    if attention is None:
        attention = math.sqrt(1 + math.log(rope.factor) / math.log(original)) if rope.factor > 1 else 1.0
    return inv_freq / np.array(rope.long_factor if length > original else rope.short_factor), attention


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
