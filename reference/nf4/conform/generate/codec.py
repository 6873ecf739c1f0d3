"""The vectors of chapters 1 to 7 and 12: codebooks, conversion, encode, decode, double quantization."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nf4.codebooks import CODEBOOKS
from nf4.conform.generate import make
from nf4.conform.values import NAMES
from nf4.conform.vectors import Vector


def vectors() -> Iterator[Vector]:
    """Yield the vectors of the codec."""
    yield from _thresholds()


def _tensor(x: NDArray[Any], block_size: int = 64, codebook: str = "nf4") -> dict[str, Any]:
    return {
        "x": x,
        "shape": list(x.shape),
        "dtype": NAMES[x.dtype],
        "block_size": block_size,
        "codebook": codebook,
    }


def _thresholds() -> Iterator[Vector]:
    for name, book in CODEBOOKS.items():
        below, above = (np.nextafter(book.thresholds, np.float32(to)) for to in (-np.inf, np.inf))
        s = np.stack([below, book.thresholds, above], axis=1).reshape(-1)
        yield make(
            "quantize",
            f"{name}-thresholds",
            "2.2 3.5" + (" 2.3" if name == "nf4" else ""),
            f"Every threshold of {name} one ulp below, at and one ulp above, in a block whose absmax is 1.",
            _tensor(np.append(s, np.float32(1)).astype(np.float32), 64, name),
            flags="TieRule NibbleOrder",
        )
