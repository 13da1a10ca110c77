"""Training and evaluation: what users call. All that is handed over is checked here, before anything moves."""

from __future__ import annotations

import contextlib
import operator
import os
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from . import inputs
from .activations import Array
from .backend import guarded, to_host
from .batches import KINDS, check_seed, split_off, steps_per_epoch
from .checkpoint import Checkpoint
from .costs import Cost, choose_cost
from .errors import ConfigError, DataError, lookup
from .executors import Problem, choose
from .gpu_faults import told
from .history import Callback, History, Run, hooks
from .inputs import Samples
from .interrupts import WholeSteps, alone
from .loop import Evaluation, Loop, evaluation, recall
from .network import Network, check_reduction, natural_task
from .optimizers import Adam, Optimizer, choose_optimizer
from .regularization import Regularization
from .resume import Checkpoints, described, digests
from .schedules import Schedule, choose_schedule
from .specs import number
from .stopping import Ending, natural, positive
from .streaming import data_limit, room_for
from .tally import Tally

BATCH_SIZE = 128
MOST_EPOCHS = 2**31


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
    checkpoint_every: str | None = None,
    resume: bool = False,
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
    retreats: int = 0,
    on_checkpoint_error: str = "raise",
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
    after every step; an object may be both. They are called in order; what one raises ends the run at that whole step,
    and those after it are not called for it (after an epoch all are called again where the run is resumed).

    `save`: the file that the network and the state of the run are written to when training is over or stopped (by
    Ctrl-C, a signal that the program turns into an exception, or any error), and each `checkpoint_every`:
    "500 steps", "2 epochs", "5 minutes". `resume`: go on from that file where there is one, with the bits of a run that
    was never stopped, on the same machine and rung (see `history.executor`); what net.theta holds does not matter then.
    All settings must be the same but `epochs`, which may be more (the schedule is stretched over all of them), and
    those of checkpoints; a run that is over returns its history at once. Callbacks keep their own state.
    Without `resume` a run begins anew, with a warning where the file holds one that is not over.
    `on_checkpoint_error`: "raise", or "warn" and go on where a checkpoint under way cannot be written.

    `retreats`: so many times at most, a run that diverges goes on after the epoch with the lowest training cost so far
    (from its start, where no epoch cost less than the first step), with half the learning rate.

    Ctrl-C ends training after the step it falls into, raising KeyboardInterrupt with the network at that whole step; a
    second Ctrl-C does not wait. Raises DataError, ConfigError; DivergenceError when the cost, the gradient or the
    outcome of a step is not finite, with the network as it was before it; CheckpointError when `save` cannot be
    written, or read to go on from.
    """

    chosen = choose_cost(cost, net.output)
    smoothed = chosen.smoothed(label_smoothing)
    rule, factor = choose_optimizer(optimizer), choose_schedule(schedule)
    regularization = Regularization(l1, l2, clip_norm, clip_value)
    check_reduction(reduction)
    lookup("kind of batches", batches, dict.fromkeys(KINDS))
    epochs, seed, frozen = positive("epochs", epochs), check_seed(seed), _frozen(net, frozen)
    if epochs > MOST_EPOCHS:
        raise ConfigError(f"epochs is {epochs}", f"give {MOST_EPOCHS} at most")
    retreats = natural("retreats", retreats)
    if patience is not None and validation is None:
        raise ConfigError("patience without validation data", "pass validation=(X, T), or a fraction to split off")
    ending = Ending(net, patience, gradient_tolerance, parameter_tolerance, time_limit)
    samples, held_out = _samples(net, X, T, chosen, reduction, sample_weight, class_weight), None
    if isinstance(validation, (int, float, np.number)) and not isinstance(validation, bool):
        share = number("train", "validation", validation, high=1.0, low_open=True)
        stay, held = split_off(len(samples), share, seed)
        with guarded(samples.X, samples.T):
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
    checkpoints = None if save is None else Checkpoints(save, checkpoint_every, on_checkpoint_error)
    if checkpoints is None and (resume or checkpoint_every is not None):
        raise ConfigError(f"{'resume' if resume else 'checkpoint_every'} without save", "name the file: save=...")
    settings: dict[str, Any] = {}
    found: Checkpoint | None = None
    if checkpoints:
        settings = {
            "optimizer": described(rule), "schedule": described(factor), "cost": chosen.name, "seed": seed,
            "samples": n, "batch_size": batch_size, "batches": batches, "frozen": frozen, "reduction": reduction,
            "l1": regularization.l1, "l2": regularization.l2, "label_smoothing": float(label_smoothing),
            "clip_norm": regularization.clip_norm, "clip_value": regularization.clip_value,
            "patience": ending.patience, "gradient_tolerance": ending.gradient_tolerance,
            "parameter_tolerance": ending.parameter_tolerance, "time_limit": ending.time_limit,
            "gradient_norms": bool(gradient_norms), "gradient_error": bool(gradient_error), "retreats": retreats,
            "data": digests(samples), "validation": held_out and digests(held_out),
        }  # fmt: skip
        if resume:
            found = checkpoints.read(net, chosen, settings, epochs)
        else:
            checkpoints.begin_anew()

    be, history = net.backend, History()
    run = Run(net, epochs, steps_per_epoch(n, batch_size), history)
    on_step, on_epoch = hooks(callbacks)
    each_step = any(getattr(c, "each_step", True) for c in callbacks if hasattr(c, "on_step"))
    with (
        alone(net), be.active(), told(be.xp, batch_size), WholeSteps() as whole_steps, contextlib.ExitStack() as stack,
    ):  # fmt: skip
        learned = chosen, _task(net, samples.T)
        if found and found.run and found.run.finished(epochs):
            return _as_it_ended(net, history, found, learned)
        weights = samples.weights  # they stay on the host, where orders are drawn
        room = room_for(net, [samples, *([held_out] if held_out else [])], rule, batch_size)
        if room is not None and data_limit() is None:
            warnings.warn(
                f"the data, {samples.nbytes:,} bytes, does not fit into the GPU's memory beside the run: it is "
                "streamed from the host",
                stacklevel=2,
            )
        place = be.asarray if room is None else to_host
        problem = Problem(net, smoothed, samples.on(place), reduction, regularization, frozen, room)
        executor = stack.enter_context(contextlib.closing(choose(problem, rule, batch_size, seed, run.steps_per_epoch)))
        history.executor, history.plan = executor.told, executor.description
        loop = Loop(
            run, problem, rule, factor, executor, ending, stack, whole_steps, batches, batch_size, seed, learned,
            held_out and held_out.on(place), weights, on_step, on_epoch, each_step,
            each_step or ending.time_limit is not None, gradient_norms, gradient_error, retreats, checkpoints, settings,
        )  # fmt: skip
        if found:
            loop.go_on_from(found)
            found = None  # its parameters and slots take memory
        loop.go()
    return history


def _as_it_ended(net: Network, history: History, found: Checkpoint, learned: tuple[Cost, str]) -> History:
    """Give `net` the parameters of a run that is over, and tell its history."""
    net.theta[...] = found.net.theta
    net.criterion, net.task = learned
    if found.run:
        recall(history, found.run)
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
        return evaluation(Tally(net, chosen, samples), reduction)


def check_data(net: Network, X: Any, T: Any, cost: Cost | str | None = None) -> None:
    """Raise what `train` and `evaluate` would raise for X, T and `cost` (None: the canonical one); else do nothing."""
    _samples(net, X, T, choose_cost(cost, net.output))


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
    with guarded(X, T, sample_weight):
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
