"""The cost and accuracy of whole data as CUDA graphs, on a stand-in of CuPy, beside NumPy's."""

import contextlib
import warnings

import fake_cupy
import numpy as np
import pytest

import backprop_gpu as bp
from backprop_gpu import network, plan, tally
from backprop_gpu.backend import to_host
from backprop_gpu.costs import choose_cost
from backprop_gpu.executors import Eager, Graph, Problem, choose
from backprop_gpu.inputs import Samples
from backprop_gpu.regularization import Regularization
from backprop_gpu.tally import GraphTally, Tally, tally_for

CHUNK = 16


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    for module in (network, tally):
        monkeypatch.setattr(module, "CHUNK_ROWS", CHUNK)
    with fake_cupy.installed():
        yield


def data(n, K, kind="labels", weighted=False, dtype=np.float32, uint8=True):
    rng = np.random.default_rng(n)
    X = rng.integers(0, 256, (n, 12)).astype(np.uint8)
    X = X if uint8 else (X / 100).astype(dtype)
    T = rng.integers(0, K, n)
    if kind != "labels":
        T = (rng.random((n, K)) > 0.5).astype(dtype) if kind == "multilabel" else rng.random((n, K)).astype(dtype)
    return Samples(X, T, rng.random(n).astype(dtype) if weighted else None, kind)


def nets(layers=(12, 9, 5), **build):
    return [bp.Network(list(layers), backend=backend, seed=4, **build) for backend in ("numpy", "cupy")]


def told(net, samples, kind=Tally, on_host=False, cost=None):
    with net.backend.active():
        there = samples if on_host else samples.on(net.backend.asarray)
        with contextlib.closing(kind(net, choose_cost(cost, net.output), there)) as of:
            return of.totals()


@pytest.mark.parametrize("n", [1, 15, 16, 17, 48, 50, 16 * 66 + 3])
@pytest.mark.parametrize("on_host", [False, True])
def test_as_numpy_says(n, on_host):
    mine, its = nets(hidden="tanh", precision="float64")
    samples = data(n, 5, dtype=np.float64)
    cost, right = told(mine, samples)
    got = told(its, samples, GraphTally, on_host)
    np.testing.assert_allclose(got, (cost, right), rtol=1e-12)
    assert 0 < right < n or n == 1


KINDS = [
    {"hidden": "gelu"},
    {"dropout": 0.5},
    {"weighted": True},
    {"uint8": False, "precision": "float64"},
    {"kind": "multilabel", "output": "sigmoid"},
    {"kind": "regression", "output": "identity", "weighted": True},
    {"kind": "regression", "output": "tanh", "cost": "huber:delta=0.5"},
    {"layers": (12, 5)},
    {"layers": (12, 7, 70)},
    {"layers": (12, 9, 8, 7, 6, 5, 4, 3), "bias": False},
]


@pytest.mark.parametrize("settings", KINDS, ids=repr)
def test_every_kind_of_network_and_target(settings):
    settings = {"precision": "float32", **settings}
    kind, weighted, uint8 = (settings.pop(k, v) for k, v in (("kind", "labels"), ("weighted", 0), ("uint8", True)))
    cost = settings.pop("cost", None)
    mine, its = nets(**settings)
    samples = data(40, mine.layers[-1], kind, weighted, mine.dtype, uint8)
    wanted = told(mine, samples, cost=cost)
    np.testing.assert_allclose(told(its, samples, GraphTally, cost=cost), wanted, rtol=2e-6)


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_less_precise_steps_are_judged_in_float32(precision):
    (its,) = (bp.Network([12, 9, 5], backend="cupy", seed=4, precision=precision),)
    mine, samples = nets(precision="float32")[0], data(40, 5)
    np.testing.assert_allclose(told(its, samples, GraphTally), told(mine, samples), rtol=2e-6)


