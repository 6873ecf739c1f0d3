"""Where an answer first leaves what is expected: the field, the element, its bits, and the step before it."""

import json
import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from nf4.conform import values
from nf4.conform.operations import OPERATIONS
from nf4.conform.port import Answer
from nf4.errors import InputError
from nf4.formats.files import DTYPES as FILE_DTYPES
from nf4.formats.files import SafetensorsFile, parse_json

NESTED_BLOCK = 256
NAN_BITS = ("widen", "narrow")  # whose clauses say which NaN; elsewhere one is as good as another (NF4-13.6)
QUANT_STATE = ".quant_state.bitsandbytes__"

# Where several outputs differ, the one computed first is the one to look at; all others come before these.
_CAUSAL = ("absmax", "offset", "nested_absmax", "absmax_codes", "codes")


@dataclass(frozen=True)
class Step:
    """A value on the way: its name, the index in its array, its bits; got is empty where none was sent."""

    name: str
    index: int
    expected: str
    expected_value: str
    got: str = ""
    got_value: str = ""


@dataclass(frozen=True)
class Difference:
    """The first difference between an answer and what is expected.

    kind is "refusal" (answered what must be refused, or the reverse), "length" (another number of elements
    than expected) or "value". `expected` and `got` are the bits of element `index` of `field` and `*_value`
    the same as numbers; count of its total elements differ. place is that element and the number of elements
    of the tensor it counts in: those of packed codes are nibbles. step is the first step that differs, if
    the port sent any that do; else `steps` has those expected at that element. agree: the steps that agree.
    """

    kind: Literal["refusal", "length", "value"]
    what: str
    field: str = ""
    index: int | None = None
    expected: str = ""
    expected_value: str = ""
    got: str = ""
    got_value: str = ""
    count: int = 0
    total: int = 0
    place: tuple[int, int] | None = None
    step: Step | None = None
    steps: tuple[Step, ...] = ()
    agree: tuple[str, ...] = ()


def compare(
    operation: str,
    given: Mapping[str, Any],
    expected: Answer,
    got: Answer,
    tolerance: Mapping[str, float] | None = None,
) -> Difference | None:
    """Return where `got` first differs from `expected`, both of kind "output" or "refused"; None: nowhere.

    given is the input, JSON values; tolerance the vector's own bounds, which replace the operation's. Raises
    InputError where `got` is not made of the operation's outputs (NF4-13.3): no clause is to blame for that.
    """
    if expected.kind == "refused":
        if got.kind == "refused":
            return None
        return Difference("refusal", f"it was answered, and must be refused: {expected.message}")
    if got.kind == "refused":
        return Difference("refusal", f"it was refused, and has an answer; the port's reason: {got.message}")
    # Strings alone: to Python, true and 1.0 equal 1.
    plain = all(isinstance(value, str) for value in got.output.values())
    if plain and not got.steps and dict(got.output) == dict(expected.output):
        return None
    want = values.decode_output(operation, expected.output, given, "the vector")
    have = values.decode_output(operation, got.output, given, "the answer")
    have_steps = values.decode_steps(operation, got.steps, given, "the answer")
    spec = OPERATIONS[operation]
    bounds = spec.tolerance | dict(tolerance or {})
    packed = math.prod(given["shape"]) if "shape" in given else None
    for name in sorted(want, key=lambda name: _CAUSAL.index(name) if name in _CAUSAL else -1):
        if isinstance(want[name], np.ndarray):
            elements = packed if name == "codes" else None
            got_array = have[name]
            if operation not in NAN_BITS:
                got_array = _with_nans_of(want[name], got_array)
            found = _array(name, want[name], got_array, bounds.get(name), elements)
        else:
            found = _other(name, spec.outputs[name], want[name], have[name], bounds.get(name))
        if found is not None:
            want_steps = values.decode_steps(operation, expected.steps, given, "the vector")
            return _with_steps(found, given, want_steps, have_steps)
    return None


