"""Steps in which the products of wide layers are cuBLASLt's, on stand-ins of CuPy and of the library, beside NumPy."""

import contextlib
import functools
import gc
import json
import sys
from pathlib import Path

import fake_cublaslt
import fake_cupy
import numpy as np
import pytest

import backprop_gpu as bp
from backprop_gpu import BackendError, cublaslt, grids, plan, tiles
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
    {"layers": [20, 12, 16, 13, 5]},
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
    X, T = rng.integers(0, 256, (N, layers[0])).astype(np.uint8), rng.integers(0, K, N)
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
                done += run.run(done, of_epoch - done)
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


@pytest.mark.parametrize("late", ["kernels", None])
def test_whenever_the_work_is_done(fake, late):
    fake_cupy.Mode.late = late
    like_numpy(bp.Adam(1e-2), 1e-9, hidden="gelu", dropout=0.4)


@pytest.mark.parametrize("hidden", ["relu", "gelu"])
def test_every_access_of_the_kernels_is_sound(fake, hidden):
    fake_cupy.Mode.check, fake_cupy.Mode.seed = True, 5
    with graph(bp.SGD(0.1), hidden=hidden) as its:
        steps_of(its, its.rule, 3)


def test_a_last_batch_that_is_wide_too(fake, monkeypatch):
    monkeypatch.setattr(plan, "WIDE", dict.fromkeys(plan.WIDE, plan.Wide(8, 12)))
    full, tail = like_numpy(bp.AdamW(1e-2), 1e-9, hidden="gelu")
    assert full.products.keys() == tail.products.keys()
    assert full.workspace.size == tail.workspace.size


def test_sums_in_several_parts(fake, monkeypatch):
    monkeypatch.setattr(grids, "CHUNK", 7)
    full, _ = like_numpy(bp.SGD(0.1), 1e-11, hidden="gelu")
    assert sum(o.equation == "db[1], of 4 parts" for o in full.operations) == 1


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({}, {"forward 1": "RELU_BIAS", "forward 2": "RELU_BIAS", "hidden_delta 1": "DEFAULT",
              "weight_gradient 1": "DEFAULT", "weight_gradient 2": "BGRADB"}),
        ({"bias": False}, {"forward 1": "RELU", "forward 2": "RELU", "hidden_delta 1": "DEFAULT",
                           "weight_gradient 1": "DEFAULT", "weight_gradient 2": "DEFAULT"}),
        ({"frozen": 1}, {"forward 1": "DEFAULT", "forward 2": "RELU_BIAS", "weight_gradient 2": "BGRADB"}),
        ({"frozen": 2}, {"forward 1": "DEFAULT", "forward 2": "DEFAULT"}),
        ({"hidden": "tanh", "frozen": 2}, {"forward 1": "DEFAULT", "forward 2": "DEFAULT"}),
        ({"hidden": ["swish", "identity"], "frozen": 2}, {"forward 1": "BIAS", "forward 2": "BIAS"}),
        ({"layers": [20, 16, 80], "frozen": 1}, {"forward 1": "DEFAULT", "forward 2": "BIAS",
                                                 "weight_gradient 2": "BGRADB"}),
        ({"layers": [20, 16, 5]}, {"forward 1": "RELU_BIAS", "weight_gradient 1": "BGRADB"}),
        ({"layers": [20, 13, 16, 5]}, {}),
        ({"layers": [20, 13, 16, 5], "dropout": [0.5, 0]},
         {"forward 1": "RELU_BIAS", "forward 2": "RELU_BIAS", "hidden_delta 1": "DEFAULT",
          "weight_gradient 1": "DEFAULT", "weight_gradient 2": "BGRADB"}),
    ],
    ids=repr,
)  # fmt: skip
def test_what_the_library_is_asked_to_do(fake, settings, wanted):
    with graph(bp.SGD(0.1), **settings) as its:
        assert {f"{name} {l}": p.epilogue for (name, l), p in its.plan.products.items()} == wanted
        assert its.plan.notes == []
        assert [p for p in its.plan.operations if isinstance(p, plan.LibraryProduct)] == sorted(
            its.plan.products.values(), key=its.plan.operations.index
        )
        assert its._products.keys() == set(its.plan.products.values())


