"""A run of the kit: which vectors, what the port made of each, and whether it conforms."""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from nf4.conform.compare import Difference, compare
from nf4.conform.operations import OPERATIONS
from nf4.conform.port import Answer, HarnessError, Port
from nf4.conform.vectors import Vector
from nf4.errors import InputError

if TYPE_CHECKING:
    from nf4.conform.layers import Defect, LayerPort
    from nf4.conform.search import Found

CONFORMS, DIFFERS, BROKEN = 0, 1, 2

# What a harness loses first: the sign of zero, the smallest and largest, nothing at all, a long line.
SMOKE = (
    ("smoke-float32", "float32", "3f800000800000000000000100800000ff7fffff0da24260"),
    ("smoke-float16", "float16", "3c008000000103ff0400fbff"),
    ("smoke-bfloat16", "bfloat16", "3f8080000001007f0080ff7f"),
    ("smoke-empty", "float32", ""),
    ("smoke-long", "float32", "3f8ccccdbf8ccccd" * 4096),
)

Outcome = Literal["passed", "failed", "errored", "skipped"]


@dataclass(frozen=True)
class Result:
    """What a port made of one vector.

    failed: it breaks a clause, as difference says. errored: it gave no answer that could be compared, as
    message says, and no clause is blamed. skipped: message has the port's reason. answer: what it gave, where
    it failed. looks_like: the flags whose bug gives exactly this answer, the likeliest first. known: it may
    fail or err, by the list of known failures. found: the search made this vector; it is not of the files.
    """

    vector: Vector
    outcome: Outcome
    message: str = ""
    difference: Difference | None = None
    answer: Answer | None = None
    looks_like: tuple[str, ...] = ()
    known: bool = False
    found: bool = False

    @property
    def bad(self) -> bool:
        """Whether it keeps the port from conforming."""
        return self.outcome in {"failed", "errored"} and not self.known


@dataclass
class Run:
    """All of a run. subject: the arguments of `nf4 conform` that name the port; options: those that stay."""

    port: str
    subject: tuple[str, ...]
    options: tuple[str, ...] = ()
    offered: list[str] = field(default_factory=list)
    not_offered: list[str] = field(default_factory=list)
    results: list[Result] = field(default_factory=list)
    stale: list[str] = field(default_factory=list)  # sentences: entries of known failures that pass
    remarks: list[str] = field(default_factory=list)
    searched: list[str] = field(default_factory=list)
    defects: list["Defect"] = field(default_factory=list)  # that histories of calls of a layer show
    seed: int = 0
    seconds: float = 0.0  # of the vectors
    search_seconds: float = 0.0
    broken: str | None = None
    whole: frozenset[str] = frozenset()  # operations of which every vector of this specification was asked

    def count(self, outcome: Outcome) -> int:
        """How many vectors of the files had that outcome."""
        return sum(result.outcome == outcome for result in self.results if not result.found)

    @property
    def exit_code(self) -> int:
        """0: conforms; 1: does not; 2: the harness is broken, or nothing was run."""
        if self.broken is not None:
            return BROKEN
        wrong = self.stale or self.defects or any(result.bad for result in self.results)
        return DIFFERS if wrong else CONFORMS


def select(vectors: Sequence[Vector], only: Iterable[str]) -> list[Vector]:
    """Return the vectors whose id or operation, or one of whose clauses or flags, matches a glob.

    Raises InputError on a glob that matches nothing.
    """
    globs = list(only)
    for glob in globs:
        if not any(_matches(vector, glob) for vector in vectors):
            raise InputError(
                f"--only {glob}: matches no id, clause, flag or operation; nf4 conform --list shows them"
            )
    return [vector for vector in vectors if not globs or any(_matches(vector, glob) for glob in globs)]


def known_failures(path: Path, vectors: Sequence[Vector]) -> dict[str, set[str]]:
    """Return the ids that each entry of a file stands for: ids or globs, one a line; # begins a comment.

    Raises InputError on a file that can't be read and on an entry that matches no vector.
    """
    try:
        text = path.read_text("utf-8")
    except OSError as error:
        raise InputError(f"{path}: can't be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 at byte {error.start}; give ids, one a line") from None
    entries = {}
    for number, line in enumerate(text.splitlines(), 1):
        entry = line.partition("#")[0].strip()
        if not entry:
            continue
        entries[entry] = {vector.id for vector in vectors if fnmatchcase(vector.id, entry)}
        if not entries[entry]:
            raise InputError(f"{path}, line {number}: {entry} matches no vector; remove it")
    return entries


def smoke(port: Port) -> None:
    """Have the port echo a few values. Raises HarnessError unless the same bits come back."""
    for id, dtype, x in SMOKE:
        answer = port.run(id, "echo", {"dtype": dtype, "x": x})
        if answer.kind != "output":
            raise HarnessError(f"the smoke case {id} got no echo, so no vector was run: {answer.message}")
        if answer.output != {"x": x}:
            raise HarnessError(
                f"the smoke case {id} must give back x of its input as it came, {_short(x)}; "
                f"it gave {_short(answer.output)}, so no vector was run"
            )


