"""Launches on a stand-in for the driver, without a GPU."""

import ctypes
from typing import Any

import numpy as np
import pytest
from nf4_gpu import launch


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
