"""Every operation, on every backend, against its literal formula at awkward sizes."""

import formulas
import numpy as np
import pytest

from backprop_gpu import SGD, AdaGrad, Adam, AdamW, RMSProp, costs, grids, numpy_ops
from backprop_gpu.activations import HIDDEN, IDENTITY, OUTPUT
from backprop_gpu.backend import to_host
from backprop_gpu.costs import COSTS
from backprop_gpu.regularization import Regularization

SIZES = [(1, 1), (1, 31), (33, 1), (31, 33), (3, 257), (127, 10)]
DTYPES = [np.float32, np.float64]
PAIRS = [
    (c, OUTPUT[g])
    for c in COSTS.values()
    for g in (OUTPUT if c.name == "squared_error" else c.outputs or ("softmax", "tanh", "gelu"))
]


def tolerance(dtype, scale=1.0):
    # float32: rtol 1.3e-6, atol 1e-5 (of values near `scale`); float64: 1e-13
    return {"rtol": 2e-6, "atol": 1e-5 * scale} if dtype == np.float32 else {"rtol": 1e-12, "atol": 1e-13 * scale}


def device(backend, *arrays):
    return [None if a is None else backend.asarray(a.copy()) for a in arrays]


def elementwise(f, M):
    return np.array([[f(float(v)) for v in row] for row in M])


@pytest.fixture(params=DTYPES, ids=["float32", "float64"])
def dtype(request):
    return request.param


@pytest.mark.parametrize(("m", "n"), SIZES)
@pytest.mark.parametrize("kind", ["indices", "slice"])
def test_gather(backend, rng, dtype, m, n, kind):
    images = rng.integers(0, 256, (200, n)).astype(np.uint8)
    floats, labels = rng.normal(size=(200, n)).astype(dtype), rng.integers(0, 10, 200)
    rows = rng.integers(0, 200, m) if kind == "indices" else slice(3, 3 + m)
    for data, wanted in (
        (images, images[rows].astype(dtype) / dtype(255)),
        (floats, floats[rows]),
        (labels, labels[rows]),
    ):
        out = backend.xp.empty(wanted.shape, wanted.dtype)
        on_device = backend.asarray(rows) if kind == "indices" else rows
        backend.ops.gather(backend.asarray(data), on_device, out)
        np.testing.assert_array_equal(to_host(out), wanted)


@pytest.mark.parametrize("f", HIDDEN.values(), ids=lambda f: f.name)
@pytest.mark.parametrize(("m", "n"), SIZES)
def test_affine_activate(backend, rng, dtype, m, n, f):
    below = 5
    W, A, b = (rng.normal(size=s).astype(dtype) for s in ((n, below), (m, below), (n,)))
    for bias in (b, None):
        z = A.astype(float) @ W.astype(float).T + (0 if bias is None else bias.astype(float))
        wanted = elementwise(formulas.VALUE[f.name], z)
        dW, dA, db = device(backend, W, A, bias)
        Z, out = backend.xp.empty((m, n), dtype), backend.xp.empty((m, n), dtype)
        backend.ops.affine_activate(dW, dA, db, f, Z, out)
        np.testing.assert_allclose(to_host(Z), z, **tolerance(dtype, 10))
        np.testing.assert_allclose(to_host(out), wanted, **tolerance(dtype, 10))
        in_place = backend.xp.empty((m, n), dtype)
        backend.ops.affine_activate(dW, dA, db, f, in_place, in_place)
        np.testing.assert_array_equal(to_host(in_place), to_host(out))


