"""What the commands ask for with --device cuda: plan and engine of a run, evaluation, generation."""

from collections.abc import Mapping, Sequence
from typing import Any

from nf4.errors import InputError
from nf4.formats.checkpoint import Checkpoint, QuantizeOptions
from nf4.formats.peft import linear_shapes
from nf4.model.config import LlamaConfig
from nf4.model.llama import Llama
from nf4.nested import NESTED_BLOCK_SIZE
from nf4.random import stream_of
from nf4.ranks import ALONE, Ranks
from nf4.train.data import IGNORE, Example
from nf4.train.engine import Engine
from nf4.train.finetune import ADAPTER_DTYPES, FinetuneOptions

from nf4_gpu.arena import Arena
from nf4_gpu.device import Cuda, Device
from nf4_gpu.model.generate import Decoder, generate, why_not
from nf4_gpu.model.llama import check_supported
from nf4_gpu.model.weights import AdapterShape, Form
from nf4_gpu.ranks import take_device
from nf4_gpu.train import plan as planning
from nf4_gpu.train.engine import GpuEngine, Inference
from nf4_gpu.train.plan import Settings

OLDEST = 80  # bfloat16 on tensor cores
_EVALUATED = 8192  # tokens of a pass
_RESERVE = 256 << 20  # bytes: cuBLAS's workspace, graphs, kernels


def check_plan(
    source: Checkpoint, config: LlamaConfig, options: FinetuneOptions, longest: int, more: int
) -> str:
    """Return a run's plan of memory, before anything is loaded.

    longest: tokens of the longest sequence; more: those that a sample adds. Raises InputError for a GPU or
    a model that is not supported, and where the run does not fit, with the nearest settings that do.
    """
    check_supported(config)
    free, processors, capability, shared_memory = _gpu()
    settings = settings_of(config, options, longest, more)
    adapters = {
        name: AdapterShape(options.rank, 1.0, options.dropout, stream_of(name))
        for name in linear_shapes(config)
        if name.rpartition(".")[2] in options.targets
    }
    quantized = QuantizeOptions(options.block_size, options.codebook, options.double_quant)
    forms = stored_forms(source, config, quantized)

    def plan_of(wanted: Settings) -> planning.Plan:
        return planning.make(
            Arena(),
            config,
            adapters,
            forms,
            wanted,
            adapter_dtype=ADAPTER_DTYPES[options.adapter_dtype],
            processors=processors,
            capability=capability,
            shared_memory=shared_memory,
        )

    plan = plan_of(settings)
    planning.check_fits(lambda wanted: plan_of(wanted).total + _RESERVE, settings, free, plan.describe())
    return plan.describe()


def settings_of(config: LlamaConfig, options: FinetuneOptions, longest: int, more: int) -> Settings:
    """Return what a run's options come to."""
    return Settings(
        options.batch_size,
        longest,
        options.checkpointing,
        options.keep_layers,
        options.optimizer_budget,
        options.weights_budget,
        min(config.max_position_embeddings, longest + more),
    )


def stored_forms(
    source: Checkpoint, config: LlamaConfig, quantized: QuantizeOptions
) -> list[dict[str, Form]]:
    """Return how each linear weight of a model on the disk will be stored, by layer and module."""
    forms: list[dict[str, Form]] = [{} for _ in range(config.num_hidden_layers)]
    given: Any = source.config.get("quantization_config")
    form = Form(quantized.block_size, NESTED_BLOCK_SIZE if quantized.double_quant else 0)
    if isinstance(given, Mapping):  # it is in 4 bits already, in blocks of 64 unless its file says otherwise
        nested = given.get("bnb_4bit_use_double_quant", False)
        form = Form(64, NESTED_BLOCK_SIZE if nested else 0)
    for name in linear_shapes(config):
        forms[int(name.split(".")[2])][name] = form
    return forms


def engine(
    model: Llama,
    options: FinetuneOptions,
    longest: int,
    more: int,
    ranks: Ranks = ALONE,
    device: Device | None = None,
) -> Engine:
    """Return the engine of a run."""
    return GpuEngine(
        model,
        settings_of(model.config, options, longest, more),
        max_grad_norm=options.max_grad_norm,
        weight_decay=options.weight_decay,
        seed=options.seed,
        device=device,
        ranks=ranks,
    )


def exact_engine(model: Llama, **settings: Any) -> Engine:
    """Return the engine of an exact run."""
    from nf4_gpu.train.exact import ExactEngine

    return ExactEngine(model, **settings)


def evaluate(model: Llama, examples: Sequence[Example], device: Device | None = None) -> float:
    """Return the mean loss of a model over the target tokens of examples, in nats."""
    if device is None:
        check_supported(model.config)
        _gpu()
    longest = max(len(example) for example in examples)
    settings = Settings(
        max(1, min(len(examples), _EVALUATED // longest)), longest, positions=longest, training=False
    )
    found = Inference(model, settings, device=device or Cuda())
    order = sorted(examples, key=len)
    targets = sum(int((example.targets != IGNORE).sum()) for example in examples)
    return found.total_loss(order) / targets


def decoder(model: Llama, prompt: int, positions: int, device: Device | None = None) -> Decoder:
    """Return a model to generate with: prompts of so many tokens, sequences of so many positions."""
    if device is None:
        check_supported(model.config)
        _gpu()
    device = device or Cuda()
    reason = why_not(model.config, device.shared_memory)
    if reason is not None:
        raise InputError(f"--device cuda does not generate with this model: {reason}; take --device cpu")
    settings = Settings(1, prompt, positions=positions, training=False)
    found = Inference(model, settings, device=device, decode=True)
    assert found.decoder is not None
    return found.decoder


def _gpu() -> tuple[int, int, int, int]:
    """Return free bytes, processors, compute capability and shared memory of the current GPU."""
    import cupy

    from nf4_gpu.compile import capability, processors, shared_memory

    number = cupy.cuda.runtime.getDevice()
    found = capability(number)
    if found < OLDEST:
        raise InputError(
            f"--device cuda: GPU {number} is of compute capability {found / 10}; bfloat16 on tensor cores, "
            f"in which a model is computed, needs {OLDEST / 10} (Ampere) or newer; take --device cpu"
        )
    free, _ = cupy.cuda.runtime.memGetInfo()
    return int(free), processors(number), found, shared_memory(number)


__all__ = [
    "check_plan", "decoder", "engine", "evaluate", "exact_engine", "generate", "settings_of", "stored_forms",
    "take_device",
]  # fmt: skip
