"""The ranks of a run, processes that MPI started: what they tell each other, and how they end."""

import hashlib
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from nf4 import __version__, parallel
from nf4.errors import CheckFailed, InputError

T = TypeVar("T")
Tensors = dict[str, NDArray[Any]]

# How a launcher tells a process its rank and their number: Open MPI; MPICH, Intel MPI and Slurm's pmi2; srun.
_LAUNCHERS = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("PMI_RANK", "PMI_SIZE"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
)
_PATIENCE = 3.0  # seconds that a rank which ends waits for the others to end too
_MESSAGE = 1 << 30  # bytes a message; MPI counts with 32 bits
_HEAD, _BODY, _STOP = 1, 2, 3  # the tags of MpiRanks.collect


class Ranks:
    """The ranks of a run. This class is one process by itself; MpiRanks is one of several.

    All ranks call the same methods in the same order, and go on with the same results: what `first`, `each`
    and `agree` raise, they raise everywhere.
    """

    rank = 0
    size = 1
    local = 0
    """The place of this rank among those of its host."""
    host = ""

    def gather(self, value: T) -> list[T]:
        """Return the values of all ranks, by rank."""
        return [value]

    def spread(self, value: T) -> T:
        """Return the value of rank 0."""
        return value

    def spread_array(self, array: NDArray[Any]) -> None:
        """Overwrite a C-contiguous array with that of rank 0, of the same dtype and shape."""

    def exchange(
        self, sends: Sequence[tuple[int, NDArray[Any]]], receives: Sequence[tuple[int, NDArray[Any]]]
    ) -> None:
        """Send C-contiguous arrays to other ranks, and fill arrays by theirs, each (rank, array).

        Between two ranks the arrays are met in their order.
        """

    def collect(
        self,
        names: Sequence[str],
        weights: Mapping[str, int],
        work: Callable[[str], Tensors],
        consume: Callable[[Iterator[tuple[str, Tensors]]], None],
    ) -> None:
        """Call work on each name, on some rank; call consume on rank 0 with all (name, result), in any order.

        weights: what work costs, by name; names without one are rank 0's. Raises, on every rank, an
        InputError or CheckFailed of work or of consume.
        """
        consume((name, work(name)) for name in names)

    def end(self, message: str, code: int) -> None:
        """Print why this rank ends. Where the others don't end too, end them, with that exit code."""
        launch = launched()
        if launch is None or launch.rank == 0:  # the others, whom no MPI joined, would say the same
            _say(message)

    def describe(self) -> str:
        """Return who the ranks are, for one who reads a launcher's message on a process that was killed."""
        return "one process"

    # ---- made of those -----------------------------------------------------------------------------------

    def any(self, flag: bool) -> bool:
        """Whether it is true on some rank."""
        return any(self.gather(flag))

    def first(self, work: Callable[[], T]) -> T:
        """Call work on rank 0; return its result, or raise its InputError or CheckFailed, on every rank."""
        value, error = self.spread(_outcome(work) if self.rank == 0 else (None, None))
        if error is not None:
            raise error
        return value  # type: ignore[return-value]

    def each(self, work: Callable[[], T]) -> T:
        """Call work on every rank; return the own result, or raise one's InputError or CheckFailed on all."""
        value, error = _outcome(work)
        errors = self.gather((error, self.host))
        failed = [rank for rank, (found, _) in enumerate(errors) if found is not None]
        if failed:
            found, host = errors[failed[0]]
            assert found is not None
            texts = {str(one) for one, _ in errors}
            raise found if len(texts) == 1 else type(found)(f"rank {failed[0]} on {host}: {found}")
        return value  # type: ignore[return-value]

    def agree(self, facts: Mapping[str, Any]) -> None:
        """Raise InputError unless the facts are the same on all ranks, naming the first that differs."""
        for rank, (found, host) in enumerate(gathered := self.gather((dict(facts), self.host))):
            mine, there = gathered[0]
            if found != mine:
                different = [
                    f"{name} is {found.get(name)}, and {mine.get(name)} on rank 0"
                    for name in sorted(found.keys() | mine.keys())
                    if found.get(name) != mine.get(name)
                ]
                raise InputError(
                    f"rank {rank} on {host} is of another run than rank 0 on {there}: {'; '.join(different)}"
                )


ALONE = Ranks()


