"""Training by CUDA graphs of whole steps: which are used, what they leave alone, and what happens where they fail."""

import contextlib
import copy
import os
import signal
import threading
import warnings
import weakref

import fake_cupy
import numpy as np
import pytest

import backprop_gpu as bp
from backprop_gpu import driver, executors
from backprop_gpu import plan as plans
from backprop_gpu.backend import to_host
from backprop_gpu.costs import choose_cost
from backprop_gpu.executors import Eager, Graph, Problem, Replay
from backprop_gpu.inputs import Samples
from backprop_gpu.regularization import Regularization

N, LAYERS = 103, [20, 13, 5]


@pytest.fixture(autouse=True)
def small_graphs(monkeypatch):
    monkeypatch.setattr(Graph, "sizes", (4, 2, 1))


@pytest.fixture
def cp():
    with fake_cupy.installed() as module:
        yield module


@pytest.fixture
def data(rng):
    return rng.integers(0, 256, (N, 20)).astype(np.uint8), rng.integers(0, 5, N)


@pytest.fixture
def seen(monkeypatch):
    """The executors that were used, and what they were asked."""
    made, choose = [], executors.choose

    def chosen(*args):
        made.append(choose(*args))
        return made[-1]

    monkeypatch.setattr("backprop_gpu.training.choose", chosen)
    return made


@pytest.fixture
def eager_steps(monkeypatch):
    """The numbers, in their epoch, of the steps that were taken one operation at a time."""
    taken, step = [], Eager.step

    def told(self, i, *rest):
        taken.append(i)
        return step(self, i, *rest)

    monkeypatch.setattr(Eager, "step", told)
    return taken


def network(backend="cupy", layers=LAYERS, precision="float64", **build):
    return bp.Network(layers, backend=backend, precision=precision, seed=2, **build)


def trained(net, data, **settings):
    settings = {"optimizer": bp.AdamW(1e-2), "epochs": 2, "batch_size": 8, **settings}
    return bp.train(net, *data, **settings)


def theta(net):
    return to_host(net.theta).copy()


def same(history, other, rtol=0.0):
    for name in ("train_cost", "train_accuracy", "validation_cost", "lr", "steps", "epoch"):
        ours, theirs = ([x for x in getattr(h, name) if x is not None] for h in (history, other))
        np.testing.assert_allclose(ours, theirs, rtol=rtol)
    assert history.samples == other.samples


@contextlib.contextmanager
def eagerly(monkeypatch):
    with monkeypatch.context() as m:
        m.setenv("BACKPROP_GPU_EXECUTOR", "eager")
        yield


def recorded(monkeypatch):
    """(samples, steps) of each graph as it is asked for."""
    asked, graph = [], Graph._graph

    def told(self, m, steps):
        asked.append((m, steps))
        return graph(self, m, steps)

    monkeypatch.setattr(Graph, "_graph", told)
    return asked


# ---- which graphs ---------------------------------------------------------------------------------------------------

SETTINGS = [
    {},
    {"batches": "chunks"},
    {"batches": "in_order"},
    {"batch_size": "full"},
    {"batch_size": 1, "epochs": 1},
    {"l2": 0.01, "clip_norm": 0.5},
    {"sample_weight": True, "label_smoothing": 0.1},
    {"frozen": 1},
    {"optimizer": bp.SGD(0.1, momentum=0.9), "schedule": "cosine", "reduction": "sum"},
    {"build": {"dropout": 0.4}},
    {"build": {"precision": "float32"}},
]


def of(settings, rng):
    """The settings of the network and of the run."""
    settings = dict(settings)
    if settings.pop("sample_weight", False):
        settings["sample_weight"] = rng.random(N) + 0.5
    return settings.pop("build", {}), settings


