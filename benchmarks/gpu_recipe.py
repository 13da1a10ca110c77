"""The training steps that are timed on a GPU, what they must compute, and how they are timed.

A step: gather m rows of uint8 MNIST on the device and scale them by 1/255, forward (ReLU, softmax), mean cross-entropy,
backward, Adam(1e-3), and the step's loss kept on the device. The initial parameters are those of
`backprop_gpu.Network(layers, seed=0)`, in float32; `order` tells the rows of each step. What computes something else is
told by `faults`: its first losses and its first gradient are compared with float64.
"""

from __future__ import annotations

import contextlib
import functools
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import backprop_gpu as bp

LR, BETA1, BETA2, EPSILON = 1e-3, 0.9, 0.999, 1e-8  # of Adam
CHECKED = 5  # steps whose losses are compared
PRECISIONS = ("float32", "tf32", "bf16")
LOSS_LIMIT = {"float32": 1e-4, "tf32": 5e-3, "bf16": 2e-2}  # of a loss, in parts of it
GRADIENT_LIMIT = {"float32": 2e-4, "tf32": 3e-2, "bf16": 6e-2}  # of its L2 norm; units whose Z is near 0 flip


class Recipe(NamedTuple):
    """A network and a batch size: `layers` its widths, `m` the samples of a step."""

    name: str
    layers: tuple[int, ...]
    m: int

    @property
    def steps(self) -> int:
        """How many steps go into one graph, one scan, one repetition."""
        return 64 if self.m < 8192 else 8


RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe("A", (784, 100, 10), 128),
        Recipe("B", (784, 512, 512, 10), 128),
        Recipe("C", (784, 512, 512, 10), 1024),
        Recipe("D", (784, 2048, 2048, 10), 8192),
    )
}


@functools.cache
def data() -> tuple[np.ndarray, np.ndarray]:
    """MNIST's training set: images (60000, 784) and labels (60000,), uint8."""
    train, _ = bp.datasets.load("mnist")
    return train.images, train.labels


def initial(recipe: Recipe) -> list[np.ndarray]:
    """The parameters to start from, float32: [W[1], b[1], W[2], b[2], ...], W[l] of (N_l, N_(l-1))."""
    net = bp.Network(list(recipe.layers), seed=0, backend="numpy")
    return [np.array(P) for l in range(1, net.L + 1) for P in (net.W[l], net.b[l])]


