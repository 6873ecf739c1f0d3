"""The oracle, plain integers and fractions, against every vector and, on drawn bits, the reference."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import oracle
import oracle_port
import oracle_step_port
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nf4.codebooks import CODEBOOKS
from nf4.conform import reference
from nf4.conform.compare import compare
from nf4.conform.operations import OPERATIONS
from nf4.conform.port import Answer
from nf4.conform.python_port import PythonPort
from nf4.conform.search import INPUTS
from nf4.conform.values import encode_input, to_hex
from nf4.conform.vectors import Vector, load
from nf4.nested import DYNAMIC_MAP

VECTORS = [vector for vector in load() if vector.operation in oracle_port.OPERATIONS]
REFERENCE = PythonPort(reference, "reference")
few = settings(deadline=None, max_examples=25)

Input = dict[str, Any]


def asked(operation: str, given: Input) -> Answer:
    """The oracle's answer."""
    answer = oracle_port.answer(operation, given)
    if "output" in answer:
        return Answer("output", answer["output"], answer["steps"])
    ((kind, message),) = answer.items()
    return Answer(kind, message=message)


def agree(operation: str, given: Input) -> None:
    """Hold the oracle's answer against the reference's, every bit of it where it is exact."""
    expected, found = REFERENCE.run("drawn", operation, given), asked(operation, given)
    assert expected.kind in ("output", "refused"), expected.message
    assert found.kind in ("output", "refused"), found.message
    assert compare(operation, given, expected, found) is None


@pytest.mark.parametrize("operation", sorted({vector.operation for vector in VECTORS}))
def test_every_vector(operation: str) -> None:
    for vector in VECTORS:
        if vector.operation == operation:
            assert difference(vector) is None, vector.id


def difference(vector: Vector) -> object:
    expected = Answer("refused") if vector.output is None else Answer("output", vector.output)
    found = asked(vector.operation, vector.input)
    assert found.kind in ("output", "refused"), f"{vector.id}: {found.message}"
    return compare(vector.operation, vector.input, expected, found, vector.bounds)


@pytest.mark.parametrize("operation", sorted(oracle_port.STEPS))
def test_every_step(operation: str) -> None:
    mine = [vector for vector in VECTORS if vector.operation == operation and vector.steps]
    assert mine
    for vector in mine:
        steps = asked(operation, vector.input).steps
        assert {name: steps[name] for name in vector.steps} == vector.steps, vector.id


def test_a_wrong_output_differs() -> None:
    vector = next(vector for vector in VECTORS if vector.operation == "quantize" and vector.output)
    assert vector.output is not None
    wrong = {**vector.output, "codes": "0" * len(vector.output["codes"])}
    assert difference(Vector(**{**vars(vector), "output": wrong})) is not None


def test_it_offers_all_but_files() -> None:
    files = {"read_tensor", "write_tensor", "read_model", "quantize_model", "read_adapter"}
    assert set(oracle_port.OPERATIONS) == OPERATIONS.keys() - files


def test_its_tables_are_those_of_the_reference() -> None:
    for name, book in CODEBOOKS.items():
        assert oracle_port.hexadecimal(oracle.CODEBOOKS[name], "float32") == to_hex(book.values)
    assert oracle_port.hexadecimal(oracle.DYNAMIC_MAP, "float32") == to_hex(DYNAMIC_MAP)


# Drawn bits

DTYPES = st.sampled_from(["float32", "float16", "bfloat16"])
BOOKS = st.sampled_from(list(CODEBOOKS))
SIZES = st.sampled_from([32, 64])


