"""Every kernel compiles for every architecture, without a GPU: no spills, nothing that exactness forbids."""

import importlib.util
import re
import shutil
import subprocess
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest
from nf4_gpu import hopper
from nf4_gpu.compile import FUSED, OF_ONE_ARCHITECTURE, ROOM, compile_kernels
from nf4_gpu.model import attention, ops
from nf4_gpu.train import run

HOPPER = 90
NEWEST_MEASURED = HOPPER  # where each combination is compiled; the other architectures get a few
OTHERS = (75, 80, 100, 120)
DTYPES = {"float32": 0, "float16": 1, "bfloat16": 2}
BLOCK_SIZES = (32, 64, 512, 4096)  # which differ in code
TILES = (1, 2, 4, 8)
FORBIDDEN = re.compile(r"\S*(?:\.ftz|\.approx|div\.full)\S*")
FUSED_INSTRUCTION = re.compile(r"\b(?:fma|mad)\.(?:r[nzmp]\.)?(?:f16|bf16|f32|f64)\S*")

EXACT = ("exact/elementary.cu", "exact/linear.cu", "exact/ops.cu", "train/exact.cu")
VALUED = ("exact/attention.cu", "exact/grid.cu")
SUMS_ON_GRIDS = {"fma.rn.f64"}
"""Where terms lie on grids no order and no fusion can be seen (NF4-14.3)."""

Case = tuple[str, int, dict[str, int]]


def cases() -> list[Case]:
    found: list[Case] = []
    for dtype, block, sums in product(DTYPES.values(), BLOCK_SIZES, ({}, {"SUM": 1})):
        found.append(("blockwise.cu", NEWEST_MEASURED, {"DTYPE": dtype, "BLOCK": block, **sums}))
    for dtype, block, tiles in product((1, 2), (32, 64), TILES):
        found.append(("product.cu", NEWEST_MEASURED, {"DTYPE": dtype, "BLOCK": block, "TILES": tiles}))
    found.append(("product.cu", NEWEST_MEASURED, {"DTYPE": 2, "BLOCK": 4096, "TILES": 1}))
    for dtype, rows, outputs in product((1, 2), (8, 16, 32, 64), (1024, 4096, 8192, 28672)):
        few = hopper.choose_few(min(rows, 16), outputs, 132).defines()
        found.append(("hopper_few.cu", HOPPER, {"DTYPE": dtype, "BLOCK": 64, **few}))
        many = hopper.choose_many(rows, outputs, 132).defines()
        found.append(("hopper_many.cu", HOPPER, {"DTYPE": dtype, "BLOCK": 64, **many}))
    for block in (128, 4096):
        found.append(("hopper_few.cu", HOPPER, {"DTYPE": 2, "BLOCK": block, "MT": 2, "TILES": 1}))
    for arch in OTHERS:
        for dtype, block in ((0, 64), (1, 4096), (2, 512)):
            found.append(("blockwise.cu", arch, {"DTYPE": dtype, "BLOCK": block, "SUM": 1}))
        if arch >= 80:
            found += [("product.cu", arch, {"DTYPE": 2, "BLOCK": 64, "TILES": tiles}) for tiles in TILES]
            found.append(("product.cu", arch, {"DTYPE": 2, "BLOCK": 64, "TILES": 2, "BUFFERS": 2}))
    for lanes, values in ((32, 1), (32, 20), (256, 16)):
        for dtype in DTYPES.values():
            defines = {"DTYPE": dtype, "LANES": lanes, "VALUES": values}
            found.append(("exact/grid.cu", NEWEST_MEASURED, defines))
    for lanes, values in ((32, 4), (32, 32), (256, 8), (256, 16)):
        found.append(("exact/attention.cu", NEWEST_MEASURED, {"DTYPE": 0, "LANES": lanes, "VALUES": values}))
    for arch in OTHERS:
        found += [(source, arch, {"DTYPE": 0, "LANES": 32, "VALUES": 16}) for source in VALUED]
    for arch in (NEWEST_MEASURED, *OTHERS):
        found += [(source, arch, {"DTYPE": 2}) for source in EXACT]
        found.append(("nested.cu", arch, {"DTYPE": 0}))
        found += [("random.cu", arch, {"DTYPE": dtype}) for dtype in DTYPES.values()]
        found += [("train/adamw.cu", arch, {"DTYPE": dtype}) for dtype in (0, 2)]
    for arch in (NEWEST_MEASURED, *OTHERS):
        if arch >= run.OLDEST:
            found += [(source, arch, defines) for source, defines in model_cases(arch)]
    return [case for i, case in enumerate(found) if case not in found[:i]]


