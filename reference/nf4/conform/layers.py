"""Defects that a history of calls shows: a state machine over the quantized linear layer of a library.

    for defect in find_defects(port, seed=0, examples=200):
        print(defect.report())
    print(*port.limits(), sep="\\n")

port is a LayerPort: a small adapter of a library (`libraries/bitsandbytes_layers.py` is one). The machine
makes layers of drawn weights, runs them in training and in evaluation, saves, loads and dequantizes them in
any order, and holds at every step that

- a forward gives x W^T + b, W being the values of what a fresh layer saves, or what it decodes to (NF4-9.2);
- what a layer saves is, bit for bit, what a fresh layer saves, whatever happened to it before (NF4-5.3);
- dequantize gives, bit for bit, the values of what a fresh layer saves (NF4-4), whatever happened before;
- none of these raises.

Whether the codes are the right ones is not asked here: that is what the vectors are for.
"""

import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from hypothesis import HealthCheck, Phase, Verbosity, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st
from hypothesis.errors import Flaky
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test
from numpy.typing import NDArray

from nf4.codebooks import CODEBOOKS
from nf4.conform.values import NAMES, to_hex
from nf4.floats import DTYPES, narrow, widen
from nf4.tensor import QuantizedTensor, dequantize

TOLERANCE = {"float32": 1e-5, "float16": 2.0**-8, "bfloat16": 2.0**-6}
"""What an output may be off, relative to the sum of the magnitudes of its terms, by the dtype of x."""

_ROUNDS = 16  # at most so many defects are looked for
_STEPS = 9  # the making of a layer and eight calls
Array = NDArray[Any]
Saved = Mapping[str, Array]


@dataclass(frozen=True)
class LayerSpec:
    """A linear layer to quantize in nf4: weight [out, in] and bias [out] or None, of one dtype (NF4-12.2)."""

    weight: Array
    bias: Array | None
    block_size: int
    double_quant: bool


class Layer(Protocol):
    """A quantized layer of the library, with whatever state it keeps."""

    def forward(self, x: Array, training: bool) -> Array:
        """Return the output [rows, out] of x [rows, in], both of the weight's dtype, in that mode."""

    def save(self) -> Saved:
        """Return all that the library saves of the layer: arrays under its own names, dtypes and shapes."""

    def dequantize(self) -> Array:
        """Return the weight [out, in], in its dtype."""


class LayerPort(Protocol):
    """A library with quantized linear layers; NotImplementedError stands for what it does not have."""

    name: str

    def quantize(self, spec: LayerSpec) -> Layer:
        """Return a fresh quantized layer."""

    def load(self, spec: LayerSpec, saved: Saved) -> Layer:
        """Return a layer of this form from what one saved."""

    def read(self, spec: LayerSpec, saved: Saved) -> QuantizedTensor:
        """Return what was saved as the tensor of NF4-5.3 that it stands for."""

    def limits(self) -> list[str]:
        """Return a sentence for each way that the library has and that this machine can't show."""


@dataclass(frozen=True)
class Defect:
    """One thing that a library does wrong, by the shortest history found."""

    library: str
    title: str  # what goes wrong, without the sizes: the same in each run
    steps: tuple[str, ...]  # from the making of the layer to the call that goes wrong
    detail: str  # what was expected, what came

    def report(self) -> str:
        """Return it in some lines for a person."""
        steps = "\n".join(f"  {number}. {step}" for number, step in enumerate(self.steps, 1))
        return f"{self.library}: {self.title}\n{steps}\n  {self.detail}"


def find_defects(port: LayerPort, seed: int = 0, examples: int = 200) -> list[Defect]:
    """Return the defects that histories of up to eight calls show, each once, by a history made short.

    A search of `examples` histories is repeated, with what is known left aside, until it finds nothing. The
    same seed finds the same.
    """
    search = _Search(port)
    for turn in range(_ROUNDS):
        found = search.find_one(seed + turn, examples)
        if found is None:
            break
        search.known.append(found)
    return [shown.defect for shown in search.known]


class _Shown(Exception):  # noqa: N818  it carries a find
    """A defect: what goes wrong, in words, and the kinds of the calls that must come before, if any."""

    def __init__(self, what: str, past: frozenset[str], defect: Defect) -> None:
        super().__init__(defect.title)
        self.what, self.past, self.defect = what, past, defect


@dataclass(frozen=True)
class _Fresh:
    """What a fresh layer saves and decodes to, and what the first decodes to by NF4-4."""

    saved: Saved
    decoded: NDArray[np.float32]
    weight: Array


