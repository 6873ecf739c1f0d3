"""The bits do not depend on NumPy's vector units, on the BLAS, or on the number of threads."""

import os
import subprocess
import sys
from pathlib import Path

import battery
import pytest
from numpy._core import _multiarray_umath

PINNED = "26adb88c11d773c3c39a61100c092b69c9cb4e7eb4457215b5c32a0db77e5d08"
"""What battery.py prints, on every machine."""

BATTERY = Path(battery.__file__)
DISPATCHED = [
    name for name in _multiarray_umath.__cpu_dispatch__ if _multiarray_umath.__cpu_features__.get(name)
]


def printed(affinity: set[int] | None = None, **environment: str) -> str:
    """What a process of its own prints, under these variables and on these processors."""
    run = subprocess.run(
        [sys.executable, BATTERY],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
        preexec_fn=None if affinity is None else lambda: os.sched_setaffinity(0, affinity),
    )
    return run.stdout.strip()


def test_here() -> None:
    assert battery.digest() == PINNED


@pytest.mark.parametrize("threads", ["1", "2", "5"])
def test_threads_of_the_blas(threads: str) -> None:
    assert printed(OPENBLAS_NUM_THREADS=threads, OMP_NUM_THREADS=threads) == PINNED


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux")
def test_one_processor() -> None:
    """The pool of nf4.parallel then has one thread, and every chunk runs in sequence."""
    assert printed({min(os.sched_getaffinity(0))}) == PINNED


@pytest.mark.skipif(not DISPATCHED, reason="NumPy has no code here for more than its baseline")
def test_without_vector_units() -> None:
    assert printed(NPY_DISABLE_CPU_FEATURES=" ".join(DISPATCHED)) == PINNED


@pytest.mark.parametrize("core", ["Nehalem", "Sandybridge", "Haswell"])
def test_another_blas_kernel(core: str) -> None:
    """OpenBLAS without and with fused multiply-add; another BLAS does not know the variable."""
    assert printed(OPENBLAS_CORETYPE=core) == PINNED
