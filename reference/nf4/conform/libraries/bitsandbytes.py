"""bitsandbytes on the CPU: functional.quantize_4bit, dequantize_4bit and the 8-bit functions below them.

The nested level is asked as quantize_4bit does it: the mean by torch, quantize_blockwise for what is left.
"""

import importlib
from typing import Any

from numpy.typing import NDArray

from nf4.conform.layers import LayerPort
from nf4.conform.libraries.bitsandbytes_layers import BitsandbytesLayers
from nf4.conform.libraries.tensors import to_numpy, to_torch, torch_dtype

Arrays = dict[str, NDArray[Any]]
_NESTED_BLOCK = 256


def quantize(x: NDArray[Any], block_size: int, codebook: str) -> Arrays:
    """quantize_4bit of x in its shape, without compress_statistics."""
    codes, state = _functional().quantize_4bit(to_torch(x), blocksize=block_size, quant_type=_kind(codebook))
    return {"codes": to_numpy(codes), "absmax": to_numpy(state.absmax)}


def dequantize(
    codes: NDArray[Any], absmax: NDArray[Any], shape: list[int], dtype: str, block_size: int, codebook: str
) -> NDArray[Any]:
    """dequantize_4bit with a QuantState of that shape."""
    state = _state(to_torch(absmax), shape, dtype, block_size, codebook)
    return to_numpy(_functional().dequantize_4bit(to_torch(codes).reshape(-1, 1), state))


def encode_absmax(absmax: NDArray[Any]) -> Arrays:
    """The mean, then quantize_blockwise of what is left, as in quantize_4bit(compress_statistics=True)."""
    values = to_torch(absmax)
    offset = values.mean()
    codes, state = _functional().quantize_blockwise(values - offset, blocksize=_NESTED_BLOCK)
    return _nested(codes, state, offset)


def decode_absmax(
    absmax_codes: NDArray[Any], nested_absmax: NDArray[Any], offset: NDArray[Any], map: NDArray[Any]
) -> NDArray[Any]:
    """dequantize_blockwise with the map given, plus the offset, as in dequantize_4bit."""
    state = _nested_state(nested_absmax, map)
    return to_numpy(_functional().dequantize_blockwise(to_torch(absmax_codes), state) + to_torch(offset))


def quantize_double(x: NDArray[Any], block_size: int, codebook: str) -> Arrays:
    """quantize_4bit of x in its shape, with compress_statistics."""
    codes, state = _functional().quantize_4bit(
        to_torch(x), blocksize=block_size, quant_type=_kind(codebook), compress_statistics=True
    )
    return {"codes": to_numpy(codes), **_nested(state.absmax, state.state2, state.offset)}


def dequantize_double(
    codes: NDArray[Any],
    absmax_codes: NDArray[Any],
    nested_absmax: NDArray[Any],
    offset: NDArray[Any],
    map: NDArray[Any],
    shape: list[int],
    dtype: str,
    block_size: int,
    codebook: str,
) -> NDArray[Any]:
    """dequantize_4bit with a nested QuantState that holds the map given."""
    state = _state(to_torch(absmax_codes), shape, dtype, block_size, codebook)
    state.nested, state.offset = True, to_torch(offset)[0]
    state.state2 = _nested_state(nested_absmax, map)
    return to_numpy(_functional().dequantize_4bit(to_torch(codes).reshape(-1, 1), state))


def layers() -> LayerPort:
    """Return its Linear4bit, for the search of defects in its state."""
    return BitsandbytesLayers()


def _functional() -> Any:
    # Without this its fallback in Python is compiled again for each size, which takes seconds.
    importlib.import_module("torch").compiler.set_stance("force_eager")
    return importlib.import_module("bitsandbytes.functional")


def _kind(codebook: str) -> str:
    if codebook not in {"nf4", "fp4"}:
        raise NotImplementedError(f"no codebook {codebook}")
    return codebook


def _nested(codes: Any, state: Any, offset: Any) -> Arrays:
    return {
        "absmax_codes": to_numpy(codes),
        "nested_absmax": to_numpy(state.absmax),
        "offset": to_numpy(offset).reshape(1),
    }


def _state(absmax: Any, shape: list[int], dtype: str, block_size: int, codebook: str) -> Any:
    functional = _functional()
    code = functional.get_4bit_type(_kind(codebook), device="cpu")
    return functional.QuantState(
        absmax,
        shape=tuple(shape),
        code=code,
        blocksize=block_size,
        quant_type=codebook,
        dtype=torch_dtype(dtype),
    )


def _nested_state(nested_absmax: NDArray[Any], map: NDArray[Any]) -> Any:
    return _functional().QuantState(
        to_torch(nested_absmax), code=to_torch(map), blocksize=_NESTED_BLOCK, dtype=torch_dtype("float32")
    )
