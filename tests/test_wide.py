"""Steps in which the products of wide layers are cuBLASLt's, on stand-ins of CuPy and of the library, beside NumPy."""

import contextlib
import gc

import fake_cublaslt
import fake_cupy
import numpy as np
import pytest

import backprop_gpu as bp
from backprop_gpu import BackendError, cublaslt, plan
from backprop_gpu.backend import to_host
from backprop_gpu.costs import choose_cost
from backprop_gpu.executors import Eager, Graph, Problem
from backprop_gpu.inputs import Samples
from backprop_gpu.optimizers import OPTIMIZERS, choose_optimizer
from backprop_gpu.regularization import Regularization

N, M, ENDS = 60, 24, [0, 24, 48, 60]  # samples, of a batch, where batches end: the last is too small for the library
WIDE = plan.Wide(8, 16)
ALL_THREE = {"forward", "hidden_delta", "weight_gradient"}
SETTINGS = [
    {},
    {"hidden": "gelu"},
    {"hidden": "tanh"},
    {"hidden": ["swish", "identity"]},
    {"bias": False},
    {"hidden": "gelu", "bias": False},
    {"hidden": "identity", "bias": False},
    {"dropout": 0.4},
    {"hidden": "gelu", "dropout": 0.4},
    {"hidden": "identity", "dropout": 0.4},
    {"weights": True},
    {"weights": True, "reduction": "sum"},
    {"frozen": 1},
    {"frozen": 2},
    {"uint8": False},
    {"layers": [20, 16], "labels": False},
    {"layers": [20, 16, 80], "hidden": "softplus"},
    {"layers": [20, 13, 16, 5]},
    {"layers": [20, 16, 13, 12, 8, 5], "hidden": "elu"},
    {"l1": 0.01, "l2": 0.1, "clip_norm": 0.5, "clip_value": 0.05},
    {"smoothing": 0.1},
]


class Lent(cublaslt.Library):
    """Lends the stand-in whatever a product is made of."""

    made = 0

    def __init__(self):
        Lent.made += 1
        super().__init__(cublaslt.load(), self._lend)

    def _lend(self, a):
        self.dll.own(a._a)
        return a.data.ptr


@pytest.fixture
def fake(monkeypatch):
    """The stand-ins, and small products wide. Nothing of cuBLASLt is left alive after the test."""
    fake = fake_cublaslt.Library()
    fake.issue = fake_cupy.issue
    monkeypatch.setattr(cublaslt, "load", lambda: fake)
    monkeypatch.setattr(cublaslt, "Library", Lent)
    monkeypatch.setattr(plan, "WIDE", dict.fromkeys(plan.WIDE, WIDE))
    with fake_cupy.installed():
        yield fake
    assert not fake.crashes
    assert not fake.refusals
    gc.collect()
    assert not fake.live


def executor(kind, backend, rule, precision="float64", layers=(20, 16, 12, 5), **more):
    """An executor over the same samples on every backend."""
    rng = np.random.default_rng(0)
    K = layers[-1]
    X, T = rng.integers(0, 256, (N, 20)).astype(np.uint8), rng.integers(0, K, N)
    net = bp.Network(
        list(layers), more.pop("hidden", "relu"), output=more.pop("output", "softmax"), precision=precision,
        backend=backend, dropout=more.pop("dropout", 0.0), bias=more.pop("bias", True), seed=3,
    )  # fmt: skip
    if not more.pop("uint8", True):
        X = (X / 99).astype(net.dtype)
    if not more.pop("labels", True):
        T = np.eye(K, dtype=net.dtype)[T]
    weights = rng.random(N).astype(net.dtype) + 0.5 if more.pop("weights", False) else None
    cost = choose_cost(None, net.output).smoothed(more.pop("smoothing", 0.0))
    samples = Samples(X, T, weights, "labels")
    with net.backend.active():
        problem = Problem(
            net, cost, samples.on(net.backend.asarray), more.pop("reduction", "mean"),
            frozen=more.pop("frozen", 0), regularization=Regularization(**more),
        )  # fmt: skip
        return kind(problem, rule, M, seed=7, steps=3)


def steps_of(run, rule, n=10):
    """So many steps, epoch by epoch; what `measured` said of each."""
    order = np.random.default_rng(1).permutation(N)
    told = []
    with run.problem.net.backend.active():
        for first in range(0, n, 3):
            of_epoch = min(3, n - first)
            run.begin(order, ENDS, [rule.lr, 0.5 * rule.lr, 0.1 * rule.lr], first + 1)
            done = 0
            while done < of_epoch:
                done += run.run(done, of_epoch - done, False)
            run.finish()
            assert int(run.diverged[0]) == 0
            told.append(to_host(run.measured)[:of_epoch].copy())
    return np.concatenate(told)


@contextlib.contextmanager
def graph(rule, **settings):
    with contextlib.closing(executor(Graph, "cupy", rule, **settings)) as run:
        yield run
        assert run.failed is None


def like_numpy(rule, rtol, **settings):
    """Ten steps on both; the plan of a full batch, and of the last one."""
    mine = executor(Eager, "numpy", rule, **settings)
    wanted = steps_of(mine, rule)
    with graph(rule, **settings) as its:
        np.testing.assert_allclose(steps_of(its, rule), wanted, rtol=10 * rtol)
        for d, h in zip((its.theta, *its.slots), (mine.theta, *mine.slots), strict=True):
            np.testing.assert_allclose(to_host(d), h, rtol=rtol, atol=rtol)
        return its.plan, its._plan_of(12)


def names(of):
    return {name for name, _ in of.products}


@pytest.mark.parametrize("settings", SETTINGS, ids=repr)
@pytest.mark.parametrize(("precision", "rtol"), [("float64", 1e-11), ("float32", 3e-5)])
def test_ten_steps_of_every_kind_of_network(fake, settings, precision, rtol):
    full, tail = like_numpy(bp.SGD(0.1), rtol, precision=precision, **settings)
    assert full.products
    assert full.rule is None
    assert not tail.products
    assert (tail.rule is None) == any(k in settings for k in ("l1", "clip_norm"))
    assert full.workspace.size == tail.workspace.size


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_ten_steps_of_every_optimizer(fake, name):
    like_numpy(choose_optimizer(name), 1e-7, hidden="tanh")