class _Search:
    """What the histories of one port share."""

    def __init__(self, port: LayerPort) -> None:
        self.port = port
        self.known: list[_Shown] = []
        self.fresh: dict[str, _Fresh] = {}  # by the description of the layer
        self.last: _Shown | None = None

    def find_one(self, seed: int, examples: int) -> _Shown | None:
        """The shortest history to something not known; None: `examples` histories show nothing new."""
        search = self

        class Machine(_Machine):
            def __init__(self) -> None:
                super().__init__(search)

        try:
            run_state_machine_as_test(
                seeded(seed)(Machine),
                settings=settings(
                    max_examples=examples,
                    stateful_step_count=_STEPS,
                    database=None,
                    deadline=None,
                    phases=[Phase.generate, Phase.shrink],
                    suppress_health_check=list(HealthCheck),
                    verbosity=Verbosity.quiet,
                    report_multiple_bugs=False,
                ),
            )
        except _Shown as shown:
            return shown
        except Flaky:  # the library does not do the same twice
            return self.last
        return None

    def is_known(self, what: str, past: frozenset[str]) -> bool:
        """Whether the same goes wrong after less; what needs no history does not stand for what needs one."""
        return any(
            what == shown.what and (past == shown.past or (shown.past and shown.past <= past))
            for shown in self.known
        )


# Small ones, what kernels are made for (as often as the rest), and others; ascending, so that the smallest is
# what is reported.
_features = st.sampled_from(
    [1, 2, 3, 4, 5, 6, 7, 8, 15, 16, 17, 31, *[32] * 4, 33, 48, *[64] * 9, 65, 96, *[128] * 5]
)


