"""Matrix products by cuBLASLt through ctypes: other matrices added, biases, any pitch."""

import ctypes
import math
from typing import Any

from nf4.floats import BFLOAT16, FLOAT32

from nf4_gpu.matrix import Matrix

WORKSPACE = 32 << 20  # bytes: what cuBLAS recommends on Hopper

_TYPES = {FLOAT32: 0, BFLOAT16: 14}  # cudaDataType
_COMPUTE_32F, _SCALE_32F = 68, 0
_TRANSA, _TRANSB, _EPILOGUE, _BIAS_POINTER = 3, 4, 7, 8  # cublasLtMatmulDescAttributes_t
_EPILOGUE_BIAS = 4
_WORKSPACE_BYTES, _ALIGNMENT_A = 1, 5  # cublasLtMatmulPreferenceAttributes_t; of B, C and D after that of A


class _Choice(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t."""

    _fields_ = (
        ("algorithm", ctypes.c_uint64 * 8),
        ("workspace", ctypes.c_size_t),
        ("state", ctypes.c_int),
        ("waves", ctypes.c_float),
        ("reserved", ctypes.c_int * 4),
    )


class Products:
    """The products of one device. The same shape gets the same algorithm and so the same bits."""

    def __init__(self) -> None:
        from cuda.pathfinder import load_nvidia_dynamic_lib

        self._library = ctypes.CDLL(load_nvidia_dynamic_lib("cublasLt").abs_path)
        self._handle = ctypes.c_void_p()
        self._call("cublasLtCreate", ctypes.byref(self._handle))
        self._plans: dict[tuple[Any, ...], _Plan] = {}

    def multiply(
        self,
        stream: int,
        workspace: int,
        a: Matrix,
        b: Matrix,
        out: Matrix,
        *,
        transpose_a: bool = False,
        transpose_b: bool = False,
        alpha: float = 1.0,
        add: Matrix | None = None,
        bias: int = 0,
    ) -> None:
        """Launch out = alpha op(a) op(b) + add + bias, summed in float32.

        op(a) is [m, k], op(b) [k, n], out and add [m, n]; add may be out. bias: the address of bfloat16 [n],
        or 0. workspace: the address of WORKSPACE bytes that this stream alone uses.
        """
        c = out if add is None else add
        alignments = tuple(math.gcd(x.address, 256) for x in (b, a, c, out))
        layouts = tuple((_TYPES[x.dtype], x.columns, x.rows, x.pitch) for x in (b, a, c, out))
        key = (layouts, transpose_a, transpose_b, bool(bias), alignments)
        plan = self._plans.get(key)
        if plan is None:
            plan = self._plans[key] = self._choose(layouts, transpose_a, transpose_b, bool(bias), alignments)
        if bias:
            pointer = ctypes.c_void_p(bias)
            self._set("MatmulDesc", plan.description, _BIAS_POINTER, pointer)
        one, two = ctypes.c_float(alpha), ctypes.c_float(0.0 if add is None else 1.0)
        self._call(
            "cublasLtMatmul",
            self._handle,
            plan.description,
            ctypes.byref(one),
            ctypes.c_void_p(b.address),
            plan.layouts[0],
            ctypes.c_void_p(a.address),
            plan.layouts[1],
            ctypes.byref(two),
            ctypes.c_void_p(c.address),
            plan.layouts[2],
            ctypes.c_void_p(out.address),
            plan.layouts[3],
            ctypes.byref(plan.choice.algorithm),
            ctypes.c_void_p(workspace),
            ctypes.c_size_t(WORKSPACE),
            ctypes.c_void_p(stream),
        )

    def _choose(
        self,
        layouts: tuple[tuple[int, int, int, int], ...],
        transpose_a: bool,
        transpose_b: bool,
        bias: bool,
        alignments: tuple[int, ...],
    ) -> "_Plan":
        """Describe a product as cuBLAS sees it, out^T = op(b)^T op(a)^T; take its first choice."""
        description = ctypes.c_void_p()
        self._call("cublasLtMatmulDescCreate", ctypes.byref(description), _COMPUTE_32F, _SCALE_32F)
        self._set("MatmulDesc", description, _TRANSA, ctypes.c_int32(transpose_b))
        self._set("MatmulDesc", description, _TRANSB, ctypes.c_int32(transpose_a))
        if bias:
            self._set("MatmulDesc", description, _EPILOGUE, ctypes.c_uint32(_EPILOGUE_BIAS))
        found = []
        for kind, rows, columns, pitch in layouts:
            layout = ctypes.c_void_p()
            sizes = ctypes.c_uint64(rows), ctypes.c_uint64(columns), ctypes.c_int64(pitch)
            self._call("cublasLtMatrixLayoutCreate", ctypes.byref(layout), kind, *sizes)
            found.append(layout)
        preference = ctypes.c_void_p()
        self._call("cublasLtMatmulPreferenceCreate", ctypes.byref(preference))
        self._set("MatmulPreference", preference, _WORKSPACE_BYTES, ctypes.c_uint64(WORKSPACE))
        for i, alignment in enumerate(alignments):
            self._set("MatmulPreference", preference, _ALIGNMENT_A + i, ctypes.c_uint32(alignment))
        choice, count = _Choice(), ctypes.c_int()
        self._call(
            "cublasLtMatmulAlgoGetHeuristic",
            self._handle,
            description,
            *found,
            preference,
            1,
            ctypes.byref(choice),
            ctypes.byref(count),
        )
        self._call("cublasLtMatmulPreferenceDestroy", preference)
        if count.value < 1 or choice.state:
            raise RuntimeError(f"cuBLASLt has no algorithm for the product {layouts}, {alignments}")
        return _Plan(description, found, choice)

    def _set(self, what: str, target: ctypes.c_void_p, attribute: int, value: Any) -> None:
        size = ctypes.c_size_t(ctypes.sizeof(value))
        self._call(f"cublasLt{what}SetAttribute", target, attribute, ctypes.byref(value), size)

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._library, name)(*arguments)
        if status:
            raise RuntimeError(f"{name} failed with cuBLAS status {status}")


class _Plan:
    def __init__(self, description: ctypes.c_void_p, layouts: list[ctypes.c_void_p], choice: _Choice) -> None:
        self.description, self.layouts, self.choice = description, layouts, choice
