"""Weights of samples and classes, and the two reductions."""

import numpy as np
import pytest

import backprop_gpu as bp
from backprop_gpu.backend import to_host
from backprop_gpu.inputs import class_weights


@pytest.fixture
def problem(rng):
    return rng.normal(size=(9, 3)), rng.integers(0, 3, 9), rng.integers(0, 4, 9).astype(float)


def net_on(backend, **settings):
    return bp.Network([3, 4, 3], "tanh", precision="float64", seed=1, backend=backend.name, **settings)


def assert_same(a, b, rtol=1e-11):
    assert a["cost"] == pytest.approx(b["cost"], rel=rtol)
    for kind in ("W", "b"):
        for x, y in zip(a[kind][1:], b[kind][1:], strict=True):
            np.testing.assert_allclose(x, y, rtol=rtol, atol=1e-15)


@pytest.mark.parametrize("cost", [None, "squared_error", "norm", "huber", "mae"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_whole_weight_is_as_many_copies(backend, problem, cost, reduction):
    X, T, w = problem
    copies = np.repeat(np.arange(9), w.astype(int))
    net = net_on(backend)
    weighted = net.gradients(X, T, cost, sample_weight=w, reduction=reduction)
    assert_same(weighted, net.gradients(X[copies], T[copies], cost, reduction=reduction))
    assert bp.gradient_check(net, X, T, cost, sample_weight=w, reduction=reduction)
    page = net.backward(X, T, cost, sample_weight=w, reduction=reduction)
    assert_same(page, weighted, 1e-15)
    np.testing.assert_allclose(page["Delta"][1], net.backward(X, T, cost)["Delta"][1], rtol=1e-13)  # without weights


def test_the_sum_is_m_times_the_mean(backend, problem):
    X, T, _ = problem
    net = net_on(backend)
    mean, total = net.gradients(X, T), net.gradients(X, T, reduction="sum")
    assert total["cost"] == pytest.approx(9 * mean["cost"])
    np.testing.assert_allclose(total["W"][1], 9 * mean["W"][1], rtol=1e-12)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_training_weighs_each_batch_by_its_own_sum(backend, problem, reduction):
    X, T, w = problem
    w[4:8] = 0  # a batch in which nothing counts: no step
    net, hand = net_on(backend), net_on(backend).to("numpy")
    history = bp.train(
        net,
        X,
        T,
        optimizer=bp.SGD(0.2),
        epochs=2,
        batch_size=4,
        batches="in_order",
        sample_weight=w,
        reduction=reduction,
    )
    costs = []
    for _ in range(2):
        total = 0.0
        for rows in (slice(0, 4), slice(8, 9)):
            if not w[rows].any():
                continue
            page = hand.gradients(X[rows], T[rows], sample_weight=w[rows], reduction=reduction)
            total += page["cost"] * (w[rows].sum() if reduction == "mean" else 1)
            for l in (1, 2):
                hand.W[l][...] -= 0.2 * page["W"][l]
                hand.b[l][...] -= 0.2 * page["b"][l]
        costs.append(total / (w.sum() if reduction == "mean" else 1))
    np.testing.assert_allclose(to_host(net.theta), hand.theta, rtol=1e-10, atol=1e-13)
    np.testing.assert_allclose(history.train_cost, costs, rtol=1e-11)
    found = bp.evaluate(net, X, T, sample_weight=w, reduction=reduction)
    assert found.cost == pytest.approx(hand.gradients(X, T, sample_weight=w, reduction=reduction)["cost"], rel=1e-10)


def test_class_weights_are_sample_weights(backend, problem):
    X, T, w = problem
    for given, by_class in (
        ({0: 2.0, 2: 0.5}, [2.0, 1.0, 0.5]),
        ([1, 2, 3], [1.0, 2.0, 3.0]),
        ("balanced", 9 / (len(np.unique(T)) * np.maximum(1, np.bincount(T, minlength=3)))),
    ):
        nets = [net_on(backend) for _ in range(2)]
        bp.train(nets[0], X, T, epochs=2, class_weight=given, sample_weight=w)
        bp.train(nets[1], X, T, epochs=2, sample_weight=w * np.array(by_class)[T])
        np.testing.assert_array_equal(to_host(nets[0].theta), to_host(nets[1].theta))


@pytest.mark.parametrize(
    ("T", "classes", "settings"),
    [
        (np.array([[0.1, 0.9], [0.8, 0.2], [0.3, 0.7]]), [1, 0, 1], {"output": "softmax"}),
        (np.array([1.0, 0.0, 1.0]), [1, 0, 1], {"output": "sigmoid"}),
        (np.array([1.0, 0.5, 0.6]), [1, 0, 1], {"output": "sigmoid"}),
    ],
    ids=["rows", "one output", "one half"],
)
def test_class_weights_of_rows_and_of_one_output(T, classes, settings):
    X, K = np.eye(3), 1 if T.ndim == 1 else 2
    nets = [bp.Network([3, K], backend="numpy", **settings) for _ in range(2)]
    bp.train(nets[0], X, T, optimizer=bp.SGD(0.1), epochs=1, class_weight=[1, 5])
    bp.train(nets[1], X, T, optimizer=bp.SGD(0.1), epochs=1, sample_weight=[1 + 4 * c for c in classes])
    np.testing.assert_array_equal(nets[0].theta, nets[1].theta)


def test_weights_are_split_with_their_samples(rng):
    """A share split off for validation takes its weights along: to weigh some 0 is to leave them out, of both parts."""
    X, T = rng.normal(size=(40, 3)), rng.integers(0, 3, 40)
    w = np.where(np.arange(40) % 2, 0.0, 1.5)
    net = bp.Network([3, 3], precision="float64", backend="numpy")
    history = bp.train(net, X, T, epochs=1, validation=0.25, sample_weight=w, batch_size="full", seed=3)
    from backprop_gpu.batches import split_off

    stay, held = split_off(40, 0.25, 3)
    counts = held[w[held] > 0]
    assert history.validation_cost[0] == pytest.approx(bp.evaluate(net, X[counts], T[counts]).cost, rel=1e-12)
    start = bp.Network([3, 3], precision="float64", backend="numpy")
    counts = stay[w[stay] > 0]
    assert history.train_cost[0] == pytest.approx(bp.evaluate(start, X[counts], T[counts]).cost, rel=1e-12)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"sample_weight": [1, 2]}, "shape (2,) for 3 samples"),
        ({"sample_weight": [[1], [2], [3]]}, "shape (3, 1)"),
        ({"sample_weight": [1, -1, 1]}, "at row 1"),
        ({"sample_weight": [1, 1, np.nan]}, "at row 2"),
        ({"sample_weight": [1, np.inf, 1]}, "at row 1"),
        ({"sample_weight": [1, 1e39, 1], "reduction": "sum"}, "too large for float32 at row 1"),
        ({"sample_weight": [1e-50] * 3, "reduction": "sum"}, "all of sample_weight is 0"),
        ({"sample_weight": [1, 0, 0], "validation": 0.34, "seed": 3}, "all of the weights"),
        ({"sample_weight": [0, 0, 0]}, "all of sample_weight is 0"),
        ({"sample_weight": ["a", "b", "c"]}, "dtype"),
        ({"class_weight": "fair"}, "'fair'"),
        ({"class_weight": {2: 1.0}}, "label 2"),
        ({"class_weight": {0: -1.0}}, "-1.0"),
        ({"class_weight": {"0": 1.0}}, "label '0'"),
        ({"class_weight": [1.0]}, "[1.0]"),
        ({"class_weight": {0: 0, 1: 0}}, "all of class_weight is 0"),
    ],
    ids=repr,
)
def test_bad_weights_are_refused_before_anything_moves(settings, words):
    net = bp.Network([2, 2], backend="numpy")
    before = net.theta.copy()
    with pytest.raises((bp.DataError, bp.ConfigError)) as caught:
        bp.train(net, np.zeros((3, 2)), [0, 1, 0], **settings)
    assert words in caught.value.cause
    np.testing.assert_array_equal(net.theta, before)