@pytest.mark.parametrize("f", HIDDEN.values(), ids=lambda f: f.name)
@pytest.mark.parametrize(("m", "n"), SIZES)
def test_hidden_delta(backend, rng, dtype, m, n, f):
    above = 7
    W, Delta = rng.normal(size=(above, n)).astype(dtype), rng.normal(size=(m, above)).astype(dtype)
    Z = (3 * rng.normal(size=(m, n))).astype(dtype)
    A = elementwise(formulas.VALUE[f.name], Z).astype(dtype)
    wanted = elementwise(formulas.DERIVATIVE[f.name], Z) * (Delta.astype(float) @ W.astype(float))
    kept = (
        (Z, np.full_like(A, np.nan)) if f.derivative_from == "Z" else (np.full_like(Z, np.nan), A)
    )  # only one is read
    dW, dDelta, dZ, dA = device(backend, W, Delta, *kept)
    out = backend.xp.empty((m, n), dtype)
    backend.ops.hidden_delta(dW, dDelta, f, dZ, dA, None, out)
    np.testing.assert_allclose(to_host(out), wanted, **tolerance(dtype, 10))
    db = backend.xp.empty(n, dtype)
    backend.ops.hidden_delta(dW, dDelta, f, dZ, dA, None, out, db)
    np.testing.assert_allclose(to_host(out), wanted, **tolerance(dtype, 10))
    np.testing.assert_allclose(to_host(db), wanted.sum(axis=0), **tolerance(dtype, 10 * m))


@pytest.mark.parametrize("g", OUTPUT.values(), ids=lambda g: g.name)
@pytest.mark.parametrize(("m", "n"), SIZES)
def test_output(backend, rng, dtype, m, n, g):
    Z = (3 * rng.normal(size=(m, n))).astype(dtype)
    A = backend.xp.empty((m, n), dtype)
    backend.ops.output(g, *device(backend, Z), A)
    np.testing.assert_allclose(to_host(A), [formulas.output(g.name, row) for row in Z.tolist()], **tolerance(dtype))


@pytest.mark.parametrize("kind", ["labels", "rows"])
@pytest.mark.parametrize(("cost", "g"), PAIRS, ids=lambda x: x.name)
@pytest.mark.parametrize(("m", "n"), SIZES)
def test_output_delta(backend, rng, dtype, m, n, cost, g, kind):
    Z = (3 * rng.normal(size=(m, n))).astype(dtype)
    labels = rng.integers(0, n, m)
    rows = {"cross_entropy": rng.dirichlet(np.ones(n), m), "binary_cross_entropy": rng.random((m, n))}.get(
        cost.name, rng.normal(size=(m, n))
    )
    T, dense = (labels, np.eye(n)[labels]) if kind == "labels" else (rows.astype(dtype), rows.astype(dtype))
    Delta, C = backend.xp.empty((m, n), dtype), backend.xp.empty(m, dtype)
    dZ, dT = device(backend, Z, T)
    backend.ops.output_delta(cost, g, dZ, dT, 0.25, Delta, C)
    wanted_C = [formulas.cost(cost.name, g.name, z, t) for z, t in zip(Z.tolist(), dense.tolist(), strict=True)]
    wanted = [formulas.delta(cost.name, g.name, z, t) for z, t in zip(Z.tolist(), dense.tolist(), strict=True)]
    np.testing.assert_allclose(to_host(C), wanted_C, **tolerance(dtype, n))
    np.testing.assert_allclose(to_host(Delta), 0.25 * np.array(wanted), **tolerance(dtype, 10))
    w, db = rng.random(m).astype(dtype), backend.xp.empty(n, dtype)
    backend.ops.output_delta(cost, g, dZ, dT, device(backend, w)[0], Delta, C, db)
    np.testing.assert_allclose(to_host(db), w @ np.array(wanted), **tolerance(dtype, 10 * m))
    np.testing.assert_allclose(to_host(C), wanted_C, **tolerance(dtype, n))
    np.testing.assert_allclose(to_host(Delta), w[:, None] * np.array(wanted), **tolerance(dtype, 10))
    np.testing.assert_array_equal(to_host(dZ), Z)


