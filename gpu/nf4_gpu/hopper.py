"""Products of up to 64 rows on Hopper: launches of hopper_few.cu and hopper_many.cu."""

from threading import get_ident
from typing import Any, NamedTuple

import cupy
from cupy.cuda import runtime
from nf4.floats import FLOAT32
from nf4.nested import NESTED_BLOCK_SIZE, NestedAbsmax
from nf4.tensor import QuantizedTensor

from nf4_gpu.arrays import KINDS, address, scratch
from nf4_gpu.codebooks import tables
from nf4_gpu.compile import capability, processors
from nf4_gpu.launch import Call, TensorMap, launcher
from nf4_gpu.tensor import kept

ROWS = 64  # of x at most
_HOPPER = 90
_STEP, _CHUNK, _TABLE = 256, 64, 256 * 256  # as in hopper.cuh: columns, columns, bytes
_WARPS, _STAGES = 8, 2  # as in hopper_few.cu
_SMALL = 1 << 24  # elements of W up to which sixteen rows are few


class Few(NamedTuple):
    """What hopper_few.cu is compiled for."""

    sixteens: int  # of rows of W, in a thread block at a time
    tiles: int  # of eight rows of x

    def defines(self) -> dict[str, int]:
        """Return them as the source names them."""
        return {"MT": self.sixteens, "TILES": self.tiles}

    def shared_bytes(self) -> int:
        """Return the dynamic shared memory of a thread block."""
        depth, rows = min(self.sixteens, 2), 16 * self.sixteens
        ring = _WARPS * _STAGES * (depth * 16 * 128 + 8)
        scales = _WARPS * depth * 16 * 4 * 4
        return _TABLE + ring + scales + _WARPS // 2 * 8 * self.tiles * rows * 4


class Many(NamedTuple):
    """What hopper_many.cu is compiled for."""

    n: int  # rows of x at most
    along_rows: int  # warpgroups
    along_columns: int
    splits: int  # thread blocks that share the columns

    def defines(self) -> dict[str, int]:
        """Return them as the source names them."""
        groups = {"MG": self.along_rows, "KG": self.along_columns}
        return {"N": self.n, **groups, "SPLITS": self.splits, "STAGES": self.stages}

    @property
    def stages(self) -> int:
        """A multiple of along_columns: each stage stays with the same warpgroups."""
        if self.n < 32 and self.along_rows == 1:
            return 8
        return 3 if self.n * self.along_rows == 128 and self.along_columns == 1 else 4

    def shared_bytes(self) -> int:
        """Return the dynamic shared memory of a thread block."""
        rows = 64 * self.along_rows
        sums = self.along_columns * self.n * (rows + 4) * 4
        return _TABLE + max(self.stages * (rows * 128 + self.n * _STEP * 2 + 16), sums)


def multiply(x: cupy.ndarray, rows: int, q: QuantizedTensor, y: cupy.ndarray) -> bool:
    """Launch y [rows, out] = x [rows, in] W^T if these kernels take it; return whether they do."""
    if rows > ROWS or address(x) % 16:
        return False
    found = kept(q)
    calls, settled = found.calls, found.settled
    key = ("hopper", get_ident(), runtime.getDevice(), rows, x.dtype)
    call = calls.get(key)
    if call is None:
        if not _fits(x, q):
            return False
        call = calls[key] = _few(x, rows, q, y) if _are_few(rows, q) else _many(x, rows, q, y)
    # Before the kernel in front of it has ended, a product only reads W, which products don't write. Whatever
    # wrote W must have ended: so the first product with it on a stream waits.
    stream = cupy.cuda.get_current_stream()
    overlapping = stream.ptr in settled
    if not overlapping and not stream.is_capturing():  # what is captured waits for nothing yet
        settled.add(stream.ptr)
    source = address(x)
    if not _are_few(rows, q):
        arranged = scratch.take("arranged", _most_rows(rows) * q.shape[1], cupy.uint16)
        arrange = calls[(*key, "arrange")]
        arrange.values[0], arrange.values[3] = source, address(arranged)
        arrange(overlapping)
        source = address(arranged)
    call.values[1], call.values[6] = source, address(y)
    call(overlapping)
    return True


def _fits(x: cupy.ndarray, q: QuantizedTensor) -> bool:
    """16-bit rows of whole steps, W aligned, on a Hopper GPU."""
    outputs, inputs = q.shape
    absmax: Any = q.absmax
    nested = isinstance(absmax, NestedAbsmax)
    return bool(
        x.dtype != FLOAT32
        and 0 < inputs < 1 << 31
        and inputs % _STEP == 0
        and q.block_size >= _CHUNK
        and outputs < 1 << 31
        and address(q.codes) % 16 == 0
        and address(absmax.codes if nested else absmax) % (4 if nested else 16) == 0
        and capability(runtime.getDevice()) == _HOPPER
    )


