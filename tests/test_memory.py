"""After the first step, a training step allocates nothing that grows with batch or width."""

import tracemalloc

import numpy as np
import pytest

import backprop_gpu as bp
from backprop_gpu.activations import HIDDEN, OUTPUT
from backprop_gpu.costs import COSTS
from backprop_gpu.executors import Eager

PAIRS = [(c.name, g) for c in COSTS.values() for g in OUTPUT if c.outputs is None or g in c.outputs]


def peak_of_a_step(m, width, hidden="relu", cost="cross_entropy", g="softmax", rule=bp.Adam(), labels=True, uint8=True):
    K = 10
    rng = np.random.default_rng(0)
    net = bp.Network([50, width, width, K], hidden=hidden, output=g, init="zeros", backend="numpy")
    X = rng.integers(0, 256, (2 * m, 50)).astype(np.uint8)
    if not uint8:
        X = X.astype(np.float32)
    T = rng.integers(0, K, 2 * m)
    if not labels:
        T = np.eye(K, dtype=np.float32)[T]
    executor = Eager(net, COSTS[cost], "labels" if labels else net.task, rule, X, T, m)
    measured = np.zeros((4, 2))
    orders = [rng.permutation(2 * m)[:size] for size in (m, m, m // 3, m)]
    with np.errstate(all="ignore"):
        executor.step(orders[0], 1e-4, 1, measured[0])
        tracemalloc.start()
        for t in range(1, 4):
            executor.step(orders[t], 1e-4, t + 1, measured[t])
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return peak


def growth(**settings):
    """By how many bytes a step's peak grows with the batch and with the width.

    Each small step is large enough to fill NumPy's casting buffers, 8192 elements whatever the array.
    """
    of_batch = peak_of_a_step(32768, 16, **settings) - peak_of_a_step(8192, 16, **settings)
    of_width = peak_of_a_step(256, 1024, **settings) - peak_of_a_step(256, 64, **settings)
    return max(of_batch, of_width)


ALLOWANCE = 6 << 10  # bytes: a few views and numbers more; one flag for each sample more would be 24 KiB


@pytest.mark.parametrize("hidden", HIDDEN)
def test_every_activation(hidden):
    assert growth(hidden=hidden) < ALLOWANCE


@pytest.mark.parametrize("labels", [True, False], ids=["labels", "rows"])
@pytest.mark.parametrize(("cost", "g"), PAIRS)
def test_every_cost(cost, g, labels):
    assert growth(cost=cost, g=g, labels=labels) < ALLOWANCE


@pytest.mark.parametrize(
    "rule",
    [bp.SGD(0.1, weight_decay=0.1), bp.SGD(0.1, momentum=0.9, nesterov=True), bp.Adam(amsgrad=True), bp.AdamW()],
    ids=repr,
)
def test_every_optimizer(rule):
    assert growth(rule=rule) < ALLOWANCE


def test_float_data():
    assert growth(uint8=False) < ALLOWANCE


def test_the_measurement_sees_one_number_a_sample(monkeypatch):
    from backprop_gpu import numpy_ops

    plain = numpy_ops.output_delta

    def with_a_copy(cost, g, Z, T, weight, Delta, C):
        plain(cost, g, Z, T, weight, Delta, C.copy())

    monkeypatch.setattr(numpy_ops, "output_delta", with_a_copy)
    assert growth() > ALLOWANCE
