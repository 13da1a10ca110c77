"""Backpropagation against central differences in float64, for every combination that is legal."""

import itertools

import numpy as np
import pytest

import backprop_gpu as bp
from backprop_gpu import inputs
from backprop_gpu.activations import HIDDEN, OUTPUT
from backprop_gpu.costs import COSTS, choose_cost
from backprop_gpu.gradient_checks import _cost_alone

EPS = 1e-5
TOLERANCE = 1e-7
KINKED = {"relu", "leaky_relu", "elu"}  # f' or f'' jumps at 0: points near it are drawn again

CANONICAL = {"cross_entropy", "binary_cross_entropy"}
PAIRS = [
    (c.name, g)
    for c in COSTS.values()
    for g in (OUTPUT if c.name == "squared_error" else c.outputs or ("softmax", "sigmoid", "gelu", "identity"))
]
CASES = [
    (f, cost, g, bias, hidden)
    for (cost, g), bias, hidden in itertools.product(PAIRS, (True, False), range(4))
    for f in (HIDDEN if hidden and cost in {*CANONICAL, "squared_error"} else ["tanh"])
]


def problem(f, cost, g, bias, hidden, m=5):
    """A network, X and T whose every Z is well away from a kink, and whose gradients are not lost in rounding."""
    layers = [3, 4, 5, 4][: hidden + 1] + [3]
    for seed in range(200):
        rng = np.random.default_rng(seed)
        net = bp.Network(
            layers, hidden=f, output=g, init="glorot", bias=bias, precision="float64", seed=seed, backend="numpy"
        )
        net.theta[...] *= 1 + seed % 3 / 2
        for b in net.b[1:]:
            if b is not None:
                b[...] = rng.normal(0, 0.3, b.shape)
        X = rng.normal(size=(m, 3))
        if cost == "cross_entropy":
            T = rng.integers(0, 3, m) if seed % 2 else rng.dirichlet(np.ones(3), m)
        elif cost == "binary_cross_entropy":
            T = rng.integers(0, 2, (m, 3)) if seed % 2 else rng.random((m, 3))
        else:
            T = rng.integers(0, 3, m) if seed % 2 else rng.normal(size=(m, 3))
        page = net.backward(X, T, cost)
        functions = [f] * hidden + [g]
        near = [np.abs(Z).min() for Z, h in zip(page["Z"][1:], functions, strict=True) if h in KINKED]
        error = np.abs(page["A"][-1] - (np.eye(3)[T] if np.ndim(T) == 1 else T))
        near += {"mae": [error.min()], "huber": [np.abs(error - 1).min()]}.get(cost, [])
        # A difference of two costs is exact to about 1e-16 C, the quotient to 1e-11 C: gradients must stand above that.
        small = min(np.sqrt(np.mean(d**2)) for d in (*page["W"][1:], *page["b"][1:]) if d is not None)
        if (not near or min(near) > 1e3 * EPS) and small > 1e-3 * page["cost"]:
            return net, X, T, page
    raise AssertionError("no well-conditioned point away from every kink")


def relative_error(n, g):
    scale = max(np.linalg.norm(n), np.linalg.norm(g))
    return np.linalg.norm(n - g) / scale if scale else 0.0


def numeric(net, parameter, cost_at):
    out = np.empty_like(parameter)
    for i in np.ndindex(parameter.shape):
        old = parameter[i]
        parameter[i] = old + EPS
        up = cost_at()
        parameter[i] = old - EPS
        down = cost_at()
        parameter[i] = old
        out[i] = (up - down) / (2 * EPS)
    return out


@pytest.mark.parametrize(("f", "cost", "g", "bias", "hidden"), CASES)
def test_against_central_differences(f, cost, g, bias, hidden):
    net, X, T, page = problem(f, cost, g, bias, hidden)
    # The cost by the forward pass alone, which takes half the time of `gradients`; of that its own is asked once.
    cost_at = _cost_alone(net, X, inputs.targets(T, len(X), 3, cost, X.dtype), choose_cost(cost, g))
    assert cost_at() == pytest.approx(net.gradients(X, T, cost)["cost"], rel=1e-14)
    for kind, parameters in (("W", net.W), ("b", net.b)):
        for l in range(1, net.L + 1):
            if parameters[l] is None:
                assert page[kind][l] is None
                continue
            n = numeric(net, parameters[l], cost_at)
            assert relative_error(n, page[kind][l]) <= TOLERANCE, (kind, l)


@pytest.mark.parametrize("hidden", range(4))
@pytest.mark.parametrize(("cost", "g"), PAIRS)
def test_batch_gradient_is_mean_of_sample_gradients(cost, g, hidden):
    net, X, T, page = problem("tanh", cost, g, True, hidden)
    singles = [net.gradients(X[i : i + 1], T[i : i + 1], cost) for i in range(len(X))]
    np.testing.assert_allclose(page["cost"], np.mean([s["cost"] for s in singles]), rtol=1e-13)
    for kind in ("W", "b"):
        for l in range(1, net.L + 1):
            mean = np.mean([s[kind][l] for s in singles], axis=0)
            np.testing.assert_allclose(page[kind][l], mean, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(("cost", "g"), PAIRS)
def test_the_page_holds_what_the_notes_say(cost, g):
    """Each equation of the page, from the page's own arrays (columns of the notes are rows here)."""
    net, X, T, page = problem("gelu", cost, g, True, 2)
    Z, A, Delta, m = page["Z"], page["A"], page["Delta"], len(X)
    np.testing.assert_array_equal(A[0], X)
    for l in range(1, 4):
        np.testing.assert_allclose(Z[l], A[l - 1] @ net.W[l].T + net.b[l], rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(page["W"][l], Delta[l].T @ A[l - 1] / m, rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(page["b"][l], Delta[l].mean(axis=0), rtol=1e-12, atol=1e-14)
    np.testing.assert_array_equal(A[3], net.forward(X))
    if cost in CANONICAL:
        one_hot = np.eye(3)[T] if np.ndim(T) == 1 else T
        np.testing.assert_allclose(Delta[3], A[3] - one_hot, rtol=1e-12, atol=1e-14)
    again = net.gradients(X, T, cost)
    assert again["cost"] == page["cost"]
    np.testing.assert_array_equal(again["W"][1], page["W"][1])
