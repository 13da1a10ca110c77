"""Data that stays on the host: the bits of a run whose data is on the device, and rows that are there in time."""

import contextlib
import gc
import weakref

import fake_cupy
import numpy as np
import pytest
from conftest import real_gpu
from test_wide import fake  # noqa: F401 - a fixture

import backprop_gpu as bp
from backprop_gpu import streaming
from backprop_gpu.backend import is_cupy, to_host
from backprop_gpu.executors import Eager, Graph
from backprop_gpu.inputs import Samples

N = 203
LIMIT = "BACKPROP_GPU_DATA_LIMIT"


@pytest.fixture(autouse=True)
def small_graphs_and_no_limit(monkeypatch):
    monkeypatch.setattr(Graph, "sizes", (4, 2, 1))
    monkeypatch.delenv(LIMIT, raising=False)


class Everything:
    """Copies and kernels alike, as what is late in the stand-in."""

    __hash__ = None

    def __ne__(self, other):
        return False

    def __eq__(self, other):
        return True

    def __repr__(self):
        return "everything"


@pytest.fixture(params=["copies", "kernels", Everything(), pytest.param("gpu", marks=pytest.mark.gpu)], ids=str)
def late(request):
    """Each way in which work is put off as long as it may be; and a GPU, which does as it likes."""
    if request.param == "gpu":
        real_gpu()
        yield "gpu"
    else:
        with fake_cupy.installed(late=request.param):
            yield request.param


@pytest.fixture
def cp():
    with fake_cupy.installed() as module:
        yield module


@pytest.fixture
def feeds(monkeypatch):
    """The feeds that were made."""
    made, init = [], streaming.Feed.__init__

    def told(self, *args):
        init(self, *args)
        made.append(self)

    monkeypatch.setattr(streaming.Feed, "__init__", told)
    return made


@pytest.fixture
def ends_of(monkeypatch):
    """theta, the slots and what was measured, as bytes, at the end of each epoch."""
    told, finish = [], Eager.finish

    def finished(self):
        finish(self)
        told.append([to_host(a).tobytes() for a in (self.theta, *self.slots, self.measured[: len(self.ends) - 1])])

    monkeypatch.setattr(Eager, "finish", finished)
    graph_finish = Graph.finish

    def graph_finished(self):
        graph_finish(self)
        told.append([to_host(a).tobytes() for a in (self.theta, *self.slots, self.measured[: len(self.ends) - 1])])

    monkeypatch.setattr(Graph, "finish", graph_finished)
    return told


def data(labels=True, as_bytes=True, n=N):
    rng = np.random.default_rng(0)
    X, T = rng.integers(0, 256, (n, 20)), rng.integers(0, 5, n)
    return X.astype(np.uint8) if as_bytes else (X - 128) / 99, T if labels else np.eye(5)[T]


def trained(settings, limit=None, monkeypatch=None, **more):
    """A run, with that limit of bytes on the device; its network and history."""
    settings = {"optimizer": bp.AdamW(1e-2), "epochs": 3, "batch_size": 16, **settings, **more}
    layers, weights = settings.pop("layers", [20, 13, 5]), settings.pop("weights", False)
    X, T = data(settings.pop("labels", True), settings.pop("uint8", True))
    if weights:
        settings["sample_weight"] = np.random.default_rng(1).random(N) + 0.5
    build = {k: settings.pop(k) for k in ("precision", "dropout", "hidden", "output") if k in settings}
    net = bp.Network(layers, backend="cupy", seed=2, **build)
    with monkeypatch.context() as m:
        if limit is not None:
            m.setenv(LIMIT, str(limit))
        return net, bp.train(net, X, T, **settings)


def same_bits(settings, limit, monkeypatch, ends_of):
    """Train with the data on the device, and with `limit`: everything is alike. The streamed run's history."""
    net, there = trained(settings, monkeypatch=monkeypatch)
    wanted, theta = list(ends_of), to_host(net.theta).tobytes()
    ends_of.clear()
    net, history = trained(settings, limit, monkeypatch)
    assert "streamed" not in there.executor
    assert history.executor == there.executor + ", data streamed"
    assert len(wanted) >= 3
    assert ends_of == wanted
    assert to_host(net.theta).tobytes() == theta
    for name in ("train_cost", "train_accuracy", "validation_cost", "validation_accuracy", "gradient_norms"):
        assert getattr(history, name) == getattr(there, name)
    assert history.gradient_error == there.gradient_error
    return history