@pytest.mark.parametrize(
    "settings", [{}, {"hidden": "gelu", "bias": False}, {"layers": [20, 16, 80]}, {"frozen": 1}], ids=repr
)
@pytest.mark.parametrize("late", ["kernels", None])
def test_weight_gradients_on_a_branch(fake, monkeypatch, settings, late):
    """The same bits, each dW in a stream beside the steps' own, in a workspace of its own."""
    fake_cupy.Mode.late = late
    thetas, spaces = [], []
    for forked in (False, True):
        monkeypatch.setattr(Graph, "forked", forked)
        with graph(bp.Adam(1e-2), **settings) as its:
            fake.ran.clear()
            steps_of(its, its.rule)
            thetas.append(to_host(its.theta).tobytes())
            spaces.append({p.plan.workspace for p in its._products.values()})
            gradients = sum(name == "weight_gradient" for name, _ in its.plan.products)
            recorded = [stream for _, stream in fake.ran]
            aside = its._branch.ptr if forked else None
            assert recorded.count(aside) == (2 * gradients if forked else 0)  # warmed up, recorded
    assert thetas[0] == thetas[1]
    assert [len(of) for of in spaces] == [1, 2]


@pytest.mark.parametrize("lost", ["fork", "join"])
def test_a_branch_that_waits_for_too_little_is_seen(fake, monkeypatch, lost):
    """That the stand-in notices what the two events are for."""
    monkeypatch.setattr(Graph, "forked", True)
    fake_cupy.Mode.late = "kernels"
    wait_event = fake_cupy.Stream.wait_event
    with contextlib.closing(executor(Graph, "cupy", bp.SGD(0.1))) as its:
        stream_of = {"fork": lambda s: s == its._branch, "join": lambda s: s != its._branch}[lost]
        monkeypatch.setattr(
            fake_cupy.Stream, "wait_event", lambda s, event: None if stream_of(s) else wait_event(s, event)
        )
        with pytest.warns(UserWarning, match="no CUDA graph"):
            steps_of(its, its.rule)


def test_what_a_plan_tells(fake):
    with graph(bp.SGD(0.1), layers=[20, 16, 12, 5]) as its:
        told = its.plan.describe().splitlines()
        flop = {p.name: p.flop for p in its.plan.products.values() if p.layer == 1}
    assert flop == dict(zip(sorted(ALL_THREE), (2 * M * 20 * 16, 2 * M * 16 * 12, 2 * M * 20 * 16), strict=True))
    (line,) = (line for line in told if line.startswith("Z[2]"))
    assert line.startswith("Z[2] = W[2] A[1] + b[2], A[2] = relu(Z[2]) ")
    assert "cuBLASLt, float64 RELU_BIAS" in line
    equations = [
        "A[0] = the step's rows of the data / 255",
        "Z[1] = W[1] A[0] + b[1], A[1] = relu(Z[1])",
        "Z[2] = W[2] A[1] + b[2], A[2] = relu(Z[2])",
        "Z[3] = W[3] A[2] + b[3], C, Delta[3] = dC/dZ[3], Delta[2] = f' ⊙ (W[3]^T Delta[3])",
        "dW[2] = Delta[2] A[1]^T, db[2]",
        "W[2]^T Delta[2]",
        "Delta[1] = relu'(Z[1]) ⊙ that, db[1]",
        "dW[1] = Delta[1] A[0]^T",
        "dW[l], db[l] of l = 3",
        "then survey and update: the gradient is stored",
        f"{len(its.plan.operations)} nodes a step",
    ]
    assert all(line.startswith(wanted) for line, wanted in zip(told, equations, strict=True))


