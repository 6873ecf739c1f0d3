"""Turns the Jargon File as Debian ships it into plain ASCII paragraphs, and cuts out the held-out piece."""

import re
import unicodedata

SOURCE = "jargon.txt of Debian's package jargon-text 4.4.7-4.1 (public domain)"
HELDOUT_BYTES = 65_536

_SPELLED = str.maketrans(
    {
        "‘": "'",
        "’": "'",
        "´": "'",
        "“": '"',
        "”": '"',
        "—": "--",
        "−": "-",
        "\xa0": " ",
        "→": "->",
        "←": "<-",
        "•": "*",
        "·": "*",
    }
)
_RULE = re.compile(r"[─═│┌┐└┘├┤┬┴┼]")


def ascii_text(text: str) -> str:
    """Spell typographic characters in ASCII and drop what has no spelling."""
    return unicodedata.normalize("NFKD", text.translate(_SPELLED)).encode("ascii", "ignore").decode("ascii")


def paragraphs(raw: str) -> str:
    """The body of the file (from the first chapter on), each paragraph on one line, tables left out."""
    body = raw[raw.rindex("Hacker Slang and Hacker Culture") :]
    blocks = (block for block in re.split(r"\n\s*\n", body) if not _RULE.search(block))
    lines = (" ".join(ascii_text(block).split()) for block in blocks)
    return "\n".join(line for line in lines if line) + "\n"


def split(raw: str) -> tuple[str, str]:
    """(training text, held-out text): the held-out piece is cut at line ends from the middle of the body."""
    text = paragraphs(raw)
    start = text.index("\n", len(text) // 2) + 1
    stop = text.index("\n", start + HELDOUT_BYTES) + 1
    return text[:start] + text[stop:], text[start:stop]
