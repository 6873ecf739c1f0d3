"""What the libraries of the world conform to, clause by clause: each is run in a process of its own."""

import contextlib
import io
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from nf4.bench.machine import describe
from nf4.conform.clauses import clause, clauses
from nf4.conform.libraries import LIBRARIES, versions
from nf4.conform.port import HarnessError
from nf4.conform.protocol import SubprocessPort
from nf4.conform.run import Result, Run, execute
from nf4.conform.vectors import Vector

TIMEOUT = 60.0  # seconds for an answer: the first one imports the library
LAYERS_TIMEOUT = 600.0  # seconds for all histories of a layer

VERDICTS = ("conforms", "differs", "refused", "accepted", "no answer", "not offered")
"""What became of a vector: the same bits; others; refused though it has an answer; answered though it must be
refused; no answer of its form (it died, hung, raised, or gave another length); the library lacks that."""


# Outputs are compared in the order in which they are computed: these clauses are about the first one alone.
_SHOWN_BY = {"NF4-3.2": "absmax", "NF4-6.1": "offset"}


@dataclass(frozen=True)
class Entry:
    """A library: its versions by distribution (None: not installed), how to install it, and the command
    that speaks the protocol for it."""

    name: str
    title: str
    versions: dict[str, str] | None
    install: str
    command: tuple[str, ...]
    layers: bool = False  # the command with `layers` after it prints the defects of its layer


@dataclass(frozen=True)
class Score:
    """What came of one library: the run of the kit, None where it is not installed; and of its layer.

    defects: objects of library, title, steps and detail; limits: sentences on what this machine can't show.
    """

    entry: Entry
    run: Run | None
    defects: list[dict[str, Any]] = field(default_factory=list)
    limits: list[str] = field(default_factory=list)


def entries() -> list[Entry]:
    """Return every library that the package has an adapter for, of this Python environment."""
    return [
        Entry(
            name,
            library.title,
            versions(library),
            f"pip install {' '.join(library.distributions)}",
            (
                sys.executable,
                "-P",
                "-m",
                "nf4.conform.libraries",
                name,
            ),  # -P: not what lies where it is called
            library.layers,
        )
        for name, library in LIBRARIES.items()
    ]


def run(
    libraries: Sequence[Entry],
    vectors: Sequence[Vector],
    timeout: float = TIMEOUT,
    progress: Callable[[str], None] = lambda title: None,
) -> list[Score]:
    """Ask every installed library for every vector; one that dies or hangs keeps no other from its turn.

    timeout is for one answer, in seconds. progress gets the title of each library before its turn.
    """
    scores = []
    for entry in libraries:
        if entry.versions is None:
            scores.append(Score(entry, None))
            continue
        progress(entry.title)
        result = Run(entry.title, ("--", *entry.command))
        with contextlib.redirect_stderr(io.StringIO()):  # what libraries say while they are loaded
            try:
                port = SubprocessPort(entry.command, timeout)
            except HarnessError as error:
                result.broken = str(error)
            else:
                execute(result, port, vectors, {})
                port.close()
        scores.append(Score(entry, result, *_histories(entry)))
    return scores


def _histories(entry: Entry) -> tuple[list[dict[str, Any]], list[str]]:
    """What histories of calls of a library's layer show, and what they can't show here."""
    if not entry.layers:
        return [], []
    try:
        done = subprocess.run(
            [*entry.command, "layers"], capture_output=True, text=True, check=True, timeout=LAYERS_TIMEOUT
        )
        found = json.loads(done.stdout)
    except subprocess.TimeoutExpired:
        return [], [f"{entry.title}: the search of its layer took more than {LAYERS_TIMEOUT} s"]
    except (subprocess.CalledProcessError, ValueError) as error:
        return [], [f"{entry.title}: the search of its layer failed: {error}"]
    return found["defects"], found["limits"]


def verdict(result: Result) -> str:
    """Return which of VERDICTS a result is."""
    if result.outcome == "failed":
        if result.vector.output is None:
            return "accepted"
        return "refused" if result.difference and result.difference.kind == "refusal" else "differs"
    return {"passed": "conforms", "skipped": "not offered", "errored": "no answer"}[result.outcome]


def by_clause(score: Score) -> dict[str, Counter[str]]:
    """Return by clause, in the order of the text, how many of its vectors got which verdict.

    What only a later output gets wrong, such as the codes, conforms to the clause of an earlier one.
    """
    found: dict[str, Counter[str]] = {}
    for result in score.run.results if score.run else []:
        wrong = result.difference.field if result.difference else ""
        for id in result.vector.clauses:
            agreed = wrong and id in _SHOWN_BY and wrong != _SHOWN_BY[id]
            found.setdefault(id, Counter())["conforms" if agreed else verdict(result)] += 1
    return {id: found[id] for id in sorted(found, key=_place)}


