"""`nf4 dequantize`: a model, 4-bit or GGUF, into plain floating-point safetensors."""

from pathlib import Path

import click

from nf4.cli.output import TensorProgress, json_option, print_json, size
from nf4.floats import DTYPES
from nf4.formats.bitsandbytes import write_dequantized
from nf4.formats.checkpoint import open_checkpoint


@click.command("dequantize")
@click.argument("src", type=click.Path(path_type=Path))
@click.argument("dst", type=click.Path(path_type=Path))
@click.option(
    "--dtype",
    type=click.Choice(list(DTYPES)),
    help="Of every weight.  [default: the one each was quantized from]",
)
@json_option
def command(src: Path, dst: Path, dtype: str | None, as_json: bool) -> None:
    """Write the 4-bit or GGUF model SRC as plain safetensors into the new directory DST."""
    with TensorProgress("dequantizing", quiet=as_json) as progress:
        write_dequantized(open_checkpoint(src), dst, DTYPES[dtype] if dtype else None, progress=progress)
    written = open_checkpoint(dst)
    names = written.names()
    nbytes = sum(file.stat().st_size for file in dst.glob("*.safetensors"))
    if as_json:
        print_json(
            {"source": str(src), "output": str(dst), "dtype": dtype, "tensors": len(names), "bytes": nbytes}
        )
        return
    click.echo(f"{dst}: {len(names)} tensors, {size(nbytes)}")
