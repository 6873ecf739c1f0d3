"""What bug an answer looks like: the wrong ports that give the same answer where the correct one does not."""

from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import combinations
from typing import Any

from nf4.conform.bugs import BUGS, Plain
from nf4.conform.compare import compare
from nf4.conform.operations import OPERATIONS
from nf4.conform.port import Answer
from nf4.conform.python_port import PythonPort
from nf4.errors import InputError

Failure = tuple[str, Mapping[str, Any], Mapping[str, Any] | None]
"""An operation, its input, and the wrong output (JSON values; None: it was refused)."""

Passed = tuple[str, Mapping[str, Any]]
"""An operation and an input that was answered rightly."""


# Most bugs show in these, so that pairs of them would take minutes; their parts are operations of their own.
_WHOLE = ("exact_step",)


class _Traced(Plain):
    """The correct port, which notes the steps that it takes: who does others wrong answers the same."""

    def __init__(self) -> None:
        self.taken: set[str] = set()

    def __getattribute__(self, name: str) -> Any:
        if name != "taken":
            self.taken.add(name)
        return super().__getattribute__(name)


def looks_like(operation: str, input: Mapping[str, Any], output: Mapping[str, Any] | None) -> list[str]:
    """Return the flags whose wrong port gives this output on this input, where the correct port does not.

    Both are JSON values; an output of None is a refusal. Where the clauses demand a refusal and no wrong port
    gives just this output, those that give any. Where no bug alone explains the output, two that do
    together, one after the other, but for whole steps. Empty where nothing does, or the output is right.
    """
    given = Answer("refused") if output is None else Answer("output", output)
    traced = _Traced()
    right = _ask(traced, operation, input)
    if right is None or _same(operation, input, right, given):
        return []
    wrong = {}
    for flag, bug in BUGS.items():
        if _steps(bug) & traced.taken:
            answer = _ask(bug, operation, input)
            if answer is not None and not _same(operation, input, right, answer):
                wrong[flag] = answer
    found = [flag for flag, answer in wrong.items() if _same(operation, input, answer, given)]
    if not found and right.kind == "refused":
        found = [flag for flag, answer in wrong.items() if answer.kind == "output"]
    return found or (_two_together(operation, input, given, wrong) if operation not in _WHOLE else [])


def explain(failures: Iterable[Failure], passed: Iterable[Passed] = ()) -> list[tuple[str, int]]:
    """Return the flags that explain wrong answers, and how many each: those that explain most come first.

    Of two that explain as many, the one comes first whose wrong port is wrong in fewer of the passed.
    """
    counts = Counter(flag for failure in failures for flag in looks_like(*failure))
    tied = {flag for flag, count in counts.items() if list(counts.values()).count(count) > 1}
    against: Counter[str] = Counter()
    for operation, input in passed if tied else ():
        right = _ask(Plain(), operation, input)
        for flag in tied:
            answer = _ask(BUGS[flag], operation, input)
            against[flag] += right is None or answer is None or not _same(operation, input, right, answer)
    return sorted(counts.items(), key=lambda item: (-item[1], against[item[0]], item[0]))


def _two_together(
    operation: str, input: Mapping[str, Any], given: Answer, wrong: Mapping[str, Answer]
) -> list[str]:
    """The first two of these bugs, in different steps, that give the answer together; or none."""
    for first, second in combinations(wrong, 2):
        if _steps(BUGS[first]) & _steps(BUGS[second]):
            continue
        both = type(f"{first}{second}", (type(BUGS[first]), type(BUGS[second])), {})()
        answer = _ask(both, operation, input)
        if answer is not None and _same(operation, input, answer, given):
            return [first, second]
    return []


def _steps(bug: Plain) -> set[str]:
    """The names of the steps that a wrong port does otherwise."""
    return {name for name in vars(type(bug)) if not name.startswith("__")}


def _ask(port: Plain, operation: str, input: Mapping[str, Any]) -> Answer | None:
    """A port's answer: its output or its refusal; None where it has neither."""
    wrapped = PythonPort(port, "a wrong port")
    if operation not in wrapped.operations:
        return None
    answer = wrapped.run("diagnosis", operation, input)
    return answer if answer.kind in {"output", "refused"} else None


def _same(operation: str, input: Mapping[str, Any], one: Answer, other: Answer) -> bool:
    """Whether two answers are the same, within the operation's tolerance of the first."""
    if one.kind != other.kind:
        return False
    if one.kind == "refused" or one.output == other.output:
        return True
    if not OPERATIONS[operation].tolerance:
        return False
    try:
        return compare(operation, input, one, other) is None
    except InputError:
        return False
