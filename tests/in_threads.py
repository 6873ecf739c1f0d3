"""Ranks that are threads of one process: all that MPI does for a run, without MPI."""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
from nf4.ranks import Ranks
from numpy.typing import NDArray

T = TypeVar("T")


class _Room:
    """What the ranks share."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=60)
        self.values: list[Any] = [None] * size
        self.mail: dict[tuple[int, int], deque[NDArray[Any]]] = {
            (i, j): deque() for i in range(size) for j in range(size)
        }


class ThreadRanks(Ranks):
    """One of `size` threads that are the ranks of a run."""

    def __init__(self, room: _Room, rank: int, size: int) -> None:
        self._room, self.rank, self.size, self.local, self.host = room, rank, size, rank, f"host{rank}"

    def gather(self, value: T) -> list[T]:
        room = self._room
        room.values[self.rank] = value
        room.barrier.wait()
        found = list(room.values)
        room.barrier.wait()
        return found

    def spread(self, value: T) -> T:
        return self.gather(value)[0]

    def spread_array(self, array: NDArray[Any]) -> None:
        np.copyto(array, self.gather(array.copy())[0])

    def exchange(
        self, sends: Sequence[tuple[int, NDArray[Any]]], receives: Sequence[tuple[int, NDArray[Any]]]
    ) -> None:
        for rank, array in sends:
            self._room.mail[self.rank, rank].append(array.copy())
        self._room.barrier.wait()
        for rank, array in receives:
            np.copyto(array, self._room.mail[rank, self.rank].popleft())

    def describe(self) -> str:
        return f"{self.size} threads"


def on_threads(size: int, work: Callable[[Ranks], T]) -> list[T]:
    """Call work on each of so many ranks; their results, by rank. Raises the first error of a rank."""
    room = _Room(size)
    results: list[Any] = [None] * size
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            results[rank] = work(ThreadRanks(room, rank, size))
        except BaseException as error:
            errors.append(error)
            room.barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,), name=f"rank {rank}") for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results
