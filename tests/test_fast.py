"""numba's operations against NumPy's, whole trainings with them, and what surrounds them: threads, forks, choice."""

import itertools
import os
import re
import subprocess
import sys
import threading
from dataclasses import dataclass

import numpy as np
import pytest
from test_recording import WEIGHTS, K, network, same
from test_recording import M as TAPED

import backprop_gpu as bp
from backprop_gpu import SGD, AdaDelta, AdaGrad, Adam, AdamW, Lion, NAdam, RMSProp, blas, numpy_ops
from backprop_gpu import backend as backends
from backprop_gpu.activations import HIDDEN, OUTPUT
from backprop_gpu.costs import COSTS

pytest.importorskip("numba", reason="numba is not installed")
if not blas.routines():
    pytest.skip("NumPy does not come with OpenBLAS here", allow_module_level=True)

import numba

from backprop_gpu import fast_kernels, fast_ops

M, N = (1, 2, 7, 33, 129), (1, 3, 10, 100, 513)
SIZES = [(m, n, N[(3 * i + j) % 5]) for i, m in enumerate(M) for j, n in enumerate(N)]
DTYPES = [np.float32, np.float64]
SOFTMAX, CROSS_ENTROPY = OUTPUT["softmax"], COSTS["cross_entropy"]
RULES = [
    SGD(0.1),
    SGD(0.1, weight_decay=0.3),
    SGD(0.1, momentum=0.9, weight_decay=0.3),
    SGD(0.1, momentum=0.9, nesterov=True, weight_decay=0.3),
    AdaGrad(0.1, lr_decay=0.5, weight_decay=0.3),
    RMSProp(0.01, weight_decay=0.3),
    RMSProp(0.01, centered=True),
    RMSProp(0.01, momentum=0.9),
    RMSProp(0.01, momentum=0.9, centered=True, weight_decay=0.3),
    AdaDelta(weight_decay=0.3),
    Adam(0.1),
    Adam(0.1, betas=(0.5, 0.8), weight_decay=0.3),
    Adam(0.1, betas=(0.5, 0.8), weight_decay=0.3, amsgrad=True),
    AdamW(0.1, weight_decay=0.3),
    AdamW(0.1, weight_decay=0.3, betas=(0.5, 0.8), amsgrad=True),
    NAdam(0.1, weight_decay=0.3),
    Lion(0.1),
    Lion(0.1, weight_decay=0.3),
]


@dataclass(frozen=True)
class Own(SGD):
    """A rule that kernels do not know, although it looks like one that they do."""

    def apply(self, xp, theta, g, slots, c, s):
        theta -= c[0] * xp.sign(g)


@pytest.fixture(autouse=True)
def _fast(monkeypatch):
    monkeypatch.setenv("BACKPROP_GPU_FAST", "1")


@pytest.fixture(params=[1, 3])
def parts(request, monkeypatch):
    """Into how many parts all work is cut."""
    in_parts(monkeypatch, request.param)
    return request.param


def in_parts(monkeypatch, count):
    for name in ("PRODUCT", "PASS", "EXPONENTIALS"):
        monkeypatch.setattr(fast_ops, name, 1)
    monkeypatch.setattr(fast_ops, "threads", lambda: count)


@pytest.fixture(params=DTYPES, ids=["float32", "float64"])
def dtype(request):
    return request.param


# -------------------------------------------------------------------------------------------------------- operations


def agree(call, dtype, *shapes, size=1.0):
    """`call(ops, *out)` writes the same with either instruction set, NaN where NumPy does; the same bits each time.

    `size`: of the numbers on the way, whose rounding may be seen in smaller results.
    """
    wanted, *got = ([np.full(shape, np.nan, dtype) for shape in shapes] for _ in range(4))
    with np.errstate(all="ignore"):
        call(numpy_ops, *wanted)
        for out in got:
            call(fast_ops, *out)
    for w, first, *others in zip(wanted, *got, strict=True):
        for other in others:
            assert other.tobytes() == first.tobytes()
        finite = abs(w[np.isfinite(w)])
        near = 64 * np.finfo(dtype).eps
        np.testing.assert_allclose(first, w, rtol=near, atol=near * max(size, finite.max(initial=0)))
    return got[0]


def drawn(rng, dtype, *shape):
    return rng.normal(size=shape).astype(dtype)


