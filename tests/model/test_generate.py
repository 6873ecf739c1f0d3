"""Generation: greedy and sampled tokens, stops, seeds, refusals."""

import numpy as np
import pytest
from central import tiny_config, tiny_model
from nf4.errors import InputError
from nf4.model.generate import generate, sample

MODEL = tiny_model(tiny_config("qwen3"))


def test_greedy_takes_the_likeliest_token_each_time() -> None:
    ids = [3, 1, 4]
    for token in generate(MODEL, [3, 1, 4], 8):
        assert token == np.argmax(MODEL.logits(np.array(ids))[-1])
        ids.append(token)
    assert len(ids) == 11


def test_a_seed_gives_its_text_again() -> None:
    runs = [list(generate(MODEL, [2], 12, temperature=1.5, seed=s)) for s in (5, 5, 6)]
    assert runs[0] == runs[1] != runs[2]


def test_a_stop_id_ends_it() -> None:
    tokens = list(generate(MODEL, [2], 12, temperature=1.5, seed=5))
    stop = tokens[4]
    assert (
        list(generate(MODEL, [2], 12, temperature=1.5, seed=5, stop_ids={stop}))
        == tokens[: tokens.index(stop)]
    )


def test_sampling_follows_the_distribution() -> None:
    logits = np.log([0.1, 0.5, 0.15, 0.25])
    draws = (np.arange(1000) + 0.5) / 1000

    def counts(temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> list[int]:
        tokens = [sample(logits, temperature, top_k, top_p, draw) for draw in draws]
        return np.bincount(tokens, minlength=4).tolist()

    assert counts() == [100, 500, 150, 250]
    assert counts(top_k=1) == [0, 1000, 0, 0]
    assert counts(top_k=2) == pytest.approx([0, 667, 0, 333], abs=1)
    assert counts(top_p=0.7) == pytest.approx([0, 667, 0, 333], abs=1)
    assert counts(top_p=1e-9) == [0, 1000, 0, 0]
    assert counts(temperature=0.01) == [0, 1000, 0, 0]


@pytest.mark.parametrize(
    ("ids", "options", "message"),
    [
        ([], {}, "prompt"),
        ([1], {"temperature": -1.0}, "temperature"),
        ([1], {"temperature": float("nan")}, "temperature"),
        ([1], {"top_k": -1}, "top_k"),
        ([1], {"top_p": 0.0}, "top_p"),
        ([99], {}, "token id 99"),
    ],
)
def test_bad_options_are_refused(ids: list[int], options: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        list(generate(MODEL, ids, 1, **options))  # type: ignore[arg-type]
