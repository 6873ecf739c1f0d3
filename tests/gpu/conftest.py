"""Fixtures of the GPU's tests: they skip where there is no GPU, unless NF4_REQUIRE_GPU=1 demands one."""

import os
import sys
from pathlib import Path
from typing import Any

import pytest
from devices import device_of, without

sys.path.insert(0, str(Path(__file__).parents[1] / "exact"))  # its step on a real model


@pytest.fixture(scope="session")
def gpu() -> None:
    """Skip, or fail where NF4_REQUIRE_GPU=1, without a GPU."""
    from nf4_gpu.arrays import require_gpu

    try:
        require_gpu()
    except ImportError as error:
        without(str(error))
    if os.environ.get("NF4_SANITIZE") == "1":
        import cupy

        cupy.cuda.set_allocator(
            None
        )  # an allocation an array, so that compute-sanitizer sees where each ends


@pytest.fixture(scope="session")
def two_gpus(gpu: None) -> None:
    """Skip, or fail where NF4_REQUIRE_GPU=2, with fewer than two."""
    import cupy

    count = cupy.cuda.runtime.getDeviceCount()
    if count < 2:
        without(f"{count} GPU; this needs two", at_least=2)


@pytest.fixture(scope="session")
def torch(gpu: None) -> Any:
    """PyTorch with CUDA."""
    try:
        import torch
    except ImportError as error:
        without(str(error))
    if not torch.cuda.is_available():
        without("this PyTorch has no CUDA")
    return torch


@pytest.fixture(params=["emulated", "cuda"])
def device(request: pytest.FixtureRequest) -> Any:
    """A device for the kernels of models: the emulated one, and then the GPU."""
    return device_of(request.param, request)
