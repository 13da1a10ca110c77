"""The least time of a training step: what none can do without, its matrix products and its state, measured.

The products are made in the fastest way there is, and the optimizer's state goes through memory once, as in the update.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from . import blas
from .activations import Array
from .backend import Backend
from .errors import ConfigError
from .network import GPU_ONLY, Network
from .optimizers import Optimizer, choose_optimizer
from .stepping import Program, Times, clocked, timed, wait_for
from .stopping import positive


class Matrix(NamedTuple):
    """An operand or a result of a product: A, W, Delta or dW of a layer, as it lies there or transposed."""

    letter: str
    layer: int
    transposed: bool = False


@dataclass(frozen=True)
class Product:
    """A matrix product of a step and the fastest way found to make it.

    `equation`: as on the page of `network`; `shape`: (rows, inner, columns) in NumPy's storage, a sample a row.
    `layout`: C or F, the order in memory of the left operand, the right one and the result; with F for the result, BLAS
    makes its transpose. `threads`: of BLAS, None where they cannot be set. `seconds`: by itself, again and again.
    """

    equation: str
    shape: tuple[int, int, int]
    layout: str = "CCC"
    threads: int | None = None
    seconds: float = 0.0

    @property
    def flop(self) -> int:
        """Multiplications and additions."""
        rows, inner, columns = self.shape
        return 2 * rows * inner * columns

    @property
    def elements(self) -> int:
        """Of both operands and the result."""
        rows, inner, columns = self.shape
        return rows * inner + inner * columns + rows * columns

    @property
    def gflops(self) -> float:
        """GFLOP/s of the fastest way."""
        return self.flop / self.seconds / 1e9 if self.seconds else 0.0


_Operands = tuple[Matrix, Matrix, Matrix]  # left, right, result


def products_of(layers: Sequence[int], m: int) -> list[tuple[Product, _Operands]]:
    """The products of a training step of m samples, in its order, each with its operands and its result.

    Z[l] = W[l] A[l-1] of every layer, dW[l] = Delta[l] A[l-1]^T of every layer, and W[l]^T Delta[l] of all but the
    first. Storage is the transpose of the page's.
    """
    L, found = len(layers) - 1, []
    for l in range(1, L + 1):
        forward = Product(f"W[{l}] A[{l - 1}]", (m, layers[l - 1], layers[l]))
        found.append((forward, (Matrix("A", l - 1), Matrix("W", l, True), Matrix("A", l))))
    for l in range(L, 0, -1):
        gradient = Product(f"Delta[{l}] A[{l - 1}]^T", (layers[l], m, layers[l - 1]))
        found.append((gradient, (Matrix("Delta", l, True), Matrix("A", l - 1), Matrix("dW", l))))
        if l > 1:
            back = Product(f"W[{l}]^T Delta[{l}]", (m, layers[l], layers[l - 1]))
            found.append((back, (Matrix("Delta", l), Matrix("W", l), Matrix("Delta", l - 1))))
    return found


class _Way(NamedTuple):
    """To make a product: BLAS's threads, and the layout of the two operands and the result."""

    threads: int | None
    layout: str


LAYOUTS = tuple(map("".join, itertools.product("CF", repeat=3)))
ROUNDS, TUNING = 20, 0.2  # of a product's ways, at most; seconds after which there are no more than MIN_ROUNDS
MIN_ROUNDS = 3


