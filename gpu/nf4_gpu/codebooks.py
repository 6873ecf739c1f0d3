"""A codebook's tables on the device (NF4-2), made once a device."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import cupy
import numpy as np
from nf4.codebooks import Codebook
from nf4.nested import DYNAMIC_MAP, THRESHOLDS
from numpy.typing import NDArray

from nf4_gpu.arrays import constant

BUCKETS = 33  # sixteenths of [-1, 1], and 1 itself


@dataclass(frozen=True, eq=False)
class Tables:
    """What the kernels read of a codebook; the fields are device arrays."""

    values: cupy.ndarray  # float32 [16], by code
    thresholds: cupy.ndarray  # uint32 [17]: the bits of 15, infinite where there are fewer; 16 nibbles
    buckets: cupy.ndarray | None  # uint32 [33, 2]: see buckets


@cache
def tables(device: int, codebook: Codebook) -> Tables:
    """Return the tables of a codebook on the current device, of that number."""
    thresholds = np.full(15, np.inf, np.float32)
    thresholds[: codebook.thresholds.size] = codebook.thresholds
    codes = np.zeros(16, np.uint64)
    codes[: codebook.codes.size] = codebook.codes
    nibbles = np.bitwise_or.reduce(codes << (np.arange(16, dtype=np.uint64) * np.uint64(4)))
    packed = np.concatenate([thresholds.view(np.uint32), np.array([nibbles]).view(np.uint32)])
    found = buckets(codebook)
    return Tables(constant(codebook.values), constant(packed), None if found is None else constant(found))


def buckets(codebook: Codebook) -> NDArray[np.uint32] | None:
    """Return, for k from -16 to 16, the threshold in [k / 16, (k + 1) / 16) and the number of those below.

    uint32 [33, 2]; the threshold as its bits, infinite where there is none. None where a sixteenth holds two,
    where a threshold is not inside (-1, 1), or where a rank is not its code.
    """
    thresholds = codebook.thresholds
    if not codebook.in_order or np.abs(thresholds).max() >= 1:
        return None
    result = np.empty((BUCKETS, 2), np.uint32)
    for row, k in zip(result, range(-16, 17), strict=True):
        below = int(np.count_nonzero(thresholds < np.float32(k / 16)))
        inside = thresholds[(thresholds >= np.float32(k / 16)) & (thresholds < np.float32((k + 1) / 16))]
        if inside.size > 1:
            return None
        row[0] = np.append(inside, np.float32(np.inf))[:1].view(np.uint32)[0]
        row[1] = below
    return result


@cache
def dynamic_map(device: int) -> tuple[cupy.ndarray, cupy.ndarray, cupy.ndarray]:
    """Return the 8-bit map, float32 [256], its thresholds, [255], and starts, on the device (NF4-6.2)."""
    return constant(DYNAMIC_MAP), constant(THRESHOLDS), constant(starts())


def starts() -> NDArray[np.uint8]:
    """Return by the upper 13 bits of a number s the count of thresholds below every such s, uint8 [8192].

    At most three more thresholds are below some such s: a search of two steps then finds the code.
    """
    lowest = np.arange(8192, dtype=np.uint32) << np.uint32(19)
    ends = np.stack([lowest, lowest | np.uint32(0x7FFFF)]).view(np.float32)
    below: NDArray[Any] = np.asarray(np.searchsorted(THRESHOLDS, np.fmin(*ends), side="left"))
    return below.astype(np.uint8)
