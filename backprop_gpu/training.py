"""Training: the loop over epochs and steps, validation, history, callbacks, and stopping in good order."""

from __future__ import annotations

import contextlib
import math
import operator
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, NamedTuple

import numpy as np

from . import inputs
from .activations import Array
from .backend import to_host
from .batches import check_seed, epoch_order, steps_per_epoch
from .checkpoint import check_target, save_network
from .costs import Cost, choose_cost
from .errors import ConfigError, DataError, DivergenceError
from .executors import Eager
from .network import Network, forward_chunks, natural_task
from .optimizers import Adam, Optimizer, choose_optimizer
from .schedules import Schedule, choose_schedule


@dataclass
class History:
    """What happened, one entry an epoch in each list.

    `train_cost`, `train_accuracy`: means over the epoch's training steps, each step measured before its update.
    `validation_cost`, `validation_accuracy`: after the epoch. Accuracies are None for regression, validation without
    data. `lr`: of the epoch's last step. `steps`: done so far. `seconds`: the epoch's wall time, validation left out.
    """

    epoch: list[int] = field(default_factory=list)
    train_cost: list[float] = field(default_factory=list)
    train_accuracy: list[float | None] = field(default_factory=list)
    validation_cost: list[float | None] = field(default_factory=list)
    validation_accuracy: list[float | None] = field(default_factory=list)
    lr: list[float] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def __len__(self) -> int:
        """How many epochs."""
        return len(self.epoch)


class Evaluation(NamedTuple):
    """Mean cost over the samples, and accuracy from 0 to 1, None for regression."""

    cost: float
    accuracy: float | None


@dataclass
class Run:
    """A training run as callbacks see it.

    `epoch`, from 1, is under way or just over; `step` says how many steps of the whole run are done, `lr` is the last
    one's. Set `stop` to end the run after this epoch. `whole` is False only while a step is under way: then theta may
    be between two steps.
    """

    net: Network
    epochs: int
    steps_per_epoch: int
    history: History
    epoch: int = 0
    step: int = 0
    lr: float = 0.0
    stop: bool = False
    whole: bool = True


Callback = Callable[[Run], Any]
BATCH_SIZE = 128


