"""The way to the GPU's side, which is imported when it is asked for."""

from importlib import import_module
from typing import Any

from nf4.errors import InputError


def gpu() -> Any:
    """Return nf4_gpu.train.run. Raises InputError, with the reason, where there is no GPU or no CuPy."""
    try:
        arrays = import_module("nf4_gpu.arrays")
        arrays.require_gpu()
    except ImportError as error:
        raise InputError(f"--device cuda: {error}") from None
    return import_module("nf4_gpu.train.run")
