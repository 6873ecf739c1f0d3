"""One NaN is as good as another, but for the operations whose clauses say which (NF4-13.6)."""

from typing import Any

import pytest
from nf4.conform.compare import compare
from nf4.conform.port import Answer

ADAMW: dict[str, Any] = {"dtype": "float32", "shape": [1]}


@pytest.mark.parametrize(
    ("operation", "given", "field", "expected", "got", "right"),
    [
        ("adamw", ADAMW, "p", "7fc00000", "ff800001", True),
        ("adamw", ADAMW, "p", "7fc00000", "3f800000", False),
        ("adamw", ADAMW, "p", "3f800000", "7fc00000", False),
        ("narrow", {"dtype": "float16"}, "y", "7e00", "7e01", False),
        ("widen", {"dtype": "float16"}, "y", "7fc00000", "ffc00000", False),
    ],
)
def test_nans(
    operation: str, given: dict[str, Any], field: str, expected: str, got: str, right: bool
) -> None:
    rest = {"m": "00000000", "v": "00000000"} if operation == "adamw" else {}
    wanted, answer = (Answer("output", {field: bits} | rest) for bits in (expected, got))
    assert (compare(operation, given, wanted, answer) is None) == right
