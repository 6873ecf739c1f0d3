"""A run for people and programs: as text, as one JSON object, as a page of HTML."""

import html
import re
import shlex
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nf4 import __version__
from nf4.conform import values
from nf4.conform.clauses import clause
from nf4.conform.compare import Difference, Step, block, position, show
from nf4.conform.operations import OPERATIONS
from nf4.conform.run import Outcome, Result, Run, listed
from nf4.conform.vectors import VERSION, Vector

OUTCOMES: tuple[Outcome, ...] = ("passed", "failed", "errored", "skipped")
WIDTH = 110
_TRAINER = {"init_adapter", "example_order", "adamw", "exact_learning_rate", "exact_step"}
_EDITION = VERSION.rpartition(".")[0]
_AROUND = 3  # elements shown on either side of the one that differs
_FEW = 6  # steps that are named one by one
_WHOLE = 8  # elements of an array that is shown whole


@dataclass(frozen=True)
class Group:
    """Failures that look like one bug (flag) or, where none is known (""), have their first clause in common.

    clause: the one that the bug breaks. Vectors that carry the flag, and test the clause, come first.
    """

    flag: str
    clause: str
    results: list[Result]


def groups(results: Iterable[Result]) -> list[Group]:
    """Return the failed results by diagnosed bug, the one that explains most first, the rest by clause.

    One answer may look like several bugs: it counts for the one that explains most of the others.
    """
    left = [result for result in results if result.outcome == "failed"]
    found = []
    while counts := Counter(flag for result in left for flag in result.looks_like):
        likeliest = Counter(result.looks_like[0] for result in left if result.looks_like)
        flag = min(counts, key=lambda name: (-counts[name], -likeliest[name], name))
        mine = [result for result in left if flag in result.looks_like]
        name = broken_by(flag) or mine[0].vector.clauses[0]
        mine.sort(key=lambda r: (flag not in r.vector.flags, name not in r.vector.clauses))
        found.append(Group(flag, name, mine))
        left = [result for result in left if flag not in result.looks_like]
    return found + [Group("", name, mine) for name, mine in _by_clause(left).items()]


@cache
def broken_by(flag: str) -> str | None:
    """Return the clause that a bug breaks: the one its wrong port's docstring names, if there is one."""
    from nf4.conform.bugs import BUGS

    cited = re.search(r"NF4-\d+\.\d+", type(BUGS.get(flag)).__doc__ or "")
    return cited[0] if cited else None


def _by_clause(results: Iterable[Result]) -> dict[str, list[Result]]:
    found: dict[str, list[Result]] = {}
    for result in results:
        found.setdefault(result.vector.clauses[0], []).append(result)
    return found


def rerun(run: Run, result: Result) -> str:
    """Return the line that runs one vector again, or the search that found it, quoted for a shell."""
    vector = result.vector
    only = vector.operation if result.found else vector.id
    search = ["--search", "--seed", str(run.seed)] if result.found else []
    return shlex.join(["nf4", "conform", *run.options, *search, "--only", only, *run.subject])


def tally(results: Iterable[Result]) -> dict[str, dict[str, int]]:
    """Return how many vectors had each outcome, by clause; one vector counts for each of its clauses."""
    table: dict[str, dict[str, int]] = {}
    for result in results:
        for name in result.vector.clauses:
            table.setdefault(name, dict.fromkeys(OUTCOMES, 0))[result.outcome] += 1
    return dict(sorted(table.items(), key=lambda row: _numbers(row[0])))


