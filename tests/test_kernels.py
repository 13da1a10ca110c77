"""Every CUDA kernel against the NumPy operation: on the CPU in order, shuffled and checked, and on a GPU."""

import itertools

import fake_cublaslt
import fake_cupy
import kernel_variants
import kernels_on_cpu
import numpy as np
import pytest
from conftest import all_ran, real_gpu

import backprop_gpu as bp
from backprop_gpu import backend as backends
from backprop_gpu import cuda_source, grids, numpy_ops
from backprop_gpu.activations import HIDDEN, OUTPUT, Activation
from backprop_gpu.backend import to_host
from backprop_gpu.costs import COSTS, choose_cost
from backprop_gpu.optimizers import OPTIMIZERS, SGD, AdaGrad, Adam, AdamW, Lion, NAdam, RMSProp, choose_optimizer
from backprop_gpu.regularization import Regularization

SIZES = [(1, 1), (1, 31), (33, 1), (31, 33), (33, 64), (40, 70), (3, 257), (127, 12), (257, 10)]
LARGE = [(1, 10007), (10007, 1), (600, 20)]
PAIRS = [(c, g) for c in COSTS.values() for g in OUTPUT.values() if c.outputs is None or g.name in c.outputs]
ANY = [c for c in COSTS.values() if c.outputs is None]  # costs of any output
LOOKED_AT = [  # of the pairs, access by access: each cost, each output; whole rows, which softmax needs, with each cost
    (c, g) for c, g in PAIRS if c not in ANY or g.name == "softmax" or c is ANY[list(OUTPUT).index(g.name) % len(ANY)]
]
MODES = {"plain": {}, "shuffled": {"seed": 1}, "check": {"check": True, "seed": 2}}
RULES = [
    *map(choose_optimizer, OPTIMIZERS),
    SGD(0.1, weight_decay=0.1),
    SGD(0.1, momentum=0.8, nesterov=True, weight_decay=0.1),
    AdaGrad(0.1, lr_decay=0.1, weight_decay=0.1),
    Adam(0.01, (0.8, 0.9), 1e-3, weight_decay=0.1),
    Adam(0.01, (0.8, 0.9), 1e-3, amsgrad=True),
    AdamW(0.01, weight_decay=0.3),
    bp.AdaDelta(0.5, rho=0.8, eps=1e-3, weight_decay=0.1),
    RMSProp(0.01, alpha=0.9, centered=True, momentum=0.5, weight_decay=0.1),
    RMSProp(0.01, alpha=0.9, centered=True, eps=1e-2),
    RMSProp(0.01, alpha=0.9, momentum=0.5),
    NAdam(0.01, (0.8, 0.9), eps=1e-3, weight_decay=0.1),
    Lion(0.01, (0.8, 0.9), weight_decay=0.1),
]


@pytest.fixture(scope="module", autouse=True)
def _built_beside_the_tests(request):
    """Where all kernels will be run, begin to build them now."""
    if sum(item.path == request.path for item in request.session.items) > 1000:
        every = [(file, choice) for file in kernel_variants.ALONE for choice in kernel_variants.variants(file)]
        of = {(f"cost_{cost.name}", f"f_{g.name}") for cost, g in LOOKED_AT}
        looked_at = [
            (file, choice)
            for file, choice in every
            if file != "output_delta.cu" or (choice["COST"], choice["ACTIVATION"]) in of
        ]
        parts = [
            ([cuda_source.text(file, **choice) for file, choice in those], check)
            for those, check in ((every, False), (looked_at, True))
        ]
        kernels_on_cpu.build_ahead(*parts)


@pytest.fixture(params=[*MODES, pytest.param("cupy", marks=pytest.mark.gpu)])
def device(request):
    """The CuPy backend: its kernels on the CPU, in each mode, and on a GPU."""
    if request.param == "cupy":
        yield real_gpu()
    else:
        with fake_cupy.installed(**MODES[request.param]):
            yield backends.choose("cupy")


@pytest.fixture(params=[np.float32, np.float64], ids=["float32", "float64"])
def dtype(request):
    return np.dtype(request.param)


@pytest.fixture
def small_grids(device, monkeypatch):
    """Launches of so few blocks that every loop over the grid and over chunks goes round several times."""
    for name, value in {"MOST_BLOCKS": 2, "MOST_PARTS": 3, "CHUNK": 16, "FILLED": 3}.items():
        monkeypatch.setattr(grids, name, value)


@pytest.fixture(params=["usual", "small"])
def grid(request):
    """The usual grids, and ones so small that every loop over the grid goes round several times."""
    if request.param == "small":
        request.getfixturevalue("small_grids")
    return request.param


def close(actual, wanted, scale=1.0):
    dtype = np.asarray(wanted).dtype
    rtol, atol = (3e-6, 3e-6 * scale) if dtype == np.float32 else (1e-13, 1e-13 * scale)
    np.testing.assert_allclose(to_host(actual), wanted, rtol=rtol, atol=atol)


def on(device, a):
    """A copy of an array on the device, or what is no array as it is."""
    return device.asarray(a.copy()) if isinstance(a, np.ndarray) else a


def blank(device, a):
    """An output array on the device: memory that nobody wrote, where that is watched; else poisoned as `a` is."""
    return device.xp.empty(a.shape, a.dtype) if fake_cupy.Mode.check and np.isnan(a).all() else on(device, a)


