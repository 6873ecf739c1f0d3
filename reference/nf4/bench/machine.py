"""What a measurement was taken on: machine, date, versions, and the peak memory of this process."""

import importlib.metadata
import importlib.util
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from nf4.errors import InputError
from nf4.parallel import worker_threads


def describe(packages: Sequence[str]) -> dict[str, Any]:
    """Return date, machine (CPU model, cores, RAM in bytes) and the versions of nf4, NumPy and `packages`."""
    import psutil

    versions = {"python": platform.python_version(), "numpy": np.__version__}
    for name in ("nf4", *packages):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # a checkout that was never installed
            versions[name] = "not installed"
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {
            "cpu": cpu_model(),
            "cores": os.cpu_count(),
            "threads_allowed": worker_threads(),
            "ram_bytes": psutil.virtual_memory().total,
            "system": f"{platform.system()} {platform.machine()}",
        },
        "versions": versions,
    }


def cpu_model() -> str:
    """Return the name the CPU gives itself, or the architecture where the system does not tell."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def peak_bytes() -> int:
    """Return the largest resident size this process has had, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        # ru_maxrss survives exec, so a child would report its parent's peak; VmHWM starts afresh.
        for line in status.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def require(packages: Sequence[str], purpose: str) -> None:
    """Raise InputError with the command that installs what is missing, if any of `packages` is."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(
            f"{purpose} needs {', '.join(missing)}: install with  pip install '.[interop]'  in nf4's checkout"
        )


def run_module(module: str, arguments: Sequence[str]) -> str:
    """Run `python -m module arguments` as a fresh process and return its last line of output.

    Raises InputError with the process's own last words if it fails.
    """
    root = str(Path(__file__).parents[2])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"},
    )
    if done.returncode:
        words = done.stderr.strip().splitlines() or ["no message"]
        raise InputError(f"the measuring process {module} failed (exit {done.returncode}): {words[-1]}")
    return done.stdout.strip().splitlines()[-1]