def verdict(run: Run) -> str:
    """Return the last line: whether the port conforms, or that the harness is broken."""
    numbers = {outcome: run.count(outcome) for outcome in OUTCOMES}
    absent = sum(result.vector.operation in run.not_offered for result in run.results)
    numbers["skipped"] -= absent
    counts = ", ".join(f"{n} {name}" for name, n in (numbers | {"not offered": absent}).items() if n)
    found = sum(result.found and result.bad for result in run.results)
    counts += f"; the search found {found} more" if found else ""
    counts += f"; histories of a layer show {len(run.defects)} more" if run.defects else ""
    known = sum(result.known for result in run.results if result.outcome in {"failed", "errored"})
    counts += f" ({known} known)" if known else ""
    counts += f"; {run.seconds:.1f} s"
    if run.broken is not None:
        return f"broken harness: {run.broken}" + (f" ({counts})" if run.results else "")
    return f"{run.port}: {'conforms' if run.exit_code == 0 else 'does not conform'}: {counts}"


@dataclass(frozen=True)
class Claim:
    """What a port may say of itself (NF4-13.7): its name, in what it conforms, and what it skipped."""

    called: str
    operations: tuple[str, ...]
    skipped: tuple[str, ...]

    def __str__(self) -> str:
        """One sentence, or nothing where there is nothing to claim."""
        if not self.operations:
            return ""
        every = len(self.operations) == len(OPERATIONS)
        names = f"all {len(OPERATIONS)} operations" if every else ", ".join(self.operations)
        called = f"may be called {self.called}: it " if self.called else ""
        skipped = f", with {', '.join(self.skipped)} skipped" if self.skipped else ""
        return f"it {called}conforms to NF4 {_EDITION} in {names}{skipped} (NF4-13.7)"


def claim(run: Run) -> Claim:
    """Return what a run bears out: operations of which every vector was asked, and none answered wrongly."""
    if run.exit_code != 0:
        return Claim("", (), ())
    by_operation: dict[str, list[Result]] = {}
    for result in run.results:
        if result.vector.operation in run.whole & set(run.offered):
            by_operation.setdefault(result.vector.operation, []).append(result)
    conforming, skipped = [], set[str]()
    for operation, results in by_operation.items():
        passed = [result.vector for result in results if result.outcome == "passed"]
        # For each that was skipped, the codebook or the dtype that the port does not have; None: it has both.
        lacks = [_lack(result.vector, passed) for result in results if result.outcome == "skipped"]
        if passed and None not in lacks and all(r.outcome in {"passed", "skipped"} for r in results):
            conforming.append(operation)
            skipped.update(lack for lack in lacks if lack is not None)
    names = []
    if {"quantize", "dequantize"} <= set(conforming):
        nested = {"encode_absmax", "decode_absmax"} <= set(conforming)
        names.append("an NF4 codec" + " with double quantization" * nested)
    if _TRAINER.issubset(conforming):
        names.append("an exact QLoRA trainer")
    called = " and ".join(names)
    return Claim(called, tuple(name for name in OPERATIONS if name in conforming), tuple(sorted(skipped)))


def _lack(vector: Vector, passed: Sequence[Vector]) -> str | None:
    """The codebook or the dtype for which a vector may be skipped (NF4-13.7)."""
    codebook = vector.input.get("codebook", "nf4")
    if codebook != "nf4":
        return str(codebook)
    known = {pair for other in passed for pair in _dtypes(other)}
    return next((dtype for name, dtype in _dtypes(vector) if (name, dtype) not in known), None)


def _dtypes(vector: Vector) -> list[tuple[str, str]]:
    """The dtypes of a vector's input, each with the field that gives it or has arrays of it."""
    given = vector.input
    found: list[tuple[str, str]] = [
        (name, str(given[name])) for name in ("dtype", "adapter_dtype") if name in given
    ]
    for name, kind in OPERATIONS[vector.operation].inputs.items():
        if kind == "arrays" and name in given:
            found += [(name, str(array["dtype"])) for array in given[name].values()]
    return found


