"""The loop over epochs and steps, once all settings are checked: what a run does, keeps and tells."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from .activations import Array
from .backend import to_host
from .batches import epoch_plan
from .checkpoint import COLUMNS, Checkpoint, RunState
from .costs import Cost
from .errors import CheckpointError, ConfigError, DivergenceError
from .executors import Eager, Problem
from .gpu_faults import lost, told
from .history import History, Hook, Run, call
from .inputs import Samples
from .interrupts import WholeSteps
from .network import CHUNK_ROWS, Batch, Views, backward, forward
from .optimizers import Optimizer
from .regularization import Regularization
from .resume import Checkpoints, digest
from .schedules import Schedule, during
from .stopping import Ending
from .tally import Tally, tally_for

STILL = 1e-6  # of the cost: a smaller change is none
MOST_SECONDS = 50_000  # epochs whose seconds a file tells one by one


@dataclass
class Loop:
    """A run of `train`. `problem`, `rule`, `executor`: what is minimised, by which rule, and what takes the steps.

    `learned`: the cost and task that the network has from the first step on. `on_step`, `on_epoch`: callbacks;
    `each_step`: whether one wants to see every step, `one_by_one`: whether each is looked after.
    """

    run: Run
    problem: Problem
    rule: Optimizer
    factor: Schedule
    executor: Eager
    ending: Ending
    stack: ExitStack
    whole_steps: WholeSteps
    batches: str
    batch_size: int
    seed: int
    learned: tuple[Cost, str]
    held_out: Samples | None
    weights: np.ndarray | None  # of the samples, on the host
    on_step: list[Hook]
    on_epoch: list[Hook]
    each_step: bool
    one_by_one: bool
    gradient_norms: bool
    gradient_error: bool
    retreats: int
    checkpoints: Checkpoints | None
    settings: dict[str, Any]

    def __post_init__(self) -> None:
        self._began = time.perf_counter()  # less, by what went before the run was resumed
        net = self.run.net
        self._closed, self._position = 0, 0  # epochs that are over; steps of the one under way
        self._samples = 0  # that the closed ones have seen
        self._under_way = 0.0  # seconds of the epoch under way, from before the run was resumed
        self._since, self._put_off = self._began, 0  # when that epoch began; of the executor, from before likewise
        self._start: Array | None = None  # parameters where the epoch under way began, where somebody asks for them
        # What a run that diverges goes back to: vectors, how many epochs were closed then, the cost of the first step.
        self._good: dict[str, Array] = {}
        self._good_epoch = 0
        self._first_cost: float | None = None
        self._last: Array | None = None  # parameters, where the network has better ones
        self._before = net.criterion, net.task
        self._theta_at_first = digest(net.theta) if self.checkpoints else ""
        self._saving = False
        self._callback_failed = False  # what ends the run is not its own error then
        self._went_on = 0, 0, 0.0  # after which step, for how many epochs its learning rate was made, and that
        self._lrs: Sequence[float] = ()  # of the steps of the epoch under way
        self._tally: Tally | None = None
        self._next: tuple[np.ndarray, np.ndarray] | None = None

    # --------------------------------------------------------------------------------------------- the run

    def go(self) -> None:
        """Train until the run ends. Where it is stopped, the last whole step is in the file, if there is to be one."""
        run = self.run
        try:
            with told(run.net.backend.xp, self.batch_size):
                while not run.history.stopped:
                    self._epoch()
                self._save(last=True)
        except BaseException as e:
            self._stop_at_whole_step(e)
            raise

    def _epoch(self) -> None:
        """Take the steps of the epoch that are left, and close it; or go back to its start."""
        run, history, executor = self.run, self.run.history, self.executor
        steps, run.epoch = run.steps_per_epoch, self._closed + 1
        self._since = time.perf_counter() - self._under_way
        order, whole_ends = self._next or self._plan(run.epoch)
        self._next, ends = None, whole_ends.tolist()
        watched: Any = history.train_cost if self.held_out is None else history.validation_cost
        scheduled, halves = during(self.factor, watched), 0.5 ** len(history.retreats)
        first, total = self._closed * steps, run.epochs * steps
        lrs = [lr_of(self.rule.lr * halves, scheduled, step, total) for step in range(first, first + steps)]
        if not self._position:
            self._keep_start()
        if self.gradient_error and not run.step:
            history.gradient_error = executor.gradient_error(order, ends)
        self._lrs = lrs
        executor.begin(order, ends, lrs, first + 1, self._position, self._put_off)
        self._put_off = 0
        try:
            late = self._steps()
            if run.epoch < run.epochs and not late:  # while a GPU is at work
                self._next = self._plan(run.epoch + 1)
                executor.ahead(self._next[0])
            self._settle()
        except DivergenceError as e:
            if self._callback_failed:
                raise
            self._retreat(e)
            return
        self._close(order, ends, lrs, late)

    def _plan(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        return epoch_plan(self.batches, len(self.problem.samples), self.batch_size, self.seed, epoch)

    def _keep_start(self) -> None:
        if self.ending.parameter_tolerance is not None:
            self._start = self.run.net.theta.copy()
        costs = [math.inf if self._first_cost is None else self._first_cost, *self.run.history.train_cost]
        if self.retreats and (not self._closed or costs[-1] <= min(costs)):
            good = {"good": self.run.net.theta.copy()}
            good |= {f"good.{k}": slot.copy() for k, slot in enumerate(self.executor.slots, 1)}
            if self.ending.best is not None:
                good["good.best"] = self.ending.best
            self._good_epoch, self._good = self._closed, good

    def _steps(self) -> bool:
        """The steps that the epoch still has; True where the time was over before them."""
        run, steps, checkpoints = self.run, self.run.steps_per_epoch, self.checkpoints
        while self._position < steps:
            run.whole = False
            most = 1 if self.one_by_one else steps - self._position
            if checkpoints:
                most = min(most, checkpoints.until(run.step) or most)
            taken = self.executor.run(self._position, most)
            if taken:
                self._position, run.step = self._position + taken, run.step + taken
                run.lr = self._lrs[self._position - 1]
                run.net.criterion, run.net.task = self.learned
            run.whole = True
            if not taken:
                break
            if self.each_step:
                self._settle()  # nobody is shown a step that was not taken
            for hook in self.on_step:
                self._call(hook)
            due = checkpoints is not None and checkpoints.due(run.step)
            if due or self.whole_steps.waiting:
                self._settle()
            if due:
                self._save()
            self.whole_steps.deliver()
            if self.ending.late():
                return True
        return self.ending.late()  # of an epoch whose steps were all taken before the run was resumed

    def _call(self, hook: Hook) -> None:
        self._callback_failed = True
        call(hook, self.run)
        self._callback_failed = False

    def _settle(self) -> None:
        """Wait for the steps so far; DivergenceError where one of them left the finite numbers."""
        run, executor, history = self.run, self.executor, self.run.history
        run.whole = False
        executor.finish()
        run.whole = True
        history.executor = executor.told
        diverged = int(executor.diverged[0])  # the host waits for the device here
        if diverged:
            if diverged == 1:  # on a GPU the host hears of it here
                run.net.criterion, run.net.task = self._before
            run.step, self._position = diverged - 1, (diverged - 1) % run.steps_per_epoch
            step, _, lr = self._went_on
            of_last = self._lrs[self._position - 1] if self._position else self._lr_of_last_epoch()
            run.lr = lr if run.step == step else of_last
            raise DivergenceError(run.epoch, diverged, self._lrs[self._position], self._cost_before())

    def _lr_of_last_epoch(self) -> float:
        return self.run.history.lr[-1] if self._closed else 0.0

    def _cost_before(self) -> float | None:
        """Of the last step that was taken, or the last epoch, the mean cost; None before the first step."""
        if not self._position:
            return self.run.history.train_cost[-1] if self._closed else None
        order, ends = self._plan(self.run.epoch)
        i = self._position - 1
        rows = order[ends[i] : ends[i + 1]]
        return float(self.executor.measured[i, 0]) / whole(self.weights, rows, self.problem.reduction)

    def _retreat(self, e: DivergenceError) -> None:
        """Go back to the end of the epoch that cost least, with half the learning rate, or raise e."""
        run, history, n = self.run, self.run.history, self._good_epoch
        if len(history.retreats) >= self.retreats:
            raise e
        run.whole = False
        history.retreats.append(e.step)
        for name in ("epoch", "seconds", *COLUMNS):
            del getattr(history, name)[n:]
        history.samples = self._samples = n * len(self.problem.samples)
        run.net.theta[...] = self._good["good"]
        for k, slot in enumerate(self.executor.slots, 1):
            slot[...] = self._good[f"good.{k}"]
        self.ending.go_on(history.validation_cost, self._good.get("good.best"))
        self.executor.go_back()
        self._closed, run.step, self._position, self._under_way, self._next = n, n * run.steps_per_epoch, 0, 0.0, None
        self._went_on = 0, 0, 0.0
        run.lr, run.whole = self._lr_of_last_epoch(), True
        warnings.warn(
            f"{e.cause}; back to the start of epoch {n + 1} with half the learning rate "
            f"({len(history.retreats)} of {self.retreats} times)",
            stacklevel=2,
        )

    def _close(self, order: np.ndarray, ends: list[int], lrs: Sequence[float], late: bool) -> None:
        """What is to be done and told after the steps of an epoch."""
        run, history, executor, problem = self.run, self.run.history, self.executor, self.problem
        done, seen = self._position, order[: ends[self._position]]
        cost_sum, right = to_host(executor.measured)[:done].sum(axis=0)
        history.seconds.append(time.perf_counter() - self._since)
        history.epoch.append(run.epoch)
        history.train_cost.append(float(cost_sum) / whole(self.weights, seen, problem.reduction))
        history.train_accuracy.append(None if problem.samples.task == "regression" else float(right) / len(seen))
        after = None
        if self.held_out is not None:
            if self._tally is None:
                made = tally_for(executor, self.held_out, self.learned[0])
                self._tally = self.stack.enter_context(closing(made))
            after = evaluation(self._tally, problem.reduction)
        history.validation_cost.append(after.cost if after else None)
        history.validation_accuracy.append(after.accuracy if after else None)
        history.lr.append(run.lr)
        history.steps.append(run.step)
        history.samples += len(seen)
        norms = None
        if self.gradient_norms or self.ending.gradient_tolerance is not None:
            everything = np.arange(len(problem.samples))
            norms = _gradient_norms(problem, whole(self.weights, everything, problem.reduction))
        history.gradient_norms.append(norms.layers if norms and self.gradient_norms else None)
        for hook in self.on_epoch:
            self._call(hook)
        moved = None
        if self.ending.parameter_tolerance is not None and max(lrs[:done]) > 0:
            moved = float(abs(run.net.theta - self._start).max())
        reason = self.ending.reason(run.epoch, run.stop, norms and norms.whole, after and after.cost, late, moved)
        reason = reason or ("epochs" if run.epoch == run.epochs else "")
        if run.epoch == 1 and self.retreats:
            self._first_cost = float(executor.measured[0, 0]) / whole(self.weights, order[: ends[1]], problem.reduction)
        self._warn_of_no_progress(run.epoch)
        last = run.net.theta.copy() if reason and self.ending.patience is not None else None
        best_epoch, best = self.ending.outcome() if reason else (None, None)
        run.whole = False  # until here, a run that is cut closes the epoch again
        if best is not None:
            run.net.theta[...] = best
        self._last, history.best_epoch, history.stopped = last, best_epoch, reason or None
        self._closed, self._position, self._under_way, self._samples = run.epoch, 0, 0.0, history.samples
        run.whole = True
        if not reason:
            if self.checkpoints and self.checkpoints.due_after_epoch(run.epoch):
                self._save()
            self.whole_steps.deliver()

    def _warn_of_no_progress(self, epoch: int) -> None:
        """Once, where the second epoch costs what the first one did."""
        costs, moving = self.run.history.train_cost, self.run.history.lr[0] > 0
        if epoch == 2 and moving and abs(costs[1] - costs[0]) < STILL * costs[0]:
            warnings.warn(
                f"no progress: the training cost was {costs[0]:.6g} in each of the first two epochs; take a larger lr, "
                "or another initialiser or activation (units that are 0 for every sample learn nothing)",
                stacklevel=2,
            )

    # --------------------------------------------------------------------------------------------- the file

    def state(self) -> RunState:
        """Where the run stands, at a whole step."""
        run, history, ending, n = self.run, self.run.history, self.ending, self._closed
        seconds = [round(s, 6) for s in history.seconds[:n]]
        if n > MOST_SECONDS:
            seconds = [sum(seconds) / n]
        vectors = {name: to_host(a) for name, a in self._good.items()}
        if self._start is not None and self._position:
            vectors["start"] = to_host(self._start)
        if history.stopped:
            if history.best_epoch is not None and history.best_epoch != n:
                vectors["last"] = to_host(self._last)
        elif ending.best is not None:
            vectors["best"] = to_host(ending.best)
        columns = {
            name: np.array(values[:n], np.int64 if name == "steps" else np.float64)
            for name in COLUMNS
            if None not in (values := getattr(history, name))[:n] and (n or name in ("train_cost", "lr", "steps"))
        }
        error = history.gradient_error
        under_way = time.perf_counter() - self._since if self._position else 0.0
        step, epochs, _ = self._went_on
        return RunState(
            self.settings, run.epochs, n, self._position, run.step, run.lr,
            epochs if run.step == step else run.epochs, self._samples, history.stopped,
            history.best_epoch, error if error is None or math.isfinite(error) else None, list(history.retreats),
            self._good_epoch, self._first_cost,
            [to_host(slot) for slot in self.executor.slots], vectors, to_host(self.executor.measured)[: self._position],
            columns, self._theta_at_first, bool(run.stop),
            (self._put_off or self.executor.put_off) if self._position else 0,
            self.checkpoints.whereabouts(run.net.backend, self.executor.told) if self.checkpoints else {},
            {"seconds": seconds, "under_way": under_way, "elapsed": time.perf_counter() - self._began},
        )  # fmt: skip

    def _save(self, last: bool = False) -> None:
        if self.checkpoints:
            self._saving = True
            self.checkpoints.write(self.run.net, self.state, last)
            self._saving = False
            self.run.saved = self.checkpoints.kept()

    def _stop_at_whole_step(self, e: BaseException) -> None:
        """Where a signal or an error has stopped the run: bring it to the last whole step, and save that.

        Not where the file is better: what it holds already is further from a divergence.
        """
        file, ours = self.checkpoints, not self._callback_failed
        diverged, failed = ours and isinstance(e, DivergenceError), ""
        if self.run.whole and not self._saving and not lost():
            try:
                try:
                    self._settle()
                except DivergenceError as also:  # on a GPU, of a step that was taken for done
                    if not diverged:
                        e.add_note(also.cause)
                    diverged = True
                better = diverged and file is not None and file.kept() is not None
                if self.run.step and not better and not (ours and isinstance(e, CheckpointError)):
                    self._save(last=True)
            except Exception as other:
                if not isinstance(e, Exception):
                    raise
                failed = (str(other).splitlines() or [type(other).__name__])[0]
        if file is None:
            return
        if failed:
            e.add_note(f"the run could not be saved: {failed}")
        if (kept := file.kept()) is not None:
            e.add_note(f"{file.name} holds the run after step {kept}")

    def go_on_from(self, found: Checkpoint) -> None:
        """Put everything where it was when the file was written.

        Raises CheckpointError, ConfigError, and BackendError for want of memory, before anything has changed.
        """
        run, history, state, slots = self.run, self.run.history, found.run, self.executor.slots
        assert state is not None
        if len(slots) != len(state.slots):
            raise CheckpointError(f"the file has {len(state.slots)} slots, not {len(slots)}", "save to another file")
        self._refuse_another_schedule(state)
        place = run.net.backend.asarray
        vectors = {name: place(a) for name, a in state.vectors.items()}
        saved, measured = [place(slot) for slot in state.slots], place(state.measured)
        if self.checkpoints:
            self.checkpoints.compare(state, self.checkpoints.whereabouts(run.net.backend, self.executor.told))
            run.saved = state.step
        run.net.theta[...] = vectors.get("last", found.net.theta)
        for slot, then in zip(slots, saved, strict=True):
            slot[...] = then
        if state.step:
            run.net.criterion, run.net.task = self.learned
        self.executor.measured[: state.position] = measured
        recall(history, state)
        history.stopped = history.best_epoch = None
        self._good = {name: a for name, a in vectors.items() if name.startswith("good")}
        self._good_epoch, self._first_cost = state.good_epoch, state.first_cost
        self._theta_at_first, self._start = state.began, vectors.get("start")
        self._closed, self._position, self._samples = state.epoch, state.position, state.samples
        self._put_off, self._under_way = state.put_off, state.clock["under_way"]
        self._went_on = state.step, state.lr_epochs, state.lr
        run.epoch, run.step, run.lr, run.stop = state.epoch, state.step, state.lr, state.stop
        self._began -= state.clock["elapsed"]
        self.ending.start(state.clock["elapsed"])
        self.ending.go_on(history.validation_cost, vectors.get("best", found.net.theta))

    def _refuse_another_schedule(self, state: RunState) -> None:
        """ConfigError where the schedule, which may be anybody's function, makes another lr of the last step."""
        if not state.step or (state.retreats and not state.position):
            return
        watched = state.columns.get("train_cost" if self.held_out is None else "validation_cost", np.zeros(0)).tolist()
        scheduled = during(self.factor, watched if state.position else watched[:-1])
        lr, total = self.rule.lr * 0.5 ** len(state.retreats), state.lr_epochs * self.run.steps_per_epoch
        lr = lr_of(lr, scheduled, state.step - 1, total)
        if lr != state.lr:
            raise ConfigError(
                f"the schedule makes lr {lr:g} in step {state.step}, which was {state.lr:g}", "give the same one"
            )


