"""Hugging Face model directories: config.json and one or more safetensors files, 4-bit ones included."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nf4.errors import InputError
from nf4.formats import bitsandbytes
from nf4.formats.files import DTYPES, SafetensorsFile, read_json
from nf4.tensor import QuantizedTensor

if TYPE_CHECKING:  # tokenizers is only needed by those who ask for one
    from nf4.formats.tokenizer import Tokenizer

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class HuggingFaceCheckpoint:
    """A Hugging Face directory as a Checkpoint; 4-bit weights are read as QuantizedTensors (NF4-8.1).

    Raises InputError on missing shards, an index that disagrees with them, and other quantization methods.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = read_json(self.path / "config.json")
        self._check_quantization()
        self._tensors = self._open()
        groups = bitsandbytes.group_names(self._tensors, str(self.path))
        self._quantized = {
            weight: bitsandbytes.StoredWeight(weight, {key: self._tensors[key] for key in keys})
            for weight, keys in groups.items()
        }
        inner = {key for keys in groups.values() for key in keys}
        self._names = sorted((set(self._tensors) - inner) | set(groups))

    def _check_quantization(self) -> None:
        config = self.config.get("quantization_config")
        if config is None:
            return
        where = self.path / "config.json"
        method = config.get("quant_method", "bitsandbytes") if isinstance(config, dict) else config
        if method != "bitsandbytes" or not config.get("load_in_4bit", False):
            raise InputError(
                f"{where}: quantization {method!r} can't be read unless it is bitsandbytes with "
                "load_in_4bit; "
                "start from the unquantized model"
            )

    def _open(self) -> dict[str, SafetensorsFile]:
        """Which file holds each tensor."""
        index = self.path / INDEX
        if not index.exists():
            single = self.path / SINGLE
            if not single.exists():
                raise InputError(
                    f"{self.path}: there is neither {SINGLE} nor {INDEX}; convert other weights to "
                    "safetensors first"
                )
            file = SafetensorsFile(single)
            return dict.fromkeys(file.entries, file)
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise InputError(f"{index}: its weight_map is missing or empty")
        present = {file.name for file in self.path.iterdir()}
        shards: dict[str, SafetensorsFile] = {}
        found: dict[str, SafetensorsFile] = {}
        for name, shard in weight_map.items():
            if not isinstance(shard, str):
                raise InputError(f"{index}: {name!r} is mapped to {shard!r}, which isn't a file name")
            if shard not in shards:
                if shard not in present:  # nor is anything outside this directory
                    raise InputError(f"{self.path}: the shard {shard!r} is missing; download it again")
                shards[shard] = SafetensorsFile(self.path / shard)
            shards[shard].entry(name)
            found[name] = shards[shard]
        for shard, file in shards.items():
            for name in file.entries:
                if weight_map.get(name) != shard:
                    raise InputError(
                        f"{index}: doesn't name tensor {name!r} of {shard}; the shards don't belong together"
                    )
        return found

    def names(self) -> list[str]:
        """The names of the parameters, sorted."""
        return list(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a parameter before quantization."""
        if name in self._quantized:
            return self._quantized[name].state.shape
        return self._file(name).entry(name).shape

    def dtype(self, name: str) -> str:
        """The safetensors dtype, or the name of the codebook."""
        if name in self._quantized:
            return self._quantized[name].state.quant_type
        return self._file(name).entry(name).dtype

    def value_dtype(self, name: str) -> np.dtype[Any]:
        """The NumPy dtype of the values; of a 4-bit parameter, the one it was quantized from."""
        if name in self._quantized:
            return self._quantized[name].state.dtype
        return DTYPES[self.dtype(name)]

    def read(self, name: str) -> NDArray[Any] | QuantizedTensor:
        """Read one parameter."""
        if name in self._quantized:
            return self._quantized[name].read()
        return self._file(name).read(name)

    def tokenizer(self) -> "Tokenizer":
        """The tokenizer of tokenizer.json, checked against the model's vocabulary."""
        from nf4.formats.tokenizer import load_tokenizer

        return load_tokenizer(self.path, self.config)

    def _file(self, name: str) -> SafetensorsFile:
        try:
            return self._tensors[name]
        except KeyError:
            raise InputError(f"{self.path}: there is no tensor {name!r}") from None
