"""Training on the CuPy backend beside NumPy, step by step, eagerly and by graphs; what a step leaves on the device."""

import contextlib

import fake_cupy
import numpy as np
import pytest
from conftest import real_gpu

import backprop_gpu as bp
from backprop_gpu.activations import HIDDEN, OUTPUT
from backprop_gpu.backend import is_cupy, to_host
from backprop_gpu.costs import COSTS, choose_cost
from backprop_gpu.executors import Eager, Graph, Problem
from backprop_gpu.inputs import Samples
from backprop_gpu.optimizers import OPTIMIZERS, choose_optimizer
from backprop_gpu.regularization import Regularization

PAIRS = [(c.name, g) for c in COSTS.values() for g in OUTPUT if c.outputs is None or g in c.outputs]
EXECUTORS = [pytest.param(Eager, id="eager"), pytest.param(Graph, id="graph")]
SETTINGS = [
    {},
    {"layers": [20, 5]},
    {"layers": [20, 33, 31, 12, 5], "hidden": ["gelu", "tanh", "swish"]},
    {"layers": [20, 64, 5], "dropout": 0.4},
    {"layers": [20, bp.Layer(9, "identity", dropout=0.5), bp.Layer(8, "elu", bias=False), 5]},
    {"bias": False},
    {"weights": True},
    {"weights": True, "reduction": "sum"},
    {"l1": 0.01, "l2": 0.1, "clip_norm": 0.5, "clip_value": 0.05},
    {"smoothing": 0.1},
    {"smoothing": 0.1, "labels": False},
    {"uint8": False, "frozen": 1, "layers": [20, 7, 6, 5]},
    {"layers": [20, 6, 1], "output": "sigmoid", "labels": False},
    {"layers": [20, 6, 1], "output": "identity", "labels": False},
]


@pytest.fixture(params=["fake cupy", pytest.param("cupy", marks=pytest.mark.gpu)])
def device(request):
    """The name under which a CuPy backend is to be had: on the stand-in, and on a GPU."""
    if request.param == "cupy":
        real_gpu()
        yield "cupy"
    else:
        with fake_cupy.installed():
            yield "cupy"


