"""Seconds until MNIST's 10 000 test images are classified with 98 % accuracy, by the same recipe in every library.

    python -m benchmarks.time_to_accuracy --out benchmarks/records/time_to_accuracy-DEVICE-DATE.json
    ... --seeds N         20 if nothing is said
    ... --libraries NAME  some of numpy, fast (both are this package), textbook, sklearn, torch, torch-compiled, jax
    ... --quick           two seeds, one cold start, nothing that takes long to compile
    ... --anyway          on a machine that has other work, too

Inside the clock: from the initial parameters, and the data in memory, to the end of the first epoch after which the
test accuracy is 98 % or more; the evaluation after each epoch counts, for all alike. A seed that does not get there
within the recipe's epochs is a failure, told and never dropped. Everything is float32. This package takes its images as
bytes; the others as bytes, gathered and then divided, or as float32 that was divided before the clock: as is quickest.

Outside of it: each library has one process, which has trained an epoch on dummy labels before, so that what it imports,
compiles and allocates is there; so it did in each of its settings (the form of the images, XLA's options), with 1
thread and with one a core, and it keeps the quickest (this package has no settings, and chooses its threads by itself).
Each seed is trained from scratch, seed 0 by all, then seed 1 by all in reverse order, and so
on; the others sleep meanwhile. All start from `bp.Network(LAYERS, seed=seed)` and see the orders of
`batches.epoch_plan`. A library whose parameters stray from a float64 reference's in 20 steps is rejected, not timed.

Cold start is a row of its own: a fresh process, from its start to the goal; imports, compilation and reading MNIST's
files count. numba finds on disk what it compiled in an earlier process, as in every run of a user's but the first. (All
read the files and draw parameters and orders by this package's functions; importing those takes some hundredths of a
second more than NumPy alone.)

The recipe was chosen on 50 000 of the training images against the other 10 000, never on the test set: of nineteen (one
or two hidden layers of 128 to 1024, batches of 125 to 512, 3 to 7 epochs) the quickest with which every seed tried
ended above 98 %; seeds 0 to 4 ended at 98.03 to 98.11 %. Its learning rate is constant within an epoch, for
scikit-learn knows no schedule for Adam (its optimizer object is handed a new rate between two calls of `partial_fit`),
and the batches divide 60 000, so that none is of another size. scikit-learn's Adam adds epsilon before the bias is
taken out of the second moment: its reference does, too.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

import backprop_gpu as bp
from backprop_gpu.batches import epoch_plan
from backprop_gpu.datasets import Dataset

from . import peer_programs, peers, record
from .gpu_recipe import BETA1, BETA2, EPSILON, loss_and_gradient

GOAL = 0.98
LAYERS = [784, 256, 10]
BATCH_SIZE = 125
RATES = (3e-3, 3e-3, 2e-3, 1.5e-3, 1e-3, 5e-4, 1e-4)  # of Adam, one an epoch
SEEDS, COLD_STARTS = 20, 3

CHECKED = 10  # steps of each of the two epochs whose outcome is compared
ERROR_LIMIT = 1e-3  # in parts of the way; float32 leaves 1e-5 or less, a first moment with 0.88 for 0.9 leaves 0.06

PATIENCE = 300.0  # seconds after which a process that has not answered is ended
PAUSE = 0.1  # seconds between two turns: threads of a library spin for a while after its work

After = Callable[[float], bool]
"""Called with the test accuracy after each epoch; says whether training is to end."""


class Data(NamedTuple):
    """Images X (n, 784) and labels y (n,), as a library wants them."""

    X: Any
    y: Any


class Model(Protocol):
    """A network in some library, made from the parameters of one of ours; making it is outside the clock.

    `early_epsilon`: its Adam adds epsilon before the bias is taken out of the second moment, not after it.
    """

    early_epsilon: bool

    def train(self, train: Data, test: Data, seed: int, after: After) -> None:
        """One epoch for each of RATES, unless `after` ends it; seed: see `order`."""

    def parameters(self) -> list[np.ndarray]:
        """[W[1], b[1], W[2], ...], W[l] of (N_l, N_(l-1))."""


class Kit(NamedTuple):
    """A library in one of its settings: `place` gives it data, outside the clock, and `make` makes its networks."""

    place: Callable[[Dataset], Data]
    make: Callable[[bp.Network], Model]


def order(n: int, seed: int, epoch: int) -> np.ndarray:
    """The rows of each step of an epoch = 1, 2, ..., (steps, BATCH_SIZE)."""
    return epoch_plan("shuffled", n, BATCH_SIZE, seed, epoch)[0].reshape(-1, BATCH_SIZE)


def parameters(net: bp.Network) -> list[np.ndarray]:
    """Copies of [W[1], b[1], W[2], ...]."""
    return [np.array(P) for l in range(1, net.L + 1) for P in (net.W[l], net.b[l])]


# ------------------------------------------------------------------------------------------------- the libraries


class Ours:
    """This package, as `bp.train` runs it; `told`: how it ran the steps."""

    early_epsilon = False
    told: str | None = None

    def __init__(self, net: bp.Network) -> None:
        self.net = net

    def train(self, train: Data, test: Data, seed: int, after: After) -> None:
        """See `Model`."""
        steps = len(train.X) // BATCH_SIZE

        def stop(run: bp.training.Run) -> None:
            run.stop = after(run.history.validation_accuracy[-1])

        history = bp.train(
            self.net, *train, None, bp.Adam(RATES[0]), lambda step, total: RATES[step // steps] / RATES[0], len(RATES),
            BATCH_SIZE, tuple(test), [stop], seed,
        )  # fmt: skip
        self.told = history.executor

    def parameters(self) -> list[np.ndarray]:
        """See `Model`."""
        return parameters(self.net)


def scaled(X: np.ndarray) -> np.ndarray:
    """Images as float32 in 0..1, if they are bytes."""
    return np.float32(X) / 255 if X.dtype == np.uint8 else X


def placed(data: Dataset, form: str) -> Data:
    """The images as bytes or as float32 in 0..1, the labels as most libraries index by them."""
    X = data.images if form == "uint8" else scaled(data.images)
    return Data(X, data.labels.astype(np.int64))


class Textbook:
    """NumPy as a tutorial has it: new arrays in each step, no tricks."""

    early_epsilon = False

    def __init__(self, net: bp.Network) -> None:
        self.theta = parameters(net)

    def train(self, train: Data, test: Data, seed: int, after: After) -> None:
        """See `Model`."""
        first, second = [np.zeros_like(P) for P in self.theta], [np.zeros_like(P) for P in self.theta]
        t = 0
        for epoch, lr in enumerate(RATES, 1):
            for rows in order(len(train.X), seed, epoch):
                t += 1
                _, g = loss_and_gradient(self.theta, scaled(train.X[rows]), train.y[rows])
                adam(self.theta, g, first, second, t, lr)
            if after(float(np.mean(self.outputs(scaled(test.X)).argmax(axis=1) == test.y))):
                return

    def outputs(self, A: np.ndarray) -> np.ndarray:
        """Z[L], (m, 10)."""
        W, b = self.theta[0::2], self.theta[1::2]
        for l in range(len(W) - 1):
            A = np.maximum(A @ W[l].T + b[l], 0)
        return A @ W[-1].T + b[-1]

    def parameters(self) -> list[np.ndarray]:
        """See `Model`."""
        return self.theta


def adam(
    theta: list[np.ndarray], g: list[np.ndarray], first: list[np.ndarray], second: list[np.ndarray], t: int, lr: float,
    epsilon: float = EPSILON,
) -> None:  # fmt: skip
    """Step t = 1, 2, ... of Adam, in place."""
    for P, dP, v, s in zip(theta, g, first, second, strict=True):
        v += (1 - BETA1) * (dP - v)
        s += (1 - BETA2) * (dP * dP - s)
        P -= lr * (v / (1 - BETA1**t)) / (np.sqrt(s / (1 - BETA2**t)) + epsilon)


class Sklearn:
    """scikit-learn's MLPClassifier, an epoch by one call of `partial_fit`."""

    early_epsilon = True

    def __init__(self, net: bp.Network) -> None:
        from sklearn.neural_network import MLPClassifier

        classes = np.arange(net.layers[-1])
        self.mlp = MLPClassifier(
            tuple(net.layers[1:-1]), alpha=0, batch_size=BATCH_SIZE, learning_rate_init=RATES[0], shuffle=False,
            beta_1=BETA1, beta_2=BETA2, epsilon=EPSILON,
        )  # fmt: skip
        some = np.zeros((BATCH_SIZE, net.layers[0]), np.float32)
        self.mlp.partial_fit(some, np.arange(BATCH_SIZE) % 10, classes=classes)  # makes its arrays
        del self.mlp._optimizer  # it makes a fresh one
        theta = parameters(net)
        self.mlp.coefs_ = [np.ascontiguousarray(W.T) for W in theta[0::2]]
        self.mlp.intercepts_ = theta[1::2]

    def train(self, train: Data, test: Data, seed: int, after: After) -> None:
        """See `Model`."""
        for epoch, lr in enumerate(RATES, 1):
            rows = order(len(train.X), seed, epoch).ravel()
            if epoch > 1:
                self.mlp._optimizer.learning_rate_init = lr
            self.mlp.partial_fit(train.X[rows], train.y[rows])
            if after(float(np.mean(self.mlp.predict(test.X) == test.y))):
                return

    def parameters(self) -> list[np.ndarray]:
        """See `Model`."""
        return [P for W, b in zip(self.mlp.coefs_, self.mlp.intercepts_, strict=True) for P in (W.T, b)]


