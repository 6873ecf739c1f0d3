"""The vectors of spec/vectors: read, written in their canonical form, and checked (NF4-13.1)."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nf4.conform.operations import OPERATIONS
from nf4.conform.values import decode_input, decode_output, decode_steps, from_hex, python_arguments
from nf4.errors import InputError
from nf4.formats.files import read_json

_PACKAGE = Path(__file__).parents[1]
_INSTALLED = _PACKAGE / "spec"

SPECIFICATION = _INSTALLED if _INSTALLED.is_dir() else _PACKAGE.parents[1] / "spec"
"""The directory of the specification: in the package or, in a checkout, beside reference/."""

VECTORS = SPECIFICATION / "vectors"
VERSION = (SPECIFICATION / "VERSION").read_text("utf-8").strip()
"""The version of the specification that these vectors are of."""

FLAGS_FILE = "flags.json"
SCHEMA_FILES = ("vectors.schema.json", "protocol.schema.json")
FIELDS = ("id", "clauses", "flags", "comment", "input", "output", "refused", "steps", "tolerance")

_SLUG = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
_FLAG = re.compile(r"([A-Z][a-z0-9]*)+")
_CLAUSE = re.compile(r"NF4-\d+\.\d+")


@dataclass(frozen=True)
class Vector:
    """One input with the output that NF4 demands, or the sentence why it is to be refused (NF4-13.1).

    The values of input, output, steps and tolerance are those of the JSON: hexadecimal strings.
    """

    id: str
    operation: str
    clauses: tuple[str, ...]
    flags: tuple[str, ...]
    comment: str
    input: dict[str, Any]
    output: dict[str, Any] | None = None
    refused: str | None = None
    steps: dict[str, Any] = field(default_factory=dict)
    tolerance: dict[str, str] = field(default_factory=dict)

    @property
    def bounds(self) -> dict[str, float]:
        """The bound by output field that need not be exact: the vector's own, or that of its operation."""
        own = {name: float(from_hex(text, "float64", name)[0]) for name, text in self.tolerance.items()}
        return OPERATIONS[self.operation].tolerance | own


def load(directory: Path | None = None) -> list[Vector]:
    """Return the vectors of all operations, in the order of the table and of their files.

    Raises InputError, naming the file, the vector and the field, on whatever lint would find but its form.
    """
    directory = directory or VECTORS
    vectors: list[Vector] = []
    for path in _files(directory):
        vectors += _parse(path)
    problem = next(_contradictions(vectors, flags(directory), directory), None)
    if problem is not None:
        raise InputError(problem)
    return vectors


def flags(directory: Path | None = None) -> dict[str, str]:
    """Return the classes of bugs: name to one sentence. Raises InputError where flags.json is not that."""
    path = (directory or VECTORS) / FLAGS_FILE
    value = _read(path)
    for name, sentence in value.items():
        if not _FLAG.fullmatch(name) or not isinstance(sentence, str) or not sentence.endswith("."):
            raise InputError(
                f"{path}: flag {name!r} must be a name in CamelCase with a sentence, not {sentence!r}"
            )
    return value


def lint(directory: Path | None = None) -> list[str]:
    """Return a sentence for each thing wrong with the vectors of a directory, none if all is well.

    Beside what load refuses: files in another form than the canonical one, flags and files nobody uses.
    """
    directory = directory or VECTORS
    problems: list[str] = []
    vectors: list[Vector] = []
    try:
        known = flags(directory)
        paths = _files(directory)
    except InputError as error:
        return [str(error)]
    for path in paths:
        try:
            mine = _parse(path)
        except InputError as error:
            problems.append(str(error))
            continue
        vectors += mine
        if path.read_bytes() != canonical(path.stem, mine):
            problems.append(f"{path}: not in canonical form; write it with python -m nf4.conform.generate")
    problems += _contradictions(vectors, known, directory)
    used = {flag for vector in vectors for flag in vector.flags}
    problems += [
        f"{directory / FLAGS_FILE}: no vector has the flag {flag}; add one or remove it"
        for flag in known
        if flag not in used
    ]
    if (directory / FLAGS_FILE).read_bytes() != canonical_flags(known):
        problems.append(f"{directory / FLAGS_FILE}: not in canonical form; sort the flags, one a line")
    expected = {FLAGS_FILE, *SCHEMA_FILES, *(path.name for path in paths)}
    problems += [
        f"{path}: no operation has this name; remove the file"
        for path in sorted(directory.iterdir())
        if path.name not in expected
    ]
    return problems


def canonical(operation: str, vectors: list[Vector]) -> bytes:
    """Return the file of an operation's vectors in canonical form (NF4-13.1)."""
    lines = [f' "specification": {_line(VERSION)},', f' "operation": {_line(operation)},', ' "vectors": [']
    written = []
    for vector in vectors:
        fields = []
        for name in FIELDS:
            value = getattr(vector, name)
            if value is None or (name in {"steps", "tolerance"} and not value):
                continue
            if isinstance(value, dict):
                inner = ",\n".join(f"    {_line(key)}: {_line(item)}" for key, item in value.items())
                fields.append(f"   {_line(name)}: {{\n{inner}\n   }}" if value else f"   {_line(name)}: {{}}")
            else:
                fields.append(f"   {_line(name)}: {_line(value)}")
        written.append("  {\n" + ",\n".join(fields) + "\n  }")
    return "\n".join(["{", *lines, ",\n".join(written), " ]", "}", ""]).encode()


