"""The pictures: grids under densities, errors against bits, errors by layer."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nf4.codebooks import CODEBOOKS
from nf4.evidence.grids import QUANTIZERS, af4, bof4
from nf4.evidence.normal import ScaledNormal
from nf4.evidence.weights import Weight, scaled_histogram
from nf4.formats.files import atomic_write

_COLOURS = {
    "nf4": "tab:blue",
    "nf4-dq": "tab:cyan",
    "fp4": "tab:red",
    "fp4-e2m1": "tab:orange",
    "int4": "tab:green",
    "int4-asym": "tab:olive",
    "af4": "tab:purple",
    "bof4": "tab:brown",
    "bof4-s": "tab:pink",
}
_EDGES = np.linspace(-1, 1, 162)  # of histograms: 0 is in the middle of a bar


@contextmanager
def figure(path: Path, width: float, height: float) -> Iterator[Any]:
    """Yield an empty figure of so many inches, then write it as a PNG, atomically."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    style: Any = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}
    with mpl.rc_context(style):
        drawn = Figure(figsize=(width, height), dpi=110, layout="constrained")
        FigureCanvasAgg(drawn)
        yield drawn
        with atomic_write(path) as file:
            drawn.savefig(file, format="png", pil_kwargs={"optimize": True})


def draw_histogram(path: Path, weights: Sequence[Weight], block_size: int, title: str) -> None:
    """Draw the weights over their block's absmax, the same of normal data, and under it the grids."""
    counts = scaled_histogram(weights, block_size, _EDGES)
    grids: dict[str, NDArray[Any]] = {
        name: np.unique(CODEBOOKS[name].values) for name in ("nf4", "fp4", "fp4-e2m1", "int4")
    }
    grids |= {"af4": af4(block_size).values, "bof4": bof4(block_size).values}
    with figure(path, 9, 5) as drawn:
        top, bottom = drawn.subplots(2, 1, sharex=True, height_ratios=(3, 2))
        width = np.diff(_EDGES)
        top.bar(_EDGES[:-1], counts / width, width, align="edge", color="0.75", label="weights")
        x = np.linspace(-1, 1, 401)
        top.plot(x, ScaledNormal(block_size).density(x), color="black", linewidth=1, label="normal data")
        top.set_ylabel("density")
        top.set_title(title)
        top.legend()
        for level, (name, values) in enumerate(grids.items()):
            bottom.plot(values, np.full(len(values), -level), "|", color=_COLOURS[name], markersize=11, mew=2)
        bottom.set_yticks(-np.arange(len(grids)), list(grids))
        bottom.set_ylim(-len(grids) + 0.4, 0.6)
        bottom.set_xlabel(f"weight / absmax of its block of {block_size}")


def draw_error_against_bits(path: Path, results: Sequence[Mapping[str, Any]], title: str) -> None:
    """Draw a line a quantizer, a point a block size."""
    with figure(path, 7.5, 5) as drawn:
        axes = drawn.subplots()
        for name, rows in _by_quantizer(results):
            x = [row["bits_per_weight"] for row in rows]
            y = [100 * row["relative_rms_error"] for row in rows]
            axes.plot(x, y, "o-", color=_COLOURS[name], markersize=4, label=QUANTIZERS[name].about)
        axes.set_xlabel("bits per weight, with the constants of the blocks")
        axes.set_ylabel("relative RMS error, %")
        axes.set_title(title)
        axes.grid(visible=True, alpha=0.3)
        axes.legend()


def draw_error_by_layer(
    path: Path, results: Sequence[Mapping[str, Any]], block_size: int, title: str
) -> None:
    """Draw a line a quantizer over the layers of the model, at one block size."""
    with figure(path, 7.5, 4.5) as drawn:
        axes = drawn.subplots()
        for name, rows in _by_quantizer(results):
            layers = next(row["layers"] for row in rows if row["block_size"] == block_size)
            y = [100 * figures["relative_rms_error"] for figures in layers.values()]
            axes.plot(list(map(int, layers)), y, "o-", color=_COLOURS[name], markersize=4, label=name)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_xlabel("layer")
        axes.set_ylabel("relative RMS error, %")
        axes.set_title(title)
        axes.grid(visible=True, alpha=0.3)
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))


def _by_quantizer(results: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, list[Mapping[str, Any]]]]:
    for name in QUANTIZERS:
        rows = [row for row in results if row["quantizer"] == name]
        if rows:
            yield name, sorted(rows, key=lambda row: row["block_size"])
