"""What config.json may say, and what is refused."""

from typing import Any

import pytest
from central import tiny_config
from nf4.errors import InputError
from nf4.model.config import RopeConfig


def test_families() -> None:
    llama, mistral, qwen2, qwen3 = (tiny_config(kind) for kind in ("llama", "mistral", "qwen2", "qwen3"))
    assert [c.qkv_bias for c in (llama, mistral, qwen2, qwen3)] == [False, False, True, False]
    assert [c.qk_norm for c in (llama, mistral, qwen2, qwen3)] == [False, False, False, True]
    assert llama.sliding_window == qwen2.sliding_window == (None, None)
    assert mistral.sliding_window == (4096, 4096)
    assert tiny_config("mistral", sliding_window=None).sliding_window == (None, None)
    assert tiny_config(head_dim=None).head_dim == 4
    assert tiny_config("qwen3", head_dim=None).head_dim == 128


def test_windows_by_layer() -> None:
    on = {"use_sliding_window": True, "sliding_window": 7}
    assert tiny_config("qwen2", **on, max_window_layers=1).sliding_window == (None, 7)
    types = ["sliding_attention", "full_attention"]
    assert tiny_config("qwen3", **on, layer_types=types).sliding_window == (7, None)
    assert tiny_config("qwen2", **on, max_window_layers=None).sliding_window == (None, None)


def test_null_is_as_good_as_nothing() -> None:
    null: dict[str, Any] = dict.fromkeys(
        ("rms_norm_eps", "rope_theta", "tie_word_embeddings", "attention_bias", "max_position_embeddings")
    )
    given = {"num_key_value_heads": 1, "max_position_embeddings": 2048}
    assert tiny_config(**given | null) == tiny_config(**given)
    scaling = {"rope_type": None, "type": "yarn", "factor": 2.0, "truncate": None, "beta_fast": None}
    assert tiny_config(rope_scaling=scaling) == tiny_config(rope_scaling={"type": "yarn", "factor": 2.0})
    scaling = {"rope_theta": None, "partial_rotary_factor": None, "rope_type": "linear", "factor": 3}
    outside = {"rope_theta": 5e5, "partial_rotary_factor": 1.0}
    assert tiny_config(**outside, rope_parameters=scaling).rope == RopeConfig(5e5, "linear", factor=3.0)
    assert tiny_config(rope_parameters={}, rope_scaling=scaling).rope == RopeConfig(1e4, "linear", factor=3.0)


def test_rope_old_and_new() -> None:
    new = tiny_config(rope_parameters={"rope_theta": 5e5, "rope_type": "linear", "factor": 4})
    old = tiny_config(rope_theta=5e5, rope_scaling={"type": "linear", "factor": 4.0})
    assert new.rope == old.rope == RopeConfig(5e5, "linear", factor=4.0)
    assert tiny_config(rope_theta=1e5, rope_scaling=None).rope == RopeConfig(1e5)
    assert tiny_config().rope == RopeConfig(1e4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "config.json: model_type 'gpt2'"),
        ({"model_type": None}, "model_type None"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": -8}, "hidden_size is -8"),
        ({"vocab_size": 2**40}, "vocab_size"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        ({"head_dim": 2, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "head_dim above 2"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"num_attention_heads": 3, "num_key_value_heads": 2}, "not a multiple"),
        ({"head_dim": 5}, "head_dim 5 is odd"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'"),
        ({"rope_theta": 0}, "rope_theta is 0"),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": "3"},
            "max_window_layers is '3'",
        ),
        ({"rope_scaling": {"rope_type": "spiral"}}, "rope_type 'spiral'"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor is missing"),
        (
            {"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0]}},
            "short_factor must be a list of 2",
        ),
        ({"rope_scaling": "linear"}, "must be an object"),
        ({"rope_scaling": {"type": "linear", "rope_type": "", "factor": 2.0}}, "rope_type '' is not"),
        ({"rope_scaling": {"type": "linear", "factor": True}}, "factor is True"),
        ({"rope_scaling": {"type": "linear", "factor": 10**400}}, "it must be a positive number"),
        (
            {"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0, True], "long_factor": [1, 1]}},
            "short_factor must be a list of 2",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"partial_rotary_factor": True}, "partial_rotary_factor True"),
        # What stands in two places is checked in both (NF4-15.3).
        (
            {"partial_rotary_factor": 0.5, "rope_parameters": {"partial_rotary_factor": None}},
            "config.json: partial_rotary_factor 0.5",
        ),
        (
            {"partial_rotary_factor": 1, "rope_parameters": {"partial_rotary_factor": 0.5}},
            r"\(rope_parameters\): partial_rotary_factor 0.5",
        ),
        ({"rope_theta": -1, "rope_parameters": {"rope_theta": 1e4}}, "config.json: rope_theta is -1"),
        (
            {
                "original_max_position_embeddings": 32,
                "rope_scaling": {
                    "type": "yarn",
                    "factor": 2,
                    "original_max_position_embeddings": 32.0,
                },
            },
            r"\(rope_parameters\): original_max_position_embeddings is 32.0",
        ),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "layer_types": ["full_attention"]},
            "layer_types",
        ),
    ],
)
def test_refusals(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        tiny_config(**{"kind": changes.pop("model_type", "llama")} | changes)
