"""Ten steps of each optimizer against the rule written out for one number, and hyper-parameters that make no sense."""

import math

import numpy as np
import pytest

import backprop_gpu as bp
from backprop_gpu import SGD, Adam, AdamW
from backprop_gpu.backend import to_host
from backprop_gpu.optimizers import OPTIMIZERS, choose_optimizer
from backprop_gpu.schedules import SCHEDULES, choose_schedule


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


@pytest.mark.parametrize(
    ("rule", "literal", "settings"), RULES, ids=lambda x: repr(x) if isinstance(x, SGD | Adam) else ""
)
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
        backend.ops.update(rule, theta, kept, slots, rule.lr, t, measured, diverged)
        np.testing.assert_array_equal(to_host(kept), g)
    wanted = [literal(float(p), grads[:, i].astype(float).tolist(), **settings) for i, p in enumerate(start)]
    np.testing.assert_allclose(
        to_host(theta), wanted, rtol=1e-12 if dtype == np.float64 else 1e-5, atol=1e-12 if dtype == np.float64 else 1e-6
    )


@pytest.mark.parametrize(
    ("rule", "literal", "settings"), RULES, ids=lambda x: repr(x) if isinstance(x, SGD | Adam) else ""
)
def test_a_learning_rate_that_varies_from_step_to_step_and_starts_at_zero(backend, rng, rule, literal, settings):
    """Warm-up from 0, as a schedule gives it: the rate that counts is the step's, in the decay too."""
    n, lrs = 9, [0.0, 0.05, 0.2, 0.1]
    start, grads = rng.normal(size=n), rng.normal(size=(len(lrs), n))
    theta, slots = backend.asarray(start.copy()), tuple(backend.zeros(n, np.dtype(float)) for _ in range(rule.slots))
    for t, (g, lr) in enumerate(zip(grads, lrs, strict=True), 1):
        backend.ops.update(rule, theta, backend.asarray(g), slots, lr, t, backend.xp.zeros(2), backend.xp.zeros(1, int))
    wanted = [literal(float(p), grads[:, i].tolist(), **{**settings, "lr": lrs}) for i, p in enumerate(start)]
    np.testing.assert_allclose(to_host(theta), wanted, rtol=1e-12)


def test_zero_gradients_leave_padding_at_zero():
    """The zeros between tensors stay zeros under every rule."""
    from backprop_gpu import numpy_ops

    for rule, *_ in RULES:
        theta = np.zeros(5)
        numpy_ops.update(
            rule,
            theta,
            np.zeros(5),
            tuple(np.zeros(5) for _ in range(rule.slots)),
            0.1,
            1,
            np.zeros(2),
            np.zeros(1, int),
        )
        assert not theta.any()


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
        lambda: choose_optimizer("adm"),
        lambda: choose_optimizer("adam", 0),
        lambda: choose_schedule("cosin"),
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
    assert choose_optimizer("nesterov") == SGD(0.1, momentum=0.9, nesterov=True)


def test_schedules():
    assert [SCHEDULES["constant"](s, 10) for s in (0, 5, 9)] == [1, 1, 1]
    cosine = [SCHEDULES["cosine"](s, 4) for s in range(4)]
    np.testing.assert_allclose(cosine, [1, 0.5 + math.sqrt(0.5) / 2, 0.5, 0.5 - math.sqrt(0.5) / 2])
    assert choose_schedule(None)(3, 7) == 1
    assert choose_schedule(lambda step, total: 0.25)(3, 7) == 0.25
