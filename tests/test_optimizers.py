"""Steps of each optimizer against the rule written out for one number, and hyper-parameters that make no sense."""

import copy
import dataclasses
import itertools
import math
import os
import pickle
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import backprop_gpu as bp
from backprop_gpu import numpy_ops
from backprop_gpu.backend import to_host
from backprop_gpu.optimizers import (
    OPTIMIZERS,
    SGD,
    AdaDelta,
    AdaGrad,
    Adam,
    AdamW,
    Lion,
    NAdam,
    Optimizer,
    RMSProp,
    choose_optimizer,
)


def rates(lr, grads):
    return lr if isinstance(lr, list) else [lr] * len(grads)


def sgd(theta, grads, lr, momentum=0.0, nesterov=False, weight_decay=0.0):
    v = 0.0
    for g, rate in zip(grads, rates(lr, grads), strict=True):
        g = g + weight_decay * theta
        v = momentum * v + g
        theta = theta - rate * (g + momentum * v if nesterov else v)
    return theta


def adam(theta, grads, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, amsgrad=False, weight_decay=0.0, decoupled=False):
    m = v = v_max = 0.0
    for t, (g, rate) in enumerate(zip(grads, rates(lr, grads), strict=True), 1):
        if decoupled:
            theta = theta - rate * weight_decay * theta
        else:
            g = g + weight_decay * theta
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g * g
        v_max = max(v_max, v) if amsgrad else v
        m_hat, v_hat = m / (1 - betas[0] ** t), v_max / (1 - betas[1] ** t)
        theta = theta - rate * m_hat / (math.sqrt(v_hat) + eps)
    return theta


def adagrad(theta, grads, lr=1e-2, lr_decay=0.0, weight_decay=0.0, eps=1e-10):
    total = 0.0
    for t, (g, rate) in enumerate(zip(grads, rates(lr, grads), strict=True)):
        g = g + weight_decay * theta
        total = total + g**2
        theta = theta - rate / (1 + t * lr_decay) * g / (math.sqrt(total) + eps)
    return theta


def rmsprop(theta, grads, lr=1e-2, alpha=0.99, eps=1e-8, weight_decay=0.0, momentum=0.0, centered=False):
    v = mean = b = 0.0
    for g, rate in zip(grads, rates(lr, grads), strict=True):
        g = g + weight_decay * theta
        v = alpha * v + (1 - alpha) * g**2
        mean = alpha * mean + (1 - alpha) * g
        b = momentum * b + g / (math.sqrt(v - mean**2 if centered else v) + eps)
        theta = theta - rate * b
    return theta


def adadelta(theta, grads, lr=1.0, rho=0.9, eps=1e-6, weight_decay=0.0):
    v = d = 0.0
    for g, rate in zip(grads, rates(lr, grads), strict=True):
        g = g + weight_decay * theta
        v = rho * v + (1 - rho) * g**2
        delta = math.sqrt(d + eps) / math.sqrt(v + eps) * g
        d = rho * d + (1 - rho) * delta**2
        theta = theta - rate * delta
    return theta


def nadam(theta, grads, lr=2e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, momentum_decay=4e-3):
    def mu(t):
        return betas[0] * (1 - 0.5 * 0.96 ** (t * momentum_decay))

    m = v = 0.0
    for t, (g, rate) in enumerate(zip(grads, rates(lr, grads), strict=True), 1):
        g = g + weight_decay * theta
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g**2
        so_far = math.prod(mu(i) for i in range(1, t + 1))
        m_hat = mu(t + 1) * m / (1 - so_far * mu(t + 1)) + (1 - mu(t)) * g / (1 - so_far)
        theta = theta - rate * m_hat / (math.sqrt(v / (1 - betas[1] ** t)) + eps)
    return theta


def lion(theta, grads, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0):
    m = 0.0
    for g, rate in zip(grads, rates(lr, grads), strict=True):
        c = betas[0] * m + (1 - betas[0]) * g
        theta = theta - rate * ((c > 0) - (c < 0) + weight_decay * theta)
        m = betas[1] * m + (1 - betas[1]) * g
    return theta


