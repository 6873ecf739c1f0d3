"""The JSON Schemas of the vector files and of the protocol, made of the table of operations (NF4-13)."""

import json
from collections.abc import Iterable
from typing import Any

from nf4.conform.operations import OPERATIONS
from nf4.conform.values import DTYPES
from nf4.floats import DTYPES as FLOATS

Schema = dict[str, Any]

_DIALECT = "https://json-schema.org/draft/2020-12/schema"
_INTEGER = {"type": "integer", "exclusiveMinimum": -(2**31), "exclusiveMaximum": 2**31}
_COUNT = {"type": "integer", "minimum": 0, "exclusiveMaximum": 2**31}
_TEXT = {"type": "string", "minLength": 1}


def schemas() -> dict[str, bytes]:
    """Return vectors.schema.json and protocol.schema.json, by name."""
    both = {"vectors.schema.json": _vectors(), "protocol.schema.json": _protocol()}
    return {name: f"{_lines(schema)}\n".encode() for name, schema in both.items()}


def _lines(value: Any, depth: int = 0) -> str:
    """JSON with a line for each definition and each part: what is inside one is on its line."""
    whole = json.dumps(value)
    if depth == 2 or not isinstance(value, dict | list) or len(whole) < 110:
        return whole
    space = " " * (depth + 1)
    if isinstance(value, dict):
        items = [f"{space}{json.dumps(key)}: {_lines(item, depth + 1)}" for key, item in value.items()]
    else:
        items = [space + _lines(item, depth + 1) for item in value]
    begin, end = "{}" if isinstance(value, dict) else "[]"
    return ",\n".join([begin + "\n" + items[0], *items[1:]]) + f"\n{space[1:]}{end}"


def _array(dtype: str) -> Schema:
    digits = 2 * DTYPES[dtype].itemsize
    return {"type": "string", "pattern": f"^([0-9a-f]{{{digits}}})*$"}


def _object(properties: dict[str, Any], optional: Iterable[str] = ()) -> Schema:
    return {
        "type": "object",
        "properties": properties,
        "required": [name for name in properties if name not in optional],
        "additionalProperties": False,
    }


def _types() -> dict[str, Schema]:
    """A definition for each type of a field; "any-dtype" is what "=dtype" may become."""
    of_dtype = [
        {"if": {"properties": {"dtype": {"const": dtype}}}, "then": {"properties": {"data": _ref(dtype)}}}
        for dtype in DTYPES
    ]
    shaped = _object(
        {
            "dtype": {"enum": list(DTYPES)},
            "shape": {"type": "array", "items": _COUNT},
            "data": {"type": "string"},
        }
    )
    return {
        **{dtype: _array(dtype) for dtype in DTYPES},
        "any-dtype": _array("uint8"),
        "int": _INTEGER,
        "bool": {"type": "boolean"},
        "str": {"type": "string"},
        "dtype": {"enum": list(DTYPES)},
        "codebook": _TEXT,
        "ints": {"type": "array", "items": _INTEGER},
        "strs": {"type": "array", "items": {"type": "string"}},
        "shape": {"type": "array", "items": _INTEGER},
        "bytes": _array("uint8"),
        "files": {"type": "object", "additionalProperties": _ref("bytes")},
        "arrays": {"type": "object", "additionalProperties": {**shaped, "allOf": of_dtype}},
    }


def _ref(name: str) -> Schema:
    return {"$ref": f"#/$defs/{name}"}


def _fields(types: dict[str, str], optional: Iterable[str] = ()) -> Schema:
    """The object of an operation's fields."""
    return _object(
        {name: _ref("any-dtype" if kind.startswith("=") else kind) for name, kind in types.items()}, optional
    )


def _definitions() -> dict[str, Schema]:
    """The types, and input, output and steps of each operation."""
    definitions = _types()
    for name, operation in OPERATIONS.items():
        definitions[f"{name}.input"] = _fields(operation.inputs, operation.optional)
        definitions[f"{name}.output"] = _fields(operation.outputs)
        definitions[f"{name}.steps"] = _fields(operation.steps, operation.steps)
    return definitions