SETTINGS = [
    {},
    {"precision": "float64"},
    {"uint8": False},
    {"labels": False, "weights": True},
    {"uint8": False, "labels": False, "weights": True, "precision": "float64", "dropout": 0.3},
    {"dropout": 0.4},
    {"weights": True, "reduction": "sum"},
    {"batches": "chunks", "batch_size": 24},
    {"batches": "in_order"},
    {"batch_size": 7},
    {"batch_size": "full"},
    {"l2": 0.01, "clip_norm": 0.5},
    {"layers": [20, 5]},
    {"layers": [20, 9, 8, 5], "frozen": 1},
    {"optimizer": bp.SGD(0.1, momentum=0.9), "validation": 0.2, "gradient_norms": True, "gradient_error": True},
    {"weights": True, "validation": 0.2, "gradient_norms": True, "gradient_error": True},
]


@pytest.mark.parametrize("how", ["graph", "eager"])
@pytest.mark.parametrize("settings", SETTINGS, ids=repr)
def test_the_bits_are_those_of_data_on_the_device(late, settings, how, monkeypatch, ends_of, feeds):
    monkeypatch.setenv("BACKPROP_GPU_EXECUTOR", how)
    same_bits(settings, 2500, monkeypatch, ends_of)
    assert feeds
    assert (len(feeds[0]._bounds) > 2) is (settings.get("batch_size") != "full")


@pytest.mark.parametrize("limit", [0, 1, 1000, 2000, 3000, 5000])
@pytest.mark.parametrize("settings", [{}, {"batches": "chunks", "batch_size": 24}], ids=repr)
def test_chunks_of_every_size(cp, settings, limit, monkeypatch, ends_of):
    same_bits(settings, limit, monkeypatch, ends_of)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["bytes", "reals"])
@pytest.mark.parametrize("limit", ["2MB", "20MB", "40MB"])
def test_much_data_on_a_gpu(kind, limit, monkeypatch):
    """Chunks of many steps, whose copies take as long as the steps do."""
    real_gpu()
    monkeypatch.setattr(Graph, "sizes", (64, 16, 1))
    rng = np.random.default_rng(0)
    X, T = rng.integers(0, 256, (60_000, 784)).astype(np.uint8), rng.integers(0, 10, 60_000)
    X = X if kind == "bytes" else (X / 255).astype(np.float32)
    weights, bits = rng.random(60_000) + 0.5, []
    for streamed in (False, True):
        with monkeypatch.context() as m:
            if streamed:
                m.setenv(LIMIT, limit)
            net = bp.Network([784, 100, 10], backend="cupy", dropout=0.2, seed=2)
            history = bp.train(net, X, T, epochs=3, sample_weight=weights, validation=0.1)
        assert history.executor == "graph" + ", data streamed" * streamed
        bits.append((to_host(net.theta).tobytes(), history.train_cost, history.validation_cost))
        print(kind, limit, history.executor, history.seconds)
    assert bits[0] == bits[1]


@pytest.mark.parametrize("more", [{}, {"uint8": False, "weights": True, "dropout": 0.3}], ids=repr)
@pytest.mark.parametrize("batches", ["shuffled", "chunks"])
def test_products_of_cublaslt(fake, batches, more, monkeypatch, ends_of):  # noqa: F811
    """The step's rows are gathered for them first."""
    settings = {"layers": [20, 16, 12, 5], "batch_size": 24, "batches": batches, "epochs": 3, **more}
    history = same_bits(settings, 2500, monkeypatch, ends_of)
    assert "cuBLASLt" in history.plan


@pytest.mark.parametrize("more", [{}, {"uint8": False, "labels": False, "weights": True}], ids=repr)
def test_no_kernel_reads_past_the_rows(more, monkeypatch, ends_of):
    """With every access of the kernels looked at."""
    with fake_cupy.installed(check=True):
        same_bits({"batch_size": 40, **more}, 3000, monkeypatch, ends_of)


