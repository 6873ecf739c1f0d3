"""NNCF and OpenVINO: compress_weights of a MatMul to NF4, and a constant of type nf4, converted and scaled.

A channel is the whole tensor, cut into groups of the block size; the bytes are those of the constant.
"""

import contextlib
import importlib
import io
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nf4.conform.libraries.tensors import fits


def quantize(x: NDArray[Any], block_size: int, codebook: str) -> dict[str, NDArray[Any]]:
    """nncf.compress_weights in mode NF4 of a MatMul with x as its one channel; the scale is widened."""
    if x.dtype not in (np.float32, np.float16):
        raise NotImplementedError(f"no NumPy array of {x.dtype}")
    ov, op, nncf = _modules(codebook)
    given = op.parameter([1, x.size], ov.Type.f32)
    weight = op.constant(x.reshape(1, -1))
    if x.dtype == np.float16:
        weight = op.convert(weight, "f32")
    model = ov.Model([op.matmul(given, weight, False, True)], [given])
    with contextlib.redirect_stdout(io.StringIO()):
        model = nncf.compress_weights(
            model, mode=nncf.CompressWeightsMode.NF4, group_size=block_size, all_layers=True
        )
    constants = [node for node in model.get_ops() if node.get_type_name() == "Constant"]
    codes = [node for node in constants if node.get_element_type() == ov.Type.nf4]
    scales = [node for node in constants if node.get_friendly_name().endswith("/scale")]
    if not codes:
        raise ValueError("the weight is left as it is")
    scale = np.array(scales[0].data, np.float32).reshape(-1)
    return {"codes": np.array(codes[0].data).view(np.uint8).reshape(-1), "absmax": scale}


def dequantize(
    codes: NDArray[Any], absmax: NDArray[Any], shape: list[int], dtype: str, block_size: int, codebook: str
) -> NDArray[Any]:
    """A model of the constant, Convert to float32, Multiply by the absmax of each element and Convert."""
    if dtype == "bfloat16":
        raise NotImplementedError("no NumPy array of bfloat16")
    ov, op, _ = _modules(codebook)
    if not fits(codes, absmax, shape, block_size):
        raise NotImplementedError("here each element is given its absmax")
    n = int(np.prod(shape))
    weight = op.constant(ov.Tensor(codes, [n], ov.Type.nf4))
    scale = op.parameter([n], ov.Type.f32)
    y = op.multiply(op.convert(weight, "f32"), scale)
    model = ov.Model([op.convert(y, "f32" if dtype == "float32" else "f16")], [scale])
    compiled = ov.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return np.asarray(compiled(np.repeat(absmax, block_size)[:n])[0])


def _modules(codebook: str) -> tuple[Any, Any, Any]:
    if codebook != "nf4":
        raise NotImplementedError(f"no codebook {codebook}")
    return (
        importlib.import_module("openvino"),
        importlib.import_module("openvino.opset13"),
        importlib.import_module("nncf"),
    )