def both(device, operation, inputs, outputs):
    """Run an operation on both backends, on copies of inputs and of outputs' first contents; what each wrote.

    On a GPU once more, which has to give the same bits.
    """
    mine = [a.copy() for a in outputs]
    runs = []
    with np.errstate(all="ignore"):
        operation(numpy_ops, *inputs, *mine)
        for _ in range(1 if fake_cupy.is_fake(device.xp) else 2):
            its = [blank(device, a) for a in outputs]
            operation(device.ops, *(on(device, a) for a in inputs), *its)
            runs.append([to_host(a) for a in its])
    for first, last in zip(runs[0], runs[-1], strict=True):
        assert first.tobytes() == last.tobytes()
    return list(zip(runs[-1], mine, strict=True))


def poisoned(*shape, dtype):
    return np.full(shape, np.nan, dtype)


def sizes(grid):
    return SIZES + LARGE if grid == "usual" else [(257, 12), (129, 33), (1, 2500), (2500, 1)]


# ---------------------------------------------------------------------------------------------------- each kernel


def test_gather(device, grid, dtype, rng):
    for m, n in sizes(grid):
        bytes_, reals = rng.integers(0, 256, (50, n)).astype(np.uint8), rng.normal(size=(50, n)).astype(dtype)
        labels = rng.integers(0, 10**12, 50)
        for data, out_dtype in ((bytes_, dtype), (reals, dtype), (labels, np.dtype(np.int64))):
            shape = (m, *data.shape[1:])
            rows = rng.integers(0, 50, m)
            ((its, wanted),) = both(
                device, lambda ops, d, r, out: ops.gather(d, r, out), (data, rows), [np.full(shape, 77, out_dtype)]
            )
            np.testing.assert_array_equal(its, wanted)
            if m <= 47:
                ((its, wanted),) = both(
                    device,
                    lambda ops, d, out, m=m: ops.gather(d, slice(3, 3 + m), out),
                    (data,),
                    [np.full(shape, 77, out_dtype)],
                )
                np.testing.assert_array_equal(its, wanted)


@pytest.mark.parametrize("shift", [1, 2, 3])
def test_gather_from_where_no_wide_access_may_start(device, dtype, rng, shift):
    for data in (rng.integers(0, 256, 12 * 20 + 3).astype(np.uint8), rng.normal(size=12 * 20 + 3).astype(dtype)):
        its = on(device, data)[shift : shift + 240].reshape(20, 12)
        out = device.xp.empty((5, 12), dtype)
        rows = np.array([0, 19, 7, 7, 3])
        device.ops.gather(its, on(device, rows), out)
        wanted = np.empty((5, 12), dtype)
        numpy_ops.gather(data[shift : shift + 240].reshape(20, 12), rows, wanted)
        np.testing.assert_array_equal(to_host(out), wanted)


@pytest.mark.parametrize("f", HIDDEN.values(), ids=lambda f: f.name)
def test_activate(device, grid, dtype, rng, f):
    for m, n in sizes(grid):
        W, A, b = (3 * rng.normal(size=s).astype(dtype) for s in ((n, 2), (m, 2), (n,)))
        for bias in (b, None):
            (Z, wanted_Z), (F, wanted_F) = both(
                device,
                lambda ops, W, A, b, Z, F: ops.affine_activate(W, A, b, f, Z, F),
                (W, A, bias),
                [poisoned(m, n, dtype=dtype), poisoned(m, n, dtype=dtype)],
            )
            close(Z, wanted_Z, 10)
            close(F, wanted_F, 10)
            ((in_place, wanted),) = both(
                device,
                lambda ops, W, A, b, Z: ops.affine_activate(W, A, b, f, Z, Z),
                (W, A, bias),
                [poisoned(m, n, dtype=dtype)],
            )
            np.testing.assert_array_equal(in_place, F)
            ((affine, wanted),) = both(
                device, lambda ops, W, A, b, Z: ops.affine(W, A, b, Z), (W, A, bias), [poisoned(m, n, dtype=dtype)]
            )
            close(affine, wanted, 10)


@pytest.mark.parametrize("f", HIDDEN.values(), ids=lambda f: f.name)
def test_activate_of_special_numbers(device, dtype, f):
    """Zero of both signs, the infinities, NaN, numbers whose exponentials overflow or vanish."""
    Z = np.array([[0.0, -0.0, np.inf, -np.inf, np.nan, 200, -200, 88.7, -88.7, 1e-6, -1e-6, 20]], dtype)
    ((its, wanted),) = both(device, lambda ops, Z, A: ops.output(f, Z, A), (Z,), [poisoned(1, 12, dtype=dtype)])
    close(its, wanted)


@pytest.mark.parametrize("mask", [True, False], ids=["mask", "no mask"])
@pytest.mark.parametrize("f", HIDDEN.values(), ids=lambda f: f.name)
def test_hidden_delta(device, grid, dtype, rng, f, mask):
    for m, n in sizes(grid):
        W, Delta, Z = (rng.normal(size=s).astype(dtype) for s in ((2, n), (m, 2), (m, n)))
        A = np.empty_like(Z)
        numpy_ops.output(f, 3 * Z, A)
        kept = (3 * Z, np.full_like(A, np.nan)) if f.derivative_from == "Z" else (np.full_like(Z, np.nan), A)
        drawn = 2 * rng.integers(0, 2, (m, n)).astype(dtype) if mask else None
        results = []
        for db in ([poisoned(n, dtype=dtype)], []):
            results.append(
                both(
                    device,
                    lambda ops, W, D, Z, A, mask, out, db=None: ops.hidden_delta(W, D, f, Z, A, mask, out, db),
                    (W, Delta, *kept, drawn),
                    [poisoned(m, n, dtype=dtype), *db],
                )
            )
            for (its, wanted), scale in zip(results[-1], (10, 30 * m**0.5), strict=False):
                close(its, wanted, scale)
        np.testing.assert_array_equal(results[0][0][0], results[1][0][0])  # with db the same Delta


