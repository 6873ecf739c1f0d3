"""The text and the code name the same clauses: each cited one exists, each normative one has its code."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
HEADING = re.compile(r"^### (NF4-\d+\.\d+) .+?(?: \*\((.+?)\)\*)?$", re.MULTILINE)
CITED = re.compile(r"NF4-\d+\.\d+")
# Rules for the reader of the other clauses; no function implements them.
CONVENTIONS = "NF4-1."


def headings() -> list[tuple[str, str]]:
    found = []
    for path in sorted((ROOT / "spec").glob("*.md")):
        chapter = path.name.split("-")[0].lstrip("0")
        for clause, kind in HEADING.findall(path.read_text("utf-8")):
            assert clause.startswith(f"NF4-{chapter}."), f"{clause} stands in {path.name}"
            found.append((clause, kind))
    return found


def code() -> str:
    return "".join(path.read_text("utf-8") for path in (ROOT / "reference").rglob("*.py"))


def cited(text: str) -> set[str]:
    ranges = re.findall(r"NF4-(\d+)\.(\d+) to (?:NF4-)?\d*\.?(\d+)\b", text)
    return set(CITED.findall(text)) | {
        f"NF4-{chapter}.{n}" for chapter, first, last in ranges for n in range(int(first), int(last) + 1)
    }


def test_clauses_are_numbered_in_order_and_once() -> None:
    clauses = [clause for clause, _ in headings()]
    assert clauses == sorted(set(clauses), key=lambda c: [int(n) for n in c[4:].split(".")])


def test_every_cited_clause_exists() -> None:
    spec = "".join(path.read_text("utf-8") for path in (ROOT / "spec").glob("*.md"))
    tests = "".join(path.read_text("utf-8") for path in (ROOT / "tests").rglob("*.py"))
    readme = (ROOT / "README.md").read_text("utf-8")
    known = {clause for clause, _ in headings()}
    assert cited(spec + code() + tests + readme) <= known


def test_every_normative_clause_has_its_code() -> None:
    normative = {c for c, kind in headings() if kind != "informative" and not c.startswith(CONVENTIONS)}
    assert normative - cited(code()) == set()
