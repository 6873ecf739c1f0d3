"""nf4.testing: what its strategies draw; its ready-made tests pass the reference and catch wrong ports."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, find, settings
from hypothesis import strategies as st
from nf4.blockwise import block_count
from nf4.codebooks import CODEBOOKS
from nf4.conform import reference
from nf4.conform.bugs import BUGS
from nf4.errors import InputError
from nf4.floats import DTYPES, widen
from nf4.nested import NestedAbsmax
from nf4.tensor import QuantizedTensor, dequantize, quantize
from nf4.testing import (
    Conformance,
    absmax_lists,
    bit_patterns,
    blocks,
    conformance_tests,
    quantized,
    requantizes,
    shapes,
    tensors,
)
from numpy.typing import NDArray

TestReference = conformance_tests(reference, examples=20)


class Codec:
    """The reference's quantize and dequantize alone: wrong ports override one."""

    def quantize(self, x: NDArray[Any], block_size: int, codebook: str) -> dict[str, Any]:
        return reference.quantize(x, block_size, codebook)

    def dequantize(self, **fields: Any) -> dict[str, Any]:
        return reference.dequantize(**fields)


class TestSubclass(Conformance):
    """The other way to the tests, with a port of two operations."""

    port = Codec()
    examples = 5


def drawn(strategy: st.SearchStrategy[Any], condition: Callable[[Any], bool]) -> Any:
    """Something that the strategy draws and that meets the condition; fails where nothing is found."""
    quiet = settings(
        database=None,
        deadline=None,
        max_examples=2000,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
        derandomize=True,
    )
    return find(strategy, condition, settings=quiet)


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_bit_patterns_reach_every_kind_of_number(dtype: str) -> None:
    kind, least = DTYPES[dtype], float(np.finfo(np.float16).tiny) if dtype == "float16" else 2.0**-126
    patterns = bit_patterns(dtype, 5)
    drawn(patterns, lambda x: bool((np.abs(widen(x))[x != 0] < least).any()))
    drawn(patterns, lambda x: bool((np.signbit(widen(x)) & (x == 0)).any()))
    drawn(patterns, lambda x: bool((np.abs(widen(x)) > 1000).any()))
    wild = bit_patterns(dtype, finite=False)
    drawn(wild, lambda x: bool(np.isnan(widen(x)).any() and x.dtype == kind))
    drawn(wild, lambda x: bool(np.isinf(widen(x)).any()))


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_blocks_reach_thresholds_and_the_ends_of_absmax(dtype: str) -> None:
    thresholds = CODEBOOKS["nf4"].thresholds

    def scaled(x: NDArray[Any]) -> NDArray[np.float64]:
        wide = widen(x).astype(np.float64)
        return wide / (np.abs(wide).max() or 1)

    near = 2e-2 if dtype == "bfloat16" else 1e-3 if dtype == "float16" else 1e-6
    hard = blocks(dtype, 64)
    drawn(hard, lambda x: bool((np.abs(scaled(x)[:, None] - thresholds) < near).any()))
    drawn(hard, lambda x: not widen(x).any() and x.size == 64)
    drawn(
        hard, lambda x: float(np.abs(widen(x)).max()) == float(np.finfo(np.float16).max) or dtype != "float16"
    )
    if dtype != "float16":
        drawn(hard, lambda x: float(np.abs(widen(x)).max()) == 2.0**-128)
        drawn(hard, lambda x: float(np.abs(widen(x)).max()) > 2.0**126)
    assert np.abs(widen(drawn(blocks(dtype, 7, absmax=3.0), lambda x: True))).max() == 3


def test_in_float32_ties_are_drawn_exactly() -> None:
    """With absmax 1, s is the element: on thresholds, and one ulp to either side."""
    thresholds = CODEBOOKS["nf4"].thresholds
    for side in (-9, 0, 9):
        wanted = np.nextafter(thresholds, np.float32(side)) if side else thresholds
        drawn(blocks("float32", 16, absmax=1.0), lambda x, wanted=wanted: bool(np.isin(x, wanted).any()))


def test_shapes_have_tails_rows_that_blocks_cross_and_nothing() -> None:
    drawn(shapes(64), lambda shape: len(shape) == 1 and shape[0] > 64 and shape[0] % 64 == 1)
    drawn(shapes(64), lambda shape: len(shape) == 1 and shape[0] == 128)
    drawn(shapes(64), lambda shape: len(shape) == 2 and shape[0] > 1 and shape[1] % 64 > 0 and shape[1] > 32)
    drawn(shapes(64), lambda shape: len(shape) == 3)
    drawn(shapes(64), lambda shape: shape == ())
    drawn(shapes(64), lambda shape: 0 in shape and len(shape) == 2)


