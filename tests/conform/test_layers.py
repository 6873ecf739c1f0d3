"""The state machine: nothing in a correct layer; each planted defect found, once, by the shortest history."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from nf4.codebooks import CODEBOOKS
from nf4.conform.layers import Defect, LayerSpec, Saved, find_defects
from nf4.conform.python_port import PythonPort
from nf4.conform.report import as_html, failures, notes, run_json, verdict
from nf4.conform.run import Run, search_layers
from nf4.floats import narrow, widen
from nf4.nested import NestedAbsmax
from nf4.tensor import QuantizedTensor, dequantize, quantize
from numpy.typing import NDArray

Array = NDArray[Any]


class Layer:
    """A correct layer of the reference; ports below plant a defect in it."""

    def __init__(self, q: QuantizedTensor, bias: Array | None) -> None:
        self.q, self.bias = q, bias

    def forward(self, x: Array, training: bool) -> Array:
        y = widen(x) @ widen(dequantize(self.q)).T
        return narrow(y if self.bias is None else y + widen(self.bias), x.dtype)

    def save(self) -> Saved:
        saved: dict[str, Array] = {"codes": self.q.codes}
        if isinstance(self.q.absmax, NestedAbsmax):
            saved |= {"absmax": self.q.absmax.codes, "nested": self.q.absmax.absmax}
            saved |= {"offset": np.array([self.q.absmax.offset]), "map": self.q.absmax.map}
        else:
            saved |= {"absmax": self.q.absmax}
        return saved if self.bias is None else saved | {"bias": self.bias}

    def dequantize(self) -> Array:
        return dequantize(self.q)


class Port:
    name = "planted"
    layer: type[Layer] = Layer

    def quantize(self, spec: LayerSpec) -> Layer:
        q = quantize(spec.weight, spec.block_size, double_quant=spec.double_quant)
        return self.layer(q, spec.bias)

    def load(self, spec: LayerSpec, saved: Saved) -> Layer:
        return self.layer(self.read(spec, saved), saved.get("bias"))

    def read(self, spec: LayerSpec, saved: Saved) -> QuantizedTensor:
        absmax: Any = saved["absmax"]
        if spec.double_quant:
            absmax = NestedAbsmax(absmax, saved["nested"], saved["offset"][0], saved["map"])
        shape, dtype = spec.weight.shape, spec.weight.dtype
        return QuantizedTensor(saved["codes"], absmax, shape, dtype, spec.block_size, CODEBOOKS["nf4"])

    def limits(self) -> list[str]:
        return []


def planted(kind: type[Layer], examples: int = 70) -> list[Defect]:
    port = Port()
    port.layer = kind
    return find_defects(port, seed=0, examples=examples)


def test_nothing_is_found_in_a_correct_layer() -> None:
    assert find_defects(Port(), seed=1, examples=50) == []


def test_a_defect_of_one_call_has_two_steps() -> None:
    class Wide(Layer):
        """Dequantize doubles from the 17th column on."""

        def dequantize(self) -> Array:
            y = super().dequantize().copy()
            y[:, 16:] *= y.dtype.type(2)
            return y

    (defect,) = planted(Wide)
    assert defect.title == "dequantize gives wrong values"
    assert defect.steps[0].startswith("quantize a float32 weight [1, 17] in blocks of 64 (")
    assert defect.steps[1:] == ("dequantize",)
    assert (
        "1 of 17 elements differ, the first at [0, 16]: expected bf800000 (-1.0), got c0000000"
        in defect.detail
    )
    assert defect.report().splitlines()[0] == "planted: dequantize gives wrong values"
    assert defect.report().splitlines()[2] == "  2. dequantize"


def test_a_forward_that_changes_what_is_saved_is_found_by_three_steps() -> None:
    class Repacks(Layer):
        def forward(self, x: Array, training: bool) -> Array:
            y = super().forward(x, training)
            self.repacked = not training
            return y

        def save(self) -> Saved:
            saved = dict(super().save())
            if getattr(self, "repacked", False):
                saved["codes"] = saved["codes"][::-1]
            return saved

    (defect,) = planted(Repacks)
    assert defect.title == "save differs from that of a fresh layer after forward in evaluation"
    assert [step.split(",")[0].split(":")[0] for step in defect.steps[1:]] == [
        "forward in evaluation",
        "save",
    ]
    assert defect.detail.startswith("codes: ")


def test_several_defects_are_found_one_after_the_other() -> None:
    class Three(Layer):
        def forward(self, x: Array, training: bool) -> Array:
            assert training or len(self.q.codes) * 2 % 32 == 0, "rows in 32s only"
            y = super().forward(x, training)
            return y * y.dtype.type(1.5) if training else y

        def dequantize(self) -> Array:
            return super().dequantize().reshape(-1)

    titles = [defect.title for defect in planted(Three)]
    assert sorted(title.split(" in test")[0] for title in titles) == [
        "dequantize gives wrong shapes or dtypes",
        "forward in evaluation raises AssertionError",
        "forward in training gives wrong values",
    ]
    (asserts,) = [title for title in titles if "AssertionError" in title]
    assert 'forward: assert training or len(self.q.codes) * 2 % 32 == 0, "rows in 32s only"' in asserts


def test_a_load_that_loses_something_is_found() -> None:
    class Forgets(Port):
        def load(self, spec: LayerSpec, saved: Saved) -> Layer:
            return Layer(self.read(spec, saved), None)

    defects = find_defects(Forgets(), seed=0, examples=150)
    assert {defect.title for defect in defects} == {
        "save differs from that of a fresh layer after save and load",
        "forward in training gives wrong values after save and load",
        "forward in evaluation gives wrong values after save and load",
    }


def test_the_same_seed_finds_the_same() -> None:
    class Sharp(Layer):
        def forward(self, x: Array, training: bool) -> Array:
            return super().forward(x, training) * x.dtype.type(1 + 2**-5)

    assert planted(Sharp) == planted(Sharp) != []


def test_what_a_library_does_not_have_is_no_defect() -> None:
    class Narrow(Port):
        def quantize(self, spec: LayerSpec) -> Layer:
            if spec.double_quant or spec.bias is not None:
                raise NotImplementedError
            return super().quantize(spec)

        def load(self, spec: LayerSpec, saved: Saved) -> Layer:
            raise NotImplementedError

    assert find_defects(Narrow(), seed=0, examples=60) == []


@pytest.mark.parametrize("fault", [KeyError("lost"), OverflowError("deep")])
def test_an_exception_is_a_defect_with_its_place(fault: Exception) -> None:
    class Raises(Layer):
        def save(self) -> Saved:
            raise fault

    (defect,) = planted(Raises, examples=20)
    assert defect.title.startswith(f"save raises {type(fault).__name__} in test_layers.py, save: raise fault")
    assert defect.steps[1:] == ("save",)


def test_unsteady_libraries_are_reported_too() -> None:
    turns: list[Callable[[], None]] = []

    class Unsteady(Layer):
        def dequantize(self) -> Array:
            turns.append(lambda: None)
            y = super().dequantize()
            return y * y.dtype.type(2) if len(turns) == 3 else y

    assert len(planted(Unsteady, examples=30)) == 1


def test_a_run_of_the_kit_tells_the_defects_and_what_can_t_be_shown() -> None:
    class Halves(Layer):
        def dequantize(self) -> Array:
            return super().dequantize() / 2

    port = Port()
    port.layer = Halves
    port.limits = lambda: ["no such processor here"]  # type: ignore[method-assign]
    run = Run("planted", ("--python", "planted"))
    search_layers(run, port, examples=20)
    assert run.exit_code == 1
    assert "DEFECT of planted: dequantize gives wrong values\n  1. quantize a float32 weight" in failures(
        run, {}
    )
    assert "remark: no such processor here" in notes(run)
    assert verdict(run).endswith("histories of a layer show 1 more; 0.0 s")
    assert run_json(run)["defects"][0]["steps"][1] == "dequantize"
    assert "dequantize gives wrong values" in as_html(run, {}, "2026-01-01")


def test_a_python_port_gives_its_layers() -> None:
    class Target:
        def quantize(self) -> None:
            raise NotImplementedError

        def layers(self) -> Port:
            return Port()

    layers = PythonPort(Target(), "target").layers
    assert layers is not None
    assert find_defects(layers, examples=5) == []
