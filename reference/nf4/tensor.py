"""The quantized tensor: one type for what quantize returns and dequantize takes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from nf4.blockwise import NonFiniteError, block_count, check_array, check_block_size, decode, encode
from nf4.codebooks import Codebook, get_codebook
from nf4.errors import InputError
from nf4.floats import DTYPES
from nf4.nested import NestedAbsmax, decode_nested, encode_nested


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """A tensor of n elements in 4-bit codes with one absmax a block (NF4-5.3, NF4-12.5).

    Raises InputError where the block size is not supported or the lengths and dtypes do not fit each other.
    """

    codes: NDArray[np.uint8]  # [ceil(n / 2)], the first element in the high nibble
    absmax: NDArray[np.float32] | NestedAbsmax  # [ceil(n / block_size)]
    shape: tuple[int, ...]
    dtype: np.dtype[Any]  # what it was quantized from: float32, float16 or bfloat16
    block_size: int
    codebook: Codebook

    def __post_init__(self) -> None:
        check_block_size(self.block_size)
        check_dtype(self.dtype)
        if min(self.shape, default=0) < 0:
            raise InputError(f"shape {list(self.shape)} has a negative size; sizes must be 0 or more")
        blocks = block_count(self.size, self.block_size)
        nested = isinstance(self.absmax, NestedAbsmax)
        scales = self.absmax.codes if isinstance(self.absmax, NestedAbsmax) else self.absmax
        what = f"quantized tensor of shape {list(self.shape)}, block size {self.block_size}: "
        check_array(what + "codes", self.codes, np.uint8, -(-self.size // 2))
        check_array(what + "absmax", scales, np.uint8 if nested else np.float32, blocks)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, QuantizedTensor):
            return NotImplemented
        return self._bits() == other._bits()

    def __hash__(self) -> int:
        return hash(self._bits())

    def _bits(self) -> tuple[Any, ...]:
        scales = self.absmax if isinstance(self.absmax, NestedAbsmax) else self.absmax.tobytes()
        return (self.shape, self.dtype, self.block_size, self.codebook, self.codes.tobytes(), scales)

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of codes and absmax (nested: its codes, absmax and offset), without the tables (NF4-5.4)."""
        return self.codes.nbytes + self.absmax.nbytes

    @property
    def bits_per_weight(self) -> float:
        """8 * nbytes / size; 0 for an empty tensor (NF4-5.4)."""
        return 8 * self.nbytes / self.size if self.size else 0.0

    def save(self, path: str | Path) -> None:
        """Write one safetensors file in the key layout of bitsandbytes, under the name "weight" (NF4-8)."""
        from nf4.formats.bitsandbytes import save_tensor

        save_tensor(self, path)

    @classmethod
    def load(cls, path: str | Path) -> QuantizedTensor:
        """Read what save wrote; InputError where the file is damaged or is something else (NF4-8)."""
        from nf4.formats.bitsandbytes import load_tensor

        return load_tensor(path)


def check_dtype(dtype: np.dtype[Any]) -> None:
    """Raise InputError unless dtype is float32, float16 or bfloat16, in native byte order (NF4-12.2)."""
    if dtype not in DTYPES.values():
        raise InputError(f"dtype {dtype} is not supported; convert to one of {', '.join(DTYPES)} first")


def quantize(
    x: NDArray[Any], block_size: int = 64, codebook: str | Codebook = "nf4", double_quant: bool = False
) -> QuantizedTensor:
    """Quantize x, of any shape in C order, to 4 bits an element (NF4-3; NF4-6 if double_quant; NF4-12.4).

    x is float32, float16 or bfloat16. Raises InputError on another dtype or block size, on an unknown
    codebook, on a NaN or an infinity, saying where it is, and if double_quant on an absmax so large that it
    would decode to an infinity (NF4-6.6).
    """
    x = np.asarray(x)
    check_dtype(x.dtype)
    check_block_size(block_size)
    book = get_codebook(codebook)
    try:
        codes, absmax = encode(np.ascontiguousarray(x).reshape(-1), block_size, book)
    except NonFiniteError as error:
        where = ", ".join(str(int(i)) for i in np.unravel_index(error.index, x.shape)) if x.ndim else ""
        raise InputError(
            f"cannot quantize: element {error.index} (index [{where}]) is {error.value}; "
            f"replace NaN and infinities with finite values first"
        ) from None
    scales = encode_nested(absmax) if double_quant else absmax
    return QuantizedTensor(codes, scales, x.shape, x.dtype, block_size, book)


def dequantize(
    q: QuantizedTensor, dtype: DTypeLike | None = None, out: NDArray[Any] | None = None
) -> NDArray[Any]:
    """Return the values of q as an array of q.shape, or out filled with them (NF4-4; NF4-6.4 if nested).

    dtype is float32, float16 or bfloat16; by default that of out, or else q.dtype. out is C-contiguous, of
    q.shape or flat, and of dtype. Raises InputError where out or dtype do not fit or an absmax is not finite.
    """
    kind = np.dtype(dtype) if dtype is not None else out.dtype if out is not None else q.dtype
    check_dtype(kind)
    if out is None:
        out = np.empty(q.shape, kind)
    elif out.dtype != kind or out.shape not in (q.shape, (q.size,)) or not out.flags.c_contiguous:
        raise InputError(
            f"out is {out.dtype} {list(out.shape)}{'' if out.flags.c_contiguous else ' (not contiguous)'}, "
            f"must be contiguous {kind} of shape {list(q.shape)} or [{q.size}]"
        )
    if isinstance(q.absmax, NestedAbsmax):
        absmax = decode_nested(q.absmax)
    else:
        absmax = q.absmax
        finite = np.isfinite(absmax)
        if not finite.all():
            block = int(np.argmin(finite))
            raise InputError(
                f"cannot dequantize: the absmax of block {block} is {absmax[block]}; the tensor is damaged"
            )
    decode(q.codes, absmax, q.block_size, q.codebook, out.reshape(-1))
    return out
