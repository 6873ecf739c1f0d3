"""The JSON values of vectors and of the protocol as NumPy arrays, and back (NF4-13.2)."""

import math
import re
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from nf4.conform.operations import OPERATIONS
from nf4.errors import InputError

DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float64": np.dtype(np.float64),
    "uint8": np.dtype(np.uint8),
    "uint32": np.dtype(np.uint32),
    "uint64": np.dtype(np.uint64),
}
"""The dtypes an array of a vector may have, by name."""

NAMES = {dtype: name for name, dtype in DTYPES.items()}

_DIGITS = re.compile(r"[0-9a-f]*")


def from_hex(text: object, dtype: str, where: str) -> NDArray[Any]:
    """Return the array [n] whose bits text lists, each element with all its digits (NF4-13.2).

    Raises InputError, beginning with where, on another type, another digit or a part of an element.
    """
    kind = DTYPES[dtype]
    digits = 2 * kind.itemsize
    if not isinstance(text, str):
        raise InputError(f"{where} is {_short(text)}; it must be a string of hexadecimal digits")
    if not _DIGITS.fullmatch(text):
        bad = next(i for i, c in enumerate(text) if c not in "0123456789abcdef")
        raise InputError(
            f"{where} has {text[bad]!r} at position {bad}; digits are 0 to 9 and a to f, in lower case"
        )
    if len(text) % digits:
        raise InputError(f"{where} has {len(text)} digits; each element of {dtype} takes {digits}")
    big_endian = np.frombuffer(bytes.fromhex(text), f">u{kind.itemsize}")
    return big_endian.astype(f"u{kind.itemsize}").view(kind)


def to_hex(array: NDArray[Any]) -> str:
    """Return the bits of the elements of array, in C order, in hexadecimal (NF4-13.2)."""
    flat = np.ascontiguousarray(array).reshape(-1)
    size = flat.dtype.itemsize
    return flat.view(f"u{size}").astype(f">u{size}").tobytes().hex()