@pytest.mark.parametrize("kind", ["bytes", "bytes that are only read", "bytes, a slice", "floats", "labels"])
def test_gather(parts, rng, dtype, kind):
    for (m, n, _), dt in itertools.product(SIZES, (dtype,)):
        data = rng.integers(0, 256, (200, n)).astype(np.uint8)
        rows = slice(3, 3 + m) if "slice" in kind else rng.integers(0, 200, m)
        data.flags.writeable = "read" not in kind
        if kind == "floats":
            data = drawn(rng, dt, 200, n)
        if kind == "labels":
            data, dt = rng.integers(0, 10, 200), np.int64
        out, wanted = (np.full((m, *data.shape[1:]), 99, dt) for _ in range(2))
        fast_ops.gather(data, rows, out)
        numpy_ops.gather(data, rows, wanted)
        np.testing.assert_array_equal(out, wanted)


@pytest.mark.parametrize(("dtype", "bias"), [(np.float32, True), (np.float64, True), (np.float64, False)])
def test_affine(parts, rng, dtype, bias):
    for m, n, k in SIZES:
        W, X, b = drawn(rng, dtype, n, k), drawn(rng, dtype, m, k), drawn(rng, dtype, n) if bias else None
        agree(lambda ops, Z: ops.affine(W, X, b, Z), dtype, (m, n))  # noqa: B023 - called at once