class Each:
    """A callback that has every step waited for."""

    def on_step(self, run):
        pass


@pytest.mark.parametrize("more", [{"callbacks": [Each()]}, {"time_limit": 1e9}], ids=["each step", "time limit"])
def test_steps_one_by_one(late, more, monkeypatch, ends_of):
    same_bits(more, 2500, monkeypatch, ends_of)


@pytest.mark.parametrize("where", [3, 70, 150, 202])
def test_steps_with_unusual_numbers_are_taken_with_care(late, where, monkeypatch, ends_of):
    """Large but finite: each such step is put off to the end of the epoch, and chunks are streamed again."""
    X, T = data(as_bytes=False)
    X[where] *= 1e5
    X[(where + 90) % N] *= 1e5
    taken, step = [], Eager.step

    def told(self, i, *rest):
        taken.append(i)
        return step(self, i, *rest)

    monkeypatch.setattr(Eager, "step", told)
    results = []
    for limit in (None, 9000):
        with monkeypatch.context() as m:
            if limit:
                m.setenv(LIMIT, str(limit))
            net = bp.Network([20, 13, 5], backend="cupy", seed=2)
            history = bp.train(net, X, T, optimizer=bp.SGD(1e-9), epochs=2, batch_size=16)
        results.append((list(ends_of), list(taken), history.train_cost, to_host(net.theta).tobytes()))
        assert taken
        ends_of.clear()
        taken.clear()
    assert results[0] == results[1]


def test_a_run_that_diverges_does_so_in_the_same_step(cp, monkeypatch):
    X, T = data(as_bytes=False)
    told = []
    for limit in (None, "9000"):
        with monkeypatch.context() as m:
            if limit:
                m.setenv(LIMIT, limit)
            net = bp.Network([20, 13, 5], hidden="identity", output="identity", backend="cupy", seed=2)
            with pytest.raises(bp.DivergenceError) as e:
                bp.train(net, X, np.eye(5)[T], "squared_error", bp.SGD(40.0), epochs=9, batch_size=16)
        told.append((e.value.epoch, e.value.step, to_host(net.theta).tobytes()))
    assert told[0] == told[1]


def test_where_no_graph_can_be_recorded_steps_are_eager_and_data_is_streamed(cp, monkeypatch, ends_of):
    def fails(self, *args):
        raise RuntimeError("no")

    monkeypatch.setattr(Graph, "_advance", fails)
    with pytest.warns(UserWarning, match="no CUDA graph"):
        history = same_bits({}, 2500, monkeypatch, ends_of)
    assert history.executor == "eager: RuntimeError: no, data streamed"


# ---- memory and time ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["graph", "eager"])
@pytest.mark.parametrize("settings", [{}, {"weights": True, "dropout": 0.3, "labels": False}], ids=repr)
def test_after_the_first_epoch_its_steps_allocate_nothing(cp, settings, how, monkeypatch):
    monkeypatch.setenv("BACKPROP_GPU_EXECUTOR", how)
    kind = {"graph": Graph, "eager": Eager}[how]
    counts, begin, finish = [], kind.begin, kind.finish
    pinned, allocate = [], cp.cuda.alloc_pinned_memory
    monkeypatch.setattr(cp.cuda, "alloc_pinned_memory", lambda n: pinned.append(n) or allocate(n))

    def beginning(self, *args):
        begin(self, *args)
        counts.append([fake_cupy.Counts.allocations, len(pinned)])

    def finishing(self):
        finish(self)
        counts[-1] += [fake_cupy.Counts.allocations, len(pinned)]

    monkeypatch.setattr(kind, "begin", beginning)
    monkeypatch.setattr(kind, "finish", finishing)
    trained(settings, 2500, monkeypatch)
    assert len(counts) == 3
    for before, pinned_before, after, pinned_after in counts[1:]:
        assert (before, pinned_before) == (after, pinned_after)
    assert len(pinned) == 2 * (2 + settings.get("weights", False))


