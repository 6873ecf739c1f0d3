"""A step shared out among ranks: runs of neighbours, and one sum of their gradients."""

from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from in_threads import on_threads
from nf4.ranks import ALONE, Ranks
from nf4.train import shares
from nf4.train.data import Example
from nf4.train.shares import PairwiseSum, cut, flatten, levels, share, total_of_ranks, unflatten
from numpy.typing import NDArray

Float32 = NDArray[np.float32]


def pairs(arrays: list[Float32]) -> Float32:
    """The clause itself: NF4-15.6."""
    if len(arrays) == 1:
        return arrays[0]
    half = 1
    while half * 2 < len(arrays):
        half *= 2
    return pairs(arrays[:half]) + pairs(arrays[half:])


@given(st.lists(st.integers(1, 300), max_size=60), st.integers(1, 12))
def test_runs_are_of_neighbours_and_of_like_tokens(lengths: list[int], ranks: int) -> None:
    runs = cut(lengths, ranks)
    assert [i for run in runs for i in run] == list(range(len(lengths)))
    assert len(runs) == ranks
    if len(lengths) >= ranks:
        assert all(runs)
    if len(set(lengths)) == 1 and len(lengths) % ranks == 0:
        assert {len(run) for run in runs} == {len(lengths) // ranks}
    if len(lengths) >= 2 * ranks:
        loads = [sum(lengths[i] for i in run) for run in runs]
        assert max(loads) <= sum(lengths) / ranks + 2 * max(lengths)


def test_a_long_sequence_has_a_rank_to_itself() -> None:
    assert cut([100, 1, 1, 1], 2) == [range(1), range(1, 4)]
    assert cut([1, 1, 1, 100], 2) == [range(3), range(3, 4)]


def test_a_share_comes_in_batches_of_the_steps_size() -> None:
    examples = [Example(np.full(3, i, np.int32), np.full(3, i, np.int32)) for i in range(10)]
    step = [(examples[i : i + 4], range(100 + i, 100 + min(i + 4, 10))) for i in (0, 4, 8)]
    assert share(step, ALONE) == (step, [range(10)])

    def taken(ranks: Ranks) -> Any:
        mine, runs = share(step, ranks)
        assert runs == [range(5), range(5, 10)]
        return [[(int(e.ids[0]), n) for e, n in zip(*batch, strict=True)] for batch in mine]

    places = [(i, 100 + i) for i in range(10)]
    assert on_threads(2, taken) == [[places[:4], places[4:5]], [places[5:9], places[9:]]]


@given(st.integers(0, 70), st.integers(1, 70))
def test_levels_are_those_that_a_sum_ends_with(first: int, count: int) -> None:
    run = range(first, first + count)
    summed = PairwiseSum(lambda x, y: x.extend(y), first=first)
    for i in run:
        summed.add([i])
    assert [level for level, _ in summed.nodes] == levels(run)
    assert [len(node) for _, node in summed.nodes] == [1 << level for level in levels(run)]
    assert [i for _, node in summed.nodes for i in node] == list(run)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_any_ranks_sum_to_the_bits_of_the_clause(data: st.DataObject) -> None:
    ranks = data.draw(st.integers(1, 5), "ranks")
    lengths = data.draw(st.lists(st.integers(1, 9), min_size=ranks, max_size=24), "lengths")
    width = data.draw(st.integers(1, 9), "width")
    seed = data.draw(st.integers(0, 1 << 32), "seed")
    bits = np.random.default_rng(seed).integers(0, 1 << 32, (len(lengths), width), np.uint32)
    arrays = list(bits.view(np.float32))  # of every exponent; what isn't finite has no sum
    arrays = [np.where(np.isfinite(a), a, np.float32(2**-149)) for a in arrays]
    runs = cut(lengths, ranks)

    def summed(rank: Ranks) -> bytes:
        own = PairwiseSum(first=runs[rank.rank].start)
        for i in runs[rank.rank]:
            own.add(arrays[i].copy())
        found: Float32 = total_of_ranks(own, runs, rank.rank, rank.exchange)
        return found.tobytes()

    before, shares._PIECE = shares._PIECE, data.draw(st.integers(1, 10), "piece")
    try:
        found = on_threads(ranks, summed)
    finally:
        shares._PIECE = before
    with np.errstate(over="ignore", invalid="ignore"):
        expected = pairs(arrays).tobytes()
    assert set(found) == {expected}


def test_arrays_go_flat_and_back() -> None:
    arrays = {"b": np.arange(6, dtype=np.float32).reshape(2, 3), "a": np.ones((1, 2), np.float32)}
    flat = flatten(list(arrays.values()))
    assert flat.tolist() == [0, 1, 2, 3, 4, 5, 1, 1]
    for name, array in unflatten(flat, arrays).items():
        assert np.array_equal(array, arrays[name])
        assert array.base is flat
