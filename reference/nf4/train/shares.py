"""A step shared out among ranks, and its gradient: one sum, in one order, whoever has its terms."""

from bisect import bisect
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from nf4.exact.ops import add
from nf4.ranks import Ranks
from nf4.train.data import Example

_PIECE = 1 << 22  # elements of the gradient that ranks exchange at a time, which bounds the memory it takes


def cut(lengths: Sequence[int], ranks: int) -> list[range]:
    """Cut sequences of these lengths into runs of neighbours, one for each rank, of like token counts.

    Each rank gets a sequence, where there are enough.
    """
    ends, count = list(accumulate(lengths, initial=0)), len(lengths)
    starts = [0]
    for rank in range(1, ranks):
        aim = ends[-1] * rank / ranks
        nearest = bisect(ends, aim)
        if nearest > count or aim - ends[nearest - 1] <= ends[nearest] - aim:
            nearest -= 1
        low, high = starts[-1] + 1, count - (ranks - rank)
        starts.append(min(max(nearest, low), high) if count >= ranks else min(rank, count))
    return [range(start, stop) for start, stop in zip(starts, [*starts[1:], count], strict=True)]


def share(
    micro_batches: Sequence[tuple[Sequence[Example], Sequence[int]]], ranks: Ranks
) -> tuple[Sequence[tuple[Sequence[Example], Sequence[int]]], list[range]]:
    """Return this rank's micro-batches, as large as the step's, and every rank's run of its sequences."""
    examples = [example for part, _ in micro_batches for example in part]
    runs = cut([len(example) for example in examples], ranks.size)
    if ranks.size == 1:
        return micro_batches, runs
    samples = [sample for _, part in micro_batches for sample in part]
    size, run = max(len(part) for part, _ in micro_batches), runs[ranks.rank]
    starts = range(run.start, run.stop, size)
    places = [slice(start, min(start + size, run.stop)) for start in starts]
    return [(examples[place], samples[place]) for place in places], runs


class PairwiseSum:
    """The sum of arrays that come one after another, in the order of NF4-15.6.

    Of G arrays it is the sum of the first h and that of the rest, h being the greatest power of two below G,
    and so on for both: whoever has a run of neighbours can sum it alone. At most 2·log2 G arrays are held.
    """

    def __init__(self, add: Callable[[Any, Any], None] = add, *, first: int = 0) -> None:
        """add: adds its second argument to its first, in place; first: the place of the first array."""
        self.combine, self._next = add, first
        self.nodes: list[tuple[int, Any]] = []
        """What the total is made of: (level, the sum of 2^level neighbours), for each of levels(run)."""

    def add(self, array: Any, level: int = 0) -> None:
        """Add the next array, or the sum of the next 2^level, which is then this sum's own."""
        place = self._next >> level  # among the sums of this level; every second one completes a pair
        self._next += 1 << level
        while place & 1 and self.nodes and self.nodes[-1][0] == level:
            _, before = self.nodes.pop()
            self.combine(before, array)
            array, level, place = before, level + 1, place >> 1
        self.nodes.append((level, array))

    def total(self) -> Any:
        """The sum of what was added from the first array of all on; nothing may be added after."""
        _, last = self.nodes.pop()
        while self.nodes:
            _, before = self.nodes.pop()
            self.combine(before, last)
            last = before
        return last


def levels(run: range) -> list[int]:
    """The levels of the sums that a PairwiseSum of this run of arrays ends with, of 2^level arrays each."""
    found, start = [], run.start
    while start < run.stop:
        level = (run.stop - start).bit_length() - 1
        if start:
            level = min(level, (start & -start).bit_length() - 1)
        found.append(level)
        start += 1 << level
    return found


class Exchange(Protocol):
    """Sends arrays to other ranks and receives some, each (rank, array): Ranks.exchange, or a GPU's."""

    def __call__(self, sends: Sequence[tuple[int, Any]], receives: Sequence[tuple[int, Any]]) -> None: ...  # noqa: D102


def total_of_ranks(
    own: PairwiseSum,
    runs: Sequence[range],
    rank: int,
    exchange: Exchange,
    empty: Callable[[int], Any] = lambda size: np.empty(size, np.float32),
) -> Any:
    """Return the sum over all ranks of the arrays of their runs, in the order of NF4-15.6, on every rank.

    own: the PairwiseSum of this rank's run, of float32 arrays [P], which are overwritten; runs: those of all
    ranks, none of them empty. Each rank sums a part of the elements, and sends the result to all.
    """
    if len(runs) == 1:
        return own.total()
    layout, ranks = [levels(run) for run in runs], range(len(runs))
    nodes = [array for _, array in own.nodes]
    result = nodes[0]
    for start in range(0, result.size, _PIECE):
        size = min(_PIECE, result.size - start)
        ends = [start + size * r // len(ranks) for r in range(len(ranks) + 1)]
        parts = [slice(ends[r], ends[r + 1]) for r in ranks]
        mine, others = parts[rank], [r for r in ranks if r != rank]
        received = {r: [empty(mine.stop - mine.start) for _ in layout[r]] for r in others}
        exchange(
            [(r, node[parts[r]]) for r in others for node in nodes],
            [(r, array) for r in others for array in received[r]],
        )
        received[rank] = [node[mine] for node in nodes]
        summed = PairwiseSum(own.combine)
        for r in ranks:
            for level, array in zip(layout[r], received[r], strict=True):
                summed.add(array, level)
        result[mine] = summed.total()
        exchange([(r, result[mine]) for r in others], [(r, result[parts[r]]) for r in others])
    return result


def flatten(arrays: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """Return arrays one after another, as one new array of one dimension."""
    return np.concatenate([array.reshape(-1) for array in arrays])


def unflatten(flat: NDArray[Any], like: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Return the parts of a flat array in the shapes of others, by their names; no copies."""
    found, start = {}, 0
    for name, array in like.items():
        found[name] = flat[start : start + array.size].reshape(array.shape)
        start += array.size
    return found
