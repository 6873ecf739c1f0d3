"""The grids to compare with: against the published tables, and each quantizer's bounds on any bits."""

import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from nf4.codebooks import CODEBOOKS
from nf4.evidence.grids import QUANTIZERS, af4, bof4, bof4_mean, round_asymmetric
from nf4.evidence.normal import ScaledNormal
from nf4.tensor import dequantize, quantize

# arXiv 2306.06965, as its author's program prints them for blocks of these sizes.
AF4 = {
    32: (-1, -0.72380075, -0.54068711, -0.3963985, -0.2723577, -0.15956821, -0.05258802, 0,
         0.04554747, 0.13780891, 0.23375854, 0.33656744, 0.4508456, 0.58437857, 0.75299116, 1),
    64: (-1, -0.69441008, -0.51243739, -0.3736951, -0.25607552, -0.14982478, -0.04934812, 0,
         0.04273164, 0.12934483, 0.21961274, 0.31675666, 0.42563882, 0.55496234, 0.72424863, 1),
    4096: (-1, -0.5379003, -0.38399174, -0.27664257, -0.18850865, -0.10999076, -0.03618635, 0,
           0.03129431, 0.09480323, 0.16126887, 0.23343416, 0.31577979, 0.41743354, 0.56468758, 1),
}  # fmt: skip
# arXiv 2505.06653, table 8 (by integration) and tables 6 and 7 (from 2^25 samples, hence less exact).
BOF4_64 = (
    -1, -0.7535689203869577, -0.5792681492535123, -0.4386720084478466, -0.3168191039791481,
    -0.2060291109696586, -0.1015640796456471, 0, 0.0887646748673216, 0.1794535266886747, 0.274249773841407,
    0.375951029286045, 0.4885925268369112, 0.6187715546288008, 0.7790828367844242, 1,
)  # fmt: skip
BOF4_MEAN_64 = (
    -1, -0.7026305794715881, -0.5272703766822815, -0.3946738243103027, -0.2832144796848297,
    -0.1835313588380814, -0.090308666229248, 0, 0.0789600014686584, 0.1598792523145676, 0.244986355304718,
    0.3372218906879425, 0.441359281539917, 0.565777063369751, 0.7299178242683411, 1,
)  # fmt: skip
BOF4_S = {
    32: (-0.8732797503471375, -0.6907446384429932, -0.5437039136886597, -0.4173701703548431,
         -0.3038933575153351, -0.1986017823219299, -0.0981557220220566, 0, 0.0925938412547112,
         0.187048003077507, 0.2855197489261627, 0.3907126188278198, 0.506283164024353, 0.6379748582839966,
         0.7956376671791077, 1),
    64: (-0.8568463921546936, -0.6692874431610107, -0.5235266089439392, -0.4004882574081421,
         -0.2910638153553009, -0.1900092959403992, -0.0938529595732689, 0, 0.0887671709060669,
         0.1794802695512772, 0.2743096053600311, 0.3760197460651398, 0.4886530041694641, 0.6188603639602661,
         0.7791395783424377, 1),
    256: (-0.8146829009056091, -0.6221838593482971, -0.4820549190044403, -0.3669650852680206,
          -0.2659871876239777, -0.1733742356300354, -0.0855776593089104, 0, 0.0815095230937004,
          0.1649149656295776, 0.2524392008781433, 0.3470274209976196, 0.4531534314155579, 0.578848659992218,
          0.7418596744537354, 1),
}  # fmt: skip

quick = settings(deadline=None, max_examples=40)

DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16]


@pytest.mark.parametrize("block_size", AF4)
def test_af4_is_the_published_table(block_size: int) -> None:
    assert np.abs(af4(block_size).values - np.array(AF4[block_size])).max() < 6e-8


def test_bof4_is_the_published_table() -> None:
    assert np.abs(bof4(64).values - np.array(BOF4_64)).max() < 2e-6
    assert np.abs(bof4_mean(64).values - np.array(BOF4_MEAN_64)).max() < 4e-4
    for block_size, table in BOF4_S.items():
        assert np.abs(bof4(block_size, signed=True).values - np.array(table)).max() < 3e-4


@quick
@given(
    st.sampled_from([32, 64, 1024]), st.booleans(), st.integers(0, 14), st.floats(0.0005, 0.02), st.booleans()
)
def test_no_table_near_bof4_has_a_smaller_error(
    block_size: int, signed: bool, which: int, by: float, up: bool
) -> None:
    scaled, best = ScaledNormal(block_size, signed), bof4(block_size, signed).values.astype(np.float64)
    fixed = {7} if signed else {0, 7}
    moved = best.copy()
    if which not in fixed:
        moved[which] += by if up else -by
        assert scaled.errors(moved)[0] > scaled.errors(best)[0]
    if not signed and which not in fixed:
        least = bof4_mean(block_size).values.astype(np.float64)
        moved = least.copy()
        moved[which] += by if up else -by
        assert scaled.errors(moved)[1] > scaled.errors(least)[1]


