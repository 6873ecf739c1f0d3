"""The launch of ranks: who started them, what they share out, and what they say when they are not joined."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nf4 import parallel, ranks
from nf4.errors import CheckFailed, InputError
from nf4.ranks import ALONE, Launch, deal, joined, launched

REFERENCE = Path(__file__).parents[2] / "reference"


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment of no launcher."""
    for rank, size in ranks._LAUNCHERS:
        monkeypatch.delenv(rank, raising=False)
        monkeypatch.delenv(size, raising=False)
    return monkeypatch


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, None),
        ({"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "4"}, Launch(2, 4, "OMPI_COMM_WORLD_SIZE")),
        ({"PMI_RANK": "0", "PMI_SIZE": "3"}, Launch(0, 3, "PMI_SIZE")),
        ({"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8"}, Launch(5, 8, "SLURM_STEP_NUM_TASKS")),
        ({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"}, None),
        # mpirun inside a job of Slurm's, and a batch script that srun didn't start
        (
            {"PMI_RANK": "1", "PMI_SIZE": "2", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"},
            Launch(1, 2, "PMI_SIZE"),
        ),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, None),
    ],
)
def test_launchers_are_known_by_their_variables(
    environment: pytest.MonkeyPatch, variables: dict[str, str], expected: Launch | None
) -> None:
    for name, value in variables.items():
        environment.setenv(name, value)
    assert launched() == expected


def test_one_process_is_alone(environment: pytest.MonkeyPatch) -> None:
    assert ranks.started() is ALONE
    assert joined() is ALONE
    assert ALONE.gather(3) == [3]
    assert ALONE.first(lambda: 4) == ALONE.each(lambda: 4) == 4
    ALONE.agree({"a": 1})
    for method in (ALONE.first, ALONE.each):
        for error in (InputError("no"), CheckFailed("no"), KeyError("no")):
            with pytest.raises(type(error), match="no"):
                method(lambda error=error: (_ for _ in ()).throw(error))  # type: ignore[misc]


@given(
    st.dictionaries(st.text("abcdef", min_size=1), st.integers(1, 1000), max_size=40),
    st.integers(0, 5),
    st.integers(1, 6),
)
def test_work_is_dealt_out_evenly(weights: dict[str, int], free: int, count: int) -> None:
    names = sorted(weights) + [f"free {i}" for i in range(free)]
    shares = deal(names, weights, count)
    assert sorted(name for share in shares for name in share) == sorted(names)
    assert len(shares) == count
    assert all(share == sorted(share, key=names.index) for share in shares)
    assert {f"free {i}" for i in range(free)} <= set(shares[0])
    loads = [sum(weights.get(name, 0) for name in share) for share in shares]
    assert max(loads) - min(loads) <= max(weights.values(), default=0)


@pytest.mark.parametrize(
    ("masks", "expected"),
    [
        ([{0, 1, 2, 3}, {0, 1, 2, 3}], [2, 2]),  # MPICH binds no process
        ([{0}, {1}], [1, 1]),  # Open MPI binds two to a core each
        ([{0, 1, 2}, {0, 1, 2}, {3, 4, 5}], [1, 1, 3]),
        ([{0, 1}] * 4, [1] * 4),
        ([{0, 1, 2}] * 3, [1] * 3),
    ],
)
def test_ranks_share_the_processors_that_they_may_use(masks: list[set[int]], expected: list[int]) -> None:
    assert [ranks._share(masks, rank) for rank in range(len(masks))] == expected


def test_threads_can_be_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "_limit", None)
    assert parallel.worker_threads() == len(parallel.processors())
    parallel.limit_threads(1)
    assert parallel.worker_threads() == 1
    parallel.limit_threads(1 << 20)
    assert parallel.worker_threads() == len(parallel.processors())


def nf4(*arguments: object, rank: int) -> subprocess.CompletedProcess[str]:
    """Run nf4 as one of two ranks where mpi4py is not installed."""
    program = "import sys; sys.modules['mpi4py'] = None; from nf4.cli import main; main()"
    environment = {name: value for name, value in os.environ.items() if "SLURM" not in name}
    for name, size in ranks._LAUNCHERS:
        environment.pop(name, None)
        environment.pop(size, None)
    environment |= {"PMI_RANK": str(rank), "PMI_SIZE": "2", "PYTHONPATH": str(REFERENCE)}
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_without_mpi4py_it_says_what_to_install(tmp_path: Path) -> None:
    first = nf4("finetune", "--out", tmp_path / "out", rank=0)
    assert first.returncode == 2
    assert first.stderr == (
        "nf4: 2 processes were started together (PMI_SIZE), and mpi4py is missing: "
        "pip install '.[mpi]' in nf4's checkout\n"
    )
    second = nf4("finetune", "--out", tmp_path / "out", rank=1)
    assert (second.returncode, second.stderr) == (2, "")
    assert not (tmp_path / "out").exists()


def test_a_command_for_one_process_refuses_to_be_several(tmp_path: Path) -> None:
    refused = nf4("inspect", tmp_path, rank=0)
    assert refused.returncode == 2
    assert (
        "2 processes were started together (PMI_SIZE), and nf4 inspect is the work of one" in refused.stderr
    )
    assert nf4("inspect", tmp_path, rank=1).stderr == ""
    usage = nf4("finetune", "--no-such-option", rank=1)
    assert (usage.returncode, usage.stderr) == (2, "")
    assert "no such option" in nf4("finetune", "--no-such-option", rank=0).stderr
