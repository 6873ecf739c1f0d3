"""GGUF files: config, names, row order and tokenizer recovered; broken ones refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nf4.errors import InputError
from nf4.formats.bitsandbytes import write_dequantized, write_quantized
from nf4.formats.checkpoint import QuantizeOptions, load_model, open_checkpoint
from nf4.formats.gguf import GgufCheckpoint
from nf4.formats.tokenizer import tokenizer_from_gguf
from tokenizers import pre_tokenizers

HIDDEN, INNER, HEADS, KV, DIM, VOCAB = 64, 96, 4, 2, 16, 300
LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
TOKENS = [*LETTERS, "<|end|>", "th", "the", "Ġthe", *(f"[PAD{i}]" for i in range(VOCAB - 260))]
MERGES = ["t h", "th e", "Ġ the"]


def interleave(weight: Any, heads: int) -> Any:
    """What llama.cpp's converter does to the rows of q and k."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def make(
    path: Path,
    arch: str = "llama",
    kind: Kind = Kind.F32,
    head: bool = False,
    freqs: Any = None,
    leave_out: str = "",
    **metadata: Any,
) -> dict[str, Any]:
    """Write a tiny GGUF of one layer; return its tensors under Hugging Face names, as they should be read."""
    writer = gguf.GGUFWriter(path, arch)
    values: dict[str, Any] = {
        "block_count": 1,
        "context_length": 128,
        "embedding_length": HIDDEN,
        "feed_forward_length": INNER,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 500000.0,
    } | metadata
    for key, value in values.items():
        if isinstance(value, int):
            writer.add_uint32(f"{arch}.{key}", value)
        elif isinstance(value, float):
            writer.add_float32(f"{arch}.{key}", value)
        else:
            writer.add_string(f"{arch}.{key}", value)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([1] * 256 + [3] + [1] * 3 + [5] * (VOCAB - 260))
    writer.add_token_merges(MERGES)
    writer.add_eos_token_id(256)
    writer.add_chat_template("{{ messages[0].content }}{{ eos_token }}")
    generator = np.random.default_rng(0)
    layer = "model.layers.0."
    shapes = {
        ("token_embd", "model.embed_tokens"): (VOCAB, HIDDEN),
        ("output_norm", "model.norm"): (HIDDEN,),
        ("blk.0.attn_norm", layer + "input_layernorm"): (HIDDEN,),
        ("blk.0.ffn_norm", layer + "post_attention_layernorm"): (HIDDEN,),
        ("blk.0.attn_q", layer + "self_attn.q_proj"): (HEADS * DIM, HIDDEN),
        ("blk.0.attn_k", layer + "self_attn.k_proj"): (KV * DIM, HIDDEN),
        ("blk.0.attn_v", layer + "self_attn.v_proj"): (KV * DIM, HIDDEN),
        ("blk.0.attn_output", layer + "self_attn.o_proj"): (HIDDEN, HEADS * DIM),
        ("blk.0.ffn_gate", layer + "mlp.gate_proj"): (INNER, HIDDEN),
        ("blk.0.ffn_up", layer + "mlp.up_proj"): (INNER, HIDDEN),
        ("blk.0.ffn_down", layer + "mlp.down_proj"): (HIDDEN, INNER),
    }
    if head:
        shapes["output", "lm_head"] = (VOCAB, HIDDEN)
    wanted = {}
    for (theirs, ours), shape in shapes.items():
        value = generator.standard_normal(shape).astype(np.float32)
        stored = value
        if arch == "llama" and theirs in ("blk.0.attn_q", "blk.0.attn_k"):
            stored = interleave(value, HEADS if theirs == "blk.0.attn_q" else KV)
        quantized = kind if len(shape) == 2 else Kind.F32
        raw = gguf.quants.quantize(stored, quantized)
        if theirs != leave_out:
            writer.add_tensor(f"{theirs}.weight", raw, raw_dtype=quantized)
        # A row is quantized by itself, so that the order of rows doesn't change its values.
        wanted[f"{ours}.weight"] = gguf.quants.dequantize(gguf.quants.quantize(value, quantized), quantized)
    if freqs is not None:
        writer.add_tensor("rope_freqs.weight", np.asarray(freqs, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return wanted


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
@pytest.mark.parametrize(
    "kind", [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1], ids=lambda k: k.name
)
def test_tensors(arch: str, kind: Kind, tmp_path: Path) -> None:
    # 96 and 64 columns: multiples of every block here
    wanted = make(tmp_path / "m.gguf", arch, kind, head=True)
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    assert checkpoint.names() == sorted(wanted)
    for name, value in wanted.items():
        read = checkpoint.read(name)
        assert read.dtype == checkpoint.value_dtype(name)
        assert read.shape == checkpoint.shape(name) == value.shape
        np.testing.assert_array_equal(np.asarray(read).astype(np.float32), value)
    assert checkpoint.dtype("lm_head.weight") == kind.name


def test_config(tmp_path: Path) -> None:
    make(tmp_path / "m.gguf")
    config = open_checkpoint(tmp_path / "m.gguf").config
    assert config["model_type"] == "llama"
    assert config["tie_word_embeddings"] is True
    assert config["vocab_size"] == VOCAB
    assert config["head_dim"] == DIM
    assert config["rms_norm_eps"] == 1e-5
    assert config["rope_theta"] == 500000.0
    assert "rope_scaling" not in config
    make(tmp_path / "m.gguf", head=True, **{"rope.scaling.type": "linear", "rope.scaling.factor": 4.0})
    config = open_checkpoint(tmp_path / "m.gguf").config
    assert config["tie_word_embeddings"] is False
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}


def llama3_factors(factor: float) -> list[float]:
    """As llama.cpp's converter computes them."""
    factors = []
    for i in range(0, DIM, 2):
        wave = 2 * np.pi * 500000.0 ** (i / DIM)
        if wave < 8192 / 4:
            factors.append(1.0)
        elif wave > 8192:
            factors.append(factor)
        else:
            smooth = (8192 / wave - 1) / 3
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return factors


def test_llama3_scaling_is_recovered(tmp_path: Path) -> None:
    make(tmp_path / "m.gguf", freqs=llama3_factors(32.0))
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    assert checkpoint.config["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    assert not any("rope" in name for name in checkpoint.names())
    make(tmp_path / "m.gguf", freqs=np.linspace(1, 8, DIM // 2))
    with pytest.raises(InputError, match="rope_freqs"):
        open_checkpoint(tmp_path / "m.gguf")


def test_tokenizer(tmp_path: Path) -> None:
    make(tmp_path / "m.gguf")
    tokenizer = open_checkpoint(tmp_path / "m.gguf").tokenizer()
    ids = tokenizer.encode("the the<|end|>é12")
    assert ids[:3] == [TOKENS.index("the"), TOKENS.index("Ġthe"), 256]
    assert tokenizer.decode(ids) == "the theé12"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "the the<|end|>é12"
    assert tokenizer.eos_ids == {256}
    assert tokenizer.chat([{"role": "user", "content": "hi"}]) == "hi<|end|>"


def test_to_a_directory(tmp_path: Path) -> None:
    make(tmp_path / "m.gguf", kind=Kind.Q8_0)
    source = open_checkpoint(tmp_path / "m.gguf")
    write_quantized(source, tmp_path / "q", QuantizeOptions())
    write_dequantized(source, tmp_path / "d", None)
    four, plain = open_checkpoint(tmp_path / "q"), open_checkpoint(tmp_path / "d")
    assert four.names() == plain.names() == source.names()
    for name in source.names():
        np.testing.assert_array_equal(plain.read(name), source.read(name))
    text = "the cat, the 42"
    assert four.tokenizer().encode(text) == source.tokenizer().encode(text)
    assert four.tokenizer().chat_template == source.tokenizer().chat_template
    assert (
        load_model(tmp_path / "q", quantize=None).config
        == load_model(tmp_path / "m.gguf", quantize=None).config
    )


BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "architecture": (lambda p: make(p, arch="gemma"), "architecture 'gemma'"),
    "no embedding": (lambda p: make(p, leave_out="token_embd"), "token_embd.weight"),
    "rope scaling": (lambda p: make(p, **{"rope.scaling.type": "longrope"}), "longrope"),
    "partial rope": (lambda p: make(p, **{"rope.dimension_count": 4}), "part of each head"),
    "no number": (lambda p: make(p, block_count="many"), "block_count"),
}


@pytest.mark.parametrize("name", BAD)
def test_models_that_cant_be_run_are_refused(name: str, tmp_path: Path) -> None:
    damage, message = BAD[name]
    damage(tmp_path / "m.gguf")
    with pytest.raises(InputError) as error:
        open_checkpoint(tmp_path / "m.gguf")
    assert message in str(error.value)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    make(path)
    return path


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_mutated_file_is_refused_or_read(tmp_path: Path, whole: Path, data: st.DataObject) -> None:
    content = bytearray(whole.read_bytes())
    table = content.index(b"token_embd.weight") - 8
    for _ in range(data.draw(st.integers(0, 3))):
        # Half of the edits in the first bytes or the tensor table, where the counts and offsets are.
        low = data.draw(st.sampled_from([0, table]))
        at = data.draw(st.integers(low, low + 700))
        new = data.draw(st.binary(min_size=1, max_size=8))
        content[at : at + len(new)] = new
    path = tmp_path / "mutated.gguf"
    path.write_bytes(content[: data.draw(st.integers(0, len(content)) | st.just(len(content)))])
    message = str(path)
    try:
        checkpoint = GgufCheckpoint(path)
        for name in checkpoint.names():
            assert checkpoint.read(name).shape == checkpoint.shape(name)
    except InputError as error:
        message = str(error)
    assert str(path) in message


PIECES = [
    "<unk>",
    "<s>",
    "</s>",
    *(f"<0x{i:02X}>" for i in range(256)),
    "▁",
    "t",
    "h",
    "e",
    "th",
    "▁the",
    "he",
    "▁t",
]


def sentencepiece(**changes: Any) -> dict[str, Any]:
    rank = {"th": -1.0, "he": -2.0, "▁t": -3.0, "▁the": -4.0}
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": PIECES,
        "tokenizer.ggml.scores": [rank.get(piece, -10.0 if len(piece) == 1 else 0.0) for piece in PIECES],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * 8,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    } | changes


def test_sentencepiece() -> None:
    tokenizer = tokenizer_from_gguf(sentencepiece(), len(PIECES), "m.gguf")
    # ▁ t h e: "th" joins first (the best score); "▁the" isn't reached, for "▁th" and "the" are no tokens.
    pieces = [PIECES[i] for i in tokenizer.encode("the x")]
    assert pieces == ["<s>", "▁", "th", "e", "▁", "<0x78>"]
    for text in ("the thé\n x", "  two", "日本"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer.ggml.model": "bert"}, "'bert' isn't supported"),
        ({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "tekken"}, "'tekken'"),
        ({"tokenizer.ggml.tokens": []}, "no tokenizer"),
        ({"tokenizer.ggml.tokens": [1, 2]}, "no tokenizer"),
        ({"tokenizer.ggml.scores": ["a"] * len(PIECES)}, "can't read it"),
        ({"tokenizer.ggml.scores": [1.0]}, "a score for each"),
        ({"tokenizer.ggml.token_type": [1]}, "token types"),
    ],
)
def test_unknown_tokenizers_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        tokenizer_from_gguf(sentencepiece(**changes), len(PIECES), "m.gguf")


def test_too_many_tokens_are_refused() -> None:
    with pytest.raises(InputError, match="don't belong together"):
        tokenizer_from_gguf(sentencepiece(), len(PIECES) - 1, "m.gguf")