RULES = [
    (SGD(0.1), sgd, {"lr": 0.1}),
    (SGD(0.1, weight_decay=0.3), sgd, {"lr": 0.1, "weight_decay": 0.3}),
    (SGD(0.1, momentum=0.9), sgd, {"lr": 0.1, "momentum": 0.9}),
    (SGD(0.1, momentum=0.9, nesterov=True), sgd, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    (
        SGD(0.1, momentum=0.8, nesterov=True, weight_decay=0.2),
        sgd,
        {"lr": 0.1, "momentum": 0.8, "nesterov": True, "weight_decay": 0.2},
    ),
    (Adam(), adam, {}),
    (Adam(0.1, betas=(0.5, 0.9), eps=0.1), adam, {"lr": 0.1, "betas": (0.5, 0.9), "eps": 0.1}),
    (Adam(0.1, amsgrad=True), adam, {"lr": 0.1, "amsgrad": True}),
    (Adam(0.1, weight_decay=0.2), adam, {"lr": 0.1, "weight_decay": 0.2}),
    (AdamW(), adam, {"weight_decay": 1e-2, "decoupled": True}),
    (
        AdamW(0.1, weight_decay=0.5, amsgrad=True),
        adam,
        {"lr": 0.1, "weight_decay": 0.5, "amsgrad": True, "decoupled": True},
    ),
]
RULES += [
    (rule(**arguments), literal, arguments)
    for rule, literal, arguments in [
        (AdaGrad, adagrad, {}),
        (AdaGrad, adagrad, {"lr": 0.2, "lr_decay": 0.3, "weight_decay": 0.4, "eps": 0.1}),
        (RMSProp, rmsprop, {}),
        (RMSProp, rmsprop, {"lr": 0.1, "alpha": 0.6, "eps": 0.1, "weight_decay": 0.4}),
        (RMSProp, rmsprop, {"lr": 0.1, "momentum": 0.8}),
        (RMSProp, rmsprop, {"lr": 0.1, "alpha": 0.9, "centered": True, "eps": 1e-3}),
        (
            RMSProp,
            rmsprop,
            {"lr": 0.1, "alpha": 0.8, "momentum": 0.8, "centered": True, "weight_decay": 0.4, "eps": 0.01},
        ),
        (AdaDelta, adadelta, {}),
        (AdaDelta, adadelta, {"lr": 3.0, "rho": 0.7, "eps": 0.01, "weight_decay": 0.4}),
        (NAdam, nadam, {}),
        (
            NAdam,
            nadam,
            {"lr": 0.1, "betas": (0.5, 0.9), "eps": 0.1, "weight_decay": 0.4, "momentum_decay": 0.5},
        ),
        (Lion, lion, {}),
        (Lion, lion, {"lr": 0.1, "betas": (0.3, 0.8), "weight_decay": 0.4}),
    ]
]


def show(x):
    return repr(x) if isinstance(x, Optimizer) else ""


@pytest.mark.parametrize(("rule", "literal", "settings"), RULES, ids=show)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_ten_steps(backend, rng, rule, literal, settings, dtype):
    n, steps = 17, 10
    start = rng.normal(size=n).astype(dtype)
    grads = rng.normal(size=(steps, n)).astype(dtype) * np.linspace(2, 0.1, steps, dtype=dtype)[:, None]
    theta = backend.asarray(start.copy())
    slots = tuple(backend.zeros(n, np.dtype(dtype)) for _ in range(rule.slots))
    measured, diverged = backend.xp.zeros(2), backend.xp.zeros(1, np.int64)
    for t, g in enumerate(grads, 1):
        kept = backend.asarray(g.copy())
        backend.ops.update(rule, theta, kept, slots, backend.ops.step_rows(rule, [rule.lr], t)[0], measured, diverged)
        np.testing.assert_array_equal(to_host(kept), g)
    wanted = [literal(float(p), grads[:, i].astype(float).tolist(), **settings) for i, p in enumerate(start)]
    np.testing.assert_allclose(
        to_host(theta), wanted, rtol=1e-12 if dtype == np.float64 else 1e-5, atol=1e-12 if dtype == np.float64 else 1e-6
    )


@pytest.mark.parametrize(("rule", "literal", "settings"), RULES, ids=show)
def test_a_learning_rate_that_varies_from_step_to_step_and_starts_at_zero(backend, rng, rule, literal, settings):
    """Warm-up from 0, as a schedule gives it: the rate that counts is the step's, in the decay too."""
    n, lrs = 9, [0.0, 0.05, 0.2, 0.1]
    start, grads = rng.normal(size=n), rng.normal(size=(len(lrs), n))
    theta, slots = backend.asarray(start.copy()), tuple(backend.zeros(n, np.dtype(float)) for _ in range(rule.slots))
    for t, (g, lr) in enumerate(zip(grads, lrs, strict=True), 1):
        backend.ops.update(
            rule,
            theta,
            backend.asarray(g),
            slots,
            backend.ops.step_rows(rule, [lr], t)[0],
            backend.xp.zeros(2),
            backend.xp.zeros(1, int),
        )
    wanted = [literal(float(p), grads[:, i].tolist(), **{**settings, "lr": lrs}) for i, p in enumerate(start)]
    np.testing.assert_allclose(to_host(theta), wanted, rtol=1e-12)


def run(backend, rule, start, grads, lr=None):
    """theta on the host after `rule` has seen the gradients."""
    theta = backend.asarray(start.copy())
    slots = tuple(backend.zeros(len(start), start.dtype) for _ in range(rule.slots))
    measured, diverged = backend.xp.zeros(2), backend.xp.zeros(1, np.int64)
    for t, g in enumerate(grads, 1):
        backend.ops.update(
            rule,
            theta,
            backend.asarray(g),
            slots,
            backend.ops.step_rows(rule, [lr or rule.lr], t)[0],
            measured,
            diverged,
        )
    return to_host(theta)


share = st.floats(0, 0.99)
decays = {"weight_decay": st.just(0.0) | st.floats(0, 1)}
small = {"eps": st.floats(-8, -1).map(lambda x: 10**x)}
rate = {"lr": st.floats(-4, -1).map(lambda x: 10**x)}
betas = {"betas": st.tuples(share, st.floats(0.5, 0.999))}
ANY = {
    "sgd": (SGD, sgd, {**rate, **decays, "momentum": st.floats(0.01, 0.99), "nesterov": st.booleans()}),
    "adam": (Adam, adam, {**rate, **decays, **small, **betas, "amsgrad": st.booleans()}),
    "adagrad": (AdaGrad, adagrad, {**rate, **decays, **small, "lr_decay": st.floats(0, 2)}),
    "rmsprop": (RMSProp, rmsprop, {**rate, **decays, **small, "alpha": share, "momentum": st.just(0.0) | share}),
    # v - a^2 loses digits where it is small: eps is not, and alpha is such that the gradients do differ.
    "rmsprop centered": (
        RMSProp,
        rmsprop,
        {**rate, **decays, "eps": st.floats(0.01, 1), "alpha": st.floats(0.5, 0.99), "centered": st.just(True)},
    ),
    "adadelta": (AdaDelta, adadelta, {**rate, **decays, **small, "rho": share}),
    "nadam": (
        NAdam,
        nadam,
        {**rate, **decays, **small, **betas, "momentum_decay": st.floats(0, 2)},
    ),
    "lion": (Lion, lion, {**rate, **decays, **betas}),
}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("rule", "literal", "parameters"), ANY.values(), ids=ANY)
@settings(max_examples=25, derandomize=True)
@given(data=st.data())
def test_seven_steps_with_any_hyper_parameters(backend, rule, literal, parameters, dtype, data):
    """To 1e-12 in float64 and 1e-5 in float32, of 1 + the largest parameter."""
    arguments = data.draw(st.fixed_dictionaries(parameters))
    rng = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    start, grads = rng.normal(size=5).astype(dtype), rng.normal(size=(7, 5)).astype(dtype)
    moved = run(backend, rule(**arguments), start, grads)
    wanted = [literal(float(p), grads[:, i].astype(float).tolist(), **arguments) for i, p in enumerate(start)]
    scale = 1 + np.abs(wanted).max()
    np.testing.assert_allclose(moved, wanted, rtol=0, atol=scale * (1e-12 if dtype == np.float64 else 1e-5))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("rule", [rule for rule, *_ in RULES], ids=repr)
