"""`nf4 explore`: a page to try the grids on, in one file that needs no network."""

from pathlib import Path

import click
import numpy as np

from nf4 import bundled
from nf4.cli.output import json_option, print_json, size
from nf4.errors import InputError
from nf4.evidence import page
from nf4.evidence.weights import Weight, weights_of
from nf4.floats import widen


@click.command("explore")
@click.argument("model", type=click.Path(path_type=Path), required=False)
@click.option("--tensor", "names", multiple=True, help="May be repeated.  [default: one of each kind]")
@click.option("--out", type=click.Path(path_type=Path), default="explore.html", show_default=True)
@json_option
def command(model: Path | None, names: tuple[str, ...], out: Path, as_json: bool) -> None:
    """Write an interactive page: drag a weight, and see its code, its decoded value and its error.

    The page offers normal, uniform and other data, and the first 4096 weights of some tensors of MODEL (of
    the bundled model where none is given). Open the file in a browser; it loads nothing.
    """
    found = weights_of(model or bundled.MODEL)
    chosen = choose(found, names, model or bundled.MODEL)
    tensors = {}
    for weight in chosen:
        sample = np.ascontiguousarray(weight.read()).reshape(-1)[: page.SAMPLE]
        tensors[weight.name] = widen(sample)
    page.write(out, tensors)
    if as_json:
        print_json({"page": str(out), "tensors": list(tensors), "bytes": out.stat().st_size})
    else:
        click.echo(f"written: {out} ({size(out.stat().st_size)}); open it in a browser")


def choose(found: list[Weight], names: tuple[str, ...], model: Path) -> list[Weight]:
    """Return the named tensors, or the first of each kind. InputError for a name that is not there."""
    if not names:
        return list({weight.kind: weight for weight in reversed(found)}.values())[::-1]
    by_name = {weight.name: weight for weight in found}
    for name in names:
        if name not in by_name:
            raise InputError(
                f"{model}: has no linear weight {name!r}; `nf4 inspect {model}` lists the tensors"
            )
    return [by_name[name] for name in names]
