"""CUDA C to machine code by NVRTC, kept on the disk, loaded once a device.

CuPy's own RawModule flushes subnormals whatever it is told, so it is not used: these options are the
specification's arithmetic (NF4-1.1, NF4-1.2).
"""

import hashlib
import os
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import cupy
from cupy_backends.cuda.api import driver
from cupy_backends.cuda.libs import nvrtc
from nf4.errors import InputError

ROOM = Path(__file__).parent
OPTIONS = (
    "--std=c++17",
    "--ftz=false",
    "--fmad=false",
    "--prec-div=true",
    "--prec-sqrt=true",
    "-default-device",
    "--ptxas-options=--verbose",  # registers, shared memory and spills, in the log
)
FUSED = frozenset(
    f"model/{name}.cu"
    for name in ("attention", "attention90", "generate", "lora", "norm", "ops", "rope", "vector")
)
"""Sources whose products and sums may be fused: they only need speed, and carry a tolerance."""
OF_ONE_ARCHITECTURE = frozenset(("hopper_many.cu", "model/attention90.cu"))
"""Sources with instructions that no other architecture has: compiled for sm_90a."""
OLDEST = 75
_SHARED_BY_DEFAULT = 16 << 10
_shared: dict[int, int] = {}
"""By kernel: the bytes of dynamic shared memory that it may have. It is launched with less as well."""
_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8  # CUfunction_attribute


def compile_kernels(
    source: str, arch: int, defines: Mapping[str, int], kind: str = "sm"
) -> tuple[bytes, str]:
    """Return the machine code of source, a file of this room, for an architecture such as 90, and the log.

    kind: "sm", or "compute" for PTX. Needs no GPU. Raises RuntimeError with the log where it is refused.
    """
    text = (ROOM / source).read_text("utf-8")
    headers = sorted(ROOM.rglob("*.cuh"))
    own = "a" if source in OF_ONE_ARCHITECTURE else ""
    given = (f"--gpu-architecture={kind}_{arch}{own}", *(f"-D{k}={v}" for k, v in defines.items()))
    options = (*options_of(source), *given)
    program = nvrtc.createProgram(
        text, source, tuple(h.read_bytes() for h in headers), tuple(_name(h) for h in headers)
    )
    try:
        nvrtc.compileProgram(program, options)
        code = nvrtc.getCUBIN(program) if kind == "sm" else nvrtc.getPTX(program)
        return bytes(code), str(nvrtc.getProgramLog(program))
    except nvrtc.NVRTCError as error:
        raise RuntimeError(f"{source} for sm_{arch}: {error}\n{nvrtc.getProgramLog(program)}") from error
    finally:
        nvrtc.destroyProgram(program)


def _name(header: Path) -> bytes:
    """What a source of any room includes it by."""
    return header.relative_to(ROOM).as_posix().encode()


def options_of(source: str) -> tuple[str, ...]:
    """Return the compiler's options for a source, but for architecture and defines."""
    if source not in FUSED:
        return OPTIONS
    return tuple("--fmad=true" if option == "--fmad=false" else option for option in OPTIONS)


@cache
def kernel(device: int, source: str, name: str, shared: int = 0, **defines: int) -> Any:
    """Return the kernel of that name, compiled with the defines, on the device.

    shared: the bytes of dynamic shared memory it will be launched with. Raises InputError where the GPU is
    older than sm_75.
    """
    function = _module(device, source, **defines).get_function(name)
    if shared > _shared.get(function.ptr, _SHARED_BY_DEFAULT):  # with what is static 48 KB, unasked
        driver.funcSetAttribute(function.ptr, _MAX_DYNAMIC_SHARED_SIZE_BYTES, shared)
        _shared[function.ptr] = shared
    return function


@cache
def _module(device: int, source: str, **defines: int) -> Any:
    arch = capability(device)
    if arch < OLDEST:
        raise InputError(
            f"GPU {device} is of compute capability {arch / 10}; 7.5 (Turing) or newer is needed"
        )
    module = cupy.cuda.function.Module()
    module.load(_cached(source, arch, defines))
    return module


def cache_directory() -> Path:
    """Return where compiled kernels are kept: $NF4_CACHE, or nf4/kernels in the user's cache directory."""
    chosen = os.environ.get("NF4_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nf4" / "kernels"


def _cached(source: str, arch: int, defines: Mapping[str, int]) -> bytes:
    key = hashlib.sha256(
        repr((nvrtc.getVersion(), options_of(source), arch, sorted(defines.items()))).encode()
    )
    for path in [ROOM / source, *sorted(ROOM.rglob("*.cuh"))]:
        key.update(path.read_bytes())
    file = cache_directory() / f"{Path(source).stem}-{key.hexdigest()[:32]}.cubin"
    try:
        return file.read_bytes()
    except OSError:
        code, _ = compile_kernels(source, arch, defines)
    try:  # a cache that can't be written costs a second a process, and is no reason to stop
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=file.parent)
        with os.fdopen(descriptor, "wb") as out:
            out.write(code)
        os.replace(temporary, file)
    except OSError:
        pass
    return code


@cache
def capability(device: int) -> int:
    """Return the compute capability of a device, 90 for 9.0."""
    return int(cupy.cuda.Device(device).compute_capability)


@cache
def shared_memory(device: int) -> int:
    """Return the bytes of shared memory that a thread block may have on a device."""
    return int(cupy.cuda.Device(device).attributes["MaxSharedMemoryPerBlockOptin"])


@cache
def processors(device: int) -> int:
    """Return the number of multiprocessors of a device."""
    return int(cupy.cuda.Device(device).attributes["MultiProcessorCount"])