@pytest.mark.parametrize(("name", "g"), [("cross_entropy", "softmax"), ("binary_cross_entropy", "sigmoid")])
def test_costs_survive_extreme_logits(backend, dtype, name, g):
    Z = np.array([[1e4, -1e4, 0], [-1e4, -1e4, -1e4], [1e4, 1e4, 1e4], [88.8, -88.8, 0.1]], dtype)
    T = np.array([[0, 1, 0]] * 4, dtype)
    Delta, C = backend.xp.empty(Z.shape, dtype), backend.xp.empty(4, dtype)
    with np.errstate(over="ignore"):
        backend.ops.output_delta(COSTS[name], OUTPUT[g], *device(backend, Z, T), 1.0, Delta, C)
    assert np.isfinite(to_host(C)).all()
    assert np.isfinite(to_host(Delta)).all()
    wanted = [formulas.cost(name, g, z, t) for z, t in zip(Z.tolist(), T.tolist(), strict=True)]
    np.testing.assert_allclose(to_host(C), wanted, rtol=1e-5)


@pytest.mark.parametrize("kind", ["labels", "rows"])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize(("name", "g"), [("cross_entropy", "softmax"), ("binary_cross_entropy", "sigmoid")])
def test_plain_lines_of_a_cost_give_what_its_operation_gives(backend, rng, dtype, name, g, smoothing, kind):
    cost, T = COSTS[name].smoothed(smoothing), rng.integers(0, 5, 9)
    T = T if kind == "labels" else rng.dirichlet(np.ones(5), 9).astype(dtype)
    dZ, dT = device(backend, rng.normal(size=(9, 5)).astype(dtype), T)
    Delta, C, wanted, wanted_C = (backend.xp.empty(shape, dtype) for shape in ((9, 5), 9, (9, 5), 9))
    costs.output_delta(backend.ops, cost, OUTPUT[g], dZ, dT, Delta, C)
    backend.ops.output_delta(cost, OUTPUT[g], dZ, dT, 1.0, wanted, wanted_C)
    np.testing.assert_allclose(to_host(C), to_host(wanted_C), **tolerance(dtype))
    np.testing.assert_allclose(to_host(Delta), to_host(wanted), **tolerance(dtype))


def test_softmax_and_norm_survive_what_is_huge(backend, dtype):
    """Numbers whose exponentials or squares leave the range of the dtype, beside a 0."""
    Z = np.array([[1000.0, 0.0], [-1000.0, 0.0]], dtype)
    A, Delta, C = backend.xp.empty((2, 2), dtype), backend.xp.empty((2, 2), dtype), backend.xp.empty(2, dtype)
    backend.ops.output(OUTPUT["softmax"], *device(backend, Z), A)
    np.testing.assert_array_equal(to_host(A), [[1, 0], [0, 1]])
    huge = dtype(np.finfo(dtype).max / 4)
    Y, T = np.array([[huge, 0], [0, 3]], dtype), np.zeros((2, 2), dtype)
    backend.ops.output_delta(COSTS["norm"], IDENTITY, *device(backend, Y, T), 1.0, Delta, C)
    np.testing.assert_array_equal(to_host(C), [huge, 3])
    np.testing.assert_array_equal(to_host(Delta), [[1, 0], [0, 1]])


@pytest.mark.parametrize(("m", "n"), SIZES)
def test_weight_gradient(backend, rng, dtype, m, n):
    Delta, A = rng.normal(size=(m, n)).astype(dtype), rng.normal(size=(m, 9)).astype(dtype)
    dDelta, dA = device(backend, Delta, A)
    dW = backend.xp.empty((n, 9), dtype)
    backend.ops.weight_gradient(dDelta, dA, dW)
    wanted = np.zeros((n, 9))
    for i in range(m):
        wanted += np.outer(Delta[i].astype(float), A[i].astype(float))
    np.testing.assert_allclose(to_host(dW), wanted, **tolerance(dtype, 10))