def executor(how, backend, rule, precision="float64", layers=(20, 13, 5), m=24, **more):
    """An executor over 60 samples, the same on every backend."""
    rng = np.random.default_rng(0)
    K = layers[-1] if isinstance(layers[-1], int) else layers[-1].width
    X = rng.integers(0, 256, (60, 20)).astype(np.uint8)
    T = rng.integers(0, K, 60)
    net = bp.Network(
        list(layers), more.pop("hidden", "relu"), output=more.pop("output", "softmax"), precision=precision,
        backend=backend, dropout=more.pop("dropout", 0.0), bias=more.pop("bias", True), seed=3,
    )  # fmt: skip
    if not more.pop("uint8", True):
        X = (X / 99).astype(net.dtype)
    labels = more.pop("labels", True)
    if not labels:
        T = (np.eye(K, dtype=net.dtype)[T] + (T[:, None] > 2)) % 2 if K == 1 else np.eye(K, dtype=net.dtype)[T]
    weights = rng.random(60).astype(net.dtype) + 0.5 if more.pop("weights", False) else None
    cost = choose_cost(more.pop("cost", None), net.output).smoothed(more.pop("smoothing", 0.0))
    samples = Samples(X, T, weights, "labels" if labels else net.task)
    with net.backend.active():
        problem = Problem(
            net, cost, samples.on(net.backend.asarray), more.pop("reduction", "mean"),
            frozen=more.pop("frozen", 0), regularization=Regularization(**more),
        )  # fmt: skip
        return how(problem, rule, m, seed=7, steps=-(-60 // m))


def ten_steps(
    how, device, rule, together, rtol, ends=(0, 24, 48, 60), shuffled=True, factors=(1, 0.5, 0.1), **settings
):
    """Ten steps on both backends, in epochs of these batches; with `together`, each begins where NumPy's is.

    A graph that updates in the kernel that makes the gradient stores none: then the rest is compared.
    """
    largest = max(np.diff(ends))
    its, mine = (executor(*which, rule, m=largest, **settings) for which in ((how, device), (Eager, "numpy")))
    be, ends, steps = its.problem.net.backend, list(ends), len(ends) - 1
    has_gradient = how is Eager or bool(its.problem.regularization)
    order = np.random.default_rng(1).permutation(60) if shuffled else np.arange(60)
    lrs = [factor * rule.lr for factor in factors[:steps]]
    atol = rtol if rtol < 1e-9 else 10 * rtol
    with be.active(), contextlib.closing(its):
        for step in range(10):
            i = step % steps
            if i == 0:
                for run in (its, mine):
                    run.begin(order, ends, lrs, step + 1)
            if together:
                for d, h in zip((its.theta, *its.slots), (mine.theta, *mine.slots), strict=True):
                    d[...] = be.asarray(h)
            assert mine.run(i, 1) == its.run(i, 1) == 1
            its.finish()
            measured = to_host(its.measured)[i], mine.measured[i]
            np.testing.assert_allclose(measured[0][0], measured[1][0], rtol=10 * rtol)
            assert measured[0][1] == measured[1][1]
            pairs = [(its.g, mine.g)] * has_gradient
            for d, h in zip((its.theta, *its.slots), (mine.theta, *mine.slots), strict=True):
                pairs.append((d, h))
            for d, h in pairs:
                np.testing.assert_allclose(to_host(d), h, rtol=rtol, atol=atol)
            if i == steps - 1:
                its.finish()
        assert int(its.diverged[0]) == 0
        if how is Graph:
            assert its.failed is None
            assert "batch" not in vars(its)  # no step was taken eagerly
    return its


@pytest.mark.parametrize("how", EXECUTORS)
@pytest.mark.parametrize("rule", [bp.SGD(0.5), bp.AdamW(1e-2, weight_decay=0.1)], ids=["sgd", "adamw"])
@pytest.mark.parametrize("settings", SETTINGS, ids=repr)
def test_ten_steps_of_every_kind_of_network(device, settings, rule, how):
    ten_steps(how, device, rule, together=True, rtol=1e-11, **settings)


@pytest.mark.parametrize("how", EXECUTORS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_ten_steps_of_every_optimizer(device, name, how):
    ten_steps(how, device, choose_optimizer(name), together=True, rtol=1e-9)


@pytest.mark.parametrize("how", EXECUTORS)
@pytest.mark.parametrize(
    "rule",
    [bp.SGD(0.1, momentum=0.9, nesterov=True, weight_decay=0.1), bp.RMSProp(1e-3, momentum=0.9, centered=True),
     bp.RMSProp(1e-3, momentum=0.9), bp.Adam(1e-3, amsgrad=True, weight_decay=0.1)],
    ids=repr,
)  # fmt: skip
def test_ten_steps_of_optimizers_with_more_slots(device, rule, how):
    ten_steps(how, device, rule, together=True, rtol=1e-9)


@pytest.mark.parametrize("how", EXECUTORS)
@pytest.mark.parametrize(("cost", "g"), PAIRS)
def test_ten_steps_of_every_cost(device, cost, g, how):
    ten_steps(how, device, bp.SGD(0.1), together=True, rtol=1e-10, cost=cost, output=g)


@pytest.mark.parametrize("how", EXECUTORS)
@pytest.mark.parametrize(
    "batches",
    [{"ends": (0, 24, 36, 60)}, {"ends": (0, 12, 36, 60)}, {"ends": (0, 60)}, {"shuffled": False},
     {"ends": (0, 1, 31, 60)}, {"ends": (0, 25, 50, 60)}, {"ends": tuple(range(61)), "factors": (1,) * 60}],
    ids=repr,
)  # fmt: skip
@pytest.mark.parametrize("more", [{}, {"weights": True, "dropout": 0.3, "l2": 0.1}], ids=repr)
def test_ten_steps_on_batches_of_every_kind(device, batches, more, how):
    """A smaller batch in the middle, first or last, one of all samples, of one sample each; the order of the data."""
    ten_steps(how, device, bp.Adam(1e-2), together=True, rtol=1e-9, **batches, **more)


@pytest.mark.parametrize("how", EXECUTORS)
@pytest.mark.parametrize("settings", SETTINGS, ids=repr)
@pytest.mark.parametrize(("precision", "rtol"), [("float64", 1e-11), ("float32", 3e-5)])
def test_the_whole_way_of_plain_sgd(device, settings, precision, rtol, how):
    """Nothing is set back: after ten steps of their own, theta and every gradient on the way are the same."""
    ten_steps(how, device, bp.SGD(0.1), together=False, rtol=rtol, precision=precision, **settings)


def test_everything_of_a_step_stays_on_the_device(device):
    its = ten_steps(Eager, device, bp.Adam(1e-3), together=True, rtol=1e-9, dropout=0.5)
    b, g = its.batch, its.gradient
    arrays = [*b.Z, *b.A, *b.F, *b.Delta, *b.mask, b.C, *g.W, *g.b, its.theta, *its.slots, its.rows, its.order]
    there = [a for a in arrays if a is not None]
    assert len(there) > 15
    assert all(is_cupy(a) for a in there)


@pytest.mark.parametrize(
    "settings",
    [*({"optimizer": name} for name in OPTIMIZERS), *({"hidden": f} for f in HIDDEN),
     *({"cost": c, "output": g} for c, g in PAIRS),
     {"dropout": 0.5}, {"sample_weight": True}, {"class_weight": "balanced"}, {"label_smoothing": 0.1},
     {"l1": 0.1, "l2": 0.1, "clip_norm": 1.0, "clip_value": 0.1}, {"precision": "float64"}, {"rows": True}],
    ids=repr,
)  # fmt: skip
def test_after_the_first_step_nothing_is_allocated_and_nothing_crosses_the_bus(settings, rng, monkeypatch):
    """Of a run that is eager; test_graph.py says it of graphs."""
    monkeypatch.setenv("BACKPROP_GPU_EXECUTOR", "eager")
    settings = dict(settings)
    X, T = rng.integers(0, 256, (103, 20)).astype(np.uint8), rng.integers(0, 5, 103)
    if settings.pop("rows", False):
        T = np.eye(5)[T]
    if settings.pop("sample_weight", False):
        settings["sample_weight"] = rng.random(103)
    build = {k: settings.pop(k) for k in ("hidden", "output", "dropout", "precision") if k in settings}
    counts = []

    class Watch:
        each_step = False  # else the host asks after each whether it was taken

        def on_step(self, run):
            of = fake_cupy.Counts
            counts.append((of.allocations, of.to_host, of.to_device))

        def __call__(self, run):
            counts.append(None)

    with fake_cupy.installed():
        net = bp.Network([20, 13, 5], backend="cupy", **build)
        bp.train(net, X, T, epochs=2, batch_size=25, callbacks=[Watch()], **settings)
    first, second = counts[:5], counts[6:11]
    assert counts[5] is None
    assert first == first[:1] * 5
    assert second == second[:1] * 5


def test_the_counts_see_what_they_should():
    with fake_cupy.installed() as cp:
        of = fake_cupy.Counts
        before = of.allocations, of.to_host, of.to_device
        a = cp.asarray(np.ones(3))
        cp.add(a, a, out=a)
        a.reshape(3, 1)[:2]
        assert (of.allocations, of.to_host, of.to_device) == (before[0] + 1, before[1], before[2] + 1)
        a.sum()
        a.get()
        assert (of.allocations, of.to_host) == (before[0] + 2, before[1] + 1)


@pytest.mark.parametrize("how", ["eager", "graph"])
def test_the_same_seed_gives_the_same_bits(device, rng, how, monkeypatch):
    monkeypatch.setenv("BACKPROP_GPU_EXECUTOR", how)
    X, T = rng.integers(0, 256, (103, 20)).astype(np.uint8), rng.integers(0, 5, 103)
    thetas = []
    for _ in range(2):
        net = bp.Network([20, 13, 5], backend=device, dropout=0.3)
        bp.train(net, X, T, epochs=2, batch_size=25, clip_norm=0.5)
        thetas.append(to_host(net.theta).tobytes())
    assert thetas[0] == thetas[1]


def test_a_run_that_diverges_in_its_first_step_leaves_the_cost_of_the_network(device, rng):
    net = bp.Network([20, 5], output="identity", backend=device)
    with pytest.raises(bp.DivergenceError, match="step 1"):
        bp.train(net, 1e30 * rng.random((9, 20)), rng.random((9, 5)), cost="mae", optimizer=bp.SGD(1e30), batch_size=9)
    assert net.cost == "squared_error"


def test_an_optimizer_without_a_kernel_is_told(device, rng):
    class Own(bp.SGD):
        pass

    net = bp.Network([20, 5], backend=device)
    with pytest.raises(bp.ConfigError, match="Own has no CUDA kernel"):
        bp.train(net, rng.random((9, 20)), rng.integers(0, 5, 9), optimizer=Own(0.1), batch_size=9)
