"""Steps ready to be timed, their floor, and the command `bench`: that they are what they say. No times are judged."""

import dataclasses
import json
import sys

import fake_cupy
import numpy as np
import pytest
from test_cli import last_json, run
from test_datasets import write_idx_directory

import backprop_gpu as bp
from backprop_gpu import bench, blas, cli, floors, stepping
from backprop_gpu.batches import epoch_plan
from backprop_gpu.executors import Eager
from backprop_gpu.network import PRECISIONS

LAYERS, M, N = [12, 7, 5], 8, 44  # five whole batches and one of 4 an epoch


@pytest.fixture
def data(rng):
    return rng.integers(0, 256, (N, LAYERS[0])).astype(np.uint8), rng.integers(0, LAYERS[-1], N)


def network(backend="numpy", layers=LAYERS, **more):
    return bp.Network(layers, backend=backend, **more)


def losses_of(ready, steps, at_once):
    """Of each step, read where no step is lost to the next `begin`."""
    found = []
    for k in [at_once] * (steps // at_once):
        ready.run(k)
        found += ready.losses[-k:].tolist()
    return found


# ---- the steps ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 4, 6, 64])
@pytest.mark.parametrize("rule", ["sgd", "adam"])
def test_steps_are_those_of_training(backend, data, rule, steps):
    nets = [network(backend.name), network(backend.name)]
    history = bp.train(nets[0], *data, optimizer=rule, epochs=3, batch_size=M, seed=3)
    with bench.Stepping(nets[1], *data, rule, M, seed=3, steps=steps) as ready:
        losses = np.array(losses_of(ready, 18, 1)).reshape(3, 6)
    weights = np.diff(epoch_plan("shuffled", N, M, 3, 1)[1]) / N
    np.testing.assert_allclose(losses @ weights, history.train_cost, rtol=1e-6)
    for net in nets:
        assert net.theta.dtype == np.float32
    np.testing.assert_array_equal(*(np.asarray(net.to("numpy").theta) for net in nets))


def test_many_steps_at_once_are_the_same(backend, data):
    results = []
    for at_once in (1, 2, 5):
        net = network(backend.name)
        with bench.Stepping(net, *data, "adam", M, steps=10) as ready:
            results.append((losses_of(ready, 10, at_once), np.asarray(net.to("numpy").theta)))
    for losses, theta in results[1:]:
        np.testing.assert_allclose(losses, results[0][0], rtol=1e-6)
        np.testing.assert_allclose(theta, results[0][1], rtol=1e-5, atol=1e-7)


def test_an_order_of_ones_own(backend, data, rng):
    X, T = data
    order = [rng.permutation(N)[:size] for size in (M, M, 3)]
    net, plain = network(backend.name, precision="float64"), network(precision="float64")
    with bench.Stepping(net, X, T, bp.SGD(0.1), M, order=order) as ready:
        losses = losses_of(ready, 7, 1)
        assert len(ready.losses) == 1
    for i, loss in enumerate(losses):
        rows = order[i % 3]
        found = plain.gradients(X[rows], T[rows])
        assert loss == pytest.approx(found["cost"], rel=1e-9)
        for l in (1, 2):
            plain.W[l][...] -= 0.1 * found["W"][l]
            plain.b[l][...] -= 0.1 * found["b"][l]


def test_losses_are_those_since_the_last_begin(data):
    with bench.Stepping(network(), *data, "sgd", M, steps=4) as ready:
        assert ready.losses.tolist() == []
        ready.run(4)
        assert len(ready.losses) == 4
        ready.run(3)
        assert len(ready.losses) == 3
        assert ready.losses.dtype == np.float64


def test_an_epoch_has_no_more_rows_than_twice_the_samples(data):
    with bench.Stepping(network(), *data, "sgd", M, steps=1000) as ready:
        assert ready.steps == 2 * N // M
    with bench.Stepping(network(), *data, "sgd", 1000, steps=1000) as ready:
        assert (ready.batch_size, ready.steps) == (N, 2)


@pytest.mark.parametrize(
    ("order", "cause"),
    [
        ([], "holds no steps"),
        ([[0, 1], [2, N]], "step 2 has"),
        ([[-1]], "step 1 has"),
        ([[]], "step 1 has"),
        ([[[0, 1]]], "step 1 has"),
        ([list(range(M + 1))], "step 1 has"),
        ([list(range(M))] * 12, "more than 88 rows"),
    ],
)
def test_orders_that_make_no_sense(data, order, cause):
    with pytest.raises(bp.ConfigError, match=cause):
        bench.Stepping(network(), *data, "sgd", M, order=order)


def test_bad_data_and_settings_are_refused_as_by_train(data):
    X, T = data
    for error, arguments in (
        (bp.DataError, (X[:, 1:], T, "sgd", M)),
        (bp.DataError, (X, T + 1, "sgd", M)),
        (bp.ConfigError, (X, T, "sgd", 0)),
        (bp.ConfigError, (X, T, "none", M)),
        (bp.ConfigError, (X, T, "sgd", M, "no cost")),
        (bp.ConfigError, (X, T, "sgd", M, None, -1)),
        (bp.ConfigError, (X, T, "sgd", M, None, 0, 0)),
    ):
        with pytest.raises(error):
            bench.Stepping(network(), *arguments)


def test_a_run_that_diverges_says_so(backend, data):
    X, T = data
    net = network(backend.name, output="identity")
    with (
        bench.Stepping(net, X.astype(np.float32), T, bp.SGD(1e30), M, steps=4) as ready,
        pytest.raises(bp.DivergenceError) as told,
    ):
        ready.run(12)
    assert 1 < told.value.step <= 4
    assert told.value.epoch == 1
    assert np.isfinite(np.asarray(net.to("numpy").theta)).all()


def test_the_executor_can_be_named(data):
    with fake_cupy.installed():
        for executor, told in ((Eager, "eager"), (stepping.choose, "graph")):
            with bench.Stepping(network("cupy"), *data, "adam", M, executor=executor) as ready:
                ready.run(3)
                ready.wait()
                assert ready.executor.told == told


# ---- the clock ------------------------------------------------------------------------------------------------------


def test_programs_are_run_in_turn():
    runs = []
    programs = {
        name: bench.Program(lambda name=name: runs.append(name), lambda: runs.append("wait"), 2) for name in "ab"
    }
    times = bench.timed(programs, seconds=0.0, least=0.0)
    turns = [name for name in runs if name != "wait"][4:]  # what comes before tells how often
    assert turns == ["a", "b"] * stepping.REPETITIONS
    assert runs[-6:] == ["wait", "a", "wait", "wait", "b", "wait"]
    assert [len(times[name].seconds) for name in "ab"] == [stepping.REPETITIONS] * 2


def test_median_and_spread():
    times = bench.Times((1.0, 4.0, 2.0))
    assert (times.median, times.spread) == (2.0, 1.5)


# ---- the floor ------------------------------------------------------------------------------------------------------


def test_the_products_of_a_step():
    products = [product for product, _ in floors.products_of([784, 100, 10], 128)]
    assert {product.equation: product.shape for product in products} == {
        "W[1] A[0]": (128, 784, 100),
        "W[2] A[1]": (128, 100, 10),
        "Delta[2] A[1]^T": (10, 128, 100),
        "W[2]^T Delta[2]": (128, 10, 100),
        "Delta[1] A[0]^T": (100, 128, 784),
    }
    assert sum(product.flop for product in products) == 2 * 128 * (2 * 784 * 100 + 3 * 100 * 10)
    assert products[0].elements == 128 * 784 + 784 * 100 + 128 * 100


class Watched:
    """An array module whose products are kept: shapes, and whether they are right."""

    def __init__(self, xp, made):
        self._xp, self._made = xp, made

    def __getattr__(self, name):
        return getattr(self._xp, name)

    def matmul(self, a, b, out):
        assert out.flags.c_contiguous
        assert a.flags.c_contiguous or a.flags.f_contiguous
        assert b.flags.c_contiguous or b.flags.f_contiguous
        got = self._xp.matmul(a, b, out=out)
        np.testing.assert_allclose(out, np.array(a) @ np.array(b), rtol=1e-4, atol=1e-4)
        self._made.append((*a.shape, b.shape[1]))
        return got


@pytest.mark.parametrize("layers", [[6, 3], [12, 7, 5], [9, 4, 4, 2]])
@pytest.mark.parametrize("rule", ["sgd", "adam"])
def test_a_run_makes_every_product_once(monkeypatch, layers, rule):
    made = []
    net = network(layers=layers)
    net.backend = dataclasses.replace(net.backend, xp=Watched(np, made))
    threads = blas.threads.now()
    with bench.Floor(net, M, rule) as floor:
        made.clear()
        floor.run()
        shapes = [p.shape if p.layout[2] == "C" else p.shape[::-1] for p in floor.products]
        assert made == shapes
        assert all(p.layout in floors.LAYOUTS and p.seconds > 0 for p in floor.products)
    wanted = [product for product, _ in floors.products_of(layers, M)]
    assert [(p.equation, p.shape) for p in floor.products] == [(p.equation, p.shape) for p in wanted]
    assert blas.threads.now() == threads


def test_the_floor_tries_all_threads_where_steps_have_threads_of_their_own(monkeypatch):
    routines, seen = blas.routines(), set()
    if routines is None:
        pytest.skip("NumPy does not come with OpenBLAS here")

    class Counted(Watched):
        def matmul(self, a, b, out):
            seen.add(routines.get_num_threads())
            return super().matmul(a, b, out)

    monkeypatch.setattr(floors, "_thread_counts", lambda: [1, 2])
    net, before = network(), blas.threads.now()
    net.backend = dataclasses.replace(net.backend, xp=Counted(np, []), fast=True)
    with bench.Floor(net, M, "sgd"):
        assert seen == {1, 2}
    assert blas.threads.now() == before


@pytest.mark.parametrize(("rule", "vectors"), [("sgd", 3), ("momentum", 5), ("adam", 7)])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_state_moves_what_the_update_moves(monkeypatch, rule, vectors, threads):
    net = network(layers=[33, 17, 5], precision="float64")
    copied = []
    monkeypatch.setattr(floors, "_thread_counts", lambda: [threads])
    with bench.Floor(net, M, rule) as floor:
        assert floor.state_bytes == vectors * net.theta.nbytes
        assert floor.state_threads == threads
        copy = np.copyto
        monkeypatch.setattr(np, "copyto", lambda to, of: copied.append((to, of)) or copy(to, of))
        floor.run_state()
    moved = sum(to.nbytes + of.nbytes for to, of in copied)
    assert len(copied) == 2 * threads
    assert abs(moved - floor.state_bytes) <= 4 * net.dtype.itemsize  # halves of an odd number
    assert not any(np.shares_memory(to, of) for to, of in copied)


def test_the_floor_in_figures():
    net = network()
    found = bench.floor(net, M, "adam", seconds=0.0)
    assert found.seconds == found.products_seconds + found.memory_seconds > 0
    assert found.copy_bandwidth == pytest.approx(7 * net.theta.nbytes / found.memory_seconds)
    assert [p.gflops for p in found.products] == [pytest.approx(p.flop / p.seconds / 1e9) for p in found.products]


def test_the_state_of_a_gpu_is_a_graph():
    with fake_cupy.installed():
        net = network("cupy")
        with bench.Floor(net, M, "adam") as floor:
            assert {p.threads for p in floor.products} == {None}
            assert isinstance(floor._state.run.__self__, fake_cupy.Graph)
            floor.run()
            floor.wait()


def test_the_floor_of_a_gpu_that_records_nothing():
    with fake_cupy.installed():
        fake_cupy.Mode.fail_capture = "end"
        with bench.Floor(network("cupy"), M, "adam") as floor:
            assert not hasattr(floor._state.run, "__self__")
            floor.run()
            floor.wait()


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_no_floor_for_reduced_precision(precision):
    net = network()
    net.precision = precision
    with pytest.raises(bp.ConfigError, match=precision):
        bench.Floor(net, M, "sgd")
    assert precision in PRECISIONS


# ---- the report -----------------------------------------------------------------------------------------------------


def test_a_report(data, monkeypatch):
    monkeypatch.setenv("BACKPROP_GPU_EXECUTOR", "eager")
    net = network()
    found = bench.bench(net, *data, "adam", M, seconds=0.01)
    assert (found.layers, found.batch_size, found.executor) == (LAYERS, M, "eager")
    assert found.flop == 2 * M * (2 * 12 * 7 + 3 * 7 * 5)
    elements = sum(p.elements for p, _ in floors.products_of(LAYERS, M))
    assert found.bytes == 7 * net.theta.nbytes + 4 * elements
    assert found.samples_per_second == M / found.step.median
    assert found.floor_share > found.products_share > 0
    assert found.workspace_bytes > 3 * net.theta.nbytes  # the gradient and two slots
    assert found.device_allocations is None
    text, values = str(found), found.as_dict()
    assert "samples/s" in text
    assert "Delta[2] A[1]^T" in text
    assert values["floor_us"] == pytest.approx(values["floor_products_us"] + values["floor_memory_us"])
    assert len(values["floor_products"]) == 5


def test_what_a_step_allocates_is_seen(data, monkeypatch):
    from backprop_gpu import numpy_ops

    monkeypatch.setenv("BACKPROP_GPU_EXECUTOR", "eager")  # which calls the operations by their names
    plain, kept = numpy_ops.weight_gradient, bench.bench(network(), *data, "adam", M, seconds=0.01).allocated_bytes

    def with_memory(Delta, A_below, dW):
        plain(Delta, A_below, dW)
        np.empty(1 << 20, np.uint8)

    monkeypatch.setattr(numpy_ops, "weight_gradient", with_memory)
    found = bench.bench(network(), *data, "adam", M, seconds=0.01)
    assert found.allocated_bytes >= 1 << 20 > kept


def test_a_report_of_a_gpu(data, monkeypatch):
    with fake_cupy.installed():
        import cupy

        class Pool:
            used = 0

            def free_bytes(self):
                return 0

            def get_limit(self):
                return 0

            def used_bytes(self):
                Pool.used += 1 << 16
                return Pool.used

            def malloc(self, size):
                return None

        monkeypatch.setattr(cupy, "get_default_memory_pool", Pool)
        found = bench.bench(network("cupy"), *data, "adam", M, seconds=0.01)
    assert (found.backend, found.executor, found.device_allocations) == ("cupy", "graph", 0)
    assert found.workspace_bytes == (1 << 16) - data[0].nbytes - data[1].nbytes
    assert "cupy" in found.versions
    assert "allocations on the device" in str(found)


def test_a_profile_has_all_operations_of_a_step(data):
    net = network()
    be = net.backend
    found = bench.profile(net, *data, "adam", M, seconds=0.01)
    assert net.backend is be
    assert {part.operation for part in found.parts} == {
        "gather", "affine_activate", "affine", "output_delta", "weight_gradient", "hidden_delta", "measure", "update",
    }  # fmt: skip
    calls = {}
    for part in found.parts:
        calls[part.operation] = calls.get(part.operation, 0) + part.calls
    assert calls == {name: pytest.approx(2 if name in ("gather", "weight_gradient") else 1) for name in calls}
    assert ("weight_gradient", (7, 12)) in {(part.operation, part.shape) for part in found.parts}
    shares = [part.share for part in found.parts]
    assert sorted(shares, reverse=True) == shares
    assert 0 < sum(shares) < 1
    assert found.between == pytest.approx(1 - sum(shares))
    assert "weight_gradient" in str(found)


def test_profiled_steps_are_the_same_steps(data):
    nets = network(), network()
    found = bench.profile(nets[0], *data, "adam", M, seconds=0.0)
    with bench.Stepping(nets[1], *data, "adam", M) as ready:
        ready.run(bench.FEW + found.steps)
    np.testing.assert_array_equal(nets[0].theta, nets[1].theta)


def test_resident_memory():
    now, most = bench.resident()
    if sys.platform == "linux":
        assert most >= now > 10 << 20


# ---- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    return write_idx_directory(tmp_path)


KEYS = {
    "layers", "batch_size", "optimizer", "cost", "precision", "backend", "device", "executor", "threads", "versions",
    "flop", "bytes", "workspace_bytes", "allocated_bytes", "device_allocations", "peak_rss", "step_us", "step_spread",
    "step_times_us", "samples_per_second", "gflops", "products_share", "floor_share", "floor_us", "floor_products_us",
    "floor_memory_us", "floor_products", "seed", "parameters", "six_parameters_bytes", "data_bytes",
    "peak_rss_above_imports",
}  # fmt: skip


def test_the_command(folder):
    flags = "--layers 4,6,3 --activation tanh --optimizer momentum --batch-size 2 --seconds 0.01 --seed 5 --json"
    result = last_json(
        run("bench", "--data", folder, *flags.split(), "--profile", env={"BACKPROP_GPU_EXECUTOR": "eager"})
    )
    assert set(result) == KEYS | {"profile"}
    assert (result["layers"], result["batch_size"], result["seed"], result["executor"]) == ([4, 6, 3], 2, 5, "eager")
    assert result["parameters"] == 4 * 6 + 6 + 6 * 3 + 3
    assert result["six_parameters_bytes"] == 24 * result["parameters"]
    sets = bp.datasets.load(folder)
    assert result["data_bytes"] == sum(one.images.nbytes + one.labels.nbytes for one in sets)
    assert result["optimizer"].startswith("SGD(lr=0.1, momentum=0.9")
    assert {part["operation"] for part in result["profile"]["parts"]} > {"gather", "update"}
    if sys.platform == "linux":
        assert result["peak_rss_above_imports"] > 0


def test_startup_is_told_where_it_is_asked_for(folder, monkeypatch, capsys):
    monkeypatch.setattr(bench, "startup", lambda: bench.Startup(0.1, 0.25, 0.3, 0.5))
    flags = ["--data", str(folder), "--seconds", "0.01", "--startup"]
    assert cli._run(["bench", *flags]) == 0
    assert (
        "150 ms beyond the 100 ms of Python with NumPy, 200 ms with all that a training uses; --help in 500 ms"
        in capsys.readouterr().out
    )
    assert cli._run(["bench", *flags, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["startup"]
    assert told == {
        "import_numpy": 0.1, "import_over_numpy": pytest.approx(0.15), "use_over_numpy": pytest.approx(0.2), "help": 0.5
    }  # fmt: skip


def test_startup_in_processes():
    found = bench.startup(repetitions=1)
    assert min(found.numpy, found.package, found.use, found.help) > 0


def test_the_command_for_people(folder):
    done = run("bench", "--data", folder, "--batch-size", "full", "--seconds", "0.01")
    lines = done.stdout.splitlines()
    assert lines[0].startswith("network    4/512/3, float32, batches of 6")
    assert lines[-1].startswith("memory     ")
    with pytest.raises(json.JSONDecodeError):
        json.loads(lines[-1])
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("flags", "code", "cause"),
    [
        ("--seconds 0", 2, "seconds"),
        ("--batch-size 0", 2, "batch_size"),
        ("--precision tf32", 2, "tf32"),
        ("--optimizer adm", 2, "adm"),
        ("--layers 5,3", 1, "5"),
        ("--epochs 3", 2, "--epochs"),
    ],
)
def test_what_the_command_refuses(folder, capsys, flags, code, cause):
    assert cli._run(["bench", "--data", str(folder), *flags.split()]) == code
    told = capsys.readouterr()
    lines = told.err.splitlines()
    assert [line.partition(": ")[2].partition(":")[0] for line in lines] == ["error", "try"]
    assert cause in lines[0]
    assert told.out == ""
