"""`nf4 finetune --exact`: one adapter whatever the threads, vector units, BLAS, batches and interruptions."""

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from nf4.errors import CheckFailed
from nf4.exact import ops
from nf4.train.finetune import FinetuneOptions, finetune
from nf4.train.log import read_log
from numpy._core import _multiarray_umath

Nf4 = Callable[..., Result]

RUN = ("--exact", "--rank", 8, "--dropout", 0.1, "--grad-accum", 2, "--eval-every", 0)
"""Of the bundled model and text, adapters on all layers."""
HUNDRED_STEPS = "7430d089b0719833f9047df86a25a6483c86be152b6600d430476bf82a02b694"
THREE_STEPS = "5437c5b46dfac9b1c716429a2b6955ccfeeff47c61a90aca81f6b90a7fedb5e4"
DISPATCHED = [
    name for name in _multiarray_umath.__cpu_dispatch__ if _multiarray_umath.__cpu_features__.get(name)
]


def adapter_of_a_run(out: Path, steps: int, *more: object, **environment: str) -> str:
    """The SHA-256 of adapter_model.safetensors after a run in a process of its own."""
    arguments = ["finetune", "--out", out, "--steps", steps, *RUN, *more]
    subprocess.run(
        [sys.executable, "-c", "from nf4.cli import main; main()", *map(str, arguments)],
        env={**os.environ, **environment},
        check=True,
        capture_output=True,
    )
    return hashlib.sha256((out / "adapter_model.safetensors").read_bytes()).hexdigest()


def test_a_hundred_steps_end_in_the_pinned_adapter(tmp_path: Path) -> None:
    assert adapter_of_a_run(tmp_path / "out", 100) == HUNDRED_STEPS


@pytest.mark.parametrize(
    ("more", "environment"),
    [
        (("--threads", 1), {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}),
        (("--threads", 2), {}),
        (("--threads", 5, "--checkpointing"), {"OPENBLAS_NUM_THREADS": "3", "OMP_NUM_THREADS": "3"}),
        (("--batch-size", 8, "--grad-accum", 1), {}),
        (("--batch-size", 1, "--grad-accum", 8), {}),
        ((), {"NPY_DISABLE_CPU_FEATURES": " ".join(DISPATCHED)}),
        ((), {"OPENBLAS_CORETYPE": "Nehalem"}),
        ((), {"OPENBLAS_CORETYPE": "Haswell"}),
    ],
    ids=[
        "one-thread",
        "two-threads",
        "checkpointing",
        "one-batch",
        "eight-batches",
        "no-vectors",
        "sse",
        "fma",
    ],
)
def test_nothing_else_can_be_seen(tmp_path: Path, more: Any, environment: dict[str, str]) -> None:
    assert adapter_of_a_run(tmp_path / "out", 3, *more, **environment) == THREE_STEPS


QUICK = ("--exact", "--steps", 4, "--seq-len", 24, "--batch-size", 2, "--eval-every", 2, "--dropout", 0.2)


def adapter(out: Path) -> bytes:
    return (out / "adapter_model.safetensors").read_bytes()


def test_a_run_resumes_on_other_threads(tmp_path: Path, model: Path, text: Path, nf4: Nf4) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert nf4("finetune", model, text, "--out", whole, *QUICK, "--threads", 1).exit_code == 0
    assert nf4("finetune", model, text, "--out", cut, *QUICK, "--steps", 2, "--threads", 2).exit_code == 0
    resumed = nf4("finetune", "--resume", "--out", cut, "--steps", 4, "--threads", 1, "--checkpointing")
    assert resumed.exit_code == 0, resumed.stderr
    assert adapter(cut) == adapter(whole)


def test_an_exact_run_is_not_resumed_as_another(tmp_path: Path, model: Path, text: Path, nf4: Nf4) -> None:
    out = tmp_path / "out"
    fast = [option for option in QUICK if option != "--exact"]
    assert nf4("finetune", model, text, "--out", out, *fast, "--steps", 2).exit_code == 0
    refused = nf4("finetune", "--resume", "--out", out, "--steps", 4, "--exact")
    assert refused.exit_code == 2
    assert "a run resumes only as it began: --exact was False, is now True" in refused.stderr


def test_it_learns_what_the_fast_mode_learns(tmp_path: Path, model: Path, text: Path) -> None:
    options = FinetuneOptions(
        str(model), str(text), str(tmp_path / "fast"), steps=6, seq_len=24, lr=1e-2, dropout=0.2, eval_every=3
    )
    fast = finetune(options)
    exact = finetune(replace(options, exact=True, out=str(tmp_path / "exact")))
    assert exact.eval_after < exact.eval_before - 0.01
    assert exact.eval_after == pytest.approx(fast.eval_after, rel=1e-5)
    logs = [read_log(tmp_path / name / "training_log.jsonl") for name in ("fast", "exact")]
    for one, other in zip(*logs, strict=True):
        assert one.keys() == other.keys()
        for name in ("loss", "grad_norm", "eval_loss"):
            assert one.get(name, 0) == pytest.approx(other.get(name, 0), rel=1e-4)


def test_what_is_not_finite_ends_the_run(
    tmp_path: Path, model: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    swiglu, calls = ops.swiglu, []

    def overflowing(*arrays: Any) -> Any:
        out = swiglu(*arrays)
        calls.append(0)
        if len(calls) > 60:  # in a step, after the held-out loss of the untrained model
            out[0, 0] = np.inf
        return out

    monkeypatch.setattr(ops, "swiglu", overflowing)
    options = FinetuneOptions(
        str(model), str(text), str(tmp_path / "out"), steps=20, seq_len=24, exact=True, threads=1,
        eval_every=0, eval_sequences=4,
    )  # fmt: skip
    with pytest.raises(CheckFailed, match=r"the loss is nan and the gradient norm nan; the last good"):
        finetune(options)


def test_a_gpu_that_is_not_there(tmp_path: Path, model: Path, text: Path, nf4: Nf4) -> None:
    out = tmp_path / "out"
    refused = nf4("finetune", model, text, "--out", out, *QUICK, "--device", "cuda")
    if refused.exit_code != 0:  # else there is one
        assert refused.exit_code == 2
        assert refused.stderr.splitlines()[-1].startswith("nf4: --device cuda: nf4_gpu needs ")
        assert not out.exists()
