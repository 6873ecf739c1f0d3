"""The vectors of single weights in files: safetensors good and bad, quantized weights read and written."""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nf4.conform.generate import make
from nf4.conform.generate.exact import numbers
from nf4.conform.values import NAMES
from nf4.conform.vectors import Vector
from nf4.floats import BFLOAT16
from nf4.formats.bitsandbytes import weight_tensors
from nf4.formats.files import DTYPE_NAMES
from nf4.nested import NestedAbsmax
from nf4.tensor import QuantizedTensor, quantize

Array = NDArray[Any]
Header = dict[str, Any]

STATE = "w.weight.quant_state.bitsandbytes__nf4"


def vectors() -> Iterator[Vector]:
    """Yield the vectors of files."""
    yield from _read_tensor()
    yield from _damaged_containers()
    yield from _damaged_weights()
    yield from _write_tensor()


def _lay(tensors: Mapping[str, Array]) -> tuple[Header, bytes]:
    """The header and the data of a file with these tensors, in their order."""
    header: Header = {}
    data = b""
    for name, value in tensors.items():
        raw = np.ascontiguousarray(value).tobytes()
        header[name] = {
            "dtype": DTYPE_NAMES[value.dtype],
            "shape": list(value.shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    return header, data


def _pack(header: Header | bytes, data: bytes, pad: int = 8) -> bytes:
    text = header if isinstance(header, bytes) else to_json(header)
    text += b" " * (-len(text) % pad)
    return len(text).to_bytes(8, "little") + text + data


def in_file(tensors: Mapping[str, Array]) -> bytes:
    """A file with these tensors by descending item size, then by name, as NF4-8.3 lays them out."""
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    return _pack(*_lay({name: tensors[name] for name in order}))


def to_json(value: Any) -> bytes:
    """Return a JSON value as text without spaces."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


def _text(text: bytes) -> Array:
    return np.frombuffer(text, np.uint8)


def _weight(
    dtype: str = "bfloat16",
    *,
    codebook: str = "nf4",
    double_quant: bool = False,
    shape: tuple[int, ...] = (3, 5),
) -> QuantizedTensor:
    x = numbers(f"file.{dtype}.{codebook}", *shape, scale=0.1, dtype=dtype)
    return quantize(x, 32, codebook, double_quant)


def _parts(**options: Any) -> dict[str, Array]:
    """The tensors of a 4-bit weight named w.weight."""
    return weight_tensors("w.weight", _weight(**options))


def _state(tensors: Mapping[str, Array], change: Callable[[Header], Any]) -> dict[str, Array]:
    """The tensors with the JSON of the quant_state changed: change returns an object, or the text itself."""
    found = change(json.loads(tensors[STATE].tobytes()))
    return {**tensors, STATE: _text(found if isinstance(found, bytes) else to_json(found))}


def _read_tensor() -> Iterator[Vector]:
    def read(slug: str, file: bytes, comment: str, flags: str = "", clauses: str = "8.4 8.5") -> Vector:
        fields = {"file": file, "name": "w.weight"}
        return make("read_tensor", f"read-{slug}", clauses, comment, fields, flags=flags)

    plain, nested = _parts(), _parts(double_quant=True)
    yield read(
        "nf4", in_file(plain), "An NF4 weight that was bfloat16, of an odd number of elements.", "NibbleOrder"
    )
    yield read(
        "fp4",
        in_file(_parts(dtype="float16", codebook="fp4")),
        "An FP4 weight that was float16.",
        "QuantTypeIgnored",
    )
    yield read("nested", in_file(nested), "A double-quantized weight.", "OffsetOmitted")
    blocks = _parts(dtype="float32", double_quant=True, shape=(4, 20))
    yield read("nested-float32", in_file(blocks), "Three blocks.", "NestedAbsmaxIgnored OffsetOmitted")
    other = plain["w.weight.quant_map"].copy()
    other[[2, 11]] = [-0.5, 0.25]
    yield read(
        "map",
        in_file({**plain, "w.weight.quant_map": other}),
        "The stored codebook is the one to decode with.",
        "MapIgnored",
    )
    other = blocks["w.weight.nested_quant_map"].copy()
    other[:] = other.view(np.uint32)[::-1].view(np.float32)
    yield read(
        "nested-map",
        in_file({**blocks, "w.weight.nested_quant_map": other}),
        "So is the stored map.",
        "MapIgnored",
    )
    codes = plain["w.weight"].reshape(-1)
    for dtype in ("BF16", "F16", "F32", "I8"):
        kind = next(kind for kind, name in DTYPE_NAMES.items() if name == dtype)
        stored = {**plain, "w.weight": codes.view(kind).reshape(-1, 1)}
        yield read(
            f"storage-{dtype.lower()}",
            in_file(stored),
            f"The codes under the dtype {dtype}.",
            "StorageRefused",
        )
    yield read("flat", in_file({**plain, "w.weight": codes}), "The codes in one dimension.", "StorageRefused")
    yield read("shape", in_file(_parts(shape=(2, 3, 4))), "Three dimensions.", "")
    yield read("scalar", in_file(_parts(shape=())), "A weight without dimensions.", "")
    yield read("empty", in_file(_parts(shape=(0, 4))), "A weight without elements.", "EmptyRefused")
    yield read(
        "bias", in_file({**plain, "w.bias": np.ones(3, np.float32)}), "Other tensors beside the weight.", ""
    )
    header, data = _lay(plain)
    yield read(
        "unaligned",
        _pack(header, data, pad=1),
        "No padding, the tensors unaligned, in another order.",
        "",
        clauses="8.2 8.4",
    )
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}, indent=2).encode()
    yield read(
        "metadata",
        _pack(text, data),
        "Metadata, and white space in the header.",
        "",
        clauses="8.2 8.4",
    )
    turned = {name: header[name] for name in reversed(header)}
    yield read(
        "turned",
        _pack(turned, data),
        "A header in another order than the data.",
        "",
        clauses="8.2 8.4",
    )
    state = _state(plain, lambda fields: json.dumps(dict(reversed(fields.items())), indent=1).encode())
    yield read("state-order", in_file(state), "The JSON's keys in another order, with white space.", "")
    for slug, value in (
        ("integer", b"1"),
        ("short", b"0.1"),
        ("exponent", b"12.5E-2"),
        ("negative", b"-0.01"),
    ):
        offset = {**nested, STATE: _text(_with_offset(json.loads(nested[STATE].tobytes()), value))}
        yield read(f"offset-{slug}", in_file(offset), f"nested_offset as {value.decode()}.", "OffsetOmitted")


def _with_offset(fields: Header, number: bytes) -> bytes:
    return to_json({**fields, "nested_offset": "@"}).replace(b'"@"', number)


def _damaged_containers() -> Iterator[Vector]:
    """Files that NF4-8.2 refuses, whatever is in them."""
    header, data = _lay(_parts())
    first, last = next(iter(header)), list(header)[-1]

    def entry(name: str = first, **change: Any) -> Header:
        return {**header, name: {**header[name], **change}}

    def moved(by: int) -> Header:
        start, stop = header[last]["data_offsets"]
        return entry(last, data_offsets=[start + by, stop + by])

    good, text = _pack(header, data), to_json(header)
    last_begin = header[last]["data_offsets"][0]
    begin, end = header[first]["data_offsets"]
    cases: dict[str, tuple[bytes, str, str]] = {
        "nothing": (b"", "A file of no bytes.", "HeaderUnchecked"),
        "short": (good[:5], "Too few bytes for the header's length.", "HeaderUnchecked"),
        "header-long": (good[:40], "A header that is longer than the file.", "HeaderUnchecked"),
        "header-huge": (b"\xff" * 7 + b"\x7f" + good[8:], "A header of 2^63 - 1 bytes.", "HeaderUnchecked"),
        "header-limit": (
            (100_000_001).to_bytes(8, "little") + good[8:],
            "A header above the limit, and the file.",
            "HeaderUnchecked",
        ),
        "header-space": (_pack(b" " + text, data), "A header that does not begin with {.", "HeaderStart"),
        "header-list": (_pack(b"[]", b""), "A header that is no object.", "HeaderStart"),
        "header-cut": (_pack(text[:-1], data), "A header that is not JSON.", "HeaderUnchecked"),
        "header-latin": (
            _pack(text.replace(b"w.weight", b"\xe9.weight", 1), data),
            "A header that is not UTF-8.",
            "HeaderUnchecked",
        ),
        "duplicate-tensor": (
            _pack(text[:-1] + b"," + to_json({first: header[first]})[1:], data),
            "A tensor's name twice.",
            "DuplicateKeys",
        ),
        "duplicate-field": (
            _pack(text.replace(b'"dtype"', b'"dtype":"U8","dtype"', 1), data),
            "A field twice.",
            "DuplicateKeys",
        ),
        "field-extra": (_pack(entry(order="C"), data), "A field nobody knows.", "FieldsUnchecked"),
        "field-missing": (
            _pack({**header, first: {k: v for k, v in header[first].items() if k != "shape"}}, data),
            "A tensor without a shape.",
            "FieldsUnchecked",
        ),
        "dtype-unknown": (_pack(entry(dtype="F3"), data), "A dtype nobody knows.", "FieldsUnchecked"),
        "shape-negative": (
            _pack(entry(shape=[-8, -1]), data),
            "Sizes whose product is right, and negative.",
            "ShapeUnchecked",
        ),
        "shape-fraction": (
            _pack(entry(shape=[8.0, 1]), data),
            "A size that is not an integer.",
            "ShapeUnchecked",
        ),
        "shape-true": (
            _pack(entry(shape=[8, True]), data),
            "A size that is a truth value.",
            "ShapeUnchecked",
        ),
        "shape-huge": (
            _pack(
                {**header, "w.none": {"dtype": "U8", "shape": [2**32, 2**32], "data_offsets": [0, 0]}}, data
            ),
            "A product of 2^64, which wraps to 0.",
            "ShapeUnchecked",
        ),
        "shape-wraps": (
            _pack(entry(shape=[2**61 + 1, 8]), data),
            "A product that modulo 2^64 is right.",
            "ShapeUnchecked",
        ),
        "shape-huge-zero": (
            _pack(
                {**header, "w.none": {"dtype": "U8", "shape": [2**62, 4, 0], "data_offsets": [0, 0]}}, data
            ),
            "Sizes beyond every address beside a 0.",
            "ShapeUnchecked",
        ),
        "shape-long": (_pack(entry(shape=[8] + [1] * 32), data), "A shape of 33 sizes.", "ShapeUnchecked"),
        "offsets-short": (
            _pack(entry(data_offsets=[begin, end - 1]), data),
            "Offsets of a byte too few.",
            "OffsetsUnchecked",
        ),
        "offsets-turned": (
            _pack(entry(data_offsets=[end, begin]), data),
            "Offsets that fall.",
            "OffsetsUnchecked",
        ),
        "offsets-negative": (
            _pack(entry(data_offsets=[begin - 8, end - 8]), data),
            "Offsets before the data.",
            "OffsetsUnchecked",
        ),
        "overlap": (
            _pack({**header, "w.none": {"dtype": "U8", "shape": [4], "data_offsets": [end - 4, end]}}, data),
            "Tensors that overlap.",
            "OverlapAccepted",
        ),
        "gap": (
            _pack(moved(4), data[:last_begin] + bytes(4) + data[last_begin:]),
            "Four bytes between tensors that belong to none.",
            "GapsAccepted",
        ),
        "gap-first": (
            _pack(
                {n: {**e, "data_offsets": [o + 8 for o in e["data_offsets"]]} for n, e in header.items()},
                bytes(8) + data,
            ),
            "A gap before the first tensor.",
            "GapsAccepted",
        ),
        "cut": (good[:-3], "A file that ends within its last tensor.", "OffsetsUnchecked"),
        "trailing": (good + b"\0", "A byte after the last tensor.", "GapsAccepted"),
        "metadata-number": (
            _pack({"__metadata__": {"step": 1}, **header}, data),
            "Metadata that is not text.",
            "FieldsUnchecked",
        ),
    }
    for slug, (file, comment, flag) in cases.items():
        fields = {"file": file, "name": "w.weight"}
        yield make("read_tensor", f"file-{slug}", "8.2", comment, fields, flags=flag, refused=comment)


def _damaged_weights() -> Iterator[Vector]:
    """Files that are sound, and hold what NF4-8.5 refuses."""
    plain, nested = _parts(), _parts(double_quant=True)
    absmax, codes = plain["w.weight.absmax"], plain["w.weight"]

    def without(tensors: Mapping[str, Array], part: str) -> dict[str, Array]:
        return {name: value for name, value in tensors.items() if name != part}

    def state(tensors: Mapping[str, Array] = plain, **change: Any) -> dict[str, Array]:
        return _state(tensors, lambda fields: fields | change)

    def dropped(tensors: Mapping[str, Array], *keys: str) -> dict[str, Array]:
        return _state(tensors, lambda fields: {key: fields[key] for key in fields if key not in keys})

    def set_to(tensors: Mapping[str, Array], part: str, at: int, value: float) -> dict[str, Array]:
        changed = tensors[part].copy()
        changed[at] = value
        return {**tensors, part: changed}

    parts, keys, finite = "PartsUnchecked", "StateUnchecked", "NonFiniteAccepted"
    cases: dict[str, tuple[dict[str, Array], str, str]] = {
        "no-codes": (without(plain, "w.weight"), "The codes are missing.", parts),
        "no-absmax": (without(plain, "w.weight.absmax"), "absmax is missing.", parts),
        "no-map": (without(plain, "w.weight.quant_map"), "The codebook is missing.", "MapIgnored"),
        "no-state": (without(plain, STATE), "The quant_state is missing.", parts),
        "no-nested-absmax": (
            without(nested, "w.weight.nested_absmax"),
            "The nested absmax are missing.",
            parts,
        ),
        "no-nested-map": (
            without(nested, "w.weight.nested_quant_map"),
            "The nested map is missing.",
            "MapIgnored",
        ),
        "unknown-part": ({**plain, "w.weight.SCB": absmax}, "A part of an 8-bit weight.", parts),
        "two-states": (
            {**plain, STATE.replace("nf4", "fp4"): plain[STATE]},
            "Two quant_states, of two codebooks.",
            parts,
        ),
        "nested-parts": (
            {**plain, "w.weight.nested_absmax": absmax},
            "A nested part of a weight that is not.",
            parts,
        ),
        "codes-short": ({**plain, "w.weight": codes[:-1]}, "Codes for two elements fewer.", parts),
        "codes-long": ({**plain, "w.weight": np.append(codes, codes[:1])}, "Codes for more elements.", parts),
        "absmax-long": (
            {**plain, "w.weight.absmax": np.repeat(absmax, 2)},
            "Two absmax for one block.",
            parts,
        ),
        "absmax-bfloat16": (
            {**plain, "w.weight.absmax": absmax.astype(BFLOAT16)},
            "absmax in bfloat16.",
            parts,
        ),
        "map-short": (
            {**plain, "w.weight.quant_map": plain["w.weight.quant_map"][:8]},
            "A codebook of eight.",
            parts,
        ),
        "state-dtype": ({**plain, STATE: plain[STATE].view(np.int8)}, "The JSON as I8.", parts),
        "absmax-nan": (set_to(plain, "w.weight.absmax", 0, math.nan), "absmax is NaN.", finite),
        "absmax-infinite": (set_to(plain, "w.weight.absmax", 0, math.inf), "absmax is infinite.", finite),
        "map-nan": (set_to(plain, "w.weight.quant_map", 3, math.nan), "A NaN in the codebook.", finite),
        "nested-absmax-nan": (
            set_to(nested, "w.weight.nested_absmax", 0, math.nan),
            "A nested absmax is NaN.",
            finite,
        ),
        "nested-map-infinite": (
            set_to(nested, "w.weight.nested_quant_map", 200, -math.inf),
            "An infinity in the nested map, at a code nobody has.",
            finite,
        ),
        "decoded-infinite": (
            {
                **_state(nested, lambda fields: _with_offset(fields, b"3e38")),
                "w.weight.nested_absmax": np.full(1, 3e38, np.float32),
                "w.weight.absmax": np.full(1, 255, np.uint8),
            },
            "Finite parts whose decoded absmax is infinite.",
            finite,
        ),
        "key-extra": (state(extra=1), "A key of the JSON that nobody knows.", keys),
        "key-missing": (dropped(plain, "blocksize"), "A key is missing.", keys),
        "key-nested-missing": (dropped(nested, "nested_offset"), "The offset is missing.", "OffsetOmitted"),
        "keys-flat": (
            dropped(nested, "nested_blocksize", "nested_dtype", "nested_offset"),
            "The keys of a weight that is not nested, and the parts of one that is.",
            keys,
        ),
        "key-twice": (
            _state(plain, lambda fields: to_json(fields)[:-1] + b',"blocksize":64}'),
            "A key twice.",
            "DuplicateKeys",
        ),
        "quant-type": (
            state(quant_type="fp4"),
            "quant_type is not what the tensor's name says.",
            "QuantTypeIgnored",
        ),
        "dtype-float64": (state(dtype="float64"), "A dtype that is not quantized.", keys),
        "shape-other": (state(shape=[3, 6]), "A shape of more elements.", parts),
        "shape-negative": (state(shape=[-3, -5]), "A shape whose product is right, and negative.", keys),
        "shape-text": (state(shape="[3, 5]"), "A shape that is text.", keys),
        "blocksize-48": (state(blocksize=48), "A block size nobody has.", keys),
        "blocksize-fraction": (state(blocksize=32.0), "A block size that is not an integer.", keys),
        "nested-blocksize": (
            state(nested, nested_blocksize=64),
            "A nested block size that is not 256.",
            keys,
        ),
        "nested-dtype": (state(nested, nested_dtype="float16"), "A nested dtype that is not float32.", keys),
        "offset-large": (
            _state(nested, lambda fields: _with_offset(fields, b"1e39")),
            "An offset beyond binary32.",
            finite,
        ),
        "offset-nan": (
            _state(nested, lambda fields: _with_offset(fields, b"NaN")),
            "NaN is not JSON.",
            finite,
        ),
        "offset-text": (state(nested, nested_offset="0.1"), "An offset that is text.", keys),
        "state-list": (_state(plain, lambda fields: to_json([fields])), "JSON that is no object.", keys),
        "state-broken": (_state(plain, lambda fields: to_json(fields)[:-1]), "Text that is not JSON.", keys),
    }
    unknown = {name.replace("bitsandbytes__nf4", "bitsandbytes__af4"): value for name, value in plain.items()}
    cases["codebook-unknown"] = (unknown, "A codebook nobody knows.", "QuantTypeIgnored")
    for slug, (tensors, comment, flag) in cases.items():
        fields = {"file": in_file(tensors), "name": "w.weight"}
        yield make("read_tensor", f"weight-{slug}", "8.5", comment, fields, flags=flag, refused=comment)
    yield make(
        "read_tensor",
        "weight-absent",
        "8.5",
        "There is no weight of that name.",
        {"file": in_file(plain), "name": "v.weight"},
        refused="There is no v.weight.",
    )


def _write_tensor() -> Iterator[Vector]:
    def fields(q: QuantizedTensor, name: str = "w.weight") -> dict[str, Any]:
        found = {
            "name": name,
            "codes": q.codes,
            "shape": list(q.shape),
            "dtype": NAMES[np.dtype(q.dtype)],
            "block_size": q.block_size,
            "codebook": q.codebook.name,
        }
        if isinstance(q.absmax, NestedAbsmax):
            offset = np.array([q.absmax.offset])
            return found | {
                "absmax_codes": q.absmax.codes,
                "nested_absmax": q.absmax.absmax,
                "offset": offset,
            }
        return found | {"absmax": q.absmax}

    def write(slug: str, comment: str, flags: str, given: dict[str, Any], **more: Any) -> Vector:
        return make("write_tensor", f"write-{slug}", "8.3 8.4", comment, given, flags=flags, **more)

    layout = "Alignment"
    plain = fields(_weight())
    yield write("nf4", "An NF4 weight of an odd number of elements.", layout, plain)
    yield write(
        "fp4",
        "An FP4 weight that was float16.",
        layout,
        fields(_weight("float16", codebook="fp4"), "model.layers.0.mlp.up_proj.weight"),
    )
    yield write(
        "nested",
        "A double-quantized weight.",
        layout,
        fields(_weight("float32", double_quant=True, shape=(4, 20))),
    )
    yield write("empty", "A weight without elements.", "", fields(_weight(shape=(0, 4))))
    yield write(
        "vector",
        "A weight of one dimension, its name beyond ASCII.",
        layout,
        fields(_weight(shape=(9,)), "é.weight"),
    )
    for slug, change, comment in (
        ("absmax-long", {"absmax": np.ones(2, np.float32)}, "Two absmax for one block."),
        ("codes-short", {"codes": plain["codes"][1:]}, "Codes for two elements fewer."),
        ("block-size", {"block_size": 48}, "A block size nobody has."),
        ("dtype", {"dtype": "float64"}, "A dtype that is not quantized."),
        ("codebook", {"codebook": "af4"}, "A codebook nobody knows."),
    ):
        yield write(f"refused-{slug}", comment, "PartsUnchecked", plain | change, refused=comment)
