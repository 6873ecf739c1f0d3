"""The LoRA linear layer of the exact tier, for linear layers that share their input, and its backward."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nf4.exact.grid import Gridded, columns, product, rows
from nf4.lora import Dropout, LoRA, LoRALinear, Workspace
from nf4.random import drop_threshold

Float32 = NDArray[np.float32]

_FLOAT32 = np.dtype(np.float32)


@dataclass
class LinearCache:
    """What backward needs of a layer, beside its input: Z [T, rank], and the mask's bits where one drops."""

    z: Float32 | None
    bits: NDArray[np.uint8] | None


Gradients = tuple[Float32, Float32] | tuple[None, None]
"""Memory for those of an adapter, by sequence: dA [sequences, rank, in] and dB [sequences, out, rank]."""


def forward(
    layers: Sequence[LoRALinear],
    x: Float32,
    dropout: Dropout | None,
    outs: Sequence[Float32],
    space: Workspace,
) -> list[LinearCache]:
    """Write y [T, out] of each layer for the x [T, in] they share into its out (NF4-15.1).

    Without `dropout` nothing is dropped. Raises InputError where an element is not finite.
    """
    left = rows(x, space.take("input", x.shape, np.float64))
    caches = []
    for layer, y in zip(layers, outs, strict=True):
        weight = space.weight(layer.weight, _FLOAT32)
        right = rows(weight, space.take("weight", weight.shape, np.float64))
        product(left, right.mT, y, space)
        if layer.bias is not None:
            np.add(y, layer.bias.astype(np.float32, copy=False), out=y)
        cache = project(layer, x, left, dropout, space)
        if layer.lora is not None and cache.z is not None:
            low = space.take("low rank", y.shape, np.float32)
            np.add(y, product(cache.z, _factor(layer.lora.B).T, low, space), out=y)
        caches.append(cache)
    return caches


def project(
    layer: LoRALinear, x: Float32, left: Gridded | None, dropout: Dropout | None, space: Workspace
) -> LinearCache:
    """The cache of forward without its output: all that a recomputation for backward needs.

    left: x on its grid, if it is at hand.
    """
    lora = layer.lora
    if lora is None:
        return LinearCache(None, None)
    bits = None
    kept: Float32 | Gridded = x if left is None else left
    if dropout is not None and drop_threshold(lora.dropout):
        bits = dropout.mask(lora, x.shape[1])
        kept = dropout.apply(bits, x, space.take("kept", x.shape, np.float32))
    z = product(kept, _factor(lora.A).T, space=space)  # [T, r]
    z *= scale(lora, bits is not None)
    return LinearCache(z, bits)


def backward(
    layers: Sequence[LoRALinear],
    douts: Sequence[Float32],
    caches: Sequence[LinearCache],
    x: Float32,
    dropout: Dropout | None,
    lengths: tuple[int, ...],
    space: Workspace,
    outs: Sequence[Gradients],
    need_dx: bool = True,
) -> Float32 | None:
    """dout [T, out] of each layer -> the sum of their dx [T, in], None unless need_dx (NF4-15.1).

    dA and dB are written into outs, of the layers that have an adapter. Raises InputError where an element is
    not finite.
    """
    dx: Float32 | None = None
    for layer, dout, cache, (dA, dB) in zip(layers, douts, caches, outs, strict=True):
        if dA is None and not need_dx:
            continue
        left = rows(dout, space.take("gradient", dout.shape, np.float64))
        part: Float32 | None = None
        if need_dx:
            weight = space.weight(layer.weight, _FLOAT32)
            right = columns(weight, space.take("weight", weight.shape, np.float64))
            part = space.new(x.shape, np.float32) if dx is None else space.take("dx", x.shape, np.float32)
            product(left, right, part, space)
        if layer.lora is not None and dA is not None and dB is not None and cache.z is not None:
            dz = product(left, _factor(layer.lora.B), space=space)  # [T, r]
            dz *= scale(layer.lora, cache.bits is not None)
            _gradients(dout, dz, cache, x, dropout, lengths, space, dA, dB)
            if part is not None:
                _add_low_rank(layer.lora, dz, cache, part, dropout, space)
        if part is not None:
            if dx is None:
                dx = part
            else:
                dx += part
    return dx


def _gradients(
    dout: Float32,
    dz: Float32,
    cache: LinearCache,
    x: Float32,
    dropout: Dropout | None,
    lengths: tuple[int, ...],
    space: Workspace,
    dA: Float32,
    dB: Float32,
) -> None:
    kept = x
    if cache.bits is not None and dropout is not None:
        kept = dropout.apply(cache.bits, x, space.take("kept", x.shape, np.float32))
    start = 0
    for i, n in enumerate(lengths):
        sequence = slice(start, start + n)
        product(dz[sequence].T, kept[sequence], dA[i], space)
        assert cache.z is not None
        product(dout[sequence].T, cache.z[sequence], dB[i], space)
        start += n


def _add_low_rank(
    lora: LoRA, dz: Float32, cache: LinearCache, dx: Float32, dropout: Dropout | None, space: Workspace
) -> None:
    part = product(dz, _factor(lora.A), space.take("low rank", dx.shape, np.float32), space)
    if cache.bits is not None and dropout is not None:
        dropout.apply(cache.bits, part, part)
    dx += part


def _factor(factor: NDArray[Any]) -> Float32:
    return factor.astype(np.float32, copy=False)


def scale(lora: LoRA, drops: bool) -> np.float32:
    """c of NF4-15.1: the adapter's scale, over the probability of being kept where a mask drops."""
    keep = 65536 / (65536 - drop_threshold(lora.dropout)) if drops else 1.0
    return np.float32(lora.scale * keep)
