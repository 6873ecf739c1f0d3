"""`nf4 finetune` from the command line: what it writes and says, its config file, and every refusal."""

import json
import signal
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from nf4.errors import CheckFailed, InputError
from nf4.formats.checkpoint import load_model, open_checkpoint
from nf4.formats.files import SafetensorsFile
from nf4.formats.peft import load_adapter
from nf4.formats.tokenizer import Tokenizer
from nf4.model.config import LlamaConfig
from nf4.model.llama import Llama
from nf4.train import engine
from nf4.train import finetune as room
from nf4.train.data import load_data
from nf4.train.finetune import FinetuneOptions, Report, finetune, prepare_output, save_parameters, train_loop
from nf4.train.init import random_params
from nf4.train.log import read_log
from nf4.train.step import evaluate, split, train_step

Nf4 = Callable[..., Result]

QUICK = ("--steps", 4, "--seq-len", 32, "--eval-sequences", 3, "--lr", 0.02, "--threads", 1)


@pytest.fixture
def options(tmp_path: Path, model: Path, text: Path) -> FinetuneOptions:
    return FinetuneOptions(
        str(model),
        str(text),
        str(tmp_path / "out"),
        steps=4,
        seq_len=32,
        eval_sequences=3,
        lr=0.02,
        threads=1,
    )


def test_what_a_run_leaves(tmp_path: Path, model: Path, text: Path, nf4: Nf4) -> None:
    out = tmp_path / "deep" / "out"
    result = nf4(
        "finetune", model, text, "--out", out, *QUICK, "--eval-every", 2, "--targets", "q_proj, up_proj"
    )
    assert result.exit_code == 0, result.output
    records = read_log(out / "training_log.jsonl")
    assert [(r["step"], *sorted(r.keys() - {"step"})) for r in records] == [
        (0, "eval_loss"),
        *[(i, "grad_norm", "loss", "lr", "seconds", "tokens") for i in (1, 2)],
        (2, "eval_loss"),
        *[(i, "grad_norm", "loss", "lr", "seconds", "tokens") for i in (3, 4)],
        (4, "eval_loss"),
    ]
    assert records[-1]["eval_loss"] < records[0]["eval_loss"] - 0.1
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    config = LlamaConfig.from_dict(open_checkpoint(model).config, "")
    for folder in (out, out / "best"):
        adapters = load_adapter(folder, config)
        assert sorted({name.rsplit(".", 1)[1] for name in adapters}) == ["q_proj", "up_proj"]
        assert all(lora.B.any() for lora in adapters.values())
    for shown in ("held-out loss", "it wrote before", "it writes after", f"{out}/best", f"{out}/loss.png"):
        assert shown in result.stdout
    assert "tokens/s" in result.stderr
    assert "4/4" in result.stderr


def test_the_adapter_gives_the_loss_that_was_logged(options: FinetuneOptions, tokenizer: Tokenizer) -> None:
    result = finetune(options)
    base = load_model(options.model, quantize=room.QuantizeOptions())
    model = Llama(base.config, base.params, load_adapter(options.out, base.config))
    data = load_data(options.data, tokenizer, 32, max_positions=128)
    heldout = room.evenly(data.heldout, 3)
    assert evaluate(model, heldout, batch_size=4, threads=1) == result.eval_after


