"""The GPUs of a run's ranks: one each, and NCCL between them, which moves arrays from one to another."""

import warnings
from collections.abc import Sequence
from typing import Any

import cupy
import numpy as np
from cupy.cuda import runtime
from nf4.errors import InputError
from nf4.ranks import Ranks


def take_device(ranks: Ranks) -> None:
    """Make this rank's GPU the current device: as many of a host's as it has ranks, or the one it was given.

    Raises InputError, on every rank, where two ranks would share one.
    """
    if ranks.size == 1:
        return
    count = runtime.getDeviceCount()
    device = ranks.local if ranks.local < count else 0
    runtime.setDevice(device)
    owners: dict[tuple[str, str], int] = {}
    for rank, place in enumerate(ranks.gather((ranks.host, runtime.deviceGetPCIBusId(device)))):
        other = owners.setdefault(place, rank)
        if other != rank:
            raise InputError(
                f"--device cuda: ranks {other} and {rank} on {place[0]} would share the GPU {place[1]}; "
                "start as many ranks a host as it has GPUs, and no more (mpirun -n; srun --gpus-per-task=1)"
            )


class Nccl:
    """NCCL's communicator of a run's ranks. Its calls go to CuPy's current stream, and wait for nothing."""

    def __init__(self, ranks: Ranks) -> None:
        """Raises InputError, on every rank, where one finds no NCCL."""
        nccl: Any = ranks.each(_nccl)
        unique = ranks.spread(nccl.get_unique_id() if ranks.rank == 0 else None)
        self._nccl, self._comm = nccl, nccl.NcclCommunicator(ranks.size, unique, ranks.rank)

    def exchange(
        self, sends: Sequence[tuple[int, cupy.ndarray]], receives: Sequence[tuple[int, cupy.ndarray]]
    ) -> None:
        """Send contiguous float32 arrays to other ranks, and fill arrays by theirs, each (rank, array)."""
        stream, kind = cupy.cuda.get_current_stream().ptr, self._nccl.NCCL_FLOAT32
        self._nccl.groupStart()
        for rank, array in sends:
            self._comm.send(array.data.ptr, array.size, kind, rank, stream)
        for rank, array in receives:
            self._comm.recv(array.data.ptr, array.size, kind, rank, stream)
        self._nccl.groupEnd()

    def sum(self, address: int, count: int, dtype: np.dtype[Any], stream: int) -> None:
        """Replace float32 or float64 on all GPUs by their sum, the same bits on all."""
        kind = self._nccl.NCCL_FLOAT32 if dtype == np.float32 else self._nccl.NCCL_FLOAT64
        self._comm.allReduce(address, address, count, kind, self._nccl.NCCL_SUM, stream)


def _nccl() -> Any:
    """CuPy's module, which warns at length where the library is missing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from cupy.cuda import nccl
    if not nccl.available:
        cuda = str(runtime.runtimeGetVersion() // 1000)
        raise InputError(
            "--device cuda on several ranks: gradients go from GPU to GPU by NCCL, and CuPy doesn't find it: "
            f"pip install nvidia-nccl-cu{cuda}"
        )
    return nccl