@pytest.mark.parametrize(
    ("task", "g", "Z", "T", "right"),
    [
        ("labels", "softmax", [[1, 2, 0], [3, 1, 1], [0, 0, 5]], [1, 2, 2], 2),
        ("labels", "identity", [[1, 2, 0], [3, 1, 1]], [[0, 1, 0], [0, 0, 1]], 1),
        ("labels", "gelu", [[-3.0, -0.7], [-0.7, -3.0]], [0, 1], 2),  # gelu(-3) > gelu(-0.7): not by the larger z
        ("labels", "swish", [[-9.0, -1.0], [-1.0, -9.0]], [0, 1], 2),
        ("labels", "relu", [[-9.0, -1.0], [-1.0, -9.0]], [0, 0], 2),  # a tie at 0: the first
        ("binary", "sigmoid", [[0.1], [-0.1], [2]], [[1], [1], [0]], 1),
        ("multilabel", "sigmoid", [[1, -1], [1, 1], [-1, -1]], [[1, 0], [1, 0], [0, 0]], 2),
        ("regression", "identity", [[1.0], [2.0]], [[1.0], [2.0]], 0),
    ],
)
def test_measure(backend, dtype, task, g, Z, T, right):
    Z = np.array(Z, dtype)
    T = np.array(T, np.intp if np.ndim(T) == 1 else dtype)
    out = backend.xp.zeros(2, np.float64)
    backend.ops.measure(task, OUTPUT[g], *device(backend, Z, T, np.arange(len(Z)).astype(dtype)), None, out)
    assert to_host(out).tolist() == [sum(range(len(Z))), right]
    w = np.array([2.0, 0.5, 3.0][: len(Z)], dtype)
    backend.ops.measure(task, OUTPUT[g], *device(backend, Z, T, np.arange(len(Z)).astype(dtype), w), out)
    assert to_host(out).tolist() == [sum(i * wi for i, wi in enumerate(w.tolist())), right]


@pytest.mark.parametrize("rule", [SGD(0.1), SGD(0.1, momentum=0.9), Adam(), AdamW(), Adam(amsgrad=True)], ids=repr)
@pytest.mark.parametrize("bad", ["cost", "gradient"])
def test_update_keeps_everything_from_the_first_step_that_is_not_finite(backend, rng, dtype, rule, bad):
    n = 100
    theta, *slots = (abs(rng.normal(size=n)).astype(dtype) for _ in range(1 + rule.slots))
    g = rng.normal(size=n).astype(dtype)
    measured = np.array([1.0, 0.0])
    if bad == "cost":
        measured[0] = np.inf
    else:
        g[57] = np.nan
    d_theta, d_g, d_measured, *d_slots = device(backend, theta, g, measured, *slots)
    diverged = backend.xp.zeros(1, np.int64)
    with np.errstate(all="ignore"):
        backend.ops.update(
            rule, d_theta, d_g, tuple(d_slots), backend.ops.step_rows(rule, [0.1], 3)[0], d_measured, diverged
        )
        assert int(diverged[0]) == 3
        fine = device(backend, rng.normal(size=n).astype(dtype), np.array([1.0, 0.0]))
        backend.ops.update(
            rule, d_theta, fine[0], tuple(d_slots), backend.ops.step_rows(rule, [0.1], 4)[0], fine[1], diverged
        )
        backend.ops.update(
            rule, d_theta, d_g, tuple(d_slots), backend.ops.step_rows(rule, [0.1], 5)[0], d_measured, diverged
        )  # the first stays told
    assert int(diverged[0]) == 3
    for kept, old in zip((d_theta, *d_slots), (theta, *slots), strict=True):
        np.testing.assert_array_equal(to_host(kept), old)