def test_the_best_adapter_is_kept_when_training_gets_worse(
    options: FinetuneOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([3.0, 2.5, 2.0, 2.2, 2.1])
    monkeypatch.setattr(engine, "evaluate", lambda *_, **__: next(losses))
    kept: list[bytes] = []

    class Watch(Report):
        def step(self, record: dict[str, Any]) -> None:
            best = Path(options.out, "best", "adapter_model.safetensors")
            kept.append(best.read_bytes() if best.exists() else b"")

    result = finetune(replace(options, eval_every=1), Watch())
    assert (result.best_loss, result.best_step, result.eval_before, result.eval_after) == (2.0, 2, 3.0, 2.1)
    assert kept[0] == b""
    assert kept[1] != kept[2] == kept[3]
    assert Path(options.out, "best", "adapter_model.safetensors").read_bytes() == kept[2]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapter_dtype(options: FinetuneOptions, dtype: str) -> None:
    finetune(replace(options, adapter_dtype=dtype, steps=1))
    file = SafetensorsFile(Path(options.out) / "adapter_model.safetensors")
    assert {entry.dtype for entry in file.entries.values()} == {{"float32": "F32", "bfloat16": "BF16"}[dtype]}


def test_checkpointing_changes_no_bit(options: FinetuneOptions, tmp_path: Path) -> None:
    other = replace(options, checkpointing=True, out=str(tmp_path / "other"))
    finetune(replace(options, dropout=0.2))
    finetune(replace(other, dropout=0.2))
    name = "adapter_model.safetensors"
    assert Path(options.out, name).read_bytes() == Path(other.out, name).read_bytes()


def test_accumulation_is_a_larger_batch(model: Path, text: Path, tokenizer: Tokenizer) -> None:
    base = load_model(model, quantize=room.QuantizeOptions())
    options = FinetuneOptions(str(model), str(text), "", dropout=0.3)
    trained = Llama(base.config, base.params, room.new_adapters(base, options))
    examples = load_data(text, tokenizer, 24, max_positions=128).train[:6]
    cuts = [[6], [2, 4], [1, 2, 3]]
    results = []
    for cut, threads in zip(cuts, (1, 2, 3), strict=True):
        micro_batches, at = [], 0
        for n in cut:
            micro_batches.append((examples[at : at + n], range(at, at + n)))
            at += n
        results.append(
            train_step(trained, micro_batches, train="lora", checkpointing=False, seed=1, threads=threads)
        )
    for other in results[1:]:
        assert other.loss == pytest.approx(results[0].loss, rel=1e-6)
        assert other.tokens == results[0].tokens
        for name, g in results[0].grads.items():
            np.testing.assert_allclose(other.grads[name], g, rtol=1e-3, atol=1e-6)


def test_sequences_are_shared_out_by_tokens() -> None:
    assert split([5, 1, 1, 3], 2) == [[0], [1, 2, 3]]
    assert split([2, 2], 4) == [[0], [1]]
    assert split([1, 9, 9, 1], 1) == [[0, 1, 2, 3]]


def test_full_training_from_nothing(options: FinetuneOptions, tokenizer: Tokenizer, tmp_path: Path) -> None:
    config = LlamaConfig.from_dict(open_checkpoint(options.model).config, "")
    data = load_data(options.data, tokenizer, 32, max_positions=128)

    def train(out: Path, steps: int, resume: bool = False) -> Llama:
        model = Llama(config, dict(random_params(config, 3)))
        settings = prepare_output(replace(options, out=str(out), steps=steps, lr=3e-3, resume=resume))
        result = train_loop(
            model,
            tokenizer,
            data,
            settings,
            train="full",
            save=lambda d: save_parameters(d, model),
            report=Report(),
        )
        assert result.eval_after < result.eval_before
        return model

    model = train(tmp_path / "a", 6)
    train(tmp_path / "b", 3)
    train(tmp_path / "b", 6, resume=True)
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()
    file = SafetensorsFile(tmp_path / "a/model.safetensors")
    assert file.entries.keys() == model.params.keys()


def test_random_parameters_are_normal_and_named() -> None:
    config = LlamaConfig.from_dict(
        {
            "model_type": "qwen2", "vocab_size": 300, "hidden_size": 64, "intermediate_size": 130,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        },
        "",
    )  # fmt: skip
    params = random_params(config, 5)
    embedding = params["model.embed_tokens.weight"]
    assert embedding.dtype == np.float32
    assert abs(embedding.mean()) < 0.02 * 4 / embedding.size**0.5
    assert embedding.std() == pytest.approx(0.02, rel=0.02)
    assert np.mean(np.abs(embedding) < 0.02) == pytest.approx(0.6827, abs=0.01)
    assert (params["model.norm.weight"] == 1).all()
    assert not params["model.layers.1.self_attn.q_proj.bias"].any()
    q = [params[f"model.layers.{i}.self_attn.q_proj.weight"] for i in (0, 1)]
    assert abs(np.corrcoef(q[0].ravel(), q[1].ravel())[0, 1]) < 0.05


def test_steps_take_the_sequences_one_after_another(
    options: FinetuneOptions, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def watched(model: Llama, micro_batches: Any, **settings: Any) -> Any:
        for examples, samples in micro_batches:
            seen.extend(zip(samples, (example.ids.tobytes() for example in examples), strict=True))
        return train_step(model, micro_batches, **settings)

    seen: list[tuple[int, bytes]] = []
    monkeypatch.setattr(engine, "train_step", watched)
    finetune(replace(options, batch_size=3, grad_accum=2, seq_len=100))
    assert [sample for sample, _ in seen] == list(range(4 * 2 * 3))
    data = load_data(options.data, tokenizer, 100, max_positions=128)
    n = len(data.train)
    assert n > 24
    assert len({ids for _, ids in seen}) == 24


def test_a_loss_that_is_not_finite_ends_the_run(
    tmp_path: Path, model: Path, text: Path, nf4: Nf4, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverging(*arguments: Any, **settings: Any) -> Any:
        result = train_step(*arguments, **settings)
        calls.append(0)
        return replace(result, loss=float("nan")) if len(calls) == 4 else result

    calls: list[int] = []
    monkeypatch.setattr(engine, "train_step", diverging)
    out = tmp_path / "out"
    result = nf4("finetune", model, text, "--out", out, *QUICK, "--save-every", 2)
    assert result.exit_code == 1
    last = result.stderr.splitlines()[-1]
    assert last.startswith("nf4: step 4: the loss is nan and the gradient norm ")
    assert f"the last good checkpoint is step 2 in {out / 'checkpoint.safetensors'}" in last
    assert "try a lower --lr (now 0.02)" in last
    assert [r["step"] for r in read_log(out / "training_log.jsonl")] == [0, 1, 2, 3]
    monkeypatch.setattr(engine, "train_step", train_step)
    assert nf4("finetune", "--resume", "--out", out).exit_code == 0


def test_an_infinite_gradient_ends_the_run(options: FinetuneOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    def overflowing(*arguments: Any, **settings: Any) -> Any:
        result = train_step(*arguments, **settings)
        next(iter(result.grads.values())).reshape(-1)[0] = np.inf
        return result

    monkeypatch.setattr(engine, "train_step", overflowing)
    with pytest.raises(
        CheckFailed, match=r"step 1: .* gradient norm inf; the last good checkpoint is step 0"
    ):
        finetune(options)


def test_a_model_broken_from_the_start(options: FinetuneOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "evaluate", lambda *_, **__: float("inf"))
    with pytest.raises(CheckFailed, match="the held-out loss is inf before any training"):
        finetune(options)
    assert not Path(options.out).exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", 0], "--steps 0: it must be at least 1"),
        (["--rank", 0], "--rank 0: it must be at least 1"),
        (["--rank", "x"], "'x' is not a valid integer"),
        (["--alpha", 0], "--alpha 0.0: it must be above 0"),
        (["--alpha", "nan"], "--alpha nan: it must be a finite number, above 0"),
        (["--lr", -1], "--lr -1.0: it must be above 0"),
        (["--lr", "inf"], "--lr inf: it must be a finite number, above 0"),
        (["--dropout", 1], "--dropout 1.0: it must be below 1"),
        (["--dropout", "nan"], "--dropout nan: it must be a finite number, at least 0"),
        (["--warmup", -1], "--warmup -1: it must be at least 0"),
        (["--weight-decay", "nan"], "--weight-decay nan: it must be a finite number, at least 0"),
        (["--max-grad-norm", -0.5], "--max-grad-norm -0.5: it must be at least 0"),
        (["--batch-size", 0], "--batch-size 0: it must be at least 1"),
        (["--grad-accum", 0], "--grad-accum 0: it must be at least 1"),
        (["--seq-len", 0], "--seq-len 0: it must be at least 1"),
        (["--seq-len", 129], "sequences of 129 tokens are longer than the model's 128 positions"),
        (["--eval-every", -1], "--eval-every -1: it must be at least 0"),
        (["--save-every", 0], "--save-every 0: it must be at least 1"),
        (["--threads", 0], "--threads 0: it must be at least 1"),
        (["--seed", -1], "--seed -1: it must be at least 0"),
        (["--seed", 1 << 64], "it must be below 2^64"),
        (["--targets", "q_proj,lm_head"], "--targets lm_head: the layers that take an adapter are q_proj"),
        (["--targets", ","], "--targets: name at least one of q_proj"),
        (["--block-size", 48], "--block-size 48: it is a power of two from 32 to 4096"),
        (["--codebook", "nf3"], "'nf3' is not one of"),
        (["--schedule", "step"], "'step' is not one of"),
        (["--eval-data", "absent.txt"], "absent.txt: the data can't be read"),
    ],
)
def test_bad_options(
    tmp_path: Path, model: Path, text: Path, nf4: Nf4, arguments: list[Any], message: str
) -> None:
    out = tmp_path / "out"
    result = nf4("finetune", model, text, "--out", out, "--seq-len", 32, *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stdout == ""
    assert not out.exists()


def test_bad_paths(tmp_path: Path, model: Path, text: Path, nf4: Nf4) -> None:
    def refused(*arguments: Any) -> str:
        result = nf4("finetune", *arguments)
        assert result.exit_code == 2, result.output
        line = result.stderr.splitlines()[-1]
        assert line.startswith("nf4: ")
        return line

    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("keep me")
    assert "isn't empty" in refused(model, text, "--out", full)
    assert "must be a directory" in refused(model, text, "--out", full / "mine.txt")
    assert [p.name for p in full.iterdir()] == ["mine.txt"]
    assert "there is no such model" in refused(tmp_path / "absent", text, "--out", tmp_path / "o")
    assert "DATA" in refused(model, "--out", tmp_path / "o")
    (tmp_path / "empty.txt").write_text("")
    assert "the file is empty" in refused(model, tmp_path / "empty.txt", "--out", tmp_path / "o", *QUICK)
    assert not (tmp_path / "o").exists()
    result = nf4("finetune", model, text)
    assert result.exit_code == 2
    assert result.stderr == "nf4: missing option '--out'; see  nf4 finetune --help\n"


def test_a_run_is_not_overwritten(tmp_path: Path, model: Path, text: Path, nf4: Nf4) -> None:
    out = tmp_path / "out"
    assert nf4("finetune", model, text, "--out", out, *QUICK).exit_code == 0
    before = (out / "adapter_model.safetensors").read_bytes()
    result = nf4("finetune", model, text, "--out", out, *QUICK)
    assert result.exit_code == 2
    assert f"nf4: {out}: it holds a run; go on with it by --resume, or name another --out" in result.stderr
    assert (out / "adapter_model.safetensors").read_bytes() == before


def test_config_file(tmp_path: Path, model: Path, text: Path, nf4: Nf4) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(
        f"model: {model}\ndata: {text}\nout: {tmp_path / 'a'}\nsteps: 9\nseq-len: 32\nlr: 2e-2\n"
        "eval_sequences: 3\nthreads: 1\nrslora: true\ndouble-quant: false\ntargets: [q_proj, v_proj]\n"
        "warmup: null\n"
    )
    assert nf4("finetune", "--config", config, "--steps", 3).exit_code == 0
    flags = ["--steps", 3, "--rslora", "--no-double-quant", "--targets", "q_proj,v_proj"]
    assert nf4("finetune", model, text, "--out", tmp_path / "b", *QUICK, *flags).exit_code == 0
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("ranks: 4", "there is no option 'ranks'; known are adapter-dtype, "),
        ("config: other.yaml", "there is no option 'config'"),
        ("steps: one", "run.yaml: steps: 'one' is not a valid integer"),
        ("lr: 3%", "run.yaml: lr: '3%' is not a valid float"),
        ("rank: 3.7", "'3.7' is not a valid integer"),
        ("rank: true", "rank is True; a single value is expected"),
        ("rank: [1, 2]", "rank is [1, 2]; a single value is expected"),
        ("rslora: 1", "rslora is 1; it is true or false"),
        ("schedule: step", "'step' is not one of"),
        ("- rank", "options are expected, as lines of `name: value`"),
        ("rank: [", "not valid YAML"),
        ("rank: !!python/object:os.system 1", "not valid YAML"),
    ],
)
def test_bad_config(tmp_path: Path, model: Path, text: Path, nf4: Nf4, content: str, message: str) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(content)
    result = nf4("finetune", model, text, "--out", tmp_path / "out", "--config", config)
    assert result.exit_code == 2
    assert message in result.stderr
    assert not (tmp_path / "out").exists()
    result = nf4("finetune", model, text, "--out", tmp_path / "out", "--config", tmp_path / "absent.yaml")
    assert result.exit_code == 2
    assert "absent.yaml: the config can't be read (No such file or directory)" in result.stderr


def test_json(tmp_path: Path, model: Path, text: Path, nf4: Nf4) -> None:
    out = tmp_path / "out"
    result = nf4("finetune", model, text, "--out", out, *QUICK, "--json")
    answer = json.loads(result.stdout)
    assert answer["eval_after"] < answer["eval_before"]
    assert answer["step"] == answer["steps"] == 4
    assert answer["tokens"] == sum(r.get("tokens", 0) for r in read_log(out / "training_log.jsonl"))
    assert set(answer) >= {"seconds", "best_loss", "best_step", "sample_before", "sample_after"}
    for name in ("adapter", "best_adapter", "log", "picture", "checkpoint"):
        assert Path(answer[name]).exists()
    assert result.stderr == ""


def test_json_lines_and_what_was_cut_is_said(tmp_path: Path, model: Path, nf4: Nf4) -> None:
    data = tmp_path / "d.jsonl"
    records = [{"prompt": "one plus one is ", "completion": "two " * (1 + 10 * (i == 3))} for i in range(12)]
    data.write_text("".join(json.dumps(r) + "\n" for r in records))
    result = nf4("finetune", model, data, "--out", tmp_path / "out", *QUICK, "--group-by-length")
    assert result.exit_code == 0, result.output
    assert "1 of 12 examples cut to 32 tokens" in result.stderr
    assert "from the held-out text\n    one plus one is \n" in result.stdout


def test_ctrl_c_waits_for_the_step_and_twice_does_not() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background begin without it
    with room._interrupts() as interrupted:
        assert not interrupted()
        signal.raise_signal(signal.SIGINT)
        assert interrupted()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_two_runs_into_one_directory(options: FinetuneOptions) -> None:
    """The second is refused, begun or gone on with, and the first ends as if it had been alone."""

    class Second(Report):
        def __init__(self) -> None:
            self.seen: list[str] = []

        def step(self, record: dict[str, Any]) -> None:
            for options_ in (options, replace(options, resume=True)):
                with pytest.raises(InputError) as refused:
                    finetune(options_)
                self.seen.append(str(refused.value))

    other = Second()
    finetune(replace(options, steps=2), other)
    begun, gone_on = (
        "it holds a run; go on with it by --resume",
        "another run writes there; wait until it ends",
    )
    assert [words.partition(": ")[0] for words in other.seen] == [options.out] * 4
    assert [begun in words for words in other.seen] == [True, False] * 2
    assert [gone_on in words for words in other.seen] == [False, True] * 2
    alone = replace(options, steps=2, out=f"{options.out}-alone")
    finetune(alone)
    first, second = (Path(o.out, "adapter_model.safetensors").read_bytes() for o in (options, alone))
    assert first == second
    finetune(replace(options, steps=3, resume=True))


def test_a_directory_that_another_run_has_taken_meanwhile(options: FinetuneOptions) -> None:
    class Other(Report):
        def evaluation(self, step: int, loss: float) -> None:
            if not Path(options.out).exists():
                finetune(replace(options, steps=1))

    with pytest.raises(InputError, match="the output directory isn't empty"):
        finetune(options, Other())


def test_runs_in_a_thread_too(options: FinetuneOptions) -> None:
    thread = threading.Thread(target=finetune, args=(replace(options, steps=1),))
    thread.start()
    thread.join()
    assert Path(options.out, "adapter_model.safetensors").exists()


def test_help_version_and_unknown_commands(nf4: Nf4) -> None:
    result = nf4("--help")
    assert result.exit_code == 0
    assert "finetune    Quantize a model and train a LoRA adapter on it." in result.stdout
    assert nf4("--version").stdout.startswith("nf4, version ")
    assert nf4("train").exit_code == 2
    assert "no such command 'train'" in nf4("train").stderr
    assert nf4("finetune", "--help").stdout.count("[default:") > 20
