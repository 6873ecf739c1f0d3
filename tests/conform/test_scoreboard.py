"""The board of libraries, on made-up ones: right, wrong, dying, hanging, noisy and absent."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from nf4.cli import main
from nf4.conform import scoreboard
from nf4.conform.libraries import LIBRARIES, Library, versions
from nf4.conform.scoreboard import Entry, by_clause, looks_like, verdict
from nf4.conform.values import to_hex
from nf4.conform.vectors import Vector
from nf4.tensor import quantize
from numpy.typing import NDArray

Make = Callable[..., Entry]

LIBRARY = """
import os, sys, time
import numpy as np
import nf4
from nf4.conform.libraries.__main__ import serve
from nf4.conform.python_port import PythonPort

class Fake:
    def quantize(self, x, block_size, codebook):
        if codebook != "nf4":
            raise NotImplementedError("nf4 alone")
        {before}
        q = nf4.quantize(x, block_size=block_size, codebook=codebook)
        codes, absmax = q.codes, q.absmax
        {after}
        return codes, absmax

serve(PythonPort(Fake(), "fake"), "fake 1.0")
"""


def vector(id: str, x: NDArray[np.float32], codebook: str = "nf4") -> Vector:
    given = {"x": to_hex(x), "shape": [x.size], "dtype": "float32", "block_size": 64, "codebook": codebook}
    if not np.isfinite(x).all():
        return Vector(id, "quantize", ("NF4-12.1",), (), "A test.", given, refused="not finite")
    q = quantize(x, 64, codebook)
    assert isinstance(q.absmax, np.ndarray)
    output = {"codes": to_hex(q.codes), "absmax": to_hex(q.absmax)}
    return Vector(id, "quantize", ("NF4-3.2", "NF4-5.1"), (), "A test.", given, output)


NORMAL = np.random.default_rng(0).standard_normal(64).astype(np.float32)
VECTORS = [
    vector("normal", NORMAL),
    vector("zeros", np.zeros(64, np.float32)),
    vector("four", np.ones(4, np.float32)),
    vector("nan", np.full(64, np.nan, np.float32)),
    vector("fp4", NORMAL, "fp4"),
]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def entry(name: str, before: str = "", after: str = "") -> Entry:
        script = tmp_path / f"{name}.py"
        script.write_text(LIBRARY.format(before=before or "pass", after=after or "pass"))
        return Entry(name, name.title(), {name: "1.0"}, f"pip install {name}", (sys.executable, str(script)))

    return entry


def verdicts(score: scoreboard.Score) -> list[str]:
    assert score.run is not None
    return [verdict(result) for result in score.run.results]


def messages(score: scoreboard.Score) -> str:
    assert score.run is not None
    return "\n".join([score.run.broken or "", *(result.message for result in score.run.results)])


def test_every_library_has_its_turn_whatever_the_others_do(make: Make) -> None:
    libraries = [
        make("dying", before="if x.size == 4: os.abort()"),
        make("hanging", before="if x.size == 4: time.sleep(60)"),
        Entry("absent", "Absent", None, "pip install absent", ("/nowhere",)),
        Entry(
            "unable", "Unable", {"unable": "1.0"}, "", (sys.executable, "-c", "raise ImportError('no lib')")
        ),
        make("noisy", before="os.write(1, b'hello')"),
        make("right"),
    ]
    turns: list[str] = []
    scores = scoreboard.run(libraries, VECTORS, timeout=3, progress=turns.append)
    dying, hanging, absent, unable, noisy, right = scores
    assert turns == ["Dying", "Hanging", "Unable", "Noisy", "Right"]
    assert verdicts(dying) == ["conforms", "conforms", "no answer", "conforms", "not offered"]
    assert verdicts(hanging) == verdicts(dying)
    assert "SIGABRT" in messages(dying)
    assert "within 3 s" in messages(hanging)
    assert absent.run is None
    assert "no lib" in messages(unable)
    assert verdicts(noisy) == verdicts(right) == ["conforms"] * 4 + ["not offered"]
    assert by_clause(right)["NF4-3.2"] == {"conforms": 3, "not offered": 1}
    text = scoreboard.markdown(scores)
    assert "Not installed: Absent (`pip install absent`)." in text
    assert "| NF4-3.2 Absmax | 1/3 no answer | 1/3 no answer | conforms (3) | conforms (3) |" in text
    assert [item["installed"] for item in scoreboard.as_json(scores)["libraries"]] == [True, True, False] + [
        True
    ] * 3


def test_a_wrong_library_is_named_by_its_bug(make: Make) -> None:
    libraries = [
        make("swapped", after="codes = codes << 4 | codes >> 4"),
        make("choosy", before="if x.size % 64: raise ValueError('whole blocks')"),
        make("careless", before="x = np.nan_to_num(x)"),
    ]
    swapped, choosy, careless = scoreboard.run(libraries, VECTORS, timeout=20)
    assert verdicts(swapped)[0] == "differs"
    assert looks_like(swapped) == {"NibbleOrder": 1}
    assert verdicts(choosy)[2] == "refused"
    assert verdicts(careless)[3] == "accepted"
    text = scoreboard.markdown([swapped, choosy, careless])
    assert "NibbleOrder (1)" in text
    assert "| NF4-5.1 Bytes | 1/3 differs: NibbleOrder | 1/3 refused | conforms (3) |" in text
    assert "| conforms (1) | conforms (1) | 1/1 accepted |" in text


def test_versions_of_what_is_there_and_none_of_what_is_not() -> None:
    assert versions(Library("NumPy", ("numpy",))) == {"numpy": np.__version__}
    assert versions(Library("Nothing", ("numpy", "there-is-no-such-distribution"))) is None


def test_every_adapter_has_its_module() -> None:
    directory = Path(scoreboard.__file__).parent / "libraries"
    for name in LIBRARIES:
        assert (directory / f"{name}.py").exists(), name


def test_the_command_prints_the_board(make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(scoreboard, "entries", lambda: [make("right")])
    run = CliRunner().invoke(main, ["conform", "--scoreboard", "--only", "quantize", "--json"])
    assert run.exit_code == 0, run.output
    assert json.loads(run.stdout)["libraries"][0]["name"] == "right"
    monkeypatch.setattr(scoreboard, "entries", lambda: [replace(make("right"), versions=None)])
    empty = CliRunner().invoke(main, ["conform", "--scoreboard"])
    assert empty.exit_code == 2, "nothing was run"
    assert "none of the libraries that it knows is installed (" in empty.stderr
    refused = CliRunner().invoke(main, ["conform", "--scoreboard", "--", "my-port"])
    assert refused.exit_code == 2
    assert "name no port" in refused.stderr


def test_what_histories_of_a_layer_show_stands_under_the_board(tmp_path: Path, make: Make) -> None:
    script = tmp_path / "layered.py"
    found = {"defects": [{"library": "L", "title": "wrong", "steps": ["make", "call"], "detail": "2, not 1"}]}
    answer = json.dumps(found | {"limits": ["No such processor."]})
    script.write_text(
        f"import sys\nif sys.argv[1:] == ['layers']:\n    print({answer!r})\n    sys.exit()\n"
        + LIBRARY.format(before="pass", after="pass")
    )
    entry = Entry("l", "L", {"l": "1.0"}, "pip install l", (sys.executable, str(script)), layers=True)
    (score,) = scoreboard.run([entry], VECTORS)
    board = scoreboard.markdown([score])
    assert "| what histories of calls of L's layer show | the shortest found |" in board
    assert "| wrong | make; call; 2, not 1 |" in board
    assert "No such processor." in board
    assert scoreboard.as_json([score])["libraries"][0]["defects"] == found["defects"]


def test_a_search_of_a_layer_that_fails_is_told(make: Make) -> None:
    broken = make("broken")
    entry = Entry(*(getattr(broken, f) for f in ("name", "title", "versions", "install")), ("false",), True)
    assert scoreboard._histories(entry)[1][0].startswith("Broken: the search of its layer failed")
