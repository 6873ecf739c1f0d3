"""Cosines and sines: the oracle's bits for every rope type, position and base; near the real numbers."""

import json
from typing import Any

import numpy as np
import oracle_step
import pytest
from drawn import SIZES
from hypothesis import given, settings
from hypothesis import strategies as st
from nf4.conform.search import INPUTS
from nf4.errors import InputError
from nf4.exact.tables import rotation
from nf4.model.config import LlamaConfig
from oracle import rounded
from oracle_reals import cosine_and_sine, nearest

few = settings(deadline=None, max_examples=60)


def config(rope: dict[str, Any], head_dim: int = 6, positions: int = 64) -> LlamaConfig:
    sizes = {**SIZES, "head_dim": head_dim, "max_position_embeddings": positions}
    return LlamaConfig.from_dict({"model_type": "llama", **sizes, **rope}, "rope")


@few
@given(INPUTS["rotation_table"], st.integers(1, 9))
def test_whole_tables_are_the_oracles(fields: dict[str, Any], other: int) -> None:
    """Of packed sequences, each from position 0."""
    rope, dim, positions = json.loads(fields["rope"]), fields["head_dim"], fields["max_positions"]
    lengths = (fields["length"], other)
    try:
        tables = [oracle_step.table(rope, dim, positions, n) for n in lengths]
    except oracle_step.RefusedError:
        with pytest.raises(InputError):
            rotation(config(rope, dim, positions), lengths)
        return
    found = rotation(config(rope, dim, positions), lengths)
    for mine, side in zip(found, range(2), strict=True):
        true = [row for table in tables for row in table[side]]
        assert mine.view(np.uint32).tolist() == true


@few
@given(
    st.floats(1, 1e8) | st.sampled_from([1e4, 5e5, 1e6]),
    st.sampled_from([2, 4, 64, 128]),
    st.integers(1, 300_000),
    st.data(),
)
def test_any_position_is_the_oracles(theta: float, dim: int, position: int, data: st.DataObject) -> None:
    pair = data.draw(st.integers(0, dim // 2 - 1))
    cos, sin = rotation(config({"rope_theta": theta}, dim), (position + 1,))
    plain, _ = oracle_step.angles({"rope_theta": theta}, dim, 64, position + 1)
    true = cosine_and_sine(position * plain[pair])
    found = [int(table[position, pair].view(np.uint32)) for table in (cos, sin)]
    assert found == [nearest(x, rounded) for x in true]


def test_a_long_table_is_near_float64() -> None:
    """Every entry, within half a unit in the last place and what float64 is off by."""
    n, theta = 20_000, 5e5
    angle = np.arange(n)[:, None] * theta ** (-2 * np.arange(32) / 64)
    for mine, true in zip(
        rotation(config({"rope_theta": theta}, 64), (n,)), (np.cos(angle), np.sin(angle)), strict=True
    ):
        assert (np.abs(mine - true) <= np.spacing(np.abs(mine)) / 2 + angle * 2.0**-51).all()


def test_a_table_is_the_beginning_of_a_longer_one() -> None:
    short, long = (rotation(config({}), (n,)) for n in (37, 500))
    assert all((a == b[:37]).all() for a, b in zip(short, long, strict=True))
    packed = rotation(config({}), (37, 1, 500))
    assert (packed[0][38:] == long[0]).all()
    assert (packed[1][37] == 0).all()


@few
@given(st.floats(1e-310, 1e-25), st.integers(1, 40), st.integers(1, 3))
def test_a_small_factor_keeps_signs(m: float, length: int, half: int) -> None:
    """Entries are subnormal, or zeros of the sign of the real number: +0 for the sine of 0."""
    rope = {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "attention_factor": m}}
    found = rotation(config(rope, 2 * half), (length,))
    for mine, true in zip(found, oracle_step.table(rope, 2 * half, 64, length), strict=True):
        assert mine.view(np.uint32).tolist() == true


@pytest.mark.parametrize("factor", [1e300, 1.7e308, 1e16 + 2, 5e-324])
def test_dynamic_leaves_theta_within_the_length_of_the_model(factor: float) -> None:
    rope = {"rope_scaling": {"rope_type": "dynamic", "factor": factor}}
    for mine, plain in zip(rotation(config(rope), (64,)), rotation(config({}), (64,)), strict=True):
        assert (mine.view(np.uint32) == plain.view(np.uint32)).all()


def test_the_first_position_has_a_sine_of_plus_zero() -> None:
    _, sin = rotation(config({"rope_theta": 3.0}), (1,))
    assert not sin.view(np.uint32).any()


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"rope_theta": 1.0, "rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "divide by 0"),
        (
            {
                "rope_scaling": {
                    "rope_type": "longrope",
                    "factor": 2.0,
                    "original_max_position_embeddings": 1,
                    "short_factor": [1, 1, 1],
                    "long_factor": [1, 1, 1],
                }
            },
            "divide by 0",
        ),
        ({"rope_scaling": {"rope_type": "linear", "factor": 1e-6}}, "by more than 65536"),
        ({"rope_theta": 1e-200}, "by more than 65536"),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "attention_factor": 1e9}},
            "by more than 65536",
        ),
    ],
)
def test_what_gives_no_rotation_is_refused(rope: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=rf"{message} \(NF4-15.3\)"):
        rotation(config(rope), (3,))