@pytest.mark.parametrize("f", HIDDEN.values(), ids=lambda f: f.name)
@pytest.mark.parametrize("bias", [True, False])
def test_affine_activate(parts, rng, f, bias):
    dtype = np.float64
    for m, n, k in SIZES:
        W, X, b = drawn(rng, dtype, n, k), drawn(rng, dtype, m, k), drawn(rng, dtype, n) if bias else None
        X[m // 2] = 0  # a kink, without a bias

        def both(ops, Z, A):
            ops.affine_activate(W, X, b, f, Z, A)  # noqa: B023

        def one(ops, A):
            ops.affine_activate(W, X, b, f, A, A)  # noqa: B023

        size = 1 + abs(X @ W.T).max()
        _, A = agree(both, dtype, (m, n), (m, n), size=size)
        np.testing.assert_array_equal(agree(one, dtype, (m, n), size=size)[0], A)


@pytest.mark.parametrize("f", HIDDEN.values(), ids=lambda f: f.name)
@pytest.mark.parametrize(("masked", "biased"), [(False, True), (True, True), (False, False)])
def test_hidden_delta(parts, rng, f, masked, biased):
    for m, n, k in SIZES:
        hold_hidden_delta(rng, np.float64, m, n, k, f, masked, biased)


@pytest.mark.parametrize("name", ["relu", "leaky_relu", "tanh"])
def test_hidden_delta_in_float32(parts, rng, name):
    for m, n, k in SIZES:
        hold_hidden_delta(rng, np.float32, m, n, k, HIDDEN[name], False, True)


def hold_hidden_delta(rng, dtype, m, n, k, f, masked, biased):
    W, Delta, Z = drawn(rng, dtype, k, n), drawn(rng, dtype, m, k), 2 * drawn(rng, dtype, m, n)
    Z[m // 2] = 0
    A, mask = np.empty_like(Z), rng.choice([0.0, 1.25], (m, n)).astype(dtype) if masked else None
    numpy_ops.activate(None, f, Z.copy(), A)
    Z, A = (Z, np.full_like(A, np.nan)) if f.derivative_from == "Z" else (np.full_like(Z, np.nan), A)
    agree(
        lambda ops, out, db=None: ops.hidden_delta(W, Delta, f, Z, A, mask, out, db),
        dtype, (m, n), *([(n,)] if biased else []),
    )  # fmt: skip


def test_weight_gradient(parts, rng, dtype):
    for m, n, k in SIZES:
        Delta, A = drawn(rng, dtype, m, n), drawn(rng, dtype, m, k)
        agree(lambda ops, dW: ops.weight_gradient(Delta, A, dW), dtype, (n, k))  # noqa: B023


@pytest.mark.parametrize(("weighted", "biased"), [(False, True), (True, True), (False, False)])
def test_output_delta_of_labels(parts, rng, weighted, biased):
    for m, n, _ in SIZES:
        hold_output_delta(rng, np.float64, m, n, weighted, biased)
        hold_output_delta(rng, np.float64, m, n, weighted, biased, scale=300)


def test_output_delta_of_labels_in_float32(parts, rng):
    for m, n, _ in SIZES:
        hold_output_delta(rng, np.float32, m, n, False, True)
        hold_output_delta(rng, np.float32, m, n, False, True, scale=300)


def hold_output_delta(rng, dtype, m, n, weighted, biased, scale=1):
    Z, T = scale * drawn(rng, dtype, m, n), rng.integers(0, n, m)
    w = rng.random(m).astype(dtype) if weighted else 0.25
    agree(
        lambda ops, Delta, C, db=None: ops.output_delta(CROSS_ENTROPY, SOFTMAX, Z, T, w, Delta, C, db),
        dtype, (m, n), (m,), *([(n,)] if biased else []),
    )  # fmt: skip


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("cost", [CROSS_ENTROPY, COSTS["squared_error"], COSTS["mae"]], ids=lambda c: c.name)
def test_output_delta_of_what_no_kernel_makes(parts, rng, cost, smoothing):
    if cost is CROSS_ENTROPY:
        cost = cost.smoothed(smoothing)
    T = rng.dirichlet(np.ones(10), 33)
    for targets in (T, T.argmax(axis=1)):
        Z = drawn(rng, np.float64, 33, 10)
        agree(
            lambda ops, *out: ops.output_delta(cost, SOFTMAX, Z, targets, 0.5, *out),  # noqa: B023
            np.float64, (33, 10), (33,), (10,),
        )  # fmt: skip


def test_exp(dtype):
    """Of numbers that are not above 0, as the softmax takes it."""
    exponentiate = fast_kernels._exponentiate

    @numba.njit(error_model="numpy")
    def run(d):
        exponentiate(d)

    x = np.concatenate([[0.0], -np.geomspace(1e-6, 86, 10_001), [-200.0, -np.inf, np.nan]]).astype(dtype)
    got = x.copy()
    run(got)
    np.testing.assert_allclose(got[:-3], np.exp(x[:-3].astype(np.float64)), rtol=2 * np.finfo(dtype).eps)
    assert (got[-3:-1] < 2e-38).all()
    assert np.isnan(got[-1])


@pytest.mark.parametrize("weighted", [False, True])
def test_measure(parts, rng, dtype, weighted):
    w = None
    for m, n, _ in SIZES:
        Z, C = drawn(rng, dtype, m, n).round(1), abs(drawn(rng, dtype, m))  # rounded: with ties
        T = rng.integers(0, n, m)
        if weighted:
            w = rng.random(m).astype(dtype)
        Z[m // 3, n // 2 :] = np.nan  # the first of them is the label
        T[m // 3] = n // 2
        agree(lambda ops, out: ops.measure("labels", SOFTMAX, Z, T, C, w, out), np.float64, 2)  # noqa: B023


@pytest.mark.parametrize(("task", "g"), [("labels", "gelu"), ("multilabel", "sigmoid"), ("regression", "identity")])
def test_measure_of_what_no_kernel_counts(rng, task, g):
    Z, C, T = drawn(rng, np.float64, 33, 10), abs(drawn(rng, np.float64, 33)), rng.integers(0, 2, (33, 10)) * 1.0
    agree(lambda ops, out: ops.measure(task, OUTPUT[g], Z, T, C, None, out), np.float64, 2)


BAD = [np.nan, np.inf, -np.inf]


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("f", HIDDEN.values(), ids=lambda f: f.name)
def test_what_is_not_finite_goes_where_it_goes_in_numpy(parts, rng, f, bad):
    m, n, k = 7, 10, 3
    for into in ("W", "X", "b"):
        of = {"W": drawn(rng, np.float64, n, k), "X": drawn(rng, np.float64, m, k), "b": drawn(rng, np.float64, n)}
        of[into][-1] = bad
        agree(
            lambda ops, Z, A: ops.affine_activate(of["W"], of["X"], of["b"], f, Z, A),  # noqa: B023
            np.float64, (m, n), (m, n),
        )  # fmt: skip
    for into in ("W", "Delta", "A", "mask"):
        of = {"W": drawn(rng, np.float64, k, n), "Delta": drawn(rng, np.float64, m, k)}
        of |= {"A": abs(drawn(rng, np.float64, m, n)), "mask": np.ones((m, n))}
        of["A"][:, ::2] = 0
        of[into][-1] = bad
        agree(
            lambda ops, out, db: ops.hidden_delta(of["W"], of["Delta"], f, of["A"], of["A"], of["mask"], out, db),  # noqa: B023
            np.float64, (m, n), (n,),
        )  # fmt: skip


@pytest.mark.parametrize("bad", BAD)
def test_what_is_not_finite_in_the_outputs(parts, rng, bad):
    for rows, columns in ((3, 0), (3, 5), (slice(3, 5), -1), (3, slice(None)), (slice(None), slice(2, 4))):
        Z, T = drawn(rng, np.float64, 7, 10), rng.integers(0, 10, 7)
        Z[rows, columns] = bad
        agree(
            lambda ops, *out: ops.output_delta(CROSS_ENTROPY, SOFTMAX, Z, T, 0.5, *out),  # noqa: B023
            np.float64, (7, 10), (7,), (10,),
        )  # fmt: skip
        C = Z[:, 0].copy()
        agree(lambda ops, out: ops.measure("labels", SOFTMAX, Z, T, C, None, out), np.float64, 2)  # noqa: B023


# -------------------------------------------------------------------------------------------------------------- rules


def stepped(ops, rule, theta, slots, gradients, lr, cost=1.0):
    """Vectors after these steps, and what was latched."""
    theta, *slots = (v.copy() for v in (theta, *slots))
    diverged, rows = np.zeros(1, np.int64), ops.step_rows(rule, [lr] * len(gradients), 1)
    with np.errstate(all="ignore"):
        for i, g in enumerate(gradients):
            ops.update(rule, theta, g, tuple(slots), rows[i], np.array([cost, 0.0]), diverged)
    return [theta, *slots], int(diverged[0])


@pytest.mark.parametrize("rule", [*RULES, Own(0.1)], ids=repr)
def test_update(parts, rng, rule):
    dtype = np.float64  # float32 is compiled by whole trainings
    near = 200 * np.finfo(dtype).eps
    for n in (1, 2, 7, 1023, 2049, 5000):
        theta, slots = drawn(rng, dtype, n), [np.zeros(n, dtype)] * rule.slots
        gradients = [scale * drawn(rng, dtype, n) for scale in (3, 0.1, 0.1)]  # so that AMSGrad's largest v stays
        gradients[0][0] = 0
        wanted, _ = stepped(numpy_ops, rule, theta, slots, gradients, rule.lr)
        got, diverged = stepped(fast_ops, rule, theta, slots, gradients, rule.lr)
        again, _ = stepped(fast_ops, rule, theta, slots, gradients, rule.lr)
        assert diverged == 0
        for one, other, w in zip(got, again, wanted, strict=True):
            assert one.tobytes() == other.tobytes()
            np.testing.assert_allclose(one, w, rtol=near, atol=near)


def test_squares_are_summed_over_every_part(parts, rng, dtype):
    for n in (1, 2, 3, 1023, 1024, 1025, 5000):
        g, sums = drawn(rng, dtype, n), np.full(parts, np.nan)
        fast_kernels.squares(parts, g, sums)
        assert sums[0] == pytest.approx(float((g.astype(float) ** 2).sum()), rel=1e-5 if dtype == np.float32 else 1e-14)


@pytest.mark.parametrize("rule", RULES, ids=repr)
@pytest.mark.parametrize("bad", ["cost", "first", "last"])
def test_update_keeps_everything_where_a_number_is_not_finite(parts, rng, rule, bad):
    theta, g = drawn(rng, np.float64, 1500), drawn(rng, np.float64, 1500)
    slots = [abs(drawn(rng, np.float64, 1500)) for _ in range(rule.slots)]
    if bad != "cost":
        g[0 if bad == "first" else -1] = np.nan
    kept, diverged = stepped(fast_ops, rule, theta, slots, [g, g], rule.lr, np.inf if bad == "cost" else 1.0)
    assert diverged == 1
    for v, old in zip(kept, (theta, *slots), strict=True):
        np.testing.assert_array_equal(v, old)


@pytest.mark.parametrize(
    ("rule", "theta", "g", "slot"),
    [
        (SGD(1e39, momentum=0.9), 1.0, 1.0, 0.0),
        (Adam(1e39), 1.0, 1.0, 0.0),
        (Adam(1e-3, weight_decay=1e25), 1.0, 1.0, 0.0),
        (AdamW(1e39), 1.0, 1.0, 0.0),
        (RMSProp(1e-3, weight_decay=1e-4, centered=True), 1e30, 1e-3, 0.0),
        (Adam(1e-3, weight_decay=1.0), 1e30, 1e-3, 0.0),
        (Adam(1e-3, weight_decay=1.0, amsgrad=True), 1e30, 1e-3, 0.0),
        (AdaGrad(1e-10), 1.0, 1e18, 3.4e38),
    ],
    ids=repr,
)
def test_update_undoes_a_step_that_leaves_the_finite_numbers(parts, rule, theta, g, slot):
    """In float32, cost and gradient finite; theta or a slot is not afterwards."""
    theta, g, *slots = (np.full(100, x, np.float32) for x in (theta, g, *[slot] * rule.slots))
    kept, diverged = stepped(fast_ops, rule, theta, slots, [g], rule.lr)
    assert diverged == 1
    for v, old in zip(kept, (theta, *slots), strict=True):
        np.testing.assert_array_equal(v, old)


# ------------------------------------------------------------------------------------------------------ whole trainings

softsign = bp.Activation.of("softsign", lambda xp, Z: Z / (1 + abs(Z)), lambda xp, Z: 1 / (1 + abs(Z)) ** 2)


@pytest.fixture
def blobs(rng):
    """Three classes in six dimensions, 101 samples."""
    T = rng.integers(0, 3, 101)
    return rng.normal(size=(101, 6)) + 2 * np.eye(6)[T], T


def trained(X, T, rule=Adam(0.01), precision="float64", net=None, **more):
    """theta and the history of a short training."""
    settings = {"hidden": "relu", "seed": 1, "backend": "numpy", "precision": precision, **(net or {})}
    network = bp.Network([6, 9, 5, 3], **settings)
    history = bp.train(network, X, T, optimizer=rule, epochs=3, batch_size=16, **more)
    return network, history


def hold_training(monkeypatch, X, T, rungs=("compiled", "replay"), rel=1e-9, **settings):
    """Its costs are NumPy's, and its bits the same each time; at this rung of the ladder of executors."""
    with monkeypatch.context() as m:
        m.setenv("BACKPROP_GPU_FAST", "0")
        net, plain = trained(X, T, **settings)
        assert "numba" not in plain.executor
    fast, history = trained(X, T, **settings)
    again, _ = trained(X, T, **settings)
    rung, numba = history.executor.split(", ")
    assert rung in rungs
    assert numba == "numba"
    assert history.train_cost == pytest.approx(plain.train_cost, rel=rel)
    assert history.train_accuracy == pytest.approx(plain.train_accuracy, abs=0.03)
    np.testing.assert_allclose(fast.theta, net.theta, rtol=1e3 * rel, atol=1e3 * rel)
    assert fast.theta.tobytes() == again.theta.tobytes()


@pytest.mark.parametrize("rung", ["compiled", "replay", "eager"])
@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_each_rule_trains_as_on_numpy(monkeypatch, blobs, rule, rung):
    monkeypatch.setenv("BACKPROP_GPU_EXECUTOR", rung if rung == "eager" else "auto")
    if rung == "replay":  # what a compiled step has no part for
        hold_training(monkeypatch, *blobs, rule=rule, rungs=["replay"], class_weight="balanced")
    else:
        hold_training(monkeypatch, *blobs, rule=rule, rungs=[rung])


def test_training_in_parts(monkeypatch, parts, blobs):
    hold_training(monkeypatch, *blobs, rungs=["compiled"])
    hold_training(monkeypatch, *blobs, rungs=["replay"], class_weight=[1, 2, 3])
    hold_training(monkeypatch, *blobs, rungs=["eager"], net={"dropout": 0.3})


@pytest.mark.parametrize(
    ("rung", "settings"),
    [
        ("replay", {"reduction": "sum", "sample_weight": np.linspace(0.1, 1, 101), "rule": SGD(0.001)}),
        ("replay", {"l2": 0.01, "clip_norm": 0.5}),
        ("replay", {"frozen": 1}),
        ("replay", {"label_smoothing": 0.1}),
        ("replay", {"cost": "squared_error"}),
        ("replay", {"net": {"bias": False}}),
        ("replay", {"net": {"hidden": "tanh"}}),
        ("replay", {"net": {"hidden": "gelu"}}),
        ("eager", {"net": {"dropout": 0.3}}),
        ("eager", {"net": {"hidden": softsign}}),
        ("compiled", {"net": {"hidden": ["leaky_relu", "identity"]}}),
        ("compiled", {"batches": "chunks", "schedule": "cosine"}),
    ],
    ids=lambda setting: setting if isinstance(setting, str) else re.sub(r" at 0x\w+", "", str(setting)),
)
def test_settings_train_as_on_numpy(monkeypatch, blobs, rung, settings):
    hold_training(monkeypatch, *blobs, rungs=[rung], **settings)


def test_bytes_in_float32(monkeypatch, rng):
    X, T = rng.integers(0, 256, (101, 6)).astype(np.uint8), rng.integers(0, 3, 101)
    hold_training(monkeypatch, X, T, precision="float32", rel=1e-5)


def test_a_rule_of_ones_own(monkeypatch, blobs):
    hold_training(monkeypatch, *blobs, rungs=["replay", "eager"], rule=Own(0.001))


def test_divergence_is_found_where_numpy_finds_it(monkeypatch, parts, blobs):
    for rule, settings in (
        (SGD(1e200), {}),
        (SGD(1e200), {"class_weight": [1, 1, 1]}),
        (SGD(1e200), {"net": {"dropout": 0.3}}),
        (Adam(1e308), {}),
    ):
        told = []
        for fast in ("0", "1"):
            monkeypatch.setenv("BACKPROP_GPU_FAST", fast)
            net = bp.Network([6, 9, 5, 3], seed=1, backend="numpy", precision="float64", **settings.get("net", {}))
            more = {k: v for k, v in settings.items() if k != "net"}
            with pytest.raises(bp.DivergenceError) as e:
                bp.train(net, *blobs, optimizer=rule, epochs=3, batch_size=16, **more)
            assert np.isfinite(net.theta).all()
            told.append(str(e.value))
        assert told[0] == told[1]


@pytest.mark.parametrize(
    "scales",
    [(1e160, 1e-160, 1, 1), (1, 1e160, 1e-160, 1), (1, 1e-160, 1e160, 1)],
    ids=["X", "A", "Delta"],
)
def test_a_gradient_without_a_norm_changes_nothing(monkeypatch, parts, blobs, scales):
    """One factor of one dW is so large that only that dW can tell, which a compiled step uses at once."""
    X, T = blobs
    for fast in ("0", "1"):
        monkeypatch.setenv("BACKPROP_GPU_FAST", fast)
        net = bp.Network([6, 9, 5, 3], seed=1, backend="numpy", precision="float64")
        for W, scale in zip(net.W[1:], scales[1:], strict=True):
            W *= scale
        before = net.theta.copy()
        with pytest.raises(bp.DivergenceError, match="step 1,"):
            bp.train(net, scales[0] * X, T, optimizer=SGD(0.1), epochs=1, batch_size=16)
        np.testing.assert_array_equal(net.theta, before)


@pytest.mark.parametrize("hidden", ["relu", "leaky_relu", "tanh", "sigmoid", "elu", "swish"])
def test_gradients_are_right(monkeypatch, parts, blobs, hidden):
    nets = []
    for fast in ("0", "1"):
        monkeypatch.setenv("BACKPROP_GPU_FAST", fast)
        nets.append(bp.Network([6, 9, 5, 3], hidden, seed=1, precision="float64", backend="numpy"))
    X, T = blobs
    assert nets[1].backend.fast
    for draw in (None, (3, 4)):
        wanted, got = (net.gradients(X, T, dropout=draw) for net in nets)
        assert got["cost"] == pytest.approx(wanted["cost"], rel=1e-12)
        for w, g in zip((*wanted["W"][1:], *wanted["b"][1:]), (*got["W"][1:], *got["b"][1:]), strict=True):
            np.testing.assert_allclose(g, w, rtol=1e-10, atol=1e-13)
    assert bp.gradient_check(nets[1], X[:9], T[:9])


def test_data_that_does_not_lie_in_rows(monkeypatch, blobs):
    X, T = blobs
    (one, _), (other, _) = trained(X, T), trained(np.asfortranarray(X), T)
    np.testing.assert_array_equal(one.theta, other.theta)
    np.testing.assert_array_equal(one.forward(X), one.forward(np.asfortranarray(X)))
    wide = np.repeat((10 * X + 100).astype(np.uint8), 2, axis=1)
    wide.flags.writeable = False
    hold_training(monkeypatch, wide[:, ::2], T)


@pytest.mark.parametrize("settings", [{}, {"optimizer": "adam", "sample_weight": WEIGHTS}], ids=["sgd", "adam"])
def test_steps_of_a_tape_are_those_of_the_operations(monkeypatch, rng, settings):
    """As test_recording.py says of NumPy's; here, where all that numba compiles for it is compiled already."""
    X, T = rng.integers(0, 256, (TAPED, 4), dtype=np.uint8), rng.integers(0, K, TAPED)
    same(monkeypatch, lambda: network(hidden="tanh"), X, T, **settings)


# ------------------------------------------------------------------------------------------------ threads, processes


def test_two_trainings_at_once_are_as_alone(monkeypatch, blobs):
    in_parts(monkeypatch, 2)
    before = blas.threads.now()
    seeds = (1, 2)
    for settings in ({}, {"class_weight": [1, 2, 3]}):
        alone = [trained(*blobs, net={"seed": seed}, **settings)[0].theta.copy() for seed in seeds]
        found, ready = {}, threading.Barrier(len(seeds))

        def work(seed, settings=settings, found=found, ready=ready):
            ready.wait()
            found[seed] = [trained(*blobs, net={"seed": seed}, **settings)[0].theta.copy() for _ in range(5)]

        both = [threading.Thread(target=work, args=(seed,)) for seed in seeds]
        for thread in both:
            thread.start()
        for thread in both:
            thread.join()
        for seed, wanted in zip(seeds, alone, strict=True):
            assert {theta.tobytes() for theta in found[seed]} == {wanted.tobytes()}
    assert blas.threads.now() == before


def test_openblas_has_its_threads_again_also_after_an_error(blobs):
    blas.threads.set(2)
    before = blas.threads.now()
    with pytest.raises(bp.DivergenceError):
        trained(*blobs, rule=SGD(1e200))
    assert blas.threads.now() == before


PREAMBLE = """
import os, sys, threading
import numpy as np
import backprop_gpu as bp
from backprop_gpu import fast_ops, numpy_ops
fast_ops.PRODUCT = fast_ops.PASS = fast_ops.EXPONENTIALS = 1
rng = np.random.default_rng(0)
T = rng.integers(0, 3, 101)
X = rng.normal(size=(101, 6)) + 2 * np.eye(6)[T]
def theta(seed=1, **more):
    net = bp.Network([6, 9, 5, 3], seed=seed, precision="float64", backend="numpy")
    bp.train(net, X, T, epochs=3, batch_size=16, **more)
    return net.theta
"""


def child(text, preamble=PREAMBLE, **environment):
    """What Python prints for this text after the preamble."""
    env = {**os.environ, "BACKPROP_GPU_FAST": "1", "NUMBA_NUM_THREADS": "2", **environment}
    done = subprocess.run([sys.executable, "-c", preamble + text], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{done.returncode}: {done.stdout}{done.stderr}"
    return done.stdout.split()


@pytest.mark.parametrize("used", [True, False], ids=["after kernels ran", "before"])
def test_a_forked_child_trains(used):
    """OpenMP ends a process that was forked and starts threads; the child has to do without, and does as well."""
    told = child(f"""
weights = dict(class_weight=[1, 2, 3])
wanted = [theta(), theta(**weights)] if {used} else []
assert fast_ops.threads() == 2
pid = os.fork()
if pid == 0:
    try:
        assert fast_ops.threads() == 1
        for got, one in zip([theta(), theta(**weights)], wanted):
            np.testing.assert_allclose(got, one, rtol=1e-9, atol=1e-12)
        print("trained", flush=True)
        os._exit(0)
    finally:
        os._exit(1)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
theta()
print("so did the parent")
""")
    assert told == ["trained", "0", "so", "did", "the", "parent"]


def test_numbas_own_threads_do_not_end_the_process():
    """They may not be used by two Python threads at once; numba takes them where OpenMP is missing."""
    told = child(
        """
wanted = [theta(seed).tobytes() for seed in range(4)]
found = {}
def work(seed):
    found[seed] = {theta(seed).tobytes() for _ in range(20)}
workers = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
for w in workers: w.start()
for w in workers: w.join()
assert all(found[seed] == {wanted[seed]} for seed in range(4))
import numba
print(numba.threading_layer(), fast_ops.threads())
""",
        NUMBA_THREADING_LAYER="workqueue",
    )
    assert told == ["workqueue", "1"]


# --------------------------------------------------------------------------------------------------------- the choice


@pytest.fixture
def anew(monkeypatch):
    """As in a process that has not imported them yet."""
    for name in ("fast_ops", "fast_kernels", "compiled"):
        monkeypatch.delitem(sys.modules, f"backprop_gpu.{name}", raising=False)
        monkeypatch.delattr(bp, name, raising=False)
    backends.no_fast.cache_clear()
    yield monkeypatch
    backends.no_fast.cache_clear()


class Broken:
    """Finds a numba that does not import."""

    def find_spec(self, name, path=None, target=None):
        if name == "numba":
            raise ImportError("Numba needs NumPy 2.2 or less. Got NumPy 2.9.")


def absent(monkeypatch):
    monkeypatch.setitem(sys.modules, "numba", None)


def broken(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "numba"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])


def another_blas(monkeypatch):
    monkeypatch.setattr(blas, "routines", lambda: None)


TROUBLES = [
    (absent, "numba is not installed", "pip install numba"),
    (broken, "Numba needs NumPy 2.2 or less. Got NumPy 2.9.", "pip install -U numba numpy"),
    (another_blas, "NumPy does not come with OpenBLAS here", "pip install -U numba numpy"),
]


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"NUMBA_DISABLE_JIT": "1"}, "NUMBA_DISABLE_JIT is set"),
        ({"NUMBA_THREADING_LAYER": "none of them"}, "none of them"),
    ],
    ids=["without a compiler", "without threads"],
)
def test_numba_that_cannot_work_is_not_used(environment, reason):
    told = child(
        "from backprop_gpu import backend; print(backend.choose('numpy').fast, backend.no_fast('auto'))",
        "", BACKPROP_GPU_FAST="auto", **environment,
    )  # fmt: skip
    assert told[0] == "False"
    assert reason in " ".join(told)


