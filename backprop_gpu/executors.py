"""How training steps are run: eagerly, one operation after the other, or as something made of a whole step once.

The ladder on a GPU: a CUDA graph of a plan's fused kernels; the operations of the page, kernels and cuBLAS's products.
On NumPy: a function that numba compiles (see `compiled`); the calls of the operations, recorded and replayed; the
operations themselves. All are over the same buffers of theta and the optimizer's slots. `choose` takes the highest rung
that does what is asked.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import math
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from . import cublaslt, driver, gpu_faults
from . import plan as plans
from .activations import OUTPUT, Array
from .backend import to_host
from .costs import MAKERS, Cost
from .errors import BackendError, ConfigError
from .inputs import Samples
from .network import GPU_ONLY, Batch, Network, Views, backward, forward
from .optimizers import Optimizer
from .recording import Tape, UnrecordableError
from .regularization import Regularization
from .streaming import Feed, greatest


@dataclasses.dataclass(frozen=True)
class Problem:
    """What a run minimises: the cost of a network, with penalties, over data.

    `samples` lie on the network's device; where `room` is a number, they lie on the host, and so many bytes are there
    for them on the device (see `streaming`). The first `frozen` layers stay as they are.
    """

    net: Network
    cost: Cost
    samples: Samples
    reduction: str
    regularization: Regularization
    frozen: int
    room: int | None = None


class Eager:
    """Training steps on a network's backend, one operation after the other, over buffers made once.

    `batch_size` is the largest batch, `steps` the number of steps of an epoch; `seed` is that of the dropout masks.
    `measured[i]`, on the device, is what step i of the epoch was judged by: the sum of the weighted costs, and how many
    samples were predicted right. `diverged[0]`, likewise, is the first step that left the finite numbers, 0 so far.
    """

    rung = "eager"
    put_off = 0  # steps of the epoch that were not taken together with others, out of the ordinary as they were
    sizes: tuple[int, ...] = (1,)  # how many steps are recorded together, largest first
    description: str | None = None  # of the operations of a step, where there is a plan of them

    def __init__(self, problem: Problem, rule: Optimizer, batch_size: int, seed: int, steps: int) -> None:
        net, be = problem.net, problem.net.backend
        rule.check(net.dtype)
        self.problem, self.rule, self.seed, self.batch_size = problem, rule, seed, batch_size
        # Frozen layers come first in theta: what is trained is the rest of it.
        self._start = Views.size(net.layers[: problem.frozen + 1], net.biased[: problem.frozen], net.dtype)
        self.theta = net.theta[self._start :]
        self.slots = tuple(be.zeros(self.theta.size, net.dtype) for _ in range(rule.slots))
        self.diverged = be.xp.zeros(1, be.xp.int64)
        self.measured = be.zeros(2 * (steps + 1), np.dtype(np.float64)).reshape(-1, 2)  # one more, to try kernels on
        room = problem.room
        self.feed = None if room is None else Feed(be, problem.samples, batch_size, room, self.sizes)

    @property
    def told(self) -> str:
        """The rung, whether numba compiles its operations, and whether data is streamed."""
        fast, streamed = self.problem.net.backend.fast, self.feed is not None
        return self.rung + ", numba" * fast + ", data streamed" * streamed

    @functools.cached_property
    def batch(self) -> Batch:
        """What a step computes on its way."""
        return Batch(self.problem.net, self.batch_size, gradient=True, draw=(self.seed, 0))

    @functools.cached_property
    def _of_batch(self) -> tuple[Array, Array, Array]:
        """The targets of a batch, its weights, and their part in the cost."""
        be, T, dtype = self.problem.net.backend, self.problem.samples.T, self.problem.net.dtype
        size = self.batch_size
        return be.xp.empty((size, *T.shape[1:]), T.dtype), be.xp.empty(size, dtype), be.xp.empty(size, dtype)

    @functools.cached_property
    def _flat(self) -> Array:
        return self.problem.net.backend.zeros(self.problem.net.theta.size, self.problem.net.dtype)

    @property
    def g(self) -> Array:
        """The gradient of what is trained, a flat vector."""
        return self._flat[self._start :]

    @functools.cached_property
    def gradient(self) -> Views:
        """dW and db of every layer."""
        return Views(self._flat, self.problem.net.layers, self.problem.net.biased)

    @functools.cached_property
    def is_weight(self) -> Array | None:
        """1 at the weights of theta, where penalties want to know."""
        return self.problem.net.weight_mask()[self._start :] if self.problem.regularization else None

    def begin(
        self, order: np.ndarray, ends: Sequence[int], lrs: Sequence[float], t: int, i: int = 0, put_off: int = 0
    ) -> None:
        """Before an epoch: its samples in order, where its batches begin and end, the learning rate of each step.

        t is the first step's (from 1), i the step of the epoch (from 0) with which it goes on, `put_off` the executor's
        own number of that name then. All that an epoch takes to the device.
        """
        be = self.problem.net.backend
        self.rows = be.ops.step_rows(self.rule, lrs, t)
        if self.feed:
            self.feed.begin(order, ends)
        else:
            self.order = be.asarray(order)
        self.ends, self.t = ends, t

    def run(self, i: int, most: int) -> int:
        """Steps i, i + 1, ... of the epoch (from 0), at most that many; how many it took, 0 where the run diverges."""
        taken = int(self.step(i, self.ends[i], self.ends[i + 1], self.measured[i]))
        if self.feed and (most == 1 or self.feed.rest(i) == 1):
            self.feed.ahead()
        return taken

    def ahead(self, order: np.ndarray) -> None:
        """While steps are under way: the order that the next `begin` will be given, if there is one."""

    def finish(self) -> None:
        """Before `measured` is read, or theta."""

    def go_back(self) -> None:
        """Forget that the run diverged: theta and the slots were put back to the beginning of an epoch."""
        self.diverged[...] = 0

    def gradient_error(self, order: np.ndarray, ends: Sequence[int]) -> float:
        """||g - exact|| / ||exact|| of the first batch: its gradient as the run computes it, and in float64."""
        problem, rows = self.problem, order[: ends[1]]
        X, T, weights = (
            None if a is None else to_host(a)[rows]
            for a in (problem.samples.X, problem.samples.T, problem.samples.weights)
        )
        exact = problem.net.to("numpy", "float64").gradients(
            X, T, problem.cost, reduction=problem.reduction, sample_weight=weights, dropout=(self.seed, 1)
        )
        mine = Views(to_host(self._first_gradient(order, ends)), problem.net.layers, problem.net.biased)
        error = whole = 0.0
        for g, wanted in zip((*mine.W, *mine.b), (*exact["W"], *exact["b"]), strict=True):
            if g is not None and g.any():  # a frozen layer has none
                error += float(((g - wanted) ** 2).sum())
                whole += float((wanted**2).sum())
        return math.sqrt(error / whole) if whole else 0.0

    def _first_gradient(self, order: np.ndarray, ends: Sequence[int]) -> Array:
        """The flat gradient of the first batch at theta, without penalties."""
        self.begin(order, ends, [self.rule.lr], 1)
        self._backpropagate(0, 0, ends[1], self.measured[0])
        return self._flat

    def close(self) -> None:
        """Wait for the device, and let go of it."""
        if self.feed and not gpu_faults.lost():
            self.feed.close()

    def step(self, i: int, start: int, stop: int, measured: Array) -> bool:
        """Step i of the epoch (from 0), on the samples start .. stop - 1 of its order: forward, backward, update.

        Writes the sum of the weighted costs and the number of samples predicted right into measured (2,). Returns False
        where it is known that the step was not applied, because the run has left the finite numbers.
        """
        self._backpropagate(i, start, stop, measured)
        regularization = self.problem.regularization
        with np.errstate(all="ignore"):
            if regularization:
                self.problem.net.backend.ops.regularize(regularization, self.theta, self.is_weight, self.g)
            return self._update(i, measured)

    def _update(self, i: int, measured: Array) -> bool:
        update = self.problem.net.backend.ops.update
        return bool(update(self.rule, self.theta, self.g, self.slots, self.rows[i], measured, self.diverged))

    def _of_step(self, i: int, start: int, stop: int) -> tuple[Samples, Any]:
        """Where the data of step i lies on the device, and which rows of it are the step's."""
        if self.feed is None:
            return self.problem.samples, self.order[start:stop]
        first = self.feed.enter(i)
        return self.feed.samples, slice(first, first + stop - start)

    def _backpropagate(self, i: int, start: int, stop: int, measured: Array) -> None:
        """The part of a step before the update: its gradient and what it is judged by."""
        m = stop - start
        batch, of_batch = self.batch.first(m), [a[:m] for a in self._of_batch]
        batch.draw = self.seed, self.t + i
        with np.errstate(all="ignore"):  # what is not finite is looked for, and told, by update
            self._calculate(*self._of_step(i, start, stop), batch, of_batch, measured)

    def _calculate(self, samples: Samples, rows: Any, batch: Batch, of_batch: Sequence[Array], measured: Array) -> None:
        """Gather these rows, forward, backward, measure; `of_batch`: see `_of_batch`, for as many samples."""
        problem, (T, w, part) = self.problem, of_batch
        net, ops, mean = problem.net, problem.net.backend.ops, problem.reduction == "mean"
        ops.gather(samples.X, rows, batch.A[0])
        ops.gather(samples.T, rows, T)
        weighted = samples.weights is not None
        if weighted:
            ops.gather(samples.weights, rows, w)
            if mean:
                ops.share(w, part)
        of_sample = (part if mean else w) if weighted else (1 / batch.m if mean else 1.0)
        forward(ops, net, batch)
        backward(ops, net, batch, T, of_sample, problem.cost, self.gradient, problem.frozen)
        ops.measure(samples.task, net.g, batch.Z[-1], T, batch.C, w if weighted else None, measured)