@pytest.mark.parametrize("settings", SETTINGS, ids=repr)
def test_graphs_of_many_steps_give_the_bits_of_single_ones(cp, data, rng, settings, monkeypatch, seen):
    build, settings = of(settings, rng)
    results = []
    for sizes in ((4, 2, 1), (1,), (3, 1)):
        monkeypatch.setattr(Graph, "sizes", sizes)
        net = network(**build)
        history = trained(net, data, **settings)
        results.append((theta(net).tobytes(), history.train_cost, history.train_accuracy))
        assert type(seen[-1]) is Graph
        assert seen[-1].failed is None
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize("settings", SETTINGS, ids=repr)
def test_a_run_by_graphs_is_that_of_numpy(cp, data, rng, settings, eager_steps):
    build, settings = of(settings, rng)
    rtol = 1e-3 if build.get("precision") == "float32" else 1e-9
    runs = []
    for backend in ("cupy", "numpy"):
        net = network(backend, **build)
        runs.append((trained(net, data, validation=data, **settings), theta(net)))
        if backend == "cupy":
            assert eager_steps == []
    same(runs[0][0], runs[1][0], rtol)
    np.testing.assert_allclose(runs[0][1], runs[1][1], rtol=rtol, atol=rtol)


def test_the_largest_graph_that_fits_is_used(cp, data, monkeypatch):
    asked = recorded(monkeypatch)
    trained(network(), data, epochs=1)
    assert asked == [(8, 4)] * 3 + [(7, 1)]  # 12 steps of 8 samples, one of 7
    asked.clear()
    trained(network(), data, epochs=1, batch_size=7)
    assert asked == [(7, 4)] * 3 + [(7, 2), (5, 1)]
    asked.clear()
    trained(network(), data, epochs=1, batch_size=15)
    assert asked == [(15, 4), (15, 2), (13, 1)]


def test_as_it_comes_there_are_graphs_of_64_16_and_1(cp, data, monkeypatch):
    monkeypatch.undo()
    assert Graph.sizes == (64, 16, 1)
    asked = recorded(monkeypatch)
    trained(network(), data, epochs=1, batch_size=1)
    assert asked == [(1, 64)] + [(1, 16)] * 2 + [(1, 1)] * 7


def test_a_small_batch_in_the_middle_is_a_graph_of_its_own(cp, data, monkeypatch):
    asked = recorded(monkeypatch)
    trained(network(), data, epochs=4, batch_size=20, batches="chunks", seed=3)
    assert asked.count((3, 1)) == 4
    assert len({m for m, _ in asked}) == 2


@pytest.mark.parametrize(
    "ends", [[0, 24, 36, 48, 60], [0, 12, 24, 48, 60], [0, 12, 24, 36, 60], [0, 24, 34, 44, 54, 60]]
)
def test_small_batches_in_a_row(cp, data, ends, monkeypatch):
    """What `Eager.begin` allows, though no run of `train` has it."""
    X, T = data
    thetas = []
    for how in (Eager, Graph):
        net = network()
        samples = Samples(X[:60], T[:60], None, "labels")
        with net.backend.active():
            problem = Problem(
                net, choose_cost(None, "softmax"), samples.on(net.backend.asarray), "mean", Regularization(), 0
            )
            steps = len(ends) - 1
            with contextlib.closing(how(problem, bp.SGD(0.1), 24, 0, steps)) as executor:
                executor.begin(np.random.default_rng(0).permutation(60), ends, [0.1] * steps, 1)
                done = 0
                while done < steps:
                    done += executor.run(done, steps - done)
                executor.finish()
        thetas.append(theta(net))
    np.testing.assert_allclose(thetas[1], thetas[0], rtol=1e-10, atol=1e-13)


def test_a_graph_is_recorded_once(cp, data, seen, monkeypatch):
    captures, end = [], fake_cupy.Stream.end_capture
    monkeypatch.setattr(fake_cupy.Stream, "end_capture", lambda self: captures.append(1) or end(self))
    trained(network(), data, epochs=3)
    assert len(captures) == 2  # of 4 steps of 8 samples, of one of 7


def test_a_step_is_as_many_nodes_as_the_plan_says(cp, data, seen):
    trained(network(), data, epochs=1, batch_size="full")
    assert fake_cupy.Counts.graph_nodes == len(seen[-1].plan.operations) + 1 == 4


