"""What cuBLASLt offers for a layer's products on this card: algorithms, the kernels that each one runs, time, error.

    python -m benchmarks.gpu_cublaslt [FILE]              a line of JSON a result
    python -m benchmarks.gpu_cublaslt --steps [FILE]      the same, of whole training steps

Each algorithm of each product is run and compared with float64, run again for equal bits, captured in a CUDA graph for
the nodes that it puts there, and timed: a graph of LAUNCHES runs between two events, the best of REPEATS. What fails is
told with "error", what is not on offer with "reason", and the next one follows.

`--steps` tells from which width and batch on a training step is faster with its products by cuBLASLt than with kernels
of its own: each of STEPS in a graph of 16 both ways, once more with algorithms that were chosen by time, and with
weight gradients on a branch of the graph; and the error of the gradient.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import functools
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

import backprop_gpu as bp
from backprop_gpu import BackendError, cublaslt, executors, plan
from backprop_gpu.backend import to_host
from backprop_gpu.costs import choose_cost
from backprop_gpu.cublaslt import PRECISIONS, WORKSPACE_BYTES, Library, Product, mask_shape
from backprop_gpu.inputs import Samples
from backprop_gpu.regularization import Regularization

from .gpu_recipe import printed

LAUNCHES, REPEATS = 10, 3
SHAPES = (  # m, K, N; those that matter most first
    (1024, 784, 512), (1024, 512, 512), (8192, 2048, 2048), (8192, 784, 2048), (128, 784, 512),
)  # fmt: skip
OFF_BOUNDARY = (1024, 512, 512), (64, 16, 4)  # this shape also with arrays at boundaries of no more than these bytes
EPILOGUES = {  # what a product is asked to do besides, as arguments that are there
    "forward": ("", "b", "b relu", "b relu mask"),
    "hidden_delta": ("", "mask", "mask db"),
    "weight_gradient": ("", "db"),
}
STEPS = tuple(
    ((784, w, w, 10), m)
    for w, m in (
        (512, 1024),
        (512, 8192),
        (1024, 1024),
        (1024, 4096),
        (2048, 1024),
        (2048, 8192),
        (256, 4096),
        (512, 256),
    )
)
ARITHMETIC = {"float32": "tf32x2", "tf32": "tf32", "bf16": "bf16", "float64": "ffma"}  # of our own kernels


class Way(NamedTuple):
    """To make a step: with cuBLASLt or without, of how many algorithms, dW on a branch."""

    cublaslt: bool
    timed: int = 1
    forked: bool = False


WAYS = (Way(False), Way(True), Way(True, timed=cublaslt.MOST_CANDIDATES), Way(True, forked=True))
A_GRAPH = 16  # steps
LIMITS = {"float32": 2e-5, "tf32": 4e-3, "bf16": 2e-2, "float64": 1e-12}  # error over the norm of the exact result

Emit = Callable[[dict[str, Any]], None]
Run = Callable[[int], None]


class Nodes(NamedTuple):
    """What one run puts into a graph: how many kernels, their names, how many nodes of other types, by number."""

    kernels: int
    names: list[str]
    others: dict[str, int]


class _KernelNodeParams(ctypes.Structure):
    """CUDA_KERNEL_NODE_PARAMS_v2 of cuda.h."""

    _fields_ = (
        ("func", ctypes.c_void_p), ("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint), ("parameters", ctypes.c_void_p), ("extra", ctypes.c_void_p),
        ("kernel", ctypes.c_void_p), ("context", ctypes.c_void_p),
    )  # fmt: skip


class Card:
    """CuPy's current device, a stream and a workspace on it."""

    def __init__(self) -> None:
        import cupy

        self.xp = cupy
        self.stream = cupy.cuda.Stream(non_blocking=True)
        self.workspace = self.at_boundary((WORKSPACE_BYTES,), np.dtype(np.uint8), 256)
        self.lib: Library = cublaslt.opened()
        self.driver: Any = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")

    def to_device(self, a: np.ndarray) -> Any:
        """A copy on the device."""
        return self.xp.asarray(a)

    def at_boundary(self, shape: tuple[int, ...], dtype: np.dtype[Any], boundary: int) -> Any:
        """An array of 0xFF bytes (floats: NaN) at a boundary of so many bytes, and below 256 of no more."""
        size = int(np.prod(shape)) * dtype.itemsize
        raw = self.xp.full(size + 512, 0xFF, np.uint8)
        start = -raw.data.ptr % 256 + (boundary if boundary < 256 else 0)
        return raw[start : start + size].view(dtype).reshape(shape)

    def synchronize(self) -> None:
        """Wait for the device: arrays are filled on another stream than products run on."""
        self.xp.cuda.Device().synchronize()

    def _captured(self, run: Run, times: int) -> int:
        """A graph (cudaGraph_t) of so many runs. CuPy's own Graph does not say what is in it."""
        runtime = self.xp.cuda.runtime
        runtime.streamBeginCapture(self.stream.ptr, runtime.streamCaptureModeRelaxed)
        try:
            for _ in range(times):
                run(self.stream.ptr)
        finally:
            graph = runtime.streamEndCapture(self.stream.ptr)
        return graph

    def nodes(self, run: Run) -> Nodes:
        """What one run is made of."""
        graph = self._captured(run, 1)
        try:
            return self._nodes(graph)
        finally:
            self.xp.cuda.runtime.graphDestroy(graph)

    def _nodes(self, graph: int) -> Nodes:
        handle, count, kind = ctypes.c_void_p(graph), ctypes.c_size_t(), ctypes.c_int()
        self._driver("cuGraphGetNodes", handle, None, ctypes.byref(count))
        nodes = (ctypes.c_void_p * count.value)()
        self._driver("cuGraphGetNodes", handle, nodes, ctypes.byref(count))
        names, others = [], collections.Counter[str]()
        for node in nodes:
            self._driver("cuGraphNodeGetType", ctypes.c_void_p(node), ctypes.byref(kind))
            if kind.value == 0:  # CU_GRAPH_NODE_TYPE_KERNEL
                names.append(self._kernel_name(node or 0))
            else:
                others[str(kind.value)] += 1
        return Nodes(len(names), names, dict(others))

    def _kernel_name(self, node: int) -> str:
        told, name = _KernelNodeParams(), ctypes.c_char_p()
        try:
            self._driver("cuGraphKernelNodeGetParams_v2", ctypes.c_void_p(node), ctypes.byref(told))
            if told.func:
                self._driver("cuFuncGetName", ctypes.byref(name), ctypes.c_void_p(told.func))
            else:
                self._driver("cuKernelGetName", ctypes.byref(name), ctypes.c_void_p(told.kernel))
        except (RuntimeError, AttributeError) as e:  # a driver that is older than these functions
            return f"unknown: {e}"
        return (name.value or b"").decode()

    def _driver(self, function: str, *arguments: Any) -> None:
        if status := getattr(self.driver, function)(*arguments):
            raise RuntimeError(f"{function}: {status}")

    def seconds(self, run: Run) -> float:
        """Device time of one run within a graph."""
        runtime = self.xp.cuda.runtime
        graph = self._captured(run, LAUNCHES)
        try:
            launchable = runtime.graphInstantiate(graph)
        finally:
            runtime.graphDestroy(graph)
        try:
            return self._best(lambda: runtime.graphLaunch(launchable, self.stream.ptr))
        finally:
            self.stream.synchronize()
            runtime.graphExecDestroy(launchable)

    def eager_seconds(self, call: Callable[[], Any]) -> float:
        """Device time of a call of CuPy on the stream, LAUNCHES of them queued one after the other."""
        with self.stream:
            return self._best(lambda: [call() for _ in range(LAUNCHES)])

    def _best(self, launch: Callable[[], Any]) -> float:
        start, stop = self.xp.cuda.Event(), self.xp.cuda.Event()
        launch()  # the first one uploads
        times = []
        for _ in range(REPEATS):
            start.record(self.stream)
            launch()
            stop.record(self.stream)
            stop.synchronize()
            times.append(self.xp.cuda.get_elapsed_time(start, stop) / 1000 / LAUNCHES)
        return min(times)


