"""Text, code, vectors and tests name the same clauses: a link that is missing, either way, fails."""

import ast
import json
import math
import re
from functools import cache
from pathlib import Path

import pytest
from nf4.conform import operations
from nf4.conform.operations import OPERATIONS
from nf4.conform.vectors import VERSION

ROOT = Path(__file__).parent.parent
SPEC = ROOT / "spec"
HEADING = re.compile(r"^### (NF4-(\d+)\.\d+) (.+?) \*\((exact|informative|tolerance: .+)\)\*$")
CITED = re.compile(r"NF4-\d+\.\d+")
NUMBER = re.compile(r"2\^-\d+|\d+e-\d+")
CONVENTIONS = ("1", "13")  # chapters: rules for the reader and the kit, which no function implements

# Fields that several operations share, by the names that stand for them in the table of NF4-13.3.
LAYER = {name: kind for name, kind in operations._LAYER.items() if name not in ("codes", "absmax", "bias")}
GROUPS = {
    "LAYER": LAYER,
    "TENSOR": operations._TENSOR,
    "NESTED": operations._NESTED,
    "DRAW": operations._DRAW,
    "ADAMW": operations._ADAMW,
}


@cache
def chapters() -> dict[str, str]:
    """The text of each chapter by its number."""
    paths = sorted(SPEC.glob("[0-9]*.md"))
    return {path.name.split("-")[0].lstrip("0"): path.read_text("utf-8") for path in paths}


@cache
def clauses() -> dict[str, tuple[str, str]]:
    """Kind and text of each clause by its id, in the order of the text."""
    found: dict[str, tuple[str, str]] = {}
    for chapter, text in chapters().items():
        for part in re.split(r"^(?=### )", text, flags=re.MULTILINE)[1:]:
            heading, _, body = part.partition("\n")
            match = HEADING.fullmatch(heading)
            assert match, f"chapter {chapter}: {heading!r} is no clause with one of the three kinds"
            assert match[2] == chapter, f"{match[1]} stands in chapter {chapter}"
            assert match[1] not in found, f"{match[1]} is there twice"
            found[match[1]] = match[4], body
    return found


def normative() -> set[str]:
    """The clauses that functions implement and vectors test."""
    return {
        clause
        for clause, (kind, _) in clauses().items()
        if kind != "informative" and clause[4:].split(".")[0] not in CONVENTIONS
    }


def cited(text: str) -> set[str]:
    """Every clause that a text names, those inside a range `NF4-3.2 to NF4-3.4` too."""
    ranges = re.findall(r"NF4-(\d+)\.(\d+)\s+to\s+NF4-\1\.(\d+)\b", text)
    return set(CITED.findall(text)) | {
        f"NF4-{chapter}.{n}" for chapter, first, last in ranges for n in range(int(first), int(last) + 1)
    }


def docstrings() -> str:
    """What the docstrings of the reference say, also those under a constant; without kit and nf4.testing."""
    found = []
    for path in (ROOT / "reference").rglob("*.py"):
        if "conform" not in path.parts and path.name != "testing.py":
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                    found.append(str(node.value.value))
    return "\n".join(found)


def vectors() -> list[dict[str, object]]:
    return [
        vector
        for path in sorted((SPEC / "vectors").glob("*.json"))
        for vector in json.loads(path.read_text("utf-8")).get("vectors", [])
    ]


def test_clauses_are_numbered_from_one_without_a_gap() -> None:
    for chapter in chapters():
        numbers = [int(c.split(".")[1]) for c in clauses() if c.startswith(f"NF4-{chapter}.")]
        assert numbers == list(range(1, len(numbers) + 1)), f"chapter {chapter}"


@pytest.mark.parametrize("clause", clauses())
def test_a_clause_has_its_kind_its_reason_and_its_bound(clause: str) -> None:
    kind, body = clauses()[clause]
    assert body.count("*Reason:*") == 1, "one sentence after *Reason:* says why"
    assert "*Libraries:*" not in body, "the word is *Elsewhere:*"
    for _, text in re.findall(
        r"\*(Reason|Elsewhere):\*\s+(\S.*?)(?=\*(?:Reason|Elsewhere):\*|\n\n|\Z)", body, re.DOTALL
    ):
        assert text.strip().endswith("."), "a note is a sentence"
    if kind.startswith("tolerance"):
        assert NUMBER.search(kind), "a tolerance has a number"


