"""Opening a model in any format, and turning it into the parameters of a Llama."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from nf4.errors import InputError
from nf4.tensor import QuantizedTensor, quantize

if TYPE_CHECKING:  # both import this module's rooms
    from nf4.formats.tokenizer import Tokenizer
    from nf4.model.llama import Llama

Progress = Callable[
    [str, int, int], None
]  # called with a tensor's name, how many are done, how many there are

AS_STORED = "none"
"""In the place of a codebook: the linear layers are not quantized."""

LINEAR_WEIGHT = re.compile(r"model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)\.weight")


class Checkpoint(Protocol):
    """A model on the disk, whatever its format: tensors under their Hugging Face names, read one at a time.

    `config` is the content of config.json, converted into that form where the format has its own.
    """

    path: Path
    config: dict[str, Any]

    def names(self) -> list[str]:
        """The names of the parameters; one that is stored as 4 bits counts once, as `....weight`."""

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a parameter, the one it had before quantization."""

    def dtype(self, name: str) -> str:
        """How a parameter is stored: F32, BF16, nf4, Q4_1 and so on."""

    def value_dtype(self, name: str) -> np.dtype[Any]:
        """The dtype of a parameter's values once read; of a 4-bit one, the dtype it was quantized from."""

    def read(self, name: str) -> NDArray[Any] | QuantizedTensor:
        """Read one parameter. Raises InputError if it is missing or broken."""

    def tokenizer(self) -> "Tokenizer":
        """The tokenizer that came with the model; InputError if none did, or not one for this vocabulary."""


@dataclass(frozen=True)
class QuantizeOptions:
    """How the linear layers are quantized (NF4-3, NF4-6); not at all where codebook is AS_STORED."""

    block_size: int = 64
    codebook: str = "nf4"
    double_quant: bool = True


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a Hugging Face directory, plain or 4-bit, a GGUF file, or a directory that holds one GGUF file.

    Raises InputError naming the path when it is none of these, or is broken.
    """
    path = Path(path)
    if path.is_dir() and not (path / "config.json").exists():
        found = sorted(path.glob("*.gguf"))
        if len(found) != 1:
            raise InputError(
                f"{path}: a model directory needs a config.json or exactly one .gguf file, and this one has "
                f"{len(found)} .gguf files"
            )
        path = found[0]
    if path.is_dir():
        from nf4.formats.huggingface import HuggingFaceCheckpoint

        return HuggingFaceCheckpoint(path)
    if not path.exists():
        raise InputError(f"{path}: there is no such model; give a local directory or a .gguf file")
    with path.open("rb") as file:
        magic = file.read(4)
    if magic == b"GGUF":
        from nf4.formats.gguf import GgufCheckpoint

        return GgufCheckpoint(path)
    raise InputError(f"{path}: not a GGUF file; give the model's directory or a .gguf file")


def load_model(
    path: str | Path | Checkpoint, *, quantize: QuantizeOptions | None, progress: Progress | None = None
) -> "Llama":
    """Load a model tensor by tensor: linear layers quantized as `quantize` says, the rest float32.

    With None, or the codebook AS_STORED, the linear layers are float32 too. Weights that are 4-bit already
    stay as they are. Raises InputError, naming the file and the tensor, on a broken or unknown model and on
    NaN or infinity in a weight.
    """
    from nf4.model.config import LlamaConfig
    from nf4.model.llama import Llama

    source = open_checkpoint(path) if isinstance(path, (str, Path)) else path
    config = LlamaConfig.from_dict(source.config, str(source.path))
    names = parameter_names(source)
    params: dict[str, NDArray[Any] | QuantizedTensor] = {}
    for i, name in enumerate(names):
        if progress is not None:
            progress(name, i, len(names))
        value = source.read(name)
        if isinstance(value, QuantizedTensor):
            params[name] = value
        elif quantize is not None and quantize.codebook != AS_STORED and LINEAR_WEIGHT.fullmatch(name):
            params[name] = quantize_weight(source, name, value, quantize)
        else:
            check_finite(source, name, value)
            params[name] = value.astype(np.float32, copy=False)
    if progress is not None and names:
        progress(names[-1], len(names), len(names))
    return Llama(config, params)


def parameter_names(source: Checkpoint) -> list[str]:
    """The parameters of the model itself: no tied head stored a second time, no table of RoPE frequencies."""
    tied = source.config.get("tie_word_embeddings", False)
    return [
        name
        for name in source.names()
        if not name.endswith("rotary_emb.inv_freq") and not (tied and name == "lm_head.weight")
    ]


def quantize_weight(
    source: Checkpoint, name: str, value: NDArray[Any], options: QuantizeOptions
) -> QuantizedTensor:
    """Quantize one weight (NF4-3). Raises InputError that names the model and the tensor."""
    try:
        return quantize(value, options.block_size, options.codebook, options.double_quant)
    except InputError as error:
        raise InputError(f"{source.path}: tensor {name!r}: {error}") from None


def check_finite(source: Checkpoint, name: str, value: NDArray[Any]) -> None:
    """Refuse NaN and infinity in a float tensor; InputError names the model, the tensor and the index."""
    if value.dtype.kind not in "fV":  # ml_dtypes.bfloat16 has the kind V
        raise InputError(f"{source.path}: tensor {name!r} has dtype {value.dtype}; a weight must be a float")
    flat = value.reshape(-1)
    for start in range(0, flat.size, 1 << 20):
        finite = np.isfinite(flat[start : start + (1 << 20)])
        if not finite.all():
            at = start + int(np.argmin(finite))
            index = tuple(int(i) for i in np.unravel_index(at, value.shape))
            raise InputError(
                f"{source.path}: tensor {name!r} holds {float(flat[at])} at {index} (flat index {at}); "
                "the checkpoint is damaged, get it again"
            )