class Replay(Eager):
    """Steps on NumPy, whose calls are written on a tape the first time and made again without the engine's Python.

    The bits are those of `Eager`. Raises UnrecordableError for what differs from step to step in more than the memory
    it reads: masks of dropout, data that is streamed, and functions and rules of one's own. Should a tape not hold a
    step nevertheless (see `recording`), steps are eager from there on.
    """

    rung = "replay"

    def __init__(self, problem: Problem, rule: Optimizer, batch_size: int, seed: int, steps: int) -> None:
        net = problem.net
        if any(net.rates) or problem.room is not None:
            raise UnrecordableError("each step has masks, or data, of its own")
        known = all(OUTPUT.get(f.name) == f for f in (*net.f[1:], net.g)) and problem.cost.name.split(":")[0] in MAKERS
        if not known or type(rule).__module__ != Optimizer.__module__:
            raise UnrecordableError("a function of one's own may do anything")
        super().__init__(problem, rule, batch_size, seed, steps)
        self._tapes: dict[int, Tape] = {}  # by the size of the batch
        self._rows, self._measured = np.zeros(batch_size, np.int64), np.zeros(2)
        ops = net.backend.ops
        self._apply = ops.prepared(rule, self.theta, self.g, self.slots, Tape())

    def _backpropagate(self, i: int, start: int, stop: int, measured: Array) -> None:
        if self.rung == Eager.rung:
            return super()._backpropagate(i, start, stop, measured)
        m = stop - start
        self._rows[:m] = self.order[start:stop]
        with np.errstate(all="ignore"):
            if m in self._tapes:
                self._tapes[m].replay()
            else:
                try:
                    self._tapes[m] = self._recorded(m)
                except UnrecordableError:  # nothing is lost: all that was written is written again
                    self.rung = Eager.rung
                    return super()._backpropagate(i, start, stop, measured)
        measured[...] = self._measured
        return None

    def _recorded(self, m: int) -> Tape:
        """The gradient of m samples, calculated and recorded."""
        tape, ops = Tape(), self.problem.net.backend.ops
        batch, of_batch = self.batch.first(m).through(tape.watched), [tape.watched(a[:m]) for a in self._of_batch]
        with ops.recording(tape):
            self._calculate(self.problem.samples, self._rows[:m], batch, of_batch, tape.watched(self._measured))
        return tape

    def _update(self, i: int, measured: Array) -> bool:
        update, row = self.problem.net.backend.ops.update, self.rows[i]
        return bool(update(self.rule, self.theta, self.g, self.slots, row, measured, self.diverged, self._apply))


