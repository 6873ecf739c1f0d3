"""The operations of chapter 8 on the reference: files read, written, quantized and merged."""

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nf4.codebooks import get_codebook
from nf4.conform.reference.training import check_counts
from nf4.errors import InputError
from nf4.floats import DTYPES
from nf4.formats.bitsandbytes import StoredWeight, group_names, save_tensor, write_quantized
from nf4.formats.checkpoint import Checkpoint, QuantizeOptions, check_finite, open_checkpoint, parameter_names
from nf4.formats.files import SafetensorsFile, read_json
from nf4.formats.merge import merge_weight
from nf4.formats.peft import load_adapter
from nf4.lora import LoRA
from nf4.model.config import LlamaConfig
from nf4.model.llama import check_params
from nf4.nested import DYNAMIC_MAP, NestedAbsmax
from nf4.tensor import QuantizedTensor, dequantize

Array = NDArray[Any]
Outputs = dict[str, Any]


def read_tensor(file: bytes, name: str) -> Outputs:
    """Return y: the 4-bit weight of this name, decoded to its shape and dtype (NF4-8.2, NF4-8.4, NF4-8.5)."""
    with _directory({"file.safetensors": file}) as directory:
        stored = SafetensorsFile(directory / "file.safetensors")
        groups = group_names(stored.entries, str(stored.path))
        if name not in groups:
            raise InputError(f"{stored.path}: has no 4-bit tensor {name!r}")
        return {"y": {name: dequantize(StoredWeight(name, dict.fromkeys(groups[name], stored)).read())}}


def write_tensor(
    name: str,
    codes: NDArray[np.uint8],
    shape: list[int],
    dtype: str,
    block_size: int,
    codebook: str,
    absmax: NDArray[np.float32] | None = None,
    absmax_codes: NDArray[np.uint8] | None = None,
    nested_absmax: NDArray[np.float32] | None = None,
    offset: NDArray[np.float32] | None = None,
) -> Outputs:
    """Return the file of one quantized tensor (NF4-8.3, NF4-8.4); its absmax are plain or nested."""
    scales: NDArray[np.float32] | NestedAbsmax
    if absmax is not None:
        scales = absmax
    elif absmax_codes is not None and nested_absmax is not None and offset is not None:
        scales = NestedAbsmax(absmax_codes, nested_absmax, offset[0], DYNAMIC_MAP)
    else:
        raise InputError(f"{name}: has neither absmax nor the three parts of its nested form")
    if dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r} is not supported; choose one of {', '.join(DTYPES)}")
    q = QuantizedTensor(codes, scales, tuple(shape), DTYPES[dtype], block_size, get_codebook(codebook))
    with _directory({}) as directory:
        save_tensor(q, directory / "file.safetensors", name)
        return {"file": (directory / "file.safetensors").read_bytes()}


def read_model(files: Mapping[str, bytes]) -> Outputs:
    """Return tensors: the parameters of a model directory, those in 4 bits decoded (NF4-8.1, NF4-8.9)."""
    with _directory(files) as directory:
        source = open_checkpoint(directory)
        config = LlamaConfig.from_dict(source.config, str(source.path))
        tensors = {name: _read(source, name) for name in parameter_names(source)}
        check_params(config, tensors)
        return {"tensors": tensors}


def quantize_model(files: Mapping[str, bytes], block_size: int, codebook: str, double_quant: bool) -> Outputs:
    """Return the files of the model's 4-bit directory (NF4-8.6)."""
    with _directory(files) as directory, tempfile.TemporaryDirectory() as out:
        written = Path(out) / "model"
        write_quantized(
            open_checkpoint(directory), written, QuantizeOptions(block_size, codebook, double_quant)
        )
        return {"files": {path.name: path.read_bytes() for path in sorted(written.iterdir())}}


def read_adapter(files: Mapping[str, bytes], model: Mapping[str, bytes]) -> Outputs:
    """Return tensors M.A and M.B, float32, and scales, float64 [1], of each module M (NF4-8.7, NF4-9.6)."""
    with _directory(model) as base, _directory(files) as directory:
        config = LlamaConfig.from_dict(read_json(base / "config.json"), str(base))
        adapters = load_adapter(directory, config)
    return {
        "tensors": {
            f"{module}.{side}": value.astype(np.float32)
            for module, lora in adapters.items()
            for side, value in (("A", lora.A), ("B", lora.B))
        },
        "scales": {module: np.array([lora.scale]) for module, lora in adapters.items()},
    }


def merge(weight: Array, shape: list[int], dtype: str, A: Array, B: Array, rank: int, scale: Any) -> Outputs:
    """Return y: weight + scale (B A), rounded to dtype (NF4-8.8)."""
    check_counts(shape=shape)
    if len(shape) != 2 or rank < 1 or not np.isfinite(scale).all():
        raise InputError(
            f"a weight of shape {shape} and an adapter of rank {rank} and scale {scale} don't merge"
        )
    factors = A.reshape(rank, shape[1]), B.reshape(shape[0], rank)
    lora = LoRA(*factors, np.asarray(scale).item(), 0.0, 0)
    y = merge_weight(weight.reshape(shape), lora)
    if not np.isfinite(y).all():
        raise InputError(f"the merged weight is not finite in {dtype}; the adapter does not fit it")
    return {"y": y}


def _read(source: Checkpoint, name: str) -> Array:
    value = source.read(name)
    if isinstance(value, QuantizedTensor):
        return dequantize(value)
    check_finite(source, name, value)
    return value


@contextmanager
def _directory(files: Mapping[str, bytes]) -> Iterator[Path]:
    """A temporary directory of these files; an InputError does not name it, but them."""
    with tempfile.TemporaryDirectory() as name:
        for path, content in files.items():
            if Path(path).name != path:
                raise InputError(f"the path {path!r} leaves its directory")
            (Path(name) / path).write_bytes(content)
        try:
            yield Path(name)
        except InputError as error:
            raise InputError(str(error).replace(f"{name}/", "").replace(name, "the directory")) from None
