"""Dropout on the device: the reference's masks, drawn in the kernel that applies them."""

import cupy
import numpy as np
from cupy.cuda import runtime
from nf4.errors import InputError
from nf4.lora import Dropout
from nf4.random import drop_threshold

from nf4_gpu.arrays import KINDS
from nf4_gpu.compile import kernel


def drop(
    dropout: Dropout, stream: int, p: float, x: cupy.ndarray, out: cupy.ndarray, add: bool = False
) -> None:
    """Launch out = x where the mask keeps and 0 elsewhere, or with add out += x where it keeps (NF4-9.4).

    x and out are [T, features], the packed sequences of dropout.lengths one after the other. Raises
    InputError where these are not T rows, or are more than a sample can draw (NF4-11.4).
    """
    lengths = dropout.lengths
    if sum(lengths) != len(x) or len(dropout.samples) != len(lengths):
        raise InputError(
            f"dropout is for {len(dropout.samples)} samples of lengths {list(lengths)}; x has {len(x)} rows"
        )
    function = kernel(runtime.getDevice(), "random.cu", "drop", DTYPE=KINDS[x.dtype])
    key = (np.uint32(dropout.seed & 0xFFFFFFFF), np.uint32(dropout.seed >> 32 & 0xFFFFFFFF))
    threshold = np.uint32(drop_threshold(p))
    row = 0
    for length, sample in zip(lengths, dropout.samples, strict=True):
        part, target = x[row : row + length], out[row : row + length]
        row += length
        n = part.size
        if n > 8 << 32:
            raise InputError(
                f"a mask of {n} elements; one sample draws at most 2^35, so split it over samples"
            )
        if n:
            draw = (*key, np.uint32(stream & 0xFFFFFFFF), np.uint32(sample & 0xFFFFFFFF), threshold)
            function((-(-n // 2048),), (256,), (part, n, *draw, add, target))