def words(n: int, digits: int, kind: str = "any") -> st.SearchStrategy[str]:
    """n elements of that many digits: any bits; or "magnitude", the float32 from 0 to the largest."""
    most = {"any": 16**digits - 1, "magnitude": 0x7F7FFFFF}[kind]
    element = st.integers(0, most) | st.sampled_from([0, 1, most, most // 2, most // 3])
    return st.lists(element, min_size=n, max_size=n).map(
        lambda found: "".join(f"{bits:0{digits}x}" for bits in found)
    )


@st.composite
def floats(draw: st.DrawFn, n: int, dtype: str) -> str:
    """n elements of dtype, finite in four cases of five."""
    digits = oracle_port.DIGITS[dtype]
    text = draw(words(n, digits))
    if draw(st.integers(0, 4)):
        exponent, fraction = oracle.FORMATS[dtype]
        last = 1 << fraction  # the lowest bit of the exponent; without it no number is infinite or a NaN
        elements = [int(text[i : i + digits], 16) for i in range(0, len(text), digits)]
        full = (1 << exponent) - 1
        text = "".join(
            f"{bits & ~last if bits >> fraction & full == full else bits:0{digits}x}" for bits in elements
        )
    return text


@few
@given(st.data(), DTYPES)
def test_conversion(data: st.DataObject, dtype: str) -> None:
    agree("widen", {"x": data.draw(floats(30, dtype)), "dtype": dtype})
    agree("narrow", {"x": data.draw(floats(30, "float32")), "dtype": dtype})


@few
@given(st.data(), DTYPES, BOOKS, SIZES, st.integers(0, 100))
def test_quantize(data: st.DataObject, dtype: str, codebook: str, block_size: int, n: int) -> None:
    x = data.draw(floats(n, dtype))
    given = {"x": x, "shape": [n], "dtype": dtype, "block_size": block_size, "codebook": codebook}
    agree("quantize", given)
    agree("quantize_double", given)


@few
@given(st.data(), DTYPES, BOOKS, SIZES, st.integers(0, 100))
def test_dequantize(data: st.DataObject, dtype: str, codebook: str, block_size: int, n: int) -> None:
    blocks = -(-n // block_size)
    given = {"codes": data.draw(words(-(-n // 2), 2)), "shape": [n], "dtype": dtype}
    given |= {"block_size": block_size, "codebook": codebook}
    agree("dequantize", {**given, "absmax": data.draw(floats(blocks, "float32"))})
    agree("dequantize_double", {**given, **data.draw(nested(blocks))})


@st.composite
def nested(draw: st.DrawFn, blocks: int) -> Input:
    """An 8-bit form of that many absmax, of any map or that of the specification."""
    own = oracle_port.hexadecimal(oracle.DYNAMIC_MAP, "float32")
    return {
        "absmax_codes": draw(words(blocks, 2)),
        "nested_absmax": draw(floats(-(-blocks // 256), "float32")),
        "offset": draw(floats(1, "float32")),
        "map": draw(st.just(own) | words(32, 8, "magnitude").map(lambda text: text * 8)),
    }


@few
@given(st.data(), st.integers(0, 20))
def test_absmax(data: st.DataObject, blocks: int) -> None:
    agree("encode_absmax", {"absmax": data.draw(words(blocks, 8, "magnitude"))})
    agree("decode_absmax", data.draw(nested(blocks)))


def test_many_nested_blocks() -> None:
    absmax = [0x3F000000 + 40503 * i % 0x800000 for i in range(600)]
    agree("encode_absmax", {"absmax": oracle_port.hexadecimal(absmax, "float32")})


@few
@given(st.data(), st.integers(0, 40), st.floats(-0.1, 1.1) | st.just(math.nan))
def test_random_numbers(data: st.DataObject, n: int, p: float) -> None:
    seed, wide = data.draw(words(1, 16)), data.draw(words(1, 16))
    drawn = {"seed": seed, "stream": data.draw(words(1, 8)), "sample": wide, "n": n}
    agree("philox", {"counter": data.draw(words(4, 8)), "key": data.draw(words(2, 8))})
    agree("uniform", drawn)
    agree("keep_mask", {**drawn, "p": oracle_port.float64_bits(p)})
    agree("permutation", {"seed": seed, "epoch": wide, "n": n})
    agree("held_out", {"seed": seed, "examples": n})
    agree("stream", {"name": data.draw(st.text(max_size=10).filter(encodable))})


def encodable(text: str) -> bool:
    return not any(0xD800 <= ord(c) < 0xE000 for c in text)


@few
@given(st.data(), st.integers(1, 70), st.integers(0, 200), st.integers(1, 2), st.booleans())
def test_order_of_examples(data: st.DataObject, n: int, first: int, batch: int, grouped: bool) -> None:
    given = {"seed": data.draw(words(1, 16)), "examples": n, "first": first, "count": 90, "batch": batch}
    if grouped:
        given["lengths"] = data.draw(st.lists(st.integers(1, 4), min_size=n, max_size=n))
    agree("example_order", given)


@few
@given(st.data(), DTYPES, st.integers(0, 9), st.integers(0, 3))
def test_init_adapter(data: st.DataObject, dtype: str, features: int, rank: int) -> None:
    given = {"seed": data.draw(words(1, 16)), "name": "a.b", "in_features": features, "rank": rank}
    agree("init_adapter", {**given, "dtype": dtype})


@few
@given(st.data(), st.sampled_from(["float32", "bfloat16"]), st.integers(0, 6), st.integers(0, 30))
def test_adamw(data: st.DataObject, dtype: str, n: int, updates: int) -> None:
    """No NaN goes in or, but for 0 / 0, comes out: which one that is the clauses leave open."""
    finite = {name: data.draw(words(n, 8, "magnitude")) for name in ("g", "m", "v")}
    p = data.draw(words(n, 8, "magnitude"))
    p = p if dtype == "float32" else "".join(p[i : i + 4] for i in range(0, len(p), 8))
    rates = {"lr": 0.1, "beta1": 1.0, "beta2": 1.0, "eps": 1e-3, "weight_decay": 1.0}
    drawn = {name: oracle_port.float64_bits(data.draw(st.floats(1e-9, most))) for name, most in rates.items()}
    shape = data.draw(st.sampled_from([[n], [1, n]]))
    agree("adamw", {"p": p, "dtype": dtype, **finite, "shape": shape, "updates": updates, **drawn})


@few
@given(st.data(), st.integers(1, 100), st.integers(0, 20), st.floats(0, 1))
def test_learning_rate(data: st.DataObject, steps: int, warmup: int, lr: float) -> None:
    step = data.draw(st.integers(0, steps))
    for schedule in (*oracle.SCHEDULES, "none"):
        given = {"step": step, "steps": steps, "warmup": warmup, "schedule": schedule}
        expected = REFERENCE.run("drawn", "learning_rate", {**given, "lr": oracle_port.float64_bits(lr)})
        found = asked("learning_rate", {**given, "lr": oracle_port.float64_bits(lr)})
        assert found.kind == expected.kind
        if found.kind == "output":
            apart = oracle_port.float64(found.output["lr"]) - oracle_port.float64(expected.output["lr"])
            assert abs(apart) <= 1e-15 * lr


# Chapter 15, as the search beyond the vectors draws it

CHAPTER_15 = [name for name in oracle_step_port.OPERATIONS if name != "exact_step"]


@pytest.mark.parametrize("operation", CHAPTER_15)
@few
@given(st.data())
def test_what_the_search_draws(operation: str, data: st.DataObject) -> None:
    agree(operation, encode_input(operation, data.draw(INPUTS[operation]), "drawn"))


@settings(deadline=None, max_examples=6, suppress_health_check=list(HealthCheck))
@given(INPUTS["exact_step"])
def test_whole_steps_that_the_search_draws(fields: Input) -> None:
    agree("exact_step", encode_input("exact_step", fields, "drawn"))


# As a program


def test_it_speaks_the_protocol() -> None:
    vector = next(vector for vector in VECTORS if vector.operation == "quantize" and vector.output)
    asked_for = [
        {"cmd": "start", "version": 1},
        {"cmd": "run", "id": "e", "operation": "echo", "input": {"dtype": "float16", "x": "3c00"}},
        {"cmd": "run", "id": "q", "operation": "quantize", "input": vector.input},
        {"cmd": "run", "id": "r", "operation": "quantize", "input": {**vector.input, "block_size": 3}},
        {"cmd": "run", "id": "s", "operation": "read_model", "input": {}},
        {"cmd": "run", "id": "x", "operation": "narrow", "input": {}},
        {"cmd": "stop"},
    ]
    done = subprocess.run(
        [sys.executable, Path(oracle_port.__file__)],
        input="".join(json.dumps(line) + "\n" for line in asked_for),
        capture_output=True,
        text=True,
        check=True,
    )
    started, *answers = map(json.loads, done.stdout.splitlines())
    assert started == {"version": 1, "name": "oracle", "operations": list(oracle_port.OPERATIONS)}
    assert answers[0] == {"id": "e", "output": {"x": "3c00"}}
    assert (answers[1]["id"], answers[1]["output"]) == ("q", vector.output)
    assert [set(answer) for answer in answers[2:]] == [
        {"id", "refused"},
        {"id", "skipped"},
        {"id", "errored"},
    ]