class Torch:
    """PyTorch: eager, or with the loss and its gradient compiled; Adam is its fused one."""

    early_epsilon = False

    def __init__(self, net: bp.Network, loss: Callable[..., Any]) -> None:
        import torch

        self.torch, self.loss = torch, loss
        self.theta = [torch.tensor(P).requires_grad_() for P in parameters(net)]

    def train(self, train: Data, test: Data, seed: int, after: After) -> None:
        """See `Model`."""
        torch, (X, y) = self.torch, train
        optimizer = torch.optim.Adam(self.theta, RATES[0], (BETA1, BETA2), EPSILON, fused=True)
        for epoch, lr in enumerate(RATES, 1):
            optimizer.param_groups[0]["lr"] = lr
            for rows in torch.from_numpy(order(len(X), seed, epoch)).unbind():
                self.loss(self.theta, X, y, rows).backward()
                optimizer.step()
                optimizer.zero_grad()
            with torch.inference_mode():
                A = test.X * (1 / 255) if test.X.dtype == torch.uint8 else test.X
                accuracy = (self.outputs(A).argmax(dim=1) == test.y).float().mean()
            if after(float(accuracy)):
                return

    def outputs(self, A: Any) -> Any:
        """Z[L], (m, 10)."""
        F = self.torch.nn.functional
        for l in range(0, len(self.theta) - 2, 2):
            A = F.relu(F.linear(A, self.theta[l], self.theta[l + 1]))
        return F.linear(A, self.theta[-2], self.theta[-1])

    def parameters(self) -> list[np.ndarray]:
        """See `Model`."""
        return [P.detach().numpy() for P in self.theta]


