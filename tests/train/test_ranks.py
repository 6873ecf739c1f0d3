"""`mpirun -n N nf4 finetune`: the bits of one process, whatever the number of ranks, and one end for all."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from in_threads import on_threads
from launchers import MAIN, Mpi
from nf4.errors import CheckFailed, InputError
from nf4.ranks import Ranks
from nf4.train import snapshot
from nf4.train.adamw import AdamW
from nf4.train.finetune import FinetuneOptions, finetune
from nf4.train.log import read_log

Nf4 = Callable[..., Result]

RUN = (
    "--exact", "--steps", 6, "--seq-len", 24, "--batch-size", 2, "--grad-accum", 4, "--eval-every", 2,
    "--eval-sequences", 3, "--dropout", 0.2, "--lr", 1e-2, "--rank", 4,
)  # fmt: skip
CURVES = 1e-5
"""How far apart losses of the fast mode may be on different numbers of ranks, relatively: as README says."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, model: Path, text: Path) -> Path:
    """The directory of the run on one rank."""
    from click.testing import CliRunner
    from nf4.cli import main

    out = tmp_path_factory.mktemp("ranks") / "out"
    result = CliRunner().invoke(main, [str(a) for a in ("finetune", model, text, "--out", out, *RUN)])
    assert result.exit_code == 0, result.output
    return out


def contents(out: Path) -> dict[str, Any]:
    """All that a run leaves but its timings and picture."""
    files = {str(p.relative_to(out)): p for p in out.rglob("*") if p.is_file()}
    tensors = snapshot.SafetensorsFile(files.pop("checkpoint.safetensors"))
    log = read_log(files.pop("training_log.jsonl"))
    del files["loss.png"]
    return {
        **{name: path.read_bytes() for name, path in files.items()},
        "checkpoint": {name: tensors.read(name).tobytes() for name in tensors.entries},
        "log": [{k: v for k, v in record.items() if k != "seconds"} for record in log],
    }


# ---- the same bits -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [2, 3, 5, 8])
def test_ranks_that_are_threads(tmp_path: Path, model: Path, text: Path, whole: Path, ranks: int) -> None:
    options = FinetuneOptions(
        str(model), str(text), str(tmp_path / "out"), exact=True, steps=6, seq_len=24, batch_size=2,
        grad_accum=4, eval_every=2, eval_sequences=3, dropout=0.2, lr=1e-2, rank=4,
    )  # fmt: skip
    results = on_threads(ranks, lambda rank: finetune(options, ranks=rank))
    assert len({(r.eval_before, r.eval_after, r.best_loss, r.sample_after) for r in results}) == 1
    assert contents(tmp_path / "out") == contents(whole)


def test_ranks_of_mpi_and_a_resume_on_other_numbers(
    tmp_path: Path, model: Path, text: Path, whole: Path, mpi: Mpi, nf4: Nf4
) -> None:
    out = tmp_path / "out"
    begun = mpi.nf4(2, "finetune", model, text, "--out", out, *RUN, "--steps", 2)
    assert begun.returncode == 0, begun.stderr
    assert re.search(r"^2 ranks: 0 is process \d+ on \S+, 1 is process \d+ on ", begun.stderr)
    assert begun.stdout.count("held-out loss") == 1
    assert snapshot.read_facts(out / snapshot.NAME)[1].get("ranks") is None
    on = mpi.nf4(4, "finetune", "--resume", "--out", out, "--steps", 4)
    assert on.returncode == 0, on.stderr
    assert on.stderr.count("going on after step 2") == 1
    assert nf4("finetune", "--resume", "--out", out, "--steps", 6).exit_code == 0
    assert contents(out) == contents(whole)


def test_the_fast_mode_comes_near(tmp_path: Path, model: Path, text: Path, mpich: Mpi, nf4: Nf4) -> None:
    fast = [option for option in RUN if option != "--exact"]
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    assert nf4("finetune", model, text, "--out", alone, *fast, "--steps", 12).exit_code == 0
    begun = mpich.nf4(2, "finetune", model, text, "--out", shared, *fast, "--steps", 8)
    assert begun.returncode == 0, begun.stderr
    on = mpich.nf4(4, "finetune", "--resume", "--out", shared, "--steps", 12)
    assert on.returncode == 0, on.stderr
    assert (
        "begun on 2 ranks, continued on 4: without --exact its last bits depend on their number" in on.stderr
    )
    assert snapshot.read_facts(shared / snapshot.NAME)[1]["ranks"] == 4
    pairs = zip(read_log(alone / "training_log.jsonl"), read_log(shared / "training_log.jsonl"), strict=True)
    for one, other in pairs:
        assert one.keys() == other.keys()
        for name in ("loss", "eval_loss"):
            assert one.get(name, 1) == pytest.approx(other.get(name, 1), rel=CURVES)
        assert one.get("tokens") == other.get("tokens")


# ---- ranks that are not of one run -------------------------------------------------------------------------


@pytest.fixture
def options(tmp_path: Path, model: Path, text: Path) -> FinetuneOptions:
    return FinetuneOptions(
        str(model), str(text), str(tmp_path / "out"), steps=2, seq_len=24, eval_sequences=2
    )


