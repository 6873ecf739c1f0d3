"""The vector files: as generated, sound, complete by clause, as the schemas say; and what the lint finds."""

import configparser
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import jsonschema
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from nf4.conform.clauses import clauses
from nf4.conform.generate.__main__ import contents, main
from nf4.conform.operations import OPERATIONS
from nf4.conform.values import (
    DTYPES,
    decode_input,
    decode_output,
    decode_steps,
    encode_input,
    encode_output,
    from_hex,
    python_arguments,
    to_hex,
)
from nf4.conform.vectors import SCHEMA_FILES, SPECIFICATION, VECTORS, Vector, canonical, flags, lint, load
from nf4.errors import InputError

ROOT = Path(__file__).parents[2]
CODEC = (
    *("codebook", "widen", "narrow", "quantize", "dequantize", "storage"),
    *("encode_absmax", "decode_absmax", "quantize_double", "dequantize_double"),
)
Json = dict[str, Any]


def schema(name: str) -> Json:
    value: Json = json.loads((VECTORS / name).read_text("utf-8"))
    return value


@pytest.fixture(scope="module")
def stored() -> list[Vector]:
    return load()


# As generated


def test_the_stored_files_are_those_the_command_writes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    written = contents()
    monkeypatch.setattr("nf4.conform.generate.__main__.contents", lambda: written)
    assert main(["--check"]) == 0
    (tmp_path / "copy").mkdir()
    copy = Path(shutil.copytree(VECTORS, tmp_path / "copy", dirs_exist_ok=True))
    path = copy / "narrow.json"
    text = path.read_text("utf-8")
    path.write_text(text.replace("7fc0", "7fc1", 1), "utf-8")
    (copy / "widen.json").unlink()
    capsys.readouterr()
    assert main(["--check", "--directory", str(copy)]) == 1
    said = capsys.readouterr().out
    assert f"{path}: differs" in said
    assert f"{copy / 'widen.json'}: is missing" in said
    assert "7fc1" in path.read_text("utf-8"), "--check must write nothing"
    assert main(["--directory", str(copy)]) == 0
    assert path.read_text("utf-8") == text
    assert main(["--check", "--directory", str(copy)]) == 0


def test_the_stored_files_are_sound() -> None:
    assert lint() == []


def test_they_are_small_enough_to_vendor() -> None:
    sizes = {path.stem: path.stat().st_size for path in VECTORS.iterdir()}
    assert sum(sizes.values()) < 2_100_000
    assert sum(sizes[operation] for operation in CODEC) < 1_200_000


# Complete


def test_every_normative_clause_has_a_vector(stored: list[Vector]) -> None:
    """But for chapter 13, which the kit itself tests."""
    cited = {clause for vector in stored for clause in vector.clauses}
    assert cited <= clauses().keys()
    normative = {
        c.id for c in clauses().values() if c.kind != "informative" and not c.id.startswith("NF4-13.")
    }
    assert normative - cited == set()


def test_every_operation_has_a_vector_and_every_refusal_a_reason(stored: list[Vector]) -> None:
    assert {vector.operation for vector in stored} == OPERATIONS.keys()
    for vector in stored:
        assert (vector.output is None) == (vector.refused is not None), vector.id
        assert vector.refused is None or vector.refused.endswith("."), vector.id


@pytest.mark.parametrize("book", ["nf4", "fp4", "fp4-e2m1", "int4"])
def test_every_threshold_is_met_from_below_and_above(stored: list[Vector], book: str) -> None:
    vector = next(v for v in stored if v.id == f"{book}-thresholds")
    x = {int(b) for b in from_hex(vector.input["x"], "float32", book).view(np.uint32)}
    table = oracle.codebook(book)
    for threshold in oracle.ranks_of(table)[0]:
        assert {threshold - 1, threshold, threshold + 1} <= x, hex(threshold)