class Jax:
    """JAX: an epoch is one jitted scan over its steps; the state's memory is donated."""

    early_epsilon = False

    def __init__(self, net: bp.Network, epoch: Callable[..., Any], accuracy: Callable[..., Any]) -> None:
        import jax

        self.jax, self.epoch, self.accuracy = jax, epoch, accuracy
        theta = [jax.device_put(P) for P in parameters(net)]
        zeros = [[jax.numpy.zeros_like(P) for P in theta] for _ in range(2)]
        self.state = (theta, *zeros, jax.numpy.zeros((), np.float32))

    def train(self, train: Data, test: Data, seed: int, after: After) -> None:
        """See `Model`."""
        for epoch, lr in enumerate(RATES, 1):
            rows = order(len(train.X), seed, epoch).astype(np.int32)
            self.state = self.epoch(self.state, *train, rows, np.float32(lr))
            if after(float(self.accuracy(self.state[0], *test))):
                return

    def parameters(self) -> list[np.ndarray]:
        """See `Model`."""
        return [np.asarray(P) for P in self.state[0]]


def our_kit(fast: bool) -> Kit:
    """This package, whose operations numba compiles or not; its images are bytes."""
    return Kit(lambda data: Data(*data), lambda net: Ours(peer_programs.checked(net, fast)))


def textbook_kit(data: str) -> Kit:
    """NumPy alone; `data`: the form of the images."""
    return Kit(lambda part: placed(part, data), Textbook)


def sklearn_kit() -> Kit:
    """scikit-learn, which takes numbers in 0..1."""
    return Kit(lambda part: placed(part, "float32"), Sklearn)