# ---- the next epoch's order -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("late", ["copies", "kernels", None])
def test_orders_follow_each_other_at_a_distance(cp, rng, late):
    """However late CUDA does its work: one is put in its place while the next is on its way."""
    fake_cupy.Mode.late = late
    orders = [rng.permutation(50) for _ in range(6)]
    place, way = cp.zeros(50, np.int64), executors._Order(cp, 50)
    arrived = cp.zeros((6, 50), np.int64)
    way.take(orders[0])
    for i, order in enumerate(orders):
        assert way.put(order, place)
        arrived[i] = place
        assert not way.put(orders[i - 1], place)
        if i < 5:
            way.take(orders[i + 1])
    np.testing.assert_array_equal(to_host(arrived), orders)
    assert not way.put(orders[5].copy(), place)
    way.take(rng.permutation(51))  # more than there is room for
    assert not way.put(orders[5], place)


def test_every_epoch_but_the_first_finds_its_order_there(cp, data, monkeypatch):
    found, put = [], executors._Order.put

    def putting(self, *args):
        found.append(put(self, *args))
        return found[-1]

    monkeypatch.setattr(executors._Order, "put", putting)
    history = trained(network(), data, epochs=4)
    assert found == [False, True, True, True]
    wanted = trained(network("numpy"), data, epochs=4)
    np.testing.assert_allclose(history.train_cost, wanted.train_cost, rtol=1e-9)


# ---- what an epoch leaves alone -------------------------------------------------------------------------------------


def counts():
    c = fake_cupy.Counts
    return c.allocations, c.to_device, c.to_host, c.synchronisations, c.launches


@pytest.fixture
def within_epochs(monkeypatch):
    """What each epoch counted between `begin` and `finish`."""
    differences, began = [], []
    begin, finish, run = Graph.begin, Graph.finish, Graph.run

    def beginning(self, *args):
        begin(self, *args)
        began[:] = [counts()]

    def running(self, i, most):
        taken = run(self, i, most)
        if i + taken == len(self.ends) - 1:
            differences.append(tuple(np.subtract(counts(), began[0]).tolist()))
        return taken

    monkeypatch.setattr(Graph, "begin", beginning)
    monkeypatch.setattr(Graph, "run", running)
    assert finish
    return differences


@pytest.mark.parametrize(
    "settings",
    [{}, {"validation": 0.2}, {"l1": 0.1, "clip_value": 0.1}, {"build": {"dropout": 0.3}}, {"sample_weight": True},
     {"build": {"precision": "float32"}}, {"time_limit": 1e9}],
    ids=repr,
)  # fmt: skip
def test_within_an_epoch_nothing_is_allocated_crosses_the_bus_or_waits(cp, data, rng, settings, within_epochs):
    build, settings = of(settings, rng)
    trained(network(**build), data, epochs=3, **settings)
    first, *later = within_epochs
    assert first[0] > 0  # it is recorded there
    assert later == [(0, 0, 0, 0, 0)] * 2


def test_the_counts_would_see_it(cp, data, within_epochs, monkeypatch):
    launch = fake_cupy.Graph.launch
    monkeypatch.setattr(fake_cupy.Graph, "launch", lambda self: float(cp.zeros(3).sum()) or launch(self))
    trained(network(), data, epochs=2)
    assert min(within_epochs[1][:4][i] for i in (0, 2, 3)) > 0


def test_memory_that_is_allocated_while_it_records_ends_in_eager_steps(cp, data, monkeypatch, seen):
    advance = Graph._advance

    def costly(self, steps, fewer):
        if steps:
            cp.empty(9)
        advance(self, steps, fewer)

    monkeypatch.setattr(Graph, "_advance", costly)
    with pytest.warns(UserWarning, match="no CUDA graph.*72 bytes are allocated in a step"):
        trained(network(), data)
    assert "72 bytes" in seen[-1].failed


def test_what_a_graph_works_on_lives_as_long_as_it(cp, data, seen):
    """The stand-in raises where a graph finds that its memory is gone."""
    import gc

    class Collect:
        def __call__(self, run):
            gc.collect()

    assert fake_cupy.Mode.freed
    net = network()
    trained(net, data, epochs=3, callbacks=[Collect()], l2=0.1)
    assert np.isfinite(theta(net)).all()


