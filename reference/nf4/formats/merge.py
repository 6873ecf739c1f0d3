"""Adding an adapter into its base model's weights: W + scale B A."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from nf4.errors import InputError
from nf4.formats.checkpoint import (
    AS_STORED,
    LINEAR_WEIGHT,
    Checkpoint,
    Progress,
    QuantizeOptions,
    check_finite,
    parameter_names,
    quantize_weight,
)
from nf4.formats.files import TensorSpec
from nf4.formats.writing import dtype_key, model_dtype, write_model
from nf4.lora import LoRA
from nf4.tensor import QuantizedTensor, dequantize

ROWS = 1024  # of a weight, merged at a time


def write_merged(
    src: Checkpoint,
    adapters: Mapping[str, LoRA],
    dst: str | Path,
    *,
    onto: Literal["original", "dequantized"],
    options: QuantizeOptions | None = None,
    progress: Progress | None = None,
) -> None:
    """Write the model with its adapters merged, as plain safetensors, tensor by tensor (NF4-8.8).

    onto: "original" adds to the weights as they are in src; "dequantized" to what they decode to after
    quantization, which is what the adapters were trained on: src is 4-bit, or is quantized here by `options`
    (which leave it as it is if their codebook is AS_STORED). Every weight is W + scale B A in float32,
    rounded once to the dtype it has in src. Raises InputError if src is 4-bit and onto is "original", if an
    adapter fits no weight, and for an output that exists.
    """
    names = parameter_names(src)
    for module in adapters:
        if f"{module}.weight" not in names:
            raise InputError(
                f"{src.path}: has no weight for the adapter of {module!r}; it is for another model"
            )
    how = options or QuantizeOptions()
    specs = {name: TensorSpec(src.value_dtype(name), src.shape(name)) for name in names}
    config = {key: value for key, value in src.config.items() if key != "quantization_config"}
    config[dtype_key(src.config)] = model_dtype(src)

    def tensors(name: str) -> dict[str, NDArray[Any]]:
        value = src.read(name)
        if isinstance(value, QuantizedTensor):
            if onto == "original":
                raise InputError(
                    f"{src.path}: tensor {name!r} is 4-bit; give the original model, or merge onto the "
                    "dequantized one"
                )
        elif onto == "dequantized" and how.codebook != AS_STORED and LINEAR_WEIGHT.fullmatch(name):
            value = quantize_weight(src, name, value, how)
        merged = merge_weight(value, adapters.get(name.removesuffix(".weight")))
        check_finite(src, name, merged)
        return {name: merged}

    write_model(src, dst, config, specs, tensors, progress)


def merge_weight(weight: NDArray[Any] | QuantizedTensor, lora: LoRA | None) -> NDArray[Any]:
    """W + scale B A in float32, rounded once to the dtype W has or was quantized from (NF4-8.8)."""
    if lora is None:
        return dequantize(weight) if isinstance(weight, QuantizedTensor) else weight
    dtype = weight.dtype
    wide = dequantize(weight) if isinstance(weight, QuantizedTensor) else weight  # as training decodes it
    merged = np.empty(weight.shape, dtype)
    A = lora.A.astype(np.float32)  # [r, in]
    B = lora.B.astype(np.float32)  # [out, r]
    with np.errstate(over="ignore"):  # an overflow to infinity is for the caller to refuse, by name
        for start in range(0, len(merged), ROWS):
            rows = slice(start, start + ROWS)
            delta = B[rows] @ A  # [rows, in]
            delta *= np.float32(lora.scale)
            delta += wide[rows]
            merged[rows] = delta
    return merged
