"""The state machine finds the defects of bitsandbytes 0.50.2, or says that this machine can't show them."""

import copy
import re
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from nf4.conform.layers import Defect, LayerSpec, Saved, find_defects
from nf4.conform.libraries.bitsandbytes_layers import BitsandbytesLayer, BitsandbytesLayers

avx512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
repacks = bool(bnb.has_avx512bf16())


def named(defects: list[Defect], title: str) -> Defect:
    """The defect whose title begins so."""
    print(*(defect.report() for defect in defects), sep="\n")
    return next(defect for defect in defects if defect.title.startswith(title))


def shape_of(defect: Defect) -> tuple[int, int, int]:
    """Rows, columns and block size of the weight of its first step."""
    match = re.search(r"weight \[(\d+), (\d+)\] in blocks of (\d+)", defect.steps[0])
    assert match
    rows, columns, block = (int(number) for number in match.groups())
    return rows, columns, block


def test_what_this_machine_shows_is_found() -> None:
    """On AVX-512: 2-D dequantize takes absmax by row * (K // block) where K is no multiple of the block."""
    port = BitsandbytesLayers()
    found = find_defects(port, seed=0, examples=150)
    if avx512:
        wrong = named(found, "dequantize gives wrong values")
        rows, columns, block = shape_of(wrong)
        assert wrong.steps[1:] == ("dequantize",)
        assert columns % block
        assert rows * columns <= 256
        assert "expected c0000000 (-2.0), got bf800000 (-1.0)" in wrong.detail
    if repacks:
        check_repacking(found)
    limits = " ".join(port.limits())
    assert ("no AVX-512 on" in limits) != avx512
    assert ("AVX512-BF16" in limits) != repacks


class Repacking(BitsandbytesLayers):
    """The layers as a processor with AVX512-BF16 has them: its flag set, so that their own code repacks."""

    def quantize(self, spec: LayerSpec) -> BitsandbytesLayer:
        return self._flagged(super().quantize(spec))

    def load(self, spec: LayerSpec, saved: Saved) -> BitsandbytesLayer:
        return self._flagged(super().load(spec, saved))

    def _flagged(self, layer: BitsandbytesLayer) -> BitsandbytesLayer:
        layer.layer.support_avx512bf16_for_cpu = True
        return layer


def product(A: Any, B: Any, out: Any = None, state: Any = None) -> Any:
    """What the kernel of that processor computes from repacked weights, as float32."""
    plain = copy.copy(state)
    plain.original_nested = False
    absmax = state.absmax.T.reshape(-1).float()
    codes, plain = bnb._convert_weight_packed_for_cpu_inverse(B, plain)
    plain.absmax, plain.dtype, plain.shape = absmax, torch.float32, torch.Size([state.shape.numel()])
    weight = bnb.dequantize_4bit(codes.reshape(-1, 1), plain).reshape(state.shape)
    return (A.float() @ weight.T).to(A.dtype)


def check_repacking(found: list[Defect]) -> None:
    """A forward in evaluation asserts rows in 32s, and what is saved after it is something else."""
    asserts = named(found, "forward in evaluation raises AssertionError")
    assert "N must be divisible by block_n" in asserts.detail
    assert len(asserts.steps) == 2
    assert shape_of(asserts)[0] % 32
    saves = named(found, "save differs from that of a fresh layer after forward in evaluation")
    assert len(saves.steps) == 3
    assert shape_of(saves)[0] == 32
    assert re.fullmatch(r"weight.absmax: expected float32 \[\d+\], got bfloat16 \[\d+, 32\]", saves.detail)


def test_what_repacking_does_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The repack and its assertion are Python: with the flag set and a product for the kernel, they run."""
    monkeypatch.setattr(bnb, "gemv_4bit", product)
    found = find_defects(Repacking(), seed=0, examples=150)
    check_repacking(found)