def torch_kit(compiled: bool, data: str) -> Kit:
    """PyTorch; all its networks share one compiled function."""
    import torch

    torch.set_num_threads(len(record.affinity()))
    loss = peer_programs.torch_loss(torch, data == "uint8")
    if compiled:
        loss = torch.compile(loss, dynamic=False)
    return Kit(lambda part: Data(*map(torch.from_numpy, placed(part, data))), lambda net: Torch(net, loss))


def jax_kit(data: str, options: Mapping[str, bool]) -> Kit:
    """JAX; all its networks share the two jitted functions, for which XLA has these options."""
    import jax

    jnp = jax.numpy
    as_bytes = data == "uint8"
    loss = peer_programs.jax_loss(jax, as_bytes)

    def epoch(state: Any, X: Any, y: Any, order: Any, lr: Any) -> Any:
        def step(state: Any, rows: Any) -> tuple[Any, None]:
            theta, first, second, t = state
            g = jax.grad(loss)(theta, X, y, rows)
            t = t + 1
            first = [v + (1 - BETA1) * (dP - v) for v, dP in zip(first, g, strict=True)]
            second = [s + (1 - BETA2) * (dP * dP - s) for s, dP in zip(second, g, strict=True)]
            unbiased = [(v / (1 - BETA1**t), s / (1 - BETA2**t)) for v, s in zip(first, second, strict=True)]
            theta = [P - lr * v / (jnp.sqrt(s) + EPSILON) for P, (v, s) in zip(theta, unbiased, strict=True)]
            return (theta, first, second, t), None

        return jax.lax.scan(step, state, order)[0]

    def accuracy(theta: Any, X: Any, y: Any) -> Any:
        A = X * np.float32(1 / 255) if as_bytes else X
        for l in range(0, len(theta) - 2, 2):
            A = jax.nn.relu(A @ theta[l].T + theta[l + 1])
        return ((A @ theta[-2].T + theta[-1]).argmax(axis=1) == y).mean()

    jit = functools.partial(jax.jit, compiler_options=dict(options) or None)
    jitted = jit(epoch, donate_argnums=0), jit(accuracy)
    return Kit(lambda part: Data(*map(jax.device_put, placed(part, data))), lambda net: Jax(net, *jitted))


class Library(NamedTuple):
    """How a library is told and made: `kit` takes one of its settings.

    `kind`: its name in `peers.KINDS`, with the package it needs and its environment. `free`: it chooses its threads by
    itself. `long`: it takes long to compile.
    """

    kind: str
    label: str
    program: str
    kit: Callable[..., Kit]
    settings: Sequence[Mapping[str, Any]] = ({},)
    free: bool = False
    long: bool = False

    def missing(self) -> str | None:
        """Why it cannot be measured here, None where it can."""
        needs = peers.KINDS[self.kind].needs
        return None if importlib.util.find_spec(needs) else f"{needs} is not installed"


FORMS = [{"data": form} for form in peer_programs.DATA]
XLA = [{**form, "options": options} for form in FORMS for options in peer_programs.Jax.options]

LIBRARIES = {
    "numpy": Library("numpy", "backprop_gpu", "NumPy alone", lambda: our_kit(False), free=True),
    "fast": Library("fast", "backprop_gpu", "with the extra `fast`", lambda: our_kit(True), free=True),
    "textbook": Library("textbook", "NumPy", "textbook", textbook_kit, FORMS),
    "sklearn": Library("sklearn", "scikit-learn", "`partial_fit`", sklearn_kit),
    "torch": Library("torch", "PyTorch", "eager, fused Adam", functools.partial(torch_kit, False), FORMS),
    "torch-compiled": Library(
        "torch", "PyTorch", "compiled loss, fused Adam", functools.partial(torch_kit, True), FORMS, long=True
    ),
    "jax": Library("jax", "JAX", "`scan` over an epoch", jax_kit, XLA),
}


# ------------------------------------------------------------------------------------------- within a process


def until_goal(kit: Kit, train: Data, test: Data, seed: int) -> dict[str, Any]:
    """Train from scratch to the goal: the seconds it took, and the test accuracy after each epoch."""
    model, accuracies = kit.make(bp.Network(LAYERS, seed=seed)), []

    def after(accuracy: float) -> bool:
        accuracies.append(accuracy)
        return accuracy >= GOAL

    start = time.perf_counter()
    model.train(train, test, seed, after)
    return {"seconds": time.perf_counter() - start, "accuracies": accuracies}


