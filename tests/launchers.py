"""The mpiruns that tests start ranks with."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

SOURCES = [str(Path(__file__).parents[1] / room) for room in ("reference", "gpu")]
MAIN = "from nf4.cli import main; main()"


class Mpi:
    """An mpirun, and what runs under it."""

    def __init__(self, flavor: str, mpirun: Path, library: Path | None) -> None:
        self.flavor, self._mpirun, self._library = flavor, mpirun, library

    def command(self, ranks: int, *arguments: object) -> list[str]:
        # Tests are run as root, and on fewer processors than ranks.
        extra = ["--allow-run-as-root", "--oversubscribe"] if self.flavor == "Open MPI" else []
        return [str(self._mpirun), *extra, "-n", str(ranks), *map(str, arguments)]

    def environment(self) -> dict[str, str]:
        paths = [*SOURCES, *filter(None, [os.environ.get("PYTHONPATH")])]
        more = {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        if self._library is not None:
            more["MPI4PY_LIBMPI"] = str(self._library)
        return {**os.environ, **more, "PATH": f"{self._mpirun.parent}:{os.environ['PATH']}"}

    def start(self, *command: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            command, env=self.environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def nf4(self, ranks: int, *arguments: object) -> "subprocess.CompletedProcess[str]":
        """Run a command of nf4 on so many ranks."""
        return self.python(ranks, "-c", MAIN, *arguments)

    def python(self, ranks: int, *arguments: object) -> "subprocess.CompletedProcess[str]":
        command = self.command(ranks, sys.executable, *arguments)
        return subprocess.run(
            command, env=self.environment(), capture_output=True, text=True, check=False, timeout=120
        )


def found() -> dict[str, Mpi]:
    """The MPIs there are: that of this Python's environment, MPICH beside it, and the system's."""
    mpis: dict[str, Mpi] = {}
    prefix = Path(sys.prefix)
    places = [(prefix / "bin/mpirun", None), (prefix / "mpich/bin/mpirun", prefix / "mpich/lib/libmpi.so.12")]
    if system := shutil.which("mpirun"):
        places.append((Path(system), None))
    for mpirun, library in places:
        if mpirun.exists():
            says = subprocess.run([mpirun, "--version"], capture_output=True, text=True, check=False).stdout
            flavor = "Open MPI" if "Open MPI" in says else "MPICH" if "HYDRA" in says else ""
            mpis.setdefault(flavor, Mpi(flavor, mpirun, library))
    return mpis
