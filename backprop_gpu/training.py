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
from typing import Any, NamedTuple, Protocol

import numpy as np

from . import blas, inputs
from .activations import Array
from .backend import to_host
from .batches import KINDS, check_seed, epoch_plan, split_off, steps_per_epoch
from .checkpoint import check_target, save_network
from .costs import Cost, choose_cost
from .errors import ConfigError, DataError, DivergenceError, lookup
from .executors import Problem, choose
from .inputs import Samples
from .network import CHUNK_ROWS, Batch, Network, Views, backward, check_reduction, forward, natural_task
from .optimizers import Adam, Optimizer, choose_optimizer
from .regularization import Regularization
from .schedules import Schedule, choose_schedule, during
from .specs import number
from .stopping import Ending, positive
from .streaming import room_for
from .tally import Tally, tally_for


@dataclass
class History:
    """What happened, one entry an epoch in each list.

    `train_cost`, `train_accuracy`: means over the epoch's training steps, each step measured before its update (with
    reduction "sum" the sum of the costs), without penalties. `validation_cost`, `validation_accuracy`: after the epoch.
    Accuracies are None for regression, validation without data. `gradient_norms`: where asked for, ||dC/dW[l]|| of each
    layer l = 1..L, of the gradient over all the training data after the epoch. `lr`: of the epoch's last step. `steps`:
    done so far. `seconds`: the epoch's wall time, validation and gradient norms left out.

    `samples`: how many the steps have seen, each as often as it was. `stopped` says why the run ended: "epochs",
    "gradient", "still", "patience", "time" or "callback". `best_epoch` is the one whose parameters the network has,
    where `patience` was given. `executor`: how steps were run, "eager", "replay", "compiled" or "graph" (see
    `executors`), with ", numba" where it compiles the operations, and ", data streamed" where the data stays on the
    host (see `streaming`), and `plan` the operations of a graph's step (see `plan.Plan.describe`).
    `gradient_error`: where asked for, see `train`.
    """

    epoch: list[int] = field(default_factory=list)
    train_cost: list[float] = field(default_factory=list)
    train_accuracy: list[float | None] = field(default_factory=list)
    validation_cost: list[float | None] = field(default_factory=list)
    validation_accuracy: list[float | None] = field(default_factory=list)
    lr: list[float] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    gradient_norms: list[list[float] | None] = field(default_factory=list)
    samples: int = 0
    stopped: str | None = None
    best_epoch: int | None = None
    executor: str | None = None
    plan: str | None = None
    gradient_error: float | None = None

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


class OnStep(Protocol):
    """What is called after every step.

    Where steps are recorded as CUDA graphs, each is waited for then. One with an attribute `each_step` that is False is
    called after several steps at once instead, which may still be under way on the GPU: it is not to look at theta.
    """

    def on_step(self, run: Run) -> Any:
        """`run.step` steps are done."""


Callback = Callable[[Run], Any] | OnStep
Hook = Callable[[Run], Any]
BATCH_SIZE = 128


