"""The vectors of chapter 6: means, the 8-bit map, nested blocks, and tensors quantized twice."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nf4.blockwise import block_count, encode
from nf4.codebooks import CODEBOOKS, midpoint_thresholds
from nf4.conform.generate import make
from nf4.conform.generate.inputs import (
    ALL_BYTES,
    Float32,
    coded,
    from_bits,
    noise,
    product_steps,
    scaling_steps,
    to_quantize,
    ulps_away,
)
from nf4.conform.vectors import Vector
from nf4.floats import widen
from nf4.nested import DYNAMIC_MAP, NESTED_BLOCK_SIZE, NestedAbsmax, decode_nested, encode_nested

LARGEST = np.finfo(np.float32).max


def vectors() -> Iterator[Vector]:
    """Yield the vectors of double quantization."""
    yield from _encode_absmax_means()
    yield from _encode_absmax_codes()
    yield from _decode_absmax()
    yield from _double()


def _centred(absmax: Float32) -> dict[str, Any]:
    centred = absmax - encode_nested(absmax).offset
    return {"centred": centred, **scaling_steps(centred, NESTED_BLOCK_SIZE)}


def _absmax(slug: str, clauses: str, comment: str, absmax: NDArray[Any], flags: str = "") -> Vector:
    """A vector of encode_absmax with its steps."""
    absmax = absmax.astype(np.float32)
    fields, steps = {"absmax": absmax}, _centred(absmax)
    return make("encode_absmax", slug, clauses, comment, fields, flags=flags, steps=steps)


def _encode_absmax_means() -> Iterator[Vector]:
    tiny, mixed = np.full(15, 2.0**-24), np.abs(noise(20, 37, spread=120))
    small = 64 * np.abs(noise(21, 12, spread=1)) / 2
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
        (
            "tie-down",
            "Two neighbours: a tie, to the even smaller one.",
            from_bits(0x3F800000, 0x3F800001),
            "",
        ),
        ("tie-up", "Two neighbours: a tie, to the even greater one.", from_bits(0x3F800001, 0x3F800002), ""),
        (
            "three",
            "The sum of three is divided by 3, not multiplied by a rounded third.",
            noise(23, 3) ** 2,
            "MeanOrder",
        ),
        ("seven", "Seven numbers.", np.abs(noise(22, 7, spread=3)), ""),
        ("mixed", "37 numbers over 120 powers of two.", mixed, ""),
        ("mixed-backwards", "The numbers of mean-mixed in reverse: the same mean.", mixed[::-1], ""),
        (
            "largest",
            "Three times the largest number, whose float32 sum is infinite.",
            np.full(3, LARGEST),
            "MeanOrder",
        ),
        ("subnormal", "Two thirds of the smallest number, rounded up.", from_bits(1, 1, 0), "FlushSubnormal"),
        ("subnormal-tie", "Half the smallest number, to even: 0.", from_bits(1, 0), "FlushSubnormal"),
        (
            "subnormal-tie-up",
            "One and a half of the smallest number, to even: two.",
            from_bits(3, 0),
            "FlushSubnormal",
        ),
        ("one", "One block: the mean is its absmax.", from_bits(0x3E99999A), ""),
        ("zeros", "Three zero blocks: offset +0 and code 127.", from_bits(0, 0, 0), "ZeroBlock"),
    ):
        yield _absmax(f"mean-{slug}", "6.1 1.3", comment, absmax, flags)
    yield make(
        "encode_absmax", "mean-of-nothing", "6.1 12.4", "No block: offset +0.", {"absmax": from_bits()}
    )


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
    by_r = [ulps_away(r, k) + offset for k in range(-3, 4)]
    return np.unique(np.concatenate([*by_r, *(ulps_away(by_r[3], k) for k in range(-3, 4))]))


def _encode_absmax_codes() -> Iterator[Vector]:
    for slug, offset, low, high, per_block, flags in (
        ("outer", 1, 0.05, 1, 100, "TieRule DynamicMapRounding NearestSearch"),
        ("inner", 1 / 16, 0, 0.05, 64, "TieRule DynamicMapRounding"),
    ):
        yield _absmax(
            f"map-thresholds-{slug}",
            "6.3 6.2",
            f"By each threshold of the map from {low} to {high} the last r below and the first above.",
            _at_map_thresholds(offset, low, high, per_block),
            flags,
        )
    yield _absmax(
        "nested-reciprocal",
        "3.3 6.3",
        "r that a true division by the nested absmax would give other codes, in a short nested block.",
        _nested_division(),
        "TrueDivision TailDivision",
    )
    base = 0x3F800000
    for n in (256, 257, 300):
        yield _absmax(
            f"nested-tail-{n}", "6.3", f"{n} blocks: {block_count(n, 256)} nested.", np.abs(noise(n, n))
        )
    yield _absmax(
        "nested-equal",
        "3.4 6.3",
        "257 equal absmax: r is 0, its code 127 and the nested absmax +0.",
        np.full(257, 0.3),
        "ZeroBlock",
    )
    yield _absmax(
        "nested-zero-block",
        "3.4 6.3",
        "A nested block of zeros before a short one of others.",
        np.append(np.full(256, 1.0), from_bits(base - 2, base + 1)),
        "ZeroBlock",
    )
    yield _absmax(
        "nested-tiny",
        "3.3 6.3 1.1",
        "r of a few 2^-149, scaled by 2^64 first.",
        from_bits(*(0x00800000 + k for k in (0, 1, 3, 4, 7, 12))),
        "FlushSubnormal ReciprocalClamped ReciprocalOverflow",
    )
    # In units of 2^103: offset is odd, and r ends on a half; to even it goes up, or down
    largest, third = float(LARGEST), 2.0**103
    yield _absmax(
        "nested-largest",
        "6.6 6.3",
        "The largest number beside others, which decodes to a finite one.",
        np.array([largest, (2**24 - 7) * third, 0]),
    )
    for slug, comment, absmax in (
        (
            "code",
            "Blocks of the largest number whose code stands for a little more than their r.",
            from_bits(0x7F400000, 0x7F7FFFFF, 0x7F7FFFFF),
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
    yield _absmax(
        "nested-negative-zero",
        "6.6 6.1",
        "-0 among the absmax is taken for 0.",
        from_bits(0x80000000, 0x3F800000, 0, 0x40400000),
    )
    yield _absmax(
        "mean-negative-zeros",
        "6.1 6.6",
        "Absmax that are all -0: the offset is +0, the codes are 127 and the nested absmax is +0.",
        from_bits(0x80000000, 0x80000000, 0x80000000),
        "MeanOrder ZeroBlock",
    )
    for name, bits in (("nan", 0x7FC00000), ("infinity", 0x7F800000), ("negative", 0xBF800000)):
        yield make(
            "encode_absmax",
            f"refuse-to-encode-{name}",
            "6.6",
            f"An absmax that is {'negative' if name == 'negative' else f'a {name}'}.",
            {"absmax": from_bits(0x3F800000, bits)},
            flags="NonFiniteAccepted" if name != "negative" else "",
            refused="The absmax of block 1 is negative or not a finite number.",
        )


def _nested_division() -> Float32:
    """absmax around 1 of which a true division by the nested absmax would give r another code."""
    thresholds = midpoint_thresholds(DYNAMIC_MAP)
    one, absmax = np.float32(1), from_bits(0x3F7FF006)[0]  # with more such r than most have
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
    return np.where(np.arange(256) % 6 == 1, ulps_away(DYNAMIC_MAP, 1), DYNAMIC_MAP).astype(np.float32)


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
    full = np.append(ALL_BYTES, some)
    yield _decoded(
        "decode-all-codes",
        "6.4 1.2 6.2",
        "All 256 codes, and a short second nested block with another absmax.",
        _nested(full, from_bits(0x3F9D70A4, 0x3E4CCCCD), 1.7),
        "FmaContraction NestedAbsmaxIgnored OffsetOmitted",
    )
    for slug, comment, nested_map, flags in (
        ("fused", "A map as stored where fused multiply-add made it.", _fused_map(), "MapIgnored"),
        ("reversed", "A map that descends from 1.", DYNAMIC_MAP[::-1].copy(), "MapIgnored"),
        (
            "unused-nan",
            "A map with a NaN and an infinity that no code stands for.",
            np.where(np.isin(ALL_BYTES, some), DYNAMIC_MAP, np.float32(np.nan)).astype(np.float32),
            "",
        ),
    ):
        fields = _nested(some, from_bits(0x3FB504F3), 2.1, nested_map)
        yield _decoded(f"decode-map-{slug}", "6.2 6.4" if flags else "12.5 6.2 6.4", comment, fields, flags)
    yield _decoded(
        "decode-negative",
        "6.4",
        "An absmax of little offset decodes to a negative number, one of none to -0.",
        _nested(some, from_bits(0x40000000), 0.125),
        "NestedAbsmaxIgnored OffsetOmitted",
    )
    minus_zero = _nested(np.array([0, 126, 127, 255], np.uint8), from_bits(0), -0.0)
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
        _nested(np.full(3, 127, np.uint8), from_bits(0), 0.3),
        "OffsetOmitted",
    )
    yield _decoded(
        "decode-subnormal",
        "6.4 1.1",
        "Products and sums that are subnormal.",
        _nested(some, from_bits(0x00300001), 2.0**-127),
        "FlushSubnormal",
    )
    yield _decoded(
        "decode-largest",
        "6.4",
        "Sums up to the largest number.",
        _nested(np.array([255, 254, 127, 0], np.uint8), from_bits(0x7EFFFFFE), 2.0**127),
    )
    yield _decoded("decode-nothing", "6.4 12.4", "No block.", _nested(some[:0], from_bits(), 0.0))
    largest = float(LARGEST)
    for slug, fields, what in (
        (
            "tie",
            _nested(np.array([127, 255], np.uint8), from_bits(0x7EFFFFFF), 2.0**127),
            "The absmax of block 1 is infinite.",
        ),
        (
            "sum",
            _nested(np.array([127, 255], np.uint8), from_bits(0x7F000000), largest),
            "The absmax of block 1 is infinite.",
        ),
        ("offset", _nested(some, from_bits(0x3F800000), np.inf), "The absmax of block 0 is infinite."),
        ("nested", _nested(some, from_bits(0xFF800000), 1), "The absmax of block 0 is infinite."),
        ("offset-nan", _nested(some, from_bits(0x3F800000), np.nan), "The absmax of block 0 is a NaN."),
        (
            "map-nan",
            _nested(
                some, from_bits(0x3F800000), 1, np.where(ALL_BYTES == 127, np.float32(np.nan), DYNAMIC_MAP)
            ),
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
        ("nested-short", _nested(full, from_bits(0x3F800000), 1), "A nested absmax is missing."),
        (
            "nested-long",
            _nested(some, from_bits(0x3F800000, 0x3F800000), 1),
            "There is a nested absmax too many.",
        ),
        ("map-short", _nested(some, from_bits(0x3F800000), 1, DYNAMIC_MAP[1:]), "The map has 255 entries."),
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
    small = noise(30, 140) * np.repeat(np.array([1, 0.25, 3, 1.5, 0.01], np.float32), 32)[:140]
    for codebook in CODEBOOKS:
        yield _quantized_twice(
            f"double-{codebook}",
            "6.1 6.3 5.3",
            f"Five blocks of {codebook}, the last one short.",
            to_quantize(small, codebook=codebook),
            "NibbleOrder",
        )
    for dtype in ("float16", "bfloat16"):
        x = noise(31, 3 * 50, dtype).reshape(3, 50)
        yield _quantized_twice(
            f"double-{dtype}-rows",
            "3.1 6.3 7.1 1.4",
            f"{dtype}, rows of 50 in blocks of 64.",
            to_quantize(x, 64),
            "BlocksRestartAtRows",
        )
    long = noise(32, 32 * 257 + 5, "bfloat16")
    yield make(
        "quantize_double",
        "double-two-nested-blocks",
        "6.1 6.3 5.3",
        "258 blocks: a whole nested block and a short one.",
        to_quantize(long),
        flags="NibbleOrder",
    )
    yield _quantized_twice(
        "double-zeros",
        "3.4 6.3",
        "Three blocks of zeros.",
        to_quantize(np.zeros(70, np.float32)),
        "ZeroBlock",
    )
    yield _quantized_twice(
        "double-scalar",
        "12.4 6.3",
        "One element without dimensions.",
        to_quantize(np.array(-0.3, np.float32)),
    )
    yield make(
        "quantize_double",
        "double-empty",
        "12.4 6.1",
        "No element: no codes, no blocks, offset +0.",
        to_quantize(np.empty((0, 3), np.float32)),
    )
    near = np.repeat(from_bits(0x7F400000, 0x7F7FFFFF, 0x7F7FFFFF), 32)
    bad = small.copy()
    bad[137] = np.nan
    for slug, fields, clauses, flags, what in (
        (
            "infinite",
            to_quantize(near),
            "6.6",
            "InfiniteAbsmaxAccepted",
            "The absmax of block 1 would decode to an infinity.",
        ),
        ("nan", to_quantize(bad), "12.1", "NonFiniteAccepted", "Element 137 is not a finite number."),
        (
            "block-size",
            to_quantize(small, 48),
            "12.3",
            "BlockSizeAccepted",
            "The block size is none of 32 to 4096.",
        ),
        (
            "dtype",
            to_quantize(np.ones(4)),
            "12.2",
            "DtypeAccepted",
            "The dtype is none of float32, float16 and bfloat16.",
        ),
        (
            "shape",
            {**to_quantize(small), "shape": [-35, -4]},
            "1.4",
            "",
            "Two sizes are negative, though they multiply to the number of elements.",
        ),
        (
            "length",
            {**to_quantize(small), "shape": [139]},
            "12.5",
            "",
            "There is an element more than those of the shape.",
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
    nested = _nested(absmax_codes, from_bits(0x3F4CCCCD), 0.9)
    for codebook in CODEBOOKS:
        yield _dequantized_twice(
            f"double-decode-{codebook}",
            "6.4 4.1",
            f"Five blocks of {codebook}, the last one short.",
            _packed_double(nested, [129], codebook=codebook),
            "NibbleOrder NestedAbsmaxIgnored OffsetOmitted",
        )
    for dtype in ("float16", "bfloat16"):
        yield _dequantized_twice(
            f"double-decode-{dtype}-rows",
            "4.1 4.2 6.4 1.4",
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
        _packed_double(_nested(np.array([0, 50, 126], np.uint8), from_bits(0x3F800000), -0.0), [80]),
        "NegativeZero",
    )
    codes, absmax = encode(widen(long), 32, CODEBOOKS["nf4"])
    twice = encode_nested(absmax)
    yield make(
        "dequantize_double",
        "double-decode-two-nested-blocks",
        "6.4 4.1 4.2",
        "258 blocks: a whole nested block and a short one.",
        {
            **_nested(twice.codes, twice.absmax, float(twice.offset)),
            **coded(codes, [long.size], "bfloat16"),
        },
        flags="NestedAbsmaxIgnored",
    )
    yield _dequantized_twice(
        "double-decode-empty",
        "12.4 6.4",
        "No element.",
        _packed_double(_nested(absmax_codes[:0], from_bits(), 0.0), [3, 0]),
    )
    for slug, fields, clauses, flags, what in (
        (
            "infinite",
            _packed_double(_nested(absmax_codes, from_bits(0x7F000000), float(LARGEST)), [129]),
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
            _packed_double({**nested, "nested_absmax": from_bits(0x3F800000, 0x3F800000)}, [129]),
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
    codes = np.resize(ALL_BYTES * np.uint8(29), -(-int(np.prod(shape)) // 2))
    return {**nested, **coded(codes, shape, dtype, 32, codebook)}


def _dequantized_twice(
    slug: str, clauses: str, comment: str, fields: dict[str, Any], flags: str = ""
) -> Vector:
    """A vector of dequantize_double with its steps."""
    absmax = decode_nested(
        NestedAbsmax(fields["absmax_codes"], fields["nested_absmax"], fields["offset"][0], fields["map"])
    )
    products = product_steps(fields["codes"], absmax, int(np.prod(fields["shape"])), 32, fields["codebook"])
    steps = {"absmax": absmax} | (products if fields["dtype"] != "float32" else {})
    return make("dequantize_double", slug, clauses, comment, fields, flags=flags, steps=steps)
