"""The cost and accuracy of whole data as CUDA graphs, on a stand-in of CuPy, beside NumPy's."""

import contextlib
import gc
import warnings
import weakref

import fake_cupy
import numpy as np
import pytest
from conftest import real_gpu

import backprop_gpu as bp
from backprop_gpu import loop, network, plan, tally
from backprop_gpu.backend import to_host
from backprop_gpu.costs import choose_cost
from backprop_gpu.executors import Eager, Graph, Problem, _Order, choose
from backprop_gpu.inputs import Samples
from backprop_gpu.regularization import Regularization
from backprop_gpu.tally import GraphTally, Tally, tally_for

CHUNK = 16


@pytest.fixture(autouse=True)
def small_chunks(request, monkeypatch):
    """On the stand-in, unless a test says where it runs."""
    for module in (network, tally):
        monkeypatch.setattr(module, "CHUNK_ROWS", CHUNK)
    with contextlib.nullcontext() if "device" in request.fixturenames else fake_cupy.installed():
        yield


@pytest.fixture(params=["fake cupy", pytest.param("cupy", marks=pytest.mark.gpu)])
def device(request):
    """The stand-in, and a GPU."""
    with fake_cupy.installed() if request.param == "fake cupy" else contextlib.nullcontext():
        yield real_gpu()


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
def test_as_numpy_says(device, n, on_host):
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
def test_every_kind_of_network_and_target(device, settings):
    settings = {"precision": "float32", **settings}
    kind, weighted, uint8 = (settings.pop(k, v) for k, v in (("kind", "labels"), ("weighted", 0), ("uint8", True)))
    cost = settings.pop("cost", None)
    mine, its = nets(**settings)
    samples = data(40, mine.layers[-1], kind, weighted, mine.dtype, uint8)
    wanted = told(mine, samples, cost=cost)
    np.testing.assert_allclose(told(its, samples, GraphTally, cost=cost), wanted, rtol=2e-6)


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_less_precise_steps_are_judged_in_float32(device, precision):
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


def test_it_goes_by_the_theta_of_now_and_leaves_it_alone(device):
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


def test_a_chunk_out_of_the_ordinary_hides_nothing(device):
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


def test_where_there_is_no_memory_for_graphs_a_run_goes_on(monkeypatch):
    def none_left(*args):
        raise MemoryError("none left")

    monkeypatch.setattr(tally._Forward, "__init__", none_left)
    rng = np.random.default_rng(0)
    X, y = rng.integers(0, 256, (60, 12)).astype(np.uint8), rng.integers(0, 5, 60)
    with pytest.warns(UserWarning, match="no CUDA graph of an evaluation: MemoryError: none left"):
        history = bp.train(nets()[1], X, y, epochs=2, batch_size=16, validation=0.4)
    assert len(history.validation_cost) == 2
    assert history.executor == "graph"


def test_training_by_graphs_evaluates_by_graphs(device):
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


def test_an_evaluation_is_the_forward_half_of_a_step(monkeypatch):
    """No gradient, no update, and nobody looks through the data before."""

    def looked_through(X):
        raise AssertionError

    monkeypatch.setattr("backprop_gpu.executors.greatest", looked_through)
    its = nets(precision="float64", dropout=0.5)[1]
    samples, be = data(50, 5, dtype=np.float64, uint8=False), its.backend
    with be.active(), contextlib.closing(GraphTally(its, its.criterion, samples.on(be.asarray))) as of:
        of.totals()
        run = of._recorded
        assert run.sizes == (3, 1)  # all whole chunks at once; the rest
        assert fake_cupy.Counts.graph_nodes == len(run.plan.operations) + 1 == 4  # forward, head, sums; advance
        assert run.plan.rule is None
        assert "_flat" not in run.__dict__
        launches = fake_cupy.Counts.graph_launches
        of.totals()
        assert fake_cupy.Counts.graph_launches == launches + 2
        assert fake_cupy.Counts.graph_nodes == 4  # nothing is recorded twice


def test_no_more_chunks_a_graph_than_steps(monkeypatch):
    monkeypatch.setattr(Graph, "sizes", (4, 2, 1))
    mine, its = nets(precision="float64")
    samples, be = data(16 * 9 + 1, 5, dtype=np.float64), its.backend
    with be.active(), contextlib.closing(GraphTally(its, its.criterion, samples.on(be.asarray))) as of:
        np.testing.assert_allclose(of.totals(), told(mine, samples), rtol=1e-12)
        assert of._recorded.sizes == (4, 1)
        launches = fake_cupy.Counts.graph_launches
        of.totals()
        assert fake_cupy.Counts.graph_launches == launches + 4  # 4 + 4 + 1, and a sample alone


def test_closed_it_holds_nothing_and_evaluates_all_the_same():
    mine, its = nets(precision="float64")
    samples, be = data(50, 5, dtype=np.float64), its.backend
    with be.active():
        of = GraphTally(its, its.criterion, samples.on(be.asarray))
        of.totals()
        run = weakref.ref(of._recorded)
        of.close()
        gc.collect()
        assert run() is None
        launches = fake_cupy.Counts.graph_launches
        np.testing.assert_allclose(of.totals(), told(mine, samples), rtol=1e-12)
        assert fake_cupy.Counts.graph_launches == launches
        of.close()


