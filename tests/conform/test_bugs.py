"""Deliberately wrong ports: each is caught by the vectors that carry its flag, and named by the diagnosis."""

from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
import pytest
from nf4.conform import diagnose
from nf4.conform.bugs import BUGS, Plain
from nf4.conform.compare import compare
from nf4.conform.diagnose import explain, looks_like
from nf4.conform.operations import OPERATIONS
from nf4.conform.port import Answer
from nf4.conform.python_port import PythonPort
from nf4.conform.report import groups
from nf4.conform.run import Run, execute
from nf4.conform.vectors import Vector, flags, load

VECTORS = load()
ENOUGH = 4  # vectors to diagnose a bug by, the shortest


def right(vector: Vector) -> Answer:
    return Answer("refused") if vector.output is None else Answer("output", vector.output)


def wrong_on(port: PythonPort, vector: Vector) -> Answer | None:
    """The port's answer to a vector if it is wrong; an error of its own is wrong, too."""
    answer = port.run(vector.id, vector.operation, vector.input)
    if answer.kind == "errored":
        return answer
    found = compare(vector.operation, vector.input, right(vector), answer, vector.bounds)
    return None if found is None else answer


@cache
def failures(flag: str) -> list[tuple[Vector, Answer | None]]:
    """The vectors that carry a flag, with the wrong port's answer if it is wrong."""
    port = PythonPort(BUGS[flag], flag)
    return [(vector, wrong_on(port, vector)) for vector in VECTORS if flag in vector.flags]


@pytest.fixture(autouse=True)
def _asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each wrong port is asked a vector once, not once for each flag that is diagnosed."""
    monkeypatch.setattr(diagnose, "_ask", ask_once)


ask = diagnose._ask
answers: dict[tuple[type[Plain], str, int], Answer | None] = {}
INPUTS = {id(vector.input) for vector in VECTORS}


def ask_once(port: Plain, operation: str, given: Mapping[str, Any]) -> Answer | None:
    key = (type(port), operation, id(given))
    if isinstance(port, diagnose._Traced) or id(given) not in INPUTS:
        return ask(port, operation, given)
    if key not in answers:
        answers[key] = ask(port, operation, given)
    return answers[key]


def test_every_flag_has_a_wrong_port() -> None:
    assert sorted(BUGS) == sorted(flags())


def test_every_wrong_port_overrides_steps_of_the_correct_one() -> None:
    for flag, bug in BUGS.items():
        steps = {name for name in vars(type(bug)) if not name.startswith("__")}
        assert steps, flag
        assert steps <= set(dir(Plain)), flag
        assert not steps & OPERATIONS.keys(), flag


@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_correct_port_passes_all(operation: str) -> None:
    port = PythonPort(Plain(), "plain")
    assert operation in port.operations
    wrong = [v.id for v in VECTORS if v.operation == operation and wrong_on(port, v)]
    assert not wrong


@pytest.mark.parametrize("flag", sorted(BUGS))
def test_each_wrong_port_is_caught_by_every_vector_with_its_flag(flag: str) -> None:
    found = failures(flag)
    assert found, f"no vector carries {flag}"
    assert not [vector.id for vector, answer in found if answer is None]


@pytest.mark.parametrize("flag", sorted(BUGS))
def test_the_diagnosis_names_it_first(flag: str) -> None:
    spread = sorted(failures(flag), key=lambda item: len(str(item[0].input)))[:ENOUGH]
    wrong = [
        (v.operation, v.input, None if answer.kind == "refused" else answer.output)
        for v, answer in spread
        if answer is not None and answer.kind != "errored"
    ]
    port = PythonPort(BUGS[flag], flag)
    operations = {operation for operation, _, _ in wrong}
    passed = (
        (v.operation, v.input)
        for v in VECTORS
        if v.operation in operations and flag not in v.flags and not wrong_on(port, v)
    )
    named, count = explain(wrong, passed)[0]
    assert named == flag
    assert count == len(wrong)


def vector(slug: str) -> Vector:
    return next(vector for vector in VECTORS if vector.id == slug)


@pytest.mark.parametrize(
    ("slug", "clause"),
    [
        ("nf4-thresholds", "NF4-3.5"),
        ("nf4-absmax-smallest", "NF4-3.3"),
        ("nf4-absmax-2-128", "NF4-3.3"),
        ("nf4-absmax-tiny-short-block", "NF4-3.3"),
        ("nf4-bfloat16-extremes", "NF4-3.3"),
        ("nested-tiny", "NF4-3.3"),
        ("nf4-odd", "NF4-5.2"),
        ("nf4-rows-3-20", "NF4-3.1"),
        ("double-decode-nf4", "NF4-6.4"),
    ],
)
def test_the_clause_that_a_vector_is_about_comes_first(slug: str, clause: str) -> None:
    assert vector(slug).clauses[0] == clause


def test_a_port_without_the_scaling_by_2_64_breaks_that_clause_alone() -> None:
    run = Run("it", ("--python", "it"))
    execute(run, PythonPort(BUGS["ReciprocalOverflow"], "it"), VECTORS, {})
    ((flag, clause),) = {(group.flag, group.clause) for group in groups(run.results)}
    assert (flag, clause) == ("ReciprocalOverflow", "NF4-3.3")


def test_thresholds_of_eight_digits() -> None:
    """Those of ONNX Runtime and OpenVINO, and those of the other codebooks as they are."""
    port = BUGS["ThresholdUlp"]
    found = port.codebook("nf4")["thresholds"].view(np.uint32)
    right = Plain().codebook("nf4")["thresholds"].view(np.uint32)
    assert [f"{bits:08x}" for bits in found[found != right]] == [
        "bf591cd9",
        "3df64863",
        "3f006d03",
        "3f5c89d9",
    ]
    assert np.array_equal(port.codebook("fp4")["thresholds"], Plain().codebook("fp4")["thresholds"])


def test_a_right_answer_looks_like_nothing() -> None:
    right_one = vector("nf4-thresholds")
    assert right_one.output is not None
    assert looks_like(right_one.operation, right_one.input, right_one.output) == []


def test_an_answer_that_no_bug_gives_looks_like_nothing() -> None:
    given = vector("nf4-thresholds")
    assert given.output is not None
    strange = {**given.output, "absmax": "40490fdb"}
    assert looks_like(given.operation, given.input, strange) == []


def test_two_bugs_at_once() -> None:
    given = vector("nf4-thresholds")

    class Both(type(BUGS["NibbleOrder"]), type(BUGS["TieRule"])):  # type: ignore[misc]
        """Two wrong steps."""

    answer = PythonPort(Both(), "both").run("both", given.operation, given.input)
    assert looks_like(given.operation, given.input, answer.output) == ["TieRule", "NibbleOrder"]


def test_an_answer_where_a_refusal_is_due() -> None:
    given = vector("refuse-block-size-96")
    anything = {"codes": "00", "absmax": "3f800000"}
    assert looks_like(given.operation, given.input, anything) == ["BlockSizeAccepted"]