def test_steps_of_quantize_are_those_of_the_oracle(stored: list[Vector]) -> None:
    """The reciprocal of each block, s and its rank, by NF4-3.3 and NF4-3.5 in integers and fractions."""
    checked = 0
    for vector in stored:
        if vector.operation != "quantize" or not vector.steps:
            continue
        steps = decode_steps("quantize", vector.steps, vector.input, vector.id)
        x = from_hex(vector.input["x"], vector.input["dtype"], vector.id).astype(np.float32)
        _, reciprocals, s = oracle.scale([int(b) for b in x.view(np.uint32)], vector.input["block_size"])
        assert steps["reciprocal"].view(np.uint32).tolist() == reciprocals, vector.id
        assert steps["s"].view(np.uint32).tolist() == s, vector.id
        limits = [oracle.value(t) for t in oracle.ranks_of(oracle.codebook(vector.input["codebook"]))[0]]
        assert steps["ranks"].tolist() == [sum(t < oracle.value(b) for t in limits) for b in s], vector.id
        checked += len(s)
    assert checked > 1000


# Values


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(sorted(DTYPES)), st.data())
def test_arrays_keep_every_bit(dtype: str, data: st.DataObject) -> None:
    digits = 2 * DTYPES[dtype].itemsize
    elements = data.draw(st.lists(st.integers(0, 16**digits - 1), max_size=9))
    text = "".join(f"{bits:0{digits}x}" for bits in elements)
    array = from_hex(text, dtype, "x")
    assert array.dtype == DTYPES[dtype]
    assert [int(b) for b in array.view(f"u{digits // 2}")] == elements
    assert to_hex(array) == text
    assert to_hex(array[::-1][::-1].reshape(1, -1)) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("3F800000", r"^x has 'F' at position 1"),
        ("3f80 000", "has ' ' at position 4"),
        ("3f8000", "^x has 6 digits; each element of float32 takes 8"),
        (1.0, "^x is 1.0; it must be a string of hexadecimal digits"),
        (None, "must be a string"),
        ("３f800000", "has '３' at position 0"),
    ],
)
def test_other_strings_are_refused(text: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        from_hex(text, "float32", "x")


FIELDS: Json = {"x": "3f80", "shape": [1], "dtype": "bfloat16", "block_size": 64, "codebook": "nf4"}


def test_what_is_decoded_is_encoded_again(stored: list[Vector]) -> None:
    for vector in stored:
        fields = decode_input(vector.operation, vector.input, vector.id)
        assert encode_input(vector.operation, fields, vector.id) == vector.input
        if vector.output is not None:
            output = decode_output(vector.operation, vector.output, vector.input, vector.id)
            assert encode_output(vector.operation, output, fields, vector.id) == vector.output


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": "3f8"}, "^v: input: x has 3 digits; each element of bfloat16 takes 4"),
        ({"dtype": "float8"}, "^v: input: x has the dtype 'float8'; choose one of float32"),
        ({"dtype": 1}, "has the dtype 1"),
        ({"block_size": 64.0}, "^v: input: block_size is 64.0; it must be an integer"),
        ({"block_size": True}, "block_size is True"),
        ({"block_size": 2**31}, "at most 31 bits"),
        ({"shape": [1.0]}, r"shape is \[1.0\]; it must be a list of integers"),
        ({"shape": 3}, "shape is 3"),
        ({"codebook": None}, "codebook is None; it must be a string"),
        ({"extra": 1}, "^v: input has a field 'extra'; its fields are x, shape"),
    ],
)
def test_fields_of_another_type_are_refused(change: Json, message: str) -> None:
    with pytest.raises(InputError, match=message):
        decode_input("quantize", {**FIELDS, **change}, "v")


def test_missing_fields_are_refused() -> None:
    for name in FIELDS:
        with pytest.raises(InputError, match=f"^v: input has no {name}; it needs x, shape"):
            decode_input("quantize", {key: value for key, value in FIELDS.items() if key != name}, "v")
    with pytest.raises(InputError, match="it must be an object of x, shape"):
        decode_input("quantize", [], "v")  # type: ignore[arg-type]