class Problem(NamedTuple):
    """A product, the exact value of each array that it writes, what it asks besides, and its operands for CuPy."""

    name: str
    extras: str
    product: Callable[[], Product]
    written: dict[str, tuple[Any, Any]]  # name -> (array, exact in float64)
    mask: tuple[Any, Any] | None  # the mask that it writes, exact Z
    plain: Callable[[], Any] | None  # the bare product, by cupy.matmul


def to_bf16(a: Any) -> Any:
    """The upper halves of float32 numbers, rounded to the nearest, ties to even, as uint16."""
    bits = a.view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)


def on_bits(xp: Any, mask: Any, N: int) -> Any:
    """The elements of a mask, (m, N) booleans."""
    j = xp.arange(N)
    return ((mask[:, j // 8] >> (j % 8).astype(np.uint8)) & 1).astype(bool)


def problems(card: Any, m: int, K: int, N: int, precision: str, boundary: int = 256) -> Iterator[Problem]:
    """The products of a layer of N units below which are K, on a batch of m, in each of their forms.

    Operands are drawn as float32, and the exact results are those of the numbers before they are rounded any further.
    """
    xp, how = card.xp, PRECISIONS[precision]
    rng = np.random.default_rng(m + K + N)

    def operand(*shape: int) -> tuple[Any, Any]:
        """What the product reads, and the same in float64 before it was rounded to bf16."""
        values = card.to_device(rng.standard_normal(shape, np.float32))
        stored = card.at_boundary(shape, how.operand, boundary)
        stored[...] = to_bf16(values) if precision == "bf16" else values
        return stored, values.astype(np.float64)

    def empty(*shape: int, dtype: Any = how.result) -> Any:
        return card.at_boundary(shape, np.dtype(dtype), 256 if dtype == np.uint8 else boundary)

    (W, w), (A, a), (Delta, delta) = operand(N, K), operand(m, K), operand(m, N)
    b = empty(N)
    b[...] = card.to_device(rng.standard_normal(N)).astype(how.result)
    on = card.to_device(rng.random((m, K)) < 0.5)
    mask_below = empty(*mask_shape(m, K), dtype=np.uint8)
    padded = np.zeros((m, 8 * mask_below.shape[1]), np.uint8)
    padded[:, :K] = on.get() if hasattr(on, "get") else on
    mask_below[...] = card.to_device(np.packbits(padded, axis=1, bitorder="little"))
    arguments: dict[str, Any] = {"precision": precision, "workspace": card.workspace}

    def plain(X: Any, Y: Any, out: Any) -> Callable[[], Any] | None:
        return (lambda: xp.matmul(X, Y, out=out)) if precision in ("float32", "float64") else None

    z = a @ w.T
    for extras in EPILOGUES["forward"]:
        Z, mask = empty(m, N), empty(*mask_shape(m, N), dtype=np.uint8) if "mask" in extras else None
        bias, relu = b if "b" in extras else None, "relu" in extras
        exact = z if bias is None else z + bias
        yield Problem(
            "forward", extras,
            functools.partial(cublaslt.forward, card.lib, W, A, Z, bias, relu, mask, **arguments),
            {"Z": (Z, xp.maximum(exact, 0) if relu else exact)},
            None if mask is None else (mask, exact),
            None if extras else plain(A, W.T, Z),
        )  # fmt: skip
    d = delta @ w
    for extras in EPILOGUES["hidden_delta"]:
        out, mask = empty(m, K), mask_below if "mask" in extras else None
        db = empty(K) if "db" in extras else None
        exact = d if mask is None else d * on
        written = {"out": (out, exact)} | ({} if db is None else {"db": (db, exact.sum(axis=0))})
        yield Problem(
            "hidden_delta", extras,
            functools.partial(cublaslt.hidden_delta, card.lib, W, Delta, out, mask, db, **arguments),
            written, None, None if extras else plain(Delta, W, out),
        )  # fmt: skip
    g = delta.T @ a
    for extras in EPILOGUES["weight_gradient"]:
        dW, db = empty(N, K), empty(N) if "db" in extras else None
        written = {"dW": (dW, g)} | ({} if db is None else {"db": (db, delta.sum(axis=0))})
        yield Problem(
            "weight_gradient", extras,
            functools.partial(cublaslt.weight_gradient, card.lib, Delta, A, dW, db, **arguments),
            written, None, None if extras else plain(Delta.T, A, dW),
        )  # fmt: skip


def compare(card: Any, problem: Problem, precision: str) -> dict[str, Any]:
    """The error of each array, over the norm of the exact one, and how many bits of the mask are wrong."""
    xp, found = card.xp, {}
    for name, (array, exact) in problem.written.items():
        found[f"error_{name}"] = float(xp.linalg.norm((array - exact).ravel()) / xp.linalg.norm(exact.ravel()))
    right = all(error <= LIMITS[precision] for error in found.values())  # a NaN is not
    if problem.mask is not None:
        mask, exact = problem.mask
        near = LIMITS[precision] * float(xp.abs(exact).max())  # rounding may carry these over zero
        wrong = (on_bits(xp, mask, exact.shape[1]) != (exact > 0)) & (xp.abs(exact) > near)
        found["mask_wrong"] = int(wrong.sum())
        right = right and found["mask_wrong"] == 0
    return found | {"right": right}


def algorithms(card: Any, problem: Problem, precision: str) -> Iterator[dict[str, Any]]:
    """One result for each algorithm on offer, or one with the reason why there is none."""
    product = problem.product()
    if product.reason is not None:
        yield {"reason": product.reason}
        return
    for index, candidate in enumerate(product.candidates):
        told: dict[str, Any] = {"candidate": index, "of": len(product.candidates), **candidate._asdict()}
        try:
            product.choose(index)
            told["config"] = product.config(index)
            for array, _ in problem.written.values():
                array.fill(np.nan)
            if problem.mask is not None:
                problem.mask[0].fill(0xFF)
            card.synchronize()
            product.run(card.stream.ptr)
            card.synchronize()
            told |= compare(card, problem, precision)
            first = [array.copy() for array, _ in problem.written.values()]
            card.synchronize()
            product.run(card.stream.ptr)
            card.synchronize()
            pairs = zip(first, problem.written.values(), strict=True)
            told["same_bits"] = all(bool((a == b).all()) for a, (b, _) in pairs)
            told |= card.nodes(product.run)._asdict()
            told["us"] = 1e6 * card.seconds(product.run)
        except Exception as e:  # told, and the next one may do
            told["error"] = f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}"
        yield told
    product.close()


def probe(
    emit: Emit, card: Any = None, shapes: Any = SHAPES, precisions: Any = tuple(PRECISIONS), seconds: float = 600
) -> bool:
    """All products, each result one dict passed to `emit`; whether every algorithm was right and ran.

    `card`: what runs them, None: CuPy's current device. BackendError where there is no cuBLASLt. What is not begun
    within so many seconds is told with "skipped".
    """
    end = time.monotonic() + seconds
    card = Card() if card is None else card
    emit({"what": "cublaslt version", "version": card.lib.version})
    every = [(shape, precision, 256) for shape in shapes for precision in precisions]
    off = [(OFF_BOUNDARY[0], precision, boundary) for precision in precisions for boundary in OFF_BOUNDARY[1]]
    every += [one for one in off if one[0] in shapes and one[2] >= PRECISIONS[one[1]].result.itemsize]
    fine = True
    for (m, K, N), precision, boundary in every:
        if time.monotonic() < end:
            fine &= _one(emit, card, (m, K, N), precision, boundary)
        else:
            where = {"precision": precision, "m": m, "K": K, "N": N, "boundary": boundary}
            emit({"what": "cublaslt", **where, "skipped": "no time left"})
    return fine


def _one(emit: Emit, card: Any, shape: tuple[int, int, int], precision: str, boundary: int) -> bool:
    m, K, N = shape
    fine = True
    here: dict[str, Any] = {"precision": precision, "m": m, "K": K, "N": N, "boundary": boundary}
    for problem in problems(card, m, K, N, precision, boundary):
        what = {"operation": problem.name, "with": problem.extras, **here}
        try:
            for result in algorithms(card, problem, precision):
                if "us" in result:
                    result["tflops"] = 2e-6 * m * K * N / result["us"]
                fine &= "error" not in result and result.get("right", True)
                emit({"what": "cublaslt", **what, **result})
            if problem.plain is not None and boundary == 256:
                us = 1e6 * card.eager_seconds(problem.plain)
                emit({"what": "cupy.matmul", **what, "us": us, "tflops": 2e-6 * m * K * N / us})
        except BackendError as e:
            fine = False
            emit({"what": "cublaslt", **what, "error": e.cause})
    return fine


def steps(emit: Emit, networks: Any = STEPS, precisions: Any = tuple(ARITHMETIC)) -> bool:
    """Training steps with and without cuBLASLt, each result one dict passed to `emit`; whether all of them ran.

    "error" is that of the gradient, over its norm, from float64: what plain SGD moves theta by, so 1e-6 at the least
    in float32.
    """
    fine = True
    for layers, m in networks:
        exact = None
        for precision in sorted(precisions, key="float64".__ne__):
            for way in WAYS:
                told: dict[str, Any] = {"what": "step", "layers": layers, "m": m, "precision": precision}
                told |= way._asdict()
                try:
                    found, gradient = _step(layers, m, precision, way)
                    exact = gradient if exact is None else exact
                    told |= found | {"error": float(np.linalg.norm(gradient - exact) / np.linalg.norm(exact))}
                except Exception as e:  # told, and the next one may do
                    fine, told["failed"] = False, f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}"
                emit(told)
    return fine


def _step(layers: tuple[int, ...], m: int, precision: str, way: Way) -> tuple[dict[str, Any], np.ndarray]:
    """What there is to tell of a step, and its gradient."""
    of_plan: Any = plan
    before = plan.WIDE, plan.arithmetic_of, executors.Graph.timed, executors.Graph.forked
    wide = plan.Wide(plan.NARROW + 1, 1)
    dtype = "float64" if precision == "float64" else "float32"
    of_plan.WIDE, of_plan.arithmetic_of = {precision: wide} if way.cublaslt else {}, lambda *_: ARITHMETIC[precision]
    executors.Graph.timed, executors.Graph.forked = way.timed, way.forked
    try:
        with contextlib.closing(_run_of(layers, m, dtype, bp.SGD(1.0))) as run, run.problem.net.backend.active():
            before_it = _parameters(run)
            run.begin(np.arange(m * A_GRAPH), [0, m], [1.0], 1)
            run.run(0, 1)
            run.finish()
            gradient = before_it - _parameters(run)
        with contextlib.closing(_run_of(layers, m, dtype, bp.Adam(1e-3))) as run, run.problem.net.backend.active():
            us = 1e6 * _seconds(run, m)
            products = [f"{p.name} {p.layer} {p.epilogue}" for p in run.plan.products.values()]
            return {"us": us, "products": products, "notes": run.plan.notes, "fell_back": run.failed}, gradient
    finally:
        of_plan.WIDE, of_plan.arithmetic_of, executors.Graph.timed, executors.Graph.forked = before


def _run_of(layers: tuple[int, ...], m: int, dtype: str, rule: Any) -> executors.Graph:
    rng = np.random.default_rng(0)
    n = m * A_GRAPH
    X, T = rng.integers(0, 256, (n, layers[0])).astype(np.uint8), rng.integers(0, layers[-1], n)
    net = bp.Network(list(layers), "relu", precision=dtype, backend="cupy", seed=3)
    with net.backend.active():
        samples = Samples(X, T, None, "labels").on(net.backend.asarray)
        problem = executors.Problem(net, choose_cost(None, net.output), samples, "mean", Regularization(), 0)
        return executors.Graph(problem, rule, m, 7, A_GRAPH)


def _parameters(run: executors.Graph) -> np.ndarray:
    """All weights and biases in a row, without what lies between them."""
    net = run.problem.net
    return np.concatenate([to_host(p).ravel() for p in (*net.W, *net.b) if p is not None]).astype(np.float64)


def _seconds(run: executors.Graph, m: int) -> float:
    """Device time of a step."""
    cp = run.problem.net.backend.xp
    start, stop = cp.cuda.Event(), cp.cuda.Event()
    times, ends = [], [m * i for i in range(A_GRAPH + 1)]
    for _ in range(1 + REPEATS):  # the first one records
        run.begin(np.arange(m * A_GRAPH), ends, [1e-3] * A_GRAPH, 1)
        start.record()
        run.run(0, A_GRAPH)
        stop.record()
        stop.synchronize()
        times.append(cp.cuda.get_elapsed_time(start, stop) / 1000 / A_GRAPH)
    return float(min(times[1:]))


def main() -> int:
    """Results to stdout, and to a file where one is named."""
    arguments = sys.argv[1:]
    what = steps if arguments[:1] == ["--steps"] else probe
    try:
        return 0 if what(printed(*arguments[what is steps :][:1])) else 1
    except BackendError as e:
        print(e, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
