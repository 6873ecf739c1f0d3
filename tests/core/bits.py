"""What the tests of the codec share: bit patterns drawn by Hypothesis, and tables read from the spec."""

import re
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import ml_dtypes
import numpy as np
from hypothesis import settings
from numpy.typing import NDArray

SPEC = Path(__file__).parents[2] / "spec"
DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
UINTS = {"float32": np.uint32, "float16": np.uint16, "bfloat16": np.uint16}
INFINITY = {"float32": 0x7F800000, "float16": 0x7C00, "bfloat16": 0x7F80}

few = settings(deadline=None, max_examples=40)


def spec_text(chapter: str) -> str:
    return next(SPEC.glob(f"{chapter}-*.md")).read_text(encoding="utf-8")


def spec_clause(clause: str) -> str:
    """The text of one clause, such as "2.3"."""
    text = spec_text(clause.split(".", maxsplit=1)[0].zfill(2))
    found = re.search(rf"^### NF4-{re.escape(clause)} .*?(?=^### |\Z)", text, re.MULTILINE | re.DOTALL)
    assert found, f"no clause NF4-{clause}"
    return found.group()


def spec_block(clause: str) -> list[int]:
    """The hexadecimal words in the fenced block of a clause."""
    return [int(word, 16) for word in spec_clause(clause).split("```")[1].split()]


def bits_of(x: NDArray[Any]) -> list[int]:
    """The bit pattern of each element of x, flat."""
    flat = np.ascontiguousarray(x).reshape(-1)
    return [int(b) for b in flat.view(f"u{x.dtype.itemsize}")]


def from_bits(bits: list[int], dtype: str) -> NDArray[Any]:
    return np.array(bits, UINTS[dtype]).view(DTYPES[dtype])


@st.composite
def finite_bits(draw: st.DrawFn, dtype: str, min_size: int = 1, max_size: int = 150) -> list[int]:
    """Bit patterns of finite numbers: any at all, or of few exponents, or a few patterns over and over."""
    infinity, sign = INFINITY[dtype], 1 << 8 * DTYPES[dtype].itemsize - 1
    kind = draw(st.sampled_from(["any", "near", "repeated", "tiny"]))
    if kind == "any":
        magnitude = st.integers(0, infinity - 1)
    elif kind == "near":
        low = draw(st.integers(0, infinity - 1))
        magnitude = st.integers(low, min(infinity - 1, low + (infinity >> 5)))
    elif kind == "repeated":
        magnitude = st.sampled_from(
            [*draw(st.lists(st.integers(0, infinity - 1), min_size=1, max_size=3)), 0]
        )
    else:
        magnitude = st.integers(0, infinity >> 5)
    pattern = st.builds(lambda m, s: m | (sign if s else 0), magnitude, st.booleans())
    return draw(st.lists(pattern, min_size=min_size, max_size=max_size))
