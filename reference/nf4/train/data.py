"""Training data: text or JSON lines to sequences with targets, the held-out part, the order of examples."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nf4 import random
from nf4.errors import InputError

if TYPE_CHECKING:  # this room is fed one
    from nf4.formats.tokenizer import Tokenizer

IGNORE = -100
"""The target of a position that has no loss."""

LOSS_ON = ("completion", "all")

_HELDOUT_SHARE = 10  # one part in ten is held out
_SPLIT_EPOCH = (
    1 << 32
) - 1  # the permutation that chooses the held-out examples; no epoch of training reaches it
_MEGABATCH = 50  # batches sorted together by group_by_length, as many as transformers takes


@dataclass(frozen=True, eq=False)
class Example:
    """One sequence: ids int32[T] and the token to predict at each, int32[T], IGNORE for no loss."""

    ids: NDArray[np.int32]
    targets: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Data:
    """The examples to train on and those held out, with what had to be cut or left out to get them."""

    train: list[Example]
    heldout: list[Example]
    truncated: int
    dropped: int

    def digest(self) -> str:
        """Return a SHA-256 of every token and target: equal for two runs that see the same examples."""
        total = hashlib.sha256()
        for part in (self.train, self.heldout):
            total.update(len(part).to_bytes(8, "little"))
            for example in part:
                total.update(
                    len(example).to_bytes(8, "little") + example.ids.tobytes() + example.targets.tobytes()
                )
        return total.hexdigest()


def load_data(
    path: str | Path,
    tokenizer: "Tokenizer",
    seq_len: int,
    *,
    max_positions: int,
    loss_on: str = "completion",
    eval_path: str | Path | None = None,
    seed: int = 0,
) -> Data:
    """Read a text (.txt or any plain text) or JSON lines (.jsonl) into training and held-out examples.

    A text is cut into windows of seq_len tokens, its last tenth held out. JSON lines hold objects with
    `text`, `prompt` and `completion`, or chat `messages`; a tenth of them, chosen by the seed, is held out,
    and the loss is on the completion or the assistant's turns unless loss_on is "all". With eval_path nothing
    is split off: that file is the held-out part, even if it is the same. Raises InputError for data that
    can't be read or leave nothing to learn.
    """
    if seq_len > max_positions:
        raise InputError(
            f"sequences of {seq_len} tokens are longer than the model's {max_positions} positions; "
            f"take --seq-len {max_positions} or less"
        )
    if loss_on not in LOSS_ON:
        raise InputError(f"--loss-on {loss_on}: it is one of {', '.join(LOSS_ON)}")
    loader = _Loader(tokenizer, seq_len, loss_on)
    if eval_path is None:
        train, heldout = loader.load(Path(path), seed)
    elif Path(eval_path) == Path(path):
        train, _ = loader.load(Path(path), None)
        heldout = train
    else:
        train, _ = loader.load(Path(path), None)
        heldout, _ = loader.load(Path(eval_path), None)
    return Data(train, heldout, loader.truncated, loader.dropped)


class _Loader:
    """Reads files under one set of rules and counts what it cuts and drops."""

    def __init__(self, tokenizer: "Tokenizer", seq_len: int, loss_on: str) -> None:
        self.tokenizer, self.seq_len, self.loss_on = tokenizer, seq_len, loss_on
        self.truncated = self.dropped = 0

    def load(self, path: Path, split_seed: int | None) -> tuple[list[Example], list[Example]]:
        """Return (train, held out); the second is empty without a split_seed."""
        if path.suffix.lower() == ".json":
            raise InputError(f"{path}: give JSON lines, an object a line, in a file named .jsonl")
        text = _decode(path, _read(path))
        if path.suffix.lower() in (".jsonl", ".ndjson"):
            return self._examples(path, text, split_seed)
        return self._windows(path, text, split_seed)

    def _windows(self, path: Path, text: str, split_seed: int | None) -> tuple[list[Example], list[Example]]:
        tokens = np.asarray(self.tokenizer.encode(text), np.int32)
        cut = len(tokens) if split_seed is None else len(tokens) - len(tokens) // _HELDOUT_SHARE
        # Windows of one part end with it, so no token of the held-out part is ever a training target.
        train, heldout = windows(tokens[:cut], self.seq_len), windows(tokens[cut:], self.seq_len)
        if not train or (split_seed is not None and not heldout):
            way = "" if split_seed is None else ", or the held-out text by --eval-data"
            raise InputError(f"{path}: {len(tokens)} tokens are too few; give more{way}")
        return train, heldout

    def _examples(self, path: Path, text: str, split_seed: int | None) -> tuple[list[Example], list[Example]]:
        examples: list[Example] = []
        dropped = 0
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                example = self._example(f"{path}:{number}", line)
                if example is None:
                    dropped += 1
                else:
                    examples.append(example)
        self.dropped += dropped
        if not examples:
            raise InputError(
                f"{path}: none of its {dropped} examples has a token to learn within "
                f"--seq-len {self.seq_len}; take longer sequences, or --loss-on all"
            )
        if split_seed is None:
            return examples, []
        if len(examples) < 2:
            raise InputError(
                f"{path}: one example can't be split; give more, or the held-out ones by --eval-data"
            )
        chosen = set(held_out(split_seed, len(examples)).tolist())
        train = [example for i, example in enumerate(examples) if i not in chosen]
        return train, [examples[i] for i in sorted(chosen)]

    def _example(self, where: str, line: str) -> Example | None:
        """Return the example of one line, or None if no target token is left in it."""
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            wrong = error.msg.removesuffix(" at")
            raise InputError(f"{where}: not a JSON object: {wrong} at column {error.colno}") from None
        if not isinstance(record, dict):
            raise InputError(f"{where}: a JSON {type(record).__name__}, where an object is expected")
        segments = self._segments(where, record)
        ids = np.concatenate([np.asarray(part, np.int32) for part, _ in segments])  # int32[n]
        learned = np.concatenate([np.full(len(part), learn) for part, learn in segments])  # bool[n]
        if self.loss_on == "all":
            learned[:] = True
        targets = np.where(learned, ids, np.int32(IGNORE))[1:]  # int32[n-1]
        if len(targets) > self.seq_len:
            self.truncated += 1
        targets = targets[: self.seq_len]
        if not (targets != IGNORE).any():
            return None
        return Example(ids[: len(targets)], targets)

    def _segments(self, where: str, record: dict[str, Any]) -> list[tuple[list[int], bool]]:
        """Return the tokens of one record in pieces, each with whether it is learned."""
        kinds = [kind for kind in ("text", "prompt", "messages") if kind in record]
        if len(kinds) != 1:
            raise InputError(
                f"{where}: an object needs just one of `text`, `prompt` with `completion`, or `messages`; "
                f"it has {', '.join(map(repr, record)) or 'no keys'}"
            )
        if kinds == ["messages"]:
            return self._chat(where, record["messages"])
        keys = ("text",) if kinds == ["text"] else ("prompt", "completion")
        for key in keys:
            if not isinstance(record.get(key), str):
                raise InputError(f"{where}: `{key}` is {_named(record.get(key))}, where a string is expected")
        end = self._plain(self.tokenizer.special.get("eos_token", ""))
        if kinds == ["text"]:
            return [(self._opened(record["text"]) + end, True)]
        return [(self._opened(record["prompt"]), False), (self._plain(record["completion"]) + end, True)]

    def _chat(self, where: str, messages: Any) -> list[tuple[list[int], bool]]:
        """Render a conversation and mark the assistant's turns: the text a turn adds to the prompt before it.

        A piece is encoded by itself, as it is when the model is asked: it reads the prompt, then writes.
        """
        if not isinstance(messages, list) or not messages:
            raise InputError(
                f"{where}: `messages` is {_named(messages)}, where a list of messages is expected"
            )
        for message in messages:
            if not isinstance(message, dict) or not isinstance(message.get("role"), str):
                raise InputError(
                    f"{where}: a message is {_named(message)}, where `role` and `content` are expected"
                )
        try:
            whole = self.tokenizer.chat(messages)
            if self.loss_on == "all":
                return [(self.tokenizer.encode(whole, add_special_tokens=False), True)]
            pieces: list[tuple[list[int], bool]] = []
            done = 0
            for i, message in enumerate(messages):
                if message["role"] != "assistant":
                    continue
                prompt = self.tokenizer.chat(messages[:i], add_generation_prompt=True)
                answer = self.tokenizer.chat(messages[: i + 1])
                if not (whole.startswith(answer) and answer.startswith(prompt) and len(prompt) >= done):
                    raise InputError(
                        "the chat template writes earlier turns differently once later ones follow, "
                        "so the assistant's part can't be told apart; use --loss-on all"
                    )
                pieces += [
                    (self._plain(whole[done : len(prompt)]), False),
                    (self._plain(whole[len(prompt) : len(answer)]), True),
                ]
                done = len(answer)
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
        return [*pieces, (self._plain(whole[done:]), False)]

    def _opened(self, text: str) -> list[int]:
        """Return a text's tokens with what the tokenizer puts before one, such as a BOS, but no end."""
        ids = self.tokenizer.encode(text)
        return ids[:-1] if ids and ids[-1] in self.tokenizer.eos_ids else ids

    def _plain(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)