def recall(history: History, state: RunState) -> None:
    """Put into a history what a file tells of it."""
    n, seconds = state.epoch, state.clock["seconds"]
    history.epoch = list(range(1, n + 1))
    for name in COLUMNS:
        setattr(history, name, state.columns[name].tolist() if name in state.columns else [None] * n)
    history.seconds = list(seconds) if len(seconds) == n else [seconds[0]] * n
    history.samples, history.gradient_error = state.samples, state.gradient_error
    history.retreats, history.resumed = list(state.retreats), state.step
    history.stopped, history.best_epoch = state.stopped, state.best_epoch
    history.executor = state.where.get("executor")


class Evaluation(NamedTuple):
    """Mean cost over the samples, and accuracy from 0 to 1, None for regression."""

    cost: float
    accuracy: float | None


def evaluation(tally: Tally, reduction: str) -> Evaluation:
    """Of the data of `tally`, at the theta of now."""
    cost, right = tally.totals()
    samples, n = tally.samples, len(tally.samples)
    weights = None if samples.weights is None else to_host(samples.weights)
    divisor = whole(weights, np.arange(n), reduction)
    return Evaluation(cost / divisor, None if samples.task == "regression" else right / n)


def whole(weights: np.ndarray | None, rows: np.ndarray, reduction: str) -> float:
    """What the sum of the weighted costs of these samples is divided by."""
    if reduction == "sum":
        return 1.0
    return float(len(rows)) if weights is None else float(weights[rows].sum(dtype=np.float64)) or 1.0