def train(
    net: Network,
    X: Any,
    T: Any,
    cost: Cost | str | None = None,
    optimizer: Optimizer | str = Adam(),  # noqa: B008 - frozen, no state
    schedule: Schedule | str | None = None,
    epochs: int = 10,
    batch_size: int | str = BATCH_SIZE,
    validation: tuple[Any, Any] | float | None = None,
    callbacks: Sequence[Callback] = (),
    seed: int = 0,
    save: str | os.PathLike[str] | None = None,
    *,
    reduction: str = "mean",
    sample_weight: Any = None,
    class_weight: Any = None,
    l1: float = 0.0,
    l2: float = 0.0,
    clip_norm: float | None = None,
    clip_value: float | None = None,
    label_smoothing: float = 0.0,
    batches: str = "shuffled",
    frozen: int = 0,
    patience: int | None = None,
    gradient_tolerance: float | None = None,
    parameter_tolerance: float | None = None,
    time_limit: float | None = None,
    gradient_norms: bool = False,
    gradient_error: bool = False,
) -> History:
    """Train `net` in place on X (m, N_0) and T, and return the history.

    X, T: see `Network.forward` and `Network.gradients`; NumPy data that fits the network's dtype (or is uint8) is used
    where it lies, on a GPU it is copied to the device once, or each epoch where it does not fit (see `streaming`).
    `cost`, `optimizer`, `schedule`: as they are, or by name with settings ("huber:delta=0.5", "sgd:momentum=0.9",
    "step:every=0.25"), an optimizer without lr at that of `optimizers.OPTIMIZERS`. The schedule's factor multiplies the
    optimizer's lr; it is asked for all steps of an epoch before the first.

    Batches: each epoch visits every sample once, in a fresh order drawn from (seed, epoch), in batches of `batch_size`
    or "full" ones; the last, smaller one is kept. `batches`: "shuffled", or as in `batches.epoch_plan`. A batch_size
    above the number of samples means all of them, with a warning unless it is the default.

    The cost of a batch is sum w_i C_i / sum w_i over its samples, or sum w_i C_i with `reduction` "sum"; w_i is
    `sample_weight` (m,) times the weight of the sample's class (`class_weight`: "balanced", a mapping from label, or
    K numbers; see `inputs.class_weights`), 1 where neither is given. `l1`, `l2`, `clip_norm`, `clip_value`: see
    `Regularization`; `label_smoothing`: see `Cost.smoothed`; none of them counts in the costs of validation.
    The first `frozen` layers keep their parameters (source 5, "Neural Networks": pre-processing layers).

    `validation`: (X, T), each sample of which counts the same, or the share of the samples to split off at random,
    drawn from the seed, which keep their weights. The run ends after
    `epochs`, or after an epoch
    - at which the norm of the whole gradient, over all the training data, is at most `gradient_tolerance` (source 4),
    - in which no parameter has moved by more than `parameter_tolerance`; 0 is while(theta^(i+1) != theta^i) (source 3),
    - that is the `patience`-th without a lower validation cost; the parameters of the best epoch are restored,
    or after the step in which `time_limit` (seconds) has passed. A second call starts with fresh slots.

    `gradient_error`: before the first step, compare the gradient of the first batch, as the run computes it, with one
    in float64: ||g - exact|| / ||exact||.

    `callbacks`: functions called with the `Run` after every epoch, or objects whose method `on_step` is called with it
    after every step; an object may be both. `save`: where to write the network when training is over or stopped.

    Ctrl-C ends training after the step it falls into, raising KeyboardInterrupt with the network at that whole step; a
    second Ctrl-C does not wait. Raises DataError, ConfigError; DivergenceError when the cost, the gradient or the
    outcome of a step is not finite, with the network as it was before it; CheckpointError when `save` cannot be
    written.
    """
    chosen = choose_cost(cost, net.output)
    smoothed = chosen.smoothed(label_smoothing)
    rule, factor = choose_optimizer(optimizer), choose_schedule(schedule)
    regularization = Regularization(l1, l2, clip_norm, clip_value)
    check_reduction(reduction)
    lookup("kind of batches", batches, dict.fromkeys(KINDS))
    epochs, seed, frozen = positive("epochs", epochs), check_seed(seed), _frozen(net, frozen)
    if patience is not None and validation is None:
        raise ConfigError("patience without validation data", "pass validation=(X, T), or a fraction to split off")
    ending = Ending(net, patience, gradient_tolerance, parameter_tolerance, time_limit)
    samples, held_out = _samples(net, X, T, chosen, reduction, sample_weight, class_weight), None
    if isinstance(validation, (int, float, np.number)) and not isinstance(validation, bool):
        share = number("train", "validation", validation, high=1.0, low_open=True)
        stay, held = split_off(len(samples), share, seed)
        samples, held_out = samples.take(stay), samples.take(held)
        for part, what in ((samples, "the weights left to train with"), (held_out, "the weights split off")):
            inputs.sample_weights(part.weights, len(part), net.dtype, what=what)
    elif validation is not None:
        held_out = _samples(net, *_pair(validation), chosen, reduction)
    n = len(samples)
    batch_size = n if isinstance(batch_size, str) and batch_size == "full" else positive("batch_size", batch_size)
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
    each_step = any(getattr(c, "each_step", True) for c in callbacks if hasattr(c, "on_step"))
    at_once = not each_step and time_limit is None  # else each step is looked after
    with (
        _saved_if_stopped(run, save), _alone(net), be.active(), _WholeSteps() as whole_steps,
        contextlib.ExitStack() as stack,
    ):  # fmt: skip
        weights = samples.weights  # they stay on the host, where orders are drawn
        before, learned = (net.criterion, net.task), _task(net, samples.T)
        room = room_for(net, [samples, *([held_out] if held_out else [])], rule, batch_size)
        place = be.asarray if room is None else to_host
        problem = Problem(net, smoothed, samples.on(place), reduction, regularization, frozen, room)
        executor = stack.enter_context(contextlib.closing(choose(problem, rule, batch_size, seed, steps)))
        held_out = None if held_out is None else held_out.on(place)
        history.executor, history.plan = executor.told, executor.description
        tally: Tally | None = None
        laid_out = epoch_plan(batches, n, batch_size, seed, 1)
        for run.epoch in range(1, epochs + 1):
            start = time.perf_counter()
            host_order, ends = laid_out
            watched: Any = history.train_cost if held_out is None else history.validation_cost
            scheduled = during(factor, watched)
            ending.begin_epoch()
            lrs = [_lr(rule.lr, scheduled, step, epochs * steps) for step in range(run.step, run.step + steps)]
            ends = ends.tolist()
            if gradient_error and run.epoch == 1:
                history.gradient_error = executor.gradient_error(host_order, ends)
            executor.begin(host_order, ends, lrs, run.step + 1)
            done, late = 0, False
            while done < steps and not late:
                run.whole = False
                taken = executor.run(done, steps - done if at_once else 1, each_step)
                if taken:
                    done, run.step, run.lr = done + taken, run.step + taken, lrs[done + taken - 1]
                    net.criterion, net.task = chosen, learned
                run.whole = True
                if not taken:
                    break
                for call in on_step:
                    _call(call, run)
                if whole_steps.waiting:
                    executor.finish()
                whole_steps.deliver()
                late = ending.late()
            if run.epoch < epochs and not late:  # while a GPU is at work
                laid_out = epoch_plan(batches, n, batch_size, seed, run.epoch + 1)
                executor.ahead(laid_out[0])
            executor.finish()
            history.executor = executor.told
            cost_sum, right = to_host(executor.measured)[:done].sum(axis=0)  # the host waits for the device here
            if diverged := int(executor.diverged[0]):
                if diverged == 1:  # on a GPU the host hears of it here
                    net.criterion, net.task = before
                raise DivergenceError(run.epoch, diverged, lrs[(diverged - 1) % steps])
            history.seconds.append(time.perf_counter() - start)
            seen = host_order[: ends[done]]
            history.epoch.append(run.epoch)
            history.train_cost.append(float(cost_sum) / _whole(weights, seen, reduction))
            history.train_accuracy.append(None if samples.task == "regression" else float(right) / len(seen))
            after = None
            if held_out is not None:
                tally = tally or stack.enter_context(contextlib.closing(tally_for(executor, held_out, chosen)))
                after = _evaluation(tally, reduction)
            history.validation_cost.append(after.cost if after else None)
            history.validation_accuracy.append(after.accuracy if after else None)
            history.lr.append(run.lr)
            history.steps.append(run.step)
            history.samples += len(seen)
            norms = None
            if gradient_norms or gradient_tolerance is not None:
                norms = _gradient_norms(problem, _whole(weights, np.arange(n), reduction))
            history.gradient_norms.append(norms.layers if norms and gradient_norms else None)
            for call in on_epoch:
                _call(call, run)
            whole_steps.deliver()
            reason = ending.reason(
                run.epoch, run.stop, norms and norms.whole, after and after.cost, late, max(lrs[:done]) > 0
            )
            history.stopped = reason or None
            if history.stopped:
                break
        history.stopped = history.stopped or "epochs"
        history.best_epoch = ending.restore()
    if save is not None:
        save_network(net, save)
    return history


