"""`nf4 quantize`: a model's linear weights into 4 bits, as a directory that transformers loads."""

import hashlib
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import numpy as np

from nf4.cli.output import TensorProgress, json_option, print_json, size
from nf4.codebooks import CODEBOOKS
from nf4.formats.bitsandbytes import write_quantized
from nf4.formats.checkpoint import Checkpoint, QuantizeOptions, open_checkpoint
from nf4.ranks import ALONE, Ranks, deal, program, started
from nf4.tensor import QuantizedTensor, dequantize

_CHUNK = 1 << 16  # elements: the differences of a large weight are never all in memory


@click.command("quantize")
@click.argument("src", type=click.Path(path_type=Path))
@click.argument("dst", type=click.Path(path_type=Path))
@click.option("--block-size", type=int, default=64, show_default=True, help="Elements a scale: 32 to 4096.")
@click.option("--codebook", type=click.Choice(list(CODEBOOKS)), default="nf4", show_default=True)
@click.option(
    "--double-quant/--no-double-quant", default=True, show_default=True, help="Quantize the scales too."
)
@json_option
def command(src: Path, dst: Path, block_size: int, codebook: str, double_quant: bool, as_json: bool) -> None:
    """Quantize the linear layers of SRC into the new directory DST, which transformers loads.

    SRC is a Hugging Face directory or a GGUF file. Embeddings, norms and the head stay as they are. The error
    is measured on DST as it was written. Under mpirun or srun, ranks share the layers.
    """
    ranks = started()
    source = ranks.each(lambda: open_checkpoint(src))
    options = QuantizeOptions(block_size=block_size, codebook=codebook, double_quant=double_quant)
    ranks.agree(program() | {"SRC": contents(source)} | asdict(options))
    quiet = as_json or ranks.rank > 0
    with TensorProgress("quantizing", quiet=quiet) as progress:
        write_quantized(source, dst, options, progress, ranks)
    with TensorProgress("measuring", quiet=quiet) as progress:
        error = measure(source, dst, progress, ranks)
    if ranks.rank:
        return
    answer = {
        "source": str(src),
        "output": str(dst),
        "codebook": codebook,
        "block_size": block_size,
        "double_quant": double_quant,
        **error,
    }
    if as_json:
        print_json(answer)
        return
    click.echo(
        f"{dst}: {error['tensors']} tensors, {error['weights']:,} weights in "
        f"{error['bits_per_weight']:.3f} bits each ({size(error['bytes'])}); "
        f"relative RMS error {error['relative_rms_error']:.3%}"
    )


def contents(source: Checkpoint) -> str:
    """Return a digest of what a model's files announce: its config, and its tensors' names and shapes."""
    tensors = [(name, source.dtype(name), source.shape(name)) for name in source.names()]
    return hashlib.sha256(repr((sorted(source.config.items()), tensors)).encode()).hexdigest()


def measure(source: Checkpoint, dst: Path, progress: TensorProgress, ranks: Ranks = ALONE) -> dict[str, Any]:
    """Compare each 4-bit weight of the model in dst with the one it was made from.

    Returns the number of tensors and weights, their bytes and bits per weight, and the relative RMS error,
    sqrt(sum (x - x')^2 / sum x^2) over all of them, with x' in the dtype that the weight has when it is used.
    Ranks share the weights, where they all see dst.
    """
    seen = not ranks.any(not (dst / "config.json").exists())

    def compared() -> dict[str, tuple[int, int, float, float]]:
        written = open_checkpoint(dst)
        names = [name for name in written.names() if written.dtype(name) in CODEBOOKS]
        sizes = {name: math.prod(written.shape(name)) for name in names}
        mine = deal(names, sizes, ranks.size)[ranks.rank] if seen else names
        found = {}
        for i, name in enumerate(mine):
            progress(name, i, len(mine))
            # No array lives on into the next tensor: what is in memory is one weight, twice.
            found[name] = _tensor_error(source, written, name)
        if mine:
            progress(mine[-1], len(mine), len(mine))
        return found

    shares = ranks.gather(ranks.each(compared)) if seen else [ranks.first(compared)]
    errors = {name: found for share in shares for name, found in share.items()}
    weights = nbytes = 0
    error = power = 0.0
    for name in sorted(errors):  # so that the sums are those of one process
        found = errors[name]
        weights, nbytes = weights + found[0], nbytes + found[1]
        error, power = error + found[2], power + found[3]
    return {
        "tensors": len(errors),
        "weights": weights,
        "bytes": nbytes,
        "bits_per_weight": 8 * nbytes / weights if weights else 0.0,
        "relative_rms_error": math.sqrt(error / power) if power else 0.0,
    }


def _tensor_error(source: Checkpoint, written: Checkpoint, name: str) -> tuple[int, int, float, float]:
    """Return a weight's size, its bytes in 4 bits, and the sums of squares of its error and of itself."""
    q = written.read(name)
    assert isinstance(q, QuantizedTensor)
    size, nbytes = q.size, q.nbytes
    decoded = dequantize(q).reshape(-1)
    del q
    x = source.read(name)
    assert not isinstance(x, QuantizedTensor)  # write_quantized refuses a source that is 4-bit already
    flat = x.reshape(-1)
    error = power = 0.0
    for start in range(0, size, _CHUNK):
        part = flat[start : start + _CHUNK].astype(np.float64)
        difference = part - decoded[start : start + _CHUNK]
        # Not a dot product: BLAS would start its threads for each of these small pieces.
        power += float(np.square(part, out=part).sum())
        error += float(np.square(difference, out=difference).sum())
    return size, nbytes, error, power