def position(length: int, index: int, total: int, block_size: int | None) -> int | None:
    """Return where, in an array of `length`, what belongs to element `index` of `total` lies or begins.

    The two have one length, or one has an element for each block (of block_size or 256 elements, or of both)
    of the other. None: they are not related so.
    """
    if length == total:
        return index
    blocks = [block_size, NESTED_BLOCK, block_size * NESTED_BLOCK] if block_size else [NESTED_BLOCK]
    for block in blocks:
        if length == -(-total // block):
            return index // block
        if total == -(-length // block):
            return index * block
    return None


def block(given: Mapping[str, Any]) -> int | None:
    """Return the block size of an input, if it has one that makes sense."""
    size = given.get("block_size")
    return size if isinstance(size, int) and size > 0 else None


def show(value: Any) -> str:
    """Return one element of an array as a person reads it: the shortest decimal of its dtype."""
    if isinstance(value, np.integer):
        return str(int(value))
    if np.asarray(value).dtype.itemsize == 2:
        return str(float(value))
    return str(value)


def _with_steps(
    found: Difference, given: Mapping[str, Any], want: Mapping[str, Any], have: Mapping[str, Any]
) -> Difference:
    """Add the first step that differs or, if the port sent none, those expected where the outputs do."""
    agree: list[str] = []
    answered = _by_name(have)
    for name, expected in _by_name(want).items():
        if name not in answered:
            continue
        got = answered[name]
        if got.dtype != expected.dtype:
            return replace(found, step=_step(name, expected, 0, got), agree=tuple(agree))
        if got.size != expected.size:
            at = min(got.size, expected.size)
            return replace(found, step=_step(name, expected, at, got), agree=tuple(agree))
        differing = np.flatnonzero(_bits(expected) != _bits(got))
        if differing.size:
            step = _step(name, expected, int(differing[0]), got)
            return replace(found, step=step, agree=tuple(agree))
        agree.append(name)
    if found.place is None:
        return replace(found, agree=tuple(agree))
    index, total = found.place
    block_size = block(given)
    steps = []
    for name, expected in want.items():
        if isinstance(expected, Mapping):
            continue  # arrays of many sizes, none of which tells what belongs to an element
        related = position(expected.size, index, total, block_size)
        if related is not None and related < expected.size:
            steps.append(_step(name, expected, related))
    return replace(found, steps=tuple(steps), agree=tuple(agree))


def _by_name(steps: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
    """Steps as flat arrays, those of a step that holds several by their names there."""
    found: dict[str, NDArray[Any]] = {}
    for name, value in steps.items():
        inner = value if isinstance(value, Mapping) else {name: value}
        found |= {key: array.reshape(-1) for key, array in inner.items()}
    return found


def _step(name: str, expected: NDArray[Any], index: int, got: NDArray[Any] | None = None) -> Step:
    want, want_value = _at(expected, index)
    have, have_value = _at(got, index) if got is not None else ("", "")
    return Step(name, index, want, want_value, have, have_value)


def _at(array: NDArray[Any], index: int) -> tuple[str, str]:
    """The bits and the number of one element; that it isn't there, where the array ends before."""
    if index >= array.size:
        return "nothing", f"it has {array.size} elements"
    return values.to_hex(array[index : index + 1]), show(array[index])


def _with_nans_of(want: NDArray[Any], have: NDArray[Any]) -> NDArray[Any]:
    """Return have with its NaNs replaced by those expected in the same places."""
    if want.size != have.size or not np.isnan(want).any():
        return have
    return np.where(np.isnan(want) & np.isnan(have), want, have)


def _bits(array: NDArray[Any]) -> NDArray[Any]:
    return array.view(f"u{array.dtype.itemsize}")


def _other(name: str, kind: str, want: Any, have: Any, bound: float | None) -> Difference | None:
    """Compare two values of an output that is no array."""
    if kind == "bytes":
        return _safetensors(name, {name: want}, {name: have})
    if kind == "files":
        return _files(name, want, have)
    if kind == "arrays":
        return _arrays(name, want, have, bound)
    if want == have:
        return None
    return Difference(
        "value", f"{name} is another", name, expected=json.dumps(want), got=json.dumps(have), count=1, total=1
    )


def _array(
    name: str,
    want: NDArray[Any],
    have: NDArray[Any],
    bound: float | None = None,
    packed: int | None = None,
) -> Difference | None:
    """Compare two flat arrays of one dtype: bit by bit, or within bound of the largest magnitude expected.

    packed: the number of codes in them, if they hold two a byte.
    """
    if want.size != have.size:
        what = f"{name} has {have.size} elements; {want.size} are expected"
        for dtype in ("float16", "float32", "float64"):
            if have.nbytes == want.size * values.DTYPES[dtype].itemsize and want.dtype.kind != "u":
                what += f" of {want.dtype}: it has the digits of {dtype}"
        return Difference("length", what, name, count=abs(want.size - have.size), total=want.size)
    differs = _bits(want) != _bits(have)
    within = ""
    if bound is not None and differs.any():
        wide, wide_have = want.astype(np.float64), have.astype(np.float64)
        with np.errstate(invalid="ignore"):  # a NaN of the port's: it is out of any bound
            distance = np.abs(wide_have - wide)
        limit = bound * float(np.abs(wide[np.isfinite(wide)]).max(initial=0))
        differs &= ~(distance <= limit)
        within = f" by more than {limit:.3g} ({bound:.3g} of the largest magnitude)"
    where = np.flatnonzero(differs)
    if not where.size:
        return None
    index = int(where[0])
    expected, expected_value = _at(want, index)
    got, got_value = _at(have, index)
    place = (index, want.size)
    what = f"element {index} of {name} differs{within}{_ulps(want[index], have[index])}"
    if packed is not None:
        high = want[index] >> 4 != have[index] >> 4
        place = (2 * index + (0 if high else 1), packed)
        expected_value, got_value = (
            f"{int(byte) >> 4}, {int(byte) & 15}" for byte in (want[index], have[index])
        )
        at = f"the code of element {place[0]}" if place[0] < packed else "the bits that no element uses"
        what = f"byte {index} of {name} differs, in {at}"
    what += f"; {where.size} of {want.size} do" if want.size > 1 else ""
    return Difference(
        "value",
        what,
        name,
        index,
        expected,
        expected_value,
        got,
        got_value,
        count=int(where.size),
        total=want.size,
        place=place,
    )


def _ulps(want: Any, have: Any) -> str:
    """Say how many representable numbers lie between two floats, where they are few."""
    if np.issubdtype(want.dtype, np.integer) or not (np.isfinite(want) and np.isfinite(have)):
        return ""
    size = want.dtype.itemsize
    ordered = []
    for value in (want, have):
        bits = int(np.asarray(value).view(f"u{size}"))
        top = 1 << (8 * size - 1)
        ordered.append(top - bits if bits & top else bits)  # -0 and +0 are one
    apart = abs(ordered[0] - ordered[1])
    if apart == 0:
        return " in the sign of zero"
    return f" by {apart} ulp" if apart <= 1000 else ""


def _names(name: str, want: Mapping[str, Any], have: Mapping[str, Any]) -> Difference | None:
    """Compare the names that two objects hold."""
    missing = [repr(key) for key in want if key not in have]
    more = [repr(key) for key in have if key not in want]
    if not missing and not more:
        return None
    parts = [f"lacks {', '.join(missing)}"] * bool(missing) + [f"has {', '.join(more)} besides"] * bool(more)
    return Difference("value", f"{name} {' and '.join(parts)}", name, count=len(missing) + len(more))


def _arrays(
    name: str,
    want: Mapping[str, NDArray[Any]],
    have: Mapping[str, NDArray[Any]],
    bound: float | None = None,
) -> Difference | None:
    found = _names(name, want, have)
    if found is not None:
        return found
    for key, expected in want.items():
        got, at = have[key], f"{name}[{key!r}]"
        if (expected.dtype, expected.shape) != (got.dtype, got.shape):
            what = (
                f"{at} is {got.dtype} {list(got.shape)}; {expected.dtype} {list(expected.shape)} is expected"
            )
            return Difference("value", what, at)
        found = _array(at, expected.reshape(-1), got.reshape(-1), bound)
        if found is not None:
            return found
    return None


def _files(name: str, want: Mapping[str, bytes], have: Mapping[str, bytes]) -> Difference | None:
    """Compare directories: all safetensors files as one set of tensors, JSON by value, the rest by bytes."""

    def plain(files: Mapping[str, bytes]) -> dict[str, bytes]:
        ends = (".safetensors", ".safetensors.index.json")  # shards are free
        return {path: data for path, data in files.items() if not path.endswith(ends)}

    def tensors(files: Mapping[str, bytes]) -> dict[str, bytes]:
        return {f"{name}[{path!r}]": files[path] for path in sorted(files) if path.endswith(".safetensors")}

    found = _names(name, plain(want), plain(have))
    if found is not None:
        return found
    for path, data in plain(want).items():
        at = f"{name}[{path!r}]"
        if path.endswith(".json"):
            expected = parse_json(data, f"the vector: {at}")
            try:
                got = parse_json(have[path], f"the answer: {at}")
            except InputError as error:
                return Difference("value", str(error), at)
            if expected != got:
                return _json(at, expected, got)
        elif data != have[path]:
            return Difference("value", f"{at} has other bytes", at)
    return _safetensors(name, tensors(want), tensors(have))


def _json(at: str, want: Mapping[str, Any], have: Mapping[str, Any]) -> Difference:
    found = _names(at, want, have)
    if found is not None:
        return found
    key = next(key for key in want if want[key] != have[key])
    expected, got = json.dumps(want[key]), json.dumps(have[key])
    return Difference("value", f"{at} has another {key!r}", at, expected=expected, got=got, count=1)


def _safetensors(name: str, want: Mapping[str, bytes], have: Mapping[str, bytes]) -> Difference | None:
    """Compare safetensors files by content: tensors, their dtypes, shapes and bytes, and NF4-8.3's layout."""
    expected = _tensors(want)
    try:
        got = _tensors(have, strict=True)
    except InputError as error:
        return Difference("value", f"the answer: {error}", name)
    states = {key for key in expected if QUANT_STATE in key}
    if states <= set(got):
        for key in states:
            found = _quant_state(f"{name}[{key!r}]", expected.pop(key), got.pop(key))
            if found is not None:
                return found
    return _arrays(name, expected, got)


def _tensors(files: Mapping[str, bytes], strict: bool = False) -> dict[str, NDArray[Any]]:
    """Return the tensors of safetensors files.

    Raises InputError on a broken file and, where strict, on a layout that is not NF4-8.3's.
    """
    tensors: dict[str, NDArray[Any]] = {}
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "file"
        for name, data in files.items():
            path.write_bytes(data)
            try:
                file = SafetensorsFile(path)
            except InputError as error:
                raise InputError(str(error).replace(str(path), name)) from None
            if strict:
                _check_layout(name, file, data)
            tensors |= {key: file.read(key) for key in file.entries}
    return tensors


def _check_layout(name: str, file: SafetensorsFile, data: bytes) -> None:
    """Raise InputError unless the tensors lie by descending item size, then by name, aligned (NF4-8.3)."""
    header = int.from_bytes(data[:8], "little")
    if header % 8:
        raise InputError(f"{name}: the header has {header} bytes, not a multiple of 8 (NF4-8.3)")
    starts = {key: entry.start for key, entry in file.entries.items() if entry.stop > entry.start}
    lie = sorted(starts, key=starts.__getitem__)
    due = sorted(starts, key=lambda key: (-FILE_DTYPES[file.entries[key].dtype].itemsize, key))
    for first, second in zip(lie, due, strict=True):
        if first != second:
            raise InputError(
                f"{name}: {first!r} lies where {second!r} must, by item size, then name (NF4-8.3)"
            )


def _quant_state(at: str, want: NDArray[Any], have: NDArray[Any]) -> Difference | None:
    """Compare two JSON objects of NF4-8.4; nested_offset by the float32 it rounds to."""
    expected = parse_json(want.tobytes(), f"the vector: {at}")
    try:
        got = parse_json(have.tobytes(), f"the answer: {at}")
    except InputError as error:
        return Difference("value", str(error), at)
    for state in (expected, got):
        if isinstance(state.get("nested_offset"), float | int):
            with np.errstate(over="ignore"):
                state["nested_offset"] = float(np.float32(state["nested_offset"]))
    return None if expected == got else _json(at, expected, got)