def canonical_flags(known: dict[str, str]) -> bytes:
    """Return flags.json in canonical form: by name, one a line."""
    lines = [f" {_line(name)}: {_line(known[name])}" for name in sorted(known)]
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode()


def _line(value: Any) -> str:
    return json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False, allow_nan=False)


def _files(directory: Path) -> list[Path]:
    paths = [directory / f"{operation}.json" for operation in OPERATIONS]
    found = [path for path in paths if path.exists()]
    if not found:
        raise InputError(f"{directory}: no vectors here; name a directory such as spec/vectors")
    return found


def _read(path: Path) -> dict[str, Any]:
    def fraction(text: str) -> Any:
        raise InputError(f"{path}: has the number {text}; write its bits in hexadecimal")

    return read_json(path, fraction)


def _parse(path: Path) -> list[Vector]:
    """Read one file; what is wrong inside one vector is an InputError with its id."""
    value = _read(path)
    if list(value) != ["specification", "operation", "vectors"] or not isinstance(value["vectors"], list):
        raise InputError(f"{path}: must hold specification, operation and a list of vectors, in this order")
    if value["specification"] != VERSION:
        raise InputError(
            f"{path}: is of specification {value['specification']!r}; this kit is of {VERSION!r}"
        )
    if value["operation"] != path.stem:
        raise InputError(
            f"{path}: its operation is {value['operation']!r}; it must be that of the file's name"
        )
    return [_vector(path, number, item) for number, item in enumerate(value["vectors"])]


def _vector(path: Path, number: int, item: Any) -> Vector:
    where = f"{path}: vector {number}"
    if not isinstance(item, dict) or not isinstance(item.get("id"), str):
        raise InputError(f"{where} has no id; every vector needs a permanent slug")
    where = f"{path}: {item['id']}"
    if not _SLUG.fullmatch(item["id"]):
        raise InputError(f"{where}: its id must be a slug of lower-case letters, digits and hyphens")
    unknown = [name for name in item if name not in FIELDS]
    if unknown:
        raise InputError(f"{where} has a field {unknown[0]!r}; the fields are {', '.join(FIELDS)}")
    for name, pattern in (("clauses", _CLAUSE), ("flags", _FLAG)):
        names = item.get(name)
        if not isinstance(names, list) or not all(isinstance(n, str) and pattern.fullmatch(n) for n in names):
            raise InputError(f"{where}: {name} is {names!r}; it must be a list of names")
    comment = item.get("comment")
    if not isinstance(comment, str) or not comment.endswith("."):
        raise InputError(f"{where}: comment is {comment!r}; it must be one sentence")
    if ("output" in item) == ("refused" in item):
        raise InputError(f"{where} must have either output or refused")
    operation = path.stem
    given: Any = item.get("input")
    arrays = decode_input(operation, given, where)
    if "output" in item:
        try:
            python_arguments(operation, arrays)  # what doesn't fit its shape can only be refused
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
        decode_output(operation, item["output"], given, where)
    elif not isinstance(item["refused"], str) or not item["refused"]:
        raise InputError(f"{where}: refused is {item['refused']!r}; it must be a sentence")
    decode_steps(operation, item.get("steps", {}), given, where)
    tolerance = item.get("tolerance", {})
    if not isinstance(tolerance, dict):
        raise InputError(
            f"{where}: tolerance is {tolerance!r}; it must be an object of bounds by output field"
        )
    for name in tolerance:
        if name not in OPERATIONS[operation].tolerance:
            raise InputError(f"{where}: tolerance: {name} of {operation} is exact; remove its bound")
        if from_hex(tolerance[name], "float64", f"{where}: tolerance: {name}").size != 1:
            raise InputError(f"{where}: tolerance: {name} must be the bits of one float64")
    return Vector(
        item["id"],
        operation,
        tuple(item["clauses"]),
        tuple(item["flags"]),
        comment,
        given,
        item.get("output"),
        item.get("refused"),
        item.get("steps", {}),
        tolerance,
    )


def _contradictions(vectors: list[Vector], known: dict[str, str], directory: Path) -> Iterator[str]:
    """What is wrong between vectors: an id twice, a flag that flags.json lacks, no clause."""
    seen: set[str] = set()
    for vector in vectors:
        where = f"{directory / vector.operation}.json: {vector.id}"
        if vector.id in seen:
            yield f"{where}: another vector has this id; every id is used once"
        seen.add(vector.id)
        if not vector.clauses:
            yield f"{where}: names no clause; a vector tests at least one"
        for flag in vector.flags:
            if flag not in known:
                yield f"{where}: flag {flag} is not in {FLAGS_FILE}; add it there with its sentence"
