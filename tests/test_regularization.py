"""Penalties, clipping, label smoothing: each against the formula written out, and in training against steps by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import backprop_gpu as bp
from backprop_gpu.backend import to_host
from backprop_gpu.regularization import Regularization


def shaped_by_hand(theta, is_weight, g, l1, l2, clip_norm, clip_value):
    g = [
        gi + w * (l1 * ((t > 0) - (t < 0)) + l2 * t)
        for t, w, gi in zip(theta.tolist(), is_weight.tolist(), g.tolist(), strict=True)
    ]
    if clip_value:
        g = [min(max(gi, -clip_value), clip_value) for gi in g]
    length = sum(gi**2 for gi in g) ** 0.5
    if clip_norm and length > clip_norm:
        g = [gi * clip_norm / length for gi in g]
    return g


strengths = st.sampled_from([0.0, 0.03, 2.0])
limits = st.sampled_from([None, 0.2, 1.5, 1e6])


@given(l1=strengths, l2=strengths, clip_norm=limits, clip_value=limits, seed=st.integers(0, 99))
def test_the_gradient_is_shaped_as_the_formula_says(backend, l1, l2, clip_norm, clip_value, seed):
    rng = np.random.default_rng(seed)
    theta, g, is_weight = rng.normal(size=37), rng.normal(size=37), (rng.random(37) < 0.7).astype(float)
    theta[:3] = 0
    arrays = [backend.xp.asarray(a.copy()) for a in (theta, is_weight, g)]
    backend.ops.regularize(Regularization(l1, l2, clip_norm, clip_value), *arrays)
    wanted = shaped_by_hand(theta, is_weight, g, l1, l2, clip_norm, clip_value)
    np.testing.assert_allclose(to_host(arrays[2]), wanted, rtol=1e-13, atol=1e-15)
    np.testing.assert_array_equal(to_host(arrays[0]), theta)


def test_clipping_a_gradient_of_zeros_leaves_zeros(backend):
    g, theta, is_weight = (backend.xp.zeros(5) for _ in range(3))
    backend.ops.regularize(Regularization(clip_norm=1.0), theta, is_weight, g)
    assert to_host(g).tolist() == [0] * 5


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_penalties_enter_cost_and_gradient_of_weights_alone(backend, rng, reduction):
    net = bp.Network([3, 4, 2], "tanh", precision="float64", backend=backend.name)
    net.b[1][...] = 0.5
    X, T = rng.normal(size=(5, 3)), rng.integers(0, 2, 5)
    plain = net.gradients(X, T, reduction=reduction)
    full = net.gradients(X, T, l1=0.1, l2=0.7, reduction=reduction)
    W = [to_host(w) for w in net.W[1:]]
    penalty = sum(0.1 * np.abs(w).sum() + 0.35 * (w**2).sum() for w in W)
    assert full["cost"] == pytest.approx(plain["cost"] + penalty, rel=1e-13)
    for l in (1, 2):
        np.testing.assert_allclose(
            full["W"][l], plain["W"][l] + 0.1 * np.sign(W[l - 1]) + 0.7 * W[l - 1], rtol=1e-12, atol=1e-15
        )
        np.testing.assert_array_equal(full["b"][l], plain["b"][l])
    assert bp.gradient_check(net, X, T, l1=0.1, l2=0.7, reduction=reduction)


@pytest.mark.parametrize(
    "settings",
    [
        {"l1": 0.01, "l2": 0.1},
        {"clip_norm": 0.1},
        {"clip_value": 0.01},
        {"l2": 0.3, "clip_norm": 0.2, "clip_value": 0.05},
    ],
    ids=repr,
)
def test_training_shapes_every_step(backend, rng, settings):
    X, T = rng.normal(size=(8, 3)), rng.integers(0, 2, 8)
    net = bp.Network([3, 4, 2], "tanh", precision="float64", backend=backend.name)
    hand = net.to("numpy")
    history = bp.train(net, X, T, optimizer=bp.SGD(0.5), epochs=3, batch_size=4, batches="in_order", **settings)
    is_weight, costs = hand.weight_mask(), []
    given_settings = {"l1": 0.0, "l2": 0.0, "clip_norm": None, "clip_value": None, **settings}
    for _ in range(3):
        for rows in (slice(0, 4), slice(4, 8)):
            page = hand.gradients(X[rows], T[rows])
            costs.append(page["cost"])
            flat = hand.to("numpy")
            flat.theta[...] = 0
            for l in (1, 2):
                flat.W[l][...], flat.b[l][...] = page["W"][l], page["b"][l]
            hand.theta[...] -= 0.5 * np.array(shaped_by_hand(hand.theta, is_weight, flat.theta, **given_settings))
    np.testing.assert_allclose(to_host(net.theta), hand.theta, rtol=1e-10, atol=1e-13)
    np.testing.assert_allclose(history.train_cost, np.reshape(costs, (3, 2)).mean(axis=1), rtol=1e-11)  # no penalties


@pytest.mark.parametrize("kind", ["labels", "rows"])
def test_smoothed_targets_are_targets_smoothed(backend, rng, kind):
    """(1 - e) t + e/K under softmax, (1 - e) t + e/2 under sigmoid, as if one had passed such targets."""
    X, e = rng.normal(size=(6, 3)), 0.2
    labels = rng.integers(0, 4, 6)
    softmax = bp.Network([3, 4], precision="float64", backend=backend.name)
    T = labels if kind == "labels" else rng.dirichlet(np.ones(4), 6)
    rows = np.eye(4)[labels] if kind == "labels" else T
    found = softmax.gradients(X, T, label_smoothing=e)
    wanted = softmax.gradients(X, (1 - e) * rows + e / 4)
    assert found["cost"] == pytest.approx(wanted["cost"], rel=1e-13)
    np.testing.assert_allclose(found["W"][1], wanted["W"][1], rtol=1e-11, atol=1e-15)
    sigmoid = bp.Network([3, 4], output="sigmoid", precision="float64", backend=backend.name)
    T = labels if kind == "labels" else rng.integers(0, 2, (6, 4))
    rows = np.eye(4)[labels] if kind == "labels" else T
    found = sigmoid.gradients(X, T, label_smoothing=e)
    wanted = sigmoid.gradients(X, (1 - e) * rows + e / 2)
    assert found["cost"] == pytest.approx(wanted["cost"], rel=1e-13)
    np.testing.assert_allclose(found["W"][1], wanted["W"][1], rtol=1e-11, atol=1e-15)


def test_validation_and_evaluation_see_targets_as_they_are(rng):
    X, T = rng.normal(size=(20, 3)), rng.integers(0, 2, 20)
    net = bp.Network([3, 2], precision="float64", backend="numpy")
    history = bp.train(net, X, T, epochs=1, validation=(X, T), label_smoothing=0.3, l2=1.0)
    assert history.validation_cost == [pytest.approx(net.gradients(X, T)["cost"], rel=1e-13)]
    assert bp.evaluate(net, X, T).cost == pytest.approx(history.validation_cost[0], rel=1e-15)


@pytest.mark.parametrize(
    "settings",
    [
        {"l1": -1},
        {"l2": float("inf")},
        {"l2": "much"},
        {"clip_norm": 0},
        {"clip_value": -1},
        {"clip_norm": float("nan")},
        {"label_smoothing": 1.5},
        {"label_smoothing": -0.1},
        {"cost": "squared_error", "label_smoothing": 0.1},
    ],
    ids=repr,
)
def test_nonsense_is_refused(settings):
    with pytest.raises(bp.ConfigError) as caught:
        bp.train(bp.Network([2, 2], backend="numpy"), np.zeros((3, 2)), [0, 1, 0], **settings)
    assert next(iter(set(settings) - {"cost"})) in caught.value.cause


@pytest.mark.parametrize("settings", [{"clip_norm": 1.0}, {"clip_value": 1.0}, {"clip_norm": 1.0, "clip_value": 1.0}])
@pytest.mark.parametrize("x", [2e19, 1e25])
def test_clipping_does_not_hide_a_gradient_that_is_not_finite(backend, settings, x):
    """2e19 has a square that is infinite in float32; behind a weight of 1e25 the second gradient is infinite itself."""
    net = bp.Network([1, 1, 1], "identity", "identity", bias=False, backend=backend.name)
    net.W[1][...], net.W[2][...] = 1e-25, (1.0 if x == 2e19 else 1e25)
    before = to_host(net.theta).copy()
    with pytest.raises(bp.DivergenceError):
        bp.train(net, np.full((4, 1), x, np.float32), np.zeros((4, 1)), cost="mae", optimizer=bp.SGD(1e-30), **settings)
    np.testing.assert_array_equal(to_host(net.theta), before)


def test_a_smoothed_cost_stays_smoothed(rng):
    from backprop_gpu.costs import COSTS

    X, T = rng.normal(size=(6, 3)), rng.integers(0, 4, 6)
    net, smoothed = bp.Network([3, 4], precision="float64", backend="numpy"), COSTS["cross_entropy"].smoothed(0.3)
    wanted = net.gradients(X, T, label_smoothing=0.3)["cost"]
    assert net.gradients(X, T, smoothed)["cost"] == wanted
    assert bp.evaluate(net, X, T, smoothed).cost == pytest.approx(wanted, rel=1e-14)
    assert bp.train(net, X, T, smoothed, epochs=1).train_cost[0] == pytest.approx(wanted, rel=1e-14)