def looks_like(score: Score, clause: str | None = None) -> Counter[str]:
    """Return how many differing vectors, all or those of a clause, look like which bug."""
    found: Counter[str] = Counter()
    for result in score.run.results if score.run else []:
        if verdict(result) == "differs" and clause in {None, *result.vector.clauses}:
            found.update(result.looks_like)
    return found


def as_json(scores: Sequence[Score]) -> dict[str, Any]:
    """Return the board as JSON: date and machine; by library its versions, each clause and each vector."""
    about = describe([])
    return {
        "date": about["date"],
        "machine": about["machine"],
        "versions": about["versions"],
        "libraries": [_json(score) for score in scores],
    }


def markdown(scores: Sequence[Score]) -> str:
    """Return the board as Markdown: clauses by library, those with NF4 first; libraries; what is missing."""
    about = describe([])
    machine = about["machine"]
    ran = [score for score in scores if score.run is not None]
    lines = [
        f"{about['date'][:10]}, {machine['cpu']}, {machine['system']}, Python {about['versions']['python']}."
    ]
    for with_nf4 in (True, False):
        lines += _table([score for score in ran if _has_nf4(score) == with_nf4])
    lines += ["", "| library | versions | vectors | differences look like |", "|---|---|---|---|"]
    lines += [_summary(score) for score in ran]
    for score in scores:
        lines += _defects(score)
    absent = [score.entry for score in scores if score.run is None]
    if absent:
        lines += ["", "Not installed: " + "; ".join(f"{e.title} (`{e.install}`)" for e in absent) + "."]
    return "\n".join(lines) + "\n"


def _defects(score: Score) -> list[str]:
    """What histories of calls show of a library's layer, as a table."""
    lines = []
    if score.defects:
        lines += [
            "",
            f"| what histories of calls of {score.entry.title}'s layer show | the shortest found |",
            "|---|---|",
        ]
        for defect in score.defects:
            steps = "; ".join([*defect["steps"], defect["detail"]])
            lines.append(f"| {defect['title']} | {steps} |".replace("\n", " "))
    return lines + [line for limit in score.limits for line in ("", limit)]


def _place(id: str) -> int:
    """Where a clause stands in the text; one that it does not have comes last."""
    order = list(clauses())
    return order.index(id) if id in order else len(order)


def _has_nf4(score: Score) -> bool:
    assert score.run is not None
    return bool({"quantize", "dequantize"} & set(score.run.offered))


def _table(scores: Sequence[Score]) -> list[str]:
    """A row for each clause that one of these libraries was asked about."""
    counts = [by_clause(score) for score in scores]
    asked = {
        id for count in counts for id, verdicts in count.items() if verdicts.total() > verdicts["not offered"]
    }
    if not asked:
        return []
    lines = [
        "",
        "| clause | " + " | ".join(score.entry.title for score in scores) + " |",
        "|---|" + "---|" * len(scores),
    ]
    for id in sorted(asked, key=_place):
        cells = [
            _cell(count.get(id, Counter()), looks_like(score, id))
            for score, count in zip(scores, counts, strict=True)
        ]
        lines.append(f"| {id} {clause(id).title} | " + " | ".join(cells) + " |")
    return lines


def _cell(verdicts: Counter[str], bugs: Counter[str]) -> str:
    asked = verdicts.total() - verdicts["not offered"]
    if not asked:
        return ""
    parts = []
    for name in VERDICTS[1:-1]:
        if verdicts[name]:
            flag = bugs.most_common(1)[0][0] if name == "differs" and bugs else ""
            parts.append(f"{verdicts[name]}/{asked} {name}" + f": {flag}" * bool(flag))
    return "; ".join(parts) or f"conforms ({asked})"


def _summary(score: Score) -> str:
    assert score.run is not None
    total = Counter(verdict(result) for result in score.run.results)
    numbers = ", ".join(f"{total[name]} {name}" for name in VERDICTS if total[name])
    if score.run.broken is not None:
        numbers = f"{numbers}; stopped: {score.run.broken}" if numbers else score.run.broken
    flags = ", ".join(f"{flag} ({count})" for flag, count in looks_like(score).most_common(4))
    installed = ", ".join(f"{name} {version}" for name, version in (score.entry.versions or {}).items())
    return f"| {score.entry.title} | {installed} | {numbers} | {flags} |".replace("\n", " ")


def _json(score: Score) -> dict[str, Any]:
    entry, result = score.entry, score.run
    about = {"name": entry.name, "title": entry.title, "versions": entry.versions, "install": entry.install}
    if result is None:
        return {**about, "installed": False}
    return {
        **about,
        "installed": True,
        "stopped": result.broken,
        "looks_like": dict(looks_like(score)),
        "defects": score.defects,
        "limits": score.limits,
        "clauses": {id: dict(count) for id, count in by_clause(score).items()},
        "vectors": [
            {
                "id": item.vector.id,
                "verdict": verdict(item),
                "message": item.message,
                "looks_like": list(item.looks_like),
            }
            for item in result.results
        ],
    }