def warm_up(kit: Kit, train: Dataset, test: Dataset) -> float:
    """Train on dummy labels, once for what is compiled and allocated; the seconds of another epoch."""
    dummy = Dataset(train.images, np.random.default_rng(0).permutation(train.labels))
    parts = kit.place(dummy), kit.place(test)
    for _ in range(2):
        model, start = kit.make(bp.Network(LAYERS, seed=0)), time.perf_counter()
        model.train(*parts, 0, lambda accuracy: True)
    return time.perf_counter() - start


def check(kit: Kit, train: Dataset, test: Dataset) -> dict[str, Any]:
    """How far the parameters are off after 2 * CHECKED steps, in parts of the way to there; "rejected" if too far.

    The steps are those of the first two epochs on as few images: so the learning rate changes once. "told": how the
    model says that it runs its steps, if it does.
    """
    some = Dataset(train.images[: CHECKED * BATCH_SIZE], train.labels[: CHECKED * BATCH_SIZE])
    start, epochs = bp.Network(LAYERS, seed=0), iter([False, True])
    model = kit.make(bp.Network(LAYERS, seed=0))
    model.train(kit.place(some), kit.place(test), 0, lambda accuracy: next(epochs))
    exact = reference(start, some, model.early_epsilon)
    error = distance(model.parameters(), exact) / distance(parameters(start), exact)
    found: dict[str, Any] = {"error_of_steps": error}
    if told := getattr(model, "told", None):
        found["told"] = told
    return found if error <= ERROR_LIMIT else {**found, "rejected": f"steps off by {error:.2g}"}  # NaN is off, too


def distance(theta: Sequence[np.ndarray], other: Sequence[np.ndarray]) -> float:
    """|theta - other|, the L2 norm over all parameters at once."""
    return math.sqrt(sum(float(((P - Q) ** 2).sum()) for P, Q in zip(theta, other, strict=True)))


def reference(net: bp.Network, data: Dataset, early_epsilon: bool = False) -> list[np.ndarray]:
    """The parameters after two epochs on `data`, in float64; `early_epsilon`: see `Model`."""
    theta = [P.astype(np.float64) for P in parameters(net)]
    first, second, t = [np.zeros_like(P) for P in theta], [np.zeros_like(P) for P in theta], 0
    for epoch, lr in enumerate(RATES[:2], 1):
        for rows in order(len(data.images), 0, epoch):
            t += 1
            _, g = loss_and_gradient(theta, data.images[rows] / 255.0, data.labels[rows])
            epsilon = EPSILON / math.sqrt(1 - BETA2**t) if early_epsilon else EPSILON
            adam(theta, g, first, second, t, lr, epsilon)
    return theta


class Server:
    """Answers orders about one library: each is answered by the method of its name. `choice`: which setting."""

    def __init__(self, library: Library) -> None:
        self.lib = library
        self.kits: dict[int, Kit] = {}
        self.placed: dict[int, tuple[Data, Data]] = {}

    @functools.cached_property
    def data(self) -> tuple[Dataset, Dataset]:
        """MNIST, read when first asked for."""
        return bp.datasets.load("mnist")

    def kit(self, choice: int) -> Kit:
        """The library, which is imported for it."""
        if choice not in self.kits:
            self.kits[choice] = self.lib.kit(**self.lib.settings[choice])
        return self.kits[choice]

    def warm(self) -> dict[str, Any]:
        """Train on dummy labels in each setting; which is the quickest, and whether its steps are right."""
        seconds, failed = {}, []
        for i in range(len(self.lib.settings)):
            try:
                seconds[i] = warm_up(self.kit(i), *self.data)
            except Exception as e:
                failed.append(peers.one_line(e))
        if not seconds:
            return {"error": failed[0]}
        best = min(seconds, key=seconds.__getitem__)
        tried = [{**self.lib.settings[i], "epoch_seconds": of_it} for i, of_it in seconds.items()]
        checked = check(self.kit(best), *self.data)
        return {"choice": best, "epoch_seconds": seconds[best], "tried": tried, "failed": failed, **checked}

    def train(self, seed: int, choice: int) -> dict[str, Any]:
        """Train a seed to the goal."""
        kit = self.kit(choice)
        if choice not in self.placed:
            self.placed = {choice: (kit.place(self.data[0]), kit.place(self.data[1]))}
        return until_goal(kit, *self.placed[choice], seed)


