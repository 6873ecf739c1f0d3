"""Cutting, masking, holding out and ordering, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nf4.errors import InputError
from nf4.formats.checkpoint import open_checkpoint
from nf4.formats.tokenizer import Tokenizer
from nf4.train.data import IGNORE, Data, evenly, load_data, ordering, windows

END = 256  # the tiny tokenizer's <|end|>


def load(path: Path, tokenizer: Tokenizer, seq_len: int = 64, **settings: Any) -> Data:
    return load_data(path, tokenizer, seq_len, max_positions=128, **settings)


def jsonl(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@given(n=st.integers(0, 60), seq_len=st.integers(1, 20))
def test_windows_predict_every_token_but_the_first_once(n: int, seq_len: int) -> None:
    tokens = np.arange(n, dtype=np.int32)
    examples = windows(tokens, seq_len)
    assert [t for e in examples for t in e.targets] == list(range(1, n))
    assert all((e.targets == e.ids + 1).all() and 0 < len(e) <= seq_len for e in examples)


@settings(deadline=None, max_examples=20)
@given(size=st.integers(40, 400), seq_len=st.integers(1, 64))
def test_the_last_tenth_of_a_text_is_held_out(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer, size: int, seq_len: int
) -> None:
    path = tmp_path_factory.mktemp("t") / "text"
    text = "".join(chr(97 + i * i % 26) for i in range(size))
    path.write_text(text)
    data = load(path, tokenizer, seq_len)

    def back(examples: list[Any]) -> str:
        return tokenizer.decode([examples[0].ids[0], *(t for e in examples for t in e.targets)])

    assert back(data.train) + back(data.heldout) == text
    assert len(back(data.heldout)) == size // 10


def test_prompt_and_completion(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = jsonl(tmp_path / "d.jsonl", *[{"prompt": "ab", "completion": "cd"}] * 2)
    example = load(path, tokenizer).train[0]
    a, b, c, d = tokenizer.encode("abcd")
    assert example.ids.tolist() == [a, b, c, d]
    assert example.targets.tolist() == [IGNORE, c, d, END]
    example = load(path, tokenizer, loss_on="all").train[0]
    assert example.targets.tolist() == [b, c, d, END]


def test_text_records_are_learned_whole(tmp_path: Path, tokenizer: Tokenizer) -> None:
    example = load(jsonl(tmp_path / "d.jsonl", *[{"text": "ab"}] * 2), tokenizer).train[0]
    assert example.targets.tolist() == [*tokenizer.encode("b"), END]


def test_only_the_assistants_turns_are_learned(tmp_path: Path, tokenizer: Tokenizer) -> None:
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yo"},
        {"role": "user", "content": "so"},
        {"role": "assistant", "content": "ok"},
    ]
    example = load(jsonl(tmp_path / "d.jsonl", *[{"messages": messages}] * 2), tokenizer, 128).train[0]
    whole = tokenizer.chat(messages)
    assert [example.ids[0], *example.ids[1:], END] == tokenizer.encode(whole)
    learned = tokenizer.decode([t for t in example.targets if t != IGNORE], skip_special_tokens=False)
    assert learned == "yo<|end|>ok<|end|>"


@pytest.mark.parametrize("loss_on", ["completion", "all"])
def test_a_template_that_rewrites_earlier_turns(
    tmp_path: Path, tiny_model: Callable[..., Path], loss_on: str
) -> None:
    template = "{% for m in messages %}[{{ loop.length }}{{ m.content }}]{% endfor %}"
    tokenizer = open_checkpoint(tiny_model(tmp_path / "m", chat_template=template)).tokenizer()
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path = jsonl(tmp_path / "d.jsonl", *[{"messages": messages}] * 2)
    if loss_on == "all":
        assert len(load(path, tokenizer, loss_on="all").train) == 1
    else:
        with pytest.raises(
            InputError, match=r"d\.jsonl:1: the chat template writes earlier .* --loss-on all"
        ):
            load(path, tokenizer)


def test_long_examples_are_cut_and_those_without_a_target_dropped(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    path = jsonl(
        tmp_path / "d.jsonl",
        *[{"prompt": "a", "completion": "b" * 20}] * 3,
        {"prompt": "a" * 20, "completion": "b"},
        {"prompt": "a", "completion": "b"},
    )
    data = load(path, tokenizer, 8)
    assert (data.truncated, data.dropped, len(data.train) + len(data.heldout)) == (4, 1, 4)
    assert max(map(len, data.train)) == 8


@settings(deadline=None, max_examples=20)
@given(n=st.integers(2, 40), seed=st.integers(0, 1000))
def test_held_out_examples_are_not_trained_on(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer, n: int, seed: int
) -> None:
    path = jsonl(tmp_path_factory.mktemp("d") / "d.jsonl", *[{"text": f"number {i}"} for i in range(n)])
    data = load(path, tokenizer, seed=seed)
    parts = [[tokenizer.decode(e.ids) for e in part] for part in (data.train, data.heldout)]
    assert len(parts[1]) == max(1, n // 10)
    assert sorted(parts[0] + parts[1]) == sorted(f"number {i}" for i in range(n))
    assert data.digest() == load(path, tokenizer, seed=seed).digest()


def test_eval_data_replaces_the_split(tmp_path: Path, text: Path, tokenizer: Tokenizer) -> None:
    other = tmp_path / "other.txt"
    other.write_text("quite another text")
    data = load(text, tokenizer, eval_path=other)
    assert tokenizer.decode(data.heldout[0].ids) == "quite another tex"
    assert sum(map(len, data.train)) == len(text.read_text()) - 1
    same = load(text, tokenizer, eval_path=text)
    assert sum(map(len, same.heldout)) == len(text.read_text()) - 1


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=300),
    batch_size=st.integers(1, 3),
    grouped=st.booleans(),
    seed=st.integers(0, 99),
)
def test_every_epoch_has_every_example_once(
    lengths: list[int], batch_size: int, grouped: bool, seed: int
) -> None:
    n = len(lengths)
    order = ordering(lengths, seed=seed, batch_size=batch_size, group_by_length=grouped)
    epochs = [[order(e * n + i) for i in range(n)] for e in range(3)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    again = ordering(lengths, seed=seed, batch_size=batch_size, group_by_length=grouped)
    assert [again(i) for i in reversed(range(3 * n))] == [
        i for epoch in reversed(epochs) for i in reversed(epoch)
    ]
    if grouped:
        span = 50 * batch_size
        for start in range(0, n, span):
            piece = [lengths[i] for i in epochs[1][start : start + span]]
            assert piece == sorted(piece, reverse=True)


@given(n=st.integers(1, 50), most=st.integers(0, 60))
def test_evenly(n: int, most: int) -> None:
    chosen = evenly(list(range(n)), most)  # type: ignore[arg-type]
    assert chosen == sorted(set(chosen))
    assert len(chosen) == (min(n, most) if most else n)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "the file is empty"),
        ("a.txt", b" \n\n", "the file is empty"),
        ("a.txt", b"fine so far \xff", "byte 0xff at offset 12 is not UTF-8"),
        ("a.json", b'[{"text": "a"}]', "give JSON lines, an object a line"),
        ("a.txt", b"short", "5 tokens are too few"),
        ("a.jsonl", b'{"text": "a"}\n{"text"', r"a\.jsonl:2: not a JSON object: .* at column"),
        ("a.jsonl", b'{"text": "a', r"a\.jsonl:1: .*: Unterminated string starting at column 10"),
        ("a.jsonl", b'["text"]', r"a\.jsonl:1: a JSON list"),
        ("a.jsonl", b'{"txt": "a"}', "needs just one of .* it has 'txt'"),
        ("a.jsonl", b"{}", "it has no keys"),
        ("a.jsonl", b'{"text": "a", "messages": []}', "needs just one of"),
        ("a.jsonl", b'{"text": 3}', "`text` is 3, where a string"),
        ("a.jsonl", b'{"prompt": "a"}', "`completion` is missing, where a string"),
        ("a.jsonl", b'{"messages": "a"}', "`messages` is 'a', where a list"),
        ("a.jsonl", b'{"messages": [{"content": "a"}]}', "a message is .* where `role` and `content`"),
        ("a.jsonl", b'{"text": "one"}', "one example can't be split"),
        ("a.jsonl", b'{"text": ""}\n{"text": ""}', "none of its 2 examples has a token to learn"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "valid Unicode"),
    ],
)
def test_refused(tmp_path: Path, tokenizer: Tokenizer, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        load(tmp_path / name, tokenizer)


def test_refused_before_reading(tmp_path: Path, text: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match=r"absent\.txt: the data can't be read: No such file"):
        load(tmp_path / "absent.txt", tokenizer)
    with pytest.raises(InputError, match="sequences of 129 tokens are longer than the model's 128 positions"):
        load(text, tokenizer, 129)
    with pytest.raises(InputError, match="--loss-on some: it is one of completion, all"):
        load(text, tokenizer, loss_on="some")