def test_wide_products_are_the_librarys(monkeypatch):
    import fake_cublaslt
    from test_wide import Lent

    library = fake_cublaslt.Library()
    library.issue = fake_cupy.issue
    monkeypatch.setattr("backprop_gpu.cublaslt.load", lambda: library)
    monkeypatch.setattr("backprop_gpu.cublaslt.Library", Lent)
    monkeypatch.setattr(plan, "WIDE", dict.fromkeys(plan.WIDE, plan.Wide(8, 10)))
    mine, its = nets((12, 16, 16, 5), precision="float64")
    samples = data(40, 5, dtype=np.float64)
    np.testing.assert_allclose(told(its, samples, GraphTally), told(mine, samples), rtol=1e-12)
    assert library.ran
    assert not library.live


def test_it_goes_by_the_theta_of_now_and_leaves_it_alone():
    mine, its = nets(precision="float64")
    samples, be = data(50, 5, dtype=np.float64), its.backend
    with be.active(), contextlib.closing(GraphTally(its, its.criterion, samples.on(be.asarray))) as of:
        of.totals()
        for factor in (1.5, 0.5):
            mine.theta[...] *= factor
            its.theta[...] = its.theta * factor
            before, allocated = to_host(its.theta).tobytes(), fake_cupy.Counts.allocations
            got = of.totals()
            assert fake_cupy.Counts.allocations == allocated
            np.testing.assert_allclose(got, told(mine, samples), rtol=1e-12)
            assert to_host(its.theta).tobytes() == before


def test_a_chunk_out_of_the_ordinary_hides_nothing():
    mine, its = nets(precision="float64", output="identity")
    samples = data(50, 5, "regression", dtype=np.float64)
    for net in (mine, its):
        net.W[1][...] = net.W[1] * 1e9
    np.testing.assert_allclose(told(its, samples, GraphTally), told(mine, samples), rtol=1e-12)
    its.W[1][...] = its.W[1] * np.nan
    assert np.isnan(told(its, samples, GraphTally)[0])


@pytest.mark.parametrize("fails", ["begin", "launch"])
def test_where_recording_fails_it_goes_on_eagerly(fails):
    mine, its = nets(precision="float64")
    samples = data(50, 5, dtype=np.float64)
    fake_cupy.Mode.fail_capture = fails
    with pytest.warns(UserWarning, match="no CUDA graph of an evaluation"):
        np.testing.assert_allclose(told(its, samples, GraphTally), told(mine, samples), rtol=1e-12)


def test_the_quickest_that_is_there():
    def tally_of(kind, net, cost=None, failed=None):
        samples = data(20, 5)
        with net.backend.active(), contextlib.ExitStack() as stack:
            problem = Problem(net, net.criterion, samples.on(net.backend.asarray), "mean", Regularization(), 0)
            run = stack.enter_context(contextlib.closing(kind(problem, bp.SGD(0.1), 8, 0, 2)))
            run.failed = failed
            return type(stack.enter_context(contextlib.closing(tally_for(run, problem.samples, cost or net.criterion))))

    mine, its = nets(precision="float32")
    assert tally_of(choose, its) is GraphTally
    assert tally_of(Eager, its) is Tally
    assert tally_of(choose, mine) is Tally
    assert tally_of(Graph, its, failed="broken") is Tally
    assert tally_of(Graph, its, bp.Cost("strange", lambda *of: None, lambda *of: None)) is Tally


def test_training_by_graphs_evaluates_by_graphs(monkeypatch):
    rng = np.random.default_rng(0)
    X, y = rng.integers(0, 256, (90, 12)).astype(np.uint8), rng.integers(0, 5, 90)
    histories = []
    for backend in ("numpy", "cupy"):
        net = bp.Network([12, 9, 5], backend=backend, precision="float64", seed=4, dropout=0.3)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            histories.append(bp.train(net, X, y, optimizer=bp.SGD(0.1), epochs=3, batch_size=16, validation=0.4))
    mine, its = histories
    assert its.executor == "graph"
    np.testing.assert_allclose(its.validation_cost, mine.validation_cost, rtol=1e-10)
    assert its.validation_accuracy == mine.validation_accuracy