@pytest.mark.parametrize(
    ("rule", "lr"),
    [(SGD(1e39, momentum=0.9), 1e39), (Adam(1e39), 1e39), (Adam(1e-3, weight_decay=1e25), 1e-3), (AdamW(1e39), 1e39)],
    ids=repr,
)
def test_update_undoes_a_step_that_leaves_the_finite_numbers(backend, rng, rule, lr):
    """In float32, cost and gradient finite; theta or only a slot is not afterwards. Nothing of it stays."""
    n = 100
    theta, *slots = (abs(rng.normal(size=n)).astype(np.float32) for _ in range(1 + rule.slots))
    d_theta, g, measured, *d_slots = device(backend, theta, np.ones(n, np.float32), np.zeros(2), *slots)
    diverged = backend.xp.zeros(1, np.int64)
    with np.errstate(all="ignore"):
        backend.ops.update(
            rule, d_theta, g, tuple(d_slots), backend.ops.step_rows(rule, [lr], 7)[0], measured, diverged
        )
    assert int(diverged[0]) == 7
    for kept, old in zip((d_theta, *d_slots), (theta, *slots), strict=True):
        np.testing.assert_array_equal(to_host(kept), old)


@pytest.mark.parametrize(
    "rule",
    [RMSProp(1e-3, weight_decay=1e-4, centered=True), SGD(1e-12, weight_decay=1e11), Adam(1e-3, weight_decay=1.0)],
    ids=repr,
)
def test_update_undoes_a_step_of_a_decay_of_huge_weights(backend, rule):
    theta, g, *slots = (np.full(100, x, np.float32) for x in (1e30, 1e-3, *[0.0] * rule.slots))
    d_theta, d_g, measured, *d_slots = device(backend, theta, g, np.zeros(2), *slots)
    diverged = backend.xp.zeros(1, np.int64)
    with np.errstate(all="ignore"):
        backend.ops.update(
            rule, d_theta, d_g, tuple(d_slots), backend.ops.step_rows(rule, [rule.lr], 7)[0], measured, diverged
        )
    assert int(diverged[0]) == 7
    np.testing.assert_array_equal(to_host(d_theta), theta)


def test_update_undoes_a_step_after_which_a_slot_is_infinite(backend):
    """AdaGrad's sum of squares near the end of float32, at a learning rate so small that theta hardly moves."""
    theta, g, G = (np.full(100, x, np.float32) for x in (1.0, 1e18, 3.4e38))
    d_theta, d_g, d_G, measured = device(backend, theta, g, G, np.zeros(2))
    diverged = backend.xp.zeros(1, np.int64)
    with np.errstate(all="ignore"):
        backend.ops.update(
            AdaGrad(1e-10),
            d_theta,
            d_g,
            (d_G,),
            backend.ops.step_rows(AdaGrad(1e-10), [1e-10], 7)[0],
            measured,
            diverged,
        )
    assert int(diverged[0]) == 7
    np.testing.assert_array_equal(to_host(d_theta), theta)
    np.testing.assert_array_equal(to_host(d_G), G)


def test_binary_cross_entropy_keeps_its_digits(backend, rng):
    """A hundred logits near 1000, each right: large terms that all but cancel, in float32."""
    Z = (1000 + rng.normal(size=(1, 100))).astype(np.float32)
    Z[0, 0] = -0.3
    Delta, C = backend.xp.empty(Z.shape, np.float32), backend.xp.empty(1, np.float32)
    backend.ops.output_delta(
        COSTS["binary_cross_entropy"], OUTPUT["sigmoid"], *device(backend, Z, np.ones_like(Z)), 1.0, Delta, C
    )
    wanted = formulas.cost("binary_cross_entropy", "sigmoid", Z[0].tolist(), [1.0] * 100)
    np.testing.assert_allclose(to_host(C), wanted, rtol=1e-6)


def test_update_in_blocks_is_update_in_one(monkeypatch, rng):
    """A theta of several blocks and a rest moves as in one block."""
    results = []
    for block in (1 << 20, 7, 64):
        monkeypatch.setattr(numpy_ops, "BLOCK", block)
        r = np.random.default_rng(0)
        theta, g, m, v = r.normal(size=1001), r.normal(size=1001), np.zeros(1001), np.zeros(1001)
        numpy_ops.update(
            AdamW(), theta, g, (m, v), numpy_ops.step_rows(AdamW(), [0.1], 1)[0], np.zeros(2), np.zeros(1, int)
        )
        results.append(np.concatenate([theta, m, v]))
    for other in results[1:]:  # BLAS rounds the rest of a vector otherwise than its whole registers
        np.testing.assert_allclose(other, results[0], rtol=1e-13, atol=1e-16)