def order(recipe: Recipe, steps: int) -> np.ndarray:
    """The rows of each step, (steps, m): permutations of all samples, a new one where no whole batch is left."""
    n, m = len(data()[0]), recipe.m
    epochs = -(-steps // (n // m))
    rng = np.random.default_rng(0)
    batches = np.concatenate([rng.permutation(n)[: n // m * m].reshape(-1, m) for _ in range(epochs)])
    return batches[:steps].astype(np.int64)


# --------------------------------------------------------------------------------------------------- the reference


def reference(recipe: Recipe, steps: int = CHECKED) -> tuple[list[float], list[np.ndarray]]:
    """In float64, with NumPy: the loss of each step, and the gradient of the first, [dW[1], db[1], dW[2], ...]."""
    X, y = data()
    theta = [P.astype(np.float64) for P in initial(recipe)]
    first, second = [np.zeros_like(P) for P in theta], [np.zeros_like(P) for P in theta]
    losses, gradient = [], []
    for t, rows in enumerate(order(recipe, steps), 1):
        loss, g = loss_and_gradient(theta, X[rows] / 255.0, y[rows])
        losses.append(loss)
        gradient = gradient or g
        if t < steps:
            adam(theta, g, first, second, t)
    return losses, gradient


def loss_and_gradient(theta: list[np.ndarray], X: np.ndarray, y: np.ndarray) -> tuple[float, list[np.ndarray]]:
    """Mean cross-entropy of a batch X (m, N_0) with labels y, and [dW[1], db[1], dW[2], ...]."""
    W, b, m = theta[0::2], theta[1::2], len(X)
    A = [X]
    for l in range(len(W) - 1):
        A.append(np.maximum(A[l] @ W[l].T + b[l], 0))
    Z = A[-1] @ W[-1].T + b[-1]
    Z -= Z.max(axis=1, keepdims=True)
    log_p = Z - np.log(np.exp(Z).sum(axis=1, keepdims=True))
    Delta = np.exp(log_p)
    Delta[np.arange(m), y] -= 1
    Delta /= m
    g: list[np.ndarray] = []
    for l in reversed(range(len(W))):
        g[:0] = [Delta.T @ A[l], Delta.sum(axis=0)]
        if l:
            Delta = (Delta @ W[l]) * (A[l] > 0)
    return float(-log_p[np.arange(m), y].mean()), g


def adam(theta: list[Any], g: list[Any], first: list[Any], second: list[Any], t: int) -> None:
    """Step t = 1, 2, ... of Adam, in place."""
    for P, dP, v, s in zip(theta, g, first, second, strict=True):
        v += (1 - BETA1) * (dP - v)
        s += (1 - BETA2) * (dP * dP - s)
        P -= LR * (v / (1 - BETA1**t)) / (np.sqrt(s / (1 - BETA2**t)) + EPSILON)


class Check:
    """Compares what a program computes for a recipe with the reference."""

    def __init__(self, recipe: Recipe) -> None:
        self.losses, self.gradient = reference(recipe)

    def __call__(
        self, precision: str, losses: Sequence[float], gradient: Sequence[np.ndarray] | None
    ) -> dict[str, Any]:
        """The errors, and under "rejected" why they are too large; `gradient` None for one that is not known."""
        first = np.array(losses[:CHECKED], np.float64)
        loss_error = float(np.abs(first / self.losses - 1).max())
        found: dict[str, Any] = {"losses": first.tolist(), "loss_error": loss_error}
        why = [] if loss_error <= LOSS_LIMIT[precision] else [f"losses off by {loss_error:.2g}"]  # NaN is off, too
        if gradient is not None:
            found["gradient_error"] = error = gradient_error(gradient, self.gradient)
            why += [] if error <= GRADIENT_LIMIT[precision] else [f"gradient off by {error:.2g}"]
        return {**found, "rejected": "; ".join(why)} if why else found


def gradient_error(gradient: Sequence[np.ndarray], exact: Sequence[np.ndarray]) -> float:
    """|gradient - exact| / |exact|, L2 norms over all parameters at once."""
    off = sum(float(((g.astype(np.float64) - e) ** 2).sum()) for g, e in zip(gradient, exact, strict=True))
    return float((off / sum(float((e**2).sum()) for e in exact)) ** 0.5)


# ---------------------------------------------------------------------------------------------------------- timing


def printed(file: str | None = None) -> Callable[[dict[str, Any]], None]:
    """What prints a result as a line of JSON, and adds it to the file, if there is one."""

    def emit(result: dict[str, Any]) -> None:
        line = json.dumps(result)
        print(line, flush=True)
        if file is not None:
            with Path(file).open("a", encoding="utf-8") as f:
                f.write(line + "\n")

    return emit


class Turns:
    """Whose turn it is: processes build side by side, and one that takes times is alone.

    `folder`: where their locks are, the same for all of them; None where there is no other process.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder

    def building(self) -> contextlib.AbstractContextManager[None]:
        """Within it nobody takes times."""
        return self._held(shared=True)

    def timing(self) -> contextlib.AbstractContextManager[None]:
        """Within it nobody builds or takes times."""
        return self._held(shared=False)

    @contextlib.contextmanager
    def _held(self, shared: bool) -> Iterator[None]:
        if self.folder is None:
            yield
            return
        import fcntl

        with (self.folder / "gate").open("a") as gate, (self.folder / "gpu").open("a") as gpu:
            fcntl.flock(gate, fcntl.LOCK_EX)  # who times waits here, and those who want to build wait behind
            fcntl.flock(gpu, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
            fcntl.flock(gate, fcntl.LOCK_UN)
            try:
                yield
            finally:
                fcntl.flock(gpu, fcntl.LOCK_UN)  # closing is not enough: a child may have the file open, too


ALONE = Turns()


class Program(NamedTuple):
    """Something to time: `run` starts `steps` steps, `wait` returns when all of them are done."""

    run: Callable[[], Any]
    wait: Callable[[], Any]
    steps: int


def timed(
    programs: Mapping[Any, Program], repetitions: int = 9, least: float = 0.02, most: int = 100
) -> dict[Any, dict[str, Any]]:
    """Microseconds a step of each program: in turn, A/B/A/B, the host's clock between two waits.

    One repetition runs a program as often as it takes to fill `least` seconds, `most` times at the utmost.
    """
    often = {}
    for name, program in programs.items():
        _clock(program, 1)  # warms up
        often[name] = max(1, min(most, round(least / _clock(program, 1))))
        _clock(program, often[name])
    seconds: dict[Any, list[float]] = {name: [] for name in programs}
    for _ in range(repetitions):
        for name, program in programs.items():
            seconds[name].append(_clock(program, often[name]) / (often[name] * program.steps))
    return {name: {**summarised(times), "runs": often[name]} for name, times in seconds.items()}


def _clock(program: Program, times: int) -> float:
    program.wait()
    start = time.perf_counter()
    for _ in range(times):
        program.run()
    program.wait()
    return time.perf_counter() - start


def summarised(seconds: Sequence[float]) -> dict[str, Any]:
    """Of repetitions: median, least, largest and all in microseconds; spread: largest less least over the median."""
    us = [1e6 * s for s in seconds]
    median = statistics.median(us)
    return {
        "us": median, "min_us": min(us), "max_us": max(us), "spread": (max(us) - min(us)) / median, "times_us": us
    }  # fmt: skip
