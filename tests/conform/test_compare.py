"""Differences: the first field, element and step that differ; bounds; files by their content."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nf4.conform.compare import Difference, compare, position
from nf4.conform.port import Answer
from nf4.conform.run import judge
from nf4.conform.vectors import Vector
from nf4.errors import InputError
from nf4.formats.files import SafetensorsWriter, TensorSpec

QUANTIZE = {
    "x": "3f800000" * 5,
    "shape": [5],
    "dtype": "float32",
    "block_size": 32,
    "codebook": "nf4",
}
RIGHT = {"codes": "ffffF7".lower(), "absmax": "3f800000"}


def quantize(output: dict[str, Any], **more: Any) -> Difference | None:
    steps = {"reciprocal": "3f800000", "s": "3f800000" * 5, "ranks": "0f" * 5}
    return compare("quantize", QUANTIZE, Answer("output", RIGHT, steps), Answer("output", output, **more))


def test_equal() -> None:
    assert quantize(RIGHT) is None
    assert quantize(RIGHT, steps={"s": "00000000" * 5}) is None  # a step alone breaks no clause


@pytest.mark.parametrize(
    ("codes", "index", "place", "values", "what"),
    [
        (
            "fffef7",
            1,
            3,
            ("15, 15", "15, 14"),
            "byte 1 of codes differs, in the code of element 3; 1 of 3 do",
        ),
        ("ffeff7", 1, 2, ("15, 15", "14, 15"), "in the code of element 2"),
        ("0000f7", 0, 0, ("15, 15", "0, 0"), "in the code of element 0; 2 of 3 do"),
        ("fffff8", 2, 5, ("15, 7", "15, 8"), "in the bits that no element uses"),
    ],
)
def test_packed_codes(codes: str, index: int, place: int, values: tuple[str, str], what: str) -> None:
    found = quantize({"codes": codes, "absmax": "3f800000"})
    assert found is not None
    assert (found.kind, found.field, found.index, found.place) == ("value", "codes", index, (place, 5))
    assert (found.expected_value, found.got_value) == values
    assert what in found.what


def test_the_cause_comes_before_the_codes() -> None:
    found = quantize({"codes": "000000", "absmax": "3f800001"})
    assert found is not None
    assert (found.field, found.expected, found.got) == ("absmax", "3f800000", "3f800001")
    assert (found.expected_value, found.got_value) == ("1.0", "1.0000001")
    assert found.what == "element 0 of absmax differs by 1 ulp"


def test_steps_expected_where_the_port_sent_none() -> None:
    found = quantize({"codes": "fffef7", "absmax": "3f800000"})
    assert found is not None
    assert found.step is None
    steps = [(step.name, step.index, step.expected, step.expected_value) for step in found.steps]
    assert steps == [
        ("reciprocal", 0, "3f800000", "1.0"),
        ("s", 3, "3f800000", "1.0"),
        ("ranks", 3, "0f", "15"),
    ]


def test_the_first_step_that_differs() -> None:
    sent = {"ranks": "0f0f0f0e0f", "s": "3f800000" * 4 + "3f7fffff", "reciprocal": "3f800000"}
    found = quantize({"codes": "fffef7", "absmax": "3f800000"}, steps=sent)
    assert found is not None
    assert found.step is not None
    assert (found.step.name, found.step.index) == ("s", 4)
    assert (found.step.expected, found.step.got) == ("3f800000", "3f7fffff")
    assert (found.agree, found.steps) == (("reciprocal",), ())


def test_a_step_that_is_too_short() -> None:
    found = quantize({"codes": "fffef7", "absmax": "3f800000"}, steps={"s": "3f800000"})
    assert found is not None
    assert found.step is not None
    assert (found.step.index, found.step.got, found.step.got_value) == (1, "nothing", "it has 1 elements")


def test_zeros_differ_in_their_sign() -> None:
    found = compare(
        "narrow",
        {"x": "00000000", "dtype": "float16"},
        Answer("output", {"y": "0000"}),
        Answer("output", {"y": "8000"}),
    )
    assert found is not None
    assert "in the sign of zero" in found.what
    assert (found.expected_value, found.got_value) == ("0.0", "-0.0")


def test_refusals() -> None:
    output, refused = Answer("output", RIGHT), Answer("refused", message="a NaN")
    assert compare("quantize", QUANTIZE, refused, Answer("refused", message="whatever")) is None
    answered = compare("quantize", QUANTIZE, refused, output)
    assert answered is not None
    assert (answered.kind, answered.what) == (
        "refusal",
        "it was answered, and must be refused: a NaN",
    )
    found = compare("quantize", QUANTIZE, output, refused)
    assert found is not None
    assert found.what == "it was refused, and has an answer; the port's reason: a NaN"


LOSS = {"logits": "3f800000" * 4, "vocabulary": 4, "targets": [0], "parts": [1]}
WANT = np.array([-3, 1, 1, 1])


def loss(dlogits: Any, tolerance: dict[str, float] | None = None) -> Difference | None:
    def answer(values: Any) -> Answer:
        y = np.asarray(values, ">f4").tobytes().hex()
        return Answer("output", {"loss": "3ff0000000000000", "dlogits": y})

    return compare("loss", LOSS, answer(WANT), answer(dlogits), tolerance)


def test_a_bound_is_relative_to_the_largest_magnitude() -> None:
    assert loss(WANT + np.array([0, 2.9e-5, -2.9e-5, 0])) is None
    found = loss(WANT + np.array([0, 0, 3.1e-5, 0]))
    assert found is not None
    assert (found.index, found.count) == (2, 1)
    assert "by more than 3e-05 (1e-05 of the largest magnitude)" in found.what
    assert loss(WANT + np.array([0, 0, 2.9e-4, 0]), {"dlogits": 1e-4}) is None


def test_a_bound_where_infinity_is_expected() -> None:
    want = Answer("output", {"loss": "7ff0000000000000", "dlogits": "7f8000003f8000003f8000003f800000"})
    for dlogits, right in (("7f800000" + "3f800001" * 3, True), ("3f800000" * 4, False)):
        got = Answer("output", {"loss": "7ff0000000000000", "dlogits": dlogits})
        assert (compare("loss", LOSS, want, got) is None) == right


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nothing_that_is_not_finite_is_within_a_bound(bad: float) -> None:
    found = loss([-3, bad, 1, 1], {"dlogits": 1e30})
    assert found is not None
    assert found.index == 1


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ({"codes": "FFFFF7", "absmax": "3f800000"}, "codes has 'F' at position 0"),
        ({"codes": "fffff", "absmax": "3f800000"}, "codes has 5 digits; each element of uint8 takes 2"),
        ({"codes": "0xffff", "absmax": "3f800000"}, "codes has 'x'"),
        ({"codes": "fffff7", "absmax": "3f80"}, "absmax has 4 digits"),
        ({"codes": "fffff7", "absmax": [1.0]}, "absmax is [1.0]; it must be a string"),
        ({"codes": "fffff7"}, "has no absmax"),
        ({"codes": "fffff7", "absmax": "3f800000", "time": 3}, "has a field 'time'"),
    ],
)
def test_a_malformed_output_is_no_difference(output: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as raised:
        quantize(output)
    assert message in str(raised.value)
    result = judged(output)
    assert (result.outcome, result.difference) == ("errored", None)


def judged(output: dict[str, Any]) -> Any:
    vector = Vector("v", "quantize", ("NF4-3.5",), (), "Ones.", QUANTIZE, RIGHT)
    return judge(vector, Answer("output", output))


def test_malformed_steps_are_an_error() -> None:
    with pytest.raises(InputError, match="sum"):
        quantize(RIGHT, steps={"sum": "00"})


def test_another_number_of_elements_is_an_error_of_no_clause() -> None:
    found = quantize({"codes": "fffff7", "absmax": "3f8000003f800000"})
    assert found is not None
    assert (found.kind, found.what[:42]) == ("length", "absmax has 2 elements; 1 are expected of f")
    assert "it has the digits of float64" in found.what
    result = judged({"codes": "ff" * 5, "absmax": "3f800000"})
    assert (result.outcome, result.message) == ("errored", "codes has 5 elements; 3 are expected")


def test_plain_values() -> None:
    given = {"elements": 5, "block_size": 64, "double_quant": False}
    want = Answer("output", {"bytes": 7})
    found = compare("storage", given, want, Answer("output", {"bytes": 8}))
    assert found is not None
    assert (found.expected, found.got) == ("7", "8")
    for wrong in (7.0, "7", True, None):
        with pytest.raises(InputError, match="must be an integer"):
            compare("storage", given, want, Answer("output", {"bytes": wrong}))


@pytest.mark.parametrize(
    ("length", "index", "total", "at"),
    [
        (130, 70, 130, 70),
        (3, 70, 130, 1),  # the block of an element
        (130, 2, 3, 128),  # the first element of a block
        (1, 700, 70000, None),
        (5, 70000, 70001, 4),  # the nested block of an element
        (70001, 4, 5, 65536),
        (16, 3, 130, None),  # a table
    ],
)
def test_position(length: int, index: int, total: int, at: int | None) -> None:
    assert position(length, index, total, 64) == at


STATE = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [2], "nested_offset": 0.1}
W_STATE = "w.quant_state.bitsandbytes__nf4"


def safetensors(directory: Path, state: Any = STATE, **tensors: Any) -> bytes:
    text = state if isinstance(state, bytes) else json.dumps(state).encode()
    arrays: dict[str, Any] = {
        "w": np.array([[0xF0]], np.uint8),
        "w.absmax": np.array([1.5], np.float32),
        W_STATE: np.frombuffer(text, np.uint8),
    } | tensors
    specs = {name: TensorSpec(array.dtype, array.shape) for name, array in arrays.items()}
    with SafetensorsWriter(directory / "file", specs) as writer:
        for name, array in arrays.items():
            writer.write(name, array)
    return (directory / "file").read_bytes()


def write_tensor(directory: Path, got: bytes) -> Difference | None:
    given = {"name": "w", "codes": "f0", "absmax": "3fc00000"} | QUANTIZE | {"shape": [2]}
    del given["x"]
    want = safetensors(directory).hex()
    return compare(
        "write_tensor", given, Answer("output", {"file": want}), Answer("output", {"file": got.hex()})
    )


def header(entries: dict[str, tuple[str, list[int], bytes]], metadata: bool = False, pad: int = 8) -> bytes:
    """A safetensors file whose tensors lie in the order given."""
    offset, fields = 0, {}
    for name, (dtype, shape, data) in entries.items():
        offsets = [offset, offset + len(data)]
        fields[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        offset = offsets[1]
    text = json.dumps(fields).encode()
    text += b" " * (-len(text) % pad)
    return len(text).to_bytes(8, "little") + text + b"".join(data for _, _, data in entries.values())


ABSMAX = ("F32", [1], b"\0\0\xc0\x3f")
CODES = ("U8", [1, 1], b"\xf0")


def state_entry(state: dict[str, Any], **layout: Any) -> tuple[str, list[int], bytes]:
    text = json.dumps(state, **layout).encode()
    return ("U8", [len(text)], text)


def test_files_are_compared_by_content(tmp_path: Path) -> None:
    state = dict(reversed(STATE.items())) | {"nested_offset": 0.10000000149011612}  # the same float32
    got = header(
        {"w.absmax": ABSMAX, "w": CODES, W_STATE: state_entry(state, separators=(",", ":"))}
    )  # no metadata, another order of keys, fewer spaces
    assert write_tensor(tmp_path, got) is None


@pytest.mark.parametrize(
    ("got", "what"),
    [
        (b"", "too few for a safetensors file"),
        (header({"w": CODES}), f"file lacks 'w.absmax', '{W_STATE}'"),
        (header({"w": CODES, "w.absmax": ABSMAX, W_STATE: state_entry(STATE)}),
         "'w' lies where 'w.absmax' must"),
        (header({"w.absmax": ABSMAX, "w": CODES, W_STATE: state_entry(STATE), "z": CODES}),
         "has 'z' besides"),
        (header({"w.absmax": ABSMAX, "w": ("U8", [1], b"\xf0"), W_STATE: state_entry(STATE)}),
         "file['w'] is uint8 [1]; uint8 [1, 1] is expected"),
        (header({"w.absmax": ABSMAX, "w": ("U8", [1, 1], b"\x0f"), W_STATE: state_entry(STATE)}),
         "element 0 of file['w'] differs"),
        (header({"w.absmax": ABSMAX, "w": CODES, W_STATE: state_entry(STATE | {"blocksize": 128})}),
         "another 'blocksize'"),
        (header({"w.absmax": ABSMAX, "w": CODES, W_STATE: state_entry(STATE | {"nested_offset": 0.1000001})}),
         "another 'nested_offset'"),
        (header({"w.absmax": ABSMAX, "w": CODES, W_STATE: state_entry(STATE | {"zero_point": 0})}),
         "has 'zero_point' besides"),
        (header({"w.absmax": ABSMAX, "w": CODES, W_STATE: ("U8", [2], b"{x")}), "not valid JSON"),
    ],
)  # fmt: skip
def test_files_that_differ(tmp_path: Path, got: bytes, what: str) -> None:
    found = write_tensor(tmp_path, got)
    assert found is not None
    assert what in found.what
    assert str(tmp_path) not in found.what
    assert "/tmp" not in found.what


def test_an_unpadded_header(tmp_path: Path) -> None:
    got = header({"w.absmax": ABSMAX, "w": CODES, W_STATE: state_entry(STATE)}, pad=1)
    assert (len(got) - 8) % 8  # or the case tests nothing
    found = write_tensor(tmp_path, got)
    assert found is not None
    assert "not a multiple of 8 (NF4-8.3)" in found.what


def model(directory: Path, config: Any, **files: bytes) -> dict[str, str]:
    contents = {
        "config.json": json.dumps(config).encode(),
        "model.safetensors": safetensors(directory),
    } | files
    return {path: data.hex() for path, data in contents.items()}


def quantize_model(directory: Path, got: dict[str, str]) -> Difference | None:
    given = {"files": {}, "block_size": 64, "codebook": "nf4", "double_quant": False}
    want = Answer("output", {"files": model(directory, {"a": 1, "b": [2]})})
    return compare("quantize_model", given, want, Answer("output", {"files": got}))


def test_directories(tmp_path: Path) -> None:
    assert quantize_model(tmp_path, model(tmp_path, {"b": [2], "a": 1})) is None
    sharded = model(tmp_path, {"b": [2], "a": 1})
    sharded["model-00001-of-00001.safetensors"] = sharded.pop("model.safetensors")
    sharded["model.safetensors.index.json"] = b"{}".hex()
    assert quantize_model(tmp_path, sharded) is None
    for got, what in (
        (model(tmp_path, {"a": 1, "b": [3]}), "files['config.json'] has another 'b'"),
        (model(tmp_path, {"a": 1, "b": [2], "c": 0}), "files['config.json'] has 'c' besides"),
        (model(tmp_path, {"a": 1}), "files['config.json'] lacks 'b'"),
        (model(tmp_path, {}, **{"config.json": b"nonsense"}), "not valid JSON"),
        (model(tmp_path, {"a": 1, "b": [2]}, x=b""), "files has 'x' besides"),
    ):
        found = quantize_model(tmp_path, got)
        assert found is not None
        assert what in found.what


def test_tensors_by_name() -> None:
    def answer(**tensors: Any) -> Answer:
        fields = {
            name: {"dtype": dtype, "shape": shape, "data": data}
            for name, (dtype, shape, data) in tensors.items()
        }
        return Answer("output", {"tensors": fields})

    want = answer(a=("float32", [1, 2], "3f80000000000000"))
    for got, what in (
        (answer(), "tensors lacks 'a'"),
        (
            answer(a=("float32", [2], "3f80000000000000")),
            "tensors['a'] is float32 [2]; float32 [1, 2] is expected",
        ),
        (answer(a=("float16", [1, 2], "3c000000")), "tensors['a'] is float16 [1, 2]"),
        (
            answer(a=("float32", [1, 2], "3f80000080000000")),
            "element 1 of tensors['a'] differs in the sign of zero",
        ),
    ):
        found = compare("read_model", {"files": {}}, want, got)
        assert found is not None
        assert what in found.what