def test_an_array_that_is_dropped_is_missed(cp, data, monkeypatch):
    bound = Graph._bound

    def forgetful(self, m):
        launches = bound(self, m)
        self._vectors.pop("work", None)
        return launches

    def shown(self, m, steps):
        graph = graph_of(self, m, steps)
        for name in ("_launches", "_vectors"):
            vars(self).pop(name, None)
        return graph

    graph_of = Graph._graph
    monkeypatch.setattr(Graph, "_bound", forgetful)
    monkeypatch.setattr(Graph, "_graph", shown)
    with pytest.raises(UserWarning, match="memory has been freed"):
        trained(network(), data, epochs=1, batch_size="full")


def test_after_training_its_memory_is_free_at_once(cp, data, seen):
    """Without the garbage collector: memory of the device is too dear to wait for it."""
    import gc

    gc.disable()
    try:
        trained(network(), data)
        executor = weakref.ref(seen.pop())
        assert executor() is None
    finally:
        gc.enable()


def test_a_number_that_stays_as_it_was_recorded_gives_wrong_results(cp, data, monkeypatch):
    """So the tests above see it: the second step of a recording that takes itself for the first."""
    right = network()
    trained(right, data)
    enqueue = Graph._enqueue
    monkeypatch.setattr(Graph, "_enqueue", lambda self, m, ahead: enqueue(self, m, 0))
    wrong = network()
    trained(wrong, data)
    assert abs(theta(right) - theta(wrong)).max() > 1e-6


def test_kernels_that_wait_by_themselves_start_early_on_newer_devices(data, monkeypatch):
    early = []

    def launch_early(function, grid, block, arguments, shared, stream):
        early.append(function.name)
        assert stream == fake_cupy.get_current_stream().ptr
        function(grid, block, tuple(arguments), shared_mem=shared)

    monkeypatch.setattr(driver, "launch_early", launch_early)
    build = {"layers": [20, 13, 11, 5], "dropout": 0.3}
    weights = np.linspace(0.5, 1.5, N)
    thetas = []
    for major in (8, 9):
        monkeypatch.setitem(fake_cupy.ATTRIBUTES, 75, major)
        with fake_cupy.installed():
            net = network(**build)
            trained(net, data, sample_weight=weights)
            thetas.append(theta(net).tobytes())
        assert set(early) == (set(plans.WAITING) if major == 9 else set())
    assert thetas[0] == thetas[1]


# ---- where recording fails ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "why"),
    [("begin", "NotSupported"), ("end", "CaptureInvalidated"), ("instantiate", "MemoryAllocation"),
     ("launch", "MemoryAllocation")],
)  # fmt: skip
@pytest.mark.parametrize("settings", [{}, {"l2": 0.01}], ids=repr)
def test_where_recording_fails_steps_are_eager_with_one_warning(cp, data, where, why, settings, seen, monkeypatch):
    with eagerly(monkeypatch):
        right = network()
        wanted = trained(right, data, epochs=3, **settings)
    fake_cupy.Mode.fail_capture = where
    net = network()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        history = trained(net, data, epochs=3, **settings)
    assert len(told) == 1
    assert "no CUDA graph, steps run one operation at a time: CUDARuntimeError" in str(told[0].message)
    assert why in str(told[0].message)
    same(history, wanted)
    assert theta(net).tobytes() == theta(right).tobytes()
    assert type(seen[-1]) is Graph


@pytest.mark.parametrize("where", ["begin", "end", "instantiate", "launch"])
@pytest.mark.parametrize("unusual", [False, True], ids=["usual", "unusual"])
def test_where_it_fails_late_no_step_is_lost(cp, rng, where, unusual, monkeypatch):
    """The graph of the last, smaller batch fails, after others have been launched, one with a step put off."""
    X, T = rng.random((N, 20)), rng.integers(0, 5, N)
    if unusual:
        X[30] *= 1e7
    with eagerly(monkeypatch):
        right = network()
        wanted = trained(right, (X, T), epochs=1, batches="in_order", optimizer=bp.Adam(1e-3))
    graph_of = Graph._graph

    def failing(self, m, steps):
        fake_cupy.Mode.fail_capture = where if m != 8 else None
        return graph_of(self, m, steps)

    monkeypatch.setattr(Graph, "_graph", failing)
    net = network()
    with pytest.warns(UserWarning, match="no CUDA graph"):
        history = trained(net, (X, T), epochs=1, batches="in_order", optimizer=bp.Adam(1e-3))
    np.testing.assert_allclose(theta(net), theta(right), rtol=1e-8, atol=1e-12)
    same(history, wanted, 1e-9)


