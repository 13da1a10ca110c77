"""Matrix products of a layer by cuBLASLt, planned once and run on a given stream, inside a captured graph too.

    forward          Z  = A W^T (+ b), and ReLU with its mask
    hidden_delta     out = Delta W, times the mask, and db of the layer below
    weight_gradient  dW = Delta^T A, and db of the layer

Arrays are row-major (m, N), a sample a row, and their rows may be longer than their width. cuBLASLt reads columns: a
row-major (r, c) array is a column-major (c, r) matrix, so each product below is computed as its transpose,

    Z^T = W A^T      out^T = W^T Delta^T      dW^T = A^T Delta

and what cuBLASLt adds to each row of its D, a bias, belongs to a column of ours.

All is asked and built when a `Product` is made; `run` is one call of the library. The numbers of the enumerations are
those of cublasLt.h and cublas_api.h of cuBLAS 12.9 and library_types.h of CUDA 13.0.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import math
import os
import threading
import weakref
from collections.abc import Callable, Sequence
from ctypes import POINTER, Structure, c_float, c_int, c_int64, c_size_t, c_uint32, c_uint64, c_void_p
from typing import Any, NamedTuple

import numpy as np

from .errors import BackendError

Array = Any

WORKSPACE_BYTES = 32 << 20  # what NVIDIA advises for Hopper; one workspace a stream
MOST_CANDIDATES = 8
ALIGNMENT = 256  # bytes: of a workspace, and the most that the heuristic asks about

# ----------------------------------------------------------------------------------------- what the headers call things

SUCCESS, ARCH_MISMATCH, NOT_SUPPORTED = 0, 8, 15
STATUS = {
    1: "NOT_INITIALIZED", 3: "ALLOC_FAILED", 7: "INVALID_VALUE", 8: "ARCH_MISMATCH", 11: "MAPPING_ERROR",
    13: "EXECUTION_FAILED", 14: "INTERNAL_ERROR", 15: "NOT_SUPPORTED", 16: "LICENSE_ERROR",
}  # fmt: skip
R_32F, R_64F, R_16BF = 0, 1, 14  # cudaDataType
COMPUTE_32F, COMPUTE_64F, COMPUTE_32F_FAST_TF32 = 68, 70, 77  # cublasComputeType_t
OP_N, OP_T = 0, 1
EPILOGUE = {
    "DEFAULT": 1, "RELU": 2, "RELU_AUX": 2 | 128, "BIAS": 4, "RELU_BIAS": 2 | 4, "RELU_AUX_BIAS": 2 | 128 | 4,
    "DRELU": 8 | 128, "DRELU_BGRAD": 8 | 128 | 16, "BGRADB": 512,
}  # fmt: skip


class Attribute(NamedTuple):
    """An attribute of a descriptor: its number and its type."""

    number: int
    type: Any


DESC_TRANSA, DESC_TRANSB = Attribute(3, c_int), Attribute(4, c_int)
DESC_EPILOGUE = Attribute(7, c_uint32)
DESC_BIAS_POINTER = Attribute(8, c_void_p)
DESC_AUX_POINTER = Attribute(11, c_void_p)
DESC_AUX_LD = Attribute(12, c_int64)  # of a ReLU mask: in bits
PREF_WORKSPACE = Attribute(1, c_uint64)
PREF_ALIGNMENTS = tuple(Attribute(number, c_uint32) for number in (5, 6, 7, 8))  # of A, B, C and D
CONFIG = {
    "id": Attribute(0, c_int), "tile": Attribute(1, c_uint32), "split_k": Attribute(2, c_int),
    "reduction": Attribute(3, c_uint32), "stages": Attribute(6, c_uint32), "cluster": Attribute(8, ctypes.c_uint16),
}  # fmt: skip


class Algo(Structure):
    """cublasLtMatmulAlgo_t: to be kept and handed back, not to be read."""

    _fields_ = (("data", c_uint64 * 8),)


class HeuristicResult(Structure):
    """cublasLtMatmulHeuristicResult_t."""

    _fields_ = (
        ("algo", Algo), ("workspace", c_size_t), ("state", c_int), ("waves", c_float), ("reserved", c_int * 4),
    )  # fmt: skip


_out = POINTER(c_void_p)
_SET = (c_void_p, c_int, c_void_p, c_size_t)  # descriptor, attribute, value, bytes
SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "cublasLtGetVersion": (c_size_t, ()),
    "cublasLtCreate": (c_int, (_out,)),
    "cublasLtDestroy": (c_int, (c_void_p,)),
    "cublasLtMatmulDescCreate": (c_int, (_out, c_int, c_int)),  # compute type, type of alpha and beta
    "cublasLtMatmulDescDestroy": (c_int, (c_void_p,)),
    "cublasLtMatmulDescSetAttribute": (c_int, _SET),
    "cublasLtMatrixLayoutCreate": (c_int, (_out, c_int, c_uint64, c_uint64, c_int64)),  # type, rows, columns, ld
    "cublasLtMatrixLayoutDestroy": (c_int, (c_void_p,)),
    "cublasLtMatmulPreferenceCreate": (c_int, (_out,)),
    "cublasLtMatmulPreferenceDestroy": (c_int, (c_void_p,)),
    "cublasLtMatmulPreferenceSetAttribute": (c_int, _SET),
    "cublasLtMatmulAlgoGetHeuristic": (  # handle, product, A, B, C, D, preference, how many at most, results, how many
        c_int, (*[c_void_p] * 7, c_int, POINTER(HeuristicResult), POINTER(c_int)),
    ),
    "cublasLtMatmulAlgoConfigGetAttribute": (c_int, (POINTER(Algo), c_int, c_void_p, c_size_t, POINTER(c_size_t))),
    "cublasLtMatmul": (  # handle, product, &alpha, A, layout, B, layout, &beta, C, layout, D, layout, algo, ...
        c_int, (*[c_void_p] * 14, c_size_t, c_void_p),
    ),
}  # fmt: skip


class CublasLtError(BackendError):
    """A call of cuBLASLt failed. `status` is its number, `name` its name in cublasStatus_t."""

    def __init__(self, function: str, status: int, of: str) -> None:
        self.function, self.status, self.of = function, status, of
        self.name = f"CUBLAS_STATUS_{STATUS[status]}" if status in STATUS else f"status {status}"
        super().__init__(
            f"{function} failed{of and f' for {of}'}: {self.name}",
            "look for an earlier CUDA error, or choose the CuPy rung: BACKPROP_GPU_EXECUTOR=eager",
        )

    def __reduce__(self) -> tuple[type[CublasLtError], tuple[str, int, str]]:
        return type(self), (self.function, self.status, self.of)


def _check(function: str, status: int, of: str = "") -> None:
    if status != SUCCESS:
        raise CublasLtError(function, status, of)


# ------------------------------------------------------------------------------------------------- finding the library


def _names() -> tuple[str, ...]:
    if os.name == "nt":
        return "cublasLt64_13.dll", "cublasLt64_12.dll"
    return "libcublasLt.so.13", "libcublasLt.so.12", "libcublasLt.so"


def load() -> Any:
    """The shared library; BackendError with the reasons where there is none.

    `cuda.pathfinder`, on which CuPy depends, knows where wheels and toolkits keep it and finds the one that is loaded
    already; then the system's own search.
    """
    reasons = []
    try:
        path = importlib.import_module("cuda.pathfinder").load_nvidia_dynamic_lib("cublasLt").abs_path
        return _declared(ctypes.CDLL(path))
    except Exception as e:  # its own exceptions derive from RuntimeError or not, by version
        reasons.append(f"cuda.pathfinder: {_first_line(e)}")
    for name in _names():
        try:
            return _declared(ctypes.CDLL(name))
        except (OSError, AttributeError) as e:
            reasons.append(_first_line(e))
    raise BackendError(
        f"no cuBLASLt library: {'; '.join(reasons)}",
        "install CuPy with its CUDA libraries, pip install 'cupy-cuda12x[ctk]' (or cuda13x), or a CUDA toolkit",
    )


def _first_line(e: BaseException) -> str:
    return next(iter(str(e).splitlines()), "") or type(e).__name__


def absent() -> str | None:
    """Why there is no cuBLASLt on this machine, None where there is one."""
    try:
        load()
    except BackendError as e:
        return e.cause
    return None


def _declared(dll: Any) -> Any:
    """The same library, its functions told what they take; AttributeError where it lacks one."""
    for name, (result, arguments) in SIGNATURES.items():
        function = getattr(dll, name)
        function.restype, function.argtypes = result, arguments
    return dll


# ------------------------------------------------------------------------------------------- what must be given back


class Owned:
    """Something that the library made, given back exactly once: by `close`, or when nothing refers to it any more."""

    def __init__(self, dll: Any, kind: str, *arguments: Any, of: str = "") -> None:
        made = c_void_p()
        _check(f"{kind}Create", getattr(dll, f"{kind}Create")(ctypes.byref(made), *arguments), of)
        self.pointer = c_void_p(made.value)  # its own object: prebuilt arguments hold on to it
        self.close = weakref.finalize(self, getattr(dll, f"{kind}Destroy"), made)
        self.close.atexit = False  # the end of the process frees it, and CUDA may be gone by then
        self._dll, self._kind, self._of = dll, kind, of

    def set(self, attribute: Attribute, value: Any) -> None:
        """Give an attribute its value."""
        held = attribute.type(value)
        function = f"{self._kind}SetAttribute"
        status = getattr(self._dll, function)(
            self.pointer, attribute.number, ctypes.addressof(held), ctypes.sizeof(held)
        )
        _check(function, status, self._of)


def _device_address(a: Array) -> int:
    return a.data.ptr


class Library:
    """cuBLASLt on the current device: one handle, of the thread that made it.

    `version` as cublasLtGetVersion tells it. The handle is destroyed by `close`, which closes the products too, or when
    nothing refers to it and no product is left; that waits for the device, so not while a stream captures.
    """

    def __init__(self, dll: Any = None, address: Callable[[Array], int] = _device_address) -> None:
        self.dll = load() if dll is None else _declared(dll)
        self.address = address
        self.version = int(self.dll.cublasLtGetVersion())
        self.handle = Owned(self.dll, "cublasLt")
        self.products: weakref.WeakSet[Product] = weakref.WeakSet()

    def close(self) -> None:
        """Close the products made with it, then the handle. Once more does no harm."""
        for product in list(self.products):
            product.close()
        self.handle.close()


_thread = threading.local()


def opened() -> Library:
    """This thread's Library on CuPy's current device; BackendError where the machine has none.

    Arrays of that device have been made on this thread, so its context is current.
    """
    import cupy as cp

    kept: dict[Any, Any] = _thread.__dict__
    device = cp.cuda.runtime.getDevice()
    if device not in kept:
        kept[device] = Library()
    return kept[device]


# ----------------------------------------------------------------------------------------------------- the products


class Precision(NamedTuple):
    """How numbers are multiplied: cuBLASLt's compute type, that of alpha, and what operands and results are stored as.

    NumPy has no bf16: such an operand is an array of uint16, the upper halves of float32 numbers.
    """

    compute: int
    scale: int
    operand: np.dtype[Any]
    result: np.dtype[Any]


_f32, _f64, _bits = np.dtype(np.float32), np.dtype(np.float64), np.dtype(np.uint16)
PRECISIONS = {
    "float32": Precision(COMPUTE_32F, R_32F, _f32, _f32),
    "tf32": Precision(COMPUTE_32F_FAST_TF32, R_32F, _f32, _f32),
    "bf16": Precision(COMPUTE_32F, R_32F, _bits, _f32),
    "float64": Precision(COMPUTE_64F, R_64F, _f64, _f64),
}
_TYPES = {_f32: R_32F, _f64: R_64F, _bits: R_16BF}


class Matrix(NamedTuple):
    """A row-major array as cuBLASLt is told of it, column-major: `rows` is its width, `ld` the length of its rows."""

    address: int
    type: int
    rows: int
    columns: int
    ld: int


class Plan(NamedTuple):
    """D = alpha op(A) op(B) and an epilogue, column-major. Addresses are 0 where there is nothing."""

    name: str
    precision: Precision
    A: Matrix
    B: Matrix
    D: Matrix
    transA: int
    transB: int
    epilogue: str
    bias: int = 0  # a vector of D.rows, read by *BIAS, written by *BGRAD; of D.columns, written by BGRADB
    mask: int = 0
    mask_ld: int = 0  # in bits
    alpha: float = 1.0
    workspace: int = 0
    workspace_bytes: int = 0


class Candidate(NamedTuple):
    """An algorithm on offer: the workspace that it needs and how often it fills the device."""

    workspace: int
    waves: float


class Product:
    """One product on fixed arrays, which it keeps alive; `run` it on a stream as often as wanted.

    `candidates`: the algorithms on offer, the one that is thought the fastest first and chosen. Where there are none
    `reason` says so (else it is None), and `run` raises. The arrays' shapes, rows and addresses are those of the time
    when it was made. It belongs to the thread and the device of its library.
    """

    def __init__(self, library: Library, plan: Plan, arrays: Sequence[Array] = ()) -> None:
        self.plan, self.arrays, self.lib = plan, tuple(arrays), library
        self.candidates: tuple[Candidate, ...] = ()
        self.chosen = 0
        self.reason: str | None = None
        self._arguments: tuple[Any, ...] = ()
        self._owned: list[Owned] = []
        self._matmul = library.dll.cublasLtMatmul
        p, real = plan, ctypes.c_double if plan.precision.scale == R_64F else c_float
        self._alpha, self._beta = real(plan.alpha), real(0)
        with contextlib.ExitStack() as undo:
            undo.callback(self.close)
            desc = self._make("cublasLtMatmulDesc", p.precision.compute, p.precision.scale)
            desc.set(DESC_TRANSA, p.transA)
            desc.set(DESC_TRANSB, p.transB)
            desc.set(DESC_EPILOGUE, EPILOGUE[p.epilogue])
            if p.bias:  # before asking: the heuristic reads the alignment of both
                desc.set(DESC_BIAS_POINTER, p.bias)
            if p.mask:
                desc.set(DESC_AUX_POINTER, p.mask)
                desc.set(DESC_AUX_LD, p.mask_ld)
            A, B, D = (
                self._make("cublasLtMatrixLayout", M.type, M.rows, M.columns, M.ld).pointer for M in (p.A, p.B, p.D)
            )
            self._layouts = A, B, D
            self._results = self._ask(desc)
            if self._results:
                self._head = (
                    library.handle.pointer, desc.pointer, _at(self._alpha), c_void_p(p.A.address), A,
                    c_void_p(p.B.address), B, _at(self._beta), c_void_p(p.D.address), D, c_void_p(p.D.address), D,
                )  # fmt: skip
                self._tail = c_void_p(p.workspace or None), c_size_t(p.workspace_bytes)
                self.choose(0)
                library.products.add(self)
                undo.pop_all()
            # else there is nothing to run, and nothing to hold

    def _make(self, kind: str, *arguments: Any) -> Owned:
        made = Owned(self.lib.dll, kind, *arguments, of=str(self))
        self._owned.append(made)
        return made

    def _ask(self, desc: Owned) -> list[HeuristicResult]:
        """What the heuristic offers; sets `candidates`, or `reason` where it offers nothing."""
        p, dll, (A, B, D) = self.plan, self.lib.dll, self._layouts
        preference = Owned(dll, "cublasLtMatmulPreference", of=str(self))
        try:
            preference.set(PREF_WORKSPACE, p.workspace_bytes)
            for attribute, M in zip(PREF_ALIGNMENTS, (p.A, p.B, p.D, p.D), strict=True):
                preference.set(attribute, _alignment(M.address))
            results, count = (HeuristicResult * MOST_CANDIDATES)(), c_int()
            status = dll.cublasLtMatmulAlgoGetHeuristic(
                self.lib.handle.pointer, desc.pointer, A, B, D, D, preference.pointer,
                MOST_CANDIDATES, results, ctypes.byref(count),
            )  # fmt: skip
        finally:
            preference.close()
        if status not in (SUCCESS, NOT_SUPPORTED, ARCH_MISMATCH):
            raise CublasLtError("cublasLtMatmulAlgoGetHeuristic", status, str(self))
        offered = list(results)[: count.value] if status == SUCCESS else []
        offered = [r for r in offered if r.state == SUCCESS and r.workspace <= p.workspace_bytes]
        self.candidates = tuple(Candidate(r.workspace, r.waves) for r in offered)
        if not offered:
            why = f": CUBLAS_STATUS_{STATUS[status]}" if status else ""
            self.reason = f"cuBLASLt {self.lib.version} offers no algorithm for {self}{why}"
        return offered

    def __str__(self) -> str:
        p = self.plan
        precision = next((name for name, precision in PRECISIONS.items() if precision == p.precision), "?")
        k = p.A.columns if p.transA == OP_N else p.A.rows
        lds = f"{p.A.ld}, {p.B.ld}, {p.D.ld}"
        return f"{p.name} {p.epilogue} {precision} m={p.D.rows} n={p.D.columns} k={k} ld={lds}"

    def choose(self, index: int) -> None:
        """Run `candidates[index]` from now on."""
        algo = self._results[range(len(self._results))[index]].algo
        self.chosen = index % len(self._results)
        self._arguments = *self._head, _at(algo), *self._tail

    def run(self, stream: int) -> None:
        """Queue the product on a stream (its pointer); nothing is allocated, so it may be captured."""
        if not self._arguments:
            raise self._nothing()
        status = self._matmul(*self._arguments, stream)
        if status != SUCCESS:
            raise CublasLtError("cublasLtMatmul", status, str(self))

    def _nothing(self) -> BackendError:
        return BackendError(self.reason or f"{self} is closed", "make it anew, or compute it with cupy.matmul")

    def config(self, index: int) -> dict[str, int]:
        """What is known of `candidates[index]`: its id, tile, split_k, ..., numbers of cublasLt.h."""
        algo, found = self._results[index].algo, {}
        for name, (number, kind) in CONFIG.items():
            value, written = kind(), c_size_t()
            status = self.lib.dll.cublasLtMatmulAlgoConfigGetAttribute(
                ctypes.byref(algo), number, ctypes.addressof(value), ctypes.sizeof(value), ctypes.byref(written)
            )
            if status == SUCCESS:  # older libraries do not know them all
                found[name] = value.value
        return found

    def time(self, measure: Callable[[Callable[[int], None]], float], first: int = 4) -> list[float]:
        """Measure the first candidates and choose the fastest, the earlier one of equals.

        `measure(run)` returns the time of a run, as `by_events` does. A candidate that fails takes for ever; if all
        fail, the last error is raised.
        """
        if not self._arguments:
            raise self._nothing()
        taken, error = [], None
        for index in range(min(first, len(self.candidates))):
            self.choose(index)
            try:
                taken.append(measure(self.run))
            except CublasLtError as e:
                taken.append(math.inf)
                error = e
        if error is not None and min(taken) == math.inf:
            raise error
        self.choose(taken.index(min(taken)))
        return taken

    def close(self) -> None:
        """Give the descriptors back. Once more does no harm; `run` raises from now on."""
        self._arguments = ()
        for owned in self._owned:
            owned.close()


def by_events(stream: Any, runs: int = 20, best_of: int = 5) -> Callable[[Callable[[int], None]], float]:
    """For `Product.time`: seconds a run on a CuPy stream, by CUDA events around `runs` of them; the least of all."""
    import cupy as cp

    def measure(run: Callable[[int], None]) -> float:
        start, stop = cp.cuda.Event(), cp.cuda.Event()
        times = []
        run(stream.ptr)  # the first run loads the kernel
        for _ in range(best_of):
            start.record(stream)
            for _ in range(runs):
                run(stream.ptr)
            stop.record(stream)
            stop.synchronize()
            times.append(cp.cuda.get_elapsed_time(start, stop) / 1000 / runs)
        return min(times)

    return measure


def _at(value: Any) -> c_void_p:
    return c_void_p(ctypes.addressof(value))


def _alignment(address: int) -> int:
    """The largest power of 2 that divides an address, at most 256."""
    return min(address & -address or ALIGNMENT, ALIGNMENT)


def mask_shape(m: int, N: int) -> tuple[int, int]:
    """The shape of the uint8 array that holds the mask of ReLU on (m, N): a bit an element, each row 16-byte lines.

    Element (i, j) is bit j % 8, counted from the lowest, of byte j // 8 of row i.
    """
    return m, -(-N // 128) * 16


def forward(
    library: Library, W: Array, A: Array, Z: Array, b: Array | None = None, relu: bool = False,
    mask: Array | None = None, *, alpha: float = 1.0, precision: str | None = None, workspace: Array | None = None,
) -> Product:  # fmt: skip
    """Z (m, N) = alpha A W^T + b, W (N, K), A (m, K), b (N,) or None; with `relu` max(Z, 0), and where Z > 0 in `mask`.

    `mask`: see `mask_shape`. `precision`: a key of PRECISIONS, None: that of the operands' dtype. `workspace`: uint8
    on the device, its size the limit. Other shapes or dtypes are a ValueError or TypeError. Of a NaN
    cuBLASLt's ReLU may make 0: divergence has to be looked for elsewhere, in theta say.
    """
    (N, K), (m, _) = W.shape, A.shape
    if mask is not None and not relu:
        raise ValueError("a mask is of ReLU, and there is none")
    how = _precision(precision, W)
    epilogue = "_".join(filter(None, ["RELU" * relu, "AUX" * (mask is not None), "BIAS" * (b is not None)]))
    plan = Plan(
        "forward", how,
        A=_matrix(library, "W", W, (N, K), how.operand), transA=OP_T,
        B=_matrix(library, "A", A, (m, K), how.operand), transB=OP_N,
        D=_matrix(library, "Z", Z, (m, N), how.result),
        epilogue=epilogue or "DEFAULT", bias=_vector(library, "b", b, N, how), alpha=alpha,
        **_mask(library, mask, m, N), **_space(library, workspace),
    )  # fmt: skip
    return Product(library, plan, (W, A, Z, b, mask, workspace))


def hidden_delta(
    library: Library, W: Array, Delta: Array, out: Array, mask: Array | None = None, db: Array | None = None,
    *, precision: str | None = None, workspace: Array | None = None,
) -> Product:  # fmt: skip
    """out (m, K) = mask ⊙ (Delta W), W (N, K), Delta (m, N); db (K,) = out 1, of the layer below.

    `mask` as `forward` of the layer below wrote it; db only with a mask: cuBLASLt sums its output in no other case.
    """
    (N, K), (m, _) = W.shape, Delta.shape
    if db is not None and mask is None:
        raise ValueError("cuBLASLt sums the columns of a product only with the mask of ReLU")
    how = _precision(precision, W)
    plan = Plan(
        "hidden_delta", how,
        A=_matrix(library, "W", W, (N, K), how.operand), transA=OP_N,
        B=_matrix(library, "Delta", Delta, (m, N), how.operand), transB=OP_N,
        D=_matrix(library, "out", out, (m, K), how.result),
        epilogue="DEFAULT" if mask is None else "DRELU" if db is None else "DRELU_BGRAD",
        bias=_vector(library, "db", db, K, how), **_mask(library, mask, m, K), **_space(library, workspace),
    )  # fmt: skip
    return Product(library, plan, (W, Delta, out, mask, db, workspace))


def weight_gradient(
    library: Library, Delta: Array, A: Array, dW: Array, db: Array | None = None, alpha: float = 1.0,
    *, precision: str | None = None, workspace: Array | None = None,
) -> Product:  # fmt: skip
    """dW (N, K) = alpha Delta^T A, Delta (m, N), A (m, K); db (N,) = Delta^T 1, of the same layer, with alpha 1 only.

    Whether alpha counts in db is not documented.
    """
    (m, N), (_, K) = Delta.shape, A.shape
    if db is not None and alpha != 1:
        raise ValueError("a db goes with alpha 1 only")
    how = _precision(precision, A)
    plan = Plan(
        "weight_gradient", how,
        A=_matrix(library, "A", A, (m, K), how.operand), transA=OP_N,
        B=_matrix(library, "Delta", Delta, (m, N), how.operand), transB=OP_T,
        D=_matrix(library, "dW", dW, (N, K), how.result),
        epilogue="DEFAULT" if db is None else "BGRADB", bias=_vector(library, "db", db, N, how), alpha=alpha,
        **_space(library, workspace),
    )  # fmt: skip
    return Product(library, plan, (Delta, A, dW, db, workspace))


# ------------------------------------------------------------------------------------ what is checked before cuBLASLt


def _precision(name: str | None, operand: Array) -> Precision:
    names = {_f32: "float32", _f64: "float64", _bits: "bf16"}
    name = names.get(operand.dtype) if name is None else name
    if name not in PRECISIONS:
        raise ValueError(f"no precision {name!r} for {operand.dtype}; known: {', '.join(PRECISIONS)}")
    return PRECISIONS[name]


def _matrix(library: Library, name: str, M: Array, shape: tuple[int, int], dtype: np.dtype[Any]) -> Matrix:
    """M as cuBLASLt sees it. ValueError or TypeError where it has another shape or dtype or gaps within its rows."""
    if M.shape != shape or 0 in shape:
        raise ValueError(f"{name} has shape {M.shape}, not {shape}, or nothing in it")
    if M.dtype != dtype:
        raise TypeError(f"{name} is {M.dtype}, not {dtype}")
    rows, width = shape
    step, within = M.strides
    ld, rest = divmod(step, dtype.itemsize) if rows > 1 else (width, 0)
    if rest or ld < width or (width > 1 and within != dtype.itemsize):
        raise ValueError(f"{name} is not row-major: strides {M.strides}, {dtype}")
    return Matrix(library.address(M), _TYPES[dtype], width, rows, ld)


def _vector(library: Library, name: str, v: Array | None, length: int, how: Precision) -> int:
    if v is None:
        return 0
    if v.shape != (length,) or (length > 1 and v.strides != (how.result.itemsize,)):
        raise ValueError(f"{name} has shape {v.shape}, not {(length,)}, or gaps")
    if v.dtype != how.result:
        raise TypeError(f"{name} is {v.dtype}, not {how.result}")
    return library.address(v)


def _mask(library: Library, mask: Array | None, m: int, N: int) -> dict[str, int]:
    if mask is None:
        return {}
    rows, width = mask_shape(m, N)
    if mask.dtype != np.uint8 or mask.shape != (rows, width) or not mask.flags.c_contiguous:
        raise ValueError(f"a mask is a C-contiguous uint8 array {(rows, width)}, not {mask.dtype} {mask.shape}")
    return {"mask": library.address(mask), "mask_ld": 8 * width}


def _space(library: Library, workspace: Array | None) -> dict[str, int]:
    if workspace is None:
        return {}
    address = library.address(workspace)
    if workspace.dtype != np.uint8 or not workspace.flags.c_contiguous or address % ALIGNMENT:
        raise ValueError(f"a workspace is a C-contiguous uint8 array at a {ALIGNMENT}-byte boundary")
    return {"workspace": address, "workspace_bytes": workspace.size}
