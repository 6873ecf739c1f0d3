"""Chapter 2: the tables of the specification are those of the code, and what follows from them."""

from fractions import Fraction
from itertools import pairwise

import numpy as np
import oracle
import pytest
from bits import bits_of, spec_block, spec_clause
from nf4.codebooks import CODEBOOKS, Codebook, derive_nf4, get_codebook
from nf4.errors import InputError

NAMES = ("nf4", "fp4", "fp4-e2m1", "int4")


def test_tables_are_those_of_the_specification() -> None:
    rows = [line.strip("| ").split(" | ") for line in spec_clause("2.1").splitlines() if line.startswith("|")]
    assert tuple(rows[0]) == ("code", *NAMES)
    assert [int(row[0]) for row in rows[2:]] == list(range(16))
    assert tuple(CODEBOOKS) == NAMES
    for column, name in enumerate(NAMES, 1):
        assert bits_of(CODEBOOKS[name].values) == [int(row[column], 16) for row in rows[2:]]


@pytest.mark.parametrize(
    ("name", "exact"),
    [
        ("fp4", [Fraction(v, 192) for v in (0, 1, 128, 192, 64, 96, 32, 48)]),
        ("fp4-e2m1", [Fraction(v, 12) for v in (0, 1, 2, 3, 4, 6, 8, 12)]),
    ],
)
def test_fp4_values_are_the_rounded_fractions(name: str, exact: list[Fraction]) -> None:
    bits = bits_of(CODEBOOKS[name].values)
    assert bits[:8] == [oracle.rounded(v) for v in exact]
    assert bits[9:] == [b | 0x80000000 for b in bits[1:8]]
    assert bits[8] == (0 if name == "fp4" else 0x80000000)


def test_int4_values_are_the_rounded_sevenths() -> None:
    assert bits_of(CODEBOOKS["int4"].values) == [oracle.rounded(Fraction(min(k, 7), 7)) for k in range(-7, 9)]


@pytest.mark.parametrize("name", NAMES)
def test_thresholds_and_order_are_those_of_the_oracle(name: str) -> None:
    book = CODEBOOKS[name]
    thresholds, codes = oracle.ranks_of(bits_of(book.values))
    assert bits_of(book.thresholds) == thresholds
    assert book.codes.tolist() == codes
    assert {"fp4": 8, "fp4-e2m1": 8, "int4": 15, "nf4": None}[name] not in codes
    assert book.zero_code == (7 if name in {"nf4", "int4"} else 0)


def test_nf4_thresholds_are_those_of_the_specification() -> None:
    assert bits_of(CODEBOOKS["nf4"].thresholds) == spec_block("2.3")


def test_nine_nf4_thresholds_are_not_midpoints() -> None:
    book = CODEBOOKS["nf4"]
    exact = [oracle.value(b) for b in bits_of(book.values)]
    middle = [(a + b) / 2 for a, b in pairwise(exact)]
    assert sum(m != oracle.value(t) for m, t in zip(middle, bits_of(book.thresholds), strict=True)) == 9


def test_derivation_gives_the_table_to_the_bit() -> None:
    assert bits_of(derive_nf4()) == bits_of(CODEBOOKS["nf4"].values)


def test_derivation_in_exact_probabilities_is_within_8_ulp() -> None:
    from scipy.special import ndtri

    positive, negative = (ndtri(np.linspace(0.9677083, 0.5, n)[:-1]) for n in (9, 8))
    values = np.sort(np.concatenate([positive, [0], -negative])) / positive[0]
    table = CODEBOOKS["nf4"].values
    error = np.abs(values - table) / np.spacing(np.abs(table)).astype(np.float64)
    assert 1 < error[table != 0].max() <= 8.5  # NF4-2.4 states it as 8 ulp between float32 values
    assert np.abs(values.astype(np.float32).view(np.int32) - table.view(np.int32))[table != 0].max() <= 8


def test_a_codebook_needs_sixteen_finite_values() -> None:
    good = CODEBOOKS["nf4"].values
    with pytest.raises(InputError, match=r"float64 \[16\].*must be float32 \[16\]"):
        Codebook("mine", good.astype(np.float64))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="must be finite"):
        Codebook("mine", np.where(good == 1, np.float32("nan"), good))
    with pytest.raises(InputError, match="not all equal"):
        Codebook("mine", np.zeros(16, np.float32))


def test_codebooks_are_equal_by_name_and_bits() -> None:
    book = CODEBOOKS["nf4"]
    assert book == Codebook("nf4", book.values.copy())
    assert hash(book) == hash(Codebook("nf4", book.values.copy()))
    assert book != Codebook("mine", book.values)
    assert CODEBOOKS["fp4"] != Codebook(
        "fp4", np.where(np.arange(16) == 8, np.float32(-0.0), CODEBOOKS["fp4"].values)
    )
    assert book != "nf4"
    assert get_codebook(book) is book


def test_an_unknown_codebook_is_refused_with_the_choices() -> None:
    with pytest.raises(
        InputError, match="there is no codebook 'nf5'; choose one of nf4, fp4, fp4-e2m1, int4"
    ):
        get_codebook("nf5")