def test_an_unknown_reduction_is_refused():
    for call in (bp.train, bp.evaluate, lambda *a, **k: bp.Network.gradients(*a, **k)):
        with pytest.raises(bp.ConfigError, match="did you mean 'sum'"):
            call(bp.Network([2, 2], backend="numpy"), np.zeros((3, 2)), [0, 1, 0], reduction="summ")


def test_balanced_weights_heed_the_classes_that_are_there():
    """m / (classes there are x samples of the class): one that has no sample does not count."""
    weights = class_weights("balanced", np.array([0, 2, 0, 0]), 4, "softmax")
    np.testing.assert_allclose(weights, [4 / (2 * 3), 4 / (2 * 1), 4 / (2 * 3), 4 / (2 * 3)])
    np.testing.assert_array_equal(class_weights("balanced", np.array([1]), 2, "softmax"), [1])


@pytest.mark.parametrize("scale", [1e-45, 1e-30, 3e37, 1e300])
def test_the_mean_knows_no_scale_of_the_weights(backend, problem, scale):
    """In float32, whose range the weights and their sum may leave."""
    X, T, w = problem
    nets = [bp.Network([3, 4, 3], seed=1, backend=backend.name) for _ in range(2)]
    histories = [
        bp.train(net, X, T, optimizer=bp.SGD(0.2), epochs=2, sample_weight=by, validation=0.3)
        for net, by in zip(nets, (w + 1, scale * (w + 1)), strict=True)
    ]
    np.testing.assert_allclose(to_host(nets[1].theta), to_host(nets[0].theta), rtol=1e-5)
    np.testing.assert_allclose(histories[1].train_cost, histories[0].train_cost, rtol=1e-6)
    np.testing.assert_allclose(histories[1].validation_cost, histories[0].validation_cost, rtol=1e-6)
    costs = [net.gradients(X, T, sample_weight=scale * (w + 1))["cost"] for net in nets]
    np.testing.assert_allclose(costs[0], bp.evaluate(nets[0], X, T, sample_weight=w + 1).cost, rtol=1e-6)


@pytest.mark.parametrize(("output", "T"), [("sigmoid", np.eye(3)), ("identity", np.eye(3)), ("softmax", None)])
def test_class_weights_want_classes(output, T):
    if T is None:  # rows of probabilities have a largest entry
        bp.train(bp.Network([2, 3], backend="numpy"), np.zeros((3, 2)), np.eye(3), epochs=1, class_weight=[1, 2, 3])
        return
    with pytest.raises(bp.ConfigError, match="class_weight without classes"):
        bp.train(bp.Network([2, 3], output=output, backend="numpy"), np.zeros((3, 2)), T, class_weight=[1, 2, 3])
