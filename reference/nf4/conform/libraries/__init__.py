"""Libraries that somebody else wrote, each as a Python port: a module with a function for each operation.

A function asks the library's public functions for what the table of operations says, and returns what comes.
What the library does not have raises NotImplementedError; whatever it raises itself refuses the input. Bytes
are rearranged only where it documents a layout other than NF4-5.1; else the difference is the finding.
"""

import importlib.metadata
from dataclasses import dataclass


@dataclass(frozen=True)
class Library:
    """A title as people know it, and the distributions it takes, its own first."""

    title: str
    distributions: tuple[str, ...]
    layers: bool = False  # whether its module has layers(), a LayerPort


LIBRARIES: dict[str, Library] = {
    "bitsandbytes": Library("bitsandbytes", ("bitsandbytes", "torch"), layers=True),
    "torchao": Library("torchao", ("torchao", "torch")),
    "onnxruntime": Library("ONNX Runtime", ("onnxruntime", "onnx")),
    "openvino": Library("NNCF and OpenVINO", ("nncf", "openvino")),
    "modelopt": Library("NVIDIA ModelOpt", ("nvidia-modelopt", "torch")),
    "qwix": Library("qwix", ("qwix", "jax")),
    "ejkernel": Library("ejkernel", ("ejkernel", "jax")),
    "neural_compressor": Library("Intel Neural Compressor", ("neural-compressor-pt", "torch")),
    "mps_bitsandbytes": Library("mps-bitsandbytes", ("mps-bitsandbytes", "torch")),
    "pytorch": Library("PyTorch", ("torch",)),
    "transformers": Library("transformers", ("transformers", "torch")),
}
"""By the name of the module in this package that asks it."""


def versions(library: Library) -> dict[str, str] | None:
    """Return the version of each distribution of a library, or None if one is not installed."""
    try:
        return {name: importlib.metadata.version(name) for name in library.distributions}
    except importlib.metadata.PackageNotFoundError:
        return None