def decode_input(operation: str, values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the inputs of an operation: arrays as NumPy [n], files as bytes, the rest as it is (NF4-13.3).

    values are JSON values by field. Raises InputError, beginning with where, on a field that is missing,
    unknown or not of its type.
    """
    spec = OPERATIONS[operation]
    return _decode(f"{where}: input", spec.inputs, spec.optional, values, values)


def decode_output(
    operation: str, values: Mapping[str, Any], given: Mapping[str, Any], where: str
) -> dict[str, Any]:
    """Return the outputs of an operation like decode_input; given is its input, JSON values or decoded.

    Raises InputError, beginning with where, on a field that is missing, unknown or not of its type.
    """
    return _decode(f"{where}: output", OPERATIONS[operation].outputs, frozenset(), values, given)


def decode_steps(
    operation: str, values: Mapping[str, Any], given: Mapping[str, Any], where: str
) -> dict[str, Any]:
    """Return the steps of an operation like decode_output; every step may be absent.

    Raises InputError, beginning with where, on one that the operation does not name or not of its type.
    """
    steps = OPERATIONS[operation].steps
    return _decode(f"{where}: steps", steps, frozenset(steps), values, given)


def encode_input(operation: str, fields: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the JSON values of what decode_input returns.

    Raises InputError, beginning with where, on a field that is missing, unknown or not of its type.
    """
    spec = OPERATIONS[operation]
    return _encode(f"{where}: input", spec.inputs, spec.optional, fields, fields)


def encode_output(
    operation: str, fields: Mapping[str, Any], given: Mapping[str, Any], where: str
) -> dict[str, Any]:
    """Return the JSON values of an operation's outputs: arrays of any shape, their dtype exactly its type.

    given is the input. Raises InputError, beginning with where, on a field that is missing, unknown or not of
    its type.
    """
    return _encode(f"{where}: output", OPERATIONS[operation].outputs, frozenset(), fields, given)


def encode_steps(
    operation: str, fields: Mapping[str, Any], given: Mapping[str, Any], where: str
) -> dict[str, Any]:
    """Return the JSON values of steps like encode_output; every step may be absent."""
    steps = OPERATIONS[operation].steps
    return _encode(f"{where}: steps", steps, frozenset(steps), fields, given)


def python_arguments(operation: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the decoded inputs as a Python port gets them: to quantize, x comes in its shape (NF4-13.3).

    Raises InputError where no array has that shape and the elements of x: NumPy refuses it for the port.
    """
    arguments = dict(fields)
    if operation in {"quantize", "quantize_double"}:
        del arguments["dtype"]  # x has it
        x, shape = arguments["x"], arguments.pop("shape")
        if min(shape, default=0) < 0:
            raise InputError(f"no array has the shape {shape}; its sizes must not be negative (NF4-1.4)")
        if x.size != math.prod(shape):
            raise InputError(f"x has {x.size} elements; its shape {shape} has others (NF4-12.5)")
        arguments["x"] = x.reshape(shape)
    return arguments


def resolve(kind: str, given: Mapping[str, Any], where: str) -> str:
    """Return a field's type, "=dtype" replaced by the dtype that the input field of that name gives.

    Raises InputError, beginning with where, if that is not one of DTYPES.
    """
    if not kind.startswith("="):
        return kind
    dtype = given.get(kind[1:])
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise InputError(f"{where} has the dtype {_short(dtype)}; choose one of {', '.join(DTYPES)}")
    return dtype


def _check_names(
    where: str, types: Mapping[str, str], optional: frozenset[str], values: Mapping[str, Any]
) -> None:
    if not isinstance(values, Mapping):
        raise InputError(f"{where} is {_short(values)}; it must be an object of {', '.join(types)}")
    for name in types:
        if name not in values and name not in optional:
            raise InputError(
                f"{where} has no {name}; it needs {', '.join(t for t in types if t not in optional)}"
            )
    for name in values:
        if name not in types:
            raise InputError(
                f"{where} has a field {_short(name)}; its fields are {', '.join(types) or 'none'}"
            )


def _decode(
    where: str,
    types: Mapping[str, str],
    optional: frozenset[str],
    values: Mapping[str, Any],
    given: Mapping[str, Any],
) -> dict[str, Any]:
    _check_names(where, types, optional, values)
    return {
        name: _decode_one(f"{where}: {name}", resolve(types[name], given, f"{where}: {name}"), value)
        for name, value in values.items()
    }


def _decode_one(where: str, kind: str, value: Any) -> Any:
    if kind in DTYPES:
        return from_hex(value, kind, where)
    if kind == "bytes":
        return from_hex(value, "uint8", where).tobytes()
    if kind == "files":
        _check(where, isinstance(value, dict), value, "an object of path to file")
        return {path: from_hex(text, "uint8", f"{where}: {path}").tobytes() for path, text in value.items()}
    if kind == "arrays":
        _check(where, isinstance(value, dict), value, "an object of name to array")
        return {name: _decode_array(f"{where}: {name}", array) for name, array in value.items()}
    return _check_plain(where, kind, value)


def _decode_array(where: str, value: Any) -> NDArray[Any]:
    _check(
        where,
        isinstance(value, dict) and set(value) == {"dtype", "shape", "data"},
        value,
        "an object of dtype, shape and data",
    )
    dtype = resolve("=dtype", value, where)
    shape = value["shape"]
    counts = isinstance(shape, list) and all(_is_count(size, 0) for size in shape)
    _check(f"{where}: shape", counts, shape, "a list of counts")
    flat = from_hex(value["data"], dtype, f"{where}: data")
    try:
        return flat.reshape(shape)
    except ValueError:
        raise InputError(
            f"{where} has {flat.size} elements; they must be as many as its shape {shape} has"
        ) from None


def _check_plain(where: str, kind: str, value: Any) -> Any:
    if kind == "int":
        _check(where, _is_count(value, 1 - 2**31), value, "an integer of at most 31 bits")
    elif kind == "bool":
        _check(where, isinstance(value, bool), value, "true or false")
    elif kind in {"str", "dtype", "codebook"}:
        _check(where, isinstance(value, str), value, "a string")
    elif kind == "strs":
        fine = isinstance(value, list) and all(isinstance(item, str) for item in value)
        _check(where, fine, value, "a list of strings")
    else:
        # "shape" too: a size below 0 is for the port to refuse (NF4-1.4)
        fine = isinstance(value, list) and all(_is_count(item, 1 - 2**31) for item in value)
        _check(where, fine, value, "a list of integers")
    return value


def _encode(
    where: str,
    types: Mapping[str, str],
    optional: frozenset[str],
    fields: Mapping[str, Any],
    given: Mapping[str, Any],
) -> dict[str, Any]:
    _check_names(where, types, optional, fields)
    return {
        name: _encode_one(f"{where}: {name}", resolve(types[name], given, f"{where}: {name}"), fields[name])
        for name in types
        if name in fields
    }


def _encode_one(where: str, kind: str, value: Any) -> Any:
    if kind in DTYPES:
        array = np.asarray(value)
        if array.dtype != DTYPES[kind]:
            raise InputError(f"{where} is of dtype {array.dtype}; it must be {kind}")
        return to_hex(array)
    if kind == "bytes":
        _check(where, isinstance(value, bytes), value, "bytes")
        return value.hex()
    if kind == "files":
        _check(where, isinstance(value, dict), value, "a dict of path to bytes")
        return {path: _encode_one(f"{where}: {path}", "bytes", file) for path, file in value.items()}
    if kind == "arrays":
        _check(where, isinstance(value, dict), value, "a dict of name to array")
        return {name: _encode_array(f"{where}: {name}", array) for name, array in value.items()}
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, tuple):
        value = list(value)
    return _check_plain(where, kind, value)


def _encode_array(where: str, value: Any) -> dict[str, Any]:
    array = np.asarray(value)
    if array.dtype not in NAMES:
        raise InputError(f"{where} is of dtype {array.dtype}; it must be one of {', '.join(DTYPES)}")
    return {"dtype": NAMES[array.dtype], "shape": list(array.shape), "data": to_hex(array)}


def _is_count(value: Any, low: int) -> bool:
    return type(value) is int and low <= value < 2**31  # True is an int too


def _check(where: str, fine: bool, value: Any, what: str) -> None:
    if not fine:
        raise InputError(f"{where} is {_short(value)}; it must be {what}")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
