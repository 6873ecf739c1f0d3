"""Python objects as ports: how they are called, what they may return, what becomes of exceptions."""

import contextlib
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from nf4.conform import values
from nf4.conform.port import Answer, HarnessError
from nf4.conform.python_port import PythonPort, load

QUANTIZE = {
    "x": "3f800000bf000000",
    "shape": [1, 2],
    "dtype": "float32",
    "block_size": 64,
    "codebook": "nf4",
}
STORAGE = {"elements": 5, "block_size": 64, "double_quant": False}


def ask(function: Callable[..., Any], operation: str = "storage", **given: Any) -> Answer:
    port = PythonPort(SimpleNamespace(**{operation: function}), "it")
    assert port.operations == {operation}
    return port.run("v", operation, given or STORAGE)


def test_quantize_gets_an_array_of_its_shape_and_dtype() -> None:
    def quantize(x: Any, block_size: int, codebook: str) -> Any:
        assert (x.dtype, x.shape, x.tolist()) == (np.float32, (1, 2), [[1.0, -0.5]])
        assert (block_size, codebook) == (64, "nf4")
        return np.array([0xF2], np.uint8), np.array([[1]], np.float32)

    answer = ask(quantize, "quantize", **QUANTIZE)
    assert answer == Answer("output", {"codes": "f2", "absmax": "3f800000"})


def test_the_others_get_every_field_flat() -> None:
    def dequantize(codes: Any, absmax: Any, shape: Any, dtype: Any, block_size: Any, codebook: Any) -> Any:
        assert (codes.dtype, codes.tolist(), absmax.tolist()) == (np.uint8, [0xF2], [2.0])
        assert (shape, dtype, block_size, codebook) == ([1, 2], "bfloat16", 64, "nf4")
        return np.array([[2, -1]], values.DTYPES["bfloat16"])

    given = QUANTIZE | {"codes": "f2", "absmax": "40000000", "dtype": "bfloat16"}
    del given["x"]
    assert ask(dequantize, "dequantize", **given) == Answer("output", {"y": "4000bf80"})


@pytest.mark.parametrize("returned", [7, np.int64(7), (7,), {"bytes": 7}, {"bytes": 7, "steps": {}}])
def test_forms_of_an_answer(returned: Any) -> None:
    assert ask(lambda **given: returned) == Answer("output", {"bytes": 7})


def test_steps_go_with_a_dict() -> None:
    output = {"codes": np.zeros(1, np.uint8), "absmax": np.ones(1, np.float32)}
    steps = {"s": np.ones(2, np.float32)}
    answer = ask(lambda **given: output | {"steps": steps}, "quantize", **QUANTIZE)
    assert answer.steps == {"s": "3f8000003f800000"}


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (np.zeros(1), "quantize returned ndarray; it must be a dict or a tuple of codes, absmax"),
        ((np.zeros(1, np.uint8),), "a tuple of 1; it must be codes, absmax"),
        ({"codes": np.zeros(1, np.uint8)}, "has no absmax"),
        ((np.zeros(1, np.uint8), np.zeros(1)), "absmax is of dtype float64; it must be float32"),
        ((np.zeros(1, np.int8), np.zeros(1, np.float32)), "codes is of dtype int8; it must be uint8"),
        ((np.zeros(1, np.uint8), [[1], [2, 3]]), "no answer of its types"),
        (
            {"codes": np.zeros(1, np.uint8), "absmax": np.zeros(1, np.float32), "scale": 1},
            "has a field 'scale'",
        ),
        (None, "quantize returned NoneType"),
    ],
)
def test_an_answer_of_other_types_is_an_error(returned: Any, message: str) -> None:
    answer = ask(lambda **given: returned, "quantize", **QUANTIZE)
    assert (answer.kind, message in answer.message) == ("errored", True), answer.message


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (ValueError("a NaN\n at 3"), "refused", "a NaN at 3"),
        (OverflowError("too large"), "refused", "too large"),
        (NotImplementedError("no fp4"), "skipped", "no fp4"),
        (NotImplementedError(), "skipped", "not implemented"),
        (TypeError("an int"), "errored", "TypeError: an int (test_python_port.py, line "),
        (SystemExit(3), "errored", "SystemExit: 3"),
        (RecursionError("x" * 9999), "errored", "RecursionError: xxx"),
    ],
)
def test_exceptions(error: BaseException, kind: str, message: str) -> None:
    def storage(**given: Any) -> None:
        raise error

    answer = ask(storage)
    assert (answer.kind, answer.message.startswith(message)) == (kind, True), answer.message
    assert len(answer.message) < 500


def test_a_call_that_does_not_end() -> None:
    def storage(**given: Any) -> None:
        while True:
            with contextlib.suppress(Exception):  # as careless code does
                time.sleep(0.01)

    port = PythonPort(SimpleNamespace(storage=storage), "it", timeout=0.2)
    assert port.run("v", "storage", STORAGE) == Answer("errored", message="no answer within 0.2 s")


def test_what_it_prints_does_not_reach_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    assert ask(lambda **given: print("noise") or 7).output == {"bytes": 7}  # type: ignore[func-returns-value]
    assert capsys.readouterr() == ("", "noise\n")


def test_it_echoes() -> None:
    port = PythonPort(SimpleNamespace(), "it")
    assert port.run("v", "echo", {"dtype": "float16", "x": "80000001"}).output == {"x": "80000001"}
    assert port.operations == set()


MODULE = """
def storage(elements, block_size, double_quant): return 1
class Port:
    def storage(self, elements, block_size, double_quant): return 2
    def other(self): pass
class Broken:
    def __init__(self): raise RuntimeError("no device")
class Empty: pass
class Space:
    port = Port()
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module `portmodule` in the current directory."""
    (tmp_path / "portmodule.py").write_text(MODULE)
    (tmp_path / "brokenmodule.py").write_text("import sys\nsys.exit('no licence')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.delitem(sys.modules, "portmodule", raising=False)


@pytest.mark.usefixtures("module")
@pytest.mark.parametrize(
    ("text", "answer"), [("portmodule", 1), ("portmodule:Port", 2), ("portmodule:Space.port", 2)]
)
def test_load(text: str, answer: int) -> None:
    port = load(text)
    assert (port.name, port.operations) == (text, {"storage"})
    assert port.run("v", "storage", STORAGE).output == {"bytes": answer}


@pytest.mark.usefixtures("module")
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nomodule:Port", "ModuleNotFoundError: No module named 'nomodule'"),
        ("portmodule:Ports", "has no attribute 'Ports'"),
        ("portmodule:Broken", "RuntimeError: no device (portmodule.py, line 7)"),
        ("portmodule:Empty", "has no function named as an operation"),
        ("brokenmodule", "SystemExit: no licence"),
        (":Port", "--python :Port"),
    ],
)
def test_load_what_is_not_there(text: str, message: str) -> None:
    with pytest.raises(HarnessError) as raised:
        load(text)
    assert message in str(raised.value)