def test_absmax_lists_cross_nested_blocks_and_are_never_negative() -> None:
    assert not np.signbit(drawn(absmax_lists(), lambda x: x.size > 256 and len(np.unique(x)) > 3)).any()
    drawn(absmax_lists(40), lambda x: bool((x > 2.0**127).any()))
    drawn(absmax_lists(3), lambda x: bool(((x > 0) & (x < 2.0**-130)).any()))
    drawn(absmax_lists(3, signed=True), lambda x: bool((x < 0).any()))


def test_tensors_and_quantized_tensors_fit_their_shape() -> None:
    x = drawn(tensors("bfloat16", 32), lambda x: x.ndim == 2 and x.size > 40)
    assert x.dtype == DTYPES["bfloat16"]
    q = drawn(quantized("float16", 32, double_quant=True), lambda q: q.size > 40)
    assert isinstance(q, QuantizedTensor)
    assert isinstance(q.absmax, NestedAbsmax)
    assert q.absmax.codes.size == block_count(q.size, 32)


@pytest.mark.parametrize("name", list(CODEBOOKS))
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_requantizes_says_exactly_when(dtype: str, name: str) -> None:
    """Every element there is, at every absmax up to 130 units of the least subnormal."""
    unit = float(np.nextafter(np.zeros(1, DTYPES[dtype]), np.ones(1, DTYPES[dtype])).astype(np.float64)[0])
    for k in range(1, 131):
        x = (np.arange(-k, k + 1) * unit).astype(np.float32).astype(DTYPES[dtype])
        q = quantize(x, 512, name)
        assert isinstance(q.absmax, np.ndarray)
        assert (quantize(dequantize(q), 512, name) == q) == requantizes(q.absmax, x.dtype, name), k


class EpsilonAdded(Codec):
    def quantize(self, x: NDArray[Any], block_size: int, codebook: str) -> dict[str, Any]:
        q = super().quantize(x, block_size, codebook)
        return q | {"absmax": q["absmax"] + np.float32(1e-8)}