def failures(run: Run, flags: Mapping[str, str]) -> str:
    """Return what went wrong as text: the first failure of each group in full, the ids of the rest.

    flags: the sentence of each flag, by name.
    """
    parts = []
    for group in groups(result for result in run.results if result.bad):
        first = group.results[0]
        one = len(group.results) == 1
        looks = f"{'looks' if one else 'look'} like {group.flag}" if group.flag else "no known bug"
        title = f"FAILED {group.clause}, {len(group.results)} {'vector' if one else 'vectors'}: {looks}"
        rows = details(run, first, flags, group)
        for name, others in _by_clause(group.results[1:]).items():
            rows.append(("also", f"{name}, {len(others)}: {listed([result.vector.id for result in others])}"))
        parts.append(_block(title, rows))
    by_message: dict[str, list[Result]] = {}
    for result in run.results:
        if result.outcome == "errored" and result.bad:
            by_message.setdefault(result.message, []).append(result)
    for message, results in by_message.items():
        rows = [
            ("vector", ", ".join(result.vector.id for result in results)),
            ("rerun", rerun(run, results[0])),
        ]
        parts.append(_block(f"ERRORED {len(results)}, no clause is to blame: {message}", rows))
    parts += [f"DEFECT of {defect.report()}\n" for defect in run.defects]
    parts += [f"STALE  {sentence}\n" for sentence in run.stale]
    return "\n".join(parts)


def notes(run: Run) -> str:
    """Return what else is to be known: skipped and why, not offered, remarks, what was searched."""
    lines = []
    reasons: dict[str, list[str]] = {}
    for result in run.results:
        if result.outcome == "skipped" and result.vector.operation not in run.not_offered:
            reasons.setdefault(result.message, []).append(result.vector.id)
    for reason, ids in reasons.items():
        lines.append(f"skipped {len(ids)}: {reason} ({', '.join(ids[:3])}{', ...' if len(ids) > 3 else ''})")
    if run.not_offered:
        skipped = sum(result.vector.operation in run.not_offered for result in run.results)
        lines.append(f"not offered ({skipped} vectors): {', '.join(run.not_offered)}")
    if run.searched:
        took = f"seed {run.seed}, {run.search_seconds:.1f} s"
        lines.append(f"searched beyond the vectors ({took}): {', '.join(run.searched)}")
    lines += [f"remark: {remark}" for remark in run.remarks]
    return "".join(textwrap.fill(line, WIDTH, subsequent_indent="  ", **_WRAP) + "\n" for line in lines)


def details(
    run: Run, result: Result, flags: Mapping[str, str], group: Group | None = None
) -> list[tuple[str, str]]:
    """Return one failure in full, as rows of a label and a text. group: what it counts for, said first."""
    vector, difference = result.vector, result.difference
    rows = [("vector", vector.id)]
    for name in dict.fromkeys([*([group.clause] if group else []), *vector.clauses]):
        found = clause(name)
        rows.append(("clause", f"{name} {found.title}: {found.rule}" if found.title else name))
    if vector.flags:
        rows.append(("flags", ", ".join(vector.flags)))
    rows.append(("about", vector.comment))
    rows += [("input", line) for line in inputs(result)]
    if difference is None:
        rows.append(("errored", result.message))
    else:
        rows.append(("differs", difference.what))
        if difference.expected:
            rows.append(("expected", _pair(difference.expected, difference.expected_value)))
            rows.append(("got", _pair(difference.got, difference.got_value)))
        sent = result.answer is not None and bool(result.answer.steps)
        rows += _steps(difference, sent)
    looks = sorted(result.looks_like, key=lambda name: group is None or name != group.flag)
    for name in looks[:1]:
        others = f" (also {', '.join(looks[1:])})" if looks[1:] else ""
        rows.append(("looks like", f"{name}{others}: {flags.get(name, '')}"))
    rows.append(("rerun", rerun(run, result)))
    return rows