@pytest.mark.parametrize("targets", ["labels", "rows"])
@pytest.mark.parametrize(("cost", "g"), PAIRS, ids=lambda x: x.name)
def test_output_delta(device, dtype, rng, cost, g, targets):
    if fake_cupy.Mode.check and (cost, g) not in LOOKED_AT:
        pytest.skip("each cost and each output is looked at access by access, in another pair")
    for m, n in [(1, 1), (33, 1), (9, 33), (3, 1025)]:
        Z = (3 * rng.normal(size=(m, n))).astype(dtype)
        labels = rng.integers(0, n, m)
        rows = {"cross_entropy": rng.dirichlet(np.ones(n), m), "binary_cross_entropy": rng.random((m, n))}.get(
            cost.name, rng.normal(size=(m, n))
        )
        T = labels if targets == "labels" else rows.astype(dtype)
        for w in (0.25, rng.random(m).astype(dtype)):
            check_output_delta(device, cost, g, Z, T, w)


def check_output_delta(device, cost, g, Z, T, w):
    m, n = Z.shape
    (Delta, wanted_Delta), (C, wanted_C), (db, wanted_db) = both(
        device,
        lambda ops, Z, T, w, Delta, C, db: ops.output_delta(cost, g, Z, T, w, Delta, C, db),
        (Z, T, w),
        [poisoned(m, n, dtype=Z.dtype), poisoned(m, dtype=Z.dtype), poisoned(n, dtype=Z.dtype)],
    )
    close(Delta, wanted_Delta, 10)
    close(C, wanted_C, 3 * n)
    close(db, wanted_db, 10 * m)


@pytest.mark.parametrize("targets", ["labels", "rows"])
@pytest.mark.parametrize(("cost", "g"), [("cross_entropy", "softmax"), ("binary_cross_entropy", "sigmoid")])
def test_output_delta_of_smoothed_targets(device, small_grids, dtype, rng, cost, g, targets):
    Z, labels = (3 * rng.normal(size=(70, 7))).astype(dtype), rng.integers(0, 7, 70)
    T = labels if targets == "labels" else rng.dirichlet(np.ones(7), 70).astype(dtype)
    check_output_delta(device, COSTS[cost].smoothed(0.3), OUTPUT[g], Z, T, 0.25)


@pytest.mark.parametrize("g", ["softmax", "tanh", "gelu"])
@pytest.mark.parametrize("name", ["huber:delta=0.3", "mae", "norm", "squared_error"])
def test_output_delta_where_output_and_target_agree(device, dtype, rng, name, g):
    Z = rng.normal(size=(4, 5)).astype(dtype)
    T = np.empty_like(Z)
    numpy_ops.output(OUTPUT[g], Z, T)
    T[1:] += rng.normal(size=(3, 5)).astype(dtype)
    if g == "tanh":  # exactly, on both backends: tanh(0) is 0
        Z[0] = T[0] = 0
    else:
        Z, T = Z[1:], T[1:]
    check_output_delta(device, choose_cost(name, g), OUTPUT[g], Z, T, 1.0)


@pytest.mark.parametrize("n", [40, 1100])
def test_output_delta_of_a_norm_of_small_errors(device, dtype, rng, n):
    """Whose largest is far below 1, and whose squares vanish in float32; rows of a warp and of a block."""
    T = rng.normal(size=(3, n)).astype(dtype)
    Z = T + (1e-4 * rng.normal(size=(3, n))).astype(dtype)
    check_output_delta(device, COSTS["norm"], OUTPUT["identity"], Z, T, 1.0)
    tiny = (1e-25 * rng.normal(size=(3, n))).astype(dtype)
    check_output_delta(device, COSTS["norm"], OUTPUT["identity"], tiny, np.zeros_like(T), 1.0)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_output_delta_of_a_label_far_above_the_rest(device, dtype, smoothing):
    """The other outputs lie so far below that the difference is infinite; without smoothing they do not count."""
    far = 0.9 * float(np.finfo(dtype).max)
    Z = np.array([[far, -far, 0.0], [0.0, -np.inf, 1.0]], dtype)
    (Delta, wanted), (C, wanted_C) = both(
        device,
        lambda ops, Z, T, Delta, C: ops.output_delta(
            COSTS["cross_entropy"].smoothed(smoothing), OUTPUT["softmax"], Z, T, 1.0, Delta, C
        ),
        (Z, np.array([0, 2])),
        [poisoned(2, 3, dtype=dtype), poisoned(2, dtype=dtype)],
    )
    close(Delta, wanted)
    np.testing.assert_array_equal(np.isfinite(C), np.isfinite(wanted_C))
    assert np.isfinite(C).all() == (not smoothing)


