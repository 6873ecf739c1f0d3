"""Safetensors files: hostile ones refused, good ones read back, outputs whole or absent."""

import json
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nf4.errors import InputError
from nf4.formats.files import (
    DTYPES,
    SafetensorsFile,
    SafetensorsWriter,
    ShardedWriter,
    TensorSpec,
    atomic_directory,
    atomic_write,
    check_output_directory,
    write_json,
)

GOOD = {
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "U8", "shape": [8], "data_offsets": [24, 32]},
}


def pack(header: Any, data: int = 32) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(data)


def changed(**fields: Any) -> dict[str, Any]:
    return {**GOOD, "a": {**GOOD["a"], **fields}}


BAD = {
    "empty": (b"", "too few"),
    "short": (b"\x00\x01", "too few"),
    "header longer than the file": ((10**6).to_bytes(8, "little") + b"{}", "header claims 1000000"),
    "header of 2^63": ((2**63).to_bytes(8, "little") + b"{}", "header claims"),
    "not JSON": (pack(b"{'a'"), "not valid JSON"),
    "not an object": (pack(b"[1]"), "doesn't begin"),
    "not UTF-8": (pack(b'{"\xff": 1}'), "not valid JSON"),
    "deeply nested": (pack(b'{"a":' * 100_000), "not valid JSON"),
    "duplicate tensor": (pack(json.dumps(GOOD).replace('"b"', '"a"').encode()), "'a' occurs twice"),
    "duplicate field": (
        pack(b'{"a": {"dtype": "U8", "dtype": "U8", "shape": [32], "data_offsets": [0, 32]}}'),
        "'dtype' occurs twice",
    ),
    "unknown dtype": (pack(changed(dtype="F8_E4M3")), "dtype 'F8_E4M3' isn't supported"),
    "dtype no string": (pack(changed(dtype=["F32"])), "isn't supported"),
    "missing field": (pack({"a": {"dtype": "F32", "shape": [8]}}), "must have exactly"),
    "entry no object": (pack({"a": 3}), "must have exactly"),
    "negative size": (pack(changed(shape=[-2, -3])), "isn't a list of non-negative"),
    "fractional size": (pack(changed(shape=[2.0, 3])), "isn't a list of non-negative"),
    "boolean size": (pack(changed(shape=[True, 6])), "isn't a list of non-negative"),
    "product overflows": (pack(changed(shape=[2**32, 2**32])), "absurd"),
    "product overflows beside a zero": (pack(changed(shape=[0, 2**62, 4], data_offsets=[0, 0])), "absurd"),
    "too many dimensions": (pack(changed(shape=[1] * 40 + [6])), "absurd"),
    "wrong byte count": (pack(changed(shape=[2, 4])), "takes 32 bytes"),
    "descending offsets": (pack(changed(data_offsets=[24, 0])), "ascending"),
    "negative offset": (pack(changed(data_offsets=[-24, 0])), "ascending"),
    "overlap": (
        pack({**GOOD, "b": {"dtype": "U8", "shape": [12], "data_offsets": [20, 32]}}),
        "'b' overlaps tensor 'a'",
    ),
    "gap": (
        pack({**GOOD, "b": {"dtype": "U8", "shape": [4], "data_offsets": [28, 32]}}),
        "leaves a gap of 4 bytes",
    ),
    "beyond the file": (pack(GOOD, data=31), "truncated"),
    "bytes after": (pack(GOOD, data=33), "1 bytes follow"),
    "metadata": (pack({**GOOD, "__metadata__": {"a": 1}}), "__metadata__"),
    "NaN in JSON": (pack(b'{"a": NaN}'), "NaN is not JSON"),
}


@pytest.mark.parametrize("name", BAD)
def test_hostile_file_is_refused(name: str, tmp_path: Path) -> None:
    content, message = BAD[name]
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(InputError) as error:
        SafetensorsFile(path)
    assert message in str(error.value)
    assert str(path) in str(error.value)


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        SafetensorsFile(tmp_path / "none")


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    edits=st.lists(st.tuples(st.integers(0, 400), st.binary(min_size=0, max_size=3)), min_size=1, max_size=4),
    cut=st.integers(0, 40),
)
def test_mutated_file_is_refused_or_read(tmp_path: Path, edits: list[tuple[int, bytes]], cut: int) -> None:
    content = bytearray(pack(GOOD))
    for place, new in edits:
        at = place % len(content)
        content[at : at + len(new)] = new
    path = tmp_path / "mutated.safetensors"
    path.write_bytes(content[: len(content) - cut] if cut < 33 else content)
    file, message = None, str(path)
    try:
        file = SafetensorsFile(path)
    except InputError as error:
        message = str(error)
    assert str(path) in message
    if file is None:
        return
    for name, entry in file.entries.items():
        array = file.read(name)
        assert array.shape == entry.shape
        assert array.tobytes() == path.read_bytes()[entry.start : entry.stop]


