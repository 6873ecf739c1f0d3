"""The search beyond the vectors: it finds, makes small, repeats itself, and asks programs too."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nf4.conform import reference
from nf4.conform.operations import OPERATIONS
from nf4.conform.port import Answer
from nf4.conform.python_port import PythonPort
from nf4.conform.search import INPUTS, Found, search
from nf4.floats import DTYPES
from numpy.typing import NDArray


class Correct:
    """A port with the operations of the reference that one test is about."""

    def quantize(self, **fields: Any) -> Any:
        return reference.quantize(**fields)


class CodeOfTies(Correct):
    """Values on a threshold go up, in arrays of one block."""

    def quantize(self, **fields: Any) -> Any:
        x = fields["x"]
        if x.dtype == np.float32 and x.size <= fields["block_size"]:
            fields["x"] = np.where(np.abs(x) < np.abs(x).max(initial=0), np.nextafter(x, np.float32(9)), x)
        return reference.quantize(**fields)


def one(port: object, operation: str = "quantize", seed: int = 0, examples: int = 200) -> Found | None:
    found = search(PythonPort(port, "mine"), [operation], seed, examples)
    assert len(found) <= 1
    return found[0] if found else None


def test_every_operation_but_those_of_files_has_inputs() -> None:
    """merge, clip, lora_step and example_order have vectors; what they compose is searched by itself."""
    assert set(INPUTS) <= set(OPERATIONS)
    assert set(OPERATIONS) - set(INPUTS) == {
        "clip",
        "example_order",
        "lora_step",
        "merge",
        "quantize_model",
        "read_adapter",
        "read_model",
        "read_tensor",
        "write_tensor",
    }


@pytest.mark.parametrize("operation", ["quantize", "dequantize_double", "adamw"])
def test_nothing_is_found_in_the_reference(operation: str) -> None:
    assert one(reference, operation, seed=7, examples=100) is None


def test_a_find_is_small_and_says_what_differs() -> None:
    found = one(CodeOfTies())
    assert found is not None
    assert (found.operation, found.expected.kind, found.got.kind) == ("quantize", "output", "output")
    assert len(found.input["x"]) <= 8 * 4
    assert found.difference is not None
    assert found.difference.field == "codes"


def test_the_same_seed_finds_the_same() -> None:
    assert one(CodeOfTies(), seed=1) == one(CodeOfTies(), seed=1) is not None


def test_what_must_be_refused_is_searched_too() -> None:
    class Takes:
        def quantize(self, x: NDArray[Any], **fields: Any) -> Any:
            return reference.quantize(np.nan_to_num(x), **fields)

    found = one(Takes(), examples=400)
    assert found is not None
    assert found.expected.kind == "refused"
    assert (
        "7f800000" in found.input["x"] or "nan" in found.expected.message or "inf" in found.expected.message
    )


def test_an_error_of_the_port_is_a_find_and_a_skip_is_none() -> None:
    class Fails:
        def widen(self, x: NDArray[Any], dtype: str) -> Any:
            if x.size > 2:
                raise KeyError("three")
            return reference.widen(x, dtype)

        def quantize(self, **fields: Any) -> Any:
            raise NotImplementedError

    found = one(Fails(), "widen")
    assert found is not None
    assert (found.got.kind, found.difference) == ("errored", None)
    assert "three" in found.got.message
    assert len(found.input["x"]) == 3 * 2 * DTYPES[found.input["dtype"]].itemsize
    assert one(Fails()) is None


def test_an_answer_of_wrong_length_is_a_find() -> None:
    class Short:
        def widen(self, x: NDArray[Any], dtype: str) -> Any:
            return reference.widen(x, dtype)["y"][:5]

    found = one(Short(), "widen")
    assert found is not None
    assert len(found.expected.output["y"]) == 6 * 8


def test_an_operation_not_offered_is_passed_over() -> None:
    assert search(PythonPort(Correct(), "mine"), ["widen", "read_model"]) == []


class Moody:
    """A port that answers wrongly the first time only, and counts."""

    name, operations = "moody", frozenset({"stream"})

    def __init__(self, wrong: int) -> None:
        self.wrong, self.asked = wrong, 0
        self.truth = PythonPort(reference, "reference")

    def run(self, id: str, operation: str, input: Mapping[str, Any]) -> Answer:
        self.asked += 1
        if self.asked <= self.wrong:
            return Answer("output", {"stream": "00000001"})
        return self.truth.run(id, operation, input)

    def close(self) -> list[str]:
        return []


def test_a_port_that_does_not_repeat_itself_is_reported_all_the_same() -> None:
    port = Moody(wrong=1)
    (found,) = search(port, ["stream"], examples=50)
    assert found.got.output == {"stream": "00000001"}


def test_a_wrong_port_is_not_asked_for_ever() -> None:
    port = Moody(wrong=10**9)
    assert search(port, ["stream"], examples=50)
    assert port.asked < 600


PROGRAM = """
import json, sys, zlib
for line in sys.stdin:
    ask = json.loads(line)
    if ask["cmd"] == "start":
        print(json.dumps({"version": 1, "name": "small", "operations": ["stream"]}), flush=True)
    elif ask["cmd"] == "run":
        x = ask["input"].get("x")
        name = ask["input"].get("name", "")
        crc = zlib.crc32(name.encode("latin-1", "replace"))
        output = {"x": x} if ask["operation"] == "echo" else {"stream": f"{crc:08x}"}
        print(json.dumps({"id": ask["id"], "output": output}), flush=True)
    else:
        break
"""


def test_a_program_is_searched_like_an_object(tmp_path: Path) -> None:
    """Its name is in Latin-1: the smallest name that shows it has one character beyond ASCII."""
    from nf4.conform.protocol import SubprocessPort

    path = tmp_path / "small.py"
    path.write_text(PROGRAM)
    port = SubprocessPort([sys.executable, str(path)], timeout=20)
    try:
        (found,) = search(port, ["stream"], examples=200)
    finally:
        port.close()
    assert len(found.input["name"]) == 1
    assert ord(found.input["name"]) >= 128
