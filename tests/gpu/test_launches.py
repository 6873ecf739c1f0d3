"""Launches and captures on stand-ins for the driver and its streams, without a GPU."""

import ctypes
import gc
import weakref
from typing import Any

import cupy
import numpy as np
import pytest
from nf4_gpu import compile as kernels
from nf4_gpu import launch
from nf4_gpu.exact import grid, linear, llama
from nf4_gpu.launch import capture
from small_models import tiny_config


class Function:
    ptr = 1234


@pytest.mark.parametrize("status", [0, 719])
def test_an_early_launch_gives_the_driver_every_argument(
    monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    seen: dict[str, Any] = {}

    class Driver:
        def cuLaunchKernelEx(self, config: Any, function: Any, arguments: Any, extra: Any) -> int:
            given = config._obj
            seen["sizes"] = [*given.grid], [*given.block], given.shared, given.stream
            seen["attributes"] = given.attributes, given.attribute_count
            seen["function"] = function.value
            seen["arguments"] = [ctypes.c_uint64.from_address(pointer).value for pointer in arguments]
            return status

    monkeypatch.setattr(launch, "_library", Driver)
    arguments = (1 << 40, np.float32(1.0), True, np.int64(-1))
    if status:
        with pytest.raises(RuntimeError, match="CUDA status 719"):
            launch.launch_early(Function, (7, 2), 96, arguments, 4096, 55)
    else:
        launch.launch_early(Function, (7, 2), 96, arguments, 4096, 55)
    assert seen == {
        "sizes": ([7, 2, 1], [96, 1, 1], 4096, 55),
        "attributes": (ctypes.addressof(launch._OVERLAPPING), 1),
        "function": 1234,
        "arguments": [1 << 40, 0x3F800000, 1, 2**64 - 1],
    }
    assert launch._OVERLAPPING.id == 6
    assert launch._OVERLAPPING.value[0] == 1


class Stream:
    """A stream whose captures end with an error where `left` others were not waited for."""

    ptr = 5

    def __init__(self, left: int = 0) -> None:
        self.left, self.captures = left, False

    def begin_capture(self) -> None:
        assert not self.captures
        self.captures = True

    def end_capture(self) -> str:
        self.captures = False
        if self.left:
            raise cupy.cuda.runtime.CUDARuntimeError(904)  # cudaErrorStreamCaptureUnjoined
        return "graph"


@pytest.mark.parametrize("left", [0, 1])
def test_what_is_raised_while_a_stream_captures_comes_out_and_ends_it(left: int) -> None:
    def run() -> None:
        raise KeyboardInterrupt

    stream = Stream(left)
    with pytest.raises(KeyboardInterrupt):
        capture(stream, run)
    assert not stream.captures


def test_a_capture_gives_its_graph_and_what_was_returned() -> None:
    assert capture(Stream(), lambda: 3) == ("graph", 3)
    with pytest.raises(cupy.cuda.runtime.CUDARuntimeError):
        capture(Stream(1), lambda: 3)


def test_a_kernel_may_have_the_most_shared_memory_that_it_was_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The attribute is the function's, and two sizes share it: with the smaller the larger would not run."""
    allowed: dict[int, int] = {}

    class Module:
        def get_function(self, name: str) -> Any:
            return Function()

    monkeypatch.setattr(kernels, "_module", lambda *where, **defines: Module())
    monkeypatch.setattr(kernels.driver, "funcSetAttribute", lambda f, what, size: allowed.update({f: size}))
    monkeypatch.setattr(kernels, "_shared", {})
    for shared, expected in (
        (0, None),
        (8 << 10, None),
        (200 << 10, 200),
        (100 << 10, 200),
        (210 << 10, 210),
    ):
        kernels.kernel(-1, "a source", "a kernel", shared)
        assert allowed.get(Function.ptr) == (expected and expected << 10)


def test_tables_of_ever_new_batches_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[Any]] = []

    def to_device(array: Any) -> Any:
        made.append(weakref.ref(array))
        return array

    monkeypatch.setattr(cupy, "asarray", to_device)
    monkeypatch.setattr(grid.runtime, "getDevice", lambda: -1)
    monkeypatch.setattr(cupy.cuda, "get_current_stream", Stream)
    config = tiny_config()
    for length in range(1, 101):
        cos, sin = llama.rotation(config, (length, 5))
        assert cos.shape == sin.shape == (length + 5, config.head_dim // 2)
        assert llama.rotation(config, (length, 5))[0] is cos
        assert np.array_equal(linear.starts((length, 5)), [0, length, length + 5])
    gc.collect()
    assert len(made) == 300
    assert sum(array() is not None for array in made) == 3 * grid.KNOWN
