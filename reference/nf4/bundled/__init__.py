"""The model and the texts that come with the package, so that `nf4 finetune` runs with no download."""

from pathlib import Path

_HERE = Path(__file__).parent

MODEL = _HERE / "model"
"""A byte-level Llama in float32 (Hugging Face directory), trained by `python -m nf4.bundled.train`."""

HELDOUT_TEXT = _HERE / "jargon-heldout.txt"
"""A piece of the Jargon File 4.4.7 (public domain) that the bundled model was not trained on."""

FINETUNE_TEXT = _HERE / "genesis.txt"
"""Genesis, King James Version (public domain), a verse a line: the text to fine-tune on."""
