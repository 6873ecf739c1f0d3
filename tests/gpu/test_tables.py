"""What the host prepares for the kernels, and what it refuses, without a GPU."""

import subprocess
import sys
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from nf4.codebooks import CODEBOOKS, Codebook
from nf4.errors import InputError
from nf4.nested import THRESHOLDS
from nf4_gpu.arrays import on_device
from nf4_gpu.codebooks import buckets, starts
from nf4_gpu.compile import cache_directory

SOURCES = Path(__file__).parents[2]
few = settings(deadline=None, max_examples=200)


def rank_by_bucket(s: np.float32, table: np.ndarray) -> int:
    row = table[int(np.floor(np.float64(s) * 16)) + 16]
    return int(row[1]) + int(s > row[:1].view(np.float32)[0])


@given(st.floats(-1, 1, width=32), st.booleans())
@few
def test_a_bucket_gives_the_rank(s: float, beside: bool) -> None:
    book = CODEBOOKS["nf4"]
    table = buckets(book)
    assert table is not None
    around = [np.float32(s)]
    if beside:
        t = book.thresholds[int(abs(s) * 14.99)]
        around = [t, np.nextafter(t, np.float32(1)), np.nextafter(t, np.float32(-1))]
    for x in around:
        assert rank_by_bucket(np.float32(x), table) == np.count_nonzero(x > book.thresholds)


def test_codebooks_without_buckets() -> None:
    assert {name for name, book in CODEBOOKS.items() if buckets(book) is None} == {"fp4", "fp4-e2m1"}
    crowded = np.linspace(-0.1, 0.1, 16, dtype=np.float32)
    assert buckets(Codebook("crowded", crowded)) is None
    outside = np.linspace(-1.5, 1.5, 16, dtype=np.float32)
    assert buckets(Codebook("outside", outside)) is None


@given(st.integers(0, 2**32 - 1), st.integers(0, 254), st.integers(-1, 1))
@few
def test_two_steps_from_its_start_lead_to_a_code(bits: int, threshold: int, step: int) -> None:
    table, padded = starts(), np.append(THRESHOLDS, np.full(3, np.inf, np.float32))
    at = int(THRESHOLDS[threshold : threshold + 1].view(np.uint32)[0]) + step
    for pattern in (bits, at):
        s = np.array([pattern], np.uint32).view(np.float32)[0]
        if np.isnan(s):
            continue
        code = int(table[pattern >> 19])
        if s > padded[code + 1]:
            code += 2
        if s > padded[code]:
            code += 1
        assert code == np.count_nonzero(s > THRESHOLDS)


def test_a_host_array_is_refused() -> None:
    with pytest.raises(InputError, match=r"x is a numpy.ndarray in host memory; .*cupy.asarray"):
        on_device(np.zeros(3), "x")
    with pytest.raises(InputError, match=r"x is a builtins.list in host memory"):
        on_device([1.0], "x")


def run(code: str, **environment: str) -> str:
    paths = {"PYTHONPATH": f"{SOURCES}/reference:{SOURCES}/gpu", "PATH": "", **environment}
    done = subprocess.run(
        [sys.executable, "-c", code], env=paths, capture_output=True, text=True, check=False
    )
    return done.stderr.strip().splitlines()[-1] if done.returncode else done.stdout.strip()


def test_without_cupy_one_sentence_says_how_to_install_it() -> None:
    hide = "import sys; sys.modules['cupy'] = None; import importlib.util as u; f = u.find_spec; "
    hide += "u.find_spec = lambda n, p=None: None if n == 'cupy' else f(n, p); import nf4_gpu"
    assert run(hide).startswith("ImportError: nf4_gpu needs CuPy: install it with  pip install '.[gpu]'")


def test_without_a_gpu_one_sentence_says_so() -> None:
    words = run("from nf4_gpu import quantize", CUDA_VISIBLE_DEVICES="")
    assert words.startswith("ImportError: nf4_gpu needs an NVIDIA GPU, and CUDA finds none")


def test_kernels_are_compiled_without_a_gpu() -> None:
    assert run("import nf4_gpu.compile as c; print(c.OLDEST)", CUDA_VISIBLE_DEVICES="") == "75"


def test_an_unknown_name() -> None:
    import nf4_gpu

    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        nf4_gpu.quantise  # noqa: B018


def test_the_cache_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NF4_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_directory() == Path("/somewhere/nf4/kernels")
    monkeypatch.setenv("NF4_CACHE", "/here")
    assert cache_directory() == Path("/here")
