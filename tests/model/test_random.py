"""Philox4x32-10 against Random123's known answers, and what is built on it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nf4.errors import InputError
from nf4.random import keep_mask, permutation, philox4x32, stream_of, uniform

u32 = st.integers(0, 2**32 - 1)


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_known_answers(counter: str, key: str, answer: str) -> None:
    c, k, a = ([int(word, 16) for word in words.split()] for words in (counter, key, answer))
    assert philox4x32(np.array([c], np.uint32), (k[0], k[1])).tolist() == [a]


def philox_by_hand(counter: list[int], key: list[int]) -> list[int]:
    c, k = list(counter), list(key)
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [b >> 32 ^ c[1] ^ k[0], b % 2**32, a >> 32 ^ c[3] ^ k[1], a % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


@settings(deadline=None, max_examples=50)
@given(st.lists(st.lists(u32, min_size=4, max_size=4), min_size=1, max_size=5), st.tuples(u32, u32))
def test_many_counters_equal_one_by_one(counters: list[list[int]], key: tuple[int, int]) -> None:
    answer = philox4x32(np.array(counters, np.uint32), key)
    assert answer.tolist() == [philox_by_hand(c, list(key)) for c in counters]


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**64 - 1), u32, u32, st.integers(1, 40), st.floats(0, 0.99))
def test_masks_and_uniforms_are_what_the_spec_says(
    seed: int, stream: int, sample: int, n: int, p: float
) -> None:
    key = [seed % 2**32, seed >> 32]
    blocks = [philox_by_hand([i, sample, stream, 1], key) for i in range(-(-n // 8))]
    lanes = [word >> shift & 0xFFFF for block in blocks for word in block for shift in (0, 16)]
    assert keep_mask(seed, stream, sample, n, p).tolist() == [
        x >= min(round(p * 65536), 65535) for x in lanes[:n]
    ]
    words = [w for i in range(-(-n // 4)) for w in philox_by_hand([i, sample, stream, 0], key)]
    assert uniform(seed, stream, n, sample).tolist() == [(w >> 8) / 2**24 for w in words[:n]]


def test_draws_of_many_chunks_continue_each_other() -> None:
    long = uniform(7, 3, 40_000)
    assert np.array_equal(long[:10_001], uniform(7, 3, 10_001))
    assert len(np.unique(long)) > 39_900
    assert abs(float(long.mean()) - 0.5) < 0.01


def test_kept_fraction() -> None:
    assert abs(float(keep_mask(1, 2, 3, 200_000, 0.1).mean()) - 0.9) < 0.005
    assert keep_mask(1, 2, 3, 1000, 0.0).all()


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**64 - 1), st.integers(0, 100), st.integers(0, 3000))
def test_permutation(seed: int, epoch: int, n: int) -> None:
    order = permutation(seed, epoch, n)
    assert order.dtype == np.int64
    assert np.array_equal(np.sort(order), np.arange(n))
    if n > 20:
        assert not np.array_equal(order, permutation(seed, epoch + 1, n))


@pytest.mark.parametrize("p", [-0.1, 1.0, float("nan")])
def test_bad_dropout_is_refused(p: float) -> None:
    with pytest.raises(InputError, match="dropout"):
        keep_mask(0, 0, 0, 8, p)


def test_streams_of_names() -> None:
    assert stream_of("123456789") == 0xCBF43926  # the check value of CRC-32


def test_a_draw_beyond_the_counter_is_refused() -> None:
    with pytest.raises(InputError, match=r"at most 2\^32"):
        uniform(0, 0, (1 << 34) + 1)
