"""Tokenizers of Hugging Face directories: encoding, end ids, chat templates, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nf4.errors import InputError
from nf4.formats.checkpoint import open_checkpoint
from nf4.formats.tokenizer import Tokenizer, load_tokenizer

Build = Callable[..., Path]


@pytest.fixture(scope="module")
def directory(tiny_model: Build, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("tokenizer") / "m")


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text())
def test_any_text_round_trips(directory: Path, text: str) -> None:
    tokenizer = load_tokenizer(directory, {"vocab_size": 257})
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert all(0 <= i < tokenizer.vocab_size for i in ids)


def test_facts(directory: Path) -> None:
    tokenizer = open_checkpoint(directory).tokenizer()
    assert tokenizer.vocab_size == 257
    assert tokenizer.eos_ids == {256}
    assert tokenizer.encode("a<|end|>")[1:] == [256]
    assert tokenizer.decode(tokenizer.encode("a<|end|>b")) == "ab"
    with pytest.raises(InputError, match="Unicode"):
        tokenizer.encode("\ud800")


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | changes))


def test_end_ids_come_from_three_files(tiny_model: Build, tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "m", eos_token_id=[1, 2])
    edit(model / "generation_config.json", eos_token_id=3)
    assert open_checkpoint(model).tokenizer().eos_ids == {1, 2, 3, 256}


def with_template(template: str | None, tmp_path: Path, tiny_model: Build) -> Tokenizer:
    return open_checkpoint(tiny_model(tmp_path / "m", chat_template=template)).tokenizer()


def test_chat(directory: Path) -> None:
    tokenizer = open_checkpoint(directory).tokenizer()
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    assert tokenizer.chat(messages) == "<user>hi<|end|><assistant>yes<|end|>"
    assert tokenizer.chat(messages[:1], add_generation_prompt=True) == "<user>hi<|end|><assistant>"


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{%- for m in messages %}\n  {{- m['content'] }}\n{%- endfor %}", "<b>"),
        ("{% generation %}{{ messages[0].content }}{% endgeneration %}!", "<b>!"),
        ("{{ messages[0] | tojson }}", '{"role": "user", "content": "<b>"}'),
        ("{% for m in messages %}{% if true %}{% break %}{% endif %}x{% endfor %}.", "."),
        ("{{ strftime_now('%%') }}", "%"),
    ],
)
def test_templates_as_transformers_renders_them(
    template: str, text: str, tiny_model: Build, tmp_path: Path
) -> None:
    tokenizer = with_template(template, tmp_path, tiny_model)
    assert tokenizer.chat([{"role": "user", "content": "<b>"}]) == text


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[0].nothing.at.all }}",
        "{% for",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ 1 / 0 }}",
        "{{ messages[0].content + 1 }}",
    ],
)
def test_templates_that_fail_are_refused(template: str, tiny_model: Build, tmp_path: Path) -> None:
    tokenizer = with_template(template, tmp_path, tiny_model)
    with pytest.raises(InputError, match="chat template refuses"):
        tokenizer.chat([{"role": "user", "content": "hi"}])


def test_no_template(tiny_model: Build, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no chat template"):
        with_template(None, tmp_path, tiny_model).chat([{"role": "user", "content": "hi"}])


def test_template_files_and_lists(tiny_model: Build, tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "m")
    edit(
        model / "tokenizer_config.json",
        chat_template=[{"name": "tools", "template": "t"}, {"name": "default", "template": "d"}],
        eos_token={"content": "<|end|>"},
    )
    tokenizer = open_checkpoint(model).tokenizer()
    assert tokenizer.chat([]) == "d"
    assert tokenizer.special["eos_token"] == "<|end|>"
    (model / "chat_template.jinja").write_text("file")
    assert open_checkpoint(model).tokenizer().chat([]) == "file"
    (model / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(InputError, match="UTF-8"):
        open_checkpoint(model).tokenizer()


def test_what_is_refused(tiny_model: Build, tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "m")
    with pytest.raises(InputError, match=r"ids up to 256, but the model's vocabulary is 256"):
        load_tokenizer(model, {"vocab_size": 256})
    with pytest.raises(InputError, match="vocab_size None"):
        load_tokenizer(model, {})
    (model / "tokenizer.json").write_text('{"model": 1}')
    with pytest.raises(InputError, match="can't read it"):
        open_checkpoint(model).tokenizer()
    (model / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"tokenizer\.json is missing"):
        open_checkpoint(model).tokenizer()


def test_save_and_load(directory: Path, tmp_path: Path) -> None:
    tokenizer = open_checkpoint(directory).tokenizer()
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path, {"vocab_size": 257, "eos_token_id": 256})
    assert again.encode("été<|end|>") == tokenizer.encode("été<|end|>")
    assert (again.eos_ids, again.special, again.chat_template) == (
        tokenizer.eos_ids,
        tokenizer.special,
        tokenizer.chat_template,
    )
