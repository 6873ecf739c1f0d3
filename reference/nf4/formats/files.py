"""Safetensors files read and written tensor by tensor, and outputs that appear whole or not at all."""

import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from nf4.errors import InputError

DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
MAX_DIMENSIONS = 32
MAX_SHARD_BYTES = 5_000_000_000


class Entry(NamedTuple):
    """Where one tensor lies: its safetensors dtype, its shape and its bytes [start, stop) in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class TensorSpec(NamedTuple):
    """What a tensor to be written will be: known before its values are, so that a file can be streamed."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """The bytes of its values."""
        return math.prod(self.shape) * self.dtype.itemsize


def parse_json(text: bytes | str, where: str, fraction: Callable[[str], Any] | None = None) -> dict[str, Any]:
    """Parse a JSON object strictly: UTF-8, no duplicate keys, no NaN. Raises InputError naming `where`.

    fraction gets the text of each number that is not an integer, instead of float.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            double = next(key for key in keys if keys.count(key) > 1)
            raise InputError(f"{where}: the key {double!r} occurs twice")
        return found

    def constant(name: str) -> Any:
        raise InputError(f"{where}: {name} is not JSON")

    try:
        value = json.loads(
            text.decode("utf-8") if isinstance(text, bytes) else text,
            object_pairs_hook=unique,
            parse_float=fraction,
            parse_constant=constant,
        )
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise InputError(f"{where}: expected a JSON object, found {type(value).__name__}")
    return value


def read_json(path: Path, fraction: Callable[[str], Any] | None = None) -> dict[str, Any]:
    """Read a JSON object from a file, as parse_json does. Raises InputError naming the file."""
    try:
        text = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: can't be read ({error.strerror})") from None
    return parse_json(text, str(path), fraction)


