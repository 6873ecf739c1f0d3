"""The pictures: grids under densities, errors against bits, errors by layer."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri

from nf4.codebooks import CODEBOOKS
from nf4.evidence.grids import QUANTIZERS, af4, bof4
from nf4.evidence.normal import ScaledNormal
from nf4.evidence.weights import Weight, masses, scaled_histogram
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
    "bof4-mean": "tab:gray",
    "bof4-s": "tab:pink",
}
_WORDS = {"nf4": "NF4", "int4": "uniform"}
_EDGES = np.linspace(-1, 1, 162)  # of histograms: 0 is in the middle of a bar


@contextmanager
def figure(path: Path, width: float, height: float) -> Iterator[Any]:
    """Yield an empty figure of so many inches, then write it as a PNG, atomically."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    style: Any = {"font.size": 10, "legend.frameon": False}
    style |= {"axes.spines.top": False, "axes.spines.right": False}
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


NORMAL, BLOCKS, WEIGHTS = "normal", "normal in blocks", "weights"
"""What fills bins: N(0, 1), which NF4 is derived from; the same over the absmax of blocks; real weights."""

_SIGMAS = float(ndtri(0.9677083))  # where NF4 puts 1 when it is derived (NF4-2.4)


def bin_masses(weights: Sequence[Weight], name: str, block_size: int) -> dict[str, NDArray[np.float64]]:
    """Return the share of the values in each bin of a codebook, ascending, for the three above.

    The bins are those of the encoder (NF4-2.2): a bin ends half-way to the next value.
    """
    book = CODEBOOKS[name]
    cumulative = ndtr(np.concatenate([[-np.inf], book.thresholds.astype(np.float64) * _SIGMAS, [np.inf]]))
    return {
        NORMAL: np.diff(cumulative),
        BLOCKS: ScaledNormal(block_size).masses(book.thresholds),
        WEIGHTS: masses(weights, book, block_size),
    }


def draw_grid(path: Path, weights: Sequence[Weight], block_size: int, what: str) -> None:
    """Draw the NF4 and the uniform grid under the normal density and real weights, and the bins' masses."""
    counts = scaled_histogram(weights, block_size, _EDGES)
    found = {name: bin_masses(weights, name, block_size) for name in ("int4", "nf4")}
    edges = CODEBOOKS["nf4"].thresholds
    with figure(path, 11, 6.6) as drawn:
        (left, right), (left_bars, right_bars) = drawn.subplots(2, 2, height_ratios=(5, 4))
        x = np.linspace(-1.5, 1.5, 601)
        normal = np.exp(-((x * _SIGMAS) ** 2) / 2) * _SIGMAS / math.sqrt(2 * math.pi)
        left.fill_between(x, normal, color="0.85")
        left.plot(x, normal, color="black", linewidth=1, label="N(0, 1)")
        left.vlines(edges, 0, np.interp(edges, x, normal), color="white", linewidth=1)
        left.set_title(f"what NF4 is derived from: N(0, 1), 1 at {_SIGMAS:.2f} σ")
        heights = counts / np.diff(_EDGES)
        right.bar(_EDGES[:-1], heights, np.diff(_EDGES), align="edge", color="0.85")
        x = np.linspace(-1, 1, 401)
        curve = ScaledNormal(block_size).density(x)
        right.plot(x, curve, color="black", linewidth=1, label="N(0, 1) in blocks")
        right.vlines(edges, 0, np.interp(edges, x, curve), color="white", linewidth=1)
        right.set_title(f"what it gets: weights of {what}, in blocks of {block_size}")
        for axes in (left, right):
            top = axes.get_ylim()[1]
            for level, name in enumerate(("nf4", "int4")):
                values, at = np.unique(CODEBOOKS[name].values), -top * (0.07 + 0.1 * level)
                axes.plot(values, np.full(len(values), at), "|", color=_COLOURS[name], markersize=12, mew=2)
                axes.text(-1.48, at, _WORDS[name], color=_COLOURS[name], va="center", fontsize=9)
            axes.set_xlim(-1.5, 1.5)
            axes.set_ylim(-0.22 * top, top)
            axes.set_yticks([])
            axes.spines["left"].set_visible(False)
            axes.legend()
        for axes, key in ((left_bars, NORMAL), (right_bars, WEIGHTS)):
            for name, shift in (("nf4", -0.2), ("int4", 0.2)):
                share = 100 * found[name][key]
                axes.bar(np.arange(len(share)) + shift, share, 0.4, color=_COLOURS[name], label=_WORDS[name])
            nf4 = 100 * found["nf4"][key]
            if key == WEIGHTS:
                blocks = 100 * found["nf4"][BLOCKS]
                axes.plot(np.arange(16) - 0.2, blocks, "k.", markersize=5, label="NF4, N(0, 1) in blocks")
            axes.axhline(100 / 16, color="black", linestyle="--", linewidth=1)
            axes.text(15.6, 100 / 16 + 0.3, "1/16", ha="right")
            axes.set_title(f"NF4's bins hold {nf4.min():.1f} to {nf4.max():.1f} % each")
            axes.set_xlabel("bin, from that of -1 to that of 1")
            axes.set_ylabel("% of the values")
            axes.set_ylim(0, 17)
            axes.legend(loc="upper left")


def _by_quantizer(results: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, list[Mapping[str, Any]]]]:
    for name in QUANTIZERS:
        rows = [row for row in results if row["quantizer"] == name]
        if rows:
            yield name, sorted(rows, key=lambda row: row["block_size"])
