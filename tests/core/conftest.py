"""The oracle lives with the conformance tests; the core's tests hold the codec against it too."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "conform"))