def refusal(changed: Callable[[Ranks], FinetuneOptions]) -> str:
    """What every one of two ranks says, whose options differ."""
    said = []

    def run(ranks: Ranks) -> None:
        with pytest.raises(InputError) as error:
            finetune(changed(ranks), ranks=ranks)
        said.append(str(error.value))

    on_threads(2, run)
    assert said[0] == said[1]
    return said[0]


def test_other_options_are_refused(options: FinetuneOptions) -> None:
    assert refusal(lambda ranks: replace(options, seed=ranks.rank, lr=1e-3 * (1 + ranks.rank))) == (
        "rank 1 on host1 is of another run than rank 0 on host0: --lr is 0.002, and 0.001 on rank 0; "
        "--seed is 1, and 0 on rank 0"
    )
    assert not Path(options.out).exists()


def test_another_version_is_refused(options: FinetuneOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    versions = iter(["1 (a)", "2 (b)"])
    monkeypatch.setattr("nf4.train.finetune.program", lambda _: {"nf4": next(versions)})
    assert re.fullmatch(
        r"rank 1 .*: nf4 is [12] \([ab]\), and [12] \([ab]\) on rank 0", refusal(lambda _: options)
    )


def test_another_model_or_text_is_refused(
    tmp_path: Path, tiny_model: Callable[..., Path], options: FinetuneOptions, text: Path
) -> None:
    other = tiny_model(tmp_path / "other", seed=1)
    said = refusal(lambda ranks: replace(options, model=str(other) if ranks.rank else options.model))
    assert re.fullmatch(r"rank 1 on host1 is .*: model is [0-9a-f]{64}, and [0-9a-f]{64} on rank 0", said)
    changed = tmp_path / "other.txt"
    changed.write_text(text.read_text().replace("cat", "dog"))
    said = refusal(lambda ranks: replace(options, data=str(changed) if ranks.rank else options.data))
    assert re.fullmatch(r"rank 1 on host1 is .*: data is [0-9a-f]{64}, and [0-9a-f]{64} on rank 0", said)
    copy = tmp_path / "copy.txt"
    copy.write_text(text.read_text())  # the same text at another place is the same
    on_threads(
        2,
        lambda ranks: finetune(replace(options, data=str(copy) if ranks.rank else options.data), ranks=ranks),
    )


def test_what_only_one_rank_lacks_is_said_by_all(tmp_path: Path, options: FinetuneOptions) -> None:
    said = refusal(
        lambda ranks: replace(options, model=str(tmp_path / "no") if ranks.rank else options.model)
    )
    assert said.startswith(f"rank 1 on host1: {tmp_path}/no: there is no such model")
    said = refusal(lambda ranks: replace(options, model=str(tmp_path / "no")))
    assert said.startswith(f"{tmp_path}/no: there is no such model")
    said = refusal(lambda ranks: replace(options, batch_size=1))
    assert said.startswith("--batch-size 1 and --grad-accum 1: a step's 1 sequences are too few for 2 ranks")


def test_ranks_that_drift_apart_end_the_run(
    options: FinetuneOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = AdamW.step

    def faulty(optimizer: AdamW, *arguments: Any) -> None:
        step(optimizer, *arguments)
        if threading.current_thread().name == "rank 1":
            next(iter(optimizer.params.values())).reshape(-1).view(np.uint32)[0] ^= 1

    monkeypatch.setattr(AdamW, "step", faulty)
    with pytest.raises(CheckFailed, match=r"step 2: rank 1 on host1 holds other bits than rank 0 on host0"):
        on_threads(2, lambda ranks: finetune(options, ranks=ranks))
    assert snapshot.read_facts(Path(options.out) / snapshot.NAME)[0].step == 0


def test_mpirun_ends_with_one_sentence(tmp_path: Path, model: Path, text: Path, mpi: Mpi) -> None:
    program = """
import sys
from nf4.ranks import launched
sys.argv += ["--seed", str(launched().rank)]
from nf4.cli import main
main()
"""
    done = mpi.python(2, "-c", program, "finetune", model, text, "--out", tmp_path / "out", *RUN)
    assert done.returncode == 2
    said = [line for line in done.stderr.splitlines() if line.startswith("nf4: ")]
    assert len(said) == 1, done.stderr
    assert re.fullmatch(
        r"nf4: rank 1 on \S+ is of another run than rank 0 on \S+: --seed is 1, and 0 on rank 0", said[0]
    )
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


# ---- one end for all ---------------------------------------------------------------------------------------

LONG = (*RUN, "--steps", 3000, "--eval-every", 0, "--save-every", 2)


def running(mpi: Mpi, ranks: int, out: Path, *arguments: object) -> tuple["subprocess.Popen[str]", list[int]]:
    """Start a long run, wait until it has made some steps; the process of mpirun, and those of the ranks."""
    process = mpi.start(*mpi.command(ranks, sys.executable, "-c", MAIN, *arguments, "--out", out, *LONG))
    assert process.stderr is not None
    pids = [int(pid) for pid in re.findall(r"is process (\d+)", process.stderr.readline())]
    assert len(pids) == ranks
    log, until = out / "training_log.jsonl", time.monotonic() + 60
    while not log.exists() or len(read_log(log)) < 6:
        assert time.monotonic() < until
        assert process.poll() is None
        time.sleep(0.02)
    return process, pids


def check_whole(out: Path, nf4: Nf4, *arguments: object) -> None:
    """The checkpoint in out is, to the bit, that of a run of as many steps on one process."""
    file = snapshot.SafetensorsFile(out / snapshot.NAME)
    step = snapshot.read_facts(out / snapshot.NAME)[0].step
    assert step >= 4
    alone = out.parent / "alone"
    assert nf4(*arguments, "--out", alone, *LONG, "--steps", step).exit_code == 0
    other = snapshot.SafetensorsFile(alone / snapshot.NAME)
    assert file.entries.keys() == other.entries.keys()
    for name in file.entries:
        assert file.read(name).tobytes() == other.read(name).tobytes()


def test_a_killed_rank_takes_the_others_along(
    tmp_path: Path, model: Path, text: Path, mpi: Mpi, nf4: Nf4
) -> None:
    out = tmp_path / "out"
    process, pids = running(mpi, 4, out, "finetune", model, text)
    began = time.monotonic()
    os.kill(pids[2], signal.SIGKILL)
    _, said = process.communicate(timeout=20)
    assert process.returncode != 0
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() - began < 10
        time.sleep(0.02)
    if mpi.flavor == "Open MPI":  # MPICH's mpirun names the first process of a host, whichever was killed
        assert re.search(rf"rank 2 with PID {pids[2]} on node \S+ exited on\s+signal 9", said)
    check_whole(out, nf4, "finetune", model, text)


def test_an_interrupted_rank_lets_all_finish_the_step(
    tmp_path: Path, model: Path, text: Path, openmpi: Mpi, nf4: Nf4
) -> None:
    out = tmp_path / "out"
    process, pids = running(openmpi, 2, out, "finetune", model, text)
    os.kill(pids[1], signal.SIGINT)
    _, said = process.communicate(timeout=20)
    assert process.returncode == 130
    assert said.count("go on with: nf4 finetune --resume") == 1
    step = snapshot.read_facts(out / snapshot.NAME)[0].step
    assert f"nf4: interrupted after step {step} of 3000" in said
    assert read_log(out / "training_log.jsonl")[-1]["step"] == step
    check_whole(out, nf4, "finetune", model, text)


BROKEN = """
from nf4 import ranks
from nf4.ranks import launched
from nf4.train.exact import ExactEngine
work, calls = ExactEngine._losses_and_sum, []
def broken(*arguments):
    calls.append(0)
    if launched().rank == 1 and len(calls) == 5:
        raise {error}
    return work(*arguments)
ExactEngine._losses_and_sum = broken
ranks._PATIENCE = 0.5
from nf4.cli import main
main()
"""


@pytest.mark.parametrize(
    ("error", "said"),
    [
        ("MemoryError('3 GiB')", r"^nf4: rank 1 on \S+: out of memory \(3 GiB\)$"),
        ("KeyError('bug')", r"^nf4: rank 1 on \S+: Traceback \(most recent call last\):$"),
    ],
)
def test_a_rank_that_fails_alone_ends_all(
    tmp_path: Path, model: Path, text: Path, mpich: Mpi, nf4: Nf4, error: str, said: str
) -> None:
    out = tmp_path / "out"
    program = BROKEN.replace("{error}", error)
    began = time.monotonic()
    done = mpich.python(2, "-c", program, "finetune", model, text, "--out", out, *LONG)
    assert time.monotonic() - began < 60
    assert done.returncode == 1
    assert len(re.findall(said, done.stderr, re.MULTILINE)) == 1, done.stderr
    assert done.stderr.count("nf4: ") == 1
    check_whole(out, nf4, "finetune", model, text)


FULL_DISK = """
import resource, signal, sys
from nf4.ranks import started
limit = int(sys.argv.pop(1))
if started().rank == 0:  # from here on: MPI has files of its own
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    sys.dont_write_bytecode = True  # it would be cut off, and stay
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
from nf4.cli import main
main()
"""


def test_a_full_disk_of_rank_0_ends_all(
    tmp_path: Path, model: Path, text: Path, mpich: Mpi, nf4: Nf4
) -> None:
    out = tmp_path / "out"
    assert nf4("finetune", model, text, "--out", out, *LONG, "--steps", 4).exit_code == 0
    before = (out / snapshot.NAME).read_bytes()
    limit = len(before) // 2
    done = mpich.python(2, "-c", FULL_DISK, limit, "finetune", "--resume", "--out", out, "--steps", 8)
    assert done.returncode == 1, done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("nf4: ")]
    assert len(said) == 1, done.stderr
    assert re.search(
        r"checkpoint\.safetensors: can't be written .* step 4 is whole: --resume from it$", said[0]
    )
    assert (out / snapshot.NAME).read_bytes() == before
    assert not list(out.rglob("*.tmp"))
