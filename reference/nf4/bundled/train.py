"""Makes the bundled model from nothing: `python -m nf4.bundled.train JARGON.TXT OUT`."""

import json
import shutil
from pathlib import Path

import click
from tokenizers import Tokenizer as Tokenizers
from tokenizers import decoders, models, pre_tokenizers

from nf4.bundled.text import SOURCE, split
from nf4.formats.files import atomic_directory
from nf4.formats.tokenizer import load_tokenizer
from nf4.model.config import LlamaConfig
from nf4.model.llama import Llama
from nf4.train.data import load_data
from nf4.train.finetune import BEST, FinetuneOptions, Report, prepare_output, save_parameters, train_loop
from nf4.train.init import random_params

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 257,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": None,
    "eos_token_id": 256,
    "torch_dtype": "float32",
}
"""1.23 million parameters: 4.9 MB in float32. Every matrix has a multiple of 64 weights a row."""

END = "<|endoftext|>"


def write_tokenizer(directory: Path) -> None:
    """Write a tokenizer.json of the 256 bytes and an end token, and its tokenizer_config.json."""
    # ByteLevel stands a printable character for each byte; in the order of the bytes, token i is byte i.
    letter = {byte: chr(byte) for byte in [*range(33, 127), *range(161, 173), *range(174, 256)]}
    for byte in range(256):
        letter.setdefault(byte, chr(256 + len(letter) - 188))
    tokenizer = Tokenizers(models.BPE(vocab={letter[byte]: byte for byte in range(256)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END])
    tokenizer.save(str(directory / "tokenizer.json"))
    facts = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "model_max_length": CONFIG["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(facts, indent=2) + "\n")


class _Printed(Report):
    """Prints an evaluation a line."""

    def evaluation(self, step: int, loss: float) -> None:
        click.echo(f"step {step}  held-out loss {loss:.4f} nats a byte")


@click.command()
@click.argument("jargon", type=click.Path(exists=True, path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--steps", default=1250, show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(jargon: Path, out: Path, steps: int, seed: int) -> None:
    """Train on JARGON (the Jargon File, jargon.txt of Debian's package jargon-text) and write OUT/model."""
    work = out / "run"
    out.mkdir(parents=True, exist_ok=True)
    for name, text in zip(("train.txt", "jargon-heldout.txt"), split(jargon.read_text("utf-8")), strict=True):
        (out / name).write_text(text)
    config = LlamaConfig.from_dict(CONFIG, "the bundled config")
    model = Llama(config, dict(random_params(config, seed)))
    options = prepare_output(
        FinetuneOptions(
            model=SOURCE,
            data=str(out / "train.txt"),
            eval_data=str(out / "jargon-heldout.txt"),
            out=str(work),
            steps=steps,
            seed=seed,
            lr=3e-3,
            schedule="cosine",
            warmup=100,
            weight_decay=0.1,
            max_grad_norm=1.0,
            batch_size=32,
            seq_len=config.max_position_embeddings,  # a position never trained spoils every measurement
            eval_every=250,
            resume=work.exists(),
        )
    )
    with atomic_directory(out / "model") as made:
        write_tokenizer(made)
        tokenizer = load_tokenizer(made, CONFIG)
        data = load_data(
            options.data,
            tokenizer,
            options.seq_len,
            max_positions=config.max_position_embeddings,
            eval_path=options.eval_data,
            seed=seed,
        )
        train_loop(
            model,
            tokenizer,
            data,
            options,
            train="full",
            save=lambda d: save_parameters(d, model),
            report=_Printed(),
        )
        shutil.copy(work / BEST / "model.safetensors", made)
        (made / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")


if __name__ == "__main__":
    main()