def windows(tokens: NDArray[np.int32], seq_len: int) -> list[Example]:
    """Cut tokens int32[n] into examples of seq_len positions, the last one short; targets are the next."""
    starts = range(0, len(tokens) - 1, seq_len)
    last = len(tokens) - 1  # the last token is only a target
    return [Example(tokens[i : min(i + seq_len, last)], tokens[i + 1 : i + seq_len + 1]) for i in starts]


def evenly(examples: list[Example], most: int) -> list[Example]:
    """Return at most so many examples, spread evenly over all; every one if most is 0."""
    if most <= 0 or len(examples) <= most:
        return examples
    return [examples[i * len(examples) // most] for i in range(most)]


def held_out(seed: int, count: int) -> NDArray[np.int64]:
    """Return the numbers of the examples held out of count, in the order they are drawn. NF4-10.8

    Raises InputError where there are fewer than two.
    """
    if count < 2:
        raise InputError(f"examples to hold some out of: {count}; there must be at least two")
    return random.permutation(seed, _SPLIT_EPOCH, count)[: max(1, count // _HELDOUT_SHARE)]


def ordering(
    lengths: Sequence[int], *, seed: int, batch_size: int, group_by_length: bool
) -> Callable[[int], int]:
    """Return the order of a run: the example that the n-th sequence of the whole run takes. NF4-10.8

    Each epoch is a permutation of its own, drawn from the seed and the epoch's number alone, so a run can
    be taken up at any step. group_by_length sorts every 50 batches of an epoch by length, longest first.
    """
    count = len(lengths)
    size = np.asarray(lengths)

    @lru_cache(maxsize=2)
    def epoch_order(epoch: int) -> NDArray[np.int64]:
        order = random.permutation(seed, epoch, count)  # int64[count]
        if not group_by_length:
            return order
        span = _MEGABATCH * batch_size
        pieces = [order[i : i + span] for i in range(0, count, span)]
        return np.concatenate([piece[np.argsort(-size[piece], kind="stable")] for piece in pieces])

    return lambda n: int(epoch_order(n // count)[n % count])


def _read(path: Path) -> bytes:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: the data can't be read: {error.strerror}") from None
    if not raw.strip():
        raise InputError(f"{path}: the file is empty; give text, or JSON lines (.jsonl)")
    return raw


def _decode(path: Path, raw: bytes) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: byte 0x{raw[error.start]:02x} at offset {error.start} is not UTF-8; convert the file"
        ) from None


def _named(value: Any) -> str:
    return "missing" if value is None else f"{value!r:.60}"
