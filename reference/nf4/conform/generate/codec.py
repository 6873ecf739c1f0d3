"""The vectors of chapters 1 to 5, 7 and 12: codebooks, conversion, encode, decode, refusals."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nf4.blockwise import BLOCK_SIZES, block_count, scale_rows
from nf4.codebooks import CODEBOOKS, Codebook
from nf4.conform.generate import make
from nf4.conform.generate.inputs import (
    ALL_BYTES,
    Float32,
    from_bits,
    noise,
    padded,
    product_steps,
    scaling_steps,
    to_decode,
    to_quantize,
    ulps_away,
)
from nf4.conform.values import DTYPES
from nf4.conform.vectors import Vector
from nf4.floats import narrow, widen

NF4 = CODEBOOKS["nf4"]
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
    yield from _storage()


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
        x = np.concatenate([ulps_away(near, k) for k in (0, 1, -1, 2, -2, 3, -3)])
        s = x / absmax if wrong == "division" else x * ulps_away(reciprocal, int(wrong))
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


def _ranked(x: NDArray[Any], block_size: int, book: Codebook) -> dict[str, Any]:
    steps = scaling_steps(widen(x), block_size)
    ranks = np.searchsorted(book.thresholds, steps["s"], side="left")  # as many as are below
    return {**steps, "ranks": ranks.astype(np.uint8)}


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
    fields = to_quantize(x, block_size, codebook)
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
            flags="CodebookRounded" + (" ThresholdUlp" if name == "nf4" else ""),
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
    x = from_bits(*bits, 0x7F800000)
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
    x = np.concatenate([_around(midpoints), pairs[:, 0], from_bits(1, 0x007FFFFF, 0x7F7FFFFF, 0x7F800000)])
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
            {"x": from_bits(*nans, *(n | 0x80000000 for n in nans)), "dtype": name},
            flags="NanPayload",
        )


# Chapters 3 and 5


def _quantize_values() -> Iterator[Vector]:
    for name, book in CODEBOOKS.items():
        yield _encode(
            f"{name}-thresholds",
            "3.5 2.2 2.1" + (" 2.3" if name == "nf4" else ""),
            f"Every threshold of {name} one ulp below, at and one ulp above, in a block whose absmax is 1.",
            padded(np.append(_around(book.thresholds), np.float32(1)), 64),
            "TieRule NearestSearch"
            + ("" if name in {"nf4", "int4"} else " CodeOrder")
            + (" ThresholdUlp" if name == "nf4" else ""),
            64,
            name,
        )
    # absmax for which every threshold has an x that the reciprocal and a true division put on different sides
    decisive = {"nf4": 0x3FFED6A2, "fp4": 0x3FF3B212, "fp4-e2m1": 0x3FE4EB3B, "int4": 0x3FF2084F}
    for name, bits in decisive.items():
        absmax, book = from_bits(bits)[0], CODEBOOKS[name]
        x = np.append(_decided_by(book.thresholds, absmax, "division"), absmax)
        yield _encode(
            f"{name}-reciprocal",
            "3.3 1.2",
            f"By each threshold of {name} a value that a true division puts on its other side.",
            padded(np.append(x, -x)),
            "TrueDivision",
            codebook=name,
        )
        if name == "nf4":
            yield _encode(
                "nf4-reciprocal-short-block",
                "3.3 3.1",
                "The values of nf4-reciprocal in a short last block: it too is multiplied by its reciprocal.",
                x,
                "TrueDivision TailDivision",
            )
    absmax = from_bits(decisive["nf4"])[0]
    off = [_decided_by(NF4.thresholds, absmax, wrong) for wrong in ("1", "-1")]
    yield _encode(
        "nf4-reciprocal-exact",
        "3.3 1.2",
        "By each threshold a value that a reciprocal 1 ulp too great, or too small, puts on its other side.",
        padded(np.concatenate([*off, absmax[None]])),
        "ReciprocalApproximation ScaleRounded16",
    )
    yield from _quantize_tiny_and_huge()
    yield from _quantize_zeros()


def _quantize_tiny_and_huge() -> Iterator[Vector]:
    small = "FlushSubnormal AbsmaxClamped ReciprocalClamped"
    # absmax as bits: the smallest, around 2^-128, around the smallest normal number
    for slug, what, bits, flags in (
        ("smallest", "the smallest subnormals", (0x1, 0x2, 0x3, 0x7), f"{small} ReciprocalOverflow"),
        (
            "2-128",
            "2^-128, where the reciprocal would become infinite, and its neighbours",
            (0x1FFFFF, 0x200000, 0x200001),
            f"{small} ReciprocalOverflow",
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
            "AbsmaxClamped ReciprocalClamped",
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
        for absmax in from_bits(*bits):
            x = _flips(absmax)
            blocks.append(np.append(x, np.full(32 - x.size, absmax)) if x.size < 32 else x)
        yield _encode(
            f"nf4-absmax-{slug}",
            "3.3 1.1 3.2",
            f"By each threshold the last value below and the first above, where absmax is {what}.",
            np.concatenate(blocks).astype(np.float32),
            flags,
        )
    yield _encode(
        "nf4-absmax-tiny-short-block",
        "3.3 3.2",
        "A short last block whose absmax is 3 * 2^-149: scaled by 2^64 first, and stored as it is.",
        np.concatenate([noise(1, 32), from_bits(0x80000003, 2, 1, 0)]),
        f"{small} ReciprocalOverflow",
    )
    for name, largest in (("float16", 0x7BFF), ("bfloat16", 0x7F7F)):
        smallest = np.array([0, 1, 2, 3, 0x8001, 0x8002, 0x8003], np.uint16)
        large = np.array([largest, largest - 1, largest ^ 0x8000, 0x8000, 1, largest >> 1], np.uint16)
        x = np.concatenate([np.resize(smallest, 32), large])
        yield _encode(
            f"nf4-{name}-extremes",
            "7.1 1.1 3.1" if name == "float16" else "3.3 7.1 1.1 3.1",
            f"A block of the smallest subnormals of {name}, and a short one with its largest numbers.",
            x.view(DTYPES[name]),
            "FlushSubnormal ReciprocalClamped ReciprocalOverflow" if name == "bfloat16" else "",
        )


def _quantize_zeros() -> Iterator[Vector]:
    zeros = np.zeros(32, np.float32)
    for name in CODEBOOKS:
        x = np.concatenate(
            [np.copysign(zeros, noise(2, 32)), noise(3, 32), -zeros, from_bits(0x80000000, 0, 0)]
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
            np.concatenate([zeros, noise(3, 32), -zeros]),
            "ZeroBlock",
            codebook=name,
        )
    x = np.concatenate(
        [from_bits(0xBF800000), noise(4, 31) / 2, from_bits(0x3F800000, 0xBF800000, 0x80000000, 0)]
    )
    yield _encode(
        "nf4-negative-absmax",
        "3.2 3.5",
        "The largest magnitude is that of a negative element: absmax is positive, and -0 has the code of +0.",
        padded(x.astype(np.float32)),
        "SignedAbsmax",
    )


def _quantize_layout() -> Iterator[Vector]:
    for size in BLOCK_SIZES:
        yield make(
            "quantize",
            f"nf4-block-{size}",
            "3.1 5.1 5.2 5.3",
            f"A whole block of {size} and a short one of 7.",
            to_quantize(noise(size, size + 7, "bfloat16"), size),
            flags="NibbleOrder PadNibble",
        )
        yield make(
            "quantize",
            f"nf4-one-block-{size}",
            "3.1 5.1",
            f"One whole block of {size} and no short one.",
            to_quantize(noise(size, size, "bfloat16"), size),
            flags="NibbleOrder",
        )
    yield make(
        "quantize",
        "nf4-whole-blocks",
        "3.1 5.1",
        "Three blocks of 64 and no short one.",
        to_quantize(noise(5, 192, "float16"), 64),
        flags="NibbleOrder",
    )
    for name in CODEBOOKS:
        yield make(
            "quantize",
            f"{name}-odd",
            "5.2 5.1 2.1",
            "An odd number of elements: the low half of the last byte holds the code of zero.",
            to_quantize(noise(6, 33), 64, name),
            flags="NibbleOrder ScaleRounded16" + (" PadNibble" if name in {"nf4", "int4"} else " CodeOrder"),
        )
    for shape, size in _CROSSED:
        text = "-".join(str(n) for n in shape)
        yield make(
            "quantize",
            f"nf4-rows-{text}",
            "3.1 1.4",
            f"Rows of {shape[-1]} in blocks of {size}: a block goes on in the next row.",
            to_quantize(noise(7, int(np.prod(shape)), "bfloat16").reshape(shape), size),
            flags="BlocksRestartAtRows",
        )
    for slug, shape in _SINGLE:
        yield make(
            "quantize",
            f"nf4-{slug}",
            "12.4 5.2" if slug == "scalar" else "5.2 5.3",
            f"One element, of shape {shape}.",
            to_quantize(np.full(shape, -0.3, np.float32), 64),
            flags="PadNibble ScaleRounded16",
        )
    for slug, shape in _EMPTY:
        yield make(
            "quantize",
            f"nf4-{slug}",
            "12.4 5.3",
            f"No element, in the shape {shape}: no codes and no blocks.",
            to_quantize(np.empty(shape, np.float32), 64),
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
    # Whole blocks but for one, so that a port that takes no short ones refuses the number and not the length
    places = ((40, "in the first block"), (65, "in the second block"), (0, "as the first"))
    for i, (name, dtype, value) in enumerate(_nonfinite()):
        place, where = places[i % 3]
        x = noise(8, 70 if name == "negative-nan" else 128, dtype)
        x[place] = value[0]
        yield make(
            "quantize",
            f"refuse-{name}",
            "12.1 1.7",
            f"One {name.replace('-', ' ')} {where}.",
            to_quantize(x, 64),
            flags="NonFiniteAccepted",
            refused=f"Element {place} is not a finite number.",
        )
    yield make(
        "quantize",
        "refuse-nan-among-zeros",
        "12.1",
        "A NaN in a block of zeros.",
        to_quantize(padded(from_bits(0, 0, 0x7FC00000, 0), 64), 64),
        flags="NonFiniteAccepted",
        refused="Element 2 is not a finite number.",
    )
    for size in (-64, 0, 1, 16, 63, 96, 8192):
        yield make(
            "quantize",
            f"refuse-block-size-{'minus-64' if size < 0 else size}",
            "12.3 3.1",
            f"A block size of {size}.",
            to_quantize(noise(9, 126 if size == 63 else max(size, 64), "bfloat16"), size),
            flags="BlockSizeAccepted",
            refused="The block size is none of 32 to 4096.",
        )
    for dtype in ("float64", "uint8", "uint32"):
        yield make(
            "quantize",
            f"refuse-dtype-{dtype}",
            "12.2",
            f"An input of {dtype}.",
            to_quantize(np.ones(64, DTYPES[dtype]), 64),
            flags="DtypeAccepted",
            refused="The dtype is none of float32, float16 and bfloat16.",
        )
    six = noise(14, 6)
    for slug, clauses, shape, what in (
        ("shape-short", "12.5", [2, 2], "The elements are two more than those of the shape."),
        ("shape-long", "12.5", [7], "The shape has an element too many."),
        (
            "shape-negative",
            "1.4",
            [-2, -3],
            "Two sizes are negative, though they multiply to the number of elements.",
        ),
        ("shape-inferred", "1.4", [2, -1], "A size is negative, which is not to be taken for what is left."),
    ):
        yield make(
            "quantize", f"refuse-{slug}", clauses, what, {**to_quantize(six), "shape": shape}, refused=what
        )
    yield make(
        "quantize",
        "refuse-codebook",
        "2.1",
        "A codebook that nobody has.",
        to_quantize(noise(9, 4), 64, "nf3"),
        refused="There is no codebook of this name.",
    )


# Chapter 4


def _decode(
    slug: str,
    clauses: str,
    comment: str,
    fields: dict[str, Any],
    flags: str = "",
) -> Vector:
    """A vector of dequantize, with its products where the dtype is not theirs."""
    n = int(np.prod(fields["shape"]))
    steps = product_steps(fields["codes"], fields["absmax"], n, fields["block_size"], fields["codebook"])
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
    scales = np.abs(noise(10, 16, spread=200))
    for name in CODEBOOKS:
        yield _decode(
            f"{name}-all-bytes",
            "4.1 2.1 5.1",
            f"All 256 bytes in 16 blocks, decoded with {name}.",
            to_decode(ALL_BYTES, scales, [512], codebook=name),
            "NibbleOrder CodebookRounded",
        )
    for dtype in ("float16", "bfloat16"):
        yield _decode(
            f"nf4-all-bytes-{dtype}",
            "4.2 4.1 5.1",
            f"All 256 bytes in 16 blocks, decoded to {dtype}.",
            to_decode(ALL_BYTES, np.abs(noise(11, 16, spread=4)), [512], dtype),
            "NibbleOrder CastBeforeMultiply TruncatedConversion",
        )
    each = np.array([2 * k << 4 | 2 * k + 1 for k in range(8)] * 2, np.uint8)  # a block of all codes, twice
    for dtype in ("float16", "bfloat16"):
        absmax = _doubly_rounded(dtype)
        yield _decode(
            f"nf4-{dtype}-rounded-twice",
            "4.2 1.2",
            f"Products that rounding to float32 moves onto the midpoint of two {dtype}.",
            to_decode(np.tile(each, absmax.size), absmax, [32 * absmax.size], dtype),
            "DoubleRounding",
        )
    tiny = from_bits(0x1, 0x3, 0x200000, 0x7FFFFF, 0x800000, 0x800001)
    yield _decode(
        "nf4-subnormal-results",
        "4.1 1.1",
        "absmax from the smallest subnormal to the smallest normal number: products are subnormal, or zero.",
        to_decode(np.tile(each, tiny.size), tiny, [32 * tiny.size]),
        "FlushSubnormal",
    )
    for dtype, bits in (
        ("float16", (0x33000000, 0x33000001, 0x33800000, 0x37FFE000, 0x387FFFFF, 0x38800001)),
        ("bfloat16", (0x00008000, 0x00018000, 0x007FFFFF, 0x00FFFFFF)),
    ):
        absmax = from_bits(*bits)
        yield _decode(
            f"nf4-{dtype}-subnormal-results",
            "4.2 1.1",
            f"Products that are subnormal in {dtype}, ties among them.",
            to_decode(np.tile(each, absmax.size), absmax, [32 * absmax.size], dtype),
            "FlushSubnormal",
        )
    for dtype, bits in (
        ("float16", (0x477FE000, 0x477FEFFF, 0x477FF000, 0x7F7FFFFF)),
        ("bfloat16", (0x7F7F0000, 0x7F7F7FFF, 0x7F7F8000, 0x7F7FFFFF)),
    ):
        absmax = from_bits(*bits)
        yield _decode(
            f"nf4-{dtype}-overflow",
            "4.2",
            f"Products up to, at and past where {dtype} ends: those past it are infinite.",
            to_decode(np.tile(each, absmax.size), absmax, [32 * absmax.size], dtype),
            "OverflowClamped",
        )
    signed = from_bits(0, 0x80000000, 0xBF800000, 0xBE99999A)
    for name in ("nf4", "fp4", "fp4-e2m1"):
        yield _decode(
            f"{name}-signed-zeros",
            "4.1 1.5",
            "absmax +0, -0 and negative: every zero has the sign of its product.",
            to_decode(np.tile(each, signed.size), signed, [32 * signed.size], codebook=name),
            "NegativeZero AbsmaxClamped" if name == "nf4" else "NegativeZero",
        )
    for low in (0, 7, 15):
        yield _decode(
            f"nf4-pad-{low}",
            "5.2",
            f"Three elements and {low} in the low half of the last byte, which nobody reads.",
            to_decode(np.array([0x1E, 0xD0 | low], np.uint8), from_bits(0x40490FDB), [3]),
        )
    for size in BLOCK_SIZES:
        n = size + 5
        yield make(
            "dequantize",
            f"nf4-decode-block-{size}",
            "4.1 3.1",
            f"A whole block of {size} and a short one of 5.",
            to_decode(np.resize(each, -(-n // 2)), np.abs(noise(size, 2)), [n], "bfloat16", size),
        )
    for shape, size in _CROSSED:
        text, n = "-".join(str(k) for k in shape), int(np.prod(shape))
        yield make(
            "dequantize",
            f"nf4-decode-rows-{text}",
            "4.1 1.4",
            f"Rows of {shape[-1]} in blocks of {size}: a block goes on in the next row.",
            to_decode(
                np.resize(each, -(-n // 2)),
                np.abs(noise(12, block_count(n, size))),
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
            to_decode(ALL_BYTES[:0], from_bits(), shape, "float16", 64),
        )
    yield _decode(
        "nf4-decode-scalar",
        "12.4 5.2",
        "One element without dimensions.",
        to_decode(np.array([0x37], np.uint8), from_bits(0x3F9D70A4), [], block_size=64),
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
        absmax = np.stack([ulps_away(near, k) for k in (-1, 0, 1)], axis=1).reshape(-1)
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
    codes, absmax = np.resize(ALL_BYTES, 48), np.abs(noise(13, 3))
    for name, bits in (
        ("nan", 0x7FC00000),
        ("negative-nan", 0xFFFFFFFF),
        ("infinity", 0x7F800000),
        ("negative-infinity", 0xFF800000),
    ):
        for block in (0, 2):
            bad = absmax.copy()
            bad[block] = from_bits(bits)[0]
            yield make(
                "dequantize",
                f"refuse-absmax-{name}-{'first' if block == 0 else 'last'}",
                "12.5",
                f"The absmax of block {block} of three is a {name.replace('-', ' ')}.",
                to_decode(codes, bad, [96]),
                flags="NonFiniteAccepted",
                refused=f"The absmax of block {block} is not a finite number.",
            )
    for name, fields, what in (
        ("codes-short", to_decode(codes[:-1], absmax, [96]), "a byte of codes too few"),
        ("codes-long", to_decode(np.append(codes, codes[:1]), absmax, [96]), "a byte of codes too many"),
        ("absmax-short", to_decode(codes, absmax[:2], [96]), "an absmax too few"),
        ("absmax-long", to_decode(codes, np.append(absmax, absmax[:1]), [96]), "an absmax too many"),
        ("codes-of-nothing", to_decode(codes[:1], absmax[:0], [0]), "a byte of codes for no element"),
        ("absmax-of-nothing", to_decode(codes[:0], absmax[:1], [2, 0]), "an absmax for no element"),
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
    for slug, fields, what in (
        (
            "negative",
            to_decode(codes[:3], absmax[:1], [-2, -3]),
            "Two sizes are negative, their product is not.",
        ),
        (
            "negative-of-nothing",
            to_decode(codes[:0], absmax[:0], [0, -3]),
            "A size is negative beside one of 0.",
        ),
    ):
        yield make(
            "dequantize",
            f"refuse-decode-shape-{slug}",
            "1.4",
            what,
            fields,
            flags="ShapeUnchecked",
            refused=what,
        )
    for size in (0, 16, 96, 8192):
        blocks = block_count(96, size) if size else 3
        yield make(
            "dequantize",
            f"refuse-decode-block-size-{size}",
            "12.3",
            f"A block size of {size}.",
            to_decode(codes, np.ones(blocks, np.float32), [96], block_size=size),
            flags="BlockSizeAccepted",
            refused="The block size is none of 32 to 4096.",
        )
    for dtype in ("float64", "uint8"):
        yield make(
            "dequantize",
            f"refuse-decode-dtype-{dtype}",
            "12.2",
            f"An output of {dtype}.",
            to_decode(codes, absmax, [96], dtype),
            flags="DtypeAccepted",
            refused="The dtype is none of float32, float16 and bfloat16.",
        )


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