def test_a_python_port_gets_x_in_its_shape() -> None:
    fields = decode_input("quantize", {**FIELDS, "x": "3f803f003e80", "shape": [1, 3]}, "v")
    arguments = python_arguments("quantize", fields)
    assert sorted(arguments) == ["block_size", "codebook", "x"]
    assert (arguments["x"].shape, arguments["x"].dtype) == ((1, 3), DTYPES["bfloat16"])
    assert python_arguments("widen", {"x": 1, "dtype": "float16"}) == {"x": 1, "dtype": "float16"}


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (
            {"codes": np.zeros(1, np.int64), "absmax": np.ones(1, np.float32)},
            "codes is of dtype int64; it must be uint8",
        ),
        ({"codes": np.zeros(1, np.uint8), "absmax": 1.0}, "absmax is of dtype float64"),
        ({"codes": np.zeros(1, np.uint8)}, "has no absmax"),
    ],
)
def test_outputs_of_another_dtype_are_refused(output: Json, message: str) -> None:
    with pytest.raises(InputError, match=message):
        encode_output("quantize", output, FIELDS, "v")


# The lint


def few_files(directory: Path) -> Path:
    """A directory of two operations, quick to check."""
    copy = directory / "vectors"
    copy.mkdir()
    for name in ("codebook.json", "storage.json", "flags.json"):
        shutil.copy(VECTORS / name, copy)
    return copy


def rewritten(directory: Path, change: Callable[[Json], object]) -> list[str]:
    """What the lint says after a change to the file of codebook, which is otherwise in canonical form."""
    copy = few_files(directory)
    path = copy / "codebook.json"
    value = json.loads(path.read_text("utf-8"))
    change(value)
    path.write_text(json.dumps(value), "utf-8")
    return [problem for problem in lint(copy) if "canonical" not in problem]


