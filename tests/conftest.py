"""Fixtures every room shares: a tiny random model directory to run real commands on."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from launchers import Mpi, found
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def write_tokenizer(directory: Path, chat_template: str | None = CHAT_TEMPLATE) -> None:
    """Write a byte-level tokenizer of 256 bytes and <|end|> (id 256) into directory."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True)])
    tokenizer.save(str(directory / "tokenizer.json"))
    settings: dict[str, Any] = {"eos_token": "<|end|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    if chat_template is not None:
        settings["chat_template"] = chat_template
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


def llama_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the name and shape of every parameter of a plain Llama checkpoint."""
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    q = config["num_attention_heads"] * config["head_dim"]
    kv = config["num_key_value_heads"] * config["head_dim"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for i in range(config["num_hidden_layers"]):
        shapes |= {
            f"model.layers.{i}.{name}.weight": shape
            for name, shape in {
                "input_layernorm": (hidden,),
                "self_attn.q_proj": (q, hidden),
                "self_attn.k_proj": (kv, hidden),
                "self_attn.v_proj": (kv, hidden),
                "self_attn.o_proj": (hidden, q),
                "post_attention_layernorm": (hidden,),
                "mlp.gate_proj": (inner, hidden),
                "mlp.up_proj": (inner, hidden),
                "mlp.down_proj": (hidden, inner),
            }.items()
        }
    shapes["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, hidden)
    return shapes


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., Path]:
    """Return build(directory, seed=0, dtype=float32, chat_template=..., **config) -> directory.

    It writes a random Llama of two layers x 32 with the byte-level tokenizer, as Hugging Face lays it out.
    """

    def build(
        directory: Path,
        seed: int = 0,
        dtype: Any = np.float32,
        chat_template: str | None = CHAT_TEMPLATE,
        **changes: Any,
    ) -> Path:
        directory.mkdir(parents=True)
        config: dict[str, Any] = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": 257,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "max_position_embeddings": 128,
            "tie_word_embeddings": True,
            "attention_bias": False,
            "mlp_bias": False,
            "bos_token_id": None,
            "eos_token_id": 256,
            "torch_dtype": np.dtype(dtype).name,
        } | changes
        generator = np.random.default_rng(seed)
        tensors = {
            name: np.ones(shape, dtype)
            if len(shape) == 1
            else (0.1 * generator.standard_normal(shape)).astype(dtype)
            for name, shape in llama_shapes(config).items()
        }
        (directory / "config.json").write_text(json.dumps(config))
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        write_tokenizer(directory, chat_template)
        return directory

    return build


def _mpi(flavor: str) -> Mpi:
    pytest.importorskip("mpi4py", reason="mpi4py is not installed; tests/run installs it")
    mpi = found().get(flavor)
    if mpi is None:
        pytest.skip(f"there is no mpirun of {flavor}; tests/run installs one")
    return mpi


@pytest.fixture(scope="session")
def openmpi() -> Mpi:
    """Open MPI's mpirun."""
    return _mpi("Open MPI")


@pytest.fixture(scope="session")
def mpich() -> Mpi:
    """MPICH's mpirun."""
    return _mpi("MPICH")


@pytest.fixture(scope="session", params=["Open MPI", "MPICH"])
def mpi(request: pytest.FixtureRequest) -> Mpi:
    """Each of the two."""
    return _mpi(request.param)
