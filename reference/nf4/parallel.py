"""The one thread pool: NumPy lets go of the GIL in its inner loops, so plain threads share the cores."""

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

_thread = threading.local()
_limit: int | None = None


def processors() -> set[int]:
    """Return the numbers of the processors that this process may run on."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    return set(affinity(0)) if affinity else set(range(os.cpu_count() or 1))


def limit_threads(threads: int) -> None:
    """Leave processors to other processes from now on: worker_threads() is at most so many."""
    global _limit  # noqa: PLW0603  it is the process's, as its threads are
    _limit = threads


def worker_threads() -> int:
    """Return the number of threads worth starting: the processors this process may run on, or its share."""
    available = len(processors())
    return available if _limit is None else min(_limit, available)


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(worker_threads(), thread_name_prefix="nf4")


if hasattr(os, "register_at_fork"):  # a forked child has the pool object but none of its threads
    os.register_at_fork(after_in_child=_pool.cache_clear)


def _inside(work: Callable[[], R]) -> R:
    """Run work with the mark that makes nested calls of this module sequential."""
    before = getattr(_thread, "busy", False)
    _thread.busy = True
    try:
        return work()
    finally:
        _thread.busy = before


def map_chunks(work: Callable[[int, int], None], n: int, chunk: int) -> None:
    """Call work(start, stop) for [0, n) cut into pieces of chunk, over the threads of the pool.

    The pieces may run in any order, so work writes each to its own place. Inside a worker thread, or where
    there is one piece, they run in sequence in the calling thread. An error is raised after all have ended.
    """
    starts = range(0, n, chunk)
    threads = min(worker_threads(), len(starts))
    if threads <= 1 or getattr(_thread, "busy", False):
        for start in starts:
            work(start, min(start + chunk, n))
        return

    pieces = iter(
        starts
    )  # next() on a range iterator is atomic: the threads draw from it as they become free

    def drain() -> None:
        for start in pieces:
            work(start, min(start + chunk, n))

    futures = [_pool().submit(_inside, drain) for _ in range(threads - 1)]
    try:
        _inside(drain)
    finally:
        errors = [future.exception() for future in futures]  # waits
    for error in errors:
        if error is not None:
            raise error


def map_spans(work: Callable[[int, int], None], n: int, chunk: int) -> None:
    """Call work(start, stop) for [0, n) cut into a few long pieces, each of whole chunks but the last.

    For work that goes through its piece chunk by chunk itself: a thread then needs the GIL for a few calls a
    chunk only, and no two threads first touch the same huge page of a new array.
    """
    threads = 1 if getattr(_thread, "busy", False) else worker_threads()
    chunks = -(-n // chunk)
    map_chunks(work, n, chunk * max(1, min(64, -(-chunks // threads))))


def map_groups(work: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """Return [work(item) for item in items], one thread an item; map_chunks is sequential inside work.

    For work that is itself long, such as one micro-batch of a training step.
    """
    if len(items) <= 1 or getattr(_thread, "busy", False):
        return [work(item) for item in items]

    def run(item: T) -> R:
        return _inside(lambda: work(item))

    futures: list[Future[R]] = [_pool().submit(run, item) for item in items]
    errors = [
        future.exception() for future in futures
    ]  # waits for all, so that nothing runs on after an error
    for error in errors:
        if error is not None:
            raise error
    return [future.result() for future in futures]
