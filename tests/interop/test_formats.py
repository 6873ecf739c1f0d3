"""Files exchanged with transformers, bitsandbytes and PEFT, bit by bit, on tiny random models."""

import json
import os
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported

import bitsandbytes as bnb
import ml_dtypes
import numpy as np
import peft
import pytest
import torch
import transformers
from nf4.formats.bitsandbytes import load_tensor, write_dequantized, write_quantized
from nf4.formats.checkpoint import QuantizeOptions, load_model, open_checkpoint
from nf4.formats.merge import write_merged
from nf4.formats.peft import linear_shapes, load_adapter, save_adapter
from nf4.lora import init_lora
from nf4.model.config import LlamaConfig
from nf4.tensor import QuantizedTensor, dequantize
from safetensors.torch import save_file

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
IDS = torch.tensor([[1, 5, 9, 2, 60, 33]])


def to_numpy(tensor: Any) -> Any:
    """A tensor's bits as an array of the same dtype."""
    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def dequantized_by_bitsandbytes(parameter: Any) -> Any:
    """Decode a Params4bit as 1-D: with AVX-512 the 2-D path is wrong where in_features % block size != 0."""
    state = bnb.functional.QuantState.from_dict(
        parameter.quant_state.as_dict(packed=True), torch.device("cpu")
    )
    shape, state.shape = state.shape, torch.Size([state.shape.numel()])
    return to_numpy(bnb.functional.dequantize_4bit(parameter.data, state)).reshape(shape)


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3", "mistral"])
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def save_model(directory: Path, family: str = "llama", dtype: Any = torch.float32, **changes: Any) -> Path:
    """Save a random model of transformers as a directory."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
    }
    config = transformers.AutoConfig.for_model(family, **(settings | changes))
    transformers.AutoModelForCausalLM.from_config(config).to(dtype).save_pretrained(directory)
    return directory


def quantized_names(checkpoint: Any) -> list[str]:
    return [name for name in checkpoint.names() if checkpoint.dtype(name) in ("nf4", "fp4")]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "options",
    [
        QuantizeOptions(),
        QuantizeOptions(128, "nf4", False),
        QuantizeOptions(32, "fp4", True),
        QuantizeOptions(64, "fp4", False),
    ],
    ids=str,
)
def test_our_directory_loads_in_transformers(dtype: str, options: QuantizeOptions, tmp_path: Path) -> None:
    source = open_checkpoint(save_model(tmp_path / "m", dtype=DTYPES[dtype]))
    write_quantized(source, tmp_path / "q", options)
    ours = open_checkpoint(tmp_path / "q")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "q")
    assert theirs.dtype == DTYPES[dtype]
    assert len(quantized_names(ours)) == 14
    for name in ours.names():
        value, parameter = ours.read(name), theirs.get_parameter(name)
        if isinstance(value, QuantizedTensor):
            assert isinstance(parameter, bnb.nn.Params4bit)
            assert parameter.quant_state.nested is options.double_quant
            assert dequantize(value).tobytes() == dequantized_by_bitsandbytes(parameter).tobytes()
        else:
            assert value.tobytes() == to_numpy(parameter).tobytes()


def test_every_family_loads_in_transformers(family: str, tmp_path: Path) -> None:
    source = open_checkpoint(save_model(tmp_path / "m", family))
    write_quantized(source, tmp_path / "q", QuantizeOptions())
    ours = open_checkpoint(tmp_path / "q")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "q")
    assert set(dict(theirs.named_parameters())) == set(ours.names())
    for name in quantized_names(ours):
        wanted = dequantized_by_bitsandbytes(theirs.get_parameter(name))
        assert dequantize(ours.read(name)).tobytes() == wanted.tobytes()
    write_dequantized(ours, tmp_path / "d", None)
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "d")
    logits = load_model(tmp_path / "q", quantize=None).logits(IDS[0].numpy().astype(np.int32))
    np.testing.assert_allclose(logits, to_numpy(plain(IDS).logits)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_a_fresh_linear4bit_loads_here(
    dtype: str, kind: str, double: bool, storage: Any, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    layer = bnb.nn.Linear4bit(
        192, 136, bias=False, compress_statistics=double, quant_type=kind, quant_storage=storage
    )
    layer.weight = bnb.nn.Params4bit(
        torch.randn(136, 192).to(DTYPES[dtype]),
        requires_grad=False,
        quant_type=kind,
        compress_statistics=double,
        quant_storage=storage,
        module=layer,
    )
    layer = layer.to("cpu")
    save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    q = load_tensor(tmp_path / "layer.safetensors")
    assert q.codebook.name == kind
    assert q.shape == (136, 192)
    assert dequantize(q).tobytes() == dequantized_by_bitsandbytes(layer.weight).tobytes()
    # Both ways: what we save is the same layer to bitsandbytes.
    q.save(tmp_path / "again.safetensors")
    assert load_tensor(tmp_path / "again.safetensors") == q


@pytest.mark.parametrize("double", [False, True])
def test_a_model_quantized_by_transformers_loads_here(double: bool, tmp_path: Path) -> None:
    save_model(tmp_path / "m", dtype=torch.bfloat16)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "m",
        dtype=torch.bfloat16,
        quantization_config=transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double
        ),
    )
    theirs.save_pretrained(tmp_path / "q")
    ours = open_checkpoint(tmp_path / "q")
    assert len(quantized_names(ours)) == 14
    for name in quantized_names(ours):
        wanted = dequantized_by_bitsandbytes(theirs.get_parameter(name))
        assert dequantize(ours.read(name)).tobytes() == wanted.tobytes()
    assert load_model(tmp_path / "q", quantize=None).config.num_hidden_layers == 2


def peft_tensors(model: Any) -> dict[str, Any]:
    return {
        name.replace(".default", ""): to_numpy(parameter)
        for name, parameter in model.named_parameters()
        if "lora_" in name
    }


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("targets", [TARGETS, ["q_proj", "v_proj"]], ids=len)
def test_our_adapter_loads_in_peft(rslora: bool, targets: list[str], tmp_path: Path) -> None:
    source = save_model(tmp_path / "m")
    config = LlamaConfig.from_dict(open_checkpoint(source).config, "m")
    generator = np.random.default_rng(0)
    adapters = {}
    for name, (out, inner) in linear_shapes(config).items():
        if name.rpartition(".")[2] in targets:
            adapters[name] = init_lora(name, inner, out, 4, 10, 0.0, 3, rslora)
            adapters[name].B[...] = generator.standard_normal((out, 4)) * 0.1
    save_adapter(tmp_path / "a", adapters, base=str(source), rslora=rslora)
    base = transformers.AutoModelForCausalLM.from_pretrained(source)
    before = base(IDS).logits
    model = peft.PeftModel.from_pretrained(base, tmp_path / "a")
    found = peft_tensors(model)
    assert len(found) == 2 * len(adapters)
    for name, lora in adapters.items():
        for letter, value in (("A", lora.A), ("B", lora.B)):
            assert found[f"base_model.model.{name}.lora_{letter}.weight"].tobytes() == value.tobytes()
    logits = to_numpy(model(IDS).logits)
    assert np.abs(logits - to_numpy(before)).max() > 1e-2
    # The same model merged here, run by transformers.
    write_merged(open_checkpoint(source), adapters, tmp_path / "merged", onto="original")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    np.testing.assert_allclose(to_numpy(merged(IDS).logits), logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"r": 4, "lora_alpha": 10, "target_modules": TARGETS},
        {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "down_proj"], "use_rslora": True},
        {"r": 4, "target_modules": "all-linear"},
        {"r": 4, "target_modules": r".*\.1\.mlp\..*_proj"},
        {"r": 4, "target_modules": ["up_proj"], "layers_to_transform": [1]},
        {
            "r": 4,
            "target_modules": TARGETS,
            "rank_pattern": {"q_proj": 2},
            "alpha_pattern": {"layers.0.mlp.up_proj": 5},
        },
        {"r": 4, "target_modules": TARGETS, "exclude_modules": ["k_proj"]},
    ],
    ids=str,
)
def test_their_adapter_loads_here(options: dict[str, Any], tmp_path: Path) -> None:
    source = save_model(tmp_path / "m")
    base = transformers.AutoModelForCausalLM.from_pretrained(source)
    model = peft.get_peft_model(
        base, peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **options)
    )
    model.save_pretrained(tmp_path / "a")
    config = LlamaConfig.from_dict(open_checkpoint(source).config, "m")
    adapters = load_adapter(tmp_path / "a", config)
    wanted = peft_tensors(model)
    assert len(wanted) == 2 * len(adapters)
    modules = dict(model.named_modules())
    for name, lora in adapters.items():
        assert lora.A.tobytes() == wanted[f"base_model.model.{name}.lora_A.weight"].tobytes()
        assert lora.B.tobytes() == wanted[f"base_model.model.{name}.lora_B.weight"].tobytes()
        assert lora.scale == pytest.approx(modules[f"base_model.model.{name}"].scaling["default"], rel=1e-12)


def test_peft_needs_what_we_always_write(tmp_path: Path) -> None:
    """The options without which PEFT quietly loads something else are all in the file."""
    config = LlamaConfig.from_dict(open_checkpoint(save_model(tmp_path / "m")).config, "m")
    adapters = {n: init_lora(n, i, o, 2, 4, 0.0, 0) for n, (o, i) in linear_shapes(config).items()}
    save_adapter(tmp_path / "a", adapters, base="m")
    options = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert {"peft_type", "r", "lora_alpha", "target_modules", "use_rslora", "task_type"} <= options.keys()
    assert peft.LoraConfig.from_pretrained(tmp_path / "a").target_modules == set(TARGETS)


def test_gguf_reads_as_transformers_reads_it(gguf: Path) -> None:
    source = open_checkpoint(gguf)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    for name in source.names():
        assert source.read(name).tobytes() == to_numpy(theirs.get_parameter(name)).tobytes()
    ours = source.tokenizer()
    for text in ("Hello  world 1234, don't!\n\n\tx", "naïve 日本語 🙂", "def f(x):\n    return x**2"):
        assert ours.encode(text) == tokenizer.encode(text)
        assert ours.decode(ours.encode(text)) == text
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    assert ours.chat(messages) == tokenizer.apply_chat_template(messages, tokenize=False)