NOES = {  # (epilogue, m, n, k of the column-major product) -> what is told
    "relu": (lambda e, *mnk: e == 6, ["forward of layer 2 (RELU_BIAS), forward of layer 1 (RELU_BIAS)"]),
    "sums": (lambda e, *mnk: e == 512, ["weight_gradient of layer 2 (BGRADB)"]),
    "forward 1": (lambda e, *mnk: mnk == (16, M, 20), ["forward of layer 1 (RELU_BIAS), forward of layer 1 (DEFAULT)"]),
    "forward 2": (lambda e, *mnk: mnk == (12, M, 16), ["forward of layer 2 (RELU_BIAS), forward of layer 2 (DEFAULT)"]),
    "hidden_delta 1": (lambda e, *mnk: mnk == (16, M, 12), ["hidden_delta of layer 1 (DEFAULT)"]),
    "weight_gradient 1": (lambda e, *mnk: mnk == (20, 16, M), ["weight_gradient of layer 1 (DEFAULT)"]),
    "weight_gradient 2": (
        lambda e, *mnk: mnk == (16, 12, M),
        ["weight_gradient of layer 2 (BGRADB), weight_gradient of layer 2 (DEFAULT)"],
    ),
    "weight gradients": (
        lambda e, *mnk: mnk[2] == M,
        ["weight_gradient of layer 2 (BGRADB), weight_gradient of layer 2 (DEFAULT), "
         "weight_gradient of layer 1 (DEFAULT)"],
    ),
    "all": (
        lambda e, *mnk: True,
        ["forward of layer 2 (RELU_BIAS), forward of layer 2 (DEFAULT), hidden_delta of layer 1 (DEFAULT), "
         "weight_gradient of layer 2 (BGRADB), weight_gradient of layer 2 (DEFAULT), forward of layer 1 (RELU_BIAS), "
         "forward of layer 1 (DEFAULT), weight_gradient of layer 1 (BGRADB), weight_gradient of layer 1 (DEFAULT)"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("no", NOES)
def test_what_the_library_does_not_offer_is_a_kernels(fake, no):
    fake.unknown, told = NOES[no]
    full, _ = like_numpy(bp.SGD(0.1), 1e-11)
    # cuBLASLt names each product in its reason, so that none is told with another
    said = ", ".join(note.removeprefix("not cuBLASLt's: ").partition(": ")[0] for note in full.notes)
    assert [said] == told
    assert all("offers no algorithm for" in note and note in full.describe() for note in full.notes)
    assert no not in {f"{name} {l}" for name, l in full.products}
    assert full.rule == ("rule_sgd" if no == "all" else None)


def test_without_the_library_there_are_kernels(fake, monkeypatch):
    asked = []

    def load():
        asked.append(1)
        raise BackendError("no cuBLASLt library: none here", "install it")

    monkeypatch.setattr(cublaslt, "load", load)
    full, _ = like_numpy(bp.SGD(0.1), 1e-11)
    assert not full.products
    assert full.rule == "rule_sgd"
    assert len(asked) == 1
    (note,) = full.notes
    assert note.endswith("weight_gradient of layer 1 (DEFAULT): no cuBLASLt library: none here")


@pytest.mark.parametrize("nth", range(5))
def test_a_product_that_fails_is_a_kernels(fake, nth):
    fake.fail = {"cublasLtMatmul": (nth, 13)}
    full, _ = like_numpy(bp.SGD(0.1), 1e-11)
    (note,) = full.notes
    assert "cublasLtMatmul failed for" in note
    assert "CUBLAS_STATUS_EXECUTION_FAILED" in note
    assert fake.refusals == ["cublasLtMatmul: cublasLtMatmul was told to fail"]
    fake.refusals.clear()


@pytest.mark.parametrize("function", ["cublasLtCreate", "cublasLtMatmulDescCreate", "cublasLtMatmulAlgoGetHeuristic"])
def test_what_fails_when_it_is_made_is_a_kernels(fake, function):
    fake.fail = {function: (0, 14)}
    full, _ = like_numpy(bp.SGD(0.1), 1e-11)
    assert f"{function} failed" in full.notes[0]
    fake.refusals.clear()


def test_a_product_that_fails_while_it_is_recorded_makes_the_steps_eager(fake):
    rule = bp.SGD(0.1)
    mine = executor(Eager, "numpy", rule)
    wanted = steps_of(mine, rule)
    with contextlib.closing(executor(Graph, "cupy", rule)) as its:
        fake.fail = {"cublasLtMatmul": (len(its.plan.products) * 2 + 1, 13)}  # bound, warmed up, then recorded
        with pytest.warns(UserWarning, match="no CUDA graph.*cublasLtMatmul failed"):
            np.testing.assert_allclose(steps_of(its, rule), wanted, rtol=1e-10)
        np.testing.assert_allclose(to_host(its.theta), mine.theta, rtol=1e-11)
    fake.refusals.clear()


def test_the_graph_holds_the_products(fake):
    """After the recordings the library is not called any more, and all it was asked for is in them."""
    with graph(bp.SGD(0.1)) as its:
        bound = len(its.plan.products)
        assert fake.ran == [(0, 0)] * bound
        nodes = len(its.plan.operations) + 2  # survey and update
        with its.problem.net.backend.active():
            its.begin(np.arange(N), ENDS, [0.1] * 3, 1)
            its._graph(M, 1)
        assert fake_cupy.Counts.graph_nodes == nodes + 1  # advance
        assert len(fake.ran) == 3 * bound
        assert len({stream for _, stream in fake.ran[2 * bound :]} - {0}) == 1
        with its.problem.net.backend.active():
            its._graph(M, 16)
        assert fake_cupy.Counts.graph_nodes == 16 * nodes + 1
        ran = len(fake.ran)
        assert ran == 3 * bound + 16 * bound
        before = to_host(its.theta).copy()
        steps_of(its, its.rule, 4)
        assert len(fake.ran) == ran
        assert (to_host(its.theta) != before).any()


def test_the_handle_is_the_graphs_own_and_given_back(fake):
    Lent.made = 0
    its = executor(Graph, "cupy", bp.SGD(0.1))
    assert Lent.made == 1
    assert (fake.count("cublasLt"), fake.count("cublasLtMatmulDesc")) == (1, len(its.plan.products))
    its.close()
    assert not fake.live
    its.close()


def test_a_graph_that_cannot_be_planned_leaves_nothing(fake, monkeypatch):
    def tiles(self):
        raise plan.Unplanned("none")

    monkeypatch.setattr(plan.Plan, "_tiled", tiles)
    with pytest.raises(plan.Unplanned):
        executor(Graph, "cupy", bp.SGD(0.1))
    assert not fake.live


def test_a_narrow_network_asks_nothing(fake, monkeypatch):
    Lent.made = 0
    with graph(bp.SGD(0.1), layers=[20, 7, 5]) as its:
        assert Lent.made == 0
        assert its.plan.notes == []
        assert ("A", 0) not in its.plan.workspace.places
        assert ("sums", 0) not in its.plan.workspace.places


@pytest.mark.parametrize("precision", ["tf32", "float32", "bf16"])
def test_precisions(fake, monkeypatch, precision):
    monkeypatch.setattr(plan, "arithmetic_of", lambda *of: {"float32": "tf32x2"}.get(precision, precision))
    with graph(bp.SGD(0.1), precision="float32") as its:
        assert {p.precision for p in its.plan.products.values()} == {precision}
        steps_of(its, its.rule, 3)
        got = to_host(its.theta)
    mine = executor(Eager, "numpy", bp.SGD(0.1), precision="float32")
    steps_of(mine, mine.rule, 3)
    np.testing.assert_allclose(got, mine.theta, atol={"float32": 1e-6}.get(precision, 2e-2))


def planned(net, library, m=M, models=1, batch=M):
    shape = plan.Shape(m, batch, N, 3, models=models)
    device = tiles.Device("none", arch=90, processors=132, shared=232448, bandwidth=0, rate=0)
    return plan.Plan(net, choose_cost(None, net.output), shape, device, "ffma", "rule_sgd", library=library)


def test_plans_need_no_gpu(monkeypatch):
    monkeypatch.setattr(plan, "WIDE", {"float32": WIDE})
    net = bp.Network([20, 16, 12, 5], precision="float32")
    assert not planned(net, None).products
    assert not planned(net, lambda of, product: "no").products
    assert {name for name, _ in planned(net, lambda of, product: None).products} == ALL_THREE
    assert not planned(net, lambda of, product: None, models=2).products
    assert not planned(net, lambda of, product: None, m=15).products
    own, asked = planned(net, None, m=15), planned(net, lambda of, product: None, m=15)
    assert own.operations[1:] != asked.operations  # the workspaces differ
    assert [o.equation for o in own.operations] == [o.equation for o in asked.operations]
    assert len(planned(net, None).notes) == 0
    assert len(planned(net, lambda of, product: "no").notes) == 1


def test_walks_over_elements_have_their_blocks_side_by_side():
    """As `Walk` and `over` of common.cuh count them."""
    net = bp.Network([784, 512, 512, 10], "gelu", precision="float32")
    walks = [
        o
        for o in planned(net, lambda of, product: None, m=2048, batch=2048).operations
        if isinstance(o, plan.Operation) and o.kernel in ("step_gather", "bias_activate")
    ]
    sizes = [2048 * 784, 2048 * 512, 2048 * 512]
    assert [o.grid for o in walks] == [(grids.blocks(size, 4), 1, 1) for size in sizes]


def test_the_limits_as_they_are():
    """The layers and batches that count as wide."""
    for layers, m, wanted in (
        ([784, 512, 512, 10], 2048, {1, 2}),
        ([784, 511, 512, 10], 2048, set()),
        ([784, 512, 512, 10], 2047, set()),
        ([784, 1024, 1024, 10], 1024, {2}),
        ([784, 1024, 1024, 10], 1023, set()),
        ([500, 512, 512, 10], 2048, {2}),
        ([784, 512, 514, 10], 2048, {1}),
    ):
        net = bp.Network(layers, precision="float32")
        found = planned(net, lambda of, product: None, m, batch=2048).products
        assert {l for name, l in found if name == "forward"} == wanted, (layers, m)


@pytest.mark.parametrize("hidden", ["relu", "tanh"])
@pytest.mark.parametrize("lr", [1e3, 1e12, 1e38])
def test_a_run_diverges_where_numpys_does(fake, monkeypatch, hidden, lr):
    """Also in graphs: as if every learning rate were ordinary."""
    monkeypatch.setattr(plan, "MOST_LR", np.inf)
    monkeypatch.setattr("warnings.warn", None)
    rng = np.random.default_rng(2)
    X, T = rng.random((N, 20)), rng.random((N, 5))
    ends = []
    for backend in ("numpy", "cupy"):
        net = bp.Network([20, 16, 12, 5], hidden, output="identity", backend=backend, precision="float32")
        try:
            bp.train(net, X, T, optimizer=bp.SGD(lr), batch_size=M, epochs=3, seed=1)
            ends.append("all well")
        except bp.DivergenceError as e:
            ends.append(e.cause.partition(" (cost")[0])
    assert ends[0] == ends[1]
    assert fake.ran


def test_training_takes_this_way_and_cleans_up(fake, monkeypatch):
    monkeypatch.setenv("BACKPROP_GPU_EXECUTOR", "graph")
    rng = np.random.default_rng(2)
    X, T = rng.integers(0, 256, (N, 20)).astype(np.uint8), rng.integers(0, 5, N)
    thetas = []
    for backend in ("numpy", "cupy", "cupy"):
        monkeypatch.setenv("BACKPROP_GPU_EXECUTOR", "auto" if backend == "numpy" else "graph")
        net = bp.Network([20, 16, 12, 5], "gelu", backend=backend, precision="float64")
        bp.train(net, X, T, optimizer=bp.SGD(0.1), batch_size=M, epochs=3, seed=1)
        thetas.append(to_host(net.theta))
        assert bool(fake.ran) == (backend == "cupy")
        assert not fake.live
    np.testing.assert_allclose(thetas[1], thetas[0], rtol=1e-10, atol=1e-12)
    assert thetas[1].tobytes() == thetas[2].tobytes()


def test_algorithms_are_chosen_by_time_only_where_that_is_asked(fake, monkeypatch):
    cuda = sys.modules["cupy"].cuda
    taken = iter(np.tile([4.0] * 5 + [3.0] * 5 + [5.0] * 5, 5))  # of three candidates each, the best of five
    monkeypatch.setattr(cuda, "get_elapsed_time", lambda start, stop: next(taken), raising=False)
    with graph(bp.SGD(0.1)) as its:
        assert {p.chosen for p in its._products.values()} == {0}
    monkeypatch.setattr(Graph, "timed", 3)
    with graph(bp.SGD(0.1)) as its:
        assert {p.chosen for p in its._products.values()} == {1}
        steps_of(its, its.rule, 3)
    assert list(taken) == []


def test_the_benchmark_of_steps(fake, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parent.parent))
    from benchmarks import gpu_cublaslt

    monkeypatch.setattr(gpu_cublaslt, "A_GRAPH", 2)
    monkeypatch.setattr(cublaslt, "by_events", functools.partial(cublaslt.by_events, runs=1, best_of=1))
    monkeypatch.setattr(plan, "NARROW", 8)
    monkeypatch.setattr(sys.modules["cupy"].cuda, "get_elapsed_time", lambda start, stop: 1.0, raising=False)
    before, told = dict(plan.WIDE), []
    fine = gpu_cublaslt.steps(told.append, [((20, 16, 12, 5), M)])
    assert fine, json.dumps(told)
    json.dumps(told)
    assert before == plan.WIDE
    ways = ((False, 1, False), (True, 1, False), (True, 8, False), (True, 1, True))
    assert [(r["precision"], r["cublaslt"], r["timed"], r["forked"], bool(r["products"])) for r in told] == [
        (name, *way, way[0]) for name in ("float64", "float32", "tf32", "bf16") for way in ways
    ]
    assert (Graph.timed, Graph.forked) == (1, False)
    assert all(r["us"] == 500 and not r["notes"] and r["fell_back"] is None for r in told)
    errors = [r["error"] for r in told]
    assert errors[0] == 0
    assert max(errors[1:4]) < 1e-14
    assert max(errors[4:8]) < 1e-5
    assert 1e-5 < min(errors[8:12]) <= max(errors[8:12]) < 1e-2
    assert 1e-4 < min(errors[12:]) <= max(errors[12:]) < 5e-2