def _are_few(rows: int, q: QuantizedTensor) -> bool:
    return rows <= 8 or (rows <= 16 and q.size <= _SMALL)


def _few(x: cupy.ndarray, rows: int, q: QuantizedTensor, y: cupy.ndarray) -> Call:
    device = runtime.getDevice()
    few = choose_few(rows, q.shape[0], processors(device))
    name, scales, defines = _scales(q)
    defines |= {"DTYPE": KINDS[x.dtype], **few.defines()}
    function = launcher(device, "hopper_few.cu", "few" + name, few.shared_bytes(), **defines)
    grid = min(processors(device), -(-q.shape[0] // (16 * few.sixteens)))
    codes = _tensor_map(q, 16 * min(few.sixteens, 2))
    values = tables(device, q.codebook).values
    return function.prepare((grid, 1), 32 * _WARPS, (codes, x, rows, *q.shape[::-1], values, y, *scales))


def _many(x: cupy.ndarray, rows: int, q: QuantizedTensor, y: cupy.ndarray) -> Call:
    """The product; the call that arranges x for it is kept with q."""
    device = runtime.getDevice()
    outputs, inputs = q.shape
    many = choose_many(rows, outputs, processors(device))
    name, scales, defines = _scales(q)
    defines |= {"DTYPE": KINDS[x.dtype], **many.defines()}
    arrange = launcher(device, "hopper_many.cu", "arrange", **defines)
    warps = many.n * inputs // _CHUNK
    key = ("hopper", get_ident(), device, rows, x.dtype, "arrange")
    kept(q).calls[key] = arrange.prepare((warps // 8, 1), 256, (x, rows, inputs, 0))
    function = launcher(device, "hopper_many.cu", "many" + name, many.shared_bytes(), **defines)
    threads = 128 * many.along_rows * many.along_columns + 32
    grid = (-(-outputs // (64 * many.along_rows)), many.splits)
    codes = _tensor_map(q, 64 * many.along_rows)
    values = tables(device, q.codebook).values
    return function.prepare(grid, threads, (codes, 0, rows, inputs, outputs, values, y, *scales))


def _scales(q: QuantizedTensor) -> tuple[str, tuple[Any, ...], dict[str, int]]:
    """The end of a kernel's name for q's absmax, its arguments and what it is compiled for."""
    absmax: Any = q.absmax
    defines = {"BLOCK": q.block_size}
    if not isinstance(absmax, NestedAbsmax):
        return "", (absmax,), defines
    if absmax.block_size != NESTED_BLOCK_SIZE:
        defines["NESTED_BLOCK"] = absmax.block_size
    return "_double", (absmax.codes, absmax.absmax, absmax.offset, absmax.map), defines


def choose_few(rows: int, outputs: int, multiprocessors: int) -> Few:
    """The rows of W of a thread block with which the multiprocessor that has most to do has least."""
    tiles = 1 if rows <= 8 else 2

    def cost(sixteens: int) -> float:
        turns = -(-outputs // (16 * sixteens * multiprocessors))
        return turns * sixteens * {1: 1.25, 2: 1.05, 4: 1.0}[sixteens]  # as measured of equal work

    return Few(min((4, 2, 1), key=cost), tiles)


def choose_many(rows: int, outputs: int, multiprocessors: int) -> Many:
    """Likewise; where it makes no difference, more rows of W for what is read of many rows of x."""
    n = _most_rows(rows)
    shapes = {16: ((1, 4), (2, 2), (4, 1)), 32: ((2, 2), (1, 2), (4, 1)), 64: ((1, 2), (2, 1))}[n]
    choices = [Many(n, *shape, splits) for shape in shapes for splits in (1, 2)]

    def cost(many: Many) -> float:
        blocks = -(-outputs // (64 * many.along_rows)) * many.splits
        return -(-blocks // multiprocessors) * (many.along_rows / many.splits + 0.3)

    return min(choices, key=cost)


def _most_rows(rows: int) -> int:
    """Of those that hopper_many.cu is compiled for."""
    return 16 if rows <= 16 else 32 if rows <= 32 else 64


def _tensor_map(q: QuantizedTensor, box_rows: int) -> TensorMap:
    """The map of q's codes, kept with q."""
    maps = kept(q).maps
    if box_rows not in maps:
        outputs, inputs = q.shape
        maps[box_rows] = TensorMap(address(q.codes), outputs, inputs // 2, box_rows)
    return maps[box_rows]
