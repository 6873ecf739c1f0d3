"""Makes the vectors of spec/vectors from the reference: the same bytes every time (NF4-13.1)."""

import struct
from collections.abc import Mapping
from typing import Any

from nf4.conform import reference
from nf4.conform.values import decode_input, encode_input, encode_output, encode_steps, python_arguments
from nf4.conform.vectors import Vector
from nf4.errors import InputError


def make(
    operation: str,
    slug: str,
    clauses: str,
    comment: str,
    fields: Mapping[str, Any],
    *,
    flags: str = "",
    refused: str | None = None,
    output: Mapping[str, Any] | None = None,
    steps: Mapping[str, Any] | None = None,
    traced: bool = False,
    tolerance: Mapping[str, float] | None = None,
) -> Vector:
    """Return a vector whose output is what the reference makes of fields (NumPy values by field).

    clauses, without their "NF4-", and flags are separated by spaces. refused is the sentence why the input
    must be refused; a ValueError says that the reference did otherwise. output is what is demanded where it
    has a tolerance, and is known better than the reference computes it. traced: the vector has the steps that
    the reference answers.
    """
    given = encode_input(operation, fields, slug)
    answer = None
    try:
        arguments = python_arguments(operation, decode_input(operation, given, slug))
        found = dict(getattr(reference, operation)(**arguments))
        own = found.pop("steps", {})
        answer = encode_output(operation, found, given, slug)
        steps = own if traced else steps
    except InputError as error:
        if refused is None:
            raise ValueError(f"{slug}: the reference refuses it: {error}") from None
    if answer is not None and refused is not None:
        raise ValueError(f"{slug}: the reference does not refuse it")
    if output is not None:
        answer = encode_output(operation, output, given, slug)
    return Vector(
        id=slug,
        operation=operation,
        clauses=tuple(f"NF4-{clause}" for clause in clauses.split()),
        flags=tuple(sorted(flags.split())),
        comment=comment,
        input=given,
        output=answer,
        refused=refused,
        steps=encode_steps(operation, steps or {}, given, slug),
        tolerance={name: struct.pack(">d", bound).hex() for name, bound in (tolerance or {}).items()},
    )