def test_after_training_its_memory_is_free_at_once(cp, monkeypatch, feeds):
    """Without the garbage collector, as that of graphs."""
    gc.disable()
    try:
        trained({}, 2500, monkeypatch)
        feed = weakref.ref(feeds.pop())
        assert feed() is None
    finally:
        gc.enable()


def test_the_data_on_the_device_is_within_the_limit(cp, monkeypatch, feeds):
    trained({"weights": True}, 3000, monkeypatch)
    (feed,) = feeds
    assert feed.samples.nbytes <= 3000
    assert feed.rows % 16 == 0
    assert all(is_cupy(a) for a in (feed.samples.X, feed.samples.T, feed.samples.weights))


def test_a_chunk_is_a_multiple_of_a_graph(cp, monkeypatch, feeds):
    trained({"batch_size": 8, "epochs": 1}, 3500, monkeypatch)  # 28 bytes a row: 7 steps would fit
    assert feeds[0].rows == 4 * 8
    trained({"batch_size": 1, "epochs": 1}, 5600, monkeypatch)  # 100 would
    assert feeds[1].rows == 64


def test_the_host_permutes_while_the_device_trains(cp, monkeypatch):
    """The next chunk is seen to after the current one's steps have been launched, and before it is waited for."""
    order, fill, launch = [], streaming.Feed._fill, fake_cupy.Graph.launch

    def filled(self, chunk):
        if chunk not in self._held:
            order.append(chunk)
        fill(self, chunk)

    monkeypatch.setattr(streaming.Feed, "_fill", filled)
    monkeypatch.setattr(fake_cupy.Graph, "launch", lambda self: order.append("launch") or launch(self))
    trained({"batch_size": 8, "epochs": 1}, 3500, monkeypatch)  # 26 steps, 4 a chunk
    assert order[:12] == [0, "launch", 1, "launch", 2, "launch", 3, "launch", 4, "launch", 5, "launch"]
    order.clear()
    trained({"batch_size": 8, "epochs": 1, "callbacks": [Each()]}, 3500, monkeypatch)
    assert order[:4] == [0, "launch", 1, "launch"]


def broken(monkeypatch, ends_of, late, **settings):
    """Whether a streamed run differs from one with its data on the device."""
    with fake_cupy.installed(late=late):
        trained(settings, monkeypatch=monkeypatch, precision="float64")
        wanted = list(ends_of)
        ends_of.clear()
        with contextlib.suppress(bp.DivergenceError):
            trained(settings, 2500, monkeypatch, precision="float64")
        differs = ends_of != wanted
        ends_of.clear()
        return differs


class NoEvent:
    """An event for which nobody waits."""

    _line = _capture = None

    def record(self, stream=None):
        pass

    def synchronize(self):
        pass


def without(monkeypatch, what):
    """Rob every feed of an event, or of one of its uses."""
    init = streaming.Feed.__init__

    def robbed(self, *args):
        init(self, *args)
        if what == "used":
            self._used = [NoEvent() for _ in self._used]
        elif what == "pinned":
            for event in self._landed:
                event.synchronize = lambda: None
        else:
            wait, events = fake_cupy.Stream.wait_event, self._landed
            monkeypatch.setattr(fake_cupy.Stream, "wait_event", lambda s, e: None if e in events else wait(s, e))

    monkeypatch.setattr(streaming.Feed, "__init__", robbed)


@pytest.mark.parametrize(("what", "late"), [("landed", "copies"), ("used", "kernels"), ("pinned", Everything())])
def test_an_event_that_is_missing_is_seen(what, late, monkeypatch, ends_of):
    assert not broken(monkeypatch, ends_of, late)
    without(monkeypatch, what)
    assert broken(monkeypatch, ends_of, late)


def test_memory_is_let_go_of_only_when_the_copies_have_landed(cp, monkeypatch, feeds):
    class Stop:
        def on_step(self, run):
            if run.step == 5:
                raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        trained({"callbacks": [Stop()]}, 2500, monkeypatch)
    line = feeds[0]._stream._line
    assert line.finished == line.issued > 2


