"""Whole training steps of small networks on a GPU, launch by launch, against NumPy's float64.

Between them they run every kernel that a plan of a step may hold; products are cuBLASLt's where a case says so, if it
is there.
"""

from __future__ import annotations

import contextlib
import types
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import numpy as np

import backprop_gpu as bp
from backprop_gpu import executors, plan
from backprop_gpu.backend import to_host
from backprop_gpu.costs import choose_cost
from backprop_gpu.executors import Eager, Graph, Problem
from backprop_gpu.inputs import Samples
from backprop_gpu.regularization import Regularization

# Of what theta moved by and of the costs, in parts of the largest. Tensor cores round operands to 11 or 8 bits.
TOLERANCE = {"float32": 3e-5, "float64": 1e-12, "tf32": 1e-2, "bf16": 5e-2}
LR, SEED = 0.5, 3


class Uncaptured(Graph):
    """Launches what a recording would hold, one after the other: tools for kernels see each of them."""

    sizes = (2, 1)

    def _graph(self, m: int, steps: int) -> Any:
        def launch() -> None:
            for ahead in range(steps):
                self._enqueue(m, ahead)
            self._advance(steps, self.batch_size - m)

        return types.SimpleNamespace(launch=launch)


class StepCase(NamedTuple):
    """A network and its data: two batches of m samples, and one of half as many."""

    name: str
    layers: tuple[int, ...]
    precision: str
    m: int = 9
    uint8: bool = True  # data, else reals
    labels: bool = True  # targets, else rows
    weights: bool = False  # of samples
    output: str = "softmax"
    dropout: float = 0.0
    reduction: str = "mean"
    penalties: tuple[tuple[str, float], ...] = ()
    wide: bool = False  # products by cuBLASLt

    @property
    def ends(self) -> list[int]:
        """Where batches begin and end."""
        return [0, self.m, 2 * self.m, 2 * self.m + self.m // 2]

    def problem(self, net: bp.Network) -> Problem:
        """Its data on the network's device, in the network's dtype; the numbers are the same on every backend."""
        rng, n, K = np.random.default_rng(0), self.ends[-1], self.layers[-1]
        X, T = rng.integers(0, 256, (n, self.layers[0])).astype(np.uint8), rng.integers(0, K, n)
        task = "labels"
        if not self.uint8:
            X = (X / 99).astype(np.float32).astype(net.dtype)
        if not self.labels:
            T, task = rng.integers(0, 2, (n, K)).astype(net.dtype), "multilabel"
        weights = (rng.integers(1, 9, n) / 4).astype(net.dtype) if self.weights else None
        return Problem(
            net, choose_cost(None, self.output), Samples(X, T, weights, task).on(net.backend.asarray), self.reduction,
            Regularization(**dict(self.penalties)), 0,
        )  # fmt: skip


def step_cases(arch: int) -> Iterator[StepCase]:
    """Of a GPU of that architecture, 90 for compute capability 9.0."""
    for precision in ("float32", "float64", *(("tf32", "bf16") if arch >= 80 else ())):
        yield StepCase("bytes, dropout", (33, 7, 33, 3), precision, dropout=0.3)
        yield StepCase("cuBLASLt", (20, 16, 24, 5), precision, 24, wide=True)
    for precision in ("float32", "float64"):
        yield StepCase(
            "reals, weights, one output", (7, 33, 1), precision, uint8=False, labels=False, weights=True,
            output="sigmoid",
        )  # fmt: skip
        yield StepCase("wide output, sum", (5, 7, 70), precision, 33, weights=True, reduction="sum")
        yield StepCase("penalties", (33, 1, 7), precision, 7, penalties=(("l2", 0.1), ("clip_norm", 0.5)))
    yield StepCase("cuBLASLt, reals", (20, 16, 5), "float32", 24, uint8=False, wide=True)


def arch_of(xp: Any) -> int:
    """Of the current GPU."""
    return executors.device_of(xp).arch


def run_case(case: StepCase, poison: bool = True) -> list[str]:
    """What is wrong, a line each. `poison`: the workspace holds NaNs before."""
    net = bp.Network(
        list(case.layers), "tanh", output=case.output, precision=case.precision, dropout=case.dropout, seed=SEED,
        backend="cupy",
    )  # fmt: skip
    exact = net.to("numpy", "float64")
    limits = dict.fromkeys(plan.WIDE, plan.Wide(8, 16)) if case.wide else {}
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("error")  # one tells that there is no graph of steps
        wanted = _trained(case, Eager, exact, False)
        with mock.patch.object(plan, "WIDE", limits), net.backend.active():
            got = _trained(case, Uncaptured, net, poison)
    off = {name: _distance(got[name], wanted[name]) for name in wanted}
    return [f"{name} off by {error:.3g}" for name, error in off.items() if not error <= TOLERANCE[case.precision]]


def _trained(case: StepCase, kind: type[Eager], net: bp.Network, poison: bool) -> dict[str, np.ndarray]:
    """After an epoch of plain SGD: what theta has moved by, and the costs and right predictions of each step."""
    before = _parameters(net)
    steps = len(case.ends) - 1
    with contextlib.closing(kind(case.problem(net), bp.SGD(LR), case.m, SEED, steps)) as executor:
        if isinstance(executor, Graph) and poison:
            executor._vectors["work"].fill(np.nan)
            executor._vectors["rounded"].fill(0x7FFF)  # a NaN of bf16
        executor.begin(np.random.default_rng(1).permutation(case.ends[-1]), case.ends, [LR] * steps, 1)
        done = 0
        while done < steps:
            done += executor.run(done, steps - done)
        executor.finish()
        if isinstance(executor, Graph) and executor.put_off:
            raise RuntimeError(f"{executor.put_off} steps were not taken by the plan's kernels")
        measured = to_host(executor.measured)[:steps].copy()
        return {"theta": _parameters(net) - before, "costs": measured[:, 0], "right": measured[:, 1]}


def _parameters(net: bp.Network) -> np.ndarray:
    """All weights and biases in a row, without what lies between them."""
    return np.concatenate([to_host(p).ravel() for p in (*net.W, *net.b) if p is not None]).astype(np.float64)


def _distance(a: np.ndarray, b: np.ndarray) -> float:
    """The largest difference, in parts of the largest element of b; where all of b is 0, as it is."""
    return float(np.abs(a - b).max() / (np.abs(b).max() or 1.0))