def test_every_cited_clause_exists() -> None:
    texts = [*SPEC.rglob("*.md"), *SPEC.rglob("*.json"), ROOT / "README.md"]
    for folder in ("reference", "tests", "ports", "examples", "gpu", ".ci"):
        for ending in ("*.py", "*.md", "*.js", "*.mjs", "*.rs", "*.cpp", "*.cu", "*.cuh", "*.h"):
            texts += (ROOT / folder).rglob(ending)
    for path in texts:
        assert cited(path.read_text("utf-8")) <= clauses().keys(), path


def test_every_cited_chapter_exists() -> None:
    for path in [*(ROOT / "reference").rglob("*.py"), *SPEC.glob("*.md"), ROOT / "README.md"]:
        assert set(re.findall(r"NF4-(\d+)", path.read_text("utf-8"))) <= chapters().keys(), path


def test_every_normative_clause_has_its_function() -> None:
    """Named in full, not inside a range: who searches for the id finds it."""
    assert normative() - set(CITED.findall(docstrings())) == set()


def test_every_normative_clause_has_its_vector() -> None:
    tested = {str(clause) for vector in vectors() for clause in vector["clauses"]}  # type: ignore[attr-defined]
    assert normative() - tested == set()


def test_every_normative_clause_of_an_operation_is_one() -> None:
    for name, operation in OPERATIONS.items():
        for clause in operation.clauses:
            assert clause in clauses() or clause[4:] in chapters(), f"{name}: {clause}"


@pytest.mark.parametrize("name", [name for name, operation in OPERATIONS.items() if operation.tolerance])
def test_the_bounds_of_operations_are_those_of_their_clauses(name: str) -> None:
    operation = OPERATIONS[name]
    stated = {
        2.0 ** int(n[2:]) if n.startswith("2^") else float(n)
        for clause in operation.clauses
        if clause in clauses()
        for n in NUMBER.findall(clauses()[clause][0])
    }
    assert set(operation.tolerance.values()) <= stated


def fields(
    types: dict[str, str], optional: frozenset[str] = frozenset(), bounds: dict[str, float] | None = None
) -> str:
    """Fields as the table shows them: the shared ones by the name of their group."""
    shown, left = [], dict(types)
    for group, members in GROUPS.items():
        if members.items() <= left.items() and not optional & members.keys():
            shown.append(group)
            left = {name: kind for name, kind in left.items() if name not in members}
    for name, kind in left.items():
        text = f"`{name}`{'?' if name in optional else ''} {kind}"
        if bounds and name in bounds:
            text += f" within {shown_bound(bounds[name])}"
        shown.append(text)
    return ", ".join(shown)


def shown_bound(bound: float) -> str:
    mantissa, exponent = math.frexp(bound)
    return f"2^{exponent - 1}" if mantissa == 0.5 else f"{bound:.0e}".replace("e-0", "e-")


def table() -> str:
    """The table of operations, as NF4-13.3 has to show it."""
    rows = ["| operation | clauses | input | output | steps |", "|---|---|---|---|---|"]
    for name, operation in OPERATIONS.items():
        inputs = fields(operation.inputs, operation.optional)
        outputs = fields(operation.outputs, bounds=operation.tolerance)
        clauses_ = ", ".join(clause.removeprefix("NF4-") for clause in operation.clauses)
        rows.append(f"| `{name}` | {clauses_} | {inputs} | {outputs} | {fields(operation.steps)} |")
    return "\n".join(rows)


def groups() -> str:
    rows = ["| name | fields |", "|---|---|"]
    for group, members in GROUPS.items():
        inner = ", ".join(
            f"`{name}` {kind}"
            for name, kind in members.items()
            if group != "LAYER" or name not in operations._TENSOR
        )
        rows.append(f"| {group} | {inner}{', and TENSOR' if group == 'LAYER' else ''} |")
    return "\n".join(rows)


@pytest.mark.parametrize("part", [table, groups])
def test_the_table_of_operations_is_in_the_text(part: object) -> None:
    expected = part()  # type: ignore[operator]
    assert expected in chapters()["13"], f"NF4-13.3 must show this table:\n{expected}"


def test_the_version_is_one() -> None:
    version = (SPEC / "VERSION").read_text("utf-8").strip()
    assert version == VERSION
    assert re.fullmatch(r"\d+\.\d+\.\d+", version)
    newest = re.search(r"^## (\S+)", (SPEC / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    assert newest
    assert newest[1] == version


def test_the_introduction_lists_every_chapter() -> None:
    linked = re.findall(r"\]\((\d\d-[a-z0-9-]+\.md)\)", (SPEC / "README.md").read_text("utf-8"))
    assert linked == [path.name for path in sorted(SPEC.glob("[0-9]*.md"))]