def evaluate(
    net: Network,
    X: Any,
    T: Any,
    cost: Cost | str | None = None,
    *,
    reduction: str = "mean",
    sample_weight: Any = None,
) -> Evaluation:
    """Mean cost and accuracy of `net` on X and T, as in `train`. `cost` None is the one the network was trained with.

    `reduction`, `sample_weight` as in `Network.gradients`; the accuracy counts every sample alike. Raises DataError,
    ConfigError.
    """
    chosen = net.criterion if cost is None else choose_cost(cost, net.output)
    check_reduction(reduction)
    samples = _samples(net, X, T, chosen, reduction, sample_weight)
    with net.backend.active():
        return _evaluation(Tally(net, chosen, samples), reduction)


def check_data(net: Network, X: Any, T: Any, cost: Cost | str | None = None) -> None:
    """Raise what `train` and `evaluate` would raise for X, T and `cost` (None: the canonical one); else do nothing."""
    _samples(net, X, T, choose_cost(cost, net.output))


def _evaluation(tally: Tally, reduction: str) -> Evaluation:
    cost, right = tally.totals()
    samples, n = tally.samples, len(tally.samples)
    weights = None if samples.weights is None else to_host(samples.weights)
    whole = _whole(weights, np.arange(n), reduction)
    return Evaluation(cost / whole, None if samples.task == "regression" else right / n)


