"""Text to tokens and back, by the tokenizers library: from tokenizer.json or from a GGUF file's metadata."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from nf4.errors import InputError
from nf4.formats.files import atomic_write, read_json, write_json

SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")

# The patterns a byte-level BPE cuts text by before merging, under the names GGUF gives them.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_PATTERNS = {"llama-bpe": _WORDS + r"\p{N}{1,3}" + _REST, "qwen2": _WORDS + r"\p{N}" + _REST}
PRE_TOKENIZERS = ("gpt-2", "smollm", *_PATTERNS)
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4  # GGUF's token types


class Tokenizer:
    """A tokenizer, its end-of-sequence ids and its chat template.

    special: the texts of bos_token, eos_token and so on, which chat templates use; where: the file, for
    errors.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        where: str,
        special: Mapping[str, str],
        eos_ids: Iterable[int],
        chat_template: str | None,
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._where = where
        self.special = dict(special)
        self.eos_ids = frozenset(eos_ids)
        self.chat_template = chat_template

    @property
    def vocab_size(self) -> int:
        """The greatest token id plus one."""
        return max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The token ids of a text; add_special_tokens: with the BOS and such that the model wants.

        Text rendered by chat() has them already. Raises InputError if the text isn't valid Unicode.
        """
        try:
            return list(self._backend.encode(text, add_special_tokens=add_special_tokens).ids)
        except (UnicodeEncodeError, TypeError):
            raise InputError("the text can't be encoded: it isn't valid Unicode") from None

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids."""
        return str(self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def chat(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = False) -> str:
        """Render messages, each with `role` and `content`, by the model's chat template, in Jinja's sandbox.

        Raises InputError if there is no template or it refuses the messages.
        """
        if self.chat_template is None:
            raise InputError(
                f"{self._where}: this model has no chat template; give text, or prompt and completion"
            )
        try:
            template = _environment().from_string(self.chat_template)
            return template.render(
                messages=list(messages),
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self.special,
            )
        except Exception as error:  # a template is a program, and may fail in any way
            raise InputError(f"{self._where}: the chat template refuses these messages ({error})") from None

    def save(self, directory: Path) -> None:
        """Write tokenizer.json and tokenizer_config.json into a directory, for transformers to load."""
        config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", **self.special}
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        with atomic_write(directory / "tokenizer.json") as file:
            file.write(self._backend.to_str(pretty=True).encode("utf-8"))
        write_json(directory / "tokenizer_config.json", config)


class _Generation(jinja2.ext.Extension):
    """The {% generation %} tag of transformers' templates, which marks and doesn't change the text."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    """The environment transformers renders chat templates in."""

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    def strftime_now(form: str) -> str:
        return datetime.now().strftime(form)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    return environment


def _check_vocabulary(tokenizer: Tokenizer, model_vocab: Any, where: str) -> Tokenizer:
    if type(model_vocab) is not int:
        raise InputError(f"{where}: the model's config.json has vocab_size {model_vocab!r}, not a number")
    if tokenizer.vocab_size > model_vocab:
        raise InputError(
            f"{where}: the tokenizer has ids up to {tokenizer.vocab_size - 1}, but the model's vocabulary is "
            f"{model_vocab}; they don't belong together"
        )
    return tokenizer


def _build(make: Callable[[], tokenizers.Tokenizer], where: str) -> tokenizers.Tokenizer:
    try:
        return make()
    except InputError:
        raise
    except Exception as error:  # the library raises nothing more precise
        raise InputError(f"{where}: the tokenizers library can't read it ({error})") from None


def load_tokenizer(directory: Path, model_config: Mapping[str, Any]) -> Tokenizer:
    """Load the tokenizer of a Hugging Face directory.

    The ids that end a text come from generation_config.json, config.json and tokenizer_config.json. Raises
    InputError if there is no tokenizer.json, or it has ids beyond the model's vocabulary.
    """
    path = directory / "tokenizer.json"
    if not path.exists():
        raise InputError(
            f"{directory}: tokenizer.json is missing; save one with transformers' AutoTokenizer first"
        )
    text = path.read_bytes()
    backend = _build(lambda: tokenizers.Tokenizer.from_buffer(text), str(path))
    options = (
        read_json(directory / "tokenizer_config.json")
        if (directory / "tokenizer_config.json").exists()
        else {}
    )
    special = {}
    for key in SPECIAL:
        value = options.get(key)
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            special[key] = value
    eos: set[int] = set()
    generation = directory / "generation_config.json"
    for source in (model_config, read_json(generation) if generation.exists() else {}):
        ids = source.get("eos_token_id")
        eos.update(i for i in (ids if isinstance(ids, list) else [ids]) if type(i) is int)
    if "eos_token" in special:
        found = backend.token_to_id(special["eos_token"])
        eos.update([] if found is None else [found])
    tokenizer = Tokenizer(
        backend,
        where=str(directory),
        special=special,
        eos_ids=eos,
        chat_template=_template(directory, options),
    )
    return _check_vocabulary(tokenizer, model_config.get("vocab_size"), str(path))


def _template(directory: Path, options: Mapping[str, Any]) -> str | None:
    """The default chat template: chat_template.jinja, or what tokenizer_config.json holds."""
    path = directory / "chat_template.jinja"
    if path.exists():
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise InputError(f"{path}: isn't UTF-8") from None
    found = options.get("chat_template")
    if isinstance(found, list):  # several, by name
        named = [item for item in found if isinstance(item, dict) and item.get("name") == "default"]
        found = named[0].get("template") if named else None
    return found if isinstance(found, str) else None


def tokenizer_from_gguf(metadata: Mapping[str, Any], model_vocab: int, where: str) -> Tokenizer:
    """Build the tokenizer of a GGUF file's metadata: byte-level BPE (gpt2) or SentencePiece BPE (llama).

    Raises InputError on other kinds, and on ids beyond the model's vocabulary.
    """
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens or not all(isinstance(token, str) for token in tokens):
        raise InputError(f"{where}: holds no tokenizer; use the Hugging Face directory of the model")
    special = {}
    for key, name in zip(SPECIAL, ("bos", "eos", "unknown", "padding"), strict=True):
        i = metadata.get(f"tokenizer.ggml.{name}_token_id")
        if isinstance(i, int) and 0 <= i < len(tokens):
            special[key] = tokens[i]
    eos = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    template = metadata.get("tokenizer.chat_template")
    tokenizer = Tokenizer(
        _build(lambda: _gguf_backend(metadata, tokens, special.get("bos_token"), where), where),
        where=where,
        special=special,
        eos_ids=[i for i in eos if isinstance(i, int)],
        chat_template=template if isinstance(template, str) else None,
    )
    return _check_vocabulary(tokenizer, model_vocab, where)


def _gguf_backend(
    metadata: Mapping[str, Any], tokens: Sequence[str], bos: str | None, where: str
) -> tokenizers.Tokenizer:
    kind, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    vocab = {token: i for i, token in enumerate(tokens)}
    if kind == "gpt2":
        backend = _byte_level(metadata, vocab, where)
    elif kind == "llama":
        backend = _sentencepiece(metadata, vocab, where)
    else:
        raise InputError(
            f"{where}: tokenizer {kind!r} isn't supported; use the Hugging Face directory of the model"
        )
    types = metadata.get("tokenizer.ggml.token_type", [NORMAL] * len(tokens))
    if len(types) != len(tokens):
        raise InputError(f"{where}: {len(tokens)} tokens, but {len(types)} token types")
    typed = list(zip(tokens, types, strict=True))
    backend.add_special_tokens([AddedToken(t, normalized=False) for t, c in typed if c in (CONTROL, UNKNOWN)])
    backend.add_tokens([AddedToken(t, normalized=False) for t, c in typed if c == USER_DEFINED])
    if bos is not None and metadata.get(
        "tokenizer.ggml.add_bos_token", kind == "llama" or pre == "llama-bpe"
    ):
        backend.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", bos, "$B"], special_tokens=[(bos, vocab[bos])]
        )
    return backend


def _byte_level(metadata: Mapping[str, Any], vocab: dict[str, int], where: str) -> tokenizers.Tokenizer:
    pre = metadata.get("tokenizer.ggml.pre")
    if pre not in PRE_TOKENIZERS:
        raise InputError(
            f"{where}: pre-tokenizer {pre!r} isn't one of {', '.join(PRE_TOKENIZERS)}; use the Hugging "
            "Face directory"
        )
    merges = []
    for merge in metadata.get("tokenizer.ggml.merges", []):
        left, _, right = merge.partition(" ")
        merges.append((left, right))
    # llama-bpe takes a whole word that is a token before it tries the merges.
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=pre == "llama-bpe"))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre not in _PATTERNS)
    if pre == "smollm":
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), byte_level]
        )
    elif pre in _PATTERNS:
        split = pre_tokenizers.Split(Regex(_PATTERNS[pre]), behavior="isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    else:
        backend.pre_tokenizer = byte_level
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(metadata: Mapping[str, Any], vocab: dict[str, int], where: str) -> tokenizers.Tokenizer:
    scores = metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(vocab):
        raise InputError(
            f"{where}: a SentencePiece tokenizer needs a score for each of its {len(vocab)} distinct tokens"
        )
    # SentencePiece joins, of all neighbours that form a token, the pair whose token scores best.
    merges = []
    for piece, i in vocab.items():
        pairs = [(piece[:k], piece[k:]) for k in range(1, len(piece))]
        merges += [(-scores[i], vocab[a], vocab[b], a, b) for a, b in pairs if a in vocab and b in vocab]
    merges.sort()
    unknown = metadata.get("tokenizer.ggml.unknown_token_id", 0)
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=[(a, b) for *_, a, b in merges],
            unk_token=next((token for token, i in vocab.items() if i == unknown), None),
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    steps: list[Any] = [normalizers.Prepend("▁")] if prefix else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    parts: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*parts, *([decoders.Strip(" ", 1, 0)] if prefix else [])])
    return backend
