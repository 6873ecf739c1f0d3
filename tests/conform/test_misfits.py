"""What has no place in its shape: arrays of other lengths, negative sizes, zeros with a sign."""

import json

import jsonschema
import numpy as np
import oracle
import oracle_port
import pytest
from nf4.conform import reference
from nf4.conform.bugs import Plain
from nf4.conform.port import Answer
from nf4.conform.python_port import PythonPort
from nf4.conform.values import decode_input, from_hex, python_arguments, to_hex
from nf4.conform.vectors import VECTORS, Vector, load
from nf4.errors import InputError
from nf4.tensor import quantize

ALL = {vector.id: vector for vector in load()}
REFUSED = (
    *(f"refuse-shape-{slug}" for slug in ("short", "long", "negative", "inferred")),
    *("refuse-decode-shape-negative", "refuse-decode-shape-negative-of-nothing"),
    *("refuse-double-shape", "refuse-double-length"),
)


def answer(target: object, vector: Vector) -> Answer:
    return PythonPort(target, "it").run(vector.id, vector.operation, vector.input)


@pytest.mark.parametrize("slug", REFUSED)
def test_all_refuse_what_does_not_fit(slug: str) -> None:
    vector = ALL[slug]
    assert vector.refused is not None
    assert vector.clauses[0] in {"NF4-1.4", "NF4-12.5"}
    assert answer(reference, vector).kind == "refused"
    assert answer(Plain(), vector).kind == "refused"
    with pytest.raises(oracle.RefusedError):
        getattr(oracle_port, vector.operation)(vector.input)


def test_a_negative_size_is_refused_where_a_tensor_is_made() -> None:
    """Two of them may multiply to the number of elements."""
    q = quantize(np.ones(6, np.float32), 64)
    with pytest.raises(InputError, match=r"shape \[-2, -3\] has a negative size"):
        type(q)(q.codes, q.absmax, (-2, -3), q.dtype, q.block_size, q.codebook)


def test_no_array_is_made_up_for_a_python_port() -> None:
    """NumPy would take the size -1 for what is left."""
    x = np.ones(6, np.float32)
    for shape, message in (
        ([2, -1], "sizes must not be negative"),
        ([4], r"x has 6 elements; its shape \[4\]"),
    ):
        with pytest.raises(InputError, match=message):
            python_arguments("quantize", {"x": x, "shape": shape, "dtype": "float32"})


def test_sizes_may_be_negative_in_what_is_asked_but_not_in_what_is_answered() -> None:
    given = ALL["refuse-shape-negative"]
    assert decode_input(given.operation, given.input, given.id)["shape"] == [-2, -3]
    protocol = json.loads((VECTORS / "protocol.schema.json").read_text("utf-8"))
    fits = jsonschema.Draft202012Validator({"$ref": "#/$defs/arrays", "$defs": protocol["$defs"]})
    array = {"dtype": "uint8", "shape": [1, 1], "data": "00"}
    fits.validate({"a": array})
    assert not fits.is_valid({"a": {**array, "shape": [-1, -1]}})
    with pytest.raises(InputError, match=r"shape is \[-1, -1\]; it must be a list of counts"):
        decode_input("clip", {"gradients": {"a": {**array, "shape": [-1, -1]}}, "max_norm": "0" * 16}, "v")


@pytest.mark.parametrize("slug", ["nested-negative-zero", "mean-negative-zeros"])
def test_negative_zeros_among_absmax(slug: str) -> None:
    vector = ALL[slug]
    absmax = from_hex(vector.input["absmax"], "float32", slug)
    assert np.signbit(absmax).any()
    assert vector.output is not None
    plain = {"absmax": to_hex(np.abs(absmax))}
    for target in (reference, Plain()):
        for given in (vector.input, plain):
            got = PythonPort(target, "it").run(slug, vector.operation, given)
            assert got.output == vector.output
    assert oracle_port.encode_absmax(vector.input) == vector.output
    if slug == "mean-negative-zeros":
        assert vector.output == {"absmax_codes": "7f7f7f", "nested_absmax": "00000000", "offset": "00000000"}