class SafetensorsFile:
    """One safetensors file, its header wholly checked (NF4-8.2), its tensors read one at a time.

    `entries` maps each name to its Entry; `metadata` is the header's `__metadata__`. Raises InputError,
    naming the file and the tensor, on anything but a well-formed file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            with self.path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                head = file.read(8)
                if len(head) < 8:
                    raise InputError(f"{self.path}: {size} bytes are too few for a safetensors file")
                length = int.from_bytes(head, "little")
                if length > min(size - 8, MAX_HEADER_BYTES):
                    raise InputError(
                        f"{self.path}: its header claims {length} bytes, but the file has {size} in all "
                        "and a header "
                        f"at most {MAX_HEADER_BYTES}; it is truncated or not a safetensors file"
                    )
                text = file.read(length)
        except OSError as error:
            raise InputError(f"{self.path}: can't be read ({error.strerror})") from None
        if not text.startswith(b"{"):
            raise InputError(f"{self.path}: the header doesn't begin with '{{'; not a safetensors file")
        header = parse_json(text, f"{self.path}: header")
        self.metadata = self._metadata(header.pop("__metadata__", {}))
        self.entries = {name: self._entry(name, value, 8 + length) for name, value in header.items()}
        self._check_cover(8 + length, size)

    def _metadata(self, value: Any) -> dict[str, str]:
        if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
            raise InputError(f"{self.path}: __metadata__ must map strings to strings")
        return value

    def _entry(self, name: str, value: Any, data: int) -> Entry:
        where = f"{self.path}: tensor {name!r}"
        if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
            raise InputError(f"{where}: its header entry must have exactly dtype, shape and data_offsets")
        dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise InputError(f"{where}: dtype {dtype!r} isn't supported (these are: {' '.join(DTYPES)})")
        if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
            raise InputError(f"{where}: shape {shape!r} isn't a list of non-negative integers")
        itemsize = DTYPES[dtype].itemsize
        # NumPy's own limit applies to the sizes that aren't zero too.
        if len(shape) > MAX_DIMENSIONS or math.prod(size for size in shape if size) * itemsize >= 2**62:
            raise InputError(f"{where}: a shape of {len(shape)} dimensions, {shape[:4]!r}..., is absurd")
        if (
            not isinstance(offsets, list)
            or len(offsets) != 2
            or not all(type(offset) is int for offset in offsets)
            or not 0 <= offsets[0] <= offsets[1]
        ):
            raise InputError(f"{where}: data_offsets {offsets!r} aren't two ascending integers")
        nbytes = math.prod(shape) * itemsize
        if offsets[1] - offsets[0] != nbytes:
            raise InputError(
                f"{where}: {dtype} of shape {shape} takes {nbytes} bytes, but data_offsets {offsets} span "
                f"{offsets[1] - offsets[0]}"
            )
        return Entry(dtype, tuple(shape), data + offsets[0], data + offsets[1])

    def _check_cover(self, data: int, size: int) -> None:
        """The tensors follow one another without a gap or an overlap, from the header's end to the file's."""
        end, before = data, "the header"
        for name, entry in sorted(self.entries.items(), key=lambda item: (item[1].start, item[1].stop)):
            if entry.stop > size:
                raise InputError(
                    f"{self.path}: tensor {name!r} ends at byte {entry.stop}, but the file has {size}; "
                    "it is truncated"
                )
            if entry.start != end:
                how = "overlaps" if entry.start < end else f"leaves a gap of {entry.start - end} bytes after"
                raise InputError(f"{self.path}: tensor {name!r} {how} {before}")
            end, before = entry.stop, f"tensor {name!r}"
        if end != size:
            raise InputError(f"{self.path}: {size - end} bytes follow the last tensor")

    def entry(self, name: str) -> Entry:
        """The entry of a tensor. Raises InputError if the file has none of that name."""
        try:
            return self.entries[name]
        except KeyError:
            raise InputError(f"{self.path}: there is no tensor {name!r}") from None

    def read(self, name: str) -> NDArray[Any]:
        """Read one tensor into a new array of its shape and dtype (BF16 as ml_dtypes.bfloat16)."""
        entry = self.entry(name)
        raw = read_bytes(self.path, entry.start, entry.stop - entry.start)
        return raw.view(DTYPES[entry.dtype]).reshape(entry.shape)


def read_bytes(path: Path, start: int, count: int) -> NDArray[np.uint8]:
    """Read `count` bytes at `start` into a new array. Raises InputError if the file ends before."""
    # Not mmap: its pages count as resident memory until the kernel takes them back.
    raw = np.empty(count, np.uint8)
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(start)
            rest = raw.data
            while rest:
                got = file.readinto(rest)
                if not got:
                    raise InputError(f"{path}: ends in the middle of its data; it is truncated")
                rest = rest[got:]
    except OSError as error:
        raise InputError(f"{path}: can't be read ({error.strerror})") from None
    return raw


class SafetensorsWriter:
    """Writes one safetensors file whose dtypes and shapes are known, its tensors in any order (NF4-8.3).

    The file is written under a temporary name and gets its own only when the `with` block ends well.
    """

    def __init__(
        self, path: str | Path, specs: Mapping[str, TensorSpec], metadata: Mapping[str, str] | None = None
    ) -> None:
        # Wide dtypes first: every tensor is then aligned to its own item size, which readers that map need.
        order = sorted(specs, key=lambda name: (-specs[name].dtype.itemsize, name))
        header: dict[str, Any] = {"__metadata__": dict(metadata or {"format": "pt"})}
        self._specs = specs
        self._starts: dict[str, int] = {}
        offset = 0
        for name in order:
            spec = specs[name]
            header[name] = {
                "dtype": DTYPE_NAMES[spec.dtype],
                "shape": list(spec.shape),
                "data_offsets": [offset, offset + spec.nbytes],
            }
            self._starts[name] = offset
            offset += spec.nbytes
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
        text += b" " * (-len(text) % 8)
        self._head = len(text).to_bytes(8, "little") + text
        self._missing = set(order)
        self._stack = ExitStack()
        self._output = atomic_write(path)

    def __enter__(self) -> "SafetensorsWriter":
        self._file = self._stack.enter_context(self._output)
        self._file.write(self._head)
        return self

    def write(self, name: str, array: NDArray[Any]) -> None:
        """Write the values of one tensor. Raises ValueError if they aren't what its spec announced."""
        spec = self._specs[name]
        if name not in self._missing or array.dtype != spec.dtype or array.shape != spec.shape:
            raise ValueError(f"{name}: {array.dtype} {array.shape} isn't the tensor announced, {spec}")
        self._file.seek(len(self._head) + self._starts[name])
        self._file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        self._missing.discard(name)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None and self._missing:
            error = ValueError(f"tensors announced and not written: {sorted(self._missing)}")
            self._stack.__exit__(ValueError, error, None)
            raise error
        self._stack.__exit__(kind, error, trace)


