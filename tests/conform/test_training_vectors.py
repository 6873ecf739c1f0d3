"""The vectors of chapters 8 to 11: the clauses covered, known answers, the reference."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nf4 import random
from nf4.conform import reference
from nf4.conform.compare import compare
from nf4.conform.generate import exact, files, lora, models, training
from nf4.conform.generate import random as random_vectors
from nf4.conform.operations import OPERATIONS
from nf4.conform.port import Answer
from nf4.conform.python_port import PythonPort
from nf4.conform.values import decode_input, decode_output
from nf4.conform.vectors import SPECIFICATION, Vector, load
from nf4.errors import InputError
from safetensors import SafetensorError, safe_open

MODULES = (random_vectors, lora, training, files, models)
CHAPTERS = ("08", "09", "10", "11")


def mine() -> Iterator[Vector]:
    generated = {vector.operation for module in MODULES for vector in module.vectors()}
    return (vector for vector in load() if vector.operation in generated)


STORED = {vector.id: vector for vector in mine()}


def of(operation: str) -> list[Vector]:
    return [vector for vector in STORED.values() if vector.operation == operation]


def test_the_stored_vectors_are_those_that_are_generated() -> None:
    generated = [vector for module in MODULES for vector in module.vectors()]
    assert {vector.id: vector for vector in generated} == STORED


def test_every_operation_has_vectors() -> None:
    chapters = tuple(f"NF4-{int(chapter)}." for chapter in CHAPTERS)
    wanted = {name for name, operation in OPERATIONS.items() if operation.clauses[0].startswith(chapters)}
    assert wanted | {"lora_step"} == {vector.operation for vector in STORED.values()}


def test_every_clause_of_the_chapters_has_a_vector() -> None:
    clauses = set()
    for chapter in CHAPTERS:
        text = next(SPECIFICATION.glob(f"{chapter}-*.md")).read_text("utf-8")
        headings = [line for line in text.splitlines() if line.startswith("### NF4-")]
        clauses |= {line.split()[1] for line in headings if "*(informative)*" not in line}
    assert clauses - {clause for vector in STORED.values() for clause in vector.clauses} == set()


@pytest.mark.parametrize("operation", sorted({vector.operation for vector in STORED.values()}))
def test_the_reference_passes(operation: str) -> None:
    port = PythonPort(reference, "reference")
    for vector in of(operation):
        if vector.refused is not None:
            expected = Answer("refused", message=vector.refused)
        else:
            assert vector.output is not None
            expected = Answer("output", vector.output)
        answer = port.run(vector.id, operation, vector.input)
        assert answer.kind == expected.kind, f"{vector.id}: {answer}"
        difference = compare(operation, vector.input, expected, answer, vector.bounds)
        assert difference is None, f"{vector.id}: {difference}"


# Philox4x32-10 of kat_vectors in Random123: counter, key, words.
PUBLISHED = {
    "philox-zeros": "6627e8d5e169c58dbc57ac4c9b00dbd8",
    "philox-ones": "408f276d41c83b0ea20bc7c66d5451fd",
    "philox-pi": "d16cfe0994fdcceb5001e42024126ea1",
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_philox(name: str) -> None:
    assert STORED[name].output == {"words": PUBLISHED[name]}


def test_published_crc() -> None:
    assert STORED["stream-check"].output == {"stream": "cbf43926"}


def masked(name: str) -> tuple[list[int], list[int]]:
    """The lanes of a mask's elements, drawn block by block, and its bits."""
    vector = STORED[name]
    given = decode_input("keep_mask", vector.input, name)
    assert vector.output is not None
    bits = decode_output("keep_mask", vector.output, vector.input, name)["mask"].tolist()
    lanes: list[int] = []
    for block in range(-(-len(bits) // 8)):
        counter = [block, int(given["sample"][0]), int(given["stream"][0]), 1]
        seed = int(given["seed"][0])
        words = random.philox4x32(np.array([counter], np.uint32), (seed & 0xFFFFFFFF, seed >> 32))[0]
        lanes += [half for word in words.tolist() for half in (word & 0xFFFF, word >> 16)]
    return lanes[: len(bits)], bits


@pytest.mark.parametrize(
    ("name", "lane", "kept"),
    [
        ("mask-zero-p", 0, 1),
        ("mask-at-threshold", 16384, 1),
        ("mask-below-threshold", 16383, 0),
        ("mask-tie-1", 0, 1),
        ("mask-tie-3", 1, 0),
        ("mask-tie-5", 2, 1),
        ("mask-largest-p", 65535, 1),
    ],
)
def test_masks_at_their_threshold(name: str, lane: int, kept: int) -> None:
    lanes, bits = masked(name)
    assert {bit for found, bit in zip(lanes, bits, strict=True) if found == lane} == {kept}


def test_wide_samples_are_taken_modulo_two_to_32() -> None:
    assert STORED["uniform-sample-wraps"].output == STORED["uniform-sample"].output


def test_what_a_sequence_keeps_does_not_depend_on_its_neighbours() -> None:
    def kept(name: str) -> Any:
        return np.frombuffer(bytes.fromhex(STORED[name].steps["kept"]), np.uint8).reshape(-1, 10)

    np.testing.assert_array_equal(kept("forward-packed")[3:], kept("forward-same-sample"))


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("lengths", [[5, 0], [0, 5], []])
@pytest.mark.parametrize(
    "operation", ["lora_forward", "lora_backward", "exact_linear", "exact_linear_backward"]
)
def test_an_empty_sequence_is_refused_in_one_sentence(operation: str, lengths: list[int], p: float) -> None:
    """With dropout and without."""
    layer = lora.Layer("empty", dropout=p)
    fields = layer.fields | {"lengths": lengths, "samples": list(range(len(lengths)))}
    fields["x"] = layer.x[: sum(lengths)].reshape(-1)
    if operation.endswith("backward"):
        fields["dout"] = layer.dout[: sum(lengths)].reshape(-1)
    with pytest.raises(InputError, match=r"at least one sequence, and each .* at least one row"):
        getattr(reference, operation)(**fields)


def test_safetensors_that_the_library_refuses_too(tmp_path: Path) -> None:
    """It takes four files that NF4-8.2 refuses, as far as is known, and refuses none that a vector takes."""
    path = tmp_path / "file.safetensors"
    accepted = set()
    for vector in of("read_tensor"):
        path.write_bytes(bytes.fromhex(vector.input["file"]))
        try:
            with safe_open(path, "numpy") as file:
                list(file.keys())
        except (SafetensorError, OSError):
            assert vector.refused is not None, vector.id
        else:
            accepted.add(vector.id)
    lenient = {name for name in accepted if name.startswith("file-")}
    assert lenient <= {"file-duplicate-tensor", "file-field-extra", "file-header-space", "file-shape-long"}


def test_written_files_are_read_by_the_library(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    for vector in of("write_tensor"):
        if vector.output is not None:
            path.write_bytes(bytes.fromhex(vector.output["file"]))
            with safe_open(path, "numpy") as file:
                assert vector.input["name"] in file.keys()  # noqa: SIM118  not a dict


def test_models_are_what_their_clause_says() -> None:
    output = STORED["quantize-nf4"].output
    assert output is not None
    config = json.loads(bytes.fromhex(output["files"]["config.json"]))
    assert config["quantization_config"]["bnb_4bit_compute_dtype"] == config["torch_dtype"] == "bfloat16"
    tied = STORED["model-tied"].output
    assert tied is not None
    assert "lm_head.weight" not in tied["tensors"]


def test_exact_matmul_keeps_what_float64_loses() -> None:
    big = np.array([[2.0**60, 1.0, -(2.0**60)]])
    assert exact.matmul(big, np.ones((3, 1)))[0, 0] == 1.0


@pytest.mark.parametrize("x", [0.0, 1.0, 3.0, 6.0])
def test_exact_functions_agree_with_the_machine(x: float) -> None:
    from decimal import Decimal

    assert float(exact.cos(Decimal(x))) == pytest.approx(math.cos(x), abs=1e-15)
    u, v = 0.25, x / 7
    radius = 0.02 * math.sqrt(-2 * math.log(1 - u))
    wanted = radius * math.cos(2 * math.pi * v), radius * math.sin(2 * math.pi * v)
    assert exact.normal(u, v) == pytest.approx(wanted, rel=1e-6, abs=1e-9)


def test_exact_loss_agrees_with_the_machine() -> None:
    logits = np.array([[1.0, 2.0, -3.0], [0.5, 0.0, 4.0]])
    loss, gradient = exact.cross_entropy(logits, [1, -100])
    p = np.exp(logits[0]) / np.exp(logits[0]).sum()
    assert loss == pytest.approx(-math.log(p[1]))
    np.testing.assert_allclose(gradient, [p - [0, 1, 0], [0, 0, 0]], atol=1e-15)