# ---- whether ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("", None), ("  ", None), ("0", 0), ("1234", 1234), ("500MB", 500_000_000), ("500 mb", 500_000_000),
     ("1.5GB", 1_500_000_000), ("2GiB", 2 << 30), ("64KiB", 65536), ("7b", 7), (".5kB", 500),
     ("123456789012345678901", 123456789012345678901)],
)  # fmt: skip
def test_limits(text, wanted, monkeypatch):
    monkeypatch.setenv(LIMIT, text)
    assert streaming.data_limit() == wanted


@pytest.mark.parametrize("text", ["-1", "much", "5 bananas", "MB", "1e9", "nan", "0x10", "5..MB", "٣MB", "1,5GB"])
def test_a_limit_that_is_none_is_told(text, monkeypatch, cp):
    with pytest.raises(bp.ConfigError, match="BACKPROP_GPU_DATA_LIMIT is ") as e:
        trained({}, text, monkeypatch)
    assert "500MB" in e.value.cure
    assert "\n" not in e.value.cause + e.value.cure


def test_numpy_knows_no_limit(monkeypatch):
    monkeypatch.setenv(LIMIT, "0")
    net = bp.Network([20, 5], backend="numpy")
    assert "streamed" not in bp.train(net, *data(), epochs=1).executor


def test_without_a_limit_memory_is_measured(cp, monkeypatch):
    """60 % of what is free beside what the run needs."""
    X, T = data()
    need = streaming._needed(bp.Network([20, 13, 5], backend="cupy"), bp.AdamW(1e-2), 16)
    size = X.nbytes + T.astype(np.int64).nbytes
    for free, streams in ((need + size / 0.6 - 2, True), (need + size / 0.6 + 2, False), (0, True), (1 << 40, False)):
        monkeypatch.setattr(cp.cuda.runtime, "memGetInfo", lambda free=free: (int(free), 80 << 30))
        told = pytest.warns(UserWarning, match=r"the data, [\d,]+ bytes, does not fit .*: it is streamed from the host")
        with told if streams else contextlib.nullcontext():
            _, history = trained({"epochs": 1}, monkeypatch=monkeypatch)
        assert history.executor == "graph" + ", data streamed" * streams
        _, history = trained({"epochs": 1}, size, monkeypatch)  # a limit counts instead
        assert history.executor == "graph"


def test_what_cupy_keeps_counts_as_free(cp, monkeypatch):
    monkeypatch.setattr(cp.cuda.runtime, "memGetInfo", lambda: (0, 80 << 30))
    pool = type("Pool", (), {"free_bytes": lambda self: 1 << 40, "get_limit": lambda self: 0})
    monkeypatch.setattr(cp, "get_default_memory_pool", pool)
    assert trained({"epochs": 1}, monkeypatch=monkeypatch)[1].executor == "graph"


def test_validation_data_counts_and_stays_on_the_host_as_well(cp, monkeypatch):
    X, T = data()
    size = X.nbytes + T.astype(np.int64).nbytes
    moved = []
    on = Samples.on
    monkeypatch.setattr(Samples, "on", lambda self, asarray: moved.append(on(self, asarray)) or moved[-1])
    for validation, streams in ((None, False), ((X, T), True)):
        _, history = trained({"epochs": 1, "validation": validation}, size, monkeypatch)
        assert ("streamed" in history.executor) is streams
    there, *here = moved
    assert is_cupy(there.X)
    assert len(here) == 2
    assert not any(is_cupy(a) for s in here for a in (s.X, s.T))


def test_data_that_is_on_the_device_stays_there(cp, monkeypatch):
    X, T = data()
    monkeypatch.setenv(LIMIT, "0")
    net = bp.Network([20, 13, 5], backend="cupy")
    assert bp.train(net, cp.asarray(X), T, epochs=1).executor == "graph"


def test_targets_on_the_device_may_go_with_data_on_the_host(cp, monkeypatch):
    X, T = data()
    monkeypatch.setenv(LIMIT, "0")
    net = bp.Network([20, 13, 5], backend="cupy")
    assert bp.train(net, X, cp.asarray(T), epochs=1).executor == "graph, data streamed"


def test_the_largest_number():
    for X in ([[1.0, -3.0]], [[2.5]], [[-1.0, 0.5]]):
        assert streaming.greatest(np.array(X)) == np.abs(X).max()
