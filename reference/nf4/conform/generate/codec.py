"""The vectors of chapters 1 to 7 and 12: codebooks, conversion, encode, decode, double quantization."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nf4.blockwise import BLOCK_SIZES, block_count, encode, scale_rows
from nf4.codebooks import CODEBOOKS, Codebook, midpoint_thresholds
from nf4.conform.generate import make
from nf4.conform.values import DTYPES, NAMES
from nf4.conform.vectors import Vector
from nf4.floats import narrow, widen
from nf4.nested import DYNAMIC_MAP, NESTED_BLOCK_SIZE, NestedAbsmax, decode_nested, encode_nested
from nf4.random import philox4x32

Float32 = NDArray[np.float32]

NF4 = CODEBOOKS["nf4"]
LARGEST = np.finfo(np.float32).max
# Shapes by what they are for; of the first, with block sizes, rows are not whole blocks
_CROSSED: list[tuple[list[int], int]] = [([3, 20], 32), ([4, 48], 64), ([2, 3, 7], 32), ([5, 1, 33], 128)]
_SINGLE: list[tuple[str, list[int]]] = [("scalar", []), ("one", [1]), ("one-by-one", [1, 1, 1])]
_EMPTY: list[tuple[str, list[int]]] = [("empty", [0]), ("empty-rows", [0, 64]), ("empty-columns", [3, 0, 2])]
_UINTS: dict[int, Any] = {2: np.uint16, 4: np.uint32}


def vectors() -> Iterator[Vector]:
    """Yield the vectors of the codec."""
    yield from _codebooks()
    yield from _widen()
    yield from _narrow()
    yield from _quantize_values()
    yield from _quantize_layout()
    yield from _quantize_refused()
    yield from _dequantize()
    yield from _dequantize_refused()
    yield from _encode_absmax_means()
    yield from _encode_absmax_codes()
    yield from _decode_absmax()
    yield from _double()
    yield from _storage()


# Values to build inputs from


def _bits(*patterns: int) -> Float32:
    return np.array(patterns, np.uint32).view(np.float32)


def _noise(seed: int, n: int, dtype: str = "float32", spread: int = 8) -> NDArray[Any]:
    """n numbers of either sign, their exponents even over `spread` values up to that of 1."""
    counter = np.zeros((n, 4), np.uint32)
    counter[:, 0] = np.arange(n)
    words = philox4x32(counter, (seed, 0))
    exponent = 127 - words[:, 1] % np.uint32(spread)
    bits = (words[:, 0] & np.uint32(0x807FFFFF)) | exponent << np.uint32(23)
    return narrow(bits.astype(np.uint32).view(np.float32), DTYPES[dtype])


def _ulps(x: Float32, k: int) -> Float32:
    """The floats k places farther from zero than those of x, of which none is crossed."""
    return (x.view(np.int32) + np.int32(k)).view(np.float32)


def _around(x: Float32) -> Float32:
    """Every element of x with its neighbours below and above."""
    below, above = (np.nextafter(x, np.float32(to)) for to in (-np.inf, np.inf))
    return np.stack([below, x, above], axis=1).reshape(-1).astype(np.float32)


def _decided_by(t: Float32, absmax: np.float32, wrong: str) -> Float32:
    """For each threshold in t an x whose s lies on the other side of it, were s computed in the wrong way.

    wrong is "division" (x / absmax) or by how many ulp the reciprocal is wrong. Thresholds without such an x
    within 3 ulp of t * absmax are left out.
    """
    reciprocal = np.float32(1) / np.array([absmax], np.float32)
    found = []
    for threshold in t:
        near = np.array([np.float64(threshold) * np.float64(absmax)]).astype(np.float32)
        x = np.concatenate([_ulps(near, k) for k in (0, 1, -1, 2, -2, 3, -3)])
        s = x / absmax if wrong == "division" else x * _ulps(reciprocal, int(wrong))
        differs = (s > threshold) != (x * reciprocal > threshold)
        found += list(x[differs][:1])
    return np.array(found, np.float32)


def _flips(absmax: np.float32, book: Codebook = NF4) -> Float32:
    """For each threshold the last x below it and the first above, of a block with that absmax."""
    found = []
    for threshold in book.thresholds:
        near = np.array([np.float64(threshold) * np.float64(absmax)]).astype(np.float32)
        bits = int(near.view(np.int32)[0]) & 0x7FFFFFFF
        low, high = max(bits - 4, 0), min(bits + 4, int(absmax.view(np.int32)))
        x = np.copysign(np.arange(low, high + 1, dtype=np.int32).view(np.float32), threshold)
        s, _ = scale_rows(np.append(x, absmax)[None])
        above = s[0, :-1] > threshold
        change = np.flatnonzero(above[1:] != above[:-1])
        found += [x[change[0] : change[0] + 2]] if change.size else [near]
    return np.concatenate(found).astype(np.float32)


def _block(x: Float32, size: int = 32) -> Float32:
    """x with zeros behind it, to fill a block."""
    return np.append(x, np.zeros(-x.size % size, np.float32)).astype(np.float32)


# Inputs and steps of the operations


def _tensor(
    x: NDArray[Any], block_size: int = 32, codebook: str = "nf4", shape: list[int] | None = None
) -> dict[str, Any]:
    return {
        "x": x,
        "shape": list(x.shape) if shape is None else shape,
        "dtype": NAMES[x.dtype],
        "block_size": block_size,
        "codebook": codebook,
    }


def _scaling(x: Float32, block_size: int) -> dict[str, Any]:
    """Steps reciprocal and s of x (NF4-3.3)."""
    blocks = [x[start : start + block_size] for start in range(0, x.size, block_size)]
    scaled = [scale_rows(block[None]) for block in blocks]
    absmax = np.concatenate([block_absmax for _, block_absmax in scaled])
    with np.errstate(over="ignore", divide="ignore"):
        reciprocal = 1 / np.where(absmax <= np.float32(2**-128), absmax * np.float32(2**64), absmax)
    return {
        "reciprocal": np.where(absmax > 0, reciprocal, np.float32(0)).astype(np.float32),
        "s": np.concatenate([s[0] for s, _ in scaled]),
    }


def _ranked(x: NDArray[Any], block_size: int, book: Codebook) -> dict[str, Any]:
    steps = _scaling(widen(x), block_size)
    ranks = np.searchsorted(book.thresholds, steps["s"], side="left")  # as many as are below
    return {**steps, "ranks": ranks.astype(np.uint8)}


def _centred(absmax: Float32) -> dict[str, Any]:
    centred = absmax - encode_nested(absmax).offset
    return {"centred": centred, **_scaling(centred, NESTED_BLOCK_SIZE)}


def _encode(
    slug: str,
    clauses: str,
    comment: str,
    x: NDArray[Any],
    flags: str = "",
    block_size: int = 32,
    codebook: str = "nf4",
) -> Vector:
    """A vector of quantize with its steps, for x of few elements."""
    steps = _ranked(x.reshape(-1), block_size, CODEBOOKS[codebook])
    fields = _tensor(x, block_size, codebook)
    return make("quantize", slug, clauses, comment, fields, flags=flags, steps=steps)


# Chapters 2 and 7


def _codebooks() -> Iterator[Vector]:
    for name in CODEBOOKS:
        yield make(
            "codebook",
            f"codebook-{name}",
            "2.1 2.2" + (" 2.3" if name == "nf4" else ""),
            f"The values of {name} by code and its thresholds.",
            {"codebook": name},
            flags="CodebookRounded",
        )
    yield make(
        "codebook",
        "codebook-unknown",
        "2.1",
        "A codebook nobody has.",
        {"codebook": "nf3"},
        refused="There is no codebook of this name.",
    )


_HALF_SIGNIFICANDS = (0, 1, 0x155, 0x200, 0x3FF)
_BFLOAT16_SIGNIFICANDS = (0, 1, 0x55, 0x7F)


def _widen() -> Iterator[Vector]:
    half = np.array([e << 10 | f for e in range(31) for f in _HALF_SIGNIFICANDS], np.uint16)
    bfloat = np.array(
        [e << 7 | f for e in (0, 1, 2, 64, 126, 127, 128, 253, 254) for f in _BFLOAT16_SIGNIFICANDS],
        np.uint16,
    )
    for name, bits, infinity in (("float16", half, 0x7C00), ("bfloat16", bfloat, 0x7F80)):
        x = np.concatenate([bits, bits | 0x8000, [infinity, infinity | 0x8000]]).astype(np.uint16)
        yield make(
            "widen",
            f"widen-{name}",
            "7.1 1.1",
            f"{name} numbers of every kind of exponent: zeros, subnormals, the largest and the infinities.",
            {"x": x.view(DTYPES[name]), "dtype": name},
            flags="FlushSubnormal" if name == "bfloat16" else "",
        )
        nans = np.array([infinity | 1, infinity | (infinity >> 1 & ~infinity), 0x7FFF], np.uint16)
        yield make(
            "widen",
            f"widen-{name}-nan",
            "7.1",
            f"{name} NaNs, quiet and signalling, with different payloads: one NaN, with their sign.",
            {"x": np.concatenate([nans, nans | 0x8000]).view(DTYPES[name]), "dtype": name},
            flags="NanPayload",
        )


def _narrow() -> Iterator[Vector]:
    upper = [0x0000, 0x0001, 0x007F, 0x0080, 0x3F7F, 0x3F80, 0x3F81, 0x42FE, 0x7F7E, 0x7F7F]
    bits = [h << 16 | low for h in upper for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)]
    x = _bits(*bits, 0x7F800000)
    yield make(
        "narrow",
        "narrow-bfloat16",
        "7.2 1.1",
        "At and around midpoints of two bfloat16: subnormal, odd and even, and past the largest.",
        {"x": np.concatenate([x, -x]), "dtype": "bfloat16"},
        flags="TruncatedConversion FlushSubnormal OverflowClamped",
    )
    # Midpoints of two float16 by the bits of the lower one: subnormal, normal, odd and even, the largest
    lower = [0, 1, 2, 0x1FF, 0x200, 0x3FE, 0x3FF, 0x400, 0x401, 0x3BFF, 0x3C00, 0x3C01, 0x7BFE]
    pairs = np.array([[h, h + 1] for h in lower], np.uint16).view(np.float16).astype(np.float32)
    midpoints = np.append(pairs.mean(axis=1, dtype=np.float32), np.float32(65520))
    x = np.concatenate([_around(midpoints), pairs[:, 0], _bits(1, 0x007FFFFF, 0x7F7FFFFF, 0x7F800000)])
    yield make(
        "narrow",
        "narrow-float16",
        "7.3 1.1",
        "At and around midpoints of two float16: subnormal, odd and even, and past the largest.",
        {"x": np.concatenate([x, -x]).astype(np.float32), "dtype": "float16"},
        flags="TruncatedConversion FlushSubnormal OverflowClamped",
    )
    nans = (0x7F800001, 0x7FBFFFFF, 0x7FC00000, 0x7FC00001, 0x7FFF7FFF, 0x7FFF8000, 0x7FFFFFFF)
    for name, clause in (("bfloat16", "7.2"), ("float16", "7.3")):
        yield make(
            "narrow",
            f"narrow-{name}-nan",
            clause,
            f"NaNs whose payload could get lost or carry into the sign: one {name} NaN, with their sign.",
            {"x": _bits(*nans, *(n | 0x80000000 for n in nans)), "dtype": name},
            flags="NanPayload",
        )


# Chapters 3 and 5


def _quantize_values() -> Iterator[Vector]:
    for name, book in CODEBOOKS.items():
        yield _encode(
            f"{name}-thresholds",
            "2.1 2.2 3.5" + (" 2.3" if name == "nf4" else ""),
            f"Every threshold of {name} one ulp below, at and one ulp above, in a block whose absmax is 1.",
            _block(np.append(_around(book.thresholds), np.float32(1)), 64),
            "TieRule NearestSearch" + ("" if name in {"nf4", "int4"} else " CodeOrder"),
            64,
            name,
        )
    # absmax for which every threshold has an x that the reciprocal and a true division put on different sides
    decisive = {"nf4": 0x3FFED6A2, "fp4": 0x3FF3B212, "fp4-e2m1": 0x3FE4EB3B, "int4": 0x3FF2084F}
    for name, bits in decisive.items():
        absmax, book = _bits(bits)[0], CODEBOOKS[name]
        x = np.append(_decided_by(book.thresholds, absmax, "division"), absmax)
        yield _encode(
            f"{name}-reciprocal",
            "3.3 1.2",
            f"By each threshold of {name} a value that a true division puts on its other side.",
            _block(np.append(x, -x)),
            "TrueDivision",
            codebook=name,
        )
        if name == "nf4":
            yield _encode(
                "nf4-reciprocal-short-block",
                "3.1 3.3",
                "The values of nf4-reciprocal in a short last block: it too is multiplied by its reciprocal.",
                x,
                "TrueDivision TailDivision",
            )
    absmax = _bits(decisive["nf4"])[0]
    off = [_decided_by(NF4.thresholds, absmax, wrong) for wrong in ("1", "-1")]
    yield _encode(
        "nf4-reciprocal-exact",
        "3.3 1.2",
        "By each threshold a value that a reciprocal 1 ulp too great, or too small, puts on its other side.",
        _block(np.concatenate([*off, absmax[None]])),
        "ReciprocalApproximation",
    )
    yield from _quantize_tiny_and_huge()
    yield from _quantize_zeros()


def _quantize_tiny_and_huge() -> Iterator[Vector]:
    # absmax as bits: the smallest, around 2^-128, around the smallest normal number
    for slug, what, bits, flags in (
        ("smallest", "the smallest subnormals", (0x1, 0x2, 0x3, 0x7), "FlushSubnormal AbsmaxClamped"),
        (
            "2-128",
            "2^-128, where the reciprocal would become infinite, and its neighbours",
            (0x1FFFFF, 0x200000, 0x200001),
            "FlushSubnormal AbsmaxClamped",
        ),
        (
            "normal",
            "the smallest normal number and its neighbours",
            (0x7FFFFF, 0x800000, 0x800001),
            "FlushSubnormal",
        ),
        (
            "1e-38",
            "1e-38, which bitsandbytes takes for the least, and its neighbours",
            (0x6CE3ED, 0x6CE3EE, 0x6CE3EF),
            "AbsmaxClamped",
        ),
        (
            "2126",
            "2^126, past which the reciprocal is subnormal, and its neighbours",
            (0x7E7FFFFF, 0x7E800000, 0x7E800001),
            "FlushSubnormal",
        ),
        ("largest", "2^127 and the largest number", (0x7F000000, 0x7F000001, 0x7F7FFFFF), "FlushSubnormal"),
    ):
        blocks = []
        for absmax in _bits(*bits):
            x = _flips(absmax)
            blocks.append(np.append(x, np.full(32 - x.size, absmax)) if x.size < 32 else x)
        yield _encode(
            f"nf4-absmax-{slug}",
            "3.2 3.3 1.1",
            f"By each threshold the last value below and the first above, where absmax is {what}.",
            np.concatenate(blocks).astype(np.float32),
            flags,
        )
    yield _encode(
        "nf4-absmax-tiny-short-block",
        "3.2 3.3",
        "A short last block whose absmax is 3 * 2^-149 is stored so.",
        np.concatenate([_noise(1, 32), _bits(0x80000003, 2, 1, 0)]),
        "AbsmaxClamped FlushSubnormal",
    )
    for name, largest in (("float16", 0x7BFF), ("bfloat16", 0x7F7F)):
        smallest = np.array([0, 1, 2, 3, 0x8001, 0x8002, 0x8003], np.uint16)
        large = np.array([largest, largest - 1, largest ^ 0x8000, 0x8000, 1, largest >> 1], np.uint16)
        x = np.concatenate([np.resize(smallest, 32), large])
        yield _encode(
            f"nf4-{name}-extremes",
            "3.1 7.1 1.1",
            f"A block of the smallest subnormals of {name}, and a short one with its largest numbers.",
            x.view(DTYPES[name]),
            "FlushSubnormal" if name == "bfloat16" else "",
        )


def _quantize_zeros() -> Iterator[Vector]:
    zeros = np.zeros(32, np.float32)
    for name in CODEBOOKS:
        x = np.concatenate(
            [np.copysign(zeros, _noise(2, 32)), _noise(3, 32), -zeros, _bits(0x80000000, 0, 0)]
        )
        yield _encode(
            f"{name}-zeros",
            "3.4 3.5 5.2",
            "Blocks of zeros of both signs, a short last one too: the code of zero, and absmax +0.",
            x,
            "ZeroBlock" + (" PadNibble" if name in {"nf4", "int4"} else ""),
            codebook=name,
        )
    for name in ("nf4", "fp4"):
        yield _encode(
            f"{name}-zero-blocks",
            "3.4 3.5",
            "Whole blocks of +0 and of -0, with one that is not zero between them.",
            np.concatenate([zeros, _noise(3, 32), -zeros]),
            "ZeroBlock",
            codebook=name,
        )
    x = np.concatenate([_bits(0xBF800000), _noise(4, 31) / 2, _bits(0x3F800000, 0xBF800000, 0x80000000, 0)])
    yield _encode(
        "nf4-negative-absmax",
        "3.2 3.5",
        "The largest magnitude is that of a negative element: absmax is positive, and -0 has the code of +0.",
        _block(x.astype(np.float32)),
        "SignedAbsmax",
    )


def _quantize_layout() -> Iterator[Vector]:
    for size in BLOCK_SIZES:
        yield make(
            "quantize",
            f"nf4-block-{size}",
            "3.1 5.1 5.2 5.3",
            f"A whole block of {size} and a short one of 7.",
            _tensor(_noise(size, size + 7, "bfloat16"), size),
            flags="NibbleOrder PadNibble",
        )
        yield make(
            "quantize",
            f"nf4-one-block-{size}",
            "3.1 5.1",
            f"One whole block of {size} and no short one.",
            _tensor(_noise(size, size, "bfloat16"), size),
            flags="NibbleOrder",
        )
    yield make(
        "quantize",
        "nf4-whole-blocks",
        "3.1 5.1",
        "Three blocks of 64 and no short one.",
        _tensor(_noise(5, 192, "float16"), 64),
        flags="NibbleOrder",
    )
    for name in CODEBOOKS:
        yield make(
            "quantize",
            f"{name}-odd",
            "2.1 5.1 5.2",
            "An odd number of elements: the low half of the last byte holds the code of zero.",
            _tensor(_noise(6, 33), 64, name),
            flags="NibbleOrder" + (" PadNibble" if name in {"nf4", "int4"} else " CodeOrder"),
        )
    for shape, size in _CROSSED:
        text = "-".join(str(n) for n in shape)
        yield make(
            "quantize",
            f"nf4-rows-{text}",
            "1.4 3.1",
            f"Rows of {shape[-1]} in blocks of {size}: a block goes on in the next row.",
            _tensor(_noise(7, int(np.prod(shape)), "bfloat16").reshape(shape), size),
            flags="BlocksRestartAtRows",
        )
    for slug, shape in _SINGLE:
        yield make(
            "quantize",
            f"nf4-{slug}",
            "12.4 5.2" if slug == "scalar" else "5.2 5.3",
            f"One element, of shape {shape}.",
            _tensor(np.full(shape, -0.3, np.float32), 64),
            flags="PadNibble",
        )
    for slug, shape in _EMPTY:
        yield make(
            "quantize",
            f"nf4-{slug}",
            "12.4 5.3",
            f"No element, in the shape {shape}: no codes and no blocks.",
            _tensor(np.empty(shape, np.float32), 64),
        )


def _nonfinite() -> Iterator[tuple[str, str, NDArray[Any]]]:
    """Slug, name and value of what quantization refuses, each of another dtype or sign."""
    for name, dtype, bits in (
        ("nan", "float32", 0x7FC00000),
        ("negative-nan", "float32", 0xFFC00000),
        ("signalling-nan", "float32", 0x7F800001),
        ("infinity", "float32", 0x7F800000),
        ("negative-infinity", "float32", 0xFF800000),
        ("float16-nan", "float16", 0xFE01),
        ("float16-infinity", "float16", 0x7C00),
        ("bfloat16-nan", "bfloat16", 0x7F81),
        ("bfloat16-negative-infinity", "bfloat16", 0xFF80),
    ):
        kind = DTYPES[dtype]
        yield name, dtype, np.array([bits], _UINTS[kind.itemsize]).view(kind)


def _quantize_refused() -> Iterator[Vector]:
    places = ((40, "in a whole block"), (65, "in the short last block"), (0, "as the first"))
    for i, (name, dtype, value) in enumerate(_nonfinite()):
        place, where = places[i % 3]
        x = _noise(8, 70, dtype)
        x[place] = value[0]
        yield make(
            "quantize",
            f"refuse-{name}",
            "12.1",
            f"One {name.replace('-', ' ')} {where}.",
            _tensor(x, 64),
            flags="NonFiniteAccepted",
            refused=f"Element {place} is not a finite number.",
        )
    yield make(
        "quantize",
        "refuse-nan-among-zeros",
        "12.1",
        "A NaN in a block of zeros.",
        _tensor(_bits(0, 0, 0x7FC00000, 0), 64),
        flags="NonFiniteAccepted",
        refused="Element 2 is not a finite number.",
    )
    for size in (-64, 0, 1, 16, 63, 96, 8192):
        yield make(
            "quantize",
            f"refuse-block-size-{'minus-64' if size < 0 else size}",
            "12.3 3.1",
            f"A block size of {size}.",
            _tensor(_noise(9, 4), size),
            flags="BlockSizeAccepted",
            refused="The block size is none of 32 to 4096.",
        )
    for dtype in ("float64", "uint8", "uint32"):
        yield make(
            "quantize",
            f"refuse-dtype-{dtype}",
            "12.2",
            f"An input of {dtype}.",
            _tensor(np.ones(4, DTYPES[dtype]), 64),
            flags="DtypeAccepted",
            refused="The dtype is none of float32, float16 and bfloat16.",
        )
    yield make(
        "quantize",
        "refuse-codebook",
        "2.1",
        "A codebook that nobody has.",
        _tensor(_noise(9, 4), 64, "nf3"),
        refused="There is no codebook of this name.",
    )


# Chapter 4


_ALL_BYTES = np.arange(256, dtype=np.uint8)


def _coded(
    codes: NDArray[np.uint8],
    shape: list[int],
    dtype: str = "float32",
    block_size: int = 32,
    codebook: str = "nf4",
) -> dict[str, Any]:
    return {"codes": codes, "shape": shape, "dtype": dtype, "block_size": block_size, "codebook": codebook}


def _packed(
    codes: NDArray[np.uint8], absmax: Float32, shape: list[int], *rest: Any, **more: Any
) -> dict[str, Any]:
    """Inputs of dequantize: what _coded takes, with absmax."""
    return {**_coded(codes, shape, *rest, **more), "absmax": absmax}


def _products(
    codes: NDArray[np.uint8], absmax: Float32, n: int, block_size: int, codebook: str
) -> dict[str, Any]:
    nibbles = np.stack([codes >> 4, codes & 15], axis=1).reshape(-1)[:n]
    with np.errstate(all="ignore"):
        product = CODEBOOKS[codebook].values[nibbles] * np.repeat(absmax, block_size)[:n]
    return {"product": product}


def _decode(
    slug: str,
    clauses: str,
    comment: str,
    fields: dict[str, Any],
    flags: str = "",
) -> Vector:
    """A vector of dequantize, with its products where the dtype is not theirs."""
    n = int(np.prod(fields["shape"]))
    steps = _products(fields["codes"], fields["absmax"], n, fields["block_size"], fields["codebook"])
    return make(
        "dequantize",
        slug,
        clauses,
        comment,
        fields,
        flags=flags,
        steps=steps if fields["dtype"] != "float32" else None,
    )


def _dequantize() -> Iterator[Vector]:
    scales = np.abs(_noise(10, 16, spread=200))
    for name in CODEBOOKS:
        yield _decode(
            f"{name}-all-bytes",
            "2.1 4.1 5.1",
            f"All 256 bytes in 16 blocks, decoded with {name}.",
            _packed(_ALL_BYTES, scales, [512], codebook=name),
            "NibbleOrder CodebookRounded",
        )
    for dtype in ("float16", "bfloat16"):
        yield _decode(
            f"nf4-all-bytes-{dtype}",
            "4.1 4.2 5.1",
            f"All 256 bytes in 16 blocks, decoded to {dtype}.",
            _packed(_ALL_BYTES, np.abs(_noise(11, 16, spread=4)), [512], dtype),
            "NibbleOrder CastBeforeMultiply TruncatedConversion",
        )
    each = np.array([2 * k << 4 | 2 * k + 1 for k in range(8)] * 2, np.uint8)  # a block of all codes, twice
    for dtype in ("float16", "bfloat16"):
        absmax = _doubly_rounded(dtype)
        yield _decode(
            f"nf4-{dtype}-rounded-twice",
            "4.2 1.2",
            f"Products that rounding to float32 moves onto the midpoint of two {dtype}.",
            _packed(np.tile(each, absmax.size), absmax, [32 * absmax.size], dtype),
            "DoubleRounding",
        )
    tiny = _bits(0x1, 0x3, 0x200000, 0x7FFFFF, 0x800000, 0x800001)
    yield _decode(
        "nf4-subnormal-results",
        "4.1 1.1",
        "absmax from the smallest subnormal to the smallest normal number: products are subnormal, or zero.",
        _packed(np.tile(each, tiny.size), tiny, [32 * tiny.size]),
        "FlushSubnormal",
    )
    for dtype, bits in (
        ("float16", (0x33000000, 0x33000001, 0x33800000, 0x37FFE000, 0x387FFFFF, 0x38800001)),
        ("bfloat16", (0x00008000, 0x00018000, 0x007FFFFF, 0x00FFFFFF)),
    ):
        absmax = _bits(*bits)
        yield _decode(
            f"nf4-{dtype}-subnormal-results",
            "4.2 1.1",
            f"Products that are subnormal in {dtype}, ties among them.",
            _packed(np.tile(each, absmax.size), absmax, [32 * absmax.size], dtype),
            "FlushSubnormal",
        )
    for dtype, bits in (
        ("float16", (0x477FE000, 0x477FEFFF, 0x477FF000, 0x7F7FFFFF)),
        ("bfloat16", (0x7F7F0000, 0x7F7F7FFF, 0x7F7F8000, 0x7F7FFFFF)),
    ):
        absmax = _bits(*bits)
        yield _decode(
            f"nf4-{dtype}-overflow",
            "4.2",
            f"Products up to, at and past where {dtype} ends: those past it are infinite.",
            _packed(np.tile(each, absmax.size), absmax, [32 * absmax.size], dtype),
            "OverflowClamped",
        )
    signed = _bits(0, 0x80000000, 0xBF800000, 0xBE99999A)
    for name in ("nf4", "fp4", "fp4-e2m1"):
        yield _decode(
            f"{name}-signed-zeros",
            "4.1 1.5",
            "absmax +0, -0 and negative: every zero has the sign of its product.",
            _packed(np.tile(each, signed.size), signed, [32 * signed.size], codebook=name),
            "NegativeZero AbsmaxClamped" if name == "nf4" else "NegativeZero",
        )
    for low in (0, 7, 15):
        yield _decode(
            f"nf4-pad-{low}",
            "5.2",
            f"Three elements and {low} in the low half of the last byte, which nobody reads.",
            _packed(np.array([0x1E, 0xD0 | low], np.uint8), _bits(0x40490FDB), [3]),
        )
    for size in BLOCK_SIZES:
        n = size + 5
        yield make(
            "dequantize",
            f"nf4-decode-block-{size}",
            "4.1 3.1",
            f"A whole block of {size} and a short one of 5.",
            _packed(np.resize(each, -(-n // 2)), np.abs(_noise(size, 2)), [n], "bfloat16", size),
        )
    for shape, size in _CROSSED:
        text, n = "-".join(str(k) for k in shape), int(np.prod(shape))
        yield make(
            "dequantize",
            f"nf4-decode-rows-{text}",
            "1.4 4.1",
            f"Rows of {shape[-1]} in blocks of {size}: a block goes on in the next row.",
            _packed(
                np.resize(each, -(-n // 2)),
                np.abs(_noise(12, block_count(n, size))),
                shape,
                "float32",
                size,
            ),
            flags="BlocksRestartAtRows",
        )
    for slug, shape in _EMPTY:
        yield _decode(
            f"nf4-decode-{slug}",
            "12.4",
            f"No element, in the shape {shape}.",
            _packed(_ALL_BYTES[:0], _bits(), shape, "float16", 64),
        )
    yield _decode(
        "nf4-decode-scalar",
        "12.4 5.2",
        "One element without dimensions.",
        _packed(np.array([0x37], np.uint8), _bits(0x3F9D70A4), [], block_size=64),
    )


def _doubly_rounded(dtype: str) -> Float32:
    """For each value of nf4 but 0, 1 and -1 an absmax whose product is another if rounded only once."""
    kind, found = DTYPES[dtype], []
    step = 16 if dtype == "bfloat16" else 13  # the bits that the 16-bit dtype lacks
    # Products whose float32 is a midpoint of two of dtype: absmax near midpoint / value
    for value in NF4.values:
        if abs(value) in {0, 1}:
            continue
        upper = np.arange(0x3F800000 >> step, (0x3F800000 >> step) + 120, dtype=np.int32)
        midpoints = (upper << step | 1 << step - 1).astype(np.int32).view(np.float32).astype(np.float64)
        near = (midpoints / abs(np.float64(value))).astype(np.float32)
        absmax = np.stack([_ulps(near, k) for k in (-1, 0, 1)], axis=1).reshape(-1)
        exact = np.abs(np.float64(value) * absmax.astype(np.float64))
        product = exact.astype(np.float32)
        tie = product == np.repeat(midpoints, 3).astype(np.float32)
        # Only an exact product on the other side of the midpoint than the even neighbour shows the tie
        wrong = np.where(exact > product, np.nextafter(product, np.float32(np.inf)), product)
        wrong = np.where(exact < product, np.nextafter(product, np.float32(0)), wrong)
        differs = tie & (narrow(product, kind) != narrow(wrong, kind))
        found.append(absmax[differs][0])
    return np.array(found, np.float32)


def _dequantize_refused() -> Iterator[Vector]:
    codes, absmax = np.resize(_ALL_BYTES, 35), np.abs(_noise(13, 3))
    for name, bits in (
        ("nan", 0x7FC00000),
        ("negative-nan", 0xFFFFFFFF),
        ("infinity", 0x7F800000),
        ("negative-infinity", 0xFF800000),
    ):
        for block in (0, 2):
            bad = absmax.copy()
            bad[block] = _bits(bits)[0]
            yield make(
                "dequantize",
                f"refuse-absmax-{name}-{'first' if block == 0 else 'last'}",
                "12.5",
                f"The absmax of block {block} of three is a {name.replace('-', ' ')}.",
                _packed(codes, bad, [70]),
                flags="NonFiniteAccepted",
                refused=f"The absmax of block {block} is not a finite number.",
            )
    for name, fields, what in (
        ("codes-short", _packed(codes[:-1], absmax, [70]), "a byte of codes too few"),
        ("codes-long", _packed(np.append(codes, codes[:1]), absmax, [70]), "a byte of codes too many"),
        ("absmax-short", _packed(codes, absmax[:2], [70]), "an absmax too few"),
        ("absmax-long", _packed(codes, np.append(absmax, absmax[:1]), [70]), "an absmax too many"),
        ("codes-of-nothing", _packed(codes[:1], absmax[:0], [0]), "a byte of codes for no element"),
        ("absmax-of-nothing", _packed(codes[:0], absmax[:1], [2, 0]), "an absmax for no element"),
    ):
        yield make(
            "dequantize",
            f"refuse-{name}",
            "12.5 5.3",
            f"There is {what}.",
            fields,
            flags="LengthAccepted",
            refused=f"There is {what}.",
        )
    for size in (0, 16, 96, 8192):
        blocks = block_count(70, size) if size else 3
        yield make(
            "dequantize",
            f"refuse-decode-block-size-{size}",
            "12.3",
            f"A block size of {size}.",
            _packed(codes, np.ones(blocks, np.float32), [70], block_size=size),
            flags="BlockSizeAccepted",
            refused="The block size is none of 32 to 4096.",
        )
    for dtype in ("float64", "uint8"):
        yield make(
            "dequantize",
            f"refuse-decode-dtype-{dtype}",
            "12.2",
            f"An output of {dtype}.",
            _packed(codes, absmax, [70], dtype),
            flags="DtypeAccepted",
            refused="The dtype is none of float32, float16 and bfloat16.",
        )


# Chapter 6


def _absmax(slug: str, clauses: str, comment: str, absmax: NDArray[Any], flags: str = "") -> Vector:
    """A vector of encode_absmax with its steps."""
    absmax = absmax.astype(np.float32)
    fields, steps = {"absmax": absmax}, _centred(absmax)
    return make("encode_absmax", slug, clauses, comment, fields, flags=flags, steps=steps)


def _encode_absmax_means() -> Iterator[Vector]:
    tiny, mixed = np.full(15, 2.0**-24), np.abs(_noise(20, 37, spread=120))
    small = 64 * np.abs(_noise(21, 12, spread=1)) / 2
    for slug, comment, absmax, flags in (
        (
            "large-first",
            "1 and fifteen 2^-24, each lost in a float32 sum from the left.",
            np.append(1, tiny),
            "MeanOrder",
        ),
        ("large-last", "Fifteen 2^-24 and 1: the same mean.", np.append(tiny, 1), ""),
        (
            "large-between",
            "2^30 amid numbers of which it loses each in a float32 sum.",
            np.concatenate([small, [2.0**30], small]),
            "MeanOrder",
        ),
        (
            "beyond-float64",
            "Half an ulp of the mean, and what decides it is lost in a float64 sum.",
            np.array([1, 2**-24, 2**-60, 2**-60]),
            "MeanOrder",
        ),
        (
            "whole-range",
            "A tie of 2^120 and 2^96, decided by the smallest number.",
            np.array([2.0**120, 2.0**96, 2.0**-149, 0]),
            "MeanOrder",
        ),
        ("tie-down", "Two neighbours: a tie, to the even smaller one.", _bits(0x3F800000, 0x3F800001), ""),
        ("tie-up", "Two neighbours: a tie, to the even greater one.", _bits(0x3F800001, 0x3F800002), ""),
        (
            "three",
            "The sum of three is divided by 3, not multiplied by a rounded third.",
            _noise(23, 3) ** 2,
            "MeanOrder",
        ),
        ("seven", "Seven numbers.", np.abs(_noise(22, 7, spread=3)), ""),
        ("mixed", "37 numbers over 120 powers of two.", mixed, ""),
        ("mixed-backwards", "The numbers of mean-mixed in reverse: the same mean.", mixed[::-1], ""),
        (
            "largest",
            "Three times the largest number, whose float32 sum is infinite.",
            np.full(3, LARGEST),
            "MeanOrder",
        ),
        ("subnormal", "Two thirds of the smallest number, rounded up.", _bits(1, 1, 0), "FlushSubnormal"),
        ("subnormal-tie", "Half the smallest number, to even: 0.", _bits(1, 0), "FlushSubnormal"),
        (
            "subnormal-tie-up",
            "One and a half of the smallest number, to even: two.",
            _bits(3, 0),
            "FlushSubnormal",
        ),
        ("one", "One block: the mean is its absmax.", _bits(0x3E99999A), ""),
        ("zeros", "Three zero blocks: offset +0 and code 127.", _bits(0, 0, 0), "ZeroBlock"),
    ):
        yield _absmax(f"mean-{slug}", "6.1 1.3", comment, absmax, flags)
    yield make("encode_absmax", "mean-of-nothing", "6.1 12.4", "No block: offset +0.", {"absmax": _bits()})


def _at_map_thresholds(offset: float, low: float, high: float, per_block: int) -> Float32:
    """absmax whose offset is just that, each nested absmax 1, and their r around the map's thresholds.

    Of each threshold with a magnitude from low to high the last absmax at or below it and the first above, so
    many thresholds a nested block; what is left of the blocks brings the mean back to offset.
    """
    thresholds = midpoint_thresholds(DYNAMIC_MAP)
    thresholds = thresholds[(np.abs(thresholds) >= low) & (np.abs(thresholds) < high)]
    blocks = []
    for start in range(0, thresholds.size, per_block):
        found = [np.float32(offset + 1)]
        for threshold in thresholds[start : start + per_block]:
            near = _near(np.float32(offset), threshold, np.float32(1))
            change = int(np.count_nonzero(near - np.float32(offset) <= threshold))
            found += [near[change - 1], near[change]]
        rest = NESTED_BLOCK_SIZE - len(found)
        fill = (NESTED_BLOCK_SIZE * offset - float(np.sum(found, dtype=np.float64))) / rest
        blocks.append(np.append(np.array(found, np.float32), np.full(rest, fill, np.float32)))
    return np.concatenate(blocks)


def _near(offset: np.float32, threshold: np.float32, absmax: np.float32) -> Float32:
    """A few numbers in order whose difference from offset is about threshold * absmax, and more and less."""
    r = np.array([threshold * absmax], np.float32)
    by_r = [_ulps(r, k) + offset for k in range(-3, 4)]
    return np.unique(np.concatenate([*by_r, *(_ulps(by_r[3], k) for k in range(-3, 4))]))


def _encode_absmax_codes() -> Iterator[Vector]:
    for slug, offset, low, high, per_block, flags in (
        ("outer", 1, 0.05, 1, 100, "TieRule DynamicMapRounding NearestSearch"),
        ("inner", 1 / 16, 0, 0.05, 64, "TieRule DynamicMapRounding"),
    ):
        yield _absmax(
            f"map-thresholds-{slug}",
            "6.2 6.3",
            f"By each threshold of the map from {low} to {high} the last r below and the first above.",
            _at_map_thresholds(offset, low, high, per_block),
            flags,
        )
    yield _absmax(
        "nested-reciprocal",
        "6.3",
        "r that a true division by the nested absmax would give other codes, in a short nested block.",
        _nested_division(),
        "TrueDivision TailDivision",
    )
    base = 0x3F800000
    for n in (256, 257, 300):
        yield _absmax(
            f"nested-tail-{n}", "6.3", f"{n} blocks: {block_count(n, 256)} nested.", np.abs(_noise(n, n))
        )
    yield _absmax(
        "nested-equal",
        "6.3 3.4",
        "257 equal absmax: r is 0, its code 127 and the nested absmax +0.",
        np.full(257, 0.3),
        "ZeroBlock",
    )
    yield _absmax(
        "nested-zero-block",
        "6.3 3.4",
        "A nested block of zeros before a short one of others.",
        np.append(np.full(256, 1.0), _bits(base - 2, base + 1)),
        "ZeroBlock",
    )
    yield _absmax(
        "nested-tiny",
        "6.3 1.1 3.3",
        "r of a few 2^-149, scaled by 2^64 first.",
        _bits(*(0x00800000 + k for k in (0, 1, 3, 4, 7, 12))),
        "FlushSubnormal",
    )
    # In units of 2^103: offset is odd, and r ends on a half; to even it goes up, or down
    largest, third = float(LARGEST), 2.0**103
    yield _absmax(
        "nested-largest",
        "6.3 6.6",
        "The largest number beside others, which decodes to a finite one.",
        np.array([largest, (2**24 - 7) * third, 0]),
    )
    for slug, comment, absmax in (
        (
            "code",
            "Blocks of the largest number whose code stands for a little more than their r.",
            _bits(0x7F400000, 0x7F7FFFFF, 0x7F7FFFFF),
        ),
        (
            "rounding",
            "r of the largest number is rounded up by half an ulp, and half an ulp past it is infinite.",
            np.array([largest, (2**24 - 13) * third, 0], np.float32),
        ),
    ):
        block = 1 if slug == "code" else 0
        yield make(
            "encode_absmax",
            f"refuse-infinite-by-{slug}",
            "6.6",
            comment,
            {"absmax": absmax},
            flags="InfiniteAbsmaxAccepted",
            refused=f"The absmax of block {block} would decode to an infinity.",
        )
    for name, bits in (("nan", 0x7FC00000), ("infinity", 0x7F800000), ("negative", 0xBF800000)):
        yield make(
            "encode_absmax",
            f"refuse-to-encode-{name}",
            "6.6",
            f"An absmax that is {'negative' if name == 'negative' else f'a {name}'}.",
            {"absmax": _bits(0x3F800000, bits)},
            flags="NonFiniteAccepted" if name != "negative" else "",
            refused="The absmax of block 1 is negative or not a finite number.",
        )


def _nested_division() -> Float32:
    """absmax around 1 of which a true division by the nested absmax would give r another code."""
    thresholds = midpoint_thresholds(DYNAMIC_MAP)
    one, absmax = np.float32(1), _bits(0x3F7FF006)[0]  # with more such r than most have
    reciprocal = one / absmax
    found = []
    for threshold in thresholds[np.abs(thresholds) > 0.3]:
        x = _near(one, threshold, absmax)
        r = x - one
        found += list(x[((r / absmax) > threshold) != ((r * reciprocal) > threshold)][:1])
    found.append(one + absmax)
    rest = NESTED_BLOCK_SIZE - 1 - len(found)
    fill = (NESTED_BLOCK_SIZE - 1 - float(np.sum(found, dtype=np.float64))) / rest
    return np.append(np.array(found, np.float32), np.full(rest, fill, np.float32))


def _fused_map() -> Float32:
    """The map with the 42 entries that fused multiply-add changes (NF4-6.2) an ulp farther from zero."""
    return np.where(np.arange(256) % 6 == 1, _ulps(DYNAMIC_MAP, 1), DYNAMIC_MAP).astype(np.float32)


def _nested(
    codes: NDArray[np.uint8], absmax: NDArray[Any], offset: float, nested_map: Float32 = DYNAMIC_MAP
) -> dict[str, Any]:
    return {
        "absmax_codes": codes,
        "nested_absmax": np.asarray(absmax, np.float32),
        "offset": np.array([offset], np.float32),
        "map": nested_map,
    }


def _decoded(slug: str, clauses: str, comment: str, fields: dict[str, Any], flags: str = "") -> Vector:
    """A vector of decode_absmax with its products."""
    codes, absmax = fields["absmax_codes"], fields["nested_absmax"]
    with np.errstate(all="ignore"):
        product = fields["map"][codes] * np.repeat(absmax, NESTED_BLOCK_SIZE)[: codes.size]
    return make("decode_absmax", slug, clauses, comment, fields, flags=flags, steps={"product": product})


def _decode_absmax() -> Iterator[Vector]:
    some = np.array([0, 1, 37, 100, 126, 127, 128, 129, 200, 254, 255], np.uint8)
    full = np.append(_ALL_BYTES, some)
    yield _decoded(
        "decode-all-codes",
        "6.2 6.4 1.2",
        "All 256 codes, and a short second nested block with another absmax.",
        _nested(full, _bits(0x3F9D70A4, 0x3E4CCCCD), 1.7),
        "FmaContraction NestedAbsmaxIgnored OffsetOmitted",
    )
    for slug, comment, nested_map, flags in (
        ("fused", "A map as stored where fused multiply-add made it.", _fused_map(), "MapIgnored"),
        ("reversed", "A map that descends from 1.", DYNAMIC_MAP[::-1].copy(), "MapIgnored"),
        (
            "unused-nan",
            "A map with a NaN and an infinity that no code stands for.",
            np.where(np.isin(_ALL_BYTES, some), DYNAMIC_MAP, np.float32(np.nan)).astype(np.float32),
            "",
        ),
    ):
        fields = _nested(some, _bits(0x3FB504F3), 2.1, nested_map)
        yield _decoded(f"decode-map-{slug}", "6.2 6.4" + " 12.5" * (flags == ""), comment, fields, flags)
    yield _decoded(
        "decode-negative",
        "6.4",
        "An absmax of little offset decodes to a negative number, one of none to -0.",
        _nested(some, _bits(0x40000000), 0.125),
        "NestedAbsmaxIgnored OffsetOmitted",
    )
    minus_zero = _nested(np.array([0, 126, 127, 255], np.uint8), _bits(0), -0.0)
    yield _decoded(
        "decode-negative-zero",
        "6.4 1.5",
        "Nested absmax +0 and offset -0: -0 where the entry of the map is negative, else +0.",
        minus_zero,
    )
    yield _decoded(
        "decode-zero-nested",
        "6.4",
        "Nested absmax +0: every absmax is the offset.",
        _nested(np.full(3, 127, np.uint8), _bits(0), 0.3),
        "OffsetOmitted",
    )
    yield _decoded(
        "decode-subnormal",
        "6.4 1.1",
        "Products and sums that are subnormal.",
        _nested(some, _bits(0x00300001), 2.0**-127),
        "FlushSubnormal",
    )
    yield _decoded(
        "decode-largest",
        "6.4",
        "Sums up to the largest number.",
        _nested(np.array([255, 254, 127, 0], np.uint8), _bits(0x7EFFFFFE), 2.0**127),
    )
    yield _decoded("decode-nothing", "6.4 12.4", "No block.", _nested(some[:0], _bits(), 0.0))
    largest = float(LARGEST)
    for slug, fields, what in (
        (
            "tie",
            _nested(np.array([127, 255], np.uint8), _bits(0x7EFFFFFF), 2.0**127),
            "The absmax of block 1 is infinite.",
        ),
        (
            "sum",
            _nested(np.array([127, 255], np.uint8), _bits(0x7F000000), largest),
            "The absmax of block 1 is infinite.",
        ),
        ("offset", _nested(some, _bits(0x3F800000), np.inf), "The absmax of block 0 is infinite."),
        ("nested", _nested(some, _bits(0xFF800000), 1), "The absmax of block 0 is infinite."),
        ("offset-nan", _nested(some, _bits(0x3F800000), np.nan), "The absmax of block 0 is a NaN."),
        (
            "map-nan",
            _nested(some, _bits(0x3F800000), 1, np.where(_ALL_BYTES == 127, np.float32(np.nan), DYNAMIC_MAP)),
            "The absmax of block 5 is a NaN.",
        ),
    ):
        yield make(
            "decode_absmax",
            f"refuse-decoded-{slug}",
            "6.4 12.5",
            f"An absmax that is not finite, by way of its {slug.split('-')[0]}.",
            fields,
            flags="NonFiniteAccepted",
            refused=what,
        )
    for slug, fields, what in (
        ("nested-short", _nested(full, _bits(0x3F800000), 1), "A nested absmax is missing."),
        (
            "nested-long",
            _nested(some, _bits(0x3F800000, 0x3F800000), 1),
            "There is a nested absmax too many.",
        ),
        ("map-short", _nested(some, _bits(0x3F800000), 1, DYNAMIC_MAP[1:]), "The map has 255 entries."),
    ):
        yield make(
            "decode_absmax",
            f"refuse-{slug}",
            "12.5 5.3",
            what,
            fields,
            flags="LengthAccepted",
            refused=what,
        )


def _double() -> Iterator[Vector]:
    small = _noise(30, 140) * np.repeat(np.array([1, 0.25, 3, 1.5, 0.01], np.float32), 32)[:140]
    for codebook in CODEBOOKS:
        yield _quantized_twice(
            f"double-{codebook}",
            "6.1 6.3 5.3",
            f"Five blocks of {codebook}, the last one short.",
            _tensor(small, codebook=codebook),
            "NibbleOrder",
        )
    for dtype in ("float16", "bfloat16"):
        x = _noise(31, 3 * 50, dtype).reshape(3, 50)
        yield _quantized_twice(
            f"double-{dtype}-rows",
            "6.3 7.1 1.4",
            f"{dtype}, rows of 50 in blocks of 64.",
            _tensor(x, 64),
            "BlocksRestartAtRows",
        )
    long = _noise(32, 32 * 257 + 5, "bfloat16")
    yield make(
        "quantize_double",
        "double-two-nested-blocks",
        "6.1 6.3 5.3",
        "258 blocks: a whole nested block and a short one.",
        _tensor(long),
        flags="NibbleOrder",
    )
    yield _quantized_twice(
        "double-zeros", "3.4 6.3", "Three blocks of zeros.", _tensor(np.zeros(70, np.float32)), "ZeroBlock"
    )
    yield _quantized_twice(
        "double-scalar", "12.4 6.3", "One element without dimensions.", _tensor(np.array(-0.3, np.float32))
    )
    yield make(
        "quantize_double",
        "double-empty",
        "12.4 6.1",
        "No element: no codes, no blocks, offset +0.",
        _tensor(np.empty((0, 3), np.float32)),
    )
    near = np.repeat(_bits(0x7F400000, 0x7F7FFFFF, 0x7F7FFFFF), 32)
    bad = small.copy()
    bad[137] = np.nan
    for slug, fields, clauses, flags, what in (
        (
            "infinite",
            _tensor(near),
            "6.6",
            "InfiniteAbsmaxAccepted",
            "The absmax of block 1 would decode to an infinity.",
        ),
        ("nan", _tensor(bad), "12.1", "NonFiniteAccepted", "Element 137 is not a finite number."),
        (
            "block-size",
            _tensor(small, 48),
            "12.3",
            "BlockSizeAccepted",
            "The block size is none of 32 to 4096.",
        ),
        (
            "dtype",
            _tensor(np.ones(4)),
            "12.2",
            "DtypeAccepted",
            "The dtype is none of float32, float16 and bfloat16.",
        ),
    ):
        yield make(
            "quantize_double", f"refuse-double-{slug}", clauses, what, fields, flags=flags, refused=what
        )
    yield from _dequantize_double(long)


def _quantized_twice(
    slug: str, clauses: str, comment: str, fields: dict[str, Any], flags: str = ""
) -> Vector:
    """A vector of quantize_double with its steps."""
    _, absmax = encode(widen(fields["x"]).reshape(-1), fields["block_size"], CODEBOOKS[fields["codebook"]])
    steps = {"absmax": absmax, **_centred(absmax)}
    return make("quantize_double", slug, clauses, comment, fields, flags=flags, steps=steps)


def _dequantize_double(long: NDArray[Any]) -> Iterator[Vector]:
    absmax_codes = np.array([3, 90, 127, 140, 255], np.uint8)
    nested = _nested(absmax_codes, _bits(0x3F4CCCCD), 0.9)
    for codebook in CODEBOOKS:
        yield _dequantized_twice(
            f"double-decode-{codebook}",
            "4.1 6.4",
            f"Five blocks of {codebook}, the last one short.",
            _packed_double(nested, [129], codebook=codebook),
            "NibbleOrder NestedAbsmaxIgnored OffsetOmitted",
        )
    for dtype in ("float16", "bfloat16"):
        yield _dequantized_twice(
            f"double-decode-{dtype}-rows",
            "4.2 6.4 1.4",
            f"Rows of 50 in blocks of 32, to {dtype}.",
            _packed_double(nested, [3, 50], dtype),
            "BlocksRestartAtRows CastBeforeMultiply TruncatedConversion",
        )
    yield _dequantized_twice(
        "double-decode-map",
        "6.2 6.4",
        "A map as stored where fused multiply-add made it.",
        _packed_double(
            {**nested, "map": _fused_map(), "absmax_codes": np.array([1, 7, 61, 199, 253], np.uint8)}, [130]
        ),
        "MapIgnored",
    )
    yield _dequantized_twice(
        "double-decode-negative",
        "4.1 6.4 1.5",
        "absmax that decode to negative numbers, and to -0.",
        _packed_double(_nested(np.array([0, 50, 126], np.uint8), _bits(0x3F800000), -0.0), [80]),
        "NegativeZero",
    )
    codes, absmax = encode(widen(long), 32, NF4)
    twice = encode_nested(absmax)
    yield make(
        "dequantize_double",
        "double-decode-two-nested-blocks",
        "4.1 4.2 6.4",
        "258 blocks: a whole nested block and a short one.",
        {
            **_nested(twice.codes, twice.absmax, float(twice.offset)),
            **_coded(codes, [long.size], "bfloat16"),
        },
        flags="NestedAbsmaxIgnored",
    )
    yield _dequantized_twice(
        "double-decode-empty",
        "12.4 6.4",
        "No element.",
        _packed_double(_nested(absmax_codes[:0], _bits(), 0.0), [3, 0]),
    )
    for slug, fields, clauses, flags, what in (
        (
            "infinite",
            _packed_double(_nested(absmax_codes, _bits(0x7F000000), float(LARGEST)), [129]),
            "12.5 6.4",
            "NonFiniteAccepted",
            "The absmax of block 4 is infinite.",
        ),
        (
            "blocks",
            _packed_double(nested, [161]),
            "12.5 5.3",
            "LengthAccepted",
            "There is a block of 8-bit codes too few.",
        ),
        (
            "nested",
            _packed_double({**nested, "nested_absmax": _bits(0x3F800000, 0x3F800000)}, [129]),
            "12.5 5.3",
            "LengthAccepted",
            "There is a nested absmax too many.",
        ),
    ):
        yield make(
            "dequantize_double",
            f"refuse-double-decode-{slug}",
            clauses,
            what,
            fields,
            flags=flags,
            refused=what,
        )


def _packed_double(
    nested: dict[str, Any], shape: list[int], dtype: str = "float32", codebook: str = "nf4"
) -> dict[str, Any]:
    """Inputs of dequantize_double with all bytes for codes, in blocks of 32."""
    codes = np.resize(_ALL_BYTES * np.uint8(29), -(-int(np.prod(shape)) // 2))
    return {**nested, **_coded(codes, shape, dtype, 32, codebook)}


def _dequantized_twice(
    slug: str, clauses: str, comment: str, fields: dict[str, Any], flags: str = ""
) -> Vector:
    """A vector of dequantize_double with its steps."""
    absmax = decode_nested(
        NestedAbsmax(fields["absmax_codes"], fields["nested_absmax"], fields["offset"][0], fields["map"])
    )
    products = _products(fields["codes"], absmax, int(np.prod(fields["shape"])), 32, fields["codebook"])
    steps = {"absmax": absmax} | (products if fields["dtype"] != "float32" else {})
    return make("dequantize_double", slug, clauses, comment, fields, flags=flags, steps=steps)


def _storage() -> Iterator[Vector]:
    for elements, size in (
        (0, 64),
        (1, 64),
        (2, 32),
        (63, 64),
        (64, 64),
        (65, 64),
        (8193, 32),
        (2**31 - 1, 4096),
    ):
        for double in (False, True):
            yield make(
                "storage",
                f"storage-{elements}-by-{size}" + "-double" * double,
                "5.4",
                f"The bytes of {elements} elements in blocks of {size}{', double-quantized' * double}.",
                {"elements": elements, "block_size": size, "double_quant": double},
            )
    yield make(
        "storage",
        "refuse-storage-block-size",
        "12.3",
        "A block size of 48.",
        {"elements": 96, "block_size": 48, "double_quant": False},
        flags="BlockSizeAccepted",
        refused="The block size is none of 32 to 4096.",
    )
