"""ONNX Runtime: MatMulBnb4Quantizer.bnb4_block_quant, and the operator MatMulBnb4.

A weight of one column holds the elements in their order. Decoding is a product of the 1 x 1 matrix 1 and that
weight, which keeps every value but the sign of a zero.
"""

import importlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nf4.codebooks import CODEBOOKS
from nf4.conform.libraries.tensors import unpacked

_KINDS = {"fp4": 0, "nf4": 1}


def quantize(x: NDArray[Any], block_size: int, codebook: str) -> dict[str, NDArray[Any]]:
    """bnb4_block_quant of x as one column; absmax comes in the dtype of x and is widened."""
    if x.dtype not in (np.float32, np.float16):
        raise NotImplementedError(f"no weights of {x.dtype}")
    module: Any = importlib.import_module("onnxruntime.quantization.matmul_bnb4_quantizer")
    model = importlib.import_module("onnx").ModelProto()
    quantizer = module.MatMulBnb4Quantizer(model, _kind(codebook), block_size)
    codes, absmax = quantizer.bnb4_block_quant(x.reshape(-1, 1))
    return {"codes": codes, "absmax": absmax.astype(np.float32)}


def dequantize(
    codes: NDArray[Any], absmax: NDArray[Any], shape: list[int], dtype: str, block_size: int, codebook: str
) -> NDArray[Any]:
    """MatMulBnb4 of [[1]] and the weight, K = 1."""
    if dtype != "float32":
        raise NotImplementedError("MatMulBnb4 is of float32 on a CPU")
    n = int(np.prod(shape))
    onnx: Any = importlib.import_module("onnx")
    runtime: Any = importlib.import_module("onnxruntime")
    helper, float32 = onnx.helper, onnx.TensorProto.FLOAT
    weight = [onnx.numpy_helper.from_array(codes, "codes"), onnx.numpy_helper.from_array(absmax, "absmax")]
    node = helper.make_node(
        "MatMulBnb4",
        ["one", "codes", "absmax"],
        ["y"],
        domain="com.microsoft",
        K=1,
        N=n,
        block_size=block_size,
        quant_type=_kind(codebook),
    )
    graph = helper.make_graph(
        [node],
        "decode",
        [helper.make_tensor_value_info("one", float32, [1, 1])],
        [helper.make_tensor_value_info("y", float32, [1, n])],
        weight,
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    options = runtime.SessionOptions()
    options.log_severity_level = 4
    session = runtime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    y = session.run(None, {"one": np.ones((1, 1), np.float32)})[0]
    values = CODEBOOKS[codebook].values[unpacked(codes, n)]
    negative = np.signbit(values) ^ np.signbit(np.repeat(absmax, block_size)[:n])
    if np.any(negative & (y[0] == 0)):
        raise NotImplementedError("a matrix product doesn't keep the sign of a zero")
    return np.asarray(y)


def _kind(codebook: str) -> int:
    if codebook not in _KINDS:
        raise NotImplementedError(f"no codebook {codebook}")
    return _KINDS[codebook]