def _whole(weights: np.ndarray | None, rows: np.ndarray, reduction: str) -> float:
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


def _samples(
    net: Network,
    X: Any,
    T: Any,
    cost: Cost,
    reduction: str = "mean",
    sample_weight: Any = None,
    class_weight: Any = None,
) -> Samples:
    """What a user handed over, checked; the task is "regression" where targets under a sigmoid are not all 0 or 1."""
    data = inputs.features(X, net.layers[0], net.dtype)
    wanted = inputs.targets(T, len(data), net.layers[-1], cost.name, net.dtype)
    weights, what = sample_weight, "sample_weight"
    if class_weight is not None:
        weights = inputs.class_weights(class_weight, wanted, net.layers[-1], net.output)
        what = "class_weight"
        if sample_weight is not None:
            weights = weights * inputs.sample_weights(sample_weight, len(data), np.dtype(np.float64), reduction)
            what = "sample_weight times class_weight"
    weights = inputs.sample_weights(weights, len(data), net.dtype, reduction, what)
    task = _task(net, wanted)
    if task in ("binary", "multilabel") and not bool(((wanted == 0) | (wanted == 1)).all()):
        task = "regression"
    return Samples(data, wanted, weights, task)


def _task(net: Network, wanted: Array) -> str:
    """What a network learns from targets as `inputs` left them: labels always make it one that predicts labels."""
    return "labels" if wanted.ndim == 1 else natural_task(net.g, net.layers[-1])


def _pair(validation: Any) -> tuple[Any, Any]:
    if not (isinstance(validation, (tuple, list)) and len(validation) == 2):
        raise DataError("validation is not a pair", "pass validation=(X, T)")
    return validation[0], validation[1]


def _frozen(net: Network, frozen: Any) -> int:
    try:
        number_of_layers = operator.index(frozen)
    except TypeError:
        number_of_layers = -1
    if not 0 <= number_of_layers < net.L:
        raise ConfigError(f"frozen is {frozen!r}", f"give 0 to {net.L - 1}: how many of the first layers to keep")
    return number_of_layers


def _lr(lr: float, factor: Schedule, step: int, total: int) -> float:
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


def _hooks(callbacks: Any) -> tuple[list[Hook], list[Hook]]:
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


def _call(callback: Hook, run: Run) -> None:
    try:
        with blas.threads.lent():
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

    @property
    def waiting(self) -> bool:
        """Whether a signal is held."""
        return self._waiting is not None

    def deliver(self) -> None:
        """Let a held signal do what it would have done."""
        if self._waiting is not None:
            number, self._waiting = self._waiting, None
            self._handlers[number](number, None)

    def __exit__(self, *raised: object) -> None:
        for which, handler in self._handlers.items():
            signal.signal(which, handler)
        self.deliver()
