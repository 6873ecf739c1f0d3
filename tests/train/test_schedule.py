"""The learning rates at the points that tell the schedules apart, and their bounds everywhere."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nf4.errors import InputError
from nf4.train.schedule import SCHEDULES, learning_rate


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ("constant", [0.0, 0.5, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.0, 0.5, 1.0, 0.75, 0.5, 0.25]),
        ("cosine", [0.0, 0.5, 1.0, (2 + 2**0.5) / 4, 0.5, (2 - 2**0.5) / 4]),
    ],
)
def test_shapes(schedule: str, rates: list[float]) -> None:
    found = [learning_rate(i, steps=6, lr=1.0, schedule=schedule, warmup=2) for i in range(6)]
    assert found == pytest.approx(rates, rel=1e-15)


@given(
    schedule=st.sampled_from(SCHEDULES),
    steps=st.integers(1, 50),
    warmup=st.integers(0, 60),
    step=st.integers(0, 60),
)
def test_rates_stay_between_0_and_lr(schedule: str, steps: int, warmup: int, step: int) -> None:
    assert 0 <= learning_rate(step, steps=steps, lr=0.3, schedule=schedule, warmup=warmup) <= 0.3


def test_unknown() -> None:
    with pytest.raises(InputError, match=r"'step' is not known.*constant, linear, cosine"):
        learning_rate(0, steps=1, lr=1.0, schedule="step")
