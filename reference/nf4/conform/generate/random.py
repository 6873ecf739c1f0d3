"""The vectors of chapter 11: Philox, streams, uniforms, dropout masks, permutations."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nf4 import random
from nf4.conform.generate import make
from nf4.conform.vectors import Vector

Array = NDArray[Any]

Q_PROJ = "model.layers.0.self_attn.q_proj"
WIDE_SEED = 0xFEDCBA9876543210
LAST = (1 << 64) - 1


def vectors() -> Iterator[Vector]:
    """Yield the vectors of random numbers."""
    yield from _philox()
    yield from _streams()
    yield from _uniforms()
    yield from _masks()
    yield from _permutations()


def _philox() -> Iterator[Vector]:
    def words(text: str) -> Array:
        return np.array([int(word, 16) for word in text.split()], np.uint32)

    published = "one of the three known answers published with Random123"
    for slug, counter, key, comment in (
        ("zeros", "0 0 0 0", "0 0", f"All bits 0: {published}."),
        ("ones", "ffffffff " * 4, "ffffffff " * 2, f"All bits 1: {published}."),
        (
            "pi",
            "243f6a88 85a308d3 13198a2e 03707344",
            "a4093822 299f31d0",
            f"Digits of pi, the example of NF4-11.1: {published}.",
        ),
        ("counter-first", "1 0 0 0", "0 0", "Only the first word of the counter."),
        ("counter-second", "0 1 0 0", "0 0", "Only the second word of the counter."),
        ("counter-third", "0 0 1 0", "0 0", "Only the third word of the counter."),
        ("counter-fourth", "0 0 0 1", "0 0", "Only the fourth word of the counter."),
        ("key-first", "0 0 0 0", "1 0", "Only the first word of the key."),
        ("key-second", "0 0 0 0", "0 1", "Only the second word of the key."),
        (
            "key-wraps",
            "0 0 0 0",
            "61c88647 44984a7b",
            "A key that is (0, 0) from the second round on, for which the sums wrap around.",
        ),
    ):
        yield make(
            "philox",
            f"philox-{slug}",
            "11.1",
            comment,
            {"counter": words(counter), "key": words(key)},
            flags="PhiloxRounds PhiloxKey",
        )


def _streams() -> Iterator[Vector]:
    for slug, name, comment, flags in (
        ("q-proj", Q_PROJ, "The name of a module.", "StreamHash"),
        ("check", "123456789", "The check value of CRC-32, cbf43926.", "StreamHash"),
        ("empty", "", "A name without characters has the stream 0.", "StreamHash"),
        ("generate", "generate", "The stream from which tokens are sampled (NF4-11.3).", "StreamHash"),
        ("accent", "modèle.couche.é", "Letters of two bytes in UTF-8.", "StreamEncoding"),
        ("decomposed", "e\u0301", "An e and a combining accent: nothing is normalised.", "StreamEncoding"),
        ("astral", "層.🦙", "Characters of three and of four bytes in UTF-8.", "StreamEncoding"),
        ("space", " a\t", "Spaces belong to the name.", "StreamHash"),
    ):
        yield make("stream", f"stream-{slug}", "11.2", comment, {"name": name}, flags=flags)


def _draw(seed: int, stream: int = 0, sample: int = 0) -> dict[str, Array]:
    return {
        "seed": np.array([seed], np.uint64),
        "stream": np.array([stream], np.uint32),
        "sample": np.array([sample], np.uint64),
    }


def _uniforms() -> Iterator[Vector]:
    q_proj = random.stream_of(Q_PROJ)
    order = "UniformBits WordOrder"
    for slug, fields, n, comment, flags in (
        ("none", _draw(1), 0, "No numbers at all.", ""),
        ("one", _draw(1), 1, "One number of a block.", "WordOrder"),
        ("blocks", _draw(1, q_proj), 11, "Two blocks and a part of a third.", f"{order} CounterOrder"),
        ("sample", _draw(1, q_proj, 3), 4, "Another sample draws other numbers.", f"{order} CounterOrder"),
        (
            "sample-wraps",
            _draw(1, q_proj, (1 << 32) + 3),
            4,
            "A sample is taken modulo 2^32, so that these are the numbers of sample 3.",
            "SampleCarry",
        ),
        ("wide-seed", _draw(WIDE_SEED, q_proj), 4, "A seed of 64 bits.", "SeedTruncated SeedHalves"),
        ("last-seed", _draw(LAST, 0xFFFFFFFF, 0xFFFFFFFF), 4, "The largest seed, stream and sample.", order),
        ("high-seed", _draw(1 << 32), 4, "A seed whose lower half is 0.", "SeedTruncated SeedHalves"),
    ):
        yield make("uniform", f"uniform-{slug}", "11.2 11.3", comment, {**fields, "n": n}, flags=flags)
    yield make(
        "uniform",
        "uniform-refused-negative",
        "1.4 11.3",
        "No count is negative.",
        {**_draw(1), "n": -3},
        flags="NegativeAccepted",
        refused="n is negative.",
    )


def _sample_with(lane: int, n: int = 64) -> int:
    """The first sample with an element of this lane (NF4-11.4) among n, under seed 5 and stream 0."""
    at_once = 1024
    for start in range(0, 1 << 16, at_once):
        counter = np.zeros((at_once, n // 8, 4), np.uint32)
        counter[..., 0] = np.arange(n // 8)
        counter[..., 1] = np.arange(start, start + at_once)[:, None]
        counter[..., 3] = random.DROPOUT
        words = random.philox4x32(counter.reshape(-1, 4), (5, 0)).reshape(at_once, -1)
        found = ((words & 0xFFFF) == lane) | (words >> 16 == lane)
        if found.any():
            return start + int(found.any(axis=1).argmax())
    raise AssertionError("no such sample")


def _masks() -> Iterator[Vector]:
    def mask(slug: str, p: float, n: int, comment: str, flags: str, sample: int = 0, **more: Any) -> Vector:
        fields = {**_draw(5, 0, sample), "n": n, "p": np.array([p])}
        return make("keep_mask", f"mask-{slug}", "11.4", comment, fields, flags=flags, **more)

    yield mask("none", 0.5, 0, "No elements.", "")
    for n in (1, 7, 8, 9, 17):
        yield mask(f"half-{n}", 0.5, n, f"{n} elements, of which eight share a block.", "LaneOrder")
    yield mask("tenth", 0.1, 64, "The dropout of most runs.", "LaneOrder MaskInverted")
    yield make(
        "keep_mask",
        "mask-module",
        "11.2 11.4",
        "The mask of a module in a late sequence of a run.",
        {**_draw(WIDE_SEED, random.stream_of(Q_PROJ), 100_000), "n": 40, "p": np.array([0.3])},
        flags="LaneOrder CounterOrder SeedTruncated",
    )
    yield mask("zero-p", 0.0, 64, "p = 0 keeps even the lane 0.", "KeepCompare", _sample_with(0))
    lane = 1 << 14
    yield mask(
        "at-threshold",
        0.25,
        64,
        "An element whose lane is h itself is kept.",
        "KeepCompare",
        _sample_with(lane),
    )
    yield mask(
        "below-threshold",
        0.25,
        64,
        "An element whose lane is h - 1 is dropped.",
        "",
        _sample_with(lane - 1),
    )
    for halves, lane, comment, flag in (
        (1, 0, "65536 p = 0.5 is rounded to 0: the lane 0 is kept", "ThresholdRounding"),
        (3, 1, "65536 p = 1.5 is rounded to 2: the lane 1 is dropped", "ThresholdTruncated"),
        (5, 2, "65536 p = 2.5 is rounded to 2: the lane 2 is kept", "ThresholdRounding"),
    ):
        yield mask(f"tie-{halves}", halves / 2**17, 64, f"{comment}.", flag, _sample_with(lane))
    yield mask(
        "largest-p",
        math.nextafter(1.0, 0.0),
        64,
        "The largest p below 1: h is 65535, and the lane 65535 is kept.",
        "ThresholdTop",
        _sample_with(65535),
    )
    yield mask("tiny-p", 5e-324, 64, "The smallest p above 0 drops nothing.", "", _sample_with(0))
    for slug, p in (("one", 1.0), ("above-one", 1.5), ("negative", -0.1), ("nan", math.nan)):
        yield mask(
            f"p-{slug}",
            p,
            8,
            "p is at least 0 and below 1.",
            "DropoutRange",
            refused=f"p is {p}, not in [0, 1).",
        )
    yield make(
        "keep_mask",
        "mask-refused-negative",
        "1.4 11.4",
        "No count is negative.",
        {**_draw(5), "n": -8, "p": np.array([0.5])},
        flags="NegativeAccepted",
        refused="n is negative.",
    )


def _permutations() -> Iterator[Vector]:
    for slug, seed, epoch, n, comment, flags in (
        ("none", 1, 0, 0, "Nothing to put in order.", ""),
        ("one", 1, 0, 1, "One thing.", ""),
        ("two", 1, 0, 2, "Two things, of one block.", ""),
        ("odd", 1, 0, 7, "An odd number: the last block gives one value.", "PermutationWords"),
        ("epoch-1", 1, 1, 7, "The next epoch has an order of its own.", "PermutationWords EpochIgnored"),
        ("forty", 1, 2, 40, "Forty things.", "PermutationWords EpochIgnored"),
        ("wide-seed", WIDE_SEED, 3, 9, "A seed of 64 bits.", "SeedTruncated SeedHalves"),
        ("last-epoch", 1, (1 << 32) - 1, 9, "The epoch that chooses what is held out.", "EpochIgnored"),
    ):
        draws = []
        for block in range(-(-n // 2)):
            counter = np.array([[block, epoch, 0, random.PERMUTATION]], np.uint32)
            w = random.philox4x32(counter, (seed & 0xFFFFFFFF, seed >> 32))[0].tolist()
            draws += [w[0] | w[1] << 32, w[2] | w[3] << 32]
        yield make(
            "permutation",
            f"permutation-{slug}",
            "11.5",
            comment,
            {"seed": np.array([seed], np.uint64), "epoch": np.array([epoch], np.uint64), "n": n},
            flags=flags,
            steps={"draws": np.array(draws[:n], np.uint64)},
        )
    yield make(
        "permutation",
        "permutation-refused-negative",
        "1.4 11.5",
        "No count is negative.",
        {"seed": np.array([1], np.uint64), "epoch": np.array([0], np.uint64), "n": -2},
        flags="NegativeAccepted",
        refused="n is negative.",
    )
