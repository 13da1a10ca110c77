"""After the first step, a training step allocates nothing that grows with batch or width."""

import tracemalloc

import numpy as np
import pytest

import backprop_gpu as bp
from backprop_gpu.activations import HIDDEN, OUTPUT
from backprop_gpu.costs import COSTS
from backprop_gpu.executors import Eager, Problem, Replay
from backprop_gpu.inputs import Samples
from backprop_gpu.optimizers import OPTIMIZERS, choose_optimizer
from backprop_gpu.regularization import Regularization

PAIRS = [
    (c.name, g)
    for c in COSTS.values()
    for g in (OUTPUT if c.name == "squared_error" else c.outputs or ("softmax", "tanh"))
]


RUNGS = pytest.mark.parametrize("rung", [Eager, Replay], ids=["eager", "replay"])


def peak_of_a_step(m, width, hidden="relu", cost="cross_entropy", g="softmax", rule=bp.Adam(), rung=Eager, **more):
    K, labels, uint8 = 10, more.pop("labels", True), more.pop("uint8", True)
    rng = np.random.default_rng(0)
    dropout = more.pop("dropout", 0.0)
    net = bp.Network([50, width, width, K], hidden, output=g, init="zeros", backend="numpy", dropout=dropout)
    X = rng.integers(0, 256, (2 * m, 50)).astype(np.uint8)
    if not uint8:
        X = X.astype(np.float32)
    T = rng.integers(0, K, 2 * m)
    if not labels:
        T = np.eye(K, dtype=np.float32)[T]
    weights = rng.random(2 * m).astype(np.float32) if more.pop("weights", False) else None
    chosen = COSTS[cost].smoothed(more.pop("label_smoothing", 0.0))
    samples = Samples(X, T, weights, "labels" if labels else net.task)
    problem = Problem(net, chosen, samples, "mean", Regularization(**more), frozen=0)
    executor = rung(problem, rule, m, seed=0, steps=1)
    measured = np.zeros(2)
    orders = [rng.permutation(2 * m)[:size] for size in (m, m // 3, m, m // 3, m)]

    def step(t):
        executor.begin(orders[t - 1], [0, len(orders[t - 1])], [1e-4], t)
        executor.step(0, 0, len(orders[t - 1]), measured)

    with np.errstate(all="ignore"):
        step(1)
        step(2)  # both sizes are recorded, where that is what the executor does
        tracemalloc.start()
        for t in (3, 4, 5):
            step(t)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert executor.rung == rung.rung  # it has not fallen back
    return peak


ALLOWANCE = 6 << 10  # bytes: a few views and numbers more; one flag for each sample more would be 24 KiB


def growth(**settings):
    """By how many bytes a step's peak grows with the batch and with the width.

    Each small step is large enough to fill NumPy's casting buffers, 8192 elements whatever the array. What another
    thread takes meanwhile counts too (the test runner's receives lists of what to run next), but not in every look.
    """
    for _ in range(3):
        of_batch = peak_of_a_step(32768, 16, **settings) - peak_of_a_step(8192, 16, **settings)
        of_width = peak_of_a_step(256, 1024, **settings) - peak_of_a_step(256, 64, **settings)
        if max(of_batch, of_width) < ALLOWANCE:
            break
    return max(of_batch, of_width)


@RUNGS
@pytest.mark.parametrize("hidden", HIDDEN)
def test_every_activation(hidden, rung):
    assert growth(hidden=hidden, rung=rung) < ALLOWANCE


@RUNGS
@pytest.mark.parametrize("labels", [True, False], ids=["labels", "rows"])
@pytest.mark.parametrize(("cost", "g"), PAIRS)
def test_every_cost(cost, g, labels, rung):
    assert growth(cost=cost, g=g, labels=labels, rung=rung) < ALLOWANCE


@RUNGS
@pytest.mark.parametrize(
    "rule",
    [bp.SGD(0.1, weight_decay=0.1), *map(choose_optimizer, OPTIMIZERS)],
    ids=repr,
)
def test_every_optimizer(rule, rung):
    assert growth(rule=rule, rung=rung) < ALLOWANCE


@RUNGS
@pytest.mark.parametrize(
    "more",
    [
        {"weights": True},
        {"l1": 0.1, "l2": 0.1, "clip_norm": 1.0, "clip_value": 0.1},
        {"label_smoothing": 0.1},
        {"label_smoothing": 0.1, "labels": False},
    ],
    ids=repr,
)
def test_every_setting(more, rung):
    assert growth(**more, rung=rung) < ALLOWANCE


def test_dropout():
    assert growth(dropout=0.5) < ALLOWANCE


@RUNGS
def test_float_data(rung):
    assert growth(uint8=False, rung=rung) < ALLOWANCE


def test_the_measurement_sees_one_number_a_sample(monkeypatch):
    from backprop_gpu import numpy_ops

    plain = numpy_ops.output_delta

    def with_a_copy(cost, g, Z, T, weight, Delta, C, db):
        plain(cost, g, Z, T, weight, Delta, C.copy(), db)

    monkeypatch.setattr(numpy_ops, "output_delta", with_a_copy)
    assert growth() > ALLOWANCE


def test_the_measurement_sees_it_in_what_is_replayed():
    class WithNumbers(Replay):
        def _backpropagate(self, i, start, stop, measured):
            super()._backpropagate(i, start, stop, measured)
            np.empty(stop - start, np.float32)

    assert growth(rung=WithNumbers) > ALLOWANCE
