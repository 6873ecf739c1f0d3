"""What comes with the package: the model gives the loss of its training, and the texts are what they say."""

import hashlib

import numpy as np
from nf4 import bundled
from nf4.bundled.text import ascii_text, split
from nf4.formats.checkpoint import load_model, open_checkpoint
from nf4.train.data import load_data
from nf4.train.step import evaluate


def test_the_model_is_small_and_in_full_precision() -> None:
    source = open_checkpoint(bundled.MODEL)
    assert sum(path.stat().st_size for path in bundled.MODEL.iterdir()) <= 5_000_000
    assert {source.value_dtype(name) for name in source.names()} == {np.dtype(np.float32)}


def test_heldout_loss_is_that_of_its_training() -> None:
    """At all of its positions: with more than it was trained on, every evaluation would measure those too."""
    model = load_model(bundled.MODEL, quantize=None)
    tokenizer = open_checkpoint(bundled.MODEL).tokenizer()
    length = model.config.max_position_embeddings
    examples = load_data(
        bundled.HELDOUT_TEXT, tokenizer, length, max_positions=length, eval_path=bundled.HELDOUT_TEXT
    ).heldout
    evenly = examples[:: len(examples) // 64][:64]
    assert abs(evaluate(model, evenly, batch_size=32, threads=1) - 1.397) < 0.02


def test_token_i_is_byte_i() -> None:
    tokenizer = open_checkpoint(bundled.MODEL).tokenizer()
    text = "".join(map(chr, range(0x80))) + "é日🙂"
    assert tokenizer.encode(text) == list(text.encode())
    assert tokenizer.decode(list(text.encode())) == text


def test_genesis() -> None:
    lines = bundled.FINETUNE_TEXT.read_text("ascii").split("\n")
    assert sum(map(bool, lines)) == 1533  # verses
    assert sum(not line for line in lines) == 50  # 49 between the chapters, and the end


def test_heldout_text_is_cut_from_the_middle_at_line_ends() -> None:
    body = "".join(f"   paragraph {i} of ‘many’,\n   on two lines\n\n" for i in range(9000))
    train, heldout = split(f"   1. Hacker Slang and Hacker Culture\n\n{body}   ┌──┐\n   │ table │\n")
    assert "table" not in train
    assert 65_536 <= len(heldout) < 65_700
    lines = heldout.splitlines()
    assert lines[0] == f"paragraph {lines[0].split()[1]} of 'many', on two lines"
    assert not set(lines) & set(train.splitlines())
    assert len(train.splitlines()) + len(lines) == 9001


def test_ascii_text() -> None:
    assert ascii_text("“naïve” — ‘x’ → y…⊕") == "\"naive\" -- 'x' -> y..."


def test_the_texts_are_the_ones_measured() -> None:
    digest = hashlib.sha256(
        bundled.HELDOUT_TEXT.read_bytes() + bundled.FINETUNE_TEXT.read_bytes()
    ).hexdigest()
    assert digest == "293e51d8e5885ed5ac014cad088cdc441c916433c1580518905bdd0f3c20f724"