numbers = st.integers(-(2**70), 2**70) | st.floats() | st.booleans() | st.none() | st.text(max_size=3)


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=numbers | st.lists(numbers, max_size=4),
    offsets=numbers | st.lists(numbers, max_size=3),
    dtype=numbers | st.sampled_from([*DTYPES, "F8_E5M2"]),
)
def test_any_header_entry_is_refused_or_read(tmp_path: Path, shape: Any, offsets: Any, dtype: Any) -> None:
    path = tmp_path / "drawn.safetensors"
    path.write_bytes(pack({"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}))
    try:
        file = SafetensorsFile(path)
    except InputError:
        return
    assert file.read("a").nbytes == 32


dtypes = st.sampled_from(list(DTYPES.values()))
tensors = st.dictionaries(
    st.text(st.characters(codec="utf-8"), max_size=6).filter(lambda name: name != "__metadata__"),
    st.tuples(dtypes, st.lists(st.integers(0, 5), max_size=3)),
    max_size=5,
)


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(specs=tensors, seed=st.integers(0, 2**32 - 1))
def test_round_trip_and_the_library_agrees(tmp_path: Path, specs: Any, seed: int) -> None:
    generator = np.random.default_rng(seed)
    values = {}
    for name, (dtype, shape) in specs.items():
        raw = generator.integers(0, 2 if dtype == np.bool_ else 256, (*shape, dtype.itemsize), dtype=np.uint8)
        values[name] = raw.view(dtype).reshape(shape)
    path = tmp_path / "round.safetensors"
    announced = {name: TensorSpec(value.dtype, value.shape) for name, value in values.items()}
    with SafetensorsWriter(path, announced) as writer:
        for name in reversed(values):  # any order will do
            writer.write(name, values[name])
    file = SafetensorsFile(path)
    library = safetensors.safe_open(path, "numpy")
    assert set(file.entries) == set(values) == set(library.keys())
    for name, value in values.items():
        back = file.read(name)
        assert back.dtype == value.dtype
        assert back.shape == value.shape
        assert back.tobytes() == value.tobytes()
        assert file.entries[name].start % value.dtype.itemsize == 0
        if value.dtype != ml_dtypes.bfloat16:
            assert library.get_tensor(name).tobytes() == value.tobytes()


def test_library_files_are_read(tmp_path: Path) -> None:
    values = {"x": np.arange(12, dtype=np.float32).reshape(3, 4), "é": np.array([True, False])}
    safetensors.numpy.save_file(values, tmp_path / "x.safetensors", metadata={"by": "them"})
    file = SafetensorsFile(tmp_path / "x.safetensors")
    assert file.metadata == {"by": "them"}
    for name, value in values.items():
        np.testing.assert_array_equal(file.read(name), value, strict=True)


def test_writer_demands_what_was_announced(tmp_path: Path) -> None:
    specs = {"x": TensorSpec(np.dtype(np.float32), (2,)), "y": TensorSpec(np.dtype(np.uint8), (1,))}
    path = tmp_path / "x.safetensors"
    with (
        pytest.raises(ValueError, match="isn't the tensor announced"),
        SafetensorsWriter(path, specs) as writer,
    ):
        writer.write("x", np.zeros(3, np.float32))
    with pytest.raises(ValueError, match="not written"), SafetensorsWriter(path, specs) as writer:
        writer.write("x", np.zeros(2, np.float32))
    assert list(tmp_path.iterdir()) == []


def test_shards_keep_a_weight_together(tmp_path: Path) -> None:
    byte = np.dtype(np.uint8)
    names = ["a.weight", "a.weight.absmax", "a.bias", "b.weight", "b.weight.absmax", "c"]
    specs = {name: TensorSpec(byte, (40,)) for name in names}
    with ShardedWriter(tmp_path, specs, max_shard_bytes=130) as writer:
        for i, name in enumerate(names):
            writer.write(name, np.full(40, i, np.uint8))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 240
    where = index["weight_map"]
    assert set(where) == set(names)
    assert where["a.weight"] == where["a.weight.absmax"] == "model-00001-of-00002.safetensors"
    assert where["b.weight"] == where["b.weight.absmax"] == "model-00002-of-00002.safetensors"
    for i, name in enumerate(names):
        assert SafetensorsFile(tmp_path / where[name]).read(name).tolist() == [i] * 40


class Stop(BaseException):
    """What a kill looks like from inside."""


def test_interrupted_file_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    write_json(path, {"step": 1})
    before = path.read_bytes()

    def work() -> None:
        with atomic_write(path) as file:
            file.write(b"half")
            raise Stop

    with pytest.raises(Stop):
        work()
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["state.json"]


def test_interrupted_directory_leaves_nothing(tmp_path: Path) -> None:
    def work() -> None:
        with atomic_directory(tmp_path / "out") as directory:
            (directory / "config.json").write_text("{}")
            raise Stop

    with pytest.raises(Stop):
        work()
    assert list(tmp_path.iterdir()) == []


def test_directory_appears_whole(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    with atomic_directory(out) as work:
        (work / "config.json").write_text("{}")
        assert not out.exists()
    assert (out / "config.json").read_text() == "{}"
    assert [p.name for p in out.parent.iterdir()] == ["out"]
    (tmp_path / "empty").mkdir()
    with atomic_directory(tmp_path / "empty") as work:
        (work / "x").write_text("x")
    assert (tmp_path / "empty" / "x").read_text() == "x"


def test_taken_outputs_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "kept").write_text("x")
    for name, message in (
        ("file", "this is a file"),
        ("full", "isn't empty"),
        ("file/below", "can't be written"),
    ):
        with pytest.raises(InputError, match=message):
            check_output_directory(tmp_path / name)
        with pytest.raises(InputError, match=message), atomic_directory(tmp_path / name):
            pytest.fail("the work was begun")
    assert (tmp_path / "full" / "kept").read_text() == "x"


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a directory that even root can't write to")
def test_unwritable_output_is_refused() -> None:
    with pytest.raises(InputError, match="/proc/self/out: can't be written"):
        check_output_directory("/proc/self/out")
    with pytest.raises(InputError, match="/proc/self/out: can't be written"), atomic_write("/proc/self/out"):
        pytest.fail("the work was begun")


KILLED = """
import os, signal, sys
import numpy as np
from nf4.formats.files import SafetensorsWriter, TensorSpec
x = np.ones(1000, np.float32)
spec = TensorSpec(x.dtype, x.shape)
with SafetensorsWriter(sys.argv[1], {"x": spec, "y": spec}) as writer:
    writer.write("x", x)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_kill_while_writing_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "adapter.safetensors"
    path.write_bytes(b"the previous one")
    done = subprocess.run([sys.executable, "-c", KILLED, str(path)], check=False, timeout=60)
    assert done.returncode == -9
    assert path.read_bytes() == b"the previous one"


FULL_DISK = """
import resource, signal, sys
import numpy as np
from nf4.errors import InputError
from nf4.formats.files import SafetensorsWriter, TensorSpec
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
sys.dont_write_bytecode = True  # it would be cut off, and stay
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
x = np.ones(100_000, np.float32)
try:
    with SafetensorsWriter(sys.argv[1], {"x": TensorSpec(x.dtype, x.shape)}) as writer:
        writer.write("x", x)
except InputError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs RLIMIT_FSIZE")
def test_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "adapter.safetensors"
    path.write_bytes(b"the previous one")
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(path)], capture_output=True, text=True, check=True, timeout=60
    )
    assert "can't be written" in done.stdout
    assert path.read_bytes() == b"the previous one"
    assert [p.name for p in tmp_path.iterdir()] == ["adapter.safetensors"]


def test_reading_takes_one_tensor_of_memory(tmp_path: Path) -> None:
    specs = {f"t{i}": TensorSpec(np.dtype(np.float32), (1 << 18,)) for i in range(8)}  # 1 MiB each
    tracemalloc.start()
    try:
        with SafetensorsWriter(tmp_path / "x", specs) as writer:
            for name, spec in specs.items():
                writer.write(name, np.ones(spec.shape, spec.dtype))
        file = SafetensorsFile(tmp_path / "x")
        for name in file.entries:
            file.read(name)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 3 << 20
