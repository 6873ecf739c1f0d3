"""The weights that are looked at: those of a model, of a file, or normal data; and how they fill bins."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nf4.blockwise import scale_rows
from nf4.codebooks import CODEBOOKS, Codebook
from nf4.errors import InputError
from nf4.floats import DTYPES, widen
from nf4.formats.checkpoint import LINEAR_WEIGHT, Checkpoint, check_finite, open_checkpoint
from nf4.formats.files import SafetensorsFile
from nf4.tensor import QuantizedTensor, quantize

NORMAL_WEIGHTS = 1 << 22

_LAYER = re.compile(r"(?:layers|h|blocks?|blk)\.(\d+)\.")
_ROWS = 1 << 18  # elements scaled at a time


@dataclass(frozen=True)
class Weight:
    """A tensor to quantize: its name, its kind (such as q_proj), its layer if it has one, how to read it.

    stored: its dtype in the file, such as F32, or Q4_1 where it was quantized before.
    """

    name: str
    kind: str
    layer: int | None
    stored: str
    read: Callable[[], NDArray[Any]]


def weights_of(path: Path) -> list[Weight]:
    """Return the linear weights of a model, or the matrices of one safetensors file.

    Raises InputError where there are none, or they are 4-bit already; reading one does for NaN and infinity.
    """
    if path.is_file() and path.suffix == ".safetensors":
        return _of_file(path)
    source = open_checkpoint(path)
    names = [name for name in source.names() if LINEAR_WEIGHT.fullmatch(name)]
    if not names:
        raise InputError(f"{path}: has no linear layers of the Llama family to look at")
    for name in names:
        if source.dtype(name) in CODEBOOKS:
            raise InputError(
                f"{path}: tensor {name!r} is {source.dtype(name)} already; give the original weights"
            )
    return [_weight(name, source) for name in names]


def _weight(name: str, source: Checkpoint) -> Weight:
    def read() -> NDArray[Any]:
        value = source.read(name)
        assert not isinstance(value, QuantizedTensor)
        check_finite(source, name, value)
        return value

    return Weight(name, *_place(name), source.dtype(name), read)


def _of_file(path: Path) -> list[Weight]:
    file = SafetensorsFile(path)

    def weight(name: str) -> Weight:
        def read() -> NDArray[Any]:
            value = file.read(name)
            if not np.isfinite(value).all():
                raise InputError(f"{path}: tensor {name!r} holds NaN or infinity; the file is damaged")
            return value

        return Weight(name, *_place(name), file.entries[name].dtype, read)

    found = [
        weight(name)
        for name, entry in file.entries.items()
        if entry.dtype in ("F32", "F16", "BF16") and len(entry.shape) == 2 and min(entry.shape) > 0
    ]
    if not found:
        raise InputError(f"{path}: holds no matrix of {', '.join(DTYPES)} to look at")
    return found


def _place(name: str) -> tuple[str, int | None]:
    """Return the kind and the layer that a tensor's name tells."""
    parts = [part for part in name.removesuffix(".weight").split(".") if not part.isdigit()]
    layer = _LAYER.search(name)
    return parts[-1], int(layer[1]) if layer else None


def normal_data(seed: int = 0, size: int = NORMAL_WEIGHTS) -> Weight:
    """Return values of N(0, 1) in float32, as if they were a weight."""
    return Weight(
        "normal data",
        "normal data",
        None,
        "F32",
        lambda: np.random.default_rng(seed).standard_normal(size, np.float32),
    )


def masses(weights: Iterable[Weight], codebook: Codebook, block_size: int) -> NDArray[np.float64]:
    """Return the share of the elements that get each value of the codebook, ascending."""
    counts = np.zeros(16, np.int64)
    for weight in weights:
        x = weight.read()
        both = np.bincount(quantize(x, block_size, codebook).codes, minlength=256).reshape(16, 16)
        counts += both.sum(0) + both.sum(1)
        if x.size % 2:
            counts[codebook.zero_code] -= 1  # the pad nibble
    ranks: NDArray[np.float64] = counts[codebook.codes] / counts.sum()
    return ranks


def scaled_histogram(
    weights: Sequence[Weight], block_size: int, edges: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return the share of the elements over their block's absmax between each two edges, without those that
    are the absmax of their block; blocks of zeros and a short last block are left out."""
    counts, total = np.zeros(len(edges) - 1, np.int64), 0
    for weight in weights:
        flat = weight.read().reshape(-1)
        flat = flat[: flat.size - flat.size % block_size]
        for start in range(0, flat.size, _ROWS):
            x = widen(flat[start : start + _ROWS]).reshape(-1, block_size)
            s, absmax = scale_rows(x)
            total += int(np.count_nonzero(absmax)) * block_size
            counts += np.histogram(s[np.abs(x) < absmax[:, None]], edges)[0]  # none in a block of zeros
    return counts / max(total, 1)