def serve(library: Library) -> None:
    """Be a library's process: a line of JSON for every line of JSON, after a first one that says it is there."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a library prints is not an answer
    server = Server(library)
    print(json.dumps({"there": True}), file=out)
    for line in sys.stdin:
        order = json.loads(line)
        try:
            answer = getattr(server, order.pop("do"))(**order)
        except Exception as e:
            answer = {"error": peers.one_line(e)}
        print(json.dumps(answer), file=out)


# --------------------------------------------------------------------------------------------- between processes


def process_of(name: str, threads: int) -> peers.Worker:
    """The process of a library; it is started by the first order."""
    command = [sys.executable, "-m", "benchmarks.time_to_accuracy", "--serve", name]
    return peers.Worker(LIBRARIES[name].kind, threads, record.affinity(), command)


Start = Callable[[str, int], peers.Worker]


def ask(worker: peers.Worker, do: str, **order: Any) -> dict[str, Any]:
    """The worker's answer, {"error": why} where it fails, hangs or has died."""
    try:
        return worker.ask(do, PATIENCE, **order)
    except peers.WorkerError as e:
        return {"error": str(e)}


def warmed(name: str, start: Start = process_of) -> tuple[dict[str, Any], peers.Worker | None]:
    """The library's row so far and its warm process, with the number of threads that is quicker; None for none."""
    library, cores = LIBRARIES[name], len(record.affinity())
    row: dict[str, Any] = {"name": name, "library": library.label, "program": library.program}
    if why := library.missing():
        return row | {"missing": why}, None
    found: list[tuple[dict[str, Any], peers.Worker]] = []
    for threads in [cores] if library.free else sorted({1, cores}, reverse=True):
        worker = start(name, threads)
        found.append(({"threads": threads, **ask(worker, "warm")}, worker))
    able = [entry for entry in found if not entry[0].keys() & {"error", "rejected"}]
    if able:
        best = min(able, key=lambda entry: entry[0]["epoch_seconds"])
        tuning = [{"threads": told["threads"], **tried} for told, _ in able for tried in told.pop("tried")]
        row |= best[0] | {"tuning": tuning, "setting": library.settings[best[0]["choice"]]}
    else:
        best = None
        row |= found[0][0]
    for _, worker in found:
        if best is None or worker is not best[1]:
            worker.close()
    return row, best and best[1]


def turns(names: Sequence[str], seeds: Sequence[int]) -> Iterator[tuple[int, str]]:
    """(seed, name): each seed by all before the next, every other time in reverse order."""
    for i, seed in enumerate(seeds):
        for name in names if i % 2 == 0 else reversed(names):
            yield seed, name