def test_row_blocks_give_what_one_block_gives(monkeypatch, rng):
    Z, W, b = rng.normal(size=(33, 31)), rng.normal(size=(31, 31)), rng.normal(size=31)
    A, Delta = rng.normal(size=(33, 31)), rng.normal(size=(33, 31))

    def everything():
        results = []
        for g in OUTPUT.values():
            results.append(np.empty_like(Z))
            numpy_ops.output(g, Z, results[-1])
        for f in HIDDEN.values():
            results += [np.empty_like(Z) for _ in range(3)]
            numpy_ops.affine_activate(W, A, b, f, results[-3], results[-2])
            numpy_ops.hidden_delta(W, Delta, f, Z, A, None, results[-1])
        return results

    whole = everything()
    monkeypatch.setattr(numpy_ops, "BLOCK", 100)
    for one, cut in zip(whole, everything(), strict=True):
        np.testing.assert_array_equal(one, cut)


def test_identity_in_place_is_the_affine_map(backend):
    W, A = np.array([[2.0]]), np.array([[3.0]])
    Z = backend.xp.empty((1, 1))
    backend.ops.affine_activate(*device(backend, W, A), None, IDENTITY, Z, Z)
    assert to_host(Z).tolist() == [[6.0]]


@pytest.mark.parametrize("task", ["binary", "multilabel"])
def test_what_lies_on_the_border_counts_as_zero(backend, dtype, task):
    """An output of exactly 1/2, which is z = 0, and a target of exactly 1/2."""
    Z, T, C = np.array([[0.0], [0.0], [1.0]], dtype), np.array([[0.0], [0.5], [1.0]], dtype), np.zeros(3, dtype)
    out = backend.xp.zeros(2, np.float64)
    backend.ops.measure(task, OUTPUT["sigmoid"], *device(backend, Z, T, C), None, out)
    assert to_host(out).tolist() == [0, 3]


def test_norm_of_nothing(backend, dtype):
    """Where y = t, C and its gradient are 0, beside rows where they are not; what scratch holds does not matter."""
    Y, T = np.array([[3.0, 1.0], [2.0, 5.0], [0.0, 0.0]], dtype), np.array([[0.0, 5.0], [2.0, 5.0], [0.0, 0.0]], dtype)
    for _ in range(2):
        Delta, C = backend.xp.empty((3, 2), dtype), backend.xp.empty(3, dtype)
        backend.ops.output_delta(COSTS["norm"], IDENTITY, *device(backend, Y, T), 1.0, Delta, C)
        np.testing.assert_allclose(to_host(C), [5, 0, 0], rtol=1e-6)
        np.testing.assert_allclose(to_host(Delta), [[0.6, -0.8], [0, 0], [0, 0]], rtol=1e-6)


@pytest.mark.parametrize(
    "rule", [SGD(1e13, momentum=0.9), SGD(2.0, weight_decay=0.5), AdamW(2.0, weight_decay=0.5)], ids=repr
)
def test_a_huge_step_that_stays_finite_is_taken(backend, rng, rule):
    theta, g = rng.normal(size=50), rng.normal(size=50)
    wanted, slots = theta.copy(), [np.zeros(50) for _ in range(rule.slots)]
    rule.apply(np, wanted, g, tuple(slots), rule.coefficients(rule.lr, 1), (np.empty(50), np.empty(50)))
    d_theta, d_g, measured, *d_slots = device(backend, theta, g, np.zeros(2), *(np.zeros(50) for _ in slots))
    diverged = backend.xp.zeros(1, np.int64)
    assert backend.ops.update(
        rule, d_theta, d_g, tuple(d_slots), backend.ops.step_rows(rule, [rule.lr], 1)[0], measured, diverged
    )
    assert int(diverged[0]) == 0
    for is_now, old in zip((d_theta, *d_slots), (wanted, *slots), strict=True):
        np.testing.assert_allclose(to_host(is_now), old, rtol=1e-14)