class Graph(Eager):
    """Steps of a `plan.Plan`, recorded as CUDA graphs of 64, 16 and 1 of them, and replayed.

    During an epoch nothing waits for the device. A step whose numbers are out of the ordinary (see kernels/step.cuh)
    changes nothing, and neither do those after it; when somebody wants to know (`finish`), at the end of the epoch at
    the latest, that step is taken eagerly, which tells whether the run diverges, and the rest follows. Where recording
    fails, steps are eager from there on, with a warning. Products of wide layers are cuBLASLt's where it offers them
    (see `plan`): they are bound, and run once, when the plan is made. Raises plan.Unplanned.
    """

    sizes: tuple[int, ...] = (64, 16, 1)
    trains = True  # else it is an evaluation, of data in its own order
    timed = 1  # of cuBLASLt's algorithms, to choose from; with more than one the bits are a matter of luck
    forked = False  # whether cuBLASLt makes dW on a branch of the graph, beside the Delta below; to be measured

    def __init__(
        self, problem: Problem, rule: Optimizer, batch_size: int, seed: int, steps: int, stored: bool = False
    ) -> None:
        super().__init__(problem, rule, batch_size, seed, steps)
        net, cp = problem.net, problem.net.backend.xp
        samples = self.feed.samples if self.feed else problem.samples
        self.ops: Any = net.backend.ops
        n, fused = len(samples), self.trains and not (problem.regularization or stored)
        as_bytes = samples.X.dtype == np.uint8
        placed = self.ops.placed(rule, self.slots)
        self._rows = cp.zeros((steps + 1, self.ops.host_rows(rule, [rule.lr], 1).shape[1]), np.float64)
        shape = plans.Shape(
            batch_size, batch_size, n, steps, "bytes" if as_bytes else "reals",
            "labels" if samples.T.ndim == 1 else "rows", samples.weights is not None, problem.reduction == "mean",
            1.0 if as_bytes or not self.trains else greatest(problem.samples.X), TASKS.get(samples.task, 0),
            ordered=self.feed is not None or not self.trains,
        )  # fmt: skip
        device, exact = device_of(cp), net.precision not in GPU_ONLY
        precision = net.precision if exact or self.trains else "float32"
        make = functools.partial(
            plans.Plan, net, problem.cost, device=device, arithmetic=plans.arithmetic_of(precision, device),
            rule=self.ops.rule_name(rule) if fused else None, slots=[s is not None for s in placed],
            row_size=self._rows.shape[1], frozen=problem.frozen, seed=seed, library=self._offers,
        )  # fmt: skip
        self._plan_of = functools.cache(lambda m: make(shape=dataclasses.replace(shape, m=m)))
        self._library: cublaslt.Library | str | None = None  # or why there is none; None: nobody has asked yet
        self._products: dict[plans.LibraryProduct, cublaslt.Product] = {}
        # An order may hold more than the data.
        self._order: Any = None if shape.ordered else cp.zeros(2 * n, np.int64)
        self._next = None if shape.ordered else _Order(cp, n)
        self._state = cp.zeros(plans.STATE, np.uint64)
        self._vectors: dict[str, Any] = {
            "data": samples.X.reshape(-1), "targets": samples.T.reshape(-1), "weights": samples.weights,
            "theta": net.theta, "trained": self.theta, "gradient": self.g if self.trains and not fused else None,
            "order": self._order, "state": self._state,
            "rows": self._rows.reshape(-1), "measured": self.measured.reshape(-1),
            **{f"slot {i}": s for i, s in enumerate(placed)},
        }  # fmt: skip
        try:
            self.plan = self._plan_of(batch_size)
        except BaseException:
            self._let_go()
            raise
        self._place_work(self.plan)
        self._graphs: dict[tuple[int, int], Any] = {}
        self.failed: str | None = None

    @property
    def rung(self) -> str:  # type: ignore[override]
        """ "graph", or why not."""
        return f"eager: {self.failed}" if self.failed else "graph"

    @property
    def description(self) -> str:  # type: ignore[override]
        """The plan's operations."""
        return self.plan.describe()

    def _first_gradient(self, order: np.ndarray, ends: Sequence[int]) -> Array:
        plain = dataclasses.replace(self.problem, regularization=Regularization())
        twin = Graph(plain, self.rule, self.batch_size, self.seed, len(ends) - 1, stored=True)
        with contextlib.closing(twin):
            twin.begin(order, ends, [self.rule.lr], 1)
            twin._go_on_from(0, unusual=1)  # so that theta stays as it is
            twin._point_at(0)
            twin._enqueue(ends[1], 0)
            return twin._flat.copy()

    def _place_work(self, plan: plans.Plan) -> None:
        """Its workspace, which is that of all sizes of batches."""
        if "work" not in self._vectors:
            net = self.problem.net
            size = plan.workspace.size
            whole = net.backend.xp.zeros(size + 2 * plan.rounded.size // net.dtype.itemsize, net.dtype)
            self._vectors |= {"work": whole[:size], "rounded": whole[size:].view(np.uint16)}

    def _offers(self, plan: plans.Plan, wanted: plans.LibraryProduct) -> str | None:
        """Bind a product of the plan and run it once, on whatever there is; else why cuBLASLt does not make it."""
        if self._library is None:
            try:
                self._library = cublaslt.Library()
            except BackendError as e:
                self._library = e.cause
        if isinstance(self._library, str):
            return self._library
        self._place_work(plan)
        if self.trains:
            self._vectors["gradient"] = self.g
        try:
            product = self._bind(self._library, wanted)
        except cublaslt.CublasLtError as e:
            return e.cause
        if product.reason is None:
            stream = self.problem.net.backend.xp.cuda.get_current_stream()
            try:
                product.run(stream.ptr)
                if self.timed > 1:
                    product.time(cublaslt.by_events(stream), self.timed)
            except cublaslt.CublasLtError as e:
                product.close()
                return e.cause
            self._products[wanted] = product
        return product.reason

    @functools.cached_property
    def _spaces(self) -> tuple[Array, Array]:
        """What cuBLASLt may work in, in the main stream and on a branch."""
        whole = self._space()
        return whole, self._space() if self.forked else whole

    def _space(self) -> Array:
        most, boundary = cublaslt.WORKSPACE_BYTES, cublaslt.ALIGNMENT
        raw = self.problem.net.backend.xp.empty(most + boundary, np.uint8)
        start = -raw.data.ptr % boundary
        return raw[start : start + most]

    def _bind(self, library: cublaslt.Library, wanted: plans.LibraryProduct) -> cublaslt.Product:
        def view(of: plans.Matrix) -> Array:
            return _found(self._vectors, of.place).reshape(of.rows, of.stride)[:, : of.columns]

        a, b, out = map(view, wanted.arrays)
        vector = _found(self._vectors, wanted.vector)
        space = self._spaces[wanted.name == "weight_gradient"]
        how: dict[str, Any] = {"precision": wanted.precision, "workspace": space}
        if wanted.name == "forward":
            return cublaslt.forward(library, a, b, out, vector, "RELU" in wanted.epilogue, alpha=wanted.alpha, **how)
        if wanted.name == "hidden_delta":
            return cublaslt.hidden_delta(library, a, b, out, **how)
        return cublaslt.weight_gradient(library, a, b, out, vector, wanted.alpha, **how)

    def begin(
        self, order: np.ndarray, ends: Sequence[int], lrs: Sequence[float], t: int, i: int = 0, put_off: int = 0
    ) -> None:
        """As `Eager.begin`, into buffers that stay where they are."""
        if self.feed:
            self.feed.begin(order, ends)
        else:
            self.order = self._order[: len(order)]
            if not (self._next and self._next.put(order, self.order)):
                self.order.set(order)
        self.rows, self.ends, self.t, self._done, self.put_off = self._rows, ends, t, i, put_off
        self._rows[: len(lrs)].set(self.ops.host_rows(self.rule, lrs, t))
        self._go_on_from(i)
        decays = max(lrs) * self.rule.weight_decay < 1
        self._ordinary = max(lrs) <= plans.MOST_LR and decays and self.failed is None and put_off < MANY

    def ahead(self, order: np.ndarray) -> None:
        """As `Eager.ahead`, on a stream of its own."""
        if self._next:
            self._next.take(order)

    def _go_on_from(self, i: int, unusual: int = 0) -> None:
        """Tell the device that the next step is i."""
        self._first = 0 if self.feed else self.ends[i] - i * self.batch_size
        self._state.set(np.array([i, unusual, self._first, self.t], np.int64).view(np.uint64))

    def _point_at(self, i: int) -> None:
        """Tell the device where the rows of the next step, i, are: without waiting, and nothing else changes there."""
        if self.feed is None:
            return
        first = self.feed.enter(i) - i * self.batch_size
        if first != self._first:
            self._shift(0, self._first - first)
            self._first = first

    def run(self, i: int, most: int) -> int:
        """As `Eager.run`, as many steps as the largest graph that fits; whether they were taken, `finish` knows."""
        if self._ordinary:
            try:
                steps = self._launch(i, most)
            except Exception as e:
                if gpu_faults.loses(e, self.problem.net.backend.xp):
                    raise
                self._ordinary, self.failed = False, f"{type(e).__name__}: {e}"
                warnings.warn(f"no CUDA graph, steps run one operation at a time: {self.failed}", stacklevel=2)
                self.finish()  # steps before these that were put off
            else:
                return steps
        return super().run(i, most)

    def _launch(self, i: int, most: int) -> int:
        """Steps i, i + 1, ... by one graph, at most that many; how many."""
        if self.feed:
            most = min(most, self.feed.rest(i))
        m, steps = self._fitting(i, most)
        self._point_at(i)
        self._graph(m, steps).launch()
        self._done = i + steps
        if self.feed:
            self._first -= steps * (self.batch_size - m)
            if steps == most:
                self.feed.ahead()  # while these are under way
        return steps

    def _fitting(self, i: int, most: int) -> tuple[int, int]:
        """How many samples step i has, and how many steps from there on the largest graph that fits."""
        m, alike = self._size(i), 1
        while alike < min(most, self.sizes[0]) and self._size(i + alike) == m:
            alike += 1
        if m != self.batch_size:  # a recording's batches begin at multiples of the whole one
            alike = 1
        return m, next(size for size in self.sizes if size <= alike)

    def _size(self, i: int) -> int:
        return self.ends[i + 1] - self.ends[i] if i + 1 < len(self.ends) else 0

    def finish(self) -> None:
        """Take the steps that were put off, if there are any. Waits for the device."""
        while (unusual := int(self._state[plans.UNUSUAL])) and not int(self.diverged[0]):
            i, done = unusual - self.t, self._done
            super().step(i, self.ends[i], self.ends[i + 1], self.measured[i])
            if int(self.diverged[0]):
                break
            self.put_off += 1
            if self.put_off == MANY:  # the rest of the epoch would be launched again and again
                self._ordinary = False
            self._go_on_from(i + 1)
            i += 1
            while i < done:
                i += self.run(i, done - i)

    def go_back(self) -> None:
        """As `Eager.go_back`."""
        super().go_back()
        self._go_on_from(0)  # else `finish` would take the step that diverged

    def _graph(self, m: int, steps: int) -> Any:
        """That many steps of m samples, recorded when they are first asked for."""
        if (m, steps) not in self._graphs:
            cp = self.problem.net.backend.xp
            self._launches(m)
            if m not in {size for size, _ in self._graphs}:  # compile and run everything once; theta stays as it is
                self._warm_up(m)
            stream = cp.cuda.Stream(non_blocking=True)
            with stream, cp.cuda.using_allocator(_refuse):
                stream.begin_capture()
                try:
                    for ahead in range(steps):
                        self._enqueue(m, ahead)
                    self._advance(steps, self.batch_size - m)
                except BaseException:
                    with contextlib.suppress(Exception):
                        stream.end_capture()
                    raise
                self._graphs[m, steps] = stream.end_capture()
        return self._graphs[m, steps]

    def _warm_up(self, m: int) -> None:
        before = self._state.copy()
        spare = len(self._rows) - 1  # a step that is none, which changes nothing
        self._state.set(np.array([spare, 1, -spare * self.batch_size, self.t], np.int64).view(np.uint64))
        try:
            self._enqueue(m, 0)
            self._advance(0, 0)
        finally:  # else `finish` would take the spare step for one that was put off
            if not gpu_faults.lost():
                self._state[...] = before

    @functools.cached_property
    def _launches(self) -> Any:
        """A step of a number of samples, ready to be launched."""
        return functools.cache(self._bound)

    def _bound(self, m: int) -> _Step:
        plan, cp = self._plan_of(m), self.problem.net.backend.xp
        vectors = {**self._vectors, "layers": cp.asarray(plan.table.reshape(-1))}
        step = _Step([self._kernel(o, vectors, False) for o in plan.prologue], [])
        for o in plan.operations:
            if isinstance(o, plans.Operation):
                step.launches.append(self._kernel(o, vectors, plan.early and o.kernel in plans.WAITING))
            elif self.forked and o.name == "weight_gradient":
                step.joined = step.joined or cp.cuda.Event(disable_timing=True)
                step.launches.append(self._on_a_branch(self._products[o], step.joined))
            else:
                step.launches.append(self._product(self._products[o]))
        if len(plan.copies):
            step.copies = cp.asarray(plan.copies), vectors["rounded"]
        return step

    def _kernel(self, o: plans.Operation, vectors: dict[str, Any], early: bool) -> _Launch:
        """A kernel with the arguments that stay."""
        stream_of = self.problem.net.backend.xp.cuda.get_current_stream
        kernel = self.ops.kernel_of(o.file, o.kernel, self.problem.net.dtype, **dict(o.defines))
        arguments = self.ops.arguments(kernel, [_found(vectors, a) for a in o.arguments])
        at = o.arguments.index(plans.AHEAD) if plans.AHEAD in o.arguments else None
        if o.shared > 32 << 10:  # with its static memory it may pass the 48 KiB that it has unasked
            kernel.function.max_dynamic_shared_size_bytes = o.shared

        def launch(ahead: int) -> None:
            if at is not None:
                arguments[at] = np.int32(ahead)
            if early:
                driver.launch_early(kernel.function, o.grid, o.block, arguments, o.shared, stream_of().ptr)
            else:
                kernel.function(o.grid, o.block, tuple(arguments), shared_mem=o.shared)

        return launch

    def _product(self, product: cublaslt.Product) -> _Launch:
        stream_of = self.problem.net.backend.xp.cuda.get_current_stream
        return lambda ahead: product.run(stream_of().ptr)

    def _on_a_branch(self, product: cublaslt.Product, joined: Any) -> _Launch:
        """A product that comes after all that was launched before it, and before what waits for `joined`."""
        cuda, branch = self.problem.net.backend.xp.cuda, self._branch
        forks = cuda.Event(disable_timing=True)

        def launch(ahead: int) -> None:
            forks.record(cuda.get_current_stream())
            branch.wait_event(forks)
            product.run(branch.ptr)
            joined.record(branch)

        return launch

    @functools.cached_property
    def _branch(self) -> Any:
        return self.problem.net.backend.xp.cuda.Stream(non_blocking=True)

    def _enqueue(self, m: int, ahead: int) -> None:
        """One step of m samples, the ahead-th of its recording."""
        step = self._launches(m)
        for launch in (*(step.prologue if ahead == 0 else ()), *step.launches):
            launch(ahead)
        if step.joined:
            self.problem.net.backend.xp.cuda.get_current_stream().wait_event(step.joined)
        if self._plan_of(m).rule is None and self.trains:
            if regularization := self.problem.regularization:
                self.ops.regularize(regularization, self.theta, self.is_weight, self.g)
            self.ops.update_step(
                self.rule, self.theta, self.g, self.slots, self._rows, self.measured, None, self._state, ahead,
                step.copies,
            )  # fmt: skip

    def _advance(self, steps: int, fewer: int) -> None:
        self._shift(steps, steps * fewer)

    def _shift(self, steps: int, rows: int) -> None:
        kernel = self.ops.kernel_of("advance.cu", "advance", self.problem.net.dtype)
        self.ops.launch(kernel, (1,), (1,), self._state, steps, rows)

    def close(self) -> None:
        """Wait for what was launched: then graphs and what they work on may go."""
        if gpu_faults.lost():
            self._products.clear()
            self._graphs.clear()
            return
        super().close()
        streams = [self.problem.net.backend.xp.cuda.get_current_stream()]
        streams += [self._next.stream] if self._next else []
        streams += [self._branch] if "_branch" in self.__dict__ else []
        try:
            for stream in streams:
                stream.synchronize()
        finally:
            self._graphs.clear()
            self._let_go()
            self._next = None
            for made in ("_launches", "_plan_of", "_vectors"):  # they hold on to this object, and to its memory
                self.__dict__.pop(made, None)

    def _let_go(self) -> None:
        """Give back what cuBLASLt made."""
        self._products.clear()
        if isinstance(self._library, cublaslt.Library):
            self._library.close()


MANY = 8  # steps put off in an epoch, from which on it runs eagerly
_Launch = Callable[[int], None]  # of the step of that number in its recording


@dataclasses.dataclass
class _Step:
    """What a step launches; before the first one of a recording the prologue.

    `joined`: the event that ends what runs on a branch. `copies`: of the weights, for the update (see `update_step`).
    """

    prologue: list[_Launch]
    launches: list[_Launch]
    joined: Any = None
    copies: tuple[Array, Array] | None = None


class _Order:
    """An epoch's order on its way to the device, in a stream of its own."""

    def __init__(self, xp: Any, n: int) -> None:
        self.stream = xp.cuda.Stream(non_blocking=True)
        # What was in the pinned memory is on the device; what is there has been put in its place.
        self._landed, self._used = (xp.cuda.Event(disable_timing=True) for _ in range(2))
        self._pinned = np.frombuffer(xp.cuda.alloc_pinned_memory(8 * n), np.int64, n)
        self._there = xp.zeros(n, np.int64)
        self._used.record()  # after the zeros
        self._taken: np.ndarray | None = None
        self._current_stream = xp.cuda.get_current_stream

    def take(self, order: np.ndarray) -> None:
        """Begin to copy it."""
        n, self._taken = len(order), None
        if n > len(self._pinned):
            return
        self._landed.synchronize()
        self._pinned[:n] = order
        self.stream.wait_event(self._used)
        self._there[:n].set(self._pinned[:n], self.stream)
        self._landed.record(self.stream)
        self._taken = order

    def put(self, order: np.ndarray, place: Array) -> bool:
        """Put it in its place, in the current stream; False if it is not what was taken."""
        if self._taken is not order:
            return False
        stream = self._current_stream()
        stream.wait_event(self._landed)
        place[...] = self._there[: len(order)]
        self._used.record(stream)
        return True


def _refuse(size: int) -> Any:
    raise RuntimeError(f"{size} bytes are allocated in a step, which is not to happen")


def _found(vectors: dict[str, Any], argument: Any) -> Any:
    if isinstance(argument, plans.Place):
        return vectors[argument.vector][argument.start : argument.start + argument.size]
    return 0 if argument == plans.AHEAD else argument


def device_of(cp: Any) -> plans.Device:
    """What a plan needs to know of the current GPU."""
    runtime, index = cp.cuda.runtime, cp.cuda.runtime.getDevice()
    major, minor, processors, shared, clock, memory_clock, bits = (
        runtime.deviceGetAttribute(attribute, index) for attribute in (75, 76, 16, 97, 13, 36, 37)
    )
    arch = 10 * major + minor
    name = runtime.getDeviceProperties(index)["name"].decode()
    lanes = 64 if arch in (60, 70, 72, 75, 80) else 128
    return plans.Device(name, arch, processors, shared, 2e3 * memory_clock * bits / 8, 2e3 * clock * lanes * processors)


TASKS = {"labels": 1, "binary": 2, "multilabel": 2}  # as in right.cuh


RUNGS = ("graph", "compiled", "replay", "eager")


def choose(problem: Problem, rule: Optimizer, batch_size: int, seed: int, steps: int) -> Eager:
    """The highest rung of the ladder that can run this, or the one that BACKPROP_GPU_EXECUTOR names.

    Raises ConfigError for another name, and where the named one cannot.
    """
    be, wanted = problem.net.backend, os.environ.get("BACKPROP_GPU_EXECUTOR", "") or "auto"
    if wanted not in ("auto", *RUNGS):
        raise ConfigError(f"BACKPROP_GPU_EXECUTOR is {wanted!r}", f"set it to {', '.join(RUNGS)} or auto")
    kinds: dict[str, type[Eager]] = {"graph": Graph} if be.name == "cupy" else {"replay": Replay}
    if be.fast:
        kinds = {"compiled": importlib.import_module(".compiled", __package__).Compiled, **kinds}
    if wanted not in ("auto", "eager", *kinds):
        where = {"cupy": "a GPU", "numpy": "NumPy with numba" if be.fast else "NumPy"}[be.name]
        raise ConfigError(f"BACKPROP_GPU_EXECUTOR is {wanted}, and this runs on {where}", "set it to eager or auto")
    for name, kind in kinds.items():
        if wanted in ("auto", name):
            try:
                return kind(problem, rule, batch_size, seed, steps)
            except (plans.Unplanned, UnrecordableError) as e:
                if wanted == name:
                    raise ConfigError(f"no {wanted} of steps: {e}", "unset BACKPROP_GPU_EXECUTOR") from None
    return Eager(problem, rule, batch_size, seed, steps)