class Floor:
    """What no step can do without, ready to be timed: `run` makes all its products once, and one pass over its state.

    The products are those of `products_of`, in the order of the step, so that each finds its operands as warm as the
    step's others leave them; for each the layouts and the number of BLAS threads are chosen once, here, by timing all
    of them. The state's pass moves as many bytes as the update must: theta, the gradient and the slots are read, theta
    and the slots written, by copies within memory of their size, in as many threads as is quickest.
    On a GPU the state's pass is one launch of a CUDA graph; the products are launched one by one, for CuPy does not
    record cuBLAS: where they are small it is the host that takes the time, and their sum is no floor.

    `products`: see `Product`; `state_bytes`, `state_threads`. Raises ConfigError for tf32 and bf16, whose products only
    the executor knows how to make. A context manager, which closes it.
    """

    def __init__(self, net: Network, batch_size: int, rule: Optimizer | str) -> None:
        if net.precision in GPU_ONLY:
            raise ConfigError(f"no floor is known for products in {net.precision}", "take float32 or float64")
        self.backend = be = net.backend
        wanted = products_of(net.layers, positive("batch_size", batch_size))
        operands = [three for _, three in wanted]
        with self._active():
            self._matrices = _Matrices(be, net.dtype, wanted)
            tried = [self._ways(three) for three in operands]
            ways = self._best(tried, operands)
            self.products = tuple(
                dataclasses.replace(product, layout=way.layout, threads=way.threads, seconds=seconds[way])
                for (product, _), way, seconds in zip(wanted, ways, tried, strict=True)
            )
            self._matrices.keep(ways, operands)
            self._make_products = self._sequence(ways, operands)
            self._state = _fastest_state(be, net.theta.size, net.dtype, choose_optimizer(rule).slots)
        self.state_bytes, self.state_threads = self._state.nbytes, self._state.threads

    def run_products(self) -> None:
        """All products once."""
        with self._active():
            self._make_products()

    def run_state(self) -> None:
        """The state once through memory."""
        with self._active():
            self._state.run()

    def run(self) -> None:
        """All products and the state, once."""
        self.run_products()
        self.run_state()

    def wait(self) -> None:
        """Return when the device has done all of it."""
        wait_for(self.backend)

    def close(self) -> None:
        """Let go of the threads."""
        self._state.close()

    def __enter__(self) -> Floor:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def _active(self) -> contextlib.AbstractContextManager[Any]:
        """Where arrays are used; on NumPy after it BLAS has as many threads as before, and within it any number.

        That of `Backend.active` may be 1 there, where steps have threads of their own.
        """
        return blas.threads.kept() if self.backend.index is None else self.backend.active()

    def _ways(self, operands: _Operands) -> dict[_Way, float]:
        """Seconds of every way to make a product."""
        often = 1 if self.backend.index is None else 16  # so that the launch does not count
        calls = {
            _Way(threads, layout): self._sequence([_Way(threads, layout)] * often, [operands] * often)
            for threads in _choices(self.backend)
            for layout in LAYOUTS
        }
        return {way: seconds / often for way, seconds in _least(calls, self.wait).items()}

    def _best(self, tried: list[dict[_Way, float]], operands: list[_Operands]) -> list[_Way]:
        """The ways that are quickest one after the other: each product's own, or those of one number of threads.

        To go from one number of threads to another may cost more than it brings.
        """
        plans = [[min(ways, key=ways.__getitem__) for ways in tried]]
        plans += [
            [min((way for way in ways if way.threads == threads), key=ways.__getitem__) for ways in tried]
            for threads in _choices(self.backend)
        ]
        taken = _least({i: self._sequence(plan, operands) for i, plan in enumerate(plans)}, self.wait)
        return plans[min(taken, key=taken.__getitem__)]

    def _sequence(self, ways: Sequence[_Way], operands: Sequence[_Operands]) -> Callable[[], None]:
        """What makes these products in these ways, one after the other."""
        set_threads, matmul = blas.threads.set, self.backend.xp.matmul
        calls = [(way.threads, *self._matrices.of(way.layout, of)) for way, of in zip(ways, operands, strict=True)]

        def make() -> None:
            for threads, a, b, out in calls:
                set_threads(threads)
                matmul(a, b, out=out)

        return _recorded(self.backend, make)


class _Matrices:
    """Memory for the operands and results of products, each in both orders until `keep` says which."""

    def __init__(self, be: Backend, dtype: np.dtype[Any], wanted: Sequence[tuple[Product, _Operands]]) -> None:
        self.be, self.dtype = be, dtype
        self._shapes: dict[tuple[str, int], tuple[int, int]] = {}
        self._there: dict[tuple[str, int, str], Array] = {}
        for product, (left, right, result) in wanted:
            rows, inner, columns = product.shape
            for matrix, shape in ((left, (rows, inner)), (right, (inner, columns)), (result, (rows, columns))):
                self._shapes[matrix[:2]] = shape[::-1] if matrix.transposed else shape

    def of(self, layout: str, operands: _Operands) -> tuple[Array, Array, Array]:
        """Left, right and result for a product in NumPy's terms; their transposes where the result lies by columns."""
        left, right, result = (self._matrix(of, order) for of, order in zip(operands, layout, strict=True))
        return (left, right, result) if layout[2] == "C" else (right.T, left.T, result.T)

    def _matrix(self, of: Matrix, order: str) -> Array:
        key = self._key(of, order)
        if key not in self._there:
            self._there[key] = self._made(self._shapes[of[:2]], key[2])
        return self._there[key].T if of.transposed else self._there[key]

    @staticmethod
    def _key(of: Matrix, order: str) -> tuple[str, int, str]:
        """A transpose that lies by rows is stored by columns."""
        return of.letter, of.layer, {"C": "F", "F": "C"}[order] if of.transposed else order

    def _made(self, shape: tuple[int, int], order: str) -> Array:
        """Numbers that stay of about this size from product to product."""
        values = np.random.default_rng(0).uniform(-1, 1, shape[:: 1 if order == "C" else -1]) * (3 / max(shape)) ** 0.5
        made = self.be.asarray(values.astype(self.dtype))
        return made if order == "C" else made.T

    def keep(self, ways: Sequence[_Way], operands: Sequence[_Operands]) -> None:
        """Forget all memory but that of these ways and operands."""
        used = [self._key(*one) for way, three in zip(ways, operands, strict=True)
                for one in zip(three, way.layout, strict=True)]  # fmt: skip
        self._there = {key: self._there[key] for key in used}