# ------------------------------------------------------------------------------------------- what CuPy does not look at

on_cupy = pytest.mark.parametrize("backend", ["fake cupy", pytest.param("cupy", marks=pytest.mark.gpu)], indirect=True)


@on_cupy
def test_arrays_of_another_shape_are_refused(backend):
    """Whichever of its arrays an operation gets longer than the others want it."""
    ops, xp = backend.ops, backend.xp
    M, W, v, b = (xp.zeros(shape) for shape in ((4, 3), (3, 3), 4, 3))
    labels, row, pair, zero = xp.zeros(4, np.int64), ops.step_rows(SGD(0.1), [0.1], 1)[0], xp.zeros(2), xp.zeros(1, int)
    mae, tanh, gelu, softmax = COSTS["mae"], OUTPUT["tanh"], HIDDEN["gelu"], OUTPUT["softmax"]
    clip, momentum = Regularization(clip_norm=1.0), SGD(0.1, momentum=0.9)
    for operation, given, places in (  # places: of the arrays to exchange
        (ops.gather, (M, labels, M), (1, 2)),
        (ops.affine, (W, M, b, M), (2,)),
        (ops.affine_activate, (W, M, b, tanh, M, M), (2, 5)),
        (ops.drop, (M, 0.5, (0, 1), 1, M, M), (4, 5)),
        (ops.output, (tanh, M, M), (2,)),
        (ops.output, (softmax, M, M), (2,)),
        (ops.share, (v, v), (1,)),
        (ops.output_delta, (mae, tanh, M, M, v, M, v, b), (3, 4, 5, 6, 7)),
        (ops.output_delta, (mae, tanh, M, labels, 1.0, M, v, b), (3, 5, 6, 7)),
        (ops.hidden_delta, (W, M, gelu, M, None, M, M, b), (3, 5, 7)),
        (ops.hidden_delta, (W, M, tanh, None, M, M, M, b), (4, 5, 7)),
        (ops.measure, ("labels", softmax, M, labels, v, v, pair), (4, 5)),
        (ops.regularize, (clip, v, v, v), (1, 2)),
        (ops.update, (SGD(0.1), v, v, (), row, pair, zero), (2,)),
        (lambda slot: ops.update(momentum, v, v, (slot,), row, pair, zero), (v,), (0,)),
    ):
        for place in places:
            shape = given[place].shape
            for axis in range(len(shape)):
                longer = xp.zeros([n + (i == axis) for i, n in enumerate(shape)], given[place].dtype)
                with pytest.raises(ValueError, match="an array has shape"):
                    operation(*given[:place], longer, *given[place + 1 :])