def inputs(result: Result) -> list[str]:
    """Return the input of a vector, a line a field; long arrays around the element that differs."""
    vector, difference = result.vector, result.difference
    place = difference.place if difference is not None else None
    fields = values.decode_input(vector.operation, vector.input, vector.id)
    types = OPERATIONS[vector.operation].inputs
    lines, short = [], []
    for name, value in fields.items():
        if isinstance(value, np.ndarray):
            packed = name == "codes"
            at = _place(value.size * (2 if packed else 1), place, block(vector.input))
            lines.append(_array(name, value, at // 2 if packed and at is not None else at))
        elif types[name] == "arrays":
            lines += [_array(f"{name}[{key!r}]", array.reshape(-1), None) for key, array in value.items()]
        elif types[name] == "bytes":
            lines.append(f"{name}: {len(value)} bytes")
        elif types[name] == "files":
            lines += [f"{name}[{path!r}]: {len(data)} bytes" for path, data in value.items()]
        else:
            text = f"{name} {value}"
            short.append(text if len(text) <= 80 else f"{text[:80]}...")
    return lines + [", ".join(short)] * bool(short)


def run_json(run: Run) -> dict[str, Any]:
    """Return a run as one JSON object, of a shape that stays (keys may be added).

    - `specification`, `kit`: versions; `port`: its name; `command`: the arguments that name it.
    - `conforms`, `exit_code`; `broken`: the sentence why the harness is, or null; `seconds`.
    - `claim` (NF4-13.7): what it may be `called`, the `operations` in which it conforms, what it `skipped`.
    - `counts`: vectors by outcome (passed, failed, errored, skipped); `clauses`: the same by clause.
    - `operations`: `offered` and `not_offered`, names; `remarks` and `stale`, sentences.
    - `results`: for each vector `id`, `operation`, `clauses`, `flags`, `outcome`, `message` (why it was
      skipped, errored or failed), `known`, `looks_like` (flags), `rerun` and, where it failed, `difference`:
      `kind` (refusal, length, value), `what`, `field`, `index`, `count`, `total`, `expected` and `got` (bits)
      with `expected_value` and `got_value`, `step` (the first that differs, or null) and `steps` (those
      expected there).
    - `defects`: what histories of calls of a layer show, each with `title`, `steps` and `detail`.
    - `groups`: failures by `flag` ("": none) and the `clause` that breaks, with their `ids`.
    - `search`: `seed`, `seconds`, `operations` and `found`: results with `input`, `output` and `refused`
      besides, one of the last two null.
    """
    return {
        "specification": VERSION,
        "kit": __version__,
        "port": run.port,
        "command": list(run.subject),
        "conforms": run.exit_code == 0,
        "exit_code": run.exit_code,
        "broken": run.broken,
        "seconds": round(run.seconds, 3),
        "claim": {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(claim(run)).items()},
        "counts": {outcome: run.count(outcome) for outcome in OUTCOMES},
        "clauses": tally(result for result in run.results if not result.found),
        "operations": {"offered": run.offered, "not_offered": run.not_offered},
        "remarks": run.remarks,
        "stale": run.stale,
        "defects": [{"title": d.title, "steps": list(d.steps), "detail": d.detail} for d in run.defects],
        "groups": [
            {"flag": g.flag, "clause": g.clause, "ids": [result.vector.id for result in g.results]}
            for g in groups(run.results)
        ],
        "results": [_result_json(run, result) for result in run.results if not result.found],
        "search": {
            "seed": run.seed,
            "seconds": round(run.search_seconds, 3),
            "operations": run.searched,
            "found": [
                _result_json(run, result)
                | {"input": result.vector.input, "output": result.vector.output}
                | {"refused": result.vector.refused}
                for result in run.results
                if result.found
            ],
        },
    }


def as_html(run: Run, flags: Mapping[str, str], date: str) -> str:
    """Return a run as a page that needs no other file: by clause, details folded, dark or light."""
    esc = html.escape
    by_clause: dict[str, list[Result]] = {}
    for result in run.results:
        for name in result.vector.clauses:
            by_clause.setdefault(name, []).append(result)
    state = ("good", "bad", "bad")[run.exit_code]
    out = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>NF4 conformance: {esc(run.port)}</title><style>{_CSS}</style></head><body><main>",
        f"<h1>NF4 conformance: {esc(run.port)}</h1>",
        f'<p class="{state}"><strong>{esc(verdict(run))}</strong></p>',
        f"<p>Specification {esc(VERSION)}, nf4 {esc(__version__)}, {esc(date)}; "
        f"<code>{esc(shlex.join(['nf4', 'conform', *run.options, *run.subject]))}</code></p>",
    ]
    out += [f'<p class="good">{esc(line)}</p>' for line in [str(claim(run))] if line]
    out += [f'<p class="bad">{esc(sentence)}</p>' for sentence in run.stale]
    out += [f'<pre class="bad">{esc(defect.report())}</pre>' for defect in run.defects]
    out += [f"<p>{esc(line)}</p>" for line in notes(run).replace("\n  ", " ").splitlines()]
    bugs = [group for group in groups(result for result in run.results if result.bad) if group.flag]
    if bugs:
        out.append("<h2>Bugs it looks like</h2><ul>")
        for group in bugs:
            head = f"<strong>{esc(group.flag)}</strong> ({esc(group.clause)}, {len(group.results)} failed)"
            out.append(f"<li>{head}: {esc(flags.get(group.flag, ''))}</li>")
        out.append("</ul>")
    out.append("<h2>By clause</h2>")
    for name in sorted(by_clause, key=_numbers):
        results = by_clause[name]
        counts = Counter(result.outcome for result in results)
        bad = any(result.bad for result in results)
        out.append(f'<details class="clause"><summary><b>{esc(name)}</b> {esc(clause(name).title)} ')
        shown = [o for o in OUTCOMES if counts[o]]
        out += [f'<span class="{_class(o, bad)}">{counts[o]} {o}</span>' for o in shown]
        out.append(f"</summary><p>{esc(clause(name).rule)}</p>")
        for result in sorted(results, key=lambda result: (not result.bad, OUTCOMES.index(result.outcome))):
            out += _result_html(run, result, flags)
        out.append("</details>")
    out.append("</main></body></html>")
    return "\n".join(out) + "\n"


def _result_html(run: Run, result: Result, flags: Mapping[str, str]) -> list[str]:
    esc = html.escape
    label = f'<span class="{_class(result.outcome, result.bad)}">{result.outcome}</span> '
    known = " (known)" if result.known and result.outcome in {"failed", "errored"} else ""
    head = f"{label}<code>{esc(result.vector.id)}</code>{known} {esc(result.vector.comment)}"
    if result.outcome == "passed":
        return [f"<div>{head}</div>"]
    if result.outcome == "skipped":
        return [f"<div>{head} <em>{esc(result.message)}</em></div>"]
    rows = details(run, result, flags)
    cells = "".join(f"<tr><th>{esc(name)}</th><td>{esc(text)}</td></tr>" for name, text in rows)
    return [f"<details><summary>{head}</summary><table>{cells}</table></details>"]


def _class(outcome: str, bad: bool) -> str:
    return {"passed": "good", "skipped": "skip"}.get(outcome, "bad" if bad else "skip")


def _result_json(run: Run, result: Result) -> dict[str, Any]:
    vector = result.vector
    answer: dict[str, Any] = {
        "id": vector.id,
        "operation": vector.operation,
        "clauses": list(vector.clauses),
        "flags": list(vector.flags),
        "outcome": result.outcome,
        "message": result.message,
        "known": result.known,
        "looks_like": list(result.looks_like),
        "rerun": rerun(run, result),
    }
    if result.difference is not None:
        answer["difference"] = asdict(result.difference)
    return answer


def _steps(difference: Difference, sent: bool) -> list[tuple[str, str]]:
    """What is known of the steps; sent: whether the port answered any."""
    rows = []
    agree = difference.agree
    if len(agree) > _FEW:
        rows.append(("agree", f"the {len(agree)} steps from {agree[0]} to {agree[-1]}"))
    elif agree:
        rows.append(("agree", f"the steps {', '.join(agree)}"))
    if difference.step is not None:
        step = difference.step
        want, got = _pair(step.expected, step.expected_value), _pair(step.got, step.got_value)
        rows.append(
            ("step", f"the first that differs is {step.name}[{step.index}]: expected {want}, got {got}")
        )
    elif difference.steps:
        hint = "" if sent else "; a port that answers `steps` is told the first that differs (NF4-13.3)"
        rows.append(("on the way", ", ".join(_expected(step) for step in difference.steps) + hint))
    return rows


def _expected(step: Step) -> str:
    return f"{step.name}[{step.index}] = {_pair(step.expected, step.expected_value)}"


def _pair(bits: str, value: str) -> str:
    return f"{bits} ({value})" if value else bits


def _place(length: int, place: tuple[int, int] | None, block_size: int | None) -> int | None:
    if place is None:
        return None
    at = position(length, place[0], place[1], block_size)
    return at if at is not None and at < length else None


def _array(name: str, array: NDArray[Any], at: int | None) -> str:
    """Show an array as bits and numbers: whole, if short, or around the element `at`, which is marked."""
    start, stop = 0, array.size
    if array.size > _WHOLE:
        start = max(0, min((at or 0) - _AROUND, array.size - 2 * _AROUND - 1))
        stop = min(array.size, start + 2 * _AROUND + 1)
    shown = []
    for i in range(start, stop):
        text = _pair(values.to_hex(array[i : i + 1]), show(array[i]))
        shown.append(f"-> {text} <-" if i == at and array.size > 1 else text)
    head = f"{name}, {array.dtype}[{array.size}]"
    where = f" from element {start}" if start else ""
    before, after = "..., " * (start > 0), ", ..." * (stop < array.size)
    return f"{head}{where}: {before}{', '.join(shown)}{after}" if shown else head


def _numbers(name: str) -> list[int]:
    return [int(part) for part in name.removeprefix("NF4-").split(".")]


_WRAP: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False}


