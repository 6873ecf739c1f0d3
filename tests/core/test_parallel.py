"""The thread pool: every piece once, errors passed on, nested calls sequential."""

import threading
import time

import pytest
from nf4 import parallel
from nf4.parallel import map_chunks, map_groups, worker_threads


@pytest.fixture
def two_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "worker_threads", lambda: 2)


def pieces(n: int, chunk: int) -> list[tuple[int, int]]:
    seen: list[tuple[int, int]] = []
    map_chunks(lambda start, stop: seen.append((start, stop)), n, chunk)
    return sorted(seen)


@pytest.mark.usefixtures("two_threads")
def test_every_piece_runs_once() -> None:
    assert pieces(10, 4) == [(0, 4), (4, 8), (8, 10)]
    assert pieces(3, 4) == [(0, 3)]
    assert pieces(0, 4) == []
    assert pieces(10_000, 1) == [(i, i + 1) for i in range(10_000)]


@pytest.mark.usefixtures("two_threads")
def test_both_threads_work() -> None:
    barrier = threading.Barrier(2)
    map_chunks(lambda start, stop: barrier.wait(timeout=10) and None, 2, 1)
    assert not barrier.broken


@pytest.mark.usefixtures("two_threads")
def test_an_error_is_raised_after_all_have_ended() -> None:
    done: list[int] = []

    def work(start: int, stop: int) -> None:
        if start == 0:
            raise ValueError("piece 0")
        time.sleep(0.001)
        done.append(start)

    with pytest.raises(ValueError, match="piece 0"):
        map_chunks(work, 20, 1)
    count = len(done)
    time.sleep(0.01)
    assert len(done) == count
    assert pieces(3, 1) == [(0, 1), (1, 2), (2, 3)]  # the pool is still good


@pytest.mark.usefixtures("two_threads")
def test_groups_keep_their_order_and_hold_chunks_sequential() -> None:
    def work(item: int) -> tuple[int, set[int]]:
        threads: set[int] = set()
        map_chunks(lambda start, stop: threads.add(threading.get_ident()), 8, 1)
        return item, threads

    results = map_groups(work, range(5))
    assert [item for item, _ in results] == list(range(5))
    assert all(len(threads) == 1 for _, threads in results)
    assert map_groups(work, []) == []


@pytest.mark.usefixtures("two_threads")
def test_a_group_that_fails_passes_its_error_on() -> None:
    def work(item: int) -> int:
        if item == 1:
            raise KeyError("group 1")
        return item

    with pytest.raises(KeyError, match="group 1"):
        map_groups(work, [0, 1, 2])


def test_there_is_a_thread() -> None:
    assert worker_threads() >= 1