@pytest.mark.parametrize(("wanted", "fast"), [("0", False), ("1", True), ("auto", True), ("", True)])
def test_the_variable_chooses(monkeypatch, wanted, fast):
    monkeypatch.setenv("BACKPROP_GPU_FAST", wanted)
    be = backends.choose("numpy")
    assert (be.fast, be.ops is fast_ops, be.ops is numpy_ops) == (fast, fast, not fast)


@pytest.mark.parametrize("wanted", ["yes", "2", "AUTO"])
def test_another_wish_is_an_error(monkeypatch, wanted):
    monkeypatch.setenv("BACKPROP_GPU_FAST", wanted)
    with pytest.raises(bp.ConfigError) as e:
        backends.choose("numpy")
    assert wanted in e.value.cause
    assert e.value.cure == "set it to 1, 0 or auto"


@pytest.mark.parametrize(("trouble", "reason", "cure"), TROUBLES, ids=lambda x: getattr(x, "__name__", ""))
def test_where_numba_cannot_be_used_numpy_is_and_says_why(anew, trouble, reason, cure):
    trouble(anew)
    anew.setenv("BACKPROP_GPU_FAST", "auto")
    be = backends.choose("numpy")
    assert (be.fast, be.ops) == (False, numpy_ops)
    assert reason in backends.no_fast("auto")
    anew.setenv("BACKPROP_GPU_FAST", "1")
    with pytest.raises(bp.ConfigError) as e:
        backends.choose("numpy")
    assert e.value.cause.startswith("BACKPROP_GPU_FAST is 1, but ")
    assert reason in e.value.cause
    assert cure in e.value.cure
    anew.setenv("BACKPROP_GPU_FAST", "0")
    assert backends.choose("numpy").ops is numpy_ops