def first(value: Json) -> Json:
    vector: Json = value["vectors"][0]
    return vector


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.update(extra=1), "must hold specification, operation and a list of vectors"),
        (lambda v: v.update(specification="9.9.9"), "is of specification '9.9.9'"),
        (lambda v: v.update(operation="widen"), "its operation is 'widen'"),
        (lambda v: v.update(vectors={}), "a list of vectors"),
        (lambda v: v["vectors"].append(3), "vector 5 has no id"),
        (lambda v: first(v).pop("id"), "vector 0 has no id"),
        (lambda v: first(v).update(id="Not a slug"), "Not a slug: its id must be a slug"),
        (lambda v: first(v).update(id="codebook-int4"), "codebook-int4: another vector has this id"),
        (lambda v: first(v).update(id="storage-0-by-64"), "storage-0-by-64: another vector has this id"),
        (lambda v: first(v).update(note=""), "codebook-nf4 has a field 'note'"),
        (lambda v: first(v).update(clauses="NF4-2.1"), "clauses is 'NF4-2.1'; it must be a list"),
        (lambda v: first(v).update(clauses=["2.1"]), "clauses is"),
        (lambda v: first(v).update(clauses=[]), "codebook-nf4: names no clause"),
        (lambda v: first(v).update(flags=["NotAFlag"]), "flag NotAFlag is not in flags.json"),
        (lambda v: first(v).update(comment="No end"), "comment is 'No end'; it must be one sentence"),
        (lambda v: first(v).update(refused="No."), "must have either output or refused"),
        (lambda v: first(v).pop("output"), "must have either output or refused"),
        (lambda v: first(v).pop("input"), "codebook-nf4: input is None"),
        (
            lambda v: first(v)["output"].update(values="3F"),
            "codebook-nf4: output: values has 'F' at position 1",
        ),
        (lambda v: first(v)["output"].pop("values"), "codebook-nf4: output has no values"),
        (lambda v: first(v).update(steps={"s": ""}), "codebook-nf4: steps has a field 's'"),
        (
            lambda v: first(v).update(tolerance={"values": "3ff0000000000000"}),
            "tolerance: values of codebook is exact",
        ),
        (lambda v: first(v).update(tolerance=[]), r"tolerance is \[\]"),
        (lambda v: first(v)["input"].update(codebook=1.5), "codebook.json: has the number 1.5"),
    ],
)
def test_the_lint_finds(tmp_path: Path, change: Callable[[Json], object], message: str) -> None:
    problems = rewritten(tmp_path, change)
    assert len(problems) >= 1
    assert re.search(message, problems[0]), problems
    with pytest.raises(InputError, match=message):
        load(tmp_path / "vectors")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not valid JSON"),
        ("[]", "expected a JSON object, found list"),
        ('{"a": 1, "a": 2}', "the key 'a' occurs twice"),
        ('{"a": NaN}', "NaN is not JSON"),
        ("[" * 100_000, "not valid JSON"),
        ('{"a": "\ud800"}', "not valid JSON"),
    ],
)
def test_the_lint_finds_broken_json(tmp_path: Path, text: str, message: str) -> None:
    copy = few_files(tmp_path)
    (copy / "codebook.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    assert re.search(f"codebook.json: .*{message}", lint(copy)[0])


def test_the_lint_finds_files_and_flags_that_nobody_needs(tmp_path: Path) -> None:
    copy = Path(shutil.copytree(VECTORS, tmp_path / "vectors"))
    path = copy / "codebook.json"
    path.write_bytes(path.read_bytes() + b"\n")
    (copy / "other.json").write_text("{}")
    known = {**flags(copy), "Unused": "Nobody has this bug."}
    (copy / "flags.json").write_text(json.dumps(known))
    problems = lint(copy)
    for expected in (
        f"{path}: not in canonical form",
        "other.json: no operation has this name",
        "no vector has the flag Unused",
        "flags.json: not in canonical form",
    ):
        assert any(expected in problem for problem in problems), expected
    assert len(problems) == 4
    (copy / "flags.json").write_text('{"lower": "No."}')
    assert "flag 'lower' must be a name in CamelCase" in lint(copy)[0]
    (copy / "flags.json").unlink()
    assert "flags.json: can't be read" in lint(copy)[0]
    with pytest.raises(InputError, match="no vectors here; name a directory such as spec/vectors"):
        load(tmp_path)


def test_the_form_is_canonical_and_read_back(stored: list[Vector], tmp_path: Path) -> None:
    mine = [vector for vector in stored if vector.operation == "quantize"]
    text = canonical("quantize", mine)
    assert text == (VECTORS / "quantize.json").read_bytes()
    assert all(line == line.rstrip() for line in text.decode().split("\n"))


def test_a_vector_may_widen_the_bound_of_its_operation(stored: list[Vector]) -> None:
    vector = next(v for v in stored if v.tolerance)
    (name,) = vector.tolerance
    assert vector.bounds[name] == from_hex(vector.tolerance[name], "float64", name)[0]
    plain = next(v for v in stored if v.operation == vector.operation and not v.tolerance)
    assert plain.bounds == OPERATIONS[vector.operation].tolerance


# The schemas


@pytest.fixture(scope="module")
def files() -> jsonschema.Draft202012Validator:
    jsonschema.Draft202012Validator.check_schema(schema("vectors.schema.json"))
    return jsonschema.Draft202012Validator(schema("vectors.schema.json"))


def side(name: str) -> jsonschema.Draft202012Validator:
    protocol = schema("protocol.schema.json")
    jsonschema.Draft202012Validator.check_schema(protocol)
    return jsonschema.Draft202012Validator({"$ref": f"#/$defs/{name}", "$defs": protocol["$defs"]})


def test_the_stored_files_fit_their_schema(files: jsonschema.Draft202012Validator) -> None:
    for path in sorted(VECTORS.glob("*.json")):
        if path.name not in {"flags.json", *SCHEMA_FILES}:
            files.validate(json.loads(path.read_text("utf-8")))


@pytest.mark.parametrize(
    "change",
    [
        lambda v: v.update(extra=1),
        lambda v: v.pop("specification"),
        lambda v: v.update(operation="transmogrify"),
        lambda v: v.update(vectors=[]),
        lambda v: first(v).update(extra=1),
        lambda v: first(v).pop("flags"),
        lambda v: first(v).update(id="No slug"),
        lambda v: first(v).update(clauses=["2.1"]),
        lambda v: first(v).update(refused="No."),
        lambda v: first(v).pop("output"),
        lambda v: first(v)["input"].update(extra=1),
        lambda v: first(v)["input"].pop("x"),
        lambda v: first(v)["input"].update(x="3F800000"),
        lambda v: first(v)["input"].update(x="3f8000"),
        lambda v: first(v)["input"].update(dtype="float16", x="3f800"),
        lambda v: first(v)["input"].update(block_size=64.5),
        lambda v: first(v)["input"].update(shape=[1.5]),
        lambda v: first(v)["output"].update(codes="0"),
        lambda v: first(v)["output"].update(y=""),
        lambda v: first(v)["steps"].update(s="3f"),
        lambda v: first(v)["steps"].update(other=""),
        lambda v: first(v).update(tolerance={"codes": "3ff0000000000000"}),
    ],
)
def test_the_schema_finds(files: jsonschema.Draft202012Validator, change: Callable[[Json], object]) -> None:
    value = json.loads((VECTORS / "quantize.json").read_text("utf-8"))
    del value["vectors"][1:]
    files.validate(value)
    change(value)
    assert not files.is_valid(value)


GOOD_LINES = {
    "asked": [
        {"cmd": "start", "version": 1},
        {"cmd": "stop"},
        {"cmd": "run", "id": "a", "operation": "echo", "input": {"dtype": "float32", "x": "3f800000"}},
        {"cmd": "run", "id": "a", "operation": "quantize", "input": FIELDS},
    ],
    "answered": [
        {"version": 1, "name": "p", "operations": ["quantize"]},
        {"id": "a", "output": {"codes": "f7", "absmax": "3f800000"}},
        {"id": "a", "output": {"codes": "f7", "absmax": "3f800000"}, "steps": {"s": "3f800000"}},
        {"id": "a", "output": {"x": ""}},
        {"id": "a", "refused": "block 0"},
        {"id": "a", "skipped": ""},
        {"id": "a", "errored": "IndexError"},
    ],
}
BAD_LINES = {
    "asked": [
        {"cmd": "start"},
        {"cmd": "start", "version": 2},
        {"cmd": "stop", "now": True},
        {"cmd": "run", "id": "a", "operation": "transmogrify", "input": {}},
        {"cmd": "run", "id": "a", "operation": "quantize", "input": {**FIELDS, "bits": 4}},
        {"cmd": "run", "operation": "quantize", "input": FIELDS},
    ],
    "answered": [
        {"version": 1, "name": "p", "operations": "quantize"},
        {"version": 1, "name": "", "operations": []},
        {"id": "a", "output": {"codes": "f7", "absmax": [1.0]}},
        {"id": "a", "output": {"codes": "f7"}},
        {"id": "a", "output": {}},
        {"id": "a", "refused": None},
        {"id": "a", "refused": "no", "output": {"x": ""}},
        {"id": "a"},
        {"output": {"x": ""}},
    ],
}


@pytest.mark.parametrize("name", ["asked", "answered"])
def test_the_protocol_schema_knows_lines_from_others(name: str) -> None:
    validator = side(name)
    for line in GOOD_LINES[name]:
        validator.validate(line)
    for line in BAD_LINES[name]:
        assert not validator.is_valid(line), line


def test_every_question_and_right_answer_fits_the_protocol_schema(stored: list[Vector]) -> None:
    protocol = schema("protocol.schema.json")["$defs"]
    parts = {
        f"{operation}.{part}": jsonschema.Draft202012Validator(
            {"$ref": f"#/$defs/{operation}.{part}", "$defs": protocol}
        )
        for operation in OPERATIONS
        for part in ("input", "output", "steps")
    }
    for vector in stored:
        parts[f"{vector.operation}.input"].validate(vector.input)
        parts[f"{vector.operation}.steps"].validate(vector.steps)
        if vector.output is not None:
            parts[f"{vector.operation}.output"].validate(vector.output)


# In the package


def test_the_package_lists_every_room_and_the_specification() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    rooms = {
        ".".join(path.parent.relative_to(ROOT / side).parts): path.parent
        for side in ("reference", "gpu")
        for path in (ROOT / side).rglob("__init__.py")
    }
    listed = set(setup["options"]["packages"].split())
    assert listed == rooms.keys() | {"nf4.spec"}
    for room, path in rooms.items():
        kernels = {f"*{file.suffix}" for file in path.iterdir() if file.suffix.startswith(".cu")}
        if kernels:
            assert set(setup["options.package_data"][room].split(", ")) == kernels, room
    shipped = [pattern.strip() for pattern in setup["options.package_data"]["nf4.spec"].split(",")]
    found = {path for pattern in shipped for path in SPECIFICATION.glob(pattern)}
    assert {path for path in SPECIFICATION.rglob("*") if path.is_file()} == found