def model_cases(arch: int) -> Iterator[tuple[str, dict[str, int]]]:
    """Yield the kernels of a model, as its launches define it; for most architectures a few."""
    both, all_ = (0, 1), arch == NEWEST_MEASURED
    yield "model/ops.cu", {"DTYPE": 2}
    yield "model/weights.cu", {"DTYPE": 2}
    for width in (64, 576, 4096, 8192) if all_ else (4096,):
        yield "model/norm.cu", {"DTYPE": 2, "WIDTH": width, "LANES": ops.norm_lanes(width)}
    for dim, norms in product((8, 24, 64, 128, 256) if all_ else (128,), both):
        yield "model/rope.cu", {"DTYPE": 2, "DIM": dim, "QK_NORM": norms}
        yield "model/rope.cu", {"DTYPE": 2, "DIM": dim, "QK_NORM": norms, "SHARES": 4}
        yield "model/generate.cu", {"DTYPE": 2, "GROUP": 4, "DIM": dim, "QK_NORM": norms}
    for dim, memory, shared in product((8, 24, 64, 96, 128, 256), (227, 163, 99), (False, True)):
        shape = attention.shape_for(dim, arch, memory << 10)
        if all_ or (dim in (64, 128) and memory == 99):
            for only in shape.passes:
                yield shape.source, shape.defined(only, shared)
    for dim in (64, 128) if all_ else ():  # as another device of this compute capability may have it
        yield "model/attention.cu", attention.shape_for(dim, 80, 163 << 10).defined()
    for pairs, warps, across in product((1, 2, 3, 4), (4, 8), both) if all_ else [(3, 4, 0), (4, 8, 1)]:
        yield "model/lora.cu", {"DTYPE": 2, "PAIRS": pairs, "WARPS": warps, "ACROSS": across}
    for narrow, width in product((8, 16, 48, 64), (576, 1024, 2048)) if all_ else [(16, 2048), (48, 2048)]:
        yield "model/norm_project.cu", ops.norm_defines(width, narrow)
    for slot in (8, 16):
        yield "model/mlp.cu", {"DTYPE": 2, "SLOT": slot}
    for prologue in range(3):
        yield "model/vector.cu", {"DTYPE": 2, "KIND": 1, "PROLOGUE": prologue}
        for warps, row, halves in ((16, 256, 0), (16, 256, 1), (8, 128, 1), (4, 64, 0)):
            cut = {"WARPS": warps, "TABLE_ROW": row, "HALVES": halves}
            yield "model/vector.cu", {"DTYPE": 2, "KIND": 0, "PROLOGUE": prologue, **cut}


def name(case: Case) -> str:
    source, arch, defines = case
    return f"{source}-{arch}-" + "-".join(f"{key}{value}" for key, value in defines.items())


_compiled: dict[str, tuple[bytes, str]] = {}


def compiled(case: Case) -> tuple[bytes, str]:
    """Machine code and log, once a case."""
    if name(case) not in _compiled:
        _compiled[name(case)] = compile_kernels(*case)
    return _compiled[name(case)]


@pytest.mark.parametrize("case", cases(), ids=name)
def test_a_kernel_compiles_without_spills(case: Case) -> None:
    code, log = compiled(case)
    assert code.startswith(b"\x7fELF")
    spilled = re.findall(r"(\d+) bytes spill", log)
    assert spilled, log
    assert set(spilled + re.findall(r"(\d+) bytes stack", log)) == {"0"}, log
    assert "serialized" not in log, log  # what ptxas says where warpgroup products wait for one another


@pytest.mark.parametrize(
    ("source", "arch", "defines"),
    [
        *(
            ("blockwise.cu", arch, {"DTYPE": dtype, "BLOCK": 64, "SUM": 1})
            for dtype in range(3)
            for arch in (75, 90)
        ),
        *(("random.cu", 90, {"DTYPE": dtype}) for dtype in range(3)),
        ("blockwise.cu", 90, {"DTYPE": 2, "BLOCK": 4096}),
        ("nested.cu", 75, {"DTYPE": 0}),
        ("nested.cu", 90, {"DTYPE": 0}),
        *((source, arch, {"DTYPE": 2}) for source in EXACT for arch in (75, 90)),
        *((source, 90, {"DTYPE": 2, "LANES": 32, "VALUES": 16}) for source in VALUED),
        ("model/weights.cu", 90, {"DTYPE": 2}),
        *(("train/adamw.cu", arch, {"DTYPE": dtype}) for dtype in (0, 2) for arch in (80, 90)),
    ],
)
def test_exact_kernels_neither_flush_nor_approximate_nor_fuse(
    source: str, arch: int, defines: dict[str, int]
) -> None:
    text = compile_kernels(source, arch, defines, "compute")[0].decode()
    assert ".entry" in text
    assert not FORBIDDEN.findall(text)
    allowed = SUMS_ON_GRIDS if source == "exact/linear.cu" else set()
    assert set(FUSED_INSTRUCTION.findall(text)) == allowed