def _least(calls: Mapping[Any, Callable[[], None]], wait: Callable[[], None]) -> dict[Any, float]:
    """The least seconds of each call, of some rounds in turn; what is far from the best after a round is left out."""
    least = dict.fromkeys(calls, float("inf"))
    start, rounds = time.perf_counter(), 0
    while rounds < MIN_ROUNDS or (rounds < ROUNDS and time.perf_counter() - start < TUNING):
        best = min(least.values())
        for key, call in calls.items():
            if rounds < 2 or least[key] <= 1.5 * best:  # the first round warms up
                least[key] = min(least[key], clocked(Program(call, wait), 1))
        rounds += 1
    return least


def _recorded(be: Backend, work: Callable[[], None]) -> Callable[[], None]:
    """`work`; on a GPU one launch of all of it, if it can be recorded."""
    if be.index is None:
        return work
    work()  # what is compiled and allocated once
    stream = be.xp.cuda.Stream(non_blocking=True)
    try:
        with stream:
            work()
            stream.synchronize()
            stream.begin_capture()
            try:
                work()
            finally:
                graph = stream.end_capture()
        graph.launch()
    except Exception:
        return work
    return graph.launch


class _State:
    """The state of the update on its way through memory, by copies of one half of it to the other and back.

    The update of P parameters with s slots reads 2 + s vectors and writes 1 + s, which is what the two copies do:
    (2 + s) P / 2 elements there and (1 + s) P / 2 back.
    """

    def __init__(self, be: Backend, size: int, dtype: np.dtype[Any], slots: int, threads: int = 1) -> None:
        self.be, self.threads = be, threads
        self.nbytes = (3 + 2 * slots) * size * dtype.itemsize
        whole = be.zeros((2 + slots) * size, dtype)
        whole.fill(1)  # else NumPy's zeros are one page, read again and again
        half, back = (2 + slots) * size // 2, (1 + slots) * size // 2
        ways = [(whole[half : 2 * half], whole[:half]), (whole[:back], whole[half : half + back])]
        self._parts = [[(to[part], of[part]) for to, of in ways for part in [_part(len(to), i, threads)]]
                       for i in range(threads)]  # fmt: skip
        self._pool = concurrent.futures.ThreadPoolExecutor(threads - 1) if threads > 1 else None
        self.run = self._in_threads if self._pool else _recorded(be, functools.partial(self._copy, self._parts[0]))

    def _copy(self, parts: list[tuple[Array, Array]]) -> None:
        for to, of in parts:
            self.be.xp.copyto(to, of)

    def _in_threads(self) -> None:
        assert self._pool
        others = [self._pool.submit(self._copy, parts) for parts in self._parts[1:]]
        self._copy(self._parts[0])
        concurrent.futures.wait(others)

    def close(self) -> None:
        if self._pool:
            self._pool.shutdown()


def _part(n: int, i: int, parts: int) -> slice:
    """The i-th of so many parts of n elements."""
    return slice(n * i // parts, n * (i + 1) // parts)


def _fastest_state(be: Backend, size: int, dtype: np.dtype[Any], slots: int) -> _State:
    """In as many threads as is quickest."""
    counts = [1] if be.index is not None else _thread_counts()
    states = {threads: _State(be, size, dtype, slots, threads) for threads in counts}
    taken = _least({threads: state.run for threads, state in states.items()}, lambda: wait_for(be))
    best = states.pop(min(taken, key=taken.__getitem__))
    for other in states.values():
        other.close()
    return best


def _choices(be: Backend) -> Sequence[int | None]:
    """The numbers of BLAS's threads to try; None: as it is."""
    return [None] if be.index is not None or blas.routines() is None else _thread_counts()


def _thread_counts() -> list[int]:
    """1, 2, 4, ... and all cores."""
    most = blas.cores()
    return sorted({1 << i for i in range(most.bit_length()) if 1 << i < most} | {most})


@dataclass(frozen=True)
class FloorTimes:
    """The least time of a step: of its products, one after the other, and of its state's way through memory."""

    products_seconds: float
    memory_seconds: float
    products: tuple[Product, ...]
    state_bytes: int
    state_threads: int

    @property
    def seconds(self) -> float:
        """Both together."""
        return self.products_seconds + self.memory_seconds

    @property
    def copy_bandwidth(self) -> float:
        """Bytes read and written a second, by the copies of the state."""
        return self.state_bytes / self.memory_seconds


def floor(net: Network, batch_size: int, rule: Optimizer | str, seconds: float = 1.0) -> FloorTimes:
    """The least time of a training step of `net` in batches of batch_size, measured on this machine: see `Floor`.

    Raises ConfigError.
    """
    with Floor(net, batch_size, rule) as ready:
        return times_of(ready, timed(programs_of(ready), seconds))


def programs_of(ready: Floor) -> dict[str, Program]:
    """Both parts of a floor, to be timed."""
    return {"products": Program(ready.run_products, ready.wait), "state": Program(ready.run_state, ready.wait)}


def times_of(ready: Floor, times: Mapping[str, Times]) -> FloorTimes:
    """What `timed` found for them."""
    return FloorTimes(
        times["products"].median, times["state"].median, ready.products, ready.state_bytes, ready.state_threads
    )