class ShardedWriter:
    """Writes a model's tensors into a directory: model.safetensors, or shards and their index (NF4-8.3).

    The tensors of one weight (those that share its name up to `.weight`) stay in one shard.
    """

    def __init__(
        self, directory: Path, specs: Mapping[str, TensorSpec], max_shard_bytes: int = MAX_SHARD_BYTES
    ) -> None:
        shards: list[dict[str, TensorSpec]] = [{}]
        groups: dict[str, list[str]] = {}
        for name in specs:
            groups.setdefault(name.partition(".weight")[0], []).append(name)
        filled = 0
        for names in groups.values():
            nbytes = sum(specs[name].nbytes for name in names)
            if shards[-1] and filled + nbytes > max_shard_bytes:
                shards.append({})
                filled = 0
            filled += nbytes
            shards[-1].update({name: specs[name] for name in names})
        count = len(shards)
        files = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
        if count == 1:
            files = ["model.safetensors"]
        self._writers = [
            SafetensorsWriter(directory / file, shard) for file, shard in zip(files, shards, strict=True)
        ]
        self._shard = {name: i for i, shard in enumerate(shards) for name in shard}
        self._index = directory / "model.safetensors.index.json" if count > 1 else None
        self._contents = {
            "metadata": {"total_size": sum(spec.nbytes for spec in specs.values())},
            "weight_map": {name: files[i] for name, i in sorted(self._shard.items())},
        }
        self._stack = ExitStack()

    def __enter__(self) -> "ShardedWriter":
        for writer in self._writers:
            self._stack.enter_context(writer)
        return self

    def write(self, name: str, array: NDArray[Any]) -> None:
        """Write the values of one tensor into its shard."""
        self._writers[self._shard[name]].write(name, array)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)
        if kind is None and self._index is not None:
            write_json(self._index, self._contents)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object, indented, atomically."""
    with atomic_write(path) as file:
        file.write((json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8"))


@contextmanager
def atomic_write(path: str | Path) -> Iterator[IO[bytes]]:
    """Open a binary file that replaces `path` when the block ends well, and leaves no trace when it doesn't.

    The bytes go to a temporary name in the same directory, are synced to the disk, and renamed. Raises
    InputError if the disk refuses (no such directory, no permission, full).
    """
    path = Path(path)
    with _refusals(path):
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        try:
            with os.fdopen(descriptor, "w+b") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, 0o666 & ~_umask())
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        _sync_directory(path.parent)


def check_output_directory(path: str | Path) -> None:
    """Refuse an output directory that exists and isn't empty, or can't be written: before any work is done.

    Raises InputError.
    """
    path = Path(os.path.abspath(path))
    if path.exists():
        if not path.is_dir():
            raise InputError(f"{path}: the output must be a directory, and this is a file")
        with _refusals(path):
            if any(path.iterdir()):
                raise InputError(
                    f"{path}: the output directory isn't empty; name a new one, or remove it first"
                )
    with _refusals(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        os.rmdir(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))


@contextmanager
def only_writer(directory: Path) -> Iterator[None]:
    """Keep a directory for this process, while the block lasts, from others that ask for it so.

    However the process ends, the directory is free then. Where the system or the disk has no such locks,
    nothing is kept. Raises InputError if another process has it.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"{directory}: another run writes there; wait until it ends, or name another output"
            ) from None
        except OSError:  # a disk without locks
            pass
        yield
    finally:
        os.close(descriptor)


@contextmanager
def atomic_directory(path: str | Path) -> Iterator[Path]:
    """Yield an empty directory that becomes `path` when the block ends well, and is removed when it doesn't.

    Raises InputError, before any work, as check_output_directory does, and if the disk refuses later.
    """
    path = Path(os.path.abspath(path))
    check_output_directory(path)
    with _refusals(path):
        work = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
        try:
            yield work
            for file in work.iterdir():
                _sync_file(file)
            _sync_directory(work)
            work.chmod(0o777 & ~_umask())
            os.replace(work, path)
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise
        _sync_directory(path.parent)


@contextmanager
def _refusals(path: Path) -> Iterator[None]:
    """Turn what the operating system refuses into an InputError that names the output."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{path}: can't be written ({error.strerror}); nothing there was changed") from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    if os.name != "posix":  # elsewhere a directory can't be opened
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