def _vectors() -> Schema:
    vector = _object(
        {
            "id": {"type": "string", "pattern": "^[a-z0-9]+(-[a-z0-9]+)*$"},
            "clauses": {
                "type": "array",
                "items": {"type": "string", "pattern": "^NF4-[0-9]+\\.[0-9]+$"},
                "minItems": 1,
                "uniqueItems": True,
            },
            "flags": {
                "type": "array",
                "items": {"type": "string", "pattern": "^([A-Z][a-z0-9]*)+$"},
                "uniqueItems": True,
            },
            "comment": {"type": "string", "pattern": "\\.$"},
            "input": {"type": "object"},
            "output": {"type": "object"},
            "refused": {"type": "string", "pattern": "\\.$"},
            "steps": {"type": "object"},
            "tolerance": {"type": "object"},
        },
        optional=("output", "refused", "steps", "tolerance"),
    )
    # Exactly one of the two, and what is refused has no values on the way
    valued = ("output", "steps", "tolerance")
    answered = [
        {"required": ["output"], "not": {"required": ["refused"]}},
        {"required": ["refused"], "not": {"anyOf": [{"required": [name]} for name in valued]}},
    ]
    file = _object(
        {
            "specification": {"type": "string", "pattern": "^[0-9]+\\.[0-9]+\\.[0-9]+$"},
            "operation": {"enum": list(OPERATIONS)},
            "vectors": {"type": "array", "items": {**vector, "oneOf": answered}, "minItems": 1},
        }
    )
    return {
        "$schema": _DIALECT,
        "title": "A file of vectors (NF4-13.1)",
        **file,
        "allOf": [_of_operation(name) for name in OPERATIONS],
        "$defs": _definitions(),
    }


def _of_operation(name: str) -> Schema:
    """What the vectors of one operation hold, their arrays of the dtype that the input gives."""
    operation = OPERATIONS[name]
    bounds = {field: _ref("float64") for field in operation.tolerance}
    parts: Schema = {part: _ref(f"{name}.{part}") for part in ("input", "output", "steps")}
    vector: Schema = {"properties": {**parts, "tolerance": _object(bounds, bounds)}}
    sides = {"input": operation.inputs, "output": operation.outputs, "steps": operation.steps}
    by_dtype = []
    for key in sorted({kind[1:] for types in sides.values() for kind in types.values() if kind[0] == "="}):
        for dtype in FLOATS:
            arrays = {
                side: {"properties": {field: _ref(dtype) for field in fields}}
                for side, types in sides.items()
                if (fields := [field for field, kind in types.items() if kind == f"={key}"])
            }
            given = {"input": {"properties": {key: {"const": dtype}}, "required": [key]}}
            by_dtype.append({"if": {"properties": given}, "then": {"properties": arrays}})
    if by_dtype:
        vector["allOf"] = by_dtype
    return {
        "if": {"properties": {"operation": {"const": name}}},
        "then": {"properties": {"vectors": {"items": vector}}},
    }


def _protocol() -> Schema:
    echo = _object({"dtype": _ref("dtype"), "x": _ref("any-dtype")})
    runs = [
        _object(
            {
                "cmd": {"const": "run"},
                "id": _TEXT,
                "operation": {"const": name},
                "input": echo if name == "echo" else _ref(f"{name}.input"),
            }
        )
        for name in ("echo", *OPERATIONS)
    ]
    start = _object({"cmd": {"const": "start"}, "version": {"const": 1}})
    stop = _object({"cmd": {"const": "stop"}})
    greeting = _object(
        {
            "version": {"const": 1},
            "name": _TEXT,
            "operations": {"type": "array", "items": {"type": "string"}, "uniqueItems": True},
        }
    )
    output = _object({"id": _TEXT, "output": _ref("output"), "steps": _ref("steps")}, ("steps",))
    sentences = [
        _object({"id": _TEXT, kind: {"type": "string"}}) for kind in ("refused", "skipped", "errored")
    ]
    outputs = [_object({"x": _ref("any-dtype")}), *(_ref(f"{name}.output") for name in OPERATIONS)]
    return {
        "$schema": _DIALECT,
        "title": "A line of the protocol (NF4-13.4): $defs/asked from the kit, $defs/answered from the port",
        "anyOf": [_ref("asked"), _ref("answered")],
        "$defs": {
            "asked": {"oneOf": [start, *runs, stop]},
            "answered": {"oneOf": [greeting, output, *sentences]},
            "output": {"anyOf": outputs},
            "steps": {"type": "object"},
            **_definitions(),
        },
    }