class MpiRanks(Ranks):
    """The ranks of an MPI communicator, all of one run."""

    def __init__(self, comm: Any) -> None:
        """comm: an mpi4py.MPI.Comm. The threads of this process become its share of the processors."""
        from mpi4py import MPI

        self._comm, self._mpi = comm.Dup(), MPI
        self._ends = comm.Dup()  # where ranks meet that end
        self.rank, self.size = comm.rank, comm.size
        self.host = MPI.Get_processor_name()
        here = comm.Split_type(MPI.COMM_TYPE_SHARED)
        self.local = here.rank
        masks = here.allgather(parallel.processors())
        parallel.limit_threads(_share(masks, here.rank))
        self._processors = len(set().union(*masks))

    def gather(self, value: T) -> list[T]:
        """Return the values of all ranks, by rank."""
        found: list[T] = self._comm.allgather(value)
        return found

    def spread(self, value: T) -> T:
        """Return the value of rank 0."""
        found: T = self._comm.bcast(value, root=0)
        return found

    def spread_array(self, array: NDArray[Any]) -> None:
        """Overwrite a C-contiguous array with that of rank 0, of the same dtype and shape."""
        for part in _messages(array):
            self._comm.Bcast(part, root=0)

    def exchange(
        self, sends: Sequence[tuple[int, NDArray[Any]]], receives: Sequence[tuple[int, NDArray[Any]]]
    ) -> None:
        """Send C-contiguous arrays to other ranks, and fill arrays by theirs, each (rank, array)."""
        requests = [
            self._comm.Irecv(part, source=rank) for rank, array in receives for part in _messages(array)
        ]
        requests += [self._comm.Isend(part, dest=rank) for rank, array in sends for part in _messages(array)]
        self._mpi.Request.Waitall(requests)

    def collect(
        self,
        names: Sequence[str],
        weights: Mapping[str, int],
        work: Callable[[str], Tensors],
        consume: Callable[[Iterator[tuple[str, Tensors]]], None],
    ) -> None:
        """Call work on each name, on some rank, and consume on rank 0 with each (name, its result)."""
        mine = deal(names, weights, self.size)[self.rank]
        if self.rank:
            self._contribute(mine, work)
            self.first(lambda: None)
        else:
            self.first(lambda: self._collect(mine, work, consume))

    def _collect(
        self,
        mine: Sequence[str],
        work: Callable[[str], Tensors],
        consume: Callable[[Iterator[tuple[str, Tensors]]], None],
    ) -> None:
        working = set(range(1, self.size))

        def results() -> Iterator[tuple[str, Tensors]]:
            for name in mine:
                while working and self._comm.iprobe(source=self._mpi.ANY_SOURCE, tag=_HEAD):
                    yield from self._receive(working)
                yield name, work(name)
            while working:
                yield from self._receive(working)

        try:
            consume(results())
        finally:
            for rank in range(1, self.size):  # where there was an error, they may stop before they are done
                self._comm.send(None, dest=rank, tag=_STOP)
            while working:
                with suppress(InputError, CheckFailed):
                    for _ in self._receive(working):
                        pass

    def _receive(self, working: set[int]) -> Iterator[tuple[str, Tensors]]:
        """Yield the next result of another rank, unless it is done. Raises the error it ended with."""
        status = self._mpi.Status()
        name, error, layout = self._comm.recv(source=self._mpi.ANY_SOURCE, tag=_HEAD, status=status)
        if name is None:
            working.discard(status.source)
            if error is not None:
                raise error
            return
        tensors = {}
        for key, dtype, shape in layout:
            tensors[key] = array = np.empty(shape, dtype)
            for part in _messages(array):
                self._comm.Recv(part, source=status.source, tag=_BODY)
        yield name, tensors

    def _contribute(self, mine: Iterable[str], work: Callable[[str], Tensors]) -> None:
        """Send rank 0 the results of this rank, one on its way while the next is worked on."""
        requests: list[Any] = []
        error = None
        try:
            for name in mine:
                if self._comm.iprobe(source=0, tag=_STOP):
                    break
                tensors = {key: np.ascontiguousarray(array) for key, array in work(name).items()}
                self._mpi.Request.waitall(requests)
                layout = [(key, array.dtype, array.shape) for key, array in tensors.items()]
                requests = [self._comm.isend((name, None, layout), dest=0, tag=_HEAD)]
                for array in tensors.values():
                    requests += [self._comm.Isend(part, dest=0, tag=_BODY) for part in _messages(array)]
        except (InputError, CheckFailed) as failed:
            error = type(failed)(f"rank {self.rank} on {self.host}: {failed}")
        self._mpi.Request.waitall(requests)
        self._comm.send((None, error, None), dest=0, tag=_HEAD)
        self._comm.recv(source=0, tag=_STOP)

    def end(self, message: str, code: int) -> None:
        """Print why this rank ends. Where the others don't end too, end them, with that exit code."""
        met, until = self._ends.Ibarrier(), time.monotonic() + _PATIENCE
        while not met.Test():
            if time.monotonic() > until:
                _say(f"rank {self.rank} on {self.host}: {message}")
                self._ends.Abort(code)
            time.sleep(0.01)
        messages = self._ends.allgather((message, self.host))
        if self.rank == 0:
            for text in dict.fromkeys(text for text, _ in messages):
                rank, host = next((i, host) for i, (found, host) in enumerate(messages) if found == text)
                alike = all(found == text for found, _ in messages)
                _say(text if alike else f"rank {rank} on {host}: {text}")

    def describe(self) -> str:
        """Return who the ranks are, for one who reads a launcher's message on a process that was killed."""
        found = self.gather((self.host, os.getpid(), self._processors, os.cpu_count() or 1))
        who = ", ".join(f"{rank} is process {pid} on {host}" for rank, (host, pid, _, _) in enumerate(found))
        text = f"{self.size} ranks: {who}"
        for host, _, processors, there in found:
            if processors < there:
                text += (
                    f"\nthe ranks on {host} may run on {processors} of its {there} processors; "
                    "the launcher binds them (mpirun --bind-to, srun --cpus-per-task)"
                )
                break
        return text