@on_cupy
def test_grids_of_elements_and_rows(backend):
    """16 bytes a thread; a warp a row, or a block where rows are long; never more blocks than there is use for."""
    ops = backend.ops
    T, most = grids.THREADS, grids.MOST_BLOCKS
    assert [grids.blocks(n, 4, 9) for n in (1, 4 * T, 4 * T + 1, 10**9)] == [1, 1, 2, 9]
    assert [grids.blocks(n, 8, 9) for n in (1, 2 * T, 2 * T + 1, 10**9)] == [1, 1, 2, 9]
    assert grids.blocks(10**9, 4) == most
    assert [ops._rows(m, ops.LONG_ROW) for m in (T // 32, T // 32 + 1, 10**9)] == [
        ((n,), (32, T // 32)) for n in (1, 2, most)
    ]
    assert [ops._rows(m, ops.LONG_ROW + 1) for m in (1, 2, 10**9)] == [((n,), (T, 1)) for n in (1, 2, most)]


@pytest.mark.parametrize(("item", "width"), [(4, 4), (8, 2)])
def test_grids_of_column_sums(item, width):
    """Strips of 32 threads, chunks of about CHUNK rows; wide accesses where a whole GPU has work even then."""
    chunk, parts, most, wide = grids.CHUNK, grids.MOST_PARTS, grids.MOST_BLOCKS, 32 * width
    full, filled = wide * grids.FILLED, grids.FILLED  # columns that fill it
    for m, n, wanted in (
        (1, 1, ((1, 1), 1, False)),
        (chunk, 32, ((1, 1), chunk, False)),
        (chunk + 1, 33, ((2, 2), chunk // 2 + 1, False)),
        (chunk * parts + 1, 1, ((1, parts), chunk + 1, False)),
        (1, full - width, ((-(-(full - width) // 32), 1), 1, False)),
        (1, full, ((filled, 1), 1, True)),
        (1, full + width, ((filled + 1, 1), 1, True)),
        (chunk + 1, full // 2, ((filled // 2, 2), chunk // 2 + 1, True)),
        (1, full + 1, ((min(full // 32 + 1, most), 1), 1, False)),
        (1, 10**9 + 1, ((most, 1), 1, False)),
        (1, 10**9, ((most, 1), 1, True)),
    ):
        grid, *rest = wanted
        assert grids.strips(m, n, item) == (*grid, *rest), (m, n)


@on_cupy
def test_what_is_launched(backend, monkeypatch):
    """Kernels and grids of the operations: a second launch only where there are several chunks to add up."""
    ops, launched = backend.ops, []
    monkeypatch.setattr(ops, "launch", lambda kernel, grid, block, *_: launched.append((kernel.name, grid, block)))
    T, chunk, narrow, strip = grids.THREADS, grids.CHUNK, ops.NARROW, (32, 16)

    def zeros(*shape):
        return backend.xp.zeros(shape, np.float32)

    def launches(operation, *given):
        launched.clear()
        operation(*given)
        return launched

    for n, blocks in ((1, 1), (4 * T, 1), (4 * T + 1, 2), (4 * T * grids.MOST_BLOCKS + 1, grids.MOST_BLOCKS)):
        F = zeros(n)
        assert launches(ops.drop, F, 0.5, (0, 1), 1, F, F) == [("drop", (blocks,), (T,))]
    assert launches(ops.share, F, F) == [("share", (1,), (1024,))]
    for m, K, chunks in (
        (chunk, narrow, 1), (chunk + 1, narrow, 2), (chunk // 8, narrow + 1, 1), (chunk // 8 + 1, narrow + 1, 2),
        (chunk * grids.MOST_PARTS + 1, 1, grids.MOST_PARTS),
    ):  # fmt: skip
        wanted = [("measure", (chunks,), (T,))] + [("add_pairs", (1,), (T,))] * (chunks > 1)
        assert launches(ops.measure, "binary", IDENTITY, zeros(m, K), zeros(m, K), zeros(m), None, None) == wanted
    for m, grid in ((chunk, (2, 1)), (chunk + 1, (2, 2)), (3 * chunk, (2, 3))):
        M, above, W = zeros(m, 33), zeros(m, 1), zeros(1, 33)
        first, second = ("hidden_delta", grid, strip), ("column_sums", (2, 1), strip)
        assert launches(ops.hidden_delta, W, above, HIDDEN["tanh"], None, M, None, M) == [first]
        wanted = [first] + [second] * (grid[1] > 1)
        assert launches(ops.hidden_delta, W, above, HIDDEN["tanh"], None, M, None, M, zeros(33)) == wanted
        assert launches(ops.hidden_delta, W, above, IDENTITY, None, M, None, M) == []
    for settings, names in (({"l2": 1.0}, ["penalize"]), ({"clip_norm": 1.0}, ["penalize", "clip"])):
        F = zeros(9)
        assert [name for name, *_ in launches(ops.regularize, Regularization(**settings), F, F, F)] == names