def train(
    net: Network,
    X: Any,
    T: Any,
    cost: str | None = None,
    optimizer: Optimizer | str = Adam(),  # noqa: B008 - frozen, no state
    schedule: Schedule | str | None = None,
    epochs: int = 10,
    batch_size: int = BATCH_SIZE,
    validation: tuple[Any, Any] | None = None,
    callbacks: Sequence[Callback] = (),
    seed: int = 0,
    save: str | os.PathLike[str] | None = None,
) -> History:
    """Train `net` in place on X (m, N_0) and T, and return the history.

    X, T: see `Network.forward` and `Network.gradients`; NumPy data that fits the network's dtype (or is uint8) is used
    where it lies, on a GPU it is copied to the device once. `cost`, `optimizer`, `schedule`: as they are, or by name,
    an optimizer then at the learning rate of `optimizers.OPTIMIZERS`. The schedule's factor multiplies the optimizer's
    lr. Each epoch visits the samples in a fresh order drawn from (seed, epoch); the last, smaller batch is kept, its
    mean taken over its own size. A batch_size above the number of samples means all of them, with a warning unless it
    is the default. A second call starts with fresh slots.

    `callbacks`: functions called with the `Run` after every epoch, or objects whose method `on_step` is called with it
    after every step; an object may be both. `save`: where to write the network when training is over or stopped.

    Ctrl-C ends training after the step it falls into, raising KeyboardInterrupt with the network at that whole step; a
    second Ctrl-C does not wait. Raises DataError, ConfigError; DivergenceError when the cost, the gradient or the
    outcome of a step is not finite, with the network as it was before it; CheckpointError when `save` cannot be
    written.
    """
    chosen = choose_cost(cost, net.output)
    rule, factor = choose_optimizer(optimizer), choose_schedule(schedule)
    epochs, batch_size = _positive("epochs", epochs), _positive("batch_size", batch_size)
    seed = check_seed(seed)
    data, wanted, task = _checked(net, X, T, chosen)
    held_out = None if validation is None else _checked(net, *_pair(validation), chosen)
    n = len(data)
    if batch_size > n:
        if batch_size != BATCH_SIZE:
            warnings.warn(f"batch_size {batch_size} is more than the {n} samples: each batch holds all", stacklevel=2)
        batch_size = n
    if save is not None:
        check_target(save)

    be, history = net.backend, History()
    steps = steps_per_epoch(n, batch_size)
    run = Run(net, epochs, steps, history)
    on_step, on_epoch = _hooks(callbacks)
    with _saved_if_stopped(run, save), _alone(net), be.active(), _WholeSteps() as whole_steps:
        executor = Eager(net, chosen, task, rule, be.asarray(data), be.asarray(wanted), batch_size)
        if held_out is not None:
            held_out = be.asarray(held_out[0]), be.asarray(held_out[1]), held_out[2]
        net.cost, net.task = chosen.name, _task(net, wanted)
        measured = be.zeros(2 * steps, np.dtype(np.float64)).reshape(steps, 2)
        for run.epoch in range(1, epochs + 1):
            start = time.perf_counter()
            order = be.asarray(epoch_order(n, seed, run.epoch))
            for i in range(steps):
                lr = _lr(rule.lr, factor, run.step, epochs * steps)
                rows = order[i * batch_size : (i + 1) * batch_size]
                run.whole = False
                applied = executor.step(rows, lr, run.step + 1, measured[i])
                if applied:
                    run.step, run.lr = run.step + 1, lr
                run.whole = True
                if not applied:
                    break
                for call in on_step:
                    _call(call, run)
                whole_steps.deliver()
            cost_sum, right = to_host(measured).sum(axis=0)  # the host waits for the device here, once an epoch
            if diverged := int(executor.diverged[0]):
                raise DivergenceError(run.epoch, diverged, _lr(rule.lr, factor, diverged - 1, epochs * steps))
            history.seconds.append(time.perf_counter() - start)
            history.epoch.append(run.epoch)
            history.train_cost.append(float(cost_sum) / n)
            history.train_accuracy.append(None if task == "regression" else float(right) / n)
            after = None if held_out is None else _evaluate(net, *held_out, chosen)
            history.validation_cost.append(after.cost if after else None)
            history.validation_accuracy.append(after.accuracy if after else None)
            history.lr.append(run.lr)
            history.steps.append(run.step)
            for call in on_epoch:
                _call(call, run)
            whole_steps.deliver()
            if run.stop:
                break
    if save is not None:
        save_network(net, save)
    return history


def evaluate(net: Network, X: Any, T: Any, cost: str | None = None) -> Evaluation:
    """Mean cost and accuracy of `net` on X and T, as in `train`. `cost` None is the one the network was trained with.

    Raises DataError, ConfigError.
    """
    chosen = choose_cost(cost or net.cost, net.output)
    data, wanted, task = _checked(net, X, T, chosen)
    be = net.backend
    with be.active():
        return _evaluate(net, data, be.asarray(wanted), task, chosen)


def check_data(net: Network, X: Any, T: Any, cost: str | None = None) -> None:
    """Raise what `train` and `evaluate` would raise for X, T and `cost` (None: the canonical one); else do nothing."""
    _checked(net, X, T, choose_cost(cost, net.output))


def _evaluate(net: Network, data: Array, wanted: Array, task: str, cost: Cost) -> Evaluation:
    be, n = net.backend, len(data)
    totals = []
    with np.errstate(all="ignore"):
        for rows, batch in forward_chunks(net, data):
            Z, T = batch.Z[-1], wanted[rows]
            be.ops.output_delta(cost, net.g, Z, T, 1.0, batch.Delta[-1], batch.C)
            totals.append(be.zeros(2, np.dtype(np.float64)))
            be.ops.measure(task, net.g, Z, T, batch.C, totals[-1])
    cost_sum, right = np.sum([to_host(t) for t in totals], axis=0)
    return Evaluation(float(cost_sum) / n, None if task == "regression" else float(right) / n)