def test_padding_stays_exactly_zero(backend, rng, rule, dtype):
    """The zeros between tensors, whose gradient is zero: in theta and in the slots, at any learning rate."""
    n, zero = 9, [2, 3, 8]
    start, grads = rng.normal(size=n).astype(dtype), rng.normal(size=(6, n)).astype(dtype)
    start[zero] = grads[:, zero] = 0
    theta = backend.asarray(start.copy())
    slots = tuple(backend.zeros(n, np.dtype(dtype)) for _ in range(rule.slots))
    for t, (g, lr) in enumerate(zip(grads, [0.0, 1e-3, 0.1, 1.0, 3.0, 7.0], strict=True), 1):
        backend.ops.update(
            rule,
            theta,
            backend.asarray(g),
            slots,
            backend.ops.step_rows(rule, [lr], t)[0],
            backend.xp.zeros(2),
            backend.xp.zeros(1, int),
        )
        for v in map(to_host, (theta, *slots)):
            assert not v[zero].any()
            assert np.isfinite(v).all()
    assert (to_host(theta) != start)[[0, 1, 4, 5, 6, 7]].all()


@pytest.mark.parametrize("rule", [rule for rule, *_ in RULES], ids=repr)
def test_stretch_by_stretch_is_the_same_to_the_bit(rng, rule):
    n, cuts = 1000, [0, 1, 33, 500, 997, 1000]
    start, grads = rng.normal(size=n).astype("f4"), rng.normal(size=(5, n)).astype("f4")
    whole, parts = start.copy(), start.copy()
    of_whole, of_parts = ([np.zeros(n, "f4") for _ in range(rule.slots)] for _ in range(2))
    s = np.empty(n, "f4"), np.empty(n, "f4")
    for t, g in enumerate(grads, 1):
        c = rule.coefficients(rule.lr, t)
        assert all(type(x) is float for x in c)
        rule.apply(np, whole, g, tuple(of_whole), c, s)
        for i, j in itertools.pairwise(cuts):
            stretch = slice(i, j)
            rule.apply(
                np, parts[stretch], g[stretch], tuple(v[stretch] for v in of_parts), c, (s[0][: j - i], s[1][: j - i])
            )
    for a, b in zip((whole, *of_whole), (parts, *of_parts), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("rule", [rule for rule, *_ in RULES], ids=repr)
def test_steps_allocate_no_arrays(rng, rule):
    n = 50_000
    theta, g, slots = rng.normal(size=n), rng.normal(size=n), tuple(np.zeros(n) for _ in range(rule.slots))
    measured, diverged = np.zeros(2), np.zeros(1, int)
    numpy_ops.update(
        rule, theta, g, slots, numpy_ops.step_rows(rule, [1e-3], 1)[0], measured, diverged
    )  # makes the scratch
    tracemalloc.start()
    try:
        for t in (2, 3):
            numpy_ops.update(rule, theta, g, slots, numpy_ops.step_rows(rule, [1e-3], t)[0], measured, diverged)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < n


@pytest.mark.parametrize("rule", [rule for rule, *_ in RULES], ids=repr)
def test_coefficients_depend_on_the_step_alone_and_not_on_what_was_asked_before(rng, rule):
    in_order = [copy.copy(rule).coefficients(0.1, t) for t in range(1, 51)]
    for t in [50, 1, 7, 7, 8, 3, *rng.permutation(np.arange(1, 51)).tolist()]:
        assert rule.coefficients(0.1, t) == in_order[t - 1] == type(rule)(**vars_of(rule)).coefficients(0.1, t)
        assert pickle.loads(pickle.dumps(rule)).coefficients(0.1, t) == in_order[t - 1]


def vars_of(rule):
    return {field.name: getattr(rule, field.name) for field in dataclasses.fields(rule)}


def test_what_nadam_remembers_is_no_part_of_it():
    asked, fresh = NAdam(), NAdam()
    asked.coefficients(0.1, 100)
    assert asked == fresh
    assert hash(asked) == hash(fresh)
    assert repr(asked) == repr(fresh)


def test_nadam_far_into_a_run_is_asked_in_no_time_and_finite():
    """The product of the momenta reaches 0 after some thousand steps; then none are multiplied any more."""
    of_m, of_g, rate, eps = NAdam().coefficients(2e-3, 10**12)
    assert (of_m, rate, eps) == pytest.approx((0.9, 2e-3, 1e-8))
    assert of_g == pytest.approx(0.1)


SLOTS = [
    (SGD(0.1), 0),
    (SGD(0.1, momentum=0.9), 1),
    (Adam(), 2),
    (Adam(amsgrad=True), 3),
    (AdaGrad(), 1),
    (RMSProp(), 1),
    (RMSProp(momentum=0.9), 2),
    (RMSProp(centered=True), 2),
    (RMSProp(momentum=0.9, centered=True), 3),
    (AdaDelta(), 2),
    (NAdam(), 2),
    (Lion(), 1),
]


@pytest.mark.parametrize(("rule", "wanted"), SLOTS, ids=show)
def test_slots(rule, wanted):
    assert rule.slots == wanted
    assert type(rule.slots) is int


def test_centered_rmsprop_survives_a_gradient_that_does_not_change():
    """The variance of it is 0, and by rounding below 0: its root counts as 0, not as not a number."""
    rule, theta, slots, s = RMSProp(centered=True, alpha=0.5, eps=1.0), np.zeros(64, "f4"), [], np.zeros((2, 64), "f4")
    slots = tuple(np.zeros(64, "f4") for _ in range(2))
    g, below = np.linspace(0.1, 3, 64, dtype="f4"), False
    for t in range(1, 60):
        before = theta.copy()
        rule.apply(np, theta, g, slots, rule.coefficients(0.01, t), tuple(s))
        below |= bool((slots[0] - slots[1] ** 2 < 0).any())
    assert below  # else this proves nothing
    np.testing.assert_allclose(before - theta, 0.01 * g, rtol=2e-3)


@pytest.mark.parametrize(
    ("rule", "eps"),
    [
        (Adam, 1e-37),
        (AdamW, 1e-37),
        (NAdam, 1e-37),
        (AdaGrad, 1e-38),
        (RMSProp, 1e-38),
        (lambda eps: RMSProp(eps=eps, centered=True), 1e-20),
        (AdaDelta, 1e-38),
    ],
)
def test_eps_that_vanishes_in_float32_is_refused(rule, eps):
    rule(eps=eps).check(np.dtype(np.float64))
    rule(eps=100 * eps).check(np.dtype(np.float32))
    with pytest.raises(bp.ConfigError, match=r"eps 1e-.* vanishes in float32"):
        rule(eps=eps).check(np.dtype(np.float32))


@pytest.mark.parametrize("rule", [SGD(0.1), Lion()], ids=repr)
def test_rules_without_eps_fit_any_dtype(rule):
    rule.check(np.dtype(np.float32))


@pytest.mark.parametrize(
    "make",
    [
        lambda: SGD(0),
        lambda: SGD(-1),
        lambda: SGD(math.inf),
        lambda: SGD(math.nan),
        lambda: SGD("fast"),
        lambda: SGD("0.1"),
        lambda: SGD(10**400),
        lambda: SGD([0.1, 0.2]),
        lambda: SGD(None),
        lambda: SGD(0.1, momentum=1),
        lambda: SGD(0.1, momentum=-0.1),
        lambda: SGD(0.1, nesterov=True),
        lambda: SGD(0.1, weight_decay=-1),
        lambda: Adam(betas=(1, 0.9)),
        lambda: Adam(betas=(0.9,)),
        lambda: Adam(betas=0.9),
        lambda: Adam(eps=0),
        lambda: AdamW(weight_decay=math.inf),
        lambda: AdaGrad(lr_decay=-1),
        lambda: AdaGrad(eps=0),
        lambda: RMSProp(alpha=1),
        lambda: RMSProp(momentum=1),
        lambda: AdaDelta(rho=1),
        lambda: AdaDelta(rho=-0.1),
        lambda: NAdam(momentum_decay=-1),
        lambda: NAdam(betas=(0.9, 1)),
        lambda: Lion(betas=(1, 0.9)),
        lambda: Lion(lr=0),
        lambda: choose_optimizer("adm"),
        lambda: choose_optimizer("adam", 0),
        lambda: choose_optimizer(None),
        lambda: choose_optimizer(Adam),
        lambda: choose_optimizer("adam:lr=0"),
        lambda: choose_optimizer("adam:betas=0.9"),
        lambda: choose_optimizer("adam:betas=0.9/1"),
        lambda: choose_optimizer("sgd:momentum=0.9,momentum=0.8"),
        lambda: choose_optimizer("sgd:nesterov=true"),
        lambda: choose_optimizer("nesterov:nesterov=false"),
        lambda: choose_optimizer("nesterov:momentum=0"),
        lambda: choose_optimizer("amsgrad:amsgrad=false"),
    ],
)
def test_nonsense_is_refused(make):
    with pytest.raises(bp.ConfigError) as e:
        make()
    assert e.value.cause
    assert e.value.cure


def test_nearest_names_are_offered():
    with pytest.raises(bp.ConfigError, match="did you mean 'adam'"):
        choose_optimizer("adm")


def test_names():
    for name, (lr, _) in OPTIMIZERS.items():
        assert choose_optimizer(name).lr == lr
        assert choose_optimizer(name, 0.5).lr == 0.5
        assert choose_optimizer(f"{name}:lr=0.5") == choose_optimizer(name, 0.5)


def test_presets_and_settings():
    assert choose_optimizer("momentum") == SGD(0.1, momentum=0.9)
    assert choose_optimizer("nesterov") == SGD(0.1, momentum=0.9, nesterov=True)
    assert choose_optimizer("nesterov:momentum=0.5,weight_decay=1e-3") == SGD(0.1, 0.5, True, 1e-3)
    assert choose_optimizer("momentum:momentum=0.5,weight_decay=1e-3") == SGD(0.1, 0.5, False, 1e-3)
    assert choose_optimizer("amsgrad", 0.5) == Adam(0.5, amsgrad=True)
    assert choose_optimizer("amsgrad:betas=0.8/0.9,eps=1e-6,weight_decay=1e-3", 0.5) == Adam(
        0.5, (0.8, 0.9), 1e-6, True, 1e-3
    )
    assert choose_optimizer("sgd:momentum=0.9,nesterov=true,weight_decay=1e-4", 0.2) == SGD(0.2, 0.9, True, 1e-4)
    assert choose_optimizer("rmsprop:centered=true,alpha=0.9", 0.2) == RMSProp(0.2, alpha=0.9, centered=True)
    rule = NAdam(momentum_decay=0.1)
    assert choose_optimizer(rule) is rule


def test_the_learning_rate_is_given_in_one_place():
    with pytest.raises(bp.ConfigError, match="one place"):
        choose_optimizer("adam:lr=0.1", 0.1)


def test_docstrings_tell_the_usual_learning_rates():
    for name in ("adagrad", "rmsprop", "adadelta", "nadam", "lion"):
        lr, rule = OPTIMIZERS[name]
        assert f"networks {lr:g} is a good start" in " ".join(rule.__doc__.split())


@pytest.mark.slow
@pytest.mark.skipif(
    os.environ.get("BACKPROP_GPU_SLOW") != "1", reason="two epochs of MNIST a name: set BACKPROP_GPU_SLOW=1"
)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_two_epochs_of_mnist_at_the_usual_learning_rate(mnist, name):
    train, test = mnist
    net = bp.Network([784, 100, 10], seed=0)
    bp.train(net, train.images, train.labels, optimizer=name, epochs=2, batch_size=128, seed=0)
    accuracy = bp.evaluate(net, test.images, test.labels).accuracy
    print(f"{name}, lr {OPTIMIZERS[name][0]:g}: {100 * accuracy:.2f} %")
    assert accuracy >= (0.90 if name == "sgd" else 0.93)
