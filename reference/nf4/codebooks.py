"""The four codebooks as tables, and what follows from a table: thresholds and the order of the codes."""

from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from nf4.errors import InputError
from nf4.floats import round_to_float32


def from_hex(table: str) -> NDArray[np.float32]:
    """Return the float32 values whose bits table lists in hexadecimal, eight digits each; read-only."""
    values = np.frombuffer(bytes.fromhex(table), ">f4").astype(np.float32)
    values.flags.writeable = False
    return values


def midpoint_thresholds(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return RN of the exact midpoints of neighbours, float32 [n] ascending -> float32 [n - 1] (NF4-2.2)."""
    exact = [Fraction(float(v)) for v in values]
    return np.array([round_to_float32((a + b) / 2) for a, b in pairwise(exact)], np.float32)


@dataclass(frozen=True, eq=False)
class Codebook:
    """Sixteen float32 values, indexed by code (NF4-2.1).

    Raises InputError unless values are 16 finite float32 values, at least two of them different.
    """

    name: str
    values: NDArray[np.float32]  # [16]

    def __post_init__(self) -> None:
        if self.values.shape != (16,) or self.values.dtype != np.float32:
            raise InputError(
                f"codebook {self.name}: values are {self.values.dtype} {list(self.values.shape)}, "
                "must be float32 [16]"
            )
        if not np.isfinite(self.values).all() or len(np.unique(self.values)) < 2:
            raise InputError(
                f"codebook {self.name}: values must be finite and not all equal, not {self.values}"
            )
        values = self.values.copy()
        values.flags.writeable = False
        object.__setattr__(self, "values", values)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Codebook):
            return NotImplemented
        return self.name == other.name and self.values.tobytes() == other.values.tobytes()

    def __hash__(self) -> int:
        return hash((self.name, self.values.tobytes()))

    @cached_property
    def codes(self) -> NDArray[np.uint8]:
        """The code of each distinct value in ascending order, uint8; of equal values the lowest (NF4-2.2)."""
        return np.unique(self.values, return_index=True)[1].astype(np.uint8)  # -0.0 equals +0.0 here

    @cached_property
    def thresholds(self) -> NDArray[np.float32]:
        """Where a value ends and the next begins, float32 [len(codes) - 1], ascending (NF4-2.2, NF4-2.3)."""
        return midpoint_thresholds(self.values[self.codes])

    @cached_property
    def zero_code(self) -> int:
        """The code of a zero: in an all-zero block, and in the pad nibble (NF4-3.4, NF4-5.2)."""
        return int(self.codes[np.count_nonzero(self.thresholds < 0)])

    @cached_property
    def in_order(self) -> bool:
        """Whether the values ascend with the codes, as in nf4, so that a rank is its code."""
        return np.array_equal(self.codes, np.arange(self.codes.size))

    @cached_property
    def quads(self) -> NDArray[np.float32]:
        """The four values in each pair of bytes, float32 [65536, 4], by the pair as a uint16 (NF4-5.1)."""
        first, second = np.arange(65536, dtype=np.uint16).view(np.uint8).reshape(-1, 2).T
        return self.values[np.stack([first >> 4, first & 15, second >> 4, second & 15], axis=1)]


CODEBOOKS = {
    book.name: book
    for book in (
        Codebook(
            "nf4",
            from_hex(
                "bf800000 bf3239b1 bf066b30 beca32a0 be91a24d be3d353f bdba7871 00000000"
                "  3da2faff 3e24cae3 3e7c04dd 3ead033a 3ee1a4b8 3f1007ab 3f3913b3 3f800000"
            ),
        ),
        # RN of {0, 1/16, 8, 12, 4, 6, 2, 3} / 12, then the same negated, but for a second +0
        Codebook(
            "fp4",
            from_hex(
                "00000000 3baaaaab 3f2aaaab 3f800000 3eaaaaab 3f000000 3e2aaaab 3e800000"
                "  00000000 bbaaaaab bf2aaaab bf800000 beaaaaab bf000000 be2aaaab be800000"
            ),
        ),
        # RN of {0, 0.5, 1, 1.5, 2, 3, 4, 6} / 6, then the same with the sign set
        Codebook(
            "fp4-e2m1",
            from_hex(
                "00000000 3daaaaab 3e2aaaab 3e800000 3eaaaaab 3f000000 3f2aaaab 3f800000"
                "  80000000 bdaaaaab be2aaaab be800000 beaaaaab bf000000 bf2aaaab bf800000"
            ),
        ),
        # RN of k / 7 at code k + 7; code 15 is spare
        Codebook(
            "int4",
            from_hex(
                "bf800000 bf5b6db7 bf36db6e bf124925 bedb6db7 be924925 be124925 00000000"
                "  3e124925 3e924925 3edb6db7 3f124925 3f36db6e 3f5b6db7 3f800000 3f800000"
            ),
        ),
    )
}


def get_codebook(codebook: str | Codebook) -> Codebook:
    """Return the codebook of that name, or the Codebook itself (NF4-2.1). InputError: no such name."""
    if isinstance(codebook, Codebook):
        return codebook
    if codebook not in CODEBOOKS:
        raise InputError(f"there is no codebook {codebook!r}; choose one of {', '.join(CODEBOOKS)}")
    return CODEBOOKS[codebook]


def derive_nf4() -> NDArray[np.float32]:
    """Return the NF4 values as QLoRA derives them from normal quantiles, float32 [16] (NF4-2.4, informative).

    Eight positive and seven negative quantiles of N(0, 1), at probabilities evenly spaced from 0.9677083 to
    0.5 (the median left out), and zero, divided by the greatest. The probabilities are float32, as in the
    original: the last bits of the table come from that. Needs SciPy.
    """
    from scipy.special import ndtri

    def quantiles(n: int) -> NDArray[np.float64]:
        return np.asarray(ndtri(_linspace32(0.9677083, 0.5, n)[:-1].astype(np.float64)))

    values = np.sort(np.concatenate([quantiles(9), [0.0], -quantiles(8)])).astype(np.float32)
    table: NDArray[np.float32] = values / values.max()
    return table


def _linspace32(start: float, stop: float, n: int) -> NDArray[np.float32]:
    """Return n float32 values from start to stop, counted from the nearer end, every operation in float32."""
    first, last = np.float32(start), np.float32(stop)
    step = (last - first) / np.float32(n - 1)
    i = np.arange(n, dtype=np.float32)
    return np.where(i < n // 2, first + step * i, last - step * (np.float32(n - 1) - i))
