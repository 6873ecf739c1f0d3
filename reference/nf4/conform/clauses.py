"""The clauses of the specification's text by id: title, kind and first sentence, for reports."""

import re
from functools import cache
from typing import NamedTuple

from nf4.conform.vectors import SPECIFICATION

_HEADING = re.compile(r"^### (NF4-\d+\.\d+) (.+?)(?: \*\((.+?)\)\*)?\n", re.MULTILINE)
_SENTENCE = re.compile(r".+?(?<!\.)\.(?=\s|$)", re.DOTALL)  # an ellipsis ends none
_LONGEST = 300  # characters: a sentence goes on into a list or a formula


class Clause(NamedTuple):
    """One clause: its id, its title, whether it is exact or has a tolerance, and its first sentence."""

    id: str
    title: str
    kind: str
    sentence: str


@cache
def clauses() -> dict[str, Clause]:
    """Return every clause of the text that comes with the package, in its order."""
    found = {}
    for path in sorted(SPECIFICATION.glob("[0-9]*.md")):
        text = path.read_text("utf-8")
        for match in _HEADING.finditer(text):
            paragraph = re.split(r"\n\s*\n|\n#|\*Reason:\*", text[match.end() :], maxsplit=1)[0]
            sentence = _SENTENCE.match(paragraph.strip())
            words = " ".join((sentence[0] if sentence else paragraph).split())
            words = words if len(words) <= _LONGEST else f"{words[:_LONGEST]}..."
            found[match[1]] = Clause(match[1], match[2], match[3] or "", words)
    return found


def clause(id: str) -> Clause:
    """Return the clause of that id; one without a title where the text has none, as of another version."""
    return clauses().get(id, Clause(id, "", "", ""))
