"""The clauses of the specification's text by id: title, kind and the beginning of its rule, for reports."""

import re
from functools import cache
from typing import NamedTuple

from nf4.conform.vectors import SPECIFICATION

_HEADING = re.compile(r"^### (NF4-\d+\.\d+) (.+?)(?: \*\((.+?)\)\*)?\n", re.MULTILINE)
_SENTENCE = re.compile(r".+?(?<!\.)(?<! \d)\.(?=\s|$)", re.DOTALL)  # no ellipsis, and no item of a list
_NOTES = re.compile(r"\*Reason:\*|^#", re.MULTILINE)
_TABLE = re.compile(r"(^\|.*\n)+", re.MULTILINE)
_FENCE = re.compile(r"^```.*\n", re.MULTILINE)
_LONGEST = 300  # characters of a rule


class Clause(NamedTuple):
    """One clause: id, title, whether it is exact or has a tolerance, and the beginning of its rule."""

    id: str
    title: str
    kind: str
    rule: str


@cache
def clauses() -> dict[str, Clause]:
    """Return every clause of the text that comes with the package, in its order."""
    found = {}
    for path in sorted(SPECIFICATION.glob("[0-9]*.md")):
        text = path.read_text("utf-8")
        for match in _HEADING.finditer(text):
            rule = _NOTES.split(text[match.end() :], maxsplit=1)[0]
            rule = _FENCE.sub("", _TABLE.sub("... ", rule))
            found[match[1]] = Clause(match[1], match[2], match[3] or "", _begin(" ".join(rule.split())))
    return found


def _begin(rule: str) -> str:
    """The first sentences of a rule, as many as fit; of a longer one, its first words."""
    if len(rule) <= _LONGEST:
        return rule
    ends = [match.end() for match in _SENTENCE.finditer(rule) if match.end() <= _LONGEST]
    return rule[: ends[-1]] if ends else f"{rule[:_LONGEST].rpartition(' ')[0]} ..."


def clause(id: str) -> Clause:
    """Return the clause of that id; one without a title where the text has none, as of another version."""
    return clauses().get(id, Clause(id, "", "", ""))