class _Norms(NamedTuple):
    """Of a gradient: of dC/dW[l] for l = 1..L, and of the whole of what is trained."""

    layers: list[float]
    whole: float


def _gradient_norms(problem: Problem, whole: float) -> _Norms:
    """Of the gradient over all the data at theta, without dropout; `whole` is what its cost is divided by."""
    net, be, samples, n = problem.net, problem.net.backend, problem.samples, len(problem.samples)
    total, flat = (be.zeros(net.theta.size, net.dtype) for _ in range(2))
    views = Views(flat, net.layers, net.biased)
    all_rows = Batch(net, min(n, CHUNK_ROWS), gradient=True)
    with np.errstate(all="ignore"):
        for i in range(0, n, CHUNK_ROWS):
            rows = slice(i, min(i + CHUNK_ROWS, n))
            batch = all_rows.first(rows.stop - i)
            be.ops.gather(be.asarray(samples.X[rows]), slice(0, batch.m), batch.A[0])
            forward(be.ops, net, batch)
            w = 1 / whole if samples.weights is None else be.asarray(samples.weights[rows]) / whole
            backward(be.ops, net, batch, be.asarray(samples.T[rows]), w, problem.cost, views)
            total += flat
        penalties = Regularization(problem.regularization.l1, problem.regularization.l2)
        if penalties:
            be.ops.regularize(penalties, net.theta, net.weight_mask(), total)
        sums = Views(total, net.layers, net.biased)
        trained = [p for p in (*sums.W[problem.frozen + 1 :], *sums.b[problem.frozen + 1 :]) if p is not None]
        return _Norms([_norm(dW) for dW in sums.W[1:]], math.hypot(*map(_norm, trained)))


def _norm(g: Array) -> float:
    """||g||, of entries that may be too large or small to be squared in their dtype."""
    largest = float(abs(g).max())
    if largest == 0 or not math.isfinite(largest):
        return largest
    return largest * math.sqrt(float(((g / largest) ** 2).sum(dtype=np.float64)))


def lr_of(lr: float, factor: Schedule, step: int, total: int) -> float:
    """The learning rate of a step, counted from 0."""
    try:
        value = lr * float(factor(step, total))
    except (TypeError, ValueError) as e:
        raise ConfigError(
            f"the schedule {factor!r} fails: {e}", "give a function of (step, total) that returns a number"
        ) from e
    if not (math.isfinite(value) and value >= 0):
        raise ConfigError(
            f"the schedule {factor!r} makes lr {value:g} in step {step + 1}", "return a finite factor, 0 or more"
        )
    return value