def _block(title: str, rows: Sequence[tuple[str, str]]) -> str:
    """A title over indented rows; a label that repeats is written once. A line to copy is not wrapped."""
    lines = textwrap.wrap(title, WIDTH, subsequent_indent="  ", **_WRAP)
    label_before = ""
    for label, text in rows:
        head = f"  {'' if label == label_before else label:<11}"
        label_before = label
        if label == "rerun":
            lines.append(head + text)
        else:
            lines += textwrap.wrap(
                text, WIDTH, initial_indent=head, subsequent_indent=" " * len(head), **_WRAP
            ) or [head.rstrip()]
    return "\n".join(lines) + "\n"


_CSS = """
:root { color-scheme: light dark; --good: #1a7f37; --bad: #cf222e; --skip: #6e7781; --line: #d0d7de; }
@media (prefers-color-scheme: dark) {
  :root { --good: #3fb950; --bad: #ff7b72; --skip: #9198a1; --line: #3d444d; }
}
body { font: 15px/1.5 system-ui, sans-serif; margin: 0; }
main { max-width: 68rem; margin: 0 auto; padding: 1rem; }
code, td { font-family: ui-monospace, monospace; font-size: 0.9em; overflow-wrap: anywhere; }
.good { color: var(--good); } .bad { color: var(--bad); } .skip { color: var(--skip); }
.clause { border-top: 1px solid var(--line); padding: 0.3rem 0; }
.clause > :not(summary) { margin-left: 1.2rem; }
summary { cursor: pointer; } summary span { margin-left: 0.5em; }
th { text-align: left; vertical-align: top; padding-right: 1em; font-weight: 600; white-space: nowrap; }
"""