@pytest.mark.parametrize("n", [CHUNK - 1, CHUNK, 3 * CHUNK + 1])
def test_of_data_on_the_host_a_chunk_or_two_are_on_the_device(n):
    """However much room there is."""
    its = nets(precision="float64")[1]
    with its.backend.active(), contextlib.closing(GraphTally(its, its.criterion, data(n, 5, dtype=np.float64))) as of:
        of.totals()
        assert of._recorded.feed.rows == min(n, CHUNK)
        assert len(of._recorded.feed.samples) == (n if n <= CHUNK else 2 * CHUNK)


def test_closing_waits_for_an_order_on_its_way():
    """Its pinned memory goes with the executor."""
    fake_cupy.Mode.late = "copies"
    its = nets(precision="float64")[1]
    samples, be = data(50, 5, dtype=np.float64), its.backend
    with be.active():
        problem = Problem(its, its.criterion, samples.on(be.asarray), "mean", Regularization(), 0)
        run = choose(problem, bp.SGD(0.1), 8, 0, 6)
        run.ahead(np.arange(50))
        landed = run._next._landed
        assert not landed.done
        run.ahead(np.arange(50))
        run.close()
        assert landed.done


def test_an_order_waits_until_the_one_before_has_left_the_host(monkeypatch):
    synchronize, seen = fake_cupy.Event.synchronize, []
    its, orders = nets()[1], [np.arange(9), np.arange(9)[::-1].copy()]
    with its.backend.active():
        xp = its.backend.xp
        way, place = _Order(xp, 9), xp.zeros(9, np.int64)

        def synchronized(event):
            seen.append(way._pinned.copy())
            synchronize(event)

        monkeypatch.setattr(fake_cupy.Event, "synchronize", synchronized)
        for order in orders:
            way.take(order)
            assert way.put(order, place)
    assert len(seen) == 2
    np.testing.assert_array_equal(seen[1], orders[0])


def test_what_fails_to_record_is_closed_at_once(monkeypatch):
    closed, close = [], tally._Forward.close
    monkeypatch.setattr(tally._Forward, "close", lambda run: (closed.append(run), close(run)))
    its = nets(precision="float64")[1]
    samples, be = data(50, 5, dtype=np.float64), its.backend
    fake_cupy.Mode.fail_capture = "begin"
    with be.active(), contextlib.closing(GraphTally(its, its.criterion, samples.on(be.asarray))) as of:
        run = of._recorded
        with pytest.warns(UserWarning, match="no CUDA graph of an evaluation"):
            of.totals()
        assert closed == [run]
        assert of._recorded is None
        of.totals()  # without another word


def test_a_run_draws_each_order_once_and_evaluates_by_one_tally(monkeypatch):
    rng = np.random.default_rng(0)
    X, y = rng.integers(0, 256, (90, 12)).astype(np.uint8), rng.integers(0, 5, 90)
    drawn, made, closed = [], [], []
    draw, make, close = loop.epoch_plan, loop.tally_for, GraphTally.close
    monkeypatch.setattr(loop, "epoch_plan", lambda *of: (drawn.append(of[-1]), draw(*of))[1])
    monkeypatch.setattr(loop, "tally_for", lambda *of: (made.append(make(*of)), made[-1])[1])
    monkeypatch.setattr(GraphTally, "close", lambda of: (closed.append(of), close(of))[1])
    for late, wanted in ((False, [1, 2, 3]), (True, [1])):
        drawn.clear(), made.clear(), closed.clear()
        monkeypatch.setattr("backprop_gpu.stopping.Ending.late", lambda of, late=late: late)
        net = bp.Network([12, 9, 5], backend="cupy", precision="float64", seed=4)
        history = bp.train(net, X, y, optimizer=bp.SGD(0.1), epochs=3, batch_size=16, validation=0.4)
        assert drawn == history.epoch == wanted
        assert [type(of) for of in made] == [GraphTally]
        assert closed == made


@pytest.mark.parametrize("precision", ["float64", "float32", "tf32", "bf16"])
def test_steps_have_the_precision_of_the_network_and_their_evaluation_is_exact(precision):
    net = bp.Network([12, 9, 5], backend="cupy", seed=4, precision=precision)
    samples, be = data(20, 5, dtype=net.dtype), net.backend
    with be.active(), contextlib.ExitStack() as stack:
        problem = Problem(net, net.criterion, samples.on(be.asarray), "mean", Regularization(), 0)
        run = stack.enter_context(contextlib.closing(choose(problem, bp.SGD(0.1), 8, 0, 3)))
        judged = stack.enter_context(contextlib.closing(tally_for(run, problem.samples, net.criterion)))._recorded
        exact = {"float64": "ffma"}.get(precision, "tf32x2")
        assert run.plan.arithmetic == {"float32": exact, "float64": exact}.get(precision, precision)
        assert judged.plan.arithmetic == exact