def summarised(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of a library's runs: median, min, max, spread over those that reached the goal; how many did not ("failures").

    A run that broke off counts among these, too, and its "error" is told.
    """
    reached = [run["seconds"] for run in runs if run.get("accuracies", [0])[-1] >= GOAL]
    found: dict[str, Any] = {"n": len(runs), "failures": len(runs) - len(reached), "runs": list(runs)}
    if reached:
        found |= {k: v for k, v in record.summary(reached).items() if k != "n"}
    return found


def measured(
    workers: Mapping[str, peers.Worker], choices: Mapping[str, int], seeds: Sequence[int],
    told: Callable[[str], object] = print,
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Train every seed in every library, each in its setting, in turn: a summary of each."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in workers}
    for seed, name in turns(list(workers), seeds):
        run = {"seed": seed, **ask(workers[name], "train", seed=seed, choice=choices[name])}
        runs[name].append(run)
        told(f"seed {seed}, {name}: {said(run)}")
        time.sleep(PAUSE)
    return {name: summarised(of_one) for name, of_one in runs.items()}


def said(run: Mapping[str, Any]) -> str:
    """A run in a line."""
    if "error" in run:
        return str(run["error"])
    reached = "" if run["accuracies"][-1] >= GOAL else ", not reached"
    return f"{run['seconds']:.2f} s, {' '.join(f'{100 * a:.2f}' for a in run['accuracies'])} %{reached}"


def cold_start(name: str, threads: int, choice: int, seed: int, start: Start = process_of) -> dict[str, Any]:
    """A fresh process from its start to the goal: "seconds" by our clock, those within it as "train_seconds"."""
    before = time.perf_counter()
    worker = start(name, threads)
    run = ask(worker, "train", seed=seed, choice=choice)
    seconds = time.perf_counter() - before
    worker.close()
    return {"seed": seed, **run, "seconds": seconds, "train_seconds": run.get("seconds")}


def measure(names: Sequence[str], seeds: Sequence[int], cold_seeds: Sequence[int]) -> list[dict[str, Any]]:
    """A row for each library: of warm processes, and of cold starts under "cold"."""
    rows: dict[str, dict[str, Any]] = {}
    workers: dict[str, peers.Worker] = {}
    try:
        for name in names:
            rows[name], process = warmed(name)
            if process is None:
                why = next(f"{key}: {rows[name][key]}" for key in ("missing", "error", "rejected") if key in rows[name])
                print(f"{name}: {why}", flush=True)
            else:
                workers[name] = process
        choices = {name: rows[name]["choice"] for name in workers}
        for name, found in measured(workers, choices, seeds, lambda line: print(line, flush=True)).items():
            rows[name] |= found
    finally:
        for process in workers.values():
            process.close()
    cold: dict[str, list[dict[str, Any]]] = {name: [] for name in workers}
    for seed, name in turns(list(workers), cold_seeds):
        run = cold_start(name, rows[name]["threads"], choices[name], seed)
        cold[name].append(run)
        print(f"cold start, seed {seed}, {name}: {said(run)}", flush=True)
        time.sleep(PAUSE)
    for name, runs in cold.items():
        rows[name]["cold"] = summarised(runs)
    return list(rows.values())


def main(argv: Sequence[str] | None = None) -> int:
    """Measure; print a line a run and one a library; write the record."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.time_to_accuracy", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--seeds", type=int, help=f"how many, 0, 1, ...; default {SEEDS}")
    parser.add_argument("--libraries", nargs="+", choices=LIBRARIES, metavar="NAME", help=", ".join(LIBRARIES))
    parser.add_argument("--quick", action="store_true", help="two seeds, one cold start, nothing compiled for long")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where to write the record")
    parser.add_argument("--anyway", action="store_true", help="measure on a loaded machine, too")
    parser.add_argument("--serve", choices=LIBRARIES, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.serve:
        serve(LIBRARIES[args.serve])
        return 0
    try:
        record.refuse_if_loaded(args.anyway)
    except record.LoadedError as e:
        print(e, file=sys.stderr)
        return 1
    before = record.conditions(record.UNSET)
    names = args.libraries or [name for name, library in LIBRARIES.items() if not (args.quick and library.long)]
    seeds = range(args.seeds or (2 if args.quick else SEEDS))
    rows = measure(names, seeds, range(1 if args.quick else COLD_STARTS))
    for row in rows:
        print(line_of(row))
    recipe = {"layers": LAYERS, "batch_size": BATCH_SIZE, "optimizer": "Adam", "rates": RATES}
    if args.out:
        whole = {"kind": "time_to_accuracy", "goal": GOAL, "recipe": recipe, "conditions": before, "rows": rows}
        record.write(args.out, whole)
    return 0


def setting_of(row: Mapping[str, Any]) -> str:
    """The threads of a row, its setting, and how it says that it runs its steps."""
    words = [f"{row['threads']} threads", *map(str, filter(None, row["setting"].values()))]
    return ", ".join([*words, row["told"]] if "told" in row else words)


def line_of(row: Mapping[str, Any]) -> str:
    """A row in a line."""
    name = f"{row['library']}, {row['program']}"
    if "median" not in row:
        return f"{name}: {row.get('missing') or row.get('error') or row.get('rejected') or 'no seed reached the goal'}"
    noisy = " *" if row["noisy"] else ""
    return (
        f"{name}, {setting_of(row)}: {row['median']:.2f} s{noisy} ({row['min']:.2f} to {row['max']:.2f}), "
        f"{row['failures']} of {row['n']} failed; cold {row['cold'].get('median', float('nan')):.2f} s"
    )


if __name__ == "__main__":
    sys.exit(main())