@st.composite
def layer_specs(draw: st.DrawFn) -> tuple[LayerSpec, str]:
    """Layers of up to 128 x 128 with every block at a scale of its own, and their description."""
    out_features, in_features = draw(_features), draw(_features)
    block_size = draw(st.sampled_from([64, 32, 128, 2048]))
    dtype = draw(st.sampled_from(list(DTYPES)))
    has_bias, double_quant, random = draw(st.booleans()), draw(st.booleans()), draw(st.booleans())
    n = out_features * in_features
    if random:
        flat = np.random.default_rng(n).standard_normal(n).astype(np.float32)
        content = f"numpy.random.default_rng({n}).standard_normal"
    else:
        element = np.arange(n)
        flat = CODEBOOKS["nf4"].values[element % 16] * (element // block_size + 1).astype(np.float32)
        content = f"element i is value i % 16 of nf4 times (i // {block_size} + 1)"
    weight = narrow(flat, DTYPES[dtype]).reshape(out_features, in_features)
    bias = np.ones(out_features, DTYPES[dtype]) if has_bias else None
    words = ["double quantization"] * double_quant + ["a bias of ones"] * has_bias
    name = f"quantize a {dtype} weight [{out_features}, {in_features}] in blocks of {block_size}"
    return LayerSpec(weight, bias, block_size, double_quant), f"{' with '.join([name, *words[:1]])}" + (
        f" and {words[1]}" if words[1:] else ""
    ) + f" ({content})"


class _Machine(RuleBasedStateMachine):
    """One history of a layer; raises _Shown at the first thing wrong that is not known."""

    def __init__(self, search: _Search) -> None:
        super().__init__()
        self._search, self._port = search, search.port
        self._layer: Layer | None = None  # None: nothing more to be learnt from this history
        self._steps: list[str] = []
        self._past: list[str] = []  # the kinds of the calls before

    @initialize(described=layer_specs())
    def quantize(self, described: tuple[LayerSpec, str]) -> None:
        self._spec, step = described
        self._steps.append(step)
        if step not in self._search.fresh:
            layers = [self._call("quantize", self._port.quantize, self._spec) for _ in range(2)]
            if any(layer is None for layer in layers):
                return
            saved = self._call("save", layers[0].save)
            decoded = self._call("dequantize", layers[1].dequantize)
            if saved is None or decoded is None:
                return
            weight = dequantize(self._port.read(self._spec, saved))
            usable = decoded if decoded.shape == weight.shape else weight
            self._search.fresh[step] = _Fresh(saved, widen(usable), weight)
        self._fresh = self._search.fresh[step]
        self._layer = self._call("quantize", self._port.quantize, self._spec)

    @rule(rows=st.integers(1, 3), training=st.booleans())
    def forward(self, rows: int, training: bool) -> None:
        if self._layer is None:
            return
        spec, kind = self._spec, f"forward in {'training' if training else 'evaluation'}"
        wide = spec.weight.shape[1]
        x = (np.arange(rows * wide) % 7 - 3).reshape(rows, wide).astype(spec.weight.dtype)
        self._steps.append(f"{kind}: x [{rows}, {wide}], element i is i % 7 - 3")
        got = self._call(kind, self._layer.forward, x, training)
        if got is not None:
            wrong = self._wrong_output(x, got)
            if wrong is not None:
                fresh = self._port.quantize(spec).forward(x, training)
                self._show(kind, "gives wrong values", wrong, self._wrong_output(x, fresh) is not None)
                # The layer itself may be as good as before: the history goes on.
        self._past.append(kind)

    @rule()
    def save(self) -> None:
        if self._layer is not None:
            self._steps.append("save")
            self._save()

    @rule()
    def load(self) -> None:
        if self._layer is None:
            return
        self._steps.append("save, and load it into a new layer")
        saved = self._save()
        if saved is not None:
            self._layer = self._call("load", self._port.load, self._spec, saved)
            self._past.append("load")

    @rule()
    def dequantize(self) -> None:
        if self._layer is None:
            return
        self._steps.append("dequantize")
        got = self._call("dequantize", self._layer.dequantize)
        if got is None:
            return
        wrong = _difference("", self._fresh.weight, got)
        if wrong is not None:
            fresh = self._port.quantize(self._spec).dequantize()
            alike = (got.dtype, got.shape) == (self._fresh.weight.dtype, self._fresh.weight.shape)
            what = f"gives wrong {'values' if alike else 'shapes or dtypes'}"
            self._show("dequantize", what, wrong, _difference("", self._fresh.weight, fresh) is not None)
            self._layer = None
        self._past.append("dequantize")

    def _save(self) -> Any:
        """What the layer saves; None where that shows something known to be wrong."""
        assert self._layer is not None
        saved = self._call("save", self._layer.save)
        if saved is None:
            return None
        wrong = _saved_difference(self._fresh.saved, saved)
        if wrong is not None:
            self._show("save", "differs from that of a fresh layer", wrong, False)
            self._layer = None
            return None
        self._past.append("save")
        return saved

    def _call(self, kind: str, function: Callable[..., Any], *arguments: Any) -> Any:
        """The result of a call of the library; None, and the end of the history, where it raises as known."""
        try:
            return function(*arguments)
        except NotImplementedError:
            pass
        except Exception as error:  # whatever the library raises is what is looked for
            frame = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{Path(frame.filename).name}, {frame.name}: {frame.line}"
            self._show(kind, f"raises {type(error).__name__} in {place}", str(error) or "(no message)", True)
        self._layer = None
        return None

    def _wrong_output(self, x: Array, got: Array) -> str | None:
        """How the output differs from x W^T + b by more than its rounding allows; None: it does not."""
        # Where dequantize is wrong, a forward that decodes so too is not wrong once more.
        reasons = [self._wrong_product(x, got, w) for w in (widen(self._fresh.weight), self._fresh.decoded)]
        return None if None in reasons else reasons[0]

    def _wrong_product(self, x: Array, got: Array, decoded: NDArray[np.float32]) -> str | None:
        """The same for one W."""
        exact, weight = widen(x).astype(np.float64), decoded.astype(np.float64)
        bias = 0.0 if self._spec.bias is None else widen(self._spec.bias).astype(np.float64)
        want = exact @ weight.T + bias
        if got.shape != want.shape:
            return f"expected an output of shape {list(want.shape)}, got {list(got.shape)}"
        scale = np.abs(exact) @ np.abs(weight).T + np.abs(bias)
        error = np.abs(got.astype(np.float64) - want)
        bound = TOLERANCE[NAMES[x.dtype]]
        bad = np.argwhere(~(error <= bound * scale))
        if not len(bad):
            return None
        at = tuple(bad[0])
        return (
            f"{len(bad)} of {want.size} outputs are off, the first at {[int(i) for i in at]}: "
            f"expected {want[at]:.9g}, by at most {bound * scale[at]:.3g} off; got {float(got[at]):.9g}"
        )

    def _show(self, kind: str, what: str, detail: str, fresh: bool) -> None:
        """Raise what is wrong, unless it is known; fresh: it needs no history."""
        past = [] if fresh else list(dict.fromkeys(self._past))
        what = f"{kind} {what}"
        if self._search.is_known(what, frozenset(past)):
            return
        title = what + (f" after {' and '.join(past)}" if past else "")
        steps = self._steps if kind in self._steps[-1] else [*self._steps, kind]
        defect = Defect(self._port.name, title, tuple(steps), detail)
        self._search.last = _Shown(what, frozenset(past), defect)
        raise self._search.last


def _saved_difference(want: Saved, got: Saved) -> str | None:
    if want.keys() != got.keys():
        return f"expected {', '.join(sorted(want))}; got {', '.join(sorted(got))}"
    differences = (_difference(f"{name}: ", want[name], got[name]) for name in want)
    return next((difference for difference in differences if difference is not None), None)


def _difference(name: str, want: Array, got: Array) -> str | None:
    """The first difference of two arrays, by dtype, shape and bits; None: they are the same."""
    if (want.dtype, want.shape) != (got.dtype, got.shape):
        return f"{name}expected {want.dtype} {list(want.shape)}, got {got.dtype} {list(got.shape)}"
    bits = f"u{want.dtype.itemsize}"
    bad = np.argwhere(np.ascontiguousarray(want).view(bits) != np.ascontiguousarray(got).view(bits))
    if not len(bad):
        return None
    at = tuple(bad[0])
    return (
        f"{name}{len(bad)} of {want.size} elements differ, the first at {[int(i) for i in at]}: expected "
        f"{to_hex(want[at])} ({want[at]}), got {to_hex(got[at])} ({got[at]})"
    )