def test_output_delta_of_extreme_outputs(device, dtype):
    """Costs and Deltas stay finite, and a NaN or an infinity in Z is seen in C."""
    Z = np.array([[1e4, -1e4, 0], [-1e4, -1e4, -1e4], [88.8, -88.8, 0.1], [np.nan, 0, 0], [0, np.inf, 0]], dtype)
    for cost, g, T in (
        ("cross_entropy", "softmax", np.array([1, 0, 2, 1, 1])),
        ("binary_cross_entropy", "sigmoid", np.array([[0, 1, 0]] * 5, dtype)),
    ):
        (Delta, wanted), (C, wanted_C) = both(
            device,
            lambda ops, Z, T, Delta, C, c=COSTS[cost], g=OUTPUT[g]: ops.output_delta(c, g, Z, T, 1.0, Delta, C),
            (Z, T),
            [poisoned(5, 3, dtype=dtype), poisoned(5, dtype=dtype)],
        )
        close(Delta[:3], wanted[:3])
        close(C[:3], wanted_C[:3])
        np.testing.assert_array_equal(np.isfinite(C), np.isfinite(wanted_C))


def test_column_sums(device, grid, dtype, rng):
    """Of a layer without derivative, whose Delta is the product itself."""
    for m, n in [*sizes(grid), (700, 132), (40, 8192 * 4)]:
        W, Delta = (rng.normal(size=s).astype(dtype) for s in ((1, n), (m, 1)))
        (its, wanted), (db, wanted_db) = both(
            device,
            lambda ops, W, D, out, db: ops.hidden_delta(W, D, OUTPUT["identity"], None, out, None, out, db),
            (W, Delta),
            [poisoned(m, n, dtype=dtype), poisoned(n, dtype=dtype)],
        )
        close(its, wanted)
        close(db, wanted_db, 3 * m**0.5)


def test_softmax(device, grid, dtype, rng):
    for m, n in [*sizes(grid), (3, 1025)]:
        Z = (5 * rng.normal(size=(m, n))).astype(dtype)
        ((its, wanted),) = both(
            device, lambda ops, Z, A: ops.output(OUTPUT["softmax"], Z, A), (Z,), [poisoned(m, n, dtype=dtype)]
        )
        close(its, wanted)


@pytest.mark.parametrize("task", ["labels", "rows", "multilabel", "binary", "regression"])
def test_measure(device, grid, dtype, rng, task):
    for m, n in sizes(grid):
        n = 1 if task == "binary" else n
        Z = rng.integers(-2, 3, (m, n)).astype(dtype)  # many ties and zeros
        T = rng.integers(0, n, m) if task == "labels" else rng.integers(0, 5, (m, n)).astype(dtype) / 4
        if task == "multilabel":  # all right but for one output of every third row
            T = (Z > 0).astype(dtype)
            T[::3, rng.integers(0, n)] = 0.75
            T[1::3, rng.integers(0, n)] = 0.5
        C = rng.normal(size=m).astype(dtype)
        for w in (rng.random(m).astype(dtype), None):
            ((its, wanted),) = both(
                device,
                lambda ops, Z, T, C, w, out: ops.measure(
                    "labels" if task == "rows" else task, OUTPUT["identity"], Z, T, C, w, out
                ),
                (Z, T, C, w),
                [np.full(2, 0.0 if task == "regression" else 77.0)],
            )
            np.testing.assert_allclose(its[0], wanted[0], rtol=1e-12, atol=1e-10)
            assert its[1] == wanted[1]


def test_measure_takes_a_nan_for_the_largest_as_numpy_does(device, dtype):
    nan = np.nan
    Z = np.array([[0, nan, 1], [nan, nan, 2], [-np.inf] * 3, [1, 2, nan]], dtype)
    for T in itertools.product(range(3), repeat=4):
        ((its, wanted),) = both(
            device,
            lambda ops, Z, T, C, out: ops.measure("labels", OUTPUT["identity"], Z, T, C, None, out),
            (Z, np.array(T), np.zeros(4, dtype)),
            [np.zeros(2)],
        )
        assert its.tolist() == wanted.tolist()


@pytest.mark.parametrize("name", ["gelu", "softmax"])
def test_measure_by_outputs_where_they_order_otherwise(device, dtype, rng, name):
    Z = (2 * rng.normal(size=(70, 5))).astype(dtype)
    T = rng.integers(0, 5, 70)
    ((its, wanted),) = both(
        device,
        lambda ops, Z, T, C, out: ops.measure("labels", OUTPUT[name], Z, T, C, None, out),
        (Z, T, np.zeros(70, dtype)),
        [np.zeros(2)],
    )
    assert its.tolist() == wanted.tolist()


def test_dropout(device, grid, dtype, rng):
    for m, n in sizes(grid):
        for rate, draw, layer in ((0.5, (0, 1), 1), (0.3, (2**64 - 1, 2**40 + 5), 2), (0.0, (7, 3), 1)):
            F = rng.normal(size=(m, n)).astype(dtype)
            (mask, wanted_mask), (A, wanted_A) = both(
                device,
                lambda ops, F, mask, A, rate=rate, draw=draw, layer=layer: ops.drop(F, rate, draw, layer, mask, A),
                (F,),
                [poisoned(m, n, dtype=dtype), poisoned(m, n, dtype=dtype)],
            )
            np.testing.assert_array_equal(mask, wanted_mask)
            np.testing.assert_array_equal(A, wanted_A)


