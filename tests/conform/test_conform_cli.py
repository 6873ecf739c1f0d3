"""`nf4 conform`: what it runs, what it prints of what failed, its exit codes, its JSON and its page."""

import json
import os
import shlex
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from nf4.cli import main
from nf4.conform.bugs import BUGS
from nf4.conform.python_port import PythonPort
from nf4.conform.report import failures, groups
from nf4.conform.run import Result as Outcome
from nf4.conform.run import Run, execute
from nf4.conform.vectors import Vector, canonical, canonical_flags, load

REFERENCE = ("--python", "nf4.conform.reference", "--no-search")

SERVER = """
import json, sys
from {module} import {target} as target
from nf4.conform.python_port import PythonPort
port = PythonPort(target, "served")
for line in sys.stdin:
    m = json.loads(line)
    if m["cmd"] == "start":
        answer = {{"version": 1, "name": port.name, "operations": sorted(port.operations)}}
    elif m["cmd"] == "run":
        a = port.run(m["id"], m["operation"], m["input"])
        answer = {{"id": m["id"], a.kind: a.output if a.kind == "output" else a.message}}
    else:
        break
    print(json.dumps(answer), flush=True)
"""

BAD = """
import numpy as np
from nf4.codebooks import CODEBOOKS
from nf4.conform import reference

class TieUp:
    '''A value on a threshold goes up.'''
    def quantize(self, x, block_size, codebook):
        exact = reference.quantize(x=x, block_size=block_size, codebook=codebook)
        if codebook != "nf4" or x.size > block_size or exact["absmax"].tolist() != [1]:
            return exact["codes"], exact["absmax"]
        s = x.astype(np.float32).reshape(-1)
        codes = np.append(np.searchsorted(CODEBOOKS["nf4"].thresholds, s, side="right"), 7)
        codes = codes[: 2 * exact["codes"].size].astype(np.uint8)
        return codes[::2] << 4 | codes[1::2], exact["absmax"]

    def storage(self, elements, block_size, double_quant):
        raise NotImplementedError("no storage")

    def widen(self, x, dtype):
        return np.zeros(3, np.float64)

class NoNesting:
    def decode_absmax(self, absmax_codes, nested_absmax, offset, map):
        first = np.zeros(absmax_codes.size, int)
        absmax = map[absmax_codes] * nested_absmax[first] + offset
        if not np.isfinite(absmax).all():
            raise ValueError("not finite")
        return absmax

class Skips:
    def storage(self, **given):
        raise NotImplementedError("later")
"""


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory to run in, with badports.py and server.py (a program that serves the reference)."""
    (tmp_path / "badports.py").write_text(BAD)
    (tmp_path / "server.py").write_text(SERVER.format(module="nf4.conform", target="reference"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.delitem(sys.modules, "badports", raising=False)
    return tmp_path


def conform(*arguments: object, exit_code: int = 0) -> Result:
    result = CliRunner().invoke(main, ["conform", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == exit_code, result.output
    return result


def run_json(*arguments: object, exit_code: int = 0) -> dict[str, Any]:
    answer = json.loads(conform("--json", *arguments, exit_code=exit_code).stdout)
    assert isinstance(answer, dict)
    return answer


def test_the_reference_conforms_in_ten_seconds(modules: Path) -> None:
    for port in (REFERENCE, ("--", sys.executable, "server.py")):
        begun = time.monotonic()
        answer = run_json(*port)
        assert time.monotonic() - begun < 10
        assert (answer["conforms"], answer["exit_code"], answer["broken"]) == (True, 0, None)
        assert answer["counts"] == {"passed": len(load()), "failed": 0, "errored": 0, "skipped": 0}
        assert answer["operations"]["not_offered"] == []


def test_list_and_only() -> None:
    every = conform("--list").stdout.splitlines()
    assert len(every) == len(load())
    for glob in ("quantize", "NF4-3.*", "TieRule", "nf4-thresholds"):
        some = conform("--list", "--only", glob).stdout.splitlines()
        assert 0 < len(some) < len(every)
        assert set(some) < set(every)
    both = conform("--list", "--only", "storage", "--only", "widen").stdout.splitlines()
    assert {line.split()[1] for line in both} == {"storage", "widen"}
    rows = json.loads(conform("--list", "--json", "--only", "nf4-thresholds").stdout)["vectors"]
    assert [(row["id"], row["operation"]) for row in rows] == [("nf4-thresholds", "quantize")]
    assert "--only Nibble: matches no id" in conform("--list", "--only", "Nibble", exit_code=2).stderr
    error = conform(*REFERENCE, "--only", "storage", "--only", "nothing*", exit_code=2).stderr
    assert "--only nothing*: matches no id, clause, flag or operation" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "runs one port"),
        (("--python", "nf4.conform.reference", "--", "true"), "runs one port"),
        (("--vectors", "nowhere", *REFERENCE), "nowhere"),
        (("--known-failures", "nowhere", *REFERENCE), "nowhere: can't be read (No such file or directory)"),
        (("--report", "nowhere/page.html", "--only", "storage", *REFERENCE), "can't be written"),
    ],
)
@pytest.mark.usefixtures("modules")
def test_bad_usage(arguments: tuple[str, ...], message: str) -> None:
    assert message in conform(*arguments, exit_code=2).stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--", "./no-such-port"), "broken harness: ./no-such-port: can't be started"),
        (("--", sys.executable, "-c", "print('hi')"), "at start, it wrote a line"),
        (("--python", "badports:Nobody"), "has no attribute 'Nobody'"),
        (("--python", "badports:Skips"), "nothing was run: "),
        (
            ("--python", "badports:TieUp", "--only", "uniform"),
            "nothing was run: the port does not offer uniform",
        ),
    ],
)
@pytest.mark.usefixtures("modules")
def test_a_broken_harness(arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:
    assert message in conform(*arguments, exit_code=2).stdout
    page = tmp_path / "page.html"
    answer = run_json("--report", page, *arguments, exit_code=2)
    assert message.removeprefix("broken harness: ") in answer["broken"]
    assert (answer["conforms"], answer["exit_code"]) == (False, 2)
    assert [row for row in answer["results"] if row["outcome"] != "skipped"] == []
    assert "broken harness" in page.read_text()


@pytest.mark.usefixtures("modules")
def test_a_failure_says_everything_and_runs_again() -> None:
    text = conform(
        "--python", "badports:TieUp", "--no-search", "--only", "nf4-thresholds", exit_code=1
    ).stdout
    words = " ".join(text.split())
    for said in (
        "vector nf4-thresholds",
        "FAILED NF4-3.5, 1 vector: looks like TieRule",
        "clause NF4-3.5 Code: The rank of s is the number of thresholds strictly below s;",
        "NF4-2.2 Order and thresholds: The different values v(0) < v(1)",
        "NF4-3.5 Code: The rank of s is the number of thresholds strictly below s;",
        "flags NearestSearch, ThresholdUlp, TieRule",
        "about Every threshold of nf4 one ulp below, at and one ulp above",
        "]: bf591cd9 (-0.84809643), -> bf591cd8 (-0.8480964) <-, bf591cd7 (-0.8480963),",
        "dtype float32, block_size 64, codebook nf4",
        "differs byte 0 of codes differs, in the code of element 1; 15 of ",
        "expected 00 (0, 0) got 01 (0, 1)",
        "on the way reciprocal[0] = 3f800000 (1.0), s[1] = bf591cd8 (-0.8480964), ranks[1] = 00 (0); a port",
        "looks like TieRule",
        "rerun nf4 conform --only nf4-thresholds --python badports:TieUp",
        "badports:TieUp: does not conform: 1 failed",
    ):
        assert said in words, text
    (line,) = [line.strip() for line in text.splitlines() if "rerun" in line]
    again = conform(*shlex.split(line.removeprefix("rerun"))[2:], exit_code=1).stdout
    assert again.split("NF4-2.2 │")[0] == text.split("NF4-2.2 │")[0]


def test_the_line_to_run_again_is_quoted(modules: Path) -> None:
    (modules / "my port.py").write_text(
        SERVER.format(module="badports", target="TieUp").replace("target, ", "target(), ")
    )
    command = [sys.executable, "my port.py", "$x 'y'"]
    environment = os.environ | {"PYTHONPATH": str(modules)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", environment["PYTHONPATH"])
        answer = run_json("--only", "nf4-thresholds", "--", *command, exit_code=1)
        (result,) = answer["results"]
        assert shlex.split(result["rerun"]) == ["nf4", "conform", "--only", "nf4-thresholds", "--", *command]
        assert run_json(*shlex.split(result["rerun"])[2:], exit_code=1)["results"] == answer["results"]


@pytest.mark.usefixtures("modules")
def test_the_summary() -> None:
    text = conform("--python", "badports:TieUp", "--no-search", exit_code=1).stdout
    words = " ".join(text.split())
    assert "no storage" in words
    assert "skipped 1" in words or "skipped 2" in words
    assert "not offered (" in words
    assert "NF4-11.1" not in text.split("not offered (")[0]  # no vector of it was asked
    assert "dequantize" in words[words.index("not offered (") :]
    assert "ERRORED" in text
    assert "y is of dtype float64; it must be float32" in words
    assert "no clause is to blame" in text


@pytest.mark.usefixtures("modules")
def test_known_failures(tmp_path: Path) -> None:
    arguments = ("--python", "badports:TieUp", "--no-search", "--only", "quantize")
    failing = [
        row["id"] for row in run_json(*arguments, exit_code=1)["results"] if row["outcome"] == "failed"
    ]
    passing = next(v.id for v in load() if v.operation == "quantize" and v.id not in failing)
    known = tmp_path / "known.txt"

    known.write_text("# ties\n\n" + "".join(f"{id}  # later\n" for id in failing))
    answer = run_json("--known-failures", known, *arguments)
    assert answer["conforms"]
    assert answer["counts"]["failed"] == len(failing)
    assert [row["id"] for row in answer["results"] if row["known"]] == failing
    assert "known)" in conform("--known-failures", known, *arguments).stdout

    known.write_text(known.read_text() + f"{passing}\n")
    result = conform("--known-failures", known, *arguments, exit_code=1)
    assert f"STALE  known failure {passing} passes; remove it from the list" in result.stdout
    assert run_json("--known-failures", known, *arguments, exit_code=1)["stale"] != []

    known.write_text("*\n")
    assert "known failure * passes for" in conform("--known-failures", known, *arguments, exit_code=1).stdout
    known.write_text("\nno-such-*\n")
    error = conform("--known-failures", known, *arguments, exit_code=2).stderr
    assert f"{known}, line 2: no-such-* matches no vector" in error


@pytest.mark.usefixtures("modules")
def test_the_json_keeps_its_shape() -> None:
    answer = run_json("--python", "badports:TieUp", "--no-search", exit_code=1)
    assert list(answer) == [
        "specification",
        "kit",
        "port",
        "command",
        "conforms",
        "exit_code",
        "broken",
        "seconds",
        "claim",
        "counts",
        "clauses",
        "operations",
        "remarks",
        "stale",
        "defects",
        "groups",
        "results",
        "search",
    ]
    assert answer["command"] == ["--python", "badports:TieUp"]
    row = next(row for row in answer["results"] if row["id"] == "nf4-thresholds")
    assert list(row) == [
        "id",
        "operation",
        "clauses",
        "flags",
        "outcome",
        "message",
        "known",
        "looks_like",
        "rerun",
        "difference",
    ]
    assert {"kind", "what", "field", "index", "expected", "got", "step", "steps"} <= set(row["difference"])
    assert row["difference"]["field"] == "codes"
    assert sum(answer["counts"].values()) == len(load()) == len(answer["results"])
    assert answer["clauses"]["NF4-3.5"]["failed"] > 0
    assert answer["search"] == {"seed": 0, "seconds": 0.0, "operations": [], "found": []}


class Page(HTMLParser):
    """What a page refers to, whether its tags match, and how many are folded."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.references: list[str] = []
        self.open: list[str] = []
        self.folded = 0
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.references += [name for name, _ in attrs if name in {"src", "href"}] + [tag] * (tag == "script")
        self.folded += tag == "details" and ("open", None) not in attrs
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.usefixtures("modules")
def test_the_page_stands_alone(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    conform("--python", "badports:TieUp", "--no-search", "--report", path, exit_code=1)
    text = path.read_text("utf-8")
    page = Page(text)
    assert (page.references, page.open) == ([], [])
    assert "@import" not in text
    assert "url(" not in text
    assert "prefers-color-scheme: dark" in text
    assert page.folded > 10
    assert "nf4 conform --only nf4-thresholds --python badports:TieUp" in text
    assert "v(0) &lt; v(1) &lt;" in text
    assert "no storage" in text


def test_the_search_goes_beyond_the_vectors(modules: Path) -> None:
    directory = modules / "vectors"
    directory.mkdir()
    every = {vector.id: vector for vector in load()}
    tiny = next(v for v in every.values() if v.operation == "decode_absmax" and v.output == {"absmax": ""})
    (directory / "decode_absmax.json").write_bytes(canonical("decode_absmax", [tiny]))
    (directory / "flags.json").write_bytes(canonical_flags(dict.fromkeys(tiny.flags, "A bug.")))
    arguments = ("--vectors", directory, "--python", "badports:NoNesting")
    assert run_json("--no-search", *arguments)["counts"]["passed"] == 1
    answer = run_json(*arguments, "--seed", 1, exit_code=1)
    (found,) = answer["search"]["found"]
    assert answer["search"]["operations"] == ["decode_absmax"]
    assert len(found["input"]["absmax_codes"]) == 2 * 257  # shrunk: the second nested block, and no more
    line = shlex.split(found["rerun"])
    assert line[2:6] == ["--vectors", str(directory), "--search", "--seed"]
    again = run_json(*line[2:], exit_code=1)
    assert again["search"]["found"] == answer["search"]["found"]
    assert "search-decode_absmax" in conform(*arguments, "--seed", 1, exit_code=1).stdout


def result(id: str, clause: str, *looks_like: str, flags: tuple[str, ...] = ()) -> Outcome:
    given = {"elements": 1, "block_size": 64, "double_quant": False}
    vector = Vector(id, "storage", (clause,), flags, "A count.", given, {"bytes": 5})
    return Outcome(vector, "failed", looks_like=looks_like)


def test_hundreds_of_failures_are_grouped_by_bug_and_clause() -> None:
    results = [result(f"a{i}", "NF4-3.5", "TieRule", "NibbleOrder") for i in range(300)]
    results += [result(f"b{i}", "NF4-2.2", "NibbleOrder", "Unheard") for i in range(5)]
    results += [result("n", "NF4-5.1", "NibbleOrder", flags=("NibbleOrder",))]
    results += [result("c", "NF4-3.5", "Unheard"), result("d", "NF4-3.1"), result("e", "NF4-3.1")]
    found = [(g.flag, g.clause, len(g.results), g.results[0].vector.id) for g in groups(results)]
    assert found == [
        ("NibbleOrder", "NF4-5.1", 306, "n"),  # it explains more than TieRule does
        ("Unheard", "NF4-3.5", 1, "c"),
        ("", "NF4-3.1", 2, "d"),
    ]
    run = Run("it", ("--", "it"), results=results)
    text = failures(run, {"NibbleOrder": "The first element of a byte is in its low bits."})
    assert len(text.splitlines()) < 80
    assert "FAILED NF4-5.1, 306 vectors: look like NibbleOrder" in text
    words = " ".join(text.split())
    assert "also NF4-3.5, 300: a0, a1, a2, a3, a4 and 295 more" in words
    assert "NF4-2.2, 5: b0, b1, b2, b3, b4" in words
    assert "a5" not in words


@pytest.mark.parametrize("flag", ["TailDivision", "ThresholdTop", "ScheduleZeroSpan", "DtypeAccepted"])
def test_the_bug_is_named_though_others_would_explain_the_same_failures(flag: str) -> None:
    run = Run(flag, ("--python", flag))
    execute(run, PythonPort(BUGS[flag], flag), load(), {})
    assert {group.flag for group in groups(run.results)} == {flag}


@pytest.mark.usefixtures("modules")
def test_many_failures_are_readable() -> None:
    text = conform("--python", "badports:TieUp", "--no-search", "--only", "quantize", exit_code=1).stdout
    blocks = text.count("FAILED")
    failed = run_json("--python", "badports:TieUp", "--no-search", "--only", "quantize", exit_code=1)
    assert 0 < blocks <= failed["counts"]["failed"]
    assert text.count("rerun") == blocks
    for row in failed["results"]:
        if row["outcome"] == "failed":
            assert row["id"] in text
    assert max(map(len, text.splitlines())) <= 110