class OneScale(Codec):
    """One scale for the whole tensor."""

    def quantize(self, x: NDArray[Any], block_size: int, codebook: str) -> dict[str, Any]:
        top = np.abs(x).max(initial=0)
        with np.errstate(all="ignore"):
            scaled = np.nan_to_num(x / top).astype(x.dtype)
        whole = super().quantize(np.append(scaled.reshape(-1), x.dtype.type(1)), 4096, codebook)
        blocks = block_count(x.size, block_size)
        return {"codes": whole["codes"][: -(-x.size // 2)], "absmax": np.full(blocks, top, np.float32)}


class RowByRow(Codec):
    def quantize(self, x: NDArray[Any], block_size: int, codebook: str) -> dict[str, Any]:
        whole = super().quantize(x, block_size, codebook)
        if x.ndim > 1 and x.shape[0] > 1 and x.size:
            first = super().quantize(x[0], block_size, codebook)["absmax"]
            whole["absmax"] = np.resize(first, whole["absmax"].size)
        return whole


class TakesNaN(Codec):
    def quantize(self, x: NDArray[Any], block_size: int, codebook: str) -> dict[str, Any]:
        return super().quantize(np.nan_to_num(x), block_size, codebook)


class LowNibbleFirst(Codec):
    def dequantize(self, **fields: Any) -> dict[str, Any]:
        codes = fields["codes"]
        return super().dequantize(**fields | {"codes": codes >> 4 | codes << 4})


class Truncates(Codec):
    def dequantize(self, **fields: Any) -> dict[str, Any]:
        if fields["dtype"] != "bfloat16":
            return super().dequantize(**fields)
        wide = super().dequantize(**fields | {"dtype": "float32"})["y"]
        return {"y": (wide.view(np.uint32) >> 16).astype(np.uint16).view(DTYPES["bfloat16"])}


class ScalesInSixteenBits(Codec):
    def quantize(self, x: NDArray[Any], block_size: int, codebook: str) -> dict[str, Any]:
        if x.dtype == np.float32:
            x = np.where(np.abs(x) < 1e-6, np.float32(0), x)
        return super().quantize(x, block_size, codebook)


class Remembers(Codec):
    last = np.zeros(1, np.uint8)

    def quantize(self, x: NDArray[Any], block_size: int, codebook: str) -> dict[str, Any]:
        q = super().quantize(x, block_size, codebook)
        codes = q["codes"] ^ (self.last.size > 3)
        self.last = q["codes"]
        return q | {"codes": codes.astype(np.uint8)}


class ScalesInPlace(Codec):
    def quantize(self, x: NDArray[Any], block_size: int, codebook: str) -> dict[str, Any]:
        q = super().quantize(x, block_size, codebook)
        x *= x.dtype.type(0.5)
        return q


class ReadsMemory(Codec):
    def quantize(self, x: NDArray[Any], block_size: int, codebook: str) -> dict[str, Any]:
        return super().quantize(x.ravel(order="K"), block_size, codebook)


CAUGHT = {
    "requantizing_a_decoded_tensor_gives_the_same_codes": LowNibbleFirst,
    "scaling_by_a_power_of_two_changes_absmax_alone": EpsilonAdded,
    "blocks_are_independent": OneScale,
    "the_shape_does_not_matter": RowByRow,
    "nan_and_infinity_are_refused": TakesNaN,
    "every_byte_decodes": LowNibbleFirst,
    "sixteen_bits_are_the_rounded_thirty_two": Truncates,
    "sixteen_bits_are_quantized_as_thirty_two": ScalesInSixteenBits,
    "the_same_input_has_the_same_answer": Remembers,
    "inputs_are_only_read": ScalesInPlace,
    "any_memory_order_is_read_in_c_order": ReadsMemory,
}


def test_every_property_is_here_with_a_port_that_breaks_it() -> None:
    names = {name.removeprefix("test_") for name in dir(Conformance) if name.startswith("test_")}
    assert names == set(CAUGHT) | {"vector", "like_the_reference"}


@pytest.mark.parametrize("name", list(CAUGHT))
def test_each_property_catches_a_wrong_port(name: str) -> None:
    tests = conformance_tests(CAUGHT[name](), examples=60)()
    with pytest.raises(AssertionError):
        getattr(tests, f"test_{name}")()


@pytest.mark.parametrize(
    ("flag", "name"),
    [
        ("NibbleOrder", "every_byte_decodes"),
        ("BlocksRestartAtRows", "the_shape_does_not_matter"),
        ("NonFiniteAccepted", "nan_and_infinity_are_refused"),
        ("TruncatedConversion", "sixteen_bits_are_the_rounded_thirty_two"),
        ("FlushSubnormal", "every_byte_decodes"),
    ],
)
def test_properties_catch_the_wrong_ports_of_flags(flag: str, name: str) -> None:
    with pytest.raises(AssertionError):
        getattr(conformance_tests(BUGS[flag])(), f"test_{name}")()


@pytest.mark.parametrize(
    ("flag", "operation"),
    [("TieRule", "quantize"), ("FmaContraction", "decode_absmax"), ("CodebookRounded", "dequantize")],
)
def test_drawn_inputs_catch_the_wrong_ports_of_flags(flag: str, operation: str) -> None:
    with pytest.raises(AssertionError, match=f"{operation}: .*expected"):
        conformance_tests(BUGS[flag], examples=200)().test_like_the_reference(operation)


def test_the_search_and_the_vectors_catch_a_wrong_port(tmp_path: Path) -> None:
    """As a third party has it: a file of two lines under pytest, the vectors by their ids."""
    port = "class Wrong:\n    def storage(self, **fields): return 4 * fields['elements']\n\n"
    lines = "from nf4.testing import conformance_tests\nTestWrong = conformance_tests(Wrong())\n"
    (tmp_path / "test_wrong.py").write_text(port + lines)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_wrong.py"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 1
    assert "TestWrong::test_like_the_reference[storage]" in run.stdout
    assert "FAILED test_wrong.py::TestWrong::test_vector[storage-" in run.stdout


def test_what_a_port_lacks_or_skips_is_not_tested() -> None:
    class Nothing:
        def quantize(self, **fields: Any) -> None:
            raise NotImplementedError("no such thing")

    tests = conformance_tests(Nothing(), examples=3)()
    with pytest.raises(pytest.skip.Exception, match="no such thing"):
        skipping(tests.test_blocks_are_independent)
    with pytest.raises(pytest.skip.Exception, match="the port has no dequantize"):
        skipping(tests.test_every_byte_decodes)


def skipping(test: Callable[[], None]) -> None:
    """Run a test whose skip is that of unittest."""
    import unittest

    try:
        test()
    except unittest.SkipTest as skip:
        pytest.skip(str(skip))


def test_a_port_that_refuses_everything_fails() -> None:
    class Refuses:
        def quantize(self, **fields: Any) -> None:
            raise InputError("no")

    with pytest.raises(AssertionError, match="was refused: no"):
        conformance_tests(Refuses(), examples=3)().test_the_shape_does_not_matter()
