"""The distribution of normal weights over their absmax: against samples, and against itself."""

import numpy as np
import pytest
from nf4.codebooks import CODEBOOKS
from nf4.evidence.grids import bof4
from nf4.evidence.normal import ScaledNormal
from nf4.evidence.weights import masses, normal_data

BLOCKS = 1 << 14
NF4 = CODEBOOKS["nf4"]


def scaled_sample(block_size: int, signed: bool) -> tuple[np.ndarray, np.ndarray]:
    """Scaled weights [blocks, block_size] in float64 and the absmax of each block [blocks, 1]."""
    w = np.random.default_rng(7).standard_normal((BLOCKS, block_size))
    at = np.abs(w).argmax(1)[:, None]
    largest = np.take_along_axis(w, at, 1)
    return w / (largest if signed else np.abs(largest)), np.abs(largest)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("block_size", [32, 256])
def test_masses_and_errors_are_those_of_a_sample(block_size: int, signed: bool) -> None:
    scaled = ScaledNormal(block_size, signed)
    x, absmax = scaled_sample(block_size, signed)
    counts = np.bincount(np.searchsorted(NF4.thresholds, x.reshape(-1)), minlength=16) / x.size
    assert np.abs(scaled.masses(NF4.thresholds) - counts).max() < 1e-3
    values = (bof4(block_size, signed=True) if signed else NF4).values.astype(np.float64)
    nearest = values[np.searchsorted((values[1:] + values[:-1]) / 2, x)]
    error, weight = np.abs(x - nearest) * absmax, np.abs(x) * absmax
    rms = np.sqrt(np.mean(error**2) / np.mean(weight**2))
    assert scaled.errors(values) == pytest.approx((rms, error.sum() / weight.sum()), rel=3e-3)


def test_masses_sum_to_one_and_the_density_to_what_is_not_an_absmax() -> None:
    for signed in (False, True):
        scaled = ScaledNormal(64, signed)
        assert scaled.masses(NF4.thresholds).sum() == pytest.approx(1, abs=1e-9)
        x = np.linspace(-1, 1, 1001)
        assert np.trapezoid(scaled.density(x), x) == pytest.approx(63 / 64, abs=1e-5)


def test_partial_moments_are_the_integrals_of_the_density() -> None:
    scaled = ScaledNormal(128)
    x = np.linspace(-1, 0.3, 4001)
    density = scaled.density(x) / scaled.rest
    for order in (0, 1, 2):
        assert scaled.partial(0.3, order, 0) == pytest.approx(np.trapezoid(density * x**order, x), abs=1e-6)


def test_no_bin_of_nf4_holds_a_sixteenth_of_blockwise_data() -> None:
    shares = ScaledNormal(64).masses(NF4.thresholds)
    assert shares.min() < 0.018
    assert shares.max() > 0.092
    assert masses([normal_data(3, 1 << 18)], NF4, 64) == pytest.approx(shares, abs=2e-3)
