"""Writing a whole model as a Hugging Face directory, tensor by tensor."""

import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from nf4.errors import InputError
from nf4.floats import DTYPES
from nf4.formats.checkpoint import LINEAR_WEIGHT, Checkpoint, Progress, parameter_names
from nf4.formats.files import ShardedWriter, TensorSpec, atomic_directory, check_output_directory, write_json
from nf4.ranks import ALONE, Ranks

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)


def write_model(
    src: Checkpoint,
    dst: str | Path,
    config: Mapping[str, Any],
    specs: Mapping[str, TensorSpec],
    tensors: Callable[[str], dict[str, NDArray[Any]]],
    progress: Progress | None,
    ranks: Ranks = ALONE,
) -> None:
    """Write a Hugging Face directory, whole or not at all: config.json, what came with src, and its tensors.

    tensors: called once for each parameter of src, gives what is written for it; specs announces all of that.
    Ranks share the linear weights; rank 0 alone writes, and reads the others.
    """
    names = parameter_names(src)
    weights = {name: math.prod(src.shape(name)) for name in names if LINEAR_WEIGHT.fullmatch(name)}

    def write(results: Iterator[tuple[str, dict[str, NDArray[Any]]]]) -> None:
        with atomic_directory(dst) as work:
            write_json(work / "config.json", config)
            if src.path.is_dir():
                for file in COMPANIONS:
                    if (src.path / file).is_file():
                        shutil.copyfile(src.path / file, work / file)
            else:
                src.tokenizer().save(work)
            if progress is not None and names:
                progress(names[0], 0, len(names))
            with ShardedWriter(work, specs) as writer:
                for done, (name, found) in enumerate(results, 1):
                    while found:  # nothing of it lives on into the next one
                        writer.write(*found.popitem())
                    if progress is not None:
                        progress(name, done, len(names))

    ranks.first(lambda: check_output_directory(dst))
    ranks.collect(names, weights, tensors, write)


def model_dtype(src: Checkpoint) -> str:
    """The dtype config.json names: that of the linear layers' values."""
    linear = next((name for name in src.names() if LINEAR_WEIGHT.fullmatch(name)), None)
    if linear is None:
        raise InputError(f"{src.path}: holds no linear layers of a Llama-family model")
    return DTYPE_NAMES.get(src.value_dtype(linear), "float32")


def dtype_key(config: Mapping[str, Any]) -> str:
    """Where config.json keeps the dtype: transformers 5 writes `dtype`, and reads `torch_dtype` too."""
    return "dtype" if "dtype" in config else "torch_dtype"