def test_nf4_is_not_the_best_table_for_normal_weights_and_af4_not_by_its_own_measure() -> None:
    nf4, scaled = CODEBOOKS["nf4"].values, ScaledNormal(64)
    assert scaled.errors(bof4(64).values)[0] < 0.98 * scaled.errors(nf4)[0]
    assert 0.999 < scaled.errors(bof4_mean(64).values)[1] / scaled.errors(nf4)[1] < 1
    assert scaled.errors(af4(64).values)[1] > scaled.errors(nf4)[1]
    assert ScaledNormal(4096).errors(af4(4096).values)[1] < ScaledNormal(4096).errors(nf4)[1]


def gap(name: str, block_size: int) -> float:
    """Half the largest distance between two values of a grid, and for BOF4-S that of -1 to its least."""
    if name == "bof4-s":
        values = bof4(block_size, signed=True).values.astype(np.float64)
        return max(float(np.diff(values).max()) / 2, 1 + float(values[0]))
    tables: dict[str, Any] = {"af4": af4, "bof4": bof4, "bof4-mean": bof4_mean}
    book = tables[name](block_size) if name in tables else CODEBOOKS[name.removesuffix("-dq")]
    return float(np.diff(np.unique(book.values.astype(np.float64))).max()) / 2


@pytest.mark.parametrize("name", [name for name in QUANTIZERS if name != "int4-asym"])
@quick
@given(data=st.data())
def test_the_error_is_at_most_half_a_gap_times_the_absmax(name: str, data: st.DataObject) -> None:
    dtype = np.dtype(data.draw(st.sampled_from(DTYPES)))
    size, block_size = data.draw(st.integers(1, 300)), data.draw(st.sampled_from([32, 128]))
    # float16 holds all of these; double quantization shifts an absmax by up to a few per cent.
    x = data.draw(hnp.arrays(np.float32, size, elements=st.floats(-64, 64, width=16))).astype(dtype)
    rounded = QUANTIZERS[name].round(x, block_size)
    assert rounded.values.dtype == dtype
    assert rounded.values.shape == x.shape
    wide, got = x.astype(np.float64), rounded.values.astype(np.float64)
    for start in range(0, size, block_size):
        part = slice(start, start + block_size)
        absmax = np.abs(wide[part]).max()
        bound = absmax * (gap(name, block_size) + 2.0**-7)
        if name == "nf4-dq":
            bound += 0.03 * np.abs(wide).max()
        assert np.abs(wide[part] - got[part]).max() <= bound + 1e-7


@quick
@given(
    hnp.arrays(np.float32, st.integers(1, 200), elements=st.floats(-1000, 1000, width=32)),
    st.sampled_from([32, 64]),
)
def test_the_asymmetric_grid_has_sixteen_even_steps_from_least_to_greatest(
    x: np.ndarray, block_size: int
) -> None:
    rounded = round_asymmetric(x, block_size)
    assert rounded.nbytes == -(-x.size // 2) + 8 * -(-x.size // block_size)
    for start in range(0, x.size, block_size):
        part, got = x[start : start + block_size], rounded.values[start : start + block_size]
        step = (float(part.max()) - float(part.min())) / 15
        assert np.abs(part.astype(np.float64) - got).max() <= step / 2 + 1e-3 * step + 1e-4
        assert got[part.argmin()] == part.min()


@quick
@given(
    hnp.arrays(
        np.float32, st.integers(1, 200), elements=st.floats(-1000, 1000, width=32, allow_subnormal=False)
    )
)
def test_a_signed_absmax_makes_no_difference_between_x_and_minus_x(x: np.ndarray) -> None:
    there, back = QUANTIZERS["bof4-s"].round(x, 32), QUANTIZERS["bof4-s"].round(-x, 32)
    assert np.array_equal(there.values, -back.values)
    assert there.nbytes == back.nbytes == quantize(x, 32).nbytes


@pytest.mark.parametrize("name", ["nf4", "fp4", "fp4-e2m1", "int4"])
def test_the_specifications_codebooks_are_rounded_by_its_codec(name: str) -> None:
    x = np.random.default_rng(1).standard_normal((7, 31)).astype(np.float32)
    q = quantize(x, 64, name)
    rounded = QUANTIZERS[name].round(x, 64)
    assert np.array_equal(rounded.values, dequantize(q))
    assert rounded.nbytes == q.nbytes


@pytest.mark.parametrize("name", QUANTIZERS)
def test_zeros_stay_zeros_and_bits_are_those_of_the_format(name: str) -> None:
    rounded = QUANTIZERS[name].round(np.zeros((64, 64), np.float32), 64)
    assert not rounded.values.any()
    per_block = {"nf4-dq": 1 + 4 / 64 + 4 / 64, "int4-asym": 8}.get(name, 4)
    assert math.isclose(8 * rounded.nbytes / 4096, 4 + 8 * per_block / 64)