@pytest.mark.parametrize("n", [1, 31, 33, 127, 257, 3000, 10007])
def test_regularize(device, grid, dtype, rng, n):
    theta, g = (rng.normal(size=n).astype(dtype) for _ in range(2))
    theta[::3] = 0
    is_weight = rng.integers(0, 2, n).astype(dtype)
    for settings in (
        {"l1": 0.1}, {"l1": 1.0}, {"l2": 0.1}, {"clip_value": 0.5}, {"clip_norm": 0.1}, {"clip_norm": 1e6},
        {"l1": 0.1, "l2": 0.2, "clip_value": 0.7, "clip_norm": 2.0},
    ):  # fmt: skip
        r = Regularization(**settings)
        ((its, wanted),) = both(
            device,
            lambda ops, theta, is_weight, g, r=r: ops.regularize(r, theta, is_weight, g),
            (theta, is_weight),
            [g],
        )
        close(its, wanted, 0.1)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    "settings", [{"clip_value": 0.5}, {"clip_norm": 0.1}, {"clip_value": 1.0, "clip_norm": 1.0}], ids=repr
)
@pytest.mark.parametrize("n", [2, 100])
def test_regularize_hides_nothing(device, dtype, rng, settings, bad, n):
    theta, g, is_weight = rng.normal(size=n).astype(dtype), rng.normal(size=n).astype(dtype), np.ones(n, dtype)
    g[n // 2] = bad
    ((its, _),) = both(
        device,
        lambda ops, theta, w, g: ops.regularize(Regularization(**settings), theta, w, g),
        (theta, is_weight),
        [g],
    )
    assert not np.isfinite(its).all()


@pytest.mark.parametrize("n", [1, 31, 257, 3000, 10007])
def test_share(device, dtype, rng, n):
    for w in (rng.random(n).astype(dtype), np.zeros(n, dtype)):
        ((its, wanted),) = both(device, lambda ops, w, out: ops.share(w, out), (w,), [poisoned(n, dtype=dtype)])
        close(its, wanted, 1 / n)
        in_place = on(device, w)
        device.ops.share(in_place, in_place)
        np.testing.assert_array_equal(to_host(in_place), its)


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_update(device, grid, dtype, rng, rule):
    for n in (1, 31, 64, 257, 3000) if grid == "usual" else (3000, 5001):
        theta, *slots = (rng.normal(size=n).astype(dtype) for _ in range(1 + rule.slots))
        slots = [abs(s) for s in slots]
        if getattr(rule, "centered", False):
            slots[0] += slots[1] ** 2 + 1  # v - a^2 does not cancel
        gs = rng.normal(size=(3, n)).astype(dtype)
        gs[0, ::5] = 0

        def steps(ops, theta, *slots, xp=None, asarray=np.asarray, gs=gs):
            rows = ops.step_rows(rule, [rule.lr, 0.5 * rule.lr, 0.0], 2)
            diverged, measured = xp.zeros(1, np.int64), xp.zeros(2)
            for g, row in zip(gs, rows, strict=True):
                assert ops.update(rule, theta, asarray(g), slots, row, measured, diverged)
            assert int(diverged[0]) == 0

        mine, its = [theta.copy(), *(s.copy() for s in slots)], [on(device, theta), *(on(device, s) for s in slots)]
        steps(numpy_ops, *mine, xp=np)
        steps(device.ops, *its, xp=device.xp, asarray=device.asarray)
        for d, h in zip(its, mine, strict=True):
            close(d, h)


@pytest.mark.parametrize("shift", [1, 2, 3])
@pytest.mark.parametrize("both_shifted", [True, False])
def test_update_where_no_wide_access_may_start(device, dtype, rng, shift, both_shifted):
    theta, g = rng.normal(size=103).astype(dtype), rng.normal(size=103).astype(dtype)
    its, its_g = on(device, theta), on(device, g)
    part, row = slice(shift, shift + 100), device.ops.step_rows(SGD(0.1), [0.1], 1)[0]
    part_g = part if both_shifted else slice(100)
    measured, diverged = device.xp.zeros(2), device.xp.zeros(1, np.int64)
    device.ops.update(SGD(0.1), its[part], its_g[part_g], (), row, measured, diverged)
    theta[part] -= dtype.type(0.1) * g[part_g]
    close(its, theta)


@pytest.mark.parametrize("shift", [1, 2, 3])
def test_dropout_where_no_wide_access_may_start(device, dtype, rng, shift):
    F = rng.normal(size=103).astype(dtype)
    mask, A = np.zeros(100, dtype), np.zeros(100, dtype)
    numpy_ops.drop(F[shift : shift + 100], 0.5, (5, 6), 1, mask, A)
    its_F, its_mask, its_A = (on(device, np.zeros(103, dtype) + x) for x in (F, 0, 0))
    part = slice(shift, shift + 100)
    device.ops.drop(its_F[part], 0.5, (5, 6), 1, its_mask[part], its_A[part])
    np.testing.assert_array_equal(to_host(its_mask)[part], mask)
    np.testing.assert_array_equal(to_host(its_A)[part], A)
    assert not to_host(its_A)[shift + 100 :].any()


def test_update_counts_a_negative_variance_as_zero(device, dtype):
    """RMSProp, centered: where v - a^2 is below 0 the step is lr g / eps."""
    rule = RMSProp(0.01, alpha=0.9, centered=True, eps=0.5)
    theta, g, v, a = (np.full(9, x, dtype) for x in (1.0, 1e-3, 0.0, 1.0))
    its = [on(device, x) for x in (theta, v, a)]
    measured, diverged = device.xp.zeros(2), device.xp.zeros(1, np.int64)
    device.ops.update(
        rule, its[0], on(device, g), its[1:], device.ops.step_rows(rule, [0.01], 1)[0], measured, diverged
    )
    close(its[0], theta - dtype.type(0.01 * 1e-3 / 0.5))


@pytest.mark.parametrize("at", [0, 1, 2, 3, 2500, 4999])
@pytest.mark.parametrize(
    ("rule", "lr", "theta", "g", "slot"),
    [
        (SGD(1.0), 1e21, 1.0, 1e18, None),
        (SGD(1.0), 1e21, 1.0, -1e18, None),
        (SGD(1.0, weight_decay=1e10), 1.0, 1e30, 1.0, None),
        (SGD(1.0, weight_decay=1e10), 1.0, -1e30, 1.0, None),
        (AdaGrad(1e-10), 1e-10, 1.0, 1e18, 3.4e38),
    ],
    ids=["step", "step back", "decay", "decay back", "slot"],
)
def test_update_finds_the_one_element_that_would_leave_the_finite_numbers(device, rng, rule, lr, theta, g, slot, at):
    vectors = {name: np.full(5000, x, np.float32) for name, x in (("theta", 1), ("g", 1e-3), ("slot", 0))}
    vectors["theta"][at], vectors["g"][at] = theta, g
    if slot:
        vectors["slot"][at] = slot
    its = {name: on(device, v) for name, v in vectors.items()}
    slots, diverged = (its["slot"],) * rule.slots, device.xp.zeros(1, np.int64)
    with np.errstate(all="ignore"):
        row = device.ops.step_rows(rule, [lr], 9)[0]
        device.ops.update(rule, its["theta"], its["g"], slots, row, device.xp.zeros(2), diverged)
    assert int(diverged[0]) == 9
    for name, v in vectors.items():
        np.testing.assert_array_equal(to_host(its[name]), v)


@pytest.mark.parametrize("rule", RULES[:11], ids=list(OPTIMIZERS))
@pytest.mark.parametrize("bad", ["cost", "infinite cost", "gradient", "overflow", "outcome"])
def test_update_takes_a_step_everywhere_or_nowhere(device, small_grids, rng, rule, bad):
    """The bad element is in the last block alone; every block must know. The step is latched, later ones rest."""
    n, lr = 5000, rule.lr
    theta, *slots = (abs(rng.normal(size=n)).astype(np.float32) for _ in range(1 + rule.slots))
    g, measured = rng.normal(size=n).astype(np.float32), np.array([1.0, 0.0])
    if "cost" in bad:
        measured[0] = np.inf if bad == "infinite cost" else np.nan
    elif bad == "gradient":
        g[-1] = np.inf
    elif bad == "overflow":
        g[-1] = 1e20  # its square leaves float32
    else:
        lr = 1e39
    its = [on(device, a) for a in (theta, *slots)]
    diverged = device.xp.zeros(1, np.int64)
    rows = device.ops.step_rows(rule, [lr, rule.lr], 4)
    with np.errstate(all="ignore"):
        device.ops.update(rule, its[0], on(device, g), tuple(its[1:]), rows[0], on(device, measured), diverged)
        assert int(diverged[0]) == 4
        fine = on(device, np.ones(n, np.float32)), on(device, np.zeros(2))
        device.ops.update(rule, its[0], fine[0], tuple(its[1:]), rows[1], fine[1], diverged)
    assert int(diverged[0]) == 4
    for d, h in zip(its, (theta, *slots), strict=True):
        np.testing.assert_array_equal(to_host(d), h)


def test_probe(device):
    """The kernel that says whether a machine runs kernels at all: the backend is there because it gave 7."""
    assert device.name == "cupy"


# ---------------------------------------------------------------------------------------------------- all of them


def test_an_expression_of_ones_own_is_a_function_of_the_table(device, grid, dtype, rng):
    """mish, with its derivative from Z; and softsign, from A."""
    mish = Activation.of(
        "mish",
        lambda xp, Z: Z * xp.tanh(xp.log1p(xp.exp(Z))),
        lambda xp, Z: xp.tanh(xp.log1p(xp.exp(Z))) + Z * (1 - xp.tanh(xp.log1p(xp.exp(Z))) ** 2) / (1 + xp.exp(-Z)),
        cuda=(
            "z * tanh(log1p(exp(z)))",
            """tanh(log1p(exp(z)))
               + z * (1 - tanh(log1p(exp(z))) * tanh(log1p(exp(z)))) / (1 + exp(-z))""",
        ),
    )
    softsign = Activation.of(
        "softsign",
        lambda xp, Z: Z / (1 + abs(Z)),
        lambda xp, A: (1 - abs(A)) ** 2,
        derivative_from="A",
        cuda=("z / (1 + fabs(z))", "(1 - fabs(a)) * (1 - fabs(a))"),
    )
    for f in (mish, softsign):
        Z, W, Delta, T = (rng.normal(size=s).astype(dtype) for s in ((33, 12), (2, 12), (33, 2), (33, 12)))
        A = np.empty_like(Z)
        numpy_ops.output(f, Z, A)
        ((its, wanted),) = both(
            device, lambda ops, Z, A, f=f: ops.output(f, Z, A), (Z,), [poisoned(33, 12, dtype=dtype)]
        )
        close(its, wanted)
        for its, wanted in both(
            device,
            lambda ops, W, D, Z, A, out, db, f=f: ops.hidden_delta(W, D, f, Z, A, None, out, db),
            (W, Delta, Z, A),
            [poisoned(33, 12, dtype=dtype), poisoned(12, dtype=dtype)],
        ):
            close(its, wanted, 30)
        check_output_delta(device, COSTS["squared_error"], f, Z, T, 1.0)


def test_a_cost_of_ones_own_is_one_of_the_table(device, dtype, rng):
    log_cosh = bp.Cost.of(
        "log_cosh",
        lambda xp, Y, T: xp.log(xp.cosh(Y - T)).sum(axis=1),
        lambda xp, Y, T: xp.tanh(Y - T),
        cuda=("log(cosh(y - t))", "tanh(y - t)"),
    )
    Z, T, labels = rng.normal(size=(33, 12)), rng.normal(size=(33, 12)), rng.integers(0, 12, 33)
    for g in ("softmax", "sigmoid", "gelu"):
        check_output_delta(device, log_cosh, OUTPUT[g], Z.astype(dtype), T.astype(dtype), 1.0)
        check_output_delta(device, log_cosh, OUTPUT[g], Z.astype(dtype), labels, 1.0)
    before = fake_cupy.Counts.allocations
    Zd, Td, Delta, C = on(device, Z), on(device, T), device.xp.empty((33, 12)), device.xp.empty(33)
    device.ops.output_delta(log_cosh, OUTPUT["tanh"], Zd, Td, 1.0, Delta, C)
    assert fake_cupy.Counts.allocations <= before + 4  # those four: the kernel ran, not the array code


def test_expressions_that_do_not_compile_are_told(device):
    f = Activation.of("\N{GREEK SMALL LETTER SIGMA}", lambda xp, Z: Z, lambda xp, Z: Z, cuda=("z + nonsense", "1"))
    Z = device.zeros(4, np.float32).reshape(2, 2)
    with pytest.raises(bp.ConfigError, match=r"CUDA expressions of your own do not compile: .*nonsense") as e:
        device.ops.output(f, Z, Z)
    assert e.value.cure == "mend z + nonsense and 1"


@pytest.mark.parametrize("cuda", ["z", ("z",), ("z", ""), ("z", 1), 3])
def test_cuda_must_be_two_expressions(cuda):
    with pytest.raises(bp.ConfigError, match="cuda is"):
        Activation.of("own", lambda xp, Z: Z, lambda xp, Z: Z, cuda=cuda)
    with pytest.raises(bp.ConfigError, match="cuda is"):
        bp.Cost.of("own", lambda xp, Y, T: Y, lambda xp, Y, T: Y, cuda=cuda)


def test_launches_are_guarded(device, dtype):
    """CuPy would run a kernel on anything: other dtypes and strides, numbers of arguments, host arrays."""
    ops, xp = device.ops, device.xp
    M = xp.zeros((4, 4), dtype)
    C, labels = xp.zeros(4, dtype), xp.zeros(4, np.int64)
    for wrong in (M.T[:2], M[:, :2]):
        with pytest.raises(TypeError, match="w must be a C-contiguous device array"):
            ops.share(wrong, wrong)
    with pytest.raises(TypeError, match="scores must be a C-contiguous device array"):
        ops.measure("labels", OUTPUT["softmax"], M.T, labels, C, None, xp.zeros(2))
    with pytest.raises(TypeError, match="labels must be a C-contiguous device array of int64"):
        ops.measure("labels", OUTPUT["softmax"], M, xp.zeros(4, np.int32), C, None, xp.zeros(2))
    with pytest.raises(TypeError, match="out must be a C-contiguous device array of float64"):
        ops.measure("labels", OUTPUT["softmax"], M, labels, C, None, np.zeros(2))
    with pytest.raises(ValueError, match="shape"):
        ops.measure("labels", OUTPUT["softmax"], M, labels, C[:3], None, xp.zeros(2))
    with pytest.raises(ValueError, match="shape"):
        ops.drop(M, 0.5, (0, 1), 1, M[:3], M)
    with pytest.raises(ValueError, match="shape"):
        ops.output_delta(COSTS["mae"], OUTPUT["tanh"], M, M[:3], 1.0, M, C)
    with pytest.raises(ValueError, match="shape"):
        ops.gather(M, labels[:3], M)
    with pytest.raises(TypeError, match="takes 3 arguments, not 2"):
        ops.launch(ops.kernel_of("share.cu", "share", dtype), (1,), (32,), C, C)


# --------------------------------------------------------------------------------------------- copies in bf16


EVERY_KIND = [0, -0.0, 1, 1 + 2**-8, 1 + 2**-7, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -3.3, 3.4e38, np.inf, -np.inf, 1e-38]
PADDED = [(1, 1, 8), (5, 8, 8), (7, 12, 16), (33, 31, 32), (300, 20, 24), (3, 1032, 1032)]  # m, n, ld


def bf16(a):
    return fake_cublaslt.to_bf16(np.asarray(a, np.float32))


def padded(a, ld):
    """In rows of ld numbers, of which those behind the row stay as they were."""
    whole = np.full((len(a), ld), 0xABCD, np.uint16)
    whole[:, : a.shape[1]] = bf16(a)
    return whole


def test_rows_rounded_to_bf16(device, dtype, rng):
    kernel = device.ops.kernel_of("round.cu", "round_rows", dtype)
    for m, n, ld in PADDED:
        a = rng.normal(size=(m, n)).astype(dtype)
        a.reshape(-1)[: len(EVERY_KIND)] = np.resize(EVERY_KIND, min(a.size, len(EVERY_KIND)))
        for start in (0, 1):  # aligned, and not
            to = device.asarray(np.full(m * ld + 8, 0xABCD, np.uint16))
            its = device.asarray(np.concatenate([np.zeros(start), a.reshape(-1)]).astype(dtype))[start:]
            device.ops.launch(kernel, (2,), (256,), its, to[: m * ld], m, n, ld)
            np.testing.assert_array_equal(to_host(to)[: m * ld].reshape(m, ld), padded(a, ld))
            assert (to_host(to)[m * ld :] == 0xABCD).all()


def test_a_nan_rounded_to_bf16_is_one(device):
    nans = np.array([np.nan, -np.nan] * 4, np.float32)
    nans.view(np.uint32)[:2] = 0x7F800001, 0xFFFFFFFF
    to = device.asarray(np.zeros(8, np.uint16))
    kernel = device.ops.kernel_of("round.cu", "round_rows", np.dtype(np.float32))
    device.ops.launch(kernel, (1,), (256,), device.asarray(nans), to, 1, 8, 8)
    assert np.isnan(fake_cublaslt.from_bf16(to_host(to))).all()


def test_hidden_delta_left_in_bf16(device, grid, dtype, rng):
    """Delta in bf16 alone, the sums as ever."""
    ops = device.ops
    for m, n, ld in PADDED:
        product, K = (rng.normal(size=(m, n)).astype(dtype) for _ in range(2))
        mask = abs(rng.normal(size=(m, n))).astype(dtype)
        wanted = mask * product * (K > 0)
        kernel = ops.kernel_of("hidden_delta.cu", "hidden_delta", dtype, **cuda_source.activation(HIDDEN["relu"]))
        Delta, db = on(device, product), on(device, np.zeros(n, dtype))
        rounded = device.asarray(np.full((m, ld), 0xABCD, np.uint16))
        ops._in_strips(kernel, Delta, db, (on(device, K), on(device, mask)), (rounded, ld))
        np.testing.assert_array_equal(to_host(rounded), padded(wanted, ld))
        np.testing.assert_array_equal(to_host(Delta), product)
        close(db, wanted.sum(axis=0), m)


@pytest.mark.parametrize("rule", [SGD(0.1), Adam(0.01)], ids=repr)
def test_the_update_rounds_weights(device, grid, dtype, rng, rule):
    """W of two layers among other numbers: (rows, columns, row of the copy); the rest has no copy."""
    layers, gap = [(5, 12, 16), (8, 9, 16), (3, 16, 16), (1, 31, 32)], 16
    theta, table, copies, places = [], [], 0, []
    for rows, n, ld in layers:
        at = sum(a.size for a in theta)
        table.append((at, rows * n, n, copies, ld))
        places.append((at, copies))
        theta += [rng.normal(size=rows * n), np.zeros(-rows * n % 16), rng.normal(size=gap)]
        copies += rows * ld
    whole = np.concatenate(theta).astype(dtype)
    g = rng.normal(size=whole.size).astype(dtype)
    slots = tuple(on(device, np.zeros_like(whole)) for _ in range(rule.slots))
    its, rounded = on(device, whole), device.asarray(np.full(copies, 0xABCD, np.uint16))
    row = device.ops.step_rows(rule, [0.1], 1)[0]
    measured, diverged = device.zeros(2, np.dtype(np.float64)), device.asarray(np.zeros(1, np.int64))
    both_of = device.asarray(np.array(table, np.int64)), rounded
    device.ops.update_step(rule, its, on(device, g), slots, row, measured, diverged, copies=both_of)
    after, left = to_host(its), to_host(rounded)
    assert (after != whole).any()
    for (rows, n, ld), (at, copy) in zip(layers, places, strict=True):
        W = after[at : at + rows * n].reshape(rows, n)
        np.testing.assert_array_equal(left[copy : copy + rows * ld].reshape(rows, ld), padded(W, ld))


def test_the_same_bits_in_any_order(rng):
    """Sums have a fixed order, whatever the order in which threads, warps and blocks run."""
    Z, labels, C = rng.normal(size=(700, 40)).astype(np.float32), rng.integers(0, 40, 700), rng.normal(size=700)
    theta, g = rng.normal(size=20000).astype(np.float32), rng.normal(size=20000).astype(np.float32)
    results = []
    for seed in range(4):
        with fake_cupy.installed(seed=seed):
            be = backends.choose("cupy")
            Delta, costs, db = (
                be.xp.empty((700, 40), np.float32),
                be.xp.empty(700, np.float32),
                be.xp.empty(40, np.float32),
            )
            be.ops.output_delta(
                COSTS["cross_entropy"], OUTPUT["softmax"], on(be, Z), on(be, labels), 0.1, Delta, costs, db
            )
            out, shares, d_theta, d_g = be.zeros(2, np.float64), be.xp.empty(700, np.float32), on(be, theta), on(be, g)
            be.ops.measure(
                "labels", OUTPUT["softmax"], on(be, Z), on(be, labels), costs, on(be, abs(C).astype(np.float32)), out
            )
            be.ops.share(on(be, abs(C).astype(np.float32)), shares)
            be.ops.regularize(Regularization(clip_norm=0.1), d_theta, d_theta, d_g)
            results.append([to_host(a).tobytes() for a in (Delta, costs, db, out, shares, d_g)])
    assert results[1:] == results[:1] * 3


def test_every_kernel_has_an_execution_test(request):
    """When all of this file has run before this last test, every kernel of an operation alone has been compared."""
    if not all_ran(request, {name for name in globals() if name.startswith("test_")}):
        pytest.skip("only part of this file ran in this process")
    written = {
        name for file in kernel_variants.ALONE for name in cuda_source.signatures(cuda_source.text(file, REAL="float"))
    }
    written = {name for name in written if not name.startswith("step_")}  # those are test_step_kernels.py's
    assert written - fake_cupy.Counts.kernels == set()
