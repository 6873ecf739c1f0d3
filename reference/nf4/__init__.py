"""NF4 and QLoRA in NumPy: quantize, dequantize, fine-tune and generate without PyTorch."""

from importlib import import_module
from typing import Any

from nf4.codebooks import CODEBOOKS, Codebook, derive_nf4
from nf4.errors import CheckFailed, InputError
from nf4.nested import NestedAbsmax
from nf4.tensor import QuantizedTensor, dequantize, quantize

__version__ = "0.1.0"

# Imported on first use: the codec above needs NumPy and ml_dtypes alone.
_LATER = {
    "Llama": "nf4.model.llama",
    "LlamaConfig": "nf4.model.config",
    "LoRA": "nf4.lora",
    "LoRALinear": "nf4.lora",
    "finetune": "nf4.train.finetune",
    "generate": "nf4.model.generate",
    "init_lora": "nf4.lora",
    "load_adapter": "nf4.formats.peft",
    "load_model": "nf4.formats.checkpoint",
    "open_checkpoint": "nf4.formats.checkpoint",
    "save_adapter": "nf4.formats.peft",
}

__all__ = [  # noqa: PLE0604
    "CODEBOOKS",
    "CheckFailed",
    "Codebook",
    "InputError",
    "NestedAbsmax",
    "QuantizedTensor",
    "dequantize",
    "derive_nf4",
    "quantize",
    *_LATER,
]


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module 'nf4' has no attribute {name!r}")
    return getattr(import_module(_LATER[name]), name)