def _checked(net: Network, X: Any, T: Any, cost: Cost) -> tuple[Array, Array, str]:
    """Features, targets, and the task for counting: "regression" where targets under a sigmoid are not all 0 or 1."""
    data = inputs.features(X, net.layers[0], net.dtype)
    wanted = inputs.targets(T, len(data), net.layers[-1], cost.name, net.dtype)
    task = _task(net, wanted)
    if task in ("binary", "multilabel") and not bool(((wanted == 0) | (wanted == 1)).all()):
        task = "regression"
    return data, wanted, task


def _task(net: Network, wanted: Array) -> str:
    """What a network learns from targets as `inputs` left them: labels always make it one that predicts labels."""
    return "labels" if wanted.ndim == 1 else natural_task(net.g, net.layers[-1])


def _pair(validation: Any) -> tuple[Any, Any]:
    if not (isinstance(validation, (tuple, list)) and len(validation) == 2):
        raise DataError("validation is not a pair", "pass validation=(X, T)")
    return validation[0], validation[1]


def _positive(name: str, value: Any) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = 0
    if number < 1:
        raise ConfigError(f"{name} is {value!r}", "give an integer, 1 or more")
    return number


def _lr(lr: float, factor: Schedule, step: int, total: int) -> float:
    """The learning rate of a step, counted from 0."""
    try:
        value = lr * float(factor(step, total))
    except TypeError as e:
        raise ConfigError(
            f"the schedule {factor!r} fails: {e}", "give a function of (step, total) that returns a number"
        ) from e
    if not (math.isfinite(value) and value >= 0):
        raise ConfigError(
            f"the schedule {factor!r} makes lr {value:g} in step {step + 1}", "return a finite factor, 0 or more"
        )
    return value


def _hooks(callbacks: Any) -> tuple[list[Callback], list[Callback]]:
    """What to call after each step, and after each epoch."""
    if not isinstance(callbacks, (list, tuple)) or not all(callable(c) or hasattr(c, "on_step") for c in callbacks):
        raise ConfigError(
            f"callbacks is {callbacks!r}",
            "give a list of functions of the run, or of objects with a method on_step(run)",
        )
    return [c.on_step for c in callbacks if hasattr(c, "on_step")], [c for c in callbacks if callable(c)]


@contextlib.contextmanager
def _saved_if_stopped(run: Run, save: str | os.PathLike[str] | None) -> Iterator[None]:
    """Save the last whole step where the run is stopped from outside: by Ctrl-C, or a signal the program treats so."""
    try:
        yield
    except Exception:
        raise
    except BaseException:
        if save is not None and run.step and run.whole:
            save_network(run.net, save)
        raise


_in_training: set[int] = set()
_in_training_lock = threading.Lock()


@contextlib.contextmanager
def _alone(net: Network) -> Iterator[None]:
    """ConfigError where this very network is being trained already, by another thread or further up."""
    with _in_training_lock:
        if id(net) in _in_training:
            raise ConfigError("this network is being trained already", "train a copy of it: copy.deepcopy(net)")
        _in_training.add(id(net))
    try:
        yield
    finally:
        with _in_training_lock:
            _in_training.discard(id(net))


def _call(callback: Callback, run: Run) -> None:
    try:
        callback(run)
    except Exception as e:
        e.add_note(
            f"raised by the callback {callback!r} in epoch {run.epoch}, after step {run.step}; "
            "the network is at that whole step"
        )
        raise


class _WholeSteps:
    """Holds back Ctrl-C, and SIGTERM where the program handles it, until `deliver` is called between two steps.

    A second signal is not held back. Outside the main thread, where Python delivers no signals, it does nothing.
    """

    def __init__(self) -> None:
        self._handlers: dict[int, Any] = {}
        self._waiting: int | None = None

    def __enter__(self) -> _WholeSteps:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                handler = signal.getsignal(number)
                if callable(handler):
                    self._handlers[number] = handler
                    signal.signal(number, self._hold)
        return self

    def _hold(self, number: int, frame: FrameType | None) -> None:
        if self._waiting is not None:
            self._waiting = None
            self._handlers[number](number, frame)
        self._waiting = number

    def deliver(self) -> None:
        """Let a held signal do what it would have done."""
        if self._waiting is not None:
            number, self._waiting = self._waiting, None
            self._handlers[number](number, None)

    def __exit__(self, *raised: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self.deliver()