def execute(
    run: Run,
    port: Port,
    vectors: Sequence[Vector],
    known: Mapping[str, set[str]],
    progress: Callable[[str, int, int], None] = lambda id, done, total: None,
) -> None:
    """Ask a port for every vector and fill in the run; what breaks the harness ends it and is noted."""
    start = time.monotonic()
    asked = {vector.operation for vector in vectors}
    run.offered = [name for name in OPERATIONS if name in port.operations]
    run.not_offered = [name for name in OPERATIONS if name in asked and name not in port.operations]
    excused = set[str]().union(*known.values())
    try:
        smoke(port)
        for i, vector in enumerate(vectors):
            progress(vector.id, i, len(vectors))
            run.results.append(_run_one(port, vector, vector.id in excused))
        run.results = _likeliest_first(run.results)
        if not any(result.outcome != "skipped" for result in run.results):
            reasons = Counter(result.message for result in run.results)
            run.broken = f"nothing was run: {listed(list(reasons)) or 'there are no vectors'}"
    except HarnessError as error:
        run.broken = str(error)
    finally:
        run.seconds = time.monotonic() - start
    outcomes = {result.vector.id: result.outcome for result in run.results}
    for entry, ids in known.items():
        passed = sorted(id for id in ids if outcomes.get(id) == "passed")
        if passed:
            which = "" if passed == [entry] else f" for {listed(passed)}"
            run.stale.append(f"known failure {entry} passes{which}; remove it from the list")


def search_beyond(
    run: Run,
    port: Port,
    operations: Iterable[str],
    examples: int,
    progress: Callable[[str, int, int], None] = lambda operation, done, total: None,
) -> None:
    """Let Hypothesis look for inputs beyond the vectors, in operations of which no vector failed."""
    from nf4.conform.search import INPUTS, search

    start = time.monotonic()
    failing = {result.vector.operation for result in run.results if result.outcome in {"failed", "errored"}}
    chosen = [name for name in operations if name in port.operations & INPUTS.keys() - failing]
    try:
        for i, operation in enumerate(chosen):
            progress(operation, i, len(chosen))
            run.results += [_found(run, found) for found in search(port, [operation], run.seed, examples)]
            run.searched.append(operation)
    except HarnessError as error:
        run.broken = f"in the search, {error}"
    finally:
        run.search_seconds += time.monotonic() - start


def search_layers(run: Run, port: "LayerPort", examples: int) -> None:
    """Let Hypothesis look for histories of a layer that go wrong; what can't be shown here is a remark."""
    from nf4.conform.layers import find_defects

    start = time.monotonic()
    run.defects += find_defects(port, run.seed, examples)
    run.searched.append("layers")
    run.remarks += port.limits()
    run.search_seconds += time.monotonic() - start


def judge(vector: Vector, answer: Answer, known: bool = False, found: bool = False) -> Result:
    """Compare an answer to a vector's and, where it differs, name the bugs it looks like."""

    base = Result(vector, "passed", known=known, found=found)
    if answer.kind == "skipped":
        return replace(base, outcome="skipped", message=answer.message or "no reason given")
    if answer.kind == "errored":
        return replace(base, outcome="errored", message=answer.message or "no message given")
    if vector.output is None:
        expected = Answer("refused", message=vector.refused or "")
    else:
        expected = Answer("output", vector.output, vector.steps)
    try:
        difference = compare(vector.operation, vector.input, expected, answer, vector.bounds)
    except InputError as error:
        return replace(base, outcome="errored", message=f"its output has not the form of NF4-13.3: {error}")
    if difference is None:
        return base
    from nf4.conform.diagnose import looks_like

    output = dict(answer.output) if answer.kind == "output" else None
    flags = tuple(looks_like(vector.operation, vector.input, output))
    if difference.kind == "length" and not flags:
        # It lost count; that says nothing about a clause, unless a known bug does just that.
        return replace(base, outcome="errored", message=difference.what)
    return replace(
        base,
        outcome="failed",
        message=difference.what,
        difference=difference,
        answer=answer,
        looks_like=flags,
    )


def _likeliest_first(results: Sequence[Result]) -> list[Result]:
    """Return the results with their flags in order: first the bug that contradicts the fewest passed."""
    from nf4.conform.diagnose import explain

    passed: dict[str, list[tuple[str, dict[str, object]]]] = {}
    for result in results:
        if result.outcome == "passed":
            vector = result.vector
            passed.setdefault(vector.operation, []).append((vector.operation, vector.input))
    orders: dict[tuple[str, tuple[str, ...]], tuple[str, ...]] = {}
    ordered = []
    for result in results:
        key = (result.vector.operation, result.looks_like)
        if len(result.looks_like) > 1 and result.answer is not None:
            if key not in orders:
                output = result.answer.output if result.answer.kind == "output" else None
                failure = (result.vector.operation, result.vector.input, output)
                orders[key] = tuple(flag for flag, _ in explain([failure], passed.get(key[0], [])))
            ordered.append(replace(result, looks_like=orders[key]))
        else:
            ordered.append(result)
    return ordered


def _found(run: Run, found: "Found") -> Result:
    """Return what the search found as the result of a vector of its own."""
    expected = found.expected
    vector = Vector(
        f"search-{found.operation}",
        found.operation,
        OPERATIONS[found.operation].clauses,
        (),
        f"Found by the search with seed {run.seed}, and made as small as it could.",
        dict(found.input),
        dict(expected.output) if expected.kind == "output" else None,
        expected.message if expected.kind == "refused" else None,
        dict(expected.steps),
    )
    return judge(vector, found.got, found=True)


def _run_one(port: Port, vector: Vector, known: bool) -> Result:
    if vector.operation not in port.operations:
        return Result(vector, "skipped", f"the port does not offer {vector.operation}", known=known)
    return judge(vector, port.run(vector.id, vector.operation, vector.input), known)


def _matches(vector: Vector, glob: str) -> bool:
    return any(
        fnmatchcase(name, glob) for name in (vector.id, vector.operation, *vector.clauses, *vector.flags)
    )


def listed(names: Sequence[str]) -> str:
    """Return the first five names, and how many more there are."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