COPYING = (
    "product.cu",
    "model/attention.cu",
    "model/attention90.cu",
    "model/lora.cu",
    "model/mlp.cu",
    "model/norm_project.cu",
    "model/vector.cu",
)


def disassembled() -> list[Case]:
    """All the kernels whose copies ptxas was seen to spoil, and one of each source and architecture."""
    found = [case for case in cases() if case[0] in ("model/vector.cu", "product.cu") and case[1] == HOPPER]
    return found + list({case[:2]: case for case in cases() if case not in found}.values())


@pytest.mark.parametrize("case", disassembled(), ids=name)
def test_addresses_are_such_as_there_are(case: Case, tmp_path: Path) -> None:
    """ptxas 13.0 spoils a copy to a lane's address plus an offset of the whole warp's.

    Descriptors are pairs of uniform registers from an even one on, and it writes an odd one.
    """
    code, _ = compiled(case)
    file = tmp_path / "kernel.cubin"
    file.write_bytes(code + b"\0")  # CuPy leaves the last byte away
    told = subprocess.run([disassembler(), "-c", file], capture_output=True, text=True, check=True).stdout
    assert "EXIT" in told
    if case[0] in COPYING and case[2].get("KIND") != 1:
        assert "LDGSTS" in told
    assert not re.findall(r".*desc\[UR\d*[13579]\].*", told)


def disassembler() -> str:
    """nvdisasm, from the package nvidia-cuda-nvdisasm or a toolkit; skip where there is none."""
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations or () if spec else ():
        for found in Path(folder).glob("*/bin/nvdisasm"):
            return str(found)
    return shutil.which("nvdisasm") or pytest.skip("there is no nvdisasm: pip install nvidia-cuda-nvdisasm")


@pytest.mark.parametrize("dtype", [1, 2])
@pytest.mark.parametrize(
    ("source", "defines", "instruction"),
    [
        ("product.cu", {"TILES": 2}, "mma.sync"),
        ("hopper_few.cu", {"MT": 4, "TILES": 1}, "mma.sync"),
        ("hopper_many.cu", hopper.choose_many(32, 8192, 132).defines(), "wgmma.mma_async"),
    ],
)
def test_products_neither_flush_nor_approximate(
    source: str, defines: dict[str, int], instruction: str, dtype: int
) -> None:
    text = compile_kernels(source, 90, {"DTYPE": dtype, "BLOCK": 64, **defines}, "compute")[0].decode()
    assert instruction in text
    assert not FORBIDDEN.findall(text)


@pytest.mark.parametrize("outputs", [1, 64, 1000, 4096, 8192, 28672, 128256])
@pytest.mark.parametrize("rows", [1, 9, 17, 33])
def test_what_hopper_is_given_fits_its_shared_memory(rows: int, outputs: int) -> None:
    most = 227 << 10
    assert hopper.choose_few(min(rows, 16), outputs, 132).shared_bytes() <= most
    many = hopper.choose_many(rows, outputs, 132)
    assert many.shared_bytes() <= most
    assert many.stages % many.along_columns == 0  # each stage stays with its warpgroups


def test_what_is_forbidden_is_found() -> None:
    assert FORBIDDEN.findall("\tmul.ftz.f32 %f1, %f2, %f3;\n\trcp.approx.f32 %f1, %f2;") == [
        "mul.ftz.f32",
        "rcp.approx.f32",
    ]
    assert FUSED_INSTRUCTION.findall("\tfma.rn.f32 %f1;\n\tmad.lo.s32 %r1;\n\tmad.f32 %f2;") == [
        "fma.rn.f32",
        "mad.f32",
    ]


def test_every_kernel_file_is_compiled_here() -> None:
    assert {source for source, _, _ in cases()} == {
        path.relative_to(ROOM).as_posix() for path in ROOM.rglob("*.cu")
    }
    assert {source for source, _, _ in cases()} >= FUSED | OF_ONE_ARCHITECTURE


def test_a_mistake_is_shown_with_the_compilers_words() -> None:
    with pytest.raises(RuntimeError, match=r"product.cu for sm_90.*\n.*error"):
        compile_kernels("product.cu", 90, {"DTYPE": 2, "BLOCK": 64})
