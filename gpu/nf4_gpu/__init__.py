"""NF4 on NVIDIA GPUs: the reference's operations on device arrays, to the same bits."""

from importlib import import_module
from importlib.util import find_spec
from typing import Any

if find_spec("cupy") is None:
    raise ImportError(
        "nf4_gpu needs CuPy: install it with  pip install '.[gpu]'  (CUDA 13) or  pip install '.[gpu12]'  "
        "in nf4's checkout"
    )

# Imported on first use: kernels can be compiled where there is no GPU to run them.
_LATER = {
    "LoRALinear": "nf4_gpu.lora",
    "check": "nf4_gpu.tensor",
    "dequantize": "nf4_gpu.tensor",
    "matmul": "nf4_gpu.product",
    "matmul_transposed": "nf4_gpu.product",
    "quantize": "nf4_gpu.tensor",
    "to_device": "nf4_gpu.tensor",
    "to_host": "nf4_gpu.tensor",
}

__all__ = [*_LATER]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module 'nf4_gpu' has no attribute {name!r}")
    from nf4_gpu.arrays import require_gpu

    require_gpu()
    globals()[name] = found = getattr(import_module(_LATER[name]), name)
    return found