@dataclass(frozen=True)
class Launch:
    """What a launcher told this process."""

    rank: int
    size: int
    variable: str


def launched() -> Launch | None:
    """Return what a launcher of several processes told this one, or None if it runs by itself."""
    for rank, size in _LAUNCHERS:
        if rank in os.environ and os.environ.get(size, "").isdecimal():
            count = int(os.environ[size])
            return Launch(int(os.environ[rank]), count, size) if count > 1 else None
    return None


@cache
def started() -> Ranks:
    """Return the ranks of this run: those that mpirun or srun started with this process, or it alone.

    Raises InputError, on every rank, where mpi4py is missing or doesn't belong to the launcher's MPI.
    """
    launch = launched()
    if launch is None:
        return ALONE
    start = f"{launch.size} processes were started together ({launch.variable})"
    try:
        from mpi4py import MPI
    except ModuleNotFoundError:
        raise InputError(f"{start}, and mpi4py is missing: pip install '.[mpi]' in nf4's checkout") from None
    except (ImportError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"{start}, and mpi4py finds no MPI library ({reason}): install the MPI of that launcher, or load "
            "its module, so that libmpi is in LD_LIBRARY_PATH; or name the library in MPI4PY_LIBMPI"
        ) from None
    if launch.size != MPI.COMM_WORLD.size:
        library = MPI.Get_library_version().partition("\n")[0].partition(",")[0].strip("\0 ")
        raise InputError(
            f"{start}, but mpi4py's library, {library}, sees {MPI.COMM_WORLD.size}: start them by the mpirun "
            "of that library, or by srun --mpi=pmix or --mpi=pmi2"
        )
    return MpiRanks(MPI.COMM_WORLD)


def joined() -> Ranks:
    """Return the ranks that started() found, if it was called."""
    return started() if started.cache_info().currsize else ALONE


def program(device: str = "cpu") -> dict[str, str]:
    """Return the version of this program, and a digest of its source: what the ranks must have in common."""
    total = hashlib.sha256()
    for package in ("nf4", "nf4_gpu") if device == "cuda" else ("nf4",):
        spec = find_spec(package)
        assert spec is not None
        assert spec.origin is not None
        folder = Path(spec.origin).parent
        for path in sorted(path for kind in ("py", "cu", "cuh") for path in folder.rglob(f"*.{kind}")):
            total.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return {"nf4": f"{__version__} ({total.hexdigest()[:12]})"}


def deal(names: Sequence[str], weights: Mapping[str, int], ranks: int) -> list[list[str]]:
    """Share names out so that the weights of a rank's are alike; names without one go to rank 0.

    Each rank keeps the order of names.
    """
    loads = [0] * ranks
    owner = dict.fromkeys(names, 0)
    for name in sorted((name for name in names if name in weights), key=lambda name: -weights[name]):
        owner[name] = rank = min(range(ranks), key=lambda rank: (loads[rank], -rank))
        loads[rank] += weights[name]
    return [[name for name in names if owner[name] == rank] for rank in range(ranks)]


def _say(message: str) -> None:
    print(f"nf4: {message}", file=sys.stderr, flush=True)


def _outcome(work: Callable[[], T]) -> tuple[T | None, InputError | CheckFailed | None]:
    """The result of work, or the error by which it refused; others are this rank's own."""
    try:
        return work(), None
    except (InputError, CheckFailed) as error:
        return None, error


def _messages(array: NDArray[Any]) -> Iterator[NDArray[np.uint8]]:
    """The bytes of an array, in parts that a message can hold."""
    flat = array.reshape(-1, copy=False).view(np.uint8)
    for start in range(0, flat.size, _MESSAGE):
        yield flat[start : start + _MESSAGE]


def _share(masks: Sequence[set[int]], rank: int) -> int:
    """The processors of a rank where each is shared by those that may use it; at least 1."""
    share = sum(Fraction(1, sum(processor in mask for mask in masks)) for processor in masks[rank])
    return max(1, int(share))