def test_a_kernel_that_does_not_compile_is_told(cp, data):
    bad = bp.Activation.of("bad", lambda xp, Z: Z, lambda xp, Z: 0 * Z + 1, cuda=("nonsense(z)", "1"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(bp.ConfigError, match="CUDA expressions of your own do not compile"):
            trained(network(hidden=bad), data, epochs=1)


# ---- steps out of the ordinary --------------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [(30,), (0,), (102,), (0, 30, 31, 77, 102), (8, 16, 24)], ids=repr)
@pytest.mark.parametrize(
    "settings", [{}, {"l2": 0.01}, {"optimizer": bp.Adam(1e-3, amsgrad=True)}, {"build": {"dropout": 0.3}}], ids=repr
)
def test_unusual_steps_are_taken_with_care_and_the_rest_follows(cp, rng, samples, settings, eager_steps, monkeypatch):
    """A huge sample makes a |Z| beyond the ordinary in its step: in the first, some in the middle, in the last."""
    X, T = rng.random((N, 20)), rng.integers(0, 5, N)
    X[list(samples)] *= 1e7
    build, settings = of({"optimizer": bp.Adam(1e-3), **settings}, rng)
    settings |= {"batches": "in_order", "epochs": 2}
    with eagerly(monkeypatch):
        right = network(**build)
        wanted = trained(right, (X, T), **settings)
    eager_steps.clear()
    net = network(**build)
    history = trained(net, (X, T), **settings)
    assert eager_steps == sorted({sample // 8 for sample in samples}) * 2
    np.testing.assert_allclose(theta(net), theta(right), rtol=1e-8, atol=1e-12)
    same(history, wanted, 1e-8)


def test_targets_that_make_a_huge_delta_are_unusual(cp, rng, eager_steps, monkeypatch):
    X, T = rng.random((N, 20)), rng.random((N, 2))
    T[50] = 1e13
    settings = {"batches": "in_order", "epochs": 1, "optimizer": bp.Adam(1e-3)}
    nets = [network(layers=[20, 7, 2], output="identity") for _ in range(2)]
    with eagerly(monkeypatch):
        trained(nets[0], (X, T), **settings)
    eager_steps.clear()
    trained(nets[1], (X, T), **settings)
    assert eager_steps == [6]
    np.testing.assert_allclose(theta(nets[1]), theta(nets[0]), rtol=1e-8)


@pytest.mark.parametrize("watched", [False, True], ids=["", "watched"])
@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize("at", [0, 30, 50, 102])
def test_a_run_that_diverges_says_so_as_numpy_does(cp, rng, monkeypatch, precision, watched, at):
    """In the same epoch and step, and theta is what it was before that step."""
    X, T = rng.random((N, 20)), rng.random((N, 2))
    huge = 1e25 if precision == "float32" else 1e200
    T[at] = huge

    class Watch:
        def on_step(self, run):
            pass

    runs = []
    for backend, how in (("numpy", "auto"), ("cupy", "eager"), ("cupy", "graph")):
        if backend == "cupy":
            monkeypatch.setenv("BACKPROP_GPU_EXECUTOR", how)
        net = network(backend, [20, 7, 2], precision, output="identity")
        with pytest.raises(bp.DivergenceError) as e:
            trained(
                net, (X, T), batches="in_order", optimizer=bp.SGD(1e-3), callbacks=[Watch()] if watched else [],
                schedule="cosine",
            )  # fmt: skip
        monkeypatch.delenv("BACKPROP_GPU_EXECUTOR", raising=False)
        runs.append((e.value.epoch, e.value.step, e.value.learning_rate, theta(net)))
    assert runs[0][:3] == runs[1][:3] == runs[2][:3]
    assert runs[0][1] == at // 8 + 1
    for run in runs[1:]:
        np.testing.assert_allclose(run[3], runs[0][3], rtol=1e-4 if precision == "float32" else 1e-10, atol=1e-6)


@pytest.mark.parametrize(
    ("layers", "precision", "lr", "epoch"), [([20, 7, 2], "float64", 0.3, 1), ([20, 2], "float32", 0.5, 6)]
)
def test_a_learning_rate_that_is_too_high_ends_where_numpy_ends(cp, layers, precision, lr, epoch):
    """After steps that are out of the ordinary and yet finite."""
    rng = np.random.default_rng(5)
    X, T = rng.random((N, 20)), rng.random((N, 2))
    told = []
    for backend in ("numpy", "cupy"):
        net = network(backend, layers, precision, hidden="identity", output="identity")
        with pytest.raises(bp.DivergenceError) as e:
            trained(net, (X, T), optimizer=bp.SGD(lr), epochs=50)
        told.append((e.value.epoch, e.value.step))
        assert np.isfinite(theta(net)).all()
    assert told[0] == told[1]
    assert told[0][0] == epoch


def test_after_a_divergence_the_next_run_begins_anew(cp, rng, eager_steps):
    X, T = rng.random((N, 20)), rng.random((N, 2))
    bad = T.copy()
    bad[20] = 1e200
    net = network(layers=[20, 7, 2], output="identity")
    with pytest.raises(bp.DivergenceError):
        trained(net, (X, bad), batches="in_order")
    eager_steps.clear()
    trained(net, (X, T))
    assert eager_steps == []


@pytest.mark.parametrize(
    ("rule", "is_eager"),
    [
        (bp.SGD(plans.MOST_LR), False),
        (bp.SGD(plans.MOST_LR * 1.01), True),
        (bp.AdamW(0.5, weight_decay=1.9), False),
        (bp.AdamW(0.5, weight_decay=2.0), True),
    ],
    ids=repr,
)
def test_learning_rates_beyond_what_bounds_allow_make_eager_epochs(cp, data, rule, is_eager, eager_steps):
    """Only the epochs that have them: here the first, for the schedule lowers it."""
    X, T = data
    lowered = {"schedule": lambda step, total: 1.0 if step < 13 else 1e-3}
    nets = [network("cupy"), network("numpy")]
    trained(nets[0], ((X * 0.0001).astype(np.float64), T), optimizer=rule, **lowered)
    assert eager_steps == (list(range(13)) if is_eager else [])
    trained(nets[1], ((X * 0.0001).astype(np.float64), T), optimizer=rule, **lowered)
    np.testing.assert_allclose(theta(nets[0]), theta(nets[1]), rtol=1e-7, atol=1e-9)


# ---- callbacks, clocks, signals, threads ------------------------------------------------------------------------


@pytest.mark.parametrize("huge", [False, True], ids=["usual", "unusual"])
def test_callbacks_see_theta_after_each_step(cp, rng, huge):
    X, T = rng.random((N, 20)), rng.integers(0, 5, N)
    if huge:
        X[[30, 99]] *= 1e7

    class Watch:
        def __init__(self):
            self.seen = []

        def on_step(self, run):
            self.seen.append((run.epoch, run.step, run.lr, theta(run.net)))

    watches = Watch(), Watch()
    for watch, backend in zip(watches, ("cupy", "numpy"), strict=True):
        trained(network(backend), (X, T), callbacks=[watch], optimizer=bp.Adam(1e-3), schedule="cosine")
    assert [s[:3] for s in watches[0].seen] == [s[:3] for s in watches[1].seen]
    assert [s[1] for s in watches[0].seen] == list(range(1, 27))
    for ours, theirs in zip(*(w.seen for w in watches), strict=True):
        np.testing.assert_allclose(ours[3], theirs[3], rtol=1e-7, atol=1e-10)
    assert abs(watches[0].seen[0][3] - watches[0].seen[1][3]).max() > 0


def test_what_a_callback_writes_into_theta_is_where_the_next_step_begins(cp, data):
    class Halve:
        def on_step(self, run):
            run.net.theta[...] = run.net.theta * 0.5

    nets = network("cupy"), network("numpy")
    for net in nets:
        trained(net, data, callbacks=[Halve()])
    np.testing.assert_allclose(theta(nets[0]), theta(nets[1]), rtol=1e-9, atol=1e-12)


def test_a_time_limit_ends_it_after_a_step(cp, data, monkeypatch):
    ticks = iter(range(10**6))
    monkeypatch.setattr("backprop_gpu.stopping.time.perf_counter", lambda: float(next(ticks)))
    nets = network("cupy"), network("numpy")
    histories = []
    for net in nets:
        ticks = iter(range(10**6))
        histories.append(trained(net, data, time_limit=5))
    assert histories[0].stopped == "time"
    assert 1 <= histories[0].steps[-1] < 13
    same(histories[0], histories[1], 1e-9)
    np.testing.assert_allclose(theta(nets[0]), theta(nets[1]), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("huge", [False, True], ids=["usual", "unusual"])
def test_ctrl_c_ends_it_between_two_graphs(cp, rng, tmp_path, huge, monkeypatch):
    """The network, and the file, are at a whole step: that of all the graphs launched before."""
    X, T = rng.random((N, 20)), rng.integers(0, 5, N)
    if huge:
        X[10] *= 1e7  # in the second step, of the first graph
    run, runs = Graph.run, []

    def interrupted(self, *args):
        taken = run(self, *args)
        runs.append(taken)
        if len(runs) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return taken

    monkeypatch.setattr(Graph, "run", interrupted)
    net, saved = network(), tmp_path / "net.safetensors"
    settings = {"batches": "in_order", "optimizer": bp.Adam(1e-3)}
    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            trained(net, (X, T), save=saved, **settings)
    finally:
        signal.signal(signal.SIGINT, before)
    monkeypatch.setattr(Graph, "run", run)
    assert runs[:2] == [4, 4]
    eight = network("numpy")

    class Stop:
        def on_step(self, run):
            if run.step == 8:
                raise InterruptedError

    with pytest.raises(InterruptedError):
        trained(eight, (X, T), callbacks=[Stop()], **settings)
    np.testing.assert_allclose(theta(net), eight.theta, rtol=1e-7, atol=1e-10)
    np.testing.assert_array_equal(bp.load(saved, backend="numpy").theta, theta(net))


def test_threads_train_side_by_side(cp, data):
    alone = network()
    trained(alone, data, epochs=3)
    nets, failed = [network() for _ in range(2)], []

    def work(net):
        try:
            trained(net, data, epochs=3)
        except BaseException as e:
            failed.append(e)

    threads = [threading.Thread(target=work, args=(net,)) for net in nets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    for net in nets:
        assert theta(net).tobytes() == theta(alone).tobytes()


def test_a_run_within_a_callback_leaves_the_outer_one_alone(cp, data):
    """Both use one thread's scratch memory and stream."""

    class Inner:
        def __call__(self, run):
            inner = network(layers=[20, 40, 5])
            trained(inner, data, epochs=1, batch_size=25, l2=0.1, optimizer="rmsprop")

        on_step = None

    nets = network(), network()
    trained(nets[0], data, epochs=3, l2=0.1)
    trained(nets[1], data, epochs=3, l2=0.1, callbacks=[lambda run: Inner()(run)])
    assert theta(nets[0]).tobytes() == theta(nets[1]).tobytes()


def test_evaluation_in_between_changes_nothing(cp, data, rng):
    X, T = data
    nets = network(), network(), network()
    plain = trained(nets[0], data)
    looked = trained(nets[1], data, validation=(rng.random((7, 20)), rng.integers(0, 5, 7)), gradient_norms=True)

    class Look:
        def on_step(self, run):
            bp.evaluate(run.net, X[:9], T[:9])
            run.net.predict(X[:3])

        def __call__(self, run):
            run.net.gradients(X[:3], T[:3])

    watched = trained(nets[2], data, callbacks=[Look()])
    assert theta(nets[0]).tobytes() == theta(nets[1]).tobytes() == theta(nets[2]).tobytes()
    assert plain.train_cost == looked.train_cost == watched.train_cost


def test_a_copy_of_the_network_trains_on(cp, data):
    net = network()
    trained(net, data)
    other = copy.deepcopy(net)
    for n in (net, other):
        trained(n, data)
    assert theta(net).tobytes() == theta(other).tobytes()


# ---- the ladder -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "kind"), [(None, Graph), ("", Graph), ("auto", Graph), ("graph", Graph), ("eager", Eager)]
)
def test_the_executor_that_the_environment_names(cp, data, seen, monkeypatch, wanted, kind):
    if wanted is not None:
        monkeypatch.setenv("BACKPROP_GPU_EXECUTOR", wanted)
    trained(network(), data, epochs=1)
    assert type(seen[-1]) is kind
    assert seen[-1].rung == kind.__name__.lower()


@pytest.mark.parametrize("backend", ["cupy", "numpy"])
@pytest.mark.parametrize("wanted", ["Graph", "cuda", "1"])
def test_a_name_that_no_executor_has(cp, data, monkeypatch, wanted, backend):
    monkeypatch.setenv("BACKPROP_GPU_EXECUTOR", wanted)
    with pytest.raises(
        bp.ConfigError, match=f"BACKPROP_GPU_EXECUTOR is '{wanted}'\nset it to graph, compiled, replay, eager or auto"
    ):
        trained(network(backend), data)


@pytest.mark.parametrize(("wanted", "fails"), [("graph", True), ("eager", False), ("auto", False)])
def test_numpy_has_no_graphs(data, seen, monkeypatch, wanted, fails):
    monkeypatch.setenv("BACKPROP_GPU_EXECUTOR", wanted)
    if fails:
        with pytest.raises(bp.ConfigError, match="BACKPROP_GPU_EXECUTOR is graph, and this runs on NumPy"):
            trained(network("numpy"), data)
    else:
        trained(network("numpy"), data)
        assert type(seen[-1]) is (Eager if wanted == "eager" else Replay)


OWN = {
    "hidden": bp.Activation.of("softsign", lambda xp, Z: Z / (1 + abs(Z)), lambda xp, Z: 1 / (1 + abs(Z)) ** 2),
    "cost": bp.Cost.of("squares", lambda xp, Y, T: ((Y - T) ** 2).sum(axis=1) / 2, lambda xp, Y, T: Y - T),
}


@pytest.mark.parametrize("what", OWN)
def test_functions_without_cuda_expressions_are_run_eagerly(cp, rng, seen, monkeypatch, what):
    data = rng.random((N, 20)), rng.random((N, 5))
    hidden, cost = OWN[what] if what == "hidden" else "relu", OWN[what] if what == "cost" else "squared_error"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trained(network(hidden=hidden, output="identity"), data, cost=cost, epochs=1)
    assert type(seen[-1]) is Eager
    monkeypatch.setenv("BACKPROP_GPU_EXECUTOR", "graph")
    with pytest.raises(bp.ConfigError, match=r"no graph of steps: the .* has no CUDA expressions"):
        trained(network(hidden=hidden, output="identity"), data, cost=cost, epochs=1)


def test_functions_with_cuda_expressions_are_in_the_graph(cp, rng, seen):
    softsign = bp.Activation.of(
        "softsign2", lambda xp, Z: Z / (1 + abs(Z)), lambda xp, Z: 1 / (1 + abs(Z)) ** 2,
        cuda=("z / (1 + fabs(z))", "1 / ((1 + fabs(z)) * (1 + fabs(z)))"),
    )  # fmt: skip
    data = rng.random((N, 20)), rng.integers(0, 5, N)
    nets = [network(b, [20, 13, 11, 5], hidden=softsign) for b in ("cupy", "numpy")]
    for net in nets:
        trained(net, data)
    assert type(seen[0]) is Graph
    np.testing.assert_allclose(theta(nets[0]), theta(nets[1]), rtol=1e-8, atol=1e-11)


def test_an_optimizer_without_a_kernel_is_told(cp, data):
    class Own(bp.SGD):
        pass

    with pytest.raises(bp.ConfigError, match="Own has no CUDA kernel"):
        trained(network(), data, optimizer=Own(0.1))
